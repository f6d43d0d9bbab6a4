"""What is read from disk and from the Hub, checked, and what is written: JSON and safetensors only.

Whatever the user gave that cannot be used ends in a UserError: one line, exit code 2.
"""

import json
import os
import re
import signal
import sys
import unicodedata
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"  # which file of a sharded checkpoint holds what
MAX_JSON = 2**28  # bytes: ten times the largest tokenizer.json; more would fill the memory
LIMITS = {int: 2**20, float: 2**40}  # of the sizes and settings in other people's config files
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of what is no sign of its own


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong and what to do."""


def printable(text, signs=None) -> str:
    """Text from a model or a file, fit for a terminal: what would steer it (escapes, carriage
    returns), reorder a line (bidi controls) or cannot be written (half of a surrogate pair) becomes
    U+FFFD. Line ends and tabs stay, or become what `signs` says."""
    signs = signs or {"\n": "\n", "\t": "\t"}
    bad = [c for c in set(text) if unicodedata.category(c) in STEERING]
    return text.translate(str.maketrans(dict.fromkeys(bad, "\ufffd") | signs))


def run_cli(main):
    """Run a command line. What the user or the machine got wrong is one line, and exit code 2; with
    Ctrl-C or SIGTERM it is 130 or 143."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows a ? for what it lacks
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    code = 2
    try:
        return main()
    except KeyboardInterrupt as stop:
        number, *said = stop.args
        line, code = ": ".join(["stopped", *said]), 128 + number
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())
        if not isinstance(error, (UserError, OSError)):
            if not out_of_memory(error):
                raise
            line = "out of memory: lower --micro-tokens, --samples, --prompts or --max-new-tokens"
        line = f"error: {line}"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # torchrun's comes while we end: the line is said
    print(printable(line[:1000]), file=sys.stderr, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # should the interpreter not find its end
    sys.exit(code)


def out_of_memory(error) -> bool:
    """Not so is an illegal memory access."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def hub_fault(error, repo, revision):
    """What an exception of huggingface_hub means, and what to do."""
    from huggingface_hub import constants, errors

    way = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "check the network"
    said = {  # the first that fits; the classes are nested
        errors.GatedRepoError: "is gated: accept its terms on its page, then set HF_TOKEN",
        errors.RepositoryNotFoundError: "is private or not on the Hub: check the name and HF_TOKEN",
        errors.RevisionNotFoundError: f"has no revision {revision}: check --revision",
        errors.LocalEntryNotFoundError: f"is not all in the cache, and the Hub out of reach: {way}",
        Exception: f"cannot be downloaded ({str(error)[:150]}): try again; whole files are kept",
    }
    return next(words for kind, words in said.items() if isinstance(error, kind))


def hub_folder(repo, revision=None, needed=(), optional=(), kind="model") -> Path:
    """The folder with these files (names or patterns) of a Hub repository, named by its commit.

    What is not cached is downloaded. UserError without network, repository, revision, permission,
    or a needed file, each in its own words.
    """
    from httpx import TransportError
    from huggingface_hub import constants, errors, snapshot_download  # slow, and only needed here

    what = dict(repo_type=kind, revision=revision or None, allow_patterns=[*needed, *optional])
    try:
        try:
            folder = Path(snapshot_download(repo, **what))
        except (TransportError, errors.OfflineModeIsEnabled):
            # Of a pinned commit the library asks the network first, though all may be cached.
            folder = Path(snapshot_download(repo, **what, local_files_only=True))
    except Exception as error:  # several libraries raise here
        raise UserError(f"{repo} {hub_fault(error, repo, revision)}") from None
    if absent := [name for name in needed if not any(folder.glob(name))]:
        where = " in the cache: go online" if constants.HF_HUB_OFFLINE else ": choose another"
        raise UserError(f"{repo} has no {absent[0]} at {folder.name}{where}")
    return folder


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
