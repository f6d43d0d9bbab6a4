"""A run on several processes, which torchrun starts, is the run on one: the same completions, the
same metrics, whichever process dies, and with however many it goes on."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed.run
from helpers import close, gradient, settings, tiny_model
from safetensors.torch import load_file, save_file
from test_memory import step
from test_resume import PRELOAD, TIMING, few_problems, finish, rows

from run import checkpoints
from sample import generate
from system import processes

HOUSE = Path(__file__).parent.parent
RUN = "--steps 4 --prompts 5 --samples 4 --max-new-tokens 32 --eval-problems 6 --eval-samples 2"
RUN = f"{RUN} --save-every 2 --micro-tokens 300 --seed 2".split()  # some three micro-batches a step

# ---- Processes -----------------------------------------------------------------------------------


def torchrun(arguments, log):
    """torchrun with these arguments, on one thread a process; its output goes to a file."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HOUSE))
    torch.distributed.run.main(["--standalone", "--nproc-per-node", *arguments])


def launch(processes, folder, flags):
    """torchrun of train.py, forked from a process that has imported it, which takes seconds."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOAD)
    more = ["--resume", folder] if (folder / "config.json").exists() else ["--out", folder]
    arguments = [str(x) for x in (processes, HOUSE / "train.py", *flags, *more)]
    process = forks.Process(target=torchrun, args=(arguments, folder.with_suffix(".log")))
    process.start()
    return process


def ended(process, folder, seconds=60):
    """Wait for the end; returns the exit code and what was printed."""
    process.join(seconds)
    if hangs := process.exitcode is None:
        process.terminate()
    assert not hangs, folder.with_suffix(".log").read_text()
    return process.exitcode, folder.with_suffix(".log").read_text()


def with_rank(launcher, rank):
    """The process id of the process of that rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


def when_done(launcher, folder, steps):
    """Wait until a run has written so many steps."""
    while len(rows(folder)) < steps:
        assert launcher.is_alive(), folder.with_suffix(".log").read_text()
        time.sleep(0.01)


# ---- Comparison ----------------------------------------------------------------------------------


def near(key, a, b):
    """Equal to 1e-5. A batch of another shape rounds otherwise, and where a rule gives two tokens
    the same multiplier but for that, their ranks are as they fall: 1e-2 for rank correlations."""
    most = 1e-2 if key.startswith("rank_correlation/") else 1e-5
    return abs(a - b) <= most * max(1, abs(b))


def assert_same_run(folder, other):
    """Metrics and evaluations equal, completions to the token; each line once."""
    assert rows(folder, "evals.jsonl") == rows(other, "evals.jsonl")
    for a, b in zip(rows(folder), rows(other), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        far = {k: (a[k], b[k]) for k in a.keys() - TIMING if not near(k, a[k], b[k])}
        assert not far, (a["step"], far)
    for key in ("reward", "completion_tokens"):
        assert [row[key] for row in rows(folder)] == [row[key] for row in rows(other)]
    told = ("step", "problem", "text", "tokens")
    ours, theirs = (rows(x, "samples.jsonl") for x in (folder, other))
    assert [[r[k] for k in told] for r in ours] == [[r[k] for k in told] for r in theirs]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a short run on few problems, which are read faster."""
    return [*RUN, "--data", few_problems(tmp_path_factory.mktemp("data"))]


def single(flags, folder):
    """The same run on one process, which must have learned something."""
    code, said = finish(folder, flags)
    assert code == 0, said
    assert sum(row["grad_norm"] > 0 for row in rows(folder)) >= 2
    return folder


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    return single(flags, tmp_path_factory.mktemp("runs") / "whole")


# ---- Runs ----------------------------------------------------------------------------------------


def test_two_processes_are_one(flags, whole, tmp_path):
    """Rows counted twice or by no process, a mean of means, randomness of the rank; two processes
    that write the same files or the same lines."""
    folder = tmp_path / "run"
    code, said = ended(launch(2, folder, flags), folder)
    assert code == 0, said
    assert_same_run(folder, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.log"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for line in ("run folder", "step    0  held-out", "next: python credit.py", "reward, 5 steps"):
        assert said.count(line) == (2 if line == "run folder" else 1)  # begin and end


def test_three_processes_with_two_prompts_and_a_rule_that_sees_the_step(flags, tmp_path):
    """DelTA's directions from a third of the step; tensors that the processes add up in the order
    of a set, each in its own; a process without a prompt that waits for ever."""
    flags = [*flags, "--credit", "delta", "--prompts", 2, "--steps", 3]
    one, three = single(flags, tmp_path / "one"), tmp_path / "three"
    code, said = ended(launch(3, three, flags), three)
    assert code == 0, said
    assert_same_run(three, one)


def test_stopped_and_killed_it_goes_on_with_another_number(flags, whole, tmp_path):
    """A process that stops at once and takes the step of the others with it; a run that hangs for
    the half hour of a collective's timeout, or that only as many processes can go on with."""
    folder = tmp_path / "run"
    launcher = launch(2, folder, flags)
    when_done(launcher, folder, 1)
    launcher.terminate()
    code, said = ended(launcher, folder)
    done = checkpoints.newest_checkpoint(folder)[1]
    assert code != 0 and done == len(rows(folder)) >= 1
    assert f"stopped: step {done} is saved, python train.py --resume {folder} goes on" in said
    assert "error: " not in said
    launcher = launch(3, folder, flags)
    when_done(launcher, folder, done + 1)
    last = with_rank(launcher, 2)
    os.kill(last, signal.SIGSTOP)
    time.sleep(0.5)  # now the others wait for it
    os.kill(last, signal.SIGKILL)
    killed = time.monotonic()
    code, said = ended(launcher, folder)
    assert code != 0 and time.monotonic() - killed < 20
    assert said.count(f"going on after step {done}") == 1
    ways = ("error: another process of this run has ended: go on with --resume", "stopped: step ")
    assert any(way in said for way in ways)  # the second if torchrun was the faster to notice
    assert done <= checkpoints.newest_checkpoint(folder)[1] <= len(rows(folder))
    code, said = finish(folder, flags)
    assert code == 0, said
    assert_same_run(folder, whole)


def part(rank, folder):
    """One of two processes that update; the second has run out of memory before."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    s = settings(credit="arca", micro_tokens=[1000, 12][rank])
    ours, _, _ = gradient(tiny_model(), *step(), s)
    save_file(dict(ours=ours, size=torch.tensor(s.micro_tokens)), folder / f"{rank}.safetensors")


def test_processes_divide_the_same_micro_batches(tmp_path):
    """Out of memory in one of the processes, after which each divides micro-batches of its own
    size: rows counted twice, and rows by none."""
    whole, _, _ = gradient(tiny_model(), *step(), settings(credit="arca"))
    forks = multiprocessing.get_context("forkserver")
    both = [forks.Process(target=part, args=(rank, tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    for rank, process in enumerate(both):
        process.join(30)
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert close(found["ours"], whole, 1e-6) and found["size"] == 12


def test_the_processes_add_up_the_same_tensors_at_a_time(monkeypatch):
    """The order of a set of strings, which differs from process to process: log-probs were added to
    entropies, or the run aborted."""
    seen, model = [], tiny_model()
    monkeypatch.setattr(
        processes, "add_up", lambda tensors: seen.append([x.shape for x in tensors])
    )
    for keep in (("entropy", "hidden"), ("hidden", "entropy")):
        generate(model, [[1, 2]], n=2, max_new_tokens=3, keep=keep)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and len(set(map(str, seen))) > 1
