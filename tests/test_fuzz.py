"""Hostile files: whatever they hold, a loader returns or raises UserError, soon, in little memory.

Each test damages one file of a checkpoint, an adapter or a data set that is otherwise whole. The
examples are the same in every run, and `pytest -m long` tries many more of them.
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
import struct
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import eval_math
import sample
import train
from data.problems import add_prompts, load_problems
from eval_math import graded
from experiments.compare import compare
from hf.checkpoint import INDEX, load_model, load_tokenizer
from hf.peft import load_adapter, save_adapter
from lora import add_lora
from run.answers import print_groups, read_answers
from run.flags import check_fit
from system.errors import UserError, printable

ROOM = 2**30  # bytes that a loader may allocate beyond what is there; the files have 200 kB
SECONDS = 5  # of processor time for a file
FEW_OR_MANY = pytest.mark.parametrize("examples", [50, pytest.param(200, marks=pytest.mark.long)])

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
        derandomize=True,
        deadline=None,  # it would count the time that other processes take
        database=None,
        phases=[Phase.generate],  # to shrink a failure takes minutes
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: how(given(*strategies)(test))


def outcome(load, *args):
    """What it returns, or None if it raises a UserError; anything else fails the test."""
    started = time.process_time()
    try:
        return load(*args)
    except UserError as error:
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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_config.json", INDEX])
def test_json_nested_too_deeply(whole, name):
    """A RecursionError is no ValueError: it went past the handler."""
    with damaged(whole, name, DEEP) as folder, pytest.raises(UserError, match=re.escape(name)):
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
        print_groups(graded(read_answers(str(path), "completion", "gold")))
        compare(str(path), str(path))

    lines = st.lists(st.sampled_from(ROWS).flatmap(changed_object), min_size=1, max_size=3)

    @fuzz(examples, lines, st.booleans())
    def test(lines, dos):
        path.write_bytes((b"\r\n" if dos else b"\n").join(lines))
        outcome(read)
        outcome(grade)

    test()
    assert "\x1b" not in capsys.readouterr().out


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
    says = r"model\.safetensors is (missing or damaged|a folder, pipe or device)"
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
    weights = scratch / "model.safetensors"
    shutil.copy(weights, scratch.parent / "x.safetensors")
    (scratch / INDEX).write_text(json.dumps(dict(weight_map={"model.norm.weight": name})))
    with pytest.raises(UserError, match="no safetensors file of it"):
        load_model(scratch)
    plain = dict(weight_map={"model.norm.weight": "model.safetensors"})
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
