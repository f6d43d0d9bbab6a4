"""Answers: found, compared and counted; and nothing that a model writes may raise, hang or run."""

import itertools
import json
import math
import threading
import time
from pathlib import Path

import pytest
from helpers import tiny_model

from eval_math import evaluate, graded, pass_at_k, verify
from run.answers import wilson
from sample import generate
from verifier.extract import extract_answer

ROOT = Path(__file__).parent.parent
TINY = [ROOT / "data" / "tiny" / f"{split}.jsonl" for split in ("train", "test")]
LABELLED = ROOT.parent / "shared" / "verifier" / "dev.jsonl"

# ---- Finding the answer --------------------------------------------------------------------------

FOUND = [
    (r"So it is $\boxed{7}$.", "7"),
    (r"\boxed{3}, no, \boxed{5} it is", "5"),  # the last one
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # braces in it
    (r"\boxed{\sqrt{\frac{1}{\sqrt{2}}}} and {more}", r"\sqrt{\frac{1}{\sqrt{2}}}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),  # escaped braces
    (r"\boxed{\left\{x \mid x>0\right.}", r"\left\{x \mid x>0\right."),  # which need not match
    (r"\fbox{4}", "4"),
    (r"\boxed{1} or \fbox{2}", "2"),
    (r"\boxed {8}", "8"),
    (r"\boxed{  9 }", "9"),
    (r"it is $\boxed 5$.", "5"),
    (r"\boxed{1} so \boxed{2", None),  # an unclosed box is no answer, nor is what stands before it
    (r"\boxed{3} oops \boxed{}", None),
    (r"\boxed{", None),
    (r"\boxed", None),
    ("", None),
    ("the answer is 5", None),  # strict: no box, no answer
    (r"<think>maybe \boxed{1}</think> \boxed{2}", "2"),
    (r"<think>it is \boxed{1}</think> I do not know", None),
    (r"a</think> \boxed{1} b</think> \boxed{2}", "2"),
    (r"\boxed{4}<|im_end|> \boxed{5}", "4"),  # after its turn a model talks to itself
    (r"\boxed{4}<|endoftext|>Problem: \boxed{5}", "4"),
    (r"<|im_end|>\boxed{5}", None),
    (r"\boxed{\boxed{5}+1}", r"\boxed{5}+1"),  # the outer box
    (r"\boxed{5} \boxed{\text{so \fbox{6}}}", r"\text{so \fbox{6}}"),
    (r"\boxed{4}</s>\boxed{5}", "4"),
]
STATED = [
    ("3+4=7\n#### 7", "7"),
    ("The answer is 12.", "12"),
    ("The answer is: 12. I am sure.", "12"),
    ("Final Answer: 3.5", "3.5"),
    ("first the answer is 3, then the answer is 4.", "4"),
    ("The answer is 8.\nThat was easy", "8"),
    (r"The answer is 5, or \boxed{6}", "6"),  # a box counts more than words
    (r"The answer is 5, or \boxed{6", None),
    ("I cannot tell", None),
    ("Answer: -7", "-7"),  # a sign is no colon
    ("**Final Answer**\n5", "5"),
    ("The final answer is $14{,}916$. I hope it is correct.", "14{,}916"),
    ("Final Answer: Jane started 3 hours ago. I hope it is correct.", "3"),
    ("Final Answer: The volume of $ABCD$ is 120. I hope it is correct.", "120"),
    (r"So we find \[x = 3\] and are done", "x = 3"),  # a last displayed formula
    ("The pair $(x, y)$ that solves it is $(7, 6)$. <|im_end|>user $8$", "(7, 6)"),
    ("The answer is 5 or 6.", "5 or 6"),  # all of it, so that guessing does not pay
]


@pytest.mark.parametrize("text, answer", FOUND)
def test_boxed_answers(text, answer):
    """Rewarding a wrong box, half a box, a box in the thinking or one after the turn."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text, answer", STATED)
def test_stated_answers(text, answer):
    """strict=False that misses plain words, or hears them when there is a box."""
    assert extract_answer(text, strict=False) == answer


# ---- Comparing -----------------------------------------------------------------------------------

TRUE = [
    ("5", "5"), ("-3", "-3"), ("−3", "-3"), ("5.", "5"), ("5.0", "5"), ("007", "7"), ("+5", "5"),
    ("0.5", r"\frac{1}{2}"), (r"\frac{2}{4}", r"\frac{1}{2}"), ("1/2", "0.5"), (".5", r"\frac12"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"), (r"\tfrac34", "0.75"), (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    ("1,234", "1234"), ("1{,}234{,}567", "1234567"), (r"12,\!345", "12345"), ("1,234.5", "1234.5"),
    (r"50\%", "50"), ("50%", r"50\%"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), (r"\$5", "5"),
    ("x=5", "5"), ("5", "x = 5"), (r"x \in (1,2]", "(1,2]"), (r"\text{east}", "east"), ("$5$", "5"),
    ("(1,2)", "(1, 2)"), (r"\left(1,2\right)", "(1,2)"), (r"(\frac{1}{2},3)", "(0.5,3)"),
    (r"(-\infty,3]", r"(-\infty, 3]"), (r"[0,\infty)", r"\left[0,\infty\right)"),
    ("((1,2),3)", "((1, 2), 3)"), ("x^2+3x-1", "x^2 + 3x - 1"), (r"3\,x", "3x"), ("12_5", "12_5"),
    ("9" * 900, "9" * 900), ("1/" + "3" * 400, r"\frac{1}{" + "3" * 400 + "}"),
]  # fmt: skip
FALSE = [
    ("6", "5"), ("-5", "5"), ("55", "5"), ("5.01", "5"), ("5 or 6", "5"), ("5,6", "5"), ("", "5"),
    (r"\frac{2}{1}", r"\frac{1}{2}"), ("0.33", r"\frac{1}{3}"), ("1/0", "1/0.0"), ("1/0", "0"),
    ("1,23", "123"), ("1234", "1,23"), ("12,34", "1234"), ("0.5", r"50\%"), ("5000", r"50\%"),
    ("(2,1)", "(1,2)"), ("(1,2,3)", "(1,2)"), ("(1)", "(1,2)"), ("(1,2)", "1"), ("12", "(1,2)"),
    ("(0,1]", "[0,1)"), ("[0,1]", "(0,1)"), ("(0,1)", "[0,1)"), (r"(\infty,3]", r"(-\infty,3]"),
    (r"(-\infty,3)", r"(-\infty,3]"), ("x^2+3x+1", "x^2+3x-1"), ("x^2", "x^3"), ("12_6", "12_5"),
    (r"\text{west}", r"\text{east}"), ("9" * 900 + "8", "9" * 901), ("1e400", "2e400"),
    ("0." + "0" * 400 + "1", "0"), ("x<5", "5"), ("nan", "5"), ("None", "5"), ("5+1", "5"),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold", TRUE)
def test_right_answers(answer, gold):
    """A right answer without reward because it is spelled in another way."""
    assert verify(rf"so \boxed{{{answer}}}", gold) is True
    assert verify(rf"\fbox{{{gold}}}", gold) is True


@pytest.mark.parametrize("answer, gold", FALSE)
def test_wrong_answers(answer, gold):
    """Reward for a wrong value, a swapped tuple, a flipped bracket or several guesses."""
    assert verify(rf"so \boxed{{{answer}}}", gold) is False


def test_strictness_reaches_the_verdict():
    """Reward in training for an answer without a box, which the prompt asks for."""
    assert verify("The answer is 5.", "5") is False
    assert verify("The answer is 5.", "5", strict=False) is True
    assert verify("The answer is 6.", "5", strict=False) is False


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_every_gold_of_the_tiny_set_accepts_its_own_solution(path):
    """Problems that no completion can get right; golds that accept the next one's answer."""
    if not path.exists():
        pytest.skip(f"{path} is not made yet")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [row for row in rows if not verify(row["solution"], row["answer"])]
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if a["answer"] != b["answer"]]
    assert not [(a, b) for a, b in pairs if verify(a["solution"], b["answer"])]


