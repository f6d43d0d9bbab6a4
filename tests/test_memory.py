"""Memory that runs out in an update, and the table of what fits."""

from pathlib import Path

import pytest
import torch
from helpers import EOS, close, gradient, handmade, settings, tiny_model
from test_resume import SMALL, one_error, resume, rows

from bench import memory
from fast.packing import Packed
from grpo import update
from lora import lora_parameters
from model import Qwen3
from run import checkpoints
from system.errors import out_of_memory

HOUSE = Path(__file__).parent.parent
CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LENGTHS = [2, 5, 3, 6, 4, 4, 6, 1, 3, 2, 5, 5]  # of three problems' completions, four each

# ---- Out of memory -------------------------------------------------------------------------------


def step():
    """A rollout of three problems, the last without spread, and its advantages."""
    rng = torch.Generator().manual_seed(3)
    drawn = [torch.randint(1, 11, (n - 1,), generator=rng).tolist() + [EOS] for n in LENGTHS]
    logps = -torch.rand(len(LENGTHS), max(LENGTHS), generator=rng)
    r = handmade([[1, 2], [3, 4, 5], [6]], drawn, [1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0], logps)
    return r, torch.tensor([1.0, -1, -1, 1, -1, 2, -1, -1, 0, 0, 0, 0])


def failing(monkeypatch, error, fails):
    """Have forward raise where fails(number of the call, rows, T) says so, for T tokens of so many
    completions; returns the calls."""
    forward, calls = Qwen3.forward, []

    def limited(self, ids, cache, *rest):
        calls.append(cache.shapes[1] if isinstance(cache, Packed) else ids.shape)
        if fails(len(calls) - 1, *calls[-1]):
            raise error
        return forward(self, ids, cache, *rest)

    monkeypatch.setattr(Qwen3, "forward", limited)
    return calls


