"""Checkpoints in Hugging Face's layout. What our model would compute wrongly is refused by name."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer as TokenizerFile

from hf.chat import Turn
from hf.hub import hub_folder, is_hub_id
from model import Config, Qwen3
from system.errors import UserError
from system.files import MAX_JSON, check_tensors, checked, opened, read_json, read_tensors

FAMILIES = {  # model_type of config.json: what the attention of that family has
    "qwen3": dict(qkv_bias=False, qk_norm=True),
    "qwen2": dict(qkv_bias=True, qk_norm=False),
    "llama": dict(qkv_bias=False, qk_norm=False),
}
TYPES = {field.name: field.type for field in fields(Config)}  # of what we read in config.json
TYPES.update(model_type=str, hidden_act=str, attention_bias=bool, use_sliding_window=bool)
TYPES.update(layer_types=list, rope_parameters=dict, rope_scaling=dict)
INDEX = "model.safetensors.index.json"  # which file of a sharded checkpoint holds which tensor


def config_from_dict(raw: dict) -> Config:
    """Return the Config of a parsed config.json; UserError, by name, on what we compute wrongly."""
    raw = checked(raw, "config.json", **TYPES)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not supported: use {', '.join(FAMILIES)}")
    # Transformers 5 writes rope_parameters, with rope_theta in it; transformers 4 rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = checked(rope, "config.json", rope_theta=float)
    feature = unsupported_feature(raw, rope, family)
    if feature:
        raise UserError(f"config.json asks for {feature}, which is not supported")
    # Three fields have defaults, those of transformers. A 0 counts as absent.
    heads = raw.get("num_attention_heads") or 1
    width = 128 if family == "qwen3" else raw.get("hidden_size", 0) // heads
    defaults = dict(num_key_value_heads=heads, head_dim=width, tie_word_embeddings=False)
    values = {f.name: raw.get(f.name) or defaults.get(f.name) for f in fields(Config)}
    values.update(FAMILIES[family])
    values["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta")
    for name, value in values.items():
        if not value and value is not False:
            raise UserError(f"config.json has no {name}: is it a {family} checkpoint's?")
    config = Config(**values)
    odd = heads % config.num_key_value_heads or config.head_dim % 2
    if odd or config.num_hidden_layers > 1000:
        limits = "key-value heads must divide heads, head_dim be even, num_hidden_layers be at most"
        raise UserError(f"config.json: {limits} 1000")
    return config


def unsupported_feature(raw: dict, rope: dict, family) -> str:
    """Return what a config.json asks for and our model does not compute; "" if all is computed."""
    if (rope.get("rope_type") or rope.get("type", "default")) != "default":
        return "rope scaling"
    if raw.get("use_sliding_window") or "sliding_attention" in raw.get("layer_types", []):
        return "a sliding window"
    if raw.get("attention_bias") and not FAMILIES[family]["qkv_bias"]:
        return "attention_bias"
    if raw.get("hidden_act", "silu") != "silu":
        return f"hidden_act {raw['hidden_act']}"
    return ""


def checkpoint_folder(path_or_id, revision=None) -> Path:
    """Return the folder of a checkpoint; a Hub id is downloaded first, at this revision of it."""
    name = str(path_or_id)
    if is_hub_id(name):
        return hub_model(name, revision)
    if not Path(name).is_dir():
        raise UserError(f"no model folder {name}: give one, or a Hub id such as Qwen/Qwen3-0.6B")
    return Path(name)


def hub_model(repo, revision=None) -> Path:
    """Download what we read of a checkpoint on the Hub, all of one commit; return its folder."""
    optional = [INDEX, "generation_config.json", "tokenizer_config.json", "chat_template.jinja"]
    folder = hub_folder(repo, revision, ["config.json", "tokenizer.json"], optional)
    return hub_folder(repo, folder.name, weight_files(folder))  # its name is the commit


def weight_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors files; UserError on one in another folder."""
    path = folder / INDEX
    if not path.exists():
        return ["model.safetensors"]
    index = checked(read_json(path), INDEX, weight_map=dict)
    names = list(index.get("weight_map", {}).values())
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{path} names {str(name)[:80]!r}, no safetensors file of it")
    if not names:
        raise UserError(f"{path} names no files: get it again")
    return sorted(set(names))


