"""Hostile files: whatever they hold, a loader returns or raises UserError, soon, in little memory.

Each test damages one file of a checkpoint, an adapter, a data set or a run that is otherwise whole.
The examples are the same in every run, and `pytest -m long` tries many more of them. For a night:

    FUZZ_EXAMPLES=500 FUZZ_SEED=1 pytest -n 0 -s -m long tests/test_fuzz.py

tries 500 of each kind, which depend on the seed alone, and says how many files were refused.
"""

import ast
import contextlib
import copy
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import time
import zipfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import eval_math
import sample
import train
from data.problems import TINY, add_prompts, load_problems
from eval_math import graded
from hf.checkpoint import INDEX, load_model, load_tokenizer
from hf.peft import load_adapter, save_adapter
from lora import add_lora, lora_parameters
from run import checkpoints
from run import folder as run_folder
from run.answers import print_groups, read_completions
from run.compare import compare
from run.flags import check, check_fit
from system import files
from system.errors import UserError, printable
from view import __main__ as view
from view.samples import read_samples

ROOM = 2**30  # bytes that a loader may allocate beyond what is there; the files have 200 kB
SECONDS = 5  # of processor time for a file
MANY = int(os.environ.get("FUZZ_EXAMPLES", 100))
SEED = int(os.environ.get("FUZZ_SEED", 0))
FEW_OR_MANY = pytest.mark.parametrize("examples", [15, pytest.param(MANY, marks=pytest.mark.long)])
TALLY = Counter()  # what became of the files

ODD = [0, 1, -1, 2, 3, 2**20, 10**9, 2**63, 10**400, 0.5, 1e-300, 1e300, float("nan"), float("inf")]
ODD += [
    True,
    False,
    None,
    "4",
    "",
    "\ud800",
    "\x1b[2J\r\u202e\0",
    "../x",
    "/etc/passwd",
    "x" * 10**5,
]
ODD += [[], {}, [[]], {"a": None}, [1, 2], [None], "qwen2", "llama", "NaN", 151936]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.fixture(scope="module", autouse=True)
def tally():
    """Say at the end how often something was read, and how often refused (pytest -s shows it)."""
    yield
    print(f"\nread: {TALLY['loaded']} times, refused: {TALLY['refused']} times")


@pytest.fixture
def little_memory():
    """More than ROOM cannot be allocated, so a blow-up is a MemoryError, which no test allows."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs Linux")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A checkpoint, an adapter for it, and the bytes of each file."""
    path = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    save_adapter(add_lora(load_model(path), 2, 4), path)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def whole(checkpoint, little_memory):
    """The same, for a test in which memory is bounded."""
    return checkpoint


@contextlib.contextmanager
def damaged(whole, name, data):
    """The folder with other bytes in one file."""
    folder, files = whole
    (folder / name).unlink(missing_ok=True)  # a new file: tensors that are mapped keep the old one
    (folder / name).write_bytes(data)
    try:
        yield folder
    finally:
        (folder / name).unlink()
        if name in files:
            (folder / name).write_bytes(files[name])


