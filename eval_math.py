"""Answers: found in a completion, compared with the gold, counted. `python eval_math.py` evaluates.

Model output is hostile input. Nothing here evaluates text: strings are normalised, numbers are read
exactly and are of bounded length, and every loop is linear in what it reads. So `verify` is a pure
function that cannot be made to run code, hang or raise.
"""

import argparse
import math
import re
from fractions import Fraction

from data.problems import last_boxed, load_problems, prompt_text
from plumbing.cli import add_flags, load_base
from plumbing.files import run_cli
from sample import generate

MAX_ANSWER = 1000  # characters; no gold answer of MATH is longer than 160
END_OF_TURN = re.compile(r"<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|</s>")
STATED = re.compile(r"####|(?:final answer|answer)(?: is)?\s*:?\s", re.IGNORECASE)

# ---- Finding the answer --------------------------------------------------------------------------


def extract_answer(text: str, strict=True) -> str | None:
    """The answer that a completion gives, as written, or None.

    It is what the last \\boxed{} or \\fbox{} after </think> and before the end of the turn holds;
    an unclosed box is no answer. Where there is no box at all, strict=False also takes a stated
    answer (`#### 5`, "the answer is 5.").
    """
    text = END_OF_TURN.split(text, maxsplit=1)[0].rsplit("</think>", 1)[-1]
    if strict or "\\boxed" in text or "\\fbox" in text:
        return last_boxed(text) or None
    said = STATED.split(text[-1500:])
    if len(said) < 2:
        return None
    line = said[-1].strip().split("\n", 1)[0]
    return re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip() or None


# ---- Comparing two answers -----------------------------------------------------------------------

REWRITES = [(r"\left", ""), (r"\right", ""), (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac")]
REWRITES += [(r"\!", ""), (r"\,", ""), (r"\;", ""), (r"\:", ""), (r"\ ", ""), ("~", ""), ("−", "-")]
REWRITES += [(r"\$", ""), ("$", ""), (r"\%", "%"), (r"^\circ", ""), (r"^{\circ}", "")]
REWRITES += [(r"\cdot", "*"), (r"\times", "*")]
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)%?")
RATIO = re.compile(r"([+-]?)([+-]?\d+)/([+-]?\d+)")
NAMED = re.compile(r"(?:([a-z]|\(x,y\))(?:=|\\in))?(.*)", re.DOTALL)


def normalise(answer: str) -> str:
    """One spelling for what LaTeX and prose spell in many; brackets, bases and commas stay."""
    for old, new in REWRITES:
        answer = answer.replace(old, new)
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer).rstrip(".")  # 3 1/2 is not 31/2
    answer = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"(?<![\w}^ ])\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}(?![\w{^])", r"\1/\2", answer)
    answer = re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", answer)
    if re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer):  # 12,345; but 1,23 is a list
        answer = answer.replace(",", "")
    return answer


def as_number(text: str) -> Fraction | None:
    """The exact value of a normalised integer, decimal, percentage or fraction, else None."""
    if NUMBER.fullmatch(text):
        return Fraction(text.rstrip("%"))  # in MATH a percentage and the bare number are the same
    match = RATIO.fullmatch(text)
    if match and int(match[3]):
        return Fraction(int(match[2]), int(match[3])) * (-1 if match[1] == "-" else 1)
    return None


