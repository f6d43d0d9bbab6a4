"""What a GPU should show, in parts; bench/gpu.sh runs them all.

    python bench/gpu.py parity     # the same numbers as on the CPU
    python bench/gpu.py paper      # a step of the paper's run on random weights

`paper` is one step of ARCA at the paper's shape: 8 prompts x 4 completions that nothing ends,
rank 64; its update also with --gradient-checkpointing. Its three parts are sampling, the update
without credit (`uniform`), and scoring: ARCA's base pass, the update with it minus the one without.
"""

import copy
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import grpo
from bench import common
from bench.common import SHAPES, TEXT, line, number, settings, timed
from bench.ours import half_right
from data.problems import TINY, add_prompts, load_problems
from hf.checkpoint import load_model, load_tokenizer, random_model
from lora import add_lora, lora_parameters
from run.flags import use_device
from run.metrics import measure
from sample import generate
from system.errors import Parser, run_cli

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)

# ---- Parity --------------------------------------------------------------------------------------


def tiny(device, dtype, adapter=True):
    """The embedded model, with an adapter that does something or with B = 0."""
    model = load_model(TINY, device, DTYPES[dtype])
    return common.adapted(model) if adapter else add_lora(model, 16, 32.0)


def logits_apart(device, problems):
    """Between CPU and device in fp32: the largest difference of a logit at all prompts."""
    apart = []
    here, there = tiny("cpu", "fp32"), tiny(device, "fp32")
    with torch.no_grad():
        for p in problems:
            ids = torch.tensor([p["prompt"]])
            a, b = here.logits(here(ids)), there.logits(there(ids.to(device)))
            apart.append((a - b.cpu()).abs().max())
    return float(max(apart))


def step_on(device, dtype, rollout, cfg, adapter=True):
    """An update of plain SGD: metrics, the signals of the step, and how the parameters moved."""
    model = tiny(device, dtype, adapter)
    parameters = list(lora_parameters(model).values())
    before = torch.cat([p.detach().flatten().cpu() for p in parameters])
    rollout, advantages = half_right(copy.copy(rollout))
    sgd = torch.optim.SGD(parameters, lr=1.0)
    metrics, signals, _ = grpo.update(model, sgd, rollout, advantages, cfg)
    metrics |= measure(rollout, signals)
    after = torch.cat([p.detach().flatten().cpu() for p in parameters])
    return metrics, signals, after - before


def same_alone(device, dtype, problems, cfg):
    """The share of completions that are the same tokens when each prompt is sampled alone, and
    whether sampling twice gives the same bytes."""
    model, prompts, G = tiny(device, dtype), [p["prompt"] for p in problems], cfg.samples
    how = dict(n=G, max_new_tokens=cfg.max_new_tokens, eos_ids=load_tokenizer(TINY).eos_ids, seed=1)
    together, again = (generate(model, prompts, **how) for _ in range(2))
    texts, same = rows(together), []
    for i, prompt in enumerate(prompts):
        part = rows(generate(model, [prompt], **how))
        same += [a == b for a, b in zip(texts[G * i : G * i + G], part, strict=True)]
    twice = torch.equal(together.tokens, again.tokens) and torch.equal(together.logps, again.logps)
    return sum(same) / len(same), twice


def rows(c):
    """The tokens of each completion as a list."""
    return [tokens[:n] for tokens, n in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True)]


def parity_of(device, dtype, problems, worst):
    """Checks (what, found, at most) of one dtype; worst: of logp_mismatch."""
    cfg = settings(samples=4, max_new_tokens=32, credit="arca")
    model, tokenizer = tiny(device, dtype), load_tokenizer(TINY)
    rollout = grpo.sample_rollout(model, tokenizer, problems, cfg, 1)
    metrics, _, there = step_on(device, dtype, rollout, cfg)
    checks = [("logp_mismatch, largest", metrics["logp_mismatch"], worst)]
    checks += [("logp_mismatch, mean", metrics["logp_mismatch_mean"], worst / 20)]
    _, signals, _ = step_on(device, dtype, rollout, cfg, adapter=False)
    checks += [("residual at B = 0", float(signals.residual.abs().max()), 0.0)]
    alone, twice = same_alone(device, dtype, problems, cfg)
    checks += [("sampled twice, bytes that differ", 1 - twice, 0.0)]
    # In bf16 a batch of another shape rounds otherwise, and a token turns: only reported.
    checks += [("completions that change when alone", 1 - alone, 0.05 if dtype == "fp32" else 1)]
    if dtype == "fp32":
        here = step_on("cpu", dtype, rollout, cfg)[2]
        apart = float((there - here).norm() / here.norm())
        checks += [("gradient, CPU and device, relative", apart, 1e-3)]
        checks += [("logits, CPU and device", logits_apart(device, problems), 1e-3)]
    return checks


def parity(args):
    """A table of what must hold on the device; returns whether all of it does."""
    tokenizer, holds = load_tokenizer(TINY), True
    problems = [add_prompts(p, tokenizer) for p in load_problems("tiny")[: args.prompts]]
    line("dtype", "check", "found", "at most", "holds")
    line(*["---"] * 5)
    for dtype, worst in (("fp32", 1e-4), ("bf16", 1.0)):
        for what, found, most in parity_of(args.device, dtype, problems, worst):
            line(dtype, what, f"{found:.3g}", f"{most:.3g}", "yes" if found <= most else "NO")
            holds &= found <= most
    return holds


