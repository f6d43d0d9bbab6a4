"""The credit rules against rows worked out by hand; concentration against definitions."""

import math
import re
from pathlib import Path

import pytest
import torch

import credit
from credit import METHODS, Signals, effective_token_ratio, gini, token_weights

ROOT = Path(__file__).parent.parent
LENGTHS = [4, 2, 1]  # a row that fills its columns, one that is padded, one of a single token
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


def signals(**changes):
    """Three completions. Padding holds numbers that would show if anything read them."""
    logp = [[-1.0, -2.0, -3.0, -4.0], [-0.5, -1.5, -7.0, -7.0], [-2.0, -7.0, -7.0, -7.0]]
    entropy = [[3.0, 1.0, 2.0, 1.5], [2.0, 1.0, 0.25, 9.0], [5.0, 1.0, 9.0, 9.0]]
    ref_logp = [[-1.0, -2.5, -2.0, -4.5], [-1.5, -1.0, -9.0, -9.0], [-2.0, -9.0, -9.0, -9.0]]
    neg_logp = [[-2.2, -2.0, -1.0, -3.0], [-0.5, -1.5, -1.0, -1.0], [-3.0, -1.0, -1.0, -1.0]]
    residual = [[0.0, 2.0, 1.0, 1.0], [3.0, 1.0, 8.0, 8.0], [0.5, 8.0, 8.0, 8.0]]
    rng = torch.Generator().manual_seed(0)
    known = dict(
        mask=MASK,
        logp=torch.tensor(logp),
        entropy=torch.tensor(entropy),
        ref_logp=torch.tensor(ref_logp),
        neg_logp=torch.tensor(neg_logp),
        residual=torch.tensor(residual),
        advantage=torch.tensor([1.0, -0.5, 0.5]),
        group=torch.tensor([0, 0, 1]),
        hidden=torch.randn(3, 4, 5, generator=rng),
        noise=torch.rand(3, 4, generator=rng),
    )
    return Signals(**(known | changes))


# method: its multipliers T s^p / sum s^p at sharpening p = 1, row by row, without padding; those of
# a row whose scores all vanish are 1. GCPO's, EAPO's and so on have tests of their own below.
WEIGHTS = {
    "uniform": [[1, 1, 1, 1], [1, 1], [1]],
    "surprisal": [[0.4, 0.8, 1.2, 1.6], [0.5, 1.5], [1]],  # scores 1 2 3 4 | 0.5 1.5 | 2
    # Falls 3 -> 1 and 2 -> 1.5 count, the rise 1 -> 2 is cut to 0, and a row's last token gets 0,
    # although row 1's entropy falls from 1 to the 0.25 that padding holds: 2 0 0.5 0 | 1 0 | 0
    "entropy_reduction": [[3.2, 0, 0.8, 0], [2, 0], [1]],
    "divergence": [[0, 1, 2, 1], [4 / 3, 2 / 3], [1]],  # scores 0 0.5 1 0.5 | 1 0.5 | 0
    "arca": [[0, 2, 1, 1], [1.5, 0.5], [1]],  # scores 0 2 1 1 | 3 1 | 0.5
}
# the same at sharpening 2: T s^2 / sum s^2
SQUARED = {
    "uniform": [[1, 1, 1, 1], [1, 1], [1]],
    "surprisal": [[2 / 15, 8 / 15, 18 / 15, 32 / 15], [0.2, 1.8], [1]],
    "entropy_reduction": [[64 / 17, 0, 4 / 17, 0], [2, 0], [1]],
    "divergence": [[0, 2 / 3, 8 / 3, 2 / 3], [1.6, 0.4], [1]],
    "arca": [[0, 8 / 3, 2 / 3, 2 / 3], [1.8, 0.2], [1]],
}
OWN = ["gcpo", "gcpo_linear", "eapo", "forking", "entropy_advantage", "delta", "permuted", "random"]


def padded(rows):
    return torch.tensor([row + [0.0] * (4 - len(row)) for row in rows])


