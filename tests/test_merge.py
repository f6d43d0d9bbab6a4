"""hf/merge.py, held to transformers, to PEFT's own merge and to our adapted model."""

import copy
import json
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import edit_json, hf_model, peft_model, save_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.problems import TINY, load_problems, prompt_text
from hf import merge
from hf.checkpoint import load_model
from hf.peft import load_adapter, save_adapter
from lora import add_lora, lora_parameters
from run.flags import load_base
from sample import generate
from system import files
from system.errors import run_cli

IDS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
SHARDS = dict(max_shard_size="40KB")
BASES = {  # family, how it is saved, its dtype, whether the head is the embedding
    "tied": ("qwen3", {}, torch.float32, True),
    "sharded": ("qwen2", SHARDS, torch.bfloat16, False),
    "head stored twice": ("llama", SHARDS, torch.float16, True),
}
# Beside a model; not one of these may come along, since it would change how the model loads.
ASTRAY = [
    "pytorch_model.bin",
    "adapter_config.json",
    "modeling_qwen3.py",
    "consolidated.safetensors",
]


def logits(model, ids=IDS):
    with torch.no_grad():
        found = model(ids)
        return found.logits if hasattr(found, "logits") else model.logits(found)


def state(folder):
    """The tensors of a checkpoint, by file and name."""
    return {path.name: load_file(path) for path in sorted(folder.glob("model*.safetensors"))}


def adapter_of(hf, folder, base="", **options):
    """PEFT's model on a copy of hf, its adapter random and saved in a folder."""
    peft_model(hf, **options).save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """A model of transformers and the folder it was saved in, with what else such folders hold."""
    family, how, dtype, tied = BASES[request.param]
    hf = hf_model(family, tie_word_embeddings=tied, eos_token_id=2).to(dtype)
    folder = tmp_path_factory.mktemp("base")
    hf.save_pretrained(folder, **how)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "onnx").mkdir()
    for name in [*ASTRAY, "onnx/model.safetensors"]:
        (folder / name).write_bytes(b"{}")
    if how and tied:  # under both names, as some checkpoints have it
        file = max(folder.glob("model-*"))
        twice = {"lm_head.weight": hf.model.embed_tokens.weight.clone()}
        save_file(load_file(file) | twice, file, dict(format="pt"))
        index = files.read_json(folder / "model.safetensors.index.json")
        index["weight_map"]["lm_head.weight"] = file.name
        files.write_json(folder / "model.safetensors.index.json", index)
    return hf, folder


def test_the_merged_model_is_the_adapted_one(base, tmp_path):
    """A scale, layer or dtype that is another; a tensor that is lost, renamed or in another file; a
    second file that transformers or we would load instead, or a tokenizer that does not load."""
    hf, folder = base
    adapter = adapter_of(hf, tmp_path / "adapter", folder, use_rslora=True)
    out = tmp_path / "out"
    merge.merge(adapter, out)

    # Files and tensors: those of the base, and only the adapted ones are others.
    there = {path.name for path in out.iterdir()}
    assert there == {path.name for path in folder.iterdir()} - {*ASTRAY, "onnx"}
    untouched = [path for path in there if not path.startswith("model")]
    untouched += [path for path in there if path.endswith("index.json")]
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in untouched)
    exact = copy.deepcopy(hf).float()
    theirs = PeftModel.from_pretrained(exact, adapter).merge_and_unload().state_dict()
    before, after = state(folder), state(out)
    assert before.keys() == after.keys()
    for file, tensors in before.items():
        assert tensors.keys() == after[file].keys()
        for name, W in tensors.items():
            merged = after[file][name]
            assert merged.dtype == W.dtype
            if "q_proj.weight" in name or "up_proj" in name:
                assert not torch.equal(merged, W)
                size = torch.finfo(W.dtype).eps * theirs[name].abs() + 1e-6
                assert ((merged.float() - theirs[name]).abs() <= size).all()
            else:
                assert torch.equal(merged, W)

    # Logits: transformers' and ours, and those of the adapted model.
    ours = load_model(out)
    want = logits(load_adapter(load_model(folder), adapter))
    plain = logits(load_model(folder))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(loaded), atol=1e-4, rtol=0)
    rounding = 40 * torch.finfo(hf.dtype).eps  # of the weights, once, through two blocks
    assert (logits(ours) - want).std() < max(rounding, 1e-5) * (want - plain).std()
    tokens = [AutoTokenizer.from_pretrained(where).encode("3+4") for where in (folder, out)]
    assert tokens[0] == tokens[1]


@pytest.fixture
def run(tmp_path):
    """The folder of a run on the embedded model, whose adapter does something."""
    model = add_lora(load_model(TINY), 2, 4)
    rng = torch.Generator().manual_seed(1)
    for name, p in lora_parameters(model).items():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=rng)
    folder = tmp_path / "run"
    save_adapter(model, folder / "adapter", "not/there")
    settings = dict(model=str(TINY), revision="", random_init=False)
    files.write_json(folder / "config.json", dict(settings=settings))
    return folder


