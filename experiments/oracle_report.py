"""The numbers, tables and figures of experiments/oracle.py, from its scored completions."""

import re

import numpy as np

from experiments.stats import crossed
from run.metrics import CLASSES
from system.files import to_json

ARMS = ("uniform", "arca", "true", "true_signed")  # of training; the first is compared with

# ---- Numbers with intervals ----------------------------------------------------------------------


def bootstrap(columns, groups, statistic, draws=2000):
    """statistic(*sums of the columns) over all rows, and the ends of its 95 % interval, from draws
    of problems with replacement; groups say which problem a row is of."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((group.max() + 1, len(columns)))  # (P, K)
    np.add.at(sums, group, np.array(columns, dtype=float).T)
    picks = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    drawn = statistic(*sums[picks].sum(1).T)  # (draws,)
    ends = np.quantile(drawn, [0.025, 0.975])
    return [round(float(x), 4) for x in (statistic(*sums.sum(0)), *ends)]


def mean_of(total, count):
    return total / count


def summarise(about, rules):
    """What these completions (lists by key) say about every rule: [estimate, low, high] each."""
    about, groups = {k: np.array(v) for k, v in about.items()}, about["group"]
    one = np.ones(len(groups))
    mean = lambda x: bootstrap([x, one], groups, mean_of)  # noqa: E731
    found = dict(completions=len(groups), problems=len(set(groups)), rules={})
    found.update(tokens=mean(about["tokens"]), prompt_value=mean(about["prompt_value"]))
    for name, key in (("delta", "size"), ("noise", "noise")):
        square = about[key].sum() / about["tokens"].sum()
        found[f"{name}_rms"] = round(float(max(0.0, square) ** 0.5), 5)
    found["chance"] = mean(about["chance"])
    for key in ("tokens", "size"):  # where the tokens are, and where what decides is
        shares = {name: about[f"{key}/{name}"].sum() / about[key].sum() for name in CLASSES}
        found[f"{key}_by_class"] = {name: round(float(x), 4) for name, x in shares.items()}
    for name, row in rules.items():
        if name.endswith("/2") and len(set(about["right"])) == 1:
            continue  # sharpening 2 for all of them only: the file stays small
        x = {key: np.array(values) for key, values in row.items()}
        found["rules"][name] = {key: mean(values) for key, values in x.items()}
    return found


def by_side(batches):
    """Batches of scored completions -> summaries of the right, the wrong and all of them."""
    join = lambda rows: {key: [x for row in rows for x in row[key]] for key in rows[0]}  # noqa: E731
    about = join([b["about"] for b in batches])
    rules = {n: join([b["rules"][n] for b in batches]) for n in batches[0]["rules"]}
    found = {}
    for side, wanted in (("both", (0, 1)), ("right", (1,)), ("wrong", (0,))):
        keep = [i for i, right in enumerate(about["right"]) if right in wanted]
        pick = lambda columns, keep=keep: {k: [v[i] for i in keep] for k, v in columns.items()}  # noqa: E731
        found[side] = summarise(pick(about), {name: pick(row) for name, row in rules.items()})
    return found


def student(values):
    """The mean of one number a seed, and the ends of its 95 % interval."""
    e = crossed(np.array(values, dtype=float)[:, None])
    return [round(x, 4) for x in (e.mean, e.low, e.high)]


def compare_arms(runs):
    """By arm: mean reward of all steps and greedy accuracy after, and both minus uniform's with the
    same seed, which saw the same problems; [mean, low, high] over seeds, and the runs."""
    found = {}
    for arm in ARMS:
        own, plain = ([x for x in runs if x["arm"] == name] for name in (arm, "uniform"))
        rows = [dict(reward=float(np.mean(x["rewards"])), greedy=x["greedy"]) for x in own]
        base = [dict(reward=float(np.mean(x["rewards"])), greedy=x["greedy"]) for x in plain]
        out = {key: student([row[key] for row in rows]) for key in ("reward", "greedy")}
        for key in ("reward", "greedy"):
            gaps = [a[key] - b[key] for a, b in zip(rows, base, strict=True)]
            out[f"{key}_above_uniform"] = student(gaps)
        found[arm] = out | dict(runs=own)
    return found


# ---- Tables and figures --------------------------------------------------------------------------


def cell(x):
    return f"{x[0]:6.3f} [{x[1]:6.3f}, {x[2]:6.3f}]"


def print_measured(measured, p):
    """The table of every rule at one sharpening, by step and side."""
    for step, sides in measured.items():
        for side, found in sides.items():
            if not any(name.endswith(f"/{p}") for name in found["rules"]):
                continue
            n = f"{found['completions']} completions of {found['problems']} problems"
            rms = f"rms of delta {found['delta_rms']:.4f}, of its noise {found['noise_rms']:.4f}"
            print(f"\nstep {step}, {side}: {n}; {rms}; chance {found['chance'][0]:.3f}")
            heads = ("Gini", "decisive tenth", "rank correlation")
            print(f"{f'sharpening {p}':18}" + "".join(f"{x:>24}" for x in heads))
            for name, x in found["rules"].items():
                if name.endswith(f"/{p}"):
                    keys = ("gini", "top", "corr_halves")
                    cells = [cell(x[key]) if key in x else "" for key in keys]
                    print(f"{name[:-2]:18}" + "".join(f"{text:>24}" for text in cells))


def print_trained(trained):
    print(
        f"\n{'arm':14}{'mean reward':>25}{'minus uniform':>25}{'greedy':>25}{'minus uniform':>25}"
    )
    for arm, x in trained.items():
        keys = ("reward", "reward_above_uniform", "greedy", "greedy_above_uniform")
        print(f"{arm:14}" + "".join(f"{cell(x[key]):>25}" for key in keys))


def draw_measured(measured, path):
    """A row of panels a checkpoint: the measures of every rule, right and wrong apart."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 4.1 * len(measured)), dpi=150, layout="constrained")
    axes = fig.subplots(len(measured), 2, squeeze=False, sharey=True, sharex="col")
    titles = dict(top="credit on the decisive tenth", corr_halves="rank correlation with delta")
    for line, (step, sides) in zip(axes, measured.items(), strict=True):
        for ax, key in zip(line, titles, strict=True):
            for side, colour, marker, shift in (
                ("right", "#0072b2", "o", -0.17),
                ("wrong", "#d55e00", "s", 0.17),
            ):
                rules = {n[:-2]: x for n, x in sides[side]["rules"].items() if n.endswith("/1")}
                at = np.arange(len(rules)) + shift
                x = np.array([row.get(key, [np.nan] * 3) for row in rules.values()]).T
                spread = np.maximum(0, [x[0] - x[1], x[2] - x[0]])
                ax.errorbar(
                    x[0], at, xerr=spread, fmt=marker, color=colour, ms=4, lw=1.2, label=side
                )
                ax.set_yticks(range(len(rules)), rules, fontsize=8)
            ax.axvline(sides["both"]["chance"][0] if key == "top" else 0, color="#888888", lw=0.8)
            ax.set_title(f"step {step}: {titles[key]}", fontsize=9)
            ax.grid(axis="y", color="#e5e5e5", lw=0.6)
            ax.set_axisbelow(True)
        line[0].set_ylim(len(rules) - 0.4, -0.6)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    fig.savefig(path)


