"""The learning curves as a picture (view.png), for which matplotlib is needed, and for it only."""

import io
import math
import warnings
from importlib.util import find_spec

from system.files import write_whole
from view.curves import choices, panels

DASHES = ["-", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (1, 3))]  # as in curves.js
ACROSS = 3  # panels beside each other


def look(line) -> dict:
    """Return the colour, dashes and thickness of a line, as matplotlib names them."""
    thick, dash = divmod(line["style"], len(DASHES))
    return dict(color=line["colour"][0], linestyle=DASHES[dash], linewidth=1.4 + thick)


def draw_panel(ax, panel, lines):
    """Draw a number of all lines by step, with their bands; a step without it leaves a gap."""
    for line in lines:
        curve = line["curves"].get(panel["key"])
        if not curve:
            continue
        style = look(line)
        few = sum(map(math.isfinite, curve["mean"])) < 15
        ax.plot(curve["x"], curve["mean"], marker="o" if few else None, markersize=3, **style)
        band = dict(color=style["color"], alpha=0.15, lw=0)
        ax.fill_between(curve["x"], curve["low"], curve["high"], **band)
    ax.set_title(panel["title"], fontsize=9, loc="left", parse_math=False)
    ax.set_ylim(0, panel["top"])
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(linewidth=0.3)


def draw(lines, title, path) -> bool:
    """Write the picture of the first choice of lines; return False if there is no matplotlib."""
    if not find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure  # optional, and for this only
    from matplotlib.lines import Line2D

    # 1) The panels, in rows.
    name, members = choices(lines)[0]
    shown = [lines[i] for i in members]
    drawn = panels(lines)
    rows = math.ceil(len(drawn) / ACROSS)
    size = (10, 2.2 * rows + 0.7 + 0.2 * len(shown))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(rows, ACROSS, squeeze=False).flatten()
    for ax in axes[len(drawn) :]:
        ax.remove()
    for ax, panel in zip(axes, drawn, strict=False):
        draw_panel(ax, panel, shown)
    # 2) Title and legend, in which a dollar sign begins no formula.
    title = title if len(members) == len(lines) else f"{title}: {name}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    handles = [Line2D([], [], **look(line)) for line in shown]
    said = [line["label"].replace("$", r"\$") for line in shown]
    figure.legend(handles, said, loc="outside lower left", fontsize=8, frameon=False)
    # 3) The file. The font may lack some sign, and draws a box.
    image = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        figure.savefig(image)
    write_whole(path, image.getvalue())
    return True
