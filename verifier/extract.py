"""Finding the answer in a completion: the last box, or a stated answer."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*")

MAX_BOX, MAX_BOXES = 5000, 20  # characters of a box that are read, and boxes that may be nested

END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<end_of_turn>")

STATED = re.compile(
    r"####|\banswers?\b(?=[^\w\n]*(?:is\b|are\b|[:=$\n]|\\[\[(]))[\s:*=]*(?:is\b|are\b)?",
    re.IGNORECASE,
)

FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)


def extract_answer(text: str, strict=True) -> str | None:
    """The answer that a completion gives, as written, or None.

    It is what the last \\boxed{} or \\fbox{} after </think> and before the end of the turn holds;
    an unclosed box is no answer. Where there is no box at all, strict=False also takes a stated
    answer (`#### 5`, "the answer is 5."), or else the last displayed formula.
    """
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
    """What the last \\boxed{...} or \\fbox{...} holds; None without one, or if it is not closed.

    Of a box in a box it is the outer one: \\boxed{\\boxed{5}+1} is not 5.
    """
    near = max(0, text.rfind("box") - MAX_BOX)  # an outer box that is longer is none
    boxes = list(BOX.finditer(text, near))[:-MAX_BOXES:-1]
    answer = held(text, boxes[0].end()) if boxes else None
    for box in boxes[1:]:
        outer = held(text, box.end())
        if answer is not None and outer and box.end() + len(outer) > boxes[0].start():
            answer = outer
    return answer and answer.strip()


def held(text: str, start: int) -> str | None:
    """What stands in the braces that open here, or one word: \\boxed 5."""
    rest = text[start : start + MAX_BOX]
    if not rest.startswith("{"):
        return rest.split()[0].rstrip(".$") if rest.split() else None
    depth, i = 0, 0
    while i < len(rest):
        if rest[i] == "\\":
            i += 1  # an escaped brace is text
        elif rest[i] in "{}":
            depth += 1 if rest[i] == "{" else -1
            if depth == 0:
                return rest[1:i]
        i += 1
    return None
