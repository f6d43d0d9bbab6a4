"""Whether two answers, as written, say the same: as words, as numbers, or tree by tree."""

import contextlib
import itertools
import re
from fractions import Fraction

from verifier.latex import DEGREE, MINUS, items, join, links, parse
from verifier.proof import Proof
from verifier.regions import is_region, same_region
from verifier.spellings import CHOICE, CHOSEN, normalise, plain
from verifier.units import CHANGING, contradict
from verifier.values import FUNCTIONS, MAX_WORK, MP, REAL, Values, close, is_rational, variables

MAX_ANSWER = 1000  # characters; no gold answer of MATH is longer than 160
MAX_ITEMS = 60  # of a list
SPACES = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # that part no two words or numbers
UNCLEAR = re.compile(r"(?<=[0-9])(,(?=[1-9])|e(?=[+-]))")  # 2,100 may be a list, 2e-1 a difference
# Most answers: -12, 0.5 and 1/2.
NUMERAL = re.compile(r"-?[0-9]{1,50}(?:\.[0-9]{1,50}|/[1-9][0-9]{0,49})?")
STRUCTURES = ("span", "matrix", "row", "ratio", "mod", "case")  # compared part by part
KNOWN = {*FUNCTIONS, *REAL, "floor", "!", "binom"}
DEGREES = frozenset({("degree", 1)})


def same_answer(answer: str, gold: str) -> bool:
    """Return whether an answer, as written, says what the gold one does; ValueError or
    ArithmeticError if one of them says nothing that can be computed."""
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer.strip() == gold.strip()
    # 1. The same number, text, or words.
    if NUMERAL.fullmatch(answer) and NUMERAL.fullmatch(gold):
        return Fraction(answer) == Fraction(gold)
    answer = normalise(answer)
    gold = normalise(gold)
    if SPACES.sub("", answer) == SPACES.sub("", gold):
        return gold != ""
    if same_words(answer, gold):
        return True
    # 2. The same mathematics, in one of the readings of each.
    work = MAX_WORK
    for pair in itertools.product(readings(answer), readings(gold)):
        comparison = Comparison(*pair, work=work)
        if comparison.same(*pair):
            return True
        work = comparison.work
    return False


def readings(text: str) -> list:
    """Return the one or two trees that a normalised answer may mean."""
    trees = [parse(text)]
    other = UNCLEAR.sub(r" \1 ", text)
    if other != text:
        with contextlib.suppress(ValueError):
            trees.append(parse(other))
    return trees


def same_words(answer: str, gold: str) -> bool:
    """Return whether both are the same choice letter or words."""
    choice = CHOICE.fullmatch(gold)
    if choice:
        chosen = CHOSEN.fullmatch(answer)
        letter = chosen[chosen.lastindex] if chosen else ""
        bare = choice[0] == choice[1]  # the gold answer C is perhaps a variable, and no c
        return choice[1] == (letter if bare else letter.upper())
    words = plain(answer)
    gold_words = plain(gold)
    if "\\" in gold_words or not ("text" in gold + answer or gold_words.isalpha()):
        return False
    any_case = "text" in gold or len(gold_words) > 3 or gold_words[1:].islower()
    any_case = any_case and (":" in gold or not gold_words[:1].isdigit())  # 4:30 PM, but not 5 MW
    return words == gold_words or (any_case and words.casefold() == gold_words.casefold())


def is_name(tree, of_answer=False, inside=False) -> bool:
    """Return whether a tree only names what is asked for: x, f(3), (x, y), AB, NO/BO, a word. An
    answer may also name a sum or product, a + b = 11; as a gold answer that is an equation."""
    kind, *parts = tree
    if kind in ("text", "var"):
        return kind == "var" or not CHANGING.search(parts[0])
    if kind == "span":
        return parts[0] == "(" and all(map(is_name, parts[2:]))
    if kind == "fn":
        return is_name(parts[1]) if parts[0] == "abs" else parts[0] not in KNOWN
    loose = of_answer or all(name[0].isupper() or name[0] == "\\" for name in variables(tree))
    if kind == "^":  # AB^2, a^2 + b^2 and a/b; x^2 = 9 and 1/x = 9 are equations
        raised = parts[1][0] == "num" and (inside or loose > of_answer)
        return raised and is_name(parts[0], of_answer)
    if kind == "+" and of_answer:
        terms = [part[2] if part[:2] == ("*", MINUS) else part for part in parts[1:]]
        return all(is_name(term, of_answer, True) for term in (parts[0], *terms))
    if kind not in ("*", "ratio") or not loose:
        return False
    return is_name(parts[0], of_answer) and all(is_name(x, of_answer, True) for x in parts[1:])


