"""fast/ against its plain twins in sample.py and grpo.py, which it must equal to rounding.

tests/test_grpo.py and tests/test_sample.py run their checks with both, tests/test_gpu_path.py has
the step that a GPU captures; here is what else only fast/ has, and one run of train.py in a process
that cannot import it.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from helpers import COMPLETIONS, EOS, PROMPTS, double, in_double, rollout_of, rounding
from helpers import tiny_model as tiny_policy

import sample
from fast import decoder, draw, linear, packing
from fast.decoder import Decoder, attend, kept_decoder
from lora import adapter_off, add_lora, lora_parameters
from model import WideProduct
from sample import PlainDecoder, generate

FAMILIES = [dict(), dict(model_type="qwen2"), dict(model_type="llama"), dict(num_key_value_heads=4)]


# ---- The decoding step ---------------------------------------------------------------------------


def adapted(targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), **changes):
    """A tiny model with adapters, on some layers only, that matter."""
    model = add_lora(tiny_model(**changes), 3, 5.0, targets)
    rng = torch.Generator().manual_seed(1)
    for name, p in lora_parameters(model).items():
        if "lora_B" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=rng)
    return model


@torch.no_grad()
def decoded(decoder, ids):
    """The states after each token of ids (B, T), one token at a time."""
    return torch.stack([decoder.step(column) for column in ids.T], dim=1)


@torch.no_grad()
def exact_states(model, ids):
    """The states of one forward pass in float64."""
    with double():
        return in_double(model)(ids)


def ids_of(model, rows=3, T=11):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, T), generator=rng)


def assert_close(found, exact, bound):
    """The states (B, T, D) of each token are right within fp32's rounding."""
    error = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < bound


@pytest.fixture(params=[True, False], ids=["merged", "stacked"])
def merges(request, monkeypatch):
    """Both ways of having the adapters in the decoding step; whether they are added to a copy."""
    monkeypatch.setattr(decoder, "MAX_MERGED", decoder.MAX_MERGED if request.param else 0)
    return request.param


@pytest.mark.parametrize("changes", FAMILIES)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_decoders_equal_forward(changes, with_adapter, merges):
    """A decoder that would sample from another model than the one that is trained.

    The fast step and the plain one are held to one forward pass in float64, each within the
    rounding of a pass in fp32.
    """
    model = (adapted if with_adapter else tiny_model)(**changes)
    ids = ids_of(model)
    exact = exact_states(model, ids)
    assert exact.dtype == torch.float64
    for make in (kept_decoder, PlainDecoder):
        assert_close(decoded(make(model, 5, 16), ids), exact, rounding(model))


def test_decoders_equal_forward_in_float64(merges):
    """An error as small as fp32's rounding. (In float64 the adapters are never merged.)"""
    model = in_double(adapted())
    ids = ids_of(model)
    with double(), torch.no_grad():
        exact = model(ids)
        for make in (kept_decoder, PlainDecoder):
            assert_close(decoded(make(model, 5, 16), ids), exact, 1e-12)


def test_decoder_follows_the_adapter(merges):
    """A decoder that is kept from rollout to rollout could go on with the adapter of the first, or
    with it where it is off, or change the weights that the update trains around; and its stacked
    weights could become a second copy of a large model."""
    model = adapted()
    bound = rounding(model)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    ids = ids_of(model)

    @torch.no_grad()
    def again():
        """The states of the decoder that the model has kept."""
        kept = kept_decoder(model, 3, 16)
        assert kept is fast
        states = decoded(kept, ids)
        kept.close()
        return states

    with torch.no_grad():  # as in sampling
        fast = kept_decoder(model, 3, 16)
        fast.close()
    for change in (0.0, 0.5, -1.0):
        for p in lora_parameters(model).values():
            p.data += change * p.abs().mean()
        assert_close(again(), exact_states(model, ids), bound)
    with adapter_off(model):
        assert_close(again(), exact_states(model, ids), bound)
    assert_close(again(), exact_states(model, ids), bound)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in before.items())
    attention = model.model.layers[0].self_attn
    held = fast.stacks[0][0].weight
    weights = [layer.base.weight for layer in (attention.q_proj, attention.v_proj)]
    views = [w.untyped_storage().data_ptr() == held.untyped_storage().data_ptr() for w in weights]
    assert views == [not merges] * 2
    with torch.no_grad():
        larger = kept_decoder(model, 4, 16)
    assert larger is not fast  # which lacks the room, or may be in use
    assert_close(decoded(larger, ids), exact_states(model, ids), bound)


