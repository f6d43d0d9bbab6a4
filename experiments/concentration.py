"""How concentrated a rule's weights are, by sharpening, on fresh completions of one model.

    python experiments/concentration.py --adapter runs/NAME/adapter

All rules are measured on the same completions, one of each problem: the intervals are over them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import credit
from data.problems import load_problems
from experiments.stats import Estimate, crossed
from experiments.tables import PUBLISHED, RULES, said, table
from experiments.truth import all_signals
from grpo import sample_rollout
from run.flags import add_flags, load_base
from system.errors import Parser, run_cli
from system.files import write_json
from train import Settings

OWN_FLAGS = {
    "problems": (64, "of each of which one completion is sampled"),
    "max_new_tokens": (128, "longer completions are cut off"),
    "out": ("", "a JSON file"),
}


def concentration(rule, signals, power):
    """Return Gini and effective-token ratio of a rule, each [mean, low, high] over completions."""
    multipliers = credit.token_weights(rule, signals, power)
    both = []
    for measure in (credit.gini, credit.effective_token_ratio):
        e = crossed(measure(multipliers, signals.mask)[None].numpy())
        both.append([round(x, 4) for x in (e.mean, e.low, e.high)])
    return both


def show(found, about):
    """Print the table of {rule: {sharpening: [Gini, ratio]}}, beside the paper's."""
    lines = []
    for rule, by_power in found.items():
        cells = [" / ".join(said(Estimate(*x)) for x in both) for both in by_power.values()]
        lines.append([rule, *cells, " / ".join(f"{x:.3f}" for x in PUBLISHED[rule, 64][3:])])
    heads = ["rule", *(f"sharpening {power}" for power in found["arca"]), "paper, rank 64"]
    title = f"Gini / effective-token ratio, 95 % over {about['completions']} completions"
    print(table(title, heads, lines))


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add_flags(parser, OWN_FLAGS)
    cfg = parser.parse_args()

    # One completion of each problem, and all its signals. (Alone in its group it has no advantage.)
    model, tokenizer = load_base(cfg)
    problems = load_problems(cfg.data, "test")[: cfg.problems]
    limits = dict(max_new_tokens=cfg.max_new_tokens, seed=cfg.seed)
    training = Settings(samples=1, advantage="centered", **limits)
    rollout = sample_rollout(model, tokenizer, problems, training, 0)
    rollout.completions.check()
    signals = all_signals(model, rollout, training)
    if not signals.residual.any():
        print("no adapter, or one that is zero: ARCA and divergence fall back to uniform")

    # What each rule makes of them.
    found = {}
    for rule in RULES:
        found[rule] = {power: concentration(rule, signals, power) for power in (1, 2)}
    about = dict(completions=len(problems))
    if cfg.out:
        write_json(Path(cfg.out), about | dict(rules=found))
    show(found, about)


if __name__ == "__main__":
    run_cli(main)
