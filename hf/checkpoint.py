"""Checkpoints in Hugging Face's layout. What our model would compute wrongly is refused by name."""

import hashlib
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
# Config's fields that config.json has, but for the last one; and what else we read in it.
TYPES = {field.name: field.type for field in fields(Config)[:-1]}
TYPES.update(model_type=str, hidden_act=str, attention_bias=bool, use_sliding_window=bool)
TYPES.update(layer_types=list, rope_parameters=dict, rope_scaling=dict, quantization_config=dict)
TYPES.update(sliding_window=int, max_window_layers=int, max_position_embeddings=int)
# What transformers takes where config.json has none and the tensors' shapes do not tell.
DEFAULTS = dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False)
# The numbers of Llama 3's rope scaling, as in Config.
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
OURS = Path(__file__).parent.parent / "data"
# Our own checkpoints; each folder holds its problems, too.
NAMED = {name: OURS / name for name in ("tiny", "slips", "three", "format")}
ADAPTER = "adapter_config.json"
EMBEDDING = "model.embed_tokens.weight"
SETTINGS = ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"]
INDEX = "model.safetensors.index.json"  # which file of a sharded checkpoint holds which tensor


def config_from_dict(raw: dict) -> Config:
    """Return the Config of a parsed config.json; UserError, by name, on what we compute wrongly."""
    raw = checked(raw, "config.json", **TYPES)
    family = raw.get("model_type")
    if family not in FAMILIES:
        is_mixture = "moe" in str(family) or any("experts" in key for key in raw)
        kind = "a mixture of experts" if is_mixture else "another architecture"
        known = ", ".join(FAMILIES)
        raise UserError(f"model_type {family!r} is {kind}: use a dense model of type {known}")
    # Transformers 5 writes rope_parameters, with rope_theta in it; transformers 4 rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    trained = dict(original_max_position_embeddings=raw.get("max_position_embeddings", 0))
    rope = trained | checked(rope, "config.json", rope_theta=float, **dict.fromkeys(LLAMA3, float))
    kind = rope.get("rope_type") or rope.get("type", "default")
    feature = unsupported_feature(raw, rope, kind, family)
    if feature:
        raise UserError(f"config.json asks for {feature}: use a model without that")
    # Fields that are absent have transformers' defaults, if shapes would not tell of a wrong one.
    heads = raw.get("num_attention_heads") or 1
    width = 128 if family == "qwen3" else raw.get("hidden_size", 0) // heads
    defaults = DEFAULTS | dict(num_key_value_heads=heads, head_dim=width)
    values = {f.name: raw.get(f.name, defaults.get(f.name)) for f in fields(Config)[:-1]}
    values.update(FAMILIES[family])
    values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
    for name, value in values.items():
        if not value and value is not False:
            raise UserError(f"config.json has no {name}: is it a {family} checkpoint's?")
    numbers = tuple(rope[name] for name in LLAMA3) if kind == "llama3" else None
    config = Config(**values, llama3_rope=numbers)
    odd = heads % config.num_key_value_heads or config.head_dim % 2
    if odd or config.num_hidden_layers > 1000:
        limits = "key-value heads must divide heads, head_dim be even, num_hidden_layers be at most"
        raise UserError(f"config.json: {limits} 1000")
    return config


def unsupported_feature(raw: dict, rope: dict, kind, family) -> str:
    """Return what a config.json asks for and our model does not compute; "" if all is computed."""
    if kind not in ("default", "llama3"):
        return f"rope scaling of type {kind}"
    if kind == "llama3":
        factor, low, high, length = (rope.get(name, 0) for name in LLAMA3)
        if factor < 1 or not 0 < low < high or length < 1:
            return f"rope scaling of type llama3 by {factor}, {low}, {high}, {length}"
    if (rope | raw).get("partial_rotary_factor", 1) != 1 or dict in map(type, rope.values()):
        return "rotary embeddings of a part, or by the type of layer"
    # Transformers counts window layers where nothing says which layers they are. Llama has none.
    windows = family != "llama" and raw.get("use_sliding_window") and raw.get("sliding_window", 1)
    full = raw.get("max_window_layers", 28) >= raw.get("num_hidden_layers", 0)
    types = raw.get("layer_types", ["full_attention" if full or not windows else "sliding"])
    if set(map(str, types)) - {"full_attention"}:
        return "a sliding window"
    if raw.get("attention_bias") and not FAMILIES[family]["qkv_bias"]:
        return "attention_bias"
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act {raw['hidden_act']}"
    return ""


def checkpoint_folder(path_or_id, revision=None) -> Path:
    """Return the folder of a checkpoint, which may be one of NAMED; a Hub id is downloaded first,
    at this revision of it."""
    name = str(NAMED.get(path_or_id, path_or_id))
    if is_hub_id(name):
        return hub_model(name, revision)
    if not Path(name).is_dir():
        way = "give another --model, or a Hub id such as Qwen/Qwen3-0.6B"
        raise UserError(f"no model folder {name}: {way}")
    check_layout(Path(name))
    return Path(name)


