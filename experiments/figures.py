"""The figures of a sweep, from its results file.

    python experiments/figures.py [experiments/results/tiny.json] [--out FOLDER]

Colours are Okabe and Ito's, which colour-blind readers tell apart; rules also differ in marker or
dashes, for print in grey. Bands and bars are 95 % intervals, as in the tables.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np

from experiments.concentration import PUBLISHED
from experiments.rows import default_file, in_cell, read_results
from experiments.stats import crossed
from run.metrics import CLASSES
from system.errors import Parser, UserError, run_cli

STYLE = {  # rule: colour, marker, dashes
    "uniform": ("#555555", "o", "-"),
    "surprisal": ("#E69F00", "s", "--"),
    "entropy_reduction": ("#56B4E9", "^", "-."),
    "divergence": ("#009E73", "v", ":"),
    "arca": ("#D55E00", "D", "-"),
    "permuted": ("#0072B2", "P", "--"),
    "random": ("#CC79A7", "X", ":"),
}
CLASS_COLOURS = ["#BBBBBB", "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9"]
SMOOTH = 5  # steps that a point of a learning curve is the mean of


def read(rule):
    return rule.replace("_", " ")


def cell_of(about, rule, power):
    """The cell of a rule at the main rank; uniform has no sharpening."""
    return (rule, about["rank"], 1.0 if rule == "uniform" else power)


def curve(rows, cell, key, smooth=1):
    """(steps, mean, low, high) of a logged number over the seeds, or None without a run."""
    runs = list(in_cell(rows, cell).values())
    if not runs:
        return None
    x = np.array([row[key] for row in runs], dtype=float)  # (S, steps)
    smooth = min(smooth, x.shape[1])
    x = np.stack([np.convolve(row, np.ones(smooth) / smooth, "valid") for row in x])
    points = [crossed(column[:, None]) for column in x.T]
    steps = np.arange(x.shape[1]) + (smooth + 1) / 2
    return steps, *(np.array([getattr(e, k) for e in points]) for k in ("mean", "low", "high"))


def draw_curve(ax, found, rule, label=None, band=True, **changes):
    """A curve in its rule's style, with its band where there are seeds enough for one."""
    if found is None:
        return
    colour, _, dashes = STYLE[rule]
    steps, mean, low, high = found
    style = dict(color=colour, linestyle=dashes, linewidth=1.6, label=label)
    ax.plot(steps, mean, **style | changes)
    if band and not np.isnan(low).all():
        ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def learning(fig, about, rows):
    """Train reward by step: each rule, at both sharpenings, before uniform."""
    rules = [rule for rule in STYLE if rule != "uniform"]
    axes = fig.subplots(2, 3, sharex=True, sharey=True).flatten()
    uniform = curve(rows, cell_of(about, "uniform", 1), "reward", SMOOTH)
    for ax, rule in zip(axes, rules, strict=True):
        draw_curve(ax, uniform, "uniform", "uniform")
        found = curve(rows, cell_of(about, rule, 2.0), "reward", SMOOTH)
        draw_curve(ax, found, rule, "sharpening 2", linestyle="-")
        found = curve(rows, cell_of(about, rule, 1.0), "reward", SMOOTH)
        draw_curve(ax, found, rule, "sharpening 1", band=False, linestyle=(0, (2, 1)))
        ax.set_title(read(rule))
        ax.legend(loc="lower right", frameon=False)
    for ax in axes[3:]:
        ax.set_xlabel("step")
    for ax in axes[::3]:
        ax.set_ylim(0, 1)
        ax.set_ylabel(f"train reward, mean of {SMOOTH} steps")


def concentration(fig, about, rows):
    """Gini and effective-token ratio by step, and the range that the paper has for ARCA."""
    axes = fig.subplots(2, 2, sharex=True, sharey=True)
    published = [v for (rule, _), v in PUBLISHED.items() if rule == "arca"]
    columns = (("gini", "Gini", 3), ("effective_token_ratio", "effective-token ratio", 4))
    for line, power in zip(axes, (2.0, 1.0), strict=True):
        for ax, (key, name, at) in zip(line, columns, strict=True):
            ends = min(v[at] for v in published), max(v[at] for v in published)
            ax.axhspan(*ends, color="#000000", alpha=0.1, linewidth=0, label="ARCA in the paper")
            for rule in STYLE:
                draw_curve(ax, curve(rows, cell_of(about, rule, power), key), rule, read(rule))
            ax.set(ylim=(-0.03, 1.03), title=f"{name}, sharpening {power:g}")
    for ax in axes[1]:
        ax.set_xlabel("step")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)


