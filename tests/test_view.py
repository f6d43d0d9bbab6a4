"""`python -m view`: its numbers against definitions, unfinished runs, hostile text, a browser."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from credit import METHODS
from system import processes
from system.errors import run_cli
from view import __main__ as view
from view import curves, picture

ROOT = Path(__file__).parent.parent
SCRIPT = "</script><script>document.title='x'</script><!--"
HOSTILE = [SCRIPT, "\x1b[2J\x1b]0;owned\x07", "\u2028\u202e", "\ud800", " a\n", "\x9b31m", "<end>"]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def sample(tokens, weights, step=1, reward=1.0, problem="What is $3+4$?"):
    """A sample of two rules, as a run keeps it: uniform, and arca with these weights at 1 and 2."""
    flat, zeros = [1.0] * len(tokens), [0.0] * len(tokens)
    x = dict(step=step, problem=problem, gold="7", text="".join(tokens[:-1]), tokens=tokens)
    x |= dict(reward=reward, credit="arca", advantage=reward - 0.5)
    x |= dict(logp=zeros, entropy=zeros, residual=zeros)
    return x | dict(rules=dict(uniform=[flat, flat], arca=weights))


def ordinary():
    """A right and a wrong completion of steps 1 and 11; Gini by hand below."""
    tokens = ["The", " answer", " 7", "<end>"]
    flat = [[1.0] * 4, [1.0] * 4]
    weights = [[0.0, 0.5, 0.5, 3.0], [0.0, 0.0, 0.0, 4.0]]
    rows = [sample(tokens, flat, 1, reward) for reward in (1.0, 0.0)]
    rows += [sample(tokens, weights, 11, reward) for reward in (1.0, 0.0)]
    return json.loads(json.dumps(rows))  # which share nothing


def write(folder, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def call(monkeypatch, capsys, *flags, terminal=False, matplotlib=False):
    """(exit code, stdout, stderr) of python -m view."""
    monkeypatch.setattr(sys, "argv", ["view", *map(str, flags)])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(picture, "find_spec", lambda name: matplotlib or None)  # slow to import
    code = 0
    try:
        run_cli(view.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def embedded(folder):
    """The data in the page."""
    text = (folder / "view.html").read_text(encoding="utf-8")
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


def credit(folder):
    """What the page shows of the first run's samples."""
    return embedded(folder)["credits"][0]


def step_row(step, reward, **more):
    """A row of metrics.jsonl: 32 tokens for 4 completions, a quarter of the time in the rollout."""
    row = dict(
        step=step, reward=reward, entropy=0.5, truncated=0.25, completion_tokens=32, gini=0.5
    )
    row |= dict(effective_token_ratio=0.75, groups_mixed=1, skipped=0, tokens_per_second=8.0)
    return row | dict(seconds_rollout=1.0, seconds_update=3.0) | more


def eval_row(step, greedy):
    """A row of evals.jsonl, with an interval of a tenth to both sides."""
    band = [round(greedy - 0.1, 3), round(greedy + 0.1, 3)]
    return {
        "step": step,
        "greedy": greedy,
        "pass@1": 0.5,
        "greedy_95": band,
        "pass@1_95": [0.4, 0.6],
    }


def make_run(folder, rewards=(), evals=(), **settings):
    """A run with these rewards at step 1, 2, ...; evaluated at the steps of evals."""
    folder.mkdir(parents=True)
    config = dict(credit="arca", seed=1, steps=3, prompts=2, samples=2, out=str(folder)) | settings
    digests = dict(model="a1", data="b2")
    (folder / "config.json").write_text(json.dumps(dict(settings=config, digests=digests)))
    rows = [step_row(step, reward) for step, reward in enumerate(rewards, 1)]
    evals = [eval_row(step, rate) for step, rate in dict(evals).items()]
    for name, found in (("metrics.jsonl", rows), ("evals.jsonl", evals)):
        if found:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def bare(text):
    """Without the colours that the view itself writes."""
    return re.sub(r"\x1b\[(48;5;\d+;38;5;\d+|0)m", "", text)


def defined(w):
    """Gini over all pairs of tokens, and the effective-token ratio, from their definitions."""
    n, total = len(w), sum(w)
    gini = sum(abs(a - b) for a in w for b in w) / (2 * n * total) if total else 0.0
    return gini, total**2 / (n * sum(x * x for x in w)) if total else 0.0


