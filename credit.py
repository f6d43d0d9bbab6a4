"""Token credit: how much of a completion's advantage each of its tokens gets.

A rule gives token t of a completion the multiplier m_t: its advantage is then A m_t. Most rules
have scores s_t >= 0, which become weights w_t = s_t^p / sum_k s_k^p within a completion of T tokens
(p is the sharpening) and multipliers m_t = T w_t. Those have mean one: credit moves within a
completion, which counts as before. Rules whose papers normalise otherwise keep their own way.

    python credit.py                    # every rule on the same completions: screen, page, figure
    python credit.py --run runs/NAME    # the same for what a run has kept, step by step

To add a rule, write a function from (Signals, p) to multipliers (B, T) and add a line to METHODS:
it names the signals that the rule reads, and grpo.py computes no others.

"The paper" is ARCA's, arXiv 2606.00257.
"""

import math
from dataclasses import dataclass, replace

import torch

from system.errors import UserError


@dataclass
class Signals:
    """What is known of the tokens of B completions, detached; what no rule needs may be None.

    Column t is about drawn token t, and about the state that predicts it: the one at the position
    before. So credit goes to the choice of a token, not to having read it.
    """

    mask: torch.Tensor  # (B, T) 1 on completion tokens, right-padded, the end of text included
    logp: torch.Tensor | None = None  # (B, T) log-prob of the drawn token under the policy
    entropy: torch.Tensor | None = None  # (B, T) of the policy's distribution there, in nats
    ref_logp: torch.Tensor | None = None  # (B, T) as logp, under the base path
    residual: torch.Tensor | None = None  # (B, T) ||h_adapted - h_base||_2
    hidden: torch.Tensor | None = None  # (B, T, D) the predicting state
    neg_logp: torch.Tensor | None = None  # (B, T) as logp, with the negative prompt
    advantage: torch.Tensor | None = None  # (B,)
    group: torch.Tensor | None = None  # (B,) index of the prompt
    noise: torch.Tensor | None = None  # (B, T) uniform in [0, 1), for the controls


# ---- Rules that share a completion's credit among its tokens -------------------------------------


def share(scores, mask, p):
    """Scores (B, T) -> multipliers T s_t^p / sum_k s_k^p; a row of zeros becomes exactly uniform.

    There is no epsilon: scores are divided by the row's largest first, so that their scale does not
    matter, however small (paper, proposition 3). LoRA starts with B = 0, so at the first step all
    scores of ARCA and divergence vanish.
    """
    tiny, mask = torch.finfo(torch.float32).tiny, mask.float()
    s = (scores.float() * mask).clamp(min=0)
    largest = s.amax(dim=1, keepdim=True)
    s = (s / largest.clamp(min=tiny)) ** p * mask
    m = mask.sum(dim=1, keepdim=True) * s / s.sum(dim=1, keepdim=True).clamp(min=tiny)
    return torch.where(largest < tiny, mask, m)


def uniform(s: Signals, p):
    """The same for every token: GRPO's length-normalised estimator (paper, section 2)."""
    return s.mask.float()


def surprisal(s: Signals, p):
    """-log pi(y_t): tokens that the policy found unlikely (paper, section 2)."""
    return share(-s.logp, s.mask, p)


def entropy_reduction(s: Signals, p):
    """max(0, H_t - H_{t+1}), 0 at a completion's last token: tokens after which the policy is less
    uncertain (paper, section 2)."""
    after = torch.cat([s.entropy[:, 1:], s.entropy[:, -1:]], dim=1)  # H_{t+1}
    has_next = torch.cat([s.mask[:, 1:], torch.zeros_like(s.mask[:, :1])], dim=1)
    return share((s.entropy - after) * has_next, s.mask, p)


def divergence(s: Signals, p):
    """|log pi(y_t) - log pi_base(y_t)|: tokens whose probability training has changed (paper,
    section 2)."""
    return share((s.logp - s.ref_logp).abs(), s.mask, p)


def arca(s: Signals, p):
    """||h_t^adapted - h_t^base||_2: tokens at which the adapter moves the hidden state (paper,
    section 3)."""
    return share(s.residual, s.mask, p)


def gcpo(s: Signals, p):
    """The rank of the contrast to a negative prompt, as GCPO's code has it (arXiv 2605.29198).

    The contrast is k3 = e^d - d - 1, d = log pi(y_t | negative prompt) - log pi(y_t), and the score
    (rank / T)^a, where a gives the upper 40 % of the tokens 80 % of the credit. Ties share a rank.
    As only ranks count, Gini and effective-token ratio are constants (0.518 and 0.534 for long
    rows), even where the contrast is noise.
    """
    a = math.log(1 - 0.8) / math.log(1 - 0.4) - 1  # 2.15
    return share((ranks(contrast(s), s.mask) / lengths(s.mask)) ** a, s.mask, p)


