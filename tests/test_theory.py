"""What of the paper's theory is exact, and where it stops."""

import math

import pytest
import torch
from helpers import handmade, settings, tiny_model

import credit
from experiments.theory import apart, at_scale, floored, signals_at, stated_bound, weights
from lora import LoRALinear

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
SCORES = torch.tensor([[3.0, 1, 0, 0, 7], [0.25, 0.75, 7, 7, 7]]) * 1e-3


@pytest.fixture(scope="module")
def case():
    """(model with an adapter that is not 0, a Rollout of four completions, settings)."""
    prompts = [[1, 2, 3], [4, 5]]
    completions = [[6, 7, 8, 9, 0], [3, 3, 0], [1, 10, 2, 0], [5, 4, 3, 2, 1, 0]]
    cfg = settings(credit="arca")
    cfg.advantage = "grpo"
    return tiny_model(B=0.1), handmade(prompts, completions, [1, 0, 1, 0]), cfg


# ---- The floor -----------------------------------------------------------------------------------


def test_floor_by_hand():
    """A floor on padding, or one that is added after the division, changes every weight."""
    w = floored(SCORES, MASK, 1e-3)
    assert w[0].tolist() == pytest.approx([4 / 8, 2 / 8, 1 / 8, 1 / 8, 0], abs=1e-7)
    assert w[1].tolist() == pytest.approx([1.25 / 3, 1.75 / 3, 0, 0, 0], abs=1e-7)


def test_a_floor_divides_the_distance_from_uniform():
    """Proposition 2, exactly: a floor of f times the mean score leaves 1 / (1 + f) of it, so a
    dominating floor makes weights uniform, and a negligible one changes nothing."""
    length = MASK.sum(dim=1, keepdim=True)
    mean = (SCORES.double() * MASK).sum(dim=1, keepdim=True) / length
    without = apart(floored(SCORES, MASK, 0), MASK / length)
    assert (without > 0.4).all()
    for f in (1e-6, 1.0, 1e3):
        distance = apart(floored(SCORES, MASK, f * mean), MASK / length)
        assert torch.allclose(distance, without / (1 + f), rtol=1e-6)


def test_a_dominating_floor_leaves_first_order_deviations():
    """Proposition 2, fixed eps and beta -> 0: w - 1/T is (a_t - mean a) / (T eps) and no more."""
    length = MASK.sum(dim=1, keepdim=True).double()
    mean = (SCORES * MASK).sum(dim=1, keepdim=True) / length
    for eps in (1.0, 100.0):
        left = (floored(SCORES, MASK, eps) - MASK / length) * length * eps
        error = (left - (SCORES - mean) * MASK).abs().max().item()
        assert error < 3 * 3e-3 * 3e-3 / eps  # the next order: a^2 / eps


def test_a_negligible_floor_leaves_the_rule_itself():
    """Proposition 2, the other limit: what the floor is does not matter, nor the scores' scale."""
    share = credit.normalize_scores(SCORES, MASK, 1)
    for scale in (1.0, 1e-12):
        w = floored(SCORES.double() * scale, MASK, 1e-9 * scale * 1e-3)
        assert torch.allclose(w, (share / share.sum(1, keepdim=True)).double(), atol=1e-7)


# ---- Bounds --------------------------------------------------------------------------------------


def test_bounds_hold_on_a_real_network(case):
    """With T the first bound holds at every scale, and so does the second proposition's: no
    divergence is larger than 2 L beta."""
    head = case[0].lm_head.weight
    limit = signals_at(0.01, *case)
    for c in (0.001, 0.1, 1.0, 10.0):
        signals = signals_at(c, *case)
        found = at_scale(signals, limit, head)
        proved = found["bound, stated"] * signals.mask.sum(dim=1)
        assert (found["surprisal moved"] > 0).all()
        assert (found["surprisal moved"] <= proved + 1e-6).all()
        beta = signals.residual.amax(dim=1)
        largest = (signals.logp - signals.ref_logp).abs().amax(dim=1)
        assert (largest <= 2 * torch.linalg.matrix_norm(head, ord=2) * beta).all()


def test_the_bound_as_stated_lacks_the_length():
    """Two tokens in the vocabulary, one hidden dimension, logits h and -h: with surprisal 1 at all
    of T tokens in the base, half of them moved by +beta and half by -beta."""
    T, beta = 40, 1e-3
    head = torch.tensor([[1.0], [-1.0]], dtype=torch.double)  # L = sqrt(2)
    h = -math.log(math.e - 1) / 2  # where -log sigmoid(2 h) = 1
    states = torch.full((1, T), h, dtype=torch.double)
    states[0, ::2] += beta
    states[0, 1::2] -= beta
    surprisal = torch.log1p(torch.exp(-2 * states))
    base, mask = torch.ones(1, T, dtype=torch.double), torch.ones(1, T)
    moved = apart(floored(surprisal, mask, 0), floored(base, mask, 0))
    stated = stated_bound(head, torch.tensor([beta]).double(), base, mask)
    # Half of the weights gain and half lose 2 (1 - 1/e) beta / T.
    assert moved.item() == pytest.approx(2 * (1 - 1 / math.e) * beta, rel=1e-3)
    assert stated.item() == pytest.approx(4 * 2**0.5 * beta / T)
    assert stated < moved < T * stated


# ---- Scale ---------------------------------------------------------------------------------------


def test_one_linear_layer_is_exactly_invariant():
    """In a single layer the residual is c times a fixed vector: weights must be the same numbers,
    however small c; a floor or a threshold on scores would show here."""
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(6, 5, bias=False), 2, 4)
    layer.base.weight.data.zero_()  # so that nothing is rounded away beside it
    x, scale, found = torch.randn(1, 7, 6), layer.scale, []
    for c in (1.0, 2.0**-10, 2.0**-60):
        layer.scale = scale * c
        residual = (layer(x) - layer.base(x)).norm(dim=-1).detach()
        found.append(credit.normalize_scores(residual, torch.ones(1, 7), 1))
    assert found[0].std() > 0.1
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], found[2], rtol=1e-5)


@pytest.mark.parametrize("rule", ["arca", "divergence"])
def test_a_network_is_invariant_to_first_order(case, rule):
    """In a network what is left is of first order in c: half the scale, half the distance."""
    at = {c: weights(rule, signals_at(c, *case)) for c in (0.2, 0.1, 0.05, 0.025)}
    first, second = apart(at[0.2], at[0.1]).mean(), apart(at[0.1], at[0.05]).mean()
    third = apart(at[0.05], at[0.025]).mean()
    assert 1.5 < first / second < 2.7 and 1.5 < second / third < 2.7
    assert third < 0.03


def test_a_network_is_not_invariant_at_large_scales(case):
    """Where it fails: there the weights are other weights."""
    limit, large = (weights("arca", signals_at(c, *case)) for c in (0.01, 10.0))
    assert apart(limit, large).mean() > 0.1


def test_the_scale_is_put_back(case):
    """A scale that stays would change every later number."""
    before = weights("arca", signals_at(1.0, *case))
    signals_at(3.0, *case)
    assert torch.equal(weights("arca", signals_at(1.0, *case)), before)
