"""Sampling with a KV cache: many prompts of unequal length, n samples each.

    python sample.py "What is 12*13?"

A prompt is read once and its cache copied to its n samples. All the completions that are wanted are
one pool: a row that has ended makes room for the next. Every completion has its own stream of
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
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data.problems import load_problems, prompt_text
from fast.decoder import Decoder
from model import KVCache
from run.flags import add_flags, load_base
from system import processes
from system.errors import UserError, printable, run_cli

CACHE = 2**31  # numbers: 4 GiB in bf16
BLOCK = 4  # tokens between two looks at which rows have ended; on a GPU each look is a wait
RUN, FEW = 64, 4096  # tokens whose probabilities are summed first, in vocabularies above FEW


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
    masses = ordered.double()
    likelier = masses.cumsum(-1) - masses  # the mass in front of each token
    ordered[likelier >= top_p * masses.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter_(-1, ids, ordered)


def invert(masses, u):
    """The first index (B,) at which the running sum of masses (B, N), float64, is above u (B,), and
    how much of u is left there. Its mass is never 0, however u and the sums were rounded."""
    cdf = masses.cumsum(-1)
    u = torch.minimum(u, cdf[:, -1] * (1 - 2**-50)).clamp(min=0)[:, None]
    index = torch.searchsorted(cdf, u, right=True).clamp(max=masses.shape[1] - 1)  # nan: no index
    return index[:, 0], (u - cdf.gather(1, index) + masses.gather(1, index))[:, 0]


def draw(logps, u, top_p=1.0, top_k=0):
    """A token a row by inverse CDF: log-probs (B, V), u (B,) in [0, 1) -> tokens (B,).

    Sums are in float64: over 151,936 tokens an fp32 running sum errs by more than many a
    probability. It runs over runs of tokens and then in one of them, which is faster if many.
    """
    probs = cut(logps.exp(), top_p, top_k)
    if probs.shape[1] <= FEW:
        probs = probs.double()
        return invert(probs, u * probs.sum(-1))[0]
    if missing := -probs.shape[1] % RUN:
        probs = F.pad(probs, (0, missing))
    probs = probs.unflatten(1, (-1, RUN))  # (B, V / RUN, RUN)
    masses = probs.sum(-1, dtype=torch.float64)
    run, rest = invert(masses, u * masses.sum(-1))
    inside = probs[torch.arange(len(run), device=run.device), run]  # (B, RUN)
    return run * RUN + invert(inside.double(), rest)[0]


def entropy(logps):
    """Log-probs of whole distributions (..., V) -> their entropy (...), nats."""
    return -(logps.exp() * logps).sum(dim=-1)


def read_prompts(model, prompts, n, fast, first):
    """Read each prompt once, and put n copies of it in the decoder from row `first` on; returns the
    states that predict the first tokens (P x n, D)."""
    device = model.device
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
    own = KVCache(model.config, *ids.shape, *fast.place)
    hidden = model(ids, own)
    own.lengths = torch.tensor([len(p) for p in prompts], device=device)
    row = torch.arange(len(prompts), device=device).repeat_interleave(n)
    fast.take(own, row, first)
    return hidden[row, own.lengths[row] - 1]


@torch.no_grad()
def decode(model, prompts, u, eos_ids, temperature, top_p, top_k, slots, block, keep=()):
    """Write n = B / P completions of each of P prompts, at most `slots` rows at once. u (B, T) are
    their uniforms. Yields, for `block` tokens of some rows, the rows (b,), the column (b,) of the
    first of them, and by name the tokens and log-probs (b, block) and what is to be kept."""
    if temperature < 0 or not top_p > 0 or not all(prompts):
        raise UserError("nothing to sample: no prompt, a negative temperature or a top-p of 0")
    device, (B, T), n = model.device, u.shape, len(u) // len(prompts)
    u, stop = torch.as_tensor(u, device=device), torch.tensor(list(eos_ids), device=device)
    slots, room = max(n, min(slots, B)), max(map(len, prompts)) + T + block
    fast, model.decoder = model.decoder, None  # while it is in use it is nobody else's
    if fast is None or not fast.fits(slots, room):
        fast = Decoder(model, slots, room)
    fast.refresh()
    waiting = list(range(len(prompts)))
    rows = column = tokens = torch.zeros(0, dtype=torch.long, device=device)
    while waiting or len(rows):
        hidden = [fast.advance(tokens)] if len(rows) else []
        free = slots - len(rows)
        if waiting and free >= max(n, slots // 4):
            new, waiting = waiting[: free // n], waiting[free // n :]
            hidden += [read_prompts(model, [prompts[i] for i in new], n, fast, len(rows))]
            new = torch.tensor(new, device=device)[:, None] * n + torch.arange(n, device=device)
            rows, column = torch.cat([rows, new.flatten()]), F.pad(column, (0, new.numel()))
        hidden, drawn = torch.cat(hidden), {name: [] for name in ("tokens", "logps", *keep)}
        for i in range(block):
            if i:
                hidden = fast.advance(tokens)
            logps = torch.log_softmax(model.logits(hidden).float() / (temperature or 1.0), dim=-1)
            if temperature == 0:  # the likeliest; its log-prob is the one at temperature 1
                tokens = logps.argmax(-1)
            else:
                tokens = draw(logps, u[rows, (column + i).clamp(max=T - 1)], top_p, top_k)
            drawn["tokens"].append(tokens)
            drawn["logps"].append(logps.gather(1, tokens[:, None])[:, 0])
            for name in keep:
                drawn[name].append(hidden if name == "hidden" else entropy(logps))
        drawn = {name: torch.stack(values, dim=1) for name, values in drawn.items()}
        yield rows, column, drawn
        column = column + block
        over = torch.isin(drawn["tokens"], stop).any(dim=1) | (column >= T)
        going = (~over).nonzero()[:, 0]
        if len(going) < len(rows):  # drop the rows that have ended, and their cache
            rows, column, tokens = rows[going], column[going], tokens[going]
            fast.take(fast.cache, going)
    model.decoder = fast


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
    c, device, B, T = model.config, model.device, len(prompts) * n, max_new_tokens
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    slots = min(max_rows, CACHE // (row * (max(map(len, prompts), default=0) + T)))
    sizes = dict(tokens=(), logps=(), entropy=(), hidden=(c.hidden_size,))
    names = ("tokens", "logps", *sorted(keep))  # a set's order differs from process to process
    out = {name: torch.zeros(B, T + BLOCK, *sizes[name], device=device) for name in names}
    out["tokens"] = out["tokens"].long()
    mine = range(processes.rank(), len(prompts), processes.world())  # the prompts of this process
    if mine:
        u = np.stack([uniforms(seed, step, prompts[p], i, T) for p in mine for i in range(n)])
        place = torch.tensor([p * n + i for p in mine for i in range(n)], device=device)
        how = (eos_ids, temperature, top_p, top_k, slots, BLOCK, keep)
        for rows, column, drawn in decode(model, [prompts[p] for p in mine], u, *how):
            columns = column[:, None] + torch.arange(BLOCK, device=device)
            for name, values in drawn.items():
                out[name][place[rows][:, None], columns] = values
    for value in out.values():
        processes.add_up([value])
    ended = torch.isin(out["tokens"][:, :T].cpu(), torch.tensor(list(eos_ids)))
    finished = ended.any(dim=1)
    lengths = torch.where(finished, ended.int().argmax(dim=1) + 1, T)
    T = int(lengths.max()) if B else 0
    past = torch.arange(T) >= lengths[:, None]  # what a row wrote after its end
    for name, value in out.items():
        out[name] = value[:, :T].cpu()
        out[name][past] = 0
    return Completions(out.pop("tokens"), lengths, out.pop("logps"), finished, **out)


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
            cuts = (s.temperature, s.top_p, s.top_k)
            for _, _, drawn in decode(model, [prompt], u, stop, *cuts, 1, block=1):
                ids.append(int(drawn["tokens"]))
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
