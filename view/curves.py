"""Read the folders of runs, and make the learning curves of those that belong together.

A run is a dict of its name, settings, history and evals. Runs that differ only in their seed are
one line: at each step the mean of those that have made it, from the smallest to the largest.
"""

import json
import math
import os
import re
from pathlib import Path

from run.checkpoints import CHANGEABLE, INPUTS
from run.folder import mean, outcome, spread, thin
from system.errors import UserError
from system.files import NUMBERS, checked, each_row, is_number, read_json, read_rows
from view.samples import clean

POINTS = 200  # of a curve at most; a point of a longer one is the mean of several steps
MOST = 10  # lines in a legend
FREE = ("seed", *CHANGEABLE)  # settings in which the runs of a line may differ
PANELS = {  # what is drawn by step: (title, the end of its axis if it is fixed)
    "reward": ("Train reward", 1),
    "entropy": ("Entropy, nats a token", None),
    "length": ("Tokens a completion", None),
    "truncated": ("Truncated, share of completions", None),
    "gini": ("Gini of the multipliers", 1),
    "effective_token_ratio": ("Effective-token ratio", 1),
    "seconds_rollout": ("Seconds a step: rollout", None),
    "seconds_update": ("Seconds a step: update", None),
    "tokens_per_second": ("Tokens a second", None),
}
# Colours on white and on black, which colour-blind readers tell apart, too.
COLOURS = [
    ("#2b2f36", "#f2f4f7"), ("#d57800", "#f0ce20"), ("#1f66ff", "#8db9ff"), ("#009c65", "#22e08c"),
    ("#8f2400", "#d0740f"), ("#14297a", "#4d66ff"), ("#c279b9", "#a07fa8"),
]  # fmt: skip
RULES = [  # each always has the same colour
    "uniform", "surprisal", "entropy_reduction", "divergence", "arca", "permuted", "random",
    "gcpo", "gcpo_linear", "delta", "eapo", "forking", "entropy_advantage",
]  # fmt: skip


# ---- Runs ----------------------------------------------------------------------------------------
def is_run(folder) -> bool:
    """Return whether train.py has begun to fill a folder. (Models have a config.json, too.)"""
    files = [folder / name for name in NUMBERS]
    if any(file.is_file() and file.stat().st_size for file in files):
        return True
    config = folder / "config.json"
    return config.is_file() and b'"settings"' in config.read_bytes()


def find_runs(names) -> list[Path]:
    """Return the folders of runs among these, or below them, such as in that of a sweep, each once;
    UserError names one that holds none."""
    found = {}
    for name in names:
        here = {}
        seen = set()  # links may lead in a circle
        for top, below, _ in os.walk(name, followlinks=True):
            folder = Path(top)
            place = folder.resolve()
            if is_run(folder):
                here[place] = folder
            if place in seen or place in here:
                below.clear()  # is not searched
            seen.add(place)
            below.sort()
        if not here:
            raise UserError(f"{name or 'RUN'} holds no run: give a folder that train.py has made")
        found |= here
    return list(found.values())


def read_run(folder) -> dict:
    """Return what a run has left so far, of its steps only what is shown; UserError names a file
    that is damaged, and the line."""
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    config = checked(config, path, settings=dict, digests=dict)
    settings, digests = (config.get(name, {}) for name in ("settings", "digests"))
    sizes = [settings.get(name) for name in ("prompts", "samples")]
    completions = math.prod(sizes) if all(is_number(x, 1) for x in sizes) else math.nan
    history = []
    for row, _ in each_row(folder / "metrics.jsonl"):
        row["length"] = row["completion_tokens"] / completions
        history.append({key: row[key] for key in ("step", "skipped", *PANELS)})
    name = clean(folder.resolve().name)
    evals = read_rows(folder / "evals.jsonl")
    found = dict(name=name, folder=folder, settings=settings, digests=digests)
    return found | dict(history=history, evals=evals)


# ---- Lines ---------------------------------------------------------------------------------------
def by_seed(runs) -> list[list[dict]]:
    """Return lists of the runs that are equal but for their seed and what changes no number."""
    groups = {}
    for run in runs:
        # What is empty or 0 was no setting yet when older runs were made.
        same = {key: x for key, x in run["settings"].items() if x and key not in FREE}
        if run["digests"]:  # say what the inputs are, wherever they lie
            same = {key: x for key, x in same.items() if key not in INPUTS} | run["digests"]
        key = json.dumps(same, sort_keys=True) if same else str(run["folder"])
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def in_short(name, value) -> str:
    """Return a setting in few words: `rank 4`, `model tiny` (of a path, its end), `chat`."""
    value = f"{value:g}" if isinstance(value, float) else str(value)
    value = value.rstrip("/").rpartition("/")[2]
    return name if value == "True" else f"{name} {value:.30}"


def labels(groups) -> list[str]:
    """Return the name of each group: its rule, and the settings in which the groups differ."""
    settings = [group[0]["settings"] for group in groups]
    known = [each for each in settings if each]
    differ = []
    for name in dict.fromkeys(name for each in known for name in each):
        values = {json.dumps(each.get(name) or None) for each in known}
        if len(values) > 1 and name not in ("credit", *FREE):
            differ.append(name)
    found = []
    for group, each in zip(groups, settings, strict=True):
        parts = [str(each.get("credit", group[0]["name"]))]
        parts += [in_short(name, each[name]) for name in differ if each.get(name)]
        label = clean(", ".join(parts))[:80]
        taken = label in found
        found.append(f"{label} ({group[0]['name']})" if taken else label)
    return found