# ---- Numbers -------------------------------------------------------------------------------------


def test_screen_shows_weights_by_shade(monkeypatch, capsys, tmp_path):
    """A view of the wrong step or sharpening; or one in which more credit is lighter."""
    write(tmp_path, ordinary())
    code, out, err = call(monkeypatch, capsys, tmp_path, "--out", tmp_path, terminal=True)
    assert (code, err) == (0, "")
    assert re.findall(r"^step (\d+): ", out, re.M) == ["11"]  # the newest
    # Gini of (0, .5, .5, 3): ((2*2-5) .5 + (2*3-5) .5 + (2*4-5) 3) / (4 * 4) = 9/16; the effective
    # ratio 4^2 / (4 (.25 + .25 + 9)) = .42
    rows = [line for line in bare(out).splitlines() if line.startswith("arca  ")]
    assert rows == [f"{'arca':17}  0.56  0.42  The answer 7<end>"] * 2
    last = [line for line in out.splitlines() if line.startswith("arca  ")][-1]
    grey = [int(shade) for shade in re.findall(r"48;5;(\d+)", last)]
    assert len(grey) == 4 and grey[0] > grey[1] == grey[2] > grey[3] >= 232
    out = call(monkeypatch, capsys, tmp_path, "--out", tmp_path, "--sharpening", 2)[1]
    assert f'{"arca":17}  0.75  0.25  4.00 "<end>"  0.00' in out  # one-hot: 3/4 and 1/4
    lines = out.replace(str(tmp_path), "").splitlines()
    assert "\x1b" not in out and max(map(len, lines)) <= 80


def test_page_holds_the_numbers(monkeypatch, capsys, tmp_path):
    """Means over the wrong completions, sharpening 1 and 2 confused, a correlation with a constant
    rule that passes for one of zero."""
    rows = ordinary()
    rows[3]["rules"]["arca"][0] = [4.0, 0.0, 0.0, 0.0]
    call(monkeypatch, capsys, write(tmp_path, rows), "--out", tmp_path)
    data = credit(tmp_path) | dict(classes=embedded(tmp_path)["classes"])
    assert data["own"] == "arca" and [g["step"] for g in data["groups"]] == [1, 11]
    first, last = data["groups"]
    assert first["gini"] == [[0, 0], [0, 0]] and first["ratio"] == [[1, 1], [1, 1]]
    assert first["correlation"][0] == [[None, None], [None, None]]
    assert last["gini"][0][1] == pytest.approx((9 / 16 + 3 / 4) / 2, abs=1e-4)
    assert last["gini"][1][1] == 0.75 and last["ratio"][1][1] == 0.25
    assert last["correlation"][0] == [[None, None], [None, 1]]
    # At 1: 4 tokens, all of the credit on the word "The", or 3 of 4 on <end>, 1 on the others.
    shares = dict(zip(data["classes"], last["classes"][0][1], strict=True))
    assert shares["eos"] == pytest.approx(3 / 8) and shares["digits"] == pytest.approx(1 / 16)
    assert shares["words"] == pytest.approx((1 + 1 / 8) / 2, abs=1e-4)


def test_numbers_that_are_not_finite_are_null(monkeypatch, capsys, tmp_path):
    """A run with steps that were skipped has nulls, which ended the view in a TypeError; NaN on the
    page is no JSON."""
    rows = ordinary()
    for row in rows[2:]:
        row["rules"]["arca"] = [[None] * 4, [None, 1.0, 1.0, 1.0]]
        row |= dict(logp=[None] * 4, entropy=[None] * 4)
    code, out, err = call(monkeypatch, capsys, write(tmp_path, rows), "--out", tmp_path)
    assert (code, err) == (0, "") and f"{'arca':17}   nan   nan" in bare(out)
    last = credit(tmp_path)["groups"][-1]
    assert last["gini"][0] == [0, None]
    assert last["completions"][0]["weights"][0][1] == last["completions"][0]["logp"] == [None] * 4


def test_rules_that_not_all_samples_have_are_left_out(monkeypatch, capsys, tmp_path):
    """A run resumed after a rule was added to METHODS would end in a KeyError."""
    rows = ordinary()
    rows[3]["rules"]["newer"] = rows[3]["rules"]["arca"]
    assert call(monkeypatch, capsys, write(tmp_path, rows), "--out", tmp_path)[0] == 0
    assert [rule["name"] for rule in credit(tmp_path)["rules"]] == ["uniform", "arca"]


