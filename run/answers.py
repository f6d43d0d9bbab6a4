"""Files of graded answers: read, written, counted by group, and two of them compared."""

import itertools
import json
import math
from pathlib import Path

from data.problems import json_rows
from system.errors import UserError, printable

GROUPS = ("level", "subject", "type", "kind")  # of problems

NORMAL = 1.959964  # quantile of the standard normal distribution for two-sided 95 % intervals


def read_answers(path: str, *keys: str) -> list[dict]:
    """The rows of a JSONL file; UserError says which line has not all of these keys."""
    rows = json_rows(Path(path))
    for row, where in rows:
        if not all(key in row for key in keys):
            raise UserError(f"{where} is no graded answer: it needs {', '.join(keys)}")
    if not rows:
        raise UserError(f"{path} holds no answers: give another file")
    return [row for row, _ in rows]


def write_answers(name: str, rows: list[dict]) -> Path:
    """Write one object a line, under this name or else the first free runs/answers-N.jsonl."""
    free = (Path("runs", f"answers-{i}.jsonl") for i in itertools.count(1))
    path = Path(name) if name else next(p for p in free if not p.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII, because a model can write half of a surrogate pair, for which UTF-8 has no bytes.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    return path


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean over n problems of values in [0, 1] (exact for 0 and 1)."""
    a = NORMAL**2 / n  # the squared normal quantile, per problem
    center, spread = mean + a / 2, math.sqrt(a * (mean * (1 - mean) + a / 4))
    return (center - spread) / (1 + a), (center + spread) / (1 + a)


def rates(result) -> list[str]:
    """The keys of a result that are rates with an interval."""
    return [key for key in result if f"{key}_95" in result]


def with_interval(result, key) -> str:
    """Such as `52.4 % [48.2, 56.6]`."""
    low, high = result[f"{key}_95"]
    return f"{100 * result[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def print_groups(rows):
    """How many rows are right, of all and by level, subject, ..., with Wilson's interval."""
    for name in (None, *GROUPS):
        for value in sorted({str(row[name]) for row in rows if name in row}) if name else [""]:
            hits = [row["verdict"] for row in rows if not name or str(row.get(name)) == value]
            rate = dict(x=sum(hits) / len(hits), x_95=wilson(sum(hits) / len(hits), len(hits)))
            label = f"  {name} {printable(value):24}" if name else "right"
            print(f"{label} {sum(hits)} of {len(hits)}: {with_interval(rate, 'x')}")


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test: each discordant pair is a fair coin (1947)."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_difference(only_a: int, only_b: int, n: int) -> tuple[float, float, float]:
    """b's accuracy minus a's on the same n problems, and the ends of its 95 % interval.

    The interval is Wald's after one pair is added to each discordant count (Bonett and Price 2012,
    J. Educ. Behav. Stat. 37, 479-488), which keeps its level in small samples.
    """
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    spread = NORMAL * math.sqrt((a + b - (b - a) ** 2) / (n + 2))
    return (only_b - only_a) / n, max(-1.0, b - a - spread), min(1.0, b - a + spread)


def compare(first: str, second: str) -> str:
    """What two answer files say about the problems that both hold, in words: greedy answers only.

    Problems are paired by their text and gold answer; UserError if the files share none.
    """
    greedy = []
    for path in (first, second):
        rows = read_answers(path, "gold", "completion", "verdict")
        rows = [row for row in rows if row.get("sample") is None]
        pairs = ((str(row.get("problem")), str(row["gold"])) for row in rows)
        greedy.append({pair: bool(row["verdict"]) for pair, row in zip(pairs, rows, strict=True)})
    a, b = greedy
    shared = a.keys() & b.keys()
    if not shared:
        raise UserError(f"{first} and {second} share no greedily answered problem")
    only_a, only_b = sum(a[k] > b[k] for k in shared), sum(a[k] < b[k] for k in shared)
    difference, low, high = (100 * x for x in paired_difference(only_a, only_b, len(shared)))
    rates = [100 * sum(x[k] for k in shared) / len(shared) for x in greedy]
    return (
        f"{len(shared)} problems: {rates[0]:.1f} % -> {rates[1]:.1f} %, difference "
        f"{difference:+.1f} points [{low:+.1f}, {high:+.1f}], {only_a} lost and {only_b} won, "
        f"exact McNemar p = {mcnemar(only_a, only_b):.3g}"
    )
