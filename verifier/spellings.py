"""What mathematicians and models spell in many ways: an answer's text to tokens.

Tables, flat regular expressions and plain loops, all linear in the text: nothing here has a value.
"""

import functools
import re
import unicodedata


def table(text: str) -> dict[str, str]:
    """Return {word: first word of its group}; commas part the groups."""
    groups = [group.split() for group in text.split(",")]
    return {word: group[0] for group in groups for word in group}


compatible = functools.partial(unicodedata.normalize, "NFKC")  # 2 for ², 1⁄2 for ½
SIGNS = table(r"""- − – — ‑, \times ×, \cdot · ⋅, * ∗, / ÷, \pi π, \infty ∞, \cup ∪, \cap ∩, ' ′ ’,
\setminus ∖, \emptyset ∅, ^\circ ° º, \sqrt √, \pm ±, \leq ≤ ⩽, \geq ≥ ⩾, \neq ≠, \approx ≈, \in ∈,
\mathbb{R} ℝ, \theta θ, \alpha α, \beta β, \phi φ, \lfloor ⌊, \rfloor ⌋, \lceil ⌈, \rceil ⌉""")
CHARACTERS = {c: macro + " " * (len(macro) > 1) for c, macro in SIGNS.items() if len(c) == 1}
CHARACTERS |= {c: f"^{{{compatible(c)}}}" for c in "⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ"}
CHARACTERS |= {c: f"_{{{compatible(c)}}}" for c in "₀₁₂₃₄₅₆₇₈₉"}
CHARACTERS |= {c: rf"\frac{{{compatible(c).replace('⁄', '}{')}}}" for c in "½⅓⅔¼¾⅕⅙⅛"}
CHARACTERS = str.maketrans(CHARACTERS | dict.fromkeys("€£\u200b\ufeff", ""))
# Macros that say nothing, that say a space, and that say what another one does; fonts are \text.
SILENT = r"""\! \$ \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \middle \displaystyle
\limits \boxed \fbox \boldsymbol \mathbf \bm \textstyle \vec \hat \( \) \[ \] \Large \cancel"""
MACROS = dict.fromkeys(SILENT.split(), "")
MACROS |= dict.fromkeys([r"\,", r"\;", r"\:", "\\ ", "~", r"\quad", r"\qquad"], " ")
MACROS |= table(r"""\text \textbf \textit \textrm \textnormal \mbox \emph \mathrm \operatorname,
\frac \dfrac \tfrac \cfrac \nicefrac, \binom \dbinom \tbinom, <= \leq \le \leqslant, < \lt, > \gt,
>= \geq \ge \geqslant, != \neq \ne, | \lvert \rvert \vert \mid, \{ \lbrace, \} \rbrace, / \div,
* \cdot \times \ast, : \colon, \deg \degree, \emptyset \varnothing, \setminus \backslash, % \%,
\ldots \dots \cdots, \text{and} \land \wedge, \text{or} \lor \vee, ' \prime, \overline \bar""")
LETTERS = """alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi psi omega ell
Gamma Delta Sigma Phi Psi Omega triangle angle circ"""
ALPHABET = {"\\" + name for name in LETTERS.split()}
NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve"
PHRASES = {word: str(n) for n, word in enumerate(NUMERALS.split())}
PHRASES |= dict.fromkeys(["all real numbers", "all reals", "real numbers"], r"\mathbb{R}")
# Units that contradict each other if both sides name one; all others are read over.
UNITS = table("""m meter, cm centimeter, mm millimeter, km kilometer, ft foot feet, in inch inches,
yard, mi mile, s sec second, min minute, h hr hour, day, week, month, year yr, lb lbs pound,
oz ounce, kg kilogram, g gram, dollar, cent, euro, l liter, gallon, degree, mph, am, pm, percent""")
MEASURE = UNITS | {word + "s": unit for word, unit in UNITS.items() if len(word) > 2}
# Words behind a number that no product of variables spells.
NOUNS = {"sq", "cu", "per", "way"} | set(MEASURE) - {"m", "s", "h", "g", "l", "in"}
# What is typed without a backslash.
ASCII = "sin cos tan cot sec csc arcsin arccos arctan log ln exp sqrt pi max min gcd lcm theta frac"
ASCII = {word: "\\" + word for word in ASCII.split()} | table(r"\infty infty infinity inf oo")
MAX_TOKENS = 500
NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
TOKEN = re.compile(
    rf"\\begin\{{[a-z]*\}}(?:\{{[lcr| ]*\}})?|\\end\{{[a-z]*\}}|(?:{NUMBER})(?:[eE][+-]?[0-9]+)?"
    r"|\\text\{[^{}]*\}|\\mathbb\{R\}|\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|=>|\*\*|\S"
)


def repeating(match) -> str:
    """Return 0.1\\overline{6} as the sum (0.1+6/90)."""
    whole, digits, block = match.groups()
    return f"({whole}{digits}+{block}/{'9' * len(block)}{'0' * len(digits)})"


