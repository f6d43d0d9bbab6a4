"""Show what every rule pays the completions that a run kept: on the screen, as a page.

A sample is a dict as run.folder.sample_rows makes it; a group is what draw.py shows of a problem.
"""

from itertools import groupby
from pathlib import Path

if __name__ == "__main__":
    from system.errors import before_imports

    before_imports()

import numpy as np
import torch

from credit import effective_token_ratio, gini
from run.metrics import CLASSES, rank_correlation, token_classes
from system.errors import Parser, UserError, printable, run_cli
from system.files import read_rows, write_whole
from view.draw import page, show


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


def read_samples(folder) -> list[dict]:
    """Read the samples that a run has kept; UserError if there are none, or a line is not one."""
    path = Path(folder) / "samples.jsonl"
    samples = read_rows(path)
    if not samples:
        raise UserError(f"{path} holds no samples: give the folder of a run that has begun")
    for i, sample in enumerate(samples):
        try:
            samples[i] = with_numbers(sample)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{path}, line {i + 1} is damaged (no sample): mend it") from None
    # Rules that all samples have: a run that was resumed may have got another one on the way.
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


def main():
    parser = Parser(prog="python -m view", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--sharpening", type=int, default=1, choices=(1, 2), help="of the screen")
    parser.add_argument("--out", default=".", help="folder for credit.html")
    cfg = parser.parse_args()
    samples = read_samples(cfg.run)
    names = list(samples[0]["rules"])
    groups = make_groups(samples)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    title = f"run {Path(cfg.run).resolve().name}"
    html = page(groups, names, cfg.sharpening, clean(samples[-1]["credit"]), title)
    write_whole(out / "credit.html", html.encode())
    show(groups, names, cfg.sharpening)
    print(printable(f"\npage: {out / 'credit.html'}"))


if __name__ == "__main__":
    run_cli(main)
