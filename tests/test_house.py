"""The house rules: imports that run one way, files that stand alone, line budgets, true READMEs.

All of it is read from the source (`ast`), so imports inside functions count as well.
"""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from run.flags import EVAL_FLAGS, FLAGS, SAMPLE_FLAGS
from system.errors import LIMITS
from train import Settings

HOUSE = Path(__file__).parent.parent
NAMES = ["model", "lora", "credit", "sample", "eval_math", "grpo", "train"]
SEVEN = [f"{name}.py" for name in NAMES]
FOLDERS = ["system", "verifier", "hf", "fast", "data", "run", "view"]
ABOVE = ["lessons", "experiments", "bench", "tests", "examples"]  # they stand above the product

# A file or folder, and what of ours it may import: what stands below it, and its own folder.
BOTTOM = ["system", "verifier", "model", "lora", "credit"]
MAY_IMPORT = {room: [] for room in BOTTOM}
MAY_IMPORT["hf"] = ["system", "model", "lora"]
MAY_IMPORT["fast"] = ["model", "lora"]
MAY_IMPORT["data"] = ["system", "verifier", "model", "hf"]
for room in ("run", "sample", "eval_math", "grpo", "train"):  # each above all those before it
    MAY_IMPORT[room] = list(MAY_IMPORT)
MAY_IMPORT["view"] = [room for room in MAY_IMPORT if room != "train"]


def product():
    """Every Python file of the product: {path below the house: its text}."""
    paths = [HOUSE / name for name in SEVEN]
    for folder in FOLDERS:
        paths += sorted((HOUSE / folder).rglob("*.py"))
    return {p.relative_to(HOUSE).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def lines(name):
    return (HOUSE / name).read_text(encoding="utf-8").splitlines()


# ---- Imports -------------------------------------------------------------------------------------


def module_name(path):
    """run/flags.py -> run.flags, run/__init__.py -> run."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(path, text):
    """Yield (line, module) for each import of a file: a module, or a name in one.

    `from run import flags` gives run.flags. Imports by a string (import_module) are none that can
    be read, and count as imports of `importlib`.
    """
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            begin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*begin, node.module] if node.module else begin)
            for name in node.names:
                yield node.lineno, f"{module}.{name.name}"


def our_imports(files):
    """Yield (path, line, module of ours, or a name in one) for all imports of the files of ours."""
    ours = {module_name(path).split(".")[0] for path in files} | {*MAY_IMPORT, *ABOVE}
    for path, text in files.items():
        for line, module in imports(path, text):
            if module.split(".")[0] in ours:
                yield path, line, module


def upward_imports(files):
    """Return the imports against the direction of the house: "file:line imports MODULE"."""
    wrong = []
    for path, line, module in our_imports(files):
        room = module_name(path).split(".")[0]
        other = module.split(".")[0]
        in_own_folder = room == other and "/" in path
        if not in_own_folder and other not in MAY_IMPORT[room]:
            wrong.append(f"{path}:{line} imports {module}")
    return wrong


def circle(files):
    """Return the imports that make a circle of files, "file:line imports MODULE"; [] if none do."""
    modules = {module_name(path) for path in files}
    edges = {module: [] for module in modules}
    for path, line, module in our_imports(files):
        target = module if module in modules else module.rpartition(".")[0]
        if target in modules:
            said = f"{path}:{line} imports {target}"
            edges[module_name(path)].append((target, said))

    done = set()

    def search(module, way, said):
        """Go on from a module that was reached by this way; return the circle, if there is one."""
        if module in way:
            return said[way.index(module) :]
        if module not in done:
            for target, how in edges[module]:
                found = search(target, [*way, module], [*said, how])
                if found:
                    return found
            done.add(module)
        return []

    for module in sorted(modules):
        found = search(module, [], [])
        if found:
            return found
    return []


def test_imports_run_one_way():
    """An import against the direction of the house makes a cycle, and files that cannot be read
    from the bottom up."""
    assert upward_imports(product()) == []


def test_no_files_import_each_other_in_a_circle():
    """Two files of one folder that need each other: neither can be read first."""
    assert circle(product()) == []


def test_every_folder_has_its_floor():
    """A folder that is added beside the house, where no test looks."""
    found = {path.parent.name for path in HOUSE.glob("*/*.py")}
    assert found <= {*FOLDERS, *ABOVE}
    assert {path.name for path in HOUSE.glob("*.py")} == set(SEVEN)
    assert MAY_IMPORT.keys() == {*FOLDERS, *NAMES}


UPWARD = """
import json

def load():
    if json:
        from sample import generate
    return generate
"""


@pytest.mark.parametrize(
    "path, text, says",
    [
        ("hf/new.py", UPWARD, ["hf/new.py:6 imports sample.generate"]),
        ("model.py", "import torch, lora", ["model.py:1 imports lora"]),
        ("credit.py", "from system.errors import UserError", ["credit.py:1 imports system.errors"]),
        ("verifier/x.py", "from system import errors", ["verifier/x.py:1 imports system.errors"]),
        ("fast/x.py", "from credit import gini", ["fast/x.py:1 imports credit.gini"]),
        ("data/x.py", "if 1:\n    from run import flags", ["data/x.py:2 imports run.flags"]),
        ("run/x.py", "def f():\n def g():\n  import grpo as g", ["run/x.py:3 imports grpo"]),
        ("grpo.py", "import tests.helpers", ["grpo.py:1 imports tests.helpers"]),
        ("view/x.py", "import train\nfrom lessons import a", ["view/x.py:1", "view/x.py:2"]),
        ("view/x.py", "from . import draw\nfrom .draw import b\nimport grpo, run.flags", []),
        ("hf/x.py", "from ..sample import a", ["hf/x.py:1 imports sample.a"]),
        ("run/x.py", "import run.y\nfrom data import problems\nimport torch.nn", []),
    ],
)
def test_the_check_of_imports_finds(path, text, says):
    """A check that sees only the top of a file, only one form of an import, or only some names."""
    found = upward_imports({path: text})
    assert len(found) == len(says)
    for line, begin in zip(found, says, strict=True):
        assert line.startswith(begin)


def test_the_check_of_circles_finds():
    """A circle through a function, an __init__.py or a name of a module."""
    files = {
        "run/a.py": "import torch\nfrom run.b import x",
        "run/b.py": "def f():\n    from run import c",
        "run/c.py": "\n\nfrom .a import f",
        "run/d.py": "import run.a",
    }
    assert circle(files) == [
        "run/a.py:2 imports run.b",
        "run/b.py:2 imports run.c",
        "run/c.py:3 imports run.a",
    ]
    files["run/c.py"] = "import math"
    assert circle(files) == []


ALONE = """
import dataclasses, torch
import credit, lora, model
sizes = dict(vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=4)
rest = dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True)
config = model.Config(**sizes, **heads, **rest, qkv_bias=False, qk_norm=True)
qwen = lora.add_lora(model.Qwen3(config), 2, 4.0)
cache = model.KVCache(config, 1, 5, "cpu", torch.float32)
ids = torch.tensor([[1, 2, 3]])
hidden = qwen(ids)
assert torch.allclose(qwen(ids, cache), hidden, atol=1e-5)
logps = qwen.logits(hidden).log_softmax(-1)[0, :2].gather(1, ids.T[1:]).T
signals = credit.Signals(torch.ones(1, 2).bool(), logp=logps)
multipliers = credit.token_weights("surprisal", signals)
(multipliers * logps).sum().backward()
assert any(p.grad.any() for p in lora.lora_parameters(qwen).values())
with lora.adapter_off(qwen):
    assert torch.allclose(qwen(ids), hidden)  # B is 0
