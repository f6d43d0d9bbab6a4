"""The paper's two tables from a results file, and what they lack: intervals and paired tests.

    python experiments/tables.py [experiments/results/tiny.json]

A pure function of the file. What is missing is shown as missing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import math

from experiments.compare import mcnemar, paired_difference
from experiments.concentration import PUBLISHED
from experiments.rows import default_file, in_cell, matrix, paired, read_results
from experiments.stats import Estimate, bootstrap_p, crossed, holm
from run.answers import wilson
from system.errors import run_cli

BASE = ("base", 0, 0.0)


def estimate(rows, cell, metric) -> Estimate | None:
    """The mean of a cell and its 95 % interval; None without a run. Of a single run's accuracy the
    interval is Wilson's, over problems."""
    x = matrix(rows, cell, metric)
    if not x.size:
        return None
    e = crossed(x)
    if len(x) == 1 and x.shape[1] > 1:
        e.low, e.high = wilson(e.mean, x.shape[1])
    return e


def said(e, scale=1, digits=3):
    """Such as `0.731 [0.702, 0.760]`; a plain mean where there is no interval."""
    if e is None:
        return "missing"
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (e.mean, e.low, e.high))
    return mean if math.isnan(e.low) else f"{mean} [{low}, {high}]"


def labels(rows, cell, seeds):
    """The first columns of a row: rule, rank, sharpening, how many seeds."""
    rule, rank, power = cell
    n = len(in_cell(rows, cell))
    count = str(n) if n == len(seeds) or rule == "base" else f"{n} of {len(seeds)}"
    return [rule, str(rank or "-"), "-" if rule in ("base", "uniform") else f"{power:g}", count]


def table(title, heads, lines):
    """Text: a title, and columns as wide as their widest cell."""
    lines = [heads, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines]
    return "\n".join([title, "", shown[0], "-" * (sum(widths) + 2 * len(widths) - 2), *shown[1:]])


def published(cell, columns):
    """What the paper has for a rule: at rank 64, or ARCA's at its own rank; with sharpening 2."""
    rule, rank, power = cell
    found = PUBLISHED.get((rule, rank if rule == "arca" else 64))
    if found is None or power != (1 if rule == "uniform" else 2):
        return "-"
    return " / ".join(f"{x:.3f}" for x in found[columns])


def accuracy_table(about, rows):
    """The paper's first table: greedy, pass@4, average train reward."""
    lines = []
    for cell in [BASE, *map(tuple, about["cells"])]:
        measured = [said(estimate(rows, cell, m), 100, 1) for m in ("greedy", "pass")]
        reward = "-" if cell == BASE else said(estimate(rows, cell, "reward"))
        lines.append(labels(rows, cell, about["seeds"]) + [*measured, reward])
        lines[-1].append(published(cell, slice(0, 3)))
    heads = [
        "rule",
        "rank",
        "sharpening",
        "seeds",
        "greedy, %",
        "pass@4, %",
        "average train reward",
    ]
    title = (
        f"Table 1. Accuracy on {about['problems']} held-out problems after {about['steps']} steps "
        f"of {about['prompts']} x {about['samples']} rollouts [95 % over seeds and problems]"
    )
    return table(title, [*heads, "paper (Qwen3-1.7B-Base, MATH, 1 seed)"], lines)


def concentration_table(about, rows):
    """The paper's second table: Gini and effective-token ratio, the mean over training."""
    lines = []
    for cell in map(tuple, about["cells"]):
        both = [said(estimate(rows, cell, m)) for m in ("gini", "effective_token_ratio")]
        lines.append([*labels(rows, cell, about["seeds"]), *both, published(cell, slice(3, 5))])
    heads = ["rule", "rank", "sharpening", "seeds", "Gini", "effective-token ratio", "paper"]
    return table("Table 2. Concentration, mean over training [95 % over seeds]", heads, lines)


def comparisons(about):
    """What is compared with what: every setting with uniform at its rank, and ARCA with its two
    controls."""
    cells = [tuple(cell) for cell in about["cells"]]
    pairs = [(c, ("uniform", c[1], 1.0)) for c in cells if c[0] != "uniform"]
    for arca in (c for c in cells if c[0] == "arca"):
        others = (("permuted", *arca[1:]), ("random", *arca[1:]))
        pairs += [(arca, other) for other in others if other in cells]
    return pairs


def compared(x) -> Estimate | None:
    """A paired difference (S, P) and its p; of one pair of evaluations the exact McNemar test and
    its interval, which also hold where few problems differ."""
    if not x.size:
        return None
    if len(x) > 1 or x.shape[1] == 1:
        return crossed(x)
    lost, won = int((x < 0).sum()), int((x > 0).sum())
    return Estimate(*paired_difference(lost, won, x.size), mcnemar(lost, won), 1)


def shown(p):
    """A p-value as text."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def difference_table(about, rows, metric, name, scale, digits):
    """Paired differences in a metric: on the same problems, with the same seeds."""
    pairs = [(a, b, paired(rows, a, b, metric)) for a, b in comparisons(about)]
    found = [compared(x) for _, _, x in pairs]
    ps = [e.p if e else math.nan for e in found]
    boots = [bootstrap_p(x) if x.size > 1 else math.nan for _, _, x in pairs]
    lines = []
    for (a, b, x), e, *tested in zip(pairs, found, ps, holm(ps), holm(boots), strict=True):
        rule, rank, power, _ = labels(rows, a, about["seeds"])
        against = f"- {b[0]}"
        lines.append([rule, against, rank, power, str(len(x)), said(e, scale, digits)])
        lines[-1] += map(shown, tested)
    heads = ["rule", "against", "rank", "sharpening", "pairs", "difference [95 %]", "p-value"]
    return table(name, [*heads, "Holm", "Holm, bootstrap"], lines)


def gain_table(about, rows, title):
    """Greedy accuracy after training minus before it, on the same problems."""
    before = matrix(rows, BASE, "greedy")  # (1, P), or (0,) without a run
    lines = []
    for cell in map(tuple, about["cells"]):
        after = matrix(rows, cell, "greedy")  # (S, P)
        e = compared(after - before if after.size and before.size else after[:0])
        lines.append([*labels(rows, cell, about["seeds"]), said(e, 100, 1)])
        lines[-1].append(shown(e.p if e else math.nan))
    return table(title, ["rule", "rank", "sharpening", "seeds", "gain [95 %]", "p-value"], lines)


def tables(about, rows) -> str:
    """All tables as one text."""
    n = f"{len(comparisons(about))} comparisons of this table"
    note = f"same problems, same seeds; p-values corrected by Holm for the {n}"
    parts = [accuracy_table(about, rows), concentration_table(about, rows)]
    for metric, name, scale, digits in (
        ("greedy", "greedy accuracy, points", 100, 1),
        ("pass", "pass@4, points", 100, 1),
        ("reward", "mean train reward", 1, 3),
    ):
        title = f"Table {len(parts) + 1}. Difference in {name} ({note})"
        parts.append(difference_table(about, rows, metric, title, scale, digits))
    title = f"Table {len(parts) + 1}. Greedy accuracy after training minus before it, points"
    parts.append(gain_table(about, rows, title))
    return "\n\n".join(parts)


def main():
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default_file()
    print(tables(*read_results(path)))


if __name__ == "__main__":
    run_cli(main)
