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
from run.metrics import diagnose, measure
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


def half_right(rollout):
    """The rollout with every second completion right, and its advantages (B,)."""
    rollout.rewards = (torch.arange(rollout.rewards.numel()) % 2.0).view(rollout.rewards.shape)
    return rollout, grpo.group_advantages(rollout.rewards).flatten()


def settings(work, credit):
    return common.settings(
        credit=credit,
        samples=work.samples,
        max_new_tokens=work.tokens,
        micro_batch_tokens=work.micro_batch_tokens,
    )


def step(work, credit):
    """A whole step of GRPO: rollout, grades, advantages, update, metrics."""
    model, cfg = work.model, settings(work, credit)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.0)

    def once(free, turn):
        rollout = grpo.sample_rollout(model, work.ends(free), work.problems, cfg, turn)
        rollout, advantages = half_right(rollout)
        _, signals, multipliers = grpo.update(model, optimizer, rollout, advantages, cfg)
        measure(rollout, signals)
        diagnose(rollout, signals, multipliers, cfg, work.tokenizer)
        return rollout

    def job(free, turn):
        seconds, rollout = timed(lambda: once(free, turn), work.device)
        return seconds, int(rollout.completions.lengths.sum())

    return job


def update(work, authors=False):
    """ARCA's update alone, on rollouts that are drawn once; or its authors' way of it."""
    model, cfg = work.model, settings(work, "arca")
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.0)
    rollouts = {}

    def job(free, turn):
        if free not in rollouts:
            rollout = grpo.sample_rollout(model, work.ends(free), work.problems, cfg, 1)
            rollouts[free] = half_right(rollout)
        if authors:
            learn = partial(authors_update, model, *rollouts[free], cfg)
        else:
            learn = partial(grpo.update, model, optimizer, *rollouts[free], cfg)
        tokens = int(rollouts[free][0].completions.lengths.sum())
        return timed(learn, work.device)[0], tokens

    return job
