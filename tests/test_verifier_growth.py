r"""No answer stalls the verifier: each production of its grammar is grown, in each other.

A production is a text with holes, written @: \frac{@}{@}. `grow` repeats it to any length, nested
or side by side; `fill` puts numbers or names into its holes. Whatever comes out, a verdict costs
time and memory linear in the text. Only CPU time counts, so that a busy machine fails no test.
Each test takes some of all cases, in turn; with `pytest -m long` two more take others.
"""

import itertools
import re
import signal
import time
import tracemalloc

import pytest

from eval_math import verify

SECONDS = 0.2  # of one verdict on up to 10,000 characters
BYTES = 50e6  # of memory, at its peak
SECONDS_OF_MEGABYTE = 1.0
LENGTHS = (50, 100, 200, 900, 1000, 10_000)
PAIRED = (100, 900)  # of a production in another one: deep, but not too deep to be read; and wide

# ---- The grammar, two spaces between two productions ---------------------------------------------

GRAMMAR = {
    "sums and products": r"@ + @  @ - @  -@  +@  @@  @ @  @ \cdot @  @ * @  @/@  @ \pm @  @ \mp @",
    "powers": r"@^@  @^{@}  @**@  2^{-@}  e^{@}  @^{@}@  (@ + @)^{9}  @^T  @²  10^{@}",
    "names": r"@_@  @_{@}  x_@  x_{@}  @_{@,@}  @'  \bar{@}  \hat{@}  \vec{@}  \overline{@}  AB@",
    "signs behind": r"@!  @!!  @\%  @%  @^\circ  @^{\circ}  @\deg  \$@  @\text{ cents}  \sqrt@!",
    "fractions": r"\frac{@}{@}  \frac@@  \dfrac{1}{@}  \frac{@}{2}  {@ \over @}  1+\frac{1}{1+@}",
    "roots": r"\sqrt{@}  \sqrt[@]{@}  \sqrt @  √@  \sqrt[3]{1+@}  \sqrt{@ + \sqrt{@}}",
    "mixed numbers": r"1\frac{@}{3}  @\frac{1}{2}  @ 1/2  @½  3 @/7",
    "decimals": r"@.@  0.\overline{@}  0.@\overline{@}  @.333...  @,000  @{,}000  @e9  .@",
    "bases": r"@_2  @_{10}  (@)_8  10@_{16}  @_{@_{8}}",
    "choose": r"\binom{@}{@}  {@ \choose @}  \tbinom@@  \gcd(@, @)  \max(@, @)  \min\{@, @\}",
    "functions": r"\sin @  \sin^2 @  \sin^{-1}(@)  \log_{@} @  \ln(@)  \arctan @  \cos(@+@)  sin@",
    "unknown functions": r"f(@)  f(@, @)  g_{@}(@)  f^{-1}(@)  P(@)  f(-@)  h(@) = @",
    "operators": r"\sum_{@}^{@} @  \prod_{k=1}^{@} @  \int_{@}^{@} @ \, dx  \lim_{x \to @} @",
    "bars": r"|@|  \lvert @ \rvert  \lfloor @ \rfloor  \lceil @ \rceil  \left| @ \right|  \|@\|",
    "brackets": r"(@)  [@]  {@}  \left( @ \right)  \langle @, @ \rangle  (@, @)  \{@\}  \bigl[@)",
    "lists": r"@, @  @; @  @ and @  @, and @  @ or @  @ \text{ or } @  @ \land @  @ : @",
    "sets": r"\{@, @\}  \{x : @\}  \{@ \mid @ > @\}  \{@\} \cup @  \emptyset @  \mathbb{R} @",
    "regions": r"@ \cup (@, @)  [@, @]  (@, @]  (-\infty, @)  @ \cap @  @ \setminus @  (0, @)",
    "relations": r"@ = @  @ < @  @ > @  @ \le @  @ >= @  @ \ne @  @ \approx @  x = @  @ < x < @",
    "members": r"@ \in @  k \in \mathbb{Z}, @  @ \equiv @ \pmod{@}  @ \mid @  @ \to @  @ \iff @",
    "conditions": r"@ \text{ if } @  @, x > @  @ \text{ for } x \ne @  @ \text{ where } @ = @",
    "matrices": r"\begin{pmatrix} @ & @ \\ @ & @ \end{pmatrix}  @ & @  @ \\ @  \begin{bmatrix}@ & 1"
    r"\end{bmatrix}  \begin{array}{cc} @ \end{array}  \begin{vmatrix}@ & @\end{vmatrix}",
    "cases": r"\begin{cases} @ & @ \\ @ & @ \end{cases}  \begin{aligned} @ &= @ \end{aligned}",
    "units": r"@\text{ m}  @\,\mathrm{kg}  @ cm^2  @\,\mathrm{m/s^{@}}  @ apples  @ per @"
    r"  @ \text{ cm}^@  @ sq ft  @\text{ meters and }@",
    "words": r"\text{@}  \text{the @ }  \mathrm{@}  the answer is @  yes @  two @  @ perhaps @  n@",
    "letters": r"(A) @  \text{(B)} @  A: @  \mathbf{C} @  @ (D)",
    "macros that are silent": r"\displaystyle @  \boxed{@}  $@$  \( @ \)  **@**  \phantom{@}  \, @"
    r"  ~@  \left. @  \color{red} @  \operatorname{@}  \cancel{@}  \boldsymbol{@}",
    "macros": r"\theta @  \pi @  \infty @  \triangle @  \angle @  \ldots @  @, \ldots, @  \foo{@}",
    "Unicode": "@\ufdfa  @\u0315\u0300  @∪@  @≤@  @₂  @⁄@  @\ud800",  # a ligature, two accents
}
GRAMMAR = {group: re.split(" {2,}", line) for group, line in GRAMMAR.items()}
PRODUCTIONS = list(itertools.chain(*GRAMMAR.values()))

