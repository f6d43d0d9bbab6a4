"""Lesson 4: what a baseline is for. The gradient of one step, again and again, at the base model.

python lessons/baseline.py
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from data.problems import load_split, problems_of_step
from grpo import group_advantages, rollout, update
from lora import add_lora, lora_parameters
from run.flags import load_base
from system.errors import run_cli
from train import Settings


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient it was given, and changes nothing."""

    def step(self):
        ps = self.param_groups[0]["params"]
        self.seen = torch.cat([p.grad.flatten() for p in ps])


def advantages(rewards, kind):
    """rewards (P, G) -> (P, G): a kind of grpo.py, or the rewards themselves."""
    return rewards if kind == "reward" else group_advantages(rewards, kind)


def main():
    parser = argparse.ArgumentParser(description="How much the gradients of some steps agree.")
    parser.add_argument("--steps", type=int, default=12, help="rollouts, none trained on")
    steps = range(1, parser.parse_args().steps + 1)
    s = Settings(credit="uniform", grad_clip=1e9)
    model, tokenizer = load_base(s)
    train, _, _ = load_split(s, tokenizer)
    add_lora(model, s.rank, s.alpha, seed=s.seed)
    recorder = Recorder(lora_parameters(model).values(), lr=0.0)
    seen = dict(reward=[], centered=[], rloo=[], grpo=[])
    for step in steps:
        r = rollout(model, tokenizer, problems_of_step(train, s.prompts, s.seed, step), s, step)
        for kind, gradients in seen.items():
            update(model, recorder, r, advantages(r.rewards, kind).flatten(), s)
            gradients.append(recorder.seen)
    print(f"{len(steps)} steps of {s.prompts} problems x {s.samples}, nothing learned in between")
    print(f"{'advantage':10}{'norm':>9}{'norm of the mean':>18}{'cosine of two steps':>21}")
    for kind, gradients in seen.items():
        g = torch.stack(gradients)  # (steps, parameters)
        unit = g / g.norm(dim=1, keepdim=True)
        cosines = torch.stack([unit[i] @ unit[j] for i, j in combinations(range(len(g)), 2)])
        print(f"{kind:10}{g.norm(dim=1).mean():9.3f}{g.mean(0).norm():18.3f}{cosines.mean():21.2f}")


if __name__ == "__main__":
    run_cli(main)
