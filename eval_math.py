"""Answers: found in a completion, compared with the gold, counted. `python eval_math.py` evaluates.

Model output is hostile input. Nothing in verifier/ evaluates text: spellings.py cuts an answer into
tokens, an own parser (latex.py) makes them a tree of bounded depth, values.py computes what a tree
is worth, each number bounded before it is computed, and compare.py compares. What is too large is
opaque: it equals only what reads the same. So `verify` is a pure function that cannot be made to
run code, hang or raise.
"""

import argparse
import math
import re
from pathlib import Path

from data.problems import last_boxed, load_problems, prompt_text
from plumbing.answers import NORMAL, compare, read_answers, write_answers
from plumbing.cli import add_flags, load_base
from plumbing.files import UserError, printable, run_cli
from sample import generate
from verifier.compare import same_answer

GROUPS = ("level", "subject", "type", "kind")  # of problems
END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<end_of_turn>")
STATED = re.compile(
    r"####|\banswers?\b(?=[^\w\n]*(?:is\b|are\b|[:=$\n]|\\[\[(]))[\s:*=]*(?:is\b|are\b)?",
    re.IGNORECASE,
)
FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)

# ---- Finding the answer --------------------------------------------------------------------------


def extract_answer(text: str, strict=True) -> str | None:
    """The answer that a completion gives, as written, or None.

    It is what the last \\boxed{} or \\fbox{} after </think> and before the end of the turn holds;
    an unclosed box is no answer. Where there is no box at all, strict=False also takes a stated
    answer (`#### 5`, "the answer is 5."), or else the last displayed formula.
    """
    text = END_OF_TURN.split(text, maxsplit=1)[0].rsplit("</think>", 1)[-1]
    if strict or "\\boxed" in text or "\\fbox" in text:
        return last_boxed(text) or None
    *before, said = STATED.split(text[-1500:])
    if before:
        said = re.split(r"\.(?:\s|$)|\n|\bI hope\b", said.strip(" *:\n"), maxsplit=1)[0].strip(" *")
        said = re.split(r"\b(?:is|are)\b", said)[-1].strip()  # "Final answer: the volume is 120"
    formulas = ["".join(parts).strip() for parts in FORMULA.findall(said)]
    if formulas or not before:
        return formulas[-1] if formulas else None
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", said)  # "Jane started 3 hours ago"
    return (numbers[0] if len(numbers) == 1 and len(said.split()) > 2 else said) or None


def verify(completion: str, gold: str, strict=True) -> bool:
    """Whether a completion's answer is the gold one. A pure function; never raises.

    As in MATH, a percent, currency or degree sign, a unit and `x =` may be left out or added, but
    not contradicted (5 m is not 5 cm, x = 5 not y = 5). Lists and sets have no order, tuples have;
    brackets, bases and strictness count. A decimal and an exact number are equal only if their
    values are: 0.5 is 1/2, and 0.333 is not 1/3. But where the gold answer is a decimal of at least
    three digits, an irrational number that rounds to it, at its precision, is right.
    """
    try:
        answer = extract_answer(str(completion), strict)
        return answer is not None and bool(same_answer(answer, str(gold)))
    except Exception:  # no mathematics, or too large: right only if it reads the same
        return False


# ---- Counting ------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """P(at least one of k samples is right), unbiased, from c right ones among n (arXiv 2107.03374,
    eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"no pass@{k} from {c} right of {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean over n problems of values in [0, 1] (exact for 0 and 1)."""
    a = NORMAL**2 / n  # the squared normal quantile, per problem
    center, spread = mean + a / 2, math.sqrt(a * (mean * (1 - mean) + a / 4))
    return (center - spread) / (1 + a), (center + spread) / (1 + a)


def graded(rows: list[dict], strict=True) -> list[dict]:
    """Rows with a completion and a gold answer, and what was extracted and decided."""
    for row in rows:
        row["extracted"] = extract_answer(str(row["completion"]), strict)
        row["verdict"] = verify(row["completion"], row["gold"], strict)
    return rows


