"""Show lines (curves.py) and groups (samples.py) on the screen and as a page (view.html)."""

import math
import shutil
import sys
import textwrap
from pathlib import Path

from credit import METHODS
from run.folder import print_outcome
from run.metrics import CLASSES
from system.errors import printable
from system.files import to_json
from view.curves import about, choices, panels, steps_done, time_split

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


def heaviest(tokens, weights, width):
    """Return one line, for a screen without colours: the tokens with most weight, and that."""
    said = ""
    for weight, token in sorted(zip(weights, tokens, strict=True), key=lambda pair: -pair[0]):
        more = f'{weight:.2f} "{token}"'
        if len(said) + len(more) > width:
            break
        said += f"{more}  "
    return [said.rstrip()]


def show_line(line):
    """Print what there is to say of a line: how far it is, before and after, its curve."""
    runs = line["runs"]
    names = ", ".join(run["name"] for run in runs)
    many = f" (mean of {len(runs)} runs; in brackets the smallest and the largest)"
    print("\n" + printable(textwrap.fill(f"{line['label']}: {names}{many * (len(runs) > 1)}", 80)))
    print(printable(", ".join(dict.fromkeys(map(steps_done, runs)))))
    print_outcome(line["history"], line["evals"], line["rule"] or "credit")
    if line["history"]:
        print(time_split(line["history"]))


def show(groups, names, power):
    """Print every rule on a telling pair of completions: Gini, effective-token ratio, tokens."""
    group, pair = telling_pair(groups)
    width = max(20, shutil.get_terminal_size((80, 0)).columns - 32)
    coloured = sys.stdout.isatty()
    weighs = "Darker: more weight" if coloured else "The heaviest tokens, with their weight"
    print(f"\nEvery rule at sharpening {power}; eff.: effective-token ratio.\n{weighs}.")
    print(textwrap.fill(group["title"], 80))
    for completion in pair:
        print(f"\n{verdict(completion)}\n{'rule':19}Gini  eff.")
        columns = [completion[key][power - 1] for key in ("weights", "gini", "ratio")]
        for name, weights, concentration, ratio in zip(names, *columns, strict=True):
            label = f"{name[:17]:17}  {concentration:4.2f}  {ratio:4.2f}  "
            lines = shaded_lines if coloured else heaviest
            for line in lines(completion["tokens"], weights, width):
                print(label + line)
                label = " " * 31


def credit_data(run, samples, groups) -> dict:
    """Return what the page shows of the samples of a run."""
    rules = []
    for name in samples[0]["rules"]:
        about = (METHODS[name].multipliers.__doc__ or "") if name in METHODS else ""
        rules.append(dict(name=name, formula=" ".join(about.split("\n\n")[0].split())))
    own = printable(samples[-1]["credit"])
    return dict(run=run["name"], own=own, rules=rules, groups=groups)


def curves_data(lines, every) -> dict:
    """Return what the page shows of the steps of runs."""
    shown = []
    for line in lines:
        kept = {key: line[key] for key in ("label", "curves", "colour", "style")}
        shown.append(kept | dict(seeds=len(line["runs"])))
    table = [about(run, line["label"]) for line in lines for run in line["runs"]]
    kinds = [dict(name=name, lines=members) for name, members in choices(lines)]
    return dict(lines=shown, every=every, choices=kinds, panels=panels(lines), table=table)


def page(title, curves, credits, power) -> str:
    """Return view.html: the template with its scripts, and with what they draw, as JSON that cannot
    end its script."""
    folder = Path(__file__).parent
    names = ("shared.js", "curves.js", "credit.js")
    scripts = [(folder / name).read_text(encoding="utf-8") for name in names]
    shown = dict(title=title, p=power, classes=CLASSES, curves=curves, credits=credits)
    text = to_json(shown | dict(top=TOP, light=LIGHT, dark=DARK)).replace("<", "\\u003c")
    template = (folder / "page.html").read_text(encoding="utf-8")
    return template.replace("{{scripts}}", "\n".join(scripts)).replace("{{data}}", text)
