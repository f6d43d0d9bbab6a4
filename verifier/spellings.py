"""What mathematicians and models spell in many ways: an answer's text to tokens.

Tables, flat regular expressions and plain loops, all linear in the text: nothing here has a value.
"""

import re
import unicodedata

CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ",
    "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/",
    "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "√": r"\sqrt ", "∛": r"\sqrt[3]",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ",
    "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "′": "'", "’": "'",
    "⁰": "^{0}", "¹": "^{1}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "⁵": "^{5}", "⁶": "^{6}",
    "⁷": "^{7}", "⁸": "^{8}", "⁹": "^{9}", "ⁿ": "^{n}", "₀": "_{0}", "₁": "_{1}", "₂": "_{2}",
    "₃": "_{3}", "₄": "_{4}", "₅": "_{5}", "₆": "_{6}", "₇": "_{7}", "₈": "_{8}", "₉": "_{9}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅙": r"\frac{1}{6}", "⅛": r"\frac{1}{8}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ",
    "φ": r"\phi ", "ω": r"\omega ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ", "\u200b": "", "\ufeff": "", "€": "", "£": "", "¢": "", "。": ".", "，": ",",
}  # fmt: skip

# Macros that say nothing, that say a space, and fonts, which say no more than \text does.
SILENT = r"""\! \$ \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl
\Biggr \bigm \middle \displaystyle \textstyle \scriptstyle \limits \nolimits \boxed \fbox \bm \pmb
\boldsymbol \ensuremath \mathbf \mathit \mathcal \mathsf \vec \overrightarrow \hat \pounds \euro
\textdollar \( \) \[ \] \rm \bf \it \large \Large \strut \noindent \cancel \mathord \hline \#"""
SPACES = r"\, \; \: \> ~ \quad \qquad \thinspace \enspace \hfill \tab"
FONTS = r"""\textbf \textit \textrm \textnormal \textsf \texttt \textsc \textup \mbox \hbox \emph
\mathrm \mathop \operatorname \underline \colorbox"""
MACROS = dict.fromkeys(SILENT.split(), "") | dict.fromkeys([*SPACES.split(), "\\ "], " ")
MACROS |= dict.fromkeys(FONTS.split(), r"\text") | {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom",
    r"\nicefrac": r"\frac",
    r"\tbinom": r"\binom", r"\le": r"\leq", r"\leqslant": r"\leq", r"\ge": r"\geq",
    r"\geqslant": r"\geq", r"\ne": r"\neq", r"\lt": "<", r"\gt": ">", r"\lvert": "|",
    r"\rvert": "|", r"\vert": "|", r"\|": "|", r"\mid": "|", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")", r"\cdot": "*",
    r"\times": "*", r"\ast": "*", r"\div": "/", r"\colon": ":", r"\degree": r"\deg ",
    r"\textdegree": r"\deg ", r"\varnothing": r"\emptyset", r"\backslash": r"\setminus",
    r"\smallsetminus": r"\setminus", r"\bigcup": r"\cup", r"\bigcap": r"\cap", r"\dots": r"\ldots",
    r"\cdots": r"\ldots", r"\dotsc": r"\ldots", r"\simeq": r"\approx", r"\thickapprox": r"\approx",
    r"\land": r"\text{and}", r"\lor": r"\text{or}", r"\wedge": r"\text{and}",
    r"\vee": r"\text{or}", r"\R": r"\mathbb{R}", r"\%": "%", r"\prime": "'", r"\bar": r"\overline",
    r"\varphi": r"\phi", r"\varepsilon": r"\epsilon", r"\newline": r"\\", r"\cr": r"\\",
    r"\tg": r"\tan", r"\ctg": r"\cot", r"\arctg": r"\arctan", r"\lg": r"\log", r"\&": "&",
}  # fmt: skip

LETTERS = r"""\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \vartheta \iota \kappa \lambda
\mu \nu \xi \rho \sigma \tau \upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi
\Sigma \Phi \Psi \Omega \ell \hbar \triangle \angle \square \circ \star \heartsuit \spadesuit
\clubsuit \diamondsuit \bullet"""
ALPHABET = set(LETTERS.split())

NUMERALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty"""
PHRASES = {word: str(n) for n, word in enumerate(NUMERALS.split())}
PHRASES |= dict.fromkeys(["all real numbers", "all reals", "real numbers"], r"\mathbb{R}")

# Units that contradict each other if both sides name one; all others are read over.
MEASURES = {
    "m": "m meter meters metre metres", "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters", "km": "km kilometer kilometers kilometre kilometres",
    "ft": "ft foot feet", "in": "in inch inches", "yd": "yd yard yards", "mi": "mi mile miles",
    "s": "s sec secs second seconds", "min": "min mins minute minutes", "h": "h hr hrs hour hours",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years yr yrs",
    "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "kg": "kg kilogram kilograms",
    "g": "g gram grams", "dollar": "dollar dollars usd", "cent": "cent cents",
    "euro": "euro euros", "l": "l liter liters litre litres", "ml": "ml milliliter milliliters",
    "gal": "gal gallon gallons", "degree": "degree degrees deg", "rad": "rad radian radians",
    "mph": "mph", "kph": "kph kmh", "am": "am", "pm": "pm", "acre": "acre acres",
    "percent": "percent percentage",
}  # fmt: skip
MEASURE = {word: unit for unit, words in MEASURES.items() for word in words.split()}

# What else is counted: words behind a number that no product of variables spells.
NOUNS = """sq cu per percent percentage square cubic unit units way ways people person persons
student students integer integers value values multiple multiples bag bags ball balls book books box
boxes card cards child children coin coins dog dogs egg eggs hat hats kid kids man men number
numbers page pages pair pairs piece pieces point points term terms time times toy toys tree trees
triangle triangles woman women apple apples meal meals vote votes solution solutions digit digits
root roots cup cups game games quart quarts pint pints th st nd rd dozen factor factors divisor
divisors outcome outcomes subset subsets element elements edge edges face faces line lines step
steps ticket tickets"""
NOUNS = set(NOUNS.split()) | set(MEASURE) - {"m", "s", "h", "g", "l", "in"}

# What is typed without a backslash.
ASCII = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi max min
gcd lcm theta infty frac"""
ASCII = {word: "\\" + word for word in ASCII.split()}
ASCII |= {"infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "asin": r"\arcsin"}
ASCII |= {"acos": r"\arccos", "atan": r"\arctan"}

MAX_TOKENS = 500
MACRO = re.compile(r"\\(?:[A-Za-z]+|.)|~", re.DOTALL)
NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
TOKEN = re.compile(
    rf"\\begin\{{[a-z]*\}}(?:\{{[lcr| ]*\}})?|\\end\{{[a-z]*\}}|(?:{NUMBER})(?:[eE][+-]?[0-9]+)?"
    r"|\\text\{[^{}]*\}|\\mathbb\{R\}|\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|=>|\*\*|\S"
)


def repeating(match) -> str:
    """0.1\\overline{6} as the sum (0.1+6/90)."""
    whole, digits, block = match.groups()
    return f"({whole}{digits}+{block}/{'9' * len(block)}{'0' * len(digits)})"


REWRITES = [  # in this order, before the macros are replaced and after
    (r"(?<=[0-9])\s*(?:\{,\}|,\\!)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}000 and 1,\!000
    (r"\\(?:left|right)\s*\.|\\phantom\s*(?:\{[^{}]*\}|.)", ""),
    (r"\\math(?:rm|bf|it|sf)\s*\{\s*([A-Za-z])\s*\}", r" \1 "),  # e and i, not the unit m
    (r"\\mathbb\s*R\b", r"\\mathbb{R}"),
    (r"\\mathbb\s*\{([A-QS-Z])\}|\\overline\s*\{([A-Z]{2})\}", r"\1\2"),  # P(A), a segment
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])", r"\\deg "),
    (r"\.\.\.", r"\\ldots "),
    (r"(\\\\)\s*\[\s*[0-9.]+\s*(?:pt|ex|em|mm|cm)\s*\]", r"\1"),  # a row's distance
    (r"\b([AaPp])\.\s?([Mm])\b\.?", r"\1\2"),
]
LATER = [
    (r"\\text\s+\{", r"\\text{"),
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
]
REWRITES, LATER = ([(re.compile(old), new) for old, new in rules] for rules in (REWRITES, LATER))
CHARACTERS = str.maketrans(CHARACTERS)
# Answers that are no formula: 1A_{12}; \text{(C)} or C; and "(C) 5", "C. 5", but not "(C) or (D)".
BASED = re.compile(r"(-?)\(?(?:\\text\{)?([0-9A-Z]+)\}?\)?_ ?\{? ?(?:\\text\{)?([0-9]+)\}? ?\}?")
CHOICE = re.compile(r"(?:\\text ?)?\{? ?\(?([A-Z])\)? ?\}?")
REST = r"(?!.*(?:\b[A-Z]\b|\bor\b|\band\b|=)).*"
CHOSEN = re.compile(
    r"(?i:option |choice )?(?:\\text ?)?\{? ?(?i:option |choice )?(?:\(?([A-Za-z])\)?[.:]? ?\}?"
    rf"|\(([A-Z])\){REST}|([A-Z])[.:]{REST})",
    re.DOTALL,
)


