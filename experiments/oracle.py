"""Does a credit rule pay the tokens that decide the outcome? Measured against sampled truth.

    python experiments/oracle.py measure    # every rule against the truth, early and late in a run
    python experiments/oracle.py train      # the size of the true credit as the weight
    python experiments/oracle.py draw       # the tables and figures again, from the results

Both take minutes on two cores and say how long is left; --preset quick is a miniature of both.

**Measures**, over completions of problems with right and wrong ones (no others teach anything), one
of each a problem, with 95 % intervals from resampling problems:

- `top`: the share of the credit on the tenth of the tokens with the largest |delta|. By chance it
  is a tenth, and a little more in short completions. Noise moves tokens into that tenth, so its
  size is measured too (`noise_rms`).
- `corr_halves`: Spearman's correlation of a completion's weights with delta_a delta_b, of two
  halves of the continuations. |delta| would flatter a rule that pays uncertain tokens, which have
  more noise; the product is without that bias: noise makes it positive as often as negative. But
  beside a truth noise lowers the correlation, and more so for weights without ties: of a mask, such
  as forking's, and of a smooth rule it should not be compared.

Neither is the value of an update: experiments/first_order.py measures that.
"""

import multiprocessing
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from tqdm import tqdm

import credit
from data.problems import problems_of_step
from experiments.arms import train_arm
from experiments.oracle_report import as_text, by_side, compare_arms, draw
from experiments.truth import all_signals, grader, open_run, prefix_values, train_run
from grpo import sample_rollout
from run.metrics import CLASSES, rank_correlation, step_classes
from system import files
from system.errors import Parser, UserError, run_cli
from train import Settings

ROOT = Path(__file__).parent.parent
RUN = str(ROOT / "runs/oracle-arca")
FULL = dict(
    steps=[10, 80],
    batches=18,
    pairs=1,
    continuations=512,
    least=64,
    train_steps=30,
    train_prompts=8,
    seeds=5,
    train_continuations=32,
    eval_problems=400,
)
QUICK = dict(
    steps=[10, 80],
    batches=2,
    pairs=1,
    continuations=64,
    least=16,
    train_steps=4,
    train_prompts=4,
    seeds=2,
    train_continuations=16,
    eval_problems=40,
)
PRESETS = dict(full=FULL, quick=QUICK)


# ---- Every rule against the truth ----------------------------------------------------------------


