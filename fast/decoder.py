"""The sampler's decoding step in less time: one token a row, the same states as PlainDecoder.

At this size the calls cost more than the arithmetic. So linear layers that read the same input
become one product, and so do their adapters; in a small fp32 model the adapters are added into a
copy of the weights. A GPU takes longer to launch a thousand kernels than to run them, so there the
step is captured as a CUDA graph and replayed. Tests hold all of it to Qwen3.forward.
"""

import gc
from functools import cache

import torch
import torch.nn.functional as F

from fast.linear import linear
from lora import LoRALinear
from model import KVCache, rms_norm, rotary, rotate

WIDTH = 256  # columns of the cache that a GPU's graphs differ by
MAX_MERGED = 2**24  # parameters up to which the sampler keeps a copy of the weights, adapters added


def kept_decoder(model, rows, columns):
    """Return the model's decoder, ready for an empty pool, with at least this much room. It is kept
    on the model between calls for its stacked weights and captured graphs; while it is in use, a
    second sampler of the model builds its own."""
    decoder = model.__dict__.pop("kept_decoder", None)
    if decoder is not None and not decoder.has_room(rows, columns):
        decoder = None  # and its cache is free before there is another
    if decoder is None:
        decoder = Decoder(model, rows, columns)
    decoder.refresh()
    return decoder


@cache
def free_at_first(device):
    """Return the bytes that were free on a GPU when first asked, so that all calls agree."""
    return torch.cuda.mem_get_info(device)[0]


def cache_room(model, plain):
    """Return how many numbers the KV cache may hold: `plain`, or half of a GPU's free memory."""
    if model.device.type != "cuda":
        return plain
    return free_at_first(model.device) // 2 // model.lm_head.weight.itemsize


# ---- Linear layers that read the same input ------------------------------------------------------
def base_of(layer):
    return layer.base if isinstance(layer, LoRALinear) else layer


def merged_weight(layer):
    """Return the weight of a linear layer, with its adapter if it has one that is on."""
    if base_of(layer) is layer or not layer.on:
        return base_of(layer).weight
    return layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight


class Stack:
    """Linear layers that read the same input, as one: x (b, D) -> (b, all their outputs)."""

    weight = None  # (outputs, D); with adapters kept apart (outputs + ranks, D)

    def merge(self, layers):
        """Copy the layers' weights, the adapters added: exact to fp32's rounding. (In bf16 a young
        adapter would be rounded away, and a large model is not worth a copy.)"""
        biases = [base_of(layer).bias for layer in layers]
        self.weight = torch.cat([merged_weight(layer) for layer in layers])
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.outputs = len(self.weight)
        self.scale = None  # no adapters beside the weight

    def refill(self, layers):
        """Stack the layers' weights, once, and copy in their adapters, which change every step;
        return whether tensors have moved in memory."""
        bases = [base_of(layer) for layer in layers]
        active = [layer for layer in layers if isinstance(layer, LoRALinear) and layer.on]
        ranks = sum(layer.rank for layer in active)
        self.outputs = sum(base.out_features for base in bases)
        self.scale = active[0].scale if active else None
        moved = self.weight is None or self.weight.data_ptr() != bases[0].weight.data_ptr()
        moved = moved or len(self.weight) < self.outputs + ranks
        if moved:
            self.stack(bases, ranks)
        if active:  # in place: captured graphs read them there
            A = torch.cat([layer.lora_A.weight for layer in active])  # (ranks, D)
            self.weight[self.outputs : self.outputs + ranks] = A
            none = A.new_empty(0)
            B = [x.lora_B.weight if x in active else none.view(x.out_features, 0) for x in layers]
            self.B.copy_(torch.block_diag(*B).T)  # (ranks, outputs)
        return moved

    def stack(self, bases, ranks):
        """Put the weights into one tensor, with room for so many rows of A. The layers' own weights
        become views of it, so that nothing is held twice."""
        weight = bases[0].weight
        room = weight.new_empty(ranks, weight.shape[1])
        self.weight = torch.cat([*(base.weight for base in bases), room])
        self.bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
        self.B = weight.new_empty(ranks, self.outputs)
        parts = self.weight[: self.outputs].split([base.out_features for base in bases])
        for base, part in zip(bases, parts, strict=True):
            base.weight.data = part

    def __call__(self, x):
        if self.scale is None:
            return linear(x, self.weight[: self.outputs], self.bias)
        both = linear(x, self.weight)  # (b, outputs + ranks): W x and A x in one product
        y, low = both[:, : self.outputs], both[:, self.outputs :]
        y = y if self.bias is None else y.add_(self.bias)
        return y.addmm_(low, self.B, alpha=self.scale)


