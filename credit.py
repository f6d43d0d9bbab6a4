"""Token credit: how much of a completion's advantage each of its tokens gets.

A rule gives token t of a completion the multiplier m_t; the token's advantage is then A m_t. Most
rules have scores s_t >= 0. Within a completion of T tokens these become

    weights       w_t = s_t^p / sum_k s_k^p      (p, the sharpening, is `power` below)
    multipliers   m_t = T w_t                    with mean one

so credit only moves between the tokens of a completion. Rules whose papers normalise otherwise keep
their own way. To add a rule, write a function from (Signals, power) to multipliers (B, T), 0 on
padding, and add a line to METHODS that names the signals it reads, so that grpo.py finds them.

This file imports nothing of ours and can be copied into another trainer.
"The paper" is ARCA's, arXiv 2606.00257. Shapes: B completions, T tokens, D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


@dataclass
class Signals:
    """What is known of the tokens of B completions, without gradient; None if nobody needs it.

    Column t is about drawn token t and the state that predicts it, at the position before: credit
    is for choosing a token, not for having read it.
    """

    mask: torch.Tensor  # (B, T) True on completion tokens, right-padded, the end of text included
    logp: torch.Tensor | None = None  # (B, T) log-prob of the drawn token under the policy, nats
    entropy: torch.Tensor | None = None  # (B, T) of the policy's distribution there, nats
    ref_logp: torch.Tensor | None = None  # (B, T) as logp, under the base path
    residual: torch.Tensor | None = None  # (B, T) ||h_adapted - h_base||_2
    hidden: torch.Tensor | None = None  # (B, T, D) the predicting state
    neg_logp: torch.Tensor | None = None  # (B, T) as logp, with the negative prompt
    advantage: torch.Tensor | None = None  # (B,)
    group: torch.Tensor | None = None  # (B,) index of the prompt
    noise: torch.Tensor | None = None  # (B, T) uniform in [0, 1), for the controls

    def rows(self, index, columns, device):
        """Return the signals of some completions, cut to their first `columns`, on a device."""

        def cut(x):
            return (x[index] if x.ndim == 1 else x[index, :columns]).to(device)

        return Signals(**{name: cut(x) for name, x in vars(self).items() if x is not None})

    def masked(self):
        """Return the signals with 0 wherever a (B, T) signal lies outside its completion."""
        on = self.mask.bool()
        known = {name: x for name, x in vars(self).items() if x is not None and x.shape == on.shape}
        return replace(self, **{name: x.masked_fill(~on, 0) for name, x in known.items()})


# ---- Rules that share a completion's credit among its tokens -------------------------------------
def normalize_scores(scores, mask, power):
    """Turn scores (B, T) into multipliers T s_t^p / sum_k s_k^p; a row of zeros becomes uniform.

    There is no epsilon: a row is divided by its largest score first, so the scale of the scores
    does not matter, however small (paper, proposition 3). LoRA's B starts as 0, so at the first
    step all scores of ARCA and divergence vanish.
    """
    tiny = torch.finfo(torch.float32).tiny
    mask = mask.float()
    scores = (scores.float() * mask).clamp(min=0)
    largest = scores.amax(dim=1, keepdim=True)  # (B, 1)
    powers = (scores / largest.clamp(min=tiny)) ** power * mask
    total = powers.sum(dim=1, keepdim=True).clamp(min=tiny)
    multipliers = mask.sum(dim=1, keepdim=True) * powers / total
    return torch.where(largest < tiny, mask, multipliers)


def uniform(signals: Signals, power):
    """The same for every token: GRPO's length-normalised estimator (paper, section 2)."""
    return signals.mask.float()


def surprisal(signals: Signals, power):
    """-log pi(y_t): tokens that the policy found unlikely (paper, section 2)."""
    return normalize_scores(-signals.logp, signals.mask, power)


