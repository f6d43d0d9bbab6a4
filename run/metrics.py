"""What a step of training says about its credit: concentration, who was paid, how rules agree.

Everything is over all the completions of the step, ragged as they are; keys go to metrics.jsonl.
"""

import re

import torch

import credit
from verifier.extract import last_boxed


def fallback(method, m, mask):
    """The share of completions of two or more tokens that a rule left exactly uniform."""
    rows = mask.sum(dim=1) > 1
    flat = (m == mask).all(dim=1) & rows
    return flat.sum() / rows.sum().clamp(min=1) * (method != "uniform")


def rank_correlation(a, b, mask):
    """Spearman's, of two rules' multipliers (B, T) in each row -> (B,); 0 where one is constant."""
    a, b = (credit.ranks(x, mask).double() for x in (a, b))
    a, b = (x - (credit.lengths(mask) + 1) / 2 * mask for x in (a, b))  # ranks sum to T (T + 1) / 2
    size = ((a**2).sum(dim=1) * (b**2).sum(dim=1)).sqrt()
    return ((a * b).sum(dim=1) / size.clamp(min=1e-12)).float()


QUADRANTS = ("right_high", "right_low", "wrong_low", "wrong_high")  # EAPO's PHR, PLR, NLR, NHR


def quadrants(s: credit.Signals, m, right, per_row):
    """EAPO's decomposition (arXiv 2604.11056, eq. 2): right (B,) or wrong completions, and entropy
    above or below its mean over the problem's tokens. Returns two (4,) that sum to one: the shares
    of tokens, and of the gradient for the logits, in the L1 norm: |A m| 2 (1 - pi(y_t)).
    """
    high, right = s.entropy >= credit.group_mean(s.entropy, s), right[:, None]
    inside = torch.stack([right & high, right & ~high, ~right & ~high, ~right & high])  # (4, B, T)
    size = (s.advantage * per_row)[:, None].abs() * m * 2 * (1 - s.logp.exp())
    parts = [(inside * x * s.mask).sum(dim=(1, 2)) for x in (torch.ones_like(size), size)]
    return [x / x.sum().clamp(min=1e-30) for x in parts]


CLASSES = ("other", "digits", "operators", "words", "latex", "answer", "eos")
PIECES = re.compile(r"(\d)|([-+*/=<>^±×÷·−])|([^\W\d_]+)|(\\(?:[A-Za-z]+|.))", re.DOTALL)


def token_classes(tokens: list[str], finished) -> list[int]:
    """The class of each token, by its place in CLASSES: that of its first visible character. The
    last box is `answer`, from its backslash to its brace; `eos` is what ended the text."""
    text = "".join(tokens)
    kinds = [0] * (len(text) + 1)
    for match in PIECES.finditer(text):
        kinds[match.start() : match.end()] = [match.lastindex] * len(match[0])
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start >= 0:
        answer = last_boxed(text)
        end = len(text) if answer is None else text.find(answer, start) + len(answer) + 1
        kinds[start:end] = [CLASSES.index("answer")] * (min(end, len(text)) - start)
    classes, at = [], 0
    for token in tokens:
        first = at + len(token) - len(token.lstrip())
        classes.append(kinds[min(first, len(text))])
        at += len(token)
    return classes[:-1] + [CLASSES.index("eos")] if finished else classes


def step_classes(c, tokenizer):
    """The class of each token of some Completions, (B, T); each id is decoded once."""
    text, classes = {}, torch.zeros_like(c.tokens)
    for row, (n, ended) in enumerate(zip(c.lengths.tolist(), c.finished.tolist(), strict=True)):
        ids = c.tokens[row, :n].tolist()
        for i in set(ids) - text.keys():
            text[i] = tokenizer.decode([i])
        classes[row, :n] = torch.tensor(token_classes([text[i] for i in ids], ended))
    return classes


def measure(r, known: credit.Signals, mixed):
    """What GRPO does, over all the completions of a step; mixed (P,): which groups have spread."""
    rewards, c = r.rewards, r.completions
    gap = (known.logp - c.logps).abs()[known.mask]
    metrics = dict(
        reward=rewards.mean(),
        entropy=known.entropy[known.mask].mean(),
        completion_tokens=c.lengths.sum(),
        truncated=(~c.finished).float().mean(),
        groups_mixed=mixed.sum(),
        groups_all_right=(~mixed & (rewards[:, 0] > 0)).sum(),
        groups_all_wrong=(~mixed & (rewards[:, 0] <= 0)).sum(),
        logp_mismatch=gap.max(),
        logp_mismatch_mean=gap.mean(),
    )
    return {name: value.item() for name, value in metrics.items()}


def diagnose(r, known: credit.Signals, m, per_row, s, compare):
    """The diagnostics of a step's multipliers m (B, T) by name, as numbers."""
    mask = known.mask
    found = dict(gini=credit.gini(m, mask).mean())
    found["effective_token_ratio"] = credit.effective_token_ratio(m, mask).mean()
    found["credit_fallback"] = fallback(s.credit, m, mask)
    if r.classes is not None:
        for i, name in enumerate(CLASSES):
            inside = mask & (r.classes == i)
            found[f"tokens/{name}"] = inside.sum() / mask.sum()
            found[f"credit/{name}"] = (m * inside).sum() / (m * mask).sum().clamp(min=1e-12)
    shares = quadrants(known, m, r.rewards.flatten() > 0, per_row)
    for kind, values in zip(("tokens", "gradient"), shares, strict=True):
        found |= {f"{kind}/{name}": x for name, x in zip(QUADRANTS, values, strict=True)}
    if known.residual is not None:
        found["residual_mean"] = known.residual[mask].mean()
        found["residual_max"] = known.residual[mask].max()
    for name in credit.METHODS if compare else ():
        for p in (1, 2):
            other = credit.token_weights(name, known, p)
            found[f"gini/{name}/{p}"] = credit.gini(other, mask).mean()
            ratio = credit.effective_token_ratio(other, mask)
            found[f"effective_token_ratio/{name}/{p}"] = ratio.mean()
        other = credit.token_weights(name, known, s.sharpening)
        found[f"rank_correlation/{name}"] = rank_correlation(m, other, mask).mean()
    return {name: value.item() for name, value in found.items()}