def share_on_top(m, x, mask):
    """The share of each row's credit m (b, T) on its tenth of tokens with the largest x; of tokens
    that tie for the last place each counts in part."""
    k = (credit.lengths(mask) / 10).ceil()  # (b, 1)
    x = x.masked_fill(~mask, -9.0)
    edge = x.sort(dim=1, descending=True).values.gather(1, k.long() - 1)
    above, tied = x > edge, x == edge
    part = (k - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return (m * (above + tied * part)).sum(1) / m.sum(1).clamp(min=1e-12)


def score(m, delta, mask, halves=None):
    """What the weights m (b, T) of completions achieve against delta (b, T): (b,)s by name; with
    halves (2, b, T) also against their product."""
    found = dict(gini=credit.gini(m, mask), ratio=credit.effective_token_ratio(m, mask))
    found["top"] = share_on_top(m, delta.abs(), mask)
    if halves is not None:
        found["corr_halves"] = rank_correlation(m, halves.prod(0), mask)
    return found


def score_rules(rollout, signals, classes, rows, V):
    """Return, per completion, what it is (`about`), and by rule what its weights achieve; lists of
    (b,). classes (B, T) are those of the tokens."""
    delta = V.diff(dim=2)  # (2, b, T)
    T = delta.shape[2]
    right = rollout.rewards.flatten()[rows]
    mask = signals.mask[rows, :T]
    classes = classes[rows, :T]
    mean = delta.mean(0)  # (b, T)
    noise = delta.diff(dim=0)[0] / 2
    about = dict(right=right, tokens=mask.sum(1), prompt_value=V[:, :, 0].mean(0))
    about.update(size=delta.prod(0).sum(1), noise=(noise**2).sum(1))
    about["chance"] = share_on_top(mask.float(), mean.abs(), mask)
    for i, name in enumerate(CLASSES):
        inside = mask & (classes == i)
        about |= {f"tokens/{name}": inside.sum(1), f"size/{name}": (delta.prod(0) * inside).sum(1)}
    rules = {}
    for name in credit.METHODS:
        for power in (1, 2):
            multipliers = credit.token_weights(name, signals, power)[rows, :T]
            rules[f"{name}/{power}"] = score(multipliers, mean, mask, delta)
    two = [score(delta[i].abs(), delta[1 - i], mask) for i in (0, 1)]  # one half's, on the other's
    rules["true/1"] = {key: (two[0][key] + two[1][key]) / 2 for key in two[0]}
    plain = lambda group: {key: x.tolist() for key, x in group.items()}  # noqa: E731
    return dict(about=plain(about), rules={name: plain(x) for name, x in rules.items()})


def chosen_rows(rewards, pairs):
    """The first `pairs` right and wrong completions of each problem that has both, as rows."""
    G = rewards.shape[1]
    has_spread = (rewards != rewards[:, :1]).any(dim=1)  # (P,)
    rows = []
    for p in has_spread.nonzero()[:, 0].tolist():
        for side in (rewards[p] > 0, rewards[p] <= 0):
            rows += [p * G + i for i in side.nonzero()[:pairs, 0].tolist()]
    return torch.tensor(rows, dtype=torch.long)


def measure_batch(job):
    """Every rule on a batch of completions as training samples them, at a checkpoint of a run."""
    folder, step, batch, how = job
    model, tokenizer, cfg, problems = open_run(folder, step)
    at = cfg.steps + batch  # problems that the run has not seen
    problems = problems_of_step(problems, cfg.prompts, cfg.seed, at)
    rollout = sample_rollout(model, tokenizer, problems, cfg, at, compare=True)
    signals = all_signals(model, rollout, cfg)
    rows = chosen_rows(rollout.rewards, how["pairs"])
    if not len(rows):
        return None
    grade = grader(tokenizer, problems)
    sampling = (grade, how["continuations"], how["least"], at)
    V, _ = prefix_values(model, rollout, rows, cfg, tokenizer.eos_ids, *sampling)
    classes = step_classes(rollout.completions, tokenizer)
    found = score_rules(rollout, signals, classes, rows, V)
    found["about"]["group"] = (batch * cfg.prompts + rows // cfg.samples).tolist()
    return found


# ---- A run and its checkpoints -------------------------------------------------------------------


def make_run():
    """The run whose checkpoints are measured, unless it is there; one cut short goes on. Returns
    its folder."""
    new = ["--credit", "arca", "--save-every", "10", "--keep-checkpoints", "9"]
    return train_run(RUN, *new, "--eval-problems", "200", "--eval-samples", "0")


# ---- The size of the true credit as weights ------------------------------------------------------


def train_job(job):
    """Train with one rule and one seed: the reward of each step and the greedy accuracy after."""
    arm, seed, how = job
    cfg = Settings(credit=arm, seed=seed, steps=how["train_steps"], prompts=how["train_prompts"])
    cfg.eval_problems = how["eval_problems"]
    found = train_arm(cfg, how["train_continuations"])
    return dict(arm=arm, seed=seed, rewards=found["reward"], greedy=found["greedy"])


# ---- The command line ----------------------------------------------------------------------------


def ready():
    """In each process: one thread, so that sums are rounded alike; Ctrl-C is for the first one."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_jobs(work, jobs, processes):
    """work(job) of each job, in their order; the bar says how long is left."""
    with multiprocessing.get_context("spawn").Pool(processes, ready) as pool:
        return list(tqdm(pool.imap(work, jobs), total=len(jobs), desc="jobs", mininterval=0))


def measure(how, folder, processes):
    """Every rule against the truth, at some checkpoints of a run."""
    for step in how["steps"]:
        open_run(folder, step)  # what is wrong with it shows now, and not in another process
    batches = range(1, how["batches"] + 1)
    jobs = [(folder, step, batch, how) for batch in batches for step in how["steps"]]
    done = run_jobs(measure_batch, jobs, processes)
    found = {}
    for step in how["steps"]:
        batches = [x for job, x in zip(jobs, done, strict=True) if job[1] == step and x]
        if not batches:
            raise UserError(f"no problem with right and wrong completions at step {step}")
        found[str(step)] = by_side(batches)
    return found


def train(how, processes):
    """Training with the truth as weights, beside uniform and ARCA."""
    arms = ("true", "true_signed", "uniform", "arca")  # the long ones first
    jobs = [(arm, seed, how) for arm in arms for seed in range(1, how["seeds"] + 1)]
    return compare_arms(run_jobs(train_job, jobs, processes))


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "train", "draw"))
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--run", default="", help="a run folder; default: one that is made here")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", default="", help="the results, a JSON file; figures go beside it")
    a = parser.parse_args()
    default = ROOT / ("experiments/results" if a.preset == "full" else f"runs/oracle-{a.preset}")
    out, how = Path(a.out or default / "oracle.json"), PRESETS[a.preset]
    results = files.read_json(out) if out.exists() or a.what == "draw" else {}
    if a.what == "measure":
        results["measured"] = measure(how, a.run or make_run(), a.processes)
    if a.what == "train":
        results["trained"] = train(how, a.processes)
    if a.what != "draw":
        out.parent.mkdir(parents=True, exist_ok=True)
        results |= {f"{a.what}_how": how}
        files.write_whole(out, as_text(results).encode())
    draw(results, out.parent)


if __name__ == "__main__":
    run_cli(main)
