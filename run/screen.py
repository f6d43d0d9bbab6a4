"""What the user of train.py sees: progress, warnings, and the table at the end."""

import sys

from tqdm import tqdm

from lora import lora_parameters
from run.answers import rates
from system import processes
from system.errors import UserError


def on_screen() -> bool:
    """Return whether to show a progress bar."""
    return sys.stderr.isatty() and processes.rank() == 0


def show(bar, metrics, accuracy):
    """Set the figures of the progress bar; where there is none, print a line every five steps."""
    text = f"reward {metrics['reward']:.2f}  accuracy {accuracy:.2f}  gini {metrics['gini']:.2f}  "
    text += f"eff {metrics['effective_token_ratio']:.2f}  tok/s {metrics['tokens_per_second']:.0f}"
    bar.set_postfix_str(text)
    if bar.disable and metrics["step"] % 5 == 0:
        print(f"step {metrics['step']:4d}  {text}", flush=True)


def show_evaluation(step, result):
    """Print what an evaluation on the held-out problems found."""
    said = ", ".join(f"{key} {rate}" for key, rate in rates(result).items())
    tqdm.write(f"step {step:4d}  held-out {said}, {result['n']} problems")


def warn(history, model):
    """Warn of what would otherwise fail in silence; UserError when to continue is pointless."""
    last = history[-5:]
    if len(last) == 5 and all(row["reward"] == 0 for row in last):
        tqdm.write("WARNING: no reward in 5 steps: wrong prompt (--chat?), or problems too hard?")
    if last[-1]["truncated"] > 0.5:
        tqdm.write("WARNING: over half of the completions were cut off: raise --max-new-tokens")
    if last[-1]["skipped"]:
        tqdm.write("WARNING: the loss or gradient was not finite; this step was skipped")
    if len(last) == 5 and all(row["skipped"] for row in last):
        raise UserError("loss or gradient not finite in 5 steps in a row: lower --lr")
    if len(history) == 3 and any(row["groups_mixed"] for row in history):
        B = [p for name, p in lora_parameters(model).items() if "lora_B" in name]
        if not any(p.any() for p in B):
            tqdm.write("WARNING: LoRA's B is still zero after 3 steps: no gradient reaches it")


def summary(folder, history, evals, cfg):
    """Print the table at the end of a run, and what to try next."""

    def mean(key, rows):
        return f"{sum(row[key] for row in rows) / max(1, len(rows)):.3f}"

    before = rates(evals[0]) | dict(reward=mean("reward", history[:5]))
    after = rates(evals[-1]) | dict(reward=mean("reward", history[-5:]))
    print(f"\n{'':22}{'before':>23}{'after':>23}")
    for key in before:
        label = "reward, 5 steps" if key == "reward" else f"held-out {key}"
        print(f"{label:22}{before[key]:>23}{after[key]:>23}")
    gini = mean("gini", history)
    ratio = mean("effective_token_ratio", history)
    print(f"\n{cfg.credit}: Gini {gini}, effective-token ratio {ratio} (mean of the steps)")
    print(f"run folder: {folder}")
    print(f"next: python -m view {folder}  (shows which tokens received credit)")
    print(f"      python train.py --credit {'arca' if cfg.credit == 'uniform' else 'uniform'}")
