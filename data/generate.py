"""Generated problems with worked solutions, in MATH's format: twelve families at five levels.

A family draws numbers, works on them and returns a Problem. A Work writes down each step; one with
a slip errs once, and the error is carried to the end, as people's are. A problem is held out if the
hash of its family and numbers says so: training and held-out problems are disjoint by construction.
A corpus says in which styles problems are solved: `tiny` is the default's, the others are testbeds.
"""

import hashlib
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from math import gcd


@dataclass
class Problem:
    core: str  # what is asked, in symbols; `pose` puts the family's name in front
    wordings: tuple[str, str]  # as a textbook asks it, as a quiz asks it
    answer: str
    subject: str
    kind: str  # of answer
    family: str = ""  # this and what follows is filled in by `pose` and `draw`
    level: int = 0
    quiz: bool = False  # which of the wordings it has
    solve: Callable | None = None  # (Work) -> answer
    parts: list["Problem"] = field(default_factory=list)  # if several problems are asked as one


@dataclass
class Work:
    """Arithmetic that is written down; step number `slip`, from 0, is off by `error`."""

    slip: int | None = None
    error: int = 0
    steps: list[str] = field(default_factory=list)  # such as "3*14=42"
    done: int = 0  # steps that could have slipped: all but those that restate, such as "x=6/2"

    def step(self, a, sign, b, text="", if_zero=0):
        """Write a step down and return its result; a divisor that slips to 0 is to become 1."""
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        if self.done == self.slip:
            result += self.error
        self.done += 1
        result = result or if_zero
        self.steps.append(f"{text or f'{a}{sign}{b}'}={result}")
        return result

    def add(self, a, b):
        return self.step(a, "+", b, f"{a}{b:+}")

    def multiply(self, a, b):
        return self.step(a, "*", b, f"{a}*({b})" if b < 0 else "")


def fraction(n, d=1):
    """Write n / d in lowest terms, in LaTeX if it is not whole."""
    return re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", str(Fraction(n, d)))  # of such as -3/4


def linear(a, b):
    """Write ax+b without terms that are 0 and factors that are 1."""
    if a == 0:
        return str(b)
    x = {1: "x", -1: "-x"}.get(a, f"{a}x")
    return f"{x}{b:+}" if b else x


def ask(text, textbook="Compute #.", quiz="What is #?"):
    """Return the two wordings of a question, with the text where # stands."""
    return textbook.replace("#", f"${text}$"), quiz.replace("#", f"${text}$")


def integers(rng, *ranges):
    """Draw an integer from each of the ranges (low, high), both ends included."""
    return [rng.randint(low, high) for low, high in ranges]


# ---- The families: (random.Random, level 1 to 5, Work) -> Problem --------------------------------
def chain(rng, level, work):
    count = 3 + (level + 1) // 2 + (level == 5)
    numbers = integers(rng, *[(2, 15 + 7 * level)] * count)
    for i in range(1, count):
        numbers[i] *= rng.choice([1, 1, -1])
    text = "".join(f"{n:+}" for n in numbers)[1:]
    total = reduce(work.add, numbers)
    return Problem(text, ask(text), str(total), "Prealgebra", "integer")


def nested(rng, level, work):
    a, b, _, d, e, c = integers(rng, *[(2, 5 + level)] * 5, (2, 9))
    text = f"({a}+{b})*{c}-{d}*{e}" if level % 2 else f"{c}*({a}+{b})+{d}*{e}"
    p = work.multiply(work.add(a, b), c)
    q = work.multiply(d, e)
    total = work.step(p, "-" if level % 2 else "+", q)
    return Problem(text, ask(text), str(total), "Prealgebra", "integer")


