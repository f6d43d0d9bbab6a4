"""A run on several processes, which torchrun starts, is the run on one: the same completions, the
same metrics, whichever process dies, and with however many it goes on."""

import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from helpers import advantages_of, close, forks, gradient, rollout_of, settings, tiny_model
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run, few_problems, finish, rows

from run import checkpoints
from sample import Completions
from system import processes
from system.errors import interrupt, on_signals

HOUSE = Path(__file__).parent.parent
RUN = "--steps 4 --prompts 5 --samples 4 --max-new-tokens 32 --eval-problems 6 --eval-samples 2"
RUN = f"{RUN} --save-every 2 --micro-batch-tokens 300 --seed 2".split()  # some three micro-batches

# ---- Processes -----------------------------------------------------------------------------------


def torchrun(arguments, log):
    """torchrun with these arguments, on one thread a process; its output goes to a file."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HOUSE))
    torch.distributed.run.main(["--standalone", "--nproc-per-node", *arguments])


def launch(number, folder, flags):
    """torchrun of train.py on so many processes."""
    more = ["--resume", folder] if (folder / "config.json").exists() else ["--out", folder]
    arguments = [str(x) for x in (number, HOUSE / "train.py", *flags, *more)]
    process = forks().Process(target=torchrun, args=(arguments, folder.with_suffix(".log")))
    process.start()
    return process


def ended(process, folder, seconds=60):
    """Wait for the end; returns the exit code and what was printed."""
    process.join(seconds)
    hangs = process.exitcode is None
    if hangs:
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


# ---- Runs ----------------------------------------------------------------------------------------


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


@pytest.mark.long
def test_two_processes_are_one(flags, whole, tmp_path):
    """Rows counted twice or by no process, a mean of means, randomness of the rank; two processes
    that write the same files or the same lines."""
    folder = tmp_path / "run"
    code, said = ended(launch(2, folder, flags), folder)
    assert code == 0, said
    assert_same_run(folder, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.log"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for line in ("run folder", "step    0  held-out", "next: python -m view", "reward, 5 steps"):
        assert said.count(line) == (2 if line == "run folder" else 1)  # begin and end


@pytest.mark.long
def test_three_processes_with_two_prompts_and_a_rule_that_sees_the_step(flags, tmp_path):
    """DelTA's directions from a third of the step; tensors that the processes add up in the order
    of a set, each in its own; a process without a prompt that waits for ever."""
    flags = [*flags, "--credit", "delta", "--prompts", 2, "--steps", 3]
    one = single(flags, tmp_path / "one")
    three = tmp_path / "three"
    code, said = ended(launch(3, three, flags), three)
    assert code == 0, said
    assert_same_run(three, one)


@pytest.mark.long
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
    ways = ("error: another process of this run has ended", "stopped: step ")
    assert any(way in said for way in ways)  # the second if torchrun was the faster to notice
    assert f"python train.py --resume {folder} goes on" in said
    assert done <= checkpoints.newest_checkpoint(folder)[1] <= len(rows(folder))
    code, said = finish(folder, flags)
    assert code == 0, said
    assert_same_run(folder, whole)


@pytest.mark.long
def test_the_others_end_with_a_first_process_that_is_refused(flags, whole, tmp_path):
    """Processes that wait half an hour for one that has ended, a line of each, and torchrun's kill
    of what does not listen after another half minute."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    processes.hold(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for begin in (["--resume", folder], ["--out", folder]):
        arguments = [str(x) for x in (2, HOUSE / "train.py", *flags, *begin)]
        launcher = forks().Process(target=torchrun, args=(arguments, folder.with_suffix(".log")))
        launcher.start()
        code, said = ended(launcher, folder)
        assert code != 0 and said.count("error: ") == 1 and "stopped" not in said
        assert f"error: {folder} is in use by process {os.getpid()} on " in said
    assert all(path.read_bytes() == data for path, data in before.items())


