"""Problems to train and evaluate on, and the one prompt that every model sees them in. A problem is
a dict with at least `problem` and `answer` (the gold answer), both text."""

import hashlib
import json
import random
import re
import unicodedata
from pathlib import Path

from data.tables import data_rows
from hf.checkpoint import NAMED
from hf.hub import hub_folder
from system.errors import UserError, printable
from verifier.extract import STATED, extract_answer, last_boxed

TINY = NAMED["tiny"]  # the embedded checkpoint and its problems
# The prompt of the ARCA authors. The embedded model was pretrained on it.
PROMPT = "Solve this math problem step by step. Put your final answer in \\boxed{}.\n\n"
PROMPT += "Problem: {problem}\n"
# GCPO's negative prompt (arXiv 2605.29198), by the suffix that its code falls back to.
NEGATIVE = PROMPT.replace("{problem}", "{problem}, but generate the wrong answer")
SPARE = 16  # tokens that a tokenizer may put around any text
# name: repository on the Hub, the files of a split, the columns that we read
HUB = dict(
    math=("DigitalLearningGmbH/MATH-lighteval", "data/{}-*.parquet", "problem solution level type"),
    math500=("HuggingFaceH4/MATH-500", "test.jsonl", "problem answer level subject"),
    gsm8k=("openai/gsm8k", "main/{}-*.parquet", "question answer"),
)


def prompt_text(problem: str, prompt=PROMPT) -> str:
    """Return the text before the completion; a chat model reads it as a user's turn."""
    return prompt.replace("{problem}", problem)


def add_prompts(problem: dict, tokenizer) -> dict:
    """Give a problem that has none the ids of its `prompt` and `negative` one; return it."""
    if "prompt" not in problem:
        text = problem["problem"]
        problem["prompt"] = tokenizer.encode_prompt(prompt_text(text))
        problem["negative"] = tokenizer.encode_prompt(prompt_text(text, NEGATIVE))
    return problem


# ---- A row of any data set -----------------------------------------------------------------------
# Columns, in any case, that hold a problem or its gold answer; the first that does counts. `user`
# and `assistant` are the messages of a chat.
PROBLEM = ("problem", "question", "query", "prompt", "user")
GOLD = ("gold", "answer", "final_answer", "expected_answer", "ground_truth", "solution")
GOLD += ("response", "completion", "assistant")
# A sentence or several, lines of equations, or ten words: more than the answer to a problem.
SOLUTION = r"[.!?]\s+[A-Z]|=[^\n]*\n[^\n]*=|(?:[^\W\d_]{2,}[^\w\\]+){10}"
SOLUTION = re.compile(SOLUTION + r"|(?:[^\W\d_]{2,}[^\w\\]+){3}.*\.\s*$")


def columns(row: dict) -> dict:
    """Return the values of a row by name in lower case; those of its objects (TRL's and DAPO's
    `reward_model` and `extra_info`) and its chat messages count as its own."""
    found = {}
    inner = {}
    for name, value in row.items():
        found[str(name).strip().lower()] = value
        if isinstance(value, dict):
            inner = {str(key).lower(): x for key, x in value.items()} | inner
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict):
                inner[str(message.get("role"))] = message.get("content")
    return inner | found


def gold_in(value) -> str | None:
    """Return the gold answer that a value gives: a number; of a worked solution its last box, or
    what it states (`#### 5`, "The answer is 5."); or the whole text. "" is an empty answer, None
    none at all."""
    if type(value) in (int, float) and abs(value) < float("inf"):
        return str(value)
    if not isinstance(value, str):
        return None
    if "\\boxed" in value or "\\fbox" in value:
        return extract_answer(value, strict=False) or last_boxed(value)
    if STATED.search(value):
        return extract_answer(value, strict=False) or ""
    return value.strip()


def gold_of(given: dict) -> str | None:
    """Return the gold answer in the `columns` of a row: the first in GOLD that is not empty ("" if
    all are); None if there is none."""
    found = None
    for name in GOLD:
        gold = gold_in(given.get(name))
        if gold:
            return gold
        found = gold if found is None else found
    return found


def as_problem(row: dict, where: str) -> dict:
    """Return a row as a problem; UserError, naming the place and its columns, if it is not one."""
    given = columns(row)
    gold = gold_of(given)
    for name in PROBLEM:
        text = given.get(name)
        if isinstance(text, str) and text.strip() and gold is not None:
            row = {key: value for key, value in row.items() if key not in ("prompt", "negative")}
            return row | dict(problem=text, answer=gold)
    known = [", ".join(names) for names in (PROBLEM, GOLD)]
    wanted = f"text in one of {known[0]}, and an answer in one of {known[1]}"
    said = f"{where} is not a problem: it needs {wanted}; it has {names_of(row)}"
    raise UserError(f"{said}: rename or fill these")


def names_of(row) -> str:
    """Return the names of a row's columns, for a message."""
    names = [" ".join(str(name).split())[:40] for name in row]
    return ", ".join(names[:20]) or "no columns"


