"""Metrics of a training step, over all of its B = P x G completions; README.md explains each."""

import re
from itertools import accumulate

import torch

from credit import Signals, effective_token_ratio, gini, rank_within_row, rules_for, token_weights
from verifier.extract import last_boxed

CLASSES = ("other", "digits", "operators", "words", "latex", "answer", "eos")  # 1 to 4 as in PIECES
PIECES = re.compile(r"(\d)|([-+*/=<>^±×÷·−])|([^\W\d_]+)|(\\(?:[A-Za-z]+|.))", re.DOTALL)


def measure(rollout, signals: Signals) -> dict:
    """Return what a step sampled and earned, and how far sampler and update differ, as numbers."""
    rewards = rollout.rewards  # (P, G)
    completions = rollout.completions
    mixed = (rewards != rewards[:, :1]).any(dim=1)  # (P,) the groups that have a gradient
    mismatch = (signals.logp - completions.logps).abs()[signals.mask]
    metrics = {
        "reward": rewards.mean(), "entropy": signals.entropy[signals.mask].mean(),
        "completion_tokens": completions.lengths.sum(),
        "truncated": (~completions.finished).float().mean(), "groups_mixed": mixed.sum(),
        "groups_all_right": (rewards > 0).all(dim=1).sum(),
        "groups_all_wrong": (rewards <= 0).all(dim=1).sum(),
        "logp_mismatch": mismatch.max(), "logp_mismatch_mean": mismatch.mean(),
    }  # fmt: skip
    return {key: value.item() for key, value in metrics.items()}


def diagnose(rollout, signals: Signals, multipliers, cfg, tokenizer, compare=False) -> dict:
    """Return how the multipliers (B, T) of a step spread its credit, as numbers: by token class, if
    there is a tokenizer; with compare how all rules spread it, which takes all their signals."""
    mask = signals.mask
    long = mask.sum(dim=1) > 1  # (B,)
    flat = long & (multipliers == mask).all(dim=1) & (cfg.credit != "uniform")
    metrics = {
        "gini": gini(multipliers, mask).mean(),
        "effective_token_ratio": effective_token_ratio(multipliers, mask).mean(),
        "credit_fallback": flat.sum() / long.sum().clamp(min=1),
    }
    if tokenizer is not None:
        classes = step_classes(rollout.completions, tokenizer)
        total = (multipliers * mask).sum().clamp(min=1e-12)
        for i, name in enumerate(CLASSES):
            inside = mask & (classes == i)
            metrics[f"tokens/{name}"] = inside.sum() / mask.sum()
            metrics[f"credit/{name}"] = (multipliers * inside).sum() / total
    if signals.residual is not None:
        metrics["residual_mean"] = signals.residual[mask].mean()
        metrics["residual_max"] = signals.residual[mask].max()
    for name in rules_for(signals) if compare else ():
        for power in (1, 2):
            m = token_weights(name, signals, power)
            metrics[f"gini/{name}/{power}"] = gini(m, mask).mean()
            metrics[f"effective_token_ratio/{name}/{power}"] = effective_token_ratio(m, mask).mean()
        m = token_weights(name, signals, cfg.sharpening)
        metrics[f"rank_correlation/{name}"] = rank_correlation(multipliers, m, mask).mean()
    return {key: value.item() for key, value in metrics.items()}


def rank_correlation(a, b, mask):
    """Return Spearman's correlation of a and b (B, T) in each row (B,); 0 if one is constant."""
    mean = (mask.sum(dim=1, keepdim=True) + 1) / 2 * mask  # of the ranks 1 ... T
    a = rank_within_row(a, mask).double() - mean
    b = rank_within_row(b, mask).double() - mean
    return torch.cosine_similarity(a, b, dim=1).float()


def token_classes(tokens: list[str], finished) -> list[int]:
    """Return the class of each token, an index into CLASSES: `answer` in the last box, `eos` for
    what ended the text, or else that of the first visible character."""
    # 1) The class of each character, and of the place after the last one.
    text = "".join(tokens)
    kinds = [0] * (len(text) + 1)
    for match in PIECES.finditer(text):
        kinds[match.start() : match.end()] = [match.lastindex] * len(match[0])
    # 2) The last box, from its backslash to its brace, or to the end if it is not closed.
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start >= 0:
        answer = last_boxed(text)
        end = len(text)
        if answer is not None:
            end = min(end, text.find(answer, start) + len(answer) + 1)
        kinds[start:end] = [CLASSES.index("answer")] * (end - start)
    # 3) The tokens.
    ends = accumulate(map(len, tokens))
    classes = [kinds[end - len(x.lstrip())] for x, end in zip(tokens, ends, strict=True)]
    return classes[:-1] + [CLASSES.index("eos")] if finished else classes


def step_classes(completions, tokenizer):
    """Return the class of each token of some Completions (B, T); padding has 0."""
    ids = completions.tokens.unique().tolist()
    text = dict(zip(ids, tokenizer.pieces(ids), strict=True))
    classes = torch.zeros_like(completions.tokens)
    for row, length in enumerate(completions.lengths.tolist()):
        tokens = [text[i] for i in completions.tokens[row, :length].tolist()]
        classes[row, :length] = torch.tensor(token_classes(tokens, completions.finished[row]))
    return classes
