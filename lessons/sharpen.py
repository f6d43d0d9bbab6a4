"""Lesson 5: how concentrated each rule's weights are as the exponent on its scores grows.

python lessons/sharpen.py --run runs/lesson
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from credit import effective_token_ratio, gini, normalize_scores
from system.errors import Parser, run_cli
from view.samples import need_samples

POWERS = (0.25, 0.5, 1, 2, 4)
RULES = ("surprisal", "entropy_reduction", "divergence", "arca", "gcpo")


def concentration(samples, rule, power):
    """Return the mean Gini and effective-token ratio of a rule's multipliers at an exponent."""
    ginis = []
    ratios = []
    for sample in samples:
        # Multipliers at exponent 1 are scores, up to a factor that normalize_scores takes out.
        scores = torch.tensor([sample["rules"][rule][0]])  # (1, T)
        mask = torch.ones_like(scores)
        multipliers = normalize_scores(scores, mask, power)
        ginis.append(gini(multipliers, mask).item())
        ratios.append(effective_token_ratio(multipliers, mask).item())
    return sum(ginis) / len(ginis), sum(ratios) / len(ratios)


def main():
    parser = Parser(description="Gini and effective-token ratio by exponent.")
    parser.add_argument("--run", default="runs/lesson", help="the folder of a run")
    samples = need_samples(parser.parse_args().run)
    samples = [sample for sample in samples if sample["step"] > 1]  # at step 1 B is 0
    print(f"{len(samples)} completions, Gini / effective-token ratio at exponent")
    print(f"{'rule':18}" + "".join(f"{power:>13}" for power in POWERS))
    for rule in RULES:
        line = f"{rule:18}"
        for power in POWERS:
            mean_gini, mean_ratio = concentration(samples, rule, power)
            cell = f"{mean_gini:.2f} / {mean_ratio:.2f}"
            line += f"{cell:>13}"
        print(line)


if __name__ == "__main__":
    run_cli(main)