print(sorted(multipliers.shape))
"""


def test_three_files_stand_alone(tmp_path):
    """A model.py, lora.py or credit.py that runs only inside this project."""
    for name in ("model.py", "lora.py", "credit.py"):
        shutil.copy(HOUSE / name, tmp_path)
    (tmp_path / "use.py").write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "use.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[1, 2]\n"), done.stderr


# ---- Budgets -------------------------------------------------------------------------------------


def nodes_per_line(name):
    """Syntax nodes per line that is not blank: how much a reader has to take in at a time."""
    filled = [line for line in lines(name) if line.strip()]
    return sum(1 for _ in ast.walk(ast.parse("\n".join(lines(name))))) / len(filled)


def test_the_seven_files_are_short():
    """Small codebases grow until nobody reads them: a change has to pay for its lines."""
    counts = {name: len(lines(name)) for name in SEVEN}
    assert 1500 <= sum(counts.values()) <= 1770, counts
    assert max(len(line) for name in SEVEN for line in lines(name)) <= 100


@pytest.mark.parametrize("name", SEVEN)
def test_lines_are_easy(name):
    """A file that keeps its line budget by putting more into each line."""
    assert nodes_per_line(name) <= 10.0


def test_the_product_is_small():
    """Lines that only move from the seven files into a folder; a verifier whose every new reading
    adds a rule."""
    counts = {path: len(text.splitlines()) for path, text in product().items()}
    verifier = sum(n for path, n in counts.items() if path.startswith("verifier/"))
    assert sum(counts.values()) - verifier < 6091, counts
    assert verifier < 1400, counts


# ---- Systems -----------------------------------------------------------------------------------


def text_calls(text):
    """Yield (line, call) for what opens a file as text and leaves its encoding or, if it writes it,
    its line ends to the system."""
    for node in ast.walk(ast.parse(text)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        kind = name.split(".")[-1]
        if kind not in ("open", "read_text", "write_text") or name == "os.open":
            continue
        if "os.devnull" in ast.unparse(node):
            continue
        words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        mode = next((word for word in words if re.fullmatch("[rwax][b+]*", str(word))), "r")
        said = {keyword.arg for keyword in node.keywords}
        in_utf8 = "encoding" in said or "utf-8" in words
        writes = kind == "write_text" or mode[0] != "r"
        if "b" not in mode and not (in_utf8 and ("newline" in said or not writes)):
            yield node.lineno, ast.unparse(node)


def test_no_file_is_in_the_encoding_of_the_system():
    """Windows reads and writes cp1252 and ends its lines by two bytes, unless it is told."""
    wrong = []
    for path in [*HOUSE.glob("*.py"), *HOUSE.glob("*/*.py")]:
        if path.parent.name != "tests":
            found = text_calls(path.read_text(encoding="utf-8"))
            wrong += [f"{path.name}:{line} {call}" for line, call in found]
    assert wrong == []


# ---- Command lines -------------------------------------------------------------------------------


def number_flags(text):
    """Yield the names of the arguments of a script that are numbers, and `argparse` if it makes a
    parser that is none of ours."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
            kinds = [ast.unparse(k.value) for k in node.keywords if k.arg == "type"]
            if kinds in (["int"], ["float"]):
                yield node.args[0].value.lstrip("-").replace("-", "_")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
            yield "argparse"


