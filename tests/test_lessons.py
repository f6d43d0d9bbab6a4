"""The exercises and traps of lessons/: every blank makes its tests fail, a usual mistake in its
place too, what was there makes them pass, and every trap is caught.

Each of these is a copy of the project that has to be tested on its own, which takes minutes: those
tests are marked long. One process imports the libraries, which takes seconds, and forks for each
copy; in the fork nothing of the project is imported yet, and pytest finds the copy's own modules.
The quick tests see that every function, line and test exists of which the exercises speak.
"""

import ast
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path

import pytest

from lessons import blank, trap
from system.errors import UserError

HOUSE = Path(__file__).parent.parent
AT_ONCE = 2  # copies tested at the same time
QUICKLY = ["-o", "addopts=", "-q", "--tb=native", "--assert=plain", "-p", "no:cacheprovider"]
LIBRARIES = ["sympy", "hypothesis", "peft", "safetensors.torch", "tokenizers", "tqdm"]
LIBRARIES += ["transformers.generation", "torch.utils.checkpoint", "transformers.models.auto"]
LIBRARIES += [f"transformers.models.{x}.modeling_{x}" for x in ("qwen3", "qwen2", "llama")]

# Query heads take key heads in turn, where each key head belongs to a run of query heads.
INTERLEAVED = "F.scaled_dot_product_attention(q, k.repeat(1, len(q[0]) // len(k[0]), 1, 1), "
INTERLEAVED += "v.repeat(1, len(q[0]) // len(v[0]), 1, 1)"
MISTAKES = {  # what people write there: the right words, and the wrong ones
    "rms_norm": ("eps=eps", "eps=1e-6"),
    "rotary": ("-even / head_dim", "-2 * even / head_dim"),
    "rotate": ("x.shape[-1] // 2", "1"),  # neighbours as pairs
    "attention": ("F.scaled_dot_product_attention(q, k, v", INTERLEAVED),
    "Attention.forward": ("rotate(k, rope)", "k"),
    "KVCache.start": ("<= self.positions", "< self.positions"),  # a token does not see itself
    "KVCache.attend": ("= v.transpose", "= k.transpose"),
    "KVCache.copy_rows": ("int(self.lengths[:used].max()) if used else 0", "S"),  # cuts longer rows
    "uniforms": ("int(sample)", "0"),  # all samples of a prompt are the same
    "top_p_filter": ("mass_before >= top_p", "mass_before + masses >= top_p"),  # loses one token
    "inverse_cdf": ("u * probs.sum(-1)", "u"),  # as if a cut distribution still summed to one
    "sample_token": ("top_p_filter(probs, top_p, top_k)", "probs"),
    "LoRALinear.forward": ("alpha=self.scale", "alpha=self.alpha"),
    "adapter_off": ("layer.on = on", "layer.on = True"),  # the inner of two switches it on again
    "add_lora": ("layer.base.in_features", "layer.base.out_features"),
    "last_boxed": ("answer = None if match[1] else answer", "pass"),  # an earlier box counts
    "extract_answer": ('.rsplit("</think>", 1)[-1]', ""),  # a box of the thinking counts
    "verify": ("bool(same_answer(answer, str(gold)))", "answer == str(gold)"),
    "pass_at_k": ("math.comb(n - c, k) / math.comb(n, k)", "(1 - c / n) ** k"),  # biased
    "group_advantages": (".std(dim=1, keepdim=True)", ".std(dim=1, keepdim=True, correction=0)"),
    "make_batch": ("torch.arange(T) < lengths", "torch.arange(T) <= lengths"),  # padding learns
    "pad_rows": ("len(prompt) - 1 for", "len(prompt) for"),  # the state that has read the token
    "token_logps": (" / temperature", ""),
    "policy_objective": ("1 + clip_high", "1 + clip_low"),
    "kl_k3": ("log_ratio.exp() - 1 - log_ratio", "-log_ratio"),  # k1, which may be negative
    "token_loss": ("objective - cfg.kl_coef", "objective + cfg.kl_coef"),  # away from the base
    "clip_and_step": ("math.isfinite(norm) and math.isfinite(loss)", "math.isfinite(loss)"),
    "update": ("here.advantage[:, None] * m", "here.advantage[:, None]"),  # no credit
    "normalize_scores": ("scores / largest.clamp(min=tiny)", "scores + 1e-8"),  # an epsilon
    "arca": ("signals.residual", "signals.residual**2"),
    "entropy_reduction": (" * signals.mask[:, 1:]", ""),  # 0 at the last column only
    "score": (".norm(dim=-1)", ".abs().sum(dim=-1)"),
    "gini": ("columns - (w.shape[1] - T)", "columns"),  # padding is ranked
    "effective_token_ratio": ("mask.double().sum(dim=1)", "mask.shape[1]"),
    "permuted": (".masked_fill(~signals.mask.bool(), 2.0)", ""),  # padding is shuffled in
    "random": ("mask, 1)", "mask, power)"),  # sharpened a second time
    "wilson": ("mean * (1 - mean) + a / 4", "mean * (1 - mean)"),
}