def default_dtype(device):
    """Return the dtype of frozen weights on a device: fp32 on the CPU, bf16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_model(path_or_id, device="cpu", dtype=None, revision=None) -> Qwen3:
    """Load a frozen model, in eval mode, from a folder or Hub id; dtype None means default_dtype.
    UserError on an architecture that is not ours, or other tensors than config.json asks for."""
    folder = checkpoint_folder(path_or_id, revision)
    config = config_from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):  # takes no memory: the tensors of the file move in below
        model = Qwen3(config)
    expected, state = model.state_dict(), {}
    most = 8 * sum(x.numel() for x in expected.values()) + 2**24  # bytes, with their names
    for file in weight_files(folder):
        state.update(read_tensors(folder / file, most)[0])
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        head = state.pop("lm_head.weight", None)  # some files hold the matrix twice
        embedding = state.get("model.embed_tokens.weight", head)
        if head is not None and not torch.equal(head, embedding):
            raise UserError(f"{folder}: config.json ties lm_head to embed_tokens, but they differ")
    check_tensors(state, expected, folder)
    dtype = dtype or default_dtype(device)
    state = {name: state.pop(name).to(device, dtype) for name in list(state)}  # no two models
    model.load_state_dict(state, assign=True, strict=False)  # a tied head is not among them
    model.tie()  # again, since assigning made the embedding a new parameter
    return model.requires_grad_(False).eval()


def random_model(config: Config, device="cpu", dtype=torch.float32, seed=0) -> Qwen3:
    """Return a frozen model of small random weights: for measuring speed and memory."""
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
    """tokenizer.json, run by the tokenizers library, the ids that end a text, and the user's turn
    of a model that is to chat."""

    file: TokenizerFile
    eos_ids: list[int]
    turn: Turn | None = None

    def encode(self, text: str, special=True) -> list[int]:
        """Return the token ids of a text; half of a surrogate pair counts as a question mark.
        special: with the tokens that some tokenizers put before every text."""
        known = text.encode("utf-8", "replace").decode()
        return self.file.encode(known, add_special_tokens=special).ids

    def prompt_text(self, text: str) -> str:
        """Return a prompt as the model reads it: as it is, or as a user's turn."""
        return self.turn.around(text) if self.turn else text

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt. (A chat template writes the special tokens itself.)"""
        return self.encode(self.prompt_text(text), special=self.turn is None)

    def count_prompts(self, texts: list[str]) -> list[int]:
        """Return how many ids encode_prompt gives each text; all cores do it."""
        texts = [self.prompt_text(text).encode("utf-8", "replace").decode() for text in texts]
        found = self.file.encode_batch_fast(texts, add_special_tokens=self.turn is None)
        return [len(encoding) for encoding in found]

    def decode(self, ids) -> str:
        """Return the text of ids, special tokens included; what is not UTF-8 becomes U+FFFD."""
        return self.file.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path_or_id, revision=None) -> Tokenizer:
    """Load the tokenizer of a folder or Hub id; UserError if it or its end token is missing."""
    folder = checkpoint_folder(path_or_id, revision)
    eos_ids = read_eos_ids(folder)
    path = folder / "tokenizer.json"
    try:
        with opened(path) as raw:
            file = TokenizerFile.from_buffer(raw.read(MAX_JSON))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} cannot be read: {error}") from None
    file.no_truncation()  # some training run's truncation and padding would change the tokens
    file.no_padding()
    return Tokenizer(file, eos_ids)


def read_eos_ids(folder: Path) -> list[int]:
    """Return the ids that end a text: those of generation_config.json, or else of config.json."""
    files = [folder / name for name in ("generation_config.json", "config.json")]
    found = [read_json(file).get("eos_token_id") for file in files if file.exists()]
    eos = next((ids for ids in found if ids is not None), None)
    eos = [eos] if type(eos) is int else eos
    if not isinstance(eos, list) or not eos or any(type(i) is not int or i < 0 for i in eos):
        raise UserError(f"{folder}: config.json and generation_config.json hold no eos_token_id")
    return eos
