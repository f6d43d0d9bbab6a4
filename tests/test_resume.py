"""A run is killed, stopped or fails, goes on, and ends as if nothing had happened.

    PYTHONPATH=. python tests/test_resume.py --kills 100    # 80 steps of four problems each

Runs are real ones of train.main, in processes forked from one that has imported everything (torch
takes seconds). Each says when it begins to sample, to update, to save or to evaluate, so that a
kill can be aimed at any of these, and at what comes before.
"""

import ast
import contextlib
import errno
import fcntl
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import forks, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from data.problems import TINY
from hf.checkpoint import load_model
from hf.peft import load_adapter
from lora import lora_parameters
from model import Qwen3
from run import answers, checkpoints
from run.folder import own_folder
from system import errors, files, processes
from system.errors import Parser, UserError, interrupt, on_signals, run_cli

TIMING = {"seconds_rollout", "seconds_update", "tokens_per_second"}
ADAPTER = "adapter/adapter_model.safetensors"
SMALL = "--steps 6 --prompts 2 --samples 3 --max-new-tokens 16 --eval-problems 4 --eval-samples 2"
SMALL = f"{SMALL} --save-every 2 --eval-every 3 --credit uniform --seed 2".split()
CORES = len(os.sched_getaffinity(0))  # as many threads does torch use if nobody tells it otherwise
PHASES = {"sampling": 0.1, "update": 0.1, "saving": 0.02, "evaluation": 0.1}  # and their seconds
# Of main's run. It is starting while model and checkpoint are read, and before that importing.
LONGER = {"sampling": 0.4, "update": 0.3, "saving": 0.05, "evaluation": 2.0}
LONGER |= {"starting": 2.0, "importing": 4.0}
ORDER = ["sampling", "update", "saving", "starting", "importing"]
ORDER += ["sampling", "update", "saving", "starting", "evaluation"]

PLACE = "make room, or give another place"

# Threads that have nothing to do sleep: else they take the time of whatever else runs here.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read by the process that all runs are forked from

# ---- Processes -----------------------------------------------------------------------------------


def telling(phase, call, pipe, moment):
    """`call`, but the pipe is told first which phase begins. At a moment (folder, phase, steps,
    signal) the process gets that signal, 5 ms into the phase, if so many steps are done."""

    def told(*args):
        pipe.send(phase)
        first = signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
        if moment and first and phase == moment[1] and len(rows(moment[0])) >= moment[2]:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), moment[3]))
            signal.setitimer(signal.ITIMER_REAL, 0.005)
        return call(*args)

    return told