# ---- Everything that is named exists -------------------------------------------------------------
def body_of(file, node):
    """Return the lines of a function's body, as the project has them."""
    lines = (HOUSE / file).read_text(encoding="utf-8").split("\n")
    return "\n".join(lines[blank.body(node)])


def defined_tests():
    """Return by name, as pytest writes it, what stands above each test of the project."""
    found = {}
    for path in (HOUSE / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                found[f"tests/{path.name}::{node.name}"] = decorators
    return found


def test_exercises_and_mistakes_exist():
    """A function that was renamed, or whose body no longer has the line where people go wrong."""
    known = blank.functions()
    assert blank.EXERCISES.keys() <= known.keys()
    assert MISTAKES.keys() == blank.EXERCISES.keys()
    for name, (right, _) in MISTAKES.items():
        assert body_of(*known[name]).count(right) == 1, (name, right)


def test_named_tests_exist():
    """A test that was renamed grades nothing, nor does one that the plain pytest command leaves
    out."""
    tests = defined_tests()
    named = {test for name in blank.EXERCISES for test in blank.tests_of(name)}
    named |= {found.test for found in trap.read_traps().values()}
    assert named <= tests.keys(), named - tests.keys()
    assert not [test for test in named if "pytest.mark.long" in tests[test]]


@pytest.mark.parametrize("number", trap.read_traps())
def test_patches_fit(number, tmp_path):
    """A patch of a line that is no more, or that stands there twice."""
    patch = trap.read_traps()[number].patch
    for file in re.findall(r"^--- a/(.*)$", patch, flags=re.MULTILINE):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(HOUSE / file, tmp_path / file)
    trap.apply(patch, tmp_path)
    for file in re.findall(r"^--- a/(.*)$", patch, flags=re.MULTILINE):
        ast.parse((tmp_path / file).read_text(encoding="utf-8"))


# ---- Many copies, each tested in a process of its own --------------------------------------------
class OneFailure:
    """To pytest: once a test has failed, leave out its other cases."""

    def __init__(self):
        self.failed = set()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid.split("[")[0])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        return item.nodeid.split("[")[0] in self.failed or None


def put_back(folder, names, old="", new=""):
    """Write the bodies that were blanked again, as the project has them but for old -> new."""
    known = blank.functions()
    for name in names:
        file, node = known[name]
        written = body_of(file, node)
        text = (folder / file).read_text(encoding="utf-8")
        [line] = [x for x in text.split("\n") if x.endswith(f'("yours to write: {name}")')]
        text = text.replace(line, written.replace(old, new) if old else written)
        (folder / file).write_text(text, encoding="utf-8")


def changed(folder):
    """The files of the exercises that are not, to the byte, the project's."""
    both = [((HOUSE / file).read_bytes(), (folder / file).read_bytes()) for file in blank.FILES]
    return {file for file, (a, b) in zip(blank.FILES, both, strict=True) if a != b}


def prepare(kind, what, out):
    """Make a copy with a `blank`, a `mistake` in its place, all blanks `restored`, or a `trap`;
    returns the tests to run in it."""
    if kind == "trap":
        found = trap.read_traps()[what]
        trap.make_trapped(found, out)
        return [found.test]
    names = [what] if what else [*blank.EXERCISES]
    blank.make_blank(names, out)
    assert changed(out)
    if kind == "mistake":
        put_back(out, names, *MISTAKES[what])
    if kind == "restored":
        put_back(out, names)
        assert not changed(out)
    return sorted({test for name in names for test in blank.tests_of(name)})


