"""What fits on one GPU without sharding the frozen base: computed from bytes counted on the CPU.

    python bench/memory.py

Nothing here ran on a GPU. `Held` counts the tensors that are alive while a small model does the
update's own passes; tests/test_memory.py holds the formula below against those counts, and here it
is applied to the real sizes. One term differs on a GPU (see `of_layer`): it is as the code says.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
import sample
from bench.common import line, settings
from hf.checkpoint import random_model
from lora import add_lora
from model import Config, Qwen3
from train import Settings

# name: hidden, intermediate, layers, heads, key-value heads, tied (arXiv 2505.09388, table 1)
SIZES = {"0.6B": (1024, 3072, 28, 16, 8, True), "1.7B": (2048, 6144, 28, 16, 8, True)}
SIZES |= {"4B": (2560, 9728, 36, 32, 8, True), "8B": (4096, 12288, 36, 32, 8, False)}
SIZES |= {"14B": (5120, 17408, 40, 40, 8, False), "32B": (5120, 25600, 64, 64, 8, False)}
CARDS, FREE = (24, 48, 80), 0.9  # GB, and the share of them that is ours to fill
PROMPT = Settings.max_prompt_tokens
TRAINED = 16  # bytes of a trained number: fp32, its gradient, and AdamW's two moments
COPIES = 4  # and what the sampler has of it in bf16, with the zeros between its blocks
HEAD = 16  # bytes of a logit while a chunk of them goes back: `head_bytes` counts them
BACK = (0.75, 1.12)  # of what a layer keeps, the most that going back makes; with --checkpoint


def config_of(hidden, inner, layers, heads, kv, tied, head_dim=128, vocab=151936):
    sizes = (vocab, hidden, inner, layers, heads, kv, head_dim)
    return Config(*sizes, 1e-6, 1e6, tied, qkv_bias=False, qk_norm=True)


# ---- Counted -------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that operations make and that are alive, but for the
    model's parameters: those that are here for its backward pass and those that are on the way."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.weights:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return made

    def now(self):
        self.storages = {k: x for k, x in self.storages.items() if not x[0].expired()}
        return sum(nbytes for _, nbytes in self.storages.values())


def counted(c, rank, rows, prompt, tokens, again):
    """(bytes kept for the backward pass, most bytes at a time) of ARCA's pass over these rows of a
    random model; `again`: with --checkpoint."""
    model = add_lora(random_model(c, "cpu", torch.bfloat16), rank, 2.0 * rank)
    model.checkpoint = again
    numbers = torch.ones(rows, tokens)
    c = sample.Completions(numbers.long(), numbers.sum(1).long(), numbers, numbers[:, 0] > 0)
    r = grpo.Rollout([dict(prompt=[1] * prompt)], c, [], torch.zeros(1, rows))
    with Held(model) as held:
        _, logps, _ = grpo.signals(model, r, torch.arange(rows), {"residual"}, settings())
        kept = held.now()
        logps.sum().backward()
    return kept, held.peak


def head_bytes(tokens=256, vocab=4096):
    """The most bytes a logit that the head's forward and backward pass hold of a chunk."""
    model = random_model(config_of(8, 8, 1, 1, 1, True, 8, vocab), "cpu", torch.bfloat16)
    hidden = torch.zeros(4 * tokens, 8, requires_grad=True)
    with Held(model) as held:
        logps, _ = grpo.token_logps(model, hidden, torch.zeros(4 * tokens).long(), chunk=tokens)
        logps.sum().backward()
    return held.peak / (tokens * vocab)


# ---- Computed ------------------------------------------------------------------------------------


def of_layer(c, rank, gpu, seen=0):
    """Bytes that a layer keeps of a token for the backward pass, in bf16; a completion's token is
    one of rows that have `seen` columns before their own.

    fp32: what the norms read. bf16: what the adapters read, and their low-rank products; what
    attention reads and makes, and that again without padding; gate, up, silu(gate) and their
    product. On a GPU keys and values of completions are repeated for each query head (model.py).
    """
    Q, V = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norms = 4 * (2 * c.hidden_size + Q + V) + 4 * (2 + c.num_attention_heads)
    norms += 4 * c.num_key_value_heads + 4 * c.num_attention_heads  # and attention's sums
    adapters = 2 * (2 * c.hidden_size + 7 * rank)
    inner = 2 * 4 * c.intermediate_size
    return norms + adapters + inner + 2 * 3 * Q + 2 * 2 * (Q if gpu and seen else V)