def test_every_rule_has_a_test():
    """A rule that is added without a row worked out by hand."""
    assert METHODS.keys() == {*WEIGHTS, *OWN} and WEIGHTS.keys() == SQUARED.keys()
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(re.search(rf"def test_{name}\w*\(", here) for name in OWN)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("method", WEIGHTS)
def test_rules_by_hand(method, boolean):
    """A rule with a wrong sign, one that reads padding, or forgets a row's true last token."""
    s = signals(mask=MASK if boolean else MASK.float())
    for sharpening, table in ((1.0, WEIGHTS), (2.0, SQUARED)):
        m = token_weights(method, s, sharpening)
        assert torch.allclose(m, padded(table[method]), atol=1e-6)
        assert (m[~MASK] == 0).all()
        assert torch.allclose(m.sum(1), torch.tensor(LENGTHS).float())  # mean one


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_padding_gets_nothing_and_decides_nothing(method, boolean):
    """A mean, a rank, a quantile or a centroid over padding."""
    first = token_weights(method, signals(mask=MASK if boolean else MASK.float()), 2.0)
    assert first.dtype == torch.float32 and (first[~MASK] == 0).all()
    noisy = signals()
    for name in METHODS[method].reads:
        value = getattr(noisy, name)
        if value.ndim > 1:
            value[~MASK] = torch.nan
    assert torch.equal(token_weights(method, noisy, 2.0), first)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_tokens(method):
    """NaN from 0 / 0 in a row of no tokens, which then spreads to the whole step."""
    s, empty = signals(), MASK.clone()
    s.mask, empty[1] = empty, False
    m = token_weights(method, s, 2.0)
    assert torch.isfinite(m).all() and (m[~empty] == 0).all() and m.sum() > 0
    assert torch.isfinite(gini(m, empty)).all()
    assert torch.isfinite(effective_token_ratio(m, empty)).all()


def test_gcpo():
    """A rank that starts at 0, or counts from the top; ties that are told apart by their position.

    Row 0 has d = -1.2, 0, 2, 1, so k3 = e^d - d - 1 = 0.50, 0, 4.39, 0.72 and ranks 2, 1, 4, 3 of
    4 (of -d they would be 3, 1, 4, 2). The power is ln 0.2 / ln 0.6 - 1 = 2.1507: 0.5^a = 0.2252,
    0.25^a = 0.0507, 1, 0.75^a = 0.5386, which sum to 1.8145; times 4 / 1.8145. In row 1 both d are
    0: a tie.
    """
    m = token_weights("gcpo", signals())
    expected = padded([[0.4964, 0.1118, 2.2044, 1.1874], [1, 1], [1]])
    assert torch.allclose(m, expected, atol=2e-4)
    scores = torch.tensor([0.5, 0.25, 1.0, 0.75]) ** (2 * 2.15066)
    assert torch.allclose(token_weights("gcpo", signals(), 2.0)[0], 4 * scores / scores.sum())