def test_every_number_on_a_command_line_has_limits():
    """A script whose --rounds may be 0 or -1 or 10^12, because it is not train.py."""
    bounded = {name for names in LIMITS.values() for name in names.split()}
    numbers = {f.name: f.default for f in dataclasses.fields(Settings)}
    for table in (FLAGS, SAMPLE_FLAGS, EVAL_FLAGS):
        numbers |= {name: default for name, (default, _) in table.items()}
    numbers = {name for name, default in numbers.items() if type(default) in (int, float)}
    for path in HOUSE.glob("*/*.py"):
        if path.name != "links.py":  # has no numbers, and imports nothing
            numbers |= set(number_flags(path.read_text(encoding="utf-8")))
    assert numbers > {"rounds", "jobs", "seeds", "results"}
    assert numbers - bounded == set()


# ---- READMEs -------------------------------------------------------------------------------------


def there(folders):
    return [name for name in folders if (HOUSE / name).is_dir()]


@pytest.mark.parametrize("folder", there([*FOLDERS, "experiments", "bench", "examples"]))
def test_every_folder_has_a_page(folder):
    """A folder of which nobody says what it is for, or whose README is a book. (lessons/README.md
    is one: it is the lessons.)"""
    assert len(lines(f"{folder}/README.md")) <= 80


def prose(name):
    """Yield (number, line) of a Markdown file: all but code blocks and tables."""
    in_code = False
    for number, line in enumerate(lines(name), 1):
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith("|"):
            yield number, line


def test_the_readme_is_short():
    """A README that grows into a manual: what it says of a folder belongs in the folder."""
    text = lines("README.md")
    assert len(text) <= 150
    assert len(" ".join(text).split()) <= 1500
    assert [number for number, line in prose("README.md") if len(line) > 100] == []


def test_the_readme_counts_lines_truly():
    """A README whose line counts are stale misleads the reader about what there is to read."""
    table = [line for line in lines("README.md") if line.startswith("|")]
    for name in SEVEN:
        rows = [line for line in table if re.match(rf"\| *\[?`{re.escape(name)}`", line)]
        assert len(rows) == 1, f"{name} has no row of its own in the README's map"
        stated = re.search(r"\| *(\d+) *\|", rows[0])
        if stated:
            assert int(stated[1]) == len(lines(name)), name


def pages():
    """The READMEs of the root and of the product's folders."""
    return ["README.md", *(f"{folder}/README.md" for folder in FOLDERS)]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    """A link to a file that has moved, or to a heading that is gone."""
    text = "\n".join(line for _, line in prose(page)) + "\n".join(lines(page))
    for link in set(re.findall(r"\]\(([^)\s]+)\)", text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (HOUSE / page).parent / path if path else HOUSE / page
        assert target.exists(), link
        if re.fullmatch(r"L\d+(-L\d+)?", anchor):
            ends = [int(number) for number in re.findall(r"\d+", anchor)]
            assert ends[-1] <= len(target.read_text(encoding="utf-8").splitlines()), link
        elif anchor:
            text_there = target.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)", text_there, re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, link


# ---- Hostile input -------------------------------------------------------------------------------

EVALUATES = {"eval", "exec", "compile", "sympify", "parse_expr", "__import__", "import_module"}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "importlib"}


def dangerous(text):
    """Return what in a file evaluates text or reads pickles: names, with their lines."""
    found = []
    for line, module in imports("x.py", text):
        if module.split(".")[0] in PICKLES and not module.startswith("importlib.util.find_spec"):
            found.append((line, module))
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        is_plain = isinstance(node.func, ast.Name) and name in EVALUATES
        if is_plain or name in ("torch.load", "torch.save", "importlib.import_module"):
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("path", product())
def test_nothing_evaluates_text_or_pickles(path):
    """A pickle or an eval of what a model or a download says runs whatever it says."""
    assert dangerous(product()[path]) == []


def test_the_check_of_evaluation_finds():
    """A check that a renamed import, or one in a function, gets around."""
    for text in ("def f():\n import pickle as p", "eval('1')", "x = torch.load('a')", "exec(a)"):
        assert dangerous(text)
    assert not dangerous("model.eval()\nre.compile('a')\nfrom importlib.util import find_spec")
