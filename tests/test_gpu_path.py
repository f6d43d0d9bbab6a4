"""What a GPU would find wrong, found without one, on the device of tests/virtual_device.py.

CI has no GPU. So here the project runs on a device that refuses what a GPU refuses, and CUDA graphs
replay what was captured: placement, capture, memory and the rounding of bf16 are held for good.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import EOS, PROMPTS, close, double, gradient, in_double, rounding, settings
from helpers import tiny_model as tiny_policy
from virtual_device import VirtualGPU, memory

import grpo
import sample
from credit import METHODS
from eval_math import evaluate
from fast.decoder import Decoder
from grpo import group_advantages, pad_rows, sample_rollout, split_rows, token_logps
from hf import checkpoint
from lora import adapter_off, lora_parameters
from run.flags import load_base
from run.folder import sample_rows, warn
from run.metrics import diagnose
from sample import PlainDecoder, generate, read_prompts

CUDA = torch.device("cuda:0")


def parity(ids):
    """Tell of ids only whether their sum is odd: half of the completions are right."""
    return rf"\boxed{{{sum(ids) % 2}}}"


def pieces(ids):
    return [str(i) for i in ids]


TOKENIZER = SimpleNamespace(eos_ids=[EOS], decode=parity, pieces=pieces)
PROBLEMS = [dict(problem=str(p), answer="1", prompt=p, negative=p[:1] + p) for p in PROMPTS]


def policy(layers=2):
    """A policy whose texts are of unequal lengths."""
    model = tiny_policy(B=0.1)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


def in_bf16(model):
    """Round the frozen weights of a model to bf16."""
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    return model


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu
    gc.enable()  # should a test have failed in a capture


# ---- The device itself ---------------------------------------------------------------------------


def attend(heads=2, **changes):
    """Call attention of two query heads, as the project does, with something changed."""
    q = torch.zeros(1, 2, 1, 8, device=CUDA)
    k = torch.zeros(1, heads, 16, 8, device=CUDA)
    given = dict(query=q, key=k, value=k, attn_mask=torch.zeros(1, 1, 1, 16, device=CUDA)) | changes
    return F.scaled_dot_product_attention(*given.values())


REFUSED = {
    "two devices": lambda x: x + torch.ones(3),
    "an index of the host": lambda x: x[torch.tensor([1])],
    "another GPU": lambda x: x + x.to("cuda:1"),
    "three axes": lambda x: attend(query=torch.zeros(2, 1, 8, device=CUDA)),
    "a mask and shared heads": lambda x: attend(heads=1),
    "a mask of fp32": lambda x: attend(attn_mask=torch.zeros(1, 1, 1, 16, device=CUDA).double()),
    "columns": lambda x: attend(query=torch.zeros(1, 2, 8, 2, device=CUDA).mT),
}
CAPTURED = {
    "a number": lambda x: x.sum().item(),
    "a choice": lambda x: 1 if (x > 0).all() else 0,
    "a mask": lambda x: x[x > 0],
    "from the host": lambda x: torch.tensor([1.0], device=CUDA),
    "to the host": lambda x: x.cpu(),
    "into the host": lambda x: torch.ones(3).copy_(x),
    "another GPU": lambda x: torch.zeros(3, device="cuda:1"),
}


def test_what_the_device_refuses(gpu):
    """A guard that lets through what it is there for; or refuses what it should not."""
    x = torch.tensor([1.0, -1.0, 2.0], device=CUDA)
    attend()
    for name, wrong in REFUSED.items():
        with pytest.raises(RuntimeError, match=r"two devices|no fused"):
            pytest.fail(f"{name} gives {wrong(x)}")
    gc.disable()
    for name, wrong in CAPTURED.items():
        assert name == "another GPU" or wrong(x) is not None  # fine before a capture
        with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pytest.fail(f"{name} gives {wrong(x)}")
    gc.enable()
    with pytest.raises(RuntimeError, match="collector"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass


# ---- The project on it ---------------------------------------------------------------------------


LIMITS = dict(n=3, max_new_tokens=12, max_rows=3, keep=("entropy", "hidden"))


def sampled(model):
    """Sample with all cuts, and greedily from the base without an end; the pool has three rows."""
    cuts = dict(top_k=3, top_p=0.9, temperature=0.7)
    found = [generate(model, PROMPTS, eos_ids=[0, 1, 2, 3], **LIMITS, **cuts)]
    with adapter_off(model):
        found.append(generate(model, PROMPTS, temperature=0, **LIMITS))
    return found


def assert_same(found, want):
    """The same tokens; what else was kept to fp32's rounding."""
    for ours, theirs in zip(found, want, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.lengths, theirs.lengths)
        for name in ("logps", "entropy", "hidden"):
            pair = (getattr(ours, name), getattr(theirs, name))
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make_decoder", [sample.make_decoder, PlainDecoder])
def test_sampling_on_the_device(gpu, monkeypatch, make_decoder):
    """A tensor that stays on the host, an index of the wrong device: a GPU would stop there. Or a
    graph that replays something else: rows rounded up that write in others' caches, a constant that
    was a variable, a token that a replay overwrites after it was noted."""
    monkeypatch.setattr(sample, "make_decoder", make_decoder)
    model = policy(layers=1)
    want = sampled(model)
    assert len(set(want[0].lengths.tolist())) > 2  # or rows do not end one by one
    there = gpu.copy(model)
    assert_same(sampled(there), want)
    if make_decoder is not PlainDecoder:
        assert_same(sampled(there), want)  # now mostly by replays
        assert len(gpu.graphs) > 2


