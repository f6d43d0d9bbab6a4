"""What a tree of latex.py is worth: exact Fractions where it can be, bounded everywhere.

Every size is estimated before anything is computed. What would be too large, or has no value, is a
ValueError or an ArithmeticError: such a tree is opaque, and equals only the same tree.
"""

import itertools
import math
from fractions import Fraction

from mpmath.ctx_mp import MPContext
from sympy import QQ, integer_nthroot, ring

MAX_DEPTH = 100  # of a tree, for recursion
MAX_BITS = 20_000  # of a numerator or denominator: 2004! fits
MAX_WORK = 400_000  # of one verdict: the bits of all exact results, and what else takes time
MAX_POWER = 60  # of a polynomial that is expanded
# Irrational numbers have 420 bits (126 digits) and are equal if they agree to 96 digits. The
# context's precision never changes, and what its functions keep (pi, log 2) is computed here and
# now to more bits than they ever ask for: threads do not disturb each other.
MP = MPContext()
MP.prec = 4000
+MP.pi, MP.ln(3), MP.exp(1), MP.atan(2)
MP.prec = 420
EQUAL, ZERO = MP.mpf(2) ** -320, MP.mpf(2) ** -380
CONSTANTS = {"pi": +MP.pi, "e": MP.exp(1), "i": MP.mpc(0, 1), "inf": MP.inf}
TRIG = {"sin": MP.sin, "cos": MP.cos, "tan": MP.tan, "cot": lambda x: 1 / MP.tan(x)}
TRIG |= {"sec": lambda x: 1 / MP.cos(x), "csc": lambda x: 1 / MP.sin(x)}
FUNCTIONS = {"arcsin": MP.asin, "arccos": MP.acos, "arctan": MP.atan, "ln": MP.ln, "exp": MP.exp}
FUNCTIONS |= {"sinh": MP.sinh, "cosh": MP.cosh, "tanh": MP.tanh, "log": MP.ln} | TRIG
WHOLE = {"!": math.factorial, "binom": math.comb, "gcd": math.gcd, "lcm": math.lcm}
NAMES = {*FUNCTIONS, "gcd", "lcm", "max", "min"}
ROUND = {"floor": (math.floor, MP.floor), "ceil": (math.ceil, MP.ceil)}

POINTS = 4
PRIMES = [p for p in range(37, 330) if all(p % q for q in range(2, 19))]


def walk(tree):
    """A tree and all trees in it; ValueError if it is too deep for recursion."""
    todo = [(tree, 0)]
    while todo:
        tree, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        yield tree
        todo += [(part, depth + 1) for part in tree[1:] if isinstance(part, tuple)]


def variables(tree) -> set[str]:
    return {x[1] for x in walk(tree) if x[0] == "var"}