LEAVES = {  # what the holes are filled with, in turn
    "x": ["x"],
    "numbers": [str(n) for n in range(1000, 9999)],
    "names": list("abcdghjkmnpqrstuvwxyz"),
    "irrational": [rf"{n}\sqrt2" for n in range(1000, 9999)],
    "fractions": [f"1/{n}" for n in range(1000, 9999)],
    "large": [f"1e{n}" for n in range(1000, 4999)],
}
SHORT = [r"\frac{1}{2}", r"\text{no}", "(0,1)", r"\{1, 2\}", "x = 5", "x<2", "x^2+1", "1,2", "5"]
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
NEXT = str.maketrans(CHARACTERS, "1234567890" + CHARACTERS[11:] + "a")
WORST = [
    ("x = @", "right", "fractions"),
    ("@ < x < @", "left", "fractions"),
    ("@ < x < @", "bush", "numbers"),
    ("@ = @", "right", "x"),
    ("@, and @", "bush", "irrational"),
    ("√@", "row", "x"),
]


# ---- Growing a text ------------------------------------------------------------------------------


def size(text, width):
    """Return the length of a text whose holes are filled with `width` characters each."""
    return len(text) + text.count("@") * (width - 1)


def split(production, way):
    """Return what stands before and after the hole in which a production is nested."""
    left, _, right = production.partition("@") if way == "left" else production.rpartition("@")
    return left, right


