"""What is logged about credit, against rows worked out by hand and definitions written out."""

import math

import pytest
import torch
from helpers import settings

from credit import Signals
from run.metrics import CLASSES, diagnose, rank_correlation, token_classes

MASK = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]


def fallback(rule, multipliers, mask):
    """What a step of these multipliers logs as credit_fallback."""
    cfg = settings(credit=rule)
    return diagnose(None, Signals(mask), multipliers, cfg, None)["credit_fallback"]


def test_fallback():
    """Rows of one token, which are uniform under any rule, or `uniform` itself, counted in."""
    m = MASK.float()
    assert fallback("arca", m, MASK) == 1 and fallback("uniform", m, MASK) == 0
    m[0] = torch.tensor([2.0, 0, 1, 1])
    assert fallback("arca", m, MASK) == 0.5  # one of the two rows of more than one token
    assert fallback("arca", MASK[2:].float(), MASK[2:]) == 0


def spearman(a, b):
    """By definition: Pearson's correlation of ranks, equals having their mean rank."""
    rank = lambda x: [sum(v < w for v in x) + (sum(v == w for v in x) + 1) / 2 for w in x]  # noqa: E731
    a, b = rank(a), rank(b)
    mean = (len(a) + 1) / 2
    dot = lambda x, y: sum((v - mean) * (w - mean) for v, w in zip(x, y, strict=True))  # noqa: E731
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) if dot(a, a) * dot(b, b) else 0.0


def test_rank_correlation():
    """Ranks that count padding, ties ranked by position, NaN for a constant row."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(20) < torch.tensor([20, 13, 2, 1, 20, 20])[:, None]
    a, b = torch.randint(0, 6, (2, 6, 20), generator=rng).float()  # with many ties
    a[4], b[5] = 3.0, b[5].sort().values
    a[5] = b[5] ** 3 + 1  # monotone: 1
    got = rank_correlation(a, b, mask)
    for row, n in enumerate(mask.sum(1).tolist()):
        expected = spearman(a[row, :n].tolist(), b[row, :n].tolist())
        assert got[row].item() == pytest.approx(expected, abs=1e-6)
    assert got[4] == 0 and got[5].item() == pytest.approx(1)
    assert torch.allclose(rank_correlation(a, -b, mask), -got, atol=1e-6)


CLASSIFIED = [
    (["3", "*", "4", "=", "12", "."], False, "digits operators digits operators digits other"),
    (["So", " x", " =", " 5", "<eos>"], True, "words words operators digits eos"),
    (["\\", "frac", "{", "1", "}"], False, "latex latex other digits other"),
    ([" \\sqrt", "2", "\n"], False, "latex digits other"),
    # The last box, from its backslash to its brace, whatever is in it
    (["a", "\\box", "ed{", "\\frac", "{1}", "}", "$"], False, "words" + 5 * " answer" + " other"),
    (
        ["\\boxed{1}", "2", "\\boxed{", "3", "}", "<eos>"],
        True,
        "latex digits" + 3 * " answer" + " eos",
    ),
    (["\\boxed{", "3", " ", "x"], False, "answer answer answer answer"),  # not closed
    (["\\boxed{}", "x"], False, "answer words"),
    (["\ufffd", "π", ""], False, "other words other"),
    ([], False, ""),
]


@pytest.mark.parametrize("tokens, finished, expected", CLASSIFIED)
def test_token_classes(tokens, finished, expected):
    """Credit counted for the wrong kind: commands spelled by several tokens, an earlier box, the
    token that ended the text, a text that was cut off."""
    assert [CLASSES[i] for i in token_classes(tokens, finished)] == expected.split()