def with_golds(rows: list[dict], source, gold="answer") -> list[dict]:
    """Return the rows whose gold answer is not empty; say how many are, and how many golds look
    like a solution. UserError if none is left."""
    kept = [row for row in rows if row[gold]]  # two of MATH's solutions end in an empty box
    if not kept:
        raise UserError(f"{source} holds no problems: give another file")
    if len(kept) < len(rows):
        print(f"left out {len(rows) - len(kept)} problems with an empty answer")
    long = [row[gold] for row in kept if len(row[gold]) > 200 or SOLUTION.search(row[gold])]
    if long:
        said = f"WARNING: {len(long)} of {len(kept)} answers in {source} look like solutions, which"
        said += " no completion will equal: give bare answers, or put a \\boxed{} around them. One"
        print(printable(f"{said} is: {' '.join(long[0].split())[:80]}"), flush=True)
    return kept


def hub_rows(name: str, split: str) -> list[tuple[dict, str]]:
    """Read a split of a data set in HUB: (dict of the columns that we read, where it is)."""
    repo, files, wanted = HUB[name]
    files = files.format(split)
    rows = []
    for path in sorted(hub_folder(repo, needed=[files], kind="dataset").glob(files)):
        for row, where in data_rows(path):
            rows.append(({key: row[key] for key in wanted.split() if key in row}, where))
    return rows


def load_problems(source: str, split="train") -> list[dict]:
    """Load the problems of `tiny`, `math`, `math500` or `gsm8k` in a split, or of a data file."""
    path = NAMED[source] / f"{split}.jsonl" if source in NAMED else Path(source)
    if source in HUB:
        rows = hub_rows(source, split)
    elif path.exists() and not path.is_dir():
        rows = data_rows(path)
    else:
        raise UserError(
            f"no data {source}: give --data a file, or one of {', '.join([*NAMED, *HUB])}"
        )
    return with_golds([as_problem(row, where) for row, where in rows], source)


def data_digest(problems) -> str:
    """Return a digest of problems: of all that their rows hold, and not of the file's format."""
    found = hashlib.sha256()
    for problem in problems:
        found.update(json.dumps(problem, sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def same_text(problem: str) -> str:
    """Return what problems share that differ only in spacing, case or forms of a character."""
    return "".join(unicodedata.normalize("NFKC", problem).casefold().split())


def short_prompts(problems, tokenizer, cfg) -> list[dict]:
    """Return the problems whose prompts have at most max_prompt_tokens tokens. Of 100,000 texts
    most need not be encoded to know: one in ASCII has no more tokens than signs, and one that so
    many of the longest tokens could not spell is not read to its end (but by a tokenizer that drops
    characters and so may spell more)."""
    most = cfg.max_prompt_tokens
    room = most * max(map(len, tokenizer.file.get_vocab()), default=0)  # characters
    around = len(tokenizer.prompt_text(prompt_text("")).encode()) + SPARE
    unsure = {}  # place in problems: text
    long = set()
    for i, problem in enumerate(problems):
        text = problem["problem"]
        if len(text) > room and len(tokenizer.encode(text[: room + 1])) > most:
            long.add(i)
        elif not text.isascii() or len(text) + around > most:
            unsure[i] = prompt_text(text)
    counts = tokenizer.count_prompts(list(unsure.values()))
    long |= {i for i, count in zip(unsure, counts, strict=True) if count > most}
    return [problem for i, problem in enumerate(problems) if i not in long]


def load_split(cfg, tokenizer):
    """Return problems to train on, held-out ones with prompt ids, what was left out, and a digest
    of each data set. Without --eval-data the test split of a named set is held out, or every tenth
    line of a file; with --eval-problems 0, nothing. A problem that is evaluated on is never trained
    on. Long prompts are left out, not cut off."""
    train = load_problems(cfg.data, "train")
    digests = dict(data=data_digest(train))
    test = []
    if cfg.eval_problems > 0 and not cfg.eval_data and Path(cfg.data).is_file():
        test = train[::10]
        train = [p for i, p in enumerate(train) if i % 10]
    elif cfg.eval_problems > 0:
        test = load_problems(cfg.eval_data or cfg.data, "test")
        digests["eval_data"] = data_digest(test)
    short = short_prompts(train, tokenizer, cfg)
    short_test = short_prompts(test, tokenizer, cfg)
    held_out = [add_prompts(p, tokenizer) for p in short_test[: cfg.eval_problems]]
    seen = {same_text(p["problem"]) for p in held_out}
    usable = [p for p in short if same_text(p["problem"]) not in seen]
    left_out = f"{len(train) - len(short)} too long, {len(short) - len(usable)} evaluated on"
    if len(short_test) < len(test):
        left_out += f", {len(test) - len(short_test)} too long to evaluate on"
    if not usable or (cfg.eval_problems > 0 and not held_out):
        flags = "--data, --eval-data and --max-prompt-tokens"
        raise UserError(f"no problem to train or to evaluate on ({left_out}): check {flags}")
    return usable, held_out, f"{len(usable)} problems (left out: {left_out})", digests


def problems_of_step(problems, count, seed, step):
    """Return the `count` problems of step 1, 2, ...; (seed, epoch) decides an epoch's shuffle."""
    epoch, start = divmod((step - 1) * count, len(problems))
    row = []  # the problems of this epoch, and of the next ones as far as needed
    while len(row) < start + count:
        order = list(problems)
        random.Random(f"{seed} {epoch}").shuffle(order)
        row += order
        epoch += 1
    return row[start : start + count]
