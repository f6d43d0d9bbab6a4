"""Many runs of train.py under one budget, and what they say: rule x rank x sharpening x seed.

    python experiments/sweep.py --preset tiny     # the embedded model: 70 minutes on two cores
    python experiments/sweep.py --preset paper    # the paper's seven runs, and what it lacks
    python experiments/sweep.py --preset chat --data TRAIN.jsonl --eval-data TEST.jsonl

A run is a folder, named after its setting and a hash of all that decides its numbers: the code, the
model, the data, every setting. So runs of different code or settings never meet, and what is done
stays done: after Ctrl-C, a crash or a kill the same command goes on, inside a run too. The folders
become results.json, and that the tables; experiments/figures.py draws the same file.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from experiments import rows, tables
from experiments.plan import PRESETS, ROOT, cells, code_key, next_command, part_of, plan
from system.errors import Parser, UserError, flag_name, printable, run_cli
from system.files import is_number, read_rows, to_json
from train import Settings

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # on Windows

# Settings of train.py that a sweep may have otherwise, the same for all its runs.
BUDGET = """steps prompts samples max_new_tokens eval_problems lr micro_batch_tokens
    model revision data eval_data device dtype chat system thinking"""

# How far numbers may lie apart that another processor rounds otherwise. One that did differed by
# up to 3e-4 in Gini and 6e-4 in entropy, with all rewards and verdicts the same. Where an outcome
# changes, a reward moves by 1/128 and an accuracy by 1/500 at least: that is no rounding.
ROUNDING = 1e-3


# ---- Doing it ------------------------------------------------------------------------------------


def start(run, words, makes, code):
    """Start a command of `next_command`; returns the process. It holds a lock on the folder,
    even if this process is killed and it goes on alone; UserError if another one has it."""
    if code != code_key():
        raise UserError("the code was changed during the sweep: start it again")
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process works in {run.folder}: wait for it or end it") from None
    if makes:
        part_of(makes).unlink(missing_ok=True)
        words = [*words, "--out", str(part_of(makes))]
    one_thread = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with open(run.folder / "log.txt", "ab") as log:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        # A session of its own: a Ctrl-C in the terminal is ours to pass on, once.
        how = dict(stdout=log, stderr=log, env=one_thread, start_new_session=True)
        process = subprocess.Popen(command, pass_fds=(lock,), **how)
    os.close(lock)
    return process


def stop(processes):
    """Ask children to end: they save their last whole step first. A second Ctrl-C kills them."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def part_done(run):
    """The share of a run's steps that its folder has, in [0, 1]."""
    steps = len(read_rows(run.folder / "metrics.jsonl"))
    return min(1.0, steps / run.settings["steps"])


def progress(runs, unfinished, begun, first):
    """Such as `12 of 86 runs, 14 %, 1 h 05 left`; begun, first: when this sweep began, and how many
    runs' worth of steps were done then. For the screen only: no number of a run knows the time."""
    complete, total = len(runs) - len(unfinished), len(runs)
    done = complete + sum(map(part_done, unfinished))
    rate = (done - first) / (time.monotonic() - begun)
    minutes = round((total - done) / rate / 60) if rate > 0 else None
    left = "" if minutes is None else f", {minutes // 60} h {minutes % 60:02d} left"
    return f"{complete} of {total} runs, {100 * done / total:.0f} %{left}"


def ended_well(process, run, words, makes):
    """Whether a child did what its command was for; what it made gets its name."""
    if process.returncode == 0 and makes:
        os.replace(part_of(makes), makes)
    return process.returncode == 0 and (next_command(run) or [None])[0] != words


def work_through(runs, jobs, code):
    """Do what is to be done for the runs, `jobs` at a time; returns how many failed. However it
    ends, no child is left behind."""
    unfinished, active, failed = [run for run in runs if next_command(run)], {}, 0
    queue = list(unfinished)
    since = time.monotonic(), len(runs) - len(queue) + sum(map(part_done, queue))
    try:
        while queue or active:
            while queue and len(active) < jobs:
                run = queue.pop(0)
                words, makes = next_command(run)
                active[start(run, words, makes, code)] = run, words, makes
            time.sleep(0.2)
            for process in [p for p in active if p.poll() is not None]:
                run, *command = active.pop(process)
                if not ended_well(process, run, *command):
                    failed += 1
                    print(f"failed: {run.folder.name}: {last_words(run)}", flush=True)
                elif next_command(run):
                    queue.insert(0, run)
                else:
                    unfinished.remove(run)
                    print(f"{progress(runs, unfinished, *since)}: {run.folder.name}", flush=True)
            if sys.stderr.isatty():
                line = progress(runs, unfinished, *since)
                print(f"\r{line}\033[K\r", end="", file=sys.stderr, flush=True)
    finally:
        stop(active)
    return failed


