"""The credit rules against rows worked out by hand; concentration against definitions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import credit
from credit import METHODS, Signals, effective_token_ratio, gini, token_weights
from model import UserError

ROOT = Path(__file__).parent.parent
LENGTHS = [4, 2, 1]  # a row that fills its columns, one that is padded, one of a single token
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


def signals(**changes):
    """Three completions. Padding holds numbers that would show if anything read them."""
    logp = [[-1.0, -2.0, -3.0, -4.0], [-0.5, -1.5, -7.0, -7.0], [-2.0, -7.0, -7.0, -7.0]]
    entropy = [[3.0, 1.0, 2.0, 1.5], [2.0, 1.0, 0.25, 9.0], [5.0, 1.0, 9.0, 9.0]]
    ref_logp = [[-1.0, -2.5, -2.0, -4.5], [-1.5, -1.0, -9.0, -9.0], [-2.0, -9.0, -9.0, -9.0]]
    residual = [[0.0, 2.0, 1.0, 1.0], [3.0, 1.0, 8.0, 8.0], [0.5, 8.0, 8.0, 8.0]]
    s = dict(logp=logp, entropy=entropy, ref_logp=ref_logp, residual=residual)
    s = {name: torch.tensor(value) for name, value in s.items()}
    return Signals(**(dict(mask=MASK) | s | changes))


# method: its scores, row by row, without padding
SCORES = {
    "uniform": [[1, 1, 1, 1], [1, 1], [1]],
    "surprisal": [[1, 2, 3, 4], [0.5, 1.5], [2]],
    # Falls 3 -> 1 and 2 -> 1.5 count, the rise 1 -> 2 is cut to 0, and a row's last token gets 0,
    # although row 1's entropy falls from 1 to the 0.25 that padding holds.
    "entropy_reduction": [[2, 0, 0.5, 0], [1, 0], [0]],
    "divergence": [[0, 0.5, 1, 0.5], [1, 0.5], [0]],
    "arca": [[0, 2, 1, 1], [3, 1], [0.5]],
}
# method: its multipliers T s / sum s; those of a row whose scores all vanish are 1
WEIGHTS = {
    "uniform": [[1, 1, 1, 1], [1, 1], [1]],
    "surprisal": [[0.4, 0.8, 1.2, 1.6], [0.5, 1.5], [1]],
    "entropy_reduction": [[3.2, 0, 0.8, 0], [2, 0], [1]],
    "divergence": [[0, 1, 2, 1], [4 / 3, 2 / 3], [1]],
    "arca": [[0, 2, 1, 1], [1.5, 0.5], [1]],
}
# the same at sharpening 2: T s^2 / sum s^2
SQUARED = {
    "uniform": [[1, 1, 1, 1], [1, 1], [1]],
    "surprisal": [[2 / 15, 8 / 15, 18 / 15, 32 / 15], [0.2, 1.8], [1]],
    "entropy_reduction": [[64 / 17, 0, 4 / 17, 0], [2, 0], [1]],
    "divergence": [[0, 2 / 3, 8 / 3, 2 / 3], [1.6, 0.4], [1]],
    "arca": [[0, 8 / 3, 2 / 3, 2 / 3], [1.8, 0.2], [1]],
}
VANISHED = {"entropy_reduction": [2], "divergence": [2]}


def padded(rows):
    return torch.tensor([row + [0.0] * (4 - len(row)) for row in rows])


def test_every_rule_is_in_the_tables():
    """A rule that is added without a row worked out by hand."""
    assert METHODS.keys() == SCORES.keys() == WEIGHTS.keys() == SQUARED.keys()


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_rules_by_hand(method, boolean):
    """A rule with a wrong sign, one that reads padding, or forgets a row's true last token."""
    s = signals(mask=MASK if boolean else MASK.float())
    got, vanished = credit.scores(method, s)
    assert torch.allclose(got, padded(SCORES[method]), atol=1e-6)
    assert vanished.nonzero()[:, 0].tolist() == VANISHED.get(method, [])
    for sharpening, table in ((1.0, WEIGHTS), (2.0, SQUARED)):
        m = token_weights(method, s, sharpening)
        assert torch.allclose(m, padded(table[method]), atol=1e-6)
        assert (m[~MASK] == 0).all()
        assert torch.allclose(m.sum(1), torch.tensor(LENGTHS).float())  # mean one


