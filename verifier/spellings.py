"""What mathematicians and models spell in many ways: an answer's text to tokens.

Tables, flat regular expressions and plain loops, all linear in the text: nothing here has a value.
"""

import functools
import re
import unicodedata

from verifier.units import BARE, UNIT


def table(text: str) -> dict[str, str]:
    """Return {word: first word of its group}; commas part the groups."""
    groups = [group.split() for group in text.split(",")]
    return {word: group[0] for group in groups for word in group}


compatible = functools.partial(unicodedata.normalize, "NFKC")  # 2 for ², 1⁄2 for ½
SIGNS = table(r"""- − – — ‑, \times ×, \cdot · ⋅, * ∗, / ÷, \infty ∞, \cup ∪, \cap ∩, ' ′ ’,
\setminus ∖, \emptyset ∅, ^\circ ° º, \sqrt √, \pm ±, \leq ≤ ⩽, \geq ≥ ⩾, \neq ≠, \approx ≈, \in ∈,
\mathbb{R} ℝ, \mathbb{Z} ℤ, \lfloor ⌊, \rfloor ⌋, \lceil ⌈, \rceil ⌉, \equiv ≡, \text{dollar} ＄,
\text{euro} €, \text{gbp} £""")
CHARACTERS = {c: macro + " " * (macro[-1].isalpha()) for c, macro in SIGNS.items() if len(c) == 1}
GREEK = {c: unicodedata.name(compatible(c), "").split() for c in map(chr, range(0x391, 0x400))}
GREEK = {c: name[-1].replace("LAMDA", "LAMBDA") for c, name in GREEK.items() if len(name) == 4}
GREEK = {c: name.title() if c.isupper() else name.lower() for c, name in GREEK.items()}
CHARACTERS |= {c: f"\\{name} " for c, name in GREEK.items()}
CHARACTERS = str.maketrans(CHARACTERS | dict.fromkeys("\u200b\ufeff`", ""))
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+|[¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
# Macros that say nothing, that say a space, and that say what another one does; fonts are \text.
SILENT = r"""\! \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \middle \displaystyle
\limits \boxed \fbox \boldsymbol \mathbf \mathit \mathsf \bm \textstyle \vec \hat \( \) \[ \]
\Large \large \small \huge \nolimits \underline \overrightarrow \widehat"""
MACROS = dict.fromkeys(SILENT.split(), "")
MACROS |= dict.fromkeys([r"\,", r"\;", r"\:", "\\ ", "~", r"\quad", r"\qquad"], " ")
MACROS |= table(r"""\text \textbf \textit \textrm \textnormal \mbox \emph \mathrm \operatorname,
\frac \dfrac \tfrac \cfrac \nicefrac, \binom \dbinom \tbinom, <= \leq \le \leqslant, < \lt, > \gt,
>= \geq \ge \geqslant, != \neq \ne, | \lvert \rvert \vert \mid, \{ \lbrace, \} \rbrace, / \div,
* \cdot \times \ast, : \colon, \deg \degree, \emptyset \varnothing, \setminus \backslash,
\ldots \dots \cdots, \text{and} \land \wedge, \text{or} \lor \vee, ' \prime, \overline \bar,
\to \rightarrow, % \%, \text{dollar} \$, \phi \varphi, \pmod \bmod \mod,
\epsilon \varepsilon, \theta \vartheta""")
MORE = "ell hbar triangle angle circ odot partial nabla det dim"
ALPHABET = {"\\" + name for name in [*GREEK.values(), *MORE.split()]}
NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve"
NUMERALS = NUMERALS.split()
# What is typed without a backslash.
ASCII = """sin cos tan cot sec csc sinh cosh tanh sech csch coth arcsin arccos arctan log ln exp
sqrt pi max min gcd lcm theta"""
ASCII = {word: "\\" + word for word in ASCII.split()}
ASCII |= table(r"\infty infty infinity inf oo, and, or")
JOINED = {"cm", "mm", "km", "kg", "ft"}  # units that stand right behind a number, too
MAX_TOKENS = 500
NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
TOKEN = re.compile(
    r"\\begin\{(?:[pb]?matrix|smallmatrix|array|cases)\}(?:\{[lcr| ]*\})?|\\end\{[A-Za-z]*\}"
    rf"|(?:{NUMBER})(?:[eE][+-]?[0-9]{{1,3}})?|\\text ?\{{[^{{}}]*\}}"
    r"|\\mathbb\{[RZ]\}|\\[A-Za-z]+|\\.|[A-Za-z]+(?: [A-Za-z]+)*|<=|>=|(?<![0-9)])!=|=>|\*\*|\S"
)


def raised(match) -> str:
    """Return ²³ as the power ^{23}, ₁₂ as the index _{12} and ½ as 1/2."""
    text = compatible(match[0]).replace("−", "-")
    if "⁄" in text:
        return " " + text.replace("⁄", "/")
    return ("_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^") + f"{{{text}}}"


def repeating(match) -> str:
    """Return 0.1\\overline{6} as the sum (0.1+6/90)."""
    whole, digits, block = match.groups()
    return f"({whole}{digits}+{block}/{'9' * len(block)}{'0' * len(digits)})"


REWRITES = [  # in this order
    (r"\\(?:textcolor|colorbox) ?\{[a-z]*\}|\\color ?\{[a-z]*\}", ""),
    (r"(?<=[0-9])\s*(?:\{,\}|,\\!)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}000 and 1,\!000
    (r"\\phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"(\\(?:text|mathrm) ?\{[^{}]*\^) ?\{(-?[0-9]+)\}", r"\1\2"),  # \text{m s^{-1}}
    (r"\\math(?:bb|bf)\s*\{?Z\}?(?![A-Za-z])", r"\\mathbb{Z}"),
    (r"\\mathbb\s*\{([A-QS-Y])\}|\\overline\s*\{([A-Z]{2})\}", r"\1\2"),  # P(A), a segment
    (r"\\(?:bar|overline)\s*\{?\s*([A-Za-z])(?![A-Za-z])\s*\}?", r"\1_{bar}"),  # a mean
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])", r"\\deg "),
    (r"\.\.\.", r"\\ldots "),
    (r"(\\\\)\s*\[\s*[0-9.]+\s*(?:pt|ex|em|mm|cm)\s*\]", r"\1"),  # a row's distance
    (r"~~", r"\\sout "),  # crossed out
    (r"(?s)\\(?:[A-Za-z]+|.)|~", lambda m: MACROS.get(m[0], m[0])),
    (r"\^ ?\{ ?((?:' ?)+)\}", r"\1"),  # f^{'}
    (r"\$|^[\s,;]+|[\s.,;]+$|(?<!\\)\\$", ""),
    (r" ?%", r"\\text{percent}"),
    (r"\s+", " "),
    (r"[,.;] ?(?=\\\\|\\end)|\\\\ ?(?=\\end)", ""),
    (r"(?<![A-Za-z\\])frac", r"\\frac"),
    (r"(\\frac|\\binom) ?([0-9]) ?([0-9])", r"\1{\2}{\3}"),  # \frac12
    (r"(\\log ?_) ?([0-9])", r"\1{\2}"),  # \log_28
    (r"(?<=[0-9]) ?\\frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r" \1/\2"),  # 3\frac{1}{2}
    (r"[,;.]? ?& ?(?:\\text ?\{ ?(?:if|for|when) ?\})?", "&"),  # a case of \begin{cases}
    (r"\( ?(?:\\text ?\{ ?mod ?\}|\\?mod|\\pmod) ?([^()]*)\)", r"\\pmod{\1}"),
    (r" ?\( ?(\\approx [^()]*)\)$", r" \1"),
    (r"(?<![,( ])[,( ]*([a-z] ?\\in ?\\mathbb\{Z\})\)?$", r", \1"),
    (r", ?(?=(?:\\text ?\{ ?)?(?:and|or)\b)", " "),  # 1, 2, and 3
    (r"(?i)^\\text ?\{ ?(?:all )?real(?:s| numbers) ?\}$", r"\\mathbb{R}"),
    (r"\\deg ?(?:\\text ?\{ ?)?([CF])\b ?\}?", r"\\text{\1}"),
    (r"(\\text ?\{[^{}]*)\} ?\^ ?(?:\{(-?[0-9]+)\}|([0-9]))", r"\1^\2\3}"),  # \text{cm}^2
    (r"(\\text ?\{[^{}]*)\} ?([*/]?) ?\\text ?\{(?! ?(?:and|or)\b)", r"\1 \2"),  # N*m
    (r"^ ?\{((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),
    (r"(?<=[0-9]) ?\(([a-z ]{3,})\)$", r"\\text{\1}"),  # 9 (apples)
    (r"(?<![0-9./_^])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.])", r"(\1+\2/\3)"),  # 3 1/2
    (r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9.,])", lambda m: m[0].replace(" ", "")),
    (r"(?<![0-9])([0-9]*\.)([0-9]*)(?:\\overline ?\{? ?|\()([0-9]+)[ })]*", repeating),
    (r"(?<![0-9])([0-9]*\.)([0-9]{0,9}?)([0-9]{1,9}?)\3{2,} ?\\ldots", repeating),  # 0.333...
    (r"(?i)^(?:\\text ?\{ ?)?(?:the )?(?:final )?answer(?: is)? ?:? ?\}?(?=.)", ""),
    (r"^\*+|\*+$", ""),
    (r"\^ ?\{? ?\\text ?\{ ?(?:st|nd|rd|th) ?\} ?\}?|(?<=[0-9])th\b", ""),
    (r"^(?:\\approx|\\therefore|\\Rightarrow|:|=) ?|[ .,;]+(?=\}*$)", ""),
    (r"\\\{ ?[a-z] ?(?:\\in ?\\mathbb\{R\} ?)?[:|]", r"\\{"),  # {x : x > 0}
    (r"^\]([^][]*,[^][]*)\[$", r"(\1)"),  # ]0,1[ is (0,1)
    (r"^(?:\\text ?\{|\()?(-?[0-9A-Z]+)[)}]*_(?:[ {]|\\text)*([0-9]+)[ }]*$", r"\1_\2"),  # F_{16}
    (r"(?<=[0-9])_10$", ""),
]
REWRITES = [(re.compile(old), new) for old, new in REWRITES]
# Answers that are no formula: \text{(C)} or C; and "(C) 5", "C. 5", but not "(C) or (D)".
CHOICE = re.compile(r"(?:\\text ?)?\{? ?\(?([A-Z])\)? ?\}?")
REST = r"""(?![ }\)]*(?:is|was|no|cannot)\b|.*(?:\([A-Za-z]\)|\b[B-Zb-d]\b|\bA\b(?! [a-z])|=|\?|
\b(?:n?or|not|wrong|false|incorrect|never|maybe|reject\w*|eliminat\w*|vs|but|answer|\w+n't)\b)).*"""
CHOSEN = r"(?s)(?:\\text|[ {]|(?i:option|choice))*"
CHOSEN += rf"(?:\(?([A-Za-z])\)?[.:]? ?\}}?|\(([A-Z])\){REST}|([A-Z])[.:)]{REST})"
CHOSEN = re.compile(CHOSEN.replace("\n", ""))


def plain(text: str) -> str:
    """Return a text without its marks, and spaces only between two numbers."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\"|\.(?![0-9])", "", text)
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


@functools.lru_cache(maxsize=1000)
def normalise(answer: str) -> str:
    """Return one spelling of what LaTeX, Unicode and prose spell in many; no value changes."""
    answer = compatible(RAISED.sub(raised, answer).translate(CHARACTERS))
    for old, new in REWRITES:
        answer = old.sub(new, answer)
    return answer.strip(" ,;").rstrip(".")


def tokens(text: str) -> list[str]:
    """Return a normalised answer's tokens, words as `text:...`; ValueError if they are too many."""
    found = []
    depth = 0  # of open brackets
    for match in TOKEN.finditer(text):
        token = match[0]
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        last = found[-1] if found else ""
        behind = last[-1:].isdigit() or last in ("}", ")", r"\pi", r"\deg", "!")
        if token.startswith(r"\text"):
            found += quoted(token[token.find("{") + 1 : -1].strip(" ,;:").rstrip("."), behind)
        elif token[0].isalpha():
            spaced = text[match.start() - 1 : match.start()] in ("", " ")
            found += words(token, spaced, behind)
        else:  # 1,234 is a number, but in (1,234) two coordinates
            found += re.split("(,)", token) if depth and token[0].isdigit() else [token]
        if len(found) > MAX_TOKENS:
            raise ValueError("too many tokens")
    return found


def quoted(word: str, behind: bool) -> list[str]:
    """Return what a \\text{} says, a formula or words; `behind`: they may be a quantity's unit."""
    runs = re.findall("[A-Za-z]+", word)
    letters = all(len(run) < 2 or run in ("and", "or") for run in runs)
    is_unit = behind and runs and (word in UNIT or runs[0] in UNIT or is_word(word))
    if not is_unit and (letters or word[:1].isdigit() or re.search("[=+^*<>]", word)):
        return tokens(word)
    if word in NUMERALS and not behind:
        return [str(NUMERALS.index(word))]
    return [ASCII[word] if word in ASCII and not behind else "text:" + word]


def words(run: str, spaced: bool, behind: bool) -> list[str]:
    """Return what letters say: the unit of a number, or words, macros and single letters."""
    parts = run.split()
    bare = all(part in BARE and (spaced or part in JOINED or len(part) > 2) for part in parts)
    if behind and not {"and", "or"} & {*parts} and (bare or any(map(is_word, parts))):
        return ["text:" + run]
    found = []
    for part in parts:
        if part.casefold() in ASCII:
            found.append(ASCII[part.casefold()])
        elif is_word(part):
            found.append("text:" + part)
        else:
            found += [part] if part.isupper() else list(part)
    return found


def is_word(letters: str) -> bool:
    """Return whether letters are a word, and no product of variables as abcd or xyzw."""
    low = letters.casefold()
    is_product = list(low) == sorted({*low}) or not {*low} & {*"aeiou"}
    return len(low) > 3 and low not in ASCII and "\\" + low not in ALPHABET and not is_product