def test_graphs_are_dropped_with_the_weights_that_they_read(monkeypatch):
    """A GPU samples before there is an adapter (an evaluation of the base): with it the weights are
    stacked anew, and graphs captured before would read memory that is somebody else's by then."""
    monkeypatch.setattr(decoder, "MAX_MERGED", 0)
    model = tiny_model()
    fast = Decoder(model, 3, 16)
    fast.refresh()
    fast.graphs = {"captured": None}
    fast.refresh()
    assert fast.graphs  # nothing moved
    add_lora(model, 3, 5.0)
    fast.refresh()
    assert not fast.graphs


def test_attend_without_rounding():
    """Scores in bf16 would be off by 0.03 at 10: log-probs would no longer be those of training."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 8, generator=rng) for n in (2, 9, 9))
    mask = torch.zeros(3, 1, 9).masked_fill_(torch.arange(9) > 6, -torch.inf)
    q, k = 4 * q.bfloat16(), 4 * k.bfloat16()
    exact = torch.softmax(q.double() @ k.double().transpose(1, 2) / 8**0.5 + mask, -1) @ v.double()
    found = attend(q, k, v.bfloat16(), mask.bfloat16())
    torch.testing.assert_close(found.double(), exact, atol=0.02, rtol=0.02)
    found = attend(q.float(), k.float(), v, mask)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


HOW = dict(n=3, max_new_tokens=40, max_rows=7, eos_ids=(7, 9), seed=3, keep=("entropy", "hidden"))


def assert_same_completions(found, want):
    """The same tokens; what else was kept to fp32's rounding."""
    assert torch.equal(found.tokens, want.tokens)
    assert torch.equal(found.lengths, want.lengths)
    assert torch.equal(found.finished, want.finished)
    for name in ("logps", "entropy", "hidden"):
        pair = (getattr(found, name), getattr(want, name))
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (0, 1.0)])
def test_completions_do_not_depend_on_the_decoder(monkeypatch, merges, temperature, top_p):
    """A rollout that the plain sampler would not have drawn: the tokens must be the same."""
    model = adapted(vocab_size=12)
    prompts = [[1, 2, 3], [4], [5, 0, 5, 1], [2, 4]]
    found = []
    for make in (kept_decoder, PlainDecoder):
        monkeypatch.setattr(sample, "make_decoder", make)
        found.append(generate(model, prompts, temperature=temperature, top_p=top_p, **HOW))
    assert len(set(found[0].lengths.tolist())) > 1 or temperature == 0
    assert_same_completions(*found)


# ---- Large vocabularies, and 16 bits without their arithmetic ------------------------------------


