"""Ours in bench/speed.py: sampling, a step of GRPO and an update, as train.py has them done.

A job is a function of whether completions are free to end, and of the round: it does the work once
and returns the seconds that took and the tokens drawn.
"""

import contextlib
from functools import partial

import torch

import grpo
from bench import common
from bench.common import timed
from bench.credit_cost import authors_update
from lora import adapter_off, lora_parameters
from sample import generate


def sampler(work, adapter=False):
    """Sampling with the adapter, or with the same model's base path."""
    model = work.model

    def job(free, turn):
        with contextlib.nullcontext() if adapter else adapter_off(model):
            how = dict(eos_ids=work.ends(free).eos_ids, seed=1, step=turn)
            sample = partial(generate, model, work.prompts(), work.samples, work.tokens, **how)
            seconds, c = timed(sample, work.device)
        return seconds, int(c.lengths.sum())

    return job


def half_right(r):
    """The rollout with every second completion right, and its advantages (B,)."""
    r.rewards = (torch.arange(r.rewards.numel()) % 2.0).view(r.rewards.shape)
    return r, grpo.group_advantages(r.rewards).flatten()


def settings(work, credit):
    sizes = dict(samples=work.samples, max_new_tokens=work.tokens, micro_tokens=work.micro_tokens)
    return common.settings(credit=credit, **sizes)


def step(work, credit):
    """A whole step of GRPO: rollout, grades, advantages, update."""
    model, s = work.model, settings(work, credit)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.0)

    def once(free, turn):
        rollout = grpo.rollout(model, work.ends(free), work.problems, s, turn)
        r, advantages = half_right(rollout)
        grpo.update(model, optimizer, r, advantages, s)
        return r

    def job(free, turn):
        seconds, r = timed(lambda: once(free, turn), work.device)
        return seconds, int(r.completions.lengths.sum())

    return job


def update(work, authors=False):
    """ARCA's update alone, on rollouts that are drawn once; or its authors' way of it."""
    model, s = work.model, settings(work, "arca")
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.0)
    rollouts = {}

    def job(free, turn):
        if free not in rollouts:
            r = grpo.rollout(model, work.ends(free), work.problems, s, 1)
            rollouts[free] = half_right(r)
        if authors:
            learn = partial(authors_update, model, *rollouts[free], s)
        else:
            learn = partial(grpo.update, model, optimizer, *rollouts[free], s)
        tokens = int(rollouts[free][0].completions.lengths.sum())
        return timed(learn, work.device)[0], tokens

    return job
