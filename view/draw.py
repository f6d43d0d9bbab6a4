"""Draw groups, which __main__.py makes, on the screen and as a page (credit.html)."""

import math
import shutil
from pathlib import Path

from credit import METHODS
from run.metrics import CLASSES
from system.files import to_json

TOP = 15  # weights from here on are shaded alike; 0, 1, 3, 7 and 15 are then equally far apart
LIGHT = ["#ffffff", "#dfe3e8", "#90b7ea", "#3674c5", "#0f3277"]  # on paper: those five weights
DARK = ["#191c20", "#353a40", "#3e6290", "#5da3e9", "#ceedff"]


def shade(weight):
    """Return how dark a weight is: 0 for 0, 1/4 for the mean of 1, and 1 from TOP on."""
    return min(1.0, math.log1p(max(0.0, weight)) / math.log1p(TOP))


def is_right(completion):
    return completion["reward"] == 1


def verdict(completion):
    """Return such as `✓ right, advantage +0.54, 61 tokens`, or the reward if it is between."""
    reward = completion["reward"]
    side = f"reward {reward:.2f}" if 0 < reward < 1 else "✗ wrong"
    side = "✓ right" if is_right(completion) else side
    return f"{side}, advantage {completion['advantage']:+.2f}, {len(completion['tokens'])} tokens"


def telling_pair(groups):
    """Return the newest group whose rewards differ, and its best and worst completion; or, if there
    is no such group, the last group and its first two."""
    for group in reversed(groups):
        best = max(group["completions"], key=lambda c: c["reward"])
        worst = min(group["completions"], key=lambda c: c["reward"])
        if best["reward"] > worst["reward"]:
            return group, [best, worst]
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
    text = to_json(shown | dict(top=TOP, light=LIGHT, dark=DARK))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text.replace("<", "\\u003c"))
