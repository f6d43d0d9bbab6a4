"""Sampling with a KV cache: many prompts of unequal length, n samples each.

    python sample.py "What is 12*13?"

A prompt is read once and its cache copied to its n samples. Every completion has its own stream of
uniforms, one a position, which depends on (seed, step, prompt, sample) and on nothing else, and a
token is drawn from its uniform by inverse CDF. So a completion does not depend on the batch that it
is in, on the order of the prompts, on finished rows being dropped, or on how many processes share
the work; and there is no random state to save. (Up to rounding: a batch of another shape may round
a logit otherwise, in fp32 by about 1e-6, and a token changes if its uniform falls in that gap.)
"""

import argparse
import hashlib
import time
from dataclasses import dataclass

import numpy as np
import torch

from data.problems import load_problems, prompt_text
from model import KVCache
from plumbing.cli import add_flags, load_base
from plumbing.files import UserError, printable, run_cli

CACHE = 2**31  # numbers: 4 GiB in bf16
CHECK_EVERY = 8  # tokens between two looks at which rows have ended; on a GPU each look is a wait


@dataclass
class Completions:
    """B = prompts x n rows, a prompt's samples side by side; columns past `lengths` are padding."""

    tokens: torch.Tensor  # (B, T) the drawn tokens, the one that ends the text included
    lengths: torch.Tensor  # (B,)
    logps: torch.Tensor  # (B, T) fp32, at the sampling temperature, before any top-p or top-k cut
    finished: torch.Tensor  # (B,) bool: ended by itself, not cut off at max_new_tokens
    entropy: torch.Tensor | None = None  # (B, T) nats, of the distribution of `logps`
    hidden: torch.Tensor | None = None  # (B, T, D) the state that predicts each token

    def texts(self, tokenizer) -> list[str]:
        """The completions as text, without the token that ends them."""
        ends = (self.lengths - self.finished.long()).tolist()
        return [tokenizer.decode(t[:n]) for t, n in zip(self.tokens.tolist(), ends, strict=True)]


def uniforms(seed, step, prompt, sample, length):
    """The uniforms of one completion: float64 (length,) in [0, 1); more of them start the same."""
    key = repr((int(seed), int(step), [int(t) for t in prompt], int(sample))).encode()
    key = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(length)


