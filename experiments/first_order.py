"""What does a rule's update buy? The first-order expected improvement, from a few batches.

    python experiments/first_order.py --credit late            # one rule, in minutes
    python experiments/first_order.py --run RUN --steps 5 10   # all rules, into results/
    python experiments/first_order.py                          # the tables, from results/

**The measure.** J is the mean reward. A step that moves the adapter by a small d raises it, to
first order, by g* . d, where g* = grad J. A batch of B completions gives two vectors,

    g = (1/B) sum_i a_i sum_t grad log pi(y_it),    a_i = r_i - mean of the group's others
    u = sum_it c_it grad log pi(y_it),              c_it = A_i m_it / (B T_i)

g is the plain estimator (RLOO, no 1/T): E g = g*. u is what a rule hands to the optimizer: A_i is
GRPO's advantage, m_it the rule's multiplier. Of N independent batches we estimate

    raw gain      <g*, E u> / rms |u|        a step of fixed length along u
    AdamW's gain  lr <g*, E[u / sqrt(v)]>    v: the mean of u^2, coordinate by coordinate
    signal share  |E u|^2 / E |u|^2          the rest is variance between batches
    bias          cos(E u, g*)               1: the rule is right on average

**Why pairs.** g and u of one batch share their noise, so the mean of g_i . u_i is far above
<g*, E u>. Products of *different* batches are unbiased: mean_{i != j} g_i . u_j (a U-statistic),
and likewise |E u|^2 and |g*|^2. AdamW's v is that of the other N - 2 batches, so it is independent
of g_i and u_j; gradients are clipped for it as `update` clips them. Errors are jackknife errors:
everything, ratios included, is computed again without each batch.

**Where it comes from.** d_t = g* . grad log pi(y_t) is what making a token likelier is worth, so a
group of tokens has the share sum c_t d_t of the raw gain. A difference quotient of log pi along the
other batches' g gives d_t of all tokens. The noise of a part is sum (c_t (1 - p_t))^2: token
gradients as long as those for the logits, and orthogonal.
"""

import json
import random
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import grpo
from credit import METHODS, token_weights
from experiments.first_order_report import PARTS, by_rule, label, report, side
from experiments.rows import read_results, write_results
from experiments.truth import ROOT, open_run, train_run
from lora import lora_parameters
from run.metrics import CLASSES, step_classes
from system.errors import Parser, UserError, run_cli

BASE = ("uniform", 1.0)
UNSHARPENED = ("uniform", "delta", "gcpo_linear", "eapo", "forking", "entropy_advantage")
ALL = [(name, p) for name in METHODS for p in (1.0, 2.0) if p == 1 or name not in UNSHARPENED]
PLAIN = ("plain", 1.0)  # g itself, as if it were a rule
SHARED = "model steps prompts samples max_new_tokens temperature rank alpha lr advantage aggregate"
SHARED = SHARED.split()  # what all runs of a results file have in common
EPSILON = 1e-8  # AdamW's
NUDGE = 0.03  # how far the adapter is moved for d_t; a step of AdamW is 0.8 long


# ---- Statistics of N batches: (N + 1,), of all batches and without each of them -----------------
def means(x):
    """Return the means of x (N, ...) over its batches (N + 1, ...)."""
    total = x.sum(dim=0, keepdim=True)
    return torch.cat([total / len(x), (total - x) / (len(x) - 1)])


def pair_means(products):
    """Return the means of products (N, N) of different batches (N + 1,): the U-statistics."""
    N = len(products)
    products = products - products.diag().diag()
    without = products.sum() - products.sum(dim=0) - products.sum(dim=1)  # (N,)
    return torch.cat([products.sum()[None] / (N * (N - 1)), without / ((N - 1) * (N - 2))])


def adam_gains(G, U):
    """Return the means of g_i . u_j / sqrt(v) over i != j (N + 1,), of G and U (N, D), v being the
    mean of u^2 over the batches that are neither i nor j, nor left out. N is at least 4."""
    N = len(U)
    sums = torch.zeros(N + 1, dtype=torch.float64)
    for g, u in zip(G.split(2**13, dim=1), U.split(2**13, dim=1), strict=True):  # for the cache
        squares = u**2  # (N, d)
        total = squares.sum(dim=0)
        for i, j in combinations(range(N), 2):
            both = g[i] * u[j] + g[j] * u[i]  # (d,)
            rest = total - squares[i] - squares[j]
            v = torch.cat([rest[None] / (N - 2), (rest - squares) / (N - 3)])  # (N + 1, d)
            gains = (v.clamp(min=0) + EPSILON**2).rsqrt() @ both  # (N + 1,)
            gains[[i + 1, j + 1]] = 0
            sums += gains
    pairs = torch.tensor([N * (N - 1)] + [(N - 1) * (N - 2)] * N)
    return sums / pairs


