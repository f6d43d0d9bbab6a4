"""Many runs of train.py under one budget, and what they say: rule x rank x sharpening x seed.

    python experiments/sweep.py --preset tiny     # the embedded model: 62 minutes on two cores
    python experiments/sweep.py --preset paper    # the paper's seven runs, and what it lacks
    python experiments/sweep.py --preset chat --data TRAIN.jsonl --eval-data TEST.jsonl

A run is a folder: runs/sweep-tiny/arca-r16-p2-s1 is ARCA at rank 16 with sharpening 2 and seed 1.
What it holds is not made again, so after Ctrl-C or a crash the same command goes on. Other settings
are refused; other code is not noticed: after a change of it give another --out.
"""

import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch

from data.problems import HUB
from experiments.rows import CURVES, RESULTS, in_cell, read_results, row_of, write_results
from experiments.tables import BASE, RULES, tables
from hf.checkpoint import NAMED
from run.checkpoints import CHANGEABLE, read_settings
from run.flags import FLAGS, PAPER, check
from system.errors import Parser, UserError, flag_name, run_cli
from system.files import read_rows
from train import Settings

ROOT = Path(__file__).resolve().parent.parent
CONTROLS = ("permuted", "random")
# A chat model of half a billion parameters: it must be seen to learn within an hour of a GPU.
CHAT = dict(model="Qwen/Qwen2.5-Coder-0.5B-Instruct", chat=True, steps=60, prompts=8, samples=8)
CHAT.update(max_new_tokens=384, lr=2e-4, eval_problems=400, eval_samples=0, micro_batch_tokens=4096)
PRESETS = {  # settings of all runs, ranks (all rules have the first, the main one), seeds, rules
    "tiny": (dict(steps=32), (16, 4, 64), (1, 2, 3, 4, 5), RULES),
    "paper": (PAPER | dict(preset="paper"), (64, 4, 16), (1337,), RULES),
    "chat": (CHAT, (16,), (1, 2, 3), ("uniform", "arca")),
}
FEW = 50  # problems that training evaluates on; eval_math.py does all of them afterwards
# Settings of train.py that a sweep may have otherwise, the same for all its runs.
BUDGET = """steps prompts samples max_new_tokens eval_problems lr micro_batch_tokens
    model revision data eval_data device dtype chat system thinking"""
BUDGET = BUDGET.split()
ROUNDING = 1e-3  # of a Gini, on another processor; an outcome moves a reward by 1/128


def cells(rules, ranks, controls=True):
    """The settings to compare (rule, rank, sharpening): the paper's, then what it lacks."""
    rank, *others = ranks
    found = [(rule, rank, 1.0 if rule == "uniform" else 2.0) for rule in rules]
    found += [("arca", other, 2.0) for other in others]
    if controls:
        found += [("uniform", other, 1.0) for other in others]
        found += [(rule, rank, 2.0) for rule in CONTROLS]
        found += [(rule, rank, 1.0) for rule in (*rules[1:], *CONTROLS)]
    return found


def run_of(cell, seed, shared, out) -> Settings:
    """The settings of a run, its folder among them; of the untrained model (BASE), too."""
    rule, rank, power = cell
    name = f"base-s{seed}" if cell == BASE else f"{rule}-r{rank}-p{power:g}-s{seed}"
    own = dict(credit=rule, rank=rank, alpha=2.0 * rank, sharpening=power)  # alpha as in the paper
    return replace(shared, seed=seed, out=str(out / name), **own)


def words(script, settings):
    """A command: a script, and settings as its flags."""
    found = [script]
    for name, value in settings.items():
        if value is True:
            found.append(flag_name(name))
        elif value is not False and value != "":
            found += [flag_name(name), str(value)]
    return found


def refuse_others(place, stored, wanted):
    """UserError if what a place holds was made with other settings than are wanted."""
    others = [name for name, x in wanted.items() if stored.get(name) != x]
    others = [name for name in others if name not in CHANGEABLE]
    if others:
        raise UserError(f"{place} was made with other {', '.join(others)}: give another --out")


def next_command(run):
    """The next command of a run, as words; None when all is done. UserError on another's folder."""
    folder = Path(run.out)
    # Train, or go on with it.
    if run.credit != "base":
        training = replace(run, eval_problems=min(FEW, run.eval_problems), eval_samples=0)
        if not (folder / "config.json").exists():
            return words("train.py", asdict(training))
        refuse_others(folder, read_settings(folder, training), asdict(training))
        evals = read_rows(folder / "evals.jsonl")
        if not evals or evals[-1]["step"] < run.steps:
            return ["train.py", "--resume", run.out]
    # Evaluate.
    answers = folder / "answers.jsonl"
    if answers.exists():
        return None
    names = (*FLAGS, "chat", "max_new_tokens", "temperature", "top_p")
    flags = {name: getattr(run, name) for name in names}
    flags["data"] = run.eval_data or run.data
    flags["adapter"] = "" if run.credit == "base" else folder / "adapter"
    count = dict(problems=run.eval_problems, samples=run.eval_samples)
    return words("eval_math.py", flags | count | dict(out=answers))