def permuted(s: Signals, p):
    """A control: ARCA's weights, shuffled within the completion: same Gini, no position."""
    order = noise(s).masked_fill(~s.mask.bool(), 2.0).argsort(dim=1)  # padding stays where it is
    return arca(s, p).gather(1, order)


def random(s: Signals, p):
    """A control: log-normal scores, of the spread at which the row's Gini is that of ARCA's.

    exp(sigma z) with z standard normal; Gini grows with sigma, which is found by bisection.
    """
    target = gini(arca(s, p), s.mask)[:, None]
    z = torch.special.ndtri(noise(s).double().clamp(min=1e-12)).masked_fill(~s.mask.bool(), -99.0)
    z = z - z.amax(dim=1, keepdim=True)  # (B, T) at most 0: nothing overflows
    low, high = torch.zeros_like(z[:, :1]), torch.full_like(z[:, :1], 100.0)
    for _ in range(30):
        sigma = (low + high) / 2
        over = gini((sigma * z).exp(), s.mask)[:, None] > target
        low, high = torch.where(over, low, sigma), torch.where(over, sigma, high)
    return share((low * z).exp(), s.mask, 1)


# ---- Rules with a normalisation of their own; the sharpening p does not touch them ---------------


def gcpo_linear(s: Signals, p):
    """GCPO as its paper has it (arXiv 2605.29198, section 3): the share of the completion's tokens
    with a smaller contrast, in [0, 1). Its mean is about a half, not one."""
    return (ranks(contrast(s), s.mask) - 1) / lengths(s.mask) * s.mask


def eapo(s: Signals, p):
    """A factor in [0.9, 1.1] that grows with the entropy (EAPO, arXiv 2604.11056, eqs. 6 and 7).

    A (1 + 0.2 clip(z / |A|, -1/2, 1/2)), with z the entropy standardised over the tokens of all the
    completions of a problem.
    """
    away = s.entropy - group_mean(s.entropy, s)
    z = away / group_mean(away**2, s).sqrt().clamp(min=1e-8)
    limit = 1 / 2  # 1 / phi
    size = s.advantage.abs()[:, None].clamp(min=1e-8)
    return (1 + 0.2 * (z / size).clamp(-limit, limit)) * s.mask