def real(x):
    """A value as a number of MP."""
    return MP.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def close(x, y) -> bool:
    """Whether two values are the same number: exactly, or to 96 digits of the larger one."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = real(x), real(y)
    if MP.isinf(x) or MP.isinf(y):
        return x == y
    return bool(abs(x - y) <= EQUAL * max(abs(x), abs(y)))


def power(a, b):
    """a^b, exact where it is rational. An odd root of a negative number is the real one."""
    if isinstance(b, Fraction) and b.denominator % 2 and not isinstance(a, MP.mpc) and a < 0:
        return power(-a, b) * (1 - 2 * (b.numerator % 2))
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        exponent = real(b) * MP.ln(real(a))
        if not abs(exponent) < 10**6:
            raise ValueError("too large")
        whole = isinstance(b, Fraction) and b.denominator == 1
        return real(a) ** int(b) if whole else MP.exp(exponent)
    size = max(abs(a.numerator), a.denominator)
    if size > 1 and size.bit_length() * abs(b) > MAX_BITS + 1:
        raise ValueError("too large")
    (p, whole), (q, too) = (
        integer_nthroot(abs(n), b.denominator) for n in (a.numerator, a.denominator)
    )
    if a >= 0 and whole and too:
        return Fraction(int(p), int(q)) ** b.numerator
    return MP.exp(real(b) * MP.ln(real(a)))


def call(name, x, *others):
    """The value of a function at values."""
    if name in WHOLE and all(isinstance(v, Fraction) and v.denominator == 1 for v in (x, *others)):
        if not all(0 <= v <= 3000 for v in (x, *others)):
            raise ValueError("too large")
        return Fraction(WHOLE[name](int(x), *map(int, others)))
    if name == "binom" and others[0] in range(1, 20):
        return math.prod((x - i) / (i + 1) for i in range(int(others[0])))
    if name in ("max", "min"):
        return {"max": max, "min": min}[name](x, *others)
    if name == "abs":
        return abs(x)
    if name in ROUND and isinstance(x, Fraction):
        return Fraction(ROUND[name][0](x))
    if name in ROUND:
        return Fraction(int(MP.nint(x) if close(x, MP.nint(x)) else ROUND[name][1](x)))
    if name in FUNCTIONS:
        if not abs(x) < 10 ** (6 if name == "exp" else 18):
            raise ValueError("too large")
        base = MP.ln(real(others[0] if others else Fraction(10))) if name == "log" else 1
        return FUNCTIONS[name](real(x)) / base
    # f(x), and n! of what is no number: an unknown function, but the same one on both sides.
    terms = [(k + 2) * real(v) * real(v) for k, v in enumerate((x, *others))]
    return MP.sqrt(sum(terms) + sum(map(ord, name)))


class Values:
    """The values of some trees at fixed sample points of their variables."""

    def __init__(self, *trees):
        found = [tree for root in trees for tree in walk(root)]
        self.names = sorted({tree[1] for tree in found if tree[0] == "var"})
        if len(self.names) * POINTS > len(PRIMES):
            raise ValueError("too many variables")
        # |x| is x at positive points, where sqrt(x y) is sqrt(x) sqrt(y): negative only if needed.
        signs = any(tree[0] == "fn" and tree[1] in ("abs", *ROUND) for tree in found)
        self.points = [{} for _ in range(POINTS if self.names else 1)]
        for (j, name), (k, point) in itertools.product(
            enumerate(self.names), enumerate(self.points)
        ):
            point[name] = Fraction(PRIMES[POINTS * j + k], -32 if signs and (j + k) % 2 else 32)
        self.work, self.cache = MAX_WORK, {}

    def of(self, tree) -> list:
        """Its values at the sample points; None where it has none."""
        if tree not in self.cache:
            self.cache[tree] = [self.at(point, tree) for point in self.points]
        return self.cache[tree]

    def number(self, tree):
        """The real number that a tree is; ValueError if it is none."""
        x = self.of(tree)[0]
        if x is None or isinstance(x, MP.mpc):
            raise ValueError("no real number")
        return real(x)

    def at(self, point, tree):
        try:
            return self.value(tree, point)
        except (ValueError, ArithmeticError, TypeError):
            return None

    def value(self, tree, point):
        kind, *parts = tree
        if kind == "num":
            return self.bounded(parts[0])
        if kind == "var":
            return point[parts[0]]
        if kind in CONSTANTS:
            return CONSTANTS[kind]
        if kind == "fn":
            return self.bounded(call(parts[0], *[self.value(x, point) for x in parts[1:]]))
        if kind not in ("+", "*", "^"):
            raise ValueError("no number")
        total, *others = [self.value(x, point) for x in parts]
        for x in others:
            total = self.bounded(self.combine(kind, total, x))
        return total

    def combine(self, kind, a, b):
        if kind == "^":
            return power(a, b)
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = real(a), real(b)
        if kind == "*":
            return a * b
        total = a + b
        if not isinstance(total, Fraction) and abs(total) <= ZERO * max(abs(a), abs(b)):
            return total if MP.isinf(total) else Fraction(0)  # equal terms of opposite sign
        return total

    def bounded(self, x):
        """x, if neither it nor the work so far is too large."""
        if isinstance(x, Fraction):
            bits = x.numerator.bit_length() + x.denominator.bit_length()
            self.spend(bits)
            if bits > 2 * MAX_BITS:
                raise ValueError("too large")
        elif MP.isnan(x) or (MP.isfinite(x) and x and abs(MP.mag(x)) > 10**7):
            raise ValueError("no number, or too large")
        return x

    def same_fraction(self, a, b, scaled=False) -> bool:
        """Whether two rational functions are the same in Q(x, ...), if `scaled` up to a factor.

        True also for constants, and for what is no rational function or too large to expand.
        """
        if not self.names:
            return True
        numbers, *gens = ring([f"x{i}" for i in range(len(self.names))], QQ)
        gens = dict(zip(self.names, gens, strict=True)) | {"": numbers.one}
        try:
            (p, q), (r, s) = self.fraction(a, gens), self.fraction(b, gens)
            x, y = self.product(p, s), self.product(q, r)
        except (ValueError, ArithmeticError):
            return True
        return x * y.LC == y * x.LC if scaled else x == y

    def fraction(self, tree, gens):
        """A rational function's numerator and denominator, exact elements of Q[x, y, ...]."""
        kind, *parts = tree
        one = gens[""]
        if kind == "num":
            return one * QQ(parts[0].numerator, parts[0].denominator), one
        if kind == "var":
            return gens[parts[0]], one
        if kind == "^" and parts[1][0] == "num" and abs(parts[1][1]) in range(MAX_POWER):
            base = self.fraction(parts[0], gens)[:: 1 if parts[1][1] > 0 else -1]
            parts = [base] * abs(int(parts[1][1]))
        elif kind in ("+", "*"):
            parts = [self.fraction(part, gens) for part in parts]
        else:
            raise ValueError("no rational function")
        a, b = (one * 0, one) if kind == "+" else (one, one)
        for c, d in parts:
            if kind == "+":
                a, b = self.product(a, d) + self.product(b, c), self.product(b, d)
            else:
                a, b = self.product(a, c), self.product(b, d)
        return a, b

    def product(self, p, q):
        """The product of two polynomials, if the work is not too much."""
        self.spend(10 * len(p) * len(q))
        return p * q

    def spend(self, work):
        """Count work against what one verdict may cost."""
        self.work -= work
        if self.work < 0:
            raise ValueError("too much work")
