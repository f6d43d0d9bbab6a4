"""The flags that all command lines share, each with its only default, and what they load."""

import os

import torch

from data.problems import TINY, prompt_text
from hf.checkpoint import (
    checkpoint_folder,
    config_from_dict,
    default_dtype,
    load_model,
    load_tokenizer,
    random_model,
)
from hf.peft import load_adapter
from system.errors import UserError
from system.files import read_json

FLAGS = dict(model=(str(TINY), "a checkpoint folder or a Hub id"))  # name: (default, help)
FLAGS |= dict(revision=("", "branch, tag or commit of the Hub id"))
FLAGS |= dict(adapter=("", "a PEFT adapter, such as runs/NAME/adapter"))
FLAGS |= dict(data=("tiny", "tiny, math, math500, gsm8k or a JSONL file"))
FLAGS |= dict(device=("auto", "auto, cpu, cuda, cuda:1, ..."))
FLAGS |= dict(dtype=("auto", "of the frozen weights: fp32, bf16, or auto (fp32 on CPU)"))
FLAGS |= dict(seed=(1, "of everything that is random"))


def add_flags(parser, flags):
    """FLAGS, which every command line has, and more of the kind."""
    parser.add_argument("--chat", action="store_true", help="prompt as a chat turn (ChatML)")
    for name, (default, text) in (FLAGS | flags).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=text)


def check_fit(tokenizer, model, name):
    """UserError if the tokenizer cannot encode, or has an id that the model has no embedding of."""
    try:
        made = tokenizer.encode(prompt_text("0 \U0010fffd"))  # of a sign that is in no vocabulary
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{name}: tokenizer.json cannot encode a text ({error})") from None
    last = max([*tokenizer.file.get_vocab().values(), *made, *tokenizer.eos_ids])
    if last >= (n := model.config.vocab_size):
        raise UserError(f"{name}: tokenizer or eos_token_id has an id {last}, the model {n} tokens")


def load_base(s):
    """The frozen model and tokenizer that these flags, or the Settings of train.py, ask for."""
    dtypes = dict(auto=None, fp32=torch.float32, bf16=torch.bfloat16)
    local = os.environ.get("LOCAL_RANK", "0")  # of a process that torchrun started
    best = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    device = best if s.device == "auto" else s.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {device} here: use --device cpu") from None
    if s.dtype not in dtypes:
        raise UserError(f"no dtype {s.dtype!r}: use one of {', '.join(dtypes)}")
    folder, dtype = checkpoint_folder(s.model, s.revision), dtypes[s.dtype]
    if getattr(s, "random_weights", False):  # config.json is enough; the text is the embedded one's
        dtype = dtype or default_dtype(device)
        config = config_from_dict(read_json(folder / "config.json"))
        tokenizer, model = load_tokenizer(TINY), random_model(config, device, dtype)
    else:
        tokenizer, model = load_tokenizer(folder), load_model(folder, device, dtype)
    check_fit(tokenizer, model, s.model)
    if s.chat and tokenizer.file.token_to_id("<|im_start|>") is None:
        raise UserError("--chat: this tokenizer has no <|im_start|>, so the model knows no ChatML")
    if getattr(s, "adapter", ""):
        load_adapter(model, s.adapter)
    return model, tokenizer
