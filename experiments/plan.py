"""Which runs a sweep has, in which folders, and what is still to be done in each.

A folder is named after its run's setting and a hash of all that decides its numbers.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path

from data.problems import HUB
from experiments.concentration import RULES
from hf.checkpoint import NAMED
from run.flags import check
from system.errors import UserError, flag_name
from system.files import checked, opened, read_json, read_rows
from train import PRESETS as TRAINING
from train import Settings

ROOT = Path(__file__).resolve().parent.parent
CONTROLS = ("permuted", "random")
POWERS = ("0.25", "0.5", "1", "1.5", "2", "3", "4")  # at which ARCA's final adapters are measured


@dataclass
class Preset:
    """What the runs of a sweep share. Alpha is twice the rank, as in the paper."""

    training: dict  # settings of train.py
    rank: int  # of the main comparison
    others: tuple  # ranks that only uniform and ARCA are run at
    seeds: tuple
    problems: int  # to evaluate on, after training
    rules: tuple = RULES  # of the main comparison
    samples: int = Settings.eval_samples  # a problem, for pass@k; 0 for greedy only
    measured: bool = True  # whether ARCA's adapters are, at many sharpenings


# A chat model of half a billion parameters: it must be seen to learn within an hour of a GPU.
CHAT = dict(model="Qwen/Qwen2.5-Coder-0.5B-Instruct", chat=True, steps=60, prompts=8, samples=8)
CHAT.update(max_new_tokens=384, lr=2e-4, eval_problems=32, micro_batch_tokens=4096)
# During training models are evaluated on few problems: the commands after it do the others.
PRESETS = {
    "tiny": Preset(dict(steps=32, eval_problems=50), 16, (4, 64), (1, 2, 3, 4, 5), 500),
    "paper": Preset(dict(preset="paper"), 64, (4, 16), (1337,), 200),
    "chat": Preset(CHAT, 16, (), (1, 2, 3), 400, ("uniform", "arca"), 0, False),
}


@dataclass
class Run:
    """One folder of the sweep; the rule `base` is the untrained model, which is only evaluated."""

    cell: tuple  # rule, rank, sharpening
    settings: dict  # of train.py, all of them
    problems: int  # to evaluate on
    samples: int  # a problem, for pass@k
    measured: bool  # whether the concentration of all rules is, at many sharpenings
    folder: Path


# ---- Which runs ----------------------------------------------------------------------------------


def cells(rank, others, controls=True, rules=RULES):
    """The settings to compare (rule, rank, sharpening): the paper's seven, then what it lacks.
    Uniform has no sharpening; it is written as 1."""
    power = {rule: 1.0 if rule == "uniform" else 2.0 for rule in (*rules, *CONTROLS)}
    seven = [(rule, rank, power[rule]) for rule in rules] + [("arca", r, 2.0) for r in others]
    more = [("uniform", r, 1.0) for r in others] + [(rule, rank, 2.0) for rule in CONTROLS]
    more += [(rule, rank, 1.0) for rule in (*rules[1:], *CONTROLS)]
    return seven + more * controls


def source_files():
    """Return the files that decide a run's numbers; run/folder.py and view/ only show them."""
    core = ("model", "lora", "credit", "sample", "eval_math", "grpo", "train")
    files = [ROOT / f"{name}.py" for name in core]
    files.append(ROOT / "data/problems.py")
    files += [ROOT / f"experiments/{name}.py" for name in ("concentration", "stats")]
    for folder in ("system", "verifier", "hf", "fast", "run"):
        files += sorted((ROOT / folder).glob("*.py"))
    return [path for path in files if path.name != "folder.py"]


def code_key() -> str:
    """A hash of the code that decides the numbers, and of the torch that computes them."""
    key = hashlib.sha256(version("torch").encode())
    for path in source_files():
        key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()


@cache
def content(name) -> str:
    """A model or data set: a hash of its files, wherever they lie, or its name on the Hub."""
    path = Path(NAMED.get(name, name))
    if name in ("", *HUB) or not path.exists():
        return name
    key = hashlib.sha256()
    for file in sorted(p for p in path.glob("*") if p.is_file()) or [path]:
        with opened(file) as content:
            key.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return key.hexdigest()


