"""What each credit rule costs: an update and a whole step, relative to those of `uniform`.

    python bench/credit_cost.py                    # the embedded model, on its own problems
    python bench/credit_cost.py --shape 0.6B       # Qwen3-0.6B's shape, random weights

The rules take turns on the same completions, so that a machine that slows down slows all of them;
what is printed is the fastest of the rounds, since other work on the machine only adds. The last
row is ARCA as its authors compute it: two more passes for the two residual states, and the logits
of all tokens at once.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch.nn.utils.rnn import pad_sequence

import credit
import grpo
from bench.common import SHAPES, TEXT, adapted, config_of, settings, timed
from data.problems import TINY, add_prompts, load_problems
from hf.checkpoint import load_model, load_tokenizer, random_model
from lora import adapter_off, lora_parameters
from run.flags import DTYPES, use_device
from system.errors import Parser, run_cli


def setting_up(args):
    """The model with an adapter that is not zero, its tokenizer, and problems."""
    torch.manual_seed(0)
    if args.shape:
        model = random_model(config_of(args.shape), args.device, DTYPES[args.dtype])
        ids = torch.randint(0, model.config.vocab_size, (args.prompts, args.prompt_tokens)).tolist()
        problems = [dict(prompt=i, negative=[*i, *range(8)], answer="") for i in ids]
        tokenizer = TEXT
    else:
        model, tokenizer = load_model(TINY, args.device), load_tokenizer(TINY)
        problems = [add_prompts(p, tokenizer) for p in load_problems("tiny")[: args.prompts]]
    return adapted(model), tokenizer, problems


def authors_update(model, rollout, advantages, cfg):
    """ARCA's update as its authors' code does it: three forward passes, and full logits."""
    completions = rollout.completions
    all_rows = torch.ones(len(advantages), dtype=torch.bool)
    for rows in grpo.split(rollout, all_rows, cfg.micro_batch_tokens, model.device):
        # 1) Prompts and completions, right-padded, and the places that predict their tokens.
        batch = grpo.make_batch(rollout, rows, model.device)
        T = batch.mask.shape[1]
        problems = (rows // rollout.rewards.shape[1]).tolist()
        prompts = [torch.tensor(rollout.problems[i]["prompt"]) for i in problems]
        pairs = zip(prompts, completions.tokens[rows, :T], strict=True)
        ids = pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True)
        ids = ids.to(model.device)  # (b, L)
        starts = torch.tensor([len(p) for p in prompts], device=model.device)[:, None]
        at = (starts - 1 + torch.arange(T, device=model.device))[:, :, None]  # (b, T, 1)
        # 2) The pass that trains.
        logits = model.logits(model(ids)).float() / cfg.temperature  # (b, L, V)
        logps = torch.log_softmax(logits, dim=-1)
        picked = logps.gather(1, at.expand(-1, -1, logps.shape[-1]))  # (b, T, V)
        picked = picked.gather(2, batch.targets[:, :, None])[:, :, 0]  # (b, T)
        # 3) Two more for the residual.
        with torch.no_grad():
            adapted_states = model(ids)
            with adapter_off(model):
                base_states = model(ids)
            residual = (adapted_states - base_states).norm(dim=-1)  # (b, L)
            residual = residual.gather(1, at[:, :, 0]) * batch.mask
        weights = residual / residual.sum(dim=1, keepdim=True).clamp(min=1e-8)
        token_advantages = advantages[rows, None].to(model.device) * weights
        loss = -(token_advantages * picked * batch.mask).sum() / len(advantages)
        loss.backward()
    model.zero_grad(set_to_none=True)


def one_round(model, tokenizer, problems, cfg, given=None):
    """Return, by rule, the seconds of the rollout (0 if it is given) and of the update, all on the
    same completions."""
    optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=0.0)
    seconds = {}
    for method in ("uniform", *credit.METHODS):  # the first one finds memory as others left it
        cfg.credit = method
        sampling, rollout = 0.0, given
        if given is None:
            sample = partial(grpo.sample_rollout, model, tokenizer, problems, cfg, 1)
            sampling, rollout = timed(sample, model.device)
        rewards = torch.arange(rollout.rewards.numel()) % 2.0  # so that all of them learn
        rollout.rewards = rewards.view(rollout.rewards.shape)
        advantages = grpo.group_advantages(rollout.rewards).flatten()
        train = partial(grpo.update, model, optimizer, rollout, advantages, cfg)
        seconds[method] = (sampling, timed(train, model.device)[0])
    train = partial(authors_update, model, rollout, advantages, cfg)
    seconds["arca, the authors' way"] = (sampling, timed(train, model.device)[0])
    return seconds


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="", help=f"{', '.join(SHAPES)}; default: embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="with --shape")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="with --shape")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates-only", action="store_true", help="one rollout for all of them")
    args = parser.parse_args()
    use_device(args.device)
    model, tokenizer, problems = setting_up(args)
    cfg = settings(samples=args.samples, max_new_tokens=args.max_new_tokens)
    cfg.micro_batch_tokens = args.micro_batch_tokens
    given = None
    if args.updates_only:  # with all that any rule reads of the sampler
        cfg.credit = "eapo"  # it sees the whole step, for which the sampler keeps more
        given = grpo.sample_rollout(model, tokenizer, problems, cfg, 1, compare=True)
    one_round(model, tokenizer, problems, cfg, given)  # kernels are chosen anew for each shape
    rounds = [one_round(model, tokenizer, problems, cfg, given) for _ in range(args.rounds)]

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
