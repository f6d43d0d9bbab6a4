"""Sets of real numbers in an answer: intervals, unions, differences, inequalities in one letter.

Two of them are the same if they have the same members among all their ends, between and beyond.
"""

import itertools

from verifier.latex import links
from verifier.values import MP, Values, close, variables, walk

SHAPES = [(2, [0]), (2, [1]), (3, [1])]  # of an inequality: its sides, and where the letter is


def is_region(tree) -> bool:
    """Return whether a tree can be a set of reals; a point (1,2) looks like one."""
    kind, *parts = tree
    if kind in ("cup", "or", "cap", "setminus"):
        return all(map(is_region, parts))
    if kind in ("span", "set"):
        return len(parts) > 0 if kind == "set" else len(parts) == 4 and parts[0] != r"\langle"
    if kind != "rel" or set(parts[0]) & {"=", r"\in", r"\approx"}:
        return False
    # An inequality bounds one letter: x != 3, |x - 1| > 2 or 1 < x < 2, but not 1 < 2 < x.
    found = [k for k, side in enumerate(parts[1:]) if variables(side)]
    if (len(parts) - 1, found) not in SHAPES:
        return False
    side = parts[1 + found[0]]
    kinds = [part[0] for part in walk(side[2] if side[:2] == ("fn", "abs") else side)]
    return {*kinds} <= {"var", "num", "+", "*"} and kinds.count("var") == 1


def same_region(a, b, values: Values) -> bool:
    """Return whether two regions are equal; ValueError if an end is no real number. The empty set
    is equal to none: as an interval a gold point (5,3) would be empty, too."""
    if len(variables(a) | variables(b)) > 1:
        return False
    a = measured(a, values)
    b = measured(b, values)
    # Probe all ends, one number between each two of them, and one beyond on either side.
    found = sorted([MP.zero, *filter(MP.isfinite, ends(a) + ends(b))])
    values.spend(40 * len(found) ** 2)
    probes = [found[0] - 1, *found, found[-1] + 1]
    probes += [(low + high) / 2 for low, high in itertools.pairwise(probes)]
    if any(contains(a, x) != contains(b, x) for x in probes):
        return False
    return any(contains(b, x) for x in probes)


def measured(tree, values):
    """Return a region with numbers in place of trees; an interval is two inequalities of x."""
    kind, *parts = tree
    if kind == "set":
        return kind, *map(values.number, parts)
    if kind == "span":
        opener, closer, low, high = parts
        end = values.number(high)
        if values.number(low) > end or (closer == "]" and MP.isinf(end)):
            raise ValueError("no interval")
        ops = "<=" if opener == "[" else "<", "<=" if closer == "]" else "<"
        tree = "rel", ops, low, ("var", "x"), high
    if kind in ("span", "rel"):
        return "rel", *((op, line(x, values), line(y, values)) for op, x, y in links(tree))
    return kind, *(measured(part, values) for part in parts)


def line(side, values):
    """Return a side of an inequality, a x + b or |a x + b|, as (a, b, whether it is |...|)."""
    if not variables(side):
        return MP.zero, values.number(side), False
    bends = side[:2] == ("fn", "abs")
    inner = side[2] if bends else side
    start, end = (values.value(inner, dict.fromkeys(variables(side), MP.mpf(x))) for x in (0, 1))
    return end - start, start, bends


def ends(region) -> list:
    """Return all numbers at which a measured region may begin or end."""
    kind, *parts = region
    if kind == "set":
        return parts
    if kind != "rel":
        return [end for part in parts for end in ends(part)]
    found = []
    for _, (a, b, bends), (c, d, bends_too) in parts:
        for sign in (1, -1) if bends or bends_too else (1,):
            left = sign if bends else 1  # |u| is u or -u
            right = sign if bends_too else 1
            slope = left * a - right * c
            gap = right * d - left * b
            found += [gap / slope] if slope else []
    return found


def contains(region, x) -> bool:
    """Return whether the real number x is in a measured region."""
    kind, *parts = region
    if kind == "set":
        return any(close(member, x) for member in parts)
    if kind == "rel":
        return all(holds(op, worth(left, x), worth(right, x)) for op, left, right in parts)
    inside = [contains(part, x) for part in parts]
    if kind == "setminus":
        return inside[0] and not any(inside[1:])
    return all(inside) if kind == "cap" else any(inside)


def worth(side, x):
    """Return the value of a measured side of an inequality at x."""
    a, b, bends = side
    return abs(a * x + b) if bends else a * x + b


def holds(op, x, y) -> bool:
    """Return whether x < y, x <= y or x != y for real numbers."""
    return op == "<=" if close(x, y) else op == "!=" or x < y