def test_uniform_is_exactly_the_mask():
    """A uniform rule that is divided and multiplied: 1 / 41 * 41 is not 1 in fp32."""
    mask = torch.arange(200) < torch.tensor([1, 41, 194, 200])[:, None]
    for sharpening in (1.0, 2.0, 0.3):
        assert torch.equal(token_weights("uniform", Signals(mask), sharpening), mask.float())


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_detached(method):
    """A gradient through the weights: the objective would pay for moving credit, not for reward."""
    names = ("logp", "entropy", "ref_logp", "residual")
    s = signals(**{name: getattr(signals(), name).requires_grad_() for name in names})
    assert not token_weights(method, s).requires_grad
    assert not credit.scores(method, s)[0].requires_grad


@pytest.mark.parametrize("sharpening", [1.0, 2.0, 4.0])
def test_only_scores_that_are_zero_vanish(sharpening):
    """An epsilon or threshold: small scores, or their squares, would become uniform silently."""
    shape = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    mask = torch.ones(1, 4).bool()
    expected = 4 * shape**sharpening / (shape**sharpening).sum()
    for scale in (1e-30, 1e-12, 1e-4, 1.0, 1e12, 1e30):
        s = Signals(mask, residual=shape * scale)
        assert not credit.scores("arca", s)[1].any()
        assert torch.allclose(token_weights("arca", s, sharpening), expected, rtol=1e-5)
    s = Signals(mask, residual=shape * 0)
    assert credit.scores("arca", s)[1].all()
    assert torch.equal(token_weights("arca", s, sharpening), torch.ones(1, 4))


@pytest.mark.parametrize("method", ["entropy_reduction", "divergence", "arca"])
def test_a_row_whose_scores_vanish_is_exactly_uniform(method):
    """NaN from 0 / 0 at the first step; a fallback that takes padding, or other rows, with it."""
    s = signals(residual=torch.zeros(3, 4), ref_logp=signals().logp, entropy=torch.ones(3, 4))
    s.residual[0, 2] = s.ref_logp[0, 2] = s.entropy[0, 2] = 3.0
    for sharpening in (1.0, 2.0):
        m = token_weights(method, s, sharpening)
        assert torch.equal(m[1:], MASK[1:].float())
        assert m[0].tolist() == [0, 0, 4, 0]
    assert credit.scores(method, s)[1].tolist() == [False, True, True]


def test_unknown_rule_lists_the_rules():
    """A typing error in --credit that trains as something else, or does not say what there is."""
    for call in (credit.needs, lambda name: token_weights(name, signals())):
        with pytest.raises(UserError, match=r"arcca.*uniform.*surprisal.*arca"):
            call("arcca")


@pytest.mark.parametrize("method", METHODS)
def test_needs_names_what_a_rule_reads(method):
    """A rule that reads a signal which grpo.py was not asked to compute."""
    only = {name: getattr(signals(), name) for name in credit.needs(method)}
    assert torch.isfinite(token_weights(method, Signals(MASK, **only))).all()
    for missing in only:
        with pytest.raises((TypeError, AttributeError)):
            token_weights(method, Signals(MASK, **{**only, missing: None}))


# ---- How concentrated weights are ----------------------------------------------------------------


def test_concentration_of_uniform_and_one_hot_rows():
    """Diagnostics over padding, or not normalised by the length."""
    one_hot = torch.zeros(3, 4)
    one_hot[torch.arange(3), torch.tensor([2, 1, 0])] = torch.tensor(LENGTHS).float()
    lengths = torch.tensor(LENGTHS).float()
    assert torch.equal(gini(MASK.float(), MASK), torch.zeros(3))
    assert torch.equal(effective_token_ratio(MASK.float(), MASK), torch.ones(3))
    assert torch.allclose(gini(one_hot, MASK), (lengths - 1) / lengths)
    assert torch.allclose(effective_token_ratio(one_hot, MASK), 1 / lengths)


