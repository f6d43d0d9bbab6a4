"""The house rules: a line budget, imports that run one way, a README that tells the truth."""

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
CORE = ["model.py", "lora.py", "sample.py", "eval_math.py", "credit.py", "grpo.py", "train.py"]
SUPPORT = [f"{p.parent.name}/{p.name}" for p in HOUSE.glob("*/*.py")]
SUPPORT = [name for name in SUPPORT if name.startswith(("plumbing/", "verifier/"))]
LAYERS = {"model": 0, "lora": 1, "sample": 2, "eval_math": 3, "credit": 2, "grpo": 4, "train": 5}


def lines(name):
    return (HOUSE / name).read_text(encoding="utf-8").splitlines()


def test_line_budget():
    """Small codebases grow until nobody reads them: a change has to pay for its lines."""
    counts = {name: len(lines(name)) for name in CORE}
    assert max(counts.values()) < 350, counts
    assert sum(counts.values()) < 1700, counts
    assert max(len(line) for name in CORE for line in lines(name)) <= 100


def test_readme_line_counts():
    """A README whose line counts are stale misleads the reader about what there is to read."""
    readme = "\n".join(lines("README.md"))
    for name in CORE:
        stated = re.search(rf"`{re.escape(name)}`[^\n]*?\| *(\d+) *\|", readme)
        assert stated, f"{name} has no line count in the README's map"
        assert int(stated[1]) == len(lines(name)), name
    for folder in ("verifier", "plumbing"):
        stated = re.search(rf"`{folder}/`[^\n]*?\| *(\d+) *\|", readme)
        assert int(stated[1]) == sum(len(lines(x)) for x in SUPPORT if x.startswith(folder)), folder


@pytest.mark.parametrize("name", CORE)
def test_imports_run_one_way(name):
    """An import against the direction of the house makes a cycle, and files that cannot be read
    from the bottom up."""
    tree = ast.parse((HOUSE / name).read_text(encoding="utf-8"))
    imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    mine = LAYERS[name.removesuffix(".py")]
    assert all(LAYERS[module] < mine for module in imported if module in LAYERS)


@pytest.mark.parametrize("name", [*CORE, "data/problems.py", *SUPPORT])
def test_nothing_evaluates_text_or_pickles(name):
    """A pickle or an eval of what a model or a download says runs whatever it says."""
    tree = ast.parse((HOUSE / name).read_text(encoding="utf-8"))
    called = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = {f.id for f in called if isinstance(f, ast.Name)}
    attributes = {ast.unparse(f) for f in called if isinstance(f, ast.Attribute)}
    assert not names & {"eval", "exec", "sympify", "parse_expr", "compile", "__import__"}
    assert not attributes & {"torch.load", "torch.save", "pickle.load", "pickle.loads"}


def test_readme_links_point_at_the_formula():
    """The README sends the reader to the lines that are ARCA; they must still be there."""
    readme = "\n".join(lines("README.md"))
    links = re.findall(r"\((\w+\.py)#L(\d+)(?:-L(\d+))?\)", readme)
    assert links
    targets = ["\n".join(lines(f)[int(a) - 1 : int(b or a)]) for f, a, b in links]
    assert any("||h_adapted - h_base||_2" in target for target in targets)
    assert all(target.strip() for target in targets)
