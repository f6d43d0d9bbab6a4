"""GRPO with token credit: rollouts, advantages, token log-probs, the loss, one update.

What a textbook PPO has and this has not: a value model (the group's mean is the baseline), a model
for reference (the LoRA model's base path is one), ratio and clip while a rollout is used once (what
is trained is what sampled), and by default a KL penalty. What is left is REINFORCE:

    loss = - mean_i (1 / T_i) sum_t  A_i * m_it * log pi(y_it | x, y_i<t)

where m, the credit of credit.py, is all that the methods differ in. Normalisers are those of the
whole step, so that micro-batches add up to the same gradient however they are cut, and every metric
is over all the rollouts of the step, those without a gradient included.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import credit
from eval_math import verify
from lora import adapter_off, lora_parameters
from model import UserError
from sample import Completions, generate

LOGITS = 2**25  # logits in memory at a time: 128 MiB in fp32


@dataclass
class Rollout:
    """The completions of a step and what they earned."""

    problems: list[dict]  # P
    prompts: list[list[int]]  # P lists of token ids
    completions: Completions  # B = P x G rows
    texts: list[str]  # B
    rewards: torch.Tensor  # (P, G)


def rollout(model, tokenizer, problems, s, step) -> Rollout:
    """Sample s.samples completions of each problem and grade them; s: the Settings of train.py."""
    prompts = [p["prompt"] for p in problems]
    sampling = (s.samples, s.max_new_tokens, s.temperature, s.top_p)
    randomness = dict(seed=s.seed, step=step)
    completions = generate(model, prompts, *sampling, eos_ids=tokenizer.eos_ids, **randomness)
    texts = completions.texts(tokenizer)
    golds = [p["answer"] for p in problems for _ in range(s.samples)]
    rewards = [float(verify(text, gold)) for text, gold in zip(texts, golds, strict=True)]
    rewards = torch.tensor(rewards).view(len(prompts), s.samples)
    return Rollout(problems, prompts, completions, texts, rewards)


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

    The head runs on a chunk of tokens at a time, under a checkpoint: its (chunk, V) logits are made
    again in the backward pass instead of kept. (A loop over chunks without the checkpoint keeps
    every chunk's logits for backward, and saves nothing.) The entropy carries no gradient.
    """

    def head(h, y):
        logits = model.logits(h).float() / temperature  # (chunk, V)
        logps = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(dim=-1)
        return logps.gather(-1, y[:, None])[:, 0], entropy

    chunk = chunk or max(1, LOGITS // model.config.vocab_size)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [checkpoint(head, h, y, use_reentrant=False) for h, y in pairs]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


@dataclass
class Batch:
    """Some rows of a rollout, right-padded, as one forward pass needs them."""

    ids: torch.Tensor  # (b, L) prompt, completion, padding
    at: torch.Tensor  # (b, T) position of the state that predicts completion token t
    targets: torch.Tensor  # (b, T) completion tokens
    mask: torch.Tensor  # (b, T) bool, True on completion tokens; from lengths, never from ids
    sampled_logps: torch.Tensor  # (b, T) what the sampler said


def make_batch(r: Rollout, rows, device) -> Batch:
    """The given rows of a rollout as a Batch on the device."""
    c, G, lengths = r.completions, r.rewards.shape[1], r.completions.lengths[rows]  # (b,)
    T = int(lengths.max())
    prompts = [r.prompts[row // G] for row in rows.tolist()]
    starts = torch.tensor([len(p) for p in prompts])[:, None]  # (b, 1) where the completion starts
    columns = torch.arange(T)
    mask = columns < lengths[:, None]
    # The last token predicts nothing that was drawn, so it need not be read: ids stop before it.
    ends = [c.tokens[row, : n - 1] for row, n in zip(rows, lengths, strict=True)]
    both = [torch.cat([torch.tensor(p), end]) for p, end in zip(prompts, ends, strict=True)]
    ids = pad_sequence(both, batch_first=True)
    at = (starts - 1 + columns).clamp(max=ids.shape[1] - 1)
    fields = (ids, at, c.tokens[rows, :T], mask, c.logps[rows, :T])
    return Batch(*(field.to(device) for field in fields))


def predicting_states(model, b: Batch):
    """The hidden states that predict the completion tokens, (b, T, D)."""
    hidden = model(b.ids)  # (b, L, D)
    return hidden.gather(1, b.at[:, :, None].expand(-1, -1, hidden.shape[-1]))


def on_tokens(model, b: Batch, states, temperature):
    """Log-prob and entropy at the completion tokens: two (b, T), 0 on padding."""
    logps, entropies = token_logps(model, states[b.mask], b.targets[b.mask], temperature)
    zeros = torch.zeros(b.mask.shape, device=logps.device)
    return zeros.masked_scatter(b.mask, logps), zeros.masked_scatter(b.mask, entropies)


def signals(model, b: Batch, wanted, temperature):
    """The log-probs (b, T) with their gradient, and what credit rules may know of these tokens.

    The adapted states are those of the training pass itself. The base ones come from one more pass,
    under adapter_off: same tokens, same shapes, same kernels, so that B = 0 gives exactly 0 and no
    rounding passes for credit.
    """
    states = predicting_states(model, b)  # (b, T, D)
    logps, entropy = on_tokens(model, b, states, temperature)
    known = credit.Signals(b.mask, logps.detach(), entropy)
    if {"residual", "ref_logp"} & wanted:
        with torch.no_grad(), adapter_off(model):
            base = predicting_states(model, b)
            if "ref_logp" in wanted:
                known.ref_logp, _ = on_tokens(model, b, base, temperature)
            if "residual" in wanted:  # ARCA's: how far the adapter moves the predicting state
                known.residual = (states - base).norm(dim=-1) * b.mask  # ||h_adapted - h_base||_2
    return logps, known


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


def micro_batches(r: Rollout, chosen, budget):
    """The chosen rows (B,) of a rollout, in groups of like length of at most `budget` tokens."""
    G, lengths = r.rewards.shape[1], r.completions.lengths.tolist()
    size = {row: len(r.prompts[row // G]) + lengths[row] for row in chosen.nonzero()[:, 0].tolist()}
    groups = []
    for row in sorted(size, key=size.get):  # so the newest row of a group is its longest
        if not groups or size[row] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(row)
    return [torch.tensor(group) for group in groups]


def clip_gradients(parameters, limit):
    """Scale the gradients so that their joint L2 norm is at most `limit`; returns what it was."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad.mul_((limit / norm).clamp(max=1))
    return norm.item()


def add_gradient(model, r: Rollout, rows, advantages, per_row, s, wanted):
    """Add the gradient of these rows' share of the step's loss; returns that share and the signals.

    per_row (B,) is what each token of a row counts. Rows that have no gradient are only measured.
    """
    b = make_batch(r, rows, model.device)
    learn = s.kl > 0 or bool((advantages[rows] != 0).any())
    with torch.set_grad_enabled(learn):
        logps, known = signals(model, b, wanted, s.temperature)
        m = credit.token_weights(s.credit, known, s.sharpening)  # (b, T)
        token_advantages = advantages[rows, None].to(m.device) * m
        old_logps = b.sampled_logps if s.updates > 1 else None
        gain = policy_objective(logps, token_advantages, old_logps, s.clip_low, s.clip_high)
        if s.kl > 0:
            gain = gain - s.kl * kl_k3(logps, known.ref_logp)
        loss = -(gain * b.mask * per_row[rows, None].to(m.device)).sum()
    if learn:
        loss.backward()
    return loss.item(), known


def merge(known: credit.Signals, rows, part: credit.Signals):
    """Put the signals of some rows where they belong among those of the whole step, on the CPU."""
    for name, value in vars(part).items():
        if value is not None:
            if getattr(known, name) is None:
                setattr(known, name, torch.zeros(known.mask.shape))
            getattr(known, name)[rows, : value.shape[1]] = value.cpu()


def measure(r: Rollout, known: credit.Signals, m, s):
    """The metrics of a step, over all its completions; known and m are those of the whole step."""
    mask, rewards, c = known.mask, r.rewards, r.completions
    mixed = has_spread(rewards)
    gap = (known.logp - c.logps).abs()[mask]
    metrics = dict(
        reward=rewards.mean(),
        entropy=known.entropy[mask].mean(),
        completion_tokens=c.lengths.sum(),
        truncated=(~c.finished).float().mean(),
        groups_mixed=mixed.sum(),
        groups_all_right=(~mixed & (rewards[:, 0] > 0)).sum(),
        groups_all_wrong=(~mixed & (rewards[:, 0] <= 0)).sum(),
        gini=credit.gini(m, mask).mean(),
        effective_token_ratio=credit.effective_token_ratio(m, mask).mean(),
        credit_fallback=credit.scores(s.credit, known)[1].float().mean(),
        logp_mismatch=gap.max(),
        logp_mismatch_mean=gap.mean(),
    )
    if s.kl > 0:
        metrics["kl"] = kl_k3(known.logp, known.ref_logp)[mask].mean()
    for method, p in itertools.product(credit.METHODS, (1, 2) if s.compare_rules else ()):
        other = credit.token_weights(method, known, p)
        metrics[f"gini/{method}/{p}"] = credit.gini(other, mask).mean()
        ratio = credit.effective_token_ratio(other, mask)
        metrics[f"effective_token_ratio/{method}/{p}"] = ratio.mean()
    return {name: value.item() for name, value in metrics.items()}


def update(model, optimizer, r: Rollout, advantages, s):
    """Train s.updates times on a rollout, advantages (B,); returns metrics, multipliers (B, T).

    A gradient that is not finite leaves the parameters as they are (`skipped` is then 1).
    """
    parameters, lengths = list(lora_parameters(model).values()), r.completions.lengths
    wanted = set(credit.needs(s.credit)) | ({"ref_logp"} if s.kl > 0 else set())
    if s.compare_rules:
        wanted |= {name for method in credit.METHODS for name in credit.needs(method)}
    # The normalisers of the whole step: a completion counts 1 / B, or a token 1 / all tokens.
    seq, token = 1 / (len(lengths) * lengths), torch.ones(len(lengths)) / lengths.sum()
    per_row = seq if s.aggregate == "seq" else token
    known = credit.Signals(torch.zeros(r.completions.tokens.shape, dtype=torch.bool))
    metrics = dict(loss=0.0, grad_norm=0.0, skipped=0)
    for turn in range(s.updates):
        idle = (advantages == 0) & (s.kl == 0)  # groups without spread: no gradient, so no backward
        batches = micro_batches(r, ~idle, s.micro_tokens)
        if turn == 0:  # the metrics are those of the policy that sampled
            batches += micro_batches(r, idle, s.micro_tokens)
        for rows in batches:
            loss, part = add_gradient(model, r, rows, advantages, per_row, s, wanted)
            if turn == 0:
                metrics["loss"] += loss
                merge(known, rows, part)
        if not idle.all():
            metrics["grad_norm"] = clip_gradients(parameters, s.grad_clip)
            if math.isfinite(metrics["grad_norm"]) and math.isfinite(metrics["loss"]):
                optimizer.step()
            else:
                metrics["skipped"] = 1
            optimizer.zero_grad(set_to_none=True)
    m = credit.token_weights(s.credit, known, s.sharpening)
    return metrics | measure(r, known, m, s), m
