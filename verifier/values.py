"""What a tree of latex.py is worth: exact Fractions where it can be, bounded everywhere.

Every size is estimated before anything is computed. What would be too large, or has no value, is a
ValueError or an ArithmeticError: such a tree is opaque, and equals only the same tree.
"""

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
TRIG = dict(sin=MP.sin, cos=MP.cos, tan=MP.tan)
TRIG |= dict(csc=lambda x: 1 / MP.sin(x), sec=lambda x: 1 / MP.cos(x), cot=lambda x: 1 / MP.tan(x))
FUNCTIONS = TRIG | dict(arcsin=MP.asin, arccos=MP.acos, arctan=MP.atan)
FUNCTIONS |= dict(sinh=MP.sinh, cosh=MP.cosh, tanh=MP.tanh, ln=MP.ln, log=MP.ln, exp=MP.exp)
WHOLE = {"!": math.factorial, "binom": math.comb, "gcd": math.gcd, "lcm": math.lcm}
KEEPING = {"max": max, "min": min, "abs": abs}
NAMES = {*FUNCTIONS, "gcd", "lcm", "max", "min"}
ROUND = {"floor": (math.floor, MP.floor), "ceil": (math.ceil, MP.ceil)}
POINTS = 4  # at which functions are compared: primes / 32
PRIMES = [p for p in range(37, 330) if all(p % q for q in range(2, 19))]


def walk(tree):
    """Yield a tree and all trees in it; ValueError if it is too deep for recursion."""
    todo = [(tree, 0)]
    while todo:
        tree, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        yield tree
        todo += [(part, depth + 1) for part in tree[1:] if isinstance(part, tuple)]


def variables(tree) -> set[str]:
    """Return the names of all variables in a tree."""
    return {part[1] for part in walk(tree) if part[0] == "var"}


