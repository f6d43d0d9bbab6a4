"""The embedded model: what it must be for reinforcement learning to have something to do."""

import pytest
import torch

from data.problems import TINY, load_problems, prompt_text
from eval_math import verify
from hf.checkpoint import load_model, load_tokenizer
from sample import generate
from verifier.extract import extract_answer


@pytest.fixture(scope="module")
def greedy():
    """Greedy completions of held-out problems: (problems, texts, finished)."""
    model, tokenizer = load_model(TINY), load_tokenizer(TINY)
    problems = load_problems("tiny", "test")[:200]
    prompts = [tokenizer.encode(prompt_text(p["problem"])) for p in problems]
    out = generate(model, prompts, 1, 128, temperature=0, eos_ids=tokenizer.eos_ids)
    return problems, out.texts(tokenizer), out.finished.tolist()


def test_base_model_has_headroom(greedy):
    """A base that is too good, too weak, or that fails by its format leaves nothing to learn about
    reasoning. It is right on 49.5 % of all 600 held-out problems; 200 of them may be off by 10."""
    problems, texts, finished = greedy
    right = [verify(text, p["answer"]) for text, p in zip(texts, problems, strict=True)]
    assert 0.39 <= sum(right) / len(right) <= 0.61
    boxed = [f and extract_answer(t) is not None for t, f in zip(texts, finished, strict=True)]
    assert sum(boxed) / len(boxed) >= 0.95


def test_careful_work_pays_and_haste_does_not(greedy):
    """The fork that learning turns on: careful answers are mostly right, hasty ones mostly not."""
    problems, texts, _ = greedy
    hits = {True: [], False: []}
    for text, p in zip(texts, problems, strict=True):
        hits["Clearly" in text].append(verify(text, p["answer"]))
    assert sum(hits[False]) / len(hits[False]) > 0.8
    assert sum(hits[True]) / len(hits[True]) < 0.3


def test_transformers_loads_the_folder_unchanged():
    """A checkpoint that only its own code can read is a private format."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model, tokenizer = load_model(TINY), load_tokenizer(TINY)
    text = prompt_text("What is $12*13$?") + r"12*10=120. The answer is $\boxed{156}$."
    ids = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == their_tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == tokenizer.eos_ids[0]
    with torch.no_grad():
        ours = model.logits(model(torch.tensor([ids])))
        assert torch.allclose(ours, theirs(torch.tensor([ids])).logits, atol=1e-4)


def test_size():
    """Folders that make a clone slow."""
    for folder in [path.parent for path in TINY.parent.glob("*/config.json")]:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
        assert (folder / "model.safetensors").stat().st_size < 4e6
