"""The view of `python credit.py`, drawn: on the screen, as a page (credit.html), as a figure.

All of it is made of the groups that plumbing/credit_view.py computes.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

import torch

from credit import METHODS, effective_token_ratio, gini
from run.metrics import CLASSES

TOP = 15  # weights from here on are shaded alike; 0, 1, 3, 7 and 15 are then equally far apart
LIGHT = ["#ffffff", "#dfe3e8", "#90b7ea", "#3674c5", "#0f3277"]  # on paper: those five weights
DARK = ["#191c20", "#353a40", "#3e6290", "#5da3e9", "#ceedff"]


def shade(weight):
    """How dark a weight is: 0 for none, 1/4 for the mean of 1, and 1 from TOP on."""
    return min(1.0, math.log1p(max(0.0, weight)) / math.log1p(TOP))


def is_right(c):
    return c["reward"] > 0


def telling_pair(groups):
    """The newest group with right and wrong completions, and the first of each; or, where there is
    none, the last group and its first two."""
    for group in reversed(groups):
        right = [c for c in group["completions"] if is_right(c)]
        wrong = [c for c in group["completions"] if not is_right(c)]
        if right and wrong:
            return group, [right[0], wrong[0]]
    return groups[-1], groups[-1]["completions"][:2]


def verdict(c):
    """Such as `✓ right, advantage +0.54, 61 tokens`."""
    side = "✓ right" if is_right(c) else "✗ wrong"
    return f"{side}, advantage {c['advantage']:+.2f}, {len(c['tokens'])} tokens"


# ---- Screen --------------------------------------------------------------------------------------


def shaded_lines(tokens, weights, width):
    """Tokens on greys of the 256-colour palette, more weight being darker, in lines of a width."""
    line, used = "", 0
    for token, weight in zip(tokens, weights, strict=True):
        if used and used + len(token) > width:
            yield line + "\033[0m"
            line, used = "", 0
        grey = 255 - round(23 * shade(weight))
        ink = 16 if grey > 243 else 231  # black, or white
        line, used = line + f"\033[48;5;{grey};38;5;{ink}m{token}", used + len(token)
    yield line + "\033[0m"


def print_row(name, tokens, weights, G, ratio):
    """A completion shaded by weight, after a name, the Gini and the effective-token ratio."""
    width = max(20, shutil.get_terminal_size((100, 0)).columns - 32)
    label = f"{name[:17]:17}  {G:4.2f}  {ratio:4.2f}  "
    for line in shaded_lines(tokens, weights, width):
        print(label + line)
        label = " " * 31


def show_own(groups, own):
    """On the screen: the rule of the run at up to six of the steps that it has kept."""
    chosen = sorted({i * (len(groups) - 1) // 5 for i in range(6)})
    print(f"{own}, the rule of the run, at {len(chosen)} of {len(groups)} steps it has kept")
    for group in (groups[i] for i in chosen):
        print(f"\n{group['title']}\n{'':19}Gini  eff.")
        for c in group["completions"]:
            m, on = torch.tensor([c["own"]]), torch.ones(1, len(c["own"]))
            numbers = gini(m, on).item(), effective_token_ratio(m, on).item()
            print_row("✓ right" if is_right(c) else "✗ wrong", c["tokens"], c["own"], *numbers)


def show_all(groups, names, p):
    """On the screen: every rule on a telling pair of completions."""
    group, pair = telling_pair(groups)
    print(f"\nEvery rule at sharpening {p}. Darker: more weight; eff.: effective-token ratio.")
    print(group["title"])
    for c in pair:
        print(f"\n{verdict(c)}\n{'rule':19}Gini  eff.")
        numbers = (c[key][p - 1] for key in ("weights", "gini", "ratio"))
        for name, *row in zip(names, *numbers, strict=True):
            print_row(name, c["tokens"], *row)


# ---- Page ----------------------------------------------------------------------------------------


def formula(name):
    """What the docstring of a rule says first."""
    text = METHODS[name][0].__doc__ if name in METHODS else ""
    return " ".join((text or "").split("\n\n")[0].split())


def page(groups, names, p, own, title):
    """credit.html: the template with everything it draws embedded as JSON, in which no text from a
    model can end the script it is in."""
    rules = [dict(name=name, formula=formula(name)) for name in names]
    about = dict(title=title, own=own, p=p, rules=rules, classes=CLASSES, groups=groups)
    text = json.dumps(about | dict(top=TOP, light=LIGHT, dark=DARK), allow_nan=False)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text.replace("<", "\\u003c"))


# ---- Figure --------------------------------------------------------------------------------------


def draw_band(ax, tokens, m, wide, colours):
    """A heat map on the axes: weights m (R, n) under the n tokens they are of."""
    cells = [[shade(w) for w in row] for row in m]
    mesh = ax.pcolormesh(cells, cmap=colours, vmin=0, vmax=1, edgecolors="#c3c9d1", linewidth=0.3)
    ax.set(xlim=(0, wide), ylim=(len(m), 0), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for i, token in enumerate(tokens):
        word = token.strip() or "␣"
        style = dict(rotation=90 if len(word) > 2 else 0, fontsize=7.5 if len(word) > 2 else 9)
        style |= dict(ha="center", va="bottom", family="monospace", parse_math=False)
        ax.text(i + 0.5, -0.3, word if len(word) < 14 else word[:12] + "…", **style)
    return mesh


def figure(groups, names, p, path):
    """credit.png: for a right and a wrong completion, every rule as a row of shaded tokens; False
    without matplotlib. A completion goes on below after 64 tokens, and ends after 256."""
    try:
        from matplotlib.colors import LinearSegmentedColormap  # optional, and for this only
        from matplotlib.figure import Figure
    except ImportError:
        return False
    group, pair = telling_pair(groups)
    wide = min(64, max(len(c["tokens"]) for c in pair))
    bands = [(c, at) for c in pair for at in range(0, min(256, len(c["tokens"])), wide)]
    colours = LinearSegmentedColormap.from_list("credit", LIGHT)
    fig = Figure(figsize=(9, 0.9 + 2.75 * len(bands)), dpi=200, layout="constrained")
    fig.suptitle(group["title"], fontsize=10, parse_math=False)
    axes = fig.subplots(len(bands), 1, squeeze=False)[:, 0]
    for ax, (c, at) in zip(axes, bands, strict=True):
        m = [row[at : at + wide] for row in c["weights"][p - 1]]
        mesh = draw_band(ax, c["tokens"][at : at + wide], m, wide, colours)
        ax.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=8)
        if at == 0:
            said = dict(fontsize=9, weight="bold", ha="right", transform=ax.transAxes)
            ax.text(-0.008, 1.06, verdict(c).replace(", ", "\n"), **said)
            ax.text(1.01, 1.01, "Gini    eff.", transform=ax.transAxes, fontsize=8)
            pairs = zip(c["gini"][p - 1], c["ratio"][p - 1], strict=True)
            for i, (G, ratio) in enumerate(pairs):
                ax.text(wide * 1.01, i + 0.8, f"{G:.2f}    {ratio:.2f}", fontsize=8)
    label = f"weight at sharpening {p} (1: the mean)"
    bar = fig.colorbar(mesh, ax=axes, location="bottom", shrink=0.4, aspect=40)
    bar.set_label(label, fontsize=8)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "1", "3", "7", f"{TOP}+"], fontsize=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks some sign of the model's; it draws a box
        fig.savefig(path)
    return True
