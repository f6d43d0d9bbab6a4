"""From the LaTeX of an answer to a tree: recursive descent over the tokens of spellings.py.

A tree is a tuple of its kind and its parts: num (Fraction, decimals), var (name), +, *, ^, pi, e,
i, inf, fn (name, arguments), pm, mp, text (words), list, or, set, span (open, close, items: a tuple
or interval), rel (operators, sides), cup, cap, setminus, ratio, base (digits, base), matrix, row.
"""

import itertools
import re
from fractions import Fraction

from verifier.spellings import ALPHABET, MEASURE, tokens
from verifier.values import NAMES, TRIG, walk

MAX_NESTING = 50
MAX_NAME = 1000  # characters: an index in an index has twice as many
BINDING = [  # the loosest first
    r"\over \choose", "; , and or", r"= < > <= >= != \in \approx", r"\cup \cap \setminus", ":",
    r"- + \pm \mp", "* /",
]  # fmt: skip
LEVEL = {op: level for level, ops in enumerate(BINDING) for op in ops.split()}
RELATIONS, SIGNS = BINDING[2].split(), BINDING[5].split()
PREFIX = len(BINDING)  # the level of what a sign or a function takes: 2x^2, but no product
CLOSERS = {"(": ") ]", "[": "] )", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
MINUS = ("num", Fraction(-1), 0)
DEGREE = ("*", ("pi",), ("num", Fraction(1, 180), 0))
CONSTANT = {r"\pi": ("pi",), "e": ("e",), "i": ("i",), r"\infty": ("inf",), r"\emptyset": ("set",)}
CONSTANT[r"\mathbb{R}"] = ("span", "(", ")", ("*", MINUS, ("inf",)), ("inf",))
STARTS = {"|", r"\frac", r"\binom", r"\sqrt", r"\lfloor", r"\lceil", *CLOSERS, *CONSTANT}
STARTS |= ALPHABET | {"\\" + name for name in NAMES}


def number(text: str):
    """Return a numeral's tree: its value and number of decimals. ValueError if it is too long."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or 0)) > 5000:
        raise ValueError("a long numeral")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    return "num", value, len(mantissa.partition(".")[2])


def signed(op, tree):
    """Return the tree of a sign before a tree."""
    if op in (r"\pm", r"\mp"):
        return op[1:], tree
    negative = ("num", -tree[1], tree[2]) if tree[0] == "num" else ("*", MINUS, tree)
    return tree if op == "+" else negative


def join(op, a, b):
    """Return the tree of a binary operator."""
    if op in (r"\pm", r"\mp", "-"):
        return join("+", a, signed(op, b))
    if op in ("/", r"\over", r"\frac"):
        return join("*", a, ("^", b, MINUS))
    if op in (r"\choose", r"\binom"):
        return "fn", "binom", a, b
    if op in RELATIONS:
        ops, *sides = a[1:] if a[0] == "rel" else ((), a)
        return "rel", (*ops, op), *sides, b
    if op == "*" and b[0] == "matrix" and all(part[0] != "matrix" for part in walk(a)):
        return "matrix", *(("row", *(join("*", a, x) for x in row[1:])) for row in b[1:])
    if op == "and" and a[0] == b[0] == "rel" and not {*a[1], *b[1]} & {"=", r"\approx"}:
        op = r"\cap"  # x > 1 and x < 2
    kind = {";": "list", ",": "list", "and": "list", ":": "ratio"}.get(op, op.lstrip("\\"))
    return kind, *(a[1:] if a[0] == kind else (a,)), b


class Parser:
    """Recursive descent with binding levels; every recursion goes through `expression`."""

    def __init__(self, found: list[str]):
        self.tokens = found
        self.i = self.depth = self.bars = 0  # bars: open ones | of absolute values
        self.degree = False  # whether a degree sign is pi/180, as in a sine
        self.measures = set()  # units that both answers must share if both name some

    def peek(self, ahead=0) -> str:
        return self.tokens[self.i + ahead] if self.i + ahead < len(self.tokens) else ""

    def take(self, *expected) -> str:
        """Return the next token and go past it; ValueError if none of these is next."""
        token = self.peek()
        if not token or (expected and token not in expected):
            raise ValueError(f"unexpected {token!r}")
        self.i += 1
        return token

    def starts(self) -> bool:
        """Return whether the next token can be a factor, as in 2x."""
        token = self.peek()
        ends = token in LEVEL or (token == "|" and self.bars)
        return not ends and (token in STARTS or token.isalpha() or token.startswith(r"\begin"))

    def expression(self, level=0):
        """Return the tree of all that binds at least as tightly as this level."""
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ValueError("nested too deeply")
        sign = self.take() if self.peek() in SIGNS else ""
        left = signed(sign, self.expression(PREFIX)) if sign else self.scripts(self.atom())
        while True:
            op = self.peek()
            if LEVEL.get(op, -1) >= level:
                while self.take() in ",;" and self.peek() in ("and", "or"):
                    op = self.peek()  # "1, 2, and 3"
                left = join(op, left, self.expression(LEVEL[op] + 1))
            elif op.startswith("text:"):
                left = self.unit(left)
            elif level < PREFIX and self.starts():
                left = join("*", left, self.expression(PREFIX))
            else:
                break
        self.depth -= 1
        return left

    def unit(self, left):
        """Return a quantity without the unit that follows it, or a text with one word more."""
        word = self.take().removeprefix("text:")
        if left[0] == "text":
            return "text", left[1] + word
        if re.search(r"\b(?:or|and|not|\w+illions?|thousand|hundred)\b", word):
            raise ValueError("no unit")
        self.measures |= {MEASURE[w] for w in re.findall("[a-z]+", word) if w in MEASURE}
        if self.peek() == "^":
            self.take()
            self.argument()  # cm^2
        if self.peek() == "/" and self.peek(1).removeprefix("text:") in MEASURE:
            self.i += 2  # m/s
        return left

    def scripts(self, base):
        """Return an atom with the powers, factorials and degrees that stand behind it."""
        while self.peek() in ("^", "**", "!", r"\deg", "%"):
            op = self.take()
            if op in ("^", "**", "!"):
                base = ("fn", "!", base) if op == "!" else ("^", base, self.argument())
            elif op == r"\deg" and self.degree:  # in a sine
                base = join("*", base, DEGREE)
            else:
                self.measures.add("percent" if op == "%" else "degree")
        return base

    def argument(self, digit=False):
        """Return an exponent or argument: a group or a token (with `digit`, \\frac12 is a half)."""
        token = self.peek()
        if digit and token.isdigit():
            self.tokens[self.i : self.i + 1] = token  # a token for each digit
            return number(self.take())
        return self.group() if token == "{" else self.expression(PREFIX + 1)

    def group(self):
        """Return what stands in brackets: a tree, a set, or a span: a tuple or an interval."""
        opener = self.take()
        bars, self.bars = self.bars, 0
        inner = ("list",) if opener + self.peek() == r"\{\}" else self.expression()
        closer = self.take(*CLOSERS[opener].split())
        self.bars = bars
        members = inner[1:] if inner[0] == "list" else (inner,)
        if (opener == r"\{" and inner[0] != "rel") or (opener == "{" and len(members) > 1):
            return "set", *members
        return inner if len(members) == 1 else ("span", opener, closer, *members)

    def atom(self):
        token = self.peek()
        if token in CLOSERS:
            return self.group()
        self.take()
        if token[:1].isdigit() or token[1:2].isdigit():
            return self.numeral(token)
        if token in ("|", r"\lfloor", r"\lceil"):
            self.bars += token == "|"
            inner = self.expression()
            self.bars -= token == "|"
            self.take(token.replace("l", "r", 1))
            return "fn", {"|": "abs"}.get(token, token[2:]), inner
        if token in (r"\frac", r"\binom"):
            return join(token, self.argument(digit=True), self.argument(digit=True))
        if token == r"\sqrt":
            index = self.group() if self.peek() == "[" else ("num", Fraction(2), 0)
            return "^", self.argument(), ("^", index, MINUS)
        if token.startswith(r"\begin"):
            return self.matrix(token)
        if token.startswith("text:"):
            return "text", token[5:]
        if token[1:] in NAMES:
            return self.function(token[1:])
        return CONSTANT[token] if token in CONSTANT and self.peek() != "_" else self.name(token)

    def numeral(self, token):
        """Return a number; 1\\frac{1}{2} is a mixed one, and 52_8 one in base 8."""
        if self.peek() == "_":
            self.take()
            return "base", token.lstrip("0"), self.argument()
        if self.peek() != r"\frac" or not token.isdigit():
            return number(token)
        part = self.atom()
        top, bottom = part[1], part[2][1]  # of ("*", top, ("^", bottom, -1))
        is_mixed = top[0] == bottom[0] == "num" and 0 < top[1] < bottom[1]
        return join("+" if is_mixed else "*", number(token), part)

    def name(self, token):
        """Return a variable with its index and primes, or a function of something: f(x)."""
        if not (token.isalpha() or token in ALPHABET):
            raise ValueError(f"unexpected {token!r}")
        if self.peek() == "_":
            self.take()
            token += f"_{self.argument()}"
            if len(token) > MAX_NAME:
                raise ValueError("a long name")
        while self.peek() == "'":
            token += self.take()
        if self.peek() == "(" and token[0] in "fg":
            return "fn", token, *arguments(self.group())
        if self.peek() == "(" and self.peek(2) == ")" and self.peek(3) == "=":
            token += self.take() + self.take() + self.take()  # p(x) = ...
        return "var", token

    def function(self, name):
        """Return \\sin^2 x or \\log_2 8: the power is the value's, and 2x is one argument."""
        scripts = {}
        while self.peek() in ("^", "_"):
            mark = self.take()
            scripts[mark] = self.argument()
        power = scripts.pop("^", None)
        outer, self.degree = self.degree, self.degree or name in TRIG
        closed = self.peek() in ("(", "[", "{", "|")
        argument = self.expression(PREFIX)
        while not closed and self.starts() and self.peek()[1:] not in NAMES:
            argument = join("*", argument, self.expression(PREFIX))
        self.degree = outer
        if power == MINUS and name in TRIG:
            name, power = "arc" + name, None
        tree = ("fn", name, *arguments(argument), *scripts.values())
        return ("^", tree, power) if power else tree

    def matrix(self, token):
        """Return the rows up to the \\end of this \\begin."""
        if not re.match(r"\\begin\{(?:[pb]?matrix|smallmatrix|array)\}", token):
            raise ValueError(f"no matrix: {token}")
        end = token.split("}")[0].replace("begin", "end") + "}"
        rows = [("row", self.expression())]
        while (mark := self.take("&", r"\\", end)) != end:
            if mark == "&":
                rows[-1] += (self.expression(),)
            elif self.peek() != end:
                rows.append(("row", self.expression()))
        return "matrix", *rows


def arguments(tree):
    """Return the arguments of a function: (x, y) are two."""
    return tree[3:] if tree[0] == "span" else (tree,)


def items(tree):
    """Return the members of a list or a set; anything else is its only member."""
    is_list = tree[0] in ("list", "or", "set") and not (len(tree) == 2 and tree[1][0] == "set")
    return list(tree[1:]) if is_list else [tree]


def spread(tree):
    """Return a tree without plus-minus: with it, the list of all that it says."""
    if tree[0] in ("list", "or", "set"):
        parts = [(part, spread(part)) for part in tree[1:]]
        members = [[part] if said == part else items(said) for part, said in parts]
        return tree[0], *itertools.chain(*members)
    kinds = [part[0] for part in walk(tree) if part[0] in ("pm", "mp")]
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


def parse(text: str):
    """Return (tree, measures) of a normalised answer; ValueError if it is no mathematics."""
    parser = Parser(tokens(text))
    tree = parser.expression()
    if parser.peek():
        raise ValueError("more than one expression")
    return spread(tree), parser.measures
