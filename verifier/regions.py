"""Sets of real numbers in an answer: intervals, unions, differences, inequalities in one letter.

Two of them are the same if they have the same members among all their ends, between and beyond.
"""

import itertools

from verifier.latex import links
from verifier.values import MP, Values, close, variables

FIRST = {"set": 1, "rel": 2, "span": 3}  # where the numbers in such a tree begin


def is_region(tree) -> bool:
    """Return whether a tree can be a set of reals; a point (1,2) looks like one."""
    kind, *parts = tree
    if kind in ("cup", "or", "cap", "setminus"):
        return all(map(is_region, parts))
    if kind == "span":
        return len(parts) == 4 and parts[0] != r"\langle"
    if kind != "rel":
        return kind == "set" and len(parts) > 0
    # An inequality bounds one letter: x != 3, or 1 < x < 2, but not 1 < 2 < x.
    shape = [side[0] if variables(side) else "" for side in parts[1:]]
    bounds = shape in (["var", ""], ["", "var"], ["", "var", ""])
    return bounds and not set(parts[0]) & {"=", r"\in", r"\approx"}


def same_region(a, b, values: Values) -> bool:
    """Return whether two regions are equal; ValueError if an end is no real number. The empty set
    is equal to none: as an interval a gold point (5,3) would be empty, too."""
    if len(variables(a) | variables(b)) > 1:
        return False
    values.spend(3000)
    # Probe all ends, one number between each two of them, and one beyond on either side.
    finite = filter(MP.isfinite, ends(a, values) + ends(b, values))
    found = sorted([MP.zero, *finite])
    probes = [found[0] - 1, *found, found[-1] + 1]
    probes += [(low + high) / 2 for low, high in itertools.pairwise(probes)]
    if any(contains(a, x, values) != contains(b, x, values) for x in probes):
        return False
    return any(contains(b, x, values) for x in probes)


def ends(tree, values) -> list:
    """Return all numbers at which a region may begin or end."""
    if tree[0] in FIRST:
        sides = tree[FIRST[tree[0]] :]
        return [values.number(side) for side in sides if side[0] != "var"]
    return [end for part in tree[1:] for end in ends(part, values)]


def contains(tree, x, values) -> bool:
    """Return whether the real number x is in a region."""
    kind, *parts = tree
    if kind == "set":
        return any(close(values.number(member), x) for member in parts)
    if kind == "span":
        opener, closer, low, high = parts
        if not holds("<=" if opener == "[" else "<", values.number(low), x):
            return False
        return holds("<=" if closer == "]" else "<", x, values.number(high))
    if kind == "rel":
        sides = [x if side[0] == "var" else values.number(side) for side in parts[1:]]
        steps = links((kind, parts[0], *sides))
        return all(holds(*step) for step in steps)
    inside = [contains(part, x, values) for part in parts]
    if kind == "setminus":
        return inside[0] and not any(inside[1:])
    return all(inside) if kind == "cap" else any(inside)


def holds(op, x, y) -> bool:
    """Return whether x < y, x <= y or x != y for real numbers."""
    if close(x, y):
        return op == "<="
    return op == "!=" or x < y
