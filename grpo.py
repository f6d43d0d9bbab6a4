"""Train by GRPO with token credit: rollouts, advantages, token log-probs, the loss, one update.

Four parts of PPO are gone: the value model (the group's mean is the baseline), the reference model
(the base path is one), ratio and clip (unless a rollout is used more than once), and by default the
KL penalty. What is left is REINFORCE:

    loss = - mean_i (1 / T_i) sum_t  A_i * m_it * log pi(y_it | x, y_i<t)

where only m, the multipliers of credit.py, differs between rules. Normalisers are those of
the whole step, so micro-batches add up to the same gradient however they are cut. Read `update`
first: it is the whole method, in order.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import credit
from data.problems import add_prompts
from eval_math import verify
from lora import adapter_off, lora_parameters
from sample import Completions, entropy, generate, number_samples, uniforms
from system import processes
from system.errors import UserError

try:
    import fast.packing as fast
except ModuleNotFoundError:
    fast = None  # one can delete fast/: it gives the same numbers in less time

MAX_LOGITS = 2**25  # logits in memory at a time: 128 MiB in fp32,
MAX_LOGITS_GPU = 2**28  # and 1 GiB
MAX_KEPT = 2**30  # numbers of `hidden` that are kept only to compare rules: 4 GiB
ADVANTAGES = ("grpo", "rloo", "centered")


# ---- Rollouts ------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """The completions of a step and what they earned."""

    problems: list[dict]  # P, each with the token ids of its `prompt` and its `negative` prompt
    completions: Completions  # B = P x G rows, a problem's G samples side by side
    texts: list[str]  # B
    rewards: torch.Tensor  # (P, G)
    noise: torch.Tensor | None = None  # (B, T) uniforms for the controls


def reward(text: str, problem: dict) -> float:
    """Return what a completion earns, from 0 to 1. Make it yours: evaluations go on by `verify`."""
    return float(verify(text, problem["answer"]))


def needed_signals(cfg, compare=False) -> set[str]:
    """Return the signals that the rule in cfg reads, or with compare that any rule reads."""
    rules = credit.METHODS.values() if compare else [credit.METHODS[cfg.credit]]
    needed = {name for rule in rules for name in rule.reads}
    return needed | {"ref_logp"} if cfg.kl_coef > 0 else needed


def sample_rollout(model, tokenizer, problems, cfg, step, compare=False) -> Rollout:
    """Sample cfg.samples completions of each problem and reward them; cfg: Settings of train.py."""
    P, G = len(problems), cfg.samples
    prompts = [add_prompts(problem, tokenizer)["prompt"] for problem in problems]
    needed = needed_signals(cfg, compare)
    # A rule that must see the whole step reads what the sampler saw, since no pass sees all of it.
    rule = credit.METHODS[cfg.credit]
    from_sampler = {"hidden", "entropy"} if rule.whole_step else {"hidden"}
    size = P * G * cfg.max_new_tokens * model.config.hidden_size
    if size > MAX_KEPT and "hidden" not in rule.reads:
        from_sampler -= {"hidden"}  # then the rules that read it are not compared

    # 1) Sample. Each process writes the completions of its share of the prompts.
    mine = processes.share(range(P))
    limits = (cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    keyed = dict(eos_ids=tokenizer.eos_ids, seed=cfg.seed, step=step, keep=needed & from_sampler)
    own = generate(model, prompts, G, *limits, **keyed, only=mine)
    completions = processes.gather(own, [i * G + j for i in mine for j in range(G)], P * G)

    # 2) Reward.
    texts = completions.texts(tokenizer)
    rewards = [float(reward(text, problems[i // G])) for i, text in enumerate(texts)]
    odd = [x for x in rewards if not 0 <= x <= 1]  # NaN, too
    if odd:
        raise UserError(f"reward() in grpo.py gave {odd[0]}: return a number from 0 to 1")

    # 3) The controls' noise: the streams of samples -1, -2, ..., which nothing else uses.
    noise = None
    if "noise" in needed:
        T = completions.tokens.shape[1]
        streams = [uniforms(cfg.seed, step, p, -1 - i, T) for p, i in number_samples(prompts, G)]
        noise = torch.from_numpy(np.stack(streams))
    return Rollout(problems, completions, texts, torch.tensor(rewards).view(P, G), noise)


# ---- Advantages ----------------------------------------------------------------------------------
def group_advantages(rewards, kind="grpo"):
    """Compare each completion with its group: rewards (P, G) -> advantages (P, G).

    grpo: (r - mean) / std with the unbiased std (arXiv 2402.03300, section 4.1.2); rloo: r - mean
    of the others (arXiv 2402.14740); centered: r - mean (Dr. GRPO, arXiv 2503.20783). A group whose
    rewards are all equal says nothing: its advantages are exactly 0. ValueError on another kind.
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
        raise ValueError(f"no advantage {kind!r}: use one of {', '.join(ADVANTAGES)}")
    has_spread = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)  # (P, 1)
    return torch.where(has_spread, advantages, 0.0)


