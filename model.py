"""Qwen3 in plain PyTorch: the model, its KV cache, and checkpoints from a folder or the Hub.

`forward` returns hidden states, and the vocabulary head is a call of its own: ARCA's base pass
compares hidden states and never needs the head. Nothing is left-padded: rows are right-padded, each
with its own length, and causal attention never looks right. By two flags the same code runs Qwen2.5
(bias on q, k, v; no q/k norm) and Llama-style models (neither). Names are Hugging Face's.

Shapes, here and in every file: B rows, P prompts, G samples a prompt, T tokens, S cached tokens, D
hidden, V vocabulary, H heads, K head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis; the statistics are fp32 whatever the dtype."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rotary(positions, head_dim, theta, dtype):
    """Cosines and signed sines (B, 1, T, K) of rotary embedding (arXiv 2104.09864, eq. 34) at
    positions (B, T)."""
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, None, :, None].float() * theta ** (-pair / head_dim)  # (B, 1, T, K/2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, rope):
    """Turn x (B, H, T, K) by its position. Coordinate i pairs with i + K/2, as in HF's weights:
    (a, b) becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attention(q, k, v, mask=None):
    """Softmax attention of q (B, H, T, K) to k and v (B, H_kv, S, K) -> (B, T, H K): where mask
    (B, 1, T, S) allows, or causal. H query heads share H_kv heads of keys and values."""
    if q.is_cuda and mask is not None:  # there a fast kernel has either a mask or grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Causal attention with grouped queries."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, cache, layer):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # (B, H, T, K)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (B, H_kv, T, K)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        y = attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)
        return self.o_proj(y)  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """A decoder-only transformer (Qwen3 technical report, arXiv 2505.09388, section 2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.model = nn.ModuleDict()
        rows = torch.empty(c.vocab_size, c.hidden_size).uniform_(-1, 1)  # normal_ is slow on `meta`
        self.model.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.model.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.decoder = None  # the sampler's fast path, kept from call to call
        self.checkpoint = False  # make activations again in the backward pass: slow, small
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, ids, cache=None, blocks=None):
        """ids (B, T), right-padded -> states after the final norm (B, T, D), in fp32.

        With a cache, row b's tokens stand at positions cache.lengths[b], ... and are added to it.
        To a list `blocks` the state (B, T, D) after each block is appended.
        """
        x = self.model.embed_tokens(ids)  # (B, T, D)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        if cache is not None:
            positions = cache.start(ids.shape[1])  # (B, T)
        rope = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        again = self.checkpoint and torch.is_grad_enabled()
        for layer, block in enumerate(self.model.layers):
            passes = (x, rope, cache, layer)
            x = checkpoint(block, *passes, use_reentrant=False) if again else block(*passes)
            if blocks is not None:
                blocks.append(x)
        # A small ARCA residual would drown in one more rounding to bf16: the last norm stays fp32.
        return self.model.norm(x.float())

    def logits(self, hidden):
        """hidden (..., D) -> logits (..., V), in the dtype of the weights."""
        return self.lm_head(hidden.to(self.lm_head.weight.dtype))


class KVCache:
    """Keys and values of all layers, preallocated, and a length for each row. Prompts go in right-
    padded; once `lengths` is set to the true ones, later tokens overwrite the padding unread."""

    def __init__(self, c: Config, rows, capacity, device, dtype):
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)  # (B,) tokens held
        self.filled = 0  # no row in use is longer than this; columns from here on are never read

    def start(self, T):
        """Make room for T more tokens in every row; returns their positions (B, T)."""
        device, fresh = self.lengths.device, self.filled == 0
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
        self.positions = self.lengths[:, None] + torch.arange(T, device=device)
        self.lengths, self.filled = self.lengths + T, self.filled + T
        # A token sees the columns up to its own position: its row's past, and no padding.
        seen = torch.arange(self.filled, device=device) <= self.positions[:, :, None]  # (B, T, S)
        self.mask = None if fresh else seen[:, None]  # at first, plain causal attention does that
        return self.positions

    def attend(self, layer, q, k, v):
        """Write k, v (B, H_kv, T, K); q (B, H, T, K) attend to all that is here -> (B, T, H K)."""
        self.k[layer][self.rows, :, self.positions] = k.transpose(1, 2)
        self.v[layer][self.rows, :, self.positions] = v.transpose(1, 2)
        if self.mask is not None:
            k, v = self.k[layer][:, :, : self.filled], self.v[layer][:, :, : self.filled]
        return attention(q, k, v, self.mask)
