"""Token credit: how much of a completion's advantage each of its tokens gets.

A rule turns what is known of the tokens into scores s_t >= 0. Within a completion of T tokens they
become weights w_t = s_t^p / sum_k s_k^p (p is the sharpening), and token t gets the advantage A m_t
with m_t = T w_t. The multipliers have mean one: a rule moves credit within a completion and never
changes how much the completion counts. `uniform` is m = 1, plain GRPO.

    python credit.py runs/NAME        # shows the weights of the completions that a run has kept

To add a rule, write a function from Signals to scores (B, T) and add a line to METHODS: the line
names the signals that it reads, and grpo.py computes no others.

The rules here are those of ARCA, arXiv 2606.00257, section 2 (we call it "the paper").
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from model import UserError, run_cli


@dataclass
class Signals:
    """What is known of the tokens of B completions, detached; what no rule needs may be None.

    Column t is about drawn token t, and about the state that predicts it: the one at the position
    before. So credit goes to the choice of a token, not to having read it.
    """

    mask: torch.Tensor  # (B, T) 1 on completion tokens, right-padded, the end of text included
    logp: torch.Tensor | None = None  # (B, T) log-prob of the drawn token under the policy
    entropy: torch.Tensor | None = None  # (B, T) of the policy's distribution there, in nats
    ref_logp: torch.Tensor | None = None  # (B, T) as logp, under the base path
    residual: torch.Tensor | None = None  # (B, T) ||h_adapted - h_base||_2
    hidden: torch.Tensor | None = None  # (B, T, D) the predicting state
    neg_logp: torch.Tensor | None = None  # (B, T) as logp, with the negative prompt
    advantage: torch.Tensor | None = None  # (B,)
    group: torch.Tensor | None = None  # (B,) index of the prompt


# ---- The rules: Signals -> scores (B, T) ---------------------------------------------------------


def uniform(s: Signals):
    """The same for every token: GRPO's length-normalised estimator."""
    return s.mask.float()


def surprisal(s: Signals):
    """-log pi(y_t): tokens that the policy found unlikely."""
    return -s.logp


def entropy_reduction(s: Signals):
    """max(0, H_t - H_{t+1}): tokens after which the policy is less uncertain; 0 at a row's last."""
    after = torch.cat([s.entropy[:, 1:], s.entropy[:, -1:]], dim=1)  # H_{t+1}
    has_next = torch.cat([s.mask[:, 1:], torch.zeros_like(s.mask[:, :1])], dim=1)
    return (s.entropy - after).clamp(min=0) * has_next


def divergence(s: Signals):
    """|log pi(y_t) - log pi_base(y_t)|: tokens whose probability training has changed."""
    return (s.logp - s.ref_logp).abs()


def arca(s: Signals):
    """||h_t^adapted - h_t^base||_2: tokens at which the adapter changes the last hidden state."""
    return s.residual


#         --credit name: (rule, the signals it reads)
METHODS = {
    "uniform": (uniform, ()),
    "surprisal": (surprisal, ("logp",)),
    "entropy_reduction": (entropy_reduction, ("entropy",)),
    "divergence": (divergence, ("logp", "ref_logp")),
    "arca": (arca, ("residual",)),
}


def needs(method) -> tuple[str, ...]:
    """The signals that a rule reads; UserError, with the list of rules, if there is no such."""
    if method not in METHODS:
        raise UserError(f"no credit rule {method!r}: use one of {', '.join(METHODS)}")
    return METHODS[method][1]


# ---- From scores to multipliers, and how concentrated those are ----------------------------------


def scores(method, signals: Signals):
    """The rule's scores (B, T), 0 outside the completions; and (B,) whether all of a row's vanish.

    LoRA starts with B = 0, so at the first step ARCA's and divergence's scores vanish everywhere.
    """
    needs(method)
    s = (METHODS[method][0](signals).float() * signals.mask).clamp(min=0).detach()
    return s, s.amax(dim=1) < torch.finfo(torch.float32).tiny


def token_weights(method, signals: Signals, sharpening=1.0):
    """The multipliers m (B, T): m_t = T s_t^p / sum_k s_k^p, of mean one over each completion.

    A row whose scores all vanish is exactly uniform. There is no epsilon: scores are divided by the
    row's largest first, so m does not depend on their scale, however small (paper, proposition 3).
    """
    s, vanished = scores(method, signals)
    mask = signals.mask.to(s.dtype)
    s = (s / s.amax(dim=1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)) ** sharpening * mask
    length = mask.sum(dim=1, keepdim=True)
    m = length * s / s.sum(dim=1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    return torch.where(vanished[:, None], mask, m)


def gini(m, mask):
    """The Gini coefficient of each row's weights, (B, T) -> (B,): 0 uniform, (T-1)/T one-hot."""
    w = (m * mask).double().sort(dim=1).values  # ascending: padding, being 0, comes first
    length = mask.double().sum(dim=1, keepdim=True)
    columns = torch.arange(1, w.shape[1] + 1, device=w.device)
    rank = columns - (w.shape[1] - length)  # 1 ... T over the completion's own weights
    total = length[:, 0] * w.sum(dim=1)
    return (((2 * rank - length - 1) * w).sum(dim=1) / total).clamp(min=0).float()


def effective_token_ratio(m, mask):
    """1 / (T sum_t w_t^2) with w = m / sum m, (B, T) -> (B,): 1 uniform, 1/T one-hot."""
    w = (m * mask).double()
    length = mask.double().sum(dim=1)
    return (w.sum(dim=1) ** 2 / (length * (w**2).sum(dim=1))).float()


def main():
    parser = argparse.ArgumentParser(description="Show the token weights that a run has kept.")
    parser.add_argument("run", help="a run folder, such as runs/NAME")
    parser.add_argument("--last", type=int, default=5, help="how many completions, the latest ones")
    args = parser.parse_args()
    path = Path(args.run) / "samples.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a run of train.py")
    for line in path.read_text(encoding="utf-8").splitlines()[-max(1, args.last) :]:
        sample = json.loads(line)
        m = torch.tensor([sample["weights"]])
        spread = f"reward {sample['reward']:g}, Gini {gini(m, m >= 0).item():.2f}"
        print(f"step {sample['step']}, {spread}: {sample['problem']}")
        for token, weight in zip(sample["tokens"], sample["weights"], strict=True):
            grey = 255 - min(15, int(4 * weight))  # the more credit, the darker the background
            print(f"\033[48;5;{grey}m\033[38;5;16m{token}\033[0m", end="")
        print("\n")


if __name__ == "__main__":
    run_cli(main)
