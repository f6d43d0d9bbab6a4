"""Command lines: the flags that all share, what they load, and the settings of train.py."""

import argparse
import os
import re
from dataclasses import fields
from importlib.util import find_spec

import torch

from data.problems import prompt_text
from hf import checkpoint
from hf.chat import load_turn
from hf.peft import adapter_folder, load_adapter, read_config
from run.checkpoints import INPUTS, resumed_settings
from system.errors import Parser, UserError, check_numbers, flag_name
from system.files import read_json

try:
    import fast.linear as fast
except ModuleNotFoundError:
    fast = None  # one can delete fast/: it gives the same numbers in less time

DTYPES = dict(auto=None, fp32=torch.float32, bf16=torch.bfloat16)
FLAGS = {  # name: (default, help)
    "model": ("tiny", "tiny, slips, three, format, a checkpoint folder or a Hub id"),
    "revision": ("", "of the Hub id"),
    "adapter": ("", "a PEFT adapter: its folder, that of a run, or a Hub id"),
    "data": ("tiny", "tiny, slips, three, format, math, math500, gsm8k or a file (data/README.md)"),
    "system": ("", "with --chat: what the system's message says; default: the template's own"),
    "thinking": ("", "with --chat: what Qwen3's template calls enable_thinking"),
    "device": ("auto", "auto, cpu, cuda, cuda:1, ..."), "seed": (1, "of everything that is random"),
    "dtype": ("auto", "of the frozen weights: fp32, bf16, or auto (fp32 on CPU)"),
}  # fmt: skip
CHAT = "prompt as a user's turn, by the model's own chat template"
SAMPLE_FLAGS = {
    "samples": (1, "completions a problem"), "problems": (3, "how many of --data"),
    "max_new_tokens": (256, "longer completions are cut off"), "temperature": (0.0, "0: greedy"),
    "top_p": (1.0, "nucleus sampling"), "top_k": (0, "sample among the likeliest k; 0: all"),
}  # fmt: skip
EVAL_FLAGS = {
    "problems": (500, "the first so many"), "samples": (4, "for pass@k; 0: greedy only"),
    "max_new_tokens": (128, "longer completions are cut off"), "temperature": (1.0, "of pass@k"),
    "top_p": (1.0, "of pass@k"), "out": ("", "all answers; default: runs/answers-N.jsonl"),
    "grade": ("", "no model: grade this JSONL of completion and gold"),
}  # fmt: skip
# ARCA, section 5, and from its released configuration: sharpening 2, AdamW's default betas.
PAPER = dict(model="Qwen/Qwen3-1.7B-Base", data="math", eval_problems=200, steps=100, prompts=8)
PAPER.update(samples=4, max_new_tokens=512, top_p=0.95, rank=64, alpha=128.0, sharpening=2.0)
PAPER.update(lr=5e-6, warmup=10, beta2=0.999, seed=1337, micro_batch_tokens=8192)
PRESETS = {"": {}, "paper": PAPER}


# ---- The shared flags, and what they load --------------------------------------------------------
def add_flags(parser, flags):
    """Add to a parser the FLAGS that every command line has, and `flags` of the same form."""
    parser.add_argument("--chat", action="store_true", help=CHAT)
    for name, (default, text) in (FLAGS | flags).items():
        parser.add_argument(flag_name(name), type=type(default), default=default, help=text)


def check_choice(name, value, choices):
    """Raise UserError, with the list, unless a setting is one of its choices."""
    if value not in choices:
        named = ", ".join(filter(None, choices))  # all but "", which stands for no choice
        raise UserError(f"{flag_name(name)} {value}: use one of {named}")


def use_device(name):
    """Ready a device: cpu, cuda or cuda:N. UserError, with what is here, if torch has no such."""
    if name == "mps":
        raise UserError("--device mps: it has no float64, of which tokens are drawn: use cpu")
    known = re.fullmatch("cpu|cuda(:[0-9]+)?", name)  # torch knows more, which nobody has tested
    try:
        torch.empty(0, device=name if known else "none")
    except (RuntimeError, AssertionError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"no device {name!r} here: use --device {', '.join(there)}") from None
    if name.startswith("cuda"):
        # Without this a CUDA graph would record what another device does, which is nothing.
        torch.cuda.set_device(torch.device(name).index or 0)
        # Its gradient can be NaN with a mask (pytorch 196678), and each new shape costs 30 ms.
        torch.backends.cuda.enable_cudnn_sdp(False)