def try_out(kind, what, log):
    """In a process of its own: make a copy, run its tests, and end with pytest's exit code."""
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "copy"
            tests = prepare(kind, what, out)
            enough = ["--exitfirst"] if kind == "mistake" else []  # one that notices it
            ours = {path.stem for path in [*HOUSE.iterdir(), *HOUSE.glob("tests/*.py")]}
            for name in [name for name in sys.modules if name.split(".")[0] in ours]:
                del sys.modules[name]  # the copy has its own
            not_ours = [p for p in sys.path if p not in (str(HOUSE), str(HOUSE / "tests"))]
            sys.path[:] = [str(out), *not_ours]
            os.chdir(out)
            code = int(pytest.main([*QUICKLY, *enough, *tests], plugins=[OneFailure()]))
            os.chdir("/")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def serve(logs):
    """Read jobs (kind, what) as JSON from stdin and try them out; prints by job pytest's exit code
    and what it said."""
    for library in LIBRARIES:
        import_module(library)
    gc.freeze()  # or each fork looks through all that was imported
    sys.dont_write_bytecode = True
    jobs = json.load(sys.stdin)
    running = {}
    done = {}
    while jobs or running:
        if jobs and len(running) < AT_ONCE:
            job, log = jobs.pop(0), f"{logs}/{len(jobs)}"
            if not (pid := os.fork()):
                try_out(*job, log)
            running[pid] = " ".join(job), log
        else:
            pid, status = os.wait()
            job, log = running.pop(pid)
            text = Path(log).read_text(encoding="utf-8", errors="replace")
            done[job] = os.waitstatus_to_exitcode(status), text
    print(json.dumps(done))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By job, such as `blank rotary`: pytest's exit code, and what it printed."""
    jobs = [("restored", ""), *(("trap", number) for number in trap.read_traps())]
    jobs += [(kind, name) for name in blank.EXERCISES for kind in ("blank", "mistake")]
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("logs"))]
    environment = os.environ | dict(PYTHONPATH=str(HOUSE), OMP_NUM_THREADS="1", PYTHONUTF8="1")
    environment |= dict(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    pipes = dict(input=json.dumps(jobs), capture_output=True, text=True)
    done = subprocess.run(command, env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- Exercises -----------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("name", blank.EXERCISES)
def test_a_blank_makes_its_tests_fail(said, name):
    """A test that is said to grade a function and does not touch it: all of those named fail, and
    because of this function."""
    code, text = said[f"blank {name}"]
    assert code == 1, text
    assert f"NotImplementedError: yours to write: {name}\n" in text
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    for test in blank.tests_of(name):
        assert any(f == test or f.startswith(f"{test}[") for f in failed), test


@pytest.mark.long
@pytest.mark.parametrize("name", blank.EXERCISES)
def test_a_usual_mistake_is_noticed(said, name):
    """A grade for having written something: a body that is nearly right has to fail, too, and by an
    assertion."""
    code, text = said[f"mistake {name}"]
    assert trap.caught(code, text), text


@pytest.mark.long
def test_what_was_there_passes(said):
    """Tests that fail in a copy whatever one writes, for what the copy lacks. All functions are
    blanked and put back, which makes each file what it was, to the byte."""
    code, text = said["restored "]
    assert code == 0, text
    tests = {test for name in blank.EXERCISES for test in blank.tests_of(name)}
    assert int(re.search(r"^(\d+) passed", text, re.MULTILINE)[1]) >= len(tests), text
    assert "skipped" not in text


def test_every_function_can_be_blanked():
    """A blank that changes a signature, a decorator, a docstring, or something near it."""
    for file in blank.FILES:
        nodes = {name: node for name, (f, node) in blank.functions().items() if f == file}
        source = (HOUSE / file).read_text(encoding="utf-8")
        tree = ast.parse(source)
        of_line = {n.lineno: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for name, node in nodes.items():
            said = ast.get_docstring(node) is not None
            error = f'raise NotImplementedError("yours to write: {name}")'
            of_line[node.lineno].body[said:] = ast.parse(error).body
        new = blank.blanked(source, nodes)
        assert ast.unparse(ast.parse(new)) == ast.unparse(tree)
        comments = [[x for x in text.split("\n") if x.startswith("#")] for text in (source, new)]
        assert comments[0] == comments[1]


def run(*command):
    """Exit code, stdout and stderr of a command line of lessons/."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_list():
    """A function or a test that the list leaves out, or too few of them."""
    assert len(blank.EXERCISES) >= 33
    assert {lesson for lesson, *_ in blank.EXERCISES.values()} == set(range(1, 7))
    code, out, _ = run(HOUSE / "lessons/blank.py", "--list")
    assert code == 0
    for name in blank.EXERCISES:
        assert f"  {name}  (" in out
        assert all(f"    {test}\n" in out for test in blank.tests_of(name))


def test_blank_on_the_command_line(tmp_path):
    """A copy made elsewhere than said, one written over another, or a command that grades another
    copy."""
    out = tmp_path / "mine"
    command = (HOUSE / "lessons/blank.py", "gini", "KVCache.attend", "--out", out)
    code, said, _ = run(*command)
    assert code == 0 and changed(out) == {"credit.py", "model.py"}
    line = next(line for line in said.split("\n") if line.startswith("    "))
    assert line.startswith(f"    cd {out} && python -m pytest ")
    assert {*blank.tests_of("gini"), *blank.tests_of("KVCache.attend")} <= set(line.split())
    assert not (out / ".git").exists() and not (out / "runs").exists()
    before = (out / "credit.py").read_bytes()
    for wrong, says in (
        (command, "exists"),
        ((command[0], "ginni"), "gini"),
        (command[:1], "--list"),
    ):
        code, said, error = run(*wrong)
        assert (code, said, error.count("\n")) == (2, "", 1) and says in error
    assert (out / "credit.py").read_bytes() == before


# ---- Traps ---------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize("number", trap.read_traps())
def test_a_trap_is_caught(said, number):
    """A silent bug that the test named for it does not see, or sees only because it crashes."""
    code, text = said[f"trap {number}"]
    assert trap.caught(code, text), text


def test_the_page_of_traps():
    """Fewer traps than ten, a patch of more than five lines, one that is hidden in many more."""
    traps = trap.read_traps()
    assert list(traps) == [str(n) for n in range(1, 11)]
    for found in traps.values():
        lines = [x for x in found.patch.split("\n") if x[:3] not in ("---", "+++")]
        assert 1 <= sum(x[:1] in ("-", "+") for x in lines) <= 5
        assert "+" in {x[:1] for x in lines}


def test_a_patch_goes_where_its_lines_are(tmp_path):
    """A patch that is put where its lines do not stand, or at one of several places, or not at all
    and says nothing."""
    file, patch = tmp_path / "a.py", "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n x\n-y\n+z\n"
    for text, want in (("x\ny\n", "x\nz\n"), ("1\n2\nx\ny\nw\n", "1\n2\nx\nz\nw\n")):
        file.write_text(text)
        trap.apply(patch, tmp_path)
        assert file.read_text() == want
    for text in ("x\nz\n", "x\ny\nx\ny\n", "ax\ny\n", "x\nyy\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"a\.py"):
            trap.apply(patch, tmp_path)
        assert file.read_text() == text


def test_traps_on_the_command_line():
    """A trap that is not listed, a number of none, or a crash that counts as caught."""
    code, out, _ = run(HOUSE / "lessons/trap.py")
    assert code == 0 and all(found.title in out for found in trap.read_traps().values())
    code, out, error = run(HOUSE / "lessons/trap.py", "11")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert trap.caught(1, "E   assert 1 == 2")
    for code, text in ((0, "1 passed"), (1, "E   NameError: x"), (2, "E   assert"), (4, "")):
        assert not trap.caught(code, text)


@pytest.mark.long
def test_a_trap_on_the_command_line(tmp_path):
    """A trap that is said to be caught and is not, or a copy that has another bug."""
    out = tmp_path / "trapped"
    code, said, _ = run(HOUSE / "lessons/trap.py", "9", "--out", out)
    assert code == 0 and said.endswith("\ncaught\n") and "E   assert" in said
    assert changed(out) == {"credit.py"}


if __name__ == "__main__":
    serve(sys.argv[1])
