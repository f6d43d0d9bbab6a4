"""Tables of first_order.py: of each number by rule and checkpoint, and held against the sweep."""

import torch

from experiments.rows import default_file, paired, read_results
from experiments.stats import crossed
from experiments.tables import table
from run.metrics import CLASSES, rank_correlation

# Parts of a completion: each token is in one of the first four, and in one of the classes or in
# the answer or the end. `sentence` and `formula` are where one begins; others overlap with them.
PARTS = ("first", "work", "answer", "end", *CLASSES[:5], "sentence", "formula")


def label(rule):
    return f"{rule[0]}/{rule[1]:g}"


def shown(x, digits=2):
    """Such as 0.43 ± 0.07."""
    return "cannot tell" if x is None else f"{x[0]:.{digits}f} ± {x[1]:.{digits}f}"


HEADS = ["step", "rule", "AdamW's gain", "in points", "raw gain", "length", "signal share"]
HEADS += ["cos(E u, g*)", "gain: first", "work", "answer", "noise"]


def line_of(row, begin):
    """Return a row's cells: what it buys, its length, how sure, and where gain and noise sit."""
    names = (("adam", 2), ("points", 2), ("raw", 2), ("length", 2), ("share", 3), ("cosine", 2))
    cells = [shown(row[name], digits) for name, digits in names]
    cells += [shown(row["gain"][part]) for part in ("first", "work", "answer")]
    noise = [row["noise"][part][0] for part in PARTS[:4]]
    answer = 100 * noise[2] / max(sum(noise), 1e-30)
    return [*begin, *cells, f"{sum(noise):.1f}, {answer:.0f} % in the answer"]


# ---- All rules, and the sweep --------------------------------------------------------------------
def over_seeds(rows, name):
    """Return the mean of a number over rows of several seeds and steps, and its error: that of the
    batches, or if it is larger that between the rows' means by seed; None if no row tells."""
    told = [row for row in rows if row[name] is not None]
    if not told:
        return None
    x = torch.tensor([row[name] for row in told], dtype=torch.float64)  # (n, 2)
    error = x[:, 1].norm().item() / len(x)
    seeds = sorted({row["seed"] for row in told})
    by_seed = [x[[row["seed"] == seed for row in told], 0].mean() for seed in seeds]
    if len(seeds) > 1:
        error = max(error, torch.stack(by_seed).std().item() / len(seeds) ** 0.5)
    return [x[:, 0].mean().item(), error]


def gain_table(rows, name, title):
    """Return the table of one number: a rule a line, a checkpoint a column, means over seeds."""
    places = sorted(
        {(row["trajectory"] != "uniform/1", row["trajectory"], row["step"]) for row in rows}
    )
    places = [place[1:] for place in places]  # uniform's first
    lines = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        line = [rule]
        for place in places:
            here = [x for x in rows if (x["trajectory"], x["step"]) == place and x["rule"] == rule]
            line.append(shown(over_seeds(here, name)) if here else "")
        lines.append(line)
    return table(title, ["rule", *(f"{run}, {step}" for run, step in places)], lines)


def side(low, high):
    """Return on which side of 0 an interval is: above, below, or cannot tell."""
    if low > 0:
        return "above"
    return "below" if high < 0 else "cannot tell"


def spearman(a, b):
    """Return Spearman's correlation of two lists and its 95 % interval, by Fisher's z with the
    error sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright, Psychometrika 65, 2000)."""
    a, b = torch.tensor([a]), torch.tensor([b])
    rho = rank_correlation(a, b, torch.ones(a.shape, dtype=torch.bool)).clamp(-0.9999, 0.9999)
    spread = 1.96 * ((1 + rho**2 / 2) / (a.shape[1] - 3)).sqrt()
    ends = [(rho.atanh() + sign * spread).tanh().item() for sign in (-1, 1)]
    return [rho.item(), *ends]


def held_against_sweep(rows, trajectory, steps):
    """Return, as text, how the AdamW gains at steps of a trajectory rank the settings that the
    sweep trained, against its differences in mean train reward from uniform: hits and misses."""
    about, runs = read_results(default_file())
    base = ("uniform", about["rank"], 1.0)
    lines, gains, rewards = [], [], []
    for cell in map(tuple, about["cells"]):
        here = [x for x in rows if x["rule"] == label((cell[0], cell[2])) and x["step"] in steps]
        here = [x for x in here if x["trajectory"] == trajectory]
        if cell[1] != about["rank"] or cell == base or not here:
            continue
        gain = over_seeds(here, "adam")
        e = crossed(paired(runs, cell, base, "reward"))
        predicted = side(gain[0] - 1 - 2 * gain[1], gain[0] - 1 + 2 * gain[1])
        seen = side(e.low, e.high)
        verdict = "hit" if predicted == seen else "MISS"
        if "cannot tell" in (predicted, seen):
            verdict = f"first order {predicted}, sweep {seen}"
        reward = f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"
        lines.append([label((cell[0], cell[2])), shown(gain), reward, verdict])
        gains.append(gain[0])
        rewards.append(e.mean)
    if len(gains) < 5:
        return f"{trajectory}, steps {steps}: too few settings of the sweep to rank"
    rho, low, high = spearman(gains, rewards)
    title = f"{trajectory}'s steps {' and '.join(map(str, steps))} against the sweep: Spearman "
    title += f"{rho:.2f} [{low:.2f}, {high:.2f}] over {len(gains)} settings"
    return table(title, ["rule", "AdamW's gain", "reward minus uniform's", ""], lines)


def report(rows):
    """Print all tables of the rows of a results file."""
    for name, title in (
        ("adam", "Gain of an AdamW step, uniform = 1"),
        ("points", "The same in points of mean reward"),
        ("raw", "Gain of a step of fixed length along u, uniform = 1"),
        ("length", "Length of u (rms), uniform = 1"),
        ("share", "Signal share of a batch"),
        ("cosine", "Bias: cos(E u, g*)"),
    ):
        print(gain_table(rows, name, f"{title}. Trajectory, step: mean of seeds ± error") + "\n")
    for kind in ("gain", "noise"):
        for part in PARTS[:4]:
            flat = [row | {"x": row[kind][part]} for row in rows]
            print(gain_table(flat, "x", f"Raw {kind} in {part}, uniform's total = 1") + "\n")
    for trajectory in ("uniform/1", "arca/2"):
        print(held_against_sweep(rows, trajectory, (5, 10)) + "\n")
