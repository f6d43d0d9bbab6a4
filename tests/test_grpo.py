"""GRPO against enumeration, finite differences, closed forms and code that is slow and plain.

What is exact is compared in float64 (helpers.double), where 1e-12 tells any error from rounding;
fp32 is held to the float64 result within its own rounding (helpers.rounding).
"""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    COMPLETIONS,
    EOS,
    EPSILON,
    EXACT,
    PROMPTS,
    TOKENS,
    Recorder,
    advantages_of,
    close,
    double,
    flat_grad,
    gradient,
    gradient_in_double,
    handmade,
    in_double,
    reference,
    rollout_of,
    rounding,
    scale_B,
    settings,
    tiny_model,
)
from torch.utils.checkpoint import checkpoint

import credit
import grpo
from data.problems import TINY
from hf.checkpoint import load_model
from lora import add_lora, lora_parameters
from run.metrics import measure
from system.errors import UserError


@pytest.fixture
def float64():
    """Compute in float64 throughout the test."""
    with double():
        yield


# ---- The policy gradient -------------------------------------------------------------------------


def all_completions(vocab, limit):
    """Every completion that a sampler can end with: those that end in EOS, and those cut off."""
    done = []
    unfinished = [[]]
    for _ in range(limit):
        longer = [c + [token] for c in unfinished for token in range(vocab)]
        done += [c for c in longer if c[-1] == EOS]
        unfinished = [c for c in longer if c[-1] != EOS]
    return done + unfinished


@pytest.mark.parametrize("aggregate, temperature", [("token", 1.0), ("token", 0.7), ("seq", 1.0)])
def test_policy_gradient_is_that_of_the_expected_reward(float64, aggregate, temperature):
    """A gradient that is biased: shifted tokens, a lost EOS, a wrong sign, prompt or temperature.

    All 40 completions of a vocabulary of 4 are listed with their exact probabilities. Weighing each
    by its probability, the step's gradient must be that of sum_y p(y) R(y); of `seq`, which divides
    by the length T, that of sum_y p(y) (R(y) - c) / T(y).
    """
    model = in_double(tiny_model(vocab=4, seed=3))
    prompts = [[1, 2], [3, 1, 1]]
    group = all_completions(4, 3)
    rng = torch.Generator().manual_seed(5)
    R = torch.rand(2, len(group), generator=rng)
    c = 0.4
    T = torch.tensor([len(y) for y in group])
    value = R if aggregate == "token" else (R - c) / T

    tokens = torch.tensor([y + [EOS] * (3 - len(y)) for y in group])  # (40, 3)
    on = torch.arange(3) < T[:, None]

    def probabilities():
        rows = []
        for x in prompts:
            ids = torch.cat([torch.tensor(x).expand(len(group), -1), tokens], dim=1)
            hidden = model(ids)[:, len(x) - 1 : -1]  # (40, 3, D)
            logps = (model.logits(hidden) / temperature).log_softmax(-1)
            drawn = logps.gather(2, tokens[:, :, None])[:, :, 0]
            rows.append((drawn * on).sum(1).exp())
        return torch.stack(rows)  # (2, 40)

    p = probabilities()
    assert torch.allclose(p.sum(1), torch.ones(2), rtol=0, atol=EXACT)
    exact = flat_grad((p * value).sum(), model)

    # The exact gradient against central differences: along itself and along its largest entries.
    lora = list(lora_parameters(model).values())
    start = torch.nn.utils.parameters_to_vector(lora).clone()

    def expected_reward(at):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(at, lora)
            value_there = (probabilities() * value).sum()
            torch.nn.utils.vector_to_parameters(start, lora)
        return float(value_there)

    largest = [torch.eye(len(start))[i] for i in exact.abs().topk(2).indices]
    h = 1e-5  # errs by about h^2 and by 1e-16 / h
    for direction in [exact / exact.norm(), *largest]:
        rise = expected_reward(start + h * direction) - expected_reward(start - h * direction)
        assert rise / (2 * h) == pytest.approx(float(exact @ direction), rel=1e-6)

    # The same from the update, whose normaliser (rows, or tokens) is taken out by the advantages.
    normaliser = 2 * len(group) if aggregate == "seq" else 2 * int(T.sum())
    advantages = (p.detach() * (R - c) * normaliser).flatten()  # a constant baseline
    cfg = settings(aggregate=aggregate, temperature=temperature)
    found, _, _ = gradient(model, handmade(prompts, group * 2, R), advantages, cfg)
    assert close(-found, exact, EXACT)


