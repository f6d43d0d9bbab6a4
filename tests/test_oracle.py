"""The oracle against exact values, on models small enough to enumerate every completion."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import EOS, settings, tiny_model

import credit
from experiments import arms
from experiments.oracle import bootstrap, chosen_rows, score, summary
from experiments.rows import RESULTS, in_cell, read_results
from experiments.truth import follow, open_run, prefix_values, starts_of
from grpo import Rollout, group_advantages, row_weights
from run.metrics import CLASSES
from sample import Completions, generate
from system.errors import UserError
from train import Settings

LIMIT = 5  # tokens a completion may have


def grade(p, ids):
    """A reward that depends on all the tokens, and not on the last alone."""
    return float((sum(ids) + p) % 3 == 0)


def exact_values(model, prompt, p, prefix=()):
    """{prefix: its value} of this prefix and all that follow, by enumeration in every step."""
    if prefix and (prefix[-1] == EOS or len(prefix) == LIMIT):
        return {prefix: grade(p, prefix)}
    logits = model.logits(model(torch.tensor([prompt + list(prefix)]))[0, -1])
    probs, values, mean = logits.softmax(-1).tolist(), {}, 0.0
    for token, prob in enumerate(probs):
        values |= exact_values(model, prompt, p, (*prefix, token))
        mean += prob * values[*prefix, token]
    return values | {prefix: mean}


@pytest.fixture(scope="module")
def known():
    """(model, a Rollout of two problems and four samples, the exact values of each problem)."""
    model = tiny_model(vocab=4)
    problems = [dict(prompt=[1, 2]), dict(prompt=[3])]
    prompts = [p["prompt"] for p in problems]
    c = generate(model, prompts, 4, LIMIT, eos_ids=[EOS], seed=3)
    ids = [tuple(c.tokens[i, : c.lengths[i]].tolist()) for i in range(8)]
    rewards = torch.tensor([grade(i // 4, x) for i, x in enumerate(ids)]).view(2, 4)
    with torch.no_grad():
        exact = [exact_values(model, prompt, p) for p, prompt in enumerate(prompts)]
    return model, Rollout(problems, c, ["" for _ in ids], rewards), exact


def deviations(known, n=1000, seed=0):
    """How many standard errors each estimate is off: those of a half, one list a half."""
    model, rollout, exact = known
    cfg, rows = settings(max_new_tokens=LIMIT, seed=seed), torch.arange(8)
    V, visits = prefix_values(model, rollout, rows, cfg, [EOS], grade, n, 8)
    found = [[], []]
    for half in (0, 1):
        for row in range(8):
            ids = tuple(
                rollout.completions.tokens[row, : rollout.completions.lengths[row]].tolist()
            )
            for t in range(len(ids)):
                v = exact[row // 4][ids[:t]]
                error = V[half, row, t].item() - v
                found[half].append(error / math.sqrt(v * (1 - v) / visits[half, row, t].item()))
            assert V[half, row, len(ids) :].tolist() == [grade(row // 4, ids)] * (
                V.shape[2] - len(ids)
            )
    return found


def test_values_are_those_of_enumeration(known):
    """Continuations of the wrong prefix, cut at the wrong length, counted twice or for prefixes
    they do not pass would give values that are off by more than their error allows."""
    for errors in deviations(known):
        assert max(map(abs, errors)) < 4
        assert 0.5 < np.square(errors).mean() ** 0.5 < 1.6  # nor are they better than they can be


@pytest.fixture(scope="module")
def many(known):
    """The deviations of 20 seeds: (seed, half, prefix)."""
    return np.array([deviations(known, n=100, seed=seed) for seed in range(20)])


def test_values_are_unbiased(many):
    """An error that is small for one seed but has always one sign would bias every delta."""
    assert np.abs(many.mean(axis=(0, 1)) * math.sqrt(40)).max() < 4


def test_halves_are_independent(many):
    """If the halves shared continuations, the product of their deltas would hold noise."""
    assert abs((many[:, 0] * many[:, 1]).mean()) < 0.2  # their covariance, of variances of 1


def test_deltas_sum_to_reward_minus_the_prompts_value(known):
    """A reward that is estimated instead of looked up, or a lost step, breaks the sum; that the
    completions of a problem disagree about V(prompt) means that it was estimated twice."""
    model, rollout, _ = known
    cfg = settings(max_new_tokens=LIMIT)
    V, visits = prefix_values(model, rollout, torch.arange(8), cfg, [EOS], grade, 400, least=100)
    assert V[:, :, 0].view(2, 2, 4).std(dim=2).max() == 0
    assert (visits[:, :, 0] == 200).all()  # by its own 400 continuations, and nothing else
    delta, prompt = V.diff(dim=2), V[:, :, 0]
    assert torch.allclose(delta.sum(2), rollout.rewards.flatten() - prompt, atol=1e-6)
    lengths = rollout.completions.lengths.tolist()
    for row, n in enumerate(lengths):
        assert visits[:, row, :n].min() >= 50 and not visits[:, row, n:].any()
        assert not delta[:, row, n:].any()  # nothing happens after the end


def test_starts_follow_the_probabilities():
    """Too few starts leave prefixes without continuations; a start after every token would cost
    ten times as much."""
    prefixes = [(0, tuple(range(t))) for t in range(6)]
    probs = [0.9, 0.4, 0.8, 0.6, 0.1]  # the last token ends it: its prefix needs no estimate
    assert starts_of(prefixes, probs) == [prefixes[t] for t in (0, 2, 4)]


def test_continuations_count_for_what_they_pass_and_no_more():
    """Worked by hand: two continuations from the prompt beside a completion 5, 6, 7."""
    tally = {(0, ids): np.zeros((2, 2)) for ids in [(), (5,), (5, 6)]}
    tokens = torch.tensor([[5, 6, 9, 1], [8, 6, 9, 0]])
    c = Completions(tokens, torch.tensor([4, 3]), torch.zeros(2, 4), torch.ones(2).bool())
    grade = lambda p, ids: {(5, 6, 9): 1.0, (8, 6, 9): 0.0}[ids]  # noqa: E731 cut off at 3 tokens
    follow(tally, [(0, ())], c, 2, 3, grade)
    assert tally[0, ()].tolist() == [[1, 0], [1, 1]]  # won, visits; by half
    assert tally[0, (5,)].tolist() == tally[0, (5, 6)].tolist() == [[1, 0], [1, 0]]


# ---- The measures --------------------------------------------------------------------------------


def test_scores_by_hand():
    """A normalisation or a mask that is wrong would rank the rules wrongly."""
    mask = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    delta = torch.tensor([[0.0, -0.6, 0.8, 0.0, 0.0]])
    m = torch.tensor([[1.0, 0.0, 3.0, 0.0, 9.0]])
    # Gini: sorted 0 0 1 3 with weights -3 -1 1 3, over n times the sum.
    assert score(m * mask, delta, mask)[0].tolist() == pytest.approx([10 / 16, 0.75])


def test_ties_for_the_last_place_count_in_part():
    """Where few tokens have a delta, those that tie at 0 must not be chosen by their position."""
    mask = torch.ones(1, 20).bool()  # a tenth is two tokens
    x = torch.zeros(1, 20)
    x[0, 19] = 0.5
    m = torch.arange(20.0)[None]
    rest = m[0, :19].mean()  # one more place, for any of the others
    assert score(m, x, mask)[0, 1].item() == pytest.approx(float((19 + rest) / m.sum()))


def test_bootstrap_resamples_problems():
    """Resampling completions instead of problems makes intervals too narrow: copies of the same
    completion say nothing new."""
    x = np.random.default_rng(1).normal(size=(40, 1))
    mean, low, high = bootstrap(x)
    assert mean == pytest.approx(x.mean(), abs=1e-4)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 40**0.5, rel=0.1)
    assert bootstrap(np.repeat(x, 5, axis=1)) == [mean, low, high]


def test_one_right_and_one_wrong_of_each_mixed_problem():
    """Groups without spread teach nothing, and must not be measured."""
    rewards = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert chosen_rows(rewards).tolist() == [4, 3, 9, 10]


def test_a_summary_keeps_sides_and_classes_apart():
    """Two batches of one problem each: shares of the wrong side, or of the wrong class, would
    place what decides elsewhere."""
    side = np.zeros((2, len(CLASSES)))  # right, wrong
    side[0, 1] = side[1, 3] = 4
    batch = dict(tokens=side + 1, delta=side / 100, noise=np.array([0.01, 0.03]))
    batch |= {"arca/1": np.array([[0.1, 0.3], [0.2, 0.5]])}
    found = summary([batch, batch])
    assert (found["completions"], found["problems"]) == (4, 2)
    assert found["delta"]["right"] == {name: float(name == "digits") for name in CLASSES}
    assert found["delta"]["wrong"] == {name: float(name == "words") for name in CLASSES}
    assert found["tokens"]["wrong"]["words"] == round(5 / 11, 4)
    assert found["delta_rms"] == round((0.08 / 22) ** 0.5, 5)
    assert found["noise_rms"] == round((0.04 / 22) ** 0.5, 5)
    gini, top = [0.15] * 3, [0.4] * 3
    assert found["rules"] == {"arca/1": dict(gini=gini, top=top)}


# ---- Training with changed rules -----------------------------------------------------------------


@pytest.mark.parametrize("arm", ["true", "true_signed", "true_delta"])
def test_true_credit(known, arm):
    """The multipliers must be in proportion to |delta|, have mean one, and with the sign give A m
    the sign of delta; completions without an advantage are not sampled for. As the advantage, delta
    must come to (1 / B) delta in the loss, of every completion."""
    model, rollout, exact = known
    cfg, advantages = settings(max_new_tokens=LIMIT), group_advantages(rollout.rewards).flatten()
    how = (model, rollout, advantages, cfg, [EOS], grade, 2000, 0)
    A, m = arms.true_credit(arm, *how)
    assert torch.equal(A, advantages) or arm == "true_delta"
    in_loss = A[:, None] * m * row_weights(rollout.completions.lengths, "seq")[:, None]
    for row in range(8):
        n = int(rollout.completions.lengths[row])
        ids = tuple(rollout.completions.tokens[row, :n].tolist())
        values = [exact[row // 4][ids[:t]] for t in range(n + 1)]
        delta = torch.tensor(values).diff()
        expected = n * delta.abs() / delta.abs().sum()
        if arm == "true_signed":
            expected = expected * delta.sign() * advantages[row].sign()
        if advantages[row] == 0:
            expected = torch.ones(n)
        if arm == "true_delta":
            assert torch.allclose(in_loss[row, :n], delta / 8, atol=0.01)
        else:
            assert torch.allclose(m[row, :n], expected, atol=0.35)
        assert not m[row, n:].any()


def test_changes_of_arca_by_hand():
    """A change that also moved other tokens, or made up for itself, would test something else."""
    answer = CLASSES.index("answer")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    residual = torch.tensor([[1.0, 1.0, 4.0, 2.0], [3.0, 0.0, 3.0, 9.0]])  # 9: padding
    classes = torch.tensor([[0, answer, answer, 6], [answer, arms.START, 0, 0]])
    signals = credit.Signals(mask, residual=residual, noise=classes)
    expected = {  # ARCA: 0.5 0.5 2 1 and 1.5 0 1.5
        "answer_cut": [[0.5, 0.5, 1.0, 1.0], [1.0, 0.0, 1.5, 0.0]],
        "forks_paid": [[0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 1.5, 0.0]],
        "answer_only": [[1.0, 0.5, 2.0, 1.0], [1.5, 1.0, 1.0, 0.0]],
        "first_halved": [[0.25, 0.5, 2.0, 1.0], [0.75, 0.0, 1.5, 0.0]],
        "plain": [[4.0, 4.0, 4.0, 4.0], [3.0, 3.0, 3.0, 0.0]],
    }
    for arm, multipliers in expected.items():
        found = arms.RULES[arm].multipliers(signals.masked(), 1)
        assert torch.allclose(found, torch.tensor(multipliers)), arm


def test_arms_resume(tmp_path, monkeypatch):
    """A run that is made twice, or lost when the next one fails, costs minutes; runs of other
    settings must not be taken for these."""
    asked = []

    def fake(cfg):
        asked.append((cfg.credit, cfg.prompts, cfg.seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return dict(greedy=0.5, reward=[cfg.seed / 8])

    monkeypatch.setattr(arms, "train_arm", fake)
    path = tmp_path / "arms.json"
    wanted = ["arca_64", "plain"], (1, 2)
    with pytest.raises(KeyboardInterrupt):
        arms.make(path, *wanted)
    rows = arms.make(path, *wanted)
    assert asked == [("arca", 64, 1), ("plain", 8, 1), *[("arca", 64, 2)] * 2, ("plain", 8, 2)]
    expected = [("arca_64", 1), ("arca_64", 2), ("plain", 1), ("plain", 2)]
    assert [(row["arm"], row["seed"]) for row in rows] == expected
    assert read_results(path)[1] == rows
    assert "0.188 [-0.607, 0.982]" in arms.tables(rows)  # the mean of 1/8 and 2/8
    monkeypatch.setitem(arms.ARMS, "plain", dict(credit="plain"))
    with pytest.raises(UserError, match="other settings"):
        arms.make(path, *wanted)


@pytest.mark.long
def test_the_loop_is_the_sweeps():
    """Arms are paired with the sweep's runs: with other problems, another adapter or other sampling
    the difference would not be the rule's alone."""
    cells = in_cell(read_results(RESULTS / "tiny.json")[1], ("uniform", 16, 1.0))
    cfg = Settings(credit="uniform", seed=1, steps=2, eval_problems=0)
    found = arms.train_arm(cfg)  # one completion more or less: another processor rounds otherwise
    assert found["reward"] == pytest.approx(cells[1]["reward"][:2], abs=1e-2)


# ---- The command line ----------------------------------------------------------------------------


def test_errors_are_one_line(tmp_path):
    """A traceback tells a user nothing that he can act on."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="settings"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(settings=asdict(Settings()))))
    with pytest.raises(UserError, match="keeps steps \\[\\], not 10"):
        open_run(tmp_path, 10)
