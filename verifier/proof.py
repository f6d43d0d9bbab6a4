"""Whether two functions are equal, exactly: as quotients of polynomials in sympy's ring Q[x, ...].

What is no polynomial (pi, sin x, a root) is an unknown of its own, known by what it is of: two of
them are one if their arguments have the same values at all points. So an equality found here holds;
where there are such unknowns, one that is not found may hold yet: sin^2 x + cos^2 x = 1.
"""

import functools
import math

from sympy import QQ, ring

from verifier.values import Values, is_whole

MAX_BITS = 20_000  # of a coefficient
MAX_POWER = 60  # of a sum that is multiplied out
RING, *UNKNOWNS = ring([f"x{i}" for i in range(12)], QQ)
MAX_CANCEL = 2000  # product of the degrees of what is cancelled


def bits(p) -> int:
    """Return the bits of the largest coefficient of a polynomial."""
    sizes = (n.bit_length() for c in p.values() for n in (c.numerator, c.denominator))
    return max(sizes, default=0)


class Proof:
    """Two trees as quotients of polynomials; ValueError if that is out of reach."""

    def __init__(self, a, b, values: Values):
        self.values = values
        self.known = {}  # {what an unknown is: its generator}
        self.sides = [self.quotient(a), self.quotient(b)]
        if not all(bottom for _, bottom in self.sides):
            raise ValueError("a division by zero")

    def same(self) -> bool | None:
        """Return whether both trees are equal; None if that is not known."""
        (a, b), (c, d) = self.sides
        equal = self.product(a, d) == self.product(b, c)
        return equal or (False if all(kind == "var" for kind, *_ in self.known) else None)

    def same_zeros(self) -> bool:
        """Return whether both are zero at the same places, as y - k/x and xy - k are."""
        for side in self.sides:
            size = math.prod(1 + degree for p in side for degree in p.degrees())
            self.values.spend(20 * size)
            if size > MAX_CANCEL:
                raise ValueError("too large")
        p, q = (top.cancel(bottom)[0] for top, bottom in self.sides)
        return bool(p and q) and p * q.LC == q * p.LC

    def quotient(self, tree):
        """Return numerator and denominator of a tree, elements of the ring."""
        kind, *parts = tree
        self.values.spend(5)
        if kind == "num":
            return RING(QQ(parts[0].numerator, parts[0].denominator)), RING.one
        if kind in ("+", "*"):
            top, bottom = self.quotient(parts[0])
            for part in parts[1:]:
                c, d = self.quotient(part)
                top = self.product(top, c if kind == "*" else d)
                top += self.product(bottom, c) if kind == "+" else 0
                bottom = self.product(bottom, d)
            return top, bottom
        if kind == "^" and is_whole(parts[1]):
            exponent = int(parts[1][1])
            top, bottom = (self.power(p, abs(exponent)) for p in self.quotient(parts[0]))
            return (top, bottom) if exponent > 0 else (bottom, top)
        if kind == "var":
            return self.unknown(tree), RING.one
        # Anything else is an unknown.
        inner = [part for part in parts if isinstance(part, tuple)]
        points = range(len(self.values.points))
        values = [tuple(self.values.at(part, k) for k in points) for part in inner]
        if any(sum(x is not None for x in found) < 2 for found in values):
            raise ValueError("no values")
        return self.unknown((kind, *parts[:1] * (kind == "fn"), *values)), RING.one

    def unknown(self, key):
        """Return the generator that stands for something."""
        if len(self.known) == len(UNKNOWNS):
            raise ValueError("too many unknowns")
        return self.known.setdefault(key, UNKNOWNS[len(self.known)])

    def power(self, p, exponent):
        """Return a power of a polynomial; only one of a single term may be large."""
        if exponent * bits(p) > MAX_BITS or (len(p) > 1 and exponent > MAX_POWER):
            raise ValueError("too large")
        if len(p) == 1:
            return p**exponent
        return functools.reduce(self.product, [p] * exponent, RING.one)

    def product(self, p, q):
        """Return the product of two polynomials, if the work is not too much."""
        size = bits(p) + bits(q)
        self.values.spend(len(p) * len(q) * (4 + size // 100) + 5)
        if size > MAX_BITS:
            raise ValueError("too large")
        return p * q
