"""Sampling with a KV cache: many prompts of unequal length, n samples each.

    python sample.py "What is 12*13?"

A prompt is read once and its cache copied to its n samples. All completions that are wanted share
one pool of rows: a row that has ended makes room for the next. Every completion has its own stream
of uniforms, one a position, which depends on (seed, step, prompt, sample) and on nothing else, and
a token is drawn from its uniform by inverse CDF. So a completion does not depend on its batch, on
the order of the prompts, on finished rows being dropped, or on how many processes share the work;
and there is no random state to save. (Up to rounding: a batch of another shape may round a logit
differently, in fp32 by about 1e-6, and a token changes if its uniform falls in that gap.)
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

if __name__ == "__main__":
    from system.errors import before_imports

    before_imports()

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data.problems import load_problems, prompt_text
from model import KVCache
from run.flags import SAMPLE_FLAGS, add_flags, load_base
from system.errors import Parser, UserError, printable, run_cli

try:
    import fast.decoder
    import fast.draw
except ModuleNotFoundError:
    fast = None  # one can delete fast/: it gives the same numbers in less time

MAX_CACHE = 2**31  # numbers in the KV cache: 4 GiB in bf16
BLOCK = 4  # tokens drawn between checks for ended rows; on a GPU each check waits for the device


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
        """Return the completions as text, without the token that ends them."""
        ends = self.lengths - self.finished.long()
        rows = zip(self.tokens.tolist(), ends.tolist(), strict=True)
        return [tokenizer.decode(tokens[:end]) for tokens, end in rows]

    def check(self):
        """Raise UserError if the model gave NaN, with which each drawn token is one of chance."""
        if self.logps.isnan().any():
            raise UserError("the model gives NaN: use --dtype fp32, another adapter, a lower --lr")


# ---- From a distribution and a uniform number to a token -----------------------------------------
def uniforms(seed, step, prompt, sample, length):
    """Return the uniforms of one completion of a prompt (token ids): float64 (length,) in [0, 1).

    A longer stream starts with the same numbers as a shorter one.
    """
    key = repr((int(seed), int(step), [int(t) for t in prompt], int(sample))).encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.random.Generator(philox).random(length)


def number_samples(prompts, n):
    """Return (prompt, number of its sample) for n samples of each prompt. Those of a prompt that
    comes again are further ones: of P Q P with n = 2, they are P0 P1, Q0 Q1, P2 P3."""
    taken = Counter()
    numbered = []
    for prompt in map(tuple, prompts):
        numbered += [(prompt, taken[prompt] + i) for i in range(n)]
        taken[prompt] += n
    return numbered


def top_p_filter(probs, top_p=1.0, top_k=0, mass=None):
    """Keep the top_k likeliest tokens of probs (B, V), and of those the nucleus; set the rest to 0.

    The nucleus is the smallest set of the likeliest with a share top_p of their mass (arXiv
    1904.09751, section 3.1), or of `mass` (B, 1) where probs are not of all tokens. Of equally
    likely tokens the lower id comes first. The result is not renormalised.
    """
    if top_k <= 0 and top_p >= 1:
        return probs
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    masses = ordered.double()
    mass_before = masses.cumsum(-1) - masses  # of the likelier tokens
    if mass is None:
        mass = masses.sum(-1, keepdim=True)
    ordered[mass_before >= top_p * mass] = 0
    return torch.zeros_like(probs).scatter_(-1, ids, ordered)


def inverse_cdf(probs, u):
    """Return the tokens (B,) at which the running sums of probs (B, V) exceed u times their totals.

    u (B,) is in [0, 1): probs 0.2 0.5 0.3 and u = 0.6 give token 1, whose sums are 0.2 to 0.7. They
    are float64: over 151,936 tokens an fp32 running sum is off by more than many of the
    probabilities. A token of probability 0 is never returned, however u and the sums were rounded.
    """
    probs = probs.double()
    cdf = probs.cumsum(-1)
    below = torch.minimum(u * probs.sum(-1), cdf[:, -1] * (1 - 2**-50)).clamp(min=0)
    token = torch.searchsorted(cdf, below[:, None], right=True)[:, 0]
    return token.clamp(max=probs.shape[1] - 1)  # with NaN, searchsorted returns V


def sample_token(logps, u, top_p=1.0, top_k=0):
    """Draw a token a row: log-probs (B, V), u (B,) in [0, 1) -> tokens (B,)."""
    probs = logps.exp()
    if fast and probs.shape[1] >= 2 * fast.draw.FEW:
        return fast.draw.draw(probs, u, top_p, top_k, top_p_filter, inverse_cdf)
    return inverse_cdf(top_p_filter(probs, top_p, top_k), u)


def entropy(logps):
    """Return the entropy (...), nats, of log-probs of whole distributions (..., V)."""
    return -(logps.exp() * logps).sum(dim=-1)


# ---- Decoding ------------------------------------------------------------------------------------
class PlainDecoder:
    """Feed each row of a pool its newest token. fast/decoder.py gives the same states sooner."""

    def __init__(self, model, rows, columns):
        dtype = model.lm_head.weight.dtype
        self.model = model
        self.cache = KVCache(model.config, rows, columns, model.device, dtype)

    def step(self, tokens):
        """Add tokens (b,) to the first b rows; return the states that predict the next (b, D)."""
        return self.model(tokens[:, None], self.cache)[:, 0]

    def close(self):
        """Free the cache."""
        self.cache = None


# One of two lines at which fast/ is entered; the other is in sample_token.
make_decoder = fast.decoder.kept_decoder if fast else PlainDecoder


def read_prompts(model, prompts, n, cache, first):
    """Read each prompt once, and copy its keys and values to n rows of the cache from row `first`.

    Returns the states that predict the first tokens (P x n, D).
    """
    device = model.device
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)  # (P, L)
    own = KVCache(model.config, *ids.shape, device, cache.k.dtype)
    hidden = model(ids, own)  # (P, L, D)
    own.lengths = torch.tensor([len(p) for p in prompts], device=device)  # without the padding
    prompt = torch.arange(len(prompts), device=device).repeat_interleave(n)  # 0 0 0 1 1 1 ...
    end = first + len(prompt)
    cache.copy_rows(own, prompt, torch.arange(first, end, device=device), end)
    return hidden[prompt, own.lengths[prompt] - 1]


def draw_next(model, hidden, u, temperature, top_p, top_k):
    """Draw a token a row after states hidden (b, D), with uniforms u (b,).

    Returns the tokens (b,) and the log-probs (b, V), at the temperature and before any cut.
    """
    logits = model.logits(hidden).div_(temperature or 1.0)
    logps = torch.log_softmax(logits, dim=-1)
    if temperature == 0:  # the likeliest; its log-prob is the one at temperature 1
        return logps.argmax(-1), logps
    return sample_token(logps, u, top_p, top_k), logps


@torch.no_grad()
def decode(model, prompts, u, out, eos_ids, cuts, slots):
    """Write n = B / P completions of each of P prompts, at most `slots` rows at a time.

    u (B, T + BLOCK) are the uniforms of completions of at most T tokens; cuts: temperature, top_p
    and top_k. The tensors in `out` (B, T + BLOCK, ...), by name the tokens, logps and optional
    fields of Completions, are filled in; columns after a row's end are garbage. With 4
    slots and n = 2 samples of the prompts P, Q and R:

        first   P0 P1 Q0 Q1     R waits for two slots
        later   Q0 P1 R0 R1     P0 and Q1 have ended; Q0 has moved into a hole
    """
    device = model.device
    T = u.shape[1] - BLOCK
    n = len(u) // len(prompts)
    stop = torch.tensor(list(eos_ids), device=device)
    decoder = make_decoder(model, slots, max(map(len, prompts)) + T + BLOCK)
    waiting = list(range(len(prompts)))

    # The pool: b rows that are being written. Each loop below admits rows, writes a block of tokens
    # in all of them, and drops those that have ended.
    rows = torch.zeros(0, dtype=torch.long, device=device)  # (b,) the completion in each row
    column = rows  # (b,) how many tokens it has
    hidden = torch.zeros(0, model.config.hidden_size, device=device)  # (b, D) predict the next

    while waiting or len(rows):
        # 1) Admit prompts, once a quarter of the slots is free.
        free = slots - len(rows)
        if waiting and free >= max(n, slots // 4):
            new, waiting = waiting[: free // n], waiting[free // n :]
            states = read_prompts(model, [prompts[i] for i in new], n, decoder.cache, len(rows))
            hidden = torch.cat([hidden, states])
            new_rows = torch.tensor([i * n + j for i in new for j in range(n)], device=device)
            rows = torch.cat([rows, new_rows])
            column = F.pad(column, (0, len(new_rows)))

        # 2) Draw the next tokens of every row, feeding each to the draw after it.
        ended = column + BLOCK >= T
        for i in range(BLOCK):
            at = (rows, column + i)
            tokens, logps = draw_next(model, hidden, u[at], *cuts)
            out["tokens"][at] = tokens
            out["logps"][at] = logps.gather(1, tokens[:, None])[:, 0]
            if "entropy" in out:
                out["entropy"][at] = entropy(logps)
            if "hidden" in out:
                out["hidden"][at] = hidden
            ended = ended | torch.isin(tokens, stop)
            if i < BLOCK - 1:
                hidden = decoder.step(tokens)

        # 3) Drop the rows that have ended. Feed the others their last token, which gives the states
        # that the next block starts from.
        going = (~ended).nonzero()[:, 0]
        if len(going) < len(rows):
            going = decoder.cache.keep_rows(going)
        rows, column = rows[going], column[going] + BLOCK
        hidden = decoder.step(tokens[going]) if len(rows) else hidden[:0]
    decoder.close()


def generate(
    model, prompts: list[list[int]], n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0,
    eos_ids=(), seed=0, step=0, max_rows=256, keep=(), only=None,
) -> Completions:  # fmt: skip
    """Sample n completions of each prompt (token ids), each ended by one of eos_ids or cut off.

    seed and step key the uniforms; temperature 0 takes the likeliest token. only: the places of the
    prompts to complete, such as a process' share. keep: "entropy" and "hidden" are optional fields.
    At most max_rows rows and MAX_CACHE cached numbers, more on a GPU, are in memory at a time,
    which changes no completion. Results are on the CPU. UserError on an empty prompt, n or
    max_new_tokens below 1, a negative temperature, top_p of 0.
    """
    if min(n, max_new_tokens) < 1 or not temperature >= 0 or not top_p > 0 or not all(prompts):
        raise UserError("nothing to sample: no prompt, n, length or top-p, or a bad temperature")
    device = model.device
    only = range(len(prompts)) if only is None else only
    numbered = number_samples(prompts, n)
    numbered = [numbered[i * n + j] for i in only for j in range(n)]
    prompts = [prompts[i] for i in only]
    B, T = len(prompts) * n, max_new_tokens

    # 1) Decode into tensors, as many rows at a time as the cache may hold.
    out = {name: torch.zeros(B, T + BLOCK, device=device) for name in ("logps", *sorted(keep))}
    if "hidden" in keep:
        out["hidden"] = torch.zeros(B, T + BLOCK, model.config.hidden_size, device=device)
    out["tokens"] = torch.zeros(B, T + BLOCK, dtype=torch.long, device=device)
    if prompts:
        streams = [uniforms(seed, step, p, i, T + BLOCK) for p, i in numbered]
        u = torch.from_numpy(np.stack(streams)).to(device)
        heads = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
        each = heads * model.config.head_dim * (max(map(len, prompts)) + T)
        most = (fast.decoder.cache_room(model, MAX_CACHE) if fast else MAX_CACHE) // each
        slots = max(n, min(max_rows, most, B))
        decode(model, prompts, u, out, eos_ids, (temperature, top_p, top_k), slots)

    # 2) A row ends at its first end-of-text token; what it wrote after that becomes 0. (Padding is
    # known by its place, never by its id: on Qwen3-Base the two ids are one.)
    ends = torch.isin(out["tokens"][:, :T].cpu(), torch.tensor(list(eos_ids)))
    finished = ends.any(dim=1)
    lengths = torch.where(finished, ends.int().argmax(dim=1) + 1, T)
    T = int(lengths.max()) if B else 0
    padding = torch.arange(T) >= lengths[:, None]  # (B, T)
    for name, value in out.items():
        out[name] = value[:, :T].cpu()
        out[name][padding] = 0
    return Completions(lengths=lengths, finished=finished, **out)


# ---- The command line ----------------------------------------------------------------------------
def main():
    parser = Parser(description="Ask a model a math problem.")
    parser.add_argument("problem", nargs="?", help="without it: problems of --data")
    add_flags(parser, SAMPLE_FLAGS)
    cfg = parser.parse_args(or_zero=("temperature",))
    model, tokenizer = load_base(cfg)
    problems = [dict(problem=cfg.problem)] if cfg.problem else load_problems(cfg.data, "test")
    how = (cfg.samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    for problem in problems[: cfg.problems]:
        prompt = tokenizer.encode_prompt(prompt_text(problem["problem"]))
        found = generate(model, [prompt], *how, eos_ids=tokenizer.eos_ids, seed=cfg.seed)
        found.check()
        gold = f"  (gold: {problem['answer']})" if "answer" in problem else ""
        for text in found.texts(tokenizer):
            print(printable(f"\n{problem['problem']}{gold}\n{text}"), flush=True)


if __name__ == "__main__":
    run_cli(main)
