"""Sets of real numbers in an answer: intervals, unions, differences, inequalities in one letter.

Two of them are the same if they have the same members among all their ends, between and beyond.
"""

import itertools
from fractions import Fraction

from verifier.latex import links
from verifier.values import Values, close, real, variables

OPERATIONS = {"cup": any, "or": any, "cap": all}


def is_region(tree) -> bool:
    """Whether a tree is a set of reals that `contains` knows; a point (1,2) also reads as one."""
    if tree[0] in (*OPERATIONS, "setminus"):
        return all(is_region(x) for x in tree[1:])
    if tree[0] == "rel":
        sides = [bool(variables(x)) for x in tree[2:]]
        alone = all((x[0] == "var") != (y[0] == "var") for _, x, y in links(tree))
        return sum(sides) == 1 and alone and not set(tree[1]) & {"=", "in", "~"}
    interval = tree[0] == "span" and len(tree) == 5 and tree[1] in "([" and tree[2] in ")]"
    return interval or (tree[0] == "set" and len(tree) > 1)


def same_region(a, b, values: Values) -> bool:
    """Equality of two trees for which is_region holds; ValueError if an end is no real number.

    The empty set is equal to none: as an interval a gold point (5,3) would be empty, too.
    """
    if len(variables(a) | variables(b)) > 1:
        return False
    values.spend(3000)
    finite = sorted(x for x in ends(a, values) + ends(b, values) if abs(x) < float("inf"))
    finite = [finite[0] - 1, *finite, finite[-1] + 1] if finite else [real(Fraction(0))]
    probes = finite + [(x + y) / 2 for x, y in itertools.pairwise(finite)]
    inside = [contains(b, x, values) for x in probes]
    return any(inside) and inside == [contains(a, x, values) for x in probes]


def ends(tree, values) -> list:
    """All numbers at which a region may begin or end."""
    parts = [x for x in tree[1:] if not isinstance(x, str)]
    if tree[0] in ("set", "span"):
        return [values.number(x) for x in parts]
    if tree[0] == "rel":
        return [values.number(x) for x in tree[2:] if x[0] != "var"]
    return [end for x in parts for end in ends(x, values)]


def contains(tree, x, values) -> bool:
    """Whether the real number x is in a region."""
    kind, *parts = tree
    if kind == "set":
        return any(close(values.number(y), x) for y in parts)
    if kind == "span":
        low, high = ("<=" if bracket in "[]" else "<" for bracket in parts[:2])
        return holds(low, values.number(parts[2]), x) and holds(high, x, values.number(parts[3]))
    if kind == "rel":
        sides = [x if side[0] == "var" else values.number(side) for side in tree[2:]]
        return all(holds(op, *pair) for op, *pair in links((kind, tree[1], *sides)))
    first, *others = [contains(part, x, values) for part in parts]
    if kind == "setminus":
        return first and not any(others)
    return OPERATIONS[kind]([first, *others])


def holds(op, x, y) -> bool:
    """x op y for real numbers."""
    if close(x, y):
        return op in ("<=", ">=")
    return op == "!=" or (x < y) == (op[0] == "<")
