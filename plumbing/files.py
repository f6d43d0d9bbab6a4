"""What is read from disk and from the Hub, checked, and what is written: JSON and safetensors only.

Whatever the user gave that cannot be used ends in a UserError: one line, exit code 2.
"""

import json
import os
import signal
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong and what to do."""


def run_cli(main):
    """Run a command line. What the user or the machine got wrong is one line, and exit code 2; with
    Ctrl-C or SIGTERM it is 130 or 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    code = 2
    try:
        return main()
    except KeyboardInterrupt as stop:
        number, *said = stop.args
        line, code = ": ".join(["stopped", *said]), 128 + number
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = "error: " + " ".join(str(error).split())
        if not isinstance(error, (UserError, OSError)):
            if isinstance(error, RuntimeError) and "memory" not in line:
                raise
            line = "out of memory: lower --micro-tokens, --samples, --prompts or --max-new-tokens"
            line = f"error: {line}"
    print(line, file=sys.stderr)
    sys.exit(code)


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def hub_folder(repo, revision=None, **what) -> Path:
    """Download those files of a Hub repository, unless they are cached; returns their folder."""
    try:
        from huggingface_hub import snapshot_download  # slow to import, and only needed here

        return Path(snapshot_download(repo, revision=revision or None, **what))
    except Exception as error:  # several libraries raise here
        raise UserError(f"no {repo} from the Hub, nor from its cache: {str(error)[:150]}") from None


def read_json(path) -> dict:
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None


def read_tensors(path):
    """The tensors of a safetensors file by name, memory-mapped, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None


def check_tensors(found: dict, expected: dict, folder):
    """UserError unless these are the expected tensors, by name and shape, and floats."""
    for name in sorted(expected.keys() | found.keys()):
        have, want = (tuple(d[name].shape) if name in d else "no such" for d in (found, expected))
        if have != want or not found[name].is_floating_point():
            raise UserError(f"{folder}: {have} tensor {name}, but {want} float expected")


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
