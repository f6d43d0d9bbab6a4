"""Checkpoints of a run of train.py: written whole or not at all, found again, gone on from.

trainer.safetensors is a checkpoint: adapter, optimizer and step in one file, so that one rename
makes it the newest; trainer.safetensors.1 is the one before. adapter/ is a copy of its adapter for
everyone else, made a moment later. The JSONL files may be ahead of the checkpoint and are cut back
to it when the run goes on.
"""

import hashlib
import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
from tqdm import tqdm

from hf.peft import save_adapter
from lora import lora_parameters
from run.folder import run_name
from system import files, processes
from system.errors import UserError
from system.files import read_rows

# Settings that a resumed run may change: they decide what is kept and seen, not what is learned.
FREE = ["out", "device", "micro_tokens", "eval_every", "save_every", "keep", "compare_rules"]
FREE += ["tensorboard", "checkpoint"]


@contextmanager
def whole_step():
    """Inside, Ctrl-C and SIGTERM wait for the end, so that parameters, optimizer and files are all
    of the same step. A second one ends the process at once, which a checkpoint survives."""
    if processes.rank() > 0:
        yield  # these follow the first process
        return
    caught = []

    def wait(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        if sys.stderr.isatty():  # print() must not be called from a signal handler
            os.write(2, b"\nstopping after this step; a second time stops at once\n")

    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt(caught[0])


# ---- Which run, and with which settings ----------------------------------------------------------


def find_run(s, resume) -> Path:
    """The folder given to --resume or to --out, or else the newest run of this name."""
    if resume and s.out not in ("", resume):
        raise UserError(f"--resume {resume} and --out {s.out} are two runs: give one of them")
    if resume or s.out:
        return Path(resume or s.out)
    like = re.compile(re.escape(run_name(s)) + r"(-\d+)?")
    found = [p for p in Path("runs").glob("*/config.json") if like.fullmatch(p.parent.name)]
    if not found:
        raise UserError(f"no run runs/{run_name(s)} to go on with: give a folder, --resume FOLDER")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def resumed_settings(s, given: dict, resume):
    """The settings of the run to go on with, and of those given the FREE ones; UserError lists the
    others, if they are not the run's."""
    folder = find_run(s, resume)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run to resume (no config.json): start without --resume")
    stored = files.read_json(path).get("settings")
    kinds = {name: type(value) for name, value in asdict(s).items()}
    if not isinstance(stored, dict) or {k: type(v) for k, v in stored.items()} != kinds:
        raise UserError(f"{path} does not hold the settings of this train.py: start another run")
    clash = {k for k, v in given.items() if k not in FREE and v != stored[k]}
    done = max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)
    if done <= stored["warmup"] and done < stored["steps"] < s.steps:
        clash -= {"steps"}  # the warmup is the same however many steps follow
    if clash:
        said = ", ".join(f"{k} = {stored[k]} and not {given[k]}" for k in sorted(clash))
        said += " (another number of steps, another schedule)" * ("steps" in clash)
        raise UserError(f"{folder} was run with {said}: leave these away, or start another run")
    return replace(s, **stored | given | dict(out=str(folder)))


# ---- Saved and restored --------------------------------------------------------------------------


def digest(tensors, step) -> str:
    """A checksum of a checkpoint, which any flipped bit of it changes."""
    return hashlib.sha256(safetensors.torch.save(tensors, dict(step=str(step)))).hexdigest()


def save(folder, model, optimizer, step, s):
    """trainer.safetensors and adapter/: with the settings, the whole state of a run."""
    if processes.rank() > 0:
        return
    for path in folder.glob("*.jsonl"):
        files.sync(path)  # else a power cut could leave a checkpoint without the lines before it
    tensors = {f"adapter.{name}": p.detach() for name, p in lora_parameters(model).items()}
    for i, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{key}": value for key, value in values.items()}
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    data = safetensors.torch.save(tensors, dict(step=str(step), sha256=digest(tensors, step)))
    files.write_whole(folder / "trainer.safetensors", data, s.keep)
    save_adapter(model, folder / "adapter", s.model)


def kept(folder) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [p for p in folder.glob("trainer.safetensors*") if p.suffix != ".part"]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def kept_adapters(folder) -> dict:
    """{step: the adapter's tensors by name} of all the checkpoints of a run, the newest first."""
    found = {}
    for path in kept(Path(folder)):
        tensors, about = files.read_tensors(path)
        own = {n.removeprefix("adapter."): x for n, x in tensors.items() if "adapter." in n}
        found[int(about.get("step", -1))] = own
    return found


def newest_checkpoint(folder):
    """Tensors and step of the newest whole checkpoint; none, and 0, in a run that was killed before
    it wrote one. UserError if all are damaged."""
    found, damage = kept(folder), ""
    for path in found:
        try:
            tensors, about = files.read_tensors(path)
            if about.get("sha256") != digest(tensors, about.get("step")):
                raise UserError(f"{path} is damaged: its checksum is wrong")
        except UserError as error:
            damage = damage or str(error)
            continue
        if damage:
            tqdm.write(f"WARNING: {damage}; going on from {path}, of step {about['step']}")
        return tensors, int(about["step"])
    if found or read_rows(folder / "metrics.jsonl"):
        damage = damage or f"{folder / 'trainer.safetensors'} is missing"
        raise UserError(f"{damage}; no older one is whole: put it back, or start another run")
    return {}, 0


def begin(folder, model, optimizer, s) -> int:
    """Give model and optimizer back what `save` wrote and cut the lines of later steps, or save the
    first checkpoint; returns its step."""
    tensors, step = newest_checkpoint(folder)
    if tensors:
        put_back(tensors, model, optimizer, folder)
    if processes.rank() > 0:
        return step
    if tensors:
        cut_back(folder, step)
        save_adapter(model, folder / "adapter", s.model)  # a crash may have come before its turn
    else:
        save(folder, model, optimizer, step, s)
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | dict(settings=asdict(s)))
    return step


def put_back(tensors, model, optimizer, folder):
    """Give model and optimizer the tensors of a checkpoint."""
    ours = {f"adapter.{name}": p for name, p in lora_parameters(model).items()}
    state = optimizer.state_dict()
    for name in [name for name in tensors if not name.startswith("adapter.")]:
        i, key = name.split(".")
        state["state"].setdefault(int(i), {})[key] = tensors.pop(name).clone()  # else of the file
    files.check_tensors(tensors, ours, folder)
    optimizer.load_state_dict(state)
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])


def cut_back(folder, step):
    """Leave the lines up to a step; UserError if some of those are missing."""
    names = ("metrics.jsonl", "evals.jsonl", "samples.jsonl")
    kept = [[row for row in read_rows(folder / name) if row["step"] <= step] for name in names]
    if [row["step"] for row in kept[0]] != list(range(1, step + 1)) or (step > 0 and not kept[1]):
        raise UserError(
            f"{folder}: metrics.jsonl or evals.jsonl lacks steps up to {step}: put it back"
        )
    for name, rows in zip(names, kept, strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_whole(folder / name, text.encode())
