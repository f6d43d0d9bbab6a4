"""A run folder: its name, its config.json, and the lines that a step adds to its JSONL files."""

import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from credit import METHODS, token_weights
from lora import lora_parameters
from system import processes
from system.errors import UserError, printable
from system.files import append, write_json


def run_name(s) -> str:
    """What a run is called that is given no --out: by what it does."""
    return "-".join([s.credit, Path(s.model).name, Path(s.data).stem, f"seed{s.seed}"])


def new_run(s, model) -> Path:
    """A run folder with its config.json. One that holds a run is never written into."""
    if processes.rank() > 0:
        return Path("runs/of-another-process")  # is not there: nothing is read, nothing written
    name, count = run_name(s), 1
    folder = Path(s.out or f"runs/{name}")
    while not s.out and folder.exists():
        count += 1
        folder = Path(f"runs/{name}-{count}")
    if any((folder / name).exists() for name in ("config.json", "trainer.safetensors")):
        raise UserError(f"{s.out} holds a run: give another --out, or --resume to go on with it")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, s, model)
    return folder


def write_config(folder, s, model):
    """config.json: every setting, and what else it takes to know what was run."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        revision = ""  # git is not installed
    both = dict(total=model.parameters(), trained=lora_parameters(model).values())
    count = {name: sum(p.numel() for p in parameters) for name, parameters in both.items()}
    config = dict(settings=asdict(s), argv=sys.argv, git=revision, parameters=count)
    config["versions"] = dict(python=platform.python_version(), torch=torch.__version__)
    write_json(folder / "config.json", config)


def open_board(s, folder, step):
    """A TensorBoard writer, if asked for. What it has of steps after this one is taken back."""
    if not s.tensorboard or processes.rank() > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter  # optional, and for this only

    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def record(path, row, board):
    """Add a line to a JSONL file, and its numbers to TensorBoard if it is used."""
    if processes.rank() > 0:
        return
    append(path, row)
    if board:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                board.add_scalar(f"{path.stem}/{key}", value, row["step"])
        board.flush()


def numbers(x, row, n) -> list[float]:
    """The first n numbers of a row of x (B, T), to 4 decimals."""
    return [round(value, 4) for value in x[row, :n].tolist()]


def sample_rows(r, chosen, known, s, tokenizer):
    """The chosen rows of a rollout as samples.jsonl has them: the completion, what is known of its
    tokens, and every rule's multipliers at sharpening 1 and 2 (`weights` are those of the run)."""
    rules = {name: [token_weights(name, known, p) for p in (1, 2)] for name in METHODS}
    own = token_weights(s.credit, known, s.sharpening)
    for row in chosen:
        n, p = int(r.completions.lengths[row]), r.problems[row // r.rewards.shape[1]]
        tokens = [tokenizer.decode([t]) for t in r.completions.tokens[row, :n].tolist()]
        sample = dict(problem=p["problem"], gold=p["answer"], text=r.texts[row], tokens=tokens)
        sample.update(reward=r.rewards.flatten()[row].item(), credit=s.credit)
        sample.update(weights=numbers(own, row, n), advantage=round(known.advantage[row].item(), 4))
        for name in ("logp", "entropy", "residual"):
            sample[name] = numbers(getattr(known, name), row, n)
        sample["rules"] = {name: [numbers(m, row, n) for m in pair] for name, pair in rules.items()}
        yield sample


def keep_samples(r, known, s, tokenizer, step, folder):
    """Write a wrong and a right completion of a problem that has both, if there is one; say one."""
    if processes.rank() > 0:
        return
    mixed = r.rewards.std(dim=1).argmax().item() * r.rewards.shape[1]  # its first row
    rewards = r.rewards.flatten()[mixed : mixed + r.rewards.shape[1]]
    chosen = [mixed + int(i) for value in (0, 1) for i in (rewards == value).nonzero()[:1, 0]]
    for sample in sample_rows(r, chosen, known, s, tokenizer):
        append(folder / "samples.jsonl", dict(step=step) | sample)
    tqdm.write(printable(f"step {step:4d}  {sample['problem']}  (gold {sample['gold']})"))
    text = printable(" ".join(sample["text"].split())[:300])
    tqdm.write(f"  reward {sample['reward']:g}: {text}")
