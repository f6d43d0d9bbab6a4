"""What a GPU should show, in parts; bench/gpu.sh runs them all.

    python bench/gpu.py parity                 # the same numbers as on the CPU
    python bench/gpu.py paper --checkpoint     # a step of the paper's run on random weights

`paper` is one step of ARCA at the paper's shape: 8 prompts x 4 completions that nothing ends,
rank 64. Its three parts are sampling, the update without credit (`uniform`), and scoring: ARCA's
base pass, which is the update with it minus the one without.
"""

import argparse
import copy
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
from lora import add_lora, lora_parameters
from model import load_model, load_tokenizer
from plumbing.files import run_cli
from sample import generate

TINY_STEP = dict(samples=4, max_new_tokens=64, credit="arca")
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


def step_on(device, dtype, r, adapter=True):
    """An update of plain SGD: metrics, the signals of the step, and how the parameters moved."""
    model = tiny(device, dtype, adapter)
    parameters = list(lora_parameters(model).values())
    before = torch.cat([p.detach().flatten().cpu() for p in parameters])
    r, advantages = half_right(copy.copy(r))
    sgd, s = torch.optim.SGD(parameters, lr=1.0), settings(**TINY_STEP)
    metrics, known, _ = grpo.update(model, sgd, r, advantages, s)
    after = torch.cat([p.detach().flatten().cpu() for p in parameters])
    return metrics, known, after - before


def same_alone(device, dtype, problems):
    """The share of completions that are the same tokens when each prompt is sampled alone, and
    whether sampling twice gives the same bytes."""
    model, stop = tiny(device, dtype), load_tokenizer(TINY).eos_ids
    prompts = [p["prompt"] for p in problems]
    together, again = (generate(model, prompts, 4, 64, eos_ids=stop, seed=1) for _ in range(2))
    texts, same = rows(together), []
    for i, prompt in enumerate(prompts):
        part = rows(generate(model, [prompt], 4, 64, eos_ids=stop, seed=1))
        same += [a == b for a, b in zip(texts[4 * i : 4 * i + 4], part, strict=True)]
    twice = torch.equal(together.tokens, again.tokens) and torch.equal(together.logps, again.logps)
    return sum(same) / len(same), twice


def rows(c):
    """The tokens of each completion as a list."""
    return [tokens[:n] for tokens, n in zip(c.tokens.tolist(), c.lengths.tolist(), strict=True)]


def parity(args):
    """A table of what must hold on the device; returns whether all of it does."""
    tokenizer, device = load_tokenizer(TINY), args.device
    problems = [add_prompts(p, tokenizer) for p in load_problems("tiny")[:8]]
    checks = [("a logit in fp32, CPU and device", logits_apart(device, problems), 1e-3)]
    moves = {}
    for dtype, worst in (("fp32", 1e-4), ("bf16", 1.0)):
        s = settings(**TINY_STEP)
        r = grpo.rollout(tiny(device, dtype), tokenizer, problems, s, 1)
        metrics, _, moves[dtype] = step_on(device, dtype, r)
        checks += [(f"logp_mismatch in {dtype}, largest", metrics["logp_mismatch"], worst)]
        checks += [(f"logp_mismatch in {dtype}, mean", metrics["logp_mismatch_mean"], worst / 20)]
        _, known, _ = step_on(device, dtype, r, adapter=False)
        checks += [(f"residual in {dtype} at B = 0", float(known.residual.abs().max()), 0.0)]
        if dtype == "fp32":
            there, here = moves[dtype], step_on("cpu", dtype, r)[2]
            apart = float((there - here).norm() / here.norm())
            checks += [("the gradient in fp32, CPU and device, relative", apart, 1e-3)]
        alone, twice = same_alone(device, dtype, problems)
        # In bf16 a batch of another shape rounds otherwise, and a token turns: only reported.
        checks += [
            (f"share changed when alone, {dtype}", 1 - alone, 0.05 if dtype[0] == "f" else 1)
        ]
        checks += [(f"sampled twice, same bytes, {dtype}", 1 - twice, 0.0)]
    line("check", "found", "at most", "holds")
    line(*["---"] * 4)
    for what, found, most in checks:
        line(what, f"{found:.3g}", f"{most:.3g}", "yes" if found <= most else "NO")
    return all(found <= most for _, found, most in checks)


