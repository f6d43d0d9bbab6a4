"""What a run leaves in its folder and shows on the screen."""

import itertools
import math
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from credit import rules_for, token_weights
from lora import lora_parameters
from run.answers import rates
from system import processes
from system.errors import UserError, printable
from system.files import append, write_json, writing

# The curve at the end of a run: its size, and signs from none to eight eighths of a line.
COLUMNS = 64
LINES = 4
BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " ...::::#"
FIGURES = "gini {gini:.2f}  eff {effective_token_ratio:.2f}  tok/s {tokens_per_second:.0f}"


# ---- The folder ----------------------------------------------------------------------------------
def run_name(cfg) -> str:
    """Return what a run without --out is called: what it does."""
    parts = [cfg.credit, Path(cfg.model).name, Path(cfg.data).stem, f"seed{cfg.seed}"]
    if cfg.adapter:  # runs/A/adapter is the adapter of A
        path = Path(cfg.adapter)
        path = path.parent if path.name == "adapter" and path.parent.name else path
        parts += ["from", path.name]
    return "-".join(parts)


def new_run(cfg, model, digests) -> Path:
    """Make a run folder with its config.json; UserError if --out already holds a run."""
    if processes.rank() > 0:
        return Path("runs/of-another-process")  # does not exist: nothing is read, nothing written
    with writing(cfg.out or "runs"):
        folder = Path(cfg.out) if cfg.out else own_folder(Path("runs"), run_name(cfg))
        folder.mkdir(parents=True, exist_ok=True)
    processes.hold(folder)
    if any((folder / x).exists() for x in ("config.json", "trainer.safetensors", "adapter")):
        raise UserError(f"{folder} holds a run: give another --out, or --resume to continue it")
    # config.json: every setting, and what else it takes to know what was run.
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        revision = ""  # git is not installed
    trained = sum(p.numel() for p in lora_parameters(model).values())
    config = {
        "settings": asdict(cfg), "digests": digests, "argv": sys.argv, "git": revision,
        "parameters": dict(total=sum(p.numel() for p in model.parameters()), trained=trained),
        "versions": dict(python=platform.python_version(), torch=torch.__version__),
    }  # fmt: skip
    write_json(folder / "config.json", config)
    return folder


def own_folder(parent, name) -> Path:
    """Make and return the folder `name`, or else the first of name-2, name-3, ... that is free."""
    parent.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (f"{name}-{number}" if number > 1 else name)
        with suppress(FileExistsError):  # mkdir fails for all processes but one
            folder.mkdir()
            return folder


def recorder(folder, cfg, done):
    """Return record(name, row), which adds a row to a JSONL file of the run; first process only.
    With --tensorboard its numbers become events, too; a killed run's after step `done` go."""
    if processes.rank() > 0:
        return lambda name, row: None
    writer = None
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # optional, and for this only

        writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def record(name, row):
        append(folder / name, row)
        if writer is not None and name != "samples.jsonl":
            for key, value in row.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(f"{Path(name).stem}/{key}", value, row["step"])
            writer.flush()

    return record


# ---- Samples -------------------------------------------------------------------------------------
def numbers(x) -> list[float]:
    """Return the numbers of a tensor (T,) to 4 decimals."""
    return [round(value, 4) for value in x.tolist()]


