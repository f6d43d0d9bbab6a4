"""model.py against transformers: the same logits, greedy tokens and text, from the same folders."""

import copy
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, edit_json, hf_model, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from hf.checkpoint import Tokenizer as OurTokenizer
from hf.checkpoint import config_from_dict, load_model, load_tokenizer
from model import KVCache, Qwen3
from run.flags import load_base
from sample import generate
from system import errors
from system.errors import UserError, run_cli

# In 64 tokens the pairs of a head turn 10 (kept), 2.9 (between), 0.8, 0.2 and 0.1 times.
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=64)
SHAPES = {  # what transformers builds; the defaults are in conftest.SHAPE
    "qwen3": dict(),
    "qwen3-1-kv-head": dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3-heads-eq-kv": dict(num_key_value_heads=4, head_dim=6, vocab_size=307, rope_theta=50.0),
    "qwen3-default-head-dim": dict(head_dim=128, hidden_size=24, rms_norm_eps=1e-6),
    "qwen2": dict(tie_word_embeddings=True, num_hidden_layers=3, rope_theta=1e6),
    "qwen2-1-kv-head": dict(num_key_value_heads=1, vocab_size=301, rms_norm_eps=0.1),
    "llama": dict(rope_theta=10000.0, intermediate_size=33),
    "llama-3.1": dict(rope=dict(LLAMA3)),
    "llama-odd-head-dim": dict(head_dim=14, num_key_value_heads=4, tie_word_embeddings=True),
}
COUNTS = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360}
CONFIGS = ROOT.parent / "shared" / "configs"


def random_ids(*shape, seed=0, vocab=300):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def to_older_form(path):
    """Rewrite a config.json of transformers 5 as transformers 4 and the Hub's files have it, old
    ones without what is the default."""
    raw = json.loads(path.read_text())
    scaling = dict(raw["rope_parameters"])
    raw["rope_theta"] = scaling.pop("rope_theta")
    default = dict(rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False)
    default["head_dim"] = 128 if raw["model_type"] == "qwen3" else raw["hidden_size"] // 4
    drop = ["rope_parameters", "layer_types", "dtype"]
    drop += [name for name, value in default.items() if raw.get(name) == value]
    scaling = None if scaling["rope_type"] == "default" else scaling
    changes = dict(rope_theta=raw["rope_theta"], rope_scaling=scaling, torch_dtype="float32")
    edit_json(path, drop, **changes)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A random model of transformers, and the folder it was saved in."""
    hf = hf_model(request.param.split("-")[0], **SHAPES[request.param])
    path = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(path)
    return hf, path


@pytest.mark.parametrize("form", ["v5", "v4"])
def test_logits_equal_transformers(pair, form):
    """Any slip in the computation (rotary pairing, norms, eps, theta, biases, grouping of heads,
    the tied head), or in reading either form of config.json, moves the logits."""
    hf, path = pair
    new = (path / "config.json").read_text()
    if form == "v4":
        to_older_form(path / "config.json")
    model = load_model(path)
    (path / "config.json").write_text(new)
    ids = random_ids(2, 23)
    want = hf(ids).logits
    assert want.std() > 0.5  # a flat model would agree with anything
    torch.testing.assert_close(model.logits(model(ids)), want, atol=1e-4, rtol=0)


def test_greedy_tokens_equal_transformers(pair):
    """The cache, the positions of decoding or the argmax may be wrong where a forward is right."""
    hf, path = pair
    prompts = [random_ids(length, seed=length).tolist() for length in (5, 1, 9)]
    ours = generate(load_model(path), prompts, max_new_tokens=12, temperature=0)
    for prompt, tokens in zip(prompts, ours.tokens.tolist(), strict=True):
        ids = torch.tensor([prompt])
        options = dict(do_sample=False, max_new_tokens=12, pad_token_id=0)
        want = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert tokens == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "text", ["", " a  b\n\n\tnaïve", "<|im_start|>user\n3 + 4 = 7<|im_end|>\n", "数学 🙂 ½", "éé<|"]
)
def test_tokenizer_equals_transformers(folder, text):
    """Text would reach the model as other tokens, or come back altered (spaces, special tokens)."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text == theirs.decode(ids)
    for part in range(len(ids)):  # tokens that end within a character
        assert ours.decode(ids[part:]) == theirs.decode(ids[part:])


