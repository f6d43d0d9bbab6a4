"""The decoding step of the sampler, fast: one token a row. One need not read it to understand the
rest, for it computes what Qwen3.forward does with a cache, and tests hold the two together.

At this size the calls cost more than the arithmetic. So layers that read the same input are one
product, and so are their adapters; in a small fp32 model they are in it. A GPU, which takes longer
to launch a thousand kernels than to run them, captures the step as a CUDA graph and replays it.
"""

import torch
import torch.nn.functional as F

from lora import LoRALinear
from model import KVCache, rms_norm, rotary, rotate

SMALL = 2**24  # parameters, up to which the sampler keeps a copy of the weights with the adapter in


def base(layer):
    return layer.base if isinstance(layer, LoRALinear) else layer


def merged(layer):
    """The weight of a linear layer with its adapter, if it has one that is on."""
    if base(layer) is layer or not layer.on:
        return base(layer).weight
    return layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight


class Stack:
    """Linear layers that read the same input as one: x (b, D) -> (b, all their outputs)."""

    weight = None

    def merge(self, layers):
        """Copy the layers' weights, the adapters added: exact to fp32's rounding. In bf16 a young
        adapter would be rounded away, and a large model is not worth a copy."""
        self.weight = torch.cat([merged(layer) for layer in layers])
        self.scale, self.out = None, len(self.weight)
        plain = [base(layer) for layer in layers]
        self.bias = None if plain[0].bias is None else torch.cat([x.bias for x in plain])

    def fill(self, layers):
        """Take the layers' weights, once, and their adapters, which change between rollouts.
        Returns whether tensors have moved."""
        plain = [base(layer) for layer in layers]
        first, sizes = plain[0], [layer.out_features for layer in plain]
        on = [x for x in layers if isinstance(x, LoRALinear) and x.on]
        self.scale, self.out = on[0].scale if on else None, sum(sizes)
        low = sum(x.rank for x in on)
        moved = self.weight is None or self.weight.data_ptr() != first.weight.data_ptr()
        if moved := moved or len(self.weight) < self.out + low:
            none = first.weight.new_empty(low, first.in_features)
            self.weight = torch.cat([*(layer.weight for layer in plain), none])
            self.bias = None if first.bias is None else torch.cat([x.bias for x in plain])
            self.B = first.weight.new_empty(low, self.out)
            for layer, part in zip(plain, self.weight.split([*sizes, low])[:-1], strict=True):
                layer.weight.data = part  # a view of the stack, so nothing is held twice
        if on:  # in place: captured graphs read them there
            self.weight[self.out : self.out + low] = torch.cat([x.lora_A.weight for x in on])
            blank = first.weight.new_empty(0)
            B = [x.lora_B.weight if x in on else blank.view(x.out_features, 0) for x in layers]
            self.B.copy_(torch.block_diag(*B).T)
        return moved

    def __call__(self, x):
        if self.scale is None:
            return F.linear(x, self.weight[: self.out], self.bias)
        both = x @ self.weight.T  # (b, out + ranks): the layers' outputs, and A x
        y, low = both[:, : self.out], both[:, self.out :]
        y = y if self.bias is None else y.add_(self.bias)
        return y.addmm_(low, self.B, alpha=self.scale)


