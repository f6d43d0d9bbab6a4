"""Files of graded answers: read, write, count by group."""

import itertools
import math
from pathlib import Path

from data.problems import columns, gold_of, names_of, with_golds
from data.tables import data_rows
from system.errors import UserError, printable
from system.files import read_lines, to_json, write_whole

GROUPS = ("level", "subject", "type", "kind")  # what problems are counted by
NORMAL = 1.959964  # quantile of the standard normal distribution for two-sided 95 % intervals


def read_answers(path: str, *keys: str) -> list[dict]:
    """Return the rows of a JSONL file; UserError names a line that lacks one of these keys."""
    rows = []
    for row, where in read_lines(path):
        if not row.keys() >= set(keys):
            raise UserError(f"{where} is no graded answer: it needs {', '.join(keys)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no answers: give another file")
    return rows


def read_completions(path: str) -> list[dict]:
    """Return the rows of a data file of completions, each with its `gold` answer: it is in any
    column and form that a problem may have it in. UserError names a row that lacks one of them."""
    rows = []
    for row, where in data_rows(Path(path)):
        gold = gold_of(columns({**row, "completion": None}))
        if "completion" not in row or gold is None:
            wanted = "`completion`, and `gold` or `answer`"
            raise UserError(f"{where} is no answer: it needs {wanted}, and has {names_of(row)}")
        rows.append(row | dict(gold=gold))
    return with_golds(rows, path, "gold")


def write_answers(name: str, rows: list[dict]) -> Path:
    """Write one object a line, under this name or else the first free runs/answers-N.jsonl."""
    numbered = (Path(f"runs/answers-{n}.jsonl") for n in itertools.count(1))
    path = Path(name) if name else next(path for path in numbered if not path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII, because a model can write half of a surrogate pair, for which UTF-8 has no bytes.
    write_whole(path, "".join(to_json(row) + "\n" for row in rows).encode("ascii"))
    return path


def with_problems(rows: list[dict], problems: list[dict]) -> list[dict]:
    """Return answers with the text and the groups of their problem in place of its index."""
    told = []
    for row in rows:
        problem = problems[row.pop("index")]
        told.append({key: problem[key] for key in ("problem", *GROUPS) if key in problem} | row)
    return told


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927, J. Am. Stat. Assoc. 22, 209-212) of a mean over n
    problems. It is made for values of 0 and 1; for values between them it is wider than needed."""
    a = NORMAL**2 / n
    center = mean + a / 2
    spread = math.sqrt(a * (mean * (1 - mean) + a / 4))
    return (center - spread) / (1 + a), (center + spread) / (1 + a)


def with_intervals(rates: dict, n: int) -> dict:
    """Return rates over n problems and, under KEY_95, their 95 % intervals to 4 decimals."""
    return rates | {f"{k}_95": [round(end, 4) for end in wilson(x, n)] for k, x in rates.items()}


def rates(result) -> dict:
    """Return the rates of a result that have an interval, as text such as `52.4 % [48.2, 56.6]`."""
    said = {}
    for key in result:
        if f"{key}_95" in result:
            low, high = result[f"{key}_95"]
            said[key] = f"{100 * result[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return said


def in_words(result) -> str:
    """Return what an evaluation found, a rate a line."""
    lines = [f"{key:8} {rate}\n" for key, rate in rates(result).items()]
    boxed = f"{100 * result['boxed']:.1f} % of the greedy completions give a boxed answer and end"
    return f"{result['n']} problems, 95 % intervals in brackets\n{''.join(lines)}{boxed}"


def print_groups(rows):
    """Print how many rows are right: of all, and by level, subject, type and kind."""
    if not rows:
        return print("right 0 of 0")
    groups = {"right": rows}
    for name in GROUPS:
        for row in sorted(rows, key=lambda row: str(row.get(name))):
            if name in row:
                label = printable(str(row[name]))
                groups.setdefault(f"  {name} {label:24}", []).append(row)
    for label, members in groups.items():
        n = len(members)
        right = sum(row["verdict"] for row in members)
        said = rates(with_intervals(dict(right=right / n), n))
        print(f"{label} {right} of {n}: {said['right']}")
