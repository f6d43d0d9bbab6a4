"""Rows of a rollout as a forward pass needs them: micro-batches by length, each prompt once, and
tokens without padding."""

from dataclasses import dataclass

import torch

from model import attention

PASS = 64  # what the calls of a pass are taken to cost; with 64 padding stays below 10 %


@dataclass
class Batch:
    """Some rows of a rollout, after the prompts that they go on from."""

    ids: torch.Tensor  # (1, N) the prompts, each once, and the completions but for the last tokens
    packed: "Packed"  # which of them see which
    before: torch.Tensor  # (b, T) which of them predicts each completion token; 0 on padding
    targets: torch.Tensor  # (b, T) the completions
    mask: torch.Tensor  # (b, T) bool, True on completion tokens; from lengths, never from ids
    sampled_logps: torch.Tensor  # (b, T) what the sampler said


class Packed:
    """Stands for a cache in Qwen3.forward where tokens (1, N) are rows end to end: first prompts of
    lengths `starts` (p,), then completions of `lengths` (b,), each after prompt `group` (b,).

    Only attention puts them in rows, with padding; all other layers read the N tokens.
    """

    def __init__(self, starts, lengths, group):
        self.cells, self.shapes = [], []  # of prompts and of completions: cells in use, rows x T
        columns = []
        for n in (starts, lengths):
            self.shapes.append((len(n), max(1, int(n.max()))))
            used = torch.arange(self.shapes[-1][1], device=n.device) < n[:, None]
            self.cells.append(used.flatten().nonzero()[:, 0])
            columns.append(self.cells[-1] % used.shape[1])
        row = self.cells[1] // self.shapes[1][1]  # of each completion token
        self.group, own = group, torch.arange(self.shapes[1][1], device=group.device)
        self.positions = torch.cat([columns[0], starts[group][row] + columns[1]])[None]  # (1, N)
        prompt = torch.arange(self.shapes[0][1], device=group.device) < starts[group][:, None]
        causal = (own <= own[:, None]).expand(len(group), -1, -1)  # (b, T, T)
        prompt = prompt[:, None].expand(-1, len(own), -1)  # (b, T, L)
        self.mask = torch.cat([prompt, causal], dim=2)[:, None]  # (b, 1, T, L + T)

    def start(self, N):
        """The positions of the tokens (1, N)."""
        return self.positions

    def attend(self, layer, q, k, v):
        """q (1, H, N, K), k and v (1, H_kv, N, K) -> (1, N, H K)."""
        prompts, rows = zip(*(self.in_rows(x[0].transpose(0, 1)) for x in (q, k, v)), strict=True)
        # (index_select adds repeated rows' gradients up in one order, indexing does not.)
        k, v = (torch.cat([prompts[i].index_select(0, self.group), rows[i]], dim=2) for i in (1, 2))
        y = attention(*prompts), attention(rows[0], k, v, self.mask)  # (p, L, H K), (b, T, H K)
        parts = zip(y, self.cells, strict=True)
        return torch.cat([x.flatten(0, 1).index_select(0, cells) for x, cells in parts])[None]

    def in_rows(self, x):
        """x (N, heads, K) as rows with padding: (p, heads, L, K) and (b, heads, T, K)."""
        parts = x.split([len(cells) for cells in self.cells])
        for part, cells, (rows, T) in zip(parts, self.cells, self.shapes, strict=True):
            padded = x.new_zeros(rows * T, *x.shape[1:]).index_put((cells,), part)
            yield padded.view(rows, T, *x.shape[1:]).transpose(1, 2)


def make_batch(r, rows, device, prompt="prompt") -> Batch:
    """The given rows of a Rollout as a Batch on the device, after the problems' `prompt`."""
    c, lengths = r.completions, r.completions.lengths[rows]  # (b,)
    used, group = (rows // r.rewards.shape[1]).unique(return_inverse=True)  # problems; of each row
    prompts = [torch.tensor(r.problems[i][prompt]) for i in used.tolist()]
    starts = torch.tensor([len(p) for p in prompts])
    columns = torch.arange(int(lengths.max()))
    mask, tokens = columns < lengths[:, None], c.tokens[rows, : len(columns)]
    ids = torch.cat([*prompts, tokens[columns < lengths[:, None] - 1]])
    # The last token of a prompt predicts the first of a completion, and each of these the next.
    first = starts.sum() + (lengths - 1).cumsum(0) - (lengths - 1)  # (b,) where a row begins
    before = (first[:, None] + columns - 1) * mask
    before[:, 0] = (starts.cumsum(0) - 1)[group]
    fields = (before, tokens, mask, c.logps[rows, : len(columns)])
    packed = Packed(*(x.to(device) for x in (starts, lengths - 1, group)))
    return Batch(ids[None].to(device), packed, *(field.to(device) for field in fields))


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
    """The share of padding in the rows that attention reads in passes over these groups of rows."""
    G, read, real = r.rewards.shape[1], 0, 0
    for rows in groups:
        starts = [len(r.problems[i]["prompt"]) for i in {row // G for row in rows.tolist()}]
        for n in (starts, (r.completions.lengths[rows] - 1).tolist()):
            read += len(n) * max(1, *n)
            real += sum(n)
    return 1 - real / max(1, read)
