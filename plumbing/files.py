"""What is read from disk and from the Hub, checked, and what is written: JSON and safetensors only.

Whatever the user gave that cannot be used ends in a UserError: one line, exit code 2.
"""

import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong and what to do."""


def run_cli(main):
    """Run a command line. What the user or the machine got wrong is one line, and exit code 2."""
    try:
        return main()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())
        if not isinstance(error, (UserError, OSError)):
            if isinstance(error, RuntimeError) and "memory" not in line:
                raise
            line = "out of memory: lower --micro-tokens, --samples, --prompts or --max-new-tokens"
    print("error:", line, file=sys.stderr)
    sys.exit(2)


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


def append(path, row):
    """Add a line of JSON; floats keep 6 significant digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
