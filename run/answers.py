"""Files of graded answers: read, write, count by group, and compare two of them in pairs."""

import itertools
import json
import math
from pathlib import Path

from data.problems import json_rows
from system.errors import UserError, printable

GROUPS = ("level", "subject", "type", "kind")  # what problems are counted by
NORMAL = 1.959964  # quantile of the standard normal distribution for two-sided 95 % intervals


def read_answers(path: str, *keys: str) -> list[dict]:
    """Return the rows of a JSONL file; UserError names a line that lacks one of these keys."""
    rows = json_rows(Path(path))
    for row, where in rows:
        if not row.keys() >= set(keys):
            raise UserError(f"{where} is no graded answer: it needs {', '.join(keys)}")
    if not rows:
        raise UserError(f"{path} holds no answers: give another file")
    return [row for row, _ in rows]


def write_answers(name: str, rows: list[dict]) -> Path:
    """Write one object a line, under this name or else the first free runs/answers-N.jsonl."""
    numbered = (Path(f"runs/answers-{n}.jsonl") for n in itertools.count(1))
    path = Path(name) if name else next(path for path in numbered if not path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII, because a model can write half of a surrogate pair, for which UTF-8 has no bytes.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
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
                label = f"  {name} {printable(str(row[name])):24}"
                groups.setdefault(label, []).append(row)
    for label, members in groups.items():
        n = len(members)
        right = sum(row["verdict"] for row in members)
        said = rates(with_intervals(dict(right=right / n), n))
        print(f"{label} {right} of {n}: {said['right']}")


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947, Psychometrika 12, 153-157)."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_difference(only_a: int, only_b: int, n: int) -> tuple[float, float, float]:
    """Return b's accuracy minus a's on the same n problems and its 95 % interval: Wald's, after one
    is added to each discordant count (Bonett and Price 2012, J. Educ. Behav. Stat. 37, 479-488)."""
    total = n + 2
    middle = (only_b - only_a) / total
    discordant = (only_a + only_b + 2) / total
    spread = NORMAL * math.sqrt((discordant - middle**2) / total)
    return (only_b - only_a) / n, max(-1.0, middle - spread), min(1.0, middle + spread)


def compare(first: str, second: str) -> str:
    """Return, in words, how the greedy answers of two files differ on the problems of both."""
    verdicts = []  # of each file, {(problem, gold answer): right or not}
    for path in (first, second):
        rows = read_answers(path, "gold", "completion", "verdict")
        greedy = [r for r in rows if r.get("sample") is None]
        right = {(str(r.get("problem")), str(r["gold"])): bool(r["verdict"]) for r in greedy}
        verdicts.append(right)
    before, after = verdicts
    pairs = [(before[key], after[key]) for key in before.keys() & after.keys()]
    if not pairs:
        raise UserError(f"{first} and {second} share no greedily answered problem")
    n = len(pairs)
    lost = pairs.count((True, False))
    won = pairs.count((False, True))
    p = mcnemar(lost, won)
    old, new = (100 * sum(right) / n for right in zip(*pairs, strict=True))
    difference, low, high = (100 * x for x in paired_difference(lost, won, n))
    said = f"{n} problems: {old:.1f} % -> {new:.1f} %, difference {difference:+.1f} points "
    said += f"[{low:+.1f}, {high:+.1f}], {lost} lost and {won} won, exact McNemar p = {p:.3g}"
    return said