def trained(model, patch):
    """Sample a rollout and train on it by each rule and option; return what can be compared. (On
    the host by one rule: that all are right is shown elsewhere.)"""
    cfg = settings(credit="eapo", max_new_tokens=6)  # for which all is kept
    rollout = sample_rollout(model, TOKENIZER, PROBLEMS, cfg, 1, compare=True)
    advantages = group_advantages(rollout.rewards).flatten()
    found = dict(tokens=rollout.completions.tokens, rewards=rollout.rewards)
    for name in METHODS if model.device.type == "cuda" else ["arca"]:
        own = settings(credit=name)
        found[name], metrics, _ = gradient(model, rollout, advantages, own, name == "arca")
        found |= {f"{name} {key}": torch.tensor(value) for key, value in metrics.items()}
    # KL, several updates, a head in chunks, activations made again, plain rows.
    cfg = settings(credit="arca", kl_coef=0.1, epochs_per_rollout=2, micro_batch_tokens=40)
    model.gradient_checkpointing = True
    patch.setattr(grpo, "MAX_LOGITS", 4 * model.config.vocab_size)
    patch.setattr(grpo, "lay_out", pad_rows)
    patch.setattr(grpo, "split", split_rows)
    found["all"], _, multipliers = gradient(model, rollout, advantages, cfg)
    found["multipliers"] = multipliers
    return found


def test_training_on_the_device(gpu, monkeypatch):
    """A signal, a mask or a multiplier that is on the wrong side, in any rule."""
    model = policy(layers=1)
    runs = []
    for policy_there in (model, gpu.copy(model)):
        with monkeypatch.context() as patch:
            runs.append(trained(policy_there, patch))
    want, found = runs
    for name in want:
        pair = (found[name].cpu().double(), want[name].double())
        assert torch.allclose(*pair, rtol=1e-3, atol=1e-4), name
    assert 0 < found["rewards"].mean() < 1  # or there is no gradient


def test_bf16_on_the_device(gpu):
    """An evaluation, greedy and pass@k, the rows that a run keeps, and a gradient by the kernels of
    a GPU, which has other code: attention without padding, products with sums in fp32."""
    on_host = in_bf16(policy(layers=1))
    model = gpu.copy(on_host)
    cfg = settings(credit="arca", max_new_tokens=9, micro_batch_tokens=30)
    result, rows = evaluate(model, TOKENIZER, PROMPTS, ["1", "1"], 2, 9, 1.0, 0.9, 1)
    assert len(rows) == 6 and 0 <= result["pass@2"] <= 1
    rollout = sample_rollout(model, TOKENIZER, PROBLEMS, cfg, 1, compare=True)
    advantages = group_advantages(rollout.rewards).flatten()
    _, signals, _ = grpo.update(model, None, rollout, advantages, cfg, compare=True)
    kept = list(sample_rows(rollout, [0, 5], signals, cfg, TOKENIZER))
    assert len(kept[0]["weights"]) == rollout.completions.lengths[0]
    given = (rollout, advantages, settings(credit="arca"))  # in one batch of both prompts
    found, want = (gradient(m, *given)[0].cpu() for m in (model, on_host))
    assert close(found, want, 0.03)  # where bf16 rounds at 0.004


