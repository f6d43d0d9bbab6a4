"""The true credit of tokens, by sampling: what experiments/oracle.py holds the rules against.

**Truth.** V(prefix) is the chance that the policy, going on from there, is right. The completion of
tokens y_1 ... y_T moves it by delta_t = V(y_1..t) - V(y_1..t-1): the advantage of having chosen
y_t. At the end V is the reward, so the deltas of a completion sum to its reward minus V(prompt).

**Estimate.** V is the success rate of fresh continuations. One that follows the completion for a
while is a fresh continuation of every prefix that it passes, and counts for them all. That has no
bias: whether it counts depends on how it got there, its outcome on how it goes on. So we start from
the prompt, and again after each token that few continuations would choose; a token that is next to
certain gets a delta next to 0 instead of noise.

**Noise.** Two independent halves of the continuations give delta_a and delta_b. Their mean is
delta, half their difference its noise alone, and their product has the mean delta^2, without noise.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from data.problems import load_split
from eval_math import verify
from grpo import group_advantages, update
from hf.peft import put_adapter
from run.checkpoints import checkpoint_paths, read_settings, step_of
from run.flags import check, load_base
from sample import generate
from system import files
from system.errors import UserError
from train import Settings

ROOT = Path(__file__).parent.parent
REACH = 0.5  # a prefix that a smaller share of continuations is expected to pass is a start


# ---- The value of every prefix -------------------------------------------------------------------
def grader(tokenizer, problems):
    """(problem index, completion's ids) -> reward; what was graded before is looked up."""

    @cache
    def grade(p, ids):
        end = len(ids) - (ids[-1] in tokenizer.eos_ids)
        return float(verify(tokenizer.decode(ids[:end]), problems[p]["answer"]))

    return grade


def prefixes_of(rollout, row):
    """The T + 1 prefixes of a completion, as (problem index, ids)."""
    ids = tuple(rollout.completions.tokens[row, : rollout.completions.lengths[row]].tolist())
    return [(int(row) // rollout.rewards.shape[1], ids[:t]) for t in range(len(ids) + 1)]


def starts_of(prefixes, probs):
    """The prefixes to sample from; probs: of each token, under the policy."""
    starts = [prefixes[0]]
    passing = 1.0
    for prefix, p in zip(prefixes[1:-1], probs, strict=False):
        passing *= p
        if passing < REACH:
            starts.append(prefix)
            passing = 1.0
    return starts


def follow(tally, starts, c, n, limit, grade):
    """Count the n continuations of each start for every prefix in the tally that they pass."""
    for row, ids in enumerate(c.tokens.tolist()):
        p, before = starts[row // n]
        # Continuations are as long as whole completions may be: what is beyond that is cut off.
        whole = (before + tuple(ids[: c.lengths[row]]))[:limit]
        reward = grade(p, whole)
        for t in range(len(before), len(whole)):
            if (p, whole[:t]) not in tally:
                break
            tally[p, whole[:t]][:, row % 2] += (reward, 1)


def prefix_values(model, rollout, rows, cfg, eos_ids, grade, n, least=64, step=0):
    """V at the T + 1 prefixes of the given rows of a Rollout, and how many continuations it is the
    success rate of: two (2, b, T + 1), by half; past a completion's end V is its reward. n: of each
    start (even, at least `least`), sampled as of step -2 - step, which nothing else has."""
    # Where to start from.
    chains = [prefixes_of(rollout, row) for row in rows]
    tally = {prefix: np.zeros((2, 2)) for chain in chains for prefix in chain[:-1]}
    probs = rollout.completions.logps.exp()[rows].tolist()
    starts = []
    for chain, p in zip(chains, probs, strict=True):
        starts += starts_of(chain, p)
    starts = list(dict.fromkeys(starts))  # what completions share is estimated once

    # Continuations, until every prefix has its visits.
    while starts:
        prompts = [rollout.problems[p]["prompt"] + list(ids) for p, ids in starts]
        how = dict(temperature=cfg.temperature, top_p=cfg.top_p, eos_ids=eos_ids)
        c = generate(model, prompts, n, cfg.max_new_tokens, seed=cfg.seed, step=-2 - step, **how)
        follow(tally, starts, c, n, cfg.max_new_tokens, grade)
        starts = [x for x, (_, visits) in tally.items() if visits.min() < least / 2]

    # Success rates. That of the whole completion, and of padding, is its reward.
    V = rollout.rewards.flatten()[rows][:, None].repeat(2, 1, max(map(len, chains)))
    visits = torch.zeros_like(V)
    for i, chain in enumerate(chains):
        won, seen = torch.tensor(np.array([tally[x] for x in chain[:-1]])).permute(1, 2, 0)
        V[:, i, : len(chain) - 1] = won / seen
        visits[:, i, : len(chain) - 1] = seen
    return V, visits


# ---- A checkpoint of a run, and what the rules read ----------------------------------------------
def train_run(folder, *flags):
    """Train a run with these flags of train.py, or what is missing of it; return its folder."""
    args = [*flags, "--out", folder]
    if (Path(folder) / "config.json").exists():
        args = ["--resume", folder]
    if subprocess.run([sys.executable, str(ROOT / "train.py"), *args]).returncode:
        raise UserError(f"{folder} could not be trained: see above")
    return folder


def saved_adapters(folder) -> dict:
    """Return {step: tensors by name, `adapter.` before it} of a run's checkpoints, newest first."""
    saved = {}
    for path in checkpoint_paths(Path(folder)):
        tensors, about = files.read_tensors(path)
        adapter = [name for name in tensors if name.startswith("adapter.")]
        saved[step_of(about)] = {name: tensors[name] for name in adapter}
    return saved


def open_run(folder, step=None):
    """(model with the run's adapter as of this step, or of the last one, tokenizer, Settings,
    problems to train on); UserError if there is no such checkpoint."""
    cfg = Settings(**read_settings(folder, Settings()))
    check(cfg)
    found = saved_adapters(folder)
    step = max(found, default=0) if step is None else step
    if step not in found:
        kept = f"{folder} keeps steps {sorted(found)}, not {step}"
        raise UserError(f"{kept}: train with more --keep-checkpoints")
    model, tokenizer = load_base(replace(cfg, adapter=""))
    put_adapter(model, found[step], cfg.rank, cfg.alpha, folder, "adapter.")
    return model, tokenizer, cfg, load_split(cfg, tokenizer)[0]


def all_signals(model, rollout, cfg):
    """Return every signal that any rule reads, of all completions of a Rollout."""
    advantages = group_advantages(rollout.rewards, cfg.advantage).flatten()
    _, signals, _ = update(model, None, rollout, advantages, cfg, compare=True)
    return signals
