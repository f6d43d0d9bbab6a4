"""What the paper's theory says (arXiv 2606.00257, section 4), measured on a trained adapter.

    python experiments/theory.py    # a minute after the run of experiments/oracle.py is there

Every completion is scored again with the adapter scaled by c, from 0.001 to 10 (1 is as trained). w
are weights that sum to one, (a_t + eps) / sum_k (a_k + eps); beta is the largest residual ||dh_t||
of a completion, L the largest singular value of the head.

**Proposition 1**: ||w_surprisal - w_surprisal,base||_1 <= 4 L beta / sum_t a_t,base. Two steps give
it: a token's log-prob moves by at most 2 L beta, and for scores that move by d_t weights move by at
most 2 sum_t d_t / sum_t a_t. But the sum over T tokens is T times 2 L beta, so what follows is
4 T L beta / sum_t a_t,base; the bound as stated (`stated`) lacks T, and tests/test_theory.py has a
case that it excludes. `proved` has it. An L1 distance is at most 2: a larger bound says nothing.

**Proposition 2**: divergence scores are at most 2 L beta. If they are far below eps the weights
are uniform, and T eps (w_t - 1/T) tends to a_t - mean a; if eps is far below them, the weights are
those without it, whatever the scale, though the scores themselves vanish.

**Scale**: to first order in c the residual is c times a fixed vector, so ARCA's weights do not
depend on c. Layers are not linear, and the final norm is not, so this must fail for a large c.
Divergence is |log pi - log pi_base|, to first order c times a fixed number: no less invariant.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import credit
from data.problems import problems_of_step
from experiments.oracle import ROOT, RUN, make_run
from experiments.oracle_report import bootstrap, mean_of
from experiments.truth import all_signals, open_run
from grpo import sample_rollout
from lora import lora_layers
from system import files
from system.errors import Parser, run_cli

SCALES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
SMALL = 0.01  # the scale that stands for the limit: below it rounding shows
FLOORS = [10.0**k for k in range(-6, 4)]  # eps, in units of a completion's mean score
RULES = ("surprisal", "entropy_reduction", "divergence", "arca")


@contextmanager
def scaled(model, c):
    """Inside, the adapter's correction is c times what it is."""
    layers = lora_layers(model).values()
    before = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale *= c
        yield model
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scale = scale


def floored(scores, mask, eps):
    """The paper's weights (a_t + eps) / sum_k (a_k + eps), (B, T), 0 outside the mask."""
    raised = (scores.double() + eps) * mask
    return raised / raised.sum(dim=1, keepdim=True)


def apart(a, b):
    """The L1 distance (B,) of weights (B, T): 0 to 2."""
    return (a - b).abs().sum(dim=1)


def surprisal_bounds(head, beta, base_scores, mask):
    """Proposition 1 as stated and as it follows, (B,) each; head (V, D), beta (B,)."""
    L = torch.linalg.matrix_norm(head.double(), ord=2)
    stated = 4 * L * beta / (base_scores.double() * mask).sum(dim=1)
    return stated, stated * mask.sum(dim=1)


def weights(name, signals):
    """A rule's weights (B, T), which sum to one."""
    m = credit.token_weights(name, signals).double()
    return m / m.sum(dim=1, keepdim=True).clamp(min=1e-300)


def at_scale(model, rollout, cfg, c, limit):
    """Numbers (B,) by name of every completion, with the adapter scaled by c; limit: the signals at
    the scale that stands for c -> 0."""
    with scaled(model, c):
        signals = all_signals(model, rollout, cfg)
    mask, beta = signals.mask, signals.residual.amax(dim=1).double()
    base = floored(-signals.ref_logp, mask, 0)
    stated, proved = surprisal_bounds(model.lm_head.weight, beta, -signals.ref_logp, mask)
    moved = apart(floored(-signals.logp, mask, 0), base)
    shift = (signals.logp - signals.ref_logp).abs()
    found = dict(beta=beta, moved=moved, stated=stated, proved=proved)
    L = torch.linalg.matrix_norm(model.lm_head.weight.double(), ord=2)
    found["used"] = shift.amax(dim=1) / (2 * L * beta)  # proposition 2: at most 1
    found["above_stated"] = moved > stated
    for eps in (1e-8, 1e-4, 1e-2):
        found[f"to_uniform/{eps:g}"] = apart(floored(shift, mask, eps), floored(mask, mask, 0))
    for name in RULES:
        w = weights(name, signals)
        found[f"from_limit/{name}"] = apart(w, weights(name, limit))
        found[f"gini/{name}"] = credit.gini(w, mask)
    return found


def against_floor(signals):
    """Divergence's weights and the floor: L1 distances (B,) to uniform and to the weights without
    a floor, by eps in units of the completion's mean score."""
    mask, shift = signals.mask, (signals.logp - signals.ref_logp).abs().double()
    mean, found = shift.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True), {}
    for floor in FLOORS:
        w = floored(shift, mask, floor * mean)
        found[f"to_uniform/{floor:g}"] = apart(w, floored(mask, mask, 0))
        found[f"to_unfloored/{floor:g}"] = apart(w, floored(shift, mask, 0))
    return found


