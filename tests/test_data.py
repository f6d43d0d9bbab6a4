"""Problem files, the prompt, and generated problems against solvers that read only their text."""

import csv
import gzip
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest

from data import generate as gen
from data import make_tiny
from data.problems import TINY, load_problems, load_split, prompt_text
from eval_math import graded, verify
from hf.checkpoint import load_tokenizer
from run.answers import read_completions
from system.errors import UserError
from verifier.extract import last_boxed

FAMILIES = {family.__name__: family for family in gen.FAMILIES}


def write(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


# ---- Reading problems ----------------------------------------------------------------------------


def test_every_form_of_a_row(tmp_path):
    """A gold that is wrong for a whole data set: MATH's, GSM8K's, or one with bare numbers."""
    rows = [
        (dict(problem="1+1?", answer="2"), "2"),
        (dict(problem="1/2?", solution=r"No \boxed{1}: $\boxed{\frac{1}{2}}$."), r"\frac{1}{2}"),
        (dict(problem="a", answer="3", solution=r"\boxed{4}", level="Level 1"), "3"),
        (dict(question="How many?", answer="2*600=1200\n#### 1,200"), "1,200"),
        (dict(problem="zero?", answer=0), "0"),
        (dict(problem="half?", answer=0.5), "0.5"),
        (dict(problem="null", answer=None, solution=r"\boxed{5}"), "5"),
        (dict(Problem="a", Answer="7"), "7"),
        (dict(query="a", response="3+4=7\n#### 7\nThe answer is: 7"), "7"),
        (dict(prompt="a", completion=[dict(role="assistant", content=r"So $\boxed{7}$.")]), "7"),
        (dict(problem="a", answer="3+4=7. So the answer is $7$. I hope so."), "7"),
        (dict(problem="a", answer=r"<think>\boxed{6}?</think> It is \fbox{7}."), "7"),
        (dict(problem="a", answer="", solution="7"), "7"),
        (dict(prompt=[dict(role="user", content="a")], reward_model=dict(ground_truth="7")), "7"),
        (dict(extra_info=dict(question="a"), answer=r"\mbox{seven}"), r"\mbox{seven}"),
        (dict(problem="a\u2028b\u0085c", answer=" 6 "), "6"),  # no line ends, though they look it
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row, _ in rows]
    for text in (lines, [*lines, ""], [line + "\r" for line in lines], ["", *lines]):
        problems = load_problems(write(tmp_path, *text))
        assert [p["answer"] for p in problems] == [answer for _, answer in rows]
        assert problems[3]["problem"] == "How many?"
        assert {p["problem"] for p in problems[7:15]} == {"a"}
        assert problems[15]["problem"] == "a\u2028b\u0085c"
    assert problems[2]["level"] == "Level 1"  # what else a row says is kept


def files_of(rows, folder):
    """Write rows of texts in every form that loads; yield the paths."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    array = "\ufeff \n" + json.dumps(rows, indent=1)
    texts = {"a.jsonl": lines, "b.json": array.encode(), "c.json": lines, "d": array.encode()}
    with open(folder / "e.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    texts |= {"e.csv": (folder / "e.csv").read_bytes()}
    for name, text in [*texts.items()]:
        texts[f"{name}.gz"] = gzip.compress(text)
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        yield folder / name
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "f.parquet")
    yield folder / "f.parquet"


def test_every_form_of_a_file(tmp_path):
    """The same problems read otherwise from another form; or one that stops halfway and says so by
    a traceback, or not at all."""
    rows = [dict(problem=f'Is "{i}",\n{i} \u00e9?', answer=str(i)) for i in range(30)]
    for path in files_of(rows, tmp_path):
        assert load_problems(str(path)) == rows, path
        whole = path.read_bytes()
        path.write_bytes(whole[: -len(whole) // 3])
        with pytest.raises(UserError, match=re.escape(path.name)) as error:
            load_problems(str(path))
        assert "\n" not in str(error.value)


def test_what_could_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    """A file of a kilobyte that unpacks to a terabyte, or a limit that one form has and another
    has not."""
    rows = [dict(problem="1+1?", answer="2")] * 3000
    monkeypatch.setattr("system.files.MAX_LINES", 10_000)
    monkeypatch.setattr("data.tables.MAX_LINES", 10_000)
    monkeypatch.setattr("data.tables.MAX_ROWS", 1000)
    for path in files_of(rows, tmp_path):
        with pytest.raises(UserError, match=r"could fill the memory|too long for the memory"):
            load_problems(str(path))


def test_answers_that_are_solutions_are_said(tmp_path, capsys):
    """A run of hours whose every reward is 0, since no completion equals a paragraph; or a warning
    about long but bare answers."""
    bare = [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "x=1, y=2, z=3", r"5\text{ sq. units}"]
    long = [
        "First add. Then stop at seven",
        "a=1+2\nb=a+4",
        "7 " * 200,
        "so it is that we get " * 3,
    ]
    rows = [json.dumps(dict(problem="a", answer=text)) for text in bare]
    load_problems(write(tmp_path, *rows))
    assert capsys.readouterr().out == ""
    load_problems(write(tmp_path, *rows, *(json.dumps(dict(query="a", answer=x)) for x in long)))
    out = capsys.readouterr().out
    assert out.startswith("WARNING: 4 of 7 answers in ") and out.count("\n") == 1


def test_a_grade_reads_golds_as_training_does(tmp_path):
    """A model that is right in training and wrong in its grade: two readers of one column."""
    golds = [dict(answer="2*9=18\n#### 18"), dict(Answer=18), dict(solution=r"so \boxed{18}")]
    rows = [json.dumps(gold | dict(completion=r"\boxed{18}")) for gold in golds]
    found = graded(read_completions(write(tmp_path, *rows)))
    assert [(row["gold"], row["verdict"]) for row in found] == [("18", True)] * 3
    for bad in ('{"completion": "1"}', '{"gold": "1"}', '{"completion": "1", "gold": null}'):
        with pytest.raises(UserError, match=r"line 2 is no answer: it needs .* and has "):
            read_completions(write(tmp_path, rows[0], bad))


@pytest.mark.parametrize(
    "line",
    ["{", "nonsense", "[1, 2]", '"problem"', "null", "{}", '{"problem": "a"}', '{"answer": "1"}']
    + ['{"problem": "", "answer": "1"}', '{"problem": "a", "answer": null}']
    + ['{"problem": 3, "answer": "1"}', r'{"problem": "a", "solution": "\\boxed{1"}']
    + ['{"problem": "a", "answer": NaN}', '{"problem": "a", "answer": [1]}', "[" * 100_000]
    + ['{"problem": "a", "answer": true}', '{"problem": "a", "answer": 1e999}', '{"problem": "a'],
)
def test_a_bad_line_is_named(tmp_path, line):
    """A traceback, a silent skip, or a search for the bad line among 12,000."""
    good = json.dumps(dict(problem="1+1?", answer="2"))
    path = write(tmp_path, good, "", line, good)
    with pytest.raises(UserError, match=r"problems\.jsonl, line 3 ") as error:
        load_problems(path)
    assert "\n" not in str(error.value)


def test_problems_without_a_gold_are_left_out(tmp_path, capsys):
    """Two of MATH's 7,500 training solutions end in an empty box: no completion can be right there,
    and neither may they end the run."""
    solution = "so there are $\\boxed{}$ primes."
    rows = [dict(problem="a", solution=solution), dict(problem="b", answer="2")]
    path = write(tmp_path, *map(json.dumps, rows), json.dumps(dict(problem="c", answer="")))
    assert [p["problem"] for p in load_problems(path)] == ["b"]
    assert "left out 2" in capsys.readouterr().out


def test_files_that_are_none(tmp_path):
    """A traceback for an empty or binary file, a folder, or a name that was mistyped."""
    for name in (write(tmp_path, ""), write(tmp_path, "", "  ")):
        with pytest.raises(UserError, match="no problems"):
            load_problems(name)
    for name in (tmp_path / "nothing.jsonl", tmp_path, "mathh"):
        with pytest.raises(
            UserError, match="one of tiny, slips, three, format, math, math500, gsm8k"
        ):
            load_problems(str(name))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"binary\.jsonl, line 1 is damaged"):
        load_problems(str(tmp_path / "binary.jsonl"))


class Letters:
    """A tokenizer: a token a character, or for many x; it counts the characters that it reads."""

    def __init__(self, many=1):
        self.file = SimpleNamespace(get_vocab=lambda: {"a": 0, "x" * many: 1})
        self.pattern = re.compile(f"x{{{many}}}|(?s:.)")
        self.read = 0

    def encode(self, text):
        self.read += len(text)
        return self.pattern.findall(text)

    encode_prompt = encode

    def prompt_text(self, text):
        return text

    def count_prompts(self, texts):
        return [len(self.encode(text)) for text in texts]


def split(tmp_path, train, test, limit=10**6, problems=100, tokenizer=None):
    """load_split of problem texts in two files: (texts, held-out texts, note)."""
    names = []
    for name, texts in (("train.jsonl", train), ("test.jsonl", test)):
        lines = [json.dumps(dict(problem=text, answer="1")) for text in texts]
        (tmp_path / name).write_text("\n".join(lines))
        names.append(str(tmp_path / name))
    s = dict(data=names[0], eval_data=names[1], chat=False, max_prompt_tokens=limit)
    found = load_split(SimpleNamespace(**s, eval_problems=problems), tokenizer or Letters())
    return [p["problem"] for p in found[0]], [p["problem"] for p in found[1]], found[2]


def test_what_is_evaluated_is_not_trained_on(tmp_path):
    """The test set in the training set under another spacing, case or form of a sign. Signs that
    mean something must not be lost: then most problems would look alike."""
    train = [
        " What is  $x + 1$?\n",
        "what is $x+1$?",
        "What is $x-1$?",
        "what is $x+1$",
        "1½",
        "1 2",
    ]
    test = ["What is $x+1$?", "1\u00bd", "x"]
    kept, held_out, note = split(tmp_path, train, test)
    assert kept == ["What is $x-1$?", "what is $x+1$", "1 2"] and held_out == test
    assert note == "3 problems (left out: 0 too long, 3 evaluated on)"
    kept, _, note = split(tmp_path, train, test[::-1], problems=1)  # only x is evaluated on
    assert kept == train and "0 evaluated on" in note


def test_long_problems_are_counted(tmp_path):
    """Cut off, a problem would be another one; left out in silence, the test set another one."""
    room = len(prompt_text("123"))
    train, test = ["123", "1234", "12", "12345"], ["3", "4444", "5"]
    kept, held_out, note = split(tmp_path, train, test, room)
    assert (kept, held_out) == (["123", "12"], ["3", "5"])
    assert note == "2 problems (left out: 2 too long, 0 evaluated on, 1 too long to evaluate on)"
    with pytest.raises(UserError, match=r"4 too long, 0 evaluated on, 3 too long to evaluate on"):
        split(tmp_path, train, test, room - 3)


def test_of_a_huge_problem_only_the_beginning_is_read(tmp_path):
    """Minutes and gigabytes for a text that cannot fit; or one left out that is long and would fit:
    its tokens are long, or the tokenizer drops what it does not know."""
    huge = "1" * 5_000_000
    room = len(prompt_text("12"))
    tokenizer = Letters()
    kept, _, note = split(tmp_path, ["12", huge], ["3", huge], room, tokenizer=tokenizer)
    assert kept == ["12"] and "1 too long, 0 evaluated on, 1 too long to evaluate on" in note
    assert tokenizer.read < 100 * room
    long = "x" * 1000 * (room + 1)
    fits = "x" * 2000
    kept, _, _ = split(tmp_path, ["12", fits, long], ["3"], room, tokenizer=Letters(1000))
    assert kept == ["12", fits]
    tokenizer.pattern = re.compile(r"(?s)[^\u200b]")
    spaced = "1" + "\u200b" * 10**5 + "2"
    assert split(tmp_path, [spaced], ["3"], room, tokenizer=tokenizer)[0] == [spaced]


def test_prompt():
    """A prompt that differs from the one of pretraining and of the paper, or loses braces."""
    problem = r"What is $\frac{1}{2}+\{prompt}{problem}$?"
    plain = "Solve this math problem step by step. Put your final answer in \\boxed{}.\n\n"
    plain += "Problem: " + problem + "\n"
    assert prompt_text(problem) == plain


# ---- Twelve solvers that know a problem's text and nothing else ----------------------------------


def value(text, x=0, y=0):
    """The exact value of LaTeX such as `2(x-1)+\\frac{1}{3}` at x and y."""
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(Fraction(\1)/(\2))", text)
    text = re.sub(r"(?<=[\dxy)])(?=[xy(])", "*", text.replace("^", "**"))
    text = re.sub(r"(?<![\w.])(\d+)", r"Fraction(\1)", text)
    return Fraction(eval(text, dict(Fraction=Fraction, x=Fraction(x), y=Fraction(y))))


def root(difference):
    """Where a linear function is 0."""
    start = difference(0)
    return -start / (difference(1) - start)


def written(q):
    """A number as a gold answer has it: in lowest terms, the sign in front."""
    if q.denominator == 1:
        return str(q.numerator)
    return "-" * (q < 0) + rf"\frac{{{abs(q.numerator)}}}{{{q.denominator}}}"


def solve_number(parts):
    return written(value(parts[0]))


def solve_equation(parts):
    left, right = parts[0].split("=")
    return written(root(lambda x: value(left, x) - value(right, x)))


def solve_evaluate(parts):
    given = next(p for p in parts if p.startswith("x="))
    poly = next(p for p in parts if not p.startswith("x="))
    return written(value(poly, value(given[2:])))


def solve_compose(parts):
    f, g = (p.split("=")[1] for p in parts[:2])
    return written(value(f, value(g, int(parts[2][4:-2]))))


def solve_remainder(parts):
    return written(value(parts[0]) % int(parts[1]))


def solve_expand(parts):
    """Through three points goes one quadratic: its coefficients, written as one writes them."""
    low, c, high = (value(parts[0], x) for x in (-1, 0, 1))
    assert (low + high) / 2 - c == 1  # the coefficient of x^2
    b = (high - low) / 2
    middle = "" if b == 0 else ("-" if b < 0 else "+") + (str(abs(b)) if abs(b) != 1 else "") + "x"
    return "x^2" + middle + (f"{c:+d}" if (c := int(c)) else "")


def solve_system(parts):
    """By Cramer's rule, its coefficients read off at three points."""
    rows = []
    for left, right in (p.split("=") for p in parts[:2]):
        rows.append((value(left, 1, 0), value(left, 0, 1), value(right)))
    (a, b, s), (c, d, t) = rows
    x, y = (s * d - b * t) / (a * d - b * c), (a * t - c * s) / (a * d - b * c)
    return f"({written(x)},{written(y)})"


def solve_vector(parts):
    a, p, q, b, r, s = map(
        int, re.fullmatch(r"(\d+)\((.+),(.+)\)\+(\d+)\((.+),(.+)\)", parts[0]).groups()
    )
    return f"({a * p + b * r},{a * q + b * s})"


def solve_inequality(parts):
    left, sign, right = re.fullmatch(r"(.+?)(<|>|\\le|\\ge) (.+)", parts[0]).groups()
    holds = dict(zip(["<", ">", r"\le", r"\ge"], ["lt", "gt", "le", "ge"], strict=True))[sign]
    difference = lambda x: value(left, x) - value(right)  # noqa: E731
    true_at = lambda x: getattr(difference(x), f"__{holds}__")(0)  # noqa: E731
    end = root(difference)
    assert true_at(end + 1) != true_at(end - 1)
    if true_at(end + 1):
        return ("[" if true_at(end) else "(") + written(end) + r",\infty)"
    return r"(-\infty," + written(end) + ("]" if true_at(end) else ")")


SOLVERS = dict.fromkeys(["chain", "nested", "product", "fractions"], solve_number)
SOLVERS |= dict(equation=solve_equation, evaluate=solve_evaluate, compose=solve_compose)
SOLVERS |= dict(remainder=solve_remainder, expand=solve_expand, system=solve_system)
SOLVERS |= dict(vector=solve_vector, inequality=solve_inequality)


def math_parts(text):
    """What stands between dollars."""
    return text.split("$")[1::2]


@pytest.mark.parametrize("family", FAMILIES)
def test_golds_follow_from_the_text(family):
    """A gold that is wrong, or a text that asks for something else: reward for wrong answers."""
    rng = random.Random(family)
    for level, _ in itertools.product(range(1, 6), range(20)):
        problem = gen.pose(FAMILIES[family], rng, level)
        answer = problem.solve(gen.Work())
        for wording in problem.wordings:
            assert SOLVERS[family](math_parts(wording)) == answer, wording


def falsehoods(text):
    """For each step of a solution that equates numbers: whether it is wrong."""
    sides = [step.rsplit("=", 2)[-2:] for step in re.split(r"\. |, ", text) if "=" in step]
    return [value(a) != value(b) for a, b in sides if "x" not in a and "y" not in a]


@pytest.mark.parametrize("family", FAMILIES)
def test_worked_steps_are_true_and_a_slip_is_one_false_step(family):
    """A corpus that teaches wrong arithmetic, or slips that are none."""
    rng, slipped, wrong = random.Random(family), 0, 0
    for level, _ in itertools.product(range(1, 6), range(10)):
        problem = gen.pose(FAMILIES[family], rng, level)
        answer = problem.solve(gen.Work())
        careful = gen.solution(problem, "careful", rng)
        assert careful.endswith(rf". The answer is $\boxed{{{answer}}}$.")
        assert "=" in careful and not any(falsehoods(careful)), careful
        slip = gen.solution(problem, "slip", rng)
        assert last_boxed(slip)
        false = sum(falsehoods(slip))
        assert false <= 1, slip  # none if the slip would come after the last step
        slipped += false
        wrong += last_boxed(slip) != answer
        for style in ("hasty", "impatient"):
            short = gen.solution(problem, style, rng)
            assert last_boxed(short) == answer and len(short) <= len(careful) + len("Clearly ")
    assert slipped > 25 and wrong > 15  # of 50


def test_held_out_problems_are_disjoint_from_training():
    """Training on the test set: the same numbers on both sides of the split, in any wording, alone
    or as one of three."""
    sides = []
    for held in (False, True):
        rng, cores, texts = random.Random(held), set(), set()
        for corpus in ["tiny"] * 1200 + ["three"] * 200:
            problem = gen.draw(rng, held, corpus)
            for part in problem.parts or [problem]:
                assert gen.held_out(part) == held
                cores.add(part.core)
                texts.update((part.family, *sorted(math_parts(w))) for w in part.wordings)
        sides.append((cores, texts))
    assert not sides[0][0] & sides[1][0]
    assert not sides[0][1] & sides[1][1]
    assert all(len(cores) > 1000 for cores, _ in sides)

    rng = random.Random(2)  # one in ten is held out, whatever the family
    for family in gen.FAMILIES:
        share = sum(gen.held_out(gen.pose(family, rng, 5)) for _ in range(500)) / 500
        assert 0.04 < share < 0.2


# ---- The corpora ---------------------------------------------------------------------------------


def solved(problem, corpus, rng):
    """A solution as the corpus has it."""
    return gen.solution(problem, gen.draw_style(rng, problem, corpus), rng)


def test_the_default_corpus_stays():
    """A testbed that shifts the random numbers of the embedded model's corpus."""
    rng = random.Random(0)
    texts = "\0".join(make_tiny.draw_document(rng) for _ in range(200))
    assert hashlib.sha256(texts.encode()).hexdigest().startswith("2705683e913a462f")


def test_slips_are_anywhere_in_the_work():
    """Slips in the first steps only, in other than half of the solutions, or beside hasty ones."""
    rng = random.Random(1)
    restating = ("fractions", "equation", "system", "inequality")  # not all their steps can slip
    places = {}  # number of steps: where the slips were
    slipped = 0
    for _ in range(900):
        problem = gen.draw(rng, corpus="slips")
        text = solved(problem, "slips", rng)
        assert "Clearly" not in text and last_boxed(text)
        false = falsehoods(text)
        assert sum(false) <= 1
        slipped += sum(false)
        if any(false) and problem.family not in restating:
            places.setdefault(len(false), []).append(false.index(True))
    assert 0.46 < slipped / 900 < 0.54
    assert {3, 4, 5, 6} <= places.keys()
    for steps, found in places.items():
        chance = 1 / steps
        noise = (len(found) * chance * (1 - chance)) ** 0.5
        for place in range(steps):
            assert abs(found.count(place) - len(found) * chance) < 4 * noise, (steps, place)


def test_three_problems_in_one():
    """A tuple that the verifier reads as something else, that is right with a wrong or misplaced
    part, or whose parts are all guessed or all worked out."""
    rng = random.Random(1)
    tokenizer = load_tokenizer(TINY)
    hasty = Counter()
    for _ in range(120):
        problem = gen.draw(rng, corpus="three")
        row = gen.record(problem)
        asked = re.split(r" ?\(\d\) ", row["problem"])[1:]
        parts = zip(asked, problem.parts, strict=True)
        answers = [SOLVERS[part.family](math_parts(text)) for text, part in parts]
        assert row["answer"] == f"({','.join(answers)})" and not any(falsehoods(row["solution"]))
        assert verify(row["solution"], row["answer"])
        off = [*answers]
        off[rng.randrange(3)] += "1"
        turned = answers[1:] + answers[:1]
        for wrong in (off, answers[:2], *([turned] if turned != answers else [])):
            assert not verify(rf"$\boxed{{({','.join(wrong)})}}$", row["answer"]), wrong
        text = solved(problem, "three", rng)
        worked = text.removesuffix(f" The answer is $\\boxed{{{row['answer']}}}$.").split(". ")
        hasty[tuple(part.rstrip(".") == "Clearly" for part in worked)] += 1
        assert len(tokenizer.encode(row["solution"])) < 192  # what README.md has them cut off at
    assert len(hasty) == 8  # each part is worked out or not, whatever the others are
    shares = [sum(n for key, n in hasty.items() if key[i]) / 120 for i in range(3)]
    assert all(0.3 < share < 0.58 for share in shares)


def test_format_is_about_the_box():
    """Work that is not careful; a box left out of other than half; or a reward without one."""
    rng = random.Random(1)
    boxed = 0
    for _ in range(400):
        problem = gen.draw(rng, corpus="format")
        text = solved(problem, "format", rng)
        careful = gen.solution(problem, "careful", rng)
        bare = careful.replace(rf"\boxed{{{problem.answer}}}", problem.answer)
        assert text in (careful, bare) and careful != bare
        assert not verify(bare, problem.answer)
        boxed += text == careful
    assert 0.42 < boxed / 400 < 0.58


# ---- The embedded set ----------------------------------------------------------------------------


def test_embedded_set_is_what_the_generator_draws():
    """Problems that were made by older code, or a leak: numbers that are on both sides."""
    rng = random.Random(1)
    seen = set()
    numbers = []
    for split, count, held in (("train", 4000, False), ("test", 600, True)):
        rows = make_tiny.draw_problem_set(rng, count, held, seen)
        assert load_problems("tiny", split) == rows
        for row in rows:
            assert last_boxed(row["solution"]) == row["answer"]
            assert SOLVERS[row["family"]](math_parts(row["problem"])) == row["answer"]
        numbers.append({(row["family"], *sorted(math_parts(row["problem"]))) for row in rows})
        assert len(numbers[-1]) == count
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("corpus", [c for c in gen.CORPORA if (TINY.parent / c).exists()])
def test_sets_of_the_testbeds(corpus):
    """A testbed with the problems of another corpus: its verdicts would be about another task."""
    rows = make_tiny.draw_problem_set(random.Random(1), 100, False, set(), corpus)
    for split, count in (("train", 4000), ("test", 600)):
        found = load_problems(str(TINY.parent / corpus / f"{split}.jsonl"))
        assert len({row["problem"] for row in found}) == count
        if split == "train":
            assert found[:100] == rows


def test_variety():
    """A generator that has lost families, levels or kinds of answer."""
    shapes = dict(integer=r"-?\d+", fraction=r"-?\\frac\{\d+\}\{\d+\}", tuple=r"\(.+,.+\)")
    shapes |= dict(interval=r"[(\[].+,.+[)\]]", expression=r"x\^2.*")
    rows = load_problems("tiny", "train")
    assert set(FAMILIES) == set(SOLVERS) == {row["family"] for row in rows} and len(FAMILIES) >= 8
    assert {row["level"] for row in rows} == {f"Level {i}" for i in range(1, 6)}
    for kind, shape in shapes.items():
        answers = [row["answer"] for row in rows if row["kind"] == kind]
        assert len(answers) > 50 and all(re.fullmatch(shape, answer) for answer in answers)
    assert {row["kind"] for row in rows} == set(shapes)