def test_concentration_by_brute_force():
    """Ranks that count padding. Gini is sum |a - b| / (2 T^2 mean), over all pairs of a row."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(30) < torch.tensor([30, 17, 5, 2, 1])[:, None]
    weights = torch.rand(5, 30, generator=rng) ** 3
    G, E = gini(weights, mask), effective_token_ratio(weights, mask)
    for row, n in enumerate(mask.sum(1).tolist()):
        w = weights[row, :n].double().tolist()
        assert G[row].item() == pytest.approx(
            sum(abs(a - b) for a in w for b in w) / (2 * n * sum(w)), abs=1e-6
        )
        shares = [x / sum(w) for x in w]
        assert E[row].item() == pytest.approx(1 / (n * sum(x * x for x in shares)), rel=1e-6)
    assert torch.allclose(gini(weights * 1e-20, mask), G)  # neither depends on the scale
    assert torch.allclose(effective_token_ratio(weights * 1e9, mask), E)


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_concentration_of_a_ramp(n):
    """Weights 1 ... n have Gini (n - 1) / 3n and effective-token ratio 3 (n + 1) / (4n + 2)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    ramp, mask = torch.arange(1.0, n + 1)[order][None], torch.ones(1, n).bool()
    assert gini(ramp, mask).item() == pytest.approx((n - 1) / (3 * n), rel=1e-5)
    assert effective_token_ratio(ramp, mask).item() == pytest.approx(3 * (n + 1) / (4 * n + 2))


def test_concentration_needs_no_mean_one():
    """Rules that keep their own normalisation would be measured as more or less concentrated."""
    m = token_weights("surprisal", signals())
    assert torch.allclose(gini(5 * m, MASK), gini(m, MASK))
    assert gini(m, MASK).tolist() == pytest.approx([0.25, 0.25, 0])  # (n - 1) / 3n; |1.5 - 0.5| / 4


# ---- python credit.py RUN ------------------------------------------------------------------------


def show(*args):
    command = [sys.executable, str(ROOT / "credit.py"), *map(str, args)]
    env = os.environ | dict(PYTHONIOENCODING="utf-8")
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=env, cwd=ROOT)


def test_credit_py_shows_the_tokens_of_a_run(tmp_path):
    """A viewer that breaks on what train.py writes, or shows the oldest completions."""
    tokens = ["The", " answer", " is", " $\\boxed{7}$", "<|endoftext|>"]
    weights = [0.0, 0.25, 0.75, 4.0, 0.0]
    sample = dict(problem="What is $3+4$?", gold="7", text="".join(tokens[:-1]), reward=1.0)
    sample |= dict(advantage=0.5, tokens=tokens, weights=weights)
    lines = [json.dumps(dict(step=step) | sample) for step in (1, 11, 21)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = show(tmp_path, "--last", 2)
    assert (result.returncode, result.stderr) == (0, "")
    shown = result.stdout.split("step ")
    assert [part.split(",")[0] for part in shown[1:]] == ["11", "21"]
    assert all(token in result.stdout for token in tokens)
    # Gini of (0, 0, .25, .75, 4): ((2*3-6) .25 + (2*4-6) .75 + (2*5-6) 4) / (5 * 5) = .70
    assert "reward 1, Gini 0.70: What is $3+4$?" in result.stdout
    grey = [int(part.split("m", 1)[0]) for part in shown[1].split("\033[48;5;")[1:]]
    assert grey[0] == grey[4] > grey[1] > grey[2] > grey[3] >= 232  # more credit is darker


def test_credit_py_without_a_run(tmp_path):
    """A traceback, or exit code 0, where a user has mistyped a folder."""
    result = show(tmp_path / "nothing")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "samples.jsonl" in result.stderr and "Traceback" not in result.stderr
