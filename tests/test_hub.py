"""Downloads, from a small server on the loopback address that speaks as the Hub does.

huggingface_hub reads its environment when it is imported, so every reader is a process of its own,
with HF_ENDPOINT at the server and a cache in the test's folder. It is forked from one that has
imported torch, which takes seconds. Nothing goes online. HUB_AT=FOLDER has the readers use another
version, from `pip install --target FOLDER huggingface_hub==2.4.0`.
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, hf_model, save_tokenizer
from helpers import forks

from data.problems import HUB, load_problems
from hf.checkpoint import hub_model, load_model
from hf.merge import merge
from hf.peft import adapter_folder, save_adapter
from lora import add_lora
from system.errors import UserError, run_cli

OLD, NEW = "1" * 40, "2" * 40  # two commits of every repository


class Hub:
    """repos: {"models/a/b": {commit: {file: bytes}}}; `log` is what was asked for."""

    def __init__(self):
        self.repos, self.log, self.gated = {}, [], set()
        self.cut, self.broken = {}, set()  # file: bytes until the line drops, once; files in error
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        serve = self.server.serve_forever
        threading.Thread(target=serve, kwargs=dict(poll_interval=0.01), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def asked(self, method="GET"):
        """The names of the files that were asked for."""
        found = [re.search(r"/resolve/\w+/(.*)", path) for m, path, _ in self.log if m == method]
        return sorted(match[1] for match in found if match)

    def answer(self, request):
        if request.path == "/api/agent-harnesses":  # the library asks that once a day
            return self.send(request, 404)
        self.log.append((request.command, request.path, request.headers.get("Range")))
        api = re.fullmatch(
            r"/api/((?:models|datasets)/[^/]+/[^/]+)/(revision|tree)/(\w+)(?:\?.*)?", request.path
        )
        file = re.fullmatch(r"/((?:datasets/)?)([^/]+/[^/]+)/resolve/(\w+)/(.+)", request.path)
        if api:
            name, what, revision = api.groups()
        elif file:
            name, revision = (file[1] or "models/") + file[2], file[3]
        else:
            return self.send(request, 404)
        if name not in self.repos:  # the Hub says 401 to a stranger, also where there is nothing
            return self.send(request, 401, {"X-Error-Code": "RepoNotFound"})
        commit = NEW if revision == "main" else revision
        files = self.repos[name].get(commit)
        if files is None:
            return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        if api and what == "revision":
            siblings = [dict(rfilename=path) for path in files]
            return self.send(request, 200, body=dict(id=name, sha=commit, siblings=siblings))
        if api:
            tree = [dict(type="file", path=p, size=len(b), oid=tag(b)) for p, b in files.items()]
            return self.send(request, 200, body=tree)
        if name in self.gated:
            return self.send(request, 403, {"X-Error-Code": "GatedRepo"})
        self.send_file(request, file[4], files[file[4]], commit)

    def send(self, request, status, headers=None, body=None):
        data = b"" if body is None else json.dumps(body).encode()
        request.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(data))}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data if request.command == "GET" else b"")

    def send_file(self, request, name, data, commit):
        if name in self.broken and request.command == "GET":
            return self.send(request, 500)
        start = int((request.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag(data)}"', "Accept-Ranges": "bytes"}
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        request.send_response(206 if start else 200)
        for key, value in (headers | {"Content-Length": str(len(data) - start)}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            end = self.cut.pop(name, len(data))
            request.wfile.write(data[start:end])
            request.close_connection = end < len(data)


def tag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


# ---- Readers, each a process of its own ----------------------------------------------------------


def in_process(function, args, hub, cache, **changes):
    """Call a function where huggingface_hub is not imported yet; returns exit code and output."""
    env = dict(HF_ENDPOINT=hub.url, HF_HOME=str(cache), HF_HUB_DISABLE_PROGRESS_BARS="1") | changes
    logs = [str(Path(cache).with_suffix(end)) for end in (".out", ".err")]
    process = forks().Process(target=child, args=(function, args, env, logs))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, *(Path(log).read_text() for log in logs)


def child(function, args, env, logs):
    """What such a process does: with this environment, its output in two files."""
    for number, log in enumerate(logs, 1):
        with open(log, "wb") as file:
            os.dup2(file.fileno(), number)
    assert "huggingface_hub" not in sys.modules
    for name in list(os.environ):
        if name.startswith("HF_") or "proxy" in name.lower():
            del os.environ[name]
    os.environ |= env
    sys.path[:0] = filter(None, [os.environ.get("HUB_AT")])  # another huggingface_hub, to try it
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*args)


def print_calls(calls, prepare):
    """Print what each call of hub_model or load_problems returns, or the words of its UserError."""
    if prepare:
        prepare()
    for kind, *args in calls:
        load = dict(model=hub_model, adapter=adapter_folder, data=load_problems, merge=merge)[kind]
        try:
            found = load(*args)
            found = found if isinstance(found, list) else str(found)
        except UserError as error:
            found = dict(error=str(error))
        print(json.dumps(found), flush=True)


def read(hub, cache, *calls, prepare=None, **env):
    """What each of these calls returned, or the words of its UserError."""
    code, out, err = in_process(print_calls, (calls, prepare), hub, cache, **env)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines() if line[0] in '"[{']
    assert len(found) == len(calls)
    return [x["error"] if isinstance(x, dict) else x for x in found]


def small_pieces():
    """The library resumes within a process, by pieces of 10 MB: here of 4 kB."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 4096