def check_fit(tokenizer, model, name):
    """Raise UserError if the tokenizer cannot encode, or has an id beyond the embeddings."""
    try:
        ids = tokenizer.encode(prompt_text("0 \U0010fffd"))  # of a sign that is in no vocabulary
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{name}: tokenizer.json cannot encode a text ({error})") from None
    # An added token may lie beyond the embeddings: `encode` refuses the text that has it.
    added = tokenizer.file.get_added_tokens_decoder().keys()
    last = max([*set(tokenizer.file.get_vocab().values()) - added, *ids, *tokenizer.eos_ids])
    size = model.config.vocab_size
    if last >= size:
        raise UserError(f"{name}: tokenizer or eos_token_id has id {last}, the model {size} tokens")
    tokenizer.size = size


def load_text(cfg, folder):
    """Return the tokenizer of a checkpoint, which with --chat writes prompts as a user's turn."""
    tokenizer = checkpoint.load_tokenizer(folder)
    check_choice("thinking", cfg.thinking, ("", "on", "off"))
    if cfg.chat:
        tokenizer.turn, ends = load_turn(folder, tokenizer, cfg.system, cfg.thinking)
        tokenizer.eos_ids = [*dict.fromkeys(tokenizer.eos_ids + ends)]
    elif cfg.system or cfg.thinking:
        raise UserError("--system and --thinking are about chat models: add --chat")
    return tokenizer


def load_base(cfg):
    """Return the frozen model and its tokenizer, as FLAGS or the Settings of train.py ask."""
    device = cfg.device
    if device == "auto":  # torchrun sets LOCAL_RANK
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    use_device(device)
    check_choice("dtype", cfg.dtype, DTYPES)
    dtype = DTYPES[cfg.dtype] or checkpoint.default_dtype(device)
    folder = checkpoint.checkpoint_folder(cfg.model, cfg.revision)
    if getattr(cfg, "random_init", False):  # config.json is enough; the text is the embedded one's
        config = checkpoint.config_from_dict(read_json(folder / "config.json"))
        tokenizer = load_text(cfg, checkpoint.NAMED["tiny"])
        model = checkpoint.random_model(config, device, dtype)
    else:
        tokenizer = load_text(cfg, folder)
        model = checkpoint.load_model(folder, device, dtype)
    check_fit(tokenizer, model, cfg.model)
    model.folder = folder
    if fast:
        fast.hasten(model)
    if getattr(cfg, "adapter", ""):
        load_adapter(model, cfg.adapter)
    return model, tokenizer


# ---- The settings of train.py --------------------------------------------------------------------
def parse_settings(Settings, presets, about):
    """Return the settings and whether to resume: defaults, then the preset, then the flags."""
    parser = Parser(description=about.splitlines()[0])
    text = "continue this run, or the one in --out, or the newest of its name"
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER", help=text)
    for field in fields(Settings):
        options = dict(type=type(field.default), metavar=repr(field.default))
        if isinstance(field.default, bool):
            options = dict(action="store_true")
        named = ", ".join(filter(None, field.metadata["choices"] or ()))
        text = field.metadata["help"] + f": {named}" * bool(named)
        parser.add_argument(flag_name(field.name), default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args())
    resume = given.pop("resume")
    preset = presets.get(given.get("preset"), {})
    if given.get("adapter"):  # which has a rank and an alpha
        preset = {name: value for name, value in preset.items() if name not in ("rank", "alpha")}
        preset |= adapter_shape(given) if resume is None else {}
    cfg = Settings(**preset | given)
    if resume is not None:
        preset = {name: value for name, value in preset.items() if name not in INPUTS}
        cfg = resumed_settings(cfg, preset | given, resume)
    check(cfg)
    return cfg, resume is not None


def adapter_shape(given) -> dict:
    """Return rank and alpha of the adapter to start from; UserError if flags ask for others."""
    config = read_config(adapter_folder(given["adapter"]))
    shape = dict(rank=config["r"], alpha=config["lora_alpha"])
    for name, value in shape.items():
        if given.get(name, value) != value:
            raise UserError(f"{flag_name(name)} {given[name]}: the adapter has {value}, so omit it")
    return shape


def check(cfg):
    """Raise UserError on a setting that makes no sense."""
    for field in fields(cfg):
        if field.metadata.get("choices"):
            check_choice(field.name, getattr(cfg, field.name), field.metadata["choices"])
    check_numbers(vars(cfg))
    if cfg.samples < 2:
        raise UserError("GRPO compares the samples of a problem: use --samples 2 or more")
    if cfg.tensorboard and not find_spec("tensorboard"):
        raise UserError("--tensorboard needs what is not installed here: pip install tensorboard")
