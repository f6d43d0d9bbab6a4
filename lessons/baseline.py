"""Lesson 4: what a baseline is for. The gradient of one step, again and again, at the base model.

python lessons/baseline.py
"""

import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from data.problems import load_split, problems_of_step
from grpo import group_advantages, sample_rollout, update
from lora import add_lora, lora_parameters
from run.flags import load_base
from system.errors import Parser, UserError, run_cli
from train import Settings

KINDS = ("reward", "centered", "rloo", "grpo")


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient it was given, and changes nothing."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        self.seen = torch.cat([p.grad.flatten() for p in parameters])


def advantages(rewards, kind):
    """Return advantages (P, G): of a kind of grpo.py, or the rewards (P, G) themselves."""
    return rewards if kind == "reward" else group_advantages(rewards, kind)


def gradients_of_steps(count, cfg):
    """Return by kind the gradients (count, parameters) of the first steps, none of them taken."""
    model, tokenizer = load_base(cfg)
    problems, _, _, _ = load_split(cfg, tokenizer)
    add_lora(model, cfg.rank, cfg.alpha, seed=cfg.seed)
    recorder = Recorder(lora_parameters(model).values(), lr=0.0)
    seen = {kind: [] for kind in KINDS}
    for step in range(1, count + 1):
        chosen = problems_of_step(problems, cfg.prompts, cfg.seed, step)
        rollout = sample_rollout(model, tokenizer, chosen, cfg, step)
        for kind in KINDS:
            update(model, recorder, rollout, advantages(rollout.rewards, kind).flatten(), cfg)
            seen[kind].append(recorder.seen)
    return {kind: torch.stack(gradients) for kind, gradients in seen.items()}


def main():
    parser = Parser(description="How much the gradients of some steps agree.")
    parser.add_argument("--steps", type=int, default=12, help="rollouts, none trained on")
    count = parser.parse_args().steps
    if count < 2:
        raise UserError(f"--steps {count}: it takes two to agree")
    cfg = Settings(credit="uniform", max_grad_norm=1e9)
    seen = gradients_of_steps(count, cfg)
    print(f"{count} steps of {cfg.prompts} problems x {cfg.samples}, nothing learned in between")
    print(f"{'advantage':10}{'norm':>9}{'norm of the mean':>18}{'cosine of two steps':>21}")
    for kind, gradients in seen.items():
        norms = gradients.norm(dim=1, keepdim=True)  # (steps, 1)
        unit = gradients / norms
        pairs = combinations(unit, 2)
        cosine = torch.stack([one @ other for one, other in pairs]).mean()
        print(f"{kind:10}{norms.mean():9.3f}{gradients.mean(0).norm():18.3f}{cosine:21.2f}")


if __name__ == "__main__":
    run_cli(main)
