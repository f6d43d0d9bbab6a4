"""Whether a GPU computes what the CPU does: the first block of bench/gpu.py."""

import contextlib
import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import grpo
from bench import common
from bench.common import line, settings
from bench.ours import half_right
from data.problems import TINY, add_prompts, load_problems
from fast.decoder import kept_decoder
from hf.checkpoint import load_model, load_tokenizer, random_model
from lora import add_lora, lora_parameters
from run.metrics import measure
from sample import draw_next, generate

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)

# ---- The embedded model, here and there ----------------------------------------------------------


def tiny(device, dtype, adapter=True):
    """The embedded model, with an adapter that does something or with B = 0."""
    model = load_model(TINY, device, DTYPES[dtype])
    return common.adapted(model) if adapter else add_lora(model, 16, 32.0)


def logits_apart(device, problems):
    """Between CPU and device in fp32: the largest difference of a logit at all prompts."""
    apart = []
    here, there = tiny("cpu", "fp32"), tiny(device, "fp32")
    with torch.no_grad():
        for p in problems:
            ids = torch.tensor([p["prompt"]])
            a, b = here.logits(here(ids)), there.logits(there(ids.to(device)))
            apart.append((a - b.cpu()).abs().max())
    return float(max(apart))


def step_of(model, rollout, cfg):
    """An update of plain SGD: metrics, the signals of the step, and how the parameters moved."""
    parameters = list(lora_parameters(model).values())
    before = torch.cat([p.detach().flatten().cpu() for p in parameters])
    rollout, advantages = half_right(copy.copy(rollout))
    sgd = torch.optim.SGD(parameters, lr=1.0)
    metrics, signals, _ = grpo.update(model, sgd, rollout, advantages, cfg)
    metrics |= measure(rollout, signals)
    after = torch.cat([p.detach().flatten().cpu() for p in parameters])
    return metrics, signals, after - before


def same_alone(device, dtype, problems, cfg):
    """The share of completions that are the same tokens when each prompt is sampled alone, and
    whether sampling twice gives the same bytes."""
    model, prompts, G = tiny(device, dtype), [p["prompt"] for p in problems], cfg.samples
    how = dict(n=G, max_new_tokens=cfg.max_new_tokens, eos_ids=load_tokenizer(TINY).eos_ids, seed=1)
    together, again = (generate(model, prompts, **how) for _ in range(2))
    texts, same = rows(together), []
    for i, prompt in enumerate(prompts):
        part = rows(generate(model, [prompt], **how))
        same += [a == b for a, b in zip(texts[G * i : G * i + G], part, strict=True)]
    twice = torch.equal(together.tokens, again.tokens) and torch.equal(together.logps, again.logps)
    return sum(same) / len(same), twice


def rows(c):
    """The tokens of each completion as a list."""
    return [tokens[:n] for tokens, n in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True)]


def replay_apart(device, dtype):
    """How many numbers differ between decoding steps and the same steps computed without a graph,
    states and cache: rows of random lengths, of which some end halfway."""
    model = tiny(device, dtype)
    decoder = kept_decoder(model, 8, 256)
    cache, apart = decoder.cache, 0
    torch.manual_seed(0)
    cache.k.normal_()
    cache.v.normal_()
    cache.lengths.copy_(torch.randint(1, 200, (8,)))
    cache.filled = int(cache.lengths.max())
    b = 8
    for turn in range(8):
        if turn == 4:
            b = 5
            cache.keep_rows(torch.tensor([0, 2, 3, 5, 7], device=device))
        tokens = torch.randint(0, model.config.vocab_size, (b,)).to(device)
        kept = [x.clone() for x in (cache.k, cache.v, cache.lengths)]
        filled = cache.filled
        states = decoder.step(tokens)
        left = [x.clone() for x in (cache.k, cache.v, cache.lengths)]
        # Back to before the step, and the same without a graph; it has a row for all that one has.
        for x, before in zip((cache.k, cache.v, cache.lengths), kept, strict=True):
            x.copy_(before)
        cache.filled = filled
        padded = F.pad(tokens, (0, 8 - b)) if decoder.captures else tokens
        eager = decoder.compute(padded)[:b]
        pairs = [(states, eager), *zip(left, (cache.k, cache.v, cache.lengths), strict=True)]
        apart += sum(int((x != y).sum()) for x, y in pairs)
    return apart


