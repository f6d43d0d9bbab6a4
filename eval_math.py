"""Answers: found in a completion, compared with the gold answer, counted.

    python eval_math.py --adapter runs/NAME/adapter    # without it: the embedded model

Model output is hostile input, so nothing in verifier/ evaluates text: it parses an answer to a tree
of bounded depth and bounds each number before it is computed.
"""

import math
from pathlib import Path

if __name__ == "__main__":
    from system.errors import before_imports

    before_imports()

import torch

from data.problems import load_problems, prompt_text
from run import answers
from run.flags import EVAL_FLAGS, add_flags, load_base
from sample import generate
from system import processes
from system.errors import Parser, UserError, printable, run_cli
from verifier.compare import same_answer
from verifier.extract import extract_answer


def verify(completion: str, gold: str, strict=True) -> bool:
    """Return whether a completion's answer (with strict=True, its last box) is the gold one.

    A pure function that never raises. As in MATH, a percent, currency or degree sign, a unit and
    `x =` may be left out or added, but not contradicted (5 m is not 5 cm, x = 5 not y = 5). Lists
    and sets have no order, tuples do; brackets, bases and strict inequality count. A decimal and an
    exact number are equal only if their values are: 0.5 is 1/2, and 0.333 is not 1/3. But an
    irrational number may round to a gold decimal of at least three digits.
    """
    try:
        answer = extract_answer(str(completion), strict)
        return answer is not None and bool(same_answer(answer, str(gold)))
    except Exception:  # no mathematics, or too large to compare
        return False


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased P(at least one of k samples is right) from c right ones among n
    (arXiv 2107.03374, eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"no pass@{k} from {c} right of {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def graded(rows: list[dict], strict=True) -> list[dict]:
    """Add the extracted answer and the verdict to rows with a completion and a gold answer."""
    for row in rows:
        row["extracted"] = extract_answer(str(row["completion"]), strict)
        row["verdict"] = verify(row["completion"], row["gold"], strict)
    return rows


def answers_of(completions, tokenizer, indices, golds, samples=0) -> list[dict]:
    """Return a row for each completion: index and gold answer of the problem, sample (None: the
    greedy answer), text, number of tokens, and whether it was cut off. UserError on NaN."""
    completions.check()
    texts = completions.texts(tokenizer)
    columns = (texts, completions.lengths.tolist(), completions.finished.tolist())
    rows = []
    for i, (text, tokens, finished) in enumerate(zip(*columns, strict=True)):
        index = indices[i // samples if samples else i]
        row = dict(index=index, gold=golds[index], sample=i % samples if samples else None)
        rows.append(row | dict(completion=text, tokens=tokens, truncated=not finished))
    return rows


def evaluate(
    model, tokenizer, prompts, golds, samples, max_new_tokens, temperature, top_p, seed, strict=True
):
    """Measure greedy accuracy, pass@1 and pass@k, k = `samples`, on prompts (token ids).

    Returns (result, rows): each rate with its 95 % interval, `boxed` (the share of greedy answers
    that end and have a box) and n; and the graded answers, the greedy ones first, of this process.
    Sampling is keyed by step -1, which no training step has: all evaluations of a run see the same
    uniforms, so their differences are paired.
    """
    # 1) Write and grade the answers. Each process does its share of the problems.
    P = len(prompts)
    mine = processes.share(range(P))
    limits = dict(max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids, seed=seed, step=-1)
    limits["only"] = mine
    greedy = generate(model, prompts, temperature=0, **limits)
    rows = answers_of(greedy, tokenizer, mine, golds)
    if samples > 0:
        sampled = generate(model, prompts, samples, temperature=temperature, top_p=top_p, **limits)
        rows += answers_of(sampled, tokenizer, mine, golds, samples)
    graded(rows, strict)

    # 2) Count by problem: is the greedy answer right, is it boxed, how many samples are right.
    counts = torch.zeros(3, P)
    for row in rows:
        if row["sample"] is None:
            boxed = row["extracted"] is not None and not row["truncated"]
            counts[:2, row["index"]] = torch.tensor([row["verdict"], boxed]).float()
        else:
            counts[2, row["index"]] += row["verdict"]
    processes.add_up([counts])
    hits, boxed, right = counts.long().tolist()

    # 3) Rates and their intervals.
    rates = dict(greedy=sum(hits) / P)
    for k in sorted({1, samples}) if samples > 0 else ():
        rates[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in right) / P
    return answers.with_intervals(rates, P) | dict(boxed=sum(boxed) / P, n=P), rows


def evaluate_problems(cfg) -> list[dict]:
    """Evaluate the model of the flags on their problems; print the rates and return the rows."""
    model, tokenizer = load_base(cfg)
    problems = load_problems(cfg.data, "test")[: cfg.problems]
    prompts = [tokenizer.encode_prompt(prompt_text(p["problem"])) for p in problems]
    golds = [p["answer"] for p in problems]
    sampling = (cfg.samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    result, rows = evaluate(model, tokenizer, prompts, golds, *sampling, not cfg.stated)
    print(printable(f"{cfg.data}: {answers.in_words(result)}"))
    return answers.with_problems(rows, problems)


def main():
    parser = Parser(description="Greedy accuracy and pass@k on math problems.")
    add_flags(parser, EVAL_FLAGS)
    parser.add_argument("--stated", action="store_true", help="take answers without a box, too")
    cfg = parser.parse_args(or_zero=("temperature", "samples"))
    if cfg.out and Path(cfg.out).exists():
        raise UserError(f"{cfg.out} exists: give another --out")
    if cfg.grade:
        rows = graded(answers.read_completions(cfg.grade), not cfg.stated)
    else:
        rows = evaluate_problems(cfg)
    answers.print_groups([row for row in rows if row.get("sample") is None])
    if cfg.out or not cfg.grade:
        print(f"wrote {len(rows)} answers to {answers.write_answers(cfg.out, rows)}")


if __name__ == "__main__":
    run_cli(main)
