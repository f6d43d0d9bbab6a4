"""What a tree of latex.py is worth: a complex number of 800 bits, bounded before it is computed.

What would be too large, or has no value, is a ValueError or an ArithmeticError: such a tree is
opaque, and equals only the same tree.
"""

import itertools
import random

from mpmath.ctx_mp import MPContext

MAX_DEPTH = 100  # of a tree, for recursion
MAX_WORK = 40_000  # of one verdict, in microseconds or so
MAX_SIZE = 480  # bits of all numbers in both trees: so many may cancel, as in sqrt(10^60+1)-10^30
TRIG = {"sin", "cos", "tan", "csc", "sec", "cot"}
REAL = {"max": max, "min": min}
BOUNDED = {"sum", "prod", "int", "lim"}  # these are not computed: equal only if they read alike
BENDING = [("fn", "floor"), ("fn", "abs"), ("fn", "max"), ("fn", "min"), ("fn", "arctan")]
TINY, LARGE = 2**-80, 10**18  # of a function's argument, if it is not 0
LIMITS = {"arctan": 2**600, "exp": 10**6, "!": 3000, "sinh": 100, "cosh": 100, "tanh": 100}
# Where functions are compared: the points of which a hash of both texts draws the coordinates.
RANGES = [(1, 10), (-10, -1), (0, 1), (100, 1000), (0, 1)]
# The precision never changes, and what mpmath keeps (pi, log 2) is computed here and now to more
# bits than are ever asked for: threads do not disturb each other.
MP = MPContext()
MP.prec = 4000
+MP.pi, MP.ln(3), MP.exp(1), MP.atan(2)
MP.prec = 800
DIGITS = 700  # bits in which equal numbers agree; with 60 more it is a rounding error
CLOSE = MP.mpf(2) ** -DIGITS
SMALL = {*map(MP.mpf, range(-60, 61))}  # exponents
CONSTANTS = {"pi": +MP.pi, "e": MP.exp(1), "i": MP.mpc(0, 1), "inf": MP.inf}
FUNCTIONS = dict(sin=MP.sin, cos=MP.cos, tan=MP.tan, sinh=MP.sinh, cosh=MP.cosh, tanh=MP.tanh)
INVERSE = dict(csc="sin", sec="cos", cot="tan", csch="sinh", sech="cosh", coth="tanh")
FUNCTIONS |= {name: lambda x, f=FUNCTIONS[f]: 1 / f(x) for name, f in INVERSE.items()}
FUNCTIONS |= dict(arcsin=MP.asin, arccos=MP.acos, arctan=MP.atan, ln=MP.ln, log=MP.ln, exp=MP.exp)


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


def is_whole(tree) -> bool:
    """Return whether a tree is a whole number."""
    return tree[0] == "num" and tree[1].denominator == 1


def is_rational(tree) -> bool:
    """Return whether a tree without variables is made of fractions alone."""
    parts = list(walk(tree))
    whole = all(is_whole(part[2]) for part in parts if part[0] == "^")
    return whole and {part[0] for part in parts} <= {"num", "+", "*", "^", "of"}


def degree(tree) -> int:
    """Return 0 for a constant, 1 for a linear function, and 2 or more for any other."""
    kind, *parts = tree
    degrees = [degree(part) for part in parts if isinstance(part, tuple)]
    if kind in ("var", "+"):
        return max(degrees, default=1)
    return sum(degrees) * (1 if kind == "*" else 2)


def close(x, y) -> bool:
    """Return whether two values are the same number but for the last 100 bits."""
    if MP.isinf(x) or MP.isinf(y):
        return x == y
    return abs(x - y) <= CLOSE * max(abs(x), abs(y))


