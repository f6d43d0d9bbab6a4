"""Credit that one can see: `python credit.py`.

Every rule's weights of the same completions, either sampled now or kept by a run (--run), for
plumbing/credit_draw.py to draw. A sample is a dict as run.sample_rows makes it; a group is what
there is to show of the completions of one problem (of one step).
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

import grpo
from credit import effective_token_ratio, gini
from data.problems import add_prompts, load_problems, problems_of_step
from run.flags import add_flags, load_base
from run.folder import sample_rows
from run.metrics import CLASSES, rank_correlation, token_classes
from system.errors import UserError, printable
from system.files import read_json
from view.draw import figure, page, show_all, show_own

# ---- Samples -------------------------------------------------------------------------------------


def newest_adapter(model):
    """The adapter of the newest run in runs/ that trained this model; empty without one."""
    configs = Path("runs").glob("*/config.json")
    for config in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        adapter = config.parent / "adapter"
        if read_json(config).get("settings", {}).get("model") == model and adapter.exists():
            return str(adapter)
    return ""


def draw_samples(s):
    """Samples of test problems, with every rule's weights: what a run would keep of them all."""
    s.adapter = s.adapter or newest_adapter(s.model)
    base = "no adapter: this is the base model, for which ARCA and divergence vanish"
    print(f"adapter: {s.adapter}" if s.adapter else base)
    model, tokenizer = load_base(s)
    every = load_problems(s.data, "test")
    problems = problems_of_step(every, min(s.problems, len(every)), s.seed, 1)
    problems = [add_prompts(p, tokenizer, s.chat) for p in problems]
    # What the Settings of train.py would say besides.
    vars(s).update(top_p=1.0, kl=0.0, micro_tokens=2048, arca_layer="final", credit="arca")
    r = grpo.rollout(model, tokenizer, problems, s, 0, compare=True)
    known = grpo.given_signals(r, grpo.group_advantages(r.rewards).flatten())
    wanted = grpo.wanted_signals(s, compare=True)
    everyone, found = torch.ones(len(known.mask)).bool(), grpo.to_be_found(known, wanted)
    groups = grpo.micro_batches(r, everyone, s.micro_tokens)
    grpo.go_over(model, r, groups, False, known, None, None, s, wanted, found)
    known = replace(known, **found)
    return list(sample_rows(r, range(len(everyone)), known, s, tokenizer))


def is_sample(row):
    """Whether a row of a file is a sample, with a number of every kind for every token."""
    try:
        lists = [row[name] for name in ("weights", "logp", "entropy", "residual")]
        lists += [m for one, two in row["rules"].values() for m in (one, two)]
        words = [*row["tokens"], row["problem"], row["gold"], row["text"], row["credit"]]
        numbers = [row["step"], row["reward"], row["advantage"], *torch.tensor(lists).flatten()]
        sizes = {len(row["tokens"]), *map(len, lists)}
        fits = len(sizes) == 1 and 0 not in sizes and all(isinstance(w, str) for w in words)
        return fits and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def read_samples(folder):
    """The samples that a run has kept; UserError if there are none. A torn last line, which a
    killed run leaves, is skipped."""
    path = Path(folder) / "samples.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a run") from None
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            row = None
        if not is_sample(row):
            raise UserError(f"{path}, line {number} is not what this train.py keeps: run it again")
        samples.append(row)
    if not samples:
        raise UserError(f"{path} holds no samples: give the folder of a run that has begun")
    return samples


# ---- Groups: the numbers of what is shown --------------------------------------------------------


def clean(text):
    """Text from a model, fit for one line of any screen."""
    return printable(text, {"\n": "↵", "\t": "⇥", "\r": "↵"})


def plain(x):
    """A tensor as nested lists for JSON, to 4 decimals; what is not a number becomes null."""
    if isinstance(x, list):
        return [plain(value) for value in x]
    return None if math.isnan(x) else round(x, 4)