def no_pyarrow():
    sys.modules["pyarrow"] = None  # as where it is not installed


def sample_main(flags):
    import sample

    sys.argv = ["sample.py", "Hi", "--max-new-tokens", "9", *flags]
    run_cli(sample.main)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The files of a sharded checkpoint, with others that one need not read beside them."""
    folder = tmp_path_factory.mktemp("sharded")
    hf_model(tie_word_embeddings=True, eos_token_id=2).save_pretrained(
        folder, max_shard_size="40KB"
    )
    save_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = ["README.md", "pytorch_model.bin", "run.py", "model.fp16.safetensors"]
    return folder, files | dict.fromkeys([*others, "onnx/model.safetensors"], b"not to be read")


def needed(files):
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    shards = [name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    assert len(shards) > 2
    return sorted([*names, *shards, "model.safetensors.index.json"])


def test_a_pinned_checkpoint_and_then_without_network(hub, sharded, tmp_path):
    """A download of the wrong commit, of files that nobody reads (a pickle, code, other weights), a
    second download of what is there, or no way to work from the cache."""
    folder, files = sharded
    changed = dict(files) | {"config.json": b"{}"}  # main has moved on
    hub.repos["models/some/tiny"] = {OLD: files, NEW: changed}
    call = ["model", "some/tiny", OLD]
    [path] = read(hub, tmp_path, call)
    assert path.endswith(f"snapshots/{OLD}")
    assert hub.asked() == needed(files)
    a, b = load_model(folder).state_dict(), load_model(path).state_dict()  # the cache has symlinks
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    hub.log.clear()
    assert read(hub, tmp_path, call) == [path]
    assert hub.asked() == hub.asked("HEAD") == []
    hub.log.clear()
    assert read(hub, tmp_path, call, ["model", "some/tiny"], HF_HUB_OFFLINE="1") == [
        path,
        "some/tiny is not all in the cache, and the Hub out of reach: unset HF_HUB_OFFLINE",
    ]
    assert hub.log == []
    assert read(hub, tmp_path, call, HF_ENDPOINT="http://127.0.0.1:9") == [path]
    for tree in tmp_path.rglob("trees"):  # as of an older library, or of transformers
        tree.rename(tree.with_name("none"))
    assert read(hub, tmp_path, call, HF_HUB_OFFLINE="1") == [path]


def test_a_branch_is_one_commit_and_works_from_the_cache(hub, sharded, tmp_path):
    """Config of one commit and weights of another, if the branch moves between two requests; or a
    model by its name alone that is cached and yet not found without network."""
    files = sharded[1]
    hub.repos["models/some/tiny"] = {NEW: files}
    calls = ["model", "some/tiny"], ["model", "some/tiny", "main"]
    [path, same] = read(hub, tmp_path, *calls)
    assert path == same and path.endswith(NEW)
    assert sum("/revision/main" in path for _, path, _ in hub.log) == 2  # once for each call
    assert read(hub, tmp_path, *calls, HF_HUB_OFFLINE="1") == [path, path]
    assert read(hub, tmp_path, *calls, HF_ENDPOINT="http://127.0.0.1:9") == [path, path]


def test_the_command_line(hub, folder, tmp_path):
    """--model and --revision of a command may not reach the download, or its fault not the user."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repos["models/some/tiny"] = {OLD: files}

    def sample(*flags, **env):
        code, out, err = in_process(sample_main, (flags,), hub, tmp_path, **env)
        return code, out.rsplit("\n\n", 1)[0], err

    pinned = ["--model", "some/tiny", "--revision", OLD]
    assert sample(*pinned) == sample("--model", str(folder)) == sample(*pinned, HF_HUB_OFFLINE="1")
    error = f"error: some/tiny has no revision {NEW}: check --revision\n"
    assert sample("--model", "some/tiny", "--revision", NEW) == (2, "", error)