def test_what_a_run_has_kept(monkeypatch, capsys, tmp_path):
    """A view whose numbers are of other completions than it shows, that leaves rules out, or that
    takes rounding for credit at step 1, where LoRA's B is still 0."""
    run, out = tmp_path / "run", tmp_path / "shown"
    flags = "--steps 1 --prompts 1 --samples 2 --max-new-tokens 40 --eval-problems 2 --seed 3"
    monkeypatch.setattr(
        sys, "argv", ["train.py", *flags.split(), "--eval-samples", "0", "--out", str(run)]
    )
    train.main()
    capsys.readouterr()
    code, shown, err = call(monkeypatch, capsys, run, "--out", out)
    assert (code, err) == (0, "") and str(out / "view.html") in shown
    data = credit(out)
    assert [rule["name"] for rule in data["rules"]] == list(METHODS)
    assert all(rule["formula"] for rule in data["rules"])
    (group,) = data["groups"]
    assert 1 <= len(group["completions"]) <= 2
    for c in group["completions"]:
        for p in (0, 1):
            for r, name in enumerate(METHODS):
                w = c["weights"][p][r]
                assert len(w) == len(c["tokens"]) == len(c["logp"])
                G, ratio = defined(w)
                assert c["gini"][p][r] == pytest.approx(G, abs=2e-4), name
                assert c["ratio"][p][r] == pytest.approx(ratio, abs=2e-4), name
        surprisal = [len(c["logp"]) * x / sum(c["logp"]) for x in c["logp"]]
        assert c["weights"][0][1] == pytest.approx(surprisal, rel=0.02, abs=0.02)
        arca = list(METHODS).index("arca")
        assert set(c["weights"][0][arca]) == {1.0} and not any(c["residual"])


# ---- Learning curves -----------------------------------------------------------------------------


def two_rules(folder):
    """A sweep: two seeds of arca, one of uniform with a step that was skipped, and the folder of a
    base model, which was not trained."""
    make_run(folder / "a1", [0.1, 0.2, 0.6], {0: 0.4, 3: 0.6})
    moved = dict(model="/elsewhere", data="other.jsonl", save_every=5)
    make_run(folder / "a2", [0.3, 0.4], {0: 0.5}, seed=2, chat=False, **moved)
    make_run(folder / "u1", [0.5, None, 0.7], {0: 0.4, 3: 0.8}, credit="uniform")
    (folder / "base").mkdir()
    (folder / "base" / "answers.jsonl").write_text("{}\n")
    return folder


def test_lines_are_the_runs(monkeypatch, capsys, tmp_path):
    """A mean over other runs than those that differ in their seed alone, a band of something else,
    a null that becomes 0 or moves the steps after it; a share of the wrong time."""
    sweep, out = two_rules(tmp_path / "sweep"), tmp_path / "shown"
    code, said, err = call(monkeypatch, capsys, sweep, sweep / "a1", "--out", out)
    assert (code, err) == (0, "")
    page = embedded(out)["curves"]
    arca, uniform = page["lines"]
    assert [(x["label"], x["seeds"]) for x in page["lines"]] == [("arca", 2), ("uniform", 1)]
    nothing = [None] * 3
    assert arca["curves"]["reward"] == {
        "x": [1, 2, 3], "mean": [0.2, 0.3, 0.6], "low": [0.1, 0.2, 0.6], "high": [0.3, 0.4, 0.6]
    }  # fmt: skip
    assert uniform["curves"]["reward"]["mean"] == [0.5, None, 0.7]
    assert uniform["curves"]["reward"]["low"] == nothing
    greedy = [line["curves"]["greedy"] for line in (arca, uniform)]
    assert greedy[0] == {"x": [0, 3], "mean": [0.45, 0.6], "low": [0.4, 0.6], "high": [0.5, 0.6]}
    assert greedy[1] == {"x": [0, 3], "mean": [0.4, 0.8], "low": [0.3, 0.7], "high": [0.5, 0.9]}
    assert {key: uniform["curves"][key]["mean"][0] for key in curves.PANELS} == {
        "reward": 0.5, "entropy": 0.5, "length": 8, "truncated": 0.25, "gini": 0.5,
        "effective_token_ratio": 0.75, "seconds_rollout": 1, "seconds_update": 3,
        "tokens_per_second": 8,
    }  # fmt: skip
    assert [row["steps"] for row in page["table"]] == [
        "3 of 3 steps",
        "2 of 3 steps",
        "3 of 3 steps",
    ]
    assert page["table"][0]["held-out greedy"] == "40.0 % [30.0, 50.0] → 60.0 % [50.0, 70.0]"
    # The screen, where no terminal is.
    for words in (
        "arca: a1, a2 (mean of 2 runs",
        "3 of 3 steps, 2 of 3 steps",
        "45.0 % [40.0, 50.0]",
        "40.0 % [30.0, 50.0]",
        "25 % of the time in rollouts",
        "no picture",
        "pip install",
    ):
        assert words in said
    assert re.search(r"^reward, 5 steps +0.600 +0.600$", said, re.M)  # uniform's, without the null
    assert max(map(len, said.replace(str(out), "").splitlines())) <= 80 and "\x1b" not in said


