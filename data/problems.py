"""Problems to train and evaluate on, and the one prompt that every model sees them in.

A problem is a dict with at least `problem` and `answer` (the gold answer, as text). It comes from a
JSONL file, the embedded set (`tiny`) or the Hub (`math`, `math500`, `gsm8k`).
"""

import json
import math
import random
import unicodedata
from pathlib import Path

from hf.hub import hub_folder
from system.errors import UserError
from verifier.extract import last_boxed

TINY = Path(__file__).parent / "tiny"  # the embedded checkpoint and its problems
# The prompt of the ARCA authors. The embedded model was pretrained on it.
PROMPT = (
    "Solve this math problem step by step. Put your final answer in \\boxed{}.\n\n"
    "Problem: {problem}\n"
)
# GCPO's negative prompt (arXiv 2605.29198), by the suffix that its code falls back to.
NEGATIVE = PROMPT.replace("{problem}", "{problem}, but generate the wrong answer")
# A turn of Qwen's and SmolLM2's chat models.
CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
# name: repository on the Hub, the files of a split, and the columns that we read
HUB = {
    "math": (
        "DigitalLearningGmbH/MATH-lighteval",
        "data/{}-*.parquet",
        "problem solution level type",
    ),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl", "problem answer level subject"),
    "gsm8k": ("openai/gsm8k", "main/{}-*.parquet", "question answer"),
}


def prompt_text(problem: str, chat=False, prompt=PROMPT) -> str:
    """The text before the completion; with chat=True as a user's turn in ChatML."""
    text = prompt.replace("{problem}", problem)
    return CHATML.replace("{prompt}", text) if chat else text


def gold_answer(row: dict) -> str | None:
    """Its `answer` (in GSM8K what follows ####), or else the last box of its `solution`; None if
    there is neither, or an answer that is no text and no number."""
    answer = row.get("answer")
    if answer is None:
        return last_boxed(str(row.get("solution", "")))
    number = type(answer) in (int, float) and abs(answer) < math.inf
    if not number and not isinstance(answer, str):
        return None
    return str(answer).split("####")[-1].strip()


def as_problem(row: dict, where: str) -> dict:
    """A row of any data set as a problem; UserError says where the row is that is none."""
    text, answer = row.get("problem", row.get("question")), gold_answer(row)
    if not isinstance(text, str) or not text.strip() or answer is None:
        raise UserError(
            f"{where} is not a problem: it needs `problem`, and `answer` or a boxed `solution`"
        )
    return {**row, "problem": text, "answer": answer}


def json_rows(path: Path) -> list[tuple]:
    """(object, where it is) of a JSONL file; UserError says which line holds none."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a JSONL file") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028 too
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is no JSON object: mend or remove it")
            rows.append((row, f"{path}, line {number}"))
    return rows


def parquet_rows(path: Path) -> list[tuple]:
    """(dict, where it is) of a parquet file, which only the Hub's MATH and GSM8K are."""
    try:
        from pyarrow.parquet import read_table

        rows = read_table(path).to_pylist()
    except ImportError:
        raise UserError(f"{path.name}: pip install pyarrow, or give a JSONL file") from None
    except Exception as error:  # several kinds
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    return [(row, f"{path}, row {i}") for i, row in enumerate(rows, 1)]


def hub_rows(name: str, split: str) -> list[tuple]:
    """(dict of the columns we read, where it is) of a split of a data set in HUB."""
    repo, files, columns = HUB[name]
    files, rows = files.format(split), []
    folder = hub_folder(repo, needed=[files], kind="dataset")
    for path in sorted(folder.glob(files)):
        rows += json_rows(path) if path.suffix == ".jsonl" else parquet_rows(path)
    return [({k: row[k] for k in columns.split() if k in row}, where) for row, where in rows]


def load_problems(source: str, split="train") -> list[dict]:
    """The problems of `tiny`, `math`, `math500` or `gsm8k` in a split, or of a JSONL file."""
    if source in HUB:
        rows = hub_rows(source, split)
    elif source == "tiny":
        rows = json_rows(TINY / f"{split}.jsonl")
    elif Path(source).is_file():
        rows = json_rows(Path(source))
    else:
        raise UserError(f"no data {source}: give a JSONL file, or one of tiny, {', '.join(HUB)}")
    problems = [as_problem(row, where) for row, where in rows]
    gradable = [p for p in problems if p["answer"]]  # two of MATH's solutions end in an empty box
    if not gradable:
        raise UserError(f"{source} holds no problems: give another file")
    if len(gradable) < len(problems):
        print(f"{source}: left out {len(problems) - len(gradable)} problems with an empty answer")
    return gradable


def add_prompts(p: dict, tokenizer, chat=False):
    """Give a problem the token ids of its `prompt`, and of the `negative` one; returns it."""
    p["prompt"] = tokenizer.encode(prompt_text(p["problem"], chat))
    p["negative"] = tokenizer.encode(prompt_text(p["problem"], chat, NEGATIVE))
    return p


def same_text(problem: str) -> str:
    """What two problems share that differ in spacing, case or forms of a character only."""
    return "".join(unicodedata.normalize("NFKC", problem).casefold().split())


def load_split(s, tokenizer):
    """(problems to train on, held-out ones, what was left out) for the Settings of train.py, each
    problem with its prompts' token ids.

    Without --eval-data the held-out ones are the test split of a named set, or every tenth line of
    a file. A problem that is evaluated on is never trained on; long prompts are left out.
    """
    train = load_problems(s.data, "train")
    if s.eval_data:
        test = load_problems(s.eval_data, "test")
    elif Path(s.data).is_file():
        train, test = [p for i, p in enumerate(train) if i % 10], train[::10]
    else:
        test = load_problems(s.data, "test")
    for p in train + test:
        add_prompts(p, tokenizer, s.chat)
    fits = [[p for p in ps if len(p["prompt"]) <= s.max_prompt_tokens] for ps in (train, test)]
    long = [len(ps) - len(short) for ps, short in zip((train, test), fits, strict=True)]
    test = fits[1][: s.eval_problems]
    seen = {same_text(p["problem"]) for p in test}
    usable = [p for p in fits[0] if same_text(p["problem"]) not in seen]
    left_out = f"{long[0]} too long, {len(fits[0]) - len(usable)} evaluated on"
    if not usable or not test:
        flags = "--data, --eval-data and --max-prompt-tokens"
        counts = f"{left_out}; to evaluate on {long[1]} too long"
        raise UserError(f"no problem is left to train or to evaluate on ({counts}): check {flags}")
    held_out = f", {long[1]} too long to evaluate on" if long[1] else ""
    return usable, test, f"{len(usable)} problems (left out: {left_out}{held_out})"


def problems_of_step(problems, count, seed, step):
    """The `count` problems of step 1, 2, ...; each epoch is a shuffle decided by (seed, epoch)."""
    first, last = (step - 1) * count, step * count  # of the problems of all epochs in a row
    epochs = range(first // len(problems), (last - 1) // len(problems) + 1)
    row = []
    for epoch in epochs:
        order = list(problems)
        random.Random(f"{seed} {epoch}").shuffle(order)
        row += order
    start = first - epochs[0] * len(problems)
    return row[start : start + count]