# ---- The paper's shape ---------------------------------------------------------------------------


def paper_step(model, problems, s):
    """Seconds of sampling, of an update without scoring, of one with it; and the peak of each."""
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.0)
    seconds, peak = {}, {}

    def measured(name, function):
        common.forget_peak(model.device)
        seconds[name], result = timed(function, model.device)
        peak[name] = common.held(model.device, "VmHWM")
        return result

    r = measured("sampling", lambda: grpo.rollout(model, TEXT, problems, s, 1))
    r, advantages = half_right(r)
    for name in ("uniform", "arca"):
        how = settings(**vars(s) | dict(credit=name))
        measured(name, lambda how=how: grpo.update(model, optimizer, r, advantages, how))
    return seconds, peak


def paper(args):
    """A table of a step at the paper's shape on random weights."""
    device, dtype = args.device, DTYPES[args.dtype]
    torch.manual_seed(0)
    model = common.adapted(common.random_model(args.shape, device, dtype), args.rank, 2 * args.rank)
    ids = torch.randint(0, 151936, (args.prompts, args.prompt_tokens)).tolist()
    problems = [dict(prompt=i, negative=i, answer="") for i in ids]
    sizes = dict(samples=args.samples, max_new_tokens=args.tokens, top_p=0.95)
    s = settings(**sizes, micro_tokens=args.micro_tokens, checkpoint=args.checkpoint)
    weights = common.held(device)
    paper_step(model, problems, settings(**vars(s) | dict(max_new_tokens=args.warm_tokens)))
    found = [paper_step(model, problems, s) for _ in range(args.rounds)]
    middle = {k: statistics.median(seconds[k] for seconds, _ in found) for k in found[0][0]}
    peak = {k: max(peaks[k] for _, peaks in found) for k in found[0][1]}
    step = middle["sampling"] + middle["arca"]

    lengths = [args.tokens] * (args.prompts * args.samples)
    prompts = [args.prompt_tokens] * args.prompts
    flops, reads = common.sampling_work(model, prompts, lengths, adapter=True)
    work = common.update_work(model, prompts, lengths)
    product, copy_rate = common.product_speed(device, dtype), common.copy_speed(device)
    rate, read = flops / middle["sampling"], reads / middle["sampling"]
    line("what", "value", "note")
    line(*["---"] * 3)
    line("step, s", number(step), "goal 6 at most")
    line(
        "sampling, s",
        number(middle["sampling"]),
        f"{sum(lengths) / middle['sampling']:.0f} tokens/s",
    )
    line("update, s", number(middle["uniform"]), f"{sum(lengths) / step:.0f} tokens/s of the step")
    line("scoring, s", number(middle["arca"] - middle["uniform"]), "ARCA's base pass")
    line("limits: TFLOP/s, TB/s", f"{product / 1e12:.3g}, {copy_rate / 1e12:.3g}", "product, copy")
    line(
        "sampling, TB/s",
        f"{read / 1e12:.3g}",
        f"{100 * read / copy_rate:.1f} % of the copy, goal 40",
    )
    line("sampling, TFLOP/s", f"{rate / 1e12:.3g}", f"{100 * rate / product:.1f} % of the product")
    share = 100 * work / middle["arca"] / product
    line(
        "update, TFLOP/s",
        f"{work / middle['arca'] / 1e12:.3g}",
        f"{share:.1f} % of the product, goal 35",
    )
    for name, most in peak.items() if weights is not None else ():
        note = f"{(most - weights) / 2**30:.2f} above the weights and adapter"
        line(f"peak of {name}, GiB", f"{most / 2**30:.2f}", note)
    return True


# ---- The command line ----------------------------------------------------------------------------

SMALL = dict(shape="small", prompts=2, samples=2, prompt_tokens=8, tokens=8, warm_tokens=2, rank=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    gpu = torch.cuda.get_device_name() if common.on_gpu(args.device) else "CPU"
    print("python bench/gpu.py", *sys.argv[1:])
    print(f"torch {torch.__version__}; {gpu}, {torch.get_num_threads()} threads\n")
    sys.exit(not dict(parity=parity, paper=paper)[args.part](args))


if __name__ == "__main__":
    run_cli(main)