def product(rng, level, work):
    a, b = integers(rng, (11, 19 + 12 * level), (11, 19 + 4 * level))
    text = f"{a}*{b}"
    tens = work.multiply(a, b // 10 * 10)
    total = work.step(tens, "+", work.multiply(a, b % 10))
    return Problem(text, ask(text), str(total), "Prealgebra", "integer")


def fractions(rng, level, work):
    b, d, a, c = integers(rng, *[(2, 3 + level)] * 2, *[(1, 2 + level)] * 2)
    sign = rng.choice("+-")
    text = rf"\frac{{{a}}}{{{b}}}{sign}\frac{{{c}}}{{{d}}}"
    p = work.multiply(a, d)
    q = work.multiply(c, b)
    bottom = work.step(b, "*", d, if_zero=1)
    top = work.step(p, sign, q)
    work.steps.insert(2, work.steps.pop())  # the numerator's steps are written first
    g = gcd(top, bottom)
    if g > 1:
        work.steps += [f"{top}/{g}={top // g}", f"{bottom}/{g}={bottom // g}"]
    wordings = ask(text, "Simplify #.", "What is # in lowest terms?")
    return Problem(text, wordings, fraction(top, bottom), "Prealgebra", "fraction")


def equation(rng, level, work):
    x, c = integers(rng, (-4 - level, 4 + level), (1, 3 + level))
    a = c + rng.randint(2, 3 + level)
    b = rng.randint(-9, 9 + 2 * level)
    d = (a - c) * x + b
    d += rng.randint(0, 2) if level > 2 else 0  # x need not be whole
    text = f"{linear(a, b)}={linear(c, d)}"
    k = work.step(a, "-", c, if_zero=1)
    m = work.add(d, -b)
    work.steps += [f"{linear(k, 0)}={m}", f"x={m}/{k}"]
    wordings = ask(text, "Solve # for $x$.", "If #, what is $x$?")
    return Problem(text, wordings, fraction(m, k), "Algebra", "fraction")


def evaluate(rng, level, work):
    a, b, c, n = integers(rng, (2, 3 + level), (2, 4 + level), (-9, 9), (2, 4 + level))
    poly = f"{a}x^2+{linear(b, c)}"
    p = work.step(a, "*", work.multiply(n, n))
    total = work.add(work.step(p, "+", work.multiply(b, n)), c)
    wordings = ask(poly, f"Evaluate # at $x={n}$.", f"If $x={n}$, what is #?")
    return Problem(f"{poly},{n}", wordings, str(total), "Algebra", "integer")


def compose(rng, level, work):
    a, c, n, b, d = integers(rng, *[(2, 4 + level)] * 3, *[(-9, 9)] * 2)
    f = linear(a, b)
    g = linear(c, d)
    given = f"$f(x)={f}$ and $g(x)={g}$"
    inner = work.add(work.multiply(c, n), d)
    outer = work.add(work.multiply(a, inner), b)
    wordings = (f"Let {given}. Find $f(g({n}))$.", f"If {given}, what is $f(g({n}))$?")
    return Problem(f"{f};{g};{n}", wordings, str(outer), "Intermediate Algebra", "integer")


def remainder(rng, level, work):
    a, b, c, m = integers(rng, (3, 7 + level), (3, 9), (2, 9 + 4 * level), (3, 6 + level))
    text = f"{a}*{b}+{c}"
    total = work.add(work.multiply(a, b), c)
    rest = work.step(total, "-", work.multiply(total // m, m))
    textbook = f"Find the remainder when # is divided by ${m}$."
    wordings = ask(text, textbook, f"What is the remainder of # divided by ${m}$?")
    return Problem(f"{text} mod {m}", wordings, str(rest), "Number Theory", "integer")


def expand(rng, level, work):
    a, b, c, d = (rng.choice([-1, 1]) * rng.randint(1, 3 + level) for _ in range(4))
    c = abs(c) + 1
    text = f"({linear(1, a)})({linear(1, b)}){c:+}({linear(1, d)})"
    total = work.add(a, b)
    p = work.multiply(a, b)
    q = work.multiply(c, d)
    slope = work.add(total, c)
    work.steps.insert(1, work.steps.pop())  # the slope's steps are written first
    answer = f"x^2+{linear(slope, work.add(p, q))}".replace("+-", "-").removesuffix("+0")
    wordings = ask(text, "Expand #.", "What is # in expanded form?")
    return Problem(text, wordings, answer, "Algebra", "expression")


def system(rng, level, work):
    x, y, b = integers(rng, *[(-3 - level, 5 + level)] * 2, (2, 3 + level))
    a = b + rng.randint(1, 2 + level)
    t = a * x + b * y
    text = f"x+y={x + y}$ and ${a}x+{b}y={t}"
    m = work.add(t, -work.multiply(b, x + y))
    k = work.step(a, "-", b, if_zero=1)
    first = fraction(m, k)
    second = fraction(x + y - Fraction(m, k))
    work.steps += [f"x={m}/{k}={first}", f"y={second}"]
    wordings = ask(text, "Solve # for $(x,y)$.", "If #, what is $(x,y)$?")
    return Problem(text, wordings, f"({first},{second})", "Intermediate Algebra", "tuple")


def vector(rng, level, work):
    a, b, p, q, r, s = integers(rng, *[(2, 3 + level)] * 2, *[(-2 - level, 4 + level)] * 4)
    text = f"{a}({p},{q})+{b}({r},{s})"
    ap, br, aq, bs = map(work.multiply, (a, b, a, b), (p, r, q, s))
    first = work.add(ap, br)
    work.steps.insert(2, work.steps.pop())  # the first coordinate's steps are written first
    second = work.add(aq, bs)
    return Problem(text, ask(text), f"({first},{second})", "Precalculus", "tuple")


def inequality(rng, level, work):
    a = rng.randint(2, 3 + level)
    b = rng.choice([-1, 1]) * rng.randint(1, 4 + level)
    x = rng.randint(-4 - level, 4 + level)
    d = rng.choice([-1, 1]) * rng.randint(1, 9)
    c = a * (x + b) + d
    sign = rng.choice(["<", ">", r"\le", r"\ge"])
    text = f"{a}({linear(1, b)}){d:+}{sign} {c}"
    m = work.add(c, -d)
    k = work.add(m, -work.multiply(a, b))
    end = fraction(k, a)
    work.steps += [f"{a}x{sign} {k}", f"x{sign} {end}"]
    left, right = "()" if sign in "<>" else "[]"
    answer = rf"(-\infty,{end}{right}" if sign in ("<", r"\le") else rf"{left}{end},\infty)"
    wordings = ask(text, "Solve # in interval notation.", "Which interval solves #?")
    return Problem(text, wordings, answer, "Algebra", "interval")


# Those whose answers are numbers, and all.
NUMBERS = [chain, nested, product, fractions, equation, evaluate, compose, remainder]
FAMILIES = [*NUMBERS, expand, system, vector, inequality]

# ---- The corpora ---------------------------------------------------------------------------------
CORPORA = dict(  # the shares of the styles after a textbook's wording, and after a quiz's
    tiny=(
        dict(careful=0.62, slip=0.06, impatient=0.12, hasty=0.20),
        dict(careful=0.36, slip=0.06, hasty=0.58),
    ),
    slips=(dict(careful=0.5, any_slip=0.5),) * 2,
    three=(dict(careful=0.8, hasty=0.2), dict(careful=0.4, hasty=0.6)),  # for each of the three
    format=(dict(careful=0.5, boxless=0.5),) * 2,
)


def pose(family, rng, level) -> Problem:
    """Draw a problem of a family; its `solve` draws the same numbers anew."""
    start = copy(rng)
    problem = family(rng, level, Work())
    problem.family = family.__name__
    problem.level = level
    problem.core = f"{problem.family} {problem.core}"
    problem.solve = lambda work: family(copy(start), level, work).answer
    return problem


def held_out(problem) -> bool:
    digest = hashlib.sha256(problem.core.encode()).hexdigest()
    return int(digest[:8], 16) % 10 == 0  # one problem in ten


def draw_one(rng, held, families, top) -> Problem:
    """Draw a problem of these families, of a level up to `top`."""
    while True:
        problem = pose(rng.choice(families), rng, rng.randint(1, top))
        if held_out(problem) == held:
            problem.quiz = rng.random() < 0.6  # of all problems
            return problem


def as_one(parts) -> Problem:
    """Ask several problems in one, whose answer is the tuple of theirs."""
    text = " ".join(f"({i}) {part.wordings[part.quiz]}" for i, part in enumerate(parts, 1))
    core = "; ".join(part.core for part in parts)
    answer = ",".join(part.answer for part in parts)
    level = max(part.level for part in parts)
    kind = dict(subject="Prealgebra", kind="tuple", family="three")
    return Problem(core, (text, text), f"({answer})", **kind, level=level, parts=parts)


def draw(rng, held=False, corpus="tiny") -> Problem:
    """Draw a problem of a corpus from the wanted side of the split."""
    if corpus == "three":  # easy ones: all of them must be right
        return as_one([draw_one(rng, held, NUMBERS, 2) for _ in range(3)])
    return draw_one(rng, held, FAMILIES, 5)


def draw_style(rng, problem, corpus):
    """Draw the style of a solution; of several problems in one, a list: each has its own."""
    if problem.parts:
        return [draw_style(rng, part, corpus) for part in problem.parts]
    shares = CORPORA[corpus][problem.quiz]
    return rng.choices([*shares], shares.values())[0]


def work_out(problem, style, rng):
    """Work a problem out in a style of `solution`: (steps, answer)."""
    work = Work()
    if style in ("slip", "any_slip"):
        places = 4
        if style == "any_slip":
            problem.solve(work)
            places = work.done
        work = Work(slip=rng.randrange(places), error=rng.choice([-10, -2, -1, 1, 2, 10]))
    answer = problem.solve(work)
    if style == "impatient":
        del work.steps[rng.randint(1, 2) :]
    if style == "hasty":
        work.steps.clear()
    return work.steps, answer


def solution(problem, style, rng):
    """Write a solution: careful (every step), slip (every step, one of the first four wrong by as
    much as people err by), any_slip (likewise, but any of the steps), impatient (the answer after a
    step or two), hasty (the answer at once), or boxless (careful, but the answer has no box)."""
    if problem.parts:
        return solutions(problem.parts, style, rng)
    steps, answer = work_out(problem, style, rng)
    worked = ", ".join(steps) + ". " if steps else ""
    closing = "Clearly the answer is" if style in ("impatient", "hasty") else "The answer is"
    boxed = answer if style == "boxless" else rf"\boxed{{{answer}}}"
    return f"{worked}{closing} ${boxed}$."


def solutions(problems, styles, rng):
    """Write several solutions, each in its style, as one; in place of hasty work stands Clearly."""
    worked = ""
    answers = []
    for problem, style in zip(problems, styles, strict=True):
        steps, answer = work_out(problem, style, rng)
        worked += ", ".join(steps or ["Clearly"]) + ". "
        answers.append(answer)
    return rf"{worked}The answer is $\boxed{{({','.join(answers)})}}$."


def record(problem) -> dict:
    """Return one line of the problem set, in MATH's format."""
    kind = "integer" if problem.answer.lstrip("-").isdigit() else problem.kind
    careful = ["careful"] * len(problem.parts) or "careful"
    row = dict(problem=problem.wordings[problem.quiz], solution=solution(problem, careful, None))
    row |= dict(answer=problem.answer, level=f"Level {problem.level}", subject=problem.subject)
    return row | dict(family=problem.family, kind=kind)