def child(flags, log, pipe, moment, limit, breaks, threads):
    """train.py with these flags; its output goes to a file, and no file may grow over `limit`
    bytes. With `breaks`, gradients are not finite from that step on."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    train.sample_rollout = telling("sampling", train.sample_rollout, pipe, moment)
    train.update = telling("update", train.update, pipe, moment)
    train.save = checkpoints.save = telling("saving", train.save, pipe, moment)
    train.evaluate_step = telling("evaluation", train.evaluate_step, pipe, moment)
    if breaks:
        advantages = train.group_advantages
        steps = iter(range(1, 10**6))
        broken = lambda r, kind: advantages(r, kind) * (1 if next(steps) < breaks else torch.nan)  # noqa: E731
        train.group_advantages = broken
    sys.argv = ["train.py", *map(str, flags)]
    run_cli(train.main)


def start(folder, flags, moment=None, limit=resource.RLIM_INFINITY, breaks=0, threads=1):
    """A process that begins the run in this folder, or goes on with it, and a pipe from it."""
    pipe, theirs = forks().Pipe()
    more = ["--resume", folder] if (folder / "config.json").exists() else ["--out", folder]
    log = folder.with_suffix(".log")
    arguments = ([*flags, *more], log, theirs, moment, limit, breaks, threads)
    process = forks().Process(target=child, args=arguments)
    process.start()
    theirs.close()
    return process, pipe


def finish(folder, flags, **how):
    """Run to the end; returns the exit code and what was printed."""
    process, _ = start(folder, flags, **how)
    process.join()
    return process.exitcode, folder.with_suffix(".log").read_text()


def stop(folder, flags, phase, steps, number=signal.SIGKILL, **how):
    """Have a run get a signal in a phase after so many steps; returns its exit code."""
    return finish(folder, flags, moment=(folder, phase, steps, number), **how)[0]


def kill(folder, flags, phase, steps, delay):
    """Kill a run from outside, some seconds after a phase began after so many steps; returns the
    phase that it was in, or None if it had ended."""
    if phase == "importing":
        command = [sys.executable, train.__file__, *map(str, flags), "--resume", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            time.sleep(delay)
            run.kill()
        return phase
    process, pipe = start(folder, flags)
    now = "starting"
    try:
        while now != phase or (phase != "starting" and len(rows(folder)) < steps):
            now = pipe.recv()
        time.sleep(delay)
        process.kill()
        while True:  # what it said before it died
            now = pipe.recv()
    except EOFError:
        process.join()
    return now if process.exitcode != 0 else None


def rows(folder, name="metrics.jsonl"):
    """The whole lines of a JSONL file."""
    path = folder / name
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON


def outcome(folder):
    """What has to be equal: metrics but for times, evaluations, samples and adapter to the byte."""
    untimed = [{k: v for k, v in row.items() if k not in TIMING} for row in rows(folder)]
    names = ("evals.jsonl", "samples.jsonl", ADAPTER, "adapter/adapter_config.json")
    return untimed, *((folder / name).read_bytes() for name in names)


def near(key, a, b):
    """Whether two metrics are equal to 1e-5. Batches of another shape round otherwise, and where a
    rule gives two tokens multipliers equal but for that, their ranks vary: 1e-2 for correlations.
    """
    most = 1e-2 if key.startswith("rank_correlation/") else 1e-5
    return abs(a - b) <= most * max(1, abs(b))


def assert_same_run(folder, other):
    """Metrics equal to rounding, rewards, evaluations and completions exactly; each line once."""
    assert rows(folder, "evals.jsonl") == rows(other, "evals.jsonl")
    for a, b in zip(rows(folder), rows(other), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        far = {key: (a[key], b[key]) for key in a.keys() - TIMING if not near(key, a[key], b[key])}
        assert not far, (a["step"], far)
    for key in ("reward", "completion_tokens"):
        assert [row[key] for row in rows(folder)] == [row[key] for row in rows(other)]
    ours = rows(folder, "samples.jsonl")
    theirs = rows(other, "samples.jsonl")
    for key in ("step", "problem", "text", "tokens"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a short run on few problems, which are read faster."""
    return [*SMALL, "--data", few_problems(tmp_path_factory.mktemp("data"))]