def test_an_adapter_by_its_id(hub, tmp_path):
    """An adapter on the Hub is what people share; a path in runs/ is a slip, and no name there."""
    wanted = ["adapter_config.json", "adapter_model.safetensors"]
    there = [*wanted, "optimizer.pt", "README.md"]
    hub.repos["models/some/sft"] = {NEW: {name: name.encode() for name in there}}
    hub.repos["models/some/full"] = {NEW: {"model.safetensors": b"x"}}
    calls = ["adapter", "some/sft"], ["adapter", "some/full"], ["adapter", "runs/sft"]
    [path, error, mine] = read(hub, tmp_path, *calls)
    assert path.endswith(NEW) and hub.asked() == wanted
    assert error == f"some/full has no adapter_config.json at {NEW}: choose another"
    assert mine.startswith("runs/sft holds no adapter")


def test_an_adapter_is_merged_into_a_base_on_the_hub(hub, sharded, tmp_path):
    """The weights of another commit than the adapter was trained on; or a model without the chat
    template and tokenizer files that training does not read."""
    folder, files = sharded
    files = files | {"chat_template.jinja": b"{{ messages }}"}
    hub.repos["models/some/tiny"] = {OLD: files, NEW: {"config.json": b"{}"}}
    save_adapter(add_lora(load_model(folder), 2, 4), tmp_path / "run" / "adapter")
    settings = dict(model="some/tiny", revision=OLD, random_init=False)
    (tmp_path / "run" / "config.json").write_text(json.dumps(dict(settings=settings)))
    call = ["merge", str(tmp_path / "run"), str(tmp_path / "out")]
    assert read(hub, tmp_path / "cache", call) == ["0.0"]  # B is 0
    merged = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    wanted = [*needed(files), "chat_template.jinja"]
    assert merged == {name: files[name] for name in wanted}
    call[2] += "-2"
    assert read(hub, tmp_path / "cache", call, HF_HUB_OFFLINE="1") == ["0.0"]


