"""Lesson 2: one set of weights, two models. What the adapter moves, and what of it is scale.

python lessons/paths.py --run runs/lesson
"""

import argparse
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
from system.errors import run_cli
from train import Settings


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Scale a trained adapter's B down to nothing.")
    parser.add_argument("--run", default="runs/lesson", help="the folder of a run")
    s = Settings(samples=2)
    s.adapter = str(Path(parser.parse_args().run, "adapter"))
    model, tokenizer = load_base(s)
    problems = [add_prompts(p, tokenizer) for p in load_problems("tiny", "test")[:16]]
    r = grpo.rollout(model, tokenizer, problems, s, step=0)
    layers, rows = lora_layers(model).values(), torch.arange(len(r.texts))
    trained, first = [layer.lora_B.weight.clone() for layer in layers], None
    print("B times   log-probs moved   mean residual   Gini of ARCA   ", end="")
    print("rank correlation with B times 1")
    for scale in (1, 0.3, 0.1, 0.01, 0.001, 0):
        for layer, B in zip(layers, trained, strict=True):
            layer.lora_B.weight.copy_(scale * B)
        b, logps, found = grpo.signals(model, r, rows, {"residual", "ref_logp"}, s)
        m = token_weights("arca", Signals(b.mask, residual=found["residual"]))
        first = m if first is None else first
        moved = (logps - found["ref_logp"]).abs()[b.mask].mean()
        residual = found["residual"][b.mask]
        same = rank_correlation(first, m, b.mask).mean()
        print(f"{scale:7g} {moved:17.2g} {residual.mean():15.2g}", end="")
        print(f"{gini(m, b.mask).mean():15.2f} {same:33.2f}")


if __name__ == "__main__":
    run_cli(main)
