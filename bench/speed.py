"""Our speed and memory beside the peers': one table, from one run, on the same work.

    python bench/speed.py                                       # the embedded model: 3 minutes
    python bench/speed.py --model 0.6B --tokens 8 --prompts 2   # Qwen3-0.6B's shape, random weights
    python bench/speed.py --model FOLDER --prompts 2 --rows sampling --dtype bf16

Same weights, adapter, prompts, lengths and threads. The contestants take turns, round after round
(the first is not counted), so that a machine that slows down slows all of them; what is printed is
the median of the rounds, from the least to the most. `free` completions end where they end, of
`forced` ones nothing ends before --tokens. Half of the completions count as right, so that every
group learns and no step is cheaper for what it leaves out; the learning rate is 0, so that every
round is the same work. Memory is that of a fresh process a row. The peers are transformers, peft,
and trl with datasets; those that are not installed are left out.
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from bench import common, ours, peers
from bench.common import line, middle, number
from run.flags import use_device
from system.errors import Parser, UserError, run_cli

# ---- The contestants -----------------------------------------------------------------------------

TRL = ("transformers", "peft", "trl", "datasets")
static, checkpointing = dict(cache="static"), dict(checkpointing=True)
# name: (what makes the job, its options, the packages it needs)
JOBS = {
    "sample, ours": (ours.sampler, {}, ()),
    "sample, transformers": (peers.sampler, {}, TRL[:1]),
    "sample, transformers, static cache": (peers.sampler, static, TRL[:1]),
    "sample, ours with the adapter": (ours.sampler, dict(adapter=True), ()),
    "sample, PEFT": (peers.sampler, dict(adapter=True), TRL[:2]),
    "step, ours, uniform": (ours.step, dict(credit="uniform"), ()),
    "step, ours, arca": (ours.step, dict(credit="arca"), ()),
    "step, TRL + PEFT": (peers.trainer, {}, TRL),
    "step, TRL + PEFT, arca": (peers.trainer, dict(credit="arca"), TRL),
    "step, TRL + PEFT, checkpointing": (peers.trainer, checkpointing, TRL),
    "update, ours, arca": (ours.update, {}, ()),
    "update, arca the authors' way": (ours.update, dict(authors=True), ()),
}
# ours, the peer, and how often ours should fit into its time: free and forced on the embedded
# model, free on a real one
RATIOS = [
    ("sample, ours", "sample, transformers", 3.0, 1.8, 1.3),
    ("sample, ours", "sample, transformers, static cache", 3.0, 1.8, 1.3),
    ("sample, ours with the adapter", "sample, PEFT", 4.0, 2.3, 1.3),
    ("step, ours, uniform", "step, TRL + PEFT", 3.0, None, 1.5),
    ("step, ours, arca", "step, TRL + PEFT", None, None, None),
    ("step, TRL + PEFT, arca", "step, TRL + PEFT", None, None, None),
    ("update, ours, arca", "update, arca the authors' way", None, None, None),
]
MEMORY = 0.6  # of TRL's, above the weights, on a real model


def job_of(name, work):
    make, options, _ = JOBS[name]
    return make(work, **options)


# ---- Rows ----------------------------------------------------------------------------------------


def chosen(work, args, kinds):
    """Names of the jobs of these kinds that this run has; a group of one teaches GRPO nothing."""
    groups = work.samples > 1
    names = [name for name in JOBS if name.split(",")[0] in kinds and args.only in name]
    return [n for n in names if not peers.absent(JOBS[n][2]) and (groups or n.startswith("sample"))]


def take_turns(jobs, rounds):
    """{(name, free): [(seconds, tokens) of each round]}; the first round finds memory as others
    left it, and kernels that are not chosen yet."""
    found = {(name, free): [] for free in (True, False) for name in jobs}
    for turn in range(rounds + 1):
        for name, free in found:
            result = jobs[name](free, turn)
            found[name, free] += [result] if turn else []
    return found


def ratios(medians, args):
    """Rows that say how many times faster ours is, and how many times it should be."""
    for us, peer, free, forced, real in RATIOS:
        if (us, True) in medians and (peer, True) in medians:
            goals = dict(tiny=(free, forced)).get(args.model, (real, None))
            goals = goals if args.model not in common.SHAPES else (None, None)
            cells = []
            for kind, goal in zip((True, False), goals, strict=True):
                cells += [number(medians[us, kind] / medians[peer, kind])]
                cells += [f"goal {goal}" if goal else ""]
            line(f"{us} / {peer}", "times", *cells)


def speeds(work, args, kinds, unit):
    """Rows of tokens/s, or of s a step, and of the ratios of speeds."""
    jobs = {name: job_of(name, work) for name in chosen(work, args, kinds)}
    found, medians = take_turns(jobs, args.rounds), {}
    for name in jobs:
        cells = []
        for free in (True, False):
            values = [n / t if unit == "tokens/s" else t for t, n in found[name, free]]
            median = statistics.median(values)
            medians[name, free] = median if unit == "tokens/s" else 1 / median
            cells += middle(values)
        line(name, unit, *cells)
    ratios(medians, args)


def alone(work, name):
    """What a job takes at most above what is held once it is loaded, and in all; MiB, as JSON."""
    job = job_of(name, work)
    gc.collect()
    for thing in gc.get_objects():  # weights that are mapped from a file count once they are read
        if issubclass(type(thing), torch.nn.Module):
            [p.sum() for p in thing.parameters(recurse=False)]
    common.forget_peak(work.device)
    loaded = common.held(work.device)
    for turn in (1, 2):  # an optimizer has no state before its second step
        job(False, turn)
    peak = common.held(work.device, "VmHWM")
    print(json.dumps(dict(above=(peak - loaded) / 2**20, peak=peak / 2**20)))


def memory(work, args):
    """Rows of the memory that forced lengths take, each measured in a process of its own."""
    if common.held(work.device) is None:
        return line("memory is not counted here: no /proc", "", "", "", "", "")
    above = {}
    for name in chosen(work, args, ("sample", "step", "update")):
        command = [sys.executable, __file__, "--alone", name, "--model", str(work.folder)]
        command += ["--adapter", str(work.adapter), "--prompts", str(len(work.problems))]
        for flag in ("samples", "tokens", "threads", "device", "dtype", "micro_batch_tokens"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            line(f"memory, {name}", "MiB", "", "", "failed", "")
            continue
        found = json.loads(ended.stdout.splitlines()[-1])
        above[name] = found["above"]
        note = f"above the weights; {number(found['peak'])} in all"
        line(f"memory, {name}", "MiB", "", "", number(found["above"]), note)
    real = args.model != "tiny" and args.model not in common.SHAPES
    for us in ("step, ours, uniform", "step, ours, arca"):
        for peer in [name for name in above if "TRL" in name and us in above]:
            goal = f"goal {MEMORY} at most" if real and peer == "step, TRL + PEFT" else ""
            line(f"memory, {us} / {peer}", "times", "", "", number(above[us] / above[peer]), goal)


def limits(work, args):
    """Rows of how much of what the machine can do is done, at forced lengths."""
    model = work.model
    prompts, rows = [len(p) for p in work.prompts()], len(work.problems) * work.samples
    lengths = [work.tokens] * rows
    flops, reads = common.sampling_work(model, prompts, lengths)
    needs = {
        "sample, ours": flops,
        "update, ours, arca": common.update_work(model, prompts, lengths),
    }
    jobs = {name: job_of(name, work) for name in needs if work.samples > 1 or name[0] == "s"}
    product, copy, rates = [], [], {name: [] for name in jobs}
    for turn in range(args.rounds + 1):
        product.append(common.product_speed(work.device, work.dtype))
        copy.append(common.copy_speed(work.device))
        for name, job in jobs.items():
            rates[name].append(needs[name] / job(False, turn)[0])
    product, copy = (statistics.median(values[1:]) for values in (product, copy))
    line("limit, matrix product", "GFLOP/s", "", "", number(product / 1e9), "")
    line("limit, copy", "GB/s", "", "", number(copy / 1e9), "read and written")
    for name, values in rates.items():
        rate = statistics.median(values[1:])
        share = f"{number(100 * rate / product)} % of the product"
        line(f"limit, {name}", "GFLOP/s", "", "", number(rate / 1e9), share)
    rate = statistics.median(rates["sample, ours"][1:]) * reads / flops
    share = f"{number(100 * rate / copy)} % of the copy"
    line("limit, sample, ours", "GB/s", "", "", number(rate / 1e9), share)


# ---- The table -----------------------------------------------------------------------------------

ROWS = {
    "sampling": partial(speeds, kinds=("sample",), unit="tokens/s"),
    "step": partial(speeds, kinds=("step", "update"), unit="s"),
    "memory": memory,
    "limits": limits,
}


def heading(work, args):
    """What was run, on what, and with what."""
    missing = peers.absent(TRL)
    have = ["torch", *(name for name in TRL if name not in missing)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in have]
    print("python bench/speed.py", *sys.argv[1:])
    gpu = torch.cuda.get_device_name() if common.on_gpu(work.device) else "CPU"
    print(f"{', '.join(versions)}; {gpu}, {args.dtype}, {torch.get_num_threads()} threads")
    if missing:
        print(f"not installed, so without their rows: {', '.join(missing)}")
    size = f"{len(work.problems)} prompts x {work.samples} completions of at most {work.tokens}"
    print(f"{args.model}: {size} tokens, {args.rounds} rounds\n")
    line("what", "unit", "free: median", "least to most", "forced: median", "least to most")
    line(*["---"] * 6)


def parse():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, 0.6B, 1.7B or a checkpoint folder")
    parser.add_argument("--adapter", default="", help="a PEFT adapter; default: rank 16, random")
    parser.add_argument("--rows", default=",".join(ROWS), help="which of these")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="at most, of a completion")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if wrong := set(args.rows.split(",")) - ROWS.keys():
        raise UserError(f"no rows {min(wrong)}: use {', '.join(ROWS)}")
    return args


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    use_device(args.device)
    sizes = dict(
        device=args.device,
        dtype=args.dtype,
        prompts=args.prompts,
        samples=args.samples,
        tokens=args.tokens,
        micro_batch_tokens=args.micro_batch_tokens,
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = common.prepare(args.model, scratch, args.adapter, **sizes)
        if args.alone:
            return alone(work, args.alone)
        heading(work, args)
        for name in args.rows.split(","):
            ROWS[name](work, args)


if __name__ == "__main__":
    run_cli(main)
