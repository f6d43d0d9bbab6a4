"""GRPO against enumeration, finite differences, closed forms and code that is slow and plain."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    EOS,
    Recorder,
    close,
    flat_grad,
    gradient,
    handmade,
    reference,
    scale_B,
    settings,
    tiny_model,
)

import credit
import grpo
from data.problems import TINY
from fast.packing import padding
from hf.checkpoint import load_model
from lora import add_lora, lora_parameters
from system.errors import UserError

PROMPTS = [[3, 5], [7, 2, 9, 4]]  # two groups, of unequal prompts
COMPLETIONS = [[4, EOS], [6, 0, 0, 3, EOS], [5, 1, 8], [EOS]]  # 0 is a token, EOS and padding
COMPLETIONS += [[2, 2, 2, 2], [9, EOS], [1, 3, 5, 7, 9, EOS], [8]]
REWARDS = [[1, 0, 0, 1], [0, 0, 1, 0]]
TOKENS = sum(map(len, COMPLETIONS))


def sampled_logps(model, prompts=PROMPTS, completions=COMPLETIONS, temperature=1.0):
    """What a sampler would have said of the completions, right-padded with 0."""
    G = len(completions) // len(prompts)
    rows = [reference(model, prompts[i // G], c, temperature)[0] for i, c in enumerate(completions)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).detach()


def rollout_of(model, rewards=REWARDS):
    """The completions above with all that a sampler would have kept of them."""
    r = handmade(PROMPTS, COMPLETIONS, rewards, sampled_logps(model))
    rows = [reference(model, PROMPTS[i // 4], c) for i, c in enumerate(COMPLETIONS)]
    for name, place in (("entropy", 1), ("hidden", 2)):
        values = [row[place].detach() for row in rows]
        setattr(r.completions, name, torch.nn.utils.rnn.pad_sequence(values, batch_first=True))
    r.noise = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)).double()
    return r


def advantages_of(r, kind="grpo"):
    return grpo.group_advantages(r.rewards, kind).flatten()


# ---- The policy gradient -------------------------------------------------------------------------


def all_completions(vocab, limit):
    """Every completion that a sampler can end with: those that end in EOS, and those cut off."""
    done, unfinished = [], [[]]
    for _ in range(limit):
        longer = [c + [token] for c in unfinished for token in range(vocab)]
        done += [c for c in longer if c[-1] == EOS]
        unfinished = [c for c in longer if c[-1] != EOS]
    return done + unfinished


@pytest.mark.parametrize("aggregate, temperature", [("token", 1.0), ("token", 0.7), ("seq", 1.0)])
def test_policy_gradient_is_that_of_the_expected_reward(aggregate, temperature):
    """A gradient that is biased: shifted tokens, a lost EOS, a wrong sign, prompt or temperature.

    All 40 completions of a vocabulary of 4 are listed with their exact probabilities. Weighing each
    by its probability, the step's gradient must be that of sum_y p(y) R(y); of `seq`, which divides
    by the length T, that of sum_y p(y) (R(y) - c) / T(y).
    """
    model, prompts, c = tiny_model(vocab=4, seed=3), [[1, 2], [3, 1, 1]], 0.4
    group = all_completions(4, 3)
    rng = torch.Generator().manual_seed(5)
    R = torch.rand(2, len(group), generator=rng)
    T = torch.tensor([len(y) for y in group])
    value = R if aggregate == "token" else (R - c) / T

    def probabilities():
        logps = [[reference(model, x, y, temperature)[0].sum() for y in group] for x in prompts]
        return torch.stack([torch.stack(row).double().exp() for row in logps])  # (2, 40)

    p = probabilities()
    assert torch.allclose(p.sum(1), torch.ones(2).double(), atol=1e-6)
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
    for direction in [exact / exact.norm(), *largest]:
        step = 0.003 * direction
        slope = (expected_reward(start + step) - expected_reward(start - step)) / 0.006
        assert slope == pytest.approx(float(exact @ direction), rel=2e-3)

    # The same from the update, whose normaliser (rows, or tokens) is taken out by the advantages.
    normaliser = 2 * len(group) if aggregate == "seq" else 2 * int(T.sum())
    advantages = (p.detach().float() * (R - c) * normaliser).flatten()  # a constant baseline
    s = settings(aggregate=aggregate, temperature=temperature)
    got, _, _ = gradient(model, handmade(prompts, group * 2, R), advantages, s)
    assert close(-got, exact, 1e-5)


def test_plain_grpo_bit_for_bit():
    """`uniform` that is only nearly GRPO: its gradient must be the same bits, and m exactly 1."""
    model = tiny_model()
    order = [3, 7, 0, 5, 2, 4, 1, 6]  # by length, as the update does: sums in the same order
    r = rollout_of(model)
    A = advantages_of(r)
    got, _, m = gradient(model, r, A, settings())
    assert torch.equal(m, (torch.arange(6) < r.completions.lengths[:, None]).float())

    # GRPO without credit, chunks, masks or losses of our making
    texts = [COMPLETIONS[i] for i in order]
    states, _ = grpo.predicting_states(model, grpo.make_batch(r, torch.tensor(order), "cpu"))
    states = torch.cat([h[: len(y)] for h, y in zip(states, texts, strict=True)])
    share = torch.tensor([1 / (8 * len(y)) for y in texts for _ in y])
    per_token = torch.cat([A[i].expand(len(COMPLETIONS[i])) for i in order])

    def plain(states):
        logps = torch.log_softmax(model.lm_head(states), dim=-1)
        drawn = logps[range(TOKENS), [token for y in texts for token in y]]
        return flat_grad(-(per_token * drawn * share).sum(), model)

    assert torch.equal(got, plain(states))

    # and, up to rounding, without a shared prompt
    rows = [(PROMPTS[i // 4], COMPLETIONS[i]) for i in order]
    alone = [model(torch.tensor([x + y])[:, :-1])[0, len(x) - 1 :] for x, y in rows]
    assert close(got, plain(torch.cat(alone)), 1e-6)


def test_every_completion_token_learns_and_nothing_else(monkeypatch):
    """A mask by token id: EOS, which is also padding, would stop learning, or padding would learn.

    Each state's gradient is compared with the closed form -A / (B T) (W[y] - sum_v p_v W[v]).
    """
    model, kept = tiny_model(), []
    states_of = grpo.predicting_states

    def keep(*args):
        states, compared = states_of(*args)
        states.retain_grad()
        kept.append(states)
        return states, compared

    monkeypatch.setattr(grpo, "predicting_states", keep)
    r = rollout_of(model)
    A, rows = advantages_of(r), torch.arange(8)
    per_row = 1 / (8 * r.completions.lengths)
    known = grpo.given_signals(r, A)
    grpo.add_gradient(model, r, rows, known, None, per_row, settings(), set())
    got, W = kept[0].grad, model.lm_head.weight  # (8, T, D)
    for row, completion in enumerate(COMPLETIONS):
        prompt, T = PROMPTS[row // 4], len(completion)
        _, _, states = reference(model, prompt, completion)
        p = (states @ W.T).softmax(-1)
        expected = -A[row] / (8 * T) * (W[completion] - p @ W)
        assert torch.allclose(got[row, :T], expected, atol=1e-6)
        assert expected[-1].norm() > 1e-3  # the last token, EOS where there is one, does learn
        assert (got[row, T:] == 0).all()


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize("aggregate", ["seq", "token"])
@pytest.mark.parametrize("method", credit.METHODS)
def test_micro_batches_change_nothing(method, aggregate, kl):
    """Normalisers or metrics of a micro-batch, not of the step; rows put back wrongly."""
    model = tiny_model()
    r = rollout_of(model, [[1, 0, 0, 1], [1, 1, 1, 1]])  # the second group has no spread
    options = dict(credit=method, aggregate=aggregate, kl=kl, sharpening=2.0)
    whole = gradient(model, r, advantages_of(r), settings(**options))
    for budget in (1, 20):
        part = gradient(model, r, advantages_of(r), settings(**options, micro_tokens=budget))
        assert close(part[0], whole[0], 1e-6)
        part[1]["padding"] = whole[1]["padding"]  # which does depend on the batches
        assert part[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)
        assert torch.allclose(part[2], whole[2], atol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(credit="gcpo", kl=0.1, arca_layer="sum")])
def test_the_same_update_gives_the_same_bytes(options):
    """Sums whose order depends on which thread comes first: a run that is resumed, or repeated with
    its seed, would drift away from the first. (Four threads do so on any processor.)"""
    rng = torch.Generator().manual_seed(0)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=rng).tolist()  # noqa: E731
    model, threads = add_lora(load_model(TINY), 16, 32.0), torch.get_num_threads()
    V = model.config.vocab_size
    prompts = [draw(0, V, n) for n in draw(12, 20, 16)]
    r = handmade(prompts, [draw(0, V, n) for n in draw(8, 16, 128)], draw(0, 2, 128))
    scale_B(model, 0.01)
    s = settings(**dict(credit="arca") | options)
    torch.set_num_threads(4)
    try:
        first, *again = [gradient(model, r, advantages_of(r), s) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert first[0].norm() > 0
    for other in again:
        assert torch.equal(other[0], first[0]) and torch.equal(other[2], first[2])
        assert other[1] == first[1]


def test_micro_batches_hold_each_chosen_row_once():
    """A row that is trained on twice, left out, or put in a batch over the budget; or groups that
    are not the cheapest of all."""
    r = rollout_of(tiny_model())
    chosen = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    rows = [3, 7, 0, 5, 4, 1]  # the chosen ones by length

    def read(group):
        prompts = {i // 4: len(PROMPTS[i // 4]) for i in group}
        longest = max(len(COMPLETIONS[i]) for i in group)
        return len(group) * longest + len(prompts) * max(prompts.values())

    def cost(groups, each):
        return sum(read(group) + each for group in groups)

    for budget, each in itertools.product((1, 10, 15, 24, 1000), (0, 1, 5, 64)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fast.packing.PASS", each)
            groups = [g.tolist() for g in grpo.micro_batches(r, chosen, budget)]
        assert [i for g in groups for i in g] == rows
        assert all(len(g) == 1 or read(g) <= budget for g in groups)
        ways = itertools.product((False, True), repeat=5)  # cut behind each row, or not
        splits = [np.split(rows, np.flatnonzero(way) + 1) for way in ways]
        fit = [s for s in splits if all(len(g) == 1 or read(g) <= budget for g in s)]
        assert cost(groups, each) == min(cost(split, each) for split in fit)


def test_padding_by_hand():
    """A share of padding that leaves out the prompts, or counts tokens that no pass reads."""
    r = rollout_of(tiny_model())  # prompts of 2 and 4 tokens, completions of 2 5 3 1, 4 2 6 1
    groups = [torch.tensor([1, 6]), torch.tensor([0])]  # reads 2 x 4 + 2 x 5, and 2 + 1
    assert padding(r, groups) == pytest.approx(1 - (2 + 4 + 4 + 5 + 2 + 1) / (8 + 10 + 2 + 1))


def test_shared_prompts_equal_each_row_alone():
    """A completion that sees another problem's prompt, its padding, or stands at a wrong place."""
    model, r = tiny_model(), rollout_of(tiny_model())
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [6, 0, 5], [7], [3, 7]):
        b = grpo.make_batch(r, torch.tensor(rows), "cpu")
        for layer in ("final", "sum"):
            states, compared = grpo.predicting_states(model, b, layer)
            for i, row in enumerate(rows):
                x, y, blocks = PROMPTS[row // 4], COMPLETIONS[row], []
                alone = model(torch.tensor([x + y]), blocks=blocks)[0, len(x) - 1 : -1]
                assert close(states[i, : len(y)], alone, 1e-5)
                if layer == "sum":
                    for got, want in zip(compared, blocks, strict=True):
                        assert close(got[i, : len(y)], want[0, len(x) - 1 : -1], 1e-5)


@pytest.mark.parametrize("aggregate", ["seq", "token"])
@pytest.mark.parametrize("sharpening", [None, 2.0])
def test_loss_by_hand(sharpening, aggregate):
    """Credit that does not reach the loss, or a normaliser that leaves groups without spread out.

    The formula, term by term; credit is none, or m_t = T s_t^2 / sum s^2 with s = -log pi.
    """
    model = tiny_model()
    r = rollout_of(model, [[1, 0, 0, 1], [1, 1, 1, 1]])
    A, loss = [0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5, 0, 0, 0, 0], 0.0
    for row, completion in enumerate(COMPLETIONS):
        T = len(completion)
        logps, _, _ = reference(model, PROMPTS[row // 4], completion)
        m = T * logps.detach() ** 2 / (logps.detach() ** 2).sum() if sharpening else torch.ones(T)
        share = 1 / (8 * T) if aggregate == "seq" else 1 / TOKENS
        loss = loss - A[row] * share * (m * logps).sum()
    method = dict(credit="surprisal", sharpening=sharpening) if sharpening else {}
    expected = flat_grad(loss, model)
    got, metrics, _ = gradient(model, r, advantages_of(r), settings(aggregate=aggregate, **method))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert close(got, expected, 1e-5)


@pytest.mark.parametrize("spread", [True, False])
def test_a_step_moves_B_iff_a_group_has_spread(spread):
    """Learning from nothing (a group that is all right or all wrong), or not learning at all."""
    model = tiny_model(B=0.0)
    r = rollout_of(model, [[1, 1, 1, 1], [0, 0, 1, 0] if spread else [0, 0, 0, 0]])
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.01, weight_decay=0.0)
    metrics, *_ = grpo.update(model, optimizer, r, advantages_of(r), settings())
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


def test_second_update_uses_ratio_and_clip():
    """Going on with A log pi on a rollout that the policy has moved away from."""
    model = tiny_model()
    r, s = rollout_of(model), settings(updates=2)
    A, once = advantages_of(r), gradient(model, r, advantages_of(r), settings())[0]
    optimizer = Recorder(model, lr=1.0)
    start = torch.nn.utils.parameters_to_vector(lora_parameters(model).values()).clone()
    grpo.update(model, optimizer, r, A, s)
    first, second = optimizer.seen
    assert close(first, once, 1e-5)  # the ratio is 1: no difference yet

    torch.nn.utils.vector_to_parameters(start - first, lora_parameters(model).values())
    loss, clipped = 0.0, 0
    for row, completion in enumerate(COMPLETIONS):
        logps, _, _ = reference(model, PROMPTS[row // 4], completion)
        for t, logp in enumerate(logps):
            ratio = (logp - r.completions.logps[row, t]).exp().item()
            outside = ratio > 1.28 if A[row] > 0 else ratio < 0.8
            clipped += outside
            loss = loss - A[row] / (8 * len(completion)) * ratio * logp * (not outside)
    assert 0 < clipped < TOKENS  # or this test says nothing
    assert close(second, flat_grad(loss, model), 1e-4)
    assert not close(second, first, 0.1)


def test_kl_estimate_is_the_kl_in_expectation_and_never_negative():
    """An estimator with the two policies swapped, or one that rewards leaving the base model."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    pi, ref = torch.log_softmax(logits.double(), -1)
    estimates = grpo.kl_k3(pi, ref)
    assert float((pi.exp() * estimates).sum()) == pytest.approx(
        float((pi.exp() * (pi - ref)).sum()), rel=1e-9
    )
    assert (estimates >= 0).all()
    assert (grpo.kl_k3(pi, pi) == 0).all()


def test_kl_penalty_pulls_towards_the_base_model():
    """A penalty with the wrong sign, or against the adapted model itself (whose gradient is 0).

    Over all one-token completions, weighed by pi, the gradient of k3 is that of KL(base || pi).
    """
    vocab, prompt = 11, [3, 5]
    model, base = tiny_model(), tiny_model(lora=False)
    r = handmade([prompt], [[v] for v in range(vocab)], [[0] * vocab])
    logp = torch.log_softmax(model.logits(model(torch.tensor([prompt]))[0, -1]), -1)
    b = torch.log_softmax(base.logits(base(torch.tensor([prompt]))[0, -1]), -1)
    args = (model, r, torch.arange(vocab), grpo.given_signals(r, torch.zeros(vocab)), None)
    grpo.add_gradient(*args, logp.exp().detach(), settings(kl=0.5), {"ref_logp"})
    got = torch.cat([p.grad.flatten() for p in lora_parameters(model).values()])
    assert close(got, 0.5 * flat_grad((b.exp() * (b - logp)).sum(), model), 1e-4)
    # A step in which no group has spread still has this gradient.
    got, metrics, _ = gradient(model, r, torch.zeros(vocab), settings(kl=0.5))
    assert metrics["grad_norm"] > 0 and not got.isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])  # 1e30: finite loss, infinite norm
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    """One bad step that turns the adapter into NaN, or whose gradient stays for the next step."""
    model = tiny_model()
    r = rollout_of(model)
    A = advantages_of(r)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.01)
    before = {name: p.clone() for name, p in lora_parameters(model).items()}
    metrics, *_ = grpo.update(model, optimizer, r, torch.where(A.max() == A, bad, A), settings())
    assert metrics["skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in lora_parameters(model).items())
    metrics, *_ = grpo.update(model, optimizer, r, A, settings())
    assert metrics["skipped"] == 0 and math.isfinite(metrics["grad_norm"])


def test_gradients_are_clipped_jointly():
    """Clipping each tensor by itself, or reporting the norm after the clip."""
    model = tiny_model()
    r = rollout_of(model)
    free, metrics, _ = gradient(model, r, advantages_of(r), settings())
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), rel=1e-4)
    limit = float(free.norm()) / 3
    clipped, metrics, _ = gradient(model, r, advantages_of(r), settings(grad_clip=limit))
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), rel=1e-4)
    assert close(clipped, free / 3, 1e-4)


# ---- Token log-probs -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 24, None])
def test_chunks_change_nothing(chunk):
    """Chunks in a wrong order, a short last chunk, an entropy or temperature that is off."""
    model = tiny_model(vocab=50)
    states = torch.randn(24, 16, requires_grad=True)
    targets = torch.randint(50, (24,))
    logps, entropy = grpo.token_logps(model, states, targets, 0.8, chunk)
    p = (states @ model.lm_head.weight.T / 0.8).softmax(-1)
    expected = p[range(24), targets].log()
    assert torch.allclose(logps, expected, atol=1e-5)
    assert torch.allclose(entropy, torch.special.entr(p).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    coefficients = torch.randn(24)
    grads = [torch.autograd.grad(x @ coefficients, states)[0] for x in (logps, expected)]
    assert torch.allclose(*grads, atol=1e-5)


def test_logits_are_not_kept_for_backward(monkeypatch):
    """The (tokens x vocabulary) matrix in memory: 19 GB for 32,768 tokens of Qwen3 in fp32."""
    N, V, chunk = 24, 50, 6
    model, sizes = tiny_model(vocab=V), []
    states, targets = torch.randn(N, 16, requires_grad=True), torch.randint(V, (N,))

    def naive(rows):
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        return torch.cat(
            [torch.log_softmax(model.logits(h), -1)[range(len(y)), y] for h, y in parts]
        )

    def kept(call):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
            call()
        return {N * V, chunk * V} & set(sizes)

    assert kept(lambda: naive(N)) == {N * V}  # the hook does see the naive version,
    assert kept(lambda: naive(chunk)) == {chunk * V}  # and a loop over chunks saves nothing
    assert kept(lambda: grpo.token_logps(model, states, targets, chunk=chunk)) == set()
    assert sizes  # the small things that a checkpoint keeps

    rows, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(len(h)) or logits(h))
    monkeypatch.setattr(grpo, "LOGITS", chunk * V)  # the default cuts chunks as well
    assert kept(lambda: grpo.token_logps(model, states, targets)) == set()
    assert rows == [chunk] * (N // chunk)


# ---- Signals for the credit rules ----------------------------------------------------------------


def signals_of(model, r, **options):
    wanted = {"residual", "ref_logp", "neg_logp"}
    b, _, found = grpo.signals(model, r, torch.arange(8), wanted, settings(**options))
    return credit.Signals(b.mask, **found)


def test_signals_are_those_of_the_predicting_state():
    """Credit for having read a token instead of choosing it (off by one), or a wrong base path.

    Every row alone, in two models: the adapted one, and one that never had an adapter.
    """
    model, base = tiny_model(), tiny_model(lora=False)
    r = rollout_of(model)
    known = signals_of(model, r, temperature=0.7)
    for row, completion in enumerate(COMPLETIONS):
        prompt, T = PROMPTS[row // 4], len(completion)
        logps, entropy, states = reference(model, prompt, completion, 0.7)
        base_logps, _, base_states = reference(base, prompt, completion, 0.7)
        distance = ((states - base_states) ** 2).sum(-1).sqrt()
        pairs = dict(logp=logps, entropy=entropy, ref_logp=base_logps, residual=distance)
        negative = r.problems[row // 4]["negative"]
        pairs["neg_logp"] = reference(model, negative, completion, 0.7)[0]
        for name, expected in pairs.items():
            got = getattr(known, name)[row]
            assert torch.allclose(got[:T], expected, atol=1e-5), name
            assert (got[T:] == 0).all(), name
        assert known.mask[row].tolist() == [True] * T + [False] * (6 - T)


@pytest.mark.parametrize("method", ["arca", "divergence"])
@pytest.mark.parametrize("budget", [1, 20, 10**6])
def test_credit_is_uniform_before_the_first_step(method, budget):
    """Rounding that passes for credit: with B = 0 the two paths must agree to the last bit."""
    model = tiny_model(B=0.0)
    r = rollout_of(model)
    known = signals_of(model, r)
    m = credit.token_weights(method, known, 2.0)
    assert torch.equal(m, known.mask.float())
    s = settings(credit=method, micro_tokens=budget)
    _, metrics, m = gradient(model, r, advantages_of(r), s)
    assert torch.equal(m, known.mask.float())
    assert (metrics["credit_fallback"], metrics["gini"]) == (1, 0)


@pytest.mark.parametrize("layer", ["prenorm", "sum"])
def test_arca_layers(layer):
    """States of the wrong block, norms of a sum instead of a sum of norms, states after the norm.

    Every row alone, block by block, in an adapted model and one that never had an adapter.
    """
    model, base = tiny_model(), tiny_model(lora=False)
    known = signals_of(model, rollout_of(model), arca_layer=layer)
    for row, completion in enumerate(COMPLETIONS):
        prompt, n = PROMPTS[row // 4], len(completion)
        blocks = {}
        for name, m in (("adapted", model), ("base", base)):
            states = blocks[name] = []
            hooks = [
                block.register_forward_hook(lambda _, __, out, states=states: states.append(out[0]))
                for block in m.model.layers
            ]
            with torch.no_grad():
                m(torch.tensor([prompt + completion]))
            for hook in hooks:
                hook.remove()
        gaps = [
            (a - b).norm(dim=-1) for a, b in zip(blocks["adapted"], blocks["base"], strict=True)
        ]
        expected = sum(gaps) if layer == "sum" else gaps[-1]
        at = slice(len(prompt) - 1, len(prompt) + n - 1)
        assert torch.allclose(known.residual[row, :n], expected[at], atol=1e-5)


# rule: (passes through the trunk, and through the head)
PASSES = dict.fromkeys(credit.METHODS, (1, 1))
PASSES |= dict.fromkeys(["arca", "permuted", "random"], (2, 1))
PASSES |= dict.fromkeys(["divergence", "gcpo", "gcpo_linear"], (2, 2))


@pytest.mark.parametrize("method", credit.METHODS)
def test_passes_of_a_rule(method, monkeypatch):
    """A pass that no rule needs, one that is made twice, an ARCA that touches the vocabulary."""
    model, trunk, head = tiny_model(), [], []
    r, logits = rollout_of(model), model.logits
    model.register_forward_hook(lambda *_: trunk.append(1))
    monkeypatch.setattr(
        model, "logits", lambda h: head.append(torch.is_grad_enabled()) or logits(h)
    )
    backward = torch.Tensor.backward
    counted = []
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda x: counted.append(len(head)) or backward(x)
    )
    gradient(model, r, advantages_of(r), settings(credit=method))
    assert (len(trunk), counted) == (PASSES[method][0], [PASSES[method][1]])


@pytest.mark.parametrize("method", ["arca", "gcpo"])
def test_checkpoint_saves_memory_and_changes_nothing(method):
    """A checkpoint that keeps the activations after all, or recomputes them in another state: with
    the adapter off, with another pass's prompts."""
    model, s = tiny_model(), settings(credit=method, kl=0.1, micro_tokens=20)
    r, kept = rollout_of(model), []

    def pack(tensor):
        kept[-1] += tensor.numel()
        return tensor

    results = []
    for model.checkpoint in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(gradient(model, r, advantages_of(r), s))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert kept[1] < kept[0] / 3


def test_arca_does_not_depend_on_the_scale_of_the_adapter():
    """An epsilon that makes a small adapter uniform: weights are scale-free to first order in B."""
    model, weights = tiny_model(), []
    r = rollout_of(model)
    for scale in (1e-4, 1e-3, 1e-2):
        scale_B(model, scale)
        weights.append(credit.token_weights("arca", signals_of(model, r)))
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
                got = grpo.group_advantages(rewards, kind)[i, j]
                assert float(got) == pytest.approx(value, abs=1e-6)
    for kind in ("grpo", "rloo", "centered"):
        for same in (1.0, 0.0, 0.1):  # the fp32 mean of seven times 0.1 is not 0.1
            assert (grpo.group_advantages(torch.full((2, 7), same), kind) == 0).all()
        assert (grpo.group_advantages(rewards, kind)[2] == 0).all()
    with pytest.raises(UserError, match="grpo, rloo, centered"):
        grpo.group_advantages(rewards, "ppo")


def test_metrics_by_hand():
    """Metrics over the rows that learn instead of all, or over padding."""
    model = tiny_model()
    r = rollout_of(model, [[1, 1, 1, 1], [0, 0, 1, 0]])
    s = settings(credit="surprisal", kl=0.1)
    _, metrics, m = gradient(model, r, advantages_of(r), s, compare=True)
    rows = [reference(model, PROMPTS[i // 4], c) for i, c in enumerate(COMPLETIONS)]
    expected = dict(reward=5 / 8, completion_tokens=TOKENS, truncated=3 / 8, skipped=0)
    expected |= dict(groups_mixed=1, groups_all_right=1, groups_all_wrong=0, credit_fallback=0)
    expected["entropy"] = torch.cat([entropy for _, entropy, _ in rows]).mean().item()
    ratios = [sum(w) ** 2 / (len(w) * sum(x * x for x in w)) for w in (row[0] for row in rows)]
    expected["effective_token_ratio"] = sum(ratios).item() / 8
    expected["effective_token_ratio/surprisal/1"] = sum(ratios).item() / 8
    expected |= {"gini/uniform/1": 0, "gini/uniform/2": 0}
    base = tiny_model(lora=False)
    refs = torch.cat([reference(base, PROMPTS[i // 4], c)[0] for i, c in enumerate(COMPLETIONS)])
    log_ratio = refs - torch.cat([logps for logps, _, _ in rows])
    expected["kl"] = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, abs=1e-5)
    assert {f"gini/{method}/{p}" for method in credit.METHODS for p in (1, 2)} <= metrics.keys()
    assert torch.allclose(m.sum(1), r.completions.lengths.float())


def test_training_scores_what_was_sampled():
    """A sampler and a trainer that disagree on log-probs; rewards given to the wrong completion."""
    model = tiny_model()
    lengths = lambda ids: rf"\boxed{{{len(ids)}}}"  # noqa: E731 (each answer is its own length)
    tokenizer = SimpleNamespace(eos_ids=[EOS], decode=lengths)
    prompts = [[3, 5], [7, 2, 9, 4], [1]]
    problems = [dict(prompt=p, answer=str(n)) for p, n in zip(prompts, (9, 1, 12), strict=True)]
    s = settings(samples=16, max_new_tokens=12, temperature=0.8, micro_tokens=100)
    r = grpo.rollout(model, tokenizer, problems, s, step=1)
    c = r.completions
    answers = (c.lengths - c.finished.long()).view(3, 16)
    assert torch.equal(r.rewards, (answers == torch.tensor([[9], [1], [12]])).float())
    assert grpo.has_spread(r.rewards).any() and c.finished.any() and not c.finished.all()

    A = grpo.group_advantages(r.rewards).flatten()
    _, metrics, _ = gradient(model, r, A, s)
    assert 0 <= metrics["logp_mismatch_mean"] <= metrics["logp_mismatch"] < 1e-4
    s.temperature = 1.0
    assert gradient(model, r, A, s)[1]["logp_mismatch"] > 1e-2  # the metric does notice


def test_controls_are_drawn_per_completion():
    """Noise that depends on the batch, repeats the sampler's uniforms, or is the same at each step:
    permuted credit could not be resumed or compared."""
    model = tiny_model()
    tokenizer = SimpleNamespace(eos_ids=[EOS], decode=str)
    problems = [dict(prompt=p, answer="1") for p in ([3, 5], [7, 2, 9, 4])]
    s = settings(credit="permuted", samples=3, seed=5)
    draw = lambda chosen, step: grpo.rollout(model, tokenizer, chosen, s, step).noise  # noqa: E731
    both = draw(problems, 1)
    T = both.shape[1]
    assert torch.equal(draw(problems[::-1], 1), both[[3, 4, 5, 0, 1, 2]])
    assert torch.equal(draw(problems[1:], 1)[:, :1], both[3:, :1])
    assert not torch.equal(draw(problems, 2)[:, 0], both[:, 0]) and len(both.unique()) == 6 * T
    own = [grpo.uniforms(5, 1, p["prompt"], i, T) for p in problems for i in range(3)]
    assert not torch.isin(both, torch.from_numpy(grpo.np.stack(own))).any()
    s.credit = "arca"
    assert draw(problems, 1) is None  # drawn for the rules that read it
    for s.credit, kept in (("entropy_reduction", False), ("eapo", True)):  # before any pass only
        c = grpo.rollout(model, tokenizer, problems, s, 1).completions
        assert (c.entropy is not None, c.hidden) == (kept, None)