def test_what_has_not_happened_yet(monkeypatch, capsys, tmp_path):
    """A traceback on a run that goes on or was killed: it holds its lock, has only been evaluated,
    or has nothing but settings, a line is half written; or it is never evaluated."""
    begun = make_run(tmp_path / "begun")
    looked = make_run(tmp_path / "looked", evals={0: 0.5})
    never = make_run(tmp_path / "never", [0.5, 0.5], prompts=None)
    killed = make_run(tmp_path / "killed", [0.25, 0.75], {0: 0.5})
    for name, text in (("metrics.jsonl", '{"step": 3, "rew'), ("samples.jsonl", '{"step": 1, "')):
        with open(killed / name, "a") as file:
            file.write(text)
    processes.hold(killed)
    for number, folder in enumerate((begun, looked, never, killed, tmp_path)):
        out = tmp_path.with_name(f"{tmp_path.name}-{number}")
        code, said, err = call(monkeypatch, capsys, folder, "--out", out)
        assert (code, err) == (0, "") and "no completions are kept yet" in said
        page = embedded(out)
        assert page["credits"] == [] and len(page["curves"]["table"]) == (1, 1, 1, 1, 4)[number]
    said = call(monkeypatch, capsys, killed, "--out", out)[1]
    assert "2 of 3 steps" in said and "train reward of steps 1 to 2" in said
    assert embedded(out)["curves"]["lines"][0]["curves"]["reward"]["mean"] == [0.25, 0.75]


def test_many_lines_and_many_steps(tmp_path, monkeypatch, capsys):
    """A legend of 22 lines, or of eleven rules; a rule that has another colour beside other rules;
    a page as large as the run is long, of steps or of samples."""
    for rank in range(1, 13):
        make_run(tmp_path / "many" / f"a{rank}", [0.5], rank=rank)
    others = sorted(["mine", "uniform", "delta", "eapo", "forking", "gcpo", "random", "divergence",
                     "permuted", "surprisal"])  # fmt: skip
    for rule in others:
        make_run(tmp_path / "many" / rule, [0.5], credit=rule)
    runs = [curves.read_run(folder) for folder in curves.find_runs([tmp_path / "many"])]
    lines, every = curves.make_lines(runs)
    found = dict(curves.choices(lines))
    firsts = ["first lines of the rules 1 to 10", "first lines of the rules 11 to 11"]
    alone = [f"{rule} 1 to 1" for rule in others]
    assert list(found) == [*firsts, "arca 1 to 10", "arca 11 to 12", *alone]
    assert sorted(i for members in list(found.values())[2:] for i in members) == list(range(22))
    for members in found.values():  # colour and dashes tell them apart
        assert len({(lines[i]["colour"], lines[i]["style"]) for i in members}) == len(members) <= 10
    alone = curves.make_lines([run for run in runs if run["name"] == "uniform"])[0]
    (beside,) = [line for line in lines if line["rule"] == "uniform"]
    assert alone[0]["colour"] == beside["colour"] and every == 1

    long = make_run(tmp_path / "long", [step / 1000 for step in range(1, 1001)], steps=1000)
    write(long, [row | dict(step=step) for step in range(1, 1001) for row in ordinary()[:2]])
    call(monkeypatch, capsys, long, "--out", tmp_path)
    page = embedded(tmp_path)
    reward = page["curves"]["lines"][0]["curves"]["reward"]
    assert page["curves"]["every"] == 5 and len(reward["x"]) == 200
    assert (reward["x"][0], reward["mean"][0]) == (3, 0.003)  # of steps 1 to 5
    shown = [group["step"] for group in page["credits"][0]["groups"]]
    assert shown[0] == 1 and shown[-1] == 1000 and len(shown) <= 101