def sentencepiece():
    """Return the tokenizers that Llama 2 and Gemma have: spaces are part of the tokens."""
    pieces = ["<unk>", "<0xF0>", "<0x9F>", "▁", "▁The", "▁answer", "▁is", ".", "▁4", "2", "a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    for prepend, strip in [("always", True), ("never", False)]:
        file = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
        space = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        file.pre_tokenizer = space
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        parts += [decoders.Strip(" ", 1, 0)] if strip else []
        for decoder in (decoders.Sequence(parts), decoders.Metaspace(prepend_scheme=prepend)):
            file.decoder = decoder
            yield OurTokenizer(file, [0])


def test_tokens_keep_their_spaces(folder):
    """Decoded one by one, SentencePiece's tokens lose the space that they begin with, on the page
    and for the token classes."""
    for tokenizer in sentencepiece():
        ids = [4, 5, 6, 8, 9, 7, 4]
        assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)
        assert tokenizer.pieces(ids)[1:] == [" answer", " is", " 4", "2", ".", " The"]
        assert tokenizer.pieces([]) == []
    bytewise = load_tokenizer(folder)
    ids = bytewise.encode(" a  b\n数<|im_end|>")
    assert bytewise.pieces(ids) == [bytewise.decode([i]) for i in ids]


def test_tokenizer_neither_cuts_nor_pads(scratch):
    """tokenizer.json may hold some training run's truncation and padding: prompts would be cut."""
    text, ours = "def forward(self, x): return x", load_tokenizer(scratch)
    want = ours.encode(text)
    ours.file.enable_truncation(5)
    ours.file.enable_padding(length=64)
    ours.file.save(str(scratch / "tokenizer.json"))
    assert len(want) > 5
    assert load_tokenizer(scratch).encode(text) == want
    assert AutoTokenizer.from_pretrained(scratch).encode(text) == want


def test_greedy_text_equals_transformers(folder):
    """Text to text: tokenizer, model, sampler and the end token together, as a user sees them."""
    from transformers import AutoModelForCausalLM

    theirs, hf = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model, ours = load_model(folder), load_tokenizer(folder)
    ended = set()
    for text in ["What is $3+4$?", "x", "def f(", "<|im_start|>", "Prove it."]:
        ids = theirs(text, return_tensors="pt")
        want = hf.generate(**ids, do_sample=False, max_new_tokens=40, pad_token_id=0)[0]
        want = want[ids["input_ids"].shape[1] :].tolist()
        got = generate(
            model, [ours.encode(text)], max_new_tokens=40, temperature=0, eos_ids=ours.eos_ids
        )
        assert got.tokens[0].tolist() == want
        ended.add(want[-1] == 2)
        assert got.texts(ours) == [theirs.decode(want[:-1] if want[-1] == 2 else want)]
    assert ended == {True, False}  # both kinds of completion were compared


def test_shards_equal_single_file(tmp_path, folder):
    """Of a sharded checkpoint a shard could be skipped, or the index not be found."""
    single = load_model(folder).state_dict()
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    sharded = load_model(tmp_path).state_dict()
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], single[name]) for name in single)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        load_model(tmp_path)


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("chunks", [[12], [5] + [1] * 7, [1] * 12, [3, 4, 5], [1, 10, 1]])
@pytest.mark.parametrize("spare", [0, 5])
def test_cache_equals_full_forward(chunks, spare):
    """Decoding would go wrong by a position, a mask or a stale key that one forward never has."""
    model, ids = tiny_model(), random_ids(3, 12)
    cache = KVCache(model.config, 3, 12 + spare, "cpu", torch.float32)
    parts = [model(part, cache) for part in ids.split(chunks, dim=1)]
    assert cache.lengths.tolist() == [12] * 3
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 4, [4], [1, 2, 1]])
def test_unequal_prompts_equal_each_alone(chunks):
    """A row could read the padding of its own prompt, or stand at another row's positions."""
    model, lengths = tiny_model(), [3, 7, 1]
    ids, after = random_ids(3, 7), random_ids(3, 4, seed=1)  # what pads a prompt is random too
    cache = KVCache(model.config, 3, 11, "cpu", torch.float32)
    first = model(ids, cache)
    cache.lengths = torch.tensor(lengths)
    rest = torch.cat([model(part, cache) for part in after.split(chunks, dim=1)], dim=1)
    assert cache.lengths.tolist() == [7, 11, 5]
    for row, length in enumerate(lengths):
        alone = model(torch.cat([ids[row, :length], after[row]])[None])[0]
        got = torch.cat([first[row, :length], rest[row]])
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("kind", ["", "-Base"])
def test_parameter_counts_of_qwen3(size, kind):
    """A layer too many, or a head that is not tied, shows in the count of a real configuration."""
    path = CONFIGS / f"Qwen3-{size}{kind}" / "config.json"
    if not path.exists():
        pytest.skip("shared/configs is not here")
    with torch.device("meta"):
        model = Qwen3(config_from_dict(json.loads(path.read_text())))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]


