"""Training runs beyond the sweep's: rules changed, larger batches, other rates, other testbeds.

    python experiments/arms.py                     # all runs that results/arms.json lacks, tables
    python experiments/arms.py --arms answer_cut   # only these

Most have the setting of table 1 (32 steps of 16 problems, rank 16) and are paired with the sweep's
runs of the same seeds, which saw the same problems in the same order. A number after a rule is its
sharpening; `_long` runs have 80 steps.

**Why is ARCA slow?** `answer_cut` is ARCA, but no token of the boxed answer gets more than 1;
`answer_only` has ARCA's multipliers in the boxed answer and 1 elsewhere; `first_halved` halves that
of a completion's first token; `forks_paid` is `answer_cut`, but where a sentence begins no token
gets less than 1. (What is cut or added is not made up for elsewhere.) `arca_64` has 64 problems
a step instead of 16, `arca_2_rate_4` 4 times the learning rate. `slips_arca_2` and the like are
runs of other models (testbeds.md).

**Perfect credit**, in 30 steps of 8 problems: `true_8` pays in proportion to |delta| (truth.py),
with the mean one, and shares GRPO's advantage; `true_signed_8` has the sign of delta too.
`true_delta` has delta_t itself as the advantage of each token, as in VinePPO (arXiv 2410.01679):

    maximise (1/B) sum_i sum_t delta_it log pi(y_it)

over the tokens of all B completions, with no 1/T, no division by the group's deviation and no clip.
delta is that of 32 continuations of each start: right on average, with their noise. `plain` is the
same sum with one advantage for all tokens of a completion, its reward minus the mean of the group's
others: credit is all that `plain` and `true_delta` differ in.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from tqdm import tqdm

import credit
from data.problems import load_split, problems_of_step
from eval_math import evaluate
from experiments.first_order import PARTS, parts_of
from experiments.rows import RESULTS, by_seed, read_results, with_sweep, write_results
from experiments.stats import crossed, ratio
from experiments.tables import said, table
from experiments.truth import grader, prefix_values
from grpo import group_advantages, sample_rollout, sampled_signals, update
from lora import add_lora, lora_parameters
from run.flags import load_base
from run.metrics import CLASSES, step_classes
from system.errors import Parser, UserError, run_cli
from train import Settings, lr_at

SEEDS = (1, 2, 3, 4, 5)
CONTINUATIONS = 32  # of each start, where the truth is the credit
TABLE_1 = dict(steps=32, sharpening=2.0, eval_problems=500)
SHORT = dict(steps=30, prompts=8, eval_problems=400)
SUMMED = SHORT | dict(advantage="rloo", max_grad_norm=1e9)
RATED = ("uniform_1", "surprisal_1", "arca_1", "arca_2")
RATES = (0.25, 0.5, 2, 4)  # times the default
BEDS = ("slips", "three", "format")
BED_RULES = ("uniform_1", "surprisal_1", "divergence_1", "permuted_2", "arca_1", "arca_2")
BEST = ("uniform_1_rate_2", "surprisal_1_rate_2")  # their best rates
PERFECT = ("uniform_8", "arca_8", "true_8", "true_signed_8", "plain", "true_delta")
LOSS = ("uniform_1", "arca_2")
THREE = ("three_uniform_1", "three_arca_2")
SHARES = (  # the gap between two arms, in units of that between two others
    ("answer_cut", "arca_2", *LOSS),
    ("uniform_1", "answer_only", *LOSS),
    ("uniform_64", "arca_64", *LOSS),
    ("three_answer_cut_2", "three_arca_2", *THREE),
    ("three_forks_paid_2", "three_arca_2", *THREE),
)


# ---- The arms ------------------------------------------------------------------------------------
def settings_of(name, **more):
    """Return the settings of table 1 with a rule and its sharpening, such as arca_2."""
    rule, power = name.rsplit("_", 1)
    return TABLE_1 | dict(credit=rule, sharpening=float(power)) | more


def all_arms():
    """Return {name: settings that are not the defaults}."""
    arms = {
        name: settings_of(f"{name}_2") for name in ("answer_cut", "answer_only", "first_halved")
    }
    arms |= {f"{rule}_64": settings_of(f"{rule}_2", prompts=64) for rule in ("uniform", "arca")}
    arms |= {name: SHORT | dict(credit=name.removesuffix("_8")) for name in PERFECT[:4]}
    arms |= {name: SUMMED | dict(credit=name) for name in PERFECT[4:]}
    arms |= {f"{name}_long": settings_of(name, steps=80) for name in LOSS}
    for name in RATED:
        for rate in RATES:
            arms[f"{name}_rate_{rate}"] = settings_of(name, lr=Settings.lr * rate)
    for bed in BEDS:
        own = dict(model=bed, data=bed, dtype="fp32", eval_problems=200)
        if bed == "three":
            own["max_new_tokens"] = 192
        arms |= {f"{bed}_{name}": settings_of(name, **own) for name in BED_RULES}
    for rule in ("answer_cut", "forks_paid"):
        arms[f"three_{rule}_2"] = arms["three_arca_2"] | dict(credit=rule)
    return arms


def seeds_of(arm):
    """Return the seeds of an arm: three of a long run, and where a learning rate is looked for."""
    return SEEDS[:3] if "_rate_" in arm or arm.endswith("_long") else SEEDS


ARMS = all_arms()


# ---- The rules -----------------------------------------------------------------------------------
# Signals have no token classes: they come as the `noise` of the rollout, which these do not draw.
START = len(CLASSES)  # the class of a token that begins a sentence


def answer_cut(signals, power):
    m = credit.arca(signals, power)
    inside = signals.noise == CLASSES.index("answer")
    return torch.where(inside, m.clamp(max=1), m)


def forks_paid(signals, power):
    m = answer_cut(signals, power)
    return torch.where(signals.noise == START, m.clamp(min=1), m)


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
    "forks_paid": credit.Rule(forks_paid, ("residual", "noise")),
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
    """Train as train.py does, with a rule of credit.py or of RULES. Returns the reward at
    each step, and the greedy accuracy after."""
    # What train.py starts from.
    if cfg.credit in RULES:
        credit.METHODS[cfg.credit] = RULES[cfg.credit]
    model, tokenizer = load_base(cfg)
    train, held_out, _, _ = load_split(cfg, tokenizer)
    add_lora(model, cfg.rank, cfg.alpha, seed=cfg.seed)
    trained = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0)
    rewards = []
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
            starts = parts_of(rollout.completions, tokenizer)[PARTS.index("sentence")]
            rollout.noise = step_classes(rollout.completions, tokenizer).masked_fill(starts, START)
        # The update.
        optimizer.param_groups[0]["lr"] = lr_at(step, cfg)
        update(model, optimizer, rollout, advantages, cfg)
        rewards.append(round(rollout.rewards.mean().item(), 6))
    prompts, golds = [p["prompt"] for p in held_out], [p["answer"] for p in held_out]
    last = (0, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    greedy = evaluate(model, tokenizer, prompts, golds, *last)[0]["greedy"] if prompts else None
    return dict(greedy=greedy, reward=rewards)


def make(path, arms, seeds=SEEDS):
    """Add the runs of these arms that a results file lacks, seed by seed; return all rows. It is
    written after each run."""
    about, rows = dict(arms=ARMS), []
    if path.exists():
        about, rows = read_results(path)
    if about != dict(arms=ARMS):
        raise UserError(f"{path} holds runs of other settings: move it away")
    done = {(row["arm"], row["seed"]) for row in rows}
    wanted = [(arm, seed) for seed in seeds for arm in arms if seed in seeds_of(arm)]
    for arm, seed in tqdm([run for run in wanted if run not in done], desc="runs", mininterval=0):
        found = train_arm(Settings(**ARMS[arm], seed=seed))
        rows.append(dict(arm=arm, seed=seed) | found)
        rows.sort(key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
        write_results(path, about, rows)
    return rows


# ---- The tables ----------------------------------------------------------------------------------
def difference(rows, metric, arm, other=None):
    """An arm, or an arm minus another, over the seeds that there are, as text."""
    x, *less = by_seed(rows, metric, [arm, other] if other else [arm])
    return said(crossed(x - sum(less)))


def group_table(rows, title, arms, others):
    """Return a table of arms: each by itself, and minus others."""
    lines = []
    for arm in arms:
        rewards = [difference(rows, "reward", arm, other) for other in (None, *others)]
        greedy = [difference(rows, "greedy", arm, other) for other in (None, others[0])]
        lines.append([arm, *rewards, *greedy])
    minus = [f"minus {other}" for other in others]
    return table(title, ["arm", "mean reward", *minus, "greedy after", minus[0]], lines)


def share_table(rows):
    lines = []
    for arms in SHARES:
        a, b, c, d = by_seed(rows, "reward", arms)
        share = said(ratio(a - b, c - d)) if len(a) else "missing"
        lines.append([f"{arms[0]} minus {arms[1]}", f"{arms[2]} minus {arms[3]}", share])
    return table("Shares of a gap in mean reward", ["gap", "of", "share"], lines)


def tables(rows):
    """Return all tables as one text."""
    rows = with_sweep(rows)
    groups = {
        "ARCA changed": ([*LOSS, "answer_cut", "answer_only", "first_halved"], LOSS),
        "80 steps": ([f"{name}_long" for name in LOSS], ["uniform_1_long"]),
        "Larger batches": (["uniform_64", "arca_64"], ("uniform_64", *LOSS)),
        "Perfect credit": (PERFECT, ("uniform_8", "plain")),
    }
    for name in RATED:
        rates = [f"{name}_rate_{rate}" for rate in sorted((*RATES, 1))]
        groups[f"{name}, learning rate"] = (rates, BEST)
    for bed in BEDS:
        others = [f"{bed}_{name}" for name in ("uniform_1", "permuted_2", "arca_2")]
        groups[bed] = ([arm for arm in ARMS if arm.startswith(bed)], others)
    parts = [group_table(rows, title, *group) for title, group in groups.items()]
    return "\n\n".join([*parts, share_table(rows)])


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--out", default="", help="the results; default: results/arms.json")
    a = parser.parse_args()
    torch.set_num_threads(1)  # so that sums are rounded alike
    path = Path(a.out or RESULTS / "arms.json")
    print(tables(make(path, a.arms, a.seeds)))


if __name__ == "__main__":
    run_cli(main)
