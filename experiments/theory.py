"""What the paper's theory says (arXiv 2606.00257, section 4), measured on a trained adapter.

    python experiments/theory.py    # a minute after the run of experiments/oracle.py is there

Completions are scored again with the adapter scaled by c (1 is as trained). Weights sum to one:
(a_t + eps) / sum_k (a_k + eps). Their distances are L1, at most 2. beta is the largest residual
||dh_t|| of a completion, L the largest singular value of the head.

**Proposition 1**: surprisal's weights move by at most 4 L beta / sum_t a_t from the base model's,
whose scores are a_t. A token's log-prob moves by at most 2 L beta, and where scores move by d_t,
weights move by at most 2 sum_t d_t / sum_t a_t. But the sum over T tokens is T times 2 L beta: the
bound lacks a factor T. **Proposition 2**: a dominating floor eps makes divergence's weights
uniform, a negligible one leaves them: one of f mean scores leaves 1 / (1 + f) of their distance.
**Scale**: to first order in c ARCA's residual is c times a fixed vector, and divergence's score c
times a fixed number, so neither's weights depend on c. tests/test_theory.py has what is exact.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from tqdm import tqdm

import credit
from data.problems import problems_of_step
from experiments.oracle import bootstrap, make_run
from experiments.stats import Estimate
from experiments.tables import said, table
from experiments.truth import ROOT, all_signals, open_run
from grpo import sample_rollout
from lora import lora_layers
from system.errors import Parser, run_cli
from system.files import write_json

SCALES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SMALL = 0.01  # the scale that stands for the limit: below it rounding shows


def signals_at(c, model, rollout, cfg):
    """Return all signals of a Rollout's completions, with the adapter's correction scaled by c."""
    layers = lora_layers(model).values()
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= c
    signals = all_signals(model, rollout, cfg)
    for layer, scale in zip(layers, before, strict=True):
        layer.scale = scale
    return signals


def floored(scores, mask, eps):
    """Return the paper's weights (a_t + eps) / sum_k (a_k + eps), (B, T), 0 outside the mask."""
    raised = (scores.double() + eps) * mask
    return raised / raised.sum(dim=1, keepdim=True)


def apart(a, b):
    """Return the L1 distance (B,) of weights (B, T): 0 to 2."""
    return (a - b).abs().sum(dim=1)


def stated_bound(head, beta, base_scores, mask):
    """Return proposition 1's bound (B,) as the paper states it; head (V, D), beta (B,)."""
    L = torch.linalg.matrix_norm(head.double(), ord=2)
    return 4 * L * beta / (base_scores.double() * mask).sum(dim=1)


def weights(name, signals):
    """Return a rule's weights (B, T), which sum to one."""
    m = credit.token_weights(name, signals).double()
    return m / m.sum(dim=1, keepdim=True)


def at_scale(signals, limit, head):
    """Return numbers (B,) by name of the signals at a scale; limit: the signals at SMALL."""
    mask = signals.mask
    base = -signals.ref_logp
    moved = apart(floored(-signals.logp, mask, 0), floored(base, mask, 0))
    bound = stated_bound(head, signals.residual.amax(dim=1).double(), base, mask)
    found = {"surprisal moved": moved, "bound, stated": bound, "beyond the bound": moved > bound}
    for name in ("divergence", "arca"):
        found[f"{name} moved"] = apart(weights(name, signals), weights(name, limit))
    shift = (signals.logp - signals.ref_logp).abs()
    for eps in (1e-8, 1e-2):
        distance = apart(floored(shift, mask, eps), floored(mask, mask, 0))
        found[f"divergence to uniform, floor {eps:g}"] = distance
    return found


def measure(folder, prompts=64):
    """Return, by scale, every number over two completions of each of so many problems."""
    model, tokenizer, cfg, problems = open_run(folder)
    cfg.samples = 2
    problems = problems_of_step(problems, prompts, cfg.seed, 1)
    rollout = sample_rollout(model, tokenizer, problems, cfg, cfg.steps + 1, compare=True)
    limit = signals_at(SMALL, model, rollout, cfg)
    scales = {}
    for c in tqdm(SCALES, desc="scales"):
        found = at_scale(signals_at(c, model, rollout, cfg), limit, model.lm_head.weight)
        scales[f"{c:g}"] = {name: bootstrap(x.view(-1, cfg.samples)) for name, x in found.items()}
    return dict(run=cfg.credit, completions=len(rollout.texts), problems=prompts, scales=scales)


def report(found):
    """Return the table of a results file as text."""
    lines = []
    for c, row in found["scales"].items():
        lines.append([c, *(said(Estimate(*x)) for x in row.values())])
    size = f"{found['completions']} completions of {found['problems']} problems"
    return table(f"{size}: L1 distances of weights, at most 2", ["c", *found["scales"]["1"]], lines)


def main():
    Parser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)  # so that sums are rounded alike
    found = measure(make_run())
    write_json(ROOT / "experiments/results/theory.json", found)
    print(report(found))


if __name__ == "__main__":
    run_cli(main)