def few_problems(folder):
    """A JSONL file of few problems."""
    lines = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()[:90]
    (folder / "few.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder / "few.jsonl"


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run that nothing interrupted, and that learned something."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, said = finish(folder, flags)
    assert code == 0, said
    assert [row["step"] for row in rows(folder, "evals.jsonl")] == [0, 3, 6]
    assert sum(row["groups_mixed"] > 0 for row in rows(folder)) > 2
    return folder


@pytest.fixture(scope="module")
def killed_once(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "killed"
    assert stop(folder, flags, "update", 4) == -signal.SIGKILL
    return folder


@pytest.fixture
def killed(killed_once, tmp_path):
    """The folder of a run that was killed in step 5; it has the checkpoints of steps 4 and 3."""
    return Path(shutil.copytree(killed_once, tmp_path / "run"))


# ---- Killed --------------------------------------------------------------------------------------


def kill_often(folder, flags, kills, steps, delays, seed):
    """Kill a run in its first saving and evaluation, then at moments spread over its steps, then in
    its last evaluation; returns how many kills met it in each phase."""
    rng = random.Random(seed)
    died = Counter()
    moments = [("saving", 0), ("evaluation", 0)]
    for i in range(kills - 3):
        at = int((i + rng.random()) * steps / (kills - 3))
        moments.append((ORDER[i % len(ORDER)], at))
    for phase, at in [*moments, ("evaluation", steps)]:
        died[kill(folder, flags, phase, at, rng.uniform(0, delays[phase]))] += 1
        print(f"after {len(rows(folder))} steps: {dict(died)}", flush=True)
    del died[None]  # those that came too late
    return died


@pytest.mark.long
def test_killed_runs_end_as_if_nothing_had_happened(flags, whole, tmp_path):
    """State that no checkpoint holds, a line twice or half, a checkpoint that is not one."""
    folder = tmp_path / "run"
    assert kill_often(folder, flags, 6, 6, PHASES, seed=1).total() >= 4
    code, said = finish(folder, flags)
    assert code == 0, said
    assert outcome(folder) == outcome(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.long
def test_a_killed_run_with_all_threads_ends_as_if_nothing_had_happened(flags, tmp_path):
    """A sum that threads add up in another order after the resume: users do not set one thread."""
    whole = tmp_path / "whole"
    folder = tmp_path / "run"
    flags = [*flags, "--steps", 3, "--eval-problems", 2, "--save-every", 1]
    code, said = finish(whole, flags, threads=CORES)
    assert code == 0, said
    assert any(row["grad_norm"] > 0 for row in rows(whole)[:2])
    assert stop(folder, flags, "update", 2, threads=CORES) == -signal.SIGKILL
    assert finish(folder, flags, threads=CORES)[0] == 0
    assert outcome(folder) == outcome(whole)


def sft_adapter(folder):
    """An adapter such as PEFT may leave it: rsLoRA, bf16, on some layers of some blocks."""
    rng = torch.Generator().manual_seed(3)
    tensors = {}
    for name in ("layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"):  # 128 to 128
        A = torch.randn(4, 128, generator=rng) / 10
        B = torch.randn(128, 4, generator=rng) / 10
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = A.bfloat16()
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = B.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=4, lora_alpha=3, use_rslora=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, tensors


def test_a_run_that_began_from_an_adapter_goes_on_without_it(flags, tmp_path):
    """All seven projections, or --rank, where the adapter has others; a run that starts again from
    an adapter which has changed since, or cannot go on because it is gone."""
    sft, tensors = sft_adapter(tmp_path / "sft")
    whole = tmp_path / "whole"
    folder = tmp_path / "run"
    flags = [*flags, "--credit", "arca", "--steps", 2, "--save-every", 1, "--adapter", sft]
    code, said = finish(whole, flags)
    assert code == 0, said
    assert stop(folder, flags, "update", 1) == -signal.SIGKILL
    shutil.rmtree(sft)
    code, said = finish(folder, flags)
    assert code == 0, said
    assert outcome(folder) == outcome(whole)
    kept = json.loads((folder / "config.json").read_text())["settings"]
    assert (kept["rank"], kept["alpha"], kept["adapter"]) == (4, 6.0, str(sft))  # 3 x sqrt(4)
    trained = load_file(folder / ADAPTER)
    assert trained.keys() == tensors.keys()
    assert any((x - tensors[name]).abs().max() > 0 for name, x in trained.items())
    assert rows(folder)[0]["credit_fallback"] == 0 < rows(folder)[0]["residual_mean"]


class Killed(BaseException):
    """What stands for SIGKILL where a test does not want to lose its own process."""


def crash_at(moment, monkeypatch):
    """Have the moment-th write, sync or rename not happen, a write by half, nor anything after."""
    left = iter(range(moment, -1, -1))

    def instead(call, half=None):
        def counted(*args):
            if next(left) == 0:
                if half:
                    half(*args)
                raise Killed
            return call(*args)

        return counted

    write = Path.write_bytes
    half = lambda path, data: write(path, data[: len(data) // 2])  # noqa: E731
    monkeypatch.setattr(Path, "write_bytes", instead(write, half))
    monkeypatch.setattr(os, "replace", instead(os.replace))
    monkeypatch.setattr(os, "fsync", instead(os.fsync))


def state(step):
    """A model and an optimizer after a step, with values that tell steps apart."""
    model = tiny_model(B=0.1 * step)
    optimizer = torch.optim.AdamW(lora_parameters(model).values())
    for p in lora_parameters(model).values():
        p.grad = torch.full_like(p, step)
    optimizer.step()
    return model, optimizer


def test_a_crash_while_saving_leaves_the_old_or_the_new(monkeypatch, tmp_path):
    """An adapter of one step with the optimizer of another, or half a file, after a crash at any
    write, sync or rename of a checkpoint."""
    cfg = train.Settings(out=str(tmp_path), keep_checkpoints=2)
    old = state(1)
    new = state(2)
    moment = 0
    ended = False
    while not ended:
        folder = tmp_path / str(moment)
        folder.mkdir()
        checkpoints.save(folder, *old, 1, cfg)
        with monkeypatch.context() as patch:
            crash_at(moment, patch)
            try:
                checkpoints.save(folder, *new, 2, cfg)
                ended = True
            except Killed:
                pass
        tensors, step = checkpoints.newest_checkpoint(folder)
        model, optimizer = [old, new][step - 1]
        for i, (name, p) in enumerate(lora_parameters(model).items()):
            assert torch.equal(tensors[f"adapter.{name}"], p)
            assert torch.equal(tensors[f"{i}.exp_avg"], optimizer.state[p]["exp_avg"])
        adapter = lora_parameters(load_adapter(tiny_model(lora=False), folder / "adapter"))
        held = [
            all(map(torch.equal, adapter.values(), lora_parameters(m).values()))
            for m in (old[0], new[0])
        ]
        assert any(held) and (held[0] or step == 2)
        moment += 1
    assert moment > 10 and step == 2 and held[1]


def test_a_full_disk_leaves_the_old_file_and_no_other(monkeypatch, tmp_path):
    """Half a file that takes the last room of a full disk; a command that has no --resume, and says
    that --resume goes on."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, call in ((Path, "write_bytes"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, call, full)
            with pytest.raises(OSError) as error:
                answers.write_answers(str(path), [dict(completion="1")])
        assert str(error.value) == f"cannot write {path} (No space left on device): {PLACE}"
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_files_are_on_the_disk_before_they_count(monkeypatch, tmp_path):
    """After a power cut a renamed file can be empty, if it was not synced before; its name can be
    lost, if the folder was not synced after; and lines, if they were not before the checkpoint."""
    seen = []
    name = lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name  # noqa: E731
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (seen.append(("sync", name(d))), fsync(d)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append(("name", Path(b).name)), replace(a, b))
    )
    files.append(tmp_path / "metrics.jsonl", dict(step=1))
    checkpoints.save(tmp_path, *state(1), 1, train.Settings())
    file = "trainer.safetensors"
    order = [
        ("sync", "metrics.jsonl"),
        ("sync", f"{file}.part"),
        ("name", file),
        ("sync", tmp_path.name),
    ]
    assert seen[:4] == order


def as_on_windows(monkeypatch):
    """Have folders not be opened, files be synced through handles that may write only, and nothing
    that is open or mapped be replaced: as on Windows."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Access is denied")

    def open_file(path, flags, *rest):
        return refuse() if os.path.isdir(path) else os_open(path, flags, *rest)

    def sync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    def in_use(path):
        handles = {os.path.realpath(x) for x in Path("/proc/self/fd").iterdir()}
        return str(path) in handles or str(path) in Path("/proc/self/maps").read_text()

    os_open, fsync, replace = os.open, os.fsync, os.replace
    move = lambda a, b: refuse() if in_use(a) or in_use(b) else replace(a, b)  # noqa: E731
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_a_run_saves_its_files_as_windows_allows(monkeypatch, tmp_path):
    """No run can start on Windows, or none goes on: a folder is opened, or a checkpoint replaced
    that is still mapped."""
    as_on_windows(monkeypatch)
    cfg = train.Settings(out=str(tmp_path), keep_checkpoints=2)
    for step in (1, 2, 3):
        model, optimizer = state(step)
        files.append(tmp_path / "metrics.jsonl", dict(step=step))
        checkpoints.save(tmp_path, model, optimizer, step, cfg)
        held, found = checkpoints.newest_checkpoint(tmp_path)  # of the step before, still in use
        again = load_adapter(tiny_model(lora=False), tmp_path)
        assert found == step and held
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids), model(ids))
    with safe_open(tmp_path / "trainer.safetensors", "pt"), pytest.raises(OSError, match="denied"):
        checkpoints.save(tmp_path, model, optimizer, 4, cfg)  # the simulation does refuse


# ---- Stopped -------------------------------------------------------------------------------------


@pytest.mark.long
def test_ctrl_c_and_sigterm_lose_no_step(flags, whole, tmp_path):
    """A traceback, a step that was done and is lost, or one that is done twice."""
    folder = tmp_path / "run"
    moments = [("evaluation", 0, signal.SIGINT, 0), ("sampling", 1, signal.SIGTERM, 1)]
    moments += [("update", 1, signal.SIGINT, 2), ("saving", 2, signal.SIGTERM, 3)]
    for phase, steps, number, done in [*moments, ("evaluation", 6, signal.SIGINT, 6)]:
        assert stop(folder, flags, phase, steps, number) == 128 + number
        *before, last = folder.with_suffix(".log").read_text().splitlines()
        assert "Traceback" not in "".join(before)
        said = f"step {done} is saved, python train.py --resume {folder} goes on"
        assert last == f"stopped: {said}" and len(rows(folder)) == done
    assert finish(folder, flags)[0] == 0
    assert outcome(folder) == outcome(whole)


def test_a_second_ctrl_c_stops_at_once():
    """A user who waits for a step of minutes, or who cuts short the saving that comes after it."""
    with pytest.raises(KeyboardInterrupt), checkpoints.uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is errors.ignore


EVERY_INSTRUCTION = """
import itertools, os, signal, sys
from system import errors
number = int(sys.argv[1])

def main():
    try:
        raise errors.UserError("the end")
    except KeyboardInterrupt as stop:  # as train.py does
        raise KeyboardInterrupt(*stop.args, "saved") from None

for moment in itertools.count():
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 2)
        left = iter(range(moment, -1, -1))
        def trace(frame, event, _):
            frame.f_trace_opcodes = True
            if frame.f_code.co_filename not in (errors.__file__, "<string>"):
                return None
            if event == "opcode" and next(left, -1) == 0:
                signal.raise_signal(number)
            return trace
        errors.on_signals(signal.SIG_DFL)
        sys.settrace(trace)
        try:
            errors.run_cli(main)
        except SystemExit as stop:
            sys.settrace(None)
            os._exit(99 if next(left, -1) >= 0 else stop.code)  # 99: there is no such moment
    os.close(writing)
    said = open(reading).read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 99:
        break
    print([code, said])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_instruction_is_a_line(number):
    """torchrun's SIGTERM just after an error, or while it is said: a traceback in two of five."""
    command = [sys.executable, "-W", "ignore", "-c", EVERY_INSTRUCTION, str(int(number))]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [ast.literal_eval(line) for line in said.splitlines()]
    stopped = [[128 + number, "stopped\n"], [128 + number, "stopped: saved\n"]]
    error = [2, "error: the end\n"]
    died = [[-number, ""], [-number, error[1]]]  # before run_cli acts, and when it has
    assert len(found) > 100 and error in found and stopped[0] in found
    assert [end for end in found if end not in [error, *stopped, *died]] == []


def test_two_signals_at_once_are_one(capfd):
    """Python complains of a second signal, with a traceback, if its handler is gone by its turn."""
    both = {signal.SIGINT, signal.SIGTERM}

    def main():
        for begin in (contextlib.nullcontext, checkpoints.uninterrupted):
            with contextlib.suppress(KeyboardInterrupt), begin():
                on_signals(interrupt) if begin is contextlib.nullcontext else None
                signal.pthread_sigmask(signal.SIG_BLOCK, both)
                for number in both:
                    os.kill(os.getpid(), number)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        return "went on"

    assert run_cli(main) == "went on" and capfd.readouterr().err == ""


# ---- Resumed -------------------------------------------------------------------------------------


def resume(monkeypatch, capsys, *flags):
    """Exit code and standard error of train.py with these flags."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    code = 0
    try:
        run_cli(train.main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_settings_that_change_the_result_are_all_listed(whole, monkeypatch, capsys):
    """One setting after the other refused, or a curve that is half of one run, half of another."""
    before = outcome(whole)
    more = ["--lr", 1, "--seed", 7, "--steps", 9, "--save-every", 1]
    code, said = resume(monkeypatch, capsys, "--resume", whole, *more)
    assert code == 2 and said.err.count("\n") == 1 and "save_every" not in said.err
    for clash in ("lr = 0.002 and not 1.0", "seed = 2 and not 7", "steps = 6 and not 9"):
        assert clash in said.err
    code, said = resume(monkeypatch, capsys, "--resume", whole, "--preset", "paper")
    assert code == 2 and "rank = 16 and not 64" in said.err
    code, said = resume(monkeypatch, capsys, "--resume", whole, "--out", "elsewhere")
    assert code == 2 and "two runs" in said.err and outcome(whole) == before


@pytest.fixture
def elsewhere(flags, tmp_path):
    """The inputs of the runs here, moved: the model's folder and the problems, now as an array."""
    lines = Path(flags[-1]).read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.json").write_text(f"[{','.join(lines)}]")
    return shutil.copytree(TINY, tmp_path / "model"), tmp_path / "few.json"


def test_a_run_goes_on_with_inputs_that_have_moved(killed, whole, elsewhere, monkeypatch, capsys):
    """A path of this machine in the run's files, which no other has; a run that is lost since its
    model was moved; a revision or a name that stands for what is there no more."""
    text = (killed / "config.json").read_text()
    config = json.loads(text)
    assert config["settings"]["model"] == "tiny" and config["digests"].keys() == {"model", "data"}
    assert str(TINY) not in text + (killed / "adapter/adapter_config.json").read_text()
    config["settings"] |= dict(model="/no/model", data="/no/data")
    (killed / "config.json").write_text(json.dumps(config))
    code, said = resume(monkeypatch, capsys, "--resume", killed)
    assert code == 2 and "no model folder /no/model" in said.err
    model, data = elsewhere
    code, said = resume(monkeypatch, capsys, "--resume", killed, "--model", model, "--data", data)
    assert code == 0, said.err
    assert outcome(killed)[:-1] == outcome(whole)[:-1]  # the last one names the model
    settings = json.loads((killed / "config.json").read_text())["settings"]
    assert (settings["model"], settings["data"]) == (str(model), str(data))


@pytest.mark.parametrize("name", ["model", "data"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_goes_on_with_no_other_inputs(killed, elsewhere, monkeypatch, capsys, name, in_place):
    """Half a run on other problems or another model, without a word; one of the same shapes."""
    model, data = elsewhere
    path = data if name == "data" else model / "generation_config.json"
    path.write_text(path.read_text().replace("$", " $", 1).replace("0", "[0, 1]", 1))
    config = json.loads((killed / "config.json").read_text())
    given = ["--model", model, "--data", data]
    if in_place:
        config["settings"] |= dict(model=str(model), data=str(data))
        (killed / "config.json").write_text(json.dumps(config))
        given = []
    (killed / "process.txt").unlink()  # it names this process now
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    code, said = resume(monkeypatch, capsys, "--resume", killed, *given)
    assert code == 2 and said.err.count("\n") == 1 and config["digests"][name] in said.err
    assert f"error: --{name} {model if name == 'model' else data} (digest " in said.err
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_finished_run_says_so(whole, monkeypatch, capsys):
    """A finished run that is trained on, or an error where nothing is wrong."""
    before = outcome(whole)
    for flags in (["--resume", whole], ["--out", whole, "--resume"]):
        code, said = resume(monkeypatch, capsys, *flags)
        assert code == 0 and "has finished its 6 steps" in said.out and said.out.count("\n") == 1
    assert outcome(whole) == before


def test_resume_finds_the_newest_run_of_its_name(monkeypatch, tmp_path):
    """The run of another seed or rule, or an older one, being gone on with."""
    monkeypatch.chdir(tmp_path)
    name = "uniform-tiny-tiny-seed1"
    for begun, folder in enumerate([name, f"{name}-2", f"{name}0", f"x{name}", f"{name}-x"]):
        config = tmp_path / "runs" / folder / "config.json"
        config.parent.mkdir(parents=True)
        config.write_text("{}")
        os.utime(config, (begun, begun))
    Path(f"runs/{name}-3").mkdir()  # in which nothing has begun
    assert checkpoints.find_run(train.Settings(credit="uniform"), "") == Path(f"runs/{name}-2")
    assert checkpoints.find_run(train.Settings(), "some/run") == Path("some/run")
    with pytest.raises(UserError, match="no run runs/arca"):
        checkpoints.find_run(train.Settings(), "")


# ---- One run, one process ------------------------------------------------------------------------


def test_only_one_process_works_on_a_run(flags, whole, monkeypatch, capsys, tmp_path):
    """Two that resume a run, or begin one in a folder, and both go on: steps that are there twice.
    A process that was killed and keeps all others out."""
    folder = tmp_path / "run"
    process, pipe = start(folder, flags)
    while pipe.recv() != "evaluation":
        pass
    process_is = f"error: {folder} is in use by process {process.pid} on {platform.node()}: "
    os.kill(process.pid, signal.SIGSTOP)
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for begin in (["--resume", folder], ["--out", folder, "--resume"], ["--out", folder]):
        code, said = resume(monkeypatch, capsys, *flags, *begin)
        assert code == 2 and said.err.startswith(process_is) and said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held
    assert checkpoints.newest_checkpoint(folder)[1] == 0  # whoever only reads needs no lock
    process.kill()
    process.join()
    assert resume(monkeypatch, capsys, "--resume", folder)[0] == 0
    assert outcome(folder) == outcome(whole)
    code, said = resume(monkeypatch, capsys, *flags, "--out", folder)
    assert code == 2 and "holds a run" in said.err


def test_runs_that_begin_at_once_get_names_of_their_own(monkeypatch, tmp_path):
    """A folder that another process makes after one looked whether it is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    made = [own_folder(Path("runs"), "name") for _ in range(3)]
    assert made == [Path("runs/name"), Path("runs/name-2"), Path("runs/name-3")]


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks")])
def test_a_folder_that_cannot_be_locked_is_named(error, monkeypatch, tmp_path):
    """A traceback on a file system without locks, or two processes that both go on there."""

    def acquire(lock):
        raise error

    monkeypatch.setattr(processes.FileLock, "acquire", acquire)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be locked \(.*o .*lock"):
        processes.hold(tmp_path)


# ---- Faults --------------------------------------------------------------------------------------


def one_error(code, said):
    """Whether a run ended in one line, and code 2."""
    return code == 2 and said.count("error: ") == 1 and "Traceback" not in said


def out_of_memory_after(folder, steps, monkeypatch):
    """Have the forward passes that train find no memory once a run has done so many steps."""
    forward = Qwen3.forward

    def limited(self, ids, cache=None):
        if torch.is_grad_enabled() and len(rows(folder)) == steps:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, ids, cache)

    monkeypatch.setattr(Qwen3, "forward", limited)


def test_a_run_without_memory_ends_in_a_line_and_resumes_exactly_with_a_smaller_micro_batch(
    flags, monkeypatch, capsys, tmp_path
):
    """A traceback of a hundred lines, the checkpoint of a step that was half done, or another run
    than the one that memory would have sufficed for."""
    whole = tmp_path / "whole"
    folder = tmp_path / "run"
    flags = [
        *flags,
        "--kl-coef",
        0.1,
        "--save-every",
        1,
    ]  # with a KL every completion is trained on
    assert resume(monkeypatch, capsys, *flags, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        out_of_memory_after(folder, 2, patch)
        code, said = resume(patch, capsys, *flags, "--out", folder)
    assert one_error(code, said.err)
    assert said.err.startswith("error: out of memory: lower --micro-batch-tokens")
    assert said.err.endswith(f", then python train.py --resume {folder} goes on\n")
    assert said.err.count("\n") == 1
    assert len(rows(folder)) == checkpoints.newest_checkpoint(folder)[1] == 2
    less = ["--resume", folder, "--micro-batch-tokens", 100]
    assert resume(monkeypatch, capsys, *less)[0] == 0
    assert_same_run(folder, whole)


@pytest.mark.long
def test_a_full_disk_costs_no_checkpoint(flags, whole, tmp_path):
    """A good checkpoint overwritten by half of one; here no file may grow over the limit."""
    folder = tmp_path / "run"
    code, said = finish(folder, flags, limit=10**6)  # the adapter fits, the optimizer's state not
    assert one_error(code, said) and f"cannot write {folder}/trainer.safetensors (" in said
    assert said.endswith(f"): {PLACE}, then python train.py --resume {folder} goes on\n")
    assert not list(folder.rglob("*.part"))
    assert len(rows(folder)) == 2 and checkpoints.newest_checkpoint(folder)[1] == 0
    assert finish(folder, flags)[0] == 0
    assert outcome(folder) == outcome(whole)


def test_a_file_that_changes_after_it_was_read_changes_nothing(scratch):
    """The base model is copied anew during a run: other weights in silence, or a bus error."""
    path = scratch / "model.safetensors"
    model = load_model(scratch)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tensors, _ = files.read_tensors(path)
    kept = {name: x.clone() for name, x in tensors.items()}
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(x, kept[name]) for name, x in tensors.items())


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(flags, whole, killed):
    """A flipped bit in a weight that nobody ever sees, or a run lost for one bad file."""
    path = killed / "trainer.safetensors"
    rng = random.Random(0)
    good = path.read_bytes()
    assert checkpoints.newest_checkpoint(killed)[1] == 4
    header = 8 * (8 + int.from_bytes(good[:8], "little"))  # in bits
    for bits in [header] * 40 + [8 * len(good)] * 10:
        data = bytearray(good)
        bit = rng.randrange(bits)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert checkpoints.newest_checkpoint(killed)[1] == 3, bit
    path.write_bytes(good[: len(good) // 2])
    code, said = finish(killed, flags)
    assert code == 0 and f"WARNING: {path}" in said and f"{path}.1, of step 3" in said
    assert outcome(killed) == outcome(whole)


LOST = [("trainer.*", None, "trainer.safetensors is missing")]
LOST += [("trainer.*", b"\0" * 100, "trainer.safetensors is missing or damaged")]
LOST += [("config.json", None, "no config.json"), ("config.json", b"{", "config.json")]
LOST += [("config.json", b'{"settings": {"lr": 1}}', "config.json does not hold")]
LOST += [("metrics.jsonl", None, "lacks steps"), ("evals.jsonl", None, "lacks steps")]
LOST += [("metrics.jsonl", b'{"step": \n{"step": 2}\n', "metrics.jsonl, line 1")]


@pytest.mark.parametrize("name, data, says", LOST, ids=range(len(LOST)))
def test_lost_files_are_named(killed, monkeypatch, capsys, name, data, says):
    """A KeyError; or a run that begins at step 0 again and cuts its metrics for it."""
    for path in killed.glob(name):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    (killed / "process.txt").unlink()  # it names this process now
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    code, said = resume(monkeypatch, capsys, "--resume", killed)
    assert code == 2 and said.err.count("\n") == 1 and says in said.err
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_torn_line_is_none(whole, tmp_path):
    """A live run read while it writes, or one that a crash cut short, ending in a traceback."""
    path = tmp_path / "metrics.jsonl"
    assert files.read_rows(path) == []
    first, second, third = (json.dumps(row) + "\n" for row in rows(whole)[:3])
    path.write_text(first + second[:-9])
    assert files.read_rows(path) == rows(whole)[:1]
    path.write_text(first + second[:-9] + "\n")  # this one was written to its end
    with pytest.raises(UserError, match="line 2 is damaged"):
        files.read_rows(path)
    path.write_text(first + third.replace('"step"', '"stop"') + third)
    with pytest.raises(UserError, match="line 2 is damaged"):
        files.read_rows(path)


def test_gradients_that_are_not_finite_end_a_run(flags, tmp_path):
    """A run that goes on for hours after its adapter broke, or that saves it over the good one."""
    folder = tmp_path / "run"
    code, said = finish(folder, [*flags, "--steps", 20, "--save-every", 1], breaks=4)
    assert one_error(code, said) and "5 steps in a row" in said
    assert [row["skipped"] for row in rows(folder)] == [0, 0, 0, 1, 1, 1, 1, 1]
    tensors, step = checkpoints.newest_checkpoint(folder)
    assert step == 3 and all(x.isfinite().all() for x in tensors.values())
    adapter = lora_parameters(load_adapter(load_model(TINY), folder / "adapter"))
    assert all(p.isfinite().all() for p in adapter.values())
    short = tmp_path / "short"  # of fewer than five steps, which all were skipped
    code, said = finish(short, [*flags, "--steps", 2], breaks=1)
    assert one_error(code, said) and "2 steps in a row" in said
    assert [row["loss"] for row in rows(short)] == [None, None]


def test_a_broken_policy_is_noticed_though_nothing_has_a_gradient(flags, tmp_path):
    """Log-probs that are not numbers earn no reward, so there is no loss that could be nan: such a
    run went on to its end, and replaced its good checkpoints."""
    folder = tmp_path / "run"
    code, said = finish(folder, [*flags, "--steps", 20, "--lr", 1e30, "--eval-every", 0])
    assert one_error(code, said) and "5 steps in a row" in said
    assert [row["skipped"] for row in rows(folder)] == [0, 1, 1, 1, 1, 1]
    tensors, step = checkpoints.newest_checkpoint(folder)
    assert step == 0 and max(x.abs().max() for x in tensors.values()) < 10
    evaluated = tmp_path / "evaluated"  # at step 3, where it has no accuracy
    code, said = finish(evaluated, [*flags, "--lr", 1e30])
    assert one_error(code, said) and "gives NaN" in said and len(rows(evaluated)) == 3


def test_tensorboard_gets_every_number_once(flags, monkeypatch, capsys, tmp_path):
    """Steps twice on the curve of a run that was resumed; a traceback where it is not installed."""
    folder = tmp_path / "run"
    flags = [*flags, "--tensorboard"]
    if not find_spec("tensorboard"):
        code, said = resume(monkeypatch, capsys, "--out", folder, *flags)
        assert code == 2 and said.err.count("\n") == 1 and "pip install tensorboard" in said.err
        assert not folder.exists()
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert stop(folder, flags, "update", 3) == -signal.SIGKILL
    assert finish(folder, flags)[0] == 0
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name, key in (("metrics", "reward"), ("metrics", "grad_norm"), ("evals", "greedy")):
        told = [(event.step, event.value) for event in events.Scalars(f"{name}/{key}")]
        written = [(row["step"], row[key]) for row in rows(folder, f"{name}.jsonl")]
        assert told == [(step, pytest.approx(value, rel=1e-5)) for step, value in written]


# ---- Many kills ----------------------------------------------------------------------------------


def main():
    parser = Parser(description="Kill a run many times, resume it, and compare.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    flags = "--steps 80 --prompts 4 --eval-every 5 --eval-problems 50"
    flags = f"{flags} --save-every 4".split()
    assert finish(folder / "whole", flags)[0] == 0
    died = kill_often(folder / "killed", flags, args.kills, 80, LONGER, args.seed)
    assert finish(folder / "killed", flags)[0] == 0
    same = outcome(folder / "whole") == outcome(folder / "killed")
    same &= set(os.listdir(folder / "whole")) == set(os.listdir(folder / "killed"))
    print(f"{died.total()} kills, {dict(died)}:", "equal" if same else f"DIFFERENT, see {folder}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