def entropy_reduction(signals: Signals, power):
    """max(0, H_t - H_{t+1}), 0 at a completion's last token: tokens after which the policy is less
    uncertain (paper, section 2)."""
    drop = (signals.entropy[:, :-1] - signals.entropy[:, 1:]) * signals.mask[:, 1:]  # (B, T - 1)
    return normalize_scores(torch.nn.functional.pad(drop, (0, 1)), signals.mask, power)


def divergence(signals: Signals, power):
    """|log pi(y_t) - log pi_base(y_t)|: tokens whose probability training has changed (paper,
    section 2)."""
    return normalize_scores((signals.logp - signals.ref_logp).abs(), signals.mask, power)


def arca(signals: Signals, power):
    """||h_t^adapted - h_t^base||_2: tokens at which the adapter moves the hidden state (paper,
    section 3)."""
    return normalize_scores(signals.residual, signals.mask, power)


def gcpo(signals: Signals, power):
    """The rank of the contrast to a negative prompt, as GCPO's code has it (arXiv 2605.29198).

    The contrast is k3 = e^d - d - 1, d = log pi(y_t | negative prompt) - log pi(y_t). The score is
    (rank / T)^a, where a gives the upper 40 % of the tokens 80 % of the credit. As only ranks
    count, long rows have a Gini of 0.518 and an effective-token ratio of 0.534 even for noise.
    """
    a = math.log(1 - 0.8) / math.log(1 - 0.4) - 1  # 2.15
    rank = rank_within_row(contrast(signals), signals.mask)
    return normalize_scores((rank / lengths(signals.mask)) ** a, signals.mask, power)


def permuted(signals: Signals, power):
    """A control: ARCA's multipliers, shuffled within the completion: same Gini, random places."""
    order = signals.noise.masked_fill(~signals.mask.bool(), 2.0).argsort(dim=1)  # padding last
    return arca(signals, power).gather(1, order)


def random(signals: Signals, power):
    """A control: log-normal scores exp(sigma z), whose Gini is ARCA's in each row. The Gini
    grows with sigma, which bisection finds."""
    mask = signals.mask.bool()
    target = gini(arca(signals, power), mask)[:, None]  # (B, 1)
    z = torch.special.ndtri(signals.noise.double().clamp(min=1e-12)).masked_fill(~mask, -99.0)
    z = z - z.amax(dim=1, keepdim=True)  # (B, T) at most 0: nothing overflows
    low = torch.zeros_like(target, dtype=z.dtype)
    high = torch.full_like(low, 100.0)
    for _ in range(30):
        sigma = (low + high) / 2
        too_wide = gini((sigma * z).exp(), mask)[:, None] > target
        low = torch.where(too_wide, low, sigma)
        high = torch.where(too_wide, sigma, high)
    return normalize_scores((low * z).exp(), mask, 1)


# ---- Rules with a normalisation of their own; the sharpening does not touch them -----------------
# AdamW removes a factor that all multipliers share, but --kl-coef and --max-grad-norm are absolute:
# they weigh otherwise beside a rule whose mean is not one (gcpo_linear 0.5, forking 0.2).
def gcpo_linear(signals: Signals, power):
    """The transform of GCPO's paper (arXiv 2605.29198, section 3) on the contrast of its code: the
    share of the completion's tokens with a smaller k3, in [0, 1), mean about a half. (The paper's
    contrast is the KL over the whole vocabulary.)"""
    rank = rank_within_row(contrast(signals), signals.mask)
    return (rank - 1) / lengths(signals.mask) * signals.mask


def eapo(signals: Signals, power):
    """1 + 0.2 clip(z / |A|, -1/2, 1/2), with z the entropy standardised over all the tokens of the
    problem (EAPO, arXiv 2604.11056, eqs. 6 and 7)."""
    away = signals.entropy - group_mean(signals.entropy, signals)  # (B, T)
    z = away / group_mean(away**2, signals).sqrt().clamp(min=1e-8)
    size = signals.advantage.abs()[:, None].clamp(min=1e-8)
    return (1 + 0.2 * (z / size).clamp(-0.5, 0.5)) * signals.mask