def assert_same(ours, theirs):
    """Gradient, metrics and multipliers of two updates; rows read alone round by 1e-6 otherwise."""
    (gradient, metrics, m), (wanted, told, weights) = ours, theirs
    assert close(gradient, wanted, 3e-6)
    assert metrics == pytest.approx(told, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(m, weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "error", [CUDA, RuntimeError(CPU), MemoryError()], ids=["gpu", "cpu", "py"]
)
@pytest.mark.parametrize("rule", ["arca", "surprisal", "gcpo"])
def test_too_many_rows_are_done_in_halves(error, rule, monkeypatch, capsys):
    """A run that ends for want of memory that half as many rows would not want; one that halves
    for ever, or that loses rows between the halves."""
    model, (r, advantages) = tiny_model(), step()
    whole = gradient(model, r, advantages, settings(credit=rule, micro_tokens=1000, kl=0.1))
    for most, halvings in ((6, 1), (3, 2), (1, 4)):
        s = settings(credit=rule, micro_tokens=1000, kl=0.1)
        with monkeypatch.context() as patch:
            failing(patch, error, lambda _, rows, T, most=most: rows > most)
            assert_same(gradient(model, r, advantages, s), whole)
        said = capsys.readouterr().out
        assert s.micro_tokens == 1000 // 2**halvings and said.count("\n") == halvings
        assert (
            f"out of memory: once more, and from now on with --micro-tokens {s.micro_tokens}"
            in said
        )


@pytest.mark.parametrize("updates", [1, 2])
def test_memory_may_run_out_in_any_pass(updates, monkeypatch, capsys):
    """Micro-batches before the one that failed counted twice, or those of the pass over rows that
    teach nothing; an optimizer step between the halves."""
    changes = dict(credit="arca", micro_tokens=24, updates=updates)
    model, (r, advantages) = tiny_model(), step()
    with monkeypatch.context() as patch:
        calls = failing(patch, None, lambda *_: False)
        whole = gradient(model, r, advantages, settings(**changes))
    assert len(calls) > 6
    for moment in range(len(calls)):
        s = settings(**changes)
        with monkeypatch.context() as patch:
            failing(patch, CUDA, lambda n, *_, moment=moment: n == moment)
            assert_same(gradient(model, r, advantages, s), whole)
        assert s.micro_tokens == 12 and capsys.readouterr().out.count("\n") == 1


def test_one_row_too_large_is_an_error(monkeypatch, capsys):
    """Halving nothing for ever; a step without the row; another error taken for this one."""
    model, (r, advantages) = tiny_model(), step()
    for error, tries in ((CUDA, 4), (RuntimeError("CUDA error: illegal memory access"), 1)):
        assert out_of_memory(error) == (tries > 1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        before = [p.clone() for p in model.parameters()]
        with monkeypatch.context() as patch, pytest.raises(RuntimeError) as raised:
            failing(patch, error, lambda _, rows, T: max(LENGTHS) - 1 == T)
            update(model, optimizer, r, advantages, settings(micro_tokens=1000))
        assert raised.value is error and capsys.readouterr().out.count("\n") == tries - 1
        assert all(map(torch.equal, model.parameters(), before))


def test_a_run_without_memory_ends_in_a_line_and_keeps_its_checkpoint(
    monkeypatch, capsys, tmp_path
):
    """A traceback of a hundred lines; the checkpoint of a step that was half done."""
    folder = tmp_path / "run"
    learning = lambda *_: torch.is_grad_enabled() and len(rows(folder)) == 2  # noqa: E731
    failing(monkeypatch, CUDA, learning)
    code, said = resume(
        monkeypatch, capsys, *SMALL, "--kl", 0.1, "--save-every", 1, "--out", folder
    )
    assert one_error(code, said.err) and said.err.startswith("error: out of memory: lower --micro")
    assert len(rows(folder)) == checkpoints.newest_checkpoint(folder)[1] == 2


# ---- What fits -----------------------------------------------------------------------------------

SMALL_MODELS = [(96, 224, 3, 4, 2, True), (160, 320, 5, 2, 1, False)]
WORK = [(2, 10, 300), (1, 100, 400), (3, 40, 150)]  # rows, tokens of their prompt, tokens of each


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("sizes", SMALL_MODELS, ids=["96", "160"])
def test_the_bytes_of_an_update_are_those_of_the_formula(sizes, again):
    """A table of what fits that forgets what an update keeps: the tensors that are alive before and
    while it goes back are counted, whatever made them."""
    c = memory.config_of(*sizes, head_dim=64, vocab=64)
    for work in WORK:
        kept, most = memory.counted(c, 8, *work, again)
        assert memory.kept_bytes(c, 8, *work, again, gpu=False)[0] == pytest.approx(kept, rel=0.05)
        told = memory.update_bytes(c, 8, *work, again, gpu=False)
        assert most <= told <= 1.2 * most  # a bound, and not a loose one


def test_logits_take_a_chunk_whatever_the_length(monkeypatch):
    """The logits of all tokens kept, or taken to be: they would be most of the memory."""
    assert memory.head_bytes() == pytest.approx(memory.HEAD, rel=0.05)
    c = memory.config_of(*SMALL_MODELS[0], head_dim=64, vocab=2048)
    monkeypatch.setattr(memory.grpo, "LOGITS", 2048 * 64)
    kept, _ = memory.counted(c, 8, 2, 10, 300, True)
    assert memory.kept_bytes(c, 8, 2, 10, 300, True, gpu=False)[0] == pytest.approx(kept, rel=0.05)


def test_the_sizes_are_the_published_ones():
    """A table of other models than it says. Billions of parameters without the embeddings, as the
    models' cards say."""
    published = {"0.6B": 0.44, "1.7B": 1.4, "4B": 3.6, "8B": 6.95, "14B": 13.2, "32B": 31.2}
    for name, billions in published.items():
        c = memory.config_of(*memory.SIZES[name])
        embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        assert memory.parameters(c) - embeddings == pytest.approx(billions * 1e9, rel=0.015)
    trained = sum(p.numel() for p in lora_parameters(tiny_model(rank=2)).values())
    assert memory.adapter_size(tiny_model().config, 2) == trained


def test_the_readme_has_the_table(capsys):
    """A table that no longer says what the code keeps."""
    memory.table()
    table, readme = capsys.readouterr().out, (HOUSE / "README.md").read_text(encoding="utf-8")
    assert table.count("\n") == 8 and table.replace("| --- " * 5 + "|", "|---" * 5 + "|") in readme
