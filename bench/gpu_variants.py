"""Why bench/gpu.py finds what it finds: which kernels run, and what other ways would take."""

import contextlib
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import sample
from bench.common import line, number, on_gpu, one_line, per_call, timed
from fast.decoder import attend
from model import rms_norm

KINDS = {  # of kernels, by the first pattern that is in their names
    "attention": "fmha|flash|sdpa|attention",
    "products": "gemm|gemv|nvjet|cutlass|splitk|aten::(add)?mm|aten::bmm|aten::baddbmm",
    "softmax, draw": "sort|radix|scan|topk|softmax|searchsorted|histogram|cumsum",
    "copies": "copy|memcpy|memset|fill|cat|index|gather|scatter",
}

# ---- Kernels -------------------------------------------------------------------------------------


def kind_of(name):
    found = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(found, "elementwise, norms")


def kernels(function, device, turns, most):
    """Print where the time of a call goes: by kind of kernel, and the slowest kernels; calls and
    microseconds are those of one of `turns` calls. On the CPU operators are what is counted."""
    gpu = on_gpu(device)
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        timed(lambda: [function() for _ in range(turns)], device)
    spent = []
    for event in found.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device or not gpu:
            us = event.self_device_time_total if gpu else event.self_cpu_time_total
            spent.append((us / turns, event.count / turns, event.key))
    spent.sort(reverse=True)
    total = sum(us for us, _, _ in spent)
    print(f"{sum(n for _, n, _ in spent):.0f} kernels, {total:.0f} us")
    for kind in sorted({kind_of(name) for _, _, name in spent}):
        of_kind = [(us, n) for us, n, name in spent if kind_of(name) == kind]
        us, n = (sum(column) for column in zip(*of_kind, strict=True))
        print(f"  {us:8.0f} us {100 * us / total:4.0f} %  {n:6.0f} calls  {kind}")
    for us, n, name in spent[:most]:
        print(f"  {us:8.0f} us  {n:6.1f} calls  {short(name)}", flush=True)


def short(name):
    """The name of a kernel without what all have in common."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "<unnamed>::", "c10::"):
        name = name.replace(noise, "")
    return name[:100]


@contextlib.contextmanager
def attention_calls(found):
    """Inside, each new kind of call of scaled_dot_product_attention is described in `found`."""
    plain = F.scaled_dot_product_attention

    def seen(q, k, v, *args, **kwargs):
        mask = args[0] if args else kwargs.get("attn_mask")
        how = dict(is_causal=kwargs.get("is_causal", False), scale=kwargs.get("scale"))
        how["enable_gqa"] = kwargs.get("enable_gqa", False)
        grad = q.requires_grad and torch.is_grad_enabled()
        kind = (q.ndim, q.shape[-2] > 1, mask is None, how["is_causal"], grad)
        if kind not in found:
            choice = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, **how)).name
            seen_by = None if mask is None else list(mask.shape)
            shapes = f"q {list(q.shape)}, k {list(k.shape)}, mask {seen_by}"
            found[kind] = f"{choice}: {shapes}, {how}, {grad=}"
        return plain(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = seen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


# ---- Attention of a decoding step ----------------------------------------------------------------


def in_graph(function, device):
    """The function as a graph to replay; on the CPU itself."""
    if not on_gpu(device):
        return function
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def three_dimensional(q, k, v, mask):
    b, heads, n, K = q.shape
    mask = mask[:, 0].repeat_interleave(heads, 0)  # (b H_kv, 1, S)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, v, mask).view(b, heads, n, K)


def by(backend):
    """Four-dimensional attention by one of PyTorch's kernels."""

    def attend(q, k, v, mask):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask)

    return attend


def ours(q, k, v, mask):
    """The decoder's own; its mask is of whole rows, in fp32."""
    b, heads, n, K = q.shape
    mask = mask[:, 0].float().repeat_interleave(heads, 0)  # (b H_kv, 1, S)
    return attend(*(x.flatten(0, 1) for x in (q, k, v)), mask).view(b, heads, n, K)


def split_flash(q, k, v, mask):
    """FlashAttention on a cache (b, S, H_kv, K), which splits a row's keys among multiprocessors
    and needs no mask, so no width; the layout of k and v is made in `attention_variants`."""
    b, heads, n, K = q.shape
    S = k.shape[2]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # a view: (b S, H_kv, K)
    begins = torch.arange(b + 1, device=q.device, dtype=torch.int32)
    used = torch.full((b,), S, device=q.device, dtype=torch.int32)
    flash = torch.ops.aten._flash_attention_forward
    q = q.reshape(b, heads * n, K)
    y = flash(q, k, v, begins, begins * S, 1, S, 0.0, False, False, seqused_k=used)[0]
    return y.view(b, heads, n, K)


VARIANTS = {
    "3-D": three_dimensional,
    "4-D efficient": by(SDPBackend.EFFICIENT_ATTENTION),
    "4-D cuDNN": by(SDPBackend.CUDNN_ATTENTION),
    "ours": ours,
    "split flash": split_flash,
}
ON_CPU = ("3-D", "ours")


