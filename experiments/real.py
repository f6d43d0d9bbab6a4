"""The paper's table of concentration on a real model: a short run of each rule, then measured.

    python experiments/real.py --model FOLDER --data math_train.jsonl --eval-data math500.jsonl
    python experiments/real.py --model FOLDER --eval-data math500.jsonl --adapter runs/NAME/adapter

Every rule is measured on the completions of each of these adapters, at sharpening 1 and 2, beside
the paper's numbers. What is trained or measured is not done again, and a run that was cut short
goes on; all that was measured is in real.json. With --adapter nothing is trained.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.concentration import RULES, show
from experiments.plan import ROOT, code_key
from run.flags import add_flags
from system.errors import Parser, UserError, flag_name, run_cli
from system.files import read_json, write_json

# Few steps must move the adapter out of the rounding of bf16: hence the rate, and no warmup.
TRAINING = "--warmup 1 --lr 2e-4 --eval-problems 1 --eval-samples 0 --save-every 1 --sharpening 2"


def parse_flags():
    flags = {
        "eval_data": ("math500", "likewise, to measure on"),
        "steps": (10, "of each rule"),
        "prompts": (4, "problems a step"),
        "samples": (4, "completions a problem"),
        "rank": (16, "of LoRA; alpha is twice that"),
        "max_new_tokens": (256, "longer completions are cut off"),
        "problems": (64, "to measure on, one completion each"),
        "out": ("runs/real", "folder for the runs and what is measured"),
    }
    parser = Parser(description=__doc__.splitlines()[0])
    add_flags(parser, flags)
    text = f"to train with; default: {' '.join(RULES)}"
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, help=text)
    return parser.parse_args()


def go(script, cfg, names, *more):
    """Run one of our scripts with these of our flags; UserError if it fails."""
    words = ["--chat"] * cfg.chat
    for name in names:
        if getattr(cfg, name):
            words += [flag_name(name), getattr(cfg, name)]
    command = [sys.executable, ROOT / script, *words, *more]
    if subprocess.run([str(word) for word in command]).returncode:
        raise UserError(f"{script} failed (see above); the same command goes on")


MODEL = ("model", "revision", "device", "dtype", "seed", "max_new_tokens")


def train(cfg, rule):
    """A short run with a rule, or the rest of it; returns its adapter's folder."""
    folder = Path(cfg.out) / f"{rule}-r{cfg.rank}-{code_key()[:10]}"
    done = ["--resume"] if (folder / "config.json").exists() else []  # refuses other settings
    names = (*MODEL, "data", "eval_data", "steps", "prompts", "samples", "rank")
    own = ("--credit", rule, "--alpha", 2.0 * cfg.rank, "--out", folder, *TRAINING.split())
    go("train.py", cfg, names, *own, *done)
    return folder / "adapter"


def measure(cfg, adapter, *more):
    """Measure all rules on completions of the model with an adapter, and show it."""
    data = ("--data", cfg.eval_data, "--adapter", adapter, "--problems", cfg.problems)
    go("experiments/concentration.py", cfg, MODEL, *data, "--sharpening", 1, 2, *more)


def main():
    cfg = parse_flags()
    if cfg.adapter:
        return measure(cfg, cfg.adapter)
    found = {}
    for rule in cfg.rules:
        print(f"\n== {rule} ==", flush=True)
        adapter = train(cfg, rule)
        path = adapter.parent / f"concentration-of-{cfg.problems}.json"
        if path.exists():
            show(read_json(path)["rules"], read_json(path))
        else:
            measure(cfg, adapter, "--out", path)
        found[rule] = read_json(path)
    how = {name: getattr(cfg, name) for name in ("steps", "prompts", "samples", "rank")}
    write_json(Path(cfg.out) / "real.json", dict(how=how, after=found))


if __name__ == "__main__":
    run_cli(main)
