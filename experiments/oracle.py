"""Does a credit rule pay the tokens that decide the outcome? Measured against sampled truth.

    python experiments/oracle.py measure    # early and late in a run
    python experiments/oracle.py report     # the tables again, from the results

delta_t is what choosing token t was worth (truth.py). The decisive tenth of a completion's tokens
has the largest |delta|; noise moves tokens into it, so its size is measured, too. What an update is
worth, first_order.py measures.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

import credit
from data.problems import problems_of_step
from experiments.rows import RESULTS
from experiments.stats import Estimate
from experiments.tables import said, table
from experiments.truth import ROOT, all_signals, grader, open_run, prefix_values, train_run
from grpo import sample_rollout
from run.metrics import CLASSES, step_classes
from system.errors import Parser, UserError, run_cli
from system.files import read_json, write_json

STEPS = (10, 80)  # of the checkpoints that are measured
SIDES = ("right", "wrong")
BATCHES, CONTINUATIONS = 18, 512  # at each checkpoint; of each start


def score(m, delta, mask):
    """Return the Gini of multipliers m (b, T), and their share on the decisive tenth: (b, 2). Of
    tokens that tie for the last place in it each counts in part."""
    k = (credit.lengths(mask) / 10).ceil()  # (b, 1)
    size = delta.abs().masked_fill(~mask, -1.0)
    edge = size.sort(dim=1, descending=True).values.gather(1, k.long() - 1)
    above = size > edge
    tied = size == edge
    part = (k - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    top = (m * (above + tied * part)).sum(1) / m.sum(1).clamp(min=1e-12)
    return torch.stack([credit.gini(m, mask), top], dim=1)


def score_rules(signals, classes, rows, V):
    """Return, of the completions in these rows (b,), where tokens and delta^2 lie (b, C), the noise
    (b,), and the score (b, 2) of each rule; classes (B, T), V (2, b, T + 1) by half."""
    delta = V.diff(dim=2)  # (2, b, T)
    T = delta.shape[2]
    mask = signals.mask[rows, :T]
    # Where tokens and delta^2 lie, and how large the noise is.
    inside = one_hot(classes[rows, :T], len(CLASSES)) * mask[:, :, None]  # (b, T, C)
    square = delta.prod(0)  # (b, T): delta^2, without the square of the noise
    error = delta.diff(dim=0)[0] / 2
    found = dict(tokens=inside.sum(1), noise=(error**2).sum(1))
    found["delta"] = (square[:, :, None] * inside).sum(1)
    # The rules.
    for name, power in product(credit.METHODS, (1, 2)):
        m = credit.token_weights(name, signals, power)[rows, :T]
        found[f"{name}/{power}"] = score(m, delta.mean(0), mask)
    # The truth as a rule: one half makes the weights, the other is what they are held against.
    one, other = delta
    forth = score(one.abs(), other, mask)
    back = score(other.abs(), one, mask)
    found["true/1"] = (forth + back) / 2
    return {key: x.numpy() for key, x in found.items()}


def chosen_rows(rewards):
    """Return the first right and first wrong completion of each problem that has both, (b,)."""
    right = rewards > 0  # (P, G)
    mixed = right.any(dim=1) & ~right.all(dim=1)
    first = torch.stack([right.int().argmax(dim=1), right.int().argmin(dim=1)], dim=1)  # (P, 2)
    rows = first + rewards.shape[1] * torch.arange(len(rewards))[:, None]
    return rows[mixed].flatten()


def bootstrap(x):
    """Return [mean, low, high] of x (P, n): 95 % over 2000 draws of problems, with replacement."""
    means = np.asarray(x, dtype=float).mean(axis=1)  # (P,)
    picks = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [0.025, 0.975])
    return [round(float(value), 4) for value in (means.mean(), low, high)]


def summary(batches):
    """Return what the scores of all batches say together, as the results file has it."""
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    x = {key: column.reshape(-1, 2, *column.shape[1:]) for key, column in columns.items()}
    P = len(x["noise"])  # x: (P, 2, ...), by problem and side
    found = dict(completions=2 * P, problems=P)
    for name in ("delta", "noise"):
        square = x[name].sum(dtype=float) / x["tokens"].sum()
        found[f"{name}_rms"] = round(float(max(0.0, square) ** 0.5), 5)
    for name in ("tokens", "delta"):  # the shares of the classes
        found[name] = {}
        for side, sums in zip(SIDES, x[name].sum(axis=0, dtype=float), strict=True):
            shares = (sums / sums.sum()).round(4).tolist()
            found[name][side] = dict(zip(CLASSES, shares, strict=True))
    found["rules"] = {}
    for rule in (key for key in x if "/" in key):
        gini, top = x[rule][..., 0], x[rule][..., 1]
        found["rules"][rule] = dict(gini=bootstrap(gini), top=bootstrap(top))
    return found


def measure(folder, batches, continuations):
    """Hold every rule against the truth, at checkpoints of a run; return the results file."""
    found = {}
    for step in STEPS:
        model, tokenizer, cfg, train = open_run(folder, step)
        scored = []
        for batch in tqdm(range(1, batches + 1), desc=f"step {step}", mininterval=0):
            # Completions as training samples them, of problems that the run has not seen.
            at = cfg.steps + batch
            problems = problems_of_step(train, cfg.prompts, cfg.seed, at)
            rollout = sample_rollout(model, tokenizer, problems, cfg, at, compare=True)
            rows = chosen_rows(rollout.rewards)
            if not len(rows):
                continue
            # What its tokens were worth, and what the rules pay them.
            sampling = (tokenizer.eos_ids, grader(tokenizer, problems), continuations)
            V, _ = prefix_values(model, rollout, rows, cfg, *sampling, step=at)
            signals = all_signals(model, rollout, cfg)
            classes = step_classes(rollout.completions, tokenizer)
            scored.append(score_rules(signals, classes, rows, V))
        if not scored:
            raise UserError(f"no problem with right and wrong completions at step {step}")
        found[str(step)] = summary(scored)
    return dict(batches=batches, continuations=continuations, measured=found)


def make_run():
    """Train the run whose checkpoints are measured, unless it is there; return its folder."""
    flags = "--credit arca --save-every 10 --keep-checkpoints 9 --eval-problems 200"
    return train_run(str(ROOT / "runs/oracle-arca"), *flags.split(), "--eval-samples", "0")


def report(results):
    """Return, as text, what the rules pay and where the truth lies, at every step measured."""
    tables = []
    for step, found in results["measured"].items():
        title = f"Step {step}: {found['completions']} completions of {found['problems']} problems, "
        title += f"rms of delta {found['delta_rms']:.4f}, of its noise {found['noise_rms']:.4f}"
        heads = ["rule/sharpening", "Gini", "credit on the decisive tenth"]
        lines = []
        for rule, x in found["rules"].items():
            lines.append([rule, said(Estimate(*x["gini"])), said(Estimate(*x["top"]))])
        tables.append(table(title, heads, lines))

        heads = ["class", "tokens, right", "delta^2, right", "tokens, wrong", "delta^2, wrong"]
        lines = []
        for name in CLASSES:
            shares = [found[key][side][name] for side in SIDES for key in ("tokens", "delta")]
            lines.append([name, *(f"{100 * share:.1f} %" for share in shares)])
        tables.append(table(f"Step {step}: where tokens and delta^2 lie", heads, lines))
    return "\n\n".join(tables)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "report"))
    a = parser.parse_args()
    torch.set_num_threads(1)  # so that sums are rounded alike
    if a.what == "measure":
        write_json(RESULTS / "oracle.json", measure(make_run(), BATCHES, CONTINUATIONS))
    print(report(read_json(RESULTS / "oracle.json")))


if __name__ == "__main__":
    run_cli(main)