def test_one_that_ends_before_they_meet_ends_the_others(tmp_path):
    """A process that waits for the others, in a library where Python runs no handler, did not hear
    that torchrun wants it to end: half a minute, for a wrong flag on one machine."""
    pipe, theirs = forks().Pipe()
    process = forks().Process(target=waits_for_others, args=(theirs,))
    process.start()
    pipe.recv()
    process.join(0.2)
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def waits_for_others(pipe):
    """Meet others that never come."""
    os.environ |= dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    meet = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda kind: (pipe.send("waits"), meet(kind))
    on_signals(interrupt)
    processes.start(torch.device("cpu"))


# ---- What the processes exchange -----------------------------------------------------------------


def meet(rank, world, folder):
    """Make this process one of `world` that talk by gloo."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)


def together(world, part, folder, *arguments):
    """Run part(rank, world, folder, *arguments) in so many processes; all must end well."""
    started = []
    for rank in range(world):
        started.append(forks().Process(target=part, args=(rank, world, folder, *arguments)))
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * world


def completions(P, G, entropy):
    """Completions of P prompts, of unequal lengths, whose padding is 0."""
    rng = torch.Generator().manual_seed(P)
    B = P * G
    lengths = torch.randint(1, 9, (B,), generator=rng)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    tokens = torch.randint(1, 2**40, mask.shape, generator=rng) * mask  # no float32 has 40 bits
    logps = -torch.rand(mask.shape, generator=rng) * mask
    finished = torch.rand(B, generator=rng) < 0.5
    hidden = torch.randn(*mask.shape, 3, generator=rng) * mask[..., None]
    more = dict(entropy=-logps) if entropy else {}
    return Completions(tokens, lengths, logps, finished, hidden=hidden, **more)


def gather_part(rank, world, folder, P, entropy):
    """Cut one's own rows out of completions, as wide as they are long; gather; compare."""
    meet(rank, world, folder)
    G = 2
    whole = completions(P, G, entropy)
    own = [p * G + i for p in processes.share(range(P)) for i in range(G)]
    width = int(whole.lengths[own].max()) if own else 0
    cut = {}
    for name, x in asdict(whole).items():
        if x is not None:
            cut[name] = x[own, :width] if x.dim() > 1 else x[own]
    found = processes.gather(Completions(**cut), own, P * G)
    for name, x in asdict(whole).items():
        if x is None:
            assert getattr(found, name) is None
        else:
            assert getattr(found, name).dtype == x.dtype
            assert torch.equal(getattr(found, name), x), name


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("world, P", [(2, 3), (2, 1), (3, 2), (3, 7)])
def test_gather(world, P, entropy, tmp_path):
    """Rows at the places of others, ids rounded by a float sum, flags that are no bools, the width
    of one process, and a process without rows that the others wait for."""
    together(world, gather_part, tmp_path, P, entropy)


def update_part(rank, world, folder, cfg):
    """One of the processes that update; the first keeps what the optimizer was given."""
    meet(rank, world, folder)
    model = tiny_model()
    rollout = rollout_of(model)
    found, _, _ = gradient(model, rollout, advantages_of(rollout), cfg)
    if rank == 0:
        save_file(dict(found=found), folder / "gradient.safetensors")


@pytest.mark.parametrize("credit", ["arca", "delta"])
@pytest.mark.parametrize("micro_batch_tokens", [1000, 12])
def test_the_processes_gradients_add_up(credit, micro_batch_tokens, tmp_path):
    """Rows that two processes count, or none; one micro-batch for two processes."""
    cfg = settings(credit=credit, micro_batch_tokens=micro_batch_tokens)
    model = tiny_model()
    rollout = rollout_of(model)
    whole, _, _ = gradient(model, rollout, advantages_of(rollout), cfg)
    together(2, update_part, tmp_path, cfg)
    found = load_file(tmp_path / "gradient.safetensors")["found"]
    assert close(found, whole, 1e-6)
