"""The lessons: links that lead where they say, commands that exist, scripts that run."""

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from credit import gini
from lessons import blank, links

HOUSE = Path(__file__).parent.parent
LINK = re.compile(r"\[(`[^`]+`|[^\]]+)\]\(([^)\s]+)\)")
GRADED = ("lessons/blank.py", "lessons/trap.py")  # they have tests of their own


def read(path):
    return path.read_text(encoding="utf-8")


def links_of(page):
    """Return (text, path, fragment) of every link of a page that leads into the project."""
    prose = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    found = [(text, *target.partition("#")[::2]) for text, target in LINK.findall(prose)]
    assert len(found) == prose.count("]("), f"a link of {page.name} is not understood"
    return [link for link in found if not link[1].startswith("http")]


def bash(page):
    """Return the commands in a page's fenced bash blocks, one a line, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


# ---- Links ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", links.PAGES, ids=lambda page: str(page.relative_to(HOUSE)))
def test_links_lead_where_they_say(page):
    """A file, a heading or a function that is gone; a link to lines that no script keeps right."""
    for text, path, fragment in links_of(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), (page.name, text, path)
        if fragment and target.suffix == ".md":  # a heading, as GitHub spells its anchor
            heads = re.findall(r"^#+ (.*)$", read(target), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert fragment in anchors, (page.name, text, fragment)
        elif fragment:
            assert links.LINK.fullmatch(f"[{text}]({path}#{fragment})"), (page.name, text)
        elif target.suffix == ".py" and re.fullmatch(r"`\w+(\.\w+)?`", text):
            name = text.strip("`")
            assert name == target.name or links.find_lines(read(target), name), (page.name, name)


def test_links_to_lines_are_not_stale():
    """Code moves: then run `python lessons/links.py`."""
    stale = [line for page in links.PAGES for line in links.mend(page, read(page))[1]]
    assert not stale, "\n".join(stale)


CODE = """LIMIT = 3


@cached
def first(x):
    return x + 1  # not x


class Second:
    def third(self):
        return first(
            LIMIT)
"""


def test_links_are_put_right(tmp_path, monkeypatch, capsys):
    """A link that is led to a decorator's next line, another method, or is left as it was."""
    monkeypatch.setattr(links, "HOUSE", tmp_path)
    monkeypatch.setattr(links, "PAGES", [tmp_path / "a.md", tmp_path / "b.md"])
    (tmp_path / "code.py").write_text(CODE)
    right = {"LIMIT": "L1", "first": "L4-L6", "Second": "L9-L12", "Second.third": "L10-L12"}
    right["return x + 1"] = "L6"
    page = "".join(f"see [`{name}`](code.py#{lines}).\n" for name, lines in right.items())
    stale = page.replace("#L1)", "#L7-L8)").replace("L10-L12", "L2").replace("L9-L12", "L9-L11")
    (tmp_path / "a.md").write_text(stale)
    (tmp_path / "b.md").write_text("no link\n")

    def run_links(*words):
        monkeypatch.setattr(sys, "argv", ["links.py", *words])
        with pytest.raises(SystemExit) as stop:
            links.main()
        return stop.value.code, capsys.readouterr().out

    code, said = run_links("--check")
    assert code == 1 and said.count("\n") == 3 and "`Second.third` is at code.py#L10-L12" in said
    assert (tmp_path / "a.md").read_text() == stale
    assert run_links()[0] == 0 and (tmp_path / "a.md").read_text() == page
    assert run_links("--check")[0] == 0

    (tmp_path / "b.md").write_text("[`fourth`](code.py#L1) [`)`](code.py#L2) [`x`](no.py#L3)\n")
    code, said = run_links()
    assert code == 1 and said.count("mend the link by hand") == 3


# ---- Words ---------------------------------------------------------------------------------------
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
    pages = sorted((HOUSE / "lessons").glob("*.md"))
    lines = [line for page in pages for line in bash(page)]
    commands = [line for line in lines if re.match(r"python (?!-c)", line)]
    assert len(commands) > 10
    for command in commands:
        _, script, *words = shlex.split(command)
        if script in GRADED:
            continue
        if script == "-m":
            place = words.pop(0).replace(".", "/")
            script = f"{place}/__main__.py" if (HOUSE / place).is_dir() else f"{place}.py"
        known = read(HOUSE / script) + read(HOUSE / "run/flags.py")
        if script == "lessons/fool.py":  # takes those of train.py
            known += read(HOUSE / "train.py")
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"\b{word[2:].replace('-', '[-_]')}\b", known), command


def test_flags_in_prose_exist():
    """A flag that was renamed, outside of the commands."""
    known = (
        read(HOUSE / "train.py") + read(HOUSE / "eval_math.py") + read(HOUSE / "lessons/blank.py")
    )
    for page in sorted((HOUSE / "lessons").glob("*.md")):
        for flag in re.findall(r"`[^`\n]*?--([a-z-]+)[^`\n]*`", read(page)):
            if flag not in ("train", "run"):  # of lessons/fool.py and figures.py
                assert re.search(rf"\b{flag.replace('-', '[-_]')}\b", known), (page.name, flag)


def test_blanks_and_traps_that_the_lessons_name():
    """`lessons/blank.py NAMES` with a function that was renamed blanks nothing."""
    text = read(HOUSE / "lessons/README.md")
    commands = re.findall(r"lessons/blank\.py ([\w. ]+)`", text)
    named = {name for names in commands for name in names.split()} - {"NAMES..."}
    assert len(named) >= 12 and named <= blank.functions().keys(), named
    rows = re.findall(r"^\| \[\d\].*\| ([^|]*) \| ([\d, ]+) \|$", text, flags=re.MULTILINE)
    assert {name for cell, _ in rows for name in re.findall(r"`(.*?)`", cell)} <= (
        blank.EXERCISES.keys()
    )
    traps = [int(number) for _, cell in rows for number in cell.split(",")]
    assert sorted(traps) == list(range(1, 11))


