"""Lesson 5: how concentrated each rule's weights are as the exponent on its scores grows.

python lessons/sharpen.py --run runs/lesson
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from credit import effective_token_ratio, gini, share
from system.errors import run_cli
from view.__main__ import read_samples

POWERS = (0.25, 0.5, 1, 2, 4)


def main():
    parser = argparse.ArgumentParser(description="Gini and effective-token ratio by exponent.")
    parser.add_argument("--run", default="runs/lesson", help="the folder of a run")
    samples = [x for x in read_samples(parser.parse_args().run) if x["step"] > 1]  # there B is 0
    print(f"{len(samples)} completions, Gini / effective-token ratio at exponent")
    print(f"{'rule':18}" + "".join(f"{p:>13}" for p in POWERS))
    for rule in ("surprisal", "entropy_reduction", "divergence", "arca", "gcpo"):
        cells = ""
        for p in POWERS:
            # Multipliers at exponent 1 are scores, up to a factor that `share` takes out again.
            scores = [torch.tensor([x["rules"][rule][0]]) for x in samples]
            pairs = [(share(m, torch.ones_like(m), p), torch.ones_like(m)) for m in scores]
            G, ratio = (sum(f(*x).item() for x in pairs) for f in (gini, effective_token_ratio))
            cells += f"{f'{G / len(pairs):.2f} / {ratio / len(pairs):.2f}':>13}"
        print(f"{rule:18}{cells}")


if __name__ == "__main__":
    run_cli(main)