def pooled(parts):
    """Return the sum of statistics of independent checkpoints: of all batches, and without each
    batch of each (1 + S N,)."""
    whole = sum(x[0] for x in parts)
    return torch.cat([whole[None], *(whole - x[0] + x[1:] for x in parts)])


def estimate(x, N):
    """Return [value, jackknife error] of a statistic (1 + S N,) of S sets of N batches."""
    left_out = x[1:].view(-1, N)
    away = left_out - left_out.mean(dim=1, keepdim=True)
    return [x[0].item(), ((N - 1) / N * (away**2).sum()).sqrt().item()]


def is_told(x):
    """Return whether an [estimate, error] is positive by two errors."""
    return x[0] > 2 * x[1]


def products(G, U, most):
    """Return a rule's statistics by name, each (N + 1,), from the plain G and its own U (N, D)."""
    lengths = U.norm(dim=1)
    clipped = U * (most / lengths).clamp(max=1)[:, None]
    return {
        "along": pair_means((G @ U.T).double()),  # <g*, E u>
        "own": pair_means((U @ U.T).double()),  # |E u|^2
        "true": pair_means((G @ G.T).double()),  # |g*|^2
        "size": means(lengths.double() ** 2),  # E |u|^2
        "adam": adam_gains(G, clipped),
        "clipped": means((lengths > most).double()),
    }


# ---- A batch -------------------------------------------------------------------------------------
def sample_batch(model, tokenizer, problems, cfg, step, batch):
    """Return a Rollout as training has them, of a seed of its own: independent of the run's
    batches, of those at other steps, and of the other batches here."""
    # A rule of the whole step, here any, has the sampler keep the entropy for it.
    cfg = replace(cfg, credit="forking", seed=cfg.seed + 10**6 * (step + 1) + 10**3 * batch)
    chosen = random.Random(cfg.seed).sample(problems, cfg.prompts)
    return grpo.sample_rollout(model, tokenizer, chosen, cfg, 1, compare=True)


def gradients(model, rollout, cfg, rules):
    """Return, by rule and for PLAIN, u (D,) and its coefficients c (B, T); one forward pass per
    micro-batch. Beside them p (B, T), the probability of each token that has a gradient."""
    # What is known before any pass.
    parameters = list(lora_parameters(model).values())
    tokens = rollout.completions.tokens
    advantages = grpo.group_advantages(rollout.rewards, cfg.advantage).flatten()  # (B,)
    plain = grpo.group_advantages(rollout.rewards, "rloo").flatten() / len(tokens)  # (B,)
    row_weight = grpo.row_weights(rollout.completions.lengths, cfg.aggregate)  # (B,)
    signals = grpo.sampled_signals(rollout, advantages)
    needed = {signal for name, _ in rules for signal in METHODS[name].reads}
    whole = [rule for rule in rules if METHODS[rule[0]].whole_step]
    early = {rule: token_weights(rule[0], signals, rule[1]) for rule in whole}  # (B, T)
    size = sum(x.numel() for x in parameters)
    found = {rule: torch.zeros(size) for rule in [*rules, PLAIN]}
    coefficients = {rule: torch.zeros(tokens.shape) for rule in found}
    p = torch.ones(tokens.shape)

    for rows in grpo.split(rollout, advantages != 0, cfg.micro_batch_tokens, model.device):
        # Each rule's coefficients, of the signals that one pass finds.
        batch, logps, signals_here = grpo.score(model, rollout, rows, needed, cfg)
        T = batch.mask.shape[1]
        here = replace(signals.rows(rows, T, model.device), **signals_here)
        p[rows, :T] = here.logp.exp().cpu()
        own = {PLAIN: plain[rows, None].to(logps) * batch.mask}
        weight = row_weight[rows, None].to(logps) * batch.mask
        for rule in rules:
            m = early[rule][rows, :T] if rule in early else token_weights(rule[0], here, rule[1])
            own[rule] = here.advantage[:, None] * m.to(logps) * weight

        # Their gradients.
        for rule, c in own.items():
            objective = grpo.policy_objective(logps, c).sum()
            parts = torch.autograd.grad(objective, parameters, retain_graph=True)
            found[rule] += parameters_to_vector(parts).cpu()
            coefficients[rule][rows, :T] = c.cpu()
    return found, coefficients, p


