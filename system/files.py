"""Files that are checked when they are read, and whole when they are written: JSON and safetensors.

Whatever cannot be used ends in a UserError.
"""

import json
import os
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open

from system.errors import UserError

MAX_JSON = 2**28  # bytes: ten times the largest tokenizer.json; more would fill the memory

LIMITS = {int: 2**20, float: 2**40}  # of the sizes and settings in other people's config files


def read_json(path) -> dict:
    """The object in a JSON file; UserError where there is none."""
    try:
        if Path(path).stat().st_size > MAX_JSON:
            raise ValueError("too large")
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None


def checked(raw: dict, where, **kinds) -> dict:
    """raw without its nulls; UserError unless what it has of these names is of these types, and
    numbers are within LIMITS (whole numbers are floats, too; booleans are no numbers)."""
    raw = {name: value for name, value in raw.items() if value is not None}
    for name in raw.keys() & kinds.keys():
        value, kind = raw[name], kinds[name]
        if type(value) not in ((int, float) if kind is float else (kind,)):
            found = type(value).__name__
            raise UserError(f"{where}: {name} should be of type {kind.__name__}, not {found}")
        if kind in LIMITS and not 0 <= value <= LIMITS[kind]:
            raise UserError(f"{where}: {name} = {value} is out of range")
    return raw


def read_tensors(path):
    """The tensors of a safetensors file by name, memory-mapped, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None


def check_tensors(found: dict, expected: dict, folder):
    """UserError unless these are the expected tensors, by name and shape, and finite floats."""
    for name in sorted(expected.keys() | found.keys()):
        have, want = (tuple(d[name].shape) if name in d else "no such" for d in (found, expected))
        if have != want or not found[name].is_floating_point():
            raise UserError(f"{folder}: {have} tensor {name}, but {want} float expected")
        if not all(x.isfinite() for x in found[name].aminmax()):  # makes no copy
            raise UserError(f"{folder}: tensor {name} holds NaN or infinity: get the file again")


def check_size(found: dict, numbers, folder):
    """UserError unless these tensors have as many numbers as a config file makes us expect: for
    layers of a size that is a lie there may be no memory."""
    if not 0 < numbers <= sum(tensor.numel() for tensor in found.values()):
        raise UserError(f"{folder}: lora_A or lora_B is missing, or smaller than the config says")


@contextmanager
def writing(path):
    """Inside, what keeps this file from being written is a UserError."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {path} ({why}): mend that, then --resume goes on") from None


def append(path, row):
    """Add a line of JSON; floats keep 6 significant digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path) -> list[dict]:
    """What `append` wrote there, each row with its step; a last line that a crash tore is none."""
    lines, rows = path.read_bytes().splitlines() if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(dict(row, step=int(row["step"])))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged: mend it") from None
    return rows


def sync(path):
    """Put what was written to a file or folder on the disk, before anything that comes later."""
    place = os.open(path, os.O_RDONLY)
    os.fsync(place)
    os.close(place)


def write_whole(path, data: bytes, keep=1):
    """Write a file such that whoever looks, after a crash too, finds the old or the new one, whole.
    The `keep` - 1 before it stay, as path.1 (the newest), path.2, ..."""
    ends = [".part", "", *(f".{n}" for n in range(1, keep))]
    part, *names = (path.with_name(path.name + end) for end in ends)
    with writing(path):
        part.write_bytes(data)
        sync(part)
        for older, newer in pairwise(reversed(names)):
            if newer.exists():
                os.replace(newer, older)
        os.replace(part, path)
        sync(path.parent)


def write_json(path, value: dict):
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