def forking(signals: Signals, power):
    """1 on the fifth of the step's tokens with the highest entropy, else 0 (arXiv 2506.01939). The
    loss is still divided by all tokens."""
    ordered = signals.entropy[signals.mask.bool()].sort().values
    return (signals.entropy >= ordered[len(ordered) * 4 // 5]) * signals.mask.float()


def entropy_advantage(signals: Signals, power):
    """(A + min(0.4 H_t, |A| / 2)) / A: the entropy is added to the advantage (arXiv 2506.14758), so
    uncertain tokens of a wrong completion are blamed less."""
    A = signals.advantage[:, None]  # (B, 1)
    bonus = torch.minimum(0.4 * signals.entropy, A.abs() / 2)
    multipliers = (A + bonus) / torch.where(A == 0, 1.0, A)
    return torch.where(A == 0, 1.0, multipliers) * signals.mask


def delta(signals: Signals, power):
    """DelTA (arXiv 2605.21467): more to tokens that are typical of their side, right or wrong.

    A token's vector is v = (1 - pi(y_t)) h_t. Each side, A > 0 and A < 0, has a centroid of its v,
    weighted by |A|. A token's margin says how much nearer its own side's centroid is, in squared
    distance. The centroids are refined once (K = 1), by the sigmoid of the margin over its standard
    deviation. The final sigmoid alpha gives 0.8 + 0.4 alpha, or 0.8 where A = 0, divided by the
    mean over the step: with --aggregate token that is the paper's self-normalised surrogate. If the
    step has one side only, all multipliers are one.
    """
    on = signals.mask.bool()
    v = ((1 - signals.logp.exp())[..., None] * signals.hidden)[on]  # (N, D), the step's N tokens
    A = signals.advantage[:, None].expand(on.shape)[on]  # (N,)
    right, wrong = A > 0, A < 0
    if not right.any() or not wrong.any():
        return signals.mask.float()

    alpha = torch.ones_like(A)
    deviation = None
    for _ in range(2):
        # 1) The centroid of each side, (D,).
        pull = A.abs() * alpha
        center = pull[right] @ v[right] / pull[right].sum()
        other = pull[wrong] @ v[wrong] / pull[wrong].sum()
        # 2) ||v - other||^2 - ||v - center||^2, and for a wrong completion's token the reverse.
        margin = A.sign() * (2 * v @ (center - other) + other @ other - center @ center)
        # 3) The deviation of the first margins is the scale of both rounds.
        if deviation is None:
            by_side = [
                margin[side].var(correction=0).clamp(min=1e-8).sqrt() for side in (right, wrong)
            ]
            deviation = torch.where(right, *by_side)
        alpha = torch.sigmoid(margin / deviation)
    factor = 0.8 + 0.4 * alpha * (A != 0)  # (N,)
    multipliers = torch.zeros_like(signals.mask, dtype=v.dtype)
    return multipliers.masked_scatter(on, factor / factor.mean())


# ---- What the rules share ------------------------------------------------------------------------
def lengths(mask):
    """Return the number of tokens of each completion (B, 1); 1 for an empty one."""
    return mask.float().sum(dim=1, keepdim=True).clamp(min=1)


def rank_within_row(x, mask):
    """Return each value's rank in its completion (B, T), ties averaged: 3 5 5 9 -> 1 2.5 2.5 4."""
    x = x.float().masked_fill(~mask.bool(), torch.inf)
    ordered = x.sort(dim=1).values
    below = torch.searchsorted(ordered, x)  # how many are smaller
    up_to = torch.searchsorted(ordered, x, right=True)  # how many are not larger
    return (below + up_to + 1) / 2 * mask


def contrast(signals: Signals):
    """Return GCPO's k3 of each token (B, T); expm1, so that small ones are not rounded to ties."""
    d = (signals.neg_logp - signals.logp).clamp(-20, 20)
    return (d.expm1() - d).clamp(max=10)


def group_mean(x, signals: Signals):
    """Return, for each completion (B, 1), the mean of x (B, T) over all tokens of its problem."""
    same = (signals.group[:, None] == signals.group).float()  # (B, B)
    total = same @ (x * signals.mask).sum(dim=1, keepdim=True)
    return total / (same @ lengths(signals.mask))


class Rule(NamedTuple):
    """A rule, the signals that it reads, and whether it must see all completions of a step."""

    multipliers: Callable  # (Signals, power) -> (B, T)
    reads: tuple[str, ...] = ()
    whole_step: bool = False  # then it reads what the sampler saw, before any pass


METHODS = {
    "uniform": Rule(uniform),
    "surprisal": Rule(surprisal, ("logp",)),
    "entropy_reduction": Rule(entropy_reduction, ("entropy",)),
    "divergence": Rule(divergence, ("logp", "ref_logp")),
    "arca": Rule(arca, ("residual",)),
    "delta": Rule(delta, ("logp", "hidden", "advantage"), whole_step=True),
    "gcpo": Rule(gcpo, ("logp", "neg_logp")),
    "gcpo_linear": Rule(gcpo_linear, ("logp", "neg_logp")),
    "eapo": Rule(eapo, ("entropy", "advantage", "group"), whole_step=True),
    "forking": Rule(forking, ("entropy",), whole_step=True),
    "entropy_advantage": Rule(entropy_advantage, ("entropy", "advantage")),
    "permuted": Rule(permuted, ("residual", "noise")),
    "random": Rule(random, ("residual", "noise")),
}


def rules_for(signals) -> list[str]:
    """Return the names of the rules all of whose signals are known."""
    known = {name for name, x in vars(signals).items() if x is not None}
    return [name for name, rule in METHODS.items() if known.issuperset(rule.reads)]


def token_weights(method, signals: Signals, sharpening=1.0):
    """Return a rule's multipliers of the advantage (B, T), fp32, without gradient, 0 on padding.
    (They are the m_t, not the weights w_t = m_t / T.) ValueError if there is no such rule."""
    if method not in METHODS:
        raise ValueError(f"no credit rule {method!r}: use one of {', '.join(METHODS)}")
    with torch.no_grad():
        return METHODS[method].multipliers(signals.masked(), sharpening).float()


# ---- How concentrated multipliers are ------------------------------------------------------------
def gini(multipliers, mask):
    """Return each row's Gini coefficient (B,): 0 uniform, (T-1)/T one-hot; 0 for a row of zeros.
    With w_1 <= ... <= w_T it is sum_i (2 i - T - 1) w_i / (T sum_i w_i) (Gini 1912)."""
    w = (multipliers * mask).double().sort(dim=1).values  # ascending: padding, being 0, comes first
    T = mask.double().sum(dim=1, keepdim=True)
    columns = torch.arange(1, w.shape[1] + 1, device=w.device)
    i = columns - (w.shape[1] - T)  # 1 ... T over the completion's own weights
    total = (T[:, 0] * w.sum(dim=1)).clamp(min=torch.finfo(w.dtype).tiny)
    return (((2 * i - T - 1) * w).sum(dim=1) / total).clamp(min=0).float()


def effective_token_ratio(multipliers, mask):
    """Return 1 / (T sum_t w_t^2) of each row (B,): 1 uniform, 1/T one-hot; 0 for a row of zeros.
    It is Kish's effective sample size (1965) as a share of T, with weights w = m / sum m."""
    w = (multipliers * mask).double()
    T = mask.double().sum(dim=1)
    squares = (T * (w**2).sum(dim=1)).clamp(min=torch.finfo(w.dtype).tiny)
    return (w.sum(dim=1) ** 2 / squares).float()