def merge(many, keys) -> list[dict]:
    """Return a row for each step that one of several runs has made: the means of the keys and, as
    key_95, their smallest and largest value. The rows of a single run stay as they are."""
    if len(many) == 1:
        return many[0]
    by_step = {}
    for rows in many:
        for row in rows:
            by_step.setdefault(row["step"], []).append(row)
    merged = []
    for step in sorted(by_step):
        new = {"step": step}
        for key in keys:
            values = [row[key] for row in by_step[step] if key in row]
            finite = list(filter(math.isfinite, values))
            new |= {key: mean(finite)} if values else {}
            new |= {f"{key}_95": [min(finite), max(finite)]} if finite else {}
        merged.append(new)
    return merged


def rate_names(runs) -> list[str]:
    """Return the held-out rates of runs: greedy, then pass@1, pass@2, ..."""
    keys = {key for run in runs for row in run["evals"] for key in row}
    powers = sorted(int(key[5:]) for key in keys if re.fullmatch("pass@[0-9]{1,6}", key))
    return ["greedy"] * ("greedy" in keys) + [f"pass@{k}" for k in powers]


def series(rows, key) -> dict:
    """Return the curve of a key: the steps, and at each the value, and the ends of its band."""
    nowhere = (math.nan, math.nan)
    points = [(row.get(key, math.nan), *row.get(f"{key}_95", nowhere)) for row in rows]
    rounded = [[float(f"{x:.6g}") for x in point] for point in points]
    mean, low, high = zip(*rounded, strict=True) if rounded else ((), (), ())
    return dict(x=[row["step"] for row in rows], mean=mean, low=low, high=high)


def make_line(runs, label, every) -> dict:
    """Return the line of runs that differ only in their seed: its history and evals, as those of
    one run, and its curves."""
    keys = ("skipped", *PANELS)
    rates = rate_names(runs)
    evals = merge([run["evals"] for run in runs], rates)
    thinned = merge([thin(run["history"], keys, every) for run in runs], keys)
    curves = {key: series(thinned, key) for key in PANELS}
    curves |= {key: series(evals, key) for key in rates}
    rule = clean(str(runs[0]["settings"].get("credit", "")))[:20]
    history = merge([run["history"] for run in runs], keys)
    return dict(label=label, rule=rule, runs=runs, history=history, evals=evals, curves=curves)


def make_lines(runs) -> tuple[list[dict], int]:
    """Return the lines of runs, with their styles, and how many steps a point is the mean of."""
    last = max([row["step"] for run in runs for row in run["history"]], default=1)
    every = math.ceil(last / POINTS) or 1
    groups = by_seed(runs)
    lines = []
    for group, label in zip(groups, labels(groups), strict=True):
        line = make_line(group, label, every)
        rule = line["rule"]
        number = RULES.index(rule) if rule in RULES else sum(rule.encode("utf-8", "replace"))
        colour = COLOURS[number % len(COLOURS)]
        alike = [other for other in lines if other["colour"] == colour]
        lines.append(line | dict(colour=colour, style=len(alike) % MOST))  # dashes, then thicker
    return lines, every


def choices(lines) -> list[tuple[str, list[int]]]:
    """Return what a legend can show, by name: all lines or, if they are too many, one of each rule
    or those of a rule, in tens."""
    if len(lines) <= MOST:
        return [("all", list(range(len(lines))))]
    rules = {}
    for i, line in enumerate(lines):
        rules.setdefault(line["rule"] or "unknown rule", []).append(i)
    found = []
    one_each = {"first lines of the rules": [members[0] for members in rules.values()]}
    for name, members in (one_each | rules).items():
        for start in range(0, len(members), MOST):
            part = members[start : start + MOST]
            found.append((f"{name} {start + 1} to {start + len(part)}", part))
    return found


def panels(lines) -> list[dict]:
    """Return what is drawn, and where its axis ends: the train reward, then the held-out rates,
    then the rest."""
    rates = rate_names([run for line in lines for run in line["runs"]])
    held_out = {key: (f"Held-out {key}", 1) for key in rates}
    found = []
    for key, (title, top) in ({"reward": PANELS["reward"]} | held_out | PANELS).items():
        curves = [line["curves"][key] for line in lines if key in line["curves"]]
        values = [x for curve in curves for x in (*curve["mean"], *curve["high"])]
        most = 1.05 * max([x for x in values if math.isfinite(x)], default=0)
        found.append(dict(key=key, title=title, top=top or most or 1))
    return found


# ---- In words ------------------------------------------------------------------------------------
def steps_done(run) -> str:
    """Return such as `12 of 80 steps`."""
    done = run["history"][-1]["step"] if run["history"] else 0
    return f"{done} of {clean(str(run['settings'].get('steps', '?')))[:12]} steps"


def time_split(history) -> str:
    """Return how the time of the steps was spent, in words."""
    keys = ("seconds_rollout", "seconds_update", "tokens_per_second")
    rollout, update, rate = (mean(row.get(key) for row in history) for key in keys)
    share = 100 * rollout / (rollout + update) if rollout + update else math.nan
    return f"{share:.0f} % of the time in rollouts, {rate:,.0f} tokens a second"


def about(run, label) -> dict[str, str]:
    """Return what there is to say of a run, in words."""
    found = {
        "run": run["name"],
        "line": label,
        "seed": clean(str(run["settings"].get("seed", "?"))),
    }
    found["steps"] = steps_done(run)
    for name, (before, after) in outcome(run["history"], run["evals"]).items():
        found[clean(name)] = f"{before} → {after}" if after else before
    if run["history"]:
        found |= {name: f"{x:.3f}" for name, x in spread(run["history"]).items()}
        found["time"] = time_split(run["history"])
    return found