def test_gcpo_linear():
    """The paper's variant, rescaled to mean one: it is the share of tokens with a smaller contrast
    (of equals half count)."""
    m = token_weights("gcpo_linear", signals())
    assert torch.allclose(m, padded([[0.25, 0, 0.75, 0.5], [0.25, 0.25], [0]]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gcpo_concentration_is_constant(scale):
    """GCPO's Gini a / (a + 2) = 0.518 and effective-token ratio (2a + 1) / (a + 1)^2 = 0.534 do not
    depend on the contrast. A k3 that rounds to 0 when contrasts are small would show as ties."""
    rng = torch.Generator().manual_seed(0)
    logp, mask = -torch.rand(2, 4000, generator=rng) - 1, torch.ones(2, 4000).bool()
    neg = logp + scale * 0.6 * torch.rand(2, 4000, generator=rng)
    s = Signals(mask, logp=logp, neg_logp=neg)
    m = token_weights("gcpo", s)
    if scale <= 1:  # beyond, k3 is cut at 10 as in GCPO's code, and what is cut is tied
        assert gini(m, mask).tolist() == pytest.approx([0.518] * 2, abs=1e-3)
        assert effective_token_ratio(m, mask).tolist() == pytest.approx([0.534] * 2, abs=1e-3)
        linear = token_weights("gcpo_linear", s)
        assert gini(linear, mask).tolist() == pytest.approx([1 / 3] * 2, abs=1e-3)
        assert effective_token_ratio(linear, mask).tolist() == pytest.approx([0.75] * 2, abs=1e-3)
    assert torch.isfinite(m).all()


def test_eapo():
    """Statistics of a completion or of the step, where EAPO's are those of the problem's group.

    Group 0 has entropies 3 1 2 1.5 | 2 1: mean 1.75, deviations 1.25 -0.75 0.25 -0.25 | 0.25 -0.75,
    variance 2.875 / 6, deviation 0.69222; z = 1.806 -1.083 0.3612 -0.3612 | 0.3612 -1.083. Divided
    by |A| = 1 | 0.5, cut at 1/2, times 0.2. Group 1 has one token, so z = 0.
    """
    m = token_weights("eapo", signals())
    z = 0.25 / (2.875 / 6) ** 0.5
    expected = [[1.1, 0.9, 1 + 0.2 * z, 1 - 0.2 * z], [1.1, 0.9], [1]]
    assert torch.allclose(m, padded(expected), atol=1e-6)


def test_eapo_factor_is_between_09_and_11():
    """A factor that grows without bound where the advantage is small or zero."""
    rng = torch.Generator().manual_seed(0)
    A = torch.tensor([1e-9, 0.0, -3.0, 0.2])
    group, mask = torch.tensor([0, 0, 1, 1]), torch.ones(4, 50).bool()
    entropy = torch.randn(4, 50, generator=rng).exp()
    m = token_weights("eapo", Signals(mask, entropy=entropy, advantage=A, group=group))
    assert m.min() >= 0.9 - 1e-6 and m.max() <= 1.1 + 1e-6
    assert gini(m, mask).max() < 0.05


def test_forking():
    """A quantile of each completion instead of the step's. Of the 7 tokens' entropies
    1 1 1.5 2 2 3 5 the upper fifth is 3 and 5; a row without one has no weight at all."""
    m = token_weights("forking", signals())
    assert torch.equal(m, padded([[1, 0, 0, 0], [0, 0], [1]]))
    assert (gini(m, MASK).tolist(), effective_token_ratio(m, MASK).tolist()) == (
        [0.75, 0, 0],
        [0.25, 0, 1],
    )
    s = Signals(torch.ones(4, 250).bool(), entropy=torch.randperm(1000).view(4, 250).float())
    assert token_weights("forking", s).sum() == 200


def test_entropy_advantage():
    """A bonus with the advantage's sign: A + min(0.4 H, |A| / 2) blames a wrong completion less.

    Row 0, A = 1: 0.4 H = 1.2 0.4 0.8 0.6, cut at 0.5. Row 1, A = -0.5: 0.8 and 0.4 are cut at 0.25,
    and (-0.5 + 0.25) / -0.5 = 0.5. Row 2, A = 0.5: 2 is cut at 0.25.
    """
    m = token_weights("entropy_advantage", signals())
    assert torch.allclose(m, padded([[1.5, 1.4, 1.5, 1.5], [0.5, 0.5], [1.5]]))
    m = token_weights("entropy_advantage", signals(advantage=torch.zeros(3)))
    assert torch.equal(m, MASK.float())


def delta_in_loops(s):
    """DelTA token by token, as papers.md and the paper's algorithm list its steps."""
    tokens = []  # (row, column, v, A)
    for row, n in enumerate(s.mask.sum(1).tolist()):
        for t in range(int(n)):
            v = (1 - s.logp[row, t].exp().item()) * s.hidden[row, t].double()
            tokens.append((row, t, v, s.advantage[row].item()))
    sides = {sign: [x for x in tokens if x[3] * sign > 0] for sign in (1, -1)}
    alpha = {x[:2]: 1.0 for x in tokens}
    gamma = {}
    for turn in range(2):
        mu = {}
        for sign, side in sides.items():
            total = sum(abs(A) * alpha[row, t] for row, t, _, A in side)
            mu[sign] = sum(abs(A) * alpha[row, t] * v for row, t, v, A in side) / total
        for sign, side in sides.items():
            margin = {}
            for row, t, v, _ in side:
                other, own = ((v - mu[k]).pow(2).sum().item() for k in (-sign, sign))
                margin[row, t] = other - own
            if turn == 0:
                mean = sum(margin.values()) / len(margin)
                variance = sum((d - mean) ** 2 for d in margin.values()) / len(margin)
                gamma[sign] = math.sqrt(max(variance, 1e-8))
            for key, d in margin.items():
                alpha[key] = 1 / (1 + math.exp(-d / gamma[sign]))
    lam = torch.zeros(s.mask.shape, dtype=torch.float64)
    for row, t, _, A in tokens:
        lam[row, t] = 0.8 + 0.4 * alpha[row, t] if A else 0.8
    return (lam * len(tokens) / lam.sum()).float()


def test_delta():
    """Sides, centroids or normalisers of a completion or a group; an unrefined centroid; a gamma of
    the refined margins; tokens without advantage that get more than 0.8."""
    rng = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 1, 5, 7, 2, 4])[:, None]
    s = Signals(mask, logp=-torch.rand(6, 9, generator=rng) * 2)
    s.hidden = torch.randn(6, 9, 5, generator=rng)
    s.advantage = torch.tensor([1.0, 0.0, -0.7, 0.3, -2.0, 0.0])
    m = token_weights("delta", s)
    assert torch.allclose(m, delta_in_loops(s), atol=1e-5)
    assert m[mask].double().mean().item() == pytest.approx(1, abs=1e-6)  # of the step, not the row
    assert (m.sum(1) / mask.sum(1) - 1).abs().max() > 0.01