def parameters(c):
    """Numbers in the frozen model."""
    with torch.device("meta"):  # takes no memory
        return sum(p.numel() for p in Qwen3(c).parameters())


def adapter_size(c, rank):
    """Trained numbers: A and B of the seven projections of each layer."""
    D, inner = c.hidden_size, c.intermediate_size
    Q, V = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return c.num_hidden_layers * rank * (2 * (D + Q) + 2 * (D + V) + 3 * (D + inner))


def kept_bytes(c, rank, rows, prompt, tokens, again, gpu=True):
    """What a micro-batch keeps for its backward pass, and what one layer of it does; bytes. The
    prompt and all but the last token of the rows are read; the head reads the rows' tokens."""
    N, D, V = rows * (tokens - 1), c.hidden_size, c.num_key_value_heads * c.head_dim
    columns, wide = prompt + tokens - 1, c.num_attention_heads * c.head_dim if gpu else V
    one = of_layer(c, rank, gpu) * prompt + of_layer(c, rank, gpu, prompt) * N
    one += 2 * N * columns + 4 * wide * rows * prompt  # the mask; keys and values of the prompt
    one += 2 * adapter_size(c, rank) // c.num_hidden_layers  # in bf16
    layers = 2 * D * (N + prompt) if again else one  # a block's input
    ends = (4 * D * again + 4 * c.head_dim) * (N + prompt) + again * N * columns
    one_chunk = rows * tokens <= grpo.LOGITS // c.vocab_size
    head = rows * tokens * (16 + 4 * (c.vocab_size if one_chunk else D))
    return c.num_hidden_layers * layers + ends + head, one


def update_bytes(c, rank, rows, prompt, tokens, again, gpu=True):
    """The most bytes of a micro-batch: what is kept and what going back makes beside it, of a chunk
    of logits or else of a layer."""
    kept, one = kept_bytes(c, rank, rows, prompt, tokens, again, gpu)
    chunk = min(rows * tokens * c.vocab_size, grpo.LOGITS)
    return kept + max(HEAD * chunk, BACK[again] * one)


def cache_bytes(c, tokens):
    """The sampler's cache, which stays, with the default number of prompts and samples."""
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (PROMPT + tokens)
    rows = min(Settings.prompts * Settings.samples, sample.CACHE // row)
    return 2 * row * max(Settings.samples, rows)


def needed(c, rank, tokens, again):
    """Bytes of a run with completions of so many tokens and prompts of the most that is let in:
    micro-batches of the default --micro-tokens, or of one row if that has more."""
    weights = 2 * parameters(c)
    rows = max(1, (Settings.micro_tokens - PROMPT) // tokens)
    held = weights + (TRAINED + COPIES) * adapter_size(c, rank) + cache_bytes(c, tokens)
    return held + update_bytes(c, rank, rows, PROMPT, tokens, again)


def cell(c, rank, tokens):
    """GB without and with --checkpoint, and the smallest card for each."""
    both = [needed(c, rank, tokens, again) / 1e9 for again in (False, True)]
    cards = [next((str(n) for n in CARDS if FREE * n >= gb), "none") for gb in both]
    cards = cards[0] if cards[0] == cards[1] else " / ".join(cards)
    return f"{both[0]:.1f} / {both[1]:.1f}: {cards}"


def table():
    cases = [(rank, tokens) for rank in (16, 64) for tokens in (512, 4096)]
    line("model", *(f"rank {rank}, {tokens} tokens" for rank, tokens in cases))
    line(*["---"] * (1 + len(cases)))
    for name, sizes in SIZES.items():
        line(name, *(cell(config_of(*sizes), *case) for case in cases))


if __name__ == "__main__":
    table()