def real(x):
    """Return a value as a number of MP."""
    return MP.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def close(x, y) -> bool:
    """Return whether two values are the same number: exactly, or to 96 digits of the larger."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = real(x), real(y)
    infinite = MP.isinf(x) or MP.isinf(y)
    return x == y if infinite else abs(x - y) <= EQUAL * max(abs(x), abs(y))


def power(base, exponent):
    """Return base^exponent, exact where it is rational."""
    rational = isinstance(exponent, Fraction)
    if rational and exponent.denominator % 2 and not isinstance(base, MP.mpc) and base < 0:
        return power(-base, exponent) * (-1) ** (exponent.numerator % 2)  # the real odd root
    if rational and isinstance(base, Fraction):
        size = max(abs(base.numerator), base.denominator)
        if size > 1 and size.bit_length() * abs(exponent) > MAX_BITS + 1:
            raise ValueError("too large")
        roots = [integer_nthroot(abs(n), exponent.denominator) for n in base.as_integer_ratio()]
        if base >= 0 and all(exact for _, exact in roots):
            return Fraction(*[int(root) for root, _ in roots]) ** exponent.numerator
    base, exponent = real(base), real(exponent)
    if not abs(exponent * MP.ln(base)) < 10**6:
        raise ValueError("too large")
    return MP.power(base, exponent)


def call(name, x, *others):
    """Return the value of a function at values."""
    values = (x, *others)
    # 1. Functions of whole numbers.
    if name in WHOLE and all(isinstance(v, Fraction) and v.denominator == 1 for v in values):
        if not all(0 <= v <= 3000 for v in values):
            raise ValueError("too large")
        return Fraction(WHOLE[name](*map(int, values)))
    if name == "binom" and others[0] in range(1, 20):
        return math.prod((x - i) / (i + 1) for i in range(int(others[0])))
    # 2. Functions that keep or make fractions.
    if name in KEEPING:
        return KEEPING[name](*values)
    if name in ROUND:
        if isinstance(x, Fraction):
            return Fraction(ROUND[name][0](x))
        nearest = MP.nint(x)
        return Fraction(int(nearest if close(x, nearest) else ROUND[name][1](x)))
    # 3. Functions of real and complex numbers.
    if name in FUNCTIONS:
        if not abs(x) < 10 ** (6 if name == "exp" else 18):
            raise ValueError("too large")
        base = real(others[0] if others else Fraction(10))
        return FUNCTIONS[name](real(x)) / (MP.ln(base) if name == "log" else 1)
    # 4. f(x), and n! of what is no number: an unknown function, but the same one on both sides.
    terms = [(k + 2) * real(v) * real(v) for k, v in enumerate(values)]
    return MP.sqrt(sum(terms) + sum(map(ord, name)))


class Values:
    """The values of some trees at fixed sample points of their variables."""

    def __init__(self, *trees):
        self.names = sorted(set().union(*map(variables, trees)))
        if len(self.names) * POINTS > len(PRIMES):
            raise ValueError("too many variables")
        # |x| is x at positive points, where sqrt(x y) is sqrt(x) sqrt(y): negative only if needed.
        functions = {part[1] for tree in trees for part in walk(tree) if part[0] == "fn"}
        signs = (32, -32) if functions & {"abs", *ROUND} else (32, 32)
        self.points = [{} for _ in range(POINTS if self.names else 1)]
        for k, point in enumerate(self.points):
            for j, name in enumerate(self.names):
                point[name] = Fraction(PRIMES[POINTS * j + k], signs[(j + k) % 2])
        self.work = MAX_WORK
        self.cache = {}

    def of(self, tree) -> list:
        """Return a tree's values at the sample points; None where it has none."""
        if tree not in self.cache:
            values = self.cache[tree] = []
            for point in self.points:
                try:
                    values.append(self.value(tree, point))
                except (ValueError, ArithmeticError, TypeError):
                    values.append(None)
        return self.cache[tree]

    def number(self, tree):
        """Return the real number that a tree is; ValueError if it is none."""
        x = self.of(tree)[0]
        if x is None or isinstance(x, MP.mpc):
            raise ValueError("no real number")
        return real(x)

    def value(self, tree, point):
        """Return a tree's value at a point; ValueError or ArithmeticError if it has none."""
        kind, *parts = tree
        if kind in ("num", "var"):
            return self.bounded(parts[0] if kind == "num" else point[parts[0]])
        if kind in CONSTANTS:
            return CONSTANTS[kind]
        if kind == "fn":
            return self.bounded(call(parts[0], *[self.value(part, point) for part in parts[1:]]))
        if kind not in ("+", "*", "^"):
            raise ValueError("no number")
        total, *others = [self.value(part, point) for part in parts]
        for x in others:
            total = self.bounded(self.combine(kind, total, x))
        return total

    def combine(self, kind, a, b):
        """Return a + b, a * b or a ^ b."""
        if kind == "^":
            return power(a, b)
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = real(a), real(b)
        total = a * b if kind == "*" else a + b
        if kind == "*" or isinstance(total, Fraction) or MP.isinf(total):
            return total
        # Equal terms of opposite sign leave a rounding error: it is 0.
        return Fraction(0) if abs(total) <= ZERO * max(abs(a), abs(b)) else total

    def bounded(self, x):
        """Return x, if neither it nor the work so far is too large."""
        if isinstance(x, Fraction):
            bits = x.numerator.bit_length() + x.denominator.bit_length()
            self.spend(bits)
            if bits > 2 * MAX_BITS:
                raise ValueError("too large")
        elif MP.isnan(x) or (MP.isfinite(x) and x and abs(MP.mag(x)) > 10**7):
            raise ValueError("no number, or too large")
        return x

    def same_fraction(self, a, b, scaled=False) -> bool:
        """Return whether rational functions are the same, if `scaled` up to a factor; True for
        constants, and for what is no rational function or too large to expand."""
        if not self.names:
            return True
        polynomials, *gens = ring([f"x{i}" for i in range(len(self.names))], QQ)
        gens = dict(zip(self.names, gens, strict=True))
        try:
            top, bottom = self.fraction(a, gens, polynomials.one)
            other_top, other_bottom = self.fraction(b, gens, polynomials.one)
            x, y = self.product(top, other_bottom), self.product(bottom, other_top)
        except (ValueError, ArithmeticError):
            return True
        return x * y.LC == y * x.LC if scaled else x == y

    def fraction(self, tree, gens, one):
        """Return a rational function's numerator and denominator, elements of Q[x, y, ...]."""
        kind, *parts = tree
        if kind == "num":
            return one * QQ(parts[0].numerator, parts[0].denominator), one
        if kind == "var":
            return gens[parts[0]], one
        if kind == "^" and parts[1][0] == "num" and abs(parts[1][1]) in range(MAX_POWER):
            exponent = int(parts[1][1])
            top, bottom = self.fraction(parts[0], gens, one)
            fractions = [(top, bottom) if exponent > 0 else (bottom, top)] * abs(exponent)
        elif kind in ("+", "*"):
            fractions = [self.fraction(part, gens, one) for part in parts]
        else:
            raise ValueError("no rational function")
        # With each part c / d, a / b becomes the sum (ad + bc) / bd or the product ac / bd.
        a, b = one * (kind != "+"), one
        for c, d in fractions:
            a = self.product(a, d) + self.product(b, c) if kind == "+" else self.product(a, c)
            b = self.product(b, d)
        return a, b

    def product(self, p, q):
        """Return the product of two polynomials, if the work is not too much."""
        self.spend(10 * len(p) * len(q))
        return p * q

    def spend(self, work):
        """Count work against what one verdict may cost."""
        self.work -= work
        if self.work < 0:
            raise ValueError("too much work")
