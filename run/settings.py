"""The command line of train.py: its flags are the fields of its Settings."""

import argparse
import math
from dataclasses import fields
from importlib.util import find_spec

import torch

import credit
from grpo import group_advantages
from run.checkpoints import resumed_settings
from system.errors import UserError


def parse_settings(kind, presets, about):
    """(settings of this kind, whether to resume): defaults, then the preset, then the flags."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    text = "go on with this run, or with that in --out, or with the newest of its name"
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER", help=text)
    for f in fields(kind):
        options = dict(type=type(f.default), metavar=repr(f.default))
        options = dict(action="store_true") if isinstance(f.default, bool) else options
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args())
    resume, preset = given.pop("resume"), given.get("preset", "")
    if preset not in presets:
        raise UserError(f"no preset {preset!r}: the only one is 'paper'")
    given = presets[preset] | given
    s = kind(**given)
    if resume is not None:
        s = resumed_settings(s, given, resume)
    check(s)
    return s, resume is not None


def check(s):
    """UserError on a setting that makes no sense."""
    credit.needs(s.credit)  # a UserError if there is no such rule, and so on
    group_advantages(torch.zeros(1, 2), s.advantage)
    if s.aggregate not in ("seq", "token"):
        raise UserError(f"no aggregate {s.aggregate!r}: use seq or token")
    if s.arca_layer not in ("final", "prenorm", "sum"):
        raise UserError(f"no ARCA layer {s.arca_layer!r}: use final, prenorm or sum")
    if s.samples < 2:
        raise UserError("GRPO compares the samples of a problem: use --samples 2 or more")
    positive = "rank alpha lr steps prompts updates max_prompt_tokens max_new_tokens eval_problems"
    positive += " micro_tokens save_every keep temperature top_p sharpening grad_clip"
    for name in positive.split():
        if not 0 < getattr(s, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)} is not positive")
    if s.tensorboard and not find_spec("tensorboard"):
        raise UserError("--tensorboard needs what is not installed here: pip install tensorboard")