def split_name(tree, of_answer=False):
    """Return (x, value) for x = value, value = x and x in value; else (None, the tree)."""
    if tree[0] != "rel":
        return None, tree
    _, ops, left, right, *others = tree
    value = ("rel", ops[1:], right, *others) if others else right
    new = left[0] == "fn" or not variables(left) & variables(value)  # x = 2x names no x
    if ops[0] in ("=", r"\in", r"\approx") and right != ("integers",) and new:
        if is_name(left, of_answer):
            return left, value
    if ops == ("=",) and is_name(right, of_answer) and not variables(left) & variables(right):
        return right, left
    return None, tree


def entries(tree):
    """Return the matrix that a tree is, with a factor before it in each entry."""
    if tree[0] != "*" or tree[-1][0] != "matrix":
        return tree
    factor = tree[:-1] if len(tree) > 3 else tree[1]
    rows = (("row", *(join("*", factor, x) for x in row[1:])) for row in tree[-1][1:])
    return "matrix", *rows


def as_point(tree):
    """Return the point (1, 2) that a tree is, also as x = 1, y = 2 in this order; else None."""
    if tree[0] == "span":
        return tree if tree[1:3] == ("(", ")") else None
    names, values = zip(*map(split_name, tree[1:]), strict=True)
    in_order = None not in names and list(names) == sorted(set(names))
    return ("span", "(", ")", *values) if in_order else None


