"""Answers: found in a completion, compared with the gold, counted. `python eval_math.py` evaluates.

Model output is hostile input. Nothing in verifier/ evaluates text: spellings.py cuts an answer into
tokens, an own parser (latex.py) makes them a tree of bounded depth, values.py computes what a tree
is worth, each number bounded before it is computed, and compare.py compares. What is too large is
opaque: it equals only what reads the same. So `verify` is a pure function that cannot be made to
run code, hang or raise.
"""

import argparse
import math
from pathlib import Path

from data.problems import load_problems, prompt_text
from run.answers import (
    GROUPS,
    compare,
    print_groups,
    rates,
    read_answers,
    wilson,
    with_interval,
    write_answers,
)
from run.flags import add_flags, load_base
from sample import generate
from system.errors import UserError, run_cli
from verifier.compare import same_answer
from verifier.extract import extract_answer


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