def forking(s: Signals, p):
    """1 on the fifth of the step's tokens with the highest entropy, else 0 (arXiv 2506.01939). The
    loss is still divided by all tokens."""
    entropy = s.entropy[s.mask.bool()].sort().values
    return (s.entropy >= entropy[len(entropy) * 4 // 5]) * s.mask.float()


def entropy_advantage(s: Signals, p):
    """(A + min(0.4 H_t, |A| / 2)) / A: the entropy is added to the advantage (arXiv 2506.14758), so
    uncertain tokens of a wrong completion are blamed less."""
    A = s.advantage[:, None]
    m = (A + torch.minimum(0.4 * s.entropy, A.abs() / 2)) / torch.where(A == 0, 1.0, A)
    return torch.where(A == 0, 1.0, m) * s.mask


def delta(s: Signals, p):
    """DelTA (arXiv 2605.21467): more to tokens that are typical of their side, right or wrong.

    A token's vector is v = (1 - pi(y_t)) h_t. Each side, A > 0 and A < 0, has a centroid of its v,
    weighted by |A|; a token's margin says how much nearer its own side's is, in squared distance.
    The centroids are refined once (K = 1), by the sigmoid of the margin over its deviation; the
    final sigmoid alpha gives 0.8 + 0.4 alpha, or 0.8 where A = 0, and the whole step's mean is one:
    with --aggregate token that is its self-normalised surrogate. With one side only, all are one.
    """
    on = s.mask.bool()
    v = ((1 - s.logp.exp())[..., None] * s.hidden)[on]  # (N, D) over the tokens of the step
    A = s.advantage[:, None].expand(on.shape)[on]  # (N,)
    sides = [A > 0, A < 0]
    if not all(side.any() for side in sides):
        return s.mask.float()
    alpha, gamma = torch.ones_like(A), None
    for _ in range(2):
        pull = A.abs() * alpha
        right, wrong = (pull[side] @ v[side] / pull[side].sum() for side in sides)  # (D,) each
        # ||v - wrong||^2 - ||v - right||^2, and for a wrong completion's token the reverse
        margin = A.sign() * (2 * v @ (right - wrong) + wrong @ wrong - right @ right)
        if gamma is None:
            spread = [margin[side].var(correction=0).clamp(min=1e-8).sqrt() for side in sides]
            gamma = torch.where(A > 0, *spread)
        alpha = torch.sigmoid(margin / gamma)
    lam = 0.8 + 0.4 * alpha * (A != 0)
    return torch.zeros_like(s.mask, dtype=v.dtype).masked_scatter(on, lam / lam.mean())


# ---- What the rules share ------------------------------------------------------------------------


def lengths(mask):
    """(B, 1) tokens of each completion, 1 for an empty one."""
    return mask.float().sum(dim=1, keepdim=True).clamp(min=1)


def ranks(x, mask):
    """x (B, T) -> its rank within the completion, 1 for the smallest; equals share their mean."""
    x = x.float().masked_fill(~mask.bool(), torch.inf)
    ordered = x.sort(dim=1).values
    below, upto = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + upto + 1) / 2 * mask


def contrast(s: Signals):
    """GCPO's k3 of each token; expm1, so that small ones are not rounded to ties."""
    d = (s.neg_logp - s.logp).clamp(-20, 20)
    return (d.expm1() - d).clamp(max=10)


def group_mean(x, s: Signals):
    """The mean of x (B, T) over all the tokens of a problem's completions, at each of its rows."""
    same = (s.group[:, None] == s.group).float()  # (B, B)
    return same @ (x * s.mask).sum(dim=1, keepdim=True) / (same @ lengths(s.mask))  # (B, 1)


def noise(s: Signals):
    """The controls' uniforms (B, T), or where there are none some that are always the same."""
    if s.noise is not None:
        return s.noise
    rng = torch.Generator().manual_seed(0)
    return torch.rand(s.mask.shape, generator=rng).to(s.mask.device)


STEP, ROW = True, False  # whether a rule must see all the completions of a step at once
#   --credit name: (rule, the signals it reads, whether it must see the whole step)
METHODS = {
    "uniform": (uniform, (), ROW),
    "surprisal": (surprisal, ("logp",), ROW),
    "entropy_reduction": (entropy_reduction, ("entropy",), ROW),
    "divergence": (divergence, ("logp", "ref_logp"), ROW),
    "arca": (arca, ("residual",), ROW),
    "delta": (delta, ("logp", "hidden", "advantage"), STEP),
    "gcpo": (gcpo, ("logp", "neg_logp"), ROW),
    "gcpo_linear": (gcpo_linear, ("logp", "neg_logp"), ROW),
    "eapo": (eapo, ("entropy", "advantage", "group"), STEP),
    "forking": (forking, ("entropy",), STEP),
    "entropy_advantage": (entropy_advantage, ("entropy", "advantage"), ROW),
    "permuted": (permuted, ("residual", "noise"), ROW),
    "random": (random, ("residual", "noise"), ROW),
}


def needs(method) -> tuple[str, ...]:
    """The signals that a rule reads; UserError, with the list of rules, if there is no such."""
    if method not in METHODS:
        raise UserError(f"no credit rule {method!r}: use one of {', '.join(METHODS)}")
    return METHODS[method][1]


def token_weights(method, signals: Signals, sharpening=1.0):
    """The rule's multipliers of the advantage m (B, T), fp32, detached, 0 outside completions."""
    needs(method)
    on = signals.mask.bool()
    known = {name: x for name, x in vars(signals).items() if x is not None and x.shape == on.shape}
    quiet = {name: x.masked_fill(~on, 0) for name, x in known.items()}  # whatever padding holds
    with torch.no_grad():
        return METHODS[method][0](replace(signals, **quiet), sharpening).float()


# ---- How concentrated multipliers are ------------------------------------------------------------


def gini(m, mask):
    """The Gini coefficient of each row's weights, (B, T) -> (B,): 0 uniform, (T-1)/T one-hot; 0 for
    a row of zeros."""
    w = (m * mask).double().sort(dim=1).values  # ascending: padding, being 0, comes first
    length = mask.double().sum(dim=1, keepdim=True)
    columns = torch.arange(1, w.shape[1] + 1, device=w.device)
    rank = columns - (w.shape[1] - length)  # 1 ... T over the completion's own weights
    total = (length[:, 0] * w.sum(dim=1)).clamp(min=torch.finfo(w.dtype).tiny)
    return (((2 * rank - length - 1) * w).sum(dim=1) / total).clamp(min=0).float()


def effective_token_ratio(m, mask):
    """1 / (T sum_t w_t^2) with w = m / sum m, (B, T) -> (B,): 1 uniform, 1/T one-hot; 0 for a row
    of zeros, where no token has an effect."""
    w = (m * mask).double()
    total = (mask.double().sum(dim=1) * (w**2).sum(dim=1)).clamp(min=torch.finfo(w.dtype).tiny)
    return (w.sum(dim=1) ** 2 / total).float()
