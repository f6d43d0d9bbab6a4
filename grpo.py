"""GRPO with token credit: rollouts, advantages, token log-probs, the loss, one update.

What a textbook PPO has and this has not: a value model (the group's mean is the baseline), a model
for reference (the LoRA model's base path is one), ratio and clip while a rollout is used once (what
is trained is what sampled), and by default a KL penalty. What is left is REINFORCE:

    loss = - mean_i (1 / T_i) sum_t  A_i * m_it * log pi(y_it | x, y_i<t)

where m, the credit of credit.py, is all that the methods differ in. Normalisers are those of the
whole step, so that micro-batches add up to the same gradient however they are cut, and every metric
is over all the rollouts of the step, those without a gradient included.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import credit
from eval_math import verify
from fast.packing import Batch, make_batch, micro_batches, padding
from lora import adapter_off, lora_parameters
from run.metrics import diagnose, measure, step_classes
from sample import Completions, entropy, generate, uniforms
from system import processes
from system.errors import UserError, out_of_memory

LOGITS = 2**25  # logits in memory at a time: 128 MiB in fp32


@dataclass
class Rollout:
    """The completions of a step and what they earned."""

    problems: list[dict]  # P, each with the token ids of its `prompt`, and of its `negative` one
    completions: Completions  # B = P x G rows
    texts: list[str]  # B
    rewards: torch.Tensor  # (P, G)
    classes: torch.Tensor | None = None  # (B, T) the class of each token: plumbing/diagnostics.py
    noise: torch.Tensor | None = None  # (B, T) uniforms for the controls
    seconds_verify: float = 0.0  # what the grading took


def wanted_signals(s, compare=False) -> set[str]:
    """The signals that the rule of these Settings reads, or with compare that any rule does."""
    rules = credit.METHODS if compare else (s.credit,)
    wanted = {name for rule in rules for name in credit.needs(rule)}
    return wanted | {"ref_logp"} if s.kl > 0 else wanted


def rollout(model, tokenizer, problems, s, step, compare=False) -> Rollout:
    """Sample s.samples completions of each problem and grade them; s: the Settings of train.py.

    The sampler also keeps what rules that see the whole step read of it: they come before any pass.
    """
    wanted, whole = wanted_signals(s, compare), credit.METHODS[s.credit][2] is credit.STEP
    keep = wanted & ({"entropy", "hidden"} if whole else {"hidden"})  # else entropy is of the pass
    prompts, G = [p["prompt"] for p in problems], s.samples
    sampling = (G, s.max_new_tokens, s.temperature, s.top_p)
    randomness = dict(seed=s.seed, step=step)
    stop = tokenizer.eos_ids
    c = generate(model, prompts, *sampling, eos_ids=stop, keep=keep, **randomness)
    texts = c.texts(tokenizer)
    golds, started = [p["answer"] for p in problems for _ in range(G)], time.perf_counter()
    rewards = [float(verify(text, gold)) for text, gold in zip(texts, golds, strict=True)]
    rewards = torch.tensor(rewards).view(len(prompts), G)
    T = c.tokens.shape[1]
    seconds = time.perf_counter() - started
    r = Rollout(problems, c, texts, rewards, step_classes(c, tokenizer), seconds_verify=seconds)
    if "noise" in wanted:  # streams of their own: those of samples -1, -2, ..., else unused
        noise = [uniforms(s.seed, step, p, -1 - i, T) for p in prompts for i in range(G)]
        r.noise = torch.from_numpy(np.stack(noise))
    return r


# ---- Advantages ----------------------------------------------------------------------------------


def has_spread(rewards):
    """rewards (P, G) -> (P,): whether a group's rewards differ; if not, it teaches nothing."""
    return (rewards != rewards[:, :1]).any(dim=1)