def token_worth(model, rollout, cfg, direction):
    """Return direction . grad log pi(y_t) (B, T) of the tokens that have a gradient, for a
    direction (D,) in LoRA space, by a central difference."""
    parameters = list(lora_parameters(model).values())
    start = parameters_to_vector(parameters).detach().clone()
    moved = NUDGE * direction / direction.norm().clamp(min=1e-30)
    has_gradient = (rollout.rewards != rollout.rewards[:, :1]).any(dim=1)
    chosen = has_gradient.repeat_interleave(rollout.rewards.shape[1])
    found = torch.zeros(rollout.completions.tokens.shape)
    with torch.no_grad():
        for rows in grpo.split(rollout, chosen, cfg.micro_batch_tokens, model.device):
            for sign in (1, -1):
                vector_to_parameters(start + sign * moved.to(start), parameters)
                _, logps, _ = grpo.score(model, rollout, rows, set(), cfg)
                found[rows, : logps.shape[1]] += sign * logps.cpu()
        vector_to_parameters(start, parameters)
    return found * direction.norm() / (2 * NUDGE)


def parts_of(completions, tokenizer):
    """Return which tokens are in which of PARTS (K, B, T)."""
    classes = step_classes(completions, tokenizer)
    mask = torch.arange(classes.shape[1]) < completions.lengths[:, None]
    first = torch.zeros_like(mask)
    first[:, 0] = True
    answer = (classes == CLASSES.index("answer")) & ~first
    end = (classes == CLASSES.index("eos")) & ~first
    by_class = [classes == i for i in range(5)]

    # Where a sentence or a formula begins: after a full stop, after a dollar sign.
    ids = completions.tokens.unique()
    pieces = tokenizer.pieces(ids.tolist())
    before = completions.tokens.roll(1, dims=1)
    stops, dollars = (
        torch.isin(before, ids[[piece.strip() == sign for piece in pieces]]) for sign in ".$"
    )
    by_place = [first | stops, dollars & ~first]
    return torch.stack([first, ~(first | answer | end), answer, end, *by_class, *by_place]) & mask


# ---- A checkpoint --------------------------------------------------------------------------------
def measure(opened, step, rules, N):
    """Return by rule its statistics at a checkpoint, (N + 1,) each, (N + 1, K) for `gain` and
    `noise` by part; opened: what open_run returned."""
    model, tokenizer, cfg, problems = opened
    G, U, batches = [], {rule: [] for rule in [*rules, PLAIN]}, []
    for batch in tqdm(range(N), desc=f"{cfg.credit}, seed {cfg.seed}, step {step}", mininterval=0):
        rollout = sample_batch(model, tokenizer, problems, cfg, step, batch)
        found, coefficients, p = gradients(model, rollout, cfg, rules)
        for rule, u in found.items():
            U[rule].append(u)
        rollout.completions.hidden = None  # megabytes
        batches.append((rollout, coefficients, p))
    U = {rule: torch.stack(found) for rule, found in U.items()}  # (N, D)
    G = U[PLAIN]
    gain, noise = {rule: [] for rule in U}, {rule: [] for rule in U}
    for (rollout, coefficients, p), others in zip(batches, means(G)[1:], strict=True):
        worth = token_worth(model, rollout, cfg, others)
        parts = parts_of(rollout.completions, tokenizer)
        for rule, c in coefficients.items():
            gain[rule].append((parts * (c * worth)).sum(dim=(1, 2)).double())
            noise[rule].append((parts * (c * (1 - p)) ** 2).sum(dim=(1, 2)).double())
    found = {}
    for rule in tqdm(U, desc="products", mininterval=0):
        by_part = {"gain": means(torch.stack(gain[rule])), "noise": means(torch.stack(noise[rule]))}
        found[rule] = products(G, U[rule], cfg.max_grad_norm) | by_part
    return found


def ratio(x, base, N):
    """Return the [value, error] of a statistic in units of another; None if that is not told
    from 0."""
    return estimate(x / base, N) if is_told(estimate(base, N)) else None


def summary(found, rule, N, lr):
    """Return the numbers of a rule in a checkpoint's statistics: [value, error] by name, most of
    them relative to uniform, or None where that cannot be told."""
    x, base = found[rule], found[BASE]
    raw = x["along"] / x["size"].sqrt()
    base_raw = base["along"] / base["size"].sqrt()
    row = {
        "adam": ratio(x["adam"], base["adam"], N),
        "points": estimate(100 * lr * x["adam"], N),
        "raw": ratio(raw, base_raw, N),
        "share": estimate(x["own"] / x["size"], N),
        "cosine": None,
        "length": estimate((x["size"] / base["size"]).sqrt(), N),
        "clipped": x["clipped"][0].item(),
    }
    if is_told(estimate(x["own"], N)) and is_told(estimate(x["true"], N)):
        row["cosine"] = estimate(x["along"] / (x["own"] * x["true"]).abs().sqrt(), N)
    for name in ("gain", "noise"):
        total = base[name][:, :4].sum(dim=1)  # of all tokens, uniform's
        row[name] = {part: ratio(x[name][:, k], total, N) for k, part in enumerate(PARTS)}
    return row


