"""The paper's two tables from a results file, and what they lack: intervals, paired tests.

    python experiments/tables.py [experiments/results/tiny.json]

Verdicts rest on the mean train reward; greedy accuracy and pass@4 are secondary.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.rows import RESULTS, in_cell, matrix, paired, read_results
from experiments.stats import crossed, holm
from run.answers import wilson
from system.errors import Parser, run_cli

RULES = ("uniform", "surprisal", "entropy_reduction", "divergence", "arca")  # the paper's
PUBLISHED = {  # its tables, by (rule, rank): greedy, pass@4, mean reward, Gini, effective ratio
    ("uniform", 64): (0.620, 0.675, 0.362, 0.000, 1.000),
    ("surprisal", 64): (0.520, 0.650, 0.326, 0.941, 0.052),
    ("entropy_reduction", 64): (0.600, 0.700, 0.367, 0.920, 0.073),
    ("divergence", 64): (0.565, 0.670, 0.351, 0.939, 0.055),
    ("arca", 4): (0.525, 0.640, 0.327, 0.353, 0.467),
    ("arca", 16): (0.510, 0.655, 0.336, 0.388, 0.460),
    ("arca", 64): (0.590, 0.680, 0.353, 0.490, 0.334),
}
BASE = ("base", 0, 0.0)  # the untrained model
OUTCOMES = (  # metric, its name, scale, digits; the first is the primary one
    ("reward", "mean train reward", 1, 3),
    ("greedy", "greedy, points", 100, 1),
    ("pass", "pass@4, points", 100, 1),
)


def said(e, scale=1, digits=3):
    """An Estimate as text, such as `0.731 [0.702, 0.760]`; a mean alone if it has no interval."""
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (e.mean, e.low, e.high))
    if math.isnan(e.low):
        return "missing" if math.isnan(e.mean) else mean
    return f"{mean} [{low}, {high}]"


def shown(p):
    """A p-value as text."""
    if math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def table(title, heads, lines):
    """Text: a title, and columns as wide as their widest cell."""
    lines = [heads, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in lines]
    return "\n".join([title, "", shown[0], "-" * (sum(widths) + 2 * len(widths) - 2), *shown[1:]])


def labels(about, rows, cell):
    """The first columns of a line: rule, rank, sharpening, how many seeds."""
    rule, rank, power = cell
    done, wanted = len(in_cell(rows, cell)), len(about["seeds"])
    seeds = str(done) if done == wanted or rule == "base" else f"{done} of {wanted}"
    return [rule, str(rank or "-"), "-" if rule in ("base", "uniform") else f"{power:g}", seeds]


def published(cell, columns):
    """What the paper has for a rule: at rank 64, or ARCA's at its own rank; with sharpening 2."""
    rule, rank, power = cell
    found = PUBLISHED.get((rule, rank if rule == "arca" else 64))
    if found is None or power != (1 if rule == "uniform" else 2):
        return "-"
    return " / ".join(f"{x:.3f}" for x in found[columns])


def accuracy(rows, cell, metric):
    """Accuracy in % as text; of a single run with Wilson's interval, over problems."""
    x = matrix(rows, cell, metric)
    e = crossed(x)
    if len(x) == 1 and x.size:
        e.low, e.high = wilson(e.mean, x.size)
    return said(e, 100, 1)


def accuracy_table(about, rows, cells):
    """The paper's first table, and greedy accuracy by seed: not all runs take off."""
    lines = []
    for cell in [BASE, *cells]:
        reward = "-" if cell == BASE else said(crossed(matrix(rows, cell, "reward")))
        runs = matrix(rows, cell, "greedy")
        by_seed = ", ".join(f"{100 * run.mean():.0f}" for run in runs) if len(runs) > 1 else "-"
        line = [*labels(about, rows, cell), reward, accuracy(rows, cell, "greedy"), by_seed]
        lines.append([*line, accuracy(rows, cell, "pass"), published(cell, slice(0, 3))])
    title = f"Table 1. Accuracy on {about['problems']} held-out problems after {about['steps']} "
    title += f"steps of {about['prompts']} x {about['samples']} rollouts "
    title += "[95 % over seeds and problems]"
    heads = ["rule", "rank", "sharpening", "seeds", "mean train reward", "greedy, %", "by seed"]
    return table(title, [*heads, "pass@4, %", "paper: greedy / pass@4 / reward"], lines)


def concentration_table(about, rows, cells):
    """The paper's second table: Gini and effective-token ratio, the mean over training."""
    lines = []
    for cell in cells:
        gini, ratio = (crossed(matrix(rows, cell, m)) for m in ("gini", "effective_token_ratio"))
        line = [*labels(about, rows, cell), said(gini), said(ratio)]
        lines.append([*line, published(cell, slice(3, 5))])
    heads = ["rule", "rank", "sharpening", "seeds", "Gini", "effective-token ratio", "paper"]
    return table("Table 2. Concentration, mean over training [95 % over seeds]", heads, lines)


def difference_table(about, rows, cells):
    """Paired differences in every outcome, from uniform at the same rank and of ARCA from its
    controls. Claims choose among them, so Holm's correction is for all tests of the table."""
    # What is compared with what.
    pairs = [(cell, ("uniform", cell[1], 1.0)) for cell in cells if cell[0] != "uniform"]
    for arca in [cell for cell in cells if cell[0] == "arca"]:
        controls = [("permuted", *arca[1:]), ("random", *arca[1:])]
        pairs += [(arca, control) for control in controls if control in cells]

    # The differences, and the p-values of all together.
    found = [[crossed(paired(rows, a, b, m)) for m, *_ in OUTCOMES] for a, b in pairs]
    ps = [e.p for row in found for e in row]
    corrected = iter(holm(ps))
    lines = []
    for (a, b), row in zip(pairs, found, strict=True):
        rule, rank, power, _ = labels(about, rows, a)
        line = [rule, f"- {b[0]}", rank, power, str(row[0].seeds)]
        for e, (_, _, scale, digits) in zip(row, OUTCOMES, strict=True):
            line += [said(e, scale, digits), shown(next(corrected))]
        lines.append(line)
    heads = ["rule", "against", "rank", "sharpening", "pairs"]
    heads += [head for _, name, _, _ in OUTCOMES for head in (name, "Holm")]
    title = "Table 3. Paired differences [95 %, each by itself], and p-values corrected by Holm "
    title += f"for the {sum(not math.isnan(p) for p in ps)} tests of this table"
    return table(title, heads, lines)


def tables(about, rows) -> str:
    """All tables as one text."""
    cells = [tuple(cell) for cell in about["cells"]]
    makers = (accuracy_table, concentration_table, difference_table)
    return "\n\n".join(make(about, rows, cells) for make in makers)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", default=RESULTS / "tiny.json", help="of sweep.py")
    print(tables(*read_results(parser.parse_args().results)))


if __name__ == "__main__":
    run_cli(main)