# ---- The paper's shape ---------------------------------------------------------------------------


UPDATES = {
    "uniform": dict(credit="uniform"),
    "arca": dict(credit="arca"),
    "arca, checkpointing": dict(credit="arca"),
}


def paper_step(model, problems, cfg):
    """Seconds and peak memory of sampling and of each update; infinite where memory ran out."""
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.0)
    seconds, peak = {}, {}

    def measured(name, function):
        common.forget_peak(model.device)
        try:
            seconds[name], result = timed(function, model.device)
        except torch.OutOfMemoryError:
            seconds[name], result = math.inf, None
            optimizer.zero_grad(set_to_none=True)
        peak[name] = common.held(model.device, "VmHWM")
        return result

    rollout = measured("sampling", lambda: grpo.sample_rollout(model, TEXT, problems, cfg, 1))
    rollout, advantages = half_right(rollout)
    for name, changes in UPDATES.items():
        how = settings(**vars(cfg) | changes)
        model.gradient_checkpointing = "checkpointing" in name
        measured(name, lambda how=how: grpo.update(model, optimizer, rollout, advantages, how))
    return seconds, peak


def paper_work(args):
    """The model with random weights and an adapter, and problems that are random tokens."""
    torch.manual_seed(0)
    model = random_model(common.config_of(args.shape), args.device, DTYPES[args.dtype])
    common.adapted(model, args.rank, 2.0 * args.rank)
    ids = torch.randint(0, 151936, (args.prompts, args.prompt_tokens)).tolist()
    return model, [dict(prompt=i, negative=i, answer="") for i in ids]


def paper(args):
    """A table of a step at the paper's shape; returns whether no memory ran out."""
    model, problems = paper_work(args)
    cfg = settings(samples=args.samples, max_new_tokens=args.tokens, top_p=0.95)
    cfg.micro_batch_tokens = args.micro_batch_tokens
    weights = common.held(args.device)
    paper_step(model, problems, settings(**vars(cfg) | dict(max_new_tokens=args.warm_tokens)))
    found = [paper_step(model, problems, cfg) for _ in range(args.rounds)]
    seconds = {k: statistics.median(one[k] for one, _ in found) for k in found[0][0]}
    line("what", "value", "note")
    line(*["---"] * 3)
    paper_rows(args, seconds)
    shares(model, args, seconds)
    for name in seconds if weights is not None else ():
        most = max(peak[name] for _, peak in found)
        note = f"{(most - weights) / 2**30:.2f} above the weights and the adapter"
        line(f"peak of {name}, GiB", f"{most / 2**30:.2f}", note)
    return math.isfinite(sum(seconds.values()))


def paper_rows(args, seconds):
    """Rows of where the time goes."""
    tokens = args.prompts * args.samples * args.tokens
    step, score = seconds["sampling"] + seconds["arca"], seconds["arca"] - seconds["uniform"]
    line("step, s", number(step), f"{tokens / step:.0f} tokens/s; goal 6 s at most")
    line("sampling, s", number(seconds["sampling"]), f"{tokens / seconds['sampling']:.0f} tokens/s")
    line("scoring, s", number(score), "ARCA's base pass")
    line("update, s", number(seconds["uniform"]), "without scoring")
    longer = seconds["arca, checkpointing"]
    line("update, checkpointing, s", number(longer - score), "without scoring")


def shares(model, args, seconds):
    """Rows of how much of what the machine can do is done, measured here and now."""
    lengths = [args.tokens] * (args.prompts * args.samples)
    prompts, top = [args.prompt_tokens] * args.prompts, DTYPES[args.dtype]
    product, moved = common.product_speed(args.device, top), common.copy_speed(args.device)
    flops, reads = common.sampling_work(model, prompts, lengths, adapter=True)
    learnt = common.update_work(model, prompts, lengths) / seconds["arca"]
    rate, read = flops / seconds["sampling"], reads / seconds["sampling"]
    line("limit, matrix product, TFLOP/s", f"{product / 1e12:.3g}", args.dtype)
    line("limit, copy, TB/s", f"{moved / 1e12:.3g}", "read and written")
    line("sampling, TB/s", f"{read / 1e12:.3g}", f"{100 * read / moved:.1f} % of the copy; goal 40")
    line("sampling, TFLOP/s", f"{rate / 1e12:.3g}", f"{100 * rate / product:.1f} % of the product")
    note = f"{100 * learnt / product:.1f} % of the product; goal 35"
    line("update and scoring, TFLOP/s", f"{learnt / 1e12:.3g}", note)


# ---- The command line ----------------------------------------------------------------------------

SMALL = dict(
    shape="small",
    prompts=2,
    samples=2,
    prompt_tokens=8,
    tokens=4,
    warm_tokens=2,
    rank=4,
    rounds=1,
)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["parity", "paper"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--shape", default="1.7B", help=", ".join(SHAPES))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument(
        "--warm-tokens", type=int, default=512, help="of a step that is not counted"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    use_device(args.device)
    gpu = torch.cuda.get_device_name() if common.on_gpu(args.device) else "CPU"
    print("python bench/gpu.py", *sys.argv[1:])
    print(f"torch {torch.__version__}; {gpu}, {torch.get_num_threads()} threads\n")
    sys.exit(not dict(parity=parity, paper=paper)[args.part](args))


if __name__ == "__main__":
    run_cli(main)