def measure(sample, p):
    """What the R rules make of a sample at sharpening p: Gini and effective-token ratio (R,), share
    of the credit by token class (R, C), rank correlation (R, R), nan where a rule is constant."""
    m, tokens = torch.tensor([pair[p - 1] for pair in sample["rules"].values()]), sample["tokens"]
    on, R = torch.ones_like(m), len(m)  # (R, T)
    pairs = rank_correlation(m.repeat_interleave(R, 0), m.repeat(R, 1), on.repeat(R, 1))
    varies = (m != m[:, :1]).any(dim=1)
    pairs = pairs.view(R, R).masked_fill(~(varies[:, None] & varies), torch.nan)
    finished = not sample["text"].endswith(tokens[-1])  # the text leaves out what ended it
    kinds = torch.tensor(token_classes(tokens, finished))
    classes = m @ torch.nn.functional.one_hot(kinds, len(CLASSES)).float()
    shares = classes / classes.sum(dim=1, keepdim=True)
    ratio = effective_token_ratio(m, on)
    return dict(gini=gini(m, on), ratio=ratio, classes=shares, correlation=pairs)


def make_completion(sample, measured):
    """What there is to show of one completion; measured: its numbers at sharpening 1 and 2."""
    c = {key: sample[key] for key in ("reward", "advantage", "logp", "entropy", "residual")}
    c.update(tokens=[clean(token) for token in sample["tokens"]], own=sample["weights"])
    c["weights"] = [[pair[i] for pair in sample["rules"].values()] for i in (0, 1)]
    return c | {key: [plain(x[key].tolist()) for x in measured] for key in ("gini", "ratio")}


def make_group(samples):
    """The completions of a problem, and the numbers over all of them, by rule, first at sharpening
    1 and then at 2."""
    measured = [[measure(x, p) for p in (1, 2)] for x in samples]
    first, pairs = samples[0], zip(samples, measured, strict=True)
    group = dict(completions=[make_completion(x, numbers) for x, numbers in pairs])
    for key in measured[0][0]:
        over = [torch.stack([pair[i][key] for pair in measured]) for i in (0, 1)]
        group[key] = [plain(x.nanmean(0).tolist()) for x in over]
    step = f"step {first['step']}: " if "step" in first else ""
    problem = clean(" ".join(first["problem"].split()))
    group["title"] = f"{step}{problem}  (gold {clean(first['gold'])})"
    return group | dict(step=first.get("step"), problem=problem, gold=clean(first["gold"]))


def make_groups(samples):
    """The groups of samples, in their order."""
    together = {}
    for x in samples:
        together.setdefault((x.get("step"), x["problem"]), []).append(x)
    return [make_group(group) for group in together.values()]


# ---- The command line ----------------------------------------------------------------------------


def parse_flags():
    about = "Every credit rule on the same completions: screen, credit.html and credit.png."
    flags = dict(run=("", "a run folder: show what the run has kept, step by step"))
    flags |= dict(problems=(3, "test problems to sample"), samples=(4, "completions a problem"))
    flags |= dict(max_new_tokens=(128, "longer completions are cut off"))
    flags |= dict(temperature=(1.0, "of sampling, and of the policy that is measured"))
    flags |= dict(sharpening=(1.0, "1 or 2: of screen and figure; the page shows both"))
    parser = argparse.ArgumentParser(description=about)
    add_flags(parser, flags | dict(out=(".", "folder for credit.html and credit.png")))
    s = parser.parse_args()
    if s.sharpening not in (1, 2):
        raise UserError(f"--sharpening {s.sharpening:g}: the view has 1 and 2")
    if s.samples < 2:
        raise UserError("credit is relative to other completions: use --samples 2 or more")
    for name in ("problems", "max_new_tokens", "temperature"):
        if not 0 < getattr(s, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)} is not positive")
    return s


def main():
    s = parse_flags()
    samples = read_samples(s.run) if s.run else draw_samples(s)
    names = [name for name in samples[0]["rules"] if all(name in x["rules"] for x in samples)]
    for x in samples:  # a run that was resumed may have got another rule on the way
        x["rules"] = {name: x["rules"][name] for name in names}
    groups, p, own = make_groups(samples), int(s.sharpening), samples[-1]["credit"] if s.run else ""
    trained = f"{Path(s.model).name}, {s.adapter or 'base model'}"
    title = f"run {Path(s.run).resolve().name}" if s.run else trained
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "credit.html").write_text(page(groups, names, p, own, title), encoding="utf-8")
    drawn = figure(groups, names, p, out / "credit.png")
    if s.run:
        show_own(groups, own)
    show_all(groups, names, p)
    print(f"\npage: {out / 'credit.html'}")
    print(f"figure: {out / 'credit.png'}" if drawn else "no figure: pip install matplotlib for it")