def sharpening(fig, about, rows):
    """Gini by exponent, of all rules on the completions of ARCA's final adapters."""
    ax = fig.subplots()
    main = [row for row in rows if (row["rule"], row["rank"]) == ("arca", about["rank"])]
    measured = [row["concentration"] for row in main if "concentration" in row]
    for rule in measured[0] if measured else ():
        powers = sorted(measured[0][rule], key=float)
        points = [crossed([[m[rule][p][0][0]] for m in measured]) for p in powers]
        ends = [np.array([getattr(e, key) for e in points]) for key in ("mean", "low", "high")]
        colour, marker, _ = STYLE[rule]
        where = np.array([float(p) for p in powers])
        draw_curve(ax, (where, *ends), rule, read(rule), marker=marker, markersize=4)
        how = dict(color="none", markersize=11, markeredgecolor=colour)
        rank = about["rank"] if rule == "arca" else 64  # the others were run at 64 only
        ax.plot(2, PUBLISHED[rule, rank][3], marker, **how)
    ax.set_xscale("log", base=2)
    ax.set_xticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    ax.axvline(1, color="#999999", linewidth=0.6)
    ax.axvline(2, color="#999999", linewidth=0.6)
    ax.set(xlabel="sharpening (1: the paper's formula, 2: its code)")
    ax.set(ylabel="Gini", ylim=(-0.03, 1.03))
    title = f"{len(measured)} adapters; hollow: published, at rank {about['rank']} (ARCA) or 64"
    ax.set_title(title, fontsize=8)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def classes(fig, about, rows):
    """Where the credit goes, by class of token, the mean over training and seeds."""
    axes = fig.subplots(1, 2, sharey=True)
    for ax, power in zip(axes, (2.0, 1.0), strict=True):
        bars = [("tokens", "uniform", "tokens")]
        bars += [(read(rule), rule, "credit") for rule in STYLE if rule != "uniform"]
        for i, (_, rule, kind) in enumerate(bars):
            runs = in_cell(rows, cell_of(about, rule, power)).values()
            if not runs:
                continue
            shares, left = np.mean([row[kind] for row in runs], axis=0, dtype=float), 0.0
            for share, colour in zip(shares, CLASS_COLOURS, strict=True):
                ax.barh(i, share, left=left, color=colour, edgecolor="white")
                if share > 0.06:
                    ink = "white" if colour in ("#0072B2", "#009E73", "#D55E00") else "black"
                    how = dict(ha="center", va="center", fontsize=7, color=ink)
                    ax.text(left + share / 2, i, f"{100 * share:.0f}", **how)
                left += share
        ax.set_yticks(range(len(bars)), [name for name, *_ in bars])
        ax.set(xlim=(0, 1), xlabel="share, %", title=f"sharpening {power:g}")
        ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}")
    axes[0].invert_yaxis()
    bars = axes[0].containers[: len(CLASSES)]
    fig.legend(bars, CLASSES, loc="outside lower center", ncols=7, frameon=False)


# name: (what draws it, width and height in inches)
FIGURES = {
    "learning": (learning, (8, 5)),
    "concentration": (concentration, (8, 6)),
    "sharpening": (sharpening, (6.4, 3.8)),
    "classes": (classes, (8, 3.8)),
}


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", default=str(default_file()))
    parser.add_argument("--out", default="", help="a folder for the PNGs; default: the file's")
    args = parser.parse_args()
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8})
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    about, rows = read_results(args.results)
    if not any(row["rule"] != "base" for row in rows):
        raise UserError(f"{args.results} holds no training runs yet: let the sweep go on")
    out = Path(args.out or Path(args.results).parent)
    out.mkdir(parents=True, exist_ok=True)
    for name, (draw, size) in FIGURES.items():
        fig = Figure(figsize=size, dpi=160, layout="constrained")
        draw(fig, about, rows)
        path = out / f"{about['preset']}-{name}.png"
        fig.savefig(path)
        print(path)


if __name__ == "__main__":
    run_cli(main)