def fuzz(examples, *strategies):
    """Have hypothesis call a test with so many examples of these strategies."""
    how = settings(
        max_examples=examples,
        derandomize=not SEED,
        deadline=None,  # it would count the time that other processes take
        database=None,
        phases=[Phase.generate],  # to shrink a failure takes minutes
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(how(given(*strategies)(test)))


def outcome(load, *args):
    """What it returns, or None if it raises a UserError; anything else fails the test."""
    started = time.process_time()
    try:
        found = load(*args)
        TALLY["loaded"] += 1
        return found
    except UserError as error:
        TALLY["refused"] += 1
        assert str(error)
    finally:
        assert time.process_time() - started < SECONDS


@st.composite
def changed_object(draw, raw):
    """Bytes that were the JSON of `raw` before some keys, or some bytes, were changed."""
    raw = json.loads(json.dumps(raw))
    for _ in range(draw(st.integers(1, 3))):
        at, keys = raw, []
        while isinstance(at, (dict, list)) and at:  # down to some place
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            keys.append((at, key))
            at = at[key]
        at, key = draw(st.sampled_from(keys))
        kind = draw(st.sampled_from(["set", "set", "set", "drop", "new"]))
        if kind == "drop" and isinstance(at, dict):
            del at[key]
        elif kind == "new" and isinstance(at, dict):
            at[draw(st.text(max_size=8))] = copy.deepcopy(draw(VALUES))
        else:
            at[key] = copy.deepcopy(draw(VALUES))
        if not raw:
            break
    data = json.dumps(raw).encode()
    return draw(st.just(data) | st.just(data) | st.just(data) | changed_bytes(data))


@st.composite
def changed_bytes(draw, data):
    place = draw(st.integers(0, len(data)))
    piece = st.sampled_from(
        [b"\xff", b"\0", b"[", b"{", b'"', b"NaN", b"-Infinity", b"\xef\xbb\xbf"]
    )
    piece |= st.sampled_from(
        [DEEP, b"[" * 100_000, b"9" * 5000, b"1e999", b"\r\n", b"\xed\xa0\x80"]
    )
    piece |= st.binary(max_size=8)
    kind = draw(st.sampled_from(["cut", "insert", "overwrite", "begin", "only"]))
    if kind == "cut":
        return data[:place]
    new = draw(piece)
    if kind == "only":
        return new
    place = 0 if kind == "begin" else place
    return data[:place] + new + data[place + (len(new) if kind == "overwrite" else 0) :]


def use(folder):
    """Load all that a command loads, and run it once."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    check_fit(tokenizer, model, folder)
    ids = tokenizer.encode("What is $3+4$? \ud800\0")
    assert all(0 <= i < model.config.vocab_size for i in [*ids, *tokenizer.eos_ids])
    if ids:
        assert isinstance(tokenizer.decode(ids), str)
        assert model.logits(model(torch.tensor([ids]))).shape[-1] == model.config.vocab_size
    return model


@FEW_OR_MANY
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_json_of_a_checkpoint(whole, name, examples):
    """A config.json that lies about shapes, of wrong types or nested too deeply; a tokenizer that
    does not fit the model, or that its library cannot run."""

    @fuzz(examples, changed_object(json.loads(whole[1][name])))
    def test(data):
        with damaged(whole, name, data) as folder:
            outcome(use, folder)

    assert use(whole[0])
    test()


def only_index(folder):
    """Take away what an index is not read beside: the whole file, and an adapter's name."""
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_config.json", INDEX])
def test_json_nested_too_deeply(whole, name, tmp_path):
    """A RecursionError is no ValueError: it went past the handler."""
    folder = shutil.copytree(whole[0], tmp_path / "model")
    (folder / name).write_bytes(DEEP)
    if name == INDEX:
        only_index(folder)
    with pytest.raises(UserError, match=re.escape(name)):
        use(folder)
        load_adapter(load_model(folder), folder)


@st.composite
def changed_tensors(draw, data):
    """A safetensors file whose header says something else, or whose bytes are damaged."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw(st.booleans()):
        return draw(changed_bytes(data))
    for name in draw(
        st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=2, unique=True)
    ):
        about = header[name]
        new = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "all"]))
        kinds = ["F16", "BF16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "what"]
        if new == "dtype":
            about[new] = draw(st.sampled_from(kinds) | VALUES)
        elif new in ("shape", "data_offsets"):
            numbers = st.sampled_from([0, 1, 2, 40, 56, 100, 10**6, 2**40, 2**63, 2**64 - 1, -1])
            about[new] = draw(st.lists(numbers, max_size=4) | VALUES)
        elif new == "name":
            header[draw(st.text(max_size=9) | st.sampled_from(ODD[14:19]).map(str))] = header.pop(
                name
            )
        else:
            header[name] = draw(VALUES)
    text = json.dumps(header).encode()
    length = draw(
        st.just(len(text)) | st.sampled_from([0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1])
    )
    return struct.pack("<Q", length) + text + body


@FEW_OR_MANY
def test_weights(whole, examples):
    """A header with lengths, offsets or types that are lies; a bit that flipped."""

    @fuzz(examples, changed_tensors(whole[1]["model.safetensors"]))
    def test(data):
        with damaged(whole, "model.safetensors", data) as folder:
            model = outcome(use, folder)
            assert model is None or all(p.isfinite().all() for p in model.parameters())

    test()


@FEW_OR_MANY
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(whole, name, examples):
    """An adapter is what people download and share: a rank of a billion must allocate nothing."""
    data = whole[1][name]
    base = load_model(whole[0])
    changed = changed_object(json.loads(data)) if name.endswith("json") else changed_tensors(data)

    @fuzz(examples, changed)
    def test(data):
        with damaged(whole, name, data) as folder:
            outcome(lambda: load_adapter(copy.deepcopy(base), folder))

    assert load_adapter(copy.deepcopy(base), whole[0])
    test()


@FEW_OR_MANY
def test_index(whole, examples):
    """The index of a sharded checkpoint names files: of any type, or anywhere."""
    raw = dict(metadata=dict(total_size=1), weight_map={"model.norm.weight": "model.safetensors"})

    @fuzz(examples, changed_object(raw))
    def test(data):
        with damaged(whole, INDEX, data) as folder:
            outcome(use, folder)

    test()


ROWS = [dict(problem="1+1?", answer="2", level=1), dict(question="2?", answer="a #### 2")]
ROWS += [dict(problem="b", solution=r"\boxed{3}", gold="3", completion=r"\boxed{3}", verdict=True)]


@FEW_OR_MANY
def test_problem_files(whole, tmp_path, capsys, examples):
    """Broken lines, wrong types, half of a surrogate pair, escapes: in the reader, the tokenizer,
    the verifier, and on the screen."""
    tokenizer, path = load_tokenizer(whole[0]), tmp_path / "rows.jsonl"

    def read():
        for p in load_problems(str(path)):
            assert isinstance(p["problem"], str) and isinstance(p["answer"], str)
            shown = printable(p["problem"] + p["answer"])
            assert not set(shown) & {"\x1b", "\r", "\0", "\u202e"} and shown.encode()
            assert len(add_prompts(p, tokenizer)["prompt"]) > 10

    def grade():
        print_groups(graded(read_completions(str(path))))
        compare(str(path), str(path))

    lines = st.lists(st.sampled_from(ROWS).flatmap(changed_object), min_size=1, max_size=3)

    @fuzz(examples, lines, st.booleans())
    def test(lines, dos):
        path.write_bytes((b"\r\n" if dos else b"\n").join(lines))
        outcome(read)
        outcome(grade)

    test()
    assert "\x1b" not in capsys.readouterr().out


# ---- The folder of a run -------------------------------------------------------------------------
ROW_FILES = ["metrics.jsonl", "evals.jsonl", "samples.jsonl"]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of three steps and its bytes. With a KL penalty every completion is trained on."""
    path = tmp_path_factory.mktemp("fuzz") / "run"
    data = path.with_name("few.jsonl")
    data.write_text("".join((TINY / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    flags = "--steps 3 --prompts 2 --samples 2 --max-new-tokens 8 --eval-problems 2 --rank 2"
    flags += " --eval-samples 2 --eval-every 1 --save-every 1 --kl-coef 0.1 --compare-rules"
    with pytest.MonkeyPatch.context() as patch:
        words = [*flags.split(), "--model", folder, "--out", path, "--data", data]
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        train.main()
    (path / "trainer.safetensors.1").unlink()  # there is nothing to fall back on
    return path, contents(path), load_model(folder)


def contents(path):
    """The bytes of all files below a folder."""
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def resume(folder, cfg, base):
    """Go on with a run from its newest checkpoint; return the optimizer and the step."""
    model = copy.deepcopy(base)
    tensors, step = checkpoints.adapt(model, cfg, True)
    optimizer = torch.optim.AdamW(lora_parameters(model).values())
    checkpoints.resume_or_start(folder, model, optimizer, cfg, tensors, step)
    return optimizer, step


def go_on(folder, original, base):
    """Do all that `train.py --resume` does but train: read, and print what is printed at the end.
    With other settings than the run had, only read them."""
    cfg = checkpoints.resumed_settings(train.Settings(), {}, str(folder))
    check(cfg)
    if asdict(cfg) != original | dict(out=str(folder)):
        return cfg
    optimizer, step = resume(folder, cfg, base)
    for state in optimizer.state_dict()["state"].values():
        assert all(x.isfinite().all() for x in state.values()) and state["step"] <= step
    evals = files.read_rows(folder / "evals.jsonl")
    history = files.read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in history] == list(range(1, step + 1))
    rates = {"greedy": 0.5, "greedy_95": [0.1, 0.9]}  # of the last evaluation, which is always made
    if history:
        run_folder.summary(folder, history, [*evals, rates], cfg)
    return cfg


def look(folder, monkeypatch):
    """Do all that `python -m view` does but the picture; the page is valid JSON."""
    out = folder.with_name("shown")
    monkeypatch.setattr(sys, "argv", ["view", str(folder), "--out", str(out)])
    monkeypatch.setattr(view.picture, "find_spec", lambda name: None)
    view.main()
    text = (out / "view.html").read_text(encoding="utf-8")
    data = text.split('id="data">', 1)[1].split("</script>", 1)[0]
    return json.loads(data, parse_constant=pytest.fail)


def try_run(run, name, data, monkeypatch):
    """Go on with a run, and look at it, with other bytes in one file. What is refused stays as it
    is, and what follows finds the run whole again."""
    path, whole, base = run
    monkeypatch.setattr(files, "sync", lambda path: None)
    original = json.loads(whole[path / "config.json"])["settings"]
    (path / name).write_bytes(data)
    before = contents(path)
    went_on = outcome(go_on, path, original, base)
    assert went_on or contents(path) == before
    looked = outcome(look, path, monkeypatch)
    for file, content in whole.items():
        file.write_bytes(content)
    return went_on and looked


@st.composite
def changed_lines(draw, data):
    """JSONL of which a line is changed, doubled, dropped or in another place, or some bytes are."""
    lines = data.splitlines()
    i = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(["object"] * 5 + ["double", "drop", "move", "bytes"]))
    if kind == "bytes":
        return draw(changed_bytes(data))
    line = lines[i] if kind == "double" else lines.pop(i)
    if kind == "object":
        line = draw(changed_object(json.loads(line)))
    if kind != "drop":
        lines.insert(draw(st.integers(0, len(lines))) if kind == "move" else i, line)
    return b"\n".join(lines) + b"\n" * draw(st.booleans())


@FEW_OR_MANY
@pytest.mark.parametrize("name", [*ROW_FILES, "config.json"])
def test_files_of_a_run(run, monkeypatch, capsys, little_memory, name, examples):
    """A step or a rate of another type, sign or size, rows that lack what the end of a run prints,
    hours later; rules that differ from line to line; escapes in any text of a shared run."""
    data = run[1][run[0] / name]
    changed = changed_lines(data) if name in ROW_FILES else changed_object(json.loads(data))

    @fuzz(examples, changed)
    def test(data):
        try_run(run, name, data, monkeypatch)

    assert try_run(run, name, data, monkeypatch)  # nothing is changed
    test()
    shown = capsys.readouterr().out
    colours = r"\x1b\[(48;5;\d+;38;5;\d+|0)m"  # the view's own
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", re.sub(colours, "", shown))


ADAPTER = "adapter.model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS = {  # by what is wrong: tensors that replace or join those of a checkpoint; None: one less
    "a moment is missing": {"0.exp_avg": None},
    "moments of some parameters": {f"0.{key}": None for key in ("step", "exp_avg", "exp_avg_sq")},
    "no adapter": {ADAPTER: None},
    "a name without a dot": {"x": torch.zeros(1)},
    "another adapter's": {"adapter.x": torch.zeros(1)},
    "no parameter": {"99.exp_avg": torch.zeros(1)},
    "a negative parameter": {"-1.exp_avg": torch.zeros(1)},
    "no state of AdamW": {"0.max_exp_avg_sq": torch.zeros(1)},
    "of another shape": {"0.exp_avg": torch.zeros(2, 41)},
    "of another size": {"0.exp_avg": torch.zeros(1)},
    "an adapter of another shape": {ADAPTER: torch.zeros(3, 40)},
    "NaN": {"0.exp_avg": torch.full((2, 40), torch.nan)},
    "infinity": {"0.exp_avg_sq": torch.full((2, 40), torch.inf)},
    "NaN in the adapter": {ADAPTER: torch.full((2, 40), torch.nan)},
    "negative squares": {"0.exp_avg_sq": torch.full((2, 40), -1e-9)},
    "float64": {"0.exp_avg": torch.zeros(2, 40, dtype=torch.float64)},
    "float16": {ADAPTER: torch.zeros(2, 40, dtype=torch.float16)},
    "float8": {"0.exp_avg": torch.zeros(2, 40, dtype=torch.float8_e4m3fn)},
    "whole numbers": {"0.exp_avg": torch.zeros(2, 40, dtype=torch.int64)},
    "booleans": {"0.exp_avg_sq": torch.zeros(2, 40, dtype=torch.bool)},
    "a step that is no scalar": {"0.step": torch.ones(1)},
    "steps that disagree": {"0.step": torch.tensor(2.0)},
    "a negative step": {"step": torch.tensor(-1.0)},
    "half a step": {"step": torch.tensor(1.5)},
    "a step beyond the run": {"step": torch.tensor(4.0)},
    "a step of NaN": {"step": torch.tensor(torch.nan)},
    "a step of 0": {"step": torch.tensor(0.0)},
}
STEPS = ["-1", "x", "", "1e1", "2.0", " 3", "3\n", "4", "0", "9" * 5000, "\u0663", "\x1b[2J", "1_0"]


def crafted(whole, changes=(), step="3"):
    """A checkpoint with a right checksum, other tensors and another step."""
    tensors = safetensors.torch.load(whole)
    for name, tensor in dict(changes).items():
        for key in [k for k in tensors if k == name or (name == "step" and k.endswith(".step"))]:
            del tensors[key]
            tensors |= {} if tensor is None else {key: tensor.clone()}
        if tensor is not None and name != "step":
            tensors[name] = tensor.clone()
    about = dict(step=step, sha256=checkpoints.digest(tensors, step))
    return safetensors.torch.save(tensors, about)


@pytest.mark.parametrize("wrong", [*TENSORS, *STEPS])
def test_a_crafted_checkpoint(run, monkeypatch, wrong):
    """A checksum proves nothing in a file that somebody made: a KeyError, moments that are NaN or
    of another shape after the first step, or the steps of a run that went on for ever."""
    path, whole, base = run
    monkeypatch.setattr(files, "sync", lambda path: None)
    data = whole[path / "trainer.safetensors"]
    how = dict(changes=TENSORS[wrong]) if wrong in TENSORS else dict(step=wrong)
    cfg = train.Settings(**json.loads(whole[path / "config.json"])["settings"])
    (path / "trainer.safetensors").write_bytes(crafted(data, **how))
    before = contents(path)
    try:
        with pytest.raises(UserError, match=r"checkpoint|tensor|trainer|adapts") as error:
            resume(path, cfg, base)
        assert len(str(error.value)) < 300 and contents(path) == before
    finally:
        (path / "trainer.safetensors").write_bytes(data)


@st.composite
def changed_checkpoint(draw, data):
    """Several things wrong at once, a right checksum or not."""
    if draw(st.booleans()):
        return draw(changed_tensors(data))
    changes = {}
    for wrong in draw(st.lists(st.sampled_from(sorted(TENSORS)), max_size=2)):
        changes |= TENSORS[wrong]
    name = draw(st.sampled_from(sorted(safetensors.torch.load(data))) | st.text(max_size=9))
    shape = draw(st.lists(st.sampled_from([1, 2, 40, 56]), max_size=2))
    if draw(st.booleans()):
        changes[name] = torch.full(shape, draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, torch.nan])))
    return crafted(data, changes, draw(st.just("3") | st.just("3") | st.sampled_from(STEPS)))


