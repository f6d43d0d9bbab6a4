"""Whether two answers, as written, say the same: as words, as numbers, or tree by tree."""

import re
from fractions import Fraction

from verifier.latex import MINUS, items, join, links, number, parse
from verifier.regions import is_region, same_region
from verifier.spellings import BASED, CHOICE, CHOSEN, NUMBER, normalise, plain
from verifier.values import MP, Values, close, real, variables, walk

MAX_ANSWER = 1000  # characters; no gold answer of MATH is longer than 160
MAX_ITEMS = 60  # of a list
PLAIN = re.compile(rf"[+-]?(?:{NUMBER})%?")
SPACES = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # that part no two words or numbers


def is_name(tree) -> bool:
    """Whether a tree only names what is asked for: x, f(x), (x,y), AB, NO/BO, a word."""
    kinds = [x[0] for x in walk(tree) if x != MINUS]
    if tree[0] in ("span", "fn"):
        return set(kinds) <= {"var", tree[0]} and tree[1] in ("(", "f", "g", "abs")
    segments = all(x[0].isupper() or x[0] == "\\" for x in variables(tree))
    return kinds in (["var"], ["text"]) or (segments and set(kinds) <= {"var", "*", "^", "ratio"})


def named(tree):
    """(x, value) of x = value, value = x or x in value; else (None, the tree)."""
    if tree[0] == "rel" and tree[1][0] in ("=", "in", "~") and is_name(tree[2]):
        return tree[2], tree[3] if len(tree[1]) == 1 else ("rel", tree[1][1:], *tree[3:])
    if tree[0] == "rel" and tree[1] == ("=",) and is_name(tree[3]):
        return tree[3], tree[2]
    return None, tree


def difference(op, a, b):
    """A link as (operator, left - right), with < and <= turned the same way."""
    return (op.replace(">", "<"), join("-", b, a)) if op[0] == ">" else (op, join("-", a, b))


def as_point(tree):
    """The point that `x = 1, y = 2` or (1, 2) is; None if a tree is none."""
    pairs = [named(x) for x in tree[1:]] if tree[0] == "list" else []
    names = [x and x[1] for x, _ in pairs]
    if pairs and all(names) and names == sorted(set(names)):
        return "span", "(", ")", *(value for _, value in pairs)
    return tree if tree[:3] == ("span", "(", ")") else None