class Comparison(Values):
    """The comparison of the trees of an answer and of a gold answer, with their values."""

    def same(self, answer, gold) -> bool:
        """Return whether a tree, or a part of it, says the same as the gold one."""
        if answer == gold:
            return True
        self.spend(40)
        if {answer[0], gold[0]} <= {"num", "var"}:
            return answer[:2] == gold[:2]
        # 1. A name may be left out or added, but not contradicted: x = 5 is 5, and not y = 5.
        name, value = split_name(answer, of_answer=True)
        gold_name, gold_value = split_name(gold)
        if len({name, gold_name} - {None}) == 1 and self.same(value, gold_value):
            return True
        # 2. So may a unit; a bare number may be an angle's degrees or its radians.
        if "of" in (answer[0], gold[0]):
            return self.same_quantity(answer, gold)
        # 3. Sets of reals by their members; but two brackets may be points, two sets lists.
        alike = answer[0] == gold[0]
        if is_region(answer) and is_region(gold) and not (alike and gold[0] in ("span", "set")):
            return same_region(answer, gold, self)
        if "rel" in (answer[0], gold[0]):
            return self.same_equation(answer, gold) if alike else self.same_chain(answer, gold)
        if {answer[0], gold[0]} == {"list", "span"}:
            points = [as_point(answer), as_point(gold)]
            if None not in points:
                return self.same(*points)
        # 4. Lists member by member, structures part by part, all else by value.
        members = items(answer)
        gold_members = items(gold)
        if not len(members) == len(gold_members) == 1:
            if {answer[0], gold[0]} == {"list", "or"} and any(map(is_region, gold_members)):
                return False  # x > 1, x < 2 does not say which
            return self.same_members(members, gold_members)
        answer = entries(members[0])
        gold = entries(gold_members[0])
        if gold[0] not in STRUCTURES or answer[0] != gold[0] or len(answer) != len(gold):
            return self.same_function(answer, gold)
        parts = zip(answer[1:], gold[1:], strict=True)
        return all(x == y or (isinstance(x, tuple) and self.same(x, y)) for x, y in parts)

    def same_quantity(self, answer, gold) -> bool:
        """Compare where at least one side has units: 5 is 5 m, but 5 cm is not."""
        bare, units = answer[1:] if answer[0] == "of" else (answer, frozenset())
        gold_bare, gold_units = gold[1:] if gold[0] == "of" else (gold, frozenset())
        if contradict(units, gold_units):
            return False
        if self.same(bare, gold_bare):
            return True
        if {units, gold_units} != {DEGREES, frozenset()}:
            return False
        if units:
            return self.same_function(join("*", bare, DEGREE), gold)
        return self.same_function(answer, join("*", gold_bare, DEGREE))

    def same_members(self, answers, golds) -> bool:
        """Return whether two lists have the same members; in the same order only for words, and
        for bare values of things that the gold list names."""
        shorter, longer = sorted([len(answers), len(golds)])
        if shorter < 2 or longer > MAX_ITEMS:
            return False
        words = any(gold[0] == "text" and len(gold[1]) > 1 for gold in golds)
        gold_names = {split_name(gold)[0] for gold in golds} - {None}
        if words or (len(gold_names) > 1 and not split_name(answers[0])[0]):
            return shorter == longer and all(map(self.same, answers, golds))
        if not all(any(self.same(x, gold) for x in answers) for gold in golds):
            return False  # one is missing
        twice = [gold for gold in golds if golds.count(gold) > 1 and shorter == longer]
        if any(sum(self.same(x, gold) for x in answers) != golds.count(gold) for gold in twice):
            return False  # 1, 1, 2 is not 1, 2, 2
        return all(any(self.same(x, gold) for gold in golds) for x in answers)

    def same_chain(self, answer, gold) -> bool:
        """Compare a chain of equal numbers with a value. A gold one gives each of its numbers:
        0.56 = 56\\%. An answer's must be true and gives its last, or its first where a part is
        approximate."""
        chain = answer if answer[0] == "rel" else gold
        if not set(chain[1]) <= {"=", r"\approx"} or variables(chain):
            return False
        if chain is gold:
            return any(self.same(answer, side) for side in gold[2:])
        for op, left, right in links(answer):
            gap = abs(self.number(left) - self.number(right)) if op == r"\approx" else 0
            if gap > abs(self.number(right)) / 20 or (op == "=" and not self.same(left, right)):
                return False
        return self.same(answer[2] if r"\approx" in answer[1] else answer[-1], gold)

    def same_equation(self, answer, gold) -> bool:
        """Return whether each link of a chain of equations or inequalities is in the other."""
        ours = links(answer)
        theirs = links(gold)
        names = variables(answer)
        if len(ours) != len(theirs) or not names or names != variables(gold):
            return False
        return all(any(self.same_link(link, other) for link in ours) for other in theirs)

    def same_link(self, link, gold_link) -> bool:
        """Return whether two equations or inequalities hold at the same places: left - right is the
        same up to a factor, positive for inequalities, or has the same zeros."""
        self.spend(300)
        if link[0] != gold_link[0]:
            return False
        if self.same(link[1], gold_link[1]) and self.same(link[2], gold_link[2]):
            return True
        if link[0] in (r"\equiv", r"\to", r"\in"):
            return False
        tree = join("-", *link[1:])
        gold_tree = join("-", *gold_link[1:])
        points = []
        factor = None  # of the one to the other
        for k, x, y in self.pairs(tree, gold_tree):
            factor = factor or (x and y and x / y)
            if not (x and y and close(x / y, factor)):
                points = []
                break
            points.append(k)
        if points and link[0] in ("<", "<=") and not (MP.im(factor) == 0 < MP.re(factor)):
            return False
        if self.unforeseen(points):
            return True
        with contextlib.suppress(ValueError):
            return link[0] in ("=", "!=") and Proof(tree, gold_tree, self).same_zeros()
        return False

    def same_function(self, answer, gold) -> bool:
        """Return whether two trees have the same value or, with variables, are one function."""
        if "text" in (answer[0], gold[0]):
            return False
        if self.prepare().blind:
            return bool(self.proven(answer, gold))
        points = []
        for k, x, y in self.pairs(answer, gold):
            if not close(x, y):
                return self.rounds(answer, x, gold, y)
            proven = self.proven(answer, gold) if self.names and not points else None
            if proven is not None:
                return proven
            points.append(k)
        if not self.names:
            return len(points) == 1
        return self.unforeseen(points) if points else bool(self.proven(answer, gold))

    def proven(self, answer, gold) -> bool | None:
        """Return whether two trees are the same function; None if no proof is in reach."""
        for_points = self.work // 2
        self.work -= for_points
        try:
            return Proof(answer, gold, self).same()
        except ValueError:
            return None
        finally:
            self.work += for_points

    def rounds(self, answer, value, gold, decimal) -> bool:
        """Return whether a gold decimal of at least three digits rounds an irrational number."""
        if gold[0] != "num" or gold[1].denominator == 1 or variables(answer):
            return False
        scale = 10 ** gold[2]  # 1000 for three decimals
        near = abs(decimal - value) * scale <= 0.5
        return near and abs(decimal) * scale >= 100 and not is_rational(answer)

    def pairs(self, a, b):
        """Yield (k, value of a, value of b) for each point k at which both have one."""
        for k in range(len(self.prepare().points)):
            x = self.at(a, k)
            y = None if x is None else self.at(b, k)
            if y is not None:
                yield k, x, y
