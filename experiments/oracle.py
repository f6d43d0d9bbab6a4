"""Does a credit rule pay the tokens that decide the outcome? Measured against sampled truth.

    python experiments/oracle.py measure    # every rule against the truth, early and late in a run
    python experiments/oracle.py train      # weights in proportion to the size of the true credit
    python experiments/oracle.py report     # the tables again, from the results

--preset quick is a miniature of the first two. delta_t is what choosing token t was worth
(truth.py). Of each problem that has right and wrong completions (no others teach anything) one of
each is looked at. The decisive tenth of its tokens are those with the largest |delta|: a rule's
share of credit there is a tenth by chance, and a little more in short completions. Noise moves
tokens into that tenth, so its size is measured, too. Where delta lies is told by its square.
Intervals are from resampling the problems of one run. None of this is the value of an update:
first_order.py measures that.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import credit
from data.problems import problems_of_step
from experiments.arms import gap, level, train_arm
from experiments.stats import Estimate
from experiments.tables import said, table
from experiments.truth import all_signals, grader, open_run, prefix_values, train_run
from grpo import sample_rollout
from run.metrics import CLASSES, step_classes
from system.errors import Parser, UserError, run_cli
from system.files import read_json, write_json
from train import Settings

ROOT = Path(__file__).parent.parent
RUN = str(ROOT / "runs/oracle-arca")
STEPS = (10, 80)  # of the checkpoints that are measured
ARMS = ("uniform", "arca", "true", "true_signed")  # of training
SIDES = ("right", "wrong")
PRESETS = {
    "full": dict(batches=18, continuations=512, seeds=5, steps=30, prompts=8, eval_problems=400),
    "quick": dict(batches=2, continuations=64, seeds=2, steps=4, prompts=4, eval_problems=40),
}


# ---- Every rule against the truth ----------------------------------------------------------------
def share_on_top(m, x, mask):
    """Return the share of each row's credit m (b, T) on its tenth of tokens with the largest x; of
    tokens that tie for the last place each counts in part."""
    k = (credit.lengths(mask) / 10).ceil()  # (b, 1)
    x = x.masked_fill(~mask, -9.0)
    edge = x.sort(dim=1, descending=True).values.gather(1, k.long() - 1)
    above = x > edge
    tied = x == edge
    part = (k - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return (m * (above + tied * part)).sum(1) / m.sum(1).clamp(min=1e-12)


def score(m, delta, mask):
    """Return the Gini of multipliers m (b, T), and their share on the decisive tenth: (b, 2)."""
    return torch.stack([credit.gini(m, mask), share_on_top(m, delta.abs(), mask)], dim=1)


def score_rules(signals, classes, rows, V):
    """Return, of the completions in these rows (b,), where tokens and delta^2 lie (b, C), the noise
    and chance (b,), and the score (b, 2) of each rule; classes (B, T), V (2, b, T + 1) by half."""
    delta = V.diff(dim=2)  # (2, b, T)
    T = delta.shape[2]
    mask = signals.mask[rows, :T]
    inside = torch.nn.functional.one_hot(classes[rows, :T], len(CLASSES)) * mask[:, :, None]
    square = delta.prod(0)  # (b, T): delta^2, without the square of the noise
    error = delta.diff(dim=0)[0] / 2
    found = dict(tokens=inside.sum(1), delta=(square[:, :, None] * inside).sum(1))
    found["noise"] = (error**2).sum(1)
    mean = delta.mean(0)
    found["chance"] = share_on_top(mask.float(), mean.abs(), mask)
    for name in credit.METHODS:
        for power in (1, 2):
            m = credit.token_weights(name, signals, power)[rows, :T]
            found[f"{name}/{power}"] = score(m, mean, mask)
    # The truth as a rule: one half makes the weights, the other is what they are held against.
    one, other = delta
    found["true/1"] = (score(one.abs(), other, mask) + score(other.abs(), one, mask)) / 2
    return {key: x.numpy() for key, x in found.items()}


def chosen_rows(rewards):
    """Return the first right and the first wrong completion of each problem that has both, in turn,
    as rows (b,); rewards (P, G)."""
    right = rewards > 0
    mixed = right.any(dim=1) & ~right.all(dim=1)
    first = torch.stack([right.int().argmax(dim=1), right.int().argmin(dim=1)], dim=1)  # (P, 2)
    rows = first + rewards.shape[1] * torch.arange(len(rewards))[:, None]
    return rows[mixed].flatten()


def measure_batch(opened, batch, continuations):
    """Score every rule on completions as training samples them; None if no problem has right and
    wrong ones. opened: what open_run returned."""
    model, tokenizer, cfg, problems = opened
    at = cfg.steps + batch  # problems that the run has not seen
    problems = problems_of_step(problems, cfg.prompts, cfg.seed, at)
    rollout = sample_rollout(model, tokenizer, problems, cfg, at, compare=True)
    rows = chosen_rows(rollout.rewards)
    if not len(rows):
        return None
    sampling = (tokenizer.eos_ids, grader(tokenizer, problems), continuations)
    V, _ = prefix_values(model, rollout, rows, cfg, *sampling, step=at)
    signals = all_signals(model, rollout, cfg)
    return score_rules(signals, step_classes(rollout.completions, tokenizer), rows, V)


def bootstrap(x):
    """Return [mean, low, high] of x (P, n), n numbers of each of P problems: the 95 % interval is
    from 2000 draws of problems, with replacement."""
    means = np.asarray(x, dtype=float).mean(axis=1)  # (P,)
    picks = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [0.025, 0.975])
    return [round(float(value), 4) for value in (means.mean(), low, high)]


def summary(batches):
    """Return what the scores of all batches say together, as the results file has it."""
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    x = {key: column.reshape(-1, 2, *column.shape[1:]) for key, column in columns.items()}
    P = len(x["chance"])  # x: (P, 2, ...), by problem and side
    found = dict(completions=2 * P, problems=P, chance=bootstrap(x["chance"]))
    for name in ("delta", "noise"):
        square = x[name].sum(dtype=float) / x["tokens"].sum()
        found[f"{name}_rms"] = round(float(max(0.0, square) ** 0.5), 5)
    for name in ("tokens", "delta"):  # the shares of the classes
        sums = x[name].sum(axis=0, dtype=float)  # (2, C)
        shares = (sums / sums.sum(axis=1, keepdims=True)).round(4).tolist()
        by_side = [dict(zip(CLASSES, side, strict=True)) for side in shares]
        found[name] = dict(zip(SIDES, by_side, strict=True))
    rules = {key: scores for key, scores in x.items() if "/" in key}
    found["rules"] = {
        rule: dict(gini=bootstrap(scores[:, :, 0]), top=bootstrap(scores[:, :, 1]))
        for rule, scores in rules.items()
    }
    return found


def measure(folder, how):
    """Hold every rule against the truth, at checkpoints of a run."""
    opened = [open_run(folder, step) for step in STEPS]  # what is wrong with it shows at once
    found = {}
    for step, run in zip(STEPS, opened, strict=True):
        batches = tqdm(range(1, how["batches"] + 1), desc=f"step {step}", mininterval=0)
        scored = [measure_batch(run, batch, how["continuations"]) for batch in batches]
        scored = [scores for scores in scored if scores]
        if not scored:
            raise UserError(f"no problem with right and wrong completions at step {step}")
        found[str(step)] = summary(scored)
    return found


def make_run():
    """Train the run whose checkpoints are measured, unless it is there; return its folder."""
    new = ["--credit", "arca", "--save-every", "10", "--keep-checkpoints", "9"]
    return train_run(RUN, *new, "--eval-problems", "200", "--eval-samples", "0")


# ---- The size of the true credit as weights ------------------------------------------------------
def train(how):
    """Train with the truth as weights, beside uniform and ARCA, on the same problems."""
    settings = {name: how[name] for name in ("steps", "prompts", "eval_problems")}
    found = {arm: dict(runs=[]) for arm in ARMS}
    jobs = [(arm, seed) for arm in ARMS for seed in range(1, how["seeds"] + 1)]
    for arm, seed in tqdm(jobs, desc="runs", mininterval=0):
        run = train_arm(Settings(credit=arm, seed=seed, **settings))
        row = dict(arm=arm, seed=seed, rewards=run["reward"], greedy=run["greedy"])
        found[arm]["runs"].append(row)
    return found


# ---- Tables --------------------------------------------------------------------------------------
def stored(x):
    """Return an estimate of a results file, [mean, low, high], as text."""
    return said(Estimate(*x, p=math.nan, seeds=1))


def truth_tables(step, found):
    """Return, as text, what the rules pay and where the truth lies, at a step."""
    lines = [[rule, stored(x["gini"]), stored(x["top"])] for rule, x in found["rules"].items()]
    title = f"Step {step}: {found['completions']} completions of {found['problems']} problems, "
    title += f"rms of delta {found['delta_rms']:.4f}, of its noise {found['noise_rms']:.4f}; "
    title += f"the decisive tenth has {stored(found['chance'])} of the tokens"
    heads = ["rule/sharpening", "Gini", "credit on the decisive tenth"]
    rules = table(title, heads, lines)

    columns = [(key, side) for side in SIDES for key in ("tokens", "delta")]
    lines = []
    for name in CLASSES:
        shares = [found[key][side][name] for key, side in columns]
        lines.append([name, *(f"{100 * share:.1f} %" for share in shares)])
    heads = ["class", *(f"{key.replace('delta', 'delta^2')}, {side}" for key, side in columns)]
    return f"{rules}\n\n" + table(f"Step {step}: where tokens and delta^2 lie", heads, lines)


def training_table(trained):
    """Return, as text, what weights in proportion to |delta| buy; Student's t over seeds."""
    runs = [run for arm in trained.values() for run in arm["runs"]]
    rows = [run | dict(reward=run["rewards"]) for run in runs]
    lines = []
    for arm in ARMS:
        line = [arm]
        for metric in ("reward", "greedy"):
            line += [level(rows, metric, arm), gap(rows, metric, arm, "uniform")]
        lines.append(line)
    heads = ["weights", "mean reward", "minus uniform's", "greedy after", "minus uniform's"]
    return table("Training with the truth as weights", heads, lines)


def report(results):
    """Return all tables of a results file as one text."""
    found = [truth_tables(*x) for x in results.get("measured", {}).items()]
    if "trained" in results:
        found.append(training_table(results["trained"]))
    return "\n\n".join(found)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "train", "report"))
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--run", default="", help="a run folder; default: one that is made here")
    parser.add_argument("--out", default="", help="the results, a JSON file")
    a = parser.parse_args()
    torch.set_num_threads(1)  # so that sums are rounded alike
    default = ROOT / ("experiments/results" if a.preset == "full" else f"runs/oracle-{a.preset}")
    out = Path(a.out or default / "oracle.json")
    how = PRESETS[a.preset]
    results = read_json(out) if out.exists() or a.what == "report" else {}
    found = {}
    if a.what == "measure":
        found = dict(measured=measure(a.run or make_run(), how), measure_how=how)
    if a.what == "train":
        found = dict(trained=train(how), train_how=how)
    if found:
        results = read_json(out) if out.exists() else {}  # it may have grown meanwhile
        results |= found
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, results)
    print(report(results))


if __name__ == "__main__":
    run_cli(main)
