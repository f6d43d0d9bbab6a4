"""The processes that torchrun has started; without torchrun there is one, of rank 0.

Each works on its share of the problems or rows; a tensor is 0 where another process fills it in.
Added up, all know the whole step and make the same update. Only the first prints and writes.
"""

import os
import platform
import signal
import sys

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from system.errors import FIRST, UserError, on_signals

HELD = []  # the lock on the run that this process works on, which the end of the process releases


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device):
    """Meet the other processes, if torchrun started any; the device is already in use. Only the
    first one prints, and only it stops when told to: the others are needed until it has ended the
    step that it is in."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    before = signal.getsignal(signal.SIGINT)
    on_signals(signal.SIG_DFL)  # while it waits for the others, Python runs no handler
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    on_signals(before if FIRST else signal.SIG_IGN)
    if not FIRST:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def hold(folder):
    """Let no other process work on a run until this one ends, however that happens; UserError tells
    which one does. (On Windows no other process can read the lock, so its name is beside it.)"""
    if not FIRST:
        return
    HELD.clear()  # a run that has ended in this process
    name = folder / "process.txt"
    lock = FileLock(folder / "process.lock", timeout=1, fallback_to_soft=False)
    try:
        lock.acquire()
        name.write_bytes(f"process {os.getpid()} on {platform.node()}".encode())
    except Timeout:  # within that second the other has written its name
        holder = name.read_text("utf-8", "replace")[:200] if name.is_file() else "another process"
        raise UserError(f"{folder} is in use by {holder}: wait for its end, or stop it") from None
    except (NotImplementedError, OSError) as error:
        raise UserError(f"{folder} cannot be locked ({error}): use a folder elsewhere") from None
    HELD.append(lock)


def share(items) -> list:
    """Return the items of this process: every world-th one, from its rank on."""
    return list(items[rank() :: world()])


def add_up(tensors):
    """Sum tensors of one dtype over the processes, in place; OSError if a process has ended."""
    if world() == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # what the backend exchanges
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    try:
        dist.all_reduce(flat)
    except RuntimeError:
        if rank() > 0:
            sys.stderr = sys.stdout  # the first process says it
        raise OSError("another process of this run has ended, see above") from None
    totals = flat.split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, totals, strict=True):
        tensor.copy_(total.view_as(tensor))


def gather(own, rows, total):
    """Return a dataclass of tensors (total, ...) from `own`, the one with this process's rows, and
    `rows`, their places in the whole. Dimension 1 is the widest process's; 0 fills the others."""
    if world() == 1:
        return own
    widths = torch.zeros(world(), dtype=torch.int64)
    widths[rank()] = own.tokens.shape[1]
    add_up([widths])
    whole = {}
    for name, part in vars(own).items():
        if part is not None:
            width = [int(widths.max())] if part.ndim > 1 else []
            dtype = torch.uint8 if part.dtype == torch.bool else part.dtype  # bools have no sum
            tensor = torch.zeros(total, *width, *part.shape[2:], dtype=dtype)
            tensor[rows, *map(slice, part.shape[1:])] = part.to("cpu", dtype)
            add_up([tensor])
            whole[name] = tensor.to(part.dtype)
    return type(own)(**whole)


def wait():
    """Wait until all processes are here."""
    add_up([torch.zeros(1)])
