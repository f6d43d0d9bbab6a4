"""Rows of a rollout as a forward pass needs them: micro-batches by length, each prompt once."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

PASS = 64  # what the calls of a pass are taken to cost; with 64 padding stays below 10 %


@dataclass
class Batch:
    """Some rows of a rollout, right-padded, and the prompts that they go on from."""

    prompts: torch.Tensor  # (p, L) each prompt of these rows once
    starts: torch.Tensor  # (p,) their lengths
    group: torch.Tensor  # (b,) which of them is a row's
    ids: torch.Tensor  # (b, T - 1) the completions but for the last token, which predicts nothing
    targets: torch.Tensor  # (b, T) the completions
    mask: torch.Tensor  # (b, T) bool, True on completion tokens; from lengths, never from ids
    sampled_logps: torch.Tensor  # (b, T) what the sampler said


def make_batch(r, rows, device, prompt="prompt") -> Batch:
    """The given rows of a Rollout as a Batch on the device, after the problems' `prompt`."""
    c, lengths = r.completions, r.completions.lengths[rows]  # (b,)
    T, problem = int(lengths.max()), rows // r.rewards.shape[1]  # (b,) the problem of each row
    used, group = problem.unique(return_inverse=True)
    prompts = [torch.tensor(r.problems[i][prompt]) for i in used.tolist()]
    starts = torch.tensor([len(p) for p in prompts])
    mask = torch.arange(T) < lengths[:, None]
    tokens = c.tokens[rows, :T]
    ids = tokens[:, : max(1, T - 1)]
    fields = (pad_sequence(prompts, batch_first=True), starts, group, ids, tokens, mask)
    return Batch(*(field.to(device) for field in (*fields, c.logps[rows, :T])))


class SharedPrompts:
    """A cache for Qwen3.forward, through which gradients flow. The first keeps the keys of prompts
    (p, L) of lengths `starts` (p,). The second, for completions (b, T), is given it as `first` and
    the prompt `group` (b,) of each row. A pass that is made again finds all as it was."""

    def __init__(self, starts, group=None, first=None):
        self.starts, self.group, self.first, self.k, self.v = starts, group, first, {}, {}

    def start(self, T):
        """The positions of the next T tokens; also notes what each may see."""
        columns = torch.arange(T, device=self.starts.device)
        if self.group is None:
            self.mask = None
            return columns[None]  # (1, T)
        starts = self.starts[self.group][:, None]  # (b, 1)
        prompt = torch.arange(int(self.starts.max()), device=starts.device) < starts  # (b, L)
        causal = (columns <= columns[:, None]).expand(len(starts), -1, -1)  # (b, T, T)
        self.mask = torch.cat([prompt[:, None].expand(-1, T, -1), causal], dim=2)[:, None]
        return starts + columns  # (b, T)

    def append(self, layer, k, v):
        """k, v (., H_kv, T, K) of this pass -> those to attend to, and the mask."""
        if self.group is None:
            self.k[layer], self.v[layer] = k, v
            return k, v, None
        k = torch.cat([self.first.k[layer][self.group], k], dim=2)  # (b, H_kv, L + T, K)
        return k, torch.cat([self.first.v[layer][self.group], v], dim=2), self.mask


def micro_batches(r, chosen, budget):
    """The chosen rows (B,) of a Rollout in groups of like length, each of which reads at most
    `budget` tokens or is one row: the cheapest such groups, if a pass costs PASS tokens more."""
    G, lengths = r.rewards.shape[1], r.completions.lengths.tolist()
    rows = sorted(chosen.nonzero()[:, 0].tolist(), key=lambda row: lengths[row])
    best = [(0, 0)]  # for the first 0, 1, ... rows: what they cost, and where the last group begins
    for end in range(1, len(rows) + 1):
        ways, prompts = [], {}
        for first in reversed(range(end)):
            problem = rows[first] // G
            prompts[problem] = len(r.problems[problem]["prompt"])
            read = (end - first) * lengths[rows[end - 1]] + len(prompts) * max(prompts.values())
            if ways and read > budget:
                break
            ways.append((best[first][0] + read + PASS, first))
        best.append(min(ways))
    groups, end = [], len(rows)
    while end:
        groups.append(torch.tensor(rows[best[end][1] : end]))
        end = best[end][1]
    return groups[::-1]


def padding(r, groups):
    """The share of padding among the tokens that passes over these groups of rows read."""
    read = real = 0
    for rows in groups:
        b = make_batch(r, rows, "cpu")
        read += b.prompts.numel() + b.ids.numel()
        real += int(b.starts.sum() + b.mask.sum()) - len(rows)
    return 1 - real / max(1, read)
