"""What each credit rule costs: an update and a whole step, relative to those of `uniform`.

    python bench/credit_cost.py                    # the embedded model, on its own problems
    python bench/credit_cost.py --shape 0.6B       # Qwen3-0.6B's shape, random weights

The rules take turns on the same completions, so that a machine that slows down slows all of them;
what is printed is the fastest of the rounds, since other work on the machine only adds. The last
row is ARCA as its authors compute it: two more passes for the two residual states, and the logits
of all tokens at once.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import credit
import grpo
from bench.common import SHAPES, TEXT, adapted, config_of, settings, timed
from data.problems import TINY, add_prompts, load_problems
from hf.checkpoint import load_model, load_tokenizer, random_model
from lora import adapter_off, lora_parameters
from system.errors import run_cli


def setting_up(args):
    """The model with an adapter that is not zero, its tokenizer, and problems."""
    torch.manual_seed(0)
    if args.shape:
        model = random_model(config_of(args.shape), args.device, getattr(torch, args.dtype))
        ids = torch.randint(0, 151936, (args.prompts, args.prompt_tokens)).tolist()
        problems = [dict(prompt=i, negative=[*i, *range(8)], answer="") for i in ids]
        tokenizer = TEXT
    else:
        model, tokenizer = load_model(TINY, args.device), load_tokenizer(TINY)
        problems = [add_prompts(p, tokenizer) for p in load_problems("tiny")[: args.prompts]]
    return adapted(model), tokenizer, problems


def authors_update(model, r, advantages, s):
    """ARCA's update as its authors' code does it: three forward passes, and full logits."""
    c, learns = r.completions, torch.ones(len(advantages), dtype=torch.bool)
    for rows in grpo.micro_batches(r, learns, s.micro_tokens):
        b = grpo.make_batch(r, rows, model.device)
        prompts = [r.problems[i]["prompt"] for i in (rows // r.rewards.shape[1]).tolist()]
        texts = [[*p, *y] for p, y in zip(prompts, c.tokens[rows].tolist(), strict=True)]
        texts = [
            torch.tensor(text[: len(text) - c.tokens.shape[1] + b.mask.shape[1]]) for text in texts
        ]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
        starts = torch.tensor([len(p) for p in prompts], device=model.device)[:, None]
        at = (starts - 1 + torch.arange(b.mask.shape[1], device=model.device))[:, :, None]
        logits = model.logits(model(ids)).float() / s.temperature  # (b, L, V)
        logps = torch.log_softmax(logits, dim=-1)
        picked = logps.gather(1, at.expand(-1, -1, logps.shape[-1]))  # (b, T, V)
        picked = picked.gather(2, b.targets[:, :, None])[:, :, 0]
        with torch.no_grad():
            adapted = model(ids)
            with adapter_off(model):
                base = model(ids)
            residual = (adapted - base).norm(dim=-1).gather(1, at[:, :, 0]) * b.mask
        w = residual / residual.sum(dim=1, keepdim=True).clamp(min=1e-8)
        A = advantages[rows, None].to(w.device)
        (-(A * w * picked * b.mask).sum() / len(c.lengths)).backward()
    model.zero_grad(set_to_none=True)


def one_round(model, tokenizer, problems, s, given=None):
    """Seconds of rollout (unless the rollout is given) and of update by rule, on the same
    completions."""
    optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=0.0)
    seconds = {}
    for method in ("uniform", *credit.METHODS):  # the first one finds memory as others left it
        s.credit = method
        sample = lambda: grpo.rollout(model, tokenizer, problems, s, 1)  # noqa: E731
        sampling, r = (0.0, given) if given else timed(sample, model.device)
        r.rewards = (torch.arange(r.rewards.numel()) % 2.0).view(r.rewards.shape)  # all learn
        A = grpo.group_advantages(r.rewards).flatten()
        train = lambda r=r, A=A: grpo.update(model, optimizer, r, A, s)  # noqa: E731
        seconds[method] = (sampling, timed(train, model.device)[0])
    train = lambda: authors_update(model, r, A, s)  # noqa: E731
    seconds["arca, the authors' way"] = (sampling, timed(train, model.device)[0])
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="", help=f"{', '.join(SHAPES)}; default: embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the random weights")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="with --shape")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates-only", action="store_true", help="one rollout for all of them")
    args = parser.parse_args()
    model, tokenizer, problems = setting_up(args)
    s = settings(samples=args.samples, max_new_tokens=args.max_new_tokens)
    s.micro_tokens, given = args.micro_tokens, None
    if args.updates_only:  # with all that any rule reads of the sampler
        s.credit = "eapo"  # it sees the whole step, for which the sampler keeps more
        given = grpo.rollout(model, tokenizer, problems, s, 1, compare=True)
    one_round(model, tokenizer, problems, s, given)  # kernels are chosen anew for each shape
    rounds = [one_round(model, tokenizer, problems, s, given) for _ in range(args.rounds)]

    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads,", end=" ")
    print(f"{args.shape or 'data/tiny'}, {args.prompts} x {args.samples} completions,", end=" ")
    print(f"fastest of {args.rounds} rounds\n")
    print("| rule | update, s | / uniform's | step, s | / uniform's | credit's share of the step |")
    print("|---|---|---|---|---|---|")
    update = {method: min(r[method][1] for r in rounds) for method in rounds[0]}
    step = {method: min(sum(r[method]) for r in rounds) for method in rounds[0]}
    for method in rounds[0]:
        ratios = [seconds[method] / seconds["uniform"] for seconds in (update, step)]
        print(f"| {method} | {update[method]:.3f} | {ratios[0]:.2f} |", end=" ")
        print(f"{step[method]:.2f} | {ratios[1]:.2f} | {1 - 1 / ratios[1]:.0%} |")


if __name__ == "__main__":
    run_cli(main)