def group_advantages(rewards, kind="grpo"):
    """rewards (P, G) -> advantages (P, G), each completion against its group.

    grpo: (r - mean) / std with the unbiased std (arXiv 2402.03300, section 4.1.2); rloo: r - mean
    of the others (arXiv 2402.14740); centered: r - mean (Dr. GRPO, arXiv 2503.20783). A group whose
    rewards are all equal says nothing: its advantages are exactly 0.
    """
    G = rewards.shape[1]
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if kind == "grpo":
        advantages = centered / rewards.std(dim=1, keepdim=True).clamp(min=1e-8)
    elif kind == "rloo":
        advantages = centered * G / (G - 1)
    elif kind == "centered":
        advantages = centered
    else:
        raise UserError(f"no advantage {kind!r}: use one of grpo, rloo, centered")
    return torch.where(has_spread(rewards)[:, None], advantages, 0.0)


# ---- Token log-probs -----------------------------------------------------------------------------


def token_logps(model, hidden, targets, temperature=1.0, chunk=None):
    """hidden (N, D), targets (N,) -> log pi(target) (N,), and the entropy of pi (N,), fp32 nats.

    The head runs on a chunk of tokens at a time; of several, the (chunk, V) logits are made again
    in the backward pass instead of kept. (A loop over chunks without the checkpoint keeps every
    chunk's logits for backward, and saves nothing.) The entropy carries no gradient.
    """

    def head(h, y):
        logits = model.logits(h).float() / temperature  # (chunk, V)
        logps = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            uncertainty = entropy(logps)
        return logps.gather(-1, y[:, None])[:, 0], uncertainty

    chunk = chunk or max(1, LOGITS // model.config.vocab_size)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    keeps = head if len(targets) <= chunk else partial(checkpoint, head, use_reentrant=False)
    parts = [keeps(h, y) for h, y in pairs]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def predicting_states(model, b: Batch, layer="final"):
    """The states that predict the completion tokens (b, T, D), and a list of those that ARCA
    compares: after the final norm (`final`), before it (`prenorm`) or after each block (`sum`).

    A prompt is read once for all its completions; its last state predicts their first tokens.
    """
    blocks = [] if layer != "final" else None
    hidden = model(b.ids, b.packed, blocks)  # (1, N, D)

    def at_targets(x):  # (1, N, D) -> (b, T, D)
        return x[0].index_select(0, b.before.flatten()).unflatten(0, b.before.shape)

    states = at_targets(hidden)
    if layer == "final":
        return states, [states.detach()]
    compared = [at_targets(x).detach().float() for x in blocks]
    return states, compared if layer == "sum" else compared[-1:]


def on_tokens(model, b: Batch, states, temperature):
    """Log-prob and entropy at the completion tokens: two (b, T), 0 on padding."""
    logps, entropies = token_logps(model, states[b.mask], b.targets[b.mask], temperature)
    zeros = torch.zeros(b.mask.shape, device=logps.device)
    return zeros.masked_scatter(b.mask, logps), zeros.masked_scatter(b.mask, entropies)


def signals(model, r: Rollout, rows, wanted, s):
    """The Batch of these rows, their log-probs (b, T) with the gradient, and a dict of the wanted
    signals that the model knows.

    The adapted states are those of the training pass itself. The base ones come from one more pass,
    under adapter_off: same tokens, same shapes, same kernels, so that B = 0 gives exactly 0 and no
    rounding passes for credit.
    """
    b = make_batch(r, rows, model.device)
    states, adapted = predicting_states(model, b, s.arca_layer)  # (b, T, D)
    logps, uncertainty = on_tokens(model, b, states, s.temperature)
    found = dict(logp=logps.detach(), entropy=uncertainty)
    if {"residual", "ref_logp"} & wanted:
        with torch.no_grad(), adapter_off(model):
            states, base = predicting_states(model, b, s.arca_layer)
            if "ref_logp" in wanted:
                found["ref_logp"], _ = on_tokens(model, b, states, s.temperature)
            if "residual" in wanted:  # ARCA's: how far the adapter moves the predicting state
                gaps = [(x - y).norm(dim=-1) for x, y in zip(adapted, base, strict=True)]
                found["residual"] = sum(gaps) * b.mask  # ||h_adapted - h_base||_2
    if "neg_logp" in wanted:
        with torch.no_grad():
            other = make_batch(r, rows, model.device, "negative")
            states, _ = predicting_states(model, other)
            found["neg_logp"], _ = on_tokens(model, other, states, s.temperature)
    return b, logps, found


# ---- The loss and the update ---------------------------------------------------------------------


def policy_objective(logps, advantages, old_logps=None, clip_low=0.2, clip_high=0.28):
    """What a token adds to the objective that is maximised, elementwise.

    Without old log-probs A log pi, whose gradient is the policy gradient. With them PPO's min(ratio
    A, clip(ratio, 1 - low, 1 + high) A) (arXiv 1707.06347, eq. 7; two bounds: arXiv 2503.14476).
    """
    if old_logps is None:
        return advantages * logps
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def kl_k3(logps, ref_logps):
    """Schulman's k3 of KL(pi || ref) at samples of pi: r - 1 - log r with r = ref / pi. As a loss
    its expected gradient is that of KL(ref || pi); GRPO's paper uses it so (arXiv 2402.03300)."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def clip_gradients(parameters, limit):
    """Scale the gradients so that their joint L2 norm is at most `limit`; returns what it was."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad.mul_((limit / norm).clamp(max=1))
    return norm.item()


def given_signals(r: Rollout, advantages) -> credit.Signals:
    """The signals of a step (B, T) that need no pass: what the sampler saw, and what follows."""
    c = r.completions
    mask = torch.arange(c.tokens.shape[1]) < c.lengths[:, None]
    group = torch.arange(len(mask)) // r.rewards.shape[1]
    known = credit.Signals(mask, c.logps, c.entropy, hidden=c.hidden, noise=r.noise)
    return replace(known, advantage=advantages, group=group)


def at_rows(known: credit.Signals, rows, b: Batch, names) -> credit.Signals:
    """The named signals of some rows of the step, on the batch's device and of its width."""
    here = {name: getattr(known, name)[rows] for name in names if getattr(known, name) is not None}
    here = {n: x[:, : b.mask.shape[1]] if x.ndim > 1 else x for n, x in here.items()}
    return credit.Signals(b.mask, **{name: x.to(b.mask.device) for name, x in here.items()})


def add_gradient(model, r: Rollout, rows, known, m, per_row, s, wanted):
    """Add the gradient of these rows' share of the step's loss; returns that share and what became
    known of their tokens.

    known holds the signals of the whole step that need no pass, and m (B, T) the multipliers if the
    rule needs no others, else None. per_row (B,) is what each token of a row counts.
    """
    b, logps, found = signals(model, r, rows, wanted, s)
    here = at_rows(known, rows, b, {"advantage", *(credit.needs(s.credit) if m is None else ())})
    if m is None:
        m = credit.token_weights(s.credit, replace(here, **found), s.sharpening)  # (b, T)
    else:
        m = m[rows, : b.mask.shape[1]].to(b.mask.device)
    old_logps = b.sampled_logps if s.updates > 1 else None
    token_advantages = here.advantage[:, None] * m
    gain = policy_objective(logps, token_advantages, old_logps, s.clip_low, s.clip_high)
    if s.kl > 0:
        gain = gain - s.kl * kl_k3(logps, found["ref_logp"])
    loss = -(gain * b.mask * per_row[rows, None].to(m.device)).sum()
    loss.backward()
    return loss.item(), found


def to_be_found(known, wanted):
    """By name, the signals that passes tell of, as yet 0 (B, T)."""
    names = {"logp", "entropy"} | wanted & {"ref_logp", "residual", "neg_logp"}
    return {name: torch.zeros(known.mask.shape) for name in sorted(names)}


def go_over(model, r: Rollout, groups, learn, known, m, per_row, s, wanted, found):
    """Note in `found` (B, T) what passes over these micro-batches tell of their tokens, and if they
    are to learn add their gradient; returns their share of the loss.

    If memory runs out, all of it is done again with each micro-batch in two, which changes nothing.
    """
    loss = 0.0
    try:
        for rows in groups:
            if learn:
                part_loss, part = add_gradient(model, r, rows, known, m, per_row, s, wanted)
                loss += part_loss
            else:
                with torch.no_grad():
                    _, _, part = signals(model, r, rows, wanted, s)
            for name in found:
                found[name][rows, : part[name].shape[1]] = part[name].cpu()
        return loss
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or all(len(rows) == 1 for rows in groups):
            raise
    model.zero_grad(set_to_none=True)
    s.micro_tokens = max(1, s.micro_tokens // 2)
    tqdm.write(f"out of memory: once more, and from now on with --micro-tokens {s.micro_tokens}")
    halves = [half for rows in groups for half in rows.chunk(2)]
    return go_over(model, r, halves, learn, known, m, per_row, s, wanted, found)


def update(model, optimizer, r: Rollout, advantages, s, compare=False):
    """Train s.updates times on a rollout, advantages (B,); returns the metrics, the signals of the
    step and its multipliers (B, T).

    A gradient that is not finite leaves the parameters as they are (`skipped` is then 1). With
    compare the signals that any rule reads are computed, and the rules are compared.
    """
    parameters, lengths = list(lora_parameters(model).values()), r.completions.lengths
    wanted = wanted_signals(s, compare)
    # The normalisers of the whole step: a completion counts 1 / B, or a token 1 / all tokens.
    seq, token = 1 / (len(lengths) * lengths), torch.ones(len(lengths)) / lengths.sum()
    per_row = seq if s.aggregate == "seq" else token
    known, m = given_signals(r, advantages), None
    if credit.METHODS[s.credit][2] is credit.STEP:  # from what the sampler saw, before any pass
        m = credit.token_weights(s.credit, known, s.sharpening)
    found = to_be_found(known, wanted)
    metrics, learns = dict(loss=0.0, grad_norm=0.0, skipped=0), (advantages != 0) | (s.kl > 0)
    s.micro_tokens = processes.least(s.micro_tokens)  # another process may have run out of memory
    groups = [micro_batches(r, chosen, s.micro_tokens) for chosen in (learns, ~learns)]
    learning, only_measured = (group[processes.rank() :: processes.world()] for group in groups)
    rest = (known, m, per_row, s, wanted)
    go_over(model, r, only_measured, False, *rest, found)
    for turn in range(s.updates if learns.any() else 0):
        # The metrics are those of the policy that sampled: of the first turn.
        loss = torch.tensor([go_over(model, r, learning, True, *rest, {} if turn else found)])
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # no rows for this process
        processes.add_up([p.grad for p in parameters])
        processes.add_up([loss])
        metrics["loss"] = metrics["loss"] if turn else loss.item()
        metrics["grad_norm"] = clip_gradients(parameters, s.grad_clip)
        if math.isfinite(metrics["grad_norm"]) and math.isfinite(metrics["loss"]):
            optimizer.step()
        else:
            metrics["skipped"] = 1
        optimizer.zero_grad(set_to_none=True)
    processes.add_up(list(found.values()))
    known = replace(known, **found)
    if m is None:
        m = credit.token_weights(s.credit, known, s.sharpening)
    if s.kl > 0:
        metrics["kl"] = kl_k3(known.logp, known.ref_logp)[known.mask].mean().item()
    metrics |= measure(r, known, has_spread(r.rewards)) | diagnose(r, known, m, per_row, s, compare)
    metrics["padding"] = padding(r, groups[0] + groups[1])
    return metrics, known, m