def draw_trained(trained, path):
    """Reward by step; the same minus uniform's, with the 95 % band of the seeds; and greedy
    accuracy after, a dot a seed."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 3.2), dpi=150, layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    styles = (("#555555", "-"), ("#0072b2", "--"), ("#d55e00", "-."), ("#009e73", ":"))
    plain = np.array([smooth(run["rewards"]) for run in trained["uniform"]["runs"]])
    for i, ((arm, found), (colour, dashes)) in enumerate(zip(trained.items(), styles, strict=True)):
        curve = np.array([smooth(run["rewards"]) for run in found["runs"]])  # (seeds, steps)
        steps = np.arange(1, curve.shape[1] + 1)
        left.plot(steps, curve.mean(0), dashes, color=colour, label=arm)
        mean, low, high = np.array([student(x) for x in (curve - plain).T]).T
        middle.plot(steps, mean, dashes, color=colour)
        middle.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        dots, x = [run["greedy"] for run in found["runs"]], found["greedy"]
        right.plot([i] * len(dots), dots, ".", color=colour, ms=6, alpha=0.6)
        spread = [[x[0] - x[1]], [x[2] - x[0]]]
        right.errorbar([i + 0.2], x[0], yerr=spread, fmt="o", color=colour, ms=5)
    left.set(xlabel="step", title="reward, mean of 5 steps")
    middle.set(xlabel="step", title="the same, minus uniform's")
    left.legend(fontsize=8)
    right.set_xticks(range(len(trained)), trained, fontsize=8)
    right.set(title="held-out greedy accuracy after")
    fig.savefig(path)


def smooth(x, width=5):
    """The mean of each number and up to width - 1 before it."""
    return [float(np.mean(x[max(0, i + 1 - width) : i + 1])) for i in range(len(x))]


def as_text(results):
    """JSON with a line for every list of numbers, and not for every number."""
    text = to_json(results, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def draw(results, folder):
    folder.mkdir(parents=True, exist_ok=True)
    if "measured" in results:
        for p in (1, 2):
            print_measured(results["measured"], p)
        draw_measured(results["measured"], folder / "oracle.png")
    if "trained" in results:
        print_trained(results["trained"])
        draw_trained(results["trained"], folder / "oracle_training.png")
    print(f"figures: {folder}")