def test_a_line_that_drops_is_taken_up_where_it_dropped(hub, sharded, tmp_path):
    """After a broken connection the file would start again from nothing, or be glued together
    wrongly."""
    files = sharded[1]
    hub.repos["models/some/tiny"] = {NEW: files}
    shard = max(needed(files), key=lambda name: len(files[name]) * name.endswith("safetensors"))
    hub.cut[shard] = 20_000
    [path] = read(hub, tmp_path, ["model", "some/tiny"], prepare=small_pieces)
    if "HUB_AT" in os.environ and "cannot be downloaded (" in path:
        [path] = read(hub, tmp_path, ["model", "some/tiny"])  # 0.36 and 1.0 wait for another call
    ranges = [asked for method, url, asked in hub.log if method == "GET" and shard in url]
    assert ranges == [None, "bytes=16384-"]
    for name in needed(files):
        assert Path(path, name).read_bytes() == files[name]


def test_a_download_that_failed_goes_on_with_the_next_file(hub, sharded, tmp_path):
    """Twenty shards of a large model would be downloaded again because the last one failed; or half
    a checkpoint in the cache be taken for a whole one."""
    files = sharded[1]
    hub.repos["models/some/tiny"] = {NEW: files}
    shard = [name for name in needed(files) if name.startswith("model-")][-1]
    hub.broken.add(shard)
    [error] = read(hub, tmp_path, ["model", "some/tiny"])
    assert error.startswith("some/tiny cannot be downloaded (") and "500" in error
    assert error.endswith("try again; whole files are kept")
    # The library's list of what there should be. (0.36 and 1.0 have none.)
    listed = [file for tree in tmp_path.rglob("trees") for file in tree.iterdir()]
    assert listed or "HUB_AT" in os.environ
    offline = "unset HF_HUB_OFFLINE"
    [error] = read(hub, tmp_path, ["model", "some/tiny"], HF_HUB_OFFLINE="1")
    absent = f"some/tiny has no {shard} at {NEW} in the cache: go online"
    said = f"some/tiny is not all in the cache, and the Hub out of reach: {offline}"
    assert error == (said if listed else absent)
    for file in listed:
        file.unlink()
    [error] = read(hub, tmp_path, ["model", "some/tiny"], HF_HUB_OFFLINE="1")
    assert error == absent
    hub.broken.clear()
    hub.log.clear()
    [path] = read(hub, tmp_path, ["model", "some/tiny"])
    assert hub.asked() == [shard]
    load_model(path)


