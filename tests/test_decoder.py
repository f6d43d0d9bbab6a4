"""plumbing/decoder.py against Qwen3.forward without a cache, which transformers vouches for."""

import pytest
import torch
from conftest import tiny_model

from fast import decoder
from fast.decoder import Decoder, attend
from lora import adapter_off, add_lora, lora_parameters
from sample import generate

FAMILIES = [dict(), dict(model_type="qwen2"), dict(model_type="llama"), dict(num_key_value_heads=4)]


def adapted(targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), **changes):
    """A tiny model with adapters, on some layers only, that matter."""
    model = add_lora(tiny_model(**changes), 3, 5.0, targets)
    rng = torch.Generator().manual_seed(1)
    for name, p in lora_parameters(model).items():
        if "lora_B" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=rng)
    return model


@torch.no_grad()
def decoded(model, decoder, ids):
    """The states after each token of ids (B, T), one token at a time."""
    decoder.refresh()
    decoder.cache.lengths.zero_()
    return torch.stack([decoder.advance(column) for column in ids.T], dim=1)


def ids_of(model, rows=3, T=11):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, T), generator=rng)


@pytest.fixture(params=[True, False], ids=["merged", "stacked"])
def merges(request, monkeypatch):
    """Both ways of having the adapters in the decoding step; whether they are added to a copy."""
    monkeypatch.setattr(decoder, "SMALL", decoder.SMALL if request.param else 0)
    return request.param


@pytest.mark.parametrize("changes", FAMILIES)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_decoder_equals_forward(changes, with_adapter, merges):
    """The fast path would sample from another model than the one that is trained."""
    model = (adapted if with_adapter else tiny_model)(**changes)
    ids = ids_of(model)
    got = decoded(model, Decoder(model, 5, 16), ids)
    torch.testing.assert_close(got, model(ids), atol=1e-5, rtol=1e-5)


def test_decoder_follows_the_adapter(merges):
    """A decoder that is kept from rollout to rollout could go on with the adapter of the first, or
    with it where it is off, or change the weights that the update trains around; and its stacked
    weights could become a second copy of a large model."""
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    ids, fast = ids_of(model), Decoder(model, 3, 16)
    for change in (0.0, 0.5, -1.0):
        for p in lora_parameters(model).values():
            p.data += change * p.abs().mean()
        torch.testing.assert_close(decoded(model, fast, ids), model(ids), atol=1e-5, rtol=1e-5)
    with adapter_off(model):
        torch.testing.assert_close(decoded(model, fast, ids), model(ids), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in before.items())
    attention, held = model.model.layers[0].self_attn, fast.stacks[0][0].weight
    weights = [layer.base.weight for layer in (attention.q_proj, attention.v_proj)]
    views = [w.untyped_storage().data_ptr() == held.untyped_storage().data_ptr() for w in weights]
    assert views == [not merges] * 2
    again = Decoder(model, 3, 16)
    torch.testing.assert_close(decoded(model, again, ids), model(ids), atol=1e-5, rtol=1e-5)


def test_graphs_are_dropped_with_the_weights_that_they_read(monkeypatch):
    """A GPU samples before there is an adapter (an evaluation of the base): with it the weights are
    stacked anew, and graphs captured before would read memory that is somebody else's by then."""
    monkeypatch.setattr(decoder, "SMALL", 0)
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
    got = attend(q, k, v.bfloat16(), mask.bfloat16())
    torch.testing.assert_close(got.double(), exact, atol=0.02, rtol=0.02)
    got = attend(q.float(), k.float(), v, mask)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


def test_two_samplers_at_once():
    """Two loops over one model, such as two streams on screen, would write into one cache."""
    from sample import decode, uniforms

    model, prompt = tiny_model(), [1, 2, 3]
    want = generate(model, [prompt], 2, 12, seed=3).tokens.tolist()
    u = [uniforms(3, 0, prompt, i, 12)[None] for i in (0, 1)]
    both = [decode(model, [prompt], one, (), 1.0, 1.0, 0, 1, 1) for one in u]
    got = [[], []]
    for blocks in zip(*both, strict=True):
        for tokens, (_, _, drawn) in zip(got, blocks, strict=True):
            tokens.append(int(drawn["tokens"]))
    assert got == want


class Tape:
    """What a CUDA graph does, on the CPU: capturing runs nothing, and replaying does it all again
    on the tensors that were there then."""

    decoder = None  # of the one test that uses it

    def replay(self):
        filled = self.decoder.cache.filled
        key = next(k for k, held in self.decoder.graphs.items() if held and held[0] is self)
        _, into, states = self.decoder.graphs[key]
        states.copy_(self.decoder.step(into))
        self.decoder.cache.filled = filled

    def __enter__(self):
        cache = self.decoder.cache
        self.before = [x.clone() for x in (cache.k, cache.v, cache.lengths)]

    def __exit__(self, *_):
        cache = self.decoder.cache
        for x, before in zip((cache.k, cache.v, cache.lengths), self.before, strict=True):
            x.copy_(before)


def test_replayed_steps_equal_plain_ones(monkeypatch):
    """Off a GPU, all but the capture itself: rows rounded up that write in others' caches, a count
    of columns that goes wrong, a token that a replay overwrites after it was noted."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(Decoder, "width", lambda self, n: min(-(-n // 4) * 4, 60))
    prompts, how = [[1, 2, 3], [4], [5, 0, 5, 1], [2, 4]], dict(eos_ids=(7, 9), seed=3)
    model = adapted(vocab_size=12)
    want = generate(model, prompts, 3, 40, max_rows=7, **how)
    Tape.decoder = model.decoder = Decoder(model, 7, 60)
    model.decoder.captures = True
    for _ in range(2):  # the second time all graphs are there
        got = generate(model, prompts, 3, 40, max_rows=7, **how)
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.lengths, want.lengths)
        torch.testing.assert_close(got.logps, want.logps, atol=1e-5, rtol=1e-5)
    assert len(model.decoder.graphs) > 8 and all(model.decoder.graphs.values())
