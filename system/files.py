"""JSON and safetensors, checked when they are read and whole when they are written."""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from system.errors import UserError

MAX_JSON = 2**28  # bytes, ten times the largest tokenizer.json: more would fill the memory
LARGEST = {int: 2**20, float: 2**40}  # of the sizes and settings in other people's config files


def read_json(path) -> dict:
    """Return the object in a JSON file; UserError if there is none."""
    try:
        if Path(path).stat().st_size > MAX_JSON:
            raise ValueError("too large")
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None
    return found


def checked(raw: dict, where, **types) -> dict:
    """Return raw without its nulls; UserError if a value of these names is not of its type, or a
    number not from 0 to LARGEST (whole numbers are floats, too; booleans are no numbers)."""
    raw = {name: value for name, value in raw.items() if value is not None}
    for name, kind in types.items():
        value = raw.get(name, kind())
        if type(value) not in ((int, float) if kind is float else (kind,)):
            found = type(value).__name__
            raise UserError(f"{where}: {name} should be of type {kind.__name__}, not {found}")
        if kind in LARGEST and not 0 <= value <= LARGEST[kind]:
            raise UserError(f"{where}: {name} = {value} is out of range")
    return raw


def read_tensors(path):
    """Return the tensors of a safetensors file by name, and its metadata. They are read and not
    mapped, so that nothing that becomes of the file changes a weight or is a bus error."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None


def check_tensors(found: dict, expected: dict, folder):
    """Raise a UserError unless these are the expected tensors, by name and shape: finite floats."""
    for name in sorted(expected.keys() | found.keys()):
        have = tuple(found[name].shape) if name in found else "no such"
        want = tuple(expected[name].shape) if name in expected else "no such"
        if have != want or not found[name].is_floating_point():
            raise UserError(f"{folder}: {have} tensor {name}, but {want} float expected")
        smallest, largest = found[name].aminmax()  # makes no copy; NaN if there is one
        if not smallest.isfinite() or not largest.isfinite():
            raise UserError(f"{folder}: tensor {name} holds NaN or infinity: get the file again")


def read_rows(path) -> list[dict]:
    """Return what `append` wrote, each row with its step; a torn last line is ignored."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(dict(row, step=int(row["step"])))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged: mend it") from None
    return rows


@contextmanager
def writing(path):
    """Say of what keeps this file from being written, which it is."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot write {path} ({why}): mend that") from None


def append(path, row: dict):
    """Add a row to a JSONL file; floats keep 6 significant digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def sync(path):
    """Put what was written to a file or folder on the disk, before anything that comes later."""
    with suppress(PermissionError):  # Windows opens no folder, and syncs what it may write to
        file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        os.fsync(file)
        os.close(file)


def write_whole(path, data: bytes, keep=1):
    """Write a file so that whoever looks, after a crash too, finds the old or the new one, whole.
    The `keep` - 1 versions before it stay, as path.1 (the newest), path.2, ..."""
    part = path.with_name(f"{path.name}.part")
    versions = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, keep))]
    with writing(path):
        try:
            part.write_bytes(data)
            sync(part)
            for n in reversed(range(1, keep)):  # the oldest is overwritten first
                if versions[n - 1].exists():
                    os.replace(versions[n - 1], versions[n])
            os.replace(part, path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)  # a disk that is full needs the room


def write_json(path, value: dict):
    """Write a JSON file, whole or not at all."""
    write_whole(path, f"{json.dumps(value, indent=2)}\n".encode())
