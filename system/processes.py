"""The processes of a run that torchrun has started; without torchrun there is one, of rank 0.

Each samples and trains on the problems of its rank. What is in a tensor only where this process
filled it in, and 0 elsewhere, is added up over the processes: so all of them know the whole step,
make the same update, and only the first need write it down.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from system.errors import UserError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device):
    """Meet the other processes, if torchrun started any. Only the first one prints, and only it
    stops when told to: the others are needed until it has ended the step that it is in."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, hush)


def hush(number, frame):
    """What there is to say about the end of the run, the first process says."""
    sys.stderr = sys.stdout


def reduce(tensor, how):
    """All processes' tensors as one, in place."""
    try:
        dist.all_reduce(tensor, how)
    except RuntimeError:
        way = "go on with --resume, with as many processes as you like"
        raise UserError(f"another process of this run has ended: {way}") from None


def place():
    """The device whose tensors the processes can exchange."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def add_up(tensors):
    """Sum tensors of one dtype over the processes, in place."""
    if world() == 1:
        return
    flat = torch.cat([x.flatten() for x in tensors]).to(place())
    reduce(flat, dist.ReduceOp.SUM)
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(part.view_as(x))


def least(number):
    """The smallest of the processes' integers."""
    if world() == 1:
        return number
    number = torch.tensor(number, device=place())
    reduce(number, dist.ReduceOp.MIN)
    return int(number)


def wait():
    """Until all processes are here."""
    add_up([torch.zeros(1)])