def test_a_merged_run_gives_the_same_answers(run, tmp_path):
    """A run folder whose base is not found; answers that are not those of --adapter."""
    out = tmp_path / "out"
    out.mkdir()  # empty
    assert 0.99 < merge.merge(run, out) <= 1
    shutil.move(run / "config.json", tmp_path)  # what is left is an adapter without a run
    merge.merge(run / "adapter", tmp_path / "again", str(TINY))
    assert state(out)["model.safetensors"].keys() == state(TINY)["model.safetensors"].keys()
    for name, tensor in state(out)["model.safetensors"].items():
        assert torch.equal(tensor, state(tmp_path / "again")["model.safetensors"][name])
    texts = []
    for model, adapter in ((out, ""), (TINY, run), (TINY, "")):
        cfg = dict(model=str(model), adapter=str(adapter), revision="", device="cpu", dtype="auto")
        loaded, tokenizer = load_base(SimpleNamespace(**cfg, chat=False, system="", thinking=""))
        problems = load_problems("tiny", "test")[:8]
        prompts = [tokenizer.encode(prompt_text(p["problem"])) for p in problems]
        found = generate(loaded, prompts, 1, 48, temperature=0, eos_ids=tokenizer.eos_ids)
        texts.append(found.texts(tokenizer))
    assert texts[0] == texts[1] != texts[2]


# ---- Refusals ------------------------------------------------------------------------------------


def without(path, *names):
    """Drop tensors of a safetensors file."""
    save_file({k: v for k, v in load_file(path).items() if k not in names}, path)


Q = "model.layers.1.self_attn.q_proj.weight"
RANDOM = dict(model="x", random_init=True)
REFUSED = [  # what is done to (base, run), more arguments, what is said
    (None, ["{base}"], "give another"),
    (None, ["{base}/new/deep"], "give another"),
    (None, ["{run}"], "give another"),
    (None, ["{run}/config.json"], "give another"),
    (None, ["{out}", "--model", "no/where/at/all"], "no model folder"),
    (lambda b, r: edit_json(r / "config.json", settings=[1]), ["{out}"], "settings should be"),
    (
        lambda b, r: edit_json(r / "config.json", settings={}),
        ["{out}"],
        "not/there is not all in the cache",
    ),
    (lambda b, r: edit_json(r / "config.json", settings=RANDOM), ["{out}"], "give --model"),
    (lambda b, r: shutil.rmtree(r / "adapter"), ["{out}"], "adapter_config.json is missing"),
    (lambda b, r: edit_json(b / "config.json", model_type="gpt2"), ["{out}"], "gpt2"),
    (lambda b, r: edit_json(b / "config.json", hidden_size=64), ["{out}"], "float expected"),
    (lambda b, r: (b / "model.safetensors").unlink(), ["{out}"], "get it again"),
    (lambda b, r: (b / "model.safetensors").write_bytes(b"x" * 99), ["{out}"], "get it again"),
    (lambda b, r: without(b / "model.safetensors", Q), ["{out}"], f"no such tensor {Q}"),
]


@pytest.mark.parametrize("harm, arguments, says", REFUSED, ids=range(len(REFUSED)))
def test_refusals_are_one_line(run, tmp_path, monkeypatch, capsys, harm, arguments, says):
    """A folder that is overwritten, half a model that looks whole, or a traceback."""
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    settings = dict(model=str(base), revision="", random_init=False)
    files.write_json(run / "config.json", dict(settings=settings))
    if harm:
        harm(base, run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = dict(base=base, run=run, out=tmp_path / "out")
    arguments = [text.format(**names) for text in arguments]
    assert refused(monkeypatch, capsys, run, *arguments).count(says) == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def refused(monkeypatch, capsys, *arguments):
    """What python -m hf.merge says when it exits with code 2: one line."""
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_cli(merge.main)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.mark.filterwarnings("ignore")  # PEFT warns of it, too
def test_an_adapted_head_is_refused(tmp_path, monkeypatch, capsys):
    """A tied head is the embedding, too: adding to it would change what the model reads."""
    hf = hf_model(tie_word_embeddings=True)
    hf.save_pretrained(tmp_path / "base")
    options = dict(target_modules=["q_proj", "lm_head"])
    adapter = adapter_of(hf, tmp_path / "adapter", tmp_path / "base", **options)
    assert "adapts lm_head" in refused(monkeypatch, capsys, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_model(run, tmp_path, monkeypatch, capsys):
    """Half of the weights, which a program would load, or which take the room that is missing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # no file may be larger
    try:
        said = refused(monkeypatch, capsys, run, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in said and list((tmp_path / "out").iterdir()) == []
    merge.merge(run, tmp_path / "out")


def test_config_json_comes_last_and_onto_a_disk_that_has_the_rest(run, tmp_path, monkeypatch):
    """A folder that looks whole after a crash and is not."""
    merge.merge(run, tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    synced, write = set(), files.write_whole
    monkeypatch.setattr(files, "sync", lambda path: synced.add(path.name))

    def crash(path, data):
        if path.name == "config.json":
            there = {p.name: p.read_bytes() for p in path.parent.iterdir()}
            assert there | {"config.json": data} == whole
            assert there.keys() <= {name.removesuffix(".part") for name in synced}
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(files, "write_whole", crash)
    with pytest.raises(KeyboardInterrupt):
        merge.merge(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_bf16_rounds_away_is_said(tmp_path, monkeypatch, capsys):
    """A young adapter that is lost in the rounding of a bf16 model, unnoticed."""
    hf = hf_model().bfloat16()
    hf.save_pretrained(tmp_path / "base")
    adapter = adapter_of(hf, tmp_path / "adapter", tmp_path / "base")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v * 1e-4 for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    monkeypatch.setattr(sys, "argv", ["merge.py", str(adapter), str(tmp_path / "out")])
    run_cli(merge.main)
    assert "merged: 0.0 % of the numbers in adapted weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