def test_delta_by_hand():
    """One right token with v = 0.5 * 2 = 1, one wrong with v = -1, and one without advantage.

    The margin is (1 + 1)^2 - 0 = 4 on both sides, its deviation is cut at 1e-4, the sigmoid is 1,
    so lambda = 1.2, 1.2, 0.8: over their mean 3.2 / 3 that is 1.125, 1.125, 0.75.
    """
    half = math.log(0.5)
    s = Signals(torch.ones(3, 1).bool(), logp=torch.full((3, 1), half))
    s.hidden, s.advantage = torch.tensor([[[2.0]], [[-2.0]], [[7.0]]]), torch.tensor([1.0, -1, 0])
    assert torch.allclose(token_weights("delta", s), torch.tensor([[1.125], [1.125], [0.75]]))


@pytest.mark.parametrize("A", [[1.0, 0.5, 0.0], [-1.0, -0.5, 0.0], [0.0, 0.0, 0.0]])
def test_delta_with_one_side_is_uniform(A):
    """0 / 0 where a step has no wrong, or no right, completion."""
    m = token_weights("delta", signals(advantage=torch.tensor(A)))
    assert torch.equal(m, MASK.float())


@pytest.mark.parametrize("sharpening", [1.0, 2.0])
def test_permuted(sharpening):
    """A control that is not one: other weights than ARCA's, weights that leave their row or stay in
    their place, or the same shuffle in every row."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(60) < torch.tensor([60, 40, 1, 60])[:, None]
    residual = torch.rand(1, 60, generator=rng).expand(4, 60)
    s = Signals(mask, residual=residual, noise=torch.rand(4, 60, generator=rng))
    m, weights = token_weights("permuted", s, sharpening), token_weights("arca", s, sharpening)
    assert torch.equal(m.sort(1).values, weights.sort(1).values)
    assert torch.allclose(gini(m, mask), gini(weights, mask))
    assert (m[~mask] == 0).all() and not torch.equal(m, weights)
    assert not torch.equal(m[0], m[3])


@pytest.mark.parametrize("sharpening", [1.0, 2.0, 4.0])
def test_random(sharpening):
    """A control of another Gini than ARCA's own, at whatever sharpening, or of a fixed one."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(60) < torch.tensor([60, 40, 1, 60, 5, 50])[:, None]
    residual = torch.rand(6, 60, generator=rng) ** torch.tensor([1, 4, 1, 9, 2, 0.0])[:, None]
    s = Signals(mask, residual=residual, noise=torch.rand(6, 60, generator=rng))
    m, weights = token_weights("random", s, sharpening), token_weights("arca", s, sharpening)
    assert torch.allclose(gini(m, mask), gini(weights, mask), atol=1e-4)
    assert torch.allclose(m.sum(1), mask.sum(1).float()) and (m[~mask] == 0).all()
    assert torch.allclose(m[5, :50], torch.ones(50), atol=1e-4)  # where ARCA is uniform, so is this
    logs = m[0].log().sort().values  # log-normal: its logarithm is linear in normal quantiles
    z = torch.special.ndtri(s.noise[0].double()).float().sort().values
    assert torch.corrcoef(torch.stack([logs, z]))[0, 1] > 0.999