def last_words(run):
    """The last line of a run's log: what it died of."""
    lines = (run.folder / "log.txt").read_text("utf-8", "replace").strip().splitlines()
    return printable(lines[-1][:300]) if lines else "killed, without a word"


# ---- The command line ----------------------------------------------------------------------------


def default_jobs(settings):
    """One run a core, as memory allows; on a GPU one at a time."""
    if settings["device"].startswith("cuda") or torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    folder = Path(settings["model"])
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    need = 2**30 + 4 * size  # bytes; the embedded model takes 0.6 GB, most of it torch itself
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, free // need))


def parse_flags():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", help=", ".join(PRESETS))
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as fit")
    parser.add_argument("--out", help="folder of the runs and results.json; runs/sweep-PRESET")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the preset's")
    text = "only what the paper ran: neither controls, nor uniform at other ranks, nor sharpening 1"
    parser.add_argument("--no-controls", action="store_true", help=text)
    parser.add_argument("--list", action="store_true", help="say what is done, and run nothing")
    parser.add_argument("--tables-only", action="store_true", help="of what is done; run nothing")
    for f in [f for f in fields(Settings) if f.name in BUDGET.split()]:
        kind = dict(action="store_true") if f.default is False else dict(type=type(f.default))
        text = f"of train.py: {f.metadata['help']}".replace("%", "%%")
        parser.add_argument(flag_name(f.name), default=None, help=text, **kind)
    args = parser.parse_args()
    if args.preset not in PRESETS:
        raise UserError(f"no preset {args.preset!r}: use one of {', '.join(PRESETS)}")
    return args


def near(a, b):
    """Whether two JSON values differ in nothing but numbers, and those by at most ROUNDING."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(near, a, b))
    if is_number(a) and is_number(b):
        return abs(a - b) <= ROUNDING
    return a == b


def likeness(found, kept):
    """Say how rows compare with the kept rows of the same runs: exactly, but for rounding, or not;
    found may be a part of the sweep."""
    known = {(r["rule"], r["rank"], r["sharpening"], r["seed"]): r for r in kept}
    partners = [known.get((r["rule"], r["rank"], r["sharpening"], r["seed"])) for r in found]
    if found == partners:
        return "the same numbers"
    return "the same but for rounding" if near(found, partners) else "others"


def report(runs, about, out):
    """Write results.json from the complete runs, print its tables, and say whether its runs are
    those that the repository holds."""
    found = [rows.row_of(run) for run in runs if not next_command(run)]
    rows.write_results(out / "results.json", about, found)
    print(tables.tables(about, found))
    print(f"\nresults: {out / 'results.json'}")
    kept = ROOT / "experiments" / "results" / f"{about['preset']}.json"
    if kept.exists() and found:
        said = likeness(json.loads(to_json(found)), rows.read_results(kept)[1])
        print(f"these {len(found)} runs and those of {kept.relative_to(ROOT)}: {said}")
    print(f"figures: python experiments/figures.py {out / 'results.json'}")


def main():
    args = parse_flags()
    preset, code, controls = PRESETS[args.preset], code_key(), not args.no_controls
    given = {k: getattr(args, k) for k in BUDGET.split() if getattr(args, k) is not None}
    out = Path(args.out or f"runs/sweep-{args.preset}")
    seeds = list(dict.fromkeys(args.seeds or preset.seeds))
    runs = plan(preset, given, seeds, controls, out, code)
    cfg = runs[0].settings
    about = {
        "preset": args.preset,
        "code": code[:10],
        "torch": version("torch"),
        "seeds": seeds,
        "rank": preset.rank,
        "cells": cells(preset.rank, preset.others, controls, preset.rules),
        "steps": cfg["steps"],
        "prompts": cfg["prompts"],
        "samples": cfg["samples"],
        "lr": cfg["lr"],
        "problems": runs[0].problems,
    }
    if args.list:
        for run in runs:
            print(f"{run.folder}  {'to do' if next_command(run) else 'done'}")
        return
    failed = 0
    if not args.tables_only:
        if not fcntl:
            raise UserError("to start runs takes Linux or macOS, or Windows' WSL: use one of these")
        jobs = args.jobs or default_jobs(cfg)
        print(f"{len(runs)} runs, {jobs} at a time, in {out}; Ctrl-C stops them", flush=True)
        try:
            failed = work_through(runs, jobs, code)
        except KeyboardInterrupt as stopped:
            said = "all children have stopped, the same command goes on"
            raise KeyboardInterrupt(*stopped.args, said) from None
    report(runs, about, out)
    if failed:
        raise UserError(f"{failed} runs failed; their log.txt says why. The same command goes on")


if __name__ == "__main__":
    run_cli(main)
