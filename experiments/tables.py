"""The paper's two tables from a results file, and what they lack: intervals and paired tests.

Verdicts rest on the mean train reward; greedy accuracy and pass@4 are secondary.

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
from experiments.stats import Estimate, crossed, holm
from run.answers import wilson
from system.errors import run_cli

BASE = ("base", 0, 0.0)
OUTCOMES = (  # metric, its name, scale, digits; the first is the primary one
    ("reward", "mean train reward", 1, 3),
    ("greedy", "greedy, points", 100, 1),
    ("pass", "pass@4, points", 100, 1),
)


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


def by_seed(rows, cell):
    """Greedy accuracy in %, a number a seed. Where three of ten runs take off, none of five does in
    0.7^5 = 17 % of cases, so a 95 % interval of the mean covers about 84 %, and hides why."""
    runs = matrix(rows, cell, "greedy")
    return ", ".join(f"{100 * run.mean():.0f}" for run in runs) if len(runs) > 1 else "-"


def accuracy_table(about, rows):
    """The paper's first table: greedy, pass@4, average train reward."""
    lines = []
    for cell in [BASE, *map(tuple, about["cells"])]:
        greedy, passed = (said(estimate(rows, cell, m), 100, 1) for m in ("greedy", "pass"))
        reward = "-" if cell == BASE else said(estimate(rows, cell, "reward"))
        line = [*labels(rows, cell, about["seeds"]), reward, greedy, by_seed(rows, cell), passed]
        lines.append([*line, published(cell, slice(0, 3))])
    heads = ["rule", "rank", "sharpening", "seeds", "mean train reward", "greedy, %", "by seed"]
    title = (
        f"Table 1. Accuracy on {about['problems']} held-out problems after {about['steps']} steps "
        f"of {about['prompts']} x {about['samples']} rollouts [95 % over seeds and problems]"
    )
    return table(title, [*heads, "pass@4, %", "paper: greedy / pass@4 / reward"], lines)


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


def difference_table(about, rows):
    """Paired differences in every outcome: on the same problems, with the same seeds. Claims choose
    among the outcomes, so Holm's correction is for all tests of the table."""
    pairs = comparisons(about)
    found = [[compared(paired(rows, a, b, m)) for m, *_ in OUTCOMES] for a, b in pairs]
    ps = [e.p if e else math.nan for row in found for e in row]
    corrected = iter(holm(ps))
    lines = []
    for (a, b), row in zip(pairs, found, strict=True):
        rule, rank, power, _ = labels(rows, a, about["seeds"])
        count = len(paired(rows, a, b, "reward"))
        line = [rule, f"- {b[0]}", rank, power, str(count)]
        for e, (_, _, scale, digits) in zip(row, OUTCOMES, strict=True):
            line += [said(e, scale, digits), shown(next(corrected))]
        lines.append(line)
    heads = ["rule", "against", "rank", "sharpening", "pairs"]
    heads += [head for _, name, _, _ in OUTCOMES for head in (name, "Holm")]
    tests = sum(not math.isnan(p) for p in ps)
    title = (
        "Table 3. Paired differences [95 %, each by itself], and p-values corrected by Holm for "
    )
    return table(title + f"the {tests} tests of this table", heads, lines)


def gain_table(about, rows):
    """Greedy accuracy after training minus before it, on the same problems."""
    before = matrix(rows, BASE, "greedy")  # (1, P), or (0,) without a run
    lines = []
    for cell in map(tuple, about["cells"]):
        after = matrix(rows, cell, "greedy")  # (S, P)
        e = compared(after - before if after.size and before.size else after[:0])
        lines.append([*labels(rows, cell, about["seeds"]), said(e, 100, 1)])
    title = "Table 4. Greedy accuracy after training minus before it, points"
    return table(title, ["rule", "rank", "sharpening", "seeds", "gain [95 %]"], lines)


def tables(about, rows) -> str:
    """All tables as one text."""
    makers = (accuracy_table, concentration_table, difference_table, gain_table)
    return "\n\n".join(make(about, rows) for make in makers)


def main():
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default_file()
    print(tables(*read_results(path)))


if __name__ == "__main__":
    run_cli(main)