def test_uniform_is_exactly_the_mask():
    """A uniform rule that is divided and multiplied: 1 / 41 * 41 is not 1 in fp32."""
    mask = torch.arange(200) < torch.tensor([1, 41, 194, 200])[:, None]
    for sharpening in (1.0, 2.0, 0.3):
        assert torch.equal(token_weights("uniform", Signals(mask), sharpening), mask.float())


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_detached(method):
    """A gradient through the weights: the objective would pay for moving credit, not for reward."""
    names = ("logp", "entropy", "ref_logp", "neg_logp", "residual", "hidden")
    s = signals(**{name: getattr(signals(), name).requires_grad_() for name in names})
    assert not token_weights(method, s).requires_grad


@pytest.mark.parametrize("sharpening", [1.0, 2.0, 4.0])
def test_only_scores_that_are_zero_vanish(sharpening):
    """An epsilon or threshold: small scores, or their squares, would become uniform silently."""
    shape = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    mask = torch.ones(1, 4).bool()
    expected = 4 * shape**sharpening / (shape**sharpening).sum()
    for scale in (1e-30, 1e-12, 1e-4, 1.0, 1e12, 1e30):
        s = Signals(mask, residual=shape * scale)
        assert torch.allclose(token_weights("arca", s, sharpening), expected, rtol=1e-5)
    s = Signals(mask, residual=shape * 0)
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


def test_unknown_rule_lists_the_rules():
    """A typing error in --credit that trains as something else, or does not say what there is."""
    with pytest.raises(ValueError, match=r"arcca.*uniform.*surprisal.*arca"):
        token_weights("arcca", signals())


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_names_what_it_reads(method):
    """A rule that reads a signal which grpo.py was not asked to compute."""
    only = {name: getattr(signals(), name) for name in METHODS[method].reads}
    assert torch.isfinite(token_weights(method, Signals(MASK, **only))).all()
    for missing in only:
        with pytest.raises((TypeError, AttributeError)):
            token_weights(method, Signals(MASK, **{**only, missing: None}))


def test_the_rule_in_the_readme(monkeypatch):
    """An example of a rule that no longer runs, or whose line in METHODS has another form."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(def late\(signals.*?)\n```", readme, re.DOTALL)
    names = dict(vars(credit), METHODS={})
    exec(example[1], names)
    monkeypatch.setitem(METHODS, "late", names["METHODS"]["late"])
    m = token_weights("late", signals())
    assert torch.allclose(m, padded([[0.4, 0.8, 1.2, 1.6], [2 / 3, 4 / 3], [1]]))


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
