"""Problems to train and evaluate on, and the one prompt that every model sees them in. A problem is
a dict with at least `problem` and `answer` (the gold answer), both text."""

import random
import unicodedata
from pathlib import Path

from hf.hub import hub_folder
from system.errors import UserError
from system.files import opened, read_lines
from verifier.extract import last_boxed

TINY = Path(__file__).parent / "tiny"  # the embedded checkpoint and its problems
# The prompt of the ARCA authors. The embedded model was pretrained on it.
PROMPT = "Solve this math problem step by step. Put your final answer in \\boxed{}.\n\n"
PROMPT += "Problem: {problem}\n"
# GCPO's negative prompt (arXiv 2605.29198), by the suffix that its code falls back to.
NEGATIVE = PROMPT.replace("{problem}", "{problem}, but generate the wrong answer")
CHATML = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"  # as Qwen chats
# name: repository on the Hub, the files of a split, the columns that we read
HUB = dict(
    math=("DigitalLearningGmbH/MATH-lighteval", "data/{}-*.parquet", "problem solution level type"),
    math500=("HuggingFaceH4/MATH-500", "test.jsonl", "problem answer level subject"),
    gsm8k=("openai/gsm8k", "main/{}-*.parquet", "question answer"),
)


def prompt_text(problem: str, chat=False, prompt=PROMPT) -> str:
    """Return the text before the completion; with chat=True it is a user's turn in ChatML."""
    text = prompt.replace("{problem}", problem)
    return CHATML.replace("{prompt}", text) if chat else text


def add_prompts(problem: dict, tokenizer, chat=False) -> dict:
    """Add the token ids of a problem's `prompt` and of its `negative` one; return the problem."""
    problem["prompt"] = tokenizer.encode(prompt_text(problem["problem"], chat))
    problem["negative"] = tokenizer.encode(prompt_text(problem["problem"], chat, NEGATIVE))
    return problem


def as_problem(row: dict, where: str) -> dict:
    """Return a row of any data set as a problem; UserError, naming the place, if it is not one. The
    gold is its `answer` (in GSM8K what follows ####), or else the last box of its `solution`."""
    text = row.get("problem", row.get("question"))
    answer = row.get("answer")
    if answer is None:
        answer = last_boxed(str(row.get("solution", "")))
    elif type(answer) in (int, float) and abs(answer) < float("inf"):
        answer = str(answer)
    if not isinstance(text, str) or not text.strip() or not isinstance(answer, str):
        wanted = "`problem`, and `answer` or a boxed `solution`"
        raise UserError(f"{where} is not a problem: it needs {wanted}")
    return {**row, "problem": text, "answer": answer.split("####")[-1].strip()}


def parquet_rows(path: Path) -> list[tuple[dict, str]]:
    """Read a parquet file, which only the Hub's MATH and GSM8K are: (dict, where it is)."""
    try:
        from pyarrow.parquet import read_table  # optional, and for this only

        rows = read_table(opened(path)).to_pylist()
    except ImportError:
        raise UserError(f"{path.name}: pip install pyarrow, or give a JSONL file") from None
    except Exception as error:  # several kinds
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    return [(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def hub_rows(name: str, split: str) -> list[tuple[dict, str]]:
    """Read a split of a data set in HUB: (dict of the columns that we read, where it is)."""
    repo, files, columns = HUB[name]
    files = files.format(split)
    rows = []
    for path in sorted(hub_folder(repo, needed=[files], kind="dataset").glob(files)):
        for row, where in read_lines(path) if path.suffix == ".jsonl" else parquet_rows(path):
            rows.append(({key: row[key] for key in columns.split() if key in row}, where))
    return rows


def load_problems(source: str, split="train") -> list[dict]:
    """Load the problems of `tiny`, `math`, `math500` or `gsm8k` in a split, or of a JSONL file."""
    path = TINY / f"{split}.jsonl" if source == "tiny" else Path(source)
    if source in HUB:
        rows = hub_rows(source, split)
    elif path.exists() and not path.is_dir():
        rows = read_lines(path)
    else:
        raise UserError(f"no data {source}: give a JSONL file, or one of tiny, {', '.join(HUB)}")
    problems = [as_problem(row, where) for row, where in rows]
    gradable = [p for p in problems if p["answer"]]  # two of MATH's solutions end in an empty box
    if not gradable:
        raise UserError(f"{source} holds no problems: give another file")
    if len(gradable) < len(problems):
        print(f"left out {len(problems) - len(gradable)} problems with an empty answer")
    return gradable


def same_text(problem: str) -> str:
    """Return what problems share that differ only in spacing, case or forms of a character."""
    return "".join(unicodedata.normalize("NFKC", problem).casefold().split())


def short_prompts(problems, tokenizer, cfg) -> list[dict]:
    """Return the problems whose prompts, which they get, have at most max_prompt_tokens tokens.
    A text that so many of the longest tokens could not spell is not read to its end (but by a
    tokenizer that drops characters and so may spell more)."""
    most = cfg.max_prompt_tokens
    room = most * max(map(len, tokenizer.file.get_vocab()), default=0)  # characters
    short = []
    for problem in problems:
        beginning = problem["problem"][: room + 1]
        if len(beginning) <= room or len(tokenizer.encode(beginning)) <= most:
            short.append(add_prompts(problem, tokenizer, cfg.chat))
    return [problem for problem in short if len(problem["prompt"]) <= most]


def load_split(cfg, tokenizer):
    """Return problems to train on, held-out ones (both with prompt ids), and what was left out.
    Without --eval-data the test split of a named set is held out, or every tenth line of a file. A
    problem that is evaluated on is never trained on. Long prompts are left out, not cut off."""
    train = load_problems(cfg.data, "train")
    if not cfg.eval_data and Path(cfg.data).is_file():
        test = train[::10]
        train = [p for i, p in enumerate(train) if i % 10]
    else:
        test = load_problems(cfg.eval_data or cfg.data, "test")
    short = short_prompts(train, tokenizer, cfg)
    short_test = short_prompts(test, tokenizer, cfg)
    held_out = short_test[: cfg.eval_problems]
    seen = {same_text(p["problem"]) for p in held_out}
    usable = [p for p in short if same_text(p["problem"]) not in seen]
    left_out = f"{len(train) - len(short)} too long, {len(short) - len(usable)} evaluated on"
    if len(short_test) < len(test):
        left_out += f", {len(test) - len(short_test)} too long to evaluate on"
    if not usable or not held_out:
        flags = "--data, --eval-data and --max-prompt-tokens"
        raise UserError(f"no problem to train or to evaluate on ({left_out}): check {flags}")
    return usable, held_out, f"{len(usable)} problems (left out: {left_out})"


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