# ---- Hostile input -------------------------------------------------------------------------------

MB = 2**20
HOSTILE = {
    "open braces": r"\boxed{" + "{" * MB,
    "closed braces": r"\boxed{" + "}" * MB,
    "balanced braces": r"\boxed{" + "{" * (MB // 2) + "}" * (MB // 2) + "}",
    "10,000 nested fractions": r"\boxed{" + r"\frac{1}{" * 10000 + "2" + "}" * 10001,
    "100,000 boxes": r"\boxed{" * 100_000,
    "100,000 closed boxes": r"\boxed{1}" * 100_000,
    "parentheses": r"\boxed{" + "(" * 900 + ")" * 900 + "}",
    "parentheses up to the limit": r"\boxed{" + "(" * 490 + ")" * 490 + "}",
    "commas": r"\boxed{(" + "," * 990 + ")}",
    "backslashes": r"\boxed{" + "\\" * MB,
    "spaces": r"\boxed" + " " * MB + "{5",
    "a huge integer": r"\boxed{" + "9" * MB + "}",
    "an integer that int() refuses": r"\boxed{" + "9" * 5000 + "}",
    "a huge decimal": r"\boxed{0." + "0" * 900 + "1}",
    "thousands": r"\boxed{1" + ",000" * 240 + ",00}",
    "a tower": r"\boxed{9^{9^{9^{9^9}}}}",
    "a factorial": r"\boxed{(10^9)!}",
    "an exponent": r"\boxed{1e999999999}",
    "a fraction of nothing": r"\boxed{\frac{1}{0}}",
    "lone surrogates": "\ud800\udfff\\boxed{\ud83d5}",
    "NUL": "\0\\boxed{\0}\0",
    "digits of other scripts": "\\boxed{٣/٤²½Ⅷ}",
    "code": r"\boxed{__import__('os').system('exit 1')}",
    "exit": r"\boxed{exit()}",
    "thinking": "</think>" * 100_000,
    "ends of turn": "<|im_end|>" * 100_000,
    "words": "the answer is " * 100_000,
    "#": "#" * MB,
    "dollars": r"\boxed{" + "$" * MB + "}",
    "dots": r"\boxed{" + "." * 990 + "}",
    "text": r"\boxed{" + r"\text{" * 160 + "}" * 161,
    "macros": r"\boxed{" + r"\frac\left\right" * 60 + "}",
    "commas in braces": r"\boxed{" + "1{,}" * 240 + "000}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions(name):
    """A reward function that stops the run: an exception, deep recursion, or no return."""
    for strict in (True, False):
        for gold in ("5", r"\frac{1}{2}", "(1,2)", "x^2+1"):
            started = time.process_time()
            verdict = verify(HOSTILE[name], gold, strict)
            assert verdict is False
            assert time.process_time() - started < 2


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_golds(name):
    """A data file with an odd line that stops a run in the middle."""
    gold = HOSTILE[name].removeprefix(r"\boxed{")[:-1]
    started = time.process_time()
    assert type(verify(r"\boxed{5}", gold)) is bool
    assert type(verify(rf"\boxed{{{gold}}}", gold)) is bool  # and what costs most: both sides odd
    assert time.process_time() - started < 2


RUN = {  # what Python would make of them: 5, whatever equals all, a file
    "sum": "sum(range(4))-1",
    "lambda": "(lambda: 5)()",
    "equals all": "type('', (), {'__eq__': lambda *_: True})()",
    "writes": "open(FILE, 'w').write('12345')",
    "imports": "__import__('pathlib').Path(FILE).write_text('12345')",
}


@pytest.mark.parametrize("name", RUN)
def test_no_answer_is_run(name, tmp_path):
    """A grader that evaluates answers as code: one of them can then write files, or be right for
    every gold answer, and with it all that is graded later."""
    file = tmp_path / "written"
    answer = RUN[name].replace("FILE", repr(str(file)))
    assert [verify(rf"\boxed{{{answer}}}", gold) for gold in ("5", "x", "(1,2)")] == [False] * 3
    assert not file.exists()


def test_honest_answers_in_hostile_surroundings():
    """A limit on the whole completion that throws long honest work away."""
    assert verify("work " * 100_000 + r"\boxed{5}", "5") is True
    assert verify("{" * MB + r" \boxed{\frac{1}{2}}", "0.5") is True
    assert verify("\ud800\0 \\boxed{5} \ud800\0", "5") is True


def test_verify_works_in_a_thread():
    """A time-out by signal, which works in the main thread only."""
    verdicts = []
    pairs = [*TRUE, *FALSE]
    work = lambda: verdicts.extend(verify(rf"\boxed{{{a}}}", b) for a, b in pairs)  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert verdicts == [True] * len(TRUE) + [False] * len(FALSE)


@pytest.mark.skipif(not LABELLED.exists(), reason="the labelled answers are not here")
def test_labelled_answers_never_raise():
    """An exception or a hang on answers that real models, test suites and attackers have given."""
    cases = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    started = time.process_time()
    for case in cases:
        strict = case["kind"] != "fallback"
        assert type(verify(case["completion"], case["gold"], strict)) is bool, case["id"]
    assert time.process_time() - started < 15


# ---- Counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_counts_subsets(n):
    """The biased 1 - (1 - c/n)^k: pass@k is the share of k-subsets that hold a right sample."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_nonsense(n, c, k):
    """A k above n, or more right than sampled, that gives a number nevertheless."""
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_pass_at_k_of_many_samples():
    """Overflow, or a probability outside 0 ... 1, for the n that papers use."""
    assert pass_at_k(10000, 0, 100) == 0 and pass_at_k(10000, 9901, 100) == 1
    assert pass_at_k(10000, 1, 100) == pytest.approx(0.01)


class Spelled:
    """A tokenizer of 11 letters, of which 0 ends the text; `boxed` ones are an answer."""

    eos_ids = (0,)

    def __init__(self, boxed):
        self.boxed = boxed

    def decode(self, ids):
        return "".join(rf"\boxed{{{i}}}" if i in self.boxed else f" {i}" for i in ids)


def test_evaluate_by_hand():
    """Answers counted for another problem or sample, cut-off ones counted as boxed, pass@k of the
    greedy answers, or sampling keyed by the step, so that evaluations are not paired."""
    model = tiny_model()
    tokenizer = Spelled(boxed=(1, 2, 3, 4, 5))
    prompts = [[3, 5], [7, 2, 9, 4], [1], [8, 8], [6, 4], [10, 9, 2]]
    golds = ["1", "2", "3", "4", "5", "1"]
    n, limit = 4, 8
    result, answers = evaluate(model, tokenizer, prompts, golds, n, limit, 1.0, 1.0, seed=3)

    # The same, one prompt at a time, counted by hand.
    shared = dict(eos_ids=(0,), max_new_tokens=limit, seed=3, step=-1)
    hits, boxed, some, each = 0, 0, 0, 0
    for prompt, gold in zip(prompts, golds, strict=True):
        greedy = generate(model, [prompt], temperature=0, **shared)
        (text,) = greedy.texts(tokenizer)
        hits += verify(text, gold)
        boxed += "boxed" in text and bool(greedy.finished)
        texts = generate(model, [prompt], n, **shared).texts(tokenizer)
        right = [verify(text, gold) for text in texts]
        some += any(right)
        each += sum(right)
        index = prompts.index(prompt)
        assert [row["completion"] for row in answers if row["index"] == index] == [text, *texts]
    P = len(prompts)
    expected = {"greedy": hits / P, "pass@1": each / (P * n), "pass@4": some / P}
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert 0 < each < P * n  # or this test says nothing
    assert (result["boxed"], result["n"]) == (boxed / P, P)
    for key in expected:
        assert result[f"{key}_95"] == pytest.approx(wilson(result[key], P), abs=1e-4)
    assert [row["sample"] for row in answers] == [None] * P + list(range(n)) * P
    assert all(row["gold"] == golds[row["index"]] for row in answers)

    greedy_only, rows = evaluate(model, tokenizer, prompts, golds, 0, limit, 1.0, 1.0, seed=3)
    assert greedy_only["greedy"] == result["greedy"]
    assert not [key for key in greedy_only if key.startswith("pass")]
    assert len(rows) == P


def test_graded_keeps_what_it_was_given():
    """A regraded file whose verdicts are the old ones, or of another strictness."""
    rows = [dict(completion=r"so \boxed{1}", gold="1", verdict=False, level=3)]
    rows.append(dict(completion="The answer is 2.", gold="2"))
    strict = graded([dict(row) for row in rows])
    assert [row["verdict"] for row in strict] == [True, False]
    assert [row["extracted"] for row in strict] == ["1", None]
    assert strict[0]["level"] == 3
    assert [row["verdict"] for row in graded(rows, strict=False)] == [True, True]


@pytest.mark.parametrize(
    "right, n, low, high",  # published Wilson score intervals without continuity correction
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ]
    + [(15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals(right, n, low, high):
    """An interval that leaves 0 ... 1 or has no width at 0 %, as the normal approximation's."""
    interval = wilson(right / n, n)
    assert interval == pytest.approx((low, high), abs=6e-5)
    # The ends are where the score test just rejects: |p - q| = 1.96 sqrt(q (1 - q) / n).
    for q in interval:
        error = 1.959964 * math.sqrt(max(0.0, q * (1 - q)) / n)
        assert abs(right / n - q) == pytest.approx(error, abs=1e-7)
