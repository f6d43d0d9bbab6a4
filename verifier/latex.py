"""From the LaTeX of an answer to a tree: recursive descent over the tokens of spellings.py.

A tree is a tuple of its kind and its parts: num (Fraction, decimals), var (name), + and * and ^,
fn (name, arguments), pm and mp, inf, text (words), list, or, set, span (open, close, items: a
tuple or an interval), rel (operators, sides), cup, cap, setminus, ratio, base, matrix, row.
"""

import itertools
import re
from fractions import Fraction

from verifier.spellings import ALPHABET, MEASURE, tokens
from verifier.values import NAMES, TRIG, walk

MAX_NESTING = 50
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", "<=": "<=", ">=": ">="}
RELATIONS |= {r"\neq": "!=", "!=": "!=", r"\in": "in", r"\approx": "~"}
LEVEL = {r"\over": 0, r"\choose": 0, ":": 5, "*": 7, "/": 7} | dict.fromkeys(RELATIONS, 3)
LEVEL |= dict.fromkeys((";", ",", "and", "or"), 1) | dict.fromkeys(("+", "-", r"\pm", r"\mp"), 6)
LEVEL |= dict.fromkeys((r"\cup", r"\cap", r"\setminus"), 4)
CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), r"\{": (r"\}",)}
CLOSERS |= {r"\langle": (r"\rangle",)}
STARTS = {*CLOSERS, "|", r"\frac", r"\binom", r"\sqrt", r"\lfloor", r"\lceil"}
STARTS |= {r"\pi", r"\infty", r"\emptyset", r"\mathbb{R}"} | ALPHABET | {"\\" + x for x in NAMES}
ONE, MINUS = ("num", Fraction(1), 0), ("num", Fraction(-1), 0)
DEGREE = ("*", ("pi",), ("num", Fraction(1, 180), 0))
CONSTANT = {r"\pi": ("pi",), "e": ("e",), "i": ("i",), r"\infty": ("inf",), r"\emptyset": ("set",)}
CONSTANT[r"\mathbb{R}"] = ("span", "(", ")", ("*", MINUS, ("inf",)), ("inf",))


