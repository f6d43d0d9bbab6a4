"""Draw groups, which __main__.py makes: on the screen, as a page (credit.html), as a figure."""

import json
import math
import shutil
import warnings
from pathlib import Path

from credit import METHODS
from run.metrics import CLASSES

TOP = 15  # weights from here on are shaded alike; 0, 1, 3, 7 and 15 are then equally far apart
LIGHT = ["#ffffff", "#dfe3e8", "#90b7ea", "#3674c5", "#0f3277"]  # on paper: those five weights
DARK = ["#191c20", "#353a40", "#3e6290", "#5da3e9", "#ceedff"]


def shade(weight):
    """Return how dark a weight is: 0 for 0, 1/4 for the mean of 1, and 1 from TOP on."""
    return min(1.0, math.log1p(max(0.0, weight)) / math.log1p(TOP))


def is_right(completion):
    return completion["reward"] > 0


def verdict(completion):
    """Return such as `✓ right, advantage +0.54, 61 tokens`."""
    side = "✓ right" if is_right(completion) else "✗ wrong"
    return f"{side}, advantage {completion['advantage']:+.2f}, {len(completion['tokens'])} tokens"


def telling_pair(groups):
    """Return the newest group with right and wrong completions, and the first of each; or, if there
    is no such group, the last group and its first two."""
    for group in reversed(groups):
        right = [c for c in group["completions"] if is_right(c)]
        wrong = [c for c in group["completions"] if not is_right(c)]
        if right and wrong:
            return group, [right[0], wrong[0]]
    return groups[-1], groups[-1]["completions"][:2]


def shaded_lines(tokens, weights, width):
    """Return lines of tokens on greys of the 256-colour palette; more weight is darker."""
    lines = [""]
    used = 0  # columns of the screen
    for token, weight in zip(tokens, weights, strict=True):
        if used and used + len(token) > width:
            lines.append("")
            used = 0
        grey = 255 - round(23 * shade(weight))
        ink = 16 if grey > 243 else 231  # black, or white
        lines[-1] += f"\033[48;5;{grey};38;5;{ink}m{token}"
        used += len(token)
    return [f"{line}\033[0m" for line in lines]


def show(groups, names, power):
    """Print every rule on a telling pair of completions: Gini, effective-token ratio, tokens."""
    group, pair = telling_pair(groups)
    width = max(20, shutil.get_terminal_size((100, 0)).columns - 32)
    print(f"\nEvery rule at sharpening {power}. Darker: more weight; eff.: effective-token ratio.")
    print(group["title"])
    for completion in pair:
        print(f"\n{verdict(completion)}\n{'rule':19}Gini  eff.")
        columns = [completion[key][power - 1] for key in ("weights", "gini", "ratio")]
        for name, weights, concentration, ratio in zip(names, *columns, strict=True):
            label = f"{name[:17]:17}  {concentration:4.2f}  {ratio:4.2f}  "
            for line in shaded_lines(completion["tokens"], weights, width):
                print(label + line)
                label = " " * 31


def page(groups, names, power, own, title):
    """Return credit.html: the template, with what it draws as JSON that cannot end its script."""
    rules = []
    for name in names:
        about = (METHODS[name].multipliers.__doc__ or "") if name in METHODS else ""
        rules.append(dict(name=name, formula=" ".join(about.split("\n\n")[0].split())))
    shown = dict(title=title, own=own, p=power, rules=rules, classes=CLASSES, groups=groups)
    text = json.dumps(shown | dict(top=TOP, light=LIGHT, dark=DARK), allow_nan=False)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text.replace("<", "\\u003c"))


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


def figure(groups, names, power, path) -> bool:
    """Draw credit.png: a right and a wrong completion, each rule a row of shaded tokens. A heat map
    has 64 tokens, a completion four of them at most. Return False without matplotlib."""
    try:
        from matplotlib.colors import LinearSegmentedColormap  # optional, and for this only
        from matplotlib.figure import Figure
    except ImportError:
        return False
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
    return True