def test_each_fault_has_its_own_words(hub, sharded, tmp_path):
    """A traceback of a library, or one sentence for all that can go wrong."""
    files = dict(sharded[1])
    hub.repos["models/some/gated"] = {NEW: files}
    hub.gated.add("models/some/gated")
    hub.repos["models/some/tiny"] = {NEW: files}
    hub.repos["models/some/gguf"] = {NEW: {"model.gguf": b"", "README.md": b""}}
    old = {"config.json", "tokenizer.json", "pytorch_model.bin"}
    hub.repos["models/some/pickle"] = {NEW: {name: files[name] for name in old}}
    away = b'{"weight_map": {"a": "../../../../model.safetensors"}}'
    hub.repos["models/some/evil"] = {NEW: files | {"model.safetensors.index.json": away}}
    said = {
        ("some/none",): "some/none is private or not on the Hub: check the name and HF_TOKEN",
        ("some/gated",): "some/gated is gated: accept its terms on its page, then set HF_TOKEN",
        ("some/tiny", "v9"): "some/tiny has no revision v9: check --revision",
        ("some/tiny", OLD): f"some/tiny has no revision {OLD}: check --revision",
        ("some/gguf",): f"some/gguf has no config.json at {NEW}: choose another",
        ("some/pickle",): f"some/pickle has no model.safetensors at {NEW}: choose another",
    }
    calls = [["model", *args] for args in [*said, ("some/evil",), ("so me/x",)]]
    *found, evil, name = read(hub, tmp_path, *calls)
    assert found == list(said.values())
    assert "names '../../../../model.safetensors', no safetensors file of it" in evil
    assert name.startswith("so me/x cannot be downloaded (Repo id must")
    assert "pytorch_model.bin" not in hub.asked()
    assert not any("\n" in words for words in [*found, evil, name])
    # Port 9 of this machine: nothing listens there.
    gone = read(
        hub, tmp_path, ["model", "a/b"], ["model", "a/b", OLD], HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert gone == ["a/b is not all in the cache, and the Hub out of reach: check the network"] * 2


# ---- Data sets -----------------------------------------------------------------------------------

SETS = {  # rows as they are on the Hub, and the gold answer
    "math": (dict(problem="1+1?", level="Level 1", type="Algebra", solution=r"$\boxed{2}$"), "2"),
    "math500": (
        dict(problem="1+2?", solution="...", answer="3", subject="Algebra", level=1, unique_id="x"),
        "3",
    ),
    "gsm8k": (dict(question="1+3?", answer="1+3=<<1+3=4>>4\n#### 4"), "4"),
}


def data_file(row, name, tmp_path):
    """The bytes of a data file of one row, in the format that its name says."""
    if name.endswith(".jsonl"):
        return json.dumps(row).encode() + b"\n"
    import pyarrow.parquet

    table = pyarrow.table({key: [value] for key, value in row.items()})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    return (tmp_path / "rows.parquet").read_bytes()


def publish(hub, name, tmp_path):
    """Put a data set on the server, each split in one file beside files that are not ours."""
    repo, files, _ = HUB[name]
    files = files.replace("*", "00000-of-00001")
    paths = {split: files.format(split) for split in ("train", "test")}
    said = {"README.md": b"", "other/train-00000.parquet": b""}
    for split, path in paths.items():
        said[path] = data_file(SETS[name][0] | dict(level=split), path, tmp_path)
    hub.repos[f"datasets/{repo}"] = {NEW: said}
    return paths


@pytest.mark.parametrize("name", SETS)
def test_named_data_sets(hub, name, tmp_path):
    """A column that is called otherwise, a split that is the other one, or every file fetched."""
    if name != "math500":
        pytest.importorskip("pyarrow")
    paths, (row, gold) = publish(hub, name, tmp_path), SETS[name]
    calls = ["data", name, "train"], ["data", name, "test"]
    train, test = read(hub, tmp_path, *calls)
    assert hub.asked() == sorted(set(paths.values()))
    assert len(train) == len(test) == 1
    assert test[0]["problem"] == row.get("problem", row.get("question"))
    assert test[0]["answer"] == train[0]["answer"] == gold
    if "level" in row:
        assert test[0]["level"] == "test"
    assert read(hub, tmp_path, *calls, HF_HUB_OFFLINE="1") == [train, test]


def test_data_faults(hub, tmp_path):
    """A data set that has moved, or a damaged file of it, would end in a library's traceback."""
    publish(hub, "math500", tmp_path)
    hub.repos["datasets/openai/gsm8k"] = {NEW: {"README.md": b""}}
    parquet = {"data/test-0.parquet": b"PAR1 no parquet"}
    hub.repos["datasets/DigitalLearningGmbH/MATH-lighteval"] = {NEW: parquet}
    [empty, damaged] = read(hub, tmp_path, ["data", "gsm8k", "test"], ["data", "math", "test"])
    assert empty == f"openai/gsm8k has no main/test-*.parquet at {NEW}: choose another"
    if importlib.util.find_spec("pyarrow"):
        assert "test-0.parquet is damaged" in damaged
    calls = ["data", "math", "test"], ["data", "math500", "test"]
    [absent, plain] = read(hub, tmp_path, *calls, prepare=no_pyarrow)
    assert absent == "test-0.parquet: pip install pyarrow, or give a JSONL file"
    assert plain[0]["answer"] == "3"
    gone = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "none"))
    [error] = read(hub, tmp_path, ["data", "math500", "test"], **gone)
    assert error.startswith(
        "HuggingFaceH4/MATH-500 is not all in the cache, and the Hub out of reach:"
    )