def test_loaded_model_is_frozen_tied_and_fp32(folder):
    """A tied head that became a copy would be trained, saved and counted twice."""
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.layers.0.mlp.extra", torch.ones(3), "model.layers.0.mlp.extra"),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(56, 40), "model.layers.2"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(40), "q_proj.bias"),
        (UP, None, UP),
        ("model.norm.weight", None, "model.norm.weight"),
        ("model.embed_tokens.weight", None, "embed_tokens|lm_head"),
        (UP, torch.ones(40, 56), UP),
        (UP, torch.ones(56, 40, dtype=torch.int8), UP),
        (UP, torch.ones(56, 40).index_fill(0, torch.tensor(7), float("nan")), "NaN"),
        (UP, torch.ones(56, 40).half().fill_(float("inf")), "infinity"),  # as after a flipped bit
        ("lm_head.weight", torch.ones(311, 40, dtype=torch.int8), "lm_head"),
        ("lm_head.weight", torch.ones(311, 40), "lm_head"),  # tied, so it must be the embedding
    ],
)
def test_wrong_tensors_are_refused(scratch, name, tensor, message):
    """A checkpoint that does not fit would load in part, and compute nonsense without a word."""
    state = load_file(scratch / "model.safetensors")
    state.pop(name, None)
    save_file(state if tensor is None else state | {name: tensor}, scratch / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(scratch)


EMBEDDING = "model.embed_tokens.weight"
STALE = dict(quant_method="bitsandbytes", load_in_4bit=True)


@pytest.mark.parametrize(
    "what", ["head twice", "head only", "inv_freq", "index", "words", "window"]
)
def test_what_transformers_ignores_is_ignored(scratch, what):
    """A checkpoint that transformers loads, refused for what does not matter; or, silently, the old
    shards of an index that nobody deleted."""
    path = scratch / "model.safetensors"
    state = load_file(path)
    want = state[EMBEDDING].clone()
    if what.startswith("head"):
        state["lm_head.weight"] = want.clone()
    if what == "head only":
        del state[EMBEDDING]
    if what == "inv_freq":
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    if what == "index":
        old = {name: torch.zeros_like(x) for name, x in state.items()}
        save_file(old, scratch / "old.safetensors")
        index = dict(weight_map=dict.fromkeys(old, "old.safetensors"))
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index))
    if what == "words":  # what a QLoRA run's base said of itself
        edit_json(scratch / "config.json", quantization_config=STALE)
    if what == "window":
        edit_json(scratch / "config.json", **SLIDING)  # which begins after layer 28
    save_file(state, path)
    model = load_model(scratch)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, want)


PACKED = torch.ones(4, 4, dtype=torch.int32)
GATE = "model.layers.1.mlp.gate_proj"
BY_NAME = {  # of a quantised matrix: what tensors there are, and what config.json says
    "fp8": ({"weight": PACKED.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1)}, None),
    "awq": (dict(qweight=PACKED, qzeros=PACKED, scales=torch.ones(4).half()), "awq"),
    "gptq": (dict(qweight=PACKED, g_idx=PACKED, scales=torch.ones(4).half()), "gptq"),
    "GPTQ or AWQ": (dict(qweight=PACKED, qzeros=PACKED), None),
    "bitsandbytes": ({"weight": PACKED.byte(), "weight.absmax": torch.ones(2)}, None),
    "int32": (dict(weight_packed=PACKED), None),
}


