"""`python -m view`: its numbers against definitions, and hostile text on screen and page."""

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
from system.errors import run_cli
from view import __main__ as view

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


def call(monkeypatch, capsys, *flags):
    """(exit code, stdout, stderr) of python -m view."""
    monkeypatch.setattr(sys, "argv", ["view", *map(str, flags)])
    code = 0
    try:
        run_cli(view.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def embedded(folder):
    """The data in the page."""
    text = (folder / "credit.html").read_text(encoding="utf-8")
    return json.loads(text.split('id="data">', 1)[1].split("</script>", 1)[0])


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
    code, out, err = call(monkeypatch, capsys, tmp_path, "--out", tmp_path)
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
    assert f"{'arca':17}  0.75  0.25  The answer" in bare(out)  # one-hot: 3/4 and 1/4


def test_page_holds_the_numbers(monkeypatch, capsys, tmp_path):
    """Means over the wrong completions, sharpening 1 and 2 confused, a correlation with a constant
    rule that passes for one of zero."""
    rows = ordinary()
    rows[3]["rules"]["arca"][0] = [4.0, 0.0, 0.0, 0.0]
    call(monkeypatch, capsys, write(tmp_path, rows), "--out", tmp_path)
    data = embedded(tmp_path)
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
    last = embedded(tmp_path)["groups"][-1]
    assert last["gini"][0] == [0, None]
    assert last["completions"][0]["weights"][0][1] == last["completions"][0]["logp"] == [None] * 4


def test_rules_that_not_all_samples_have_are_left_out(monkeypatch, capsys, tmp_path):
    """A run resumed after a rule was added to METHODS would end in a KeyError."""
    rows = ordinary()
    rows[3]["rules"]["newer"] = rows[3]["rules"]["arca"]
    assert call(monkeypatch, capsys, write(tmp_path, rows), "--out", tmp_path)[0] == 0
    assert [rule["name"] for rule in embedded(tmp_path)["rules"]] == ["uniform", "arca"]


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
    assert (code, err) == (0, "") and str(out / "credit.html") in shown
    data = embedded(out)
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


# ---- Hostile text, damaged files -----------------------------------------------------------------


def hostile(folder):
    weights = [[1.0] * 6 + [1.0], [0.5] * 6 + [4.0]]
    return write(folder, [sample(HOSTILE, weights, problem=SCRIPT + "\x1b[2J") for _ in range(2)])


def test_screen_never_emits_what_a_model_wrote_to_steer_it(monkeypatch, capsys, tmp_path):
    """ESC and C1 sequences clear the screen or rename the window; a lone surrogate ends in a
    UnicodeEncodeError."""
    hostile(tmp_path)
    code, out, err = call(monkeypatch, capsys, tmp_path, "--out", tmp_path)
    assert (code, err) == (0, "")
    rest = set(bare(out)) - {"\n"}
    assert not {c for c in rest if ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u202e\ud800"}
    assert "�[2J�]0;owned�" in bare(out).replace("\n" + " " * 31, "") and " a↵" in bare(out)


def test_page_escapes_what_a_model_wrote(monkeypatch, capsys, tmp_path):
    """A token that ends the script it is embedded in, and runs as another."""
    call(monkeypatch, capsys, hostile(tmp_path), "--out", tmp_path)
    text = (tmp_path / "credit.html").read_text(encoding="utf-8")
    assert "document.title='x'" in text  # it is there, but neither of these is
    template = (ROOT / "view" / "page.html").read_text(encoding="utf-8")
    for mark in ("<script", "</script", "<!--"):
        assert text.count(mark) == template.count(mark)
    assert not set(text) & set("\u2028\u2029\x1b\x9b")
    assert embedded(tmp_path)["groups"][0]["completions"][0]["tokens"][0] == SCRIPT


def test_page_asks_for_nothing_from_outside():
    """A font or script from elsewhere: broken without a network, and it tells who looks."""
    text = (ROOT / "view" / "page.html").read_text(encoding="utf-8")
    links = set(re.findall(r"https?://[^\"' )]*", text)) - {"http://www.w3.org/2000/svg"}  # a name
    assert not links
    assert not re.findall(r"\b(?:src|href|action)\s*=|@import|url\(|fetch\(|innerHTML", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "samples.jsonl"),
        ("", "no samples"),
        ('{"step": 1}\n', "line 1"),
        ("{torn\n{}\n", "line 1"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(monkeypatch, capsys, tmp_path, text, says):
    """A traceback, or exit code 0, where a user has mistyped a folder or a file is damaged."""
    if text is not None:
        (tmp_path / "samples.jsonl").write_text(text)
    code, _, err = call(monkeypatch, capsys, tmp_path, "--out", tmp_path / "shown")
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
    from experiments import credit_figure

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
const key = (name) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const tab = document.querySelector("#rules [tabindex='0']");
tab.focus();
for (const name of ["Home", "ArrowUp", "ArrowRight", "ArrowRight"]) key(name);
document.documentElement.dataset.focus = document.activeElement.dataset.at;
document.documentElement.dataset.stops = document.querySelectorAll("#rules [tabindex='0']").length;
</script>"""


def opened(folder, hash="", after=""):
    """The page's document as headless Chromium has it after its script ran, with any error."""
    path, copied = folder / "credit.html", folder / "watched.html"
    text = path.read_text(encoding="utf-8").replace("<head>", "<head>" + WATCH, 1)
    head, tail = text.rsplit("</body>", 1)
    copied.write_text(head + after + "</body>" + tail, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--dump-dom", "--virtual-time-budget=2000"]
    command = [BROWSER, *flags, f"{copied.as_uri()}#{hash}"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=90).stdout


needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here")


@needs_browser
def test_page_in_a_browser(monkeypatch, capsys, tmp_path):
    """A page that stops with an error, shows other numbers than were computed, or cannot be used
    without a mouse."""
    call(monkeypatch, capsys, write(tmp_path, ordinary()), "--out", tmp_path)
    dom = opened(tmp_path, after=PRESS)
    tag = re.search(r"<html[^>]*>", dom)[0]
    assert 'data-ready="yes"' in tag and "data-error" not in tag, tag
    text = html.unescape(re.sub(r"<[^>]*>", "", dom.split("<script type=")[0]))
    assert "Gini 0.56, effective-token ratio 0.42" in text and "0.75" not in text
    assert "✓ right" in text and "✗ wrong" in text and "What is $3+4$?" in text
    assert 'data-focus="0 0 2"' in tag and 'data-stops="1"' in tag  # arca to uniform, two along
    assert "token 3 of 4" in text
    dom = opened(tmp_path, "p=2&group=2&theme=dark")
    assert "Gini 0.75, effective-token ratio 0.25" in dom and 'data-theme="dark"' in dom
    assert "Gini 0.00, effective-token ratio 1.00" in opened(tmp_path, "group=1")


@needs_browser
def test_hostile_text_stays_text_in_a_browser(monkeypatch, capsys, tmp_path):
    """A model's completion that runs as a script in the reader's browser."""
    call(monkeypatch, capsys, hostile(tmp_path), "--out", tmp_path)
    dom = opened(tmp_path)
    assert 'data-ready="yes"' in dom and "data-error" not in re.search(r"<html[^>]*>", dom)[0]
    assert "<title>x</title>" not in dom
    assert html.escape(SCRIPT, quote=False) in dom