def parity_of(device, dtype, problems, worst):
    """Checks (what, found, at most) of one dtype; worst: of logp_mismatch."""
    cfg = settings(samples=4, max_new_tokens=32, credit="arca")
    model, tokenizer = tiny(device, dtype), load_tokenizer(TINY)
    rollout = grpo.sample_rollout(model, tokenizer, problems, cfg, 1)
    metrics, _, there = step_of(model, rollout, cfg)
    checks = [("logp_mismatch, largest", metrics["logp_mismatch"], worst)]
    checks += [("logp_mismatch, mean", metrics["logp_mismatch_mean"], worst / 20)]
    _, signals, _ = step_of(tiny(device, dtype, adapter=False), rollout, cfg)
    checks += [("residual at B = 0", float(signals.residual.abs().max()), 0.0)]
    checks += [("replayed step, numbers that differ", replay_apart(device, dtype), 0.0)]
    alone, twice = same_alone(device, dtype, problems, cfg)
    checks += [("sampled twice, bytes that differ", 1 - twice, 0.0)]
    # In bf16 a batch of another shape rounds otherwise, and a token turns: only reported.
    checks += [("completions that change when alone", 1 - alone, 0.05 if dtype == "fp32" else 1)]
    if dtype == "fp32":
        here = step_of(tiny("cpu", dtype), rollout, cfg)[2]
        apart = float((there - here).norm() / here.norm())
        checks += [("gradient, CPU and device, relative", apart, 1e-3)]
        checks += [("logits, CPU and device", logits_apart(device, problems), 1e-3)]
    return checks


# ---- Other shapes --------------------------------------------------------------------------------


def wide_residual(device, rollout):
    """The largest residual at B = 0 of a model with heads of 128: other kernels than 32 take."""
    model = add_lora(random_model(common.config_of("small"), device, torch.bfloat16), 4, 8.0)
    _, signals, _ = step_of(model, rollout, settings(credit="arca"))
    return float(signals.residual.abs().max())


def logp_errors(device, shape):
    """The mean error of a log-prob in bf16, of the sampler and of the trainer, against float64: at
    logits as peaked as a trained model's."""
    config = replace(common.config_of(shape), num_hidden_layers=0)
    model = random_model(config, device, torch.bfloat16)
    model.lm_head.weight.normal_(std=4.5 / math.sqrt(config.hidden_size))
    hidden = torch.randn(64, config.hidden_size, device=device)
    u = torch.rand(64, device=device, dtype=torch.float64)
    with torch.no_grad():
        tokens, sampled = draw_next(model, hidden, u, 1.0, 1.0, 0)
        trained, _ = grpo.token_logps(model, hidden, tokens)
        exact = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(dim=-1)
    sampled, exact = (x.gather(1, tokens[:, None])[:, 0] for x in (sampled, exact))
    return [float((logps - exact).abs().mean()) for logps in (sampled, trained)]


def nans_of_cudnn(device):
    """How many gradients are not finite where cuDNN's attention fails (pytorch #196678): a mask,
    704 columns, and scores of -120. As the project has it, and with cuDNN alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 704, 64, device=device).bfloat16() for _ in range(3))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    mask = torch.ones(704, 704, dtype=torch.bool, device=device).tril()[None, None]
    for x in (q, k, v):
        x.requires_grad_()
    found = []
    ways = [contextlib.nullcontext(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION)]
    for way in ways if common.on_gpu(device) else ways[:1]:
        q.grad = None
        with way:
            y = F.scaled_dot_product_attention(q, k, v, mask)
            y.backward(torch.randn_like(y))
        found.append(int((~q.grad.isfinite()).sum()))
    return found


def checks_of(device, shape, prompts):
    """All checks: (dtype, what, found, at most). The most important ones come first."""
    tokenizer = load_tokenizer(TINY)
    problems = [add_prompts(p, tokenizer) for p in load_problems("tiny")[:prompts]]
    for dtype, worst in (("fp32", 1e-4), ("bf16", 1.0)):
        for check in parity_of(device, dtype, problems, worst):
            yield dtype, *check
    cfg = settings(samples=4, max_new_tokens=32)
    rollout = grpo.sample_rollout(tiny(device, "bf16"), tokenizer, problems[:2], cfg, 1)
    yield "bf16", "residual at B = 0, heads of 128", wide_residual(device, rollout), 0.0
    for who, error in zip(("sampler", "trainer"), logp_errors(device, shape), strict=True):
        yield "bf16", f"log-prob against float64, {who}, mean", error, 0.01
    for way, nans in zip(("our settings", "cuDNN alone"), nans_of_cudnn(device), strict=False):
        most = math.inf if "alone" in way else 0
        yield "bf16", f"NaN in the gradient of attention, {way}", nans, most


def right(bench):
    """A table of what must hold on the device; AssertionError names what does not."""
    device = bench.model.device  # to load it chooses which kernels of attention may be used
    line("dtype", "check", "found", "at most", "holds")
    line(*["---"] * 5)
    broken = []
    for dtype, what, found, most in checks_of(device, bench.size.shape, bench.size.checked):
        line(dtype, what, f"{found:.3g}", f"{most:.3g}", "yes" if found <= most else "NO")
        if not found <= most:
            broken.append(f"{what} ({dtype})")
    bench.found("checks that do not hold", len(broken), "; ".join(broken))
    assert not broken, "; ".join(broken)
