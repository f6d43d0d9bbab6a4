"""Qwen3 in plain PyTorch: the model and its KV cache.

`forward` returns hidden states, and the vocabulary head is a separate call: ARCA's residual needs
hidden states only. With two fields of Config the same code runs Qwen2.5 (bias on q, k and v; no q/k
norm) and Llama (neither). Modules are named as in Hugging Face, so hf/checkpoint.py can load their
weights. This file imports nothing of ours and can be copied out alone.

Rows are right-padded. Causal attention never looks right, so padding changes nothing that we read.
Shapes, here and in every file: B rows, P prompts, G samples a prompt, T tokens, S cached tokens,
D hidden size, V vocabulary, H heads, H_kv key-value heads, K head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Config:
    """The fields of config.json that the computation depends on, and two flags for the family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool  # whether the head is the embedding matrix
    qkv_bias: bool  # True for Qwen2
    qk_norm: bool  # True for Qwen3
    llama3_rope: tuple | None = None  # Llama 3.1: factor, low, high, trained length; see `rotary`


# ---- Functions on tensors ------------------------------------------------------------------------
def rms_norm(x, weight, eps):
    """Return x / rms(x) * weight over the last axis; the statistics are fp32 in any dtype."""
    if x.is_cuda and weight.dim() == 1:  # one kernel for four; it rounds once instead of twice
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotary(positions, head_dim, theta, dtype, llama3_rope=None):
    """Return the cosines and signed sines, (B, 1, T, K) each, of positions (B, T).

    Rotary embedding, arXiv 2104.09864, eq. 34: coordinate pair i turns by position * theta^(-2i/K).
    Llama 3.1 slows down, to 1 / factor, the pairs of less than `low` turns in the trained length.
    """
    even = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)  # (K/2,)
    frequency = theta ** (-even / head_dim)
    if llama3_rope is not None:
        factor, low, high, length = llama3_rope
        turns = length * frequency / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # all of it from `high` turns on
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, K/2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, rope):
    """Turn x (B, H, T, K) by its positions; rope is what `rotary` returned. Coordinate i pairs with
    i + K/2, as in Hugging Face's weights: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attention(q, k, v, mask=None):
    """Attend from q (B, H, T, K) to k and v (B, H_kv, S, K); return (B, T, H K).

    mask (B, 1, T, S) is True where a token may look; without one attention is causal. H / H_kv
    query heads share a key-value head.
    """
    if q.is_cuda and mask is not None:  # no fast kernel there takes both
        shared = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(shared, dim=1)
        v = v.repeat_interleave(shared, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


# ---- The model -----------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with grouped queries and, in Qwen3, normalised queries and keys."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        D = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, rope, cache, layer):
        # (B, T, D) -> (B, T, H, K) -> (B, H, T, K); k and v have H_kv heads
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        y = attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)
        return self.o_proj(y)  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP; each reads a normalised state and adds to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class WideProduct(torch.autograd.Function):
    """The product of 16-bit states (N, D) and a frozen 16-bit weight (V, D), its sums left in fp32.
    Logits rounded to bf16 put a log-prob off by 0.02, which is more than a young adapter moves it.
    """

    PART = 2**19  # numbers of a weight that a CPU makes fp32 at a time, and its cache holds

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        # A GPU adds up in fp32 and need only not round.
        if x.is_cuda:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        # A CPU multiplies in fp32, a part of the weight at a time.
        x = x.float()
        parts = weight.split(WideProduct.PART // x.shape[1] + 1)
        return torch.cat([x @ part.float().T for part in parts], dim=1)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if grad.is_cuda:
            return grad.to(weight.dtype) @ weight, None
        rows = WideProduct.PART // weight.shape[1] + 1
        pairs = zip(grad.split(rows, dim=1), weight.split(rows), strict=True)
        return sum(g @ part.float() for g, part in pairs).to(weight.dtype), None


class Qwen3(nn.Module):
    """A decoder-only transformer (Qwen3 technical report, arXiv 2505.09388, section 2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        rows = torch.empty(V, D).uniform_(-1, 1)  # nn.Embedding's normal_ is slow on `meta`
        self.model = nn.ModuleDict()
        self.model.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(D, config.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=False)
        self.gradient_checkpointing = False  # recompute activations in the backward pass
        self.tie()

    def tie(self):
        """Make the head the embedding matrix, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, ids, cache=None):
        """Return the states after the final norm (B, T, D), fp32, of right-padded ids (B, T).

        cache: None for causal attention, or an object that decides what each token sees:
        `cache.start(B, T)` gives the positions of the tokens, `cache.attend(layer, q, k, v)` their
        attention. KVCache below is one; fast/packing.py has another.
        """
        x = self.model.embed_tokens(ids)  # (B, T, D)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        if cache is not None:
            positions = cache.start(*ids.shape)  # (B, T)
        config = self.config
        rope = rotary(positions, config.head_dim, config.rope_theta, x.dtype, config.llama3_rope)

        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.model.layers):
            args = (x, rope, cache, layer)
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        # A small ARCA residual would drown in one more rounding to bf16: the last norm stays fp32.
        return self.model.norm(x.float())

    def logits(self, hidden):
        """Return the logits (..., V), fp32 or finer, of hidden (..., D)."""
        weight = self.lm_head.weight
        # In fp32 the head is a linear layer like others.
        if weight.dtype not in HALF:
            return self.lm_head(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)  # (N, D)
        return WideProduct.apply(rows, weight).view(*hidden.shape[:-1], -1)


# ---- The KV cache --------------------------------------------------------------------------------
class KVCache:
    """Keep the keys and values of a pool of rows, of which the first B are in use.

    Prompts go in right-padded; once `lengths` is set to the true lengths, later tokens overwrite
    the padding, which nothing has read. Prompts of 3 and 1 tokens, then one new token a row:

        after the prompts       a b c .     lengths 3, 1 (the padding of row 2 is not counted)
                                d . . .
        after one more token    a b c e     positions 3 and 1
                                d f . .
    """

    def __init__(self, config: Config, rows, capacity, device, dtype):
        heads, K = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, rows, heads, capacity, K)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)  # tokens in each row
        self.filled = 0  # no row in use is longer; columns from here on are never read

    def start(self, B, T):
        """Make room for T more tokens in the first B rows; return their positions (B, T)."""
        device = self.lengths.device
        self.rows = torch.arange(B, device=device)[:, None]  # (B, 1)
        self.positions = self.lengths[:B, None] + torch.arange(T, device=device)  # (B, T)
        is_empty = self.filled == 0
        self.lengths[:B] += T
        self.filled += T
        # A token sees the columns up to its own position: its row's past, and no padding. In an
        # empty cache that is plain causal attention, which needs no mask.
        columns = torch.arange(self.filled, device=device)
        seen = columns <= self.positions[:, :, None]  # (B, T, S)
        self.mask = None if is_empty else seen[:, None]  # (B, 1, T, S)
        return self.positions

    def attend(self, layer, q, k, v):
        """Add k and v (B, H_kv, T, K), and attend from q (B, H, T, K) to the row -> (B, T, H K)."""
        self.k[layer][self.rows, :, self.positions] = k.transpose(1, 2)
        self.v[layer][self.rows, :, self.positions] = v.transpose(1, 2)
        if self.mask is not None:
            B = len(q)
            k = self.k[layer][:B, :, : self.filled]
            v = self.v[layer][:B, :, : self.filled]
        return attention(q, k, v, self.mask)

    def copy_rows(self, source, rows, to, used):
        """Copy these rows of a cache, which may be this one, to the rows `to`; then the first
        `used` are in use. The tensors stay where they are in memory."""
        S = source.filled
        self.k[:, to, :, :S] = source.k[:, rows, :, :S]
        self.v[:, to, :, :S] = source.v[:, rows, :, :S]
        self.lengths[to] = source.lengths[rows]
        self.filled = int(self.lengths[:used].max()) if used else 0

    def keep_rows(self, going):
        """Keep the rows `going` (n,), increasing, as the first n; return the order they are now in.

        Only those beyond the first n move, into the holes: rows 0 2 4 5 become 0 4 2 5.
        """
        n = len(going)
        order = torch.arange(n, device=going.device)
        # The rows that are over among the first n, and those that go on beyond them: as many.
        holes = order[~torch.isin(order, going)]
        order[holes] = going[n - len(holes) :]
        self.copy_rows(self, order[holes], holes, n)
        return order
