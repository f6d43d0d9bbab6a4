"""Where the answer is in a completion: the last box, or a stated answer."""

import re

MAX_BOX = 5000  # characters around the last box that are read
BOX = re.compile(r"(?s)\\f?box(?:ed)?\b\s*(?:(\{)|(\S+))|\\.|[{}]")  # an escaped brace is text
END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<end_of_turn>")
STATED = re.compile(
    r"(?i)####|\banswers?\b(?=[^\w\n]*(?:is\b|are\b|[:=$\n]|\\[\[(]))[\s:*=]*(?:is\b|are\b)?"
)
HEDGED = re.compile(r"(?i)\b(?:not|no|or|between|less|more|most|least|root|either|half)\b|n't\b")
FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)


def extract_answer(text: str, strict=True) -> str | None:
    """Return the answer that a completion gives, as written, or None: what the last \\boxed{} or
    \\fbox{} after </think> and before the end of the turn holds, if it is closed. Without a box,
    strict=False takes a stated answer (`#### 5`, "the answer is 5."), or else the last formula."""
    if "<s>" in text:  # HTML for crossed out: its </s> ends no turn
        text = text.replace("</s>", "")
    text = END_OF_TURN.split(text, maxsplit=1)[0].rsplit("</think>", 1)[-1]
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if strict or last >= 0:
        return last_boxed(text[max(0, last - MAX_BOX) : last + MAX_BOX]) or None
    # The first sentence behind the last "answer is", in it the last formula or a lone number.
    *before, said = STATED.split(text[-1500:])
    if before:
        said = re.split(r"\.(?:\s|$)|\n|\bI hope\b", said.strip(" *:\n"), maxsplit=1)[0].strip(" *")
        said = re.split(r"\b(?:is|are)\b", said)[-1].strip()
        if HEDGED.search(said):
            return said
    formulas = ["".join(parts).strip() for parts in FORMULA.findall(said)]
    if formulas or not before:
        return formulas[-1] if formulas else None
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", said)
    return (numbers[0] if len(numbers) == 1 and len(said.split()) > 2 else said) or None


def last_boxed(text: str) -> str | None:
    """Return what the last \\boxed{} or \\fbox{} holds, or \\boxed 5; None if it is not closed. Of
    a box in a box it is the outer one: \\boxed{\\boxed{5}+1} is not 5."""
    answer = None
    open_braces = []  # (where it opens, whether it is a box's)
    for match in BOX.finditer(text):
        if match[2]:
            answer = match[2].rstrip(".$")
        elif match[0].endswith("{") and match[0] != "\\{":
            open_braces.append((match.end(), bool(match[1])))
            answer = None if match[1] else answer  # an earlier box counts no more
        elif match[0] == "}" and open_braces:
            start, is_box = open_braces.pop()
            answer = text[start : match.start()] if is_box else answer
    return answer and answer.strip()
