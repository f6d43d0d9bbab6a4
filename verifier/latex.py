"""From the LaTeX of an answer to a tree: recursive descent over the tokens of spellings.py.

A tree is a tuple of its kind and its parts: num (Fraction, decimals), var (name), +, *, ^, pi, e,
i, inf, fn (name, arguments), of (quantity, units), pm, mp, text (words), list, or, set, span (open,
close, items: a tuple or interval), rel (operators, sides), mod, cup, cap, setminus, ratio, matrix,
row, case (value, condition), integers.
"""

import functools
import itertools
import re
from fractions import Fraction

from verifier.spellings import ALPHABET, tokens
from verifier.units import CURRENCIES, UNIT, read_unit
from verifier.values import BOUNDED, FUNCTIONS, REAL, TRIG, walk

MAX_NESTING = 50
BINDING = [  # the loosest first
    r"\over \choose", "; , and or", r"\pmod", r"= < > <= >= != \in \approx \equiv \to",
    r"\cup \cap \setminus", ":", r"- + \pm \mp", "* /", "functions", "powers", "atoms",
]  # fmt: skip
LEVEL = {op: level for level, ops in enumerate(BINDING) for op in ops.split()}
SIGNS = BINDING[6].split()
PREFIX, POWER, ATOM = LEVEL["functions"], LEVEL["powers"], LEVEL["atoms"]  # what these take
CLOSERS = {"(": ") ]", "[": "] )", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
MINUS = ("num", Fraction(-1), 0)
DEGREE = ("*", ("pi",), ("num", Fraction(1, 180), 0))
CONSTANT = {r"\pi": ("pi",), "e": ("e",), "i": ("i",), r"\infty": ("inf",), r"\emptyset": ("set",)}
CONSTANT[r"\mathbb{R}"] = ("span", "(", ")", ("*", MINUS, ("inf",)), ("inf",))
CONSTANT[r"\mathbb{Z}"] = ("integers",)
NAMED = {*FUNCTIONS, *BOUNDED, *REAL, "gcd", "lcm"}
STARTS = {"|", r"\frac", r"\binom", r"\sqrt", r"\lfloor", r"\lceil", *CLOSERS, *CONSTANT}
STARTS |= ALPHABET | {"\\" + name for name in NAMED}
LISTS = ("list", "or", "set")
KINDS = dict.fromkeys([",", ";", "and"], "list") | {":": "ratio", r"\pmod": "mod"}


def number(text: str):
    """Return a numeral's tree: its value and number of decimals."""
    text = text.replace(",", "").lower()
    return "num", Fraction(text), len(text.partition("e")[0].partition(".")[2])


def signed(op, tree):
    """Return the tree of a sign before a tree."""
    if op == "-":
        return ("num", -tree[1], tree[2]) if tree[0] == "num" else ("*", MINUS, tree)
    return tree if op == "+" else (op[1:], tree)


def join(op, a, b):
    """Return the tree of a binary operator."""
    if op in (r"\pm", r"\mp", "-"):
        return join("+", a, signed(op, b))
    if op in ("/", r"\over"):
        return join("*", a, ("^", b, MINUS))
    if op == r"\choose":
        return "fn", "binom", a, b
    if LEVEL[op] == LEVEL["="]:
        ops, *sides = a[1:] if a[0] == "rel" else ((), a)
        return "rel", (*ops, op), *sides, b
    if op == "and" and a[0] == b[0] == "rel" and not {*a[1], *b[1]} & {"=", r"\approx", r"\in"}:
        op = r"\cap"  # x > 1 and x < 2
    kind = KINDS.get(op, op.lstrip("\\"))
    return kind, *(a[1:] if a[0] == kind else (a,)), b


class Parser:
    """Recursive descent with binding levels; every recursion goes through `expression`."""

    def __init__(self, found: list[str]):
        self.tokens = found
        self.i = self.depth = self.bars = 0  # bars: open ones | of absolute values
        self.radians = any(token[1:] in TRIG for token in found)  # then a degree is pi/180

    def peek(self) -> str:
        """Return the next token, "" behind the last."""
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, *expected) -> str:
        """Return the next token and go past it; ValueError if none of these is next."""
        token = self.peek()
        if not token or (expected and token not in expected):
            raise ValueError(f"unexpected {token!r}")
        self.i += 1
        return token

    def starts(self, left=("num",)) -> bool:
        """Return whether the next token can be a factor: x in 2x, and behind a power a number."""
        token = self.peek()
        if token in LEVEL or (token == "|" and self.bars):
            return False
        last = left[-1] if left[0] == "*" else left
        if token[:1].isdigit():  # 2^6 3^5, but not 1/2 3
            return last[0] == "^" and last[2] != MINUS
        return token in STARTS or token.isalpha() or token.startswith(r"\begin")

    def expression(self, level=0):
        """Return the tree of all that binds at least as tightly as this level."""
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ValueError("nested too deeply")
        if self.peek() in SIGNS:
            left = signed(self.take(), self.expression(PREFIX))
        else:
            left = self.atom() if level == ATOM else self.scripts(self.atom())
        while True:
            op = self.peek()
            if LEVEL.get(op, -1) >= level:
                left = join(self.take(), left, self.expression(LEVEL[op] + 1))
            elif (op[:5] == "text:" or op == r"\deg") and level <= LEVEL["-"]:
                left = self.unit(left)  # it belongs to the whole sum or product before it
            elif level < PREFIX and self.starts(left):
                left = join("*", left, self.expression(PREFIX))
            else:
                break
        self.depth -= 1
        return left

    def unit(self, left):
        """Return a quantity of the unit that follows it; ValueError if its parts have others."""
        word = self.take().removeprefix("text:")
        units = read_unit(word.replace(r"\deg", "degree"))
        if left[0] == "of":  # $5 per month
            return "of", left[1], units | left[2]
        if left[0] == "+" and any(part[0] == "of" and part[2] != units for part in left[1:]):
            raise ValueError("a sum of other units")  # 2 h + 30 min
        return ("of", left, units) if units else left

    def scripts(self, base):
        """Return an atom with the powers, factorials and degrees that stand behind it."""
        while self.peek() in ("^", "**", "!") or (self.radians and self.peek() == r"\deg"):
            op = self.take()
            if op == r"\deg":
                base = join("*", base, DEGREE)
            elif op == "!":
                base = "fn", "!", base
            else:
                base = "^", base, self.expression(ATOM if self.peek() == "{" else POWER)
        return base

    def group(self):
        """Return what stands in brackets: a tree, a set, or a span: a tuple or an interval."""
        opener = self.take()
        inner = ("list",) if opener + self.peek() == r"\{\}" else self.expression()
        closer = self.take(*CLOSERS[opener].split())
        members = inner[1:] if inner[0] == "list" else (inner,)
        if (opener == r"\{" and inner[0] != "rel") or (opener == "{" and len(members) > 1):
            return "set", *members
        return inner if len(members) == 1 else ("span", opener, closer, *members)

    def atom(self):
        """Return the tree of a number, a name, a function, or of what brackets or bars hold."""
        if self.peek() in CLOSERS:
            return self.group()
        token = self.take()
        if token[0].isdigit() or token[1:2].isdigit():
            return number(token)
        # 1. Absolute values, floors, and ceilings: -floor(-x).
        if token in ("|", r"\lfloor", r"\lceil"):
            self.bars += token == "|"
            inner = self.expression()
            self.bars -= token == "|"
            self.take(token.replace("l", "r", 1))
            if token == r"\lceil":
                return signed("-", ("fn", "floor", signed("-", inner)))
            return "fn", "abs" if token == "|" else "floor", inner
        # 2. Macros with arguments.
        if token in (r"\frac", r"\binom"):
            op = "/" if token == r"\frac" else r"\choose"
            return join(op, self.expression(ATOM), self.expression(ATOM))
        if token == r"\sqrt":
            index = self.group() if self.peek() == "[" else ("num", Fraction(2), 0)
            return "^", self.expression(ATOM), ("^", index, MINUS)
        if token.startswith(r"\begin{"):
            return self.matrix(token)
        # 3. Words, a price before its number, and names.
        if token.startswith("text:"):
            word = token[5:]
            if UNIT.get(word) in CURRENCIES and self.peek():
                return "of", self.expression(PREFIX), read_unit(word)
            return "text", word.casefold()
        if token[1:] in NAMED:
            return self.function(token[1:])
        return CONSTANT[token] if token in CONSTANT else self.name(token)

    def name(self, token):
        """Return a variable with its index and primes, or a function of something: f(x)."""
        if not (token.isalpha() or token in ALPHABET):
            raise ValueError(f"unexpected {token!r}")
        is_function = token[0] in "fgh"
        if self.peek() == "_":  # one flat text: x_{i,j} is the variable "x_i,j"
            parts = [self.take(), self.take()]
            while parts.count("{") > parts.count("}"):
                parts.append(self.take())
            token += "".join(part.removeprefix("text:").strip("\\{} ") for part in parts)
        while self.peek() == "'":
            token += self.take()
        if self.peek() != "(":
            return "var", token
        # P(A) or p(x) is no product if an equation defines it.
        inside, defined, _ = " ".join(self.tokens[self.i + 1 : self.i + 12]).partition(" ) =")
        if is_function or (defined and not set(inside) & set("+*/^(")):
            return "fn", token, *arguments(self.group())
        return "var", token

    def function(self, name):
        """Return \\sin^2 x, \\log_2 8 or \\sum_{k=1}^n k: 2x is one argument."""
        scripts = {"_": (), "^": ()}
        while self.peek() in scripts:
            mark = self.take()
            scripts[mark] = (self.expression(ATOM),)
        below, above = scripts.values()
        closed = self.peek() in ("(", "[", "{", "|")
        argument = self.expression(PREFIX)
        while not closed and self.starts() and self.peek()[1:] not in NAMED and self.peek() != "d":
            argument = join("*", argument, self.expression(PREFIX))
        if above == (MINUS,) and name in TRIG:
            return "fn", "arc" + name, argument
        tree = ("fn", name, *arguments(argument), *below)
        if name in BOUNDED:
            return *tree, *above
        return ("^", tree, *above) if above else tree

    def matrix(self, token):
        """Return the rows up to the \\end of this \\begin: a matrix, or a list of cases."""
        end = re.sub(r"\\begin(\{\w+\}).*", r"\\end\1", token)
        rows = []
        mark = r"\\"
        while mark != end:
            if mark == r"\\":
                rows.append(("row",))
            rows[-1] += (self.expression(),)
            mark = self.take("&", r"\\", end)
        if "cases" not in token:
            return "matrix", *rows
        # Equations, or values with their conditions.
        return "list", *(row[1] if len(row) == 2 else ("case", *row[1:]) for row in rows)


