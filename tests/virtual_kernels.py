"""What PyTorch has for CUDA only, on the CPU, for tests/virtual_device.py: products in bf16 with
sums in fp32, and flash attention of sequences that lie end to end."""

import torch


def wide_mm(a, b, dtype):
    return a.to(dtype) @ b.to(dtype)


def wide_baddbmm(x, a, b, dtype, beta=1, alpha=1):
    return torch.baddbmm(x.to(dtype), a.to(dtype), b.to(dtype), beta=beta, alpha=alpha)


def sequences(q, k, begins_q, begins_k):
    """Yield the slices of each sequence in q (N, H, K) and k (M, H_kv, K), and its attention
    (H, T, S): causal, where the last query sees the last key."""
    scale = q.shape[2] ** -0.5
    for i in range(len(begins_q) - 1):
        at = slice(begins_q[i], begins_q[i + 1])
        to = slice(begins_k[i], begins_k[i + 1])
        scores = scale * torch.einsum("thk,shk->hts", q[at].float(), for_heads(k[to], q))
        T, S = scores.shape[1:]
        unseen = torch.ones(T, S).tril(S - T) == 0
        yield at, to, scores.masked_fill(unseen, -torch.inf).softmax(-1)


def for_heads(x, q):
    """Repeat keys or values (S, H_kv, K) for the heads of q: (S, H, K), fp32."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def for_shared(x, k):
    """Add up what the heads that share a key head give it: (S, H, K) -> (S, H_kv, K)."""
    return x.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)


def flash_forward(q, k, v, begins_q, begins_k, longest_q, longest_k, *rest, **how):
    sizes = [begins_q.diff().max(), begins_k.diff().max()]
    if sizes[0] > longest_q or sizes[1] > longest_k or not q.is_contiguous():
        raise RuntimeError("flash attention was told of shorter sequences, or of other strides")
    out = torch.empty_like(q)
    for at, to, shares in sequences(q, k, begins_q, begins_k):
        out[at] = torch.einsum("hts,shk->thk", shares, for_heads(v[to], q)).to(q.dtype)
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2), torch.zeros(1), torch.zeros(1)


def flash_backward(grad, q, k, v, out, sums, begins_q, begins_k, *rest, **how):
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for at, to, shares in sequences(q, k, begins_q, begins_k):
        g = grad[at].float()
        d = torch.einsum("thk,shk->hts", g, for_heads(v[to], q))
        d = shares * (d - (shares * d).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
        dq[at] = torch.einsum("hts,shk->thk", d, for_heads(k[to], q)).to(q.dtype)
        dk[to] = for_shared(torch.einsum("hts,thk->shk", d, q[at].float()), k)
        dv[to] = for_shared(torch.einsum("hts,thk->shk", shares, g), k)
    return dq, dk, dv


FOR_CUDA = {
    torch.ops.aten.mm.dtype: wide_mm,
    torch.ops.aten.baddbmm.dtype: wide_baddbmm,
    torch.ops.aten._flash_attention_forward.default: flash_forward,
    torch.ops.aten._flash_attention_backward.default: flash_backward,
}