def start(run, command):
    """Start a command, which writes to the run's log.txt; returns the process."""
    Path(run.out).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    env = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with open(Path(run.out) / "log.txt", "ab") as log:
        # A session of its own: a Ctrl-C in the terminal is ours to pass on, once.
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def work_through(runs, jobs):
    """Do what is to be done for the runs, `jobs` at a time; returns how many failed. However it
    ends, no child is left behind; train.py saves its last whole step first."""
    waiting, active, failed = list(runs), {}, 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                command = next_command(run)
                if command:
                    active[start(run, command)] = run
                else:
                    print(f"done: {run.out}", flush=True)
            time.sleep(0.2)
            for process in [p for p in active if p.poll() is not None]:
                run = active.pop(process)
                if process.returncode == 0:
                    waiting.insert(0, run)
                else:
                    failed += 1
                    print(f"failed: {run.out}, see its log.txt", flush=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*stop.args, "the same command goes on") from None
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()
    return failed


def near(row, kept):
    """Whether a row is that of the same run among those kept, but for rounding."""
    other = in_cell(kept, (row["rule"], row["rank"], row["sharpening"])).get(row["seed"], {})
    same = all(row[key] == other.get(key) for key in row if key not in CURVES)
    a, b = (np.array([x for key in CURVES for x in r.get(key, [])], float) for r in (row, other))
    return same and len(a) == len(b) and np.allclose(a, b, rtol=0, atol=ROUNDING)


def plan(args, out):
    """What results.json says of a sweep, and its runs: seed by seed, so that one that is cut short
    compares all rules. UserError on flags that make no sense, or a folder of another sweep."""
    # What all runs share.
    settings, ranks, seeds, rules = PRESETS[args.preset]
    given = {name: x for name, x in vars(args).items() if name in BUDGET and x is not None}
    shared = Settings(**settings | given)
    check(shared)
    if not shared.eval_data and shared.data not in (*NAMED, *HUB):
        raise UserError("--data FILE: give --eval-data FILE too, with the problems to evaluate on")
    if not shared.eval_problems:
        raise UserError("--eval-problems 0: runs are compared on them, so give 1 or more")
    about = dict(preset=args.preset, rank=ranks[0])
    about |= {name: getattr(shared, name) for name in BUDGET}
    if (out / "results.json").exists():
        refuse_others(out, read_results(out / "results.json")[0], about)
    # Each one.
    seeds = list(dict.fromkeys(args.seeds or seeds))
    compared = cells(rules, ranks, not args.no_controls)
    runs = [run_of(BASE, seeds[0], shared, out)]
    runs += [run_of(cell, seed, shared, out) for seed in seeds for cell in compared]
    return about | dict(problems=shared.eval_problems, seeds=seeds, cells=compared), runs


def main():
    # The flags.
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a core, 1 on a GPU")
    parser.add_argument("--out", help="folder of the runs and results.json; runs/sweep-PRESET")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the preset's")
    parser.add_argument("--no-controls", action="store_true", help="only what the paper ran")
    for name in BUDGET:
        usual = getattr(Settings, name)
        kind = dict(action="store_true") if usual is False else dict(type=type(usual))
        parser.add_argument(flag_name(name), default=None, help="of train.py", **kind)
    args = parser.parse_args()

    # Train and evaluate.
    out = Path(args.out or f"runs/sweep-{args.preset}")
    about, runs = plan(args, out)
    results = out / "results.json"
    found = [row_of(run) for run in runs if not next_command(run)]  # refuses others' folders
    write_results(results, about, found)
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    print(f"{len(runs)} runs, {jobs} at a time, in {out}; Ctrl-C stops them", flush=True)
    failed = work_through(runs, jobs)

    # What came out, and whether it is what the repository holds.
    found = [row_of(run) for run in runs if not next_command(run)]
    write_results(results, about, found)
    print(f"{tables(about, found)}\n\nresults: {results}")
    kept = RESULTS / f"{args.preset}.json"
    if kept.exists():
        stored = read_results(kept)[1]
        alike = sum(near(row, stored) for row in found)
        print(f"{alike} of {len(found)} runs have the numbers of {kept.name}, to within {ROUNDING}")
    if failed:
        raise UserError(f"{failed} runs failed; their log.txt says why. The same command goes on")


if __name__ == "__main__":
    run_cli(main)