def rows_of(found, at, N, lr):
    """Return the rows of a results file that a checkpoint's statistics make; at: where it was."""
    rows = [at | dict(rule=label(rule)) | summary(found, rule, N, lr) for rule in found]
    return json.loads(json.dumps(rows), parse_float=lambda x: float(f"{float(x):.4g}"))  # rounded


def measure_run(folder, steps, N, out, rules):
    """Measure rules at steps of a run and add them to a results file, checkpoint by checkpoint;
    what it already has is not measured again."""
    about, rows = read_results(out) if out.exists() else ({}, [])
    for step in steps:
        opened = open_run(folder, step)
        cfg = opened[2]
        shared = {name: getattr(cfg, name) for name in SHARED} | dict(batches=N)
        if about not in ({}, shared):
            raise UserError(f"{out} holds runs of other settings than {folder}: give another --out")
        at = dict(trajectory=label((cfg.credit, cfg.sharpening)), seed=cfg.seed, step=step)
        if any(at.items() <= row.items() for row in rows):
            print(f"{at}: in {out} already", flush=True)
            continue
        about = shared
        rows += rows_of(measure(opened, step, rules, N), at, N, cfg.lr)
        write_results(out, about, rows)


# ---- One rule ------------------------------------------------------------------------------------
CAVEAT = """What this cannot tell: it is the first order of one step, on one seed's policies. No
curvature (real steps gain less), nothing of later phases or of where a run ends. It rates
divergence above uniform, and training did not agree: above is worth a run, no more."""


def score_rule(rule, folder, steps, N):
    """Measure a rule beside others at steps of a run, and print what it buys."""
    others = [BASE, ("permuted", rule[1]), ("arca", rule[1])]
    others = [other for other in others if other != rule]
    gains = {}  # of an AdamW step, by rule: a checkpoint after another
    for step in steps:
        opened = open_run(folder, step)
        found = measure(opened, step, list(dict.fromkeys([BASE, *others, rule])), N)
        print(by_rule(rows_of(found, dict(seed=0), N, opened[2].lr), f"Step {step}") + "\n")
        for name, x in found.items():
            gains.setdefault(name, []).append(x["adam"])
    base = pooled(gains[BASE])
    if not is_told(estimate(base, N)):
        return print("uniform's own gain is not told from 0: look at other steps, or more batches")
    print(f"An AdamW step of {label(rule)}, at steps {', '.join(map(str, steps))} together:")
    for other in others:
        value, error = estimate((pooled(gains[rule]) - pooled(gains[other])) / base, N)
        verdict = side(value - 2 * error, value + 2 * error)
        print(f"- {verdict} ({value:+.2f} ± {error:.2f} of uniform's gain): {label(other)}")
    print("\n" + CAVEAT)


# ---- The command line ----------------------------------------------------------------------------
def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--credit", default="", help="score this rule; default: all, into --out")
    parser.add_argument("--sharpening", type=float, default=1.0, help="of --credit")
    parser.add_argument("--run", default="", help="a run with --keep-checkpoints; default: its own")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10], help="of the run")
    known = {label(rule): rule for rule in ALL}
    text = "with --run: which, such as arca/2 (the number is the sharpening); default: all"
    parser.add_argument("--rules", nargs="+", choices=known, default=list(known), help=text)
    parser.add_argument("--batches", type=int, default=20, help="at each checkpoint")
    default = str(ROOT / "experiments/results/first_order.json")
    parser.add_argument("--out", default=default, help="the results of all rules, a JSON file")
    a = parser.parse_args(or_zero=("steps",))
    if a.credit and a.credit not in METHODS:
        add = f'METHODS["{a.credit}"] = Rule({a.credit})'
        names = f"there are {', '.join(METHODS)}"
        raise UserError(f"no credit rule {a.credit!r}: write it in credit.py, with {add}; {names}")
    torch.set_num_threads(1)  # so that sums are rounded alike
    if a.credit:
        flags = "--credit uniform --steps 10 --save-every 5 --keep-checkpoints 9 --eval-problems 0"
        folder = a.run or train_run(str(ROOT / "runs/first-order"), *flags.split())
        return score_rule((a.credit, a.sharpening), folder, a.steps, a.batches)
    if a.run:
        measure_run(a.run, a.steps, a.batches, Path(a.out), [known[name] for name in a.rules])
    report(*read_results(Path(a.out)))


if __name__ == "__main__":
    run_cli(main)