@pytest.mark.parametrize("kind", BY_NAME)
def test_quantised_checkpoints_are_refused_as_such(scratch, kind):
    """A traceback from torch, or a shape that does not fit: neither says what to do."""
    tensors, said = BY_NAME[kind]
    state = load_file(scratch / "model.safetensors")
    del state[f"{GATE}.weight"]
    state |= {f"{GATE}.{name}": x.clone() for name, x in tensors.items()}
    save_file(state, scratch / "model.safetensors")
    if said:
        edit_json(scratch / "config.json", quantization_config=dict(quant_method=said))
    with pytest.raises(
        UserError, match=rf"quantised weights \(.*{kind}.*\), such as .*: give the model"
    ):
        load_model(scratch)


@pytest.mark.parametrize(
    "names, message",
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter: give it as --adap"),
        (["adapter_config.json", "config.json", "adapter_model.bin"], "a LoRA adapter: give it as"),
        (["config.json", "trainer.safetensors", "metrics.jsonl"], "a LoRA adapter: give it as --a"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], r"only \.bin files, which can"),
        (["config.json", "pytorch_model-00001-of-00002.bin", "tokenizer.model"], r"only \.bin fi"),
        (["model-q4_k_m.gguf", "README.md"], "only GGUF, quantised weights: give"),
        (
            ["refs/main", "blobs/0", "snapshots/0123/config.json"],
            "cache: give the folder in .*snapshots$",
        ),
        (["tokenizer.json", "model.safetensors"], "no config.json"),
        ([], "no config.json"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_other_folders_are_refused_by_what_they_are(tmp_path, load, names, message):
    """Words about end tokens or a missing file, for an adapter or a folder of the cache."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1000, -2, None])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_and_missing_files_are_refused(scratch, file, keep):
    """A download that broke off would end in a traceback from some library, or load in part."""
    path = scratch / file
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep] if keep != 1000 else b"\x80" * 1000)
    with pytest.raises(UserError, match=file):
        load_model(scratch)


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "a/b/c", "nobody/no-such-model"])
def test_missing_folder_is_refused(name):
    """A mistyped path must be an error that shows it, not a search on the Hub."""
    with pytest.raises(UserError, match=name):
        load_model(name)


YARN = dict(rope_type="yarn", factor=4.0, rope_theta=500.0)
SLIDING = dict(use_sliding_window=True, sliding_window=8, layer_types=None)
OLDER = dict(rope_parameters=None, rope_theta=500.0)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gpt2", {}, "gpt2"),
        ("mistral", {}, "mistral"),
        ("qwen3", dict(rope_parameters=YARN), "rope scaling"),
        ("llama", dict(rope_scaling=dict(type="linear", factor=2.0), **OLDER), "rope scaling"),
        (
            "llama",
            dict(rope_scaling=dict(rope_type="llama3"), **OLDER),
            "scaling of type llama3 by",
        ),
        ("llama", dict(rope_parameters=LLAMA3 | dict(factor=0)), "scaling of type llama3 by"),
        ("llama", dict(rope_parameters=LLAMA3 | dict(factor="8")), "factor should be of type"),
        ("llama", dict(partial_rotary_factor=0.5), "rotary embeddings of a part"),
        ("qwen2", dict(rope_parameters=dict(full_attention=YARN)), "by the type of layer"),
        ("qwen2", SLIDING | dict(max_window_layers=1), "sliding"),
        ("qwen3_moe", dict(num_experts=4), "'qwen3_moe' is a mixture of experts"),
        ("mixtral", dict(num_local_experts=8), "'mixtral' is a mixture of experts"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "sliding"),
        ("llama", dict(attention_bias=True), "attention_bias"),
        ("qwen3", dict(attention_bias=True), "attention_bias"),
        ("qwen3", dict(hidden_act="gelu"), "gelu"),
        ("qwen3", dict(hidden_size=None), "hidden_size"),
        ("qwen3", dict(rope_parameters=dict(rope_theta=0)), "no rope_theta"),
        ("qwen3", dict(num_attention_heads="4"), "num_attention_heads should be of type int"),
        ("qwen3", dict(hidden_size=40.0), "hidden_size should be of type int, not float"),
        ("qwen3", dict(num_hidden_layers=True), "num_hidden_layers should be of type int"),
        ("qwen3", dict(vocab_size=-311), "vocab_size = -311 is out of range"),
        ("qwen3", dict(vocab_size=10**12), "vocab_size = 1000000000000 is out of range"),
        ("qwen3", dict(vocab_size=2**20), "embed_tokens|lm_head"),
        ("qwen3", dict(num_hidden_layers=2**20), "num_hidden_layers be at most 1000"),
        ("qwen3", dict(num_hidden_layers=100), "model.layers.10.input_layernorm"),
        ("qwen3", dict(num_attention_heads=2**20, hidden_size=2**20, head_dim=2**20), "tensor"),
        ("qwen3", dict(tie_word_embeddings="false"), "tie_word_embeddings should be of type bool"),
        ("qwen3", dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan is out of range"),
        ("qwen3", dict(rope_parameters=dict(rope_theta=float("inf"))), "rope_theta = inf"),
        ("qwen3", dict(rope_parameters=[1]), "rope_parameters should be of type dict"),
        (["qwen3"], {}, "model_type should be of type str"),
    ],
)
def test_unsupported_configurations_are_refused(scratch, family, changes, message):
    """What we would compute wrongly must be refused by name: wrong logits show nowhere else."""
    edit_json(scratch / "config.json", model_type=family, **changes)
    with pytest.raises(UserError, match=message):
        load_model(scratch)


def test_bf16(tmp_path):
    """In bf16 the statistics, the states and the rounding must be as exact as transformers'."""
    hf, ids = hf_model(), random_ids(4, 23)
    exact = hf(ids).logits
    hf.bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    hidden = model(ids)
    assert hidden.dtype == torch.float32
    ours, theirs = model.logits(hidden).float(), hf(ids).logits.float()
    norm, x = model.model.layers[1].input_layernorm, torch.randn(64, 40).bfloat16()
    assert torch.equal(norm(x), hf.model.layers[1].input_layernorm(x))
    noise = (theirs - exact).pow(2).mean().sqrt()
    assert 0 < (ours - exact).pow(2).mean().sqrt() < 1.3 * noise
    assert (ours - theirs).pow(2).mean().sqrt() < 1.5 * noise < 0.1 * exact.std()


MEASURE = """
import re, sys, torch
from hf.checkpoint import load_model
def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_model(sys.argv[1])  # a tiny one, after which all that torch imports late is there
for dtype in (torch.bfloat16, torch.float32):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the peak, becomes VmRSS
    before = memory("VmRSS")
    model = load_model(sys.argv[2], dtype=dtype)
    print(memory("VmHWM") - before)
    del model
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_loading_takes_the_memory_of_one_model(tmp_path, folder):
    """An 8B model would take twice its 16 GB while it is loaded on the CPU."""
    shape = dict(vocab_size=20_000, hidden_size=512, intermediate_size=2048, head_dim=64)
    model = tiny_model(**shape, num_hidden_layers=4).bfloat16()
    state = {name: p.data for name, p in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    raw = vars(model.config) | dict(model_type="qwen3")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 40e6
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    same_dtype, other_dtype = map(int, done.stdout.split())
    assert 0.9 * size < same_dtype < 1.3 * size
    assert 1.8 * size < other_dtype < 2.8 * size  # in fp32; the allocator keeps some of the bf16


@pytest.mark.parametrize(
    "config, generation, want",
    [
        (5, [7, 6], [7, 6]),
        (5, 7, [7]),
        ([5, 6], "no key", [5, 6]),
        (5, "no file", [5]),
        (None, [7], [7]),
        (5, 0, [0]),  # 0 is an id as any other
        (None, 0, [0]),
    ],
)
def test_eos_ids(scratch, config, generation, want):
    """With the wrong end tokens completions run on to the limit, or end too early."""
    edit_json(scratch / "config.json", eos_token_id=config)
    if generation == "no file":
        (scratch / "generation_config.json").unlink()
    elif generation == "no key":
        edit_json(scratch / "generation_config.json", drop=["eos_token_id"])
    else:
        edit_json(scratch / "generation_config.json", eos_token_id=generation)
    assert load_tokenizer(scratch).eos_ids == want


def test_tokenizer_refusals(scratch):
    """A folder without end token or tokenizer must say so, not fail at the first prompt."""
    for name in ("config.json", "generation_config.json"):
        edit_json(scratch / name, drop=["eos_token_id"])
    with pytest.raises(UserError, match="eos_token_id"):
        load_tokenizer(scratch)
    edit_json(scratch / "config.json", eos_token_id=2)
    (scratch / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(scratch)


MORE_ROOM = "lower --micro-batch-tokens (in training), --samples or --max-new-tokens"


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("mend\n\x1b[2Jthis"), "error: mend \ufffd[2Jthis\n"),
        (OSError("the disk is full"), "error: the disk is full\n"),
        (MemoryError("no memory"), f"error: out of memory: {MORE_ROOM}\n"),
        (RuntimeError("CUDA out of memory. Tried"), f"error: out of memory: {MORE_ROOM}\n"),
    ],
)
def test_run_cli_shows_one_line(capsys, error, line):
    """A user's mistake would end in a traceback, or a script take it for success."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == 2 and capsys.readouterr() == ("", line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_the_line(capsys, monkeypatch, number):
    """torchrun sends a signal of its own after Ctrl-C: a traceback in place of how to resume."""

    def main():
        os.kill(os.getpid(), number)

    def say(line, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        print(line, **options)

    monkeypatch.setattr(errors, "print", say, raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == 128 + number and capsys.readouterr() == ("", "stopped\n")


@pytest.mark.parametrize("eos", [[], "2", ["2"], -1, [2, -1], True, [[2]], {"2": 2}, 2.0])
def test_wrong_eos_ids_are_refused(scratch, eos):
    """Of the wrong type they are compared with every token and never found: nothing would end."""
    edit_json(scratch / "generation_config.json", eos_token_id=eos)
    with pytest.raises(UserError, match="eos_token_id"):
        load_tokenizer(scratch)


def test_a_tokenizer_of_another_model_is_refused(scratch):
    """An id beyond the embeddings is a crash deep in a run (on a GPU, of the whole process), and an
    end token beyond them never comes: completions run on to the limit."""

    def load(**flags):
        s = dict(model=str(scratch), revision="", device="cpu", dtype="auto")
        s |= dict(chat=False, system="", thinking="")
        return load_base(SimpleNamespace(**s | flags))

    load()
    edit_json(scratch / "generation_config.json", eos_token_id=0)
    assert [load(chat=chat)[1].eos_ids for chat in (False, True)] == [[0], [0, 2]]  # <|im_end|>
    edit_json(scratch / "generation_config.json", eos_token_id=[2, 310])
    load()  # the last embedding, which the tokenizer does not use
    edit_json(scratch / "generation_config.json", eos_token_id=[2, 311])
    with pytest.raises(UserError, match="id 311, the model 311 tokens"):
        load()
    edit_json(scratch / "generation_config.json", eos_token_id=2)
    path = scratch / "tokenizer.json"
    whole = json.loads(path.read_text())
    raw = copy.deepcopy(whole)
    for i in range(300, 312):
        token = dict(id=i, content=f"[PAD{i}]")
        raw["added_tokens"].append(raw["added_tokens"][-1] | token)
    path.write_text(json.dumps(raw))
    _, tokenizer = load()  # no text produces it
    with pytest.raises(UserError, match=r"for '\[PAD311\]' in the text '\[PAD311\]3\?'"):
        tokenizer.encode("What is [PAD310][PAD311]3?")
    raw = copy.deepcopy(whole)
    long = max((token for token in raw["model"]["vocab"] if "<" not in token), key=len)
    raw["model"]["vocab"][long] = 9000  # few tokens, but a far id
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="id 9000"):
        load()
    raw = copy.deepcopy(whole)
    token = dict(id="<s>", ids=[9001], tokens=["<s>"])  # is put before every text
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template = dict(type="TemplateProcessing", single=single, pair=single)
    raw["post_processor"] = template | {"special_tokens": {"<s>": token}}
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read|id 9001"):
        load()
    vocab = dict(type="WordLevel", vocab={"a": 0}, unk_token="[UNK]")  # which is not in it
    path.write_text(json.dumps(whole | dict(model=vocab, added_tokens=[])))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot encode"):
        load()


def test_half_of_a_surrogate_pair_has_tokens(folder):
    """JSON can hold one, and so can a command line: no tokenizer takes it."""
    ours = load_tokenizer(folder)
    assert ours.encode("a\ud800b") == ours.encode("a?b")


def test_run_cli_hides_no_bug(capsys):
    """Our own mistakes must keep their traceback, and a run that went well its exit code 0."""
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
    assert run_cli(lambda: None) is None
    assert capsys.readouterr().err == ""