# ---- The scripts run -----------------------------------------------------------------------------
@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script of lessons/ in this process, elsewhere than in the project; return what it
    printed."""
    monkeypatch.chdir(tmp_path)

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        import_module(f"lessons.{name}").main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Make a run of two steps of two problems, with a checkpoint each."""
    import train

    folder = tmp_path_factory.mktemp("lesson") / "run"
    sizes = "--steps 2 --prompts 2 --samples 4 --eval-problems 2 --eval-samples 0 --rank 2"
    flags = f"{sizes} --max-new-tokens 24 --save-every 1 --keep-checkpoints 3 --out {folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags.split()])
        train.main()
    return folder


def test_figures_from_a_run(run, tiny_run, tmp_path):
    """Figures that are drawn by hand once, or from numbers that nobody can make again."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    printed = run("figures", "--run", tiny_run, "--problems", 3, "--samples", 2, "--out", out)
    assert re.findall(r"^ +(\d+) ", printed, flags=re.MULTILINE) == ["0", "1", "2"]
    assert {path.name for path in out.iterdir()} == {"fork.png", "paid.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.iterdir())


def test_scale_and_exponent_of_a_run(run, tiny_run):
    """The experiments of lessons 2 and 5 read a run. At B = 0 the two paths are one, exactly; and
    at exponent 2 a rule's Gini is that of the multipliers the run kept for sharpening 2."""
    lines = run("paths", "--run", tiny_run).splitlines()
    assert lines[-1].split()[:4] == ["0", "0", "0", "0.00"]
    rows = [json.loads(line) for line in read(tiny_run / "samples.jsonl").splitlines()]
    kept = [torch.tensor([row["rules"]["surprisal"][1]]) for row in rows if row["step"] > 1]
    mean = sum(gini(m, torch.ones_like(m)).item() for m in kept) / len(kept)
    printed = run("sharpen", "--run", tiny_run)
    cells = next(line for line in printed.splitlines() if line.startswith("surprisal")).split()
    assert abs(float(cells[1 + 3 * 3]) - mean) < 0.006  # "0.97 / 0.03" are three words


def test_fool_by_hand(run):
    """The real verifier must come out of the comparison without an error, and no other grader."""
    errors = run("fool").splitlines()[-1].split()
    assert int(errors[-1]) == 0 and all(int(n) > 0 for n in errors[1:-1])


def test_fool_on_a_model(run, tmp_path):
    """A grader whose payments are counted as refusals, or guesses as what was worked out."""
    said = [("Clearly $\\boxed{3}$", "3"), ("Clearly 12 and $\\boxed{13}$", "12")]
    said += [("1+1=2, $\\boxed{2}$.", "2"), ("$\\boxed{\\frac{2}{4}}$", "\\frac{1}{2}")]
    rows = [json.dumps(dict(completion=text, gold=gold)) for text, gold in said]
    (tmp_path / "answers.jsonl").write_text("\n".join(rows))
    lines = run("fool", "answers.jsonl").splitlines()
    assert lines[0] == "2 guessed, 1 right" and lines[4] == "2 worked out, 2 right"
    assert lines[1].endswith("pays 1 wrong ones, refuses 0 right ones")  # substring
    assert lines[6].endswith("pays 0 wrong ones, refuses 1 right ones")  # string


def test_fool_trains_on_another_reward(run, monkeypatch):
    """`--train` that changes nothing, or that changes the evaluation as well."""
    import eval_math
    import grpo
    import train

    monkeypatch.setattr(grpo, "verify", grpo.verify)  # put back after the test
    seen = []
    monkeypatch.setattr(train, "main", lambda: seen.append((sys.argv[1:], grpo.verify)))
    run("fool", "--train", "shows_work", "--steps", 1)
    [(words, reward)] = seen
    assert words == ["--steps", "1"] and reward("1=2", "7") and not reward("7", "7")
    assert eval_math.verify("$\\boxed{7}$", "7") and not eval_math.verify("1=2", "7")


def test_baselines(run, monkeypatch):
    """Each baseline must give a gradient."""
    baseline = import_module("lessons.baseline")
    monkeypatch.setattr(baseline, "Settings", partial(baseline.Settings, prompts=4, samples=4))
    rows = run("baseline", "--steps", 2).splitlines()[-4:]
    assert [row.split()[0] for row in rows] == ["reward", "centered", "rloo", "grpo"]
    assert all(float(row.split()[1]) > 0 for row in rows)


def test_cache_and_power(run, monkeypatch):
    """The cache must change nothing; and the 1-point line is the one that the text quotes."""
    cache = import_module("lessons.cache")
    monkeypatch.setattr(cache, "LENGTHS", (8, 16))
    rows = run("cache").splitlines()[-2:]
    assert [int(row.split()[0]) for row in rows] == [8, 16]
    assert all(float(row.split()[-1]) < 1e-3 for row in rows)
    assert "42 seeds" in run("power", 93.2, 90.6, 93.6)


def test_a_script_alone():
    """A script that runs only where the project is installed, or from another one."""
    command = [sys.executable, "lessons/links.py", "--help"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0 and "--check" in done.stdout
    for path in (HOUSE / "lessons").glob("*.py"):
        if path.stem not in ("links", "power"):  # which import nothing of ours
            assert "sys.path.insert(0, str(Path(__file__)" in read(path), path.name