def sample_rows(rollout, chosen, signals, cfg, tokenizer):
    """Yield the chosen rows of a rollout as samples.jsonl has them: the completion, the signals of
    its tokens, the run's multipliers (`weights`), and every rule's at sharpening 1 and 2."""
    own = token_weights(cfg.credit, signals, cfg.sharpening)
    rules = {name: [token_weights(name, signals, p) for p in (1, 2)] for name in rules_for(signals)}
    for row in chosen:
        problem = rollout.problems[row // rollout.rewards.shape[1]]
        at = (row, slice(rollout.completions.lengths[row]))  # its tokens
        tokens = tokenizer.pieces(rollout.completions.tokens[at].tolist())
        yield {
            "problem": problem["problem"], "gold": problem["answer"], "text": rollout.texts[row],
            "tokens": tokens, "reward": rollout.rewards.flatten()[row].item(), "credit": cfg.credit,
            "weights": numbers(own[at]), "advantage": round(signals.advantage[row].item(), 4),
            "logp": numbers(signals.logp[at]), "entropy": numbers(signals.entropy[at]),
            "residual": numbers(signals.residual[at]),
            "rules": {name: [numbers(x[at]) for x in pair] for name, pair in rules.items()},
        }  # fmt: skip


def keep_samples(record, rollout, signals, cfg, tokenizer, step):
    """Record the worst and the best completion of the group with most spread; print the best."""
    if processes.rank() > 0:
        return
    group = int(rollout.rewards.std(dim=1).argmax())
    rewards = rollout.rewards[group].tolist()
    ends = (rewards.index(min(rewards)), rewards.index(max(rewards)))  # one if all are equal
    chosen = [group * len(rewards) + i for i in dict.fromkeys(ends)]
    for sample in sample_rows(rollout, chosen, signals, cfg, tokenizer):
        record("samples.jsonl", dict(step=step) | sample)
    tqdm.write(printable(f"step {step:4d}  {sample['problem']}  (gold {sample['gold']})"))
    text = printable(" ".join(sample["text"].split())[:300])
    tqdm.write(f"  reward {sample['reward']:g}: {text}")


# ---- The screen ----------------------------------------------------------------------------------
def show(bar, metrics, evals):
    """Set the figures of the progress bar; where there is none, print a line every five steps."""
    accuracy = f"accuracy {evals[-1]['greedy']:.2f}  " if evals else ""
    text = f"reward {metrics['reward']:.2f}  {accuracy}{FIGURES.format(**metrics)}"
    bar.set_postfix_str(text)
    if bar.disable and metrics["step"] % 5 == 0:
        print(f"step {metrics['step']:4d}  {text}", flush=True)


def show_evaluation(step, result):
    """Print what an evaluation on the held-out problems found."""
    said = ", ".join(f"{key} {rate}" for key, rate in rates(result).items())
    tqdm.write(f"step {step:4d}  held-out {said}, {result['n']} problems")


def warn(history, model, cfg):
    """Warn of what would otherwise fail in silence; UserError when to continue is pointless."""
    last = history[-5:]
    if [row["reward"] for row in last] == [0] * 5:
        tqdm.write("WARNING: no reward in 5 steps: wrong prompt (--chat?), or problems too hard?")
    if last[-1]["truncated"] > 0.5:
        tqdm.write("WARNING: over half of the completions were cut off: raise --max-new-tokens")
    if "gini/uniform/1" in last[-1] and "gini/delta/1" not in last[-1]:
        tqdm.write("WARNING: the rule delta is not compared: its states are too large to keep")
    if last[-1]["skipped"]:
        tqdm.write("WARNING: the loss or gradient was not finite; this step was skipped")
    if [row["skipped"] for row in last] == [1] * min(5, cfg.steps):  # a short run's are all
        raise UserError(f"loss or gradient not finite in {len(last)} steps in a row: lower --lr")
    if len(history) == 3 and any(row["groups_mixed"] for row in history):
        B = [p for name, p in lora_parameters(model).items() if "lora_B" in name]
        if not any(p.any() for p in B):
            tqdm.write("WARNING: LoRA's B is still zero after 3 steps: no gradient reaches it")


def mean(values) -> float:
    """Return the mean of the values that are finite numbers; NaN if there are none."""
    finite = [x for x in values if x is not None and math.isfinite(x)]
    return fmean(finite) if finite else math.nan


def thin(rows, keys, every) -> list[dict]:
    """Return a row for steps 1 to `every`, one for as many after them, ...: the means of these
    keys, and the step in the middle. Step 0 stands alone."""
    bins = {}
    for row in rows:
        bins.setdefault(math.ceil(row["step"] / every), []).append(row)
    thinned = []
    for number, members in bins.items():
        middle = (number - 1) * every + (every + 1) / 2 if number else 0
        means = {key: mean(row[key] for row in members) for key in keys}
        thinned.append({"step": middle} | means)
    return thinned


def outcome(history, evals) -> dict[str, tuple[str, str]]:
    """Return, in words, what a run was before and after: held-out rates, and means of the first and
    the last five steps."""
    before = rates(evals[0]) if evals else {}
    after = rates(evals[-1]) if len(evals) > 1 else {}
    found = {f"held-out {key:.31}": (rate, after.get(key, "")) for key, rate in before.items()}
    for key in ("reward", "entropy", "truncated") if history else ():
        values = [row.get(key) for row in history]
        found[f"{key}, 5 steps"] = (f"{mean(values[:5]):.3f}", f"{mean(values[-5:]):.3f}")
    return found


def spread(history) -> dict[str, float]:
    """Return how concentrated the credit was: means of the steps that were not skipped."""
    made = [row for row in history if not row.get("skipped")]
    gini = mean(row.get("gini") for row in made)
    ratio = mean(row.get("effective_token_ratio") for row in made)
    return {"Gini": gini, "effective-token ratio": ratio}


def encodes(signs) -> bool:
    """Return whether the screen's encoding has these signs."""
    try:
        return bool(signs.encode(sys.stdout.encoding or "ascii"))
    except (UnicodeEncodeError, LookupError):
        return False


def curve(rewards) -> list[str]:
    """Return the rewards of steps 1, 2, ... as 5 lines of at most 80 columns: of blocks, or ASCII
    where the screen has none. A reward that is no number leaves a gap."""
    # 1) A column is the mean of a few steps; its height is in eighths of a line.
    every = math.ceil(len(rewards) / COLUMNS)
    rows = [dict(step=step, reward=reward) for step, reward in enumerate(rewards, 1)]
    means = [row["reward"] for row in thin(rows, ["reward"], every)]
    top = max([x for x in means if x > 0], default=1.0)
    heights = [max(1, round(8 * LINES * x / top)) if math.isfinite(x) else 0 for x in means]
    # 2) A title, and the lines from the top one to the lowest.
    signs = BLOCKS if encodes(BLOCKS) else ASCII
    labels = [f"{top:.3g}"] + [""] * (LINES - 2) + ["0"]
    smoothed = f", a column is the mean of {every}" if every > 1 else ""
    lines = [f"train reward of steps 1 to {len(rewards)}{smoothed}"]
    for i, label in enumerate(labels):
        below = 8 * (LINES - 1 - i)
        blocks = "".join(signs[min(8, max(0, height - below))] for height in heights)
        lines.append(f"{label:>8} {blocks}".rstrip())
    return lines


def print_outcome(history, evals, rule):
    """Print what a run was before and after, as a table, and the curve of its train reward."""
    found = outcome(history, evals)
    if found:
        print(f"{'':22}{'before':>23}{'after':>23}")
    for name, (before, after) in found.items():
        print(printable(f"{name:22}{before:>23}{after:>23}"))
    if history:
        print("", *curve([row["reward"] for row in history]), "", sep="\n")
        said = ", ".join(f"{name} {x:.3f}" for name, x in spread(history).items())
        print(printable(f"{rule}: {said} (mean of the steps)"))


def summary(folder, history, evals, cfg):
    """Print what a run was before and after, its curve, and what to try next."""
    print()
    print_outcome(history, evals, cfg.credit)
    print(printable(f"run folder: {folder}"))
    print(printable(f"next: python -m view {folder}  (its curves, and who received credit)"))
    print(f"      python train.py --credit {'arca' if cfg.credit == 'uniform' else 'uniform'}")