def run_key(settings, problems, code) -> str:
    """A hash of code, settings and inputs."""
    inputs = {name: content(settings[name]) for name in ("model", "data", "eval_data")}
    about = json.dumps([code, problems, settings | inputs], sort_keys=True)
    return hashlib.sha256(about.encode()).hexdigest()


def plan(preset: Preset, given, seeds, controls, out, code):
    """The Runs of a sweep in their order: the base model, then seed by seed, so that a sweep that
    is cut short has compared all settings. given: settings of the command line."""
    training = dict(preset.training) | {k: v for k, v in given.items() if k != "eval_problems"}
    training = TRAINING[training.get("preset", "")] | training | dict(eval_samples=0)
    problems = given.get("eval_problems", preset.problems)
    training["eval_problems"] = min(problems, training["eval_problems"])
    main = cells(preset.rank, preset.others, controls, preset.rules)
    chosen = [("base", 0, 0.0, seeds[0]), *((*cell, seed) for seed in seeds for cell in main)]
    runs = []
    for rule, rank, power, seed in chosen:
        own = dict(credit=rule, rank=rank, alpha=2.0 * rank, sharpening=power, seed=seed)
        own = own if rule != "base" else dict(seed=seed)
        settings = asdict(Settings(**training | own))
        name = "-".join([rule] + [f"r{rank}-p{power:g}"] * (rule != "base") + [f"s{seed}"])
        folder = out / f"{name}-{run_key(settings, problems, code)[:10]}"
        measured = preset.measured and rule == "arca" and rank == preset.rank
        about = (settings, problems, preset.samples, measured, folder)
        runs.append(Run((rule, rank, power), *about))
    cfg = Settings(**training)
    if not cfg.eval_data and cfg.data not in (*NAMED, *HUB):
        raise UserError("--data FILE: give --eval-data FILE too, with the problems to evaluate on")
    check(cfg)
    return runs


# ---- What is to be done in a folder --------------------------------------------------------------


def flags(settings):
    """Settings as flags of train.py, those that are not its defaults."""
    words = []
    for f in fields(Settings):
        value = settings[f.name]
        if value != f.default:
            words += [flag_name(f.name)] + [str(value)] * (value is not True)
    return words


def of_model(run, *names):
    """The flags that eval_math.py and concentration.py share with train.py."""
    cfg = run.settings
    pairs = dict(model=cfg["model"], revision=cfg["revision"], data=cfg["eval_data"] or cfg["data"])
    names = ("seed", "device", "dtype", "max_new_tokens", "temperature", *names)
    pairs |= {name: cfg[name] for name in names}
    pairs["adapter"] = str(run.folder / "adapter") if run.cell[0] != "base" else ""
    words = [w for k, v in pairs.items() if v for w in (flag_name(k), str(v))]
    words += [w for k in ("system", "thinking") if cfg[k] for w in (flag_name(k), cfg[k])]
    return words + ["--chat"] * cfg["chat"]


def trained(run) -> bool:
    """Whether the folder holds the whole training; UserError if it holds another run's."""
    path = run.folder / "config.json"
    if not path.exists():
        return False
    stored = checked(read_json(path), path, settings=dict).get("settings", {})
    free = ("out", "model", "data", "eval_data")  # the last three are in the folder's key
    wrong = sorted(k for k, v in run.settings.items() if k not in free and stored.get(k, "") != v)
    if wrong:
        raise UserError(f"{run.folder} holds a run of other {', '.join(wrong)}: move it away")
    evals = read_rows(run.folder / "evals.jsonl")
    return bool(evals) and evals[-1]["step"] == run.settings["steps"]


def next_command(run):
    """What is to be done next for a run, as words, and the file that it makes; None when all is
    done. What a command writes is called `.part` until it has ended well."""
    folder = run.folder
    if run.cell[0] != "base" and not trained(run):
        if (folder / "config.json").exists():
            return ["train.py", "--resume", str(folder)], None
        return ["train.py", *flags(run.settings), "--out", str(folder)], None
    answers, measured = folder / "answers.jsonl", folder / "concentration.json"
    if not answers.exists():
        count = ("--problems", str(run.problems), "--samples", str(run.samples))
        return ["eval_math.py", *of_model(run, "top_p"), *count], answers
    if run.measured and not measured.exists():
        script = ["experiments/concentration.py", *of_model(run), "--problems", "128"]
        return [*script, "--sharpening", *POWERS], measured
    return None


def part_of(path):
    return path.with_name(path.name + ".part")