def plain(text: str) -> str:
    """A text without its marks and without spaces, but for those between two numbers."""
    text = re.sub(r"\\text|[{}\"]|\.(?![0-9])", "", text)
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


def normalise(answer: str) -> str:
    """One spelling for what LaTeX, Unicode and prose spell in many; all that has a value stays."""
    answer = unicodedata.normalize("NFKC", answer.translate(CHARACTERS))
    for old, new in REWRITES:
        answer = old.sub(new, answer)
    answer = MACRO.sub(lambda m: MACROS.get(m[0], m[0]), answer).replace("$", "")
    answer = answer.strip(" \n\t,;").rstrip(" .,;")
    for old, new in LATER:
        answer = old.sub(new, answer)
    return answer.strip(" ,;").rstrip(".")


def tokens(text: str) -> list[str]:
    """The tokens of a normalised answer; words that say no number, sign or name are `text:...`.

    ValueError if there are more than MAX_TOKENS.
    """
    found, depth = [], 0
    for match in TOKEN.finditer(text):
        token = match[0]
        if token == r"\text":  # around a formula
            continue
        depth += (token in ("(", "[", r"\{")) - (token in (")", "]", r"\}"))
        if token[0].isalpha() or token.startswith(r"\text{"):
            found += words(token, text[match.start() - 1 : match.start()], bool(found))
        elif token[0].isdigit() and "," in token:  # thousands; but in (1,234) two coordinates
            found += re.split("(,)", token) if depth else [token.replace(",", "")]
        else:
            found.append(token)
        if len(found) > MAX_TOKENS:
            raise ValueError("too many tokens")
    return found


def words(token: str, before: str, trails: bool) -> list[str]:
    """What a run of letters or a \\text{} says: and, or, \\sin, a unit, a name, or its letters.

    `before` is the character before it; `trails`: whether anything stands before it.
    """
    quoted = token.startswith("\\")
    word = token[6:-1].strip() if quoted else token
    bare, runs = word.strip(" .,;:").casefold(), re.findall("[A-Za-z]+", word)
    if bare in ("and", "or"):
        return [bare]
    is_formula = word[:1].isdigit() or re.search("[=+^*<>]", word)
    single = all(len(run) < 2 or run in ("and", "or") for run in runs)
    if quoted and (is_formula or single):
        is_unit = trails and bare.isalpha() and before not in ",;(="
        return ["text:" + bare] if is_unit else tokens(word)
    if bare in PHRASES and not trails:
        return [PHRASES[bare]]
    if not quoted and bare in ASCII and (bare != "min" or not trails):  # 10 min is a time
        return [ASCII[bare]]
    is_word = bare in NOUNS or (len(word) > 3 and list(bare) != sorted(set(bare)))
    if quoted or (is_word and (not trails or bare in NOUNS or before == " ")):
        return ["text:" + bare]
    return [word] if word.isupper() else list(word)  # AB is a segment, xy a product