@pytest.mark.parametrize(
    "spread", [0.0, 1.0, 6.0]
)  # of logits: no nucleus of few tokens, to a sharp one
def test_draws_from_a_large_vocabulary(spread):
    """A nucleus that is cut where not all of its tokens are at hand, ties that are broken by
    another order, or a part of the vocabulary that is missed."""
    V, B = 2 * draw.FEW + 300, 64
    rng = torch.Generator().manual_seed(0)
    u = torch.rand(B, generator=rng, dtype=torch.float64)
    u[:2] = torch.tensor([0, 1 - 2**-30])
    for ties in (False, True):
        logits = spread * torch.randn(B, V, generator=rng)
        logits = logits.round() if ties else logits
        logits[: B // 2, : V - 5] -= torch.inf if ties else 0  # most tokens are impossible
        probs = logits.softmax(-1)
        for top_p, top_k in ((1.0, 0), (0.95, 0), (0.3, 0), (1e-9, 0), (0.9, 7)):
            want = sample.inverse_cdf(sample.top_p_filter(probs, top_p, top_k), u)
            plain = (sample.top_p_filter, sample.inverse_cdf)
            assert torch.equal(draw.draw(probs, u, top_p, top_k, *plain), want)
    lost = draw.draw(torch.full((1, V), torch.nan), u[:1], 0.9, 0, *plain)
    assert 0 <= lost < V  # NaN is said elsewhere


def test_bf16_without_bf16_arithmetic(monkeypatch):
    """A product that is rounded on its way, or a gradient of the adapter that goes wrong: both
    are as near to float64 as those of PyTorch's own bf16, or nearer."""
    monkeypatch.setattr(linear, "NATIVE", False)
    monkeypatch.setattr(WideProduct, "PART", 40)  # so that each weight is several parts
    ids = ids_of(adapted())
    found = {}
    for name in ("exact", "plain", "hastened"):
        model = adapted(model_type="qwen2").bfloat16()  # with biases
        model.config.qkv_bias = True
        for p in lora_parameters(model).values():
            p.data = p.data.float()
        if name == "exact":
            model = in_double(model)
        if name == "hastened":
            linear.hasten(model)
        with double() if name == "exact" else contextlib.nullcontext():
            states = model(ids)
            states.square().sum().backward()
        grads = [p.grad.double().flatten() for p in lora_parameters(model).values()]
        found[name] = (states.detach().double(), torch.cat(grads))
    for i in range(2):
        apart = {n: (x[i] - found["exact"][i]).norm() for n, x in found.items()}
        assert 0 < apart["hastened"] < 1.1 * apart["plain"]


# ---- Packed micro-batches ------------------------------------------------------------------------
# That they give the gradients and signals of plain rows: tests/test_grpo.py, with every rule.


@pytest.mark.parametrize("budget", [1, 10, 15, 24, 1000])
@pytest.mark.parametrize("each", [0, 1, 5, 64])
def test_micro_batches_are_the_cheapest(monkeypatch, budget, each):
    """A row that is trained on twice, left out, or put in a batch over the budget; or groups that
    are not the cheapest of all."""
    monkeypatch.setattr(packing, "PASS", each)
    rollout = rollout_of(tiny_policy())
    chosen = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    rows = [3, 7, 0, 5, 4, 1]  # the chosen ones by length

    def read(group):
        prompts = {i // 4: len(PROMPTS[i // 4]) for i in group}
        longest = max(len(COMPLETIONS[i]) for i in group)
        return len(group) * longest + len(prompts) * max(prompts.values())

    def cost(groups):
        return sum(read(group) + each for group in groups)

    groups = [
        group.tolist()
        for group in packing.micro_batches(rollout, chosen, budget, torch.device("cpu"))
    ]
    assert [i for group in groups for i in group] == rows
    assert all(len(group) == 1 or read(group) <= budget for group in groups)
    costs = []
    for way in itertools.product((False, True), repeat=5):  # cut behind each row, or not
        split = [part.tolist() for part in np.split(rows, np.flatnonzero(way) + 1)]
        if all(len(part) == 1 or read(part) <= budget for part in split):
            costs.append(cost(split))
    assert cost(groups) == min(costs)


def test_the_worked_example_of_packed():
    """A docstring whose indices are wrong misleads whoever relies on it."""
    prompts = [torch.tensor([10, 11, 12]), torch.tensor([20, 21])]
    tokens = torch.tensor([[30, 31, 39], [40, 49, EOS], [50, 51, 59]])  # the last is not read
    group = torch.tensor([0, 0, 1])
    given = (prompts, group, tokens, torch.tensor([3, 2, 3]), "cpu")
    ids, predicts, packed = packing.pack(*given)
    assert ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 40, 50, 51]]
    assert packed.start(*ids.shape).tolist() == [[0, 1, 2, 0, 1, 3, 4, 3, 2, 3]]
    assert predicts.tolist() == [[2, 5, 6], [2, 7, 0], [4, 8, 9]]
    seen = packed.mask[0, 0, 1]  # by a1: prompt columns P0 P1 P2, then its own row
    assert seen.tolist() == [True, True, True, True, True]


# ---- Without fast/ -------------------------------------------------------------------------------

SMALL = "--steps 2 --prompts 4 --samples 3 --max-new-tokens 48 --eval-problems 4 --eval-samples 0"
SMALL = f"{SMALL} --compare-rules".split()
CHILD = """
import sys
sys.modules["fast"] = None  # so that importing fast, or a file of it, fails as if it were deleted
import grpo, sample, train
assert sample.make_decoder is sample.PlainDecoder
assert grpo.lay_out is grpo.pad_rows and grpo.split is grpo.split_rows
assert not [name for name in sys.modules if name.startswith("fast.")]
train.main()
"""


def test_a_run_without_fast_learns_the_same(tmp_path, monkeypatch):
    """A product that needs what it says one can delete, or that learns something else without it.

    A run in a process in which fast/ cannot be imported, and the same run with it.
    """
    import train

    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", CHILD, *SMALL, "--out", str(tmp_path / "plain")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(tmp_path / "fast")])
    train.main()

    def rows(run, name):
        lines = (tmp_path / run / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    same = {
        "metrics.jsonl": ("reward", "completion_tokens", "truncated", "groups_mixed"),
        "evals.jsonl": ("greedy", "boxed", "n"),
        "samples.jsonl": ("problem", "text", "reward"),
    }
    for name, keys in same.items():
        pairs = zip(rows("plain", name), rows("fast", name), strict=True)
        for plain, fast in pairs:
            assert {key: plain[key] for key in keys} == {key: fast[key] for key in keys}
    pairs = list(zip(rows("plain", "metrics.jsonl"), rows("fast", "metrics.jsonl"), strict=True))
    for plain, fast in pairs:
        for key in ("loss", "grad_norm", "entropy", "gini"):
            assert plain[key] == pytest.approx(fast[key], rel=1e-3, abs=1e-4), key
    assert sum(plain["groups_mixed"] for plain, _ in pairs) > 0  # or nothing is learned