def evaluate(
    model, tokenizer, prompts, golds, samples, max_new_tokens, temperature, top_p, seed, strict=True
):
    """Greedy accuracy, and pass@1 and pass@k from k = `samples`, with their 95 % intervals.

    Returns (result, answers): an answer is a dict of the problem's index, gold, sample (None: the
    greedy one), completion, extracted, verdict, tokens and truncated; greedy answers come first.
    Sampling is keyed by step -1, which no training step has: every evaluation of a run sees the
    same uniforms, and differences are paired.
    """
    limits = dict(max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids, seed=seed, step=-1)
    drawn = [(None, generate(model, prompts, temperature=0, **limits))]
    if samples > 0:
        limits.update(temperature=temperature, top_p=top_p)
        drawn.append((0, generate(model, prompts, samples, **limits)))
    answers, n = [], len(golds)
    for first, done in drawn:
        columns = done.texts(tokenizer), done.lengths.tolist(), done.finished.tolist()
        for i, (text, tokens, ended) in enumerate(zip(*columns, strict=True)):
            index, sample = (i, None) if first is None else divmod(i, samples)
            row = dict(index=index, gold=golds[index], sample=sample, completion=text)
            answers.append(row | dict(tokens=tokens, truncated=not ended))
    hits = [row["verdict"] for row in graded(answers, strict)]
    result = dict(greedy=sum(hits[:n]) / n)
    if samples > 0:
        counts = [sum(hits[n + i * samples : n + (i + 1) * samples]) for i in range(n)]
        for k in sorted({1, samples}):
            result[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / n
    intervals = {f"{key}_95": [round(x, 4) for x in wilson(result[key], n)] for key in result}
    boxed = sum(not row["truncated"] and row["extracted"] is not None for row in answers[:n]) / n
    return result | intervals | dict(boxed=boxed, n=n), answers


def rates(result) -> list[str]:
    """The keys of a result that are rates with an interval."""
    return [key for key in result if f"{key}_95" in result]


def with_interval(result, key) -> str:
    """Such as `52.4 % [48.2, 56.6]`."""
    low, high = result[f"{key}_95"]
    return f"{100 * result[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def print_groups(rows):
    """How many rows are right, of all and by level, subject, ..., with Wilson's interval."""
    for name in (None, *GROUPS):
        for value in sorted({str(row[name]) for row in rows if name in row}) if name else [""]:
            hits = [row["verdict"] for row in rows if not name or str(row.get(name)) == value]
            rate = dict(x=sum(hits) / len(hits), x_95=wilson(sum(hits) / len(hits), len(hits)))
            label = f"  {name} {printable(value):24}" if name else "right"
            print(f"{label} {sum(hits)} of {len(hits)}: {with_interval(rate, 'x')}")


def main():
    parser = argparse.ArgumentParser(description="Greedy accuracy and pass@k on math problems.")
    flags = dict(problems=(500, "the first so many"), samples=(4, "for pass@k; 0: greedy only"))
    flags |= dict(max_new_tokens=(128, "longer completions are cut off"))
    flags |= dict(temperature=(1.0, "of pass@k"), top_p=(1.0, "of pass@k"))
    flags |= dict(out=("", "the JSONL file of all answers; runs/answers-N.jsonl"))
    add_flags(parser, flags | dict(grade=("", "no model: grade this JSONL of completion and gold")))
    parser.add_argument("--compare", nargs=2, metavar="JSONL", help="two files of --out, in pairs")
    parser.add_argument("--stated", action="store_true", help="take answers without a box, too")
    s = parser.parse_args()
    if s.out and Path(s.out).exists():
        raise UserError(f"{s.out} exists: give another --out")
    if s.compare:
        return print(compare(*s.compare))
    if s.grade:
        rows = graded(read_answers(s.grade, "completion", "gold"), not s.stated)
    else:
        model, tokenizer = load_base(s)
        problems = load_problems(s.data, "test")[: max(1, s.problems)]
        prompts = [tokenizer.encode(prompt_text(p["problem"], s.chat)) for p in problems]
        golds = [p["answer"] for p in problems]
        sampling = (s.samples, s.max_new_tokens, s.temperature, s.top_p, s.seed, not s.stated)
        result, rows = evaluate(model, tokenizer, prompts, golds, *sampling)
        kept = [{k: p[k] for k in ("problem", *GROUPS) if k in p} for p in problems]
        rows = [kept[row.pop("index")] | row for row in rows]
        print(f"{s.data}: {len(golds)} problems, 95 % intervals in brackets")
        for key in rates(result):
            print(f"{key:8} {with_interval(result, key)}")
        print(
            f"{100 * result['boxed']:.1f} % of the greedy completions give a boxed answer and end"
        )
    print_groups([row for row in rows if row.get("sample") is None])
    if s.out or not s.grade:
        print(f"wrote {len(rows)} answers to {write_answers(s.out, rows)}")


if __name__ == "__main__":
    run_cli(main)
