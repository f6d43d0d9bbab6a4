"""Checkpoints in Hugging Face's layout: config.json, weights and tokenizer of a folder or a Hub id.

What transformers would compute otherwise than our model is refused by name.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer as TokenizerFile

from hf.hub import hub_folder
from model import Config, Qwen3
from system.errors import UserError
from system.files import check_tensors, checked, read_json, read_tensors

FAMILIES = dict(qwen3=(False, True), qwen2=(True, False), llama=(False, False))  # bias, norm

INDEX = "model.safetensors.index.json"  # which file of a sharded checkpoint holds what


def weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's safetensors files; UserError on one that leads elsewhere."""
    if not (folder / INDEX).exists():
        return ["model.safetensors"]
    index = checked(read_json(folder / INDEX), INDEX, weight_map=dict)
    names = list(index.get("weight_map", {}).values())
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{folder / INDEX} names {str(name)[:80]!r}, no safetensors file of it")
    if not names:
        raise UserError(f"{folder / INDEX} names no files: get it again")
    return sorted(set(names))


def hub_model(repo, revision=None) -> Path:
    """The folder with what we read of a checkpoint on the Hub, all of it of one commit."""
    optional = [INDEX, "generation_config.json"]
    folder = hub_folder(repo, revision, ["config.json", "tokenizer.json"], optional)
    return hub_folder(repo, folder.name, weight_files(folder))


def read_weights(folder: Path) -> dict:
    """The tensors of single-file or sharded safetensors by name."""
    state = {}
    for file in weight_files(folder):
        state.update(read_tensors(folder / file)[0])
    return state


def config_from_dict(raw: dict) -> Config:
    """From a parsed config.json. UserError, by name, on all that we would compute wrongly."""
    kinds = {f.name: f.type for f in fields(Config)} | dict(model_type=str, hidden_act=str)
    kinds |= dict(rope_parameters=dict, rope_scaling=dict, layer_types=list)
    kinds |= dict(use_sliding_window=bool, attention_bias=bool)
    raw = checked(raw, "config.json", **kinds)
    family, heads = raw.get("model_type"), raw.get("num_attention_heads") or 1
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not supported: use {', '.join(FAMILIES)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, 4
    rope = checked(rope, "config.json", rope_theta=float)
    layers, act = raw.get("layer_types", ()), raw.get("hidden_act", "silu")
    refused = {
        "rope scaling": (rope.get("rope_type") or rope.get("type", "default")) != "default",
        "a sliding window": raw.get("use_sliding_window") or "sliding_attention" in layers,
        "attention_bias": raw.get("attention_bias") and not FAMILIES[family][0],
        f"hidden_act {act}": act != "silu",
    }
    if asks := [what for what, present in refused.items() if present]:
        raise UserError(f"config.json asks for {asks[0]}, which is not supported")
    c = {f.name: raw.get(f.name) for f in fields(Config)}
    c["qkv_bias"], c["qk_norm"] = FAMILIES[family]
    c["rope_theta"] = rope.get("rope_theta") or c["rope_theta"]
    c["tie_word_embeddings"] = bool(c["tie_word_embeddings"])
    c["num_key_value_heads"] = c["num_key_value_heads"] or heads
    width = 128 if family == "qwen3" else (c["hidden_size"] or 0) // heads
    c["head_dim"] = c["head_dim"] or width
    if absent := [name for name, value in c.items() if not (value or value is False)]:
        raise UserError(f"config.json has no {absent[0]}: is it a {family} checkpoint's?")
    if heads % c["num_key_value_heads"] or c["head_dim"] % 2 or c["num_hidden_layers"] > 1000:
        limits = "key-value heads must divide heads, head_dim be even, layers be at most 1,000"
        raise UserError(f"config.json: {limits}")
    return Config(**c)


def checkpoint_folder(path_or_id, revision=None) -> Path:
    """The folder of a checkpoint, which for a Hub id is downloaded first."""
    name = str(path_or_id)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name[0] in "./~" or Path(name).exists():
        raise UserError(f"no model folder {name}: give one, or a Hub id such as Qwen/Qwen3-0.6B")
    return hub_model(name, revision)


def default_dtype(device):
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_model(path_or_id, device="cpu", dtype=None, revision=None) -> Qwen3:
    """A frozen model in eval mode, from a folder or Hub id; dtype: fp32 on the CPU, else bf16.
    UserError on an unknown or missing tensor, a wrong shape, an architecture that is not ours."""
    folder = checkpoint_folder(path_or_id, revision)
    dtype = dtype or default_dtype(device)
    with torch.device("meta"):  # takes no memory: the tensors of the file move in below
        model = Qwen3(config_from_dict(read_json(folder / "config.json")))
    state, expected = read_weights(folder), model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]  # a file may hold the matrix twice
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.get("model.embed_tokens.weight", head)):
            raise UserError(f"{folder}: config.json ties lm_head to embed_tokens, but they differ")
    check_tensors(state, expected, folder)
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True, strict=False)  # a tied head is not among them
    model.tie()  # again, since assigning made the embedding a new parameter
    return model.requires_grad_(False).eval()


def random_model(config: Config, device="cpu", dtype=torch.float32, seed=0) -> Qwen3:
    """A frozen model whose weights are small random numbers: for measuring speed and memory."""
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to_empty(device=device).to(dtype)
    model.tie()
    rng = torch.Generator(model.device).manual_seed(seed)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.02, generator=rng)
    return model.requires_grad_(False).eval()


@dataclass
class Tokenizer:
    """tokenizer.json, run by the tokenizers library, and the ids that end a text."""

    file: TokenizerFile
    eos_ids: list[int]

    def encode(self, text: str) -> list[int]:
        # Half of a surrogate pair (JSON can say one) has no bytes: it becomes a question mark.
        return self.file.encode(text.encode("utf-8", "replace").decode()).ids

    def decode(self, ids) -> str:
        """The text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.file.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path_or_id, revision=None) -> Tokenizer:
    """From a folder or Hub id; eos_ids are generation_config.json's, else config.json's."""
    folder = checkpoint_folder(path_or_id, revision)
    files = [folder / name for name in ("generation_config.json", "config.json")]
    said = [read_json(file).get("eos_token_id") for file in files if file.exists()]
    eos = next((ids for ids in said if ids is not None), None)
    eos = [eos] if type(eos) is int else eos
    if not isinstance(eos, list) or not eos or any(type(i) is not int or i < 0 for i in eos):
        raise UserError(f"{folder}: config.json and generation_config.json hold no eos_token_id")
    try:
        file = TokenizerFile.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
    file.no_truncation()  # neither is part of what a text's tokens are
    file.no_padding()
    return Tokenizer(file, eos)
