"""Lesson 2: one set of weights, two models. What the adapter moves, and what of it is scale.

python lessons/paths.py --run runs/lesson
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import grpo
from credit import Signals, gini, token_weights
from data.problems import add_prompts, load_problems
from lora import lora_layers
from run.flags import load_base
from run.metrics import rank_correlation
from system.errors import Parser, run_cli
from train import Settings


@torch.no_grad()
def main():
    parser = Parser(description="Scale a trained adapter's B down to nothing.")
    parser.add_argument("--run", default="runs/lesson", help="the folder of a run")
    run = parser.parse_args().run

    # 1) The trained model, and completions that stay the same below.
    cfg = Settings(samples=2)
    cfg.adapter = str(Path(run, "adapter"))
    model, tokenizer = load_base(cfg)
    problems = [add_prompts(p, tokenizer) for p in load_problems("tiny", "test")[:16]]
    rollout = grpo.sample_rollout(model, tokenizer, problems, cfg, step=0)
    rows = torch.arange(len(rollout.texts))

    # 2) The same completions scored with B made smaller and smaller.
    layers = lora_layers(model).values()
    trained = [layer.lora_B.weight.clone() for layer in layers]
    first = None  # ARCA's multipliers at B times 1
    print("B times   log-probs moved   mean residual   Gini of ARCA   ", end="")
    print("rank correlation with B times 1")
    for scale in (1, 0.3, 0.1, 0.01, 0.001, 0):
        for layer, B in zip(layers, trained, strict=True):
            layer.lora_B.weight.copy_(scale * B)
        batch, logps, found = grpo.score(model, rollout, rows, {"residual", "ref_logp"}, cfg)
        mask = batch.mask
        multipliers = token_weights("arca", Signals(mask, residual=found["residual"]))
        first = multipliers if first is None else first
        moved = (logps - found["ref_logp"]).abs()[mask].mean()
        residual = found["residual"][mask].mean()
        same = rank_correlation(first, multipliers, mask).mean()
        concentration = gini(multipliers, mask).mean()
        print(f"{scale:7g} {moved:17.2g} {residual:15.2g} {concentration:14.2f} {same:33.2f}")


if __name__ == "__main__":
    run_cli(main)