# ---- The step ------------------------------------------------------------------------------------
class Decoder:
    """A model's decoding step, with the cache that it reads and writes."""

    def __init__(self, model, rows, columns):
        config = model.config
        device, dtype = model.device, model.lm_head.weight.dtype
        small = sum(p.numel() for p in model.parameters()) <= MAX_MERGED
        self.model = model
        self.place = (device, dtype)
        self.merges = small and device.type == "cpu" and dtype == torch.float32
        self.captures = device.type == "cuda"
        self.graphs = {}
        self.pool = None
        if self.captures:
            self.pool = torch.cuda.graph_pool_handle()  # all graphs make what they make in one
            columns = -(-columns // WIDTH) * WIDTH  # kernels want masks of even widths
        self.cache = KVCache(config, rows, columns, device, dtype)
        self.stacks = [[Stack() for _ in range(4)] for _ in model.model.layers]
        # What no step needs to compute again: the rotary table, and the q and k norms side by side.
        positions = torch.arange(columns, device=device)[None]
        cos, sin = rotary(positions, config.head_dim, config.rope_theta, dtype, config.llama3_rope)
        self.cos, self.sin = cos[0, 0], sin[0, 0]  # (columns, K)
        self.qk_weights = []  # a layer's: (H + H_kv, K)
        for block in model.model.layers if config.qk_norm else ():
            q = block.self_attn.q_norm.weight.expand(config.num_attention_heads, -1)
            k = block.self_attn.k_norm.weight.expand(config.num_key_value_heads, -1)
            self.qk_weights.append(torch.cat([q, k]))

    def has_room(self, rows, columns):
        """Return whether this decoder still fits its model, and has that much room."""
        place = (self.model.device, self.model.lm_head.weight.dtype)
        _, held_rows, _, held_columns, _ = self.cache.k.shape
        return place == self.place and held_rows >= rows and held_columns >= columns

    def refresh(self):
        """Empty the cache and take over the adapters as they are now."""
        self.cache.lengths.zero_()
        self.cache.filled = 0
        for block, stacks in zip(self.model.model.layers, self.stacks, strict=True):
            attention, mlp = block.self_attn, block.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            inputs = (qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])
            for stack, layers in zip(stacks, inputs, strict=True):
                if self.merges:
                    stack.merge(layers)
                elif stack.refill(layers):
                    self.graphs = {}  # they read what was there before
        self.on = tuple(stack.scale for stacks in self.stacks for stack in stacks)

    def close(self):
        """Leave this decoder on the model, for the next call of kept_decoder."""
        self.model.kept_decoder = self

    def step(self, tokens):
        """Add tokens (b,) to the first b rows; return the states that predict the next (b, D).

        On a GPU it is a graph: one for each number of rows and columns, rounded up, and setting of
        the adapters. The first time it runs as it is, which readies the kernels.
        """
        if not self.captures:
            return self.compute(tokens)
        b, filled = len(tokens), self.cache.filled
        rows = min(1 << (b - 1).bit_length(), self.cache.k.shape[1])  # nobody reads the rows past b
        key = (rows, self.width(filled + 1), self.on)
        padded = tokens.new_zeros(rows)
        padded[:b] = tokens
        if key not in self.graphs:
            self.graphs[key] = None
            return self.compute(padded)[:b]
        if self.graphs[key] is None:
            self.graphs[key] = self.capture(padded)
        graph, inputs, states = self.graphs[key]
        inputs.copy_(padded)
        graph.replay()
        self.cache.filled = filled + 1
        return states[:b].clone()

    def capture(self, tokens):
        """Return a graph of the step, and the tensors that it reads its tokens from and writes its
        states to. Graphs may share the memory of what they make, since step copies the states."""
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # to free another decoder's graphs in a capture breaks it
        try:
            with torch.cuda.graph(graph, pool=self.pool):  # records what to do, and does nothing
                states = self.compute(tokens)
        finally:
            if collects:
                gc.enable()
        return graph, tokens, states

    def width(self, filled):
        """Return how many columns to read; rounded up on a GPU, where each number is a graph."""
        step = WIDTH if self.captures else 1
        return min(-(-filled // step) * step, self.cache.k.shape[3])

    def compute(self, tokens):
        """Do what Qwen3.forward does with one token a row: (b,) -> (b, D)."""
        config, cache, b = self.model.config, self.cache, len(tokens)
        H, H_kv, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        columns = cache.k.shape[3]
        # 1) Each row's position, what it may not see, and where its new keys go. Key-value heads
        # are rows of their own here: (b, H_kv) flattened.
        at = cache.lengths[:b].clamp(max=columns - 1)  # (b,); a row that is over may run on
        cache.lengths[:b] += 1
        cache.filled += 1
        S = self.width(cache.filled)
        unseen = torch.arange(S, device=at.device) > at[:, None]  # (b, S)
        by_products = self.captures or self.place[1] == torch.float32
        dtype = torch.float32 if by_products else self.place[1]
        mask = torch.zeros(unseen.shape, device=at.device, dtype=dtype)
        mask = mask.masked_fill_(unseen, -torch.inf)[:, None]  # (b, 1, S)
        if by_products:
            mask = mask.repeat_interleave(H_kv, 0)  # (b H_kv, 1, S)
        heads = torch.arange(b * H_kv, device=at.device).view(b, H_kv)
        place = (heads * columns + at[:, None]).flatten()
        rope = (self.cos[at][:, None], self.sin[at][:, None])  # (b, 1, K)
        # 2) The blocks.
        x = self.model.model.embed_tokens(tokens)  # (b, D)
        for layer, block in enumerate(self.model.model.layers):
            to_qkv, to_out, to_inner, to_down = self.stacks[layer]
            qkv = to_qkv(normed(x, block.input_layernorm)).view(b, -1, K)
            qk, v = qkv[:, : H + H_kv], qkv[:, H + H_kv :]
            if config.qk_norm:
                qk = rms_norm(qk, self.qk_weights[layer], config.rms_norm_eps)
            qk = rotate(qk, rope)
            keys, values = cache.k[layer].view(-1, K), cache.v[layer].view(-1, K)
            keys.index_copy_(0, place, qk[:, H:].reshape(-1, K))
            values.index_copy_(0, place, v.reshape(-1, K))
            keys = keys.view(-1, columns, K)[: b * H_kv, :S]  # (b H_kv, S, K)
            values = values.view(-1, columns, K)[: b * H_kv, :S]
            # Query heads that share a key head are queries of one head: its keys are read once.
            q = qk[:, :H].reshape(b * H_kv, -1, K)
            x = x + to_out(attend(q, keys, values, mask).reshape(b, -1))
            gate, up = to_inner(normed(x, block.post_attention_layernorm)).chunk(2, dim=-1)
            x = x + to_down(F.silu(gate) * up)
        return self.model.model.norm(x.float())


def normed(x, norm):
    return rms_norm(x, norm.weight, norm.eps)  # to call a module takes a fifth of the time again


def attend(q, k, v, mask):
    """Attend from a few queries (b H_kv, n, K) of each key head to k and v (b H_kv, S, K). The mask
    is added: (b H_kv, 1, S), fp32, for two products, else (b, 1, S). Scores are not rounded."""
    scale = q.shape[-1] ** -0.5
    if q.is_cuda or q.dtype == torch.float32:
        out = () if q.dtype == torch.float32 else (torch.float32,)  # of the sums, on a GPU
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), *out, alpha=scale)  # (b H_kv, n, S)
        return torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
    b = len(mask)
    q, k, v = (x.unflatten(0, (b, -1)) for x in (q, k, v))  # fast kernels want (b, H_kv, .., K)
    return F.scaled_dot_product_attention(q, k, v, mask[:, None]).flatten(0, 1)