def test_plain_grpo_bit_for_bit():
    """`uniform` that is only nearly GRPO: its gradient must be the same bits, and m exactly 1."""
    model = tiny_model()
    order = [3, 7, 0, 5, 2, 4, 1, 6]  # by length, as the update does: sums in the same order
    texts = [COMPLETIONS[i] for i in order]
    rollout = rollout_of(model)
    A = advantages_of(rollout)
    found, _, m = gradient(model, rollout, A, settings())
    assert torch.equal(m, (torch.arange(6) < rollout.completions.lengths[:, None]).float())

    # GRPO without credit, chunks, masks or losses of our making.
    def plain(model, states):
        share = torch.tensor([1 / (8 * len(y)) for y in texts for _ in y])
        per_token = torch.cat([A[i].expand(len(COMPLETIONS[i])) for i in order])
        logps = torch.log_softmax(model.lm_head(states), dim=-1)
        drawn = logps[range(TOKENS), [token for y in texts for token in y]]
        return flat_grad(-(per_token * drawn * share).sum(), model)

    batch = grpo.make_batch(rollout, torch.tensor(order), "cpu")
    states = grpo.hidden_at_targets(model, batch)
    states = torch.cat([h[: len(y)] for h, y in zip(states, texts, strict=True)])
    assert torch.equal(found, plain(model, states))

    # And without a batch at all, each row alone: in float64, since sums are in another order.
    wide = in_double(model)
    found, _, _ = gradient_in_double(wide, rollout, A, settings())
    A = A.double()
    with double():
        rows = [reference(wide, PROMPTS[i // 4], COMPLETIONS[i])[2] for i in order]
        assert close(found, plain(wide, torch.cat(rows)), EXACT)


def test_every_completion_token_learns_and_nothing_else(monkeypatch, float64):
    """A mask by token id: EOS, which is also padding, would stop learning, or padding would learn.

    Each state's gradient is compared with the closed form -A / (B T) (W[y] - sum_v p_v W[v]).
    """
    kept = []
    states_of = grpo.hidden_at_targets

    def keep(*args):
        kept.append(states_of(*args))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(grpo, "hidden_at_targets", keep)
    all_rows = lambda _, chosen, **__: [torch.arange(8)] * bool(chosen.all())  # noqa: E731
    monkeypatch.setattr(grpo, "split", all_rows)
    model = in_double(tiny_model())
    rollout = rollout_of(model)
    A = advantages_of(rollout)
    gradient(model, rollout, A, settings())
    (states,) = kept  # one pass
    W = model.lm_head.weight
    for row, completion in enumerate(COMPLETIONS):
        T = len(completion)
        _, _, alone = reference(model, PROMPTS[row // 4], completion)
        p = (alone @ W.T).softmax(-1)
        expected = -A[row] / (8 * T) * (W[completion] - p @ W)
        assert close(states.grad[row, :T], expected, EXACT)
        assert expected[-1].norm() > 1e-3  # the last token, EOS where there is one, does learn
        assert (states.grad[row, T:] == 0).all()


# Ways to lay out the rows of a step, plain or packed, and to cut them into micro-batches.
CUTS = [("plain", 1), ("plain", 20), ("fast", 10**6), ("fast", 20)]


@pytest.fixture
def use(monkeypatch):
    """Return a function that has grpo.py use fast/packing.py, or its own plain functions."""
    packing = pytest.importorskip("fast.packing")
    twins = dict(fast=(packing.pack, packing.micro_batches), plain=(grpo.pad_rows, grpo.split_rows))

    def choose(which):
        lay_out, split = twins[which]
        monkeypatch.setattr(grpo, "lay_out", lay_out)
        monkeypatch.setattr(grpo, "split", split)

    return choose


# Every rule with all that a step can have, and two with the other normaliser, which no rule sees.
STEPS = [(method, "token", 0.5) for method in credit.METHODS]
STEPS += [("uniform", "seq", 0.0), ("arca", "seq", 0.0)]


@pytest.mark.parametrize("method, aggregate, kl", STEPS)
def test_micro_batches_change_nothing(use, method, aggregate, kl):
    """Normalisers or metrics of a micro-batch, not of the step; rows put back wrongly; a packed
    batch in which a token sees another row, or stands at another position.

    float64 must agree to 1e-12 however the rows are laid out and cut. fp32 is not compared with
    fp32, because batches of other shapes add up in another order, but with float64: the gradient is
    three passes from the weights, and the multipliers, which it is a product with, are two more
    (the adapted states and the base ones).
    """
    model = tiny_model()
    wide = in_double(model)
    rollout = rollout_of(model, [[1, 0, 0, 1], [1, 1, 1, 1]])  # the second group has no spread
    A = advantages_of(rollout)
    cfg = settings(credit=method, aggregate=aggregate, kl_coef=kl, sharpening=2.0)
    use("plain")
    exact = gradient_in_double(wide, rollout, A, cfg)
    for which, cfg.micro_batch_tokens in CUTS:
        use(which)
        found, metrics, m = gradient_in_double(wide, rollout, A, cfg)
        assert close(found, exact[0], EXACT)
        assert metrics == pytest.approx(exact[1], rel=EXACT, abs=EXACT)
        assert close(m, exact[2], EXACT)
    bound = rounding(model, passes=5)
    found, metrics, m = gradient(model, rollout, A, cfg)
    assert found.dtype == m.dtype == torch.float32
    assert close(found, exact[0], bound)
    assert metrics == pytest.approx(exact[1], rel=bound, abs=bound)
    assert close(m, exact[2], bound)


@pytest.mark.parametrize(
    "which, options",
    [("fast", dict()), ("plain", dict(credit="gcpo", kl_coef=0.1))],
)
def test_the_same_update_gives_the_same_bytes(use, which, options):
    """Sums whose order depends on which thread comes first: a run that is resumed, or repeated with
    its seed, would drift away from the first. (Four threads do so on any processor.)"""
    use(which)
    rng = torch.Generator().manual_seed(0)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=rng).tolist()  # noqa: E731
    model = add_lora(load_model(TINY), 16, 32.0)
    scale_B(model, 0.01)
    V = model.config.vocab_size
    prompts = [draw(0, V, n) for n in draw(12, 20, 16)]
    rollout = handmade(prompts, [draw(0, V, n) for n in draw(8, 16, 128)], draw(0, 2, 128))
    cfg = settings(**dict(credit="arca") | options)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *again = [gradient(model, rollout, advantages_of(rollout), cfg) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert first[0].norm() > 0
    for other in again:
        assert torch.equal(other[0], first[0])
        assert torch.equal(other[2], first[2])
        assert other[1] == first[1]


@pytest.mark.parametrize("budget", [1, 10, 15, 24, 1000])
def test_split_rows_holds_each_chosen_row_once(budget):
    """A row that is trained on twice, left out, or put in a batch over the budget."""
    rollout = rollout_of(tiny_model())
    chosen = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    groups = [group.tolist() for group in grpo.split_rows(rollout, chosen, budget, "cpu")]
    rows = [row for group in groups for row in group]
    assert sorted(rows) == [0, 1, 3, 4, 5, 7]
    assert [len(COMPLETIONS[row]) for row in rows] == [1, 1, 2, 2, 4, 5]  # like beside like
    for group in groups:
        width = max(len(PROMPTS[row // 4]) + len(COMPLETIONS[row]) - 1 for row in group)
        assert len(group) == 1 or len(group) * width <= budget
    assert grpo.split_rows(rollout, ~chosen & chosen, budget, "cpu") == []


@pytest.mark.parametrize("which", ["fast", "plain"])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6, 7], [6, 0, 5], [7], [3, 7]], ids=str)
def test_batches_equal_each_row_alone(use, float64, which, rows):
    """A completion that sees another problem's prompt, its padding, or stands at a wrong place."""
    use(which)
    model = in_double(tiny_model())
    batch = grpo.make_batch(rollout_of(model), torch.tensor(rows), "cpu")
    states = grpo.hidden_at_targets(model, batch)
    for i, row in enumerate(rows):
        completion = COMPLETIONS[row]
        T = len(completion)
        _, _, alone = reference(model, PROMPTS[row // 4], completion)
        assert close(states[i, :T], alone, EXACT)
        assert batch.targets[i, :T].tolist() == completion
        assert batch.mask[i].tolist() == [column < T for column in range(batch.mask.shape[1])]


def test_the_worked_example_of_pad_rows():
    """A docstring whose indices are wrong misleads whoever relies on it."""
    prompts = [torch.tensor([5, 6]), torch.tensor([4])]
    tokens = torch.tensor([[7, 8, 9], [3, 9, 0]])
    given = (prompts, torch.tensor([0, 1]), tokens, torch.tensor([3, 2]), "cpu")
    ids, predicts, packed = grpo.pad_rows(*given)
    assert ids.tolist() == [[5, 6, 7, 8], [4, 3, 0, 0]]
    assert predicts.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert packed is None


@pytest.mark.parametrize("aggregate", ["seq", "token"])
@pytest.mark.parametrize("sharpening", [None, 2.0])
def test_loss_by_hand(float64, sharpening, aggregate):
    """Credit that does not reach the loss, or a normaliser that leaves groups without spread out.

    The formula, term by term; credit is none, or m_t = T s_t^2 / sum s^2 with s = -log pi.
    """
    model = in_double(tiny_model())
    rollout = rollout_of(model, [[1, 0, 0, 1], [1, 1, 1, 1]])
    A = [0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5, 0, 0, 0, 0]
    loss = 0.0
    for row, completion in enumerate(COMPLETIONS):
        T = len(completion)
        logps, _, _ = reference(model, PROMPTS[row // 4], completion)
        m = torch.ones(T)
        if sharpening:
            m = T * logps.detach() ** 2 / (logps.detach() ** 2).sum()
        share = 1 / (8 * T) if aggregate == "seq" else 1 / TOKENS
        loss = loss - A[row] * share * (m * logps).sum()
    expected = flat_grad(loss, model)
    method = dict(credit="surprisal", sharpening=sharpening) if sharpening else {}
    cfg = settings(aggregate=aggregate, **method)
    found, metrics, _ = gradient(model, rollout, advantages_of(rollout), cfg)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=EXACT)
    assert close(found, expected, EXACT)


@pytest.mark.parametrize("spread", [True, False])
def test_a_step_moves_B_iff_a_group_has_spread(spread):
    """Learning from nothing (a group that is all right or all wrong), or not learning at all."""
    model = tiny_model(B=0.0)
    rollout = rollout_of(model, [[1, 1, 1, 1], [0, 0, 1, 0] if spread else [0, 0, 0, 0]])
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.01, weight_decay=0.0)
    metrics, *_ = grpo.update(model, optimizer, rollout, advantages_of(rollout), settings())
    moved = [bool(p.any()) for name, p in lora_parameters(model).items() if "lora_B" in name]
    assert all(moved) if spread else not any(moved)
    assert (metrics["grad_norm"] > 0) == spread


# ---- Several updates, clipping, KL, gradients that are not finite --------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, slope",  # d objective / d logp: ratio x advantage, or 0 where it is clipped
    [(2.0, 1.5, 0), (2.0, 0.5, 1.0), (-2.0, 1.5, -3.0), (-2.0, 0.5, 0), (2.0, 1.1, 2.2)],
)
def test_clip_by_hand(advantage, ratio, slope):
    """A clip on the wrong side: it must stop what goes too far and never what comes back."""
    logp = torch.tensor(math.log(ratio) - 1, requires_grad=True)
    old = torch.tensor(-1.0)
    gain = grpo.policy_objective(logp, torch.tensor(advantage), old, 0.2, 0.28)
    gain.backward()
    assert float(logp.grad) == pytest.approx(slope, abs=1e-5)
    expected = {0: {2.0: 2 * 1.28, -2.0: -2 * 0.8}[advantage]}.get(slope, ratio * advantage)
    assert gain.item() == pytest.approx(expected, abs=1e-5)  # asymmetric: 1.28 above, 0.8 below


def test_second_update_uses_ratio_and_clip(float64):
    """Going on with A log pi on a rollout that the policy has moved away from."""
    model = in_double(tiny_model())
    rollout = rollout_of(model)
    A = advantages_of(rollout)
    once, _, _ = gradient(model, rollout, A, settings())
    optimizer = Recorder(model, lr=1.0)
    lora = lora_parameters(model).values()
    start = torch.nn.utils.parameters_to_vector(lora).clone()
    grpo.update(model, optimizer, rollout, A, settings(epochs_per_rollout=2))
    first, second = optimizer.seen
    assert close(first, once, EXACT)  # the ratio is 1: no difference yet

    torch.nn.utils.vector_to_parameters(start - first, lora)
    loss = 0.0
    clipped = 0
    for row, completion in enumerate(COMPLETIONS):
        logps, _, _ = reference(model, PROMPTS[row // 4], completion)
        for t, logp in enumerate(logps):
            ratio = (logp - rollout.completions.logps[row, t]).exp().item()
            outside = ratio > 1.28 if A[row] > 0 else ratio < 0.8
            clipped += outside
            loss = loss - A[row] / (8 * len(completion)) * ratio * logp * (not outside)
    assert 0 < clipped < TOKENS  # or this test says nothing
    assert close(second, flat_grad(loss, model), 10 * EXACT)  # after a step that rounds, too
    assert not close(second, first, 0.1)


def test_kl_estimate_is_the_kl_in_expectation_and_never_negative():
    """An estimator with the two policies swapped, or one that rewards leaving the base model."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    pi, ref = torch.log_softmax(logits.double(), -1)
    estimates = grpo.kl_k3(pi, ref)
    expected = float((pi.exp() * (pi - ref)).sum())
    assert float((pi.exp() * estimates).sum()) == pytest.approx(expected, rel=1e-9)
    assert (estimates >= 0).all()
    assert (grpo.kl_k3(pi, pi) == 0).all()


def test_kl_penalty_pulls_towards_the_base_model(float64):
    """A penalty with the wrong sign, or against the adapted model itself (whose gradient is 0).

    Over all one-token completions, weighed by pi, the gradient of k3 is that of KL(base || pi).
    """
    prompt = [3, 5]
    model = in_double(tiny_model())
    base = in_double(tiny_model(lora=False))
    logp = torch.log_softmax(model.logits(model(torch.tensor([prompt]))[0, -1]), -1)
    b = torch.log_softmax(base.logits(base(torch.tensor([prompt]))[0, -1]), -1)
    expected = 0.5 * flat_grad((b.exp() * (b - logp)).sum(), model)
    found = torch.zeros_like(expected)
    for v, pi in enumerate(logp.exp().tolist()):
        rollout = handmade([prompt], [[v], [v]], [[0, 0]])  # no spread: the penalty is all there is
        one, metrics, _ = gradient(model, rollout, torch.zeros(2), settings(kl_coef=0.5))
        assert metrics["grad_norm"] == pytest.approx(float(one.norm()), rel=1e-6)
        found += pi * one
    assert close(found, expected, EXACT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])  # 1e30: finite loss, infinite norm
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    """One bad step that turns the adapter into NaN, or whose gradient stays for the next step."""
    model = tiny_model()
    rollout = rollout_of(model)
    A = advantages_of(rollout)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.01)
    before = {name: p.clone() for name, p in lora_parameters(model).items()}
    broken = torch.where(A.max() == A, bad, A)
    metrics, *_ = grpo.update(model, optimizer, rollout, broken, settings())
    assert metrics["skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in lora_parameters(model).items())
    metrics, *_ = grpo.update(model, optimizer, rollout, A, settings())
    assert metrics["skipped"] == 0
    assert math.isfinite(metrics["grad_norm"])


def test_gradients_are_clipped_jointly():
    """Clipping each tensor by itself, or reporting the norm after the clip."""
    model = tiny_model()
    rollout = rollout_of(model)
    free, metrics, _ = gradient(model, rollout, advantages_of(rollout), settings())
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), rel=1e-4)
    cfg = settings(max_grad_norm=float(free.norm()) / 3)
    clipped, metrics, _ = gradient(model, rollout, advantages_of(rollout), cfg)
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), rel=1e-4)
    assert close(clipped, free / 3, 1e-4)


# ---- Token log-probs -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk, plain", [(1, 0), (7, 0), (7, 1), (24, 0), (None, 0)])
def test_chunks_change_nothing(float64, monkeypatch, chunk, plain):
    """Chunks in a wrong order, a short last chunk, an entropy or temperature that is off."""
    if plain:
        monkeypatch.setattr(grpo, "recomputed", partial(checkpoint, use_reentrant=False))
    model = in_double(tiny_model(vocab=50))
    states = torch.randn(24, 16, requires_grad=True)
    targets = torch.randint(50, (24,))
    logps, entropy = grpo.token_logps(model, states, targets, 0.8, chunk)
    p = (states @ model.lm_head.weight.T / 0.8).softmax(-1)
    expected = p[range(24), targets].log()
    assert close(logps, expected, EXACT)
    assert close(entropy, torch.special.entr(p).sum(-1), EXACT)
    assert not entropy.requires_grad
    coefficients = torch.randn(24)
    grads = [torch.autograd.grad(x @ coefficients, states)[0] for x in (logps, expected)]
    assert close(*grads, EXACT)


def test_logits_are_not_kept_for_backward(monkeypatch):
    """The (tokens x vocabulary) matrix in memory: 19 GB for 32,768 tokens of Qwen3 in fp32."""
    N, V, chunk = 24, 50, 6
    model = tiny_model(vocab=V)
    sizes = []
    states = torch.randn(N, 16, requires_grad=True)
    targets = torch.randint(V, (N,))

    def naive(rows):
        parts = []
        for h, y in zip(states.split(rows), targets.split(rows), strict=True):
            parts.append(torch.log_softmax(model.logits(h), -1)[range(len(y)), y])
        return torch.cat(parts)

    def kept(call):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
            call()
        return {N * V, chunk * V} & set(sizes)

    assert kept(lambda: naive(N)) == {N * V}  # the hook does see the naive version,
    assert kept(lambda: naive(chunk)) == {chunk * V}  # and a loop over chunks saves nothing
    assert kept(lambda: grpo.token_logps(model, states, targets, chunk=chunk)) == set()
    assert sizes  # the small things that a checkpoint keeps

    rows = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(len(h)) or logits(h))
    monkeypatch.setattr(grpo, "MAX_LOGITS", chunk * V)  # the default cuts chunks as well
    assert kept(lambda: grpo.token_logps(model, states, targets)) == set()
    assert rows == [chunk] * (N // chunk)


# ---- Signals for the credit rules ----------------------------------------------------------------


def signals_of(model, rollout, **options):
    """The signals that passes find, of all rows in one batch."""
    wanted = {"residual", "ref_logp", "neg_logp"}
    batch, _, found = grpo.score(model, rollout, torch.arange(8), wanted, settings(**options))
    return credit.Signals(batch.mask, **found)


@pytest.mark.parametrize("which", ["fast", "plain"])
def test_signals_are_those_of_the_predicting_state(use, float64, which):
    """Credit for having read a token instead of choosing it (off by one), or a wrong base path.

    Every row alone, in two models: the adapted one, and one that never had an adapter.
    """
    use(which)
    model = in_double(tiny_model())
    base = in_double(tiny_model(lora=False))
    rollout = rollout_of(model)
    known = signals_of(model, rollout, temperature=0.7)
    for row, completion in enumerate(COMPLETIONS):
        prompt, T = PROMPTS[row // 4], len(completion)
        logps, entropy, states = reference(model, prompt, completion, 0.7)
        base_logps, _, base_states = reference(base, prompt, completion, 0.7)
        distance = ((states - base_states) ** 2).sum(-1).sqrt()
        pairs = dict(logp=logps, entropy=entropy, ref_logp=base_logps, residual=distance)
        negative = rollout.problems[row // 4]["negative"]
        pairs["neg_logp"] = reference(model, negative, completion, 0.7)[0]
        for name, expected in pairs.items():
            found = getattr(known, name)[row]
            assert close(found[:T], expected, EXACT), name
            assert (found[T:] == 0).all(), name
        assert known.mask[row].tolist() == [True] * T + [False] * (6 - T)


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_signals_can_be_measured_without_training(float64, kl):
    """A view of a run that changes the adapter, or lacks what a rule reads."""
    model = in_double(tiny_model())
    rollout = rollout_of(model)
    before = torch.nn.utils.parameters_to_vector(lora_parameters(model).values()).clone()
    A = advantages_of(rollout)
    cfg = settings(micro_batch_tokens=20, kl_coef=kl)
    _, measured, _ = grpo.update(model, None, rollout, A, cfg, compare=True)
    expected = signals_of(model, rollout)
    for name in ("logp", "entropy", "ref_logp", "residual", "neg_logp"):
        assert close(getattr(measured, name), getattr(expected, name), EXACT), name
    read = {name for rule in credit.METHODS.values() for name in rule.reads}
    assert all(getattr(measured, name) is not None for name in read)
    assert torch.equal(measured.advantage, A)
    after = torch.nn.utils.parameters_to_vector(lora_parameters(model).values())
    assert torch.equal(after, before)
    assert all(p.grad is None for p in lora_parameters(model).values())


@pytest.mark.parametrize("which", ["fast", "plain"])
@pytest.mark.parametrize("method", ["arca", "divergence"])
@pytest.mark.parametrize("budget", [1, 20, 10**6])
def test_credit_is_uniform_before_the_first_step(use, which, method, budget):
    """Rounding that passes for credit: with B = 0 the two paths must agree to the last bit."""
    use(which)
    model = tiny_model(B=0.0)
    rollout = rollout_of(model)
    known = signals_of(model, rollout)
    m = credit.token_weights(method, known, 2.0)
    assert torch.equal(m, known.mask.float())
    cfg = settings(credit=method, micro_batch_tokens=budget)
    _, metrics, m = gradient(model, rollout, advantages_of(rollout), cfg)
    assert torch.equal(m, known.mask.float())
    assert metrics["credit_fallback"] == 1
    assert metrics["gini"] == 0


# rule: (passes through the trunk, and through the head)
PASSES = dict.fromkeys(credit.METHODS, (1, 1))
PASSES |= dict.fromkeys(["arca", "permuted", "random"], (2, 1))
PASSES |= dict.fromkeys(["divergence", "gcpo", "gcpo_linear"], (2, 2))


@pytest.mark.parametrize("method", credit.METHODS)
def test_passes_of_a_rule(method, monkeypatch):
    """A pass that no rule needs, one that is made twice, an ARCA that touches the vocabulary."""
    model = tiny_model()
    rollout = rollout_of(model)
    trunk = []
    head = []
    counted = []
    logits = model.logits
    backward = torch.Tensor.backward

    def head_is_run(hidden):
        head.append(1)
        return logits(hidden)

    def backward_begins(loss):
        counted.append(len(head))
        return backward(loss)

    model.register_forward_hook(lambda *_: trunk.append(1))
    monkeypatch.setattr(model, "logits", head_is_run)
    monkeypatch.setattr(torch.Tensor, "backward", backward_begins)
    gradient(model, rollout, advantages_of(rollout), settings(credit=method))
    assert (len(trunk), counted) == (PASSES[method][0], [PASSES[method][1]])


@pytest.mark.parametrize("method", ["arca", "gcpo"])
def test_checkpoint_saves_memory_and_changes_nothing(method):
    """A checkpoint that keeps the activations after all, or recomputes them in another state: with
    the adapter off, with another pass's prompts."""
    model = tiny_model()
    cfg = settings(credit=method, kl_coef=0.1, micro_batch_tokens=20)
    rollout = rollout_of(model)
    kept = []

    def pack(tensor):
        kept[-1] += tensor.numel()
        return tensor

    results = []
    for model.gradient_checkpointing in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(gradient(model, rollout, advantages_of(rollout), cfg))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert kept[1] < kept[0] / 3


def test_arca_does_not_depend_on_the_scale_of_the_adapter():
    """An epsilon that makes a small adapter uniform: weights are scale-free to first order in B."""
    model = tiny_model()
    weights = []
    rollout = rollout_of(model)
    for scale in (1e-4, 1e-3, 1e-2):
        scale_B(model, scale)
        weights.append(credit.token_weights("arca", signals_of(model, rollout)))
    small, medium, large = weights
    assert (small - medium).abs().max() < 0.05
    assert (small - medium).norm() < (small - large).norm() / 3  # the rest is of second order
    assert credit.gini(small, small > 0).max() > 0.1  # and they are not uniform


# ---- Advantages, rollouts and metrics ------------------------------------------------------------


def test_advantages_by_hand():
    """A biased deviation, a leave-one-out mean that leaves none out, groups mixed up."""
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.5, 0, 1, 0], [1, 1, 1, 1]])
    for i, group in enumerate(rewards[:2].tolist()):
        mean = sum(group) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        for j, reward in enumerate(group):
            others = [r for k, r in enumerate(group) if k != j]
            expected = dict(grpo=(reward - mean) / deviation, rloo=reward - sum(others) / 3)
            expected["centered"] = reward - mean
            for kind, value in expected.items():
                found = float(grpo.group_advantages(rewards, kind)[i, j])
                assert found == pytest.approx(value, abs=10 * EPSILON)  # a dozen operations
    for kind in ("grpo", "rloo", "centered"):
        for same in (1.0, 0.0, 0.1):  # the fp32 mean of seven times 0.1 is not 0.1
            assert (grpo.group_advantages(torch.full((2, 7), same), kind) == 0).all()
        assert (grpo.group_advantages(rewards, kind)[2] == 0).all()
    with pytest.raises(ValueError, match="grpo, rloo, centered"):
        grpo.group_advantages(rewards, "ppo")


def test_the_reward_in_the_readme(monkeypatch):
    """An example that no longer runs, or a reward between 0 and 1 that counts as right or wrong."""
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(def reward\(.*?)\n```", text, re.DOTALL)
    names = dict(vars(grpo))
    exec(example[1], names)
    said = ["So it is $\\boxed{7}$.", "So it is $\\boxed{8}$.", "7"]
    assert [round(names["reward"](x, dict(answer="7")), 2) for x in said] == [0.99, 0.1, 0]
    rollout = rollout_of(tiny_model(), [[0.1, 0.1, 0.1, 0.1], [0, 0.1, 1, 0.99]])
    signals = grpo.sampled_signals(rollout, advantages_of(rollout))
    found = measure(rollout, signals)
    counts = [found[f"groups_{kind}"] for kind in ("mixed", "all_right", "all_wrong")]
    assert counts == [1, 0, 0]
    problem = dict(problem="1+1?", answer="2", prompt=[1, 2])
    tokenizer = SimpleNamespace(eos_ids=[EOS], decode=str)
    for bad in (float("nan"), 1.5, -1):
        monkeypatch.setattr(grpo, "reward", lambda text, problem, bad=bad: bad)
        with pytest.raises(UserError, match="from 0 to 1"):
            grpo.sample_rollout(tiny_model(), tokenizer, [problem], settings(), 1)


def test_metrics_by_hand(float64):
    """Metrics over the rows that learn instead of all, or over padding."""
    model = in_double(tiny_model())
    base = in_double(tiny_model(lora=False))
    rollout = rollout_of(model, [[1, 1, 1, 1], [0, 0, 1, 0]])
    cfg = settings(credit="surprisal", kl_coef=0.1)
    _, metrics, m = gradient(model, rollout, advantages_of(rollout), cfg, compare=True)
    rows = [reference(model, PROMPTS[i // 4], c) for i, c in enumerate(COMPLETIONS)]
    logps = torch.cat([row[0] for row in rows])
    refs = torch.cat([reference(base, PROMPTS[i // 4], c)[0] for i, c in enumerate(COMPLETIONS)])
    ratios = [sum(w) ** 2 / (len(w) * sum(x * x for x in w)) for w in (row[0] for row in rows)]
    expected = {
        "reward": 5 / 8,
        "completion_tokens": TOKENS,
        "truncated": 3 / 8,
        "skipped": 0,
        "groups_mixed": 1,
        "groups_all_right": 1,
        "groups_all_wrong": 0,
        "credit_fallback": 0,
        "entropy": torch.cat([row[1] for row in rows]).mean().item(),
        "effective_token_ratio": sum(ratios).item() / 8,
        "effective_token_ratio/surprisal/1": sum(ratios).item() / 8,
        "gini/uniform/1": 0,
        "gini/uniform/2": 0,
        "kl": ((refs - logps).exp() - 1 - (refs - logps)).mean().item(),
    }
    found = {key: metrics[key] for key in expected}
    assert found == pytest.approx(expected, rel=EXACT, abs=EXACT)
    names = {f"gini/{method}/{power}" for method in credit.METHODS for power in (1, 2)}
    assert names <= metrics.keys()
    assert torch.allclose(m.sum(1), rollout.completions.lengths.double())


def test_training_scores_what_was_sampled():
    """A sampler and a trainer that disagree on log-probs; rewards given to the wrong completion."""
    model = tiny_model()
    lengths = lambda ids: rf"\boxed{{{len(ids)}}}"  # noqa: E731 (each answer is its own length)
    tokenizer = SimpleNamespace(eos_ids=[EOS], decode=lengths)
    prompts = [[3, 5], [7, 2, 9, 4], [1]]
    problems = [dict(prompt=p, answer=str(n)) for p, n in zip(prompts, (9, 1, 12), strict=True)]
    cfg = settings(samples=16, max_new_tokens=12, temperature=0.8, micro_batch_tokens=100)
    rollout = grpo.sample_rollout(model, tokenizer, problems, cfg, step=1)
    c = rollout.completions
    answers = (c.lengths - c.finished.long()).view(3, 16)
    assert torch.equal(rollout.rewards, (answers == torch.tensor([[9], [1], [12]])).float())
    assert c.finished.any() and not c.finished.all()

    A = advantages_of(rollout)
    assert A.any()
    _, metrics, _ = gradient(model, rollout, A, cfg)
    assert 0 <= metrics["logp_mismatch_mean"] <= metrics["logp_mismatch"] < 1e-4
    cfg.temperature = 1.0
    assert gradient(model, rollout, A, cfg)[1]["logp_mismatch"] > 1e-2  # the metric does notice


def test_controls_are_drawn_per_completion():
    """Noise that depends on the batch, repeats the sampler's uniforms, or is the same at each step:
    permuted credit could not be resumed or compared."""
    model = tiny_model()
    tokenizer = SimpleNamespace(eos_ids=[EOS], decode=str)
    problems = [dict(prompt=p, answer="1") for p in ([3, 5], [7, 2, 9, 4])]
    cfg = settings(credit="permuted", samples=3, seed=5)

    def draw(chosen, step):
        return grpo.sample_rollout(model, tokenizer, chosen, cfg, step)

    both = draw(problems, 1).noise
    T = both.shape[1]
    assert torch.equal(draw(problems[::-1], 1).noise, both[[3, 4, 5, 0, 1, 2]])
    assert torch.equal(draw(problems[1:], 1).noise[:, :1], both[3:, :1])
    assert not torch.equal(draw(problems, 2).noise[:, 0], both[:, 0])
    assert len(both.unique()) == 6 * T
    own = [grpo.uniforms(5, 1, p["prompt"], i, T) for p in problems for i in range(3)]
    assert not torch.isin(both, torch.from_numpy(grpo.np.stack(own))).any()
    cfg.credit = "arca"
    assert draw(problems, 1).noise is None  # drawn for the rules that read it
    for cfg.credit, kept in (("entropy_reduction", False), ("eapo", True)):  # before any pass only
        c = draw(problems, 1).completions
        assert (c.entropy is not None) == kept
        assert c.hidden is None
