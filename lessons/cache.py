"""Lesson 1: what the KV cache saves, and that it changes nothing.

python lessons/cache.py
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from data.problems import TINY, load_problems
from hf.checkpoint import load_model, load_tokenizer
from model import KVCache

ROWS = 8
LENGTHS = (32, 64, 128, 256)


def read_again(model, ids):
    """Return states (B, T, D) without a cache: for each token, all before it are read again."""
    states = [model(ids[:, :t])[:, -1] for t in range(1, ids.shape[1] + 1)]
    return torch.stack(states, dim=1)


def read_once(model, ids):
    """Return the same states, each from one new token and the keys and values of those before."""
    cache = KVCache(model.config, *ids.shape, model.device, torch.float32)
    states = [model(ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    return torch.cat(states, dim=1)


def timed(function, *inputs):
    """Return what a function returns, and the seconds of CPU it took (all threads together)."""
    started = time.process_time()
    result = function(*inputs)
    return result, time.process_time() - started


@torch.no_grad()
def main():
    model = load_model(TINY)
    tokenizer = load_tokenizer(TINY)
    text = " ".join(p["solution"] for p in load_problems("tiny", "test"))
    tokens = torch.tensor(tokenizer.encode(text))
    print(f"{ROWS} rows at once")
    print("tokens  reading again  with cache  difference")
    for T in LENGTHS:
        ids = tokens[: ROWS * T].view(ROWS, T)
        slow, slow_seconds = timed(read_again, model, ids)
        fast, fast_seconds = timed(read_once, model, ids)
        slow_logps = model.logits(slow).log_softmax(-1)
        fast_logps = model.logits(fast).log_softmax(-1)
        gap = (slow_logps - fast_logps).abs().max()
        print(f"{T:6}  {slow_seconds:11.2f} s  {fast_seconds:8.2f} s  {gap:10.1e}", flush=True)


if __name__ == "__main__":
    main()
