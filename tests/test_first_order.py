"""The first-order improvement: closed forms on a bandit, enumeration, `update` on tiny models."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from helpers import (
    EOS,
    advantages_of,
    close,
    double,
    gradient,
    handmade,
    in_double,
    rollout_in_double,
    rollout_of,
    settings,
    tiny_model,
)

import grpo
from experiments import first_order
from experiments.first_order import ALL, BASE, PARTS, PLAIN
from experiments.rows import RESULTS, paired, read_results
from lora import lora_parameters
from system.errors import UserError

# ---- A bandit ------------------------------------------------------------------------------------

POLICY = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)  # softmax of one token
REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
PAY = torch.tensor([1.0, 4.0, 0.5, 1.0], dtype=torch.float64)  # a rule that is biased
SCORES = torch.eye(4, dtype=torch.float64) - POLICY  # grad log pi of each arm
PLAIN_G = (REWARD - POLICY @ REWARD)[:, None] * SCORES  # (4, D) what each draw adds
PAID = PAY[:, None] * PLAIN_G
G_STAR = POLICY @ PLAIN_G
E_U = POLICY @ PAID
N, DRAWS = 6, 1  # batches, and draws in each


def bandit(sets, seed=0):
    """Yield (G, U) (N, D) of so many independent sets of batches."""
    rng = torch.Generator().manual_seed(seed)
    arms = torch.multinomial(POLICY, sets * N * DRAWS, True, generator=rng).view(sets, N, DRAWS)
    yield from zip(PLAIN_G[arms].mean(dim=2), PAID[arms].mean(dim=2), strict=True)


def off(found, truth):
    """How many standard errors the mean of found (sets,) is off."""
    return float((found.mean() - truth) / (found.std() / len(found) ** 0.5))


def test_products_are_unbiased_and_their_errors_true():
    """Products within a batch (i = j) hold its noise: |E u|^2 would be too large by a variance that
    is known here. A jackknife error that is wrong by a factor would tell what cannot be told."""
    truths = {"along": G_STAR @ E_U, "own": E_U @ E_U, "true": G_STAR @ G_STAR}
    variance = (POLICY @ (PAID**2).sum(1) - E_U @ E_U) / DRAWS
    truths["size"] = E_U @ E_U + variance
    found = [first_order.products(G, U, 1e9) for G, U in bandit(400)]
    for name, truth in truths.items():
        estimates = torch.tensor([first_order.estimate(x[name], N) for x in found])
        assert abs(off(estimates[:, 0], truth)) < 4, name
        seen = float(estimates[:, 0].std())
        assert 0.8 < float((estimates[:, 1] ** 2).mean() ** 0.5) / seen < 1.35, name
    with_itself = torch.stack([(U @ U.T).mean() for _, U in bandit(400)])
    assert off(with_itself, E_U @ E_U) > 6
    assert abs(off(with_itself, E_U @ E_U + variance / N)) < 4


def test_a_ratio_is_left_out_as_a_whole():
    """Errors of numerator and denominator, added as if they were independent, would say 'cannot
    tell' of rules that move together: a multiple of u has an error of 0."""
    (G, U), *_ = bandit(1)
    one, two = first_order.products(G, U, 1e9), first_order.products(G, 3 * U, 1e9)
    assert first_order.estimate(two["along"] / one["along"], N) == pytest.approx([3, 0], abs=1e-9)
    assert first_order.estimate(two["adam"] / one["adam"], N) == pytest.approx([1, 0], abs=1e-6)
    both = first_order.pooled([one["along"], one["along"]])
    value, error = first_order.estimate(one["along"], N)
    assert first_order.estimate(both, N) == pytest.approx([2 * value, 2**0.5 * error])


