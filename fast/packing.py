"""Scoring a micro-batch in less time: each prompt read once, no padding but in attention.

`pack` and `micro_batches` are the twins of pad_rows and split_rows in grpo.py, and `recomputed` of
PyTorch's checkpoint.
"""

from functools import cached_property

import torch

from model import HALF, attention

PASS = 64  # the cost of a pass beside its tokens, in tokens; with 64 padding stays below 10 %.
PASS_GPU = 4096  # There it is to launch the pass.


class Packed:
    """Say who sees whom where tokens (1, N) are rows end to end, in place of a KV cache.

    First come p prompts, of lengths `starts`, then b completions, of `lengths`; completion i
    follows prompt group[i]. Only attention puts them in padded rows; all other layers read the N
    tokens. With prompts P Q and completions a, b of P and c of Q:

        tokens     P0 P1 P2  Q0 Q1  a0 a1  b0  c0 c1
        position    0  1  2   0  1   3  4   3   2  3
        a1 sees    P0 P1 P2         a0 a1
    """

    def __init__(self, starts, lengths, group):
        self.starts, self.lengths, self.group = starts, lengths, group
        # Padded rows, (p, L) and (b, T): which of their cells, counted row by row, hold a token.
        L, T = max(1, int(starts.max())), max(1, int(lengths.max()))
        self.shapes = ((len(starts), L), (len(lengths), T))
        self.prompt_columns = torch.arange(L, device=group.device)
        self.columns = torch.arange(T, device=group.device)
        in_prompt = (self.prompt_columns < starts[:, None]).flatten().nonzero()[:, 0]
        in_row = (self.columns < lengths[:, None]).flatten().nonzero()[:, 0]
        self.cells = (in_prompt, in_row)
        # The positions of a completion follow its prompt's.
        after_prompt = starts[group][in_row // T] + in_row % T
        self.positions = torch.cat([in_prompt % L, after_prompt])[None]  # (1, N)

    def start(self, B, N):
        """Return the positions of the tokens (1, N)."""
        return self.positions

    def attend(self, layer, q, k, v):
        """Attend from q (1, H, N, K) to k and v (1, H_kv, N, K); return (1, N, H K)."""
        return self.flash(q, k, v) if has_flash(q) else self.padded(q, k, v)

    # In padded rows, with a mask.
    @cached_property
    def mask(self):
        """Which columns of a prompt and a completion a token of the completion sees: those of the
        prompt, and its own row's up to itself (b, 1, T, L + T)."""
        T = len(self.columns)
        sees_prompt = self.prompt_columns < self.starts[self.group][:, None]  # (b, L)
        sees_prompt = sees_prompt[:, None].expand(-1, T, -1)  # (b, T, L)
        sees_own = (self.columns <= self.columns[:, None]).expand(len(self.group), -1, -1)
        return torch.cat([sees_prompt, sees_own], dim=2)[:, None]

    def padded(self, q, k, v):
        """Attend in rows, which any device can."""
        prompt_q, own_q = self.in_rows(q)
        prompt_k, own_k = self.in_rows(k)
        prompt_v, own_v = self.in_rows(v)
        # index_select adds up a prompt's gradients in one order; indexing does so in parallel.
        k = torch.cat([prompt_k.index_select(0, self.group), own_k], dim=2)  # (b, H_kv, L + T, K)
        v = torch.cat([prompt_v.index_select(0, self.group), own_v], dim=2)
        rows = (attention(prompt_q, prompt_k, prompt_v), attention(own_q, k, v, self.mask))
        parts = zip(rows, self.cells, strict=True)
        return torch.cat([x.flatten(0, 1).index_select(0, cells) for x, cells in parts])[None]

    def in_rows(self, x):
        """Pad x (1, heads, N, K) to the rows of the prompts (p, heads, L, K) and of the completions
        (b, heads, T, K)."""
        padded = []
        parts = x[0].transpose(0, 1).split([len(cells) for cells in self.cells])  # (n, heads, K)
        for part, cells, (rows, T) in zip(parts, self.cells, self.shapes, strict=True):
            zeros = part.new_zeros(rows * T, *part.shape[1:])
            padded.append(zeros.index_put((cells,), part).unflatten(0, (rows, T)).transpose(1, 2))
        return padded

    # End to end, by a kernel of GPUs.
    @cached_property
    def ends(self):
        """What flash attention wants: which tokens the sequences' keys are, laid end to end, and
        where the sequences' queries and keys begin. They are the prompts, then each completion,
        whose keys are its prompt's and its own."""
        starts, lengths, group = self.starts, self.lengths, self.group
        first = starts.cumsum(0) - starts  # (p,) where a prompt begins
        own = starts.sum() + lengths.cumsum(0) - lengths  # (b,) where a completion does
        places = [first[group][:, None] + self.prompt_columns, own[:, None] + self.columns]
        there = [self.prompt_columns < starts[group][:, None], self.columns < lengths[:, None]]
        of_rows = torch.cat(places, dim=1)[torch.cat(there, dim=1)]
        keys = torch.cat([torch.arange(int(starts.sum()), device=starts.device), of_rows])
        sizes = [torch.cat([starts, lengths]), torch.cat([starts, starts[group] + lengths])]
        begins = [torch.cat([x.new_zeros(1), x.cumsum(0)]).int() for x in sizes]
        return keys, *begins

    def flash(self, q, k, v):
        """Attend without padding. A causal mask ends where the keys do, so the tokens of a
        completion see all of its prompt."""
        keys, query_begins, key_begins = self.ends
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, heads, K)
        k, v = k.index_select(0, keys), v.index_select(0, keys)
        L, T = len(self.prompt_columns), len(self.columns)
        sizes = (query_begins, key_begins, max(L, T), L + T)
        out = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k, v, *sizes, 0.0, True, False
        )
        return out[0].flatten(1)[None]