# ---- The captured step ---------------------------------------------------------------------------


def held_by(*owners):
    """Return the addresses of all tensors that objects hold, however deep."""
    found, seen, todo = set(), set(), list(owners)
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (str, type)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.add(memory(x))
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple)):
            todo += x
        else:
            todo += vars(x).values() if hasattr(x, "__dict__") else []
    return found


def captured(gpu, model, b=3):
    """Feed two tokens to b rows of a pool; return the decoder and the graph of its step."""
    decoder = Decoder(model, b + 1, 300)
    decoder.refresh()
    for _ in range(2):  # the first runs as it is
        decoder.step(torch.zeros(b, dtype=torch.long, device=CUDA))
    return decoder, gpu.graphs[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_captured_step_touches_only_what_lasts(gpu, dtype):
    """A graph that reads a tensor which is freed after the capture, or writes one that the host
    changes too: every replay would be garbage. And (in bf16, where the model is large) something
    large that is made in a step, such as a copy of the keys: half of the sampling time was that."""
    model = policy()
    model = in_bf16(model) if dtype == torch.bfloat16 else model
    decoder, graph = captured(gpu, gpu.copy(model))
    cache = decoder.cache
    assert cache.k.shape[3] % 8 == 0  # or the mask of the last columns is copied in every layer
    assert set(graph.written) == {memory(x) for x in (cache.k, cache.v, cache.lengths)}
    foreign = set(graph.read) - held_by(decoder, decoder.model)
    assert not [graph.read[key].shape for key in foreign]
    if dtype == torch.bfloat16:
        columns = cache.k.shape[3]
        outputs = max(stack.outputs for stacks in decoder.stacks for stack in stacks)
        scores = model.config.num_attention_heads * columns
        most = max(x.untyped_storage().nbytes() // x.itemsize for x in graph.made.values())
        assert most <= 4 * max(outputs, scores)  # of four rows: three, rounded up


@torch.no_grad()
def test_replays_with_other_inputs(gpu):
    """A length, a position or an adapter that a graph has kept as it was at the capture; rows that
    a replay reads where they no longer are; a memory pool for each graph, gigabytes in all; or a
    capture too many.

    Five rows of unequal lengths cross a bucket of 256 columns, some end, the adapter changes: all
    states are those of one forward pass.
    """
    model = policy()
    rng = torch.Generator().manual_seed(0)
    texts = torch.randint(model.config.vocab_size, (5, 280), generator=rng)
    there = gpu.copy(model)
    decoder = Decoder(there, 8, 300)

    def follow(rows, begins, steps):
        """Read the beginnings of some texts, feed them on, and drop the first row after each third
        of the steps; return the largest error of a state."""
        decoder.refresh()
        prompts = [texts[row, :n].tolist() for row, n in zip(rows, begins, strict=True)]
        read_prompts(there, prompts, 1, decoder.cache, 0)
        with double():
            exact = in_double(model)(texts[rows])
        rows, at = torch.tensor(rows), torch.tensor(begins)
        found, want = [], []
        for step in range(steps):
            if step % (steps // 3) == 2:
                going = torch.arange(1, len(at), device=CUDA)
                order = decoder.cache.keep_rows(going).cpu()
                rows, at, exact = rows[order], at[order], exact[order]
            found.append(decoder.step(texts[rows, at].to(CUDA)))
            want.append(exact[torch.arange(len(at)), at])
            at = at + 1
        states, want = torch.cat(found).cpu().double(), torch.cat(want)
        return ((states - want).norm(dim=-1) / want.norm(dim=-1)).max()

    bound = rounding(model)
    assert follow([0, 1, 2, 3, 4], [3, 250, 17, 100, 251], 12) < bound
    for mine, its in zip(*(lora_parameters(m).values() for m in (model, there)), strict=True):
        mine.data *= -0.5
        its.data *= -0.5
    count = len(gpu.graphs)
    assert follow([4, 3, 2, 0, 1], [255, 1, 30, 2, 240], 12) < bound
    assert follow([2, 1, 0], [4, 5, 6], 3) < bound
    assert count > 2
    assert len(gpu.graphs) <= 3 * 2  # rows 2, 4, 8; two widths
    assert {id(graph.pool) for graph in gpu.graphs} == {id(decoder.pool)}


@torch.no_grad()
def test_no_collector_in_a_capture(gpu, monkeypatch):
    """The garbage collector may free another decoder's graphs inside a capture, which ends it: it
    waits (the virtual device insists), but not for good, also after a capture that fails."""
    decoder, _ = captured(gpu, gpu.copy(policy()))
    assert gc.isenabled()
    decoder.graphs.clear()
    tokens = torch.zeros(3, dtype=torch.long, device=CUDA)
    decoder.step(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(F, "silu", lambda x: x.sum().item())
        with pytest.raises(RuntimeError, match="inside a capture"):
            decoder.step(tokens)
    assert gc.isenabled()
    decoder.step(tokens)
    assert len(gpu.graphs) == 2


# ---- Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_the_model_is_on_the_device_that_captures(gpu, monkeypatch, name):
    """`--device cuda:1` captured empty graphs on cuda:0, whose replays gave garbage in silence. And
    cuDNN's attention, the first choice on an H100, gives NaN under masks like ours."""
    monkeypatch.setattr(gpu, "current", int(name == "cuda"))
    load = checkpoint.load_model
    index = int(name[-1] == "1")
    at_index = lambda folder, device, dtype: load(folder, f"cuda:{index}", dtype)  # noqa: E731
    monkeypatch.setattr(checkpoint, "load_model", at_index)
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        model, _ = load_base(settings(device=name))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)
    assert model.device == torch.device("cuda", index)
    assert model.lm_head.weight.dtype == torch.bfloat16
    generate(model, [[1, 2]], 2, 5)
    assert gpu.graphs


# ---- Rounding and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_log_probs_of_a_bf16_model(gpu, device):
    """Logits of about 20 are rounded to 1/8 in bf16: their log-probs were off by 0.02, more than
    what a young adapter changes, and so were all signals made of them."""
    model = tiny_policy(vocab=2000, hidden=256, lora=False).bfloat16()
    torch.nn.init.normal_(model.lm_head.weight, std=6 / 16)
    exact = model.lm_head.weight.double()
    model = gpu.copy(model) if device == "cuda:0" else model
    c = generate(model, [[1, 2], [3]], 16, 4, keep={"hidden"})

    def log_probs(hidden):
        logits = hidden.double() @ exact.T
        assert 15 < logits.max(-1).values.mean() < 25
        return torch.log_softmax(logits, -1).gather(-1, c.tokens[..., None])[..., 0]

    assert (c.logps - log_probs(c.hidden)).abs().mean() < 0.01
    hidden = c.hidden.to(device).detach().requires_grad_()
    logps, _ = token_logps(model, hidden.flatten(0, 1), c.tokens.flatten().to(device))
    assert (logps.cpu() - log_probs(c.hidden).flatten()).abs().mean() < 0.01
    logps.sum().backward()
    wide = c.hidden.double().requires_grad_()
    log_probs(wide).sum().backward()
    assert close(hidden.grad.cpu(), wide.grad, 0.01)


def test_kept_states_are_bounded(monkeypatch, capsys):
    """A compare step of long completions kept 16 GiB of states on the GPU, and more on the host:
    above a limit the rule that reads them is left out, and somebody is told."""
    model, cfg = policy(), settings(credit="arca", max_new_tokens=9)
    given = (model, TOKENIZER, PROBLEMS, cfg, 1)
    assert sample_rollout(*given, compare=True).completions.hidden is not None
    monkeypatch.setattr(grpo, "MAX_KEPT", 8 * 9 * model.config.hidden_size - 1)
    rollout = sample_rollout(*given, compare=True)
    assert rollout.completions.hidden is None
    advantages = group_advantages(rollout.rewards).flatten()
    _, signals, multipliers = grpo.update(model, None, rollout, advantages, cfg, compare=True)
    metrics = diagnose(rollout, signals, multipliers, cfg, None, compare=True)
    assert {"gini/delta/1"} ^ {f"gini/{name}/1" for name in METHODS} <= set(metrics)
    assert "gini/delta/1" not in metrics
    warn([metrics | dict(reward=1, truncated=0, skipped=0)], model, cfg)
    assert "delta" in capsys.readouterr().out
    (kept,) = sample_rows(rollout, [0], signals, cfg, TOKENIZER)
    assert set(kept["rules"]) == set(METHODS) - {"delta"}
