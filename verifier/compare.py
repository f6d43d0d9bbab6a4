"""Whether two answers, as written, say the same: as words, as numbers, or tree by tree."""

import re
from fractions import Fraction

from verifier.latex import MINUS, items, join, links, parse
from verifier.regions import is_region, same_region
from verifier.spellings import CHOICE, CHOSEN, normalise, plain
from verifier.values import MP, Values, close, real, variables, walk

MAX_ANSWER = 1000  # characters; no gold answer of MATH is longer than 160
MAX_ITEMS = 60  # of a list
SPACES = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # that part no two words or numbers
STRUCTURES = ("span", "matrix", "row", "ratio", "base")  # compared part by part


def same_answer(answer: str, gold: str) -> bool:
    """Return whether an answer, as written, says what the gold one does; ValueError or
    ArithmeticError if one of them says nothing that can be computed."""
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer.strip() == gold.strip()
    # 1. The same text, or the same words.
    answer = normalise(answer)
    gold = normalise(gold)
    if SPACES.sub("", answer) == SPACES.sub("", gold):
        return gold != ""
    if same_words(answer, gold):
        return True
    # 2. The same mathematics, in units that do not contradict each other.
    tree, units = parse(answer)
    gold_tree, gold_units = parse(gold)
    if units and gold_units and units != gold_units:
        return False
    return Comparison(tree, gold_tree).same(tree, gold_tree)


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
    if "\\" in gold_words or not ("text" in gold or gold_words.isalpha()):
        return False
    any_case = "text" in gold or len(gold_words) > 3
    return words == gold_words or (any_case and words.casefold() == gold_words.casefold())


def is_name(tree) -> bool:
    """Return whether a tree only names what is asked for: x, f(x), (x,y), AB, NO/BO, a word."""
    kinds = {part[0] for part in walk(tree) if part != MINUS}
    if tree[0] in ("span", "fn"):
        return kinds <= {"var", tree[0]} and tree[1] in ("(", "f", "g", "abs")
    if tree[0] in ("var", "text"):
        return True
    segments = all(name[0].isupper() or name[0] == "\\" for name in variables(tree))
    return segments and kinds <= {"var", "*", "^", "ratio"}


def split_name(tree):
    """Return (x, value) for x = value, value = x and x in value; else (None, the tree)."""
    if tree[0] == "rel":
        _, ops, left, right, *others = tree
        if ops[0] in ("=", r"\in", r"\approx") and is_name(left):
            return left, ("rel", ops[1:], right, *others) if others else right
        if ops == ("=",) and is_name(right):
            return right, left
    return None, tree


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
        self.spend(100)
        # 1. A name may be left out or added, but not contradicted: x = 5 is 5, and not y = 5.
        name, value = split_name(answer)
        gold_name, gold_value = split_name(gold)
        names = {name, gold_name} - {None}
        if len(names) == 1 and self.same(value, gold_value):
            return True
        # 2. Sets of reals by their members; but two brackets may be points, two sets lists.
        unclear = answer[0] == gold[0] and gold[0] in ("span", "set")
        if is_region(answer) and is_region(gold) and not unclear:
            return same_region(answer, gold, self)
        if "rel" in (answer[0], gold[0]):
            return self.same_relation(answer, gold)
        if {answer[0], gold[0]} == {"list", "span"}:
            points = [as_point(answer), as_point(gold)]
            if None not in points:
                return self.same(*points)
        # 3. Lists member by member, structures part by part, all else by value.
        members = items(answer)
        gold_members = items(gold)
        if not len(members) == len(gold_members) == 1:
            return self.same_members(members, gold_members)
        answer = members[0]
        gold = gold_members[0]
        if gold[0] not in STRUCTURES or answer[0] != gold[0] or len(answer) != len(gold):
            return self.same_function(answer, gold)
        for part, gold_part in zip(answer[1:], gold[1:], strict=True):
            is_tree = isinstance(part, tuple)  # and no bracket
            if part != gold_part and not (is_tree and self.same(part, gold_part)):
                return False
        return True

    def same_members(self, answers, golds) -> bool:
        """Return whether two lists have the same members; in the same order only for words, and
        for bare values of things that the gold list names."""
        shorter, longer = sorted([len(answers), len(golds)])
        if shorter < 2 or longer > MAX_ITEMS:
            return False
        words = any(gold[0] == "text" and len(gold[1]) > 1 for gold in golds)
        gold_names = {split_name(gold)[0] for gold in golds} - {None}
        bare = len(gold_names) > 1 and not split_name(answers[0])[0]
        if words or bare:
            return shorter == longer and all(map(self.same, answers, golds))
        if not all(any(self.same(x, gold) for x in answers) for gold in golds):
            return False  # one is missing
        return all(any(self.same(x, gold) for gold in golds) for x in answers)

    def same_relation(self, answer, gold) -> bool:
        """Compare where at least one side is an equation or an inequality."""
        if answer[0] == gold[0]:
            ours = links(answer)
            theirs = links(gold)
            names = variables(answer)
            if len(ours) != len(theirs) or not names or names != variables(gold):
                return False
            return all(any(self.same_link(link, other) for link in ours) for other in theirs)
        # Of a chain of equal numbers the gold one gives each: 0.56 = 56\%. An answer's must be
        # true and gives its last, or its first where a part is approximate.
        chain = answer if answer[0] == "rel" else gold
        if not set(chain[1]) <= {"=", r"\approx"} or variables(chain):
            return False
        if chain is gold:
            return any(self.same(answer, side) for side in gold[2:])
        if not all(op != "=" or self.same(left, right) for op, left, right in links(answer)):
            return False
        return self.same(answer[2] if r"\approx" in answer[1] else answer[-1], gold)

    def same_link(self, link, gold_link) -> bool:
        """Return whether left - right is the same up to a factor, positive for inequalities."""
        tree = join("-", *link[1:])
        gold_tree = join("-", *gold_link[1:])
        pairs = list(zip(self.of(tree), self.of(gold_tree), strict=True))
        if link[0] != gold_link[0] or not all(x and y for x, y in pairs):
            return False
        ratios = [self.combine("*", x, 1 / y) for x, y in pairs]
        factor = ratios[0]
        if link[0] in ("<", "<=") and not (isinstance(factor, Fraction) and factor > 0):
            return False
        constant = all(close(ratio, factor) for ratio in ratios)
        return constant and self.same_fraction(tree, gold_tree, scaled=True)

    def same_function(self, answer, gold) -> bool:
        """Return whether two trees have the same value or, with variables, are one function."""
        if "text" in (answer[0], gold[0]):
            return False
        pairs = zip(self.of(answer), self.of(gold), strict=True)
        pairs = [pair for pair in pairs if None not in pair]
        if len(pairs) < min(2, len(self.points)):
            return False
        if all(close(x, y) for x, y in pairs):
            return self.same_fraction(answer, gold)
        # A gold decimal stands for the irrational number that it rounds, from three digits on.
        if gold[0] != "num" or variables(answer):
            return False
        exact, decimal = pairs[0]
        scale = 10 ** gold[2]  # 1000 for three decimals
        if scale == 1 or abs(decimal) * scale < 100 or not isinstance(exact, MP.mpf):
            return False
        return abs(real(decimal) - exact) * scale <= 0.5