def split_list(text: str) -> list[str]:
    """The parts of a list at its outermost commas."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def same_value(a: str, b: str) -> bool:
    """Equality of two normalised answers that have no parts: as text, or as exact numbers."""
    x, y = as_number(a), as_number(b)
    return a == b or (x is not None and x == y)


def same_answer(a: str, b: str) -> bool:
    """Equality of two normalised answers: as a whole, or part by part for tuples and intervals."""
    if a.startswith(("(", "[")) and b.startswith(("(", "[")):
        parts, others = split_list(a[1:-1]), split_list(b[1:-1])
        same_kind = (a[0], a[-1], len(parts)) == (b[0], b[-1], len(others))  # (0,1] is not [0,1)
        return same_kind and all(map(same_value, parts, others))
    return same_value(a, b)


def verify(completion: str, gold: str, strict=True) -> bool:
    """Whether a completion's answer is the gold one. Never raises; linear in the text's length."""
    answer, gold = extract_answer(str(completion), strict), str(gold)
    if answer is None or len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return False
    (name, a), (other, b) = (NAMED.fullmatch(normalise(x)).groups() for x in (answer, gold))
    return same_answer(a, b) and (name == other or not (name and other))  # x=5 says 5, y=5 does not


# ---- Counting ------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """P(at least one of k samples is right), unbiased, from c right ones among n (arXiv 2107.03374,
    eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"no pass@{k} from {c} right of {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean over n problems of values in [0, 1] (exact for 0 and 1)."""
    a = 1.959964**2 / n  # the squared normal quantile, per problem
    center, spread = mean + a / 2, math.sqrt(a * (mean * (1 - mean) + a / 4))
    return (center - spread) / (1 + a), (center + spread) / (1 + a)


def evaluate(model, tokenizer, prompts, golds, samples, max_new_tokens, temperature, top_p, seed):
    """Greedy accuracy, and pass@1 and pass@k from k = `samples`, with their 95 % intervals.

    Returns (result, the verdict on each greedy completion). Sampling is keyed by step -1, which no
    training step has: every evaluation of a run sees the same uniforms; differences are paired.
    """
    limits = dict(max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids, seed=seed, step=-1)
    greedy = generate(model, prompts, temperature=0, **limits)
    texts, n = greedy.texts(tokenizer), len(golds)
    right = [verify(text, gold) for text, gold in zip(texts, golds, strict=True)]
    result = dict(greedy=sum(right) / n)
    if samples > 0:
        limits.update(temperature=temperature, top_p=top_p)
        drawn = generate(model, prompts, samples, **limits).texts(tokenizer)
        hits = [verify(text, golds[i // samples]) for i, text in enumerate(drawn)]
        counts = [sum(hits[i * samples : (i + 1) * samples]) for i in range(n)]
        for k in sorted({1, samples}):
            result[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / n
    intervals = {f"{key}_95": [round(x, 4) for x in wilson(result[key], n)] for key in result}
    ended = zip(texts, greedy.finished.tolist(), strict=True)
    boxed = sum(end and extract_answer(text) is not None for text, end in ended) / n
    return result | intervals | dict(boxed=boxed, n=n), right


def rates(result) -> list[str]:
    """The keys of a result that are rates with an interval."""
    return [key for key in result if f"{key}_95" in result]


def with_interval(result, key) -> str:
    """Such as `52.4 % [48.2, 56.6]`."""
    low, high = result[f"{key}_95"]
    return f"{100 * result[key]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def main():
    parser = argparse.ArgumentParser(description="Greedy accuracy and pass@k on math problems.")
    flags = dict(problems=(500, "the first so many"), samples=(4, "for pass@k; 0: greedy only"))
    flags |= dict(max_new_tokens=(128, "longer completions are cut off"))
    add_flags(parser, flags | dict(temperature=(1.0, "of pass@k"), top_p=(1.0, "of pass@k")))
    s = parser.parse_args()
    model, tokenizer = load_base(s)
    problems = load_problems(s.data, "test")[: max(1, s.problems)]
    prompts = [tokenizer.encode(prompt_text(p["problem"], s.chat)) for p in problems]
    golds = [p["answer"] for p in problems]
    sampling = (s.samples, s.max_new_tokens, s.temperature, s.top_p, s.seed)
    result, right = evaluate(model, tokenizer, prompts, golds, *sampling)
    print(f"{s.data}: {len(golds)} problems, 95 % intervals in brackets")
    for key in rates(result):
        print(f"{key:8} {with_interval(result, key)}")
    print(f"{100 * result['boxed']:.1f} % of the greedy completions give a boxed answer and end")
    for name in ("level", "subject", "type", "kind"):
        for value in sorted({str(p[name]) for p in problems if name in p}):
            hits = [r for r, p in zip(right, problems, strict=True) if str(p.get(name)) == value]
            print(f"  {name} {value:24} {sum(hits):4} of {len(hits):4} greedy")


if __name__ == "__main__":
    run_cli(main)
