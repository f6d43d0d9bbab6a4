"""What the user of train.py sees: the bar, warnings, and the table at the end."""

import sys

from tqdm import tqdm

from lora import lora_parameters
from run.answers import rates, with_interval
from system import processes
from system.errors import UserError


def on_screen() -> bool:
    return sys.stderr.isatty() and processes.rank() == 0


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
