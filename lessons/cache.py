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


def reread(model, ids):
    """States (B, T, D) without a cache: for each token, all before it is read again."""
    return torch.stack([model(ids[:, :t])[:, -1] for t in range(1, ids.shape[1] + 1)], dim=1)


def cached(model, ids):
    """The same states, each from one new token and the keys and values of those before it."""
    cache = KVCache(model.config, *ids.shape, model.device, torch.float32)
    return torch.cat([model(ids[:, t : t + 1], cache) for t in range(ids.shape[1])], dim=1)


def timed(function, *inputs):
    """What it returns, and the seconds of computing that took (all threads together)."""
    started = time.process_time()
    return function(*inputs), time.process_time() - started


@torch.no_grad()
def main():
    model, tokenizer = load_model(TINY), load_tokenizer(TINY)
    text = " ".join(p["solution"] for p in load_problems("tiny", "test"))
    print(
        f"{ROWS} rows at once\n{'tokens':>6}  {'reading again':>13}  {'with cache':>10}  difference"
    )
    for T in (32, 64, 128, 256):
        ids = torch.tensor(tokenizer.encode(text)[: ROWS * T]).view(ROWS, T)
        (slow, seconds), (fast, less) = timed(reread, model, ids), timed(cached, model, ids)
        gap = (model.logits(slow).log_softmax(-1) - model.logits(fast).log_softmax(-1)).abs().max()
        print(f"{T:6}  {seconds:11.2f} s  {less:8.2f} s  {gap:10.1e}", flush=True)


if __name__ == "__main__":
    main()
