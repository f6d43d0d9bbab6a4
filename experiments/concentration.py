"""How concentrated a rule's weights are, by sharpening, on fresh completions of one model.

    python experiments/concentration.py --adapter runs/NAME/adapter
    python experiments/concentration.py --model FOLDER --adapter FOLDER --data math500.jsonl

All rules are measured on the same completions, one of each problem, so that completions are
independent and the intervals are over them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import credit
import grpo
from data.problems import add_prompts, load_problems
from experiments.stats import crossed
from run.flags import add_flags, load_base
from system.errors import Parser, UserError, run_cli
from system.files import write_json
from train import Settings

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


def sample_signals(model, tokenizer, problems, cfg) -> credit.Signals:
    """Return the signals of one completion of each problem, sampled now; cfg: the flags."""
    training = Settings(
        credit="arca",
        samples=1,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        seed=cfg.seed,
    )
    rollout = grpo.sample_rollout(model, tokenizer, problems, training, 0)
    rollout.completions.check()
    nothing = torch.zeros(len(problems))
    _, signals, _ = grpo.update(model, None, rollout, nothing, training, compare=True)
    return signals


def concentration(signals: credit.Signals, powers) -> dict:
    """Return, by rule and sharpening (as text), Gini and effective-token ratio over completions,
    each with its 95 % interval."""
    found = {}
    for rule in RULES:
        found[rule] = {}
        for power in powers:
            multipliers = credit.token_weights(rule, signals, power)
            both = []
            for measure in (credit.gini, credit.effective_token_ratio):
                e = crossed(measure(multipliers, signals.mask)[None].numpy())
                both.append([round(x, 4) for x in (e.mean, e.low, e.high)])
            found[rule][f"{power:g}"] = both
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
    parser = Parser(description=__doc__.splitlines()[0])
    add_flags(
        parser,
        dict(
            problems=(64, "test problems, of which one completion each is sampled"),
            max_new_tokens=(128, "longer completions are cut off"),
            temperature=(1.0, "of sampling, and of the policy that is measured"),
            out=("", "a JSON file for the numbers"),
        ),
    )
    text = "exponents on the scores"
    parser.add_argument("--sharpening", type=float, nargs="+", default=[1.0, 2.0], help=text)
    cfg = parser.parse_args()
    if cfg.problems < 2:
        raise UserError(f"--problems {cfg.problems}: an interval needs 2 or more")
    return cfg


def main():
    cfg = parse_flags()
    model, tokenizer = load_base(cfg)
    problems = load_problems(cfg.data, "test")[: cfg.problems]
    problems = [add_prompts(p, tokenizer) for p in problems]
    signals = sample_signals(model, tokenizer, problems, cfg)
    lengths = signals.mask.sum(dim=1).float()
    about = dict(completions=len(lengths), mean_tokens=round(lengths.mean().item(), 1))
    if not signals.residual.any():
        print("no adapter, or one that is zero: ARCA and divergence fall back to uniform")
    found = concentration(signals, cfg.sharpening)
    if cfg.out:
        write_json(Path(cfg.out), about | dict(rules=found))
    print(
        f"{Path(cfg.model).name}, {cfg.adapter or 'base model'}, {about['mean_tokens']} tokens each"
    )
    show(found, about)


if __name__ == "__main__":
    run_cli(main)