def test_the_preconditioner_is_of_other_batches():
    """A preconditioner that holds u_j shrinks just the large u_j: the gain would be too small. Of
    independent batches its mean is g* . (E u E[1 / sqrt v]), by simulation of v alone."""
    found = torch.stack([first_order.adam_gains(G, U) for G, U in bandit(400)])
    scale = torch.stack([(U[:-2] ** 2).mean(0).rsqrt() for _, U in bandit(4000, seed=1)])
    truth = float(G_STAR @ (E_U * scale.mean(0)))
    assert abs(off(found[:, 0], truth)) < 4
    again = torch.stack([first_order.adam_gains(G[1:], U[1:])[0] for G, U in bandit(20)])
    assert torch.allclose(found[:20, 1], again)  # what is left out is left out of v, too


# ---- Tiny models ---------------------------------------------------------------------------------


def rewarded(completions):
    return [float(sum(c) % 3 == 1) for c in completions]


def test_g_is_the_derivative_of_the_success_rate():
    """A g that is biased: 1/T left in, the group's deviation, a wrong sign. All groups of two
    completions are listed; their mean g, by probability, must be that of finite differences."""
    model = in_double(tiny_model(vocab=3, seed=3))
    prompt = [1, 2]
    group = [[EOS], [1, EOS], [2, EOS], [1, 1], [1, 2], [2, 1], [2, 2]]
    with double():
        rewards = torch.tensor(rewarded(group))
        lora = list(lora_parameters(model).values())
        start = torch.nn.utils.parameters_to_vector(lora).detach().clone()

        def probabilities(at):
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(at, lora)
                rows = handmade([prompt], group, rewards)
                _, logps, _ = grpo.score(model, rows, torch.arange(7), set(), settings())
                torch.nn.utils.vector_to_parameters(start, lora)
            return logps.sum(dim=1).exp()  # (7,)

        p = probabilities(start)
        assert float(p.sum()) == pytest.approx(1)
        mean = torch.zeros_like(start)
        for i, j in itertools.product(range(7), repeat=2):
            pair = handmade([prompt], [group[i], group[j]], [rewards[i], rewards[j]])
            mean += p[i] * p[j] * first_order.gradients(model, pair, settings(), [BASE])[0][PLAIN]
        rng = torch.Generator().manual_seed(0)
        direction = torch.randn(len(start), generator=rng)
        h = 1e-5
        ends = [probabilities(start + sign * h * direction) @ rewards for sign in (1, -1)]
        slope = float(ends[0] - ends[1]) / (2 * h)
        assert float(mean @ direction) == pytest.approx(slope, rel=1e-6)


@pytest.fixture(scope="module")
def measured():
    """A tiny model, the rollout of helpers.py, and all rules' gradients and coefficients on it."""
    model = tiny_model()
    rollout = rollout_of(model)
    cfg = settings(micro_batch_tokens=12)  # several passes
    return model, rollout, *first_order.gradients(model, rollout, cfg, ALL)


@pytest.mark.parametrize("rule", ALL)
def test_u_is_the_gradient_of_the_update(measured, rule):
    """A second loss that drifts from grpo.py's: another 1/T, another sign, signals of another
    pass, a rule of the whole step that sees a micro-batch."""
    model, rollout, found, _, _ = measured
    cfg = settings(credit=rule[0], sharpening=rule[1])
    loss, _, _ = gradient(model, rollout, advantages_of(rollout), cfg, compare=True)
    assert close(found[rule], -loss, 1e-5)


