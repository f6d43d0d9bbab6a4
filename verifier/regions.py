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


def conditions(tree, values) -> list:
    """Return what an interval or an inequality says of x, as (operator, left, right)."""
    if tree[0] == "rel":
        return links(tree)
    _, opener, closer, low, high = tree
    ends = values.number(low), values.number(high)
    if ends[0] > ends[1] or (closer == "]" and MP.isinf(ends[1])):
        raise ValueError("no interval")
    ops = "<=" if opener == "[" else "<", "<=" if closer == "]" else "<"
    return links(("rel", ops, low, ("var", "x"), high))


def same_region(a, b, values: Values) -> bool:
    """Return whether two regions are equal; ValueError if an end is no real number. The empty set
    is equal to none: as an interval a gold point (5,3) would be empty, too."""
    if len(variables(a) | variables(b)) > 1:
        return False
    # Probe all ends, one number between each two of them, and one beyond on either side.
    found = sorted([MP.zero, *filter(MP.isfinite, ends(a, values) + ends(b, values))])
    values.spend(40 * len(found) ** 2)
    probes = [found[0] - 1, *found, found[-1] + 1]
    probes += [(low + high) / 2 for low, high in itertools.pairwise(probes)]
    inside = [contains(b, x, values) for x in probes]
    return any(inside) and inside == [contains(a, x, values) for x in probes]


def ends(tree, values) -> list:
    """Return all numbers at which a region may begin or end."""
    kind, *parts = tree
    if kind == "set":
        return [values.number(part) for part in parts]
    if kind not in ("span", "rel"):
        return [end for part in parts for end in ends(part, values)]
    found = []
    for _, left, right in conditions(tree, values):
        for sign in (1, -1):  # of what stands between |...|: so both sides are linear in x
            start, end = (
                side_at(left, x, sign, values) - side_at(right, x, sign, values) for x in (0, 1)
            )
            found += [start / (start - end)] if start != end else []
    return found


def side_at(side, x, sign, values):
    """Return the value of a side of an inequality where the letter is x, and |u| is u or -u."""
    inner, sign = (side[2], sign) if side[:2] == ("fn", "abs") and sign else (side, 1)
    return sign * values.value(inner, dict.fromkeys(variables(side), MP.mpf(x)))


def contains(tree, x, values) -> bool:
    """Return whether the real number x is in a region."""
    kind, *parts = tree
    if kind == "set":
        return any(close(values.number(member), x) for member in parts)
    if kind in ("span", "rel"):
        sides = [
            (op, side_at(a, x, 0, values), side_at(b, x, 0, values))
            for op, a, b in conditions(tree, values)
        ]
        return all(itertools.starmap(holds, sides))
    inside = [contains(part, x, values) for part in parts]
    if kind == "setminus":
        return inside[0] and not any(inside[1:])
    return all(inside) if kind == "cap" else any(inside)


def holds(op, x, y) -> bool:
    """Return whether x < y, x <= y or x != y for real numbers."""
    return op == "<=" if close(x, y) else op == "!=" or x < y