class Values:
    """The values of an answer's tree and of the gold one at the same points of their variables. The
    points come from a hash of both: none are known before an answer is written."""

    def __init__(self, *trees, work=MAX_WORK):
        self.trees = trees
        self.work = work
        self.cache = {}
        self.points = self.unclear = ()

    def prepare(self):
        """Look through both trees and draw the points, if that is not done yet; return itself."""
        if self.points:
            return self
        trees = self.trees
        parts = [part for tree in trees for part in walk(tree)]
        bends = [part for part in parts if part[:2] in BENDING and degree(part)]
        roots = [part[1] for part in parts if part[0] == "^" and not is_whole(part[2])]
        self.names = sorted({part[1] for part in parts if part[0] == "var"})
        self.real = ("i",) not in parts  # then a root of -1 is outside of a function's domain
        # What steps, and what bends in a way of its own, agrees with others almost everywhere:
        # floor(x) and |x^2 - 2| are unknown functions. |x - 1000| bends only once.
        bend_once = [x for x in bends if x[1] != "floor" and max(map(degree, x[2:])) < 2]
        self.unclear = {*map(id, bends)} - {*map(id, bend_once)}
        self.kinks = bool(bend_once) or any(map(degree, roots))
        draw = random.Random(repr(trees) if any(x[0] in ("var", "fn") for x in parts) else 0)
        self.seed = draw.random()  # of unknown functions
        size = sum(map(self.size, trees))
        self.blind = size > MAX_SIZE  # more digits may cancel than are computed
        # Points, for what bends once also beyond all numbers on either side.
        far = 2 ** min(size + 10, MAX_SIZE)
        ranges = RANGES + [(far, 2 * far), (-2 * far, -far)] * self.kinks
        self.points = [{} for _ in ranges] if self.names else [{}]
        cells = itertools.product(range(len(self.points)), enumerate(self.names))
        for k, (j, name) in cells:
            low, high = ranges[k]
            sign = {2: (-1) ** j, 3: (-1) ** (j // 2), 4: -((-1) ** j)}.get(k, 1)
            share = MP.mpf(draw.getrandbits(64) + 1) / (2**64 + 1)
            self.points[k][name] = sign * (low + (high - low) * share)
        return self

    def size(self, tree) -> int:
        """Return the bits of all numbers in a tree together; of a list, its largest one's."""
        kind, *parts = tree
        if kind == "num":
            n, d = parts[0].as_integer_ratio()
            return 0 if abs(n) <= d == 1 else n.bit_length() + d.bit_length()
        sizes = [self.size(part) for part in parts if isinstance(part, tuple)]
        if kind in ("fn", "^") and not variables(tree):  # as large as they are, or small: 10^{-150}
            x = self.value(tree, {})
            sizes.append(abs(MP.mag(x)) if x and MP.isfinite(x) else 0)
        return sum(sizes) if kind in ("+", "*", "^", "fn") else max(sizes, default=0)

    def spend(self, work):
        """Count work against what one verdict may cost."""
        self.work -= work
        if self.work < 0:
            raise ValueError("too much work")

    def at(self, tree, k):
        """Return a tree's value at the k-th point; None if it has none there."""
        if self.prepare().blind:
            raise ValueError("too many digits")
        values = self.cache.setdefault(tree, {})
        if k not in values:
            try:
                value = self.value(tree, self.points[k])
            except (ValueError, ArithmeticError):
                value = None
            outside = self.real and self.names and isinstance(value, MP.mpc)
            values[k] = None if outside else value
        return values[k]

    def unforeseen(self, points) -> bool:
        """Return whether these points are enough: two, and for |x - 9| one far away."""
        return len(points) > 1 and (not self.kinks or points[-1] >= len(RANGES))

    def number(self, tree):
        """Return the real number that a tree is; ValueError if it is none."""
        x = self.at(tree, 0)
        if x is None or isinstance(x, MP.mpc):
            raise ValueError("no real number")
        return x

    def value(self, tree, point):
        """Return a tree's value at a point; ValueError or ArithmeticError if it has none."""
        kind, *parts = tree
        self.spend(5)
        if kind == "num":
            return MP.mpf(parts[0].numerator) / parts[0].denominator
        if kind == "var":
            return point[parts[0]]
        if kind in CONSTANTS:
            return CONSTANTS[kind]
        if kind == "of":  # 20% of something is a fifth of it, but 20 degrees are 20
            return self.value(parts[0], point) / (100 if ("percent", 1) in parts[1] else 1)
        if kind not in ("fn", "+", "*", "^"):
            raise ValueError("no number")
        x, *others = [self.value(part, point) for part in parts if isinstance(part, tuple)]
        if id(tree) in self.unclear:
            whole = MP.floor(x) if parts[0] == "floor" else 0  # floor(x + 1) is floor(x) + 1
            x = whole + self.unknown(parts[0], x - whole, *others)
        elif kind == "fn":
            x = self.call(parts[0], x, *others)
        for y in others if kind != "fn" else ():
            self.spend(10)
            x = {"+": self.sum, "*": MP.fmul, "^": self.power}[kind](x, y)
        size = MP.mag(x)
        if MP.isnan(size) or 10**7 < abs(size) < MP.inf:
            raise ValueError("no number, or too large")
        return x

    def sum(self, x, y):
        """Return x + y; ValueError if one term is lost in the other: 1 + e^{-1000} is not 1."""
        small, large = sorted([MP.mag(x), MP.mag(y)])
        if x and y and small < large - DIGITS < MP.inf:
            raise ValueError("a term is lost")
        # Equal terms of opposite sign leave a rounding error: it is 0.
        total = x + y
        return MP.zero if MP.mag(total) < large - DIGITS - 60 else total

    def power(self, base, exponent):
        """Return base^exponent; of a negative number the real root, if there is one."""
        if exponent in SMALL and MP.isfinite(base):
            return base ** int(exponent)
        self.spend(200)
        if base not in (-1, 0, 1) and abs(exponent) * (1 + abs(MP.mag(base))) > 2 * 10**6:
            raise ValueError("too large")
        if exponent and abs(exponent) < TINY:
            raise ValueError("too small")
        if not isinstance(base, MP.mpc) and base < 0:
            for q in range(1, 16, 2):  # an odd root, if the exponent is p / q
                self.spend(20)
                p = MP.nint(exponent * q)
                if abs(exponent * q - p) <= CLOSE * abs(p):
                    return self.power(-base, exponent) * (-1) ** (int(p) % 2)
            self.spend(300)
        return MP.power(base, exponent)

    def call(self, name, x, *others):
        """Return the value of a function at values."""
        self.spend(150)
        # 1. Functions that have limits of their own, or none.
        if name == "abs":
            return abs(x)
        if name == "binom":
            low = self.call("!", others[0]) * self.call("!", self.sum(x, -others[0]))
            return self.call("!", x) / low
        least = TINY if name in FUNCTIONS else 0
        if any(y and not least < abs(y) < LIMITS.get(name, LARGE) for y in (x, *others)):
            raise ValueError("too small or too large")
        # 2. Factorials, and functions of real numbers.
        if name == "!":
            self.spend(1000)
            return MP.gamma(x + 1)
        if name in REAL or name == "floor":
            if any(isinstance(y, MP.mpc) for y in (x, *others)):
                raise ValueError("no real number")
            if name in REAL:
                return REAL[name]((x, *others))
            nearest = MP.nint(x)
            return nearest if close(x, nearest) else MP.floor(x)
        # 3. Functions of complex numbers; sin(pi) is 0 but for the rounding of pi.
        if name in FUNCTIONS:
            if len(others) > (name == "log"):
                raise ValueError("too many arguments")
            result = FUNCTIONS[name](x)
            if name not in ("exp", "sech", "csch") and abs(result) < CLOSE < TINY < abs(x):
                return MP.zero
            return result / MP.ln(others[0] if others else 10) if name == "log" else result
        return self.unknown(name, x, *others)

    def unknown(self, name, *values):
        """Return the value of f(x), the same unknown function on both sides."""
        self.spend(150)
        draw = random.Random(f"{self.seed} {name}")
        angle = sum(MP.mpf(draw.random()) * y for y in (1, *values))
        if not abs(angle) < LARGE:
            raise ValueError("too large")
        return MP.sin(angle)