REWRITES = [  # in this order
    (r"(?<=[0-9])\s*(?:\{,\}|,\\!)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}000 and 1,\!000
    (r"\\(?:left|right)\s*\.|\\phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\\math(?:rm|bf|it|sf)\s*\{\s*([A-Za-z])\s*\}", r" \1 "),  # e and i, not the unit m
    (r"\\mathbb\s*\{([A-QS-Z])\}|\\overline\s*\{([A-Z]{2})\}", r"\1\2"),  # P(A), a segment
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])", r"\\deg "),
    (r"\.\.\.", r"\\ldots "),
    (r"(\\\\)\s*\[\s*[0-9.]+\s*(?:pt|ex|em|mm|cm)\s*\]", r"\1"),  # a row's distance
    (r"(?s)\\(?:[A-Za-z]+|.)|~", lambda m: MACROS.get(m[0], m[0])),
    (r"\$|^[\s,;]+|[\s.,;]+$", ""),
    (r"\s+", " "),
    (r"^ ?\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),
    (r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9.,])", lambda m: m[0].replace(" ", "")),
    (r"(?<![0-9./_^])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.])", r"(\1+\2/\3)"),  # 3 1/2
    (r"\^ ?\{? ?\\text\{ ?(?:st|nd|rd|th) ?\} ?\}?|(?<=[0-9])(?:st|nd|rd|th)\b", ""),
    (r"(?<![0-9])([0-9]*\.)([0-9]*)\\overline ?\{? ?([0-9]+) ?\}?", repeating),
    (r"(?<![0-9])([0-9]*\.)([0-9]{0,9}?)([0-9]{1,9}?)\3{2,} ?\\ldots", repeating),  # 0.333...
    (r"(?i)^(?:\\text\{ ?)?(?:the )?(?:final )?answer(?: is)? ?:? ?\}?(?=.)", ""),
    (r"^\*+|\*+$", ""),
    (r"^(?:\\approx|\\therefore|\\Rightarrow|:|=) ?|[ .,;]+(?=\}*$)", ""),
    (r"\\\{ ?[a-z] ?(?:\\in ?\\mathbb\{R\} ?)?[:|]", r"\\{"),  # {x : x > 0}
    (r"^(?:\\text\{|\()?(-?[0-9A-Z]+)[)}]*_(?:[ {]|\\text)*([0-9]+)[ }]*$", r"\1_\2"),  # F_{16}
    (r"(?<=[0-9])_10$", ""),
]
REWRITES = [(re.compile(old), new) for old, new in REWRITES]
# Answers that are no formula: \text{(C)} or C; and "(C) 5", "C. 5", but not "(C) or (D)".
CHOICE = re.compile(r"(?:\\text ?)?\{? ?\(?([A-Z])\)? ?\}?")
REST = r"(?!.*(?:\b[A-Z]\b|\bor\b|\band\b|=)).*"
CHOSEN = re.compile(
    r"(?s)(?:\\text|[ {]|(?i:option|choice))*"
    rf"(?:\(?([A-Za-z])\)?[.:]? ?\}}?|\(([A-Z])\){REST}|([A-Z])[.:]{REST})"
)


def plain(text: str) -> str:
    """Return a text without its marks, and spaces only between two numbers."""
    text = re.sub(r"\\text|[{}\"]|\.(?![0-9])", "", text)
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


def normalise(answer: str) -> str:
    """Return one spelling of what LaTeX, Unicode and prose spell in many; no value changes."""
    answer = compatible(answer.translate(CHARACTERS))
    for old, new in REWRITES:
        answer = old.sub(new, answer)
    return answer.strip(" ,;").rstrip(".")


def tokens(text: str) -> list[str]:
    """Return a normalised answer's tokens; words that say no number, sign or name are `text:...`.
    ValueError if there are more than MAX_TOKENS."""
    found = []
    depth = 0  # of open brackets
    for match in TOKEN.finditer(text):
        token = match[0]
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        if token[0].isalpha() or token.startswith(r"\text{"):
            found += words(token, text[match.start() - 1 : match.start()], trails=bool(found))
        elif token[0].isdigit() and "," in token:  # thousands; but in (1,234) two coordinates
            found += re.split("(,)", token) if depth else [token.replace(",", "")]
        elif token != r"\text":  # around a formula
            found.append(token)
        if len(found) > MAX_TOKENS:
            raise ValueError("too many tokens")
    return found


def words(token: str, before: str, trails: bool) -> list[str]:
    """Return what letters or a \\text{} say: and, or, \\sin, a unit, a name, or single letters.
    `before` is the character before it; `trails`: whether any token stands before it."""
    quoted = token.startswith("\\")
    word = token[6:-1].strip() if quoted else token
    bare = word.strip(" .,;:").casefold()
    if bare in ("and", "or"):
        return [bare]
    # 1. A formula in \text{}, or single letters: those behind a number are a unit.
    runs = re.findall("[A-Za-z]+", word)
    is_formula = word[:1].isdigit() or re.search("[=+^*<>]", word)
    if quoted and (is_formula or all(len(run) < 2 or run in ("and", "or") for run in runs)):
        is_unit = trails and bare.isalpha() and before not in ",;(="
        return ["text:" + bare] if is_unit else tokens(word)
    # 2. What has a name in mathematics.
    if bare in PHRASES and not trails:
        return [PHRASES[bare]]
    if not quoted and bare in ASCII and (bare != "min" or not trails):  # 10 min is a time
        return [ASCII[bare]]
    # 3. A word, a segment AB, or a product xy.
    is_word = len(word) > 3 and list(bare) != sorted(set(bare)) and (not trails or before == " ")
    if quoted or is_word or bare in NOUNS:
        return ["text:" + bare]
    return [word] if word.isupper() else list(word)