def grow(production, way, length, width):
    """Return about `length` characters of a production, with holes to be filled.

    The ways: itself in its first hole (left) or in its last one (right), in all of them (bush),
    side by side (row), and only what stands before its last hole (open) or after it (shut).
    """
    if way == "bush":
        return bush(production, length, width)
    before, after = split(production, way)
    unit = {"row": production, "open": before, "shut": after}.get(way, before + after)
    times = max(1, length // max(1, size(unit, width)))
    return unit * times if way in ("row", "open", "shut") else before * times + "@" + after * times


def bush(production, length, width):
    """Return a production in all its holes, to a depth that is the logarithm of the length."""
    text = production
    more = size(production, width) - width  # that each hole adds
    while (room := (length - size(text, width)) // more) > 0:
        text = text.replace("@", production, room)
    return text


def ways(production):
    """Return the ways in which a production grows to different texts."""
    several = production.count("@") > 1
    return ["right", "row", *(["left", "bush"] if several else [])]


def fill(text, leaves):
    """Return a text with a leaf in each hole, in turn."""
    parts = text.split("@")
    holes = itertools.islice(itertools.cycle(leaves), len(parts) - 1)
    return "".join(itertools.chain(*zip(parts, [*holes, ""], strict=True)))


def rivals(text, leaves):
    """Return a filled text, and what it is compared with: itself with one character changed in the
    last hole, and itself with all leaves the other way round, which is equal if it is a list."""
    used = leaves[: text.count("@")]
    before, hole, after = text.rpartition("@")
    last = used[-1] if hole else ""
    changed = last[:-1] + last[-1:].translate(NEXT)
    same = fill(before, leaves) if hole else ""
    return same + last + after, same + changed + after, fill(text, used[::-1] or [""])


# ---- What a verdict costs ------------------------------------------------------------------------


class Stalled(BaseException):
    """Raised in a verdict that takes much too long; no Exception, so that no net catches it."""


def stop(*_):
    raise Stalled


def seconds(completion, gold, strict, limit):
    """Return the CPU seconds of a verdict; infinity if it is stopped at three times the limit."""
    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * limit)
    started = time.thread_time()
    try:
        assert type(verify(completion, gold, strict)) is bool
        return time.thread_time() - started
    except Stalled:
        return float("inf")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def too_slow(name, completion, gold, strict=True, limit=SECONDS):
    """Return [(name, length, seconds)] if a verdict takes too long, twice in a row, else []."""
    spent = seconds(completion, gold, strict, limit)
    if limit < spent < float("inf"):
        spent = min(spent, seconds(completion, gold, strict, limit))
    return [(name, len(completion) + len(gold), round(spent, 2))] if spent > limit else []


def memory(completion, gold):
    """Return the bytes that a verdict takes at its peak; infinity if it is stopped."""
    tracemalloc.start()
    try:
        spent = seconds(completion, gold, True, 2.0)
        return max(tracemalloc.get_traced_memory()[1], spent if spent == float("inf") else 0)
    finally:
        tracemalloc.stop()


def boxed(answer):
    return rf"So it is $\boxed{{{answer}}}$."


def checks(text, leaves, short):
    """Return the four checks of a grown text, each an answer and a gold: against the two texts that
    are almost the same, and beside a short one."""
    text, changed, turned = rivals(text, leaves)
    return [(text, changed), (text, turned), (text, short), (short, text)]


def slow_checks(pairs, name):
    """Return what is too slow of pairs of an answer and a gold."""
    return [case for answer, gold in pairs for case in too_slow(name, boxed(answer), gold)]


def nested(outer, inner, way, length, width):
    """Return one production in another one, both grown, or (way "inside") only the inner one."""
    if way == "inside":
        rest = length - size(outer, width)
        return outer.replace("@", grow(inner, ways(inner)[-1], rest, width), 1)
    return grow(outer.replace("@", inner, 1), way, length, width)


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Let sympy fill its caches before anything is timed."""
    for short in SHORT:
        verify(boxed(short), "x + 1/2")


# ---- The tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_each_production_alone(length):
    """x_x_x_x of 79 characters that doubles its work with each letter, a set that is compared
    member by member, a sum whose terms grow, a limit that a longer text goes past."""
    slow = []
    turn = itertools.count(length)
    for production in PRODUCTIONS:
        n = next(turn)
        kind = list(LEAVES)[n % len(LEAVES)]
        way = [*ways(production), "open", "shut"][n // 2 % (len(ways(production)) + 2)]
        text = grow(production, way, length, len(LEAVES[kind][-1]))
        pairs = checks(text, LEAVES[kind], SHORT[n % len(SHORT)])
        slow += slow_checks([pairs[n % 4]], (production, way, kind))
    assert slow == []


@pytest.mark.parametrize("name", WORST)
def test_the_slowest_that_were_found(name):
    """What took longest of all that the two long tests tried: chains of equal values, lists
    whose members are all compared, inequalities with hundreds of ends."""
    production, way, kind = name
    leaves = LEAVES[kind]
    text = grow(production, way, 900, len(leaves[-1]))
    assert slow_checks(checks(text, leaves, "5"), name) == []


@pytest.mark.parametrize("length", PAIRED)
def test_each_production_in_each_other(length):
    """Two bounds that hold alone and multiply together: a matrix in a product, a list of regions,
    an index in a set. Some pairs of groups are taken, with their productions in turn."""
    slow = []
    turn = itertools.cycle(itertools.product(LEAVES, ("right", "row", "bush", "inside")))
    members = {group: itertools.cycle(found) for group, found in GRAMMAR.items()}
    for groups in [*itertools.product(GRAMMAR, repeat=2)][:: 5 if length == 900 else 2]:
        outer, inner = (next(members[group]) for group in groups)
        kind, way = next(turn)
        text = nested(outer, inner, way, length, len(LEAVES[kind][-1]))
        text, changed, _ = rivals(text, LEAVES[kind])
        slow += slow_checks([(text, changed)], (outer, inner, way, kind))
    assert slow == []


@pytest.mark.parametrize("length", [900, 10_000])
def test_memory(length):
    """A text, a tree or a number that grows to gigabytes before its size is known."""
    large = []
    turn = itertools.cycle(LEAVES.values())
    for production in PRODUCTIONS[:: 16 if length == 900 else 4]:
        leaves = next(turn)
        text = grow(production, ways(production)[-1], length, len(leaves[-1]))
        text, changed, _ = rivals(text, leaves)
        peak = memory(boxed(text), changed)
        large += [(production, length, peak)] if peak > BYTES else []
    assert large == []


@pytest.mark.parametrize("side", ["answer", "gold"])
def test_a_megabyte_of_each_production(side):
    """A regular expression that goes back over what it has read, or a loop that cuts off the front
    of its text: quadratic, where no limit of the length stands before it."""
    slow = []
    for production in PRODUCTIONS:
        text = 100 * fill(grow(production, "row", 10_000, 4), LEAVES["numbers"])
        answer, gold = (text, "5") if side == "answer" else ("5", text)
        slow += too_slow((production, side), boxed(answer), gold, limit=SECONDS_OF_MEGABYTE)
    assert slow == []


NOISE = r"\boxed{  \boxed{5}  \boxed  \fbox  \boxed{5  }  {  {}  \  \}  $  box  </think>  <think>"
NOISE += r"  <|  <|im_end|>  ####  answer is  is:  answer:  **  $5$  \[  \(  5  5,  .  =  -  a  \ "
NOISE = [*re.split(" {2,}", NOISE), " ", "\n", "\\\n", "answer ", "\u0315\u0300", "\0", "５"]


@pytest.mark.parametrize("place", ["alone", "inside", "before", "after", "around"])
def test_a_megabyte_around_the_box(place):
    """A search for the last box that begins again at each box, brace or line."""
    slow = []
    for unit in NOISE:
        text = unit * (1_000_000 // len(unit))
        half = text[: len(text) // 2]
        box = boxed("5")
        completion = {
            "alone": text,
            "inside": boxed(text),
            "before": text + box,
            "after": box + text,
            "around": half + box + half,
        }[place]
        for strict in (True, False):
            slow += too_slow((unit, place), completion, "5", strict, SECONDS_OF_MEGABYTE)
    assert slow == []


@pytest.mark.long
@pytest.mark.parametrize("kind", LEAVES)
def test_each_production_alone_in_all_ways(kind):
    """One combination of way, leaves and rival that the turns of the short test miss."""
    slow = []
    turn = itertools.cycle(SHORT)
    for production in PRODUCTIONS[::30]:
        for way in [*ways(production), "open", "shut"]:
            text = grow(production, way, 900, len(LEAVES[kind][-1]))
            pairs = checks(text, LEAVES[kind], next(turn))
            slow += slow_checks(pairs, (production, way, kind))
    assert slow == []


@pytest.mark.long
@pytest.mark.parametrize("way", ["right", "row", "bush", "inside"])
def test_pairs_of_productions(way):
    """One pair of productions that the turns of the short test miss: every 397th is taken."""
    slow = []
    turn = itertools.cycle(LEAVES)
    for outer, inner in [*itertools.product(PRODUCTIONS, repeat=2)][::397]:
        kind = next(turn)
        text = nested(outer, inner, way, 900, len(LEAVES[kind][-1]))
        text, changed, _ = rivals(text, LEAVES[kind])
        slow += slow_checks([(text, changed)], (outer, inner, way, kind))
    assert slow == []
