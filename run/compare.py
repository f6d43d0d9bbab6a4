"""Compare two evaluations problem by problem: how many were won and lost, and is that luck?

python eval_math.py --adapter A --out a.jsonl
python eval_math.py --adapter B --out b.jsonl
python -m run.compare a.jsonl b.jsonl
"""

import math

from run.answers import NORMAL, read_answers
from system.errors import Parser, UserError, run_cli


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


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, metavar="JSONL", help="what eval_math.py --out wrote")
    print(compare(*parser.parse_args().files))


if __name__ == "__main__":
    run_cli(main)