class Decoder:
    """A model's decoding step, with the cache that it reads and writes."""

    def __init__(self, model, rows, columns):
        c, place = model.config, (model.device, model.lm_head.weight.dtype)
        self.model, self.place, self.graphs = model, place, {}
        self.captures = place[0].type == "cuda"
        size = sum(p.numel() for p in model.parameters())
        self.merges = place == (torch.device("cpu"), torch.float32) and size <= SMALL
        self.cache = KVCache(c, rows, columns, *place)
        self.stacks = [[Stack() for _ in range(4)] for _ in model.model.layers]
        rope = rotary(
            torch.arange(columns, device=place[0])[None], c.head_dim, c.rope_theta, place[1]
        )
        self.cos, self.sin = rope[0][0, 0], rope[1][0, 0]  # (columns, K)
        self.qk_weight = []
        for block in model.model.layers:
            norms = (block.self_attn.q_norm, c.num_attention_heads)
            norms = (norms, (block.self_attn.k_norm, c.num_key_value_heads))
            weights = [norm.weight.expand(heads, -1) for norm, heads in norms if c.qk_norm]
            self.qk_weight.append(torch.cat(weights) if weights else None)  # (H + H_kv, K)

    def fits(self, rows, columns):
        """Whether this decoder is still good for its model, and has that much room."""
        have = (*self.place, self.cache.k.shape[1] >= rows, self.cache.k.shape[3] >= columns)
        return have == (self.model.device, self.model.lm_head.weight.dtype, True, True)

    def refresh(self):
        """Empty the cache and take over the adapters as they are now."""
        self.cache.filled = 0
        for block, (qkv, o, up, down) in zip(self.model.model.layers, self.stacks, strict=True):
            attention, mlp = block.self_attn, block.mlp
            inputs = {qkv: [attention.q_proj, attention.k_proj, attention.v_proj]}
            inputs |= {o: [attention.o_proj], down: [mlp.down_proj]}
            inputs[up] = [mlp.gate_proj, mlp.up_proj]
            for stack, layers in inputs.items():
                if self.merges:
                    stack.merge(layers)
                elif stack.fill(layers):
                    self.graphs = {}  # they read what was there before
        self.on = tuple(stack.scale for four in self.stacks for stack in four)

    def take(self, other, rows, first=0):
        """Copy the given rows of a KVCache, perhaps our own, to our rows from `first` on; later
        rows are out of use. The tensors stay where they are, as captured graphs need it."""
        cache, to, S = self.cache, slice(first, first + len(rows)), other.filled
        cache.k[:, to, :, :S] = other.k[:, rows, :, :S]
        cache.v[:, to, :, :S] = other.v[:, rows, :, :S]
        cache.lengths[to] = other.lengths[rows]
        cache.filled = int(cache.lengths[: to.stop].max()) if to.stop else 0

    def step(self, tokens):
        """tokens (b,) of the first b rows -> the states after the final norm (b, D)."""
        c, cache, b = self.model.config, self.cache, len(tokens)
        H, H_kv, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        columns = cache.k.shape[3]
        at = cache.lengths[:b].clamp(max=columns - 1)  # (b,); a row that is over may run on
        cache.lengths[:b] += 1
        cache.filled += 1
        S = self.width(cache.filled)
        unseen = torch.arange(S, device=at.device) > at[:, None]
        mask = torch.zeros(unseen.shape, device=at.device, dtype=self.place[1])
        mask = mask.masked_fill_(unseen, -torch.inf).repeat_interleave(H_kv, 0)[:, None]
        rope = self.cos[at][:, None], self.sin[at][:, None]  # (b, 1, K)
        place = torch.arange(b * H_kv, device=at.device).view(b, H_kv) * columns + at[:, None]
        place = place.flatten()  # of each row's and head's new key among those of the layer
        x = self.model.model.embed_tokens(tokens)
        for layer, block in enumerate(self.model.model.layers):
            to_qkv, to_out, to_inner, to_down = self.stacks[layer]
            qkv = to_qkv(normed(x, block.input_layernorm)).view(b, -1, K)
            qk, v = qkv[:, : H + H_kv], qkv[:, H + H_kv :]
            if c.qk_norm:
                qk = rms_norm(qk, self.qk_weight[layer], c.rms_norm_eps)
            qk = rotate(qk, rope)
            keys, values = (x[layer].view(-1, K) for x in (cache.k, cache.v))
            keys.index_copy_(0, place, qk[:, H:].reshape(-1, K))
            values.index_copy_(0, place, v.reshape(-1, K))
            keys, values = (x.view(-1, columns, K)[: b * H_kv, :S] for x in (keys, values))
            # Query heads that share a key head are queries of one head: its keys are read once.
            q = qk[:, :H].reshape(b * H_kv, -1, K)
            y = attend(q, keys, values, mask).view(b, -1)
            x = x + to_out(y)
            gate, up = to_inner(normed(x, block.post_attention_layernorm)).chunk(2, dim=-1)
            x = x + to_down(F.silu(gate) * up)
        return self.model.model.norm(x.float())

    def width(self, filled):
        """Columns to read if so many are filled; rounded up on a GPU, where each is a graph."""
        step = 256 if self.captures else 1
        return min(-(-filled // step) * step, self.cache.k.shape[3])

    def advance(self, tokens):
        """`step`, on a GPU as a graph: one for each number of rows and columns, rounded up, and
        setting of the adapters. The first time it runs as it is, which readies the kernels."""
        b, cache = len(tokens), self.cache
        if not self.captures:
            return self.step(tokens)
        rows = min(1 << (b - 1).bit_length(), cache.k.shape[1])  # what those past b do, none reads
        key = (rows, self.width(cache.filled + 1), self.on)
        padded = tokens.new_zeros(rows)
        padded[:b] = tokens
        if key not in self.graphs:
            self.graphs[key] = None
            return self.step(padded)[:b]
        if self.graphs[key] is None:
            graph, filled = torch.cuda.CUDAGraph(), cache.filled
            with torch.cuda.graph(graph):  # notes what is to be done, and does nothing
                states = self.step(padded)
            self.graphs[key], cache.filled = (graph, padded, states), filled
        graph, into, states = self.graphs[key]
        into.copy_(padded)
        graph.replay()
        cache.filled += 1
        return states[:b].clone()


def normed(x, norm):
    return rms_norm(x, norm.weight, norm.eps)  # to call a module takes a fifth of the time again


def attend(q, k, v, mask):
    """Attention of a few queries (b, n, K) to k, v (b, S, K), with a mask (b, 1, S) to add."""
    if q.dtype != torch.float32:  # where scores must not be rounded
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)  # (b, n, S)
    return torch.bmm(scores.softmax(dim=-1), v)
