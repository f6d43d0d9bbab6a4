"""Checkpoints of a run: written whole or not at all, found again, resumed from.
trainer.safetensors holds adapter, optimizer and step, so that one rename makes it the newest
checkpoint; adapter/ is a copy for other programs. A run that resumes cuts its JSONL files back.
"""

import hashlib
import math
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from hf.peft import load_adapter, most_bytes, put_adapter, save_adapter
from lora import add_lora, lora_parameters
from run.folder import run_name
from system import files, processes
from system.errors import UserError, flag_name, interrupt, on_signals, printable

# Settings that --resume may change: they decide what is kept and seen, not what is learned.
CHANGEABLE = ("out", "device", "micro_batch_tokens", "gradient_checkpointing", "eval_every")
CHANGEABLE += ("save_every", "keep_checkpoints", "compare_rules", "tensorboard")
# Settings that say where the inputs are. These may have moved: what they hold must be the same.
INPUTS = ("model", "revision", "data", "eval_data")


@contextmanager
def uninterrupted():
    """Hold back Ctrl-C and SIGTERM to the end of the block, so that parameters, optimizer and files
    are all of one step. A second signal ends the process at once, which a checkpoint survives."""
    caught = []

    def wait(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        if sys.stderr.isatty():  # print() must not be called from a signal handler
            os.write(2, b"\nstopping after this step; a second time stops at once\n")

    before = signal.getsignal(signal.SIGINT)
    on_signals(wait if processes.rank() == 0 else before)  # the other processes follow the first
    try:
        yield
    finally:
        on_signals(before)
    if caught:
        interrupt(caught[0], None)


def find_run(cfg, resume) -> Path:
    """Return the folder given to --resume or --out, or else the newest run of this name."""
    if resume and cfg.out not in ("", resume):
        raise UserError(f"--resume {resume} and --out {cfg.out} are two runs: give one of them")
    if resume or cfg.out:
        return Path(resume or cfg.out)
    name = run_name(cfg)
    configs = list(Path("runs").glob(f"{name}/config.json"))
    configs += Path("runs").glob(f"{name}-[0-9]*/config.json")
    if not configs:
        raise UserError(f"no run runs/{name} to resume: give its folder, --resume FOLDER")
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def read_settings(folder, cfg) -> dict:
    """Return the settings in a run's config.json: those of cfg by name and type, with no text that
    would steer a terminal; UserError if it has no such ones."""
    path = Path(folder) / "config.json"
    stored = files.read_json(path).get("settings")
    kinds = {name: type(value) for name, value in asdict(cfg).items()}
    known = isinstance(stored, dict) and {k: type(v) for k, v in stored.items()} == kinds
    if not known or any(printable(str(value)) != str(value) for value in stored.values()):
        raise UserError(f"{path} does not hold the settings of this train.py: start another run")
    return stored


def resumed_settings(cfg, given: dict, resume):
    """Return the run's settings, CHANGEABLE ones and INPUTS as given; UserError lists all other
    changes."""
    folder = find_run(cfg, resume)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no run to resume (no config.json): start without --resume")
    processes.hold(folder)
    stored = read_settings(folder, cfg)
    clash = {name for name in given if given[name] != stored[name]}
    clash -= {*CHANGEABLE, *INPUTS}
    if clash:
        said = ", ".join(f"{name} = {stored[name]} and not {given[name]}" for name in sorted(clash))
        raise UserError(f"{folder} was run with {said}: leave these out, or start another run")
    return replace(cfg, **stored | given | dict(out=str(folder)))


def check_inputs(cfg, digests):
    """Raise UserError if a run would go on with another model or other data than it began with."""
    path = Path(cfg.out) / "config.json"
    stored = files.checked(files.read_json(path), path, digests=dict).get("digests", {})
    for name in ("model", "data", "eval_data"):
        before = str(stored.get(name, "none"))[:16]
        now = digests.get(name, "none")
        if before != now:
            given = f"{flag_name(name)} {getattr(cfg, name) or cfg.data} (digest {now})"
            said = f"{given} is not what {path.parent} began with (digest {before})"
            raise UserError(f"{said}: name that one, or start another run")


def digest(tensors, step) -> str:
    """Return a checksum of a checkpoint, which any flipped bit of it changes."""
    return hashlib.sha256(safetensors.torch.save(tensors, dict(step=str(step)))).hexdigest()


def save(folder, model, optimizer, step, cfg):
    """Write trainer.safetensors and adapter/: with the settings, the whole state of a run."""
    if processes.rank() > 0:
        return
    for path in folder.glob("*.jsonl"):
        files.sync(path)  # else a power cut could leave a checkpoint without the lines before it
    tensors = {f"adapter.{name}": p.detach() for name, p in lora_parameters(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": value for key, value in state.items()}
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    data = safetensors.torch.save(tensors, dict(step=str(step), sha256=digest(tensors, step)))
    files.write_whole(folder / "trainer.safetensors", data, cfg.keep_checkpoints)
    save_adapter(model, folder / "adapter", cfg.model)


def checkpoint_paths(folder) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    found = [p for p in folder.glob("trainer.safetensors*") if p.suffix != ".part"]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def step_of(about) -> int:
    """Return the step in a checkpoint's metadata, -1 if that is no number."""
    step = about.get("step", "")
    return int(step) if re.fullmatch("[0-9]{1,12}", step) else -1


def newest_checkpoint(folder, most=math.inf):
    """Return tensors and step of the newest whole checkpoint of at most so many bytes, or {} and 0
    if there was none yet; a step that is no number is -1."""
    damage = ""
    for path in checkpoint_paths(folder):
        try:
            tensors, about = files.read_tensors(path, most)
            if not tensors or about.get("sha256") != digest(tensors, about.get("step", "")):
                raise UserError(f"{path} is damaged: its checksum is wrong")
            if damage:
                said = f"WARNING: {damage}; resuming from {path}, of step {step_of(about)}"
                tqdm.write(printable(said))
            return tensors, step_of(about)
        except UserError as error:
            damage = damage or str(error)
    if not damage and files.read_rows(folder / "metrics.jsonl"):
        damage = f"{folder / 'trainer.safetensors'} is missing"
    if damage:
        raise UserError(f"{damage}; no older one is whole: put it back, or start another run")
    return {}, 0


def adapt(model, cfg, resume):
    """Put an adapter on the base model: the newest checkpoint's, that of --adapter, or a new one.
    Return tensors and step of that checkpoint; once there is one, --adapter is not read again."""
    tensors = {}
    step = 0
    if resume:  # a checkpoint has A and B three times
        tensors, step = newest_checkpoint(Path(cfg.out), 3 * most_bytes(model, cfg.rank))
    if tensors:
        own = {name: x for name, x in tensors.items() if name.startswith("adapter.")}
        put_adapter(model, own, cfg.rank, cfg.alpha, cfg.out, "adapter.")
    elif cfg.adapter:
        load_adapter(model, cfg.adapter)
    else:
        add_lora(model, cfg.rank, cfg.alpha, seed=cfg.seed)
    return tensors, step


def resume_or_start(folder, model, optimizer, cfg, tensors, step):
    """Restore the optimizer of a checkpoint and cut the rows after it, or save a first one."""
    if tensors:
        restore(tensors, step, model, optimizer, cfg)
    else:
        save(folder, model, optimizer, step, cfg)
    if processes.rank() > 0:
        return
    if tensors:
        kept = {}
        for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
            kept[name] = [row for row in files.read_rows(folder / name) if row["step"] <= step]
        steps = [row["step"] for row in kept["metrics.jsonl"]]
        evaluated = kept["evals.jsonl"] or step == 0 or cfg.eval_problems == 0
        if steps != list(range(1, step + 1)) or not evaluated:
            raise UserError(f"{folder}: metrics.jsonl or evals.jsonl lacks steps: put it back")
        for name, rows in kept.items():
            text = "".join(files.to_json(row) + "\n" for row in rows)
            files.write_whole(folder / name, text.encode())
        save_adapter(model, folder / "adapter", cfg.model)  # a crash may have left an older one
    config = files.read_json(folder / "config.json") | dict(settings=asdict(cfg))
    files.write_json(folder / "config.json", config)


def restore(tensors, step, model, optimizer, cfg):
    """Give the optimizer the tensors of a checkpoint; UserError if a run of these settings has no
    such ones after so many steps."""
    adapter = lora_parameters(model)
    expected = {f"adapter.{name}": p for name, p in adapter.items()}
    states = {}  # AdamW's, by the index of the parameter; before the first update there are none
    for i, p in enumerate(adapter.values() if "0.step" in tensors else ()):
        states[i] = dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p)
        expected |= {f"{i}.{key}": like for key, like in states[i].items()}
    files.check_tensors(tensors, expected, cfg.out)
    updates = {tensors[f"{i}.step"].item() for i in states} or {0}
    possible = 0 <= step <= cfg.steps and {x.dtype for x in tensors.values()} == {torch.float32}
    possible &= len(updates) == 1 and max(updates) % 1 == 0
    possible &= min(1, len(states)) <= max(updates) <= step * cfg.epochs_per_rollout
    if not possible or any((tensors[f"{i}.exp_avg_sq"] < 0).any() for i in states):
        raise UserError(f"{cfg.out}: no run saves such a checkpoint at step {step}: mend that")
    states = {i: {key: tensors[f"{i}.{key}"] for key in state} for i, state in states.items()}
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=states))