def number(text: str):
    """A numeral's tree: its value, and how many decimals it has. ValueError if it is too long."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or 0)) > 5000:
        raise ValueError("a long numeral")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    return "num", value, len(mantissa.partition(".")[2])


def join(op, a, b):
    """The tree of a binary operator, or with a=None of a sign."""
    if a is None and op in "+-":
        negative = ("num", -b[1], b[2]) if b[0] == "num" else ("*", MINUS, b)
        return b if op == "+" else negative
    if a is None:
        return op[1:], b  # pm or mp
    if op in (r"\pm", r"\mp", "-"):
        return join("+", a, join(op, None, b))
    if op in ("/", r"\over"):
        return join("*", a, ("^", b, MINUS))
    if op == r"\choose":
        return "fn", "binom", a, b
    if op in RELATIONS:
        ops, *sides = a[1:] if a[0] == "rel" else ((), a)
        return ("rel", (*ops, RELATIONS[op]), *sides, b)
    if op == "*" and "matrix" in (a[0], b[0]) and a[0] != b[0]:
        scalar, matrix = (b, a) if a[0] == "matrix" else (a, b)
        rows = [("row", *(join("*", scalar, x) for x in row[1:])) for row in matrix[1:]]
        return "matrix", *rows
    if op == "and" and a[0] == b[0] == "rel" and not {*a[1], *b[1]} & {"=", "~"}:
        op = r"\cap"  # x > 1 and x < 2
    kind = {";": "list", ",": "list", "and": "list", ":": "ratio"}.get(op, op.lstrip("\\"))
    return (kind, *(a[1:] if a[0] == kind else (a,)), b)


class Parser:
    """Recursive descent with binding levels; every recursion goes through `expression`."""

    def __init__(self, found: list[str]):
        self.tokens, self.i, self.depth, self.bars, self.degree = found, 0, 0, 0, ONE
        self.measures = set()  # units that both answers must share if both name some

    def peek(self, ahead=0) -> str:
        return self.tokens[self.i + ahead] if self.i + ahead < len(self.tokens) else ""

    def take(self, *expected) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise ValueError(f"unexpected {token!r}")
        self.i += 1
        return token

    def starts(self) -> bool:
        """Whether the next token can be a factor, as in 2x."""
        token = self.peek()
        atom = token in STARTS or token.isalpha() or token.startswith(r"\begin")
        return atom and token not in LEVEL and not (token == "|" and self.bars)

    def expression(self, level=0):
        """A tree of all that binds at least as tightly as this level."""
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ValueError("nested too deeply")
        if self.peek() in ("-", "+", r"\pm", r"\mp"):
            left = join(self.take(), None, self.expression(8))
        else:
            left = self.scripts(self.atom())
        while True:
            op = self.peek()
            if LEVEL.get(op, -1) >= level:
                while self.take() in ",;" and self.peek() in ("and", "or"):
                    op = self.peek()  # "1, 2, and 3"
                left = join(op, left, self.expression(LEVEL[op] + 1))
            elif op.startswith("text:"):
                left = self.unit(left)
            elif level <= 7 and self.starts():
                left = join("*", left, self.expression(8))
            else:
                break
        self.depth -= 1
        return left

    def unit(self, left):
        """A quantity without the unit that follows it, or a text with one word more."""
        word = self.take()[5:]
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
        """What stands behind an atom: powers, factorials, degrees (which count in a sine only)."""
        while self.peek() in ("^", "**", "!", r"\deg", "%"):
            op = self.take()
            if op in ("^", "**"):
                base = ("^", base, self.argument())
            elif op == "!":
                base = ("fn", "!", base)
            elif op == r"\deg" and self.degree is not ONE:
                base = join("*", base, self.degree)
            else:
                self.measures.add("percent" if op == "%" else "degree")
        return base

    def argument(self, digit=False):
        """An exponent or an argument: a group, or one token (with `digit`, \\frac12 is a half)."""
        token = self.peek()
        if digit and token.isdigit():
            self.tokens[self.i : self.i + 1] = [token[0], *([token[1:]] if token[1:] else [])]
            return number(self.take())
        return self.group() if token == "{" else self.expression(9)

    def group(self):
        """What stands in brackets: one tree, or a set, or a span: a tuple or an interval."""
        opener, (bars, self.bars) = self.take(), (self.bars, 0)
        empty = opener == r"\{" and self.peek() == r"\}"
        inner = ("list",) if empty else self.expression()
        closer, self.bars = self.take(*CLOSERS[opener]), bars
        items = inner[1:] if inner[0] == "list" else (inner,)
        if (opener == r"\{" and inner[0] != "rel") or (opener == "{" and len(items) > 1):
            return "set", *items
        return inner if len(items) == 1 else ("span", opener, closer, *items)

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
        if token == r"\frac":
            return join("/", self.argument(digit=True), self.argument(digit=True))
        if token == r"\binom":
            return "fn", "binom", self.argument(digit=True), self.argument(digit=True)
        if token == r"\sqrt":
            index = self.group() if self.peek() == "[" else ("num", Fraction(2), 0)
            inverse = ("num", 1 / index[1], 0) if index[0] == "num" else ("^", index, MINUS)
            return "^", self.argument(), inverse
        if token.startswith(r"\begin"):
            return self.matrix(token)
        if token.startswith("text:"):
            return "text", token[5:]
        if token[1:] in NAMES:
            return self.function(token[1:])
        return CONSTANT[token] if token in CONSTANT and self.peek() != "_" else self.name(token)

    def numeral(self, token):
        """A number; 1\\frac{1}{2} is a mixed one, and 52_8 one in base 8."""
        if self.peek() == "_":
            self.take()
            base = self.argument()
            if base[0] != "num" or not 2 <= base[1] <= 36 or len(token) > 300:
                raise ValueError("no base")
            value = "num", Fraction(int(token, int(base[1]))), 0
            return value if base[1] == 10 else ("base", value, base)
        value = number(token)
        if self.peek() == r"\frac" and token.isdigit():
            part = self.atom()
            a, b = part[1], part[2][1]
            mixed = a[0] == b[0] == "num" and 0 < a[1] < b[1] and not (a[2] or b[2])
            return ("num", value[1] + a[1] / b[1], 0) if mixed else join("*", value, part)
        return value

    def name(self, token):
        """A variable with its index and primes, or a function of something: f(x)."""
        if not (token.isalpha() or token in ALPHABET):
            raise ValueError(f"unexpected {token!r}")
        if self.peek() == "_":
            self.take()
            token += f"_{self.argument()}"
        while self.peek() == "'":
            token += self.take()
        if self.peek() == "(" and token[0] in "fg":
            argument = self.group()
            return "fn", token, *(argument[3:] if argument[0] == "span" else (argument,))
        if self.peek() == "(" and self.peek(2) == ")" and self.peek(3) == "=":
            token += self.take() + self.take() + self.take()  # p(x) = ...
        return "var", token

    def function(self, name):
        """\\sin^2 x, \\log_2 8, \\arctan(y): the power is the value's; 2x is one argument."""
        power = base = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.argument()
            else:
                base = self.argument()
        outer, self.degree = self.degree, DEGREE if name in TRIG else self.degree
        closed = self.peek() in ("(", "[", "{", "|")
        argument = self.expression(8)
        while not closed and self.starts() and self.peek()[1:] not in NAMES:
            argument = join("*", argument, self.expression(8))
        self.degree = outer
        if power == MINUS and name in TRIG:
            name, power = "arc" + name, None
        arguments = argument[3:] if argument[0] == "span" else (argument,)
        tree = ("fn", name, *arguments, *([base] if base else []))
        return ("^", tree, power) if power else tree

    def matrix(self, token):
        if not re.match(r"\\begin\{(?:[pb]?matrix|smallmatrix|array)\}", token):
            raise ValueError(f"no matrix: {token}")
        rows = [["row", self.expression()]]
        end = token.split("}")[0].replace("begin", "end") + "}"
        while self.peek() != end:
            if self.take("&", r"\\") == "&":
                rows[-1].append(self.expression())
            elif self.peek() != end:
                rows.append(["row", self.expression()])
        self.take()
        return "matrix", *map(tuple, rows)


