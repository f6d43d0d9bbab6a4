"""Tables of first_order.py: each number by rule and checkpoint, and held against training."""

import torch

from experiments.rows import RESULTS, by_seed, read_results, with_sweep
from experiments.stats import crossed
from experiments.tables import said, table
from run.metrics import CLASSES, rank_correlation

# Parts of a completion: each token is in one of the first four, and in one of the classes or in
# the answer or the end. `sentence` and `formula` are where one begins; others overlap with them.
PARTS = ("first", "work", "answer", "end", *CLASSES[:5], "sentence", "formula")
NUMBERS = {  # of a rule at a checkpoint
    "adam": "gain of an AdamW step",
    "points": "the same in points of reward",
    "raw": "gain of a step of fixed length",
    "length": "length of u (rms)",
    "share": "signal share of a batch",
    "cosine": "cos(E u, g*)",
}


def label(rule):
    return f"{rule[0]}/{rule[1]:g}"


def shown(x, digits=2):
    """Such as 0.43 ± 0.07."""
    return "cannot tell" if x is None else f"{x[0]:.{digits}f} ± {x[1]:.{digits}f}"


def side(low, high):
    """Return on which side of 0 an interval is: above, below, or cannot tell."""
    if low > 0:
        return "above"
    return "below" if high < 0 else "cannot tell"


def over_seeds(found):
    """Return the mean of [(seed, [value, error] or None), ...], of several seeds and steps, and its
    error: that of the batches, or if it is larger that between the seeds' means; None if no value
    is told."""
    told = [(seed, x) for seed, x in found if x is not None]
    if not told:
        return None
    x = torch.tensor([x for _, x in told], dtype=torch.float64)  # (n, 2)
    error = x[:, 1].norm().item() / len(x)
    seeds = sorted({seed for seed, _ in told})
    if len(seeds) > 1:
        by_seed = [x[[own == seed for own, _ in told], 0].mean() for seed in seeds]
        error = max(error, torch.stack(by_seed).std().item() / len(seeds) ** 0.5)
    return [x[:, 0].mean().item(), error]


def number(rows, name, part=None):
    """Return the mean over rows of a number, or of a part's gain or noise."""
    values = [row[name] if part is None else row[name][part] for row in rows]
    return over_seeds([(row["seed"], x) for row, x in zip(rows, values, strict=True)])


def spearman(a, b):
    """Return Spearman's correlation of two lists and its 95 % interval, by Fisher's z with the
    error sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright, Psychometrika 65, 2000). It takes the
    pairs as independent; settings that share seeds are not quite."""
    a, b = torch.tensor([a]), torch.tensor([b])
    rho = rank_correlation(a, b, torch.ones(a.shape, dtype=torch.bool)).clamp(-0.9999, 0.9999)
    spread = 1.96 * ((1 + rho**2 / 2) / (a.shape[1] - 3)).sqrt()
    ends = [(rho.atanh() + sign * spread).tanh().item() for sign in (-1, 1)]
    return [rho.item(), *ends]


# ---- The tables ----------------------------------------------------------------------------------
def by_checkpoint(rows, name, rules):
    """Return the table of one number: a rule a line, a checkpoint a column, means over seeds."""
    places = {(row["trajectory"], row["step"]) for row in rows}
    places = sorted(places, key=lambda place: (place[0] != "uniform/1", place))  # uniform's first
    lines = []
    for rule in rules:
        at = {place: [] for place in places}
        for row in rows:
            if row["rule"] == rule:
                at[row["trajectory"], row["step"]].append(row)
        lines.append([rule, *(shown(number(here, name)) for here in at.values())])
    heads = ["rule", *(f"{run}, {step}" for run, step in places)]
    return table(f"{NUMBERS[name]}, by trajectory and step: mean of seeds ± error", heads, lines)


def by_rule(rows, title):
    """Return all numbers of each rule in some rows, where its gain and its noise sit (of uniform's
    total), and how much of its noise is in the answer."""
    kinds = ("first", "sentence", "formula", "digits", "answer")
    lines = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        noise = {part: number(own, "noise", part) or [0, 0] for part in PARTS[:4]}
        total = sum(x[0] for x in noise.values())
        line = [rule, *(shown(number(own, name)) for name in NUMBERS)]
        line += [shown(number(own, "gain", part)) for part in kinds]
        line += [shown(noise["work"], 1), shown(noise["answer"], 1)]
        lines.append([*line, f"{100 * noise['answer'][0] / max(total, 1e-30):.0f} %"])
    heads = ["rule", *NUMBERS, *(f"gain: {part}" for part in kinds)]
    return table(title, [*heads, "noise: work", "answer", "of its own"], lines)


def held_against(rows, model, title):
    """Return, as text, how the AdamW gains of some rows rank the rules that were trained from this
    model, in mean train reward minus uniform's: hits and misses."""
    runs = with_sweep(read_results(RESULTS / "arms.json")[1])
    bed = "" if model == "tiny" else f"{model}_"
    lines, gains, rewards = [], [], []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        names = [f"{bed}{name}" for name in (rule.replace("/", "_"), "uniform_1")]
        own, base = by_seed(runs, "reward", names)
        if rule == "uniform/1" or not len(own):
            continue
        gain = number([row for row in rows if row["rule"] == rule], "adam")
        e = crossed(own - base)
        predicted = side(gain[0] - 1 - 2 * gain[1], gain[0] - 1 + 2 * gain[1])
        seen = side(e.low, e.high)
        verdict = "hit" if predicted == seen else "MISS"
        if "cannot tell" in (predicted, seen):
            verdict = f"first order {predicted}, training {seen}"
        lines.append([rule, shown(gain), said(e), verdict])
        gains.append(gain[0])
        rewards.append(e.mean)
    if len(gains) < 5:
        return f"{title}: too few trained rules to rank"
    rho, low, high = spearman(gains, rewards)
    title += f" against training: Spearman {rho:.2f} [{low:.2f}, {high:.2f}] over {len(gains)}"
    return table(title, ["rule", "AdamW's gain", "reward minus uniform's", ""], lines)


def report(about, rows):
    """Print all tables of a results file. `Early` is the first two checkpoints after step 0."""
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    for name in NUMBERS:
        print(by_checkpoint(rows, name, rules) + "\n")
    for trajectory in dict.fromkeys(row["trajectory"] for row in rows):
        own = [row for row in rows if row["trajectory"] == trajectory]
        early = sorted({row["step"] for row in own} - {0})[:2]
        own = [row for row in own if row["step"] in early]
        where = f"{about['model']}, {trajectory}'s steps {' and '.join(map(str, early))}"
        print(by_rule(own, f"{where}, uniform = 1") + "\n")
        print(held_against(own, about["model"], where) + "\n")