@FEW_OR_MANY
def test_checkpoints_of_a_run(run, monkeypatch, little_memory, capsys, examples):
    """Damaged, or made: no other exception, and no state that is not finite."""
    data = run[1][run[0] / "trainer.safetensors"]

    @fuzz(examples, changed_checkpoint(data))
    def test(data):
        try_run(run, "trainer.safetensors", data, monkeypatch)

    test()


@pytest.mark.parametrize("name", ["config.json", *ROW_FILES])
def test_a_run_nested_to_any_depth(run, monkeypatch, name):
    """Python gives up at a depth that depends on who calls: what can be read, but neither written
    nor printed, is a RecursionError in the middle of a run."""
    text = run[1][run[0] / name].decode()
    for depth in [*range(90, 990, 90), *range(980, 1000, 3)]:
        deep = "[" * depth + "]" * depth
        try_run(run, name, text.replace("{", f'{{"deep": {deep}, ', 1).encode(), monkeypatch)


# ---- What is no regular file, and what has no end ------------------------------------------------
def strange(kind, path):
    """Put something at a path that is no file of a checkpoint, a run or problems."""
    if path.is_file():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif kind == "zeros":
        path.touch()
        os.truncate(path, ROOM // 2)  # takes no room on the disk
    else:
        path.symlink_to(kind)


@pytest.fixture
def in_time():
    """A test that waits for a pipe ends after a while, and fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)


KINDS = [
    "pipe",
    "folder",
    "socket",
    "zeros",
    "/dev/zero",
    "/dev/tty",
    "/proc/self/mem",
    "/proc/self/maps",
]
NAMES = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors", INDEX]
NAMES += ["adapter_config.json", "adapter_model.safetensors", "few.jsonl"]
NAMES += [f"run/{name}" for name in ("config.json", "trainer.safetensors", *ROW_FILES)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regular_file(whole, run, in_time, monkeypatch, tmp_path, name):
    """A pipe waits for ever and /dev/zero fills the memory; /proc says that its files are empty,
    and a file of zeros takes no room until it is read."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    for i, kind in enumerate(KINDS):
        place = Path(str(i))
        shutil.copytree(run[0] if "/" in name else whole[0], place)
        path = place / Path(name).name
        if name == INDEX:
            only_index(place)
        strange(kind, path)
        with pytest.raises(UserError) as error:
            if "/" in name:
                go_on(place, json.loads(run[1][run[0] / "config.json"])["settings"], run[2])
                read_samples(place)
            elif name == "few.jsonl":
                outcome(read_completions, str(path))
                load_problems(str(path))
            else:
                load_adapter(use(place), place)
        assert path.name in str(error.value)
        shutil.rmtree(place)


# ---- What is never parsed, and never printed -----------------------------------------------------


class Trap:
    def __reduce__(self):
        return (open, ("/nonexistent/trap", "w"))  # what unpickling would do


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip", "empty", "folder"])
def test_a_pickle_under_another_name(scratch, kind):
    """Code that runs because a file was opened: whatever a name says, only safetensors are read."""
    path = scratch / "model.safetensors"
    path.unlink()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif kind == "torch":
        torch.save({"model.norm.weight": torch.ones(40)}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps(Trap()))
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
    says = r"model\.safetensors is (missing or damaged|a folder)"
    with pytest.raises(UserError, match=says):
        load_model(scratch)


UNSAFE = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "pandas",
}
CALLS = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "parse_latex"}
METHODS = {
    "torch.load",
    "torch.save",
    "np.load",
    "numpy.load",
    "os.system",
    "os.popen",
    "torch.hub",
}
SOURCES = [p for p in ROOT.rglob("*.py") if not {"tests", ".git", ".venv"} & set(p.parts)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_a_file_says(path):
    """A loader that unpickles, or evaluates text, in any file of the repository but the tests."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    imported = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    imported += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    assert not UNSAFE & {name.split(".")[0] for name in imported}
    assert not CALLS & {n.id for n in nodes if isinstance(n, ast.Name)}
    assert not METHODS & {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    words = {word.arg for n in nodes if isinstance(n, ast.Call) for word in n.keywords}
    assert not words & {"allow_pickle", "trust_remote_code", "shell"}


def test_the_sources_were_found():
    """The test above would pass on an empty list."""
    assert len(SOURCES) > 20 and ROOT / "model.py" in SOURCES


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", 5])
def test_an_index_stays_in_its_folder(scratch, name):
    """A file of another folder would be read because an index names it; even if it is a model."""
    weights = (scratch / "model.safetensors").rename(scratch / "part.safetensors")
    shutil.copy(weights, scratch.parent / "x.safetensors")
    (scratch / INDEX).write_text(json.dumps(dict(weight_map={"model.norm.weight": name})))
    with pytest.raises(UserError, match="no safetensors file of it"):
        load_model(scratch)
    plain = dict(weight_map={"model.norm.weight": "part.safetensors"})
    (scratch / INDEX).write_text(json.dumps(plain))
    weights.rename(scratch.parent / "blob")
    weights.symlink_to("../blob")  # as in the Hub's cache
    load_model(scratch)


def test_printable():
    """A completion could clear the screen, retitle the window, rewrite the line above it, or show
    another order of signs than it has."""
    bad = [
        "\x1b[2J",
        "\x1b]0;title\a",
        "\r",
        "\b",
        "\0",
        "\x7f",
        "\x9b2J",
        "\u202e",
        "\u2066",
        "\u200f",
    ]
    for text in [*bad, "\u2028", "\ud800", "\ufeff"]:
        shown = printable(f"a{text}b")
        assert shown[0] == "a" and shown[-1] == "b" and shown[1] == "\ufffd"
        assert len(shown) == len(text) + 2 and shown.encode()
        assert not set(shown) & set(bad)
    for text in ["x\n\ty", "数学 🙂 ½ é \u00a0∫", "\\frac{1}{2}"]:
        assert printable(text) == text
    assert printable("a\nb\x1b", {"\n": "↵"}) == "a↵b\ufffd"


def test_a_hostile_tokenizer_on_the_screen(scratch, monkeypatch, capfdbinary):
    """The commands print what a model writes: here every token is an escape sequence."""
    raw = json.loads((scratch / "tokenizer.json").read_text())
    raw["added_tokens"] = [
        dict(id=i, content=f"\x1b[{i}m\r", special=False, single_word=False, lstrip=False)
        | dict(rstrip=False, normalized=False)
        for i in range(300)
    ]
    raw["model"] = dict(type="WordLevel", vocab={"a": 300}, unk_token="a")
    (scratch / "tokenizer.json").write_text(json.dumps(raw))
    rows = [dict(problem=f"\x1b[31mred {i}\u202e?", answer="\x1b[2J1") for i in range(20)]
    rows = [row | dict(level="\x1b]0;x\a") for row in rows]
    (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", scratch, "--data", scratch / "rows.jsonl", "--max-new-tokens", "20"]
    small = ["--steps", "1", "--prompts", "2", "--samples", "2", "--eval-problems", "2"]
    commands = {
        sample: ["--problems", "1"],
        eval_math: ["--problems", "2", "--samples", "1", "--out", scratch / "answers.jsonl"],
        train: [*small, "--eval-samples", "0", "--rank", "1", "--out", scratch / "run"],
    }
    for module, own in commands.items():
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, own), *map(str, flags)])
        assert module.main() is None
        out, err = capfdbinary.readouterr()
        assert b"red" in out or module is eval_math
        assert not re.search(rb"[\x00-\x08\x0b-\x1f]|\xe2\x80\xae", out + err)