def items(tree):
    """The members of a list or a set; anything else is its only member."""
    nested = tree[0] == "set" and len(tree) == 2 and tree[1][0] == "set"
    return list(tree[1:]) if tree[0] in ("list", "or", "set") and not nested else [tree]


def spread(tree):
    """A tree without plus-minus: with it, the list of all that it says."""
    if tree[0] in ("list", "or", "set"):
        parts = [(part, spread(part)) for part in tree[1:]]
        return (tree[0], *(x for old, new in parts for x in ([old] if old == new else items(new))))
    kinds = [x[0] for x in walk(tree) if x[0] in ("pm", "mp")]
    if not kinds or len(kinds) > 3:
        return tree
    free = 1 if "mp" in kinds else len(kinds)
    choices = itertools.product((True, False), repeat=free)
    return ("list", *(resolve(tree, itertools.cycle(signs)) for signs in choices))


def resolve(tree, signs):
    """The tree with its plus-minuses read as these signs, from left to right."""
    if not isinstance(tree, tuple):
        return tree
    if tree[0] in ("pm", "mp"):
        positive = next(signs) == (tree[0] == "pm")
        return resolve(tree[1] if positive else join("-", None, tree[1]), signs)
    return tuple(resolve(x, signs) for x in tree)


def links(tree):
    """A relation's or a chain's links as (operator, left side, right side)."""
    return list(zip(tree[1], tree[2:], tree[3:], strict=False))


def parse(text: str):
    """(tree, measures) of a normalised answer; ValueError if it is no mathematics."""
    parser = Parser(tokens(text))
    tree = parser.expression()
    if parser.peek():
        raise ValueError("more than one expression")
    return spread(tree), parser.measures
