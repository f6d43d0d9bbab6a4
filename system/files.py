"""JSON and safetensors, checked when they are read and whole when they are written."""

import gzip
import json
import math
import os
import stat
import zlib
from contextlib import contextmanager
from functools import partial

from safetensors import SafetensorError, safe_open

from system.errors import UserError

MAX_JSON = 2**26  # bytes of a JSON file (tokenizers have up to 2**25), or of a line of JSONL
MAX_LINES = 2**30  # bytes of a JSONL, CSV or parquet file, unpacked
LARGEST = {int: 2**20, float: 2**40}  # of the sizes and settings in other people's config files
NUMBERS = {  # that are read of the rows of a run's files; null is read as NaN
    "metrics.jsonl": ("reward", "gini", "effective_token_ratio", "groups_mixed", "skipped"),
    "evals.jsonl": ("greedy",), "samples.jsonl": ("reward", "advantage"),
}  # fmt: skip
SHOWN = (  # likewise, of metrics.jsonl; a row that lacks one has NaN
    "entropy", "truncated", "completion_tokens", "seconds_rollout", "seconds_update",
    "tokens_per_second",
)  # fmt: skip


def opened(path):
    """Open a regular file to read its bytes. UserError on anything else, which is not even opened:
    a pipe may keep us waiting for ever, and /dev/zero has no end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path} is a folder, pipe or device: save what it gives to a file first")
    return open(path, "rb")


@contextmanager
def unpacked(path):
    """Open a file as `opened` does, and unpack what gzip has packed as it is read. UserError if
    it cannot be read."""
    try:
        with opened(path) as file:
            is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=file) if is_gzip else file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): give another file") from None


def depth(value) -> int:
    """Return how deep lists and objects are nested in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def parse(data: bytes) -> dict:
    """Return the JSON object in UTF-8; ValueError or RecursionError if there is none that is fit to
    be written and printed: for these, too, Python ends at some 300 deep."""
    return fit(json.loads(data.decode("utf-8-sig")))


def fit(found) -> dict:
    """Return a JSON value that is an object, and not nested too deeply; ValueError if not."""
    if not isinstance(found, dict) or depth(found) > 100:
        raise ValueError("no object, or nested too deeply")
    return found


def read_json(path) -> dict:
    """Return the object in a JSON file; UserError if there is none."""
    try:
        with opened(path) as file:
            return parse(file.read(MAX_JSON))  # what is longer is cut off, and thus damaged
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): get it again") from None


def raw_lines(path):
    """Yield (bytes, "PATH, line N") for the lines of a text file, which gzip may have packed;
    UserError if one of them, or all, could fill the memory."""
    with unpacked(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_JSON), b""), 1):
            where = f"{path}, line {number}"
            if len(line) == MAX_JSON or file.tell() > MAX_LINES:
                raise UserError(f"{where} is too long: it could fill the memory, so shorten it")
            yield line, where


def read_lines(path, of_run=False, wanted=None):
    """Yield (object, "PATH, line N") for the lines of a JSONL file; UserError names one that holds
    no object. Blank lines are skipped, and those that are not wanted. A run's file has none that
    are blank, and if a crash has torn its last line, that is ignored."""
    try:
        for line, where in raw_lines(path):
            if (line.strip() or of_run) and (wanted is None or wanted(line)):
                yield parse(line), where
    except (ValueError, RecursionError):
        if not of_run or line.endswith(b"\n"):
            raise UserError(
                f"{where} is damaged: it is no JSON object in UTF-8, so mend it"
            ) from None


def is_number(x, least=-(2**40), most=2**40) -> bool:
    """Return whether a JSON value is a number of this size; booleans and NaN are none."""
    return type(x) in (int, float) and least <= x <= most


def read_rows(path) -> list[dict]:
    """Return the rows that `append` wrote to a run's file, [] if there is no file; UserError names
    a line whose step is no later one (samples: an earlier one), or that lacks its NUMBERS."""
    return [row for row, _ in each_row(path)]


def each_row(path, wanted=None):
    """Yield (row, "PATH, line N") for the rows of `read_rows`, one at a time: of all lines, or of
    those of which wanted(line) is true."""
    least = 0
    for row, where in read_lines(path, True, wanted) if path.exists() else ():
        wrong = [] if type(row.get("step")) is int and is_number(row["step"], least) else ["step"]
        shown = dict.fromkeys(SHOWN if path.name == "metrics.jsonl" else ())
        row = shown | row
        for name in (*NUMBERS[path.name], *shown):
            value = row.get(name, "")
            wrong += [] if value is None or is_number(value) else [name]
            row[name] = math.nan if value is None else value
        # A rate, such as pass@4, has the ends of its 95 % interval, pass@4_95.
        for name in [name for name in row if name.endswith("_95")]:
            ends = row[name] if type(row[name]) is list else []
            rates = [x for x in (row.get(name[:-3]), *ends) if is_number(x, 0, 1)]
            wrong += [] if len(rates) == len(ends) + 1 == 3 else [name]
        if wrong:
            raise UserError(f"{where} is damaged ({wrong[0]}): mend it, or start another run")
        least = row["step"] + (path.name != "samples.jsonl")
        yield row, where


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


def read_tensors(path, most=math.inf):
    """Return the tensors of a safetensors file of at most so many bytes by name, and its metadata.
    They are read and not mapped: what becomes of the file then changes no weight."""
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path} is damaged: {size} bytes are more than its tensors have")
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
        if have != want or not found[name].is_floating_point() or found[name].element_size() < 2:
            raise UserError(
                f"{folder}: {have} tensor {name}, but {want} float expected: another model's?"
            )
        smallest, largest = found[name].aminmax()  # makes no copy; NaN if there is one
        if not smallest.isfinite() or not largest.isfinite():
            raise UserError(f"{folder}: tensor {name} holds NaN or infinity: get the file again")


@contextmanager
def writing(path):
    """Say of what keeps this file from being written, which it is."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot write {path} ({why}): make room, or give another place") from None


def to_json(value, **layout) -> str:
    """Return valid JSON, with null in place of NaN and infinity."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, allow_nan=False, **layout)


def append(path, row: dict):
    """Add a row to a JSONL file; floats keep 6 significant digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(to_json(row) + "\n")


def sync(path):
    """Put what was written to a file or folder on the disk, before anything that comes later."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only such
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not is_folder:  # Windows opens none, and some file systems sync none
            raise


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
    write_whole(path, f"{to_json(value, indent=2)}\n".encode())
