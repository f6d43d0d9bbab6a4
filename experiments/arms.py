"""Why is ARCA slow, and what would perfect credit buy? Training with changed rules, seed by seed.

    python experiments/arms.py                # all runs that results/causal.json lacks, its tables
    python experiments/arms.py --arms answer_cut

**Why.** In the setting of table 1 (32 steps, rank 16, sharpening 2), paired with the sweep's
`uniform` and `arca` of the same seeds, which saw the same problems in the same order:

- `answer_cut`: ARCA, but no token of the boxed answer gets more than 1.
- `answer_only`: ARCA's multipliers in the boxed answer, 1 elsewhere.
- `first_halved`: ARCA, with half the multiplier of a completion's first token.
- `uniform_64`, `arca_64`: 64 problems a step instead of 16. If ARCA's loss is noise, the gap
  between the two closes; if ARCA is wrong on average, it stays.

A changed multiplier is not made up for elsewhere: the completion's mean is no longer one.

**Perfect credit** is the advantage delta_t of each token itself (truth.py). `true_delta` maximises

    (1/B) sum_i sum_t delta_it log pi(y_it)

with VinePPO's advantage (arXiv 2410.01679) in the plain sum over the tokens of all B completions:
no 1/T, no division by the group's deviation, no completion left out, and no clip of the gradient's
norm. (For `uniform` the clip at 1 does not bind, but its gradient is 1/T as long. To AdamW a factor
is nothing.) delta_t is that of 32 continuations of each start: right on average, with their noise.
`plain` is the same with one advantage for all tokens of a completion, its reward minus the mean of
the group's others: credit is all that the two differ in. They have the setting of `oracle.py
train`, 30 steps of 8 problems, and are paired with its arms: there `true` has weights in proportion
to |delta|, of mean one, times GRPO's advantage; `true_signed` has the sign of delta, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import credit
from data.problems import load_split, problems_of_step
from eval_math import evaluate
from experiments.rows import default_file, in_cell, read_results, values, write_results
from experiments.stats import crossed, ratio
from experiments.tables import said, table
from experiments.truth import grader, prefix_values
from grpo import group_advantages, sample_rollout, sampled_signals, update
from lora import add_lora, lora_parameters
from run.flags import load_base
from run.metrics import CLASSES, step_classes
from system.errors import Parser, UserError, run_cli
from system.files import read_json
from train import Settings, lr_at

SEEDS = (1, 2, 3, 4, 5)
CONTINUATIONS = 32  # of each start, where the truth is the credit
TABLE_1 = dict(steps=32, sharpening=2.0, eval_problems=500)
SUMMED = dict(steps=30, prompts=8, eval_problems=400, advantage="rloo", max_grad_norm=1e9)
ARMS = {  # settings of each arm's runs
    "answer_cut": dict(TABLE_1, credit="answer_cut"),
    "answer_only": dict(TABLE_1, credit="answer_only"),
    "first_halved": dict(TABLE_1, credit="first_halved"),
    "plain": dict(SUMMED, credit="plain"),
    "true_delta": dict(SUMMED, credit="true_delta"),
    "uniform_64": dict(TABLE_1, credit="uniform", prompts=64),
    "arca_64": dict(TABLE_1, credit="arca", prompts=64),
}
for rule, power in (("uniform", 1.0), ("surprisal", 1.0), ("arca", 1.0), ("arca", 2.0)):
    for factor in (0.25, 0.5, 2.0):
        own = dict(credit=rule, sharpening=power, lr=Settings.lr * factor)
        ARMS[f"{rule}_{power:g}_rate_{factor:g}"] = TABLE_1 | own
for bed in ("slips", "three", "format"):
    for name in ("uniform_1", "surprisal_1", "divergence_1", "permuted_2", "arca_1", "arca_2"):
        rule, power = name.split("_")
        own = dict(model=bed, data=bed, dtype="fp32", eval_problems=200)
        own.update(credit=rule, sharpening=float(power))
        ARMS[f"{bed}_{name}"] = TABLE_1 | own
        if bed == "three":
            ARMS[f"{bed}_{name}"]["max_new_tokens"] = 192
ARMS["three_cut_2"] = ARMS["three_arca_2"] | dict(credit="answer_cut")


# ---- The rules -----------------------------------------------------------------------------------
# Signals have no token classes: they come as the `noise` of the rollout, which these do not draw.


def answer_cut(signals, power):
    m = credit.arca(signals, power)
    inside = signals.noise == CLASSES.index("answer")
    return torch.where(inside, m.clamp(max=1), m)


def answer_only(signals, power):
    inside = signals.noise == CLASSES.index("answer")
    return torch.where(inside, credit.arca(signals, power), signals.mask.float())


def first_halved(signals, power):
    m = credit.arca(signals, power)
    return torch.cat([m[:, :1] / 2, m[:, 1:]], dim=1)


def plain(signals, power):
    """T for every token: the loss has 1/T."""
    return credit.lengths(signals.mask) * signals.mask


RULES = {
    "answer_cut": credit.Rule(answer_cut, ("residual", "noise")),
    "answer_only": credit.Rule(answer_only, ("residual", "noise")),
    "first_halved": credit.Rule(first_halved, ("residual",)),
    "plain": credit.Rule(plain),
}
# Each step brings these with its truth.
RULES |= dict.fromkeys(("true", "true_signed", "true_delta"), credit.Rule(None, whole_step=True))


def true_credit(arm, model, rollout, advantages, cfg, eos_ids, grade, n, step):
    """Return the advantages (B,) and multipliers (B, T) of an arm that knows the true delta, from n
    continuations of each start: in proportion to |delta| (`true`), to delta itself for every
    advantage (`true_signed`), or such that A m / T is delta (`true_delta`)."""
    mask = sampled_signals(rollout, advantages).mask
    multipliers = mask.float()
    if arm == "true_delta":  # every completion has something to say
        advantages = torch.ones_like(advantages)
    rows = advantages.nonzero()[:, 0]
    if not len(rows):
        return advantages, multipliers
    V, _ = prefix_values(model, rollout, rows, cfg, eos_ids, grade, n, 2, step)
    delta = V.mean(0).diff(dim=1)  # (b, t), of the longest of these rows
    inside = mask[rows, : delta.shape[1]]
    if arm == "true_delta":
        m = delta * credit.lengths(inside)
    else:
        m = credit.normalize_scores(delta.abs(), inside, 1)
    if arm == "true_signed":
        m = m * delta.sign() * advantages[rows, None].sign()
    multipliers[rows, : delta.shape[1]] = m
    return advantages, multipliers


# ---- A run ---------------------------------------------------------------------------------------


def train_arm(cfg, n=CONTINUATIONS):
    """Train as train.py does, with a rule of credit.py or of RULES. Returns the reward and the norm
    of the gradient at each step, and the greedy accuracy after."""
    # What train.py starts from.
    if cfg.credit in RULES:
        credit.METHODS[cfg.credit] = RULES[cfg.credit]
    model, tokenizer = load_base(cfg)
    train, held_out, _, _ = load_split(cfg, tokenizer)
    add_lora(model, cfg.rank, cfg.alpha, seed=cfg.seed)
    trained = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0)
    rewards, norms = [], []
    for step in range(1, cfg.steps + 1):
        # Completions and their advantages.
        problems = problems_of_step(train, cfg.prompts, cfg.seed, step)
        rollout = sample_rollout(model, tokenizer, problems, cfg, step)
        advantages = group_advantages(rollout.rewards, cfg.advantage).flatten()
        # What the arm has to know.
        if cfg.credit.startswith("true"):
            sampling = (tokenizer.eos_ids, grader(tokenizer, problems), n, step)
            truth = true_credit(cfg.credit, model, rollout, advantages, cfg, *sampling)
            advantages, multipliers = truth
            rule = lambda signals, power, found=multipliers: found  # noqa: E731
            credit.METHODS[cfg.credit] = credit.Rule(rule, whole_step=True)
        elif cfg.credit in RULES:
            rollout.noise = step_classes(rollout.completions, tokenizer)
        # The update.
        optimizer.param_groups[0]["lr"] = lr_at(step, cfg)
        metrics, _, _ = update(model, optimizer, rollout, advantages, cfg)
        rewards.append(round(rollout.rewards.mean().item(), 6))
        norms.append(round(metrics["grad_norm"], 4))
    prompts, golds = [p["prompt"] for p in held_out], [p["answer"] for p in held_out]
    last = (0, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    greedy = evaluate(model, tokenizer, prompts, golds, *last)[0]["greedy"] if prompts else None
    return dict(greedy=greedy, reward=rewards, grad_norm=norms)


def make(path, arms, seeds):
    """Add the runs of these arms that a results file lacks, seed by seed; return all rows. The file
    is written after each run."""
    about, rows = dict(arms=ARMS), []
    if path.exists():
        about, rows = read_results(path)
    if about != dict(arms=ARMS):
        raise UserError(f"{path} holds runs of other settings: move it away")
    done = {(row["arm"], row["seed"]) for row in rows}
    missing = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    for arm, seed in tqdm(missing, desc="runs", mininterval=0):
        found = train_arm(Settings(**ARMS[arm], seed=seed))
        rows.append(dict(arm=arm, seed=seed) | found)
        rows.sort(key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
        write_results(path, about, rows)
    return rows


# ---- The tables ----------------------------------------------------------------------------------


def with_stored(rows):
    """Return the rows, and those of the runs that they are paired with: the sweep's, and those of
    `oracle.py train`, whose arms get an 8 for their problems a step."""
    rows = list(rows)
    swept = read_results(default_file())[1]
    for cell in (("uniform", 16, 1.0), ("arca", 16, 2.0)):
        for seed, row in in_cell(swept, cell).items():
            greedy = np.mean(values(row, "greedy"))
            rows.append(dict(arm=cell[0], seed=seed, reward=row["reward"], greedy=greedy))
    for arm, found in read_json(default_file().with_name("oracle.json"))["trained"].items():
        rows += [run | dict(arm=f"{arm}_8", reward=run["rewards"]) for run in found["runs"]]
    return rows


def by_seed(rows, metric, arms):
    """Return a number of each arm's runs, (S, 1) an arm, over the seeds that all of them have: the
    greedy accuracy after, or the mean reward of all steps, or of the last ten (`late`)."""
    found = {arm: {} for arm in arms}
    for row in rows:
        curve = row["reward"][-10:] if metric == "late" else row["reward"]
        number = row["greedy"] if metric == "greedy" else np.mean(curve)
        found.get(row["arm"], {})[row["seed"]] = number
    seeds = sorted(set.intersection(*map(set, found.values())))
    return [np.array([[found[arm][seed]] for seed in seeds]) for arm in arms]


def shown(e):
    """An estimate as text, with the number of seeds if some are missing."""
    return said(e) if e.seeds == len(SEEDS) else f"{said(e)}, n = {e.seeds}"


def level(rows, metric, arm):
    """The mean of an arm over its seeds, with its interval, as text."""
    (x,) = by_seed(rows, metric, [arm])
    return shown(crossed(x)) if len(x) else "-"


def gap(rows, metric, arm, other):
    """An arm minus another, over the seeds of both, as text."""
    x, y = by_seed(rows, metric, [arm, other])
    return shown(crossed(x - y)) if len(x) else "-"


def share(rows, part, whole):
    """The share that the gap of two arms is of that of two others, in mean reward, as text."""
    a, b, c, d = by_seed(rows, "reward", [*part, *whole])
    return shown(ratio(a - b, c - d)) if len(a) else "-"


def tables(rows):
    """Return all tables as one text."""
    rows = with_stored(rows)
    loss = ("uniform", "arca")

    # ARCA changed: what the change gives back of ARCA's loss, or brings about.
    lines = []
    for arm in ("uniform", "arca", "answer_cut", "answer_only", "first_halved"):
        part = ("uniform", arm) if arm == "answer_only" else (arm, "arca")
        line = [arm, level(rows, "reward", arm), level(rows, "late", arm)]
        line += [gap(rows, "reward", arm, other) for other in loss]
        line.append("-" if arm in loss else share(rows, part, loss))
        lines.append([*line, gap(rows, "greedy", arm, "uniform")])
    heads = ["arm", "mean reward", "of the last ten", "minus uniform's", "minus ARCA's"]
    title = "ARCA (sharpening 2) changed: the share of its loss given back, or brought about"
    causal = table(title, [*heads, "share", "greedy minus uniform's"], lines)

    # Noise or bias.
    lines = [["ARCA minus uniform, 16 problems a step", gap(rows, "reward", "arca", "uniform")]]
    lines.append(["the same, 64", gap(rows, "reward", "arca_64", "uniform_64")])
    lines.append(["share that stays", share(rows, ("uniform_64", "arca_64"), loss)])
    for arm in loss:
        lines.append([f"{arm}, 64 minus 16", gap(rows, "reward", f"{arm}_64", arm)])
    noise = table("Noise or bias", ["", "mean reward"], lines)

    # Perfect credit.
    lines = []
    for arm in ("uniform_8", "true_8", "true_signed_8", "plain", "true_delta"):
        line = [arm]
        for metric in ("reward", "greedy"):
            line.append(level(rows, metric, arm))
            line += [gap(rows, metric, arm, other) for other in ("uniform_8", "plain")]
        lines.append(line)
    differences = ["minus uniform's", "minus plain's"]
    heads = ["arm", "mean reward", *differences, "greedy after", *differences]
    perfect = table("Perfect credit, 30 steps of 8 problems", heads, lines)
    return "\n\n".join([causal, noise, perfect])


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", default="", help="the results; default: results/causal.json")
    a = parser.parse_args()
    torch.set_num_threads(1)  # so that sums are rounded alike
    path = Path(a.out or default_file().with_name("causal.json"))
    print(tables(make(path, a.arms, a.seeds)))


if __name__ == "__main__":
    run_cli(main)