def test_picture(monkeypatch, capsys, tmp_path):
    """Dollar signs that matplotlib takes for formulas and cannot parse, in names of runs; a
    run without a step."""
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "_$x_$", [0.5, 0.6, None], {0: 0.5}, credit="_$\\frac{")
    make_run(tmp_path / "begun")
    flags = (tmp_path, "--out", tmp_path)
    code, said, err = call(monkeypatch, capsys, *flags, matplotlib=True)
    assert (code, err) == (0, "") and f"picture: {tmp_path / 'view.png'}" in said
    assert (tmp_path / "view.png").read_bytes()[:4] == b"\x89PNG"


# ---- Hostile text, damaged files -----------------------------------------------------------------


def hostile(folder):
    weights = [[1.0] * 6 + [1.0], [0.5] * 6 + [4.0]]
    return write(folder, [sample(HOSTILE, weights, problem=SCRIPT + "\x1b[2J") for _ in range(2)])


def test_screen_never_emits_what_a_model_wrote_to_steer_it(monkeypatch, capsys, tmp_path):
    """ESC and C1 sequences clear the screen or rename the window; a lone surrogate ends in a
    UnicodeEncodeError."""
    hostile(tmp_path)
    code, out, err = call(monkeypatch, capsys, tmp_path, "--out", tmp_path, terminal=True)
    assert (code, err) == (0, "")
    rest = set(bare(out)) - {"\n"}
    assert not {c for c in rest if ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u202e\ud800"}
    assert "�[2J�]0;owned�" in bare(out).replace("\n" + " " * 31, "") and " a↵" in bare(out)
    # The same in what else a shared run says: its name, its settings, the names of its rates.
    named = make_run(tmp_path / "\x1b[2J$\\frac{", [0.5], {0: 0.5}, credit=SCRIPT + "\x1b[31m")
    make_run(tmp_path / "other", [0.5], {0: 0.5}, steps="\x1b[2J", model="\x1b[2J\u202e</script>")
    with open(named / "evals.jsonl", "a") as file:
        file.write(json.dumps(eval_row(1, 0.5) | {"\x1b[2J": 0.5, "\x1b[2J_95": [0.1, 0.9]}) + "\n")
    code, out, err = call(monkeypatch, capsys, named, tmp_path / "other", "--out", tmp_path)
    assert (code, err) == (0, "") and not set(out) & set("\x1b\u202e") and len(out) > 500
    assert not set((tmp_path / "view.html").read_text()) & set("\x1b\u202e")


def test_page_escapes_what_a_model_wrote(monkeypatch, capsys, tmp_path):
    """A token that ends the script it is embedded in, and runs as another."""
    call(monkeypatch, capsys, hostile(tmp_path), "--out", tmp_path)
    text = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert "document.title='x'" in text  # it is there, but neither of these is
    template = (ROOT / "view" / "page.html").read_text(encoding="utf-8")
    for mark in ("<script", "</script", "<!--"):
        assert text.count(mark) == template.count(mark)
    assert not set(text) & set("\u2028\u2029\x1b\x9b")
    assert credit(tmp_path)["groups"][0]["completions"][0]["tokens"][0] == SCRIPT


def test_page_asks_for_nothing_from_outside():
    """A font or script from elsewhere: broken without a network, and it tells who looks."""
    files = [*(ROOT / "view").glob("*.html"), *(ROOT / "view").glob("*.js")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    links = set(re.findall(r"https?://[^\"' )]*", text)) - {"http://www.w3.org/2000/svg"}  # a name
    assert not links
    assert not re.findall(r"\b(?:src|href|action)\s*=|@import|url\(|fetch\(|innerHTML", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("", "", "no run"),
        ("samples.jsonl", "", "no run"),
        ("config.json", '{"model_type": "qwen3"}', "no run"),
        ("config.json", '{"settings": 1}', "config.json"),
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl, line 1"),
        ("samples.jsonl", "{torn\n{}\n", "samples.jsonl, line 1"),
        ("metrics.jsonl", json.dumps(step_row(1, 0.5)) + "\n{}\n", "metrics.jsonl, line 2"),
        ("metrics.jsonl", json.dumps(step_row(1, 0.5, entropy="x")) + "\n", "line 1"),
        ("evals.jsonl", json.dumps(eval_row(0, 3.0)) + "\n", "evals.jsonl, line 1"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(monkeypatch, capsys, tmp_path, name, text, says):
    """A traceback, or exit code 0, where a user has mistyped a folder or a file is damaged."""
    if name:
        (tmp_path / name).write_text(text)
    whole = make_run(tmp_path.with_name(f"{tmp_path.name}-whole"), [0.5])
    code, _, err = call(monkeypatch, capsys, whole, tmp_path, "--out", tmp_path / "shown")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "shown").exists()


def test_a_sharpening_that_is_not_kept(monkeypatch, capsys, tmp_path):
    """A traceback from deep inside."""
    code, _, err = call(monkeypatch, capsys, write(tmp_path, ordinary()), "--sharpening", 3)
    assert code == 2 and err.count("\n") == 1 and "--sharpening" in err


def test_figure(monkeypatch, tmp_path):
    """Dollar signs that matplotlib takes for formulas and cannot parse, signs that its font lacks,
    a completion too long for one row of tokens."""
    pytest.importorskip("matplotlib")
    from view import credit_figure

    tokens = ["$\\frac$", "}$", "_^", "\n", "汉", "x" * 30]
    problem = "$\\frac{$ $x_$?"
    right = sample(tokens * 50, [[1.0] * 300, [0.5] * 299 + [150.5]], problem=problem)
    wrong = sample(tokens, [[1.0] * 6] * 2, reward=0.0, problem=problem)
    folder, png = write(tmp_path, [right, wrong]), tmp_path / "credit.png"
    monkeypatch.setattr(sys, "argv", ["credit_figure.py", str(folder), "--out", str(png)])
    credit_figure.main()
    size = png.read_bytes()[16:24]  # of a PNG: two big-endian integers
    wide, high = int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")
    assert wide == 1800 and 14 < high / 200 < 15  # inches: five heat maps, four of the long one


# ---- The page in a browser -----------------------------------------------------------------------

WATCH = """<script>
window.addEventListener("error", (e) => { document.documentElement.dataset.error = e.message; });
document.addEventListener("securitypolicyviolation", (e) => {
  document.documentElement.dataset.error = e.blockedURI; });
console.error = (text) => { document.documentElement.dataset.error = text; };
</script>"""
PRESS = """<script>
const set = document.documentElement.dataset;
const key = (name) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
// The keyboard: a curve's steps, a line of the legend, tokens.
const chart = document.querySelector(".chart[data-key=reward]");
chart.focus();
for (const name of ["Home", "ArrowRight"]) key(name);
set.step = chart.getAttribute("aria-valuetext");
set.pointed = document.getElementById("pointed").textContent;
set.outline = getComputedStyle(chart).outlineStyle;
const tab = document.querySelector("#rules [tabindex='0']");
tab.focus();
for (const name of ["Home", "ArrowUp", "ArrowRight", "ArrowRight"]) key(name);
set.focus = document.activeElement.dataset.at;
set.stops = document.querySelectorAll("#rules [tabindex='0']").length;
</script>"""
LOOK = """<script>{
// The least contrast of a text with what is behind it, and of a curve; how much is too wide.
const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
function luminance(colour) {
  const part = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = numbers(colour).map((v) => part(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
}
function behind(node) {
  const colour = getComputedStyle(node).backgroundColor;
  return numbers(colour)[3] === 0 ? behind(node.parentElement) : colour;
}
function contrast(node, colour) {
  const [a, b] = [luminance(colour), luminance(behind(node))];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}
let text = 99, drawn = 99, worst = "";
for (const node of document.body.querySelectorAll("*")) {
  const isText = (child) => child.nodeType === 3 && child.textContent.trim();
  const says = [...node.childNodes].some(isText);
  if (!node.getClientRects().length || ["SCRIPT", "OPTION"].includes(node.tagName)) continue;
  const style = getComputedStyle(node);
  if (says) {
    const found = contrast(node, node instanceof SVGElement ? style.fill : style.color);
    if (found < text) { text = found; worst = node.outerHTML.slice(0, 200); }
  }
  if (node.classList.contains("curve")) drawn = Math.min(drawn, contrast(node, style.stroke));
}
const wide = document.documentElement.scrollWidth - innerWidth;
const page = getComputedStyle(document.body).backgroundColor;
Object.assign(document.documentElement.dataset, { text, drawn, worst, page, wide });
}</script>"""


def opened(folder, hash="", after="", *flags):
    """The page's document as headless Chromium has it after its script ran, with any error."""
    path, copied = folder / "view.html", folder / "watched.html"
    text = path.read_text(encoding="utf-8").replace("<head>", "<head>" + WATCH, 1)
    head, tail = text.rsplit("</body>", 1)
    copied.write_text(head + after + "</body>" + tail, encoding="utf-8")
    flags += (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    )
    flags += ("--dump-dom", "--virtual-time-budget=2000")
    command = [BROWSER, *flags, f"{copied.as_uri()}#{hash}"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=90).stdout


needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here")


@needs_browser
def test_page_in_a_browser(monkeypatch, capsys, tmp_path):
    """A page that stops with an error, shows other numbers than were computed, or cannot be used
    without a mouse."""
    two_rules(tmp_path / "sweep")
    write(tmp_path / "sweep" / "a1", ordinary())
    write(tmp_path / "sweep" / "u1", ordinary()[:2])
    call(monkeypatch, capsys, tmp_path / "sweep", "--out", tmp_path)
    dom = opened(tmp_path, "", PRESS + LOOK, "--window-size=1100,800", light_or_dark(1))
    tag = re.search(r"<html[^>]*>", dom)[0]
    assert 'data-ready="yes"' in tag and "data-error" not in tag, tag
    text = html.unescape(re.sub(r"<[^>]*>", "", dom.split("<script type=")[0]))
    assert "Gini 0.56, effective-token ratio 0.42" in text and "Gini 0.75" not in text
    assert "✓ right" in text and "✗ wrong" in text and "What is $3+4$?" in text
    assert 'data-focus="0 0 2"' in tag and 'data-stops="1"' in tag  # arca to uniform, two along
    assert "token 3 of 4" in text
    # The curves: arca's mean reward at steps 1 to 3, of which the axes are 0 to 3 and 0 to 1.
    chart = re.search(r'<svg class="chart"[^>]*data-key="reward".*?</svg>', dom, re.DOTALL)[0]
    points = re.search(r'data-line="arca".*?<polyline[^>]*points="([^"]*)"', chart, re.DOTALL)[1]
    points = [tuple(map(float, point.split(","))) for point in points.split()]
    left, right, low, high = 46, 348, 166, 8  # of BOX in curves.js
    shown = [((x - left) / (right - left) * 3, (low - y) / (low - high)) for x, y in points]
    for found, wanted in zip(shown, [(1, 0.2), (2, 0.3), (3, 0.6)], strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)
    assert (
        'data-line="uniform"' in chart and "<polyline" not in chart.split('"uniform"')[1]
    )  # a gap
    assert 'data-step="step 2: arca 0.3 [0.2, 0.4]; uniform –"' in tag
    assert 'data-pointed="Train reward at step 2"' in tag and 'data-outline="solid"' in tag
    check_look(tag, light=True)
    dom = opened(tmp_path, "p=2&group=2", LOOK, "--window-size=360,800", light_or_dark(0))
    assert "Gini 0.75, effective-token ratio 0.25" in dom
    check_look(re.search(r"<html[^>]*>", dom)[0], light=False)
    dom = opened(tmp_path, "run=2&theme=dark")
    assert "Gini 0.00, effective-token ratio 1.00" in dom and 'data-theme="dark"' in dom


def light_or_dark(scheme):
    """The flag for a system that is light (1) or dark (0)."""
    return f"--blink-settings=preferredColorScheme={scheme}"


def check_look(tag, light):
    """Text and curves stand out as WCAG asks, and the page does not scroll sideways."""
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', tag))
    assert (sum(map(int, re.findall(r"\d+", found["page"])[:3])) > 384) == light
    assert float(found["text"]) >= 4.5, found
    assert float(found["drawn"]) >= 3 and int(found["wide"]) <= 0, found


@needs_browser
def test_hostile_text_stays_text_in_a_browser(monkeypatch, capsys, tmp_path):
    """A model's completion that runs as a script in the reader's browser."""
    call(monkeypatch, capsys, hostile(tmp_path), "--out", tmp_path)
    dom = opened(tmp_path)
    assert 'data-ready="yes"' in dom and "data-error" not in re.search(r"<html[^>]*>", dom)[0]
    assert "<title>x</title>" not in dom
    assert html.escape(SCRIPT, quote=False) in dom