@pytest.mark.parametrize("name", ["permuted", "random"])
def test_controls_are_uniform_on_average(name):
    """The controls measure what variance costs; a bias of theirs would be taken for it. Of all
    orders of a completion's noise, which are equally likely, the mean update is uniform's."""
    model = in_double(tiny_model(vocab=7))
    with double():
        rollout = handmade([[3, 5]], [[4, 1, EOS], [6, EOS]], [1.0, 0.0])
        drawn = torch.tensor([[0.2, 0.9, 0.6], [0.7, 0.1, 0.0]], dtype=torch.float64)
        found = []
        for first in itertools.permutations(range(3)):
            for second in ((0, 1, 2), (1, 0, 2)):
                noise = torch.stack([drawn[0, list(first)], drawn[1, list(second)]])
                rules = [BASE, (name, 2.0)]
                given = replace(rollout_in_double(rollout), noise=noise)
                found.append(first_order.gradients(model, given, settings(), rules)[0])
        mean = torch.stack([u[name, 2.0] for u in found]).mean(0)
        assert close(mean, found[0][BASE], 1e-9)
        assert not close(found[0][name, 2.0], found[0][BASE], 1e-2)


def test_worth_and_coefficients_make_the_product(measured, monkeypatch):
    """Parts of the gain that do not sum to it: a lost token, a difference quotient that is too
    coarse, an adapter that is not put back."""
    # This random policy bends more than a trained one.
    monkeypatch.setattr(first_order, "NUDGE", 1e-4)
    model = in_double(measured[0])
    before = torch.nn.utils.parameters_to_vector(lora_parameters(model).values()).clone()
    with double():
        rollout = rollout_in_double(measured[1])
        found, coefficients, _ = first_order.gradients(model, rollout, settings(), ALL)
        worth = first_order.token_worth(model, rollout, settings(), found[PLAIN])
    for rule, u in found.items():
        whole = float((coefficients[rule] * worth).sum())
        assert whole == pytest.approx(float(found[PLAIN] @ u), rel=1e-4), rule
    after = torch.nn.utils.parameters_to_vector(lora_parameters(model).values())
    assert torch.equal(before, after)


# ---- Results -------------------------------------------------------------------------------------


def test_a_checkpoint_is_measured_once(monkeypatch, tmp_path, capsys):
    """Hours that are lost with the process, measured twice, or mixed with another setting's; and a
    comparison with the sweep that ranks the wrong way: as gains we take the sweep's own rewards."""
    asked = []
    about, runs = read_results(RESULTS / "tiny.json")
    cells = {tuple(cell) for cell in about["cells"] if cell[1] == about["rank"]}
    rules = {
        (cell[0], cell[2]): paired(runs, cell, ("uniform", 16, 1.0), "reward") for cell in cells
    }

    def measure(opened, step, wanted, N):
        asked.append(step)
        one = torch.ones(N + 1, dtype=torch.float64)
        base = {"along": one, "own": one, "true": one, "size": 2 * one, "clipped": 0 * one}
        parts = torch.ones(N + 1, len(PARTS))
        base |= dict(gain=parts, noise=parts)
        return {rule: base | {"adam": one * (1 + x.mean())} for rule, x in rules.items()}

    monkeypatch.setattr(first_order, "measure", measure)
    monkeypatch.setattr(first_order, "open_run", lambda *at: (None, None, settings(), []))
    out = tmp_path / "out.json"
    first_order.measure_run("run", [5], 6, out, ALL)
    first_order.measure_run("run", [5, 10], 6, out, ALL)
    assert asked == [5, 10]
    with pytest.raises(UserError, match="other settings"):
        first_order.measure_run("run", [20], 7, out, ALL)
    first_order.report(*read_results(out))
    printed = capsys.readouterr().out
    assert "Spearman 1.00 [" in printed and "over 12" in printed
    assert "hit" in printed and "MISS" not in printed


# ---- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        ("--credit nosuch", r'no credit rule .nosuch.*METHODS\["nosuch"\] = Rule\(nosuch\)'),
        ("--batches 3", "--batches 3: use 6"),
        ("--steps -1", "--steps -1"),
        ("--run none", "none"),
        ("--out none.json", "none.json"),
    ],
)
def test_refusals_are_one_line(monkeypatch, tmp_path, words, says):
    """A traceback, or minutes of training before a rule turns out not to exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments/first_order.py", *words.split()])
    with pytest.raises(UserError, match=says):
        first_order.main()