def arguments(tree):
    """Return the arguments of a function: (x, y) are two."""
    return tree[3:] if tree[0] == "span" else (tree,)


def items(tree):
    """Return the members of a list or a set; anything else is its only member."""
    return list(tree[1:]) if tree[0] in LISTS else [tree]


def spread(tree):
    """Return a tree without plus-minus: with it, the list of all that it says."""
    kinds = [part[0] for part in walk(tree) if part[0] in ("pm", "mp")]
    if kinds and tree[0] in LISTS:
        return tree[0], *itertools.chain(*(items(spread(part)) for part in tree[1:]))
    if not 0 < len(kinds) < 4:
        return tree
    choices = itertools.product((True, False), repeat=1 if "mp" in kinds else len(kinds))
    return ("list", *(resolve(tree, itertools.cycle(signs)) for signs in choices))


def resolve(tree, signs):
    """Return the tree with its plus-minuses read as these signs, from left to right."""
    if tree[0] in ("pm", "mp"):
        positive = next(signs) == (tree[0] == "pm")
        return resolve(tree[1] if positive else signed("-", tree[1]), signs)
    return tuple(resolve(part, signs) if isinstance(part, tuple) else part for part in tree)


def links(tree):
    """Return a relation's links as (operator, left, right), with x > y turned into y < x."""
    found = zip(tree[1], tree[2:], tree[3:], strict=False)
    return [(op.replace(">", "<"), y, x) if op[0] == ">" else (op, x, y) for op, x, y in found]


@functools.lru_cache(maxsize=64)  # a gold answer is asked for many times
def parse(text: str):
    """Return the tree of a normalised answer; ValueError if it is no mathematics."""
    parser = Parser(tokens(text))
    tree = parser.expression()
    if parser.peek():
        raise ValueError("more than one expression")
    return spread(tree)