def has_flash(x):
    """Return whether PyTorch's flash attention takes such tensors (..., K)."""
    is_new = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return is_new and x.dtype in HALF and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def pack(prompts, group, tokens, lengths, device):
    """Lay out p prompts and b completions end to end. Returns ids (1, N), the place in them that
    predicts each target (b, T), 0 on padding, and who sees whom."""
    starts = torch.tensor([len(prompt) for prompt in prompts])
    columns = torch.arange(tokens.shape[1])
    ids = torch.cat([*prompts, tokens[columns < lengths[:, None] - 1]])
    # The last token of a prompt predicts the first of a completion, and each of these the next.
    inner = lengths - 1
    begins = starts.sum() + inner.cumsum(0) - inner  # (b,) where each completion begins in ids
    predicts = (begins[:, None] + columns - 1) * (columns < lengths[:, None])
    predicts[:, 0] = (starts.cumsum(0) - 1)[group]
    packed = Packed(starts.to(device), inner.to(device), group.to(device))
    return ids[None].to(device), predicts.to(device), packed


def micro_batches(rollout, chosen, budget, device):
    """Cut the chosen rows (B,) of a rollout into the cheapest micro-batches of like length, by
    dynamic programming. One reads at most `budget` tokens or is one row, and costs PASS beside."""
    each = PASS_GPU if device.type == "cuda" else PASS
    G = rollout.rewards.shape[1]
    lengths = rollout.completions.lengths.tolist()
    rows = sorted(chosen.nonzero()[:, 0].tolist(), key=lambda row: lengths[row])
    best = [(0, 0)]  # for the first 0, 1, ... rows: their cost, and where their last batch begins
    for end in range(1, len(rows) + 1):
        ways, prompts = [], {}
        for first in reversed(range(end)):
            problem = rows[first] // G
            prompts[problem] = len(rollout.problems[problem]["prompt"])
            read = (end - first) * lengths[rows[end - 1]] + len(prompts) * max(prompts.values())
            if ways and read > budget:
                break
            ways.append((best[first][0] + read + each, first))
        best.append(min(ways))
    batches, end = [], len(rows)
    while end:
        first = best[end][1]
        batches.insert(0, torch.tensor(rows[first:end]))
        end = first
    return batches


class Recomputed(torch.autograd.Function):
    """The head of grpo.py on some tokens, whose logits the backward pass makes again. Its entropies
    it does not, which checkpoint does: it is a third of what is read and written there."""

    @staticmethod
    def forward(ctx, head, states, targets):
        ctx.save_for_backward(states, targets)
        ctx.head = head
        logps, entropies = head(states, targets)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad, _):
        states, targets = ctx.saved_tensors
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logps, _ = ctx.head(states, targets, with_entropy=False)
        (at_states,) = torch.autograd.grad(logps, states, grad)
        return None, at_states, None


recomputed = Recomputed.apply