class Comparison:
    """Whether the tree of an answer says the same as that of the gold one."""

    def __init__(self, answer, gold):
        self.values = Values(answer, gold)

    def same(self, a, b) -> bool:
        if a == b:
            return True
        self.values.spend(100)
        (name, said), (other, meant) = named(a), named(b)
        if (name or other) and (name == other or not (name and other)) and self.same(said, meant):
            return True
        if is_region(a) and is_region(b) and not a[0] == b[0] in ("span", "set"):
            return same_region(a, b, self.values)
        if "rel" in (a[0], b[0]):
            return self.same_relation(a, b)
        if {a[0], b[0]} == {"list", "span"} and as_point(a) and as_point(b):
            return self.same(as_point(a), as_point(b))
        few, many = items(a), items(b)
        if not len(few) == len(many) == 1:
            return self.same_members(few, many)
        (a,), (b,) = few, many
        if a[0] == b[0] and a[0] in ("span", "matrix", "row", "ratio", "base") and len(a) == len(b):
            parts = zip(a[1:], b[1:], strict=True)  # a bracket is a string, and the same or not
            return all(x == y if isinstance(x, str) else self.same(x, y) for x, y in parts)
        return self.same_function(a, b)

    def same_members(self, few, many) -> bool:
        """Lists and sets: in any order, but for words, and for bare values of several names."""
        if min(len(few), len(many)) < 2 or max(len(few), len(many)) > MAX_ITEMS:
            return False
        words = any(x[0] == "text" and len(x[1]) > 1 for x in many)
        names = len({named(x)[0] for x in many} - {None}) > 1 and not named(few[0])[0]
        if words or names:
            return len(few) == len(many) and all(map(self.same, few, many))
        found = all(any(self.same(x, y) for x in few) for y in many)
        return found and all(any(self.same(x, y) for y in many) for x in few)

    def same_relation(self, a, b) -> bool:
        """Equations and inequalities, up to a factor. Of a chain of equal numbers the gold one
        gives each, an answer's its last, or the one before an approximate one."""
        if a[0] == b[0]:
            ours, theirs = links(a), links(b)
            alike = len(ours) == len(theirs) and variables(a) == variables(b) != set()
            return alike and all(any(self.same_link(x, y) for x in ours) for y in theirs)
        chain = a if a[0] == "rel" else b
        if not set(chain[1]) <= {"=", "~"} or variables(chain):
            return False
        if chain is b:
            return any(self.same(a, x) for x in b[2:])
        equal = all(self.same(x, y) for op, x, y in links(a) if op == "=")
        return equal and self.same(a[2] if "~" in a[1] else a[-1], b)

    def same_link(self, x, y) -> bool:
        """Whether (left - right) of both is the same up to a factor, positive for inequalities."""
        (op, a), (other, b) = difference(*x), difference(*y)
        pairs = list(zip(self.values.of(a), self.values.of(b), strict=True))
        if op != other or not all(p and q for p, q in pairs):
            return False
        ratios = [self.values.combine("*", p, 1 / q) for p, q in pairs]
        if op in ("<", "<=") and not (isinstance(ratios[0], Fraction) and ratios[0] > 0):
            return False
        return all(close(r, ratios[0]) for r in ratios) and self.values.same_fraction(a, b, True)

    def same_function(self, a, b) -> bool:
        """The same value, or with variables the same function."""
        if "text" in (a[0], b[0]):
            return False
        pairs = zip(self.values.of(a), self.values.of(b), strict=True)
        pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
        if len(pairs) < min(2, len(self.values.points)):
            return False
        if all(close(x, y) for x, y in pairs):
            return self.values.same_fraction(a, b)
        # A gold decimal stands for the irrational number that it rounds, from three digits on.
        decimals, (x, y) = b[2] if b[0] == "num" else 0, pairs[0]
        rounded = decimals and abs(y) * 10**decimals >= 100 and not variables(a)
        return bool(rounded and isinstance(x, MP.mpf) and abs(real(y) - x) * 10**decimals <= 0.5)


def same_words(answer: str, gold: str) -> bool:
    """Equality as words, as a choice letter, or as a numeral in a base."""
    based, meant = BASED.fullmatch(answer), BASED.fullmatch(gold)
    if based and meant:
        return [x.lstrip("0") for x in based.groups()] == [x.lstrip("0") for x in meant.groups()]
    choice = CHOICE.fullmatch(gold)
    if choice:
        chosen = CHOSEN.fullmatch(answer)
        letter = str(chosen and (chosen[1] or chosen[2] or chosen[3]))
        return choice[1] == (letter if choice[0] == choice[1] else letter.upper())
    said, meant = plain(answer), plain(gold)
    if "\\" in meant or not ("text" in gold or meant.isalpha()):
        return False
    fold = "text" in gold or len(meant) > 3
    return said == meant or (fold and said.casefold() == meant.casefold())


def same_answer(answer: str, gold: str) -> bool:
    """Whether an answer, as written, says what the gold one does; ValueError if it says nothing."""
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer.strip() == gold.strip()
    answer, gold = normalise(answer), normalise(gold)
    if SPACES.sub("", answer) == SPACES.sub("", gold):
        return gold != ""
    if PLAIN.fullmatch(answer) and PLAIN.fullmatch(gold):
        return number(answer.rstrip("%"))[1] == number(gold.rstrip("%"))[1]
    if same_words(answer, gold):
        return True
    (a, ours), (b, theirs) = parse(answer), parse(gold)
    return (ours == theirs or not (ours and theirs)) and Comparison(a, b).same(a, b)