# ---- Micro-batches -------------------------------------------------------------------------------
@dataclass
class Batch:
    """Some rows of a rollout, ready for a forward pass, on the model's device.

    Prompt 5 6 with the completion 7 8 9, and prompt 4 with the completion 3 9, as pad_rows lays
    them out. The state at the last token of a prompt predicts the first token of the completion;
    the last token of a completion is a target, never an input:

        ids          5 6 7 8      targets   7 8 9     predicts   1 2 3     (places in ids,
                     4 3 0 0                3 9 0                4 5 0      row after row)
    """

    ids: torch.Tensor  # what the model reads
    packed: object  # who sees whom in it: None (rows, causal attention) or fast.packing.Packed
    predicts: torch.Tensor  # (b, T) which place in ids predicts each target; 0 on padding
    targets: torch.Tensor  # (b, T) the completions
    mask: torch.Tensor  # (b, T) bool, True on completion tokens; from lengths, never from ids
    sampled_logps: torch.Tensor  # (b, T) what the sampler said


def make_batch(rollout: Rollout, rows, device, prompt="prompt") -> Batch:
    """Return the given rows (b,) of a rollout as a Batch, after the problems' `prompt`."""
    c = rollout.completions
    lengths = c.lengths[rows]
    T = int(lengths.max())
    targets = c.tokens[rows, :T]
    mask = torch.arange(T) < lengths[:, None]
    problems, group = (rows // rollout.rewards.shape[1]).unique(return_inverse=True)
    prompts = [torch.tensor(rollout.problems[i][prompt]) for i in problems.tolist()]
    ids, predicts, packed = lay_out(prompts, group, targets, lengths, device)
    sampled_logps = c.logps[rows, :T].to(device)
    return Batch(ids, packed, predicts, targets.to(device), mask.to(device), sampled_logps)


def pad_rows(prompts, group, targets, lengths, device):
    """Lay out each completion after its own copy of its prompt, prompts[group[i]], right-padded.
    Returns ids (b, S), the flat place in ids that predicts each token (b, T), and None: rows need
    nothing but causal attention. fast/packing.py's `pack` reads a prompt once, without padding."""
    begins = [prompts[i] for i in group.tolist()]
    rows = [torch.cat([x, y[: n - 1]]) for x, y, n in zip(begins, targets, lengths, strict=True)]
    ids = pad_sequence(rows, batch_first=True)  # (b, S)
    last = torch.tensor([len(prompt) - 1 for prompt in begins])  # (b,)
    columns = torch.arange(targets.shape[1])
    predicts = (torch.arange(len(rows)) * ids.shape[1] + last)[:, None] + columns
    predicts = predicts * (columns < lengths[:, None])
    return ids.to(device), predicts.to(device), None


def split_rows(rollout: Rollout, chosen, budget, device):
    """Cut the chosen rows (B,), by length, into micro-batches of at most `budget` tokens, or one
    row; fast/packing.py's `micro_batches` finds the cheapest cut for a device."""
    lengths = rollout.completions.lengths
    rows = [row for row in lengths.argsort().tolist() if chosen[row]]
    width = max(len(problem["prompt"]) for problem in rollout.problems) + int(lengths.max())
    return list(torch.tensor(rows, dtype=torch.long).split(max(1, budget // width))) if rows else []


# Where fast/ is entered; it replaces the two functions above, and PyTorch's way to compute again.
lay_out, split = (fast.pack, fast.micro_batches) if fast else (pad_rows, split_rows)
recomputed = fast.recomputed if fast else partial(checkpoint, use_reentrant=False)


# ---- Signals of a micro-batch --------------------------------------------------------------------
def token_logps(model, hidden, targets, temperature=1.0, chunk=None):
    """Return log pi(target) (N,) and the entropy of pi (N,), fp32 nats, at states hidden (N, D).

    The head runs on a chunk of tokens at a time; of several, the (chunk, V) logits are made again
    in the backward pass instead of kept. (A loop over chunks without `recomputed` keeps every
    chunk's logits for backward, and saves nothing.) The entropy carries no gradient.
    """

    def head(h, y, with_entropy=True):
        logits = model.logits(h) / temperature  # (chunk, V)
        logps = torch.log_softmax(logits, dim=-1)
        with torch.no_grad():
            uncertainty = entropy(logps) if with_entropy else None
        return logps.gather(-1, y[:, None])[:, 0], uncertainty

    if chunk is None:
        most = MAX_LOGITS_GPU if hidden.is_cuda else MAX_LOGITS
        chunk = max(1, most // model.config.vocab_size)
    run = head if len(targets) <= chunk else partial(recomputed, head)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [run(h, y) for h, y in pairs]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def hidden_at_targets(model, batch: Batch):
    """Return the states that predict the completion tokens (b, T, D), fp32."""
    hidden = model(batch.ids, batch.packed).flatten(0, 1)
    states = hidden.index_select(0, batch.predicts.flatten())
    return states.unflatten(0, batch.predicts.shape)


def completion_logps(model, batch: Batch, states, temperature):
    """Return log-prob and entropy at the completion tokens: two (b, T), 0 on padding."""
    mask = batch.mask
    logps, entropies = token_logps(model, states[mask], batch.targets[mask], temperature)
    zeros = torch.zeros(mask.shape, device=logps.device)
    return zeros.masked_scatter(mask, logps), zeros.masked_scatter(mask, entropies)


def score(model, rollout: Rollout, rows, needed, cfg):
    """Run the forward passes over some rows that the needed signals require.

    Returns the Batch, its log-probs (b, T) with gradient, and a dict of signals (b, T) without:
    logp and entropy always, and of residual, ref_logp and neg_logp those that are needed.
    """
    # 1) The adapted path: the pass that trains.
    batch = make_batch(rollout, rows, model.device)
    states = hidden_at_targets(model, batch)  # (b, T, D)
    logps, entropies = completion_logps(model, batch, states, cfg.temperature)
    found = dict(logp=logps.detach(), entropy=entropies)

    # 2) The base path: the same tokens, shapes and kernels, so that LoRA's B = 0 gives
    # exactly 0. This is ARCA: how far the adapter moves the predicting state.
    if needed & {"residual", "ref_logp"}:
        with torch.no_grad(), adapter_off(model):
            base = hidden_at_targets(model, batch)
            if "residual" in needed:  # ||h_adapted - h_base||_2
                found["residual"] = (states.detach() - base).norm(dim=-1) * batch.mask
            if "ref_logp" in needed:
                found["ref_logp"], _ = completion_logps(model, batch, base, cfg.temperature)

    # 3) The negative prompt: the same completions after another text.
    if "neg_logp" in needed:
        with torch.no_grad():
            negative = make_batch(rollout, rows, model.device, "negative")
            states = hidden_at_targets(model, negative)
            found["neg_logp"], _ = completion_logps(model, negative, states, cfg.temperature)
    return batch, logps, found


# ---- The loss ------------------------------------------------------------------------------------
def policy_objective(logps, advantages, old_logps=None, clip_low=0.2, clip_high=0.28):
    """Return what a token adds to the objective that is maximised, elementwise.

    Without old log-probs A log pi, whose gradient is the policy gradient. With them PPO's min(ratio
    A, clip(ratio, 1 - low, 1 + high) A) (arXiv 1707.06347, eq. 7; two bounds: arXiv 2503.14476).
    """
    if old_logps is None:
        return advantages * logps
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def kl_k3(logps, ref_logps):
    """Return Schulman's k3 estimate, nats, of KL(pi || ref) at samples of pi, elementwise.

    It is r - 1 - log r with r = ref / pi. As a loss its expected gradient is that of KL(ref || pi);
    GRPO's paper uses it so (arXiv 2402.03300).
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def token_loss(logps, advantages, batch: Batch, ref_logps, cfg):
    """Return each token's loss (b, T) at advantages (b, T), before it is weighted and masked."""
    old_logps = batch.sampled_logps if cfg.epochs_per_rollout > 1 else None
    clip = (cfg.clip_eps_low, cfg.clip_eps_high)
    objective = policy_objective(logps, advantages, old_logps, *clip)
    if cfg.kl_coef > 0:
        objective = objective - cfg.kl_coef * kl_k3(logps, ref_logps)
    return -objective


def row_weights(lengths, aggregate):
    """Return the weight of each completion's tokens in the loss (B,), of lengths (B,): 1 / (B T_i)
    (seq), or 1 / all tokens of the step (token)."""
    if aggregate == "seq":
        return 1 / (len(lengths) * lengths)
    return torch.ones(len(lengths)) / lengths.sum()


# ---- The update ----------------------------------------------------------------------------------
FOUND = ("logp", "entropy", "ref_logp", "residual", "neg_logp")  # the signals that passes find


def sampled_signals(rollout: Rollout, advantages) -> credit.Signals:
    """Return the signals of a step (B, T) that need no pass: some are what the sampler saw."""
    c = rollout.completions
    mask = torch.arange(c.tokens.shape[1]) < c.lengths[:, None]
    group = torch.arange(len(mask)) // rollout.rewards.shape[1]
    sampled = dict(logp=c.logps, entropy=c.entropy, hidden=c.hidden, noise=rollout.noise)
    return credit.Signals(mask, advantage=advantages, group=group, **sampled)


def with_room(signals: credit.Signals, needed):
    """Return the signals with zeros (B, T) for those that passes will find."""
    names = {"logp", "entropy"} | needed.intersection(FOUND)
    return replace(signals, **{name: torch.zeros(signals.mask.shape) for name in names})


def fill_in(signals: credit.Signals, rows, found):
    """Write what was found of some rows (b, T) into the signals of the step."""
    for name, x in found.items():
        getattr(signals, name)[rows, : x.shape[1]] = x.cpu()


def clip_and_step(optimizer, parameters, loss, cfg):
    """Add up the processes' gradients, clip them to a joint norm of cfg.max_grad_norm, and step.
    Returns the norm before clipping, and whether it and the loss are finite: if not, no step."""
    for p in parameters:
        if p.grad is None:  # no rows for this process
            p.grad = torch.zeros_like(p)
    processes.add_up([p.grad for p in parameters])
    norm = clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def update(model, optimizer, rollout: Rollout, advantages, cfg, compare=False):
    """Make cfg.epochs_per_rollout optimizer steps on a rollout, with advantages (B,).

    Returns the metrics (loss of the first epoch, grad_norm of the last, skipped: 1 if a gradient
    was not finite and left the parameters alone, kl if it is penalised), the step's Signals and its
    multipliers (B, T). With compare all rules' signals are found; no optimizer: nothing is trained.
    """
    parameters = list(lora_parameters(model).values())
    needed = needed_signals(cfg, compare)
    metrics = dict(loss=0.0, grad_norm=0.0, skipped=0)
    row_weight = row_weights(rollout.completions.lengths, cfg.aggregate)  # (B,)

    # 1. A rule that must see the whole step gives its multipliers before any pass.
    signals = sampled_signals(rollout, advantages)
    whole_step = credit.METHODS[cfg.credit].whole_step
    if whole_step:
        multipliers = credit.token_weights(cfg.credit, signals, cfg.sharpening)  # (B, T)
    signals = with_room(signals, needed)

    # 2. Rows of advantage 0 count in B, but have no gradient unless KL is penalised: they are only
    # measured.
    has_gradient = (advantages != 0) | (cfg.kl_coef > 0)  # (B,)
    has_gradient &= optimizer is not None
    cut = partial(split, rollout, budget=cfg.micro_batch_tokens, device=model.device)
    for rows in processes.share(cut(~has_gradient)):
        with torch.no_grad():
            _, _, found = score(model, rollout, rows, needed, cfg)
        fill_in(signals, rows, found)

    for epoch in range(cfg.epochs_per_rollout if has_gradient.any() else 0):
        # 3. One micro-batch at a time: score it, share its credit out, add its gradient.
        loss = torch.zeros(1)
        for rows in processes.share(cut(has_gradient)):
            batch, logps, found = score(model, rollout, rows, needed, cfg)
            here = replace(signals.rows(rows, batch.mask.shape[1], model.device), **found)
            if whole_step:
                m = multipliers[rows, : batch.mask.shape[1]].to(model.device)
            else:
                m = credit.token_weights(cfg.credit, here, cfg.sharpening)
            token_advantages = here.advantage[:, None] * m  # (b, T): all that the methods differ in
            losses = token_loss(logps, token_advantages, batch, here.ref_logp, cfg)
            batch_loss = (losses * batch.mask * row_weight[rows, None].to(model.device)).sum()
            batch_loss.backward()
            loss += batch_loss.item()
            if epoch == 0:  # the metrics are those of the policy that sampled
                fill_in(signals, rows, found)

        # 4. Clip and step, or skip a gradient that is not finite.
        processes.add_up([loss])
        metrics["loss"] = metrics["loss"] if epoch else loss.item()
        norm, finite = clip_and_step(optimizer, parameters, loss.item(), cfg)
        metrics["grad_norm"] = norm
        metrics["skipped"] |= not finite

    # 5. What is now known of all tokens of the step, whichever process found it.
    parts = [getattr(signals, name) for name in FOUND]
    processes.add_up([x for x in parts if x is not None])
    if not whole_step:  # those of the first epoch, for all rows
        multipliers = credit.token_weights(cfg.credit, signals, cfg.sharpening)
    if cfg.kl_coef > 0:
        metrics["kl"] = kl_k3(signals.logp, signals.ref_logp)[signals.mask].mean().item()
    return metrics, signals, multipliers