def check_layout(folder: Path):
    """Raise UserError if a folder is something else than a checkpoint that we read, by its name."""
    names = {path.name for path in folder.iterdir()}
    if any(folder.glob("model*.safetensors")):
        names &= {"config.json"}  # nothing beside them matters
    ends = {Path(name).suffix for name in names}
    adapter = "a LoRA adapter: give it as --adapter, and its base as --model"
    pickles = "only .bin files, which can hold code: convert them, by transformers' save_pretrained"
    kinds = {
        adapter: names & {ADAPTER, "trainer.safetensors"},  # or a run, which holds one
        f"the Hub's cache: give the folder in {folder / 'snapshots'}": "snapshots" in names,
        pickles: ends & {".bin", ".pt", ".pth"},
        "only GGUF, quantised weights: give the model that they were made of": ".gguf" in ends,
        "no model (no config.json): give a checkpoint's folder": "config.json" not in names,
    }
    for kind, found in kinds.items():
        if found:
            raise UserError(f"{folder} holds {kind}")


def hub_model(repo, revision=None) -> Path:
    """Download what we read of a checkpoint on the Hub, all of one commit; return its folder."""
    first = [*SETTINGS, ADAPTER, "model.safetensors", INDEX]
    folder = hub_folder(repo, revision, optional=first)
    if (folder / ADAPTER).exists():
        check_layout(folder)
    needed = ["config.json", "tokenizer.json", *weight_files(folder)]
    return hub_folder(repo, folder.name, needed)  # its name is the commit


def weight_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors files; UserError on one in another folder.
    Beside model.safetensors an index is out of date, as for transformers."""
    path = folder / INDEX
    if (folder / "model.safetensors").exists() or not path.exists():
        return ["model.safetensors"]
    index = checked(read_json(path), INDEX, weight_map=dict)
    names = list(index.get("weight_map", {}).values())
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{path} names {str(name)[:80]!r}, no safetensors file of it")
    if not names:
        raise UserError(f"{path} names no files: get it again")
    return sorted(set(names))


def model_digest(folder: Path) -> str:
    """Return a digest of what a checkpoint's folder gives us: its files' names and bytes."""
    found = hashlib.sha256()
    for name in [*SETTINGS, "tokenizer.json", *weight_files(folder)]:
        if (folder / name).is_file():
            with opened(folder / name) as file:
                found.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def check_quantised(state: dict, raw: dict, folder):
    """Raise UserError if weights are quantised. What config.json says of it decides nothing: merged
    weights keep the words of their base."""
    packed = [
        name for name, x in state.items() if x.element_size() < 2 or not x.is_floating_point()
    ]
    if packed:
        marks = dict(qweight="GPTQ or AWQ", absmax="bitsandbytes", SCB="bitsandbytes")
        guesses = [kind for mark, kind in marks.items() if mark in " ".join(state)]
        kind = [*guesses, str(state[packed[0]].dtype).replace("torch.float8", "fp8")][0]
        kind = raw.get("quantization_config", {}).get("quant_method", kind)
        way = f"such as {packed[0]}: give the model that they were made of"
        raise UserError(f"{folder} holds quantised weights ({kind}), {way}")


def default_dtype(device):
    """Return the dtype of frozen weights on a device: fp32 on the CPU, bf16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_model(path_or_id, device="cpu", dtype=None, revision=None) -> Qwen3:
    """Load a frozen model, in eval mode, from a folder or Hub id; dtype None means default_dtype.
    UserError on an architecture that is not ours, or other tensors than config.json asks for."""
    folder = checkpoint_folder(path_or_id, revision)
    raw = read_json(folder / "config.json")
    config = config_from_dict(raw)
    with torch.device("meta"):  # takes no memory: the tensors of the file move in below
        model = Qwen3(config)
    expected, state = model.state_dict(), {}
    most = 8 * sum(x.numel() for x in expected.values()) + 2**24  # bytes, with their names
    for file in weight_files(folder):
        state.update(read_tensors(folder / file, most)[0])
    check_quantised(state, raw, folder)
    for name in [name for name in state if name.endswith("rotary_emb.inv_freq")]:
        del state[name]  # a buffer of old Llama files, which is computed
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        head = state.pop("lm_head.weight", None)  # some files hold the matrix twice, or only so
        if head is not None and not head.equal(state.setdefault(EMBEDDING, head)):
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
    size: int = 2**31  # of the model's vocabulary, once it is known
    turn: Turn | None = None

    def encode(self, text: str, special=True) -> list[int]:
        """Return the token ids of a text; half of a surrogate pair counts as a question mark.
        special: with the tokens that some tokenizers put before every text. UserError on a token
        that the model has no embedding of, such as a [PAD] added later."""
        known = text.encode("utf-8", "replace").decode()
        found = self.file.encode(known, add_special_tokens=special)
        last = max(found.ids, default=0)
        if last >= self.size:
            at = found.offsets[found.ids.index(last)][0]
            where = f"{found.tokens[found.ids.index(last)]!r} in the text {text[at : at + 60]!r}"
            raise UserError(f"the model has no embedding for {where}: leave it out")
        return found.ids

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

    def pieces(self, ids) -> list[str]:
        """Return the text of each token. SentencePiece's decoders drop the space that begins what
        they are given, so all tokens but the first are decoded behind another one."""
        before = self.file.encode("a", add_special_tokens=False).ids[-1:]
        skip = len(self.decode(before))
        text = {i: self.decode([*before, i])[skip:] for i in set(ids)}
        return [self.decode(ids[:1]), *(text[i] for i in ids[1:])][: len(ids)]


def load_tokenizer(path_or_id, revision=None) -> Tokenizer:
    """Load the tokenizer of a folder or Hub id; UserError if it or its end token is missing."""
    folder = checkpoint_folder(path_or_id, revision)
    eos_ids = read_eos_ids(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        way = "save_pretrained of transformers' AutoTokenizer makes one"
        raise UserError(f"{folder} has no tokenizer.json: {way}")
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
