"""Qwen3 in plain PyTorch: the model, its KV cache, and checkpoints from a folder or the Hub.

`forward` returns hidden states, and the vocabulary head is a call of its own: ARCA's base pass
compares hidden states and never needs the head. Nothing is left-padded: rows are right-padded, each
with its own length, and causal attention never looks right. By two flags the same code runs Qwen2.5
(bias on q, k, v; no q/k norm) and Llama-style models (neither). Names are Hugging Face's.

Shapes, here and in every file: B rows, P prompts, G samples a prompt, T tokens, S cached tokens, D
hidden, V vocabulary, H heads, K head_dim.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer as TokenizerFile
from torch.utils.checkpoint import checkpoint

from plumbing.files import UserError, check_tensors, checked, hub_model, read_json, read_weights

FAMILIES = dict(qwen3=(False, True), qwen2=(True, False), llama=(False, False))  # bias, norm

# ---- The model -----------------------------------------------------------------------------------


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

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """From a parsed config.json. UserError, by name, on all that we would compute wrongly."""
        kinds = {f.name: f.type for f in fields(cls)} | dict(model_type=str, hidden_act=str)
        kinds |= dict(rope_parameters=dict, rope_scaling=dict, layer_types=list)
        kinds |= dict(use_sliding_window=bool, attention_bias=bool)
        raw = checked(raw, "config.json", **kinds)
        family, heads = raw.get("model_type"), raw.get("num_attention_heads") or 1
        if family not in FAMILIES:
            raise UserError(f"model_type {family!r} is not supported: use {', '.join(FAMILIES)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, 4
        rope = checked(rope, "config.json", rope_theta=float)
        layers, act = raw.get("layer_types", ()), raw.get("hidden_act", "silu")
        refused = {
            "rope scaling": (rope.get("rope_type") or rope.get("type", "default")) != "default",
            "a sliding window": raw.get("use_sliding_window") or "sliding_attention" in layers,
            "attention_bias": raw.get("attention_bias") and not FAMILIES[family][0],
            f"hidden_act {act}": act != "silu",
        }
        if asks := [what for what, present in refused.items() if present]:
            raise UserError(f"config.json asks for {asks[0]}, which is not supported")
        c = {f.name: raw.get(f.name) for f in fields(cls)}
        c["qkv_bias"], c["qk_norm"] = FAMILIES[family]
        c["rope_theta"] = rope.get("rope_theta") or c["rope_theta"]
        c["tie_word_embeddings"] = bool(c["tie_word_embeddings"])
        c["num_key_value_heads"] = c["num_key_value_heads"] or heads
        width = 128 if family == "qwen3" else (c["hidden_size"] or 0) // heads
        c["head_dim"] = c["head_dim"] or width
        if absent := [name for name, value in c.items() if not (value or value is False)]:
            raise UserError(f"config.json has no {absent[0]}: is it a {family} checkpoint's?")
        if heads % c["num_key_value_heads"] or c["head_dim"] % 2 or c["num_hidden_layers"] > 1000:
            limits = "key-value heads must divide heads, head_dim be even, layers be at most 1,000"
            raise UserError(f"config.json: {limits}")
        return cls(**c)


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


# ---- Checkpoints in Hugging Face layout ----------------------------------------------------------


def checkpoint_folder(path_or_id, revision=None) -> Path:
    """The folder of a checkpoint, which for a Hub id is downloaded first."""
    name = str(path_or_id)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name[0] in "./~" or Path(name).exists():
        raise UserError(f"no model folder {name}: give one, or a Hub id such as Qwen/Qwen3-0.6B")
    return hub_model(name, revision)


def default_dtype(device):
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_model(path_or_id, device="cpu", dtype=None, revision=None) -> Qwen3:
    """A frozen model in eval mode, from a folder or Hub id; dtype: fp32 on the CPU, else bf16.
    UserError on an unknown or missing tensor, a wrong shape, an architecture that is not ours."""
    folder = checkpoint_folder(path_or_id, revision)
    dtype = dtype or default_dtype(device)
    with torch.device("meta"):  # takes no memory: the tensors of the file move in below
        model = Qwen3(Config.from_dict(read_json(folder / "config.json")))
    state, expected = read_weights(folder), model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]  # a file may hold the matrix twice
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.get("model.embed_tokens.weight", head)):
            raise UserError(f"{folder}: config.json ties lm_head to embed_tokens, but they differ")
    check_tensors(state, expected, folder)
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True, strict=False)  # a tied head is not among them
    model.tie()  # again, since assigning made the embedding a new parameter
    return model.requires_grad_(False).eval()


@dataclass
class Tokenizer:
    """tokenizer.json, run by the tokenizers library, and the ids that end a text."""

    file: TokenizerFile
    eos_ids: list[int]

    def encode(self, text: str) -> list[int]:
        # Half of a surrogate pair (JSON can say one) has no bytes: it becomes a question mark.
        return self.file.encode(text.encode("utf-8", "replace").decode()).ids

    def decode(self, ids) -> str:
        """The text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.file.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path_or_id, revision=None) -> Tokenizer:
    """From a folder or Hub id; eos_ids are generation_config.json's, else config.json's."""
    folder = checkpoint_folder(path_or_id, revision)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    said = [read_json(file).get("eos_token_id") for file in files if file.exists()]
    eos = next((ids for ids in said if ids is not None), None)
    eos = [eos] if type(eos) is int else eos
    if not isinstance(eos, list) or not eos or any(type(i) is not int or i < 0 for i in eos):
        raise UserError(f"{folder}: config.json and generation_config.json hold no eos_token_id")
    try:
        file = TokenizerFile.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    file.no_truncation()  # neither is part of what a text's tokens are
    file.no_padding()
    return Tokenizer(file, eos)