def measure(folder, prompts):
    """By scale, and by floor, [mean, low, high] of every number over two completions of each of so
    many problems; intervals are from resampling problems."""
    model, tokenizer, cfg, problems = open_run(folder)
    cfg.samples = 2
    problems = problems_of_step(problems, prompts, cfg.seed, 1)
    rollout = sample_rollout(model, tokenizer, problems, cfg, cfg.steps + 1, compare=True)
    one = np.ones(len(rollout.texts))
    groups = np.arange(len(one)) // cfg.samples

    def means(found):
        return {key: bootstrap([x.numpy(), one], groups, mean_of) for key, x in found.items()}

    with scaled(model, SMALL):
        limit = all_signals(model, rollout, cfg)
    scales = {}
    for c in tqdm(SCALES, desc="scales"):
        scales[f"{c:g}"] = means(at_scale(model, rollout, cfg, c, limit))
    floors = means(against_floor(all_signals(model, rollout, cfg)))
    about = dict(run=cfg.credit, completions=len(one), problems=prompts)
    return about | dict(scales=scales, floors=floors)


# ---- Table and figure ----------------------------------------------------------------------------


def cell(x):
    return "{:.3g} [{:.3g}, {:.3g}]".format(*x)


def print_table(found):
    columns = {
        "beta": "beta",
        "moved": "surprisal moved",
        "stated": "bound, stated",
        "proved": "proved",
        "from_limit/divergence": "divergence moved",
        "from_limit/arca": "arca moved",
        "to_uniform/0.0001": "div. to unif., eps 1e-4",
        "gini/arca": "Gini of ARCA",
    }
    print(f"{found['completions']} completions of {found['problems']} problems; L1 distances")
    print(f"{'scale':6}" + "".join(f"{title:>30}" for title in columns.values()))
    for c, row in found["scales"].items():
        print(f"{c:6}" + "".join(f"{cell(row[key]):>30}" for key in columns))
    print("\ndivergence by floor, in mean scores of the completion: to uniform, to unfloored")
    for floor in FLOORS:
        rows = [found["floors"][f"{key}/{floor:g}"] for key in ("to_uniform", "to_unfloored")]
        print(f"{floor:<6g}" + "".join(f"{cell(x):>30}" for x in rows))


def band(ax, x, rows, colour, style, label):
    """A line through the means, with the band of their intervals."""
    mean, low, high = np.array(rows).T
    ax.plot(x, mean, style, color=colour, label=label, ms=3.5, lw=1.4)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def draw(found, path):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
    axes, rows = fig.subplots(1, 3), list(found["scales"].values())
    looks = {
        "moved": ("#0072b2", "o-", "moved from the base's"),
        "stated": ("#d55e00", "--", "bound as stated"),
        "proved": ("#555555", ":", "with T"),
    }
    for key, (colour, style, label) in looks.items():
        band(axes[0], SCALES, [row[key] for row in rows], colour, style, label)
    axes[0].axhline(2, color="#aaaaaa", lw=0.8)  # no two weights are further apart
    axes[0].set(title="surprisal (proposition 1)", xlabel="adapter scale c", yscale="log")
    looks = dict(to_uniform=("#0072b2", "o-"), to_unfloored=("#d55e00", "s--"))
    for key, (colour, style) in looks.items():
        line = [found["floors"][f"{key}/{floor:g}"] for floor in FLOORS]
        band(axes[1], FLOORS, line, colour, style, key.replace("_", " "))
    label = "floor / mean score of the completion"
    axes[1].set(title="divergence (proposition 2)", xlabel=label)
    looks = dict(arca=("#0072b2", "o-"), divergence=("#d55e00", "s--"), surprisal=("#555555", ":"))
    for key, (colour, style) in looks.items():
        band(axes[2], SCALES, [row[f"from_limit/{key}"] for row in rows], colour, style, key)
    axes[2].set(title=f"distance from c = {SMALL:g}", xlabel="adapter scale c")
    axes[0].set_ylabel("L1 distance of weights")
    for ax in axes:
        ax.set_xscale("log")
        ax.grid(color="#eeeeee", lw=0.6)
        ax.legend(fontsize=7)
    fig.savefig(path)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="", help=f"a run folder; default: {RUN}, made if need be")
    parser.add_argument("--prompts", type=int, default=64, help="problems, two completions each")
    default = str(ROOT / "experiments/results/theory.json")
    parser.add_argument("--out", default=default, help="the results; the figure goes beside it")
    a = parser.parse_args()
    torch.set_num_threads(1)  # with more, sums may be rounded otherwise
    found = measure(a.run or make_run(), a.prompts)
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(Path(a.out), found)
    print_table(found)
    draw(found, Path(a.out).with_suffix(".png"))


if __name__ == "__main__":
    run_cli(main)