def cut(probs, top_p=1.0, top_k=0):
    """probs (B, V) with all but the top_k likeliest tokens set to 0, and then all but the smallest
    set of the likeliest that holds a share top_p of what is left (arXiv 1904.09751, section 3.1).
    Of equally likely tokens the lower id comes first. Not renormalised."""
    if top_k <= 0 and top_p >= 1:
        return probs
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    likelier = ordered.cumsum(-1) - ordered  # the mass in front of each token
    ordered[likelier >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter_(-1, ids, ordered)


def draw(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    """A token a row by inverse CDF: logits (B, V), u (B,) in [0, 1) -> tokens (B,), log-probs (B,).

    Temperature 0 takes the likeliest token; its log-prob is then the one at temperature 1.
    """
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = logps.argmax(-1)
    else:
        # In float64: over 151,936 tokens an fp32 running sum errs by more than many a probability.
        cdf = cut(logps.double().exp(), top_p, top_k).cumsum(-1)
        tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def entropy(logps):
    """Log-probs of whole distributions (..., V) -> their entropy (...), nats."""
    return -(logps.exp() * logps).sum(dim=-1)


@torch.no_grad()
def decode(model, prompts, u, eos_ids, temperature, top_p, top_k):
    """Write B / P completions of each of P prompts token by token; u is (B, T) uniforms. Yields for
    each position the rows still in the batch, their tokens and log-probs, which of them had ended
    before (four tensors of shape (b,)), and the states (b, D) and logits (b, V) drawn from."""
    if temperature < 0 or not top_p > 0 or not all(prompts):
        raise UserError("nothing to sample: no prompt, a negative temperature or a top-p of 0")
    device, P = model.device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    ids, u = ids.to(device), torch.as_tensor(u, device=device)
    stop = torch.tensor(list(eos_ids), device=device)
    B, capacity = len(u), ids.shape[1] + u.shape[1]

    # The prompts' cache has room for whole texts: it becomes that of their samples.
    cache = KVCache(model.config, P, capacity, device, model.lm_head.weight.dtype)
    hidden = model(ids, cache)[torch.arange(P, device=device), lengths - 1]  # (P, D)
    cache.lengths = lengths
    group = torch.arange(P, device=device).repeat_interleave(B // P)  # (B,) the prompt of each row
    hidden = hidden[group]
    cache.select(group)
    rows = torch.arange(B, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for position in range(u.shape[1]):
        logits = model.logits(hidden)
        tokens, logps = draw(logits, u[rows, position], temperature, top_p, top_k)
        yield rows, tokens, logps, ended, hidden, logits
        ended = ended | torch.isin(tokens, stop)
        if position % CHECK_EVERY == CHECK_EVERY - 1 or B == 1:
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                return
            if len(going) < len(rows):  # drop the rows that have ended, and their cache
                rows, tokens, ended = rows[going], tokens[going], ended[going]
                cache.select(going)
        hidden = model(tokens[:, None], cache)[:, 0]  # (b, D)


def generate(
    model,
    prompts: list[list[int]],
    n=1,
    max_new_tokens=256,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    eos_ids=(),
    seed=0,
    step=0,
    max_rows=256,
    keep=(),
) -> Completions:
    """n completions of each prompt (token ids), each ended by one of eos_ids or by max_new_tokens.
    At most max_rows rows and CACHE cached numbers (or one prompt's n) are in memory at a time;
    that changes no completion. Results are on the CPU; keep names the optional ones."""
    if min(n, max_new_tokens) < 1:
        raise UserError("nothing to sample: n and max_new_tokens must be 1 or more")
    device, B = model.device, len(prompts) * n
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    sizes = dict(entropy=(), hidden=(model.config.hidden_size,))
    kept = {name: torch.zeros(B, max_new_tokens, *sizes[name], device=device) for name in keep}
    c, width = model.config, max(map(len, prompts), default=0) + max_new_tokens
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width
    size = max(1, min(max_rows, CACHE // row) // n)  # prompts at a time
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        u = [uniforms(seed, step, p, i, max_new_tokens) for p in part for i in range(n)]
        steps = decode(model, part, np.stack(u), eos_ids, temperature, top_p, top_k)
        for position, (rows, token, logp, ended, hidden, logits) in enumerate(steps):
            rows = rows + first * n
            tokens[rows, position] = token.masked_fill(ended, 0)
            logps[rows, position] = logp.masked_fill(ended, 0.0)
            lengths[rows] += ~ended
            if "hidden" in keep:
                kept["hidden"][rows, position] = hidden
            if "entropy" in keep:
                logits = logits.float() / (temperature or 1.0)
                kept["entropy"][rows, position] = entropy(logits.log_softmax(-1))
    T = int(lengths.max()) if B else 0
    kept = {name: value[:, :T].cpu() for name, value in kept.items()}
    tokens, logps, lengths = tokens[:, :T].cpu(), logps[:, :T].cpu(), lengths.cpu()
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, torch.tensor(list(eos_ids)))
    return Completions(tokens, lengths, logps, ended, **kept)


def main():
    parser = argparse.ArgumentParser(description="Ask a model a math problem.")
    parser.add_argument("problem", nargs="?", help="without it: problems of --data")
    flags = dict(samples=(1, "completions a problem"), problems=(3, "how many of --data"))
    flags |= dict(max_new_tokens=(256, "longer ones are cut off"), temperature=(0.0, "0: greedy"))
    add_flags(parser, flags | dict(top_p=(1.0, "nucleus"), top_k=(0, "likeliest; 0: all")))
    s = parser.parse_args()
    model, tokenizer = load_base(s)
    problems = [dict(problem=s.problem)] if s.problem else load_problems(s.data, "test")
    count, started = 0, time.perf_counter()
    for p in problems[: s.problems]:
        prompt = tokenizer.encode(prompt_text(p["problem"], s.chat))
        for sample in range(s.samples):
            gold = f"  (gold: {p['answer']})" if "answer" in p else ""
            print(printable(f"\n{p['problem']}{gold}"))
            u = uniforms(s.seed, 0, prompt, sample, s.max_new_tokens)[None]
            ids, shown, stop = [], "", tokenizer.eos_ids
            for _, token, *_ in decode(model, [prompt], u, stop, s.temperature, s.top_p, s.top_k):
                ids.append(int(token))
                text = tokenizer.decode([i for i in ids if i not in stop])
                if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                    print(printable(text[len(shown) :]), end="", flush=True)
                    shown = text
            count += len(ids)
            print()
    seconds = time.perf_counter() - started
    print(f"\n{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s")


if __name__ == "__main__":
    run_cli(main)
