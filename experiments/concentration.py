"""How concentrated a rule's weights are, by sharpening, on fresh completions of one model.

    python experiments/concentration.py --adapter runs/NAME/adapter
    python experiments/concentration.py --model FOLDER --adapter FOLDER --data math500.jsonl

All rules are measured on the same completions, one of each problem, so that completions are
independent and the intervals are over them.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import credit
import grpo
from data.problems import add_prompts, load_problems
from experiments.stats import crossed
from fast.packing import micro_batches
from run.flags import add_flags, load_base
from system.errors import UserError, run_cli
from system.files import write_json

RULES = ("uniform", "surprisal", "entropy_reduction", "divergence", "arca")  # the paper's
PUBLISHED = {  # its tables, by (rule, rank): greedy, pass@4, mean reward, Gini, effective ratio
    ("uniform", 64): (0.620, 0.675, 0.362, 0.000, 1.000),
    ("surprisal", 64): (0.520, 0.650, 0.326, 0.941, 0.052),
    ("entropy_reduction", 64): (0.600, 0.700, 0.367, 0.920, 0.073),
    ("divergence", 64): (0.565, 0.670, 0.351, 0.939, 0.055),
    ("arca", 4): (0.525, 0.640, 0.327, 0.353, 0.467),
    ("arca", 16): (0.510, 0.655, 0.336, 0.388, 0.460),
    ("arca", 64): (0.590, 0.680, 0.353, 0.490, 0.334),
}


def read_signals(model, r, advantages, wanted, s) -> credit.Signals:
    """The wanted signals of all the completions of a Rollout, as `update` has them, learning
    nothing."""
    known, rows = grpo.given_signals(r, advantages), torch.ones(len(advantages), dtype=torch.bool)
    found, groups = grpo.to_be_found(known, wanted), micro_batches(r, rows, s.micro_tokens)
    grpo.go_over(model, r, groups, False, known, None, None, s, wanted, found)
    return replace(known, **found)


def known_signals(model, tokenizer, problems, s) -> credit.Signals:
    """The signals of the paper's rules on one completion of each problem, sampled now."""
    settings = dict(credit="arca", samples=1, top_p=1.0, kl=0.0, micro_tokens=2048)
    vars(s).update(settings, arca_layer="final")  # what the Settings of train.py would say besides
    r = grpo.rollout(model, tokenizer, problems, s, 0)
    wanted = {name for rule in RULES for name in credit.needs(rule)}
    return read_signals(model, r, torch.zeros(len(problems)), wanted, s)


def concentration(known: credit.Signals, powers) -> dict:
    """By rule and sharpening (as text): Gini and effective-token ratio over completions, each with
    its 95 % interval."""
    found = {}
    for rule in RULES:
        for p in powers:
            m = credit.token_weights(rule, known, p)
            measured = (f(m, known.mask) for f in (credit.gini, credit.effective_token_ratio))
            both = [crossed(x[None].numpy()) for x in measured]
            found.setdefault(rule, {})[f"{p:g}"] = [
                [round(x, 4) for x in (e.mean, e.low, e.high)] for e in both
            ]
    return found


def show(found, about):
    """The table, beside the paper's."""
    powers = list(next(iter(found.values())))
    print(f"\nGini / effective-token ratio, 95 % intervals over {about['completions']} completions")
    heads = [f"sharpening {p}" for p in powers]
    print(f"{'rule':18}" + "".join(f"{h:50}" for h in heads) + "paper, rank 64")
    for rule, by_power in found.items():
        cells = [
            " / ".join(f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in by_power[p])
            for p in powers
        ]
        gini, ratio = PUBLISHED[rule, 64][3:]
        print(f"{rule:18}" + "".join(f"{c:50}" for c in cells) + f"{gini:.3f} / {ratio:.3f}")


def parse_flags():
    flags = dict(problems=(64, "test problems, of which one completion each is sampled"))
    flags |= dict(max_new_tokens=(128, "longer completions are cut off"))
    flags |= dict(temperature=(1.0, "of sampling, and of the policy that is measured"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, flags | dict(out=("", "a JSON file for the numbers")))
    text = "exponents on the scores"
    parser.add_argument("--sharpening", type=float, nargs="+", default=[1.0, 2.0], help=text)
    s = parser.parse_args()
    if s.problems < 2 or s.max_new_tokens < 1 or not min(s.sharpening) > 0:
        raise UserError("give at least 2 --problems, 1 --max-new-tokens, and --sharpening above 0")
    return s


def main():
    s = parse_flags()
    model, tokenizer = load_base(s)
    problems = load_problems(s.data, "test")[: s.problems]
    problems = [add_prompts(p, tokenizer, s.chat) for p in problems]
    known = known_signals(model, tokenizer, problems, s)
    lengths = known.mask.sum(dim=1).float()
    about = dict(completions=len(lengths), mean_tokens=round(lengths.mean().item(), 1))
    if not known.residual.any():
        print("no adapter, or one that is zero: ARCA and divergence fall back to uniform")
    found = concentration(known, s.sharpening)
    if s.out:
        write_json(Path(s.out), about | dict(rules=found))
    print(f"{Path(s.model).name}, {s.adapter or 'base model'}, {about['mean_tokens']} tokens each")
    show(found, about)


if __name__ == "__main__":
    run_cli(main)
