"""The credit of every rule on a right and a wrong completion of a run, as a figure.

python -m view.credit_figure RUN --out docs/credit.png
"""

import warnings
from importlib.util import find_spec

from system.errors import Parser, UserError, run_cli
from view.draw import LIGHT, TOP, shade, telling_pair, verdict
from view.samples import make_groups, need_samples


def draw_band(ax, tokens, weights, wide, colours):
    """Draw a heat map of weights (R, n) under the n tokens that they are of."""
    cells = [[shade(weight) for weight in row] for row in weights]
    mesh = ax.pcolormesh(cells, cmap=colours, vmin=0, vmax=1, edgecolors="#c3c9d1", linewidth=0.3)
    ax.set(xlim=(0, wide), ylim=(len(weights), 0), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    style = dict(ha="center", va="bottom", family="monospace", parse_math=False)
    for i, token in enumerate(tokens):
        word = token.strip() or "␣"
        turned = dict(rotation=90, fontsize=7.5) if len(word) > 2 else dict(fontsize=9)
        ax.text(i + 0.5, -0.3, word if len(word) < 14 else word[:12] + "…", **style, **turned)
    return mesh


def figure(groups, names, power, path):
    """Draw a right and a wrong completion, each rule a row of shaded tokens. A heat map has 64
    tokens, a completion four of them at most."""
    from matplotlib.colors import LinearSegmentedColormap  # optional, as in picture.py
    from matplotlib.figure import Figure

    # A band is a heat map: up to `wide` tokens of a completion, from a start on.
    group, pair = telling_pair(groups)
    wide = min(64, max(len(c["tokens"]) for c in pair))
    bands = [(c, start) for c in pair for start in range(0, min(256, len(c["tokens"])), wide)]
    fig = Figure(figsize=(9, 0.9 + 2.75 * len(bands)), dpi=200, layout="constrained")
    fig.suptitle(group["title"], fontsize=10, parse_math=False)
    axes = fig.subplots(len(bands), 1, squeeze=False)[:, 0]
    colours = LinearSegmentedColormap.from_list("credit", LIGHT)
    for ax, (completion, start) in zip(axes, bands, strict=True):
        tokens = completion["tokens"][start : start + wide]
        weights = [row[start : start + wide] for row in completion["weights"][power - 1]]
        mesh = draw_band(ax, tokens, weights, wide, colours)
        ax.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=8)
        if start > 0:
            continue
        # Beside the first band: what the completion earned, and how concentrated each rule is.
        style = dict(weight="bold", ha="right", transform=ax.transAxes)
        ax.text(-0.008, 1.06, verdict(completion).replace(", ", "\n"), fontsize=9, **style)
        ax.text(1.01, 1.01, "Gini    eff.", transform=ax.transAxes, fontsize=8)
        numbers = zip(completion["gini"][power - 1], completion["ratio"][power - 1], strict=True)
        for i, (concentration, ratio) in enumerate(numbers):
            ax.text(wide * 1.01, i + 0.8, f"{concentration:.2f}    {ratio:.2f}", fontsize=8)
    bar = fig.colorbar(mesh, ax=axes, location="bottom", shrink=0.4, aspect=40)
    bar.set_label(f"weight at sharpening {power} (1: the mean)", fontsize=8)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "1", "3", "7", f"{TOP}+"], fontsize=8)
    with warnings.catch_warnings(action="ignore"):  # the font lacks some sign; it draws a box
        fig.savefig(path)


def main():
    parser = Parser(prog="python -m view.credit_figure", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--sharpening", type=int, choices=(1, 2), default=1)
    parser.add_argument("--out", default="credit.png")
    args = parser.parse_args()
    if not find_spec("matplotlib"):
        raise UserError("the figure needs matplotlib: pip install matplotlib")
    samples = need_samples(args.run)
    figure(make_groups(samples), list(samples[0]["rules"]), args.sharpening, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    run_cli(main)
