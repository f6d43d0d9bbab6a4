"""A run of train.py beside its loop: the run folder, and what the user sees on the way."""

import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from credit import METHODS, token_weights
from eval_math import evaluate, rates, with_interval
from lora import lora_parameters
from plumbing import ranks
from plumbing.files import UserError, append, printable, write_json

# ---- The run folder ------------------------------------------------------------------------------


def run_name(s) -> str:
    """What a run is called that is given no --out: by what it does."""
    return "-".join([s.credit, Path(s.model).name, Path(s.data).stem, f"seed{s.seed}"])


def new_run(s, model) -> Path:
    """A run folder with its config.json. One that holds a run is never written into."""
    if ranks.rank() > 0:
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
    if not s.tensorboard or ranks.rank() > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter  # optional, and for this only

    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


def record(path, row, board):
    """Add a line to a JSONL file, and its numbers to TensorBoard if it is used."""
    if ranks.rank() > 0:
        return
    append(path, row)
    if board:
        for key, value in row.items():
            if isinstance(value, (int, float)):
                board.add_scalar(f"{path.stem}/{key}", value, row["step"])
        board.flush()


# ---- What the user sees --------------------------------------------------------------------------


def is_evaluated(step, s):
    """Whether a run is evaluated here: before it, after it, and every s.eval_every steps."""
    return step in (0, s.steps) or (s.eval_every > 0 and step % s.eval_every == 0)


def evaluate_step(model, tokenizer, held_out, s, step, folder, board):
    """Evaluate; write a line of evals.jsonl, say it, and return it."""
    prompts, golds = [p["prompt"] for p in held_out], [p["answer"] for p in held_out]
    sampling = (s.eval_samples, s.max_new_tokens, s.temperature, s.top_p, s.seed)
    result, _ = evaluate(model, tokenizer, prompts, golds, *sampling)
    record(folder / "evals.jsonl", dict(step=step) | result, board)
    said = [f"{key} {with_interval(result, key)}" for key in rates(result)]
    tqdm.write(f"step {step:4d}  held-out {', '.join(said)}, {result['n']} problems")
    return dict(step=step) | result


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
    if ranks.rank() > 0:
        return
    mixed = r.rewards.std(dim=1).argmax().item() * r.rewards.shape[1]  # its first row
    rewards = r.rewards.flatten()[mixed : mixed + r.rewards.shape[1]]
    chosen = [mixed + int(i) for value in (0, 1) for i in (rewards == value).nonzero()[:1, 0]]
    for sample in sample_rows(r, chosen, known, s, tokenizer):
        append(folder / "samples.jsonl", dict(step=step) | sample)
    tqdm.write(printable(f"step {step:4d}  {sample['problem']}  (gold {sample['gold']})"))
    text = printable(" ".join(sample["text"].split())[:300])
    tqdm.write(f"  reward {sample['reward']:g}: {text}")


def on_screen() -> bool:
    return sys.stderr.isatty() and ranks.rank() == 0


def show(bar, metrics, accuracy):
    """The progress bar's figures; where there is no bar, a line every five steps."""
    figures = dict(reward=f"{metrics['reward']:.2f}", accuracy=f"{accuracy:.2f}")
    figures.update(gini=f"{metrics['gini']:.2f}", eff=f"{metrics['effective_token_ratio']:.2f}")
    figures["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
    bar.set_postfix(figures)
    if bar.disable and metrics["step"] % 5 == 0:
        text = "  ".join(f"{name} {figure}" for name, figure in figures.items())
        print(f"step {metrics['step']:4d}  {text}", flush=True)


def warn(history, model):
    """Say loudly what would otherwise fail in silence; UserError when to go on is pointless."""
    last, metrics = history[-5:], history[-1]
    if len(last) == 5 and all(row["reward"] == 0 for row in last):
        tqdm.write("WARNING: no reward in 5 steps: wrong prompt (--chat?), or problems too hard?")
    if metrics["truncated"] > 0.5:
        tqdm.write("WARNING: over half of the completions were cut off: raise --max-new-tokens")
    if metrics["skipped"]:
        tqdm.write("WARNING: the loss or gradient was not finite; this step was skipped")
    if len(last) == 5 and all(row["skipped"] for row in last):
        raise UserError("loss or gradient not finite in 5 steps in a row: lower --lr")
    if len(history) == 3 and any(row["groups_mixed"] for row in last):
        B = [p for name, p in lora_parameters(model).items() if "lora_B" in name]
        if not any(p.any() for p in B):
            tqdm.write("WARNING: LoRA's B is still zero after 3 steps: no gradient reaches it")


def summary(folder, history, evals, s):
    """The table at the end of a run."""
    mean = lambda key, rows: sum(row[key] for row in rows) / max(1, len(rows))  # noqa: E731
    print(f"\n{'':22}{'before':>23}{'after':>23}")
    for key in rates(evals[0]):
        cells = [with_interval(result, key) for result in (evals[0], evals[-1])]
        print(f"{'held-out ' + key:22}{cells[0]:>23}{cells[1]:>23}")
    first, last = (f"{mean('reward', rows):.3f}" for rows in (history[:5], history[-5:]))
    print(f"{'reward, 5 steps':22}{first:>23}{last:>23}")
    spread = [f"{mean(key, history):.3f}" for key in ("gini", "effective_token_ratio")]
    print(f"\n{s.credit}: Gini {spread[0]}, effective-token ratio {spread[1]} (mean of the steps)")
    print(f"run folder: {folder}")
    print(f"next: python credit.py --run {folder}  (shows which tokens were paid)")
    print(f"      python train.py --credit {'arca' if s.credit == 'uniform' else 'uniform'}")
