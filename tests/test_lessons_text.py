"""The lessons: links that lead where they say, commands that exist, scripts that run."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from credit import gini

HOUSE = Path(__file__).parent.parent
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "lessons").glob("*.md"))]
CODE = [*HOUSE.glob("*.py"), HOUSE / "data/problems.py"]
LINK = re.compile(r"\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^)\s]+)\)")
GRADED = ("lessons/blank.py", "lessons/trap.py")  # they have tests of their own


def read(path):
    return path.read_text(encoding="utf-8")


def links(page):
    """(text, path, fragment) of every link of a page that leads into the project."""
    prose = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    found = [(text, *target.partition("#")[::2]) for text, target in LINK.findall(prose)]
    assert len(found) == prose.count("]("), f"a link of {page.name} is not understood"
    return [link for link in found if not link[1].startswith("http")]


def functions(path):
    """The first and last line of every function and class of a file, methods as Class.method."""
    found, tree = {}, ast.parse(read(path))
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        pairs = [(node, ""), *((x, f"{node.name}.") for x in inner)]
        for x, prefix in pairs:
            if isinstance(x, (ast.FunctionDef, ast.ClassDef)):
                first = min(y.lineno for y in (x, *x.decorator_list))
                found[prefix + x.name] = (first, x.end_lineno)
    return found


def bash(page):
    """The commands in the fenced bash blocks of a page, one a line, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_where_they_say(page):
    """Code moves: a link to lines must be to the function, or to the line of code, that it names,
    from its first line to its last, or the reader is shown something else."""
    for text, path, lines in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), (page.name, text, path)
        if not lines:
            continue
        if not path or target.suffix == ".md":  # a heading, as GitHub spells its anchor
            heads = re.findall(r"^#+ (.*)$", read(target), flags=re.MULTILINE)
            assert lines in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads]
            continue
        ends = re.fullmatch(r"L(\d+)(?:-L(\d+))?", lines)
        first, last = int(ends[1]), int(ends[2] or ends[1])
        quoted = re.fullmatch(r"`+([^`]+)`+", text)
        source = read(target).splitlines()
        assert 1 <= first <= last <= len(source), (page.name, text, lines)
        if not quoted:  # prose: tests/test_house.py knows what stands there
            continue
        name = quoted[1]
        if re.fullmatch(r"[\w.]+", name):
            assert functions(target)[name] == (first, last), (page.name, name)
        else:
            assert first == last, (page.name, text)
            assert source[first - 1].split("  #")[0].strip() == name, (page.name, lines)


def test_every_lesson_shows_its_formulas_and_has_three_questions():
    """A lesson without a link to the line, a command, or questions is a text to nod at."""
    parts = re.split(r"^## (?=\d)", read(HOUSE / "lessons/README.md"), flags=re.MULTILINE)[1:]
    assert len(parts) == 6
    for part in parts:
        assert part.count("<details><summary>") == part.count("</details>") == 3, part[:40]
        assert re.search(r"\]\(\.\./[\w/]+\.py#L\d+\)", part), part[:40]
        assert "```bash" in part and "**Open end.**" in part and "lessons/trap.py" in part
        assert "@@" not in part


def test_commands_exist():
    """A command of the lessons that names a script or a flag that is gone ends a student's day."""
    shared = "".join(read(HOUSE / f"plumbing/{name}.py") for name in ("cli", "credit_view"))
    scripts = re.compile(r"python [^-]")  # not `python -c "`, which goes on over lines
    commands = [line for page in PAGES[1:] for line in bash(page) if scripts.match(line)]
    assert len(commands) > 10
    for command in commands:
        _, script, *words = shlex.split(command)
        if script in GRADED:
            continue
        known = read(HOUSE / script) + shared + read(HOUSE / "train.py") * ("lessons" in script)
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"\b{word[2:].replace('-', '[-_]')}\b", known), command


def test_blanks_and_traps_that_the_lessons_name():
    """`lessons/blank.py NAMES` with a function that was renamed blanks nothing."""
    known = {name for path in CODE for name in functions(path)}
    text = read(HOUSE / "lessons/README.md")
    named = [
        n for names in re.findall(r"lessons/blank\.py ([\w. ]+)`", text) for n in names.split()
    ]
    named = [name for name in named if name != "NAMES..."]
    assert len(named) >= 12 and set(named) <= known, set(named) - known
    table = re.findall(r"^\| \[\d\].*\| ([\d, ]+) \|$", text, flags=re.MULTILINE)
    assert sorted(int(n) for row in table for n in row.split(",")) == list(range(1, 11))


# ---- The scripts run -----------------------------------------------------------------------------


def run(*words, cwd):
    """Run a script of the project there; returns what it printed."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, str(HOUSE / words[0]), *map(str, words[1:])]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Two steps of two problems, with a checkpoint each."""
    folder = tmp_path_factory.mktemp("lesson") / "run"
    sizes = "--steps 2 --prompts 2 --samples 4 --eval-problems 2 --eval-samples 0 --rank 2"
    flags = f"{sizes} --max-new-tokens 24 --save-every 1 --keep 3 --out {folder}"
    run("train.py", *flags.split(), cwd=folder.parent)
    return folder


def test_figures_from_a_run(tiny_run):
    """Figures that are drawn by hand once, or from numbers that nobody can make again."""
    pytest.importorskip("matplotlib")
    out = tiny_run.parent / "figures"
    words = ("--run", tiny_run, "--problems", 3, "--samples", 2, "--out", out)
    printed = run("lessons/figures.py", *words, cwd=out.parent)
    assert re.findall(r"^ +(\d+) ", printed, flags=re.MULTILINE) == ["0", "1", "2"]
    assert {path.name for path in out.iterdir()} == {"fork.png", "paid.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.iterdir())


def test_scale_and_exponent_of_a_run(tiny_run):
    """The experiments of lessons 2 and 5 read a run. At B = 0 the two paths are one, exactly; and
    at exponent 2 a rule's Gini is that of the multipliers the run kept for sharpening 2."""
    lines = run("lessons/paths.py", "--run", tiny_run, cwd=tiny_run.parent).splitlines()
    assert lines[-1].split()[:4] == ["0", "0", "0", "0.00"]
    rows = [json.loads(line) for line in read(tiny_run / "samples.jsonl").splitlines()]
    kept = [torch.tensor([x["rules"]["surprisal"][1]]) for x in rows if x["step"] > 1]
    mean = sum(gini(m, torch.ones_like(m)).item() for m in kept) / len(kept)
    printed = run("lessons/sharpen.py", "--run", tiny_run, cwd=tiny_run.parent)
    cells = next(x for x in printed.splitlines() if x.startswith("surprisal")).split()
    assert abs(float(cells[1 + 3 * 3]) - mean) < 0.006  # "0.97 / 0.03" are three words


def test_fool_and_baseline(tmp_path):
    """The real verifier must come out of the comparison without an error, and each baseline must
    give a gradient."""
    errors = run("lessons/fool.py", cwd=tmp_path).splitlines()[-1].split()
    assert int(errors[-1]) == 0 and all(int(n) > 0 for n in errors[1:-1])
    rows = run("lessons/baseline.py", "--steps", 2, cwd=tmp_path).splitlines()[-4:]
    assert [row.split()[0] for row in rows] == ["reward", "centered", "rloo", "grpo"]
    assert all(float(row.split()[1]) > 0 for row in rows)
    assert "42 seeds" in run("lessons/power.py", 93.2, 90.6, 93.6, cwd=tmp_path)