def attention_variants(bench):
    """A table: microseconds a layer of a decoding step's attention, replayed, and in brackets the
    TB/s at which it reads keys and values. They are those of layers that no cache of a GPU holds
    together. Four-dimensional queries are (b, H_kv, H / H_kv, K), as the decoder has them."""
    device, config = bench.device, bench.model.config
    heads, K = (config.num_attention_heads, config.num_key_value_heads), config.head_dim
    names = [name for name in VARIANTS if on_gpu(device) or name in ON_CPU]
    line("rows", "columns", *names)
    line(*["---"] * (2 + len(names)))
    failed = {}
    for b, S in bench.size.attention:
        size = 2 * b * S * heads[1] * K * 2
        layers = max(1, min(28, 2**28 // size)) if on_gpu(device) else 1
        cells = []
        for name in names:
            work = (VARIANTS[name], device, b, S, heads, K, layers)
            seconds = tried(name, failed, one_variant, *work)
            cells.append(f"{1e6 * seconds:.0f} ({size / seconds / 1e12:.2f})" if seconds else "-")
        line(b, S, *cells)
    for name, why in failed.items():
        print(f"- {name}: {why}", flush=True)


def tried(name, failed, function, *args):
    """What a call returns; if it fails None, and why goes to `failed` by name."""
    try:
        return function(*args)
    except TimeoutError:
        raise
    except Exception as error:
        failed.setdefault(name, one_line(error))


def one_variant(variant, device, b, S, heads, K, layers):
    """Seconds a layer; ValueError if its states are not those of the plain formula."""
    H, H_kv = heads
    order = (b, S, H_kv, K) if variant is split_flash else (b, H_kv, S, K)
    pairs = [torch.randn(2, *order, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    if variant is split_flash:
        pairs = [pair.transpose(2, 3) for pair in pairs]
    q = torch.randn(b, H_kv, H // H_kv, K, device=device, dtype=torch.bfloat16)
    mask = torch.zeros(b, 1, 1, S, device=device, dtype=torch.bfloat16)
    k, v = pairs[0][0][:2].float(), pairs[0][1][:2].float()
    right = (q[:2].float() @ k.transpose(2, 3) * K**-0.5).softmax(dim=-1) @ v
    apart = (variant(q, *pairs[0], mask)[:2].float() - right).abs().max()
    if not apart < 0.02:
        raise ValueError(f"{float(apart):.3g} apart from the formula")
    run = in_graph(lambda: [variant(q, k, v, mask) for k, v in pairs], device)
    return per_call(run, device) / layers


# ---- The draw ------------------------------------------------------------------------------------


@torch.no_grad()
def draw_variants(bench):
    """A table: microseconds of what follows a decoding step, and of other ways to do it."""
    model, rows = bench.model, bench.size.drawn
    device, W = model.device, model.lm_head.weight
    line("what", *(f"{b} rows, us" for b in rows))
    line(*["---"] * (1 + len(rows)))
    ways = {}
    for b in rows:
        hidden = peaked_states(model, b)
        u = torch.rand(b, device=device, dtype=torch.float64)
        rounded = hidden.to(W.dtype)
        logits = model.logits(hidden).float()
        probs = logits.softmax(dim=-1)
        ways[b] = {
            "draw_next, top_p 0.95": partial(sample.draw_next, model, hidden, u, 1.0, 0.95, 0),
            "draw_next, top_p 1": partial(sample.draw_next, model, hidden, u, 1.0, 1.0, 0),
            "head, model.logits": lambda h=hidden: model.logits(h).float(),
            "head, bf16 then fp32": lambda h=rounded: F.linear(h, W).float(),
            "head, out_dtype": partial(torch.mm, rounded, W.T, out_dtype=torch.float32),
            "log_softmax": partial(torch.log_softmax, logits, dim=-1),
            "top_p_filter": partial(sample.top_p_filter, probs, 0.95),
            "draw, top_p 0.95": partial(sample.sample_token, logits.log_softmax(-1), u, 0.95),
            "topk(1024)": partial(torch.topk, probs, 1024),
            "inverse_cdf": partial(sample.inverse_cdf, probs, u),
            "rms_norm, model.py's": partial(rms_norm, rounded, rounded[0], 1e-6),
            "rms_norm, one kernel": partial(F.rms_norm, rounded, W[0].shape, rounded[0], 1e-6),
        }
    failed = {}
    for name in ways[rows[0]]:
        seconds = [tried(name, failed, per_call, ways[b][name], device) for b in rows]
        line(name, *("-" if x is None else number(1e6 * x) for x in seconds))
    for name, why in failed.items():
        print(f"- {name}: {why}", flush=True)


def peaked_states(model, b):
    """States (b, D) whose logits have a standard deviation of 7, as peaked as a trained model's:
    some 25 tokens have 95 % of the mass."""
    W = model.lm_head.weight
    hidden = torch.randn(b, W.shape[1], device=W.device)
    return hidden * 7 / model.logits(hidden).float().std()
