"""The completions that a run kept: what every rule pays their tokens, and statistics of it.

A sample is a dict as run.folder.sample_rows makes it; a group is what draw.py shows of a problem.
"""

import math
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from credit import effective_token_ratio, gini
from run.metrics import CLASSES, rank_correlation, token_classes
from system.errors import UserError, printable
from system.files import each_row, raw_lines

STEPS = 100  # that are shown at most, of all runs together


def clean(text):
    """Return text from a model, fit for one line of any screen."""
    return printable(text, {"\n": "↵", "\t": "⇥", "\r": "↵"})


def with_numbers(row) -> dict:
    """Return a row of samples.jsonl with NaN for each null in its numbers. Several exceptions say
    that these, or its texts, are none, or that there is not one number a token."""
    tokens, rules = row["tokens"], row["rules"]
    "".join([row["problem"], row["gold"], row["text"], row["credit"]] + tokens)  # TypeError
    signals = np.array([row["logp"], row["entropy"], row["residual"]], dtype=float)
    weights = np.array(list(rules.values()), dtype=float)
    T = len(tokens)
    if not T or signals.shape != (3, T) or weights.shape != (len(rules), 2, T):
        raise ValueError
    numbers = dict(zip(("logp", "entropy", "residual"), signals.tolist(), strict=True))
    return row | numbers | dict(rules=dict(zip(map(clean, rules), weights.tolist(), strict=True)))


def step_of(line) -> bytes:
    """Return the step of a line that a run wrote, unread; b"" if it does not begin with one."""
    found = re.match(rb'\{"step": ([0-9]+),', line)
    return found[1] if found else b""


def read_samples(folder, most=STEPS) -> list[dict]:
    """Return the samples that a run has kept, [] if none yet; of many steps, about `most` that are
    evenly spaced, the last among them. UserError names a line that is no sample."""
    # 1) Which steps. To parse all lines of a run of many steps would take a minute.
    path = Path(folder) / "samples.jsonl"
    lines = raw_lines(path) if path.exists() else ()
    steps = list(dict.fromkeys(step_of(line) for line, _ in lines))
    chosen = {*steps[:: math.ceil(len(steps) / most) or 1], *steps[-1:], b""}
    # 2) Their samples.
    samples = []
    for row, where in each_row(path, lambda line: step_of(line) in chosen):
        try:
            samples.append(with_numbers(row))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{where} is damaged (no sample): mend it") from None
    return with_common_rules(samples, path) if samples else []


def need_samples(folder) -> list[dict]:
    """Return the samples that a run has kept; UserError if there are none."""
    samples = read_samples(folder)
    if not samples:
        raise UserError(f"{folder} holds no samples: give the folder of a run that has begun")
    return samples


def with_common_rules(samples, path) -> list[dict]:
    """Return samples with the rules that all of them have: a run that was resumed may have got
    another one on the way."""
    names = [name for name in samples[0]["rules"] if all(name in x["rules"] for x in samples)]
    if not 0 < len(names) < 100:
        raise UserError(f"{path}: its lines share {len(names)} rules, not 1 to 99: run it again")
    for sample in samples:
        sample["rules"] = {name: sample["rules"][name] for name in names}
    return samples


def rule_statistics(sample) -> dict:
    """Compute what R rules make of a sample, at sharpening 1 and 2: Gini and effective-token ratio
    (2, R), the share of the credit by token class (2, R, C), and the rank correlation of the rules
    (2, R, R), nan where one is constant."""
    rules = torch.tensor(list(sample["rules"].values())).transpose(0, 1)  # (2, R, T)
    R = rules.shape[1]
    rows = rules.flatten(0, 1)  # (2R, T)
    mask = torch.ones_like(rows)
    finished = not sample["text"].endswith(sample["tokens"][-1])  # the text leaves out the end
    classes = torch.tensor(token_classes(sample["tokens"], finished))  # (T,)
    paid = rules @ torch.nn.functional.one_hot(classes, len(CLASSES)).float()  # (2, R, C)
    # Each rule with each other one, which says nothing where one of them is constant.
    constant = (rows == rows[:, :1]).all(dim=1).view(2, R)
    correlation = torch.empty(2, R, R)
    for r in range(R):
        other = rules[:, r].repeat_interleave(R, dim=0)  # (2R, T)
        correlation[:, :, r] = rank_correlation(rows, other, mask).view(2, R)
    correlation[constant[:, :, None] | constant[:, None, :]] = torch.nan
    return {
        "gini": gini(rows, mask).view(2, R),
        "ratio": effective_token_ratio(rows, mask).view(2, R),
        "classes": paid / paid.sum(dim=2, keepdim=True),
        "correlation": correlation,
    }


def make_group(samples) -> dict:
    """Return the completions of a problem, and the means of their statistics."""
    statistics = [rule_statistics(sample) for sample in samples]
    group = {"step": samples[0]["step"]}
    group["problem"] = clean(" ".join(samples[0]["problem"].split()))
    group["gold"] = clean(samples[0]["gold"])
    group["title"] = f"step {group['step']}: {group['problem']}  (gold {group['gold']})"
    group["completions"] = []
    for sample, own in zip(samples, statistics, strict=True):
        shown = {key: sample[key] for key in ("reward", "advantage", "logp", "entropy", "residual")}
        shown["tokens"] = [clean(token) for token in sample["tokens"]]
        shown["weights"] = list(zip(*sample["rules"].values(), strict=True))  # (2, R, T)
        measured = {key: own[key].tolist() for key in ("gini", "ratio")}
        group["completions"].append(shown | measured)
    for key in statistics[0]:
        group[key] = torch.stack([x[key] for x in statistics]).nanmean(dim=0).tolist()
    return group


def make_groups(samples) -> list[dict]:
    """Return the groups of samples; those of a group come one after the other."""
    groups = groupby(samples, key=lambda sample: (sample["step"], sample["problem"]))
    return [make_group(list(group)) for _, group in groups]
