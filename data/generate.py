"""Generated problems with worked solutions, in MATH's format: twelve families, five levels, and
integers, fractions, expressions, tuples and intervals for answers.

A family draws numbers and returns what is asked and how it is solved: `solve(calc)` gives the steps
and the answer, and every number that it works out goes through `calc`. With the identity the
solution is right; a `calc` that errs once gives a slip that is carried to the end, as people's
slips are.

A problem is held out if the hash of its family and numbers says so, whatever its wording: training
and held-out problems are disjoint by construction.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

HELD_OUT = 10  # one problem in so many


@dataclass
class Problem:
    core: str  # what is asked, in symbols; the held-out split is by its hash
    wordings: tuple[str, str]  # as a textbook asks it, as a quiz asks it
    solve: Callable  # calc -> (steps, answer)
    subject: str
    kind: str


def term(n):
    """n with its sign, as the next term of a sum."""
    return f"+{n}" if n >= 0 else f"{n}"


def fraction(n, d=1):
    q = Fraction(n, d)
    sign = "-" if q < 0 else ""
    return (
        str(q) if q.denominator == 1 else rf"{sign}\frac{{{abs(q.numerator)}}}{{{q.denominator}}}"
    )


def times(a, b):
    return f"{a}*{b}" if b >= 0 else f"{a}*({b})"


def linear(a, b, first=True):
    """ax+b as one writes it; with first=False as the rest of a longer expression."""
    x = {1: "x", -1: "-x", 0: ""}.get(a, f"{a}x")
    x = f"+{x}" if x and not first and not x.startswith("-") else x
    return (x + (term(b) if b else "")) or "0" if x else str(b)


def compute(text):
    """The two wordings of a plain calculation."""
    return f"Compute ${text}$.", f"What is ${text}$?"


def chain(rng, level):
    numbers = [rng.randint(2, 15 + 7 * level) for _ in range(3 + (level + 1) // 2 + (level == 5))]
    signs = [1] + [rng.choice([1, 1, -1]) for _ in numbers[1:]]
    text = "".join(term(s * n) for s, n in zip(signs, numbers, strict=True))[1:]

    def solve(calc):
        total, steps = numbers[0], []
        for s, n in zip(signs[1:], numbers[1:], strict=True):
            result = calc(total + s * n)
            steps.append(f"{total}{term(s * n)}={result}")
            total = result
        return steps, str(total)

    return Problem(text, compute(text), solve, "Prealgebra", "integer")


def nested(rng, level):
    a, b, c, d, e = (rng.randint(2, 5 + level) for _ in range(5))
    c = rng.randint(2, 9)
    text = f"({a}+{b})*{c}-{d}*{e}" if level % 2 else f"{c}*({a}+{b})+{d}*{e}"

    def solve(calc):
        s = calc(a + b)
        p, q = calc(s * c), calc(d * e)
        sign = "-" if level % 2 else "+"
        r = calc(p - q if level % 2 else p + q)
        return [f"{a}+{b}={s}", f"{s}*{c}={p}", f"{d}*{e}={q}", f"{p}{sign}{q}={r}"], str(r)

    return Problem(text, compute(text), solve, "Prealgebra", "integer")


def product(rng, level):
    a, b = rng.randint(11, 19 + 12 * level), rng.randint(11, 19 + 4 * level)

    def solve(calc):
        tens, ones = b // 10 * 10, b % 10
        p = calc(a * tens)
        q = calc(a * ones)
        r = calc(p + q)
        return [f"{a}*{tens}={p}", f"{a}*{ones}={q}", f"{p}+{q}={r}"], str(r)

    text = f"{a}*{b}"
    return Problem(text, compute(text), solve, "Prealgebra", "integer")


def fractions(rng, level):
    b, d = rng.randint(2, 3 + level), rng.randint(2, 3 + level)
    a, c, sign = rng.randint(1, 2 + level), rng.randint(1, 2 + level), rng.choice([1, -1])
    op = "+" if sign > 0 else "-"
    text = rf"\frac{{{a}}}{{{b}}}{op}\frac{{{c}}}{{{d}}}"

    def solve(calc):
        p, q, bottom = calc(a * d), calc(c * b), calc(b * d) or 1
        top = calc(p + sign * q)
        steps = [f"{a}*{d}={p}", f"{c}*{b}={q}", f"{p}{op}{q}={top}", f"{b}*{d}={bottom}"]
        g = gcd(top, bottom)
        if g > 1:
            steps += [f"{top}/{g}={top // g}", f"{bottom}/{g}={bottom // g}"]
        return steps, fraction(top, bottom)

    wordings = (f"Simplify ${text}$.", f"What is ${text}$ in lowest terms?")
    return Problem(text, wordings, solve, "Prealgebra", "fraction")


def equation(rng, level):
    x, c = rng.randint(-4 - level, 4 + level), rng.randint(1, 3 + level)
    a, b = c + rng.randint(2, 3 + level), rng.randint(-9, 9 + 2 * level)
    d = (a - c) * x + b + (rng.randint(0, 2) if level > 2 else 0)
    text = f"{linear(a, b)}={linear(c, d)}"

    def solve(calc):
        k, m = calc(a - c), calc(d - b)
        k = k or 1
        steps = [f"{a}-{c}={k}", f"{d}{term(-b)}={m}", f"{linear(k, 0)}={m}", f"x={m}/{k}"]
        return steps, fraction(m, k)

    wordings = (f"Solve ${text}$ for $x$.", f"If ${text}$, what is $x$?")
    return Problem(text, wordings, solve, "Algebra", "fraction")


def evaluate(rng, level):
    a, b, c = rng.randint(2, 3 + level), rng.randint(2, 4 + level), rng.randint(-9, 9)
    n = rng.randint(2, 4 + level)
    poly = f"{a}x^2{linear(b, c, first=False)}"

    def solve(calc):
        square = calc(n * n)
        p, q = calc(a * square), calc(b * n)
        s = calc(p + q)
        r = calc(s + c)
        steps = [
            f"{n}*{n}={square}",
            f"{a}*{square}={p}",
            f"{b}*{n}={q}",
            f"{p}+{q}={s}",
            f"{s}{term(c)}={r}",
        ]
        return steps, str(r)

    wordings = (f"Evaluate ${poly}$ at $x={n}$.", f"If $x={n}$, what is ${poly}$?")
    return Problem(f"{poly},{n}", wordings, solve, "Algebra", "integer")


def compose(rng, level):
    a, c, n = rng.randint(2, 4 + level), rng.randint(2, 4 + level), rng.randint(2, 4 + level)
    b, d = rng.randint(-9, 9), rng.randint(-9, 9)
    f, g = linear(a, b), linear(c, d)

    def solve(calc):
        p = calc(c * n)
        q = calc(p + d)
        r = calc(a * q)
        s = calc(r + b)
        return [
            f"{c}*{n}={p}",
            f"{p}{term(d)}={q}",
            f"{times(a, q)}={r}",
            f"{r}{term(b)}={s}",
        ], str(s)

    given = f"$f(x)={f}$ and $g(x)={g}$"
    wordings = (f"Let {given}. Find $f(g({n}))$.", f"If {given}, what is $f(g({n}))$?")
    return Problem(f"{f};{g};{n}", wordings, solve, "Intermediate Algebra", "integer")


def remainder(rng, level):
    a, b, c = rng.randint(3, 7 + level), rng.randint(3, 9), rng.randint(2, 9 + 4 * level)
    m = rng.randint(3, 6 + level)
    text = f"{a}*{b}+{c}"

    def solve(calc):
        p = calc(a * b)
        s = calc(p + c)
        k = s // m
        q = calc(k * m)
        r = calc(s - q)
        return [f"{a}*{b}={p}", f"{p}+{c}={s}", f"{k}*{m}={q}", f"{s}-{q}={r}"], str(r)

    wordings = (
        f"Find the remainder when ${text}$ is divided by ${m}$.",
        f"What is the remainder of ${text}$ divided by ${m}$?",
    )
    return Problem(f"{text} mod {m}", wordings, solve, "Number Theory", "integer")


def expand(rng, level):
    a, b, c, d = (rng.choice([-1, 1]) * rng.randint(1, 3 + level) for _ in range(4))
    c = abs(c) + 1
    text = f"({linear(1, a)})({linear(1, b)}){term(c)}({linear(1, d)})"

    def solve(calc):
        s = calc(a + b)
        p, q = calc(a * b), calc(c * d)
        one, zero = calc(s + c), calc(p + q)
        steps = [
            f"{a}{term(b)}={s}",
            f"{s}+{c}={one}",
            f"{times(a, b)}={p}",
            f"{times(c, d)}={q}",
            f"{p}{term(q)}={zero}",
        ]
        return steps, (
            "x^2" + linear(one, zero, first=False) if one else "x^2" + (term(zero) if zero else "")
        )

    wordings = (f"Expand ${text}$.", f"What is ${text}$ in expanded form?")
    return Problem(text, wordings, solve, "Algebra", "expression")


def system(rng, level):
    x, y = (rng.randint(-3 - level, 5 + level) for _ in range(2))
    b = rng.randint(2, 3 + level)
    a = b + rng.randint(1, 2 + level)
    s, t = x + y, a * x + b * y
    text = f"x+y={s}$ and ${a}x+{b}y={t}"

    def solve(calc):
        p = calc(b * s)
        m, k = calc(t - p), calc(a - b) or 1
        u = Fraction(m, k)
        v = s - u
        steps = [f"{times(b, s)}={p}", f"{t}{term(-p)}={m}", f"{a}-{b}={k}"]
        return steps + [
            f"x={m}/{k}={fraction(u)}",
            f"y={fraction(v)}",
        ], f"({fraction(u)},{fraction(v)})"

    wordings = (f"Solve ${text}$ for $(x,y)$.", f"If ${text}$, what is $(x,y)$?")
    return Problem(text, wordings, solve, "Intermediate Algebra", "tuple")


def vector(rng, level):
    a, b = rng.randint(2, 3 + level), rng.randint(2, 3 + level)
    p, q, r, s = (rng.randint(-2 - level, 4 + level) for _ in range(4))
    text = f"{a}({p},{q})+{b}({r},{s})"

    def solve(calc):
        ap, br, aq, bs = calc(a * p), calc(b * r), calc(a * q), calc(b * s)
        u, v = calc(ap + br), calc(aq + bs)
        steps = [f"{times(a, p)}={ap}", f"{times(b, r)}={br}", f"{ap}{term(br)}={u}"]
        steps += [f"{times(a, q)}={aq}", f"{times(b, s)}={bs}", f"{aq}{term(bs)}={v}"]
        return steps, f"({u},{v})"

    return Problem(text, compute(text), solve, "Precalculus", "tuple")


def inequality(rng, level):
    a, b = rng.randint(2, 3 + level), rng.choice([-1, 1]) * rng.randint(1, 4 + level)
    x, d = rng.randint(-4 - level, 4 + level), rng.choice([-1, 1]) * rng.randint(1, 9)
    c, sign = a * (x + b) + d, rng.choice(["<", ">", r"\le", r"\ge"])
    text = f"{a}({linear(1, b)}){term(d)}{sign} {c}"

    def solve(calc):
        m = calc(c - d)
        p = calc(a * b)
        k = calc(m - p)
        end = fraction(k, a)
        left, right = ("(", ")") if sign in "<>" else ("[", "]")
        answer = rf"(-\infty,{end}{right}" if sign in (r"\le", "<") else rf"{left}{end},\infty)"
        return [
            f"{c}{term(-d)}={m}",
            f"{times(a, b)}={p}",
            f"{m}{term(-p)}={k}",
            f"{a}x{sign} {k}",
            f"x{sign} {end}",
        ], answer

    wordings = (f"Solve ${text}$ in interval notation.", f"Which interval solves ${text}$?")
    return Problem(text, wordings, solve, "Algebra", "interval")


FAMILIES = [chain, nested, product, fractions, equation, evaluate]
FAMILIES += [compose, remainder, expand, system, vector, inequality]


def held_out(family, problem) -> bool:
    digest = hashlib.sha256(f"{family.__name__} {problem.core}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT == 0


def right(number):
    return number


class Slip:
    """A calc that errs at one of the first few results, by an amount that people err by."""

    def __init__(self, rng):
        self.left, self.error = rng.randint(0, 3), rng.choice([-10, -2, -1, 1, 2, 10])

    def __call__(self, number):
        self.left -= 1
        return number + (self.error if self.left == -1 else 0)


CLOSING = dict(careful="The answer is", slip="The answer is", hasty="Clearly the answer is")
CLOSING["impatient"] = CLOSING["hasty"]


def solution(problem, style, rng):
    """Worked text in one of four styles: careful (every step), slip (every step, one of them
    wrong), impatient (the answer after a step or two), hasty (the answer at once)."""
    steps, answer = problem.solve(Slip(rng) if style == "slip" else right)
    if style in ("hasty", "impatient"):
        steps = steps[: rng.randint(1, 2)] if style == "impatient" else []
    work = ", ".join(steps) + ". " if steps else ""
    return rf"{work}{CLOSING[style]} $\boxed{{{answer}}}$."


def draw(rng, held=False):
    """A random (problem, level, family) on the wanted side of the split."""
    while True:
        family, level = rng.choice(FAMILIES), rng.randint(1, 5)
        problem = family(rng, level)
        if held_out(family, problem) == held:
            return problem, level, family


def record(problem, level, wording, family):
    """One line of the problem set, in MATH's format."""
    answer = problem.solve(right)[1]
    return dict(
        problem=problem.wordings[wording],
        solution=solution(problem, "careful", None),
        answer=answer,
        level=f"Level {level}",
        subject=problem.subject,
        family=family.__name__,
        kind="integer" if answer.lstrip("-").isdigit() else problem.kind,
    )


if __name__ == "__main__":
    rng = random.Random(0)
    for family in FAMILIES:
        for level in (1, 5):
            problem = family(rng, level)
            print(f"{family.__name__} {level}: {problem.wordings[level % 2]}")
            for style in CLOSING:
                print(f"    {style}: {solution(problem, style, rng)}")
