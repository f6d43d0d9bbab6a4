"""Where the answer is in a completion: the last box, or a stated answer."""

import re

MAX_BOX = 5000  # characters of a box that are read
MAX_BOXES = 20  # that may be nested
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<end_of_turn>")
STATED = re.compile(
    r"####|\banswers?\b(?=[^\w\n]*(?:is\b|are\b|[:=$\n]|\\[\[(]))[\s:*=]*(?:is\b|are\b)?",
    re.IGNORECASE,
)
FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)


def extract_answer(text: str, strict=True) -> str | None:
    """Return the answer that a completion gives, as written, or None: what the last \\boxed{} or
    \\fbox{} after </think> and before the end of the turn holds, if it is closed. Without a box,
    strict=False takes a stated answer (`#### 5`, "the answer is 5."), or else the last formula."""
    text = END_OF_TURN.split(text, maxsplit=1)[0].rsplit("</think>", 1)[-1]
    if strict or "\\boxed" in text or "\\fbox" in text:
        return last_boxed(text) or None
    *before, said = STATED.split(text[-1500:])
    if before:
        said = re.split(r"\.(?:\s|$)|\n|\bI hope\b", said.strip(" *:\n"), maxsplit=1)[0].strip(" *")
        said = re.split(r"\b(?:is|are)\b", said)[-1].strip()  # "Final answer: the volume is 120"
    formulas = ["".join(parts).strip() for parts in FORMULA.findall(said)]
    if formulas or not before:
        return formulas[-1] if formulas else None
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", said)  # "Jane started 3 hours ago"
    return (numbers[0] if len(numbers) == 1 and len(said.split()) > 2 else said) or None


def last_boxed(text: str) -> str | None:
    """Return what the last \\boxed{} or \\fbox{} holds; None without one, or if it is not closed.
    Of a box in a box it is the outer one: \\boxed{\\boxed{5}+1} is not 5."""
    near = max(0, text.rfind("box") - MAX_BOX)  # a longer outer box counts as none
    boxes = list(BOX.finditer(text, near))[:-MAX_BOXES:-1]
    answer = held(text, boxes[0].end()) if boxes else None
    for box in boxes[1:]:
        outer = held(text, box.end())
        if answer is not None and outer and box.end() + len(outer) > boxes[0].start():
            answer = outer
    return answer and answer.strip()


def held(text: str, start: int) -> str | None:
    """Return what stands in the braces that open here, or one word: \\boxed 5."""
    rest = text[start : start + MAX_BOX]
    if not rest.startswith("{"):
        return rest.split()[0].rstrip(".$") if rest.split() else None
    depth = 0
    for match in re.finditer(r"(?s)\\.|[{}]", rest):  # an escaped brace is text
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1 : match.start()]
    return None
