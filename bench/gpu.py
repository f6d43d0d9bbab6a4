"""What a GPU should show, in one process: is it right, how fast, why, and what fits.

    bash bench/gpu.sh                          # about 4 minutes on an H100, 450 s at most
    bash bench/gpu.sh --only right,paper       # some of the blocks
    bash bench/gpu.sh --device cpu --small     # all of it in small, to try it out

The work is the paper's step on random weights: 8 prompts x 4 completions that nothing ends, rank
64. Blocks come in order of what they tell in a second, and each prints as it finds. One that fails
says so in a line, one that no longer fits is named, and the others go on; at the end stands a table
of all that was measured. Scoring is ARCA's base pass: an update with it minus one without.
"""

import contextlib
import gc
import io
import math
import signal
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import grpo
import sample
import train
from bench import common, gpu_variants
from bench.common import TEXT, line, number, one_line, per_call, settings, timed
from bench.gpu_right import right
from bench.ours import half_right
from eval_math import evaluate
from fast.decoder import kept_decoder
from lora import lora_parameters
from run.flags import check_choice, load_base, use_device
from system.errors import Parser, run_cli
from system.files import read_rows

MOST_SECONDS = 450
FULL = dict(shape="1.7B", rank=64, prompts=8, samples=4, prompt_tokens=128, tokens=512)
FULL |= dict(micro_batch_tokens=8192, long=4096, checked=8, turns=8, matrix=8192)
FULL |= dict(budgets=[2048, 8192, 32768])  # tokens of a micro-batch
FULL |= dict(pools=[(32, 512), (64, 512), (128, 512), (256, 512), (16, 4096)])  # rows, columns
FULL |= dict(attention=[(b, S) for S in (256, 512, 1024, 4608) for b in (16, 32, 128)])
FULL |= dict(drawn=(32, 256), evaluated=64)  # rows, problems
SMALL = dict(shape="small", rank=4, prompts=2, samples=2, prompt_tokens=8, tokens=8)
SMALL |= dict(micro_batch_tokens=64, long=16, checked=2, turns=1, matrix=256)
SMALL |= dict(budgets=[64], pools=[(2, 8)], attention=[(2, 16)], drawn=(2, 4), evaluated=2)
EVALUATED = 200  # problems of the paper's evaluation


@dataclass
class Bench:
    """What the blocks share: the sizes, the model, the limits of the machine, the table."""

    device: str
    size: SimpleNamespace  # FULL or SMALL
    folder: Path  # for what is written
    rows: list[tuple] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def seconds(self):
        """How long it has been running."""
        return time.perf_counter() - self.started

    def found(self, what, value, note=""):
        """Print a row, and keep it for the table at the end."""
        value = "out of memory" if value == math.inf else value
        self.rows.append((what, number(value) if isinstance(value, float) else value, note))
        line(*self.rows[-1])

    def table(self):
        """Print all that was found so far."""
        print(f"\n{self.card}, torch {torch.__version__}, {self.size.shape}, bf16:\n")
        line("what", "value", "note")
        line(*["---"] * 3)
        for row in self.rows:
            line(*row)

    @cached_property
    def card(self):
        return torch.cuda.get_device_name() if common.on_gpu(self.device) else "CPU"

    @cached_property
    def model(self):
        """A model of random weights, loaded as train.py --random-init does, with an adapter; its
        distributions are as peaked as a trained one's, on which the time of a draw may depend."""
        common.write_config(self.size.shape, self.folder)
        flags = dict(model=str(self.folder), revision="", device=self.device, dtype="bf16")
        model, _ = load_base(
            SimpleNamespace(**flags, random_init=True, chat=False, system="", thinking="")
        )
        W = model.lm_head.weight
        model.model.norm.weight.data.fill_(7 / (float(W.std()) * math.sqrt(W.shape[1])))
        return common.adapted(model, self.size.rank, 2.0 * self.size.rank)

    @cached_property
    def copied(self):
        return common.copy_speed(self.device)

    @cached_property
    def product(self):
        return common.product_speed(self.device, torch.bfloat16, self.size.matrix)

    @cached_property
    def optimizer(self):
        return torch.optim.AdamW(lora_parameters(self.model).values(), lr=0.0)

    def settings(self, **changes):
        size = self.size
        sizes = dict(samples=size.samples, max_new_tokens=size.tokens, top_p=0.95)
        return settings(**sizes | dict(micro_batch_tokens=size.micro_batch_tokens) | changes)

    def problems(self, count, tokens):
        """Problems whose prompts are random tokens."""
        torch.manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (count, tokens)).tolist()
        return [dict(prompt=i, negative=i, answer="") for i in ids]

    def rollout(self, lengths, samples):
        """A rollout of random completions of these lengths, every second one right."""
        lengths = torch.tensor(lengths)
        problems = self.problems(len(lengths) // samples, self.size.prompt_tokens)
        tokens = torch.randint(0, self.model.config.vocab_size, (len(lengths), int(lengths.max())))
        logps = torch.zeros(tokens.shape)
        finished = torch.ones(len(lengths), dtype=torch.bool)
        completions = sample.Completions(tokens, lengths, logps, finished)
        return grpo.Rollout(problems, completions, [], torch.zeros(len(problems), samples))

    def update(self, rollout, credit="arca", budget=None, checkpointing=False):
        """(Seconds, peak GiB) of an update; infinite where memory ran out."""
        budget = budget or self.size.micro_batch_tokens
        cfg = self.settings(credit=credit, micro_batch_tokens=budget)
        self.model.gradient_checkpointing = checkpointing
        rollout, advantages = half_right(rollout)
        work = (self.model, self.optimizer, rollout, advantages, cfg)
        common.forget_peak(self.device)
        try:
            seconds, _ = timed(lambda: grpo.update(*work), self.device)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return math.inf, math.inf
        finally:
            self.model.gradient_checkpointing = False
        return seconds, peak(self.device)

    def pool(self, rows, columns):
        """A function that draws a token in each of so many rows and decodes it, which makes the
        rows `columns` long. It begins by cutting the token off, so every call is the same step."""
        model = self.model
        decoder = kept_decoder(model, rows, columns)
        cache = decoder.cache
        cache.k.normal_()
        cache.v.normal_()
        hidden = gpu_variants.peaked_states(model, rows)
        u = torch.rand(rows, device=self.device, dtype=torch.float64)
        tokens = torch.zeros(rows, dtype=torch.long, device=self.device)

        @torch.no_grad()
        def step(draw=True, decode=True):
            cache.lengths[:rows] = columns - 1
            cache.filled = columns - 1
            drawn = sample.draw_next(model, hidden, u, 1.0, 0.95, 0)[0] if draw else tokens
            if decode:
                decoder.step(drawn)

        return step

    def step_bytes(self, rows, columns):
        """What a decoding step must read: all weights, and the cache of each row."""
        prompts = [columns] * rows
        _, read_by_two = common.sampling_work(self.model, prompts, [2] * rows, adapter=True)
        _, read_by_three = common.sampling_work(self.model, prompts, [3] * rows, adapter=True)
        return read_by_three - read_by_two


def peak(device):
    """GiB held at most since `forget_peak`."""
    return (common.held(device, "VmHWM") or 0) / 2**30


def percent(part, whole):
    return f"{100 * part / whole:.1f} %"


# ---- Blocks --------------------------------------------------------------------------------------


def facts(bench):
    """Versions, limits, and which kernel PyTorch chooses for each of our calls of attention."""
    model = bench.model  # to load it chooses which kernels of attention may be used
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if common.on_gpu(bench.device):
        print(torch.cuda.get_device_properties(bench.device))
        print("cuDNN", torch.backends.cudnn.version())
    for kind in ("flash", "mem_efficient", "cudnn", "math"):
        print(f"attention, {kind}:", getattr(torch.backends.cuda, f"{kind}_sdp_enabled")())
    print(f"model loaded at {bench.seconds():.0f} s", flush=True)
    bench.found("limit, matrix product, TFLOP/s", bench.product / 1e12, "bf16")
    bench.found("limit, copy, TB/s", bench.copied / 1e12, "read and written")
    calls = {}
    with gpu_variants.attention_calls(calls):
        cfg = bench.settings(max_new_tokens=8)
        grpo.sample_rollout(model, TEXT, bench.problems(2, 8), cfg, 1)
        bench.update(bench.rollout([5, 8, 8, 3], 2))
    print(*calls.values(), sep="\n")


def decode_profile(bench):
    """What a decoding step at the paper's shape consists of."""
    rows, columns = bench.size.prompts * bench.size.samples, bench.size.tokens
    step = bench.pool(rows, columns)
    decode = per_call(lambda: step(draw=False), bench.device)
    draw = per_call(lambda: step(decode=False), bench.device)
    bench.found("a decoding step, ms", 1e3 * decode, f"{rows} rows that hold {columns} tokens")
    bench.found("a draw, ms", 1e3 * draw, "top_p 0.95")
    gpu_variants.kernels(step, bench.device, bench.size.turns, 25)


def paper_rollout(bench):
    """Sampling at the paper's shape, the first time (with its captures) and the second."""
    size, model, device = bench.size, bench.model, bench.device
    problems, cfg = bench.problems(size.prompts, size.prompt_tokens), bench.settings()
    model.__dict__.pop("kept_decoder", None)
    free()
    reserved = torch.cuda.memory_reserved() if common.on_gpu(device) else 0
    common.forget_peak(device)
    work = partial(grpo.sample_rollout, model, TEXT, problems, cfg, 1)
    first, _ = timed(work, device)
    seconds, _ = timed(work, device)
    lengths = [size.tokens] * (size.prompts * size.samples)
    prompts = [size.prompt_tokens] * size.prompts
    flops, read = common.sampling_work(model, prompts, lengths, adapter=True)
    rate = read / seconds
    bench.found("sampling, s", seconds, f"{sum(lengths) / seconds:.0f} tokens/s")
    bench.found("sampling, TB/s", rate / 1e12, f"{percent(rate, bench.copied)} of the copy")
    share = percent(flops / seconds, bench.product)
    bench.found("sampling, TFLOP/s", flops / seconds / 1e12, f"{share} of the product")
    bench.found("sampling, the first time, s", first, "with its graphs")
    bench.found("peak of sampling, GiB", peak(device))
    if common.on_gpu(device):
        more = (torch.cuda.memory_reserved() - reserved) / 2**30
        graphs = len(model.kept_decoder.graphs)
        bench.found("memory that sampling keeps, GiB", more, f"its cache and {graphs} graphs")
    return sum(lengths), seconds


def paper(bench):
    """A step at the paper's shape: sampling, scoring, update."""
    size = bench.size
    tokens, sampling = paper_rollout(bench)
    rollout = bench.rollout([size.tokens] * (size.prompts * size.samples), size.samples)
    ways = dict(uniform=dict(credit="uniform"), arca={}, checkpointing=dict(checkpointing=True))
    seconds, peaks = {}, {}
    for name, how in ways.items():
        first, _ = bench.update(rollout, **how)
        seconds[name], peaks[name] = bench.update(rollout, **how)
        print(f"update, {name}: {first:.2f} s, then {seconds[name]:.2f}", flush=True)
    score = seconds["arca"] - seconds["uniform"]
    bench.found("scoring, s", score, "ARCA's base pass")
    bench.found("update, s", seconds["uniform"], "without scoring")
    bench.found("update, checkpointing, s", seconds["checkpointing"] - score, "without scoring")
    step = sampling + seconds["arca"]
    bench.found("step, s", step, f"{tokens / step:.0f} tokens/s")
    lengths, prompts = rollout.completions.lengths.tolist(), [size.prompt_tokens] * size.prompts
    rate = common.update_work(bench.model, prompts, lengths) / seconds["arca"]
    share = percent(rate, bench.product)
    bench.found("update and scoring, TFLOP/s", rate / 1e12, f"{share} of the product")
    note = f"{size.micro_batch_tokens} tokens at once"
    bench.found("peak of an update, GiB", peaks["arca"], note)
    bench.found("peak of an update, checkpointing, GiB", peaks["checkpointing"])
    bench.table()


def update_profile(bench):
    """What an update of one micro-batch consists of; on the GPU and until it is done."""
    size = bench.size
    count = max(1, size.micro_batch_tokens // (size.tokens * size.samples))
    rollout = bench.rollout([size.tokens] * (count * size.samples), size.samples)
    seconds = per_call(lambda: bench.update(rollout, "uniform"), bench.device, calls=3)
    print(f"{count * size.samples} rows: {1e6 * seconds:.0f} us until done")
    gpu_variants.kernels(lambda: bench.update(rollout, "uniform"), bench.device, 1, 20)


def ragged(bench):
    """Updates whose every shape is new, twice each: what a first time costs. Then the same with
    cuDNN's attention switched on, or off if the project has it on."""
    size, cuda = bench.size, torch.backends.cuda
    rng = torch.Generator().manual_seed(1)
    many = (5, size.prompts * size.samples)
    lengths = torch.randint(size.tokens // 4, size.tokens + 1, many, generator=rng).tolist()
    ours = cuda.cudnn_sdp_enabled()
    turns = {ours: lengths[:3]}
    if common.on_gpu(bench.device):
        turns[not ours] = lengths[3:]
    for cudnn, drawn in turns.items():
        cuda.enable_cudnn_sdp(cudnn)
        try:
            rollouts = [bench.rollout(x, size.samples) for x in drawn]
            pairs = [(bench.update(x)[0], bench.update(x)[0]) for x in rollouts]
        finally:
            cuda.enable_cudnn_sdp(ours)
        name = "update, ragged, s" + f", with cuDNN {cudnn}" * (cudnn != ours)
        firsts = ", ".join(number(first) for first, _ in pairs)
        bench.found(name, statistics.mean(again for _, again in pairs), f"first times {firsts}")


def fits(bench):
    """Peak of an update by the tokens of a micro-batch, and of long completions, a row at once;
    without the cache that the sampler keeps."""
    size = bench.size
    bench.model.__dict__.pop("kept_decoder", None)
    shapes = [(budget, size.tokens) for budget in size.budgets] + [(1, size.long)]
    for budget, tokens in shapes:
        rows = size.prompts * size.samples if tokens == size.tokens else 2
        rollout = bench.rollout([tokens] * rows, min(rows, size.samples))
        what = "one row" if budget == 1 else f"{budget} tokens at once"
        for checkpointing in (False, True):
            seconds, most = bench.update(rollout, "arca", budget, checkpointing)
            note = f"{number(rows * tokens / seconds)} tokens/s" + ", checkpointing" * checkpointing
            bench.found(f"peak, completions of {tokens}, {what}, GiB", most, note)
            free()


def pools(bench):
    """Decoding by how many rows there are and how much they hold."""
    for rows, columns in bench.size.pools:
        seconds = per_call(bench.pool(rows, columns), bench.device)
        rate = bench.step_bytes(rows, columns) / seconds
        note = f"{rows / seconds:.0f} tokens/s, {percent(rate, bench.copied)} of the copy"
        bench.found(f"draw and step, {rows} rows of {columns}, ms", 1e3 * seconds, note)
        free()


def evaluation(bench):
    """An evaluation of the paper's run, scaled from a part of it: a quarter of the tokens, after
    prompts so long that the mean row is as long, of fewer problems."""
    size, few = bench.size, bench.size.tokens // 4
    some = size.evaluated
    prompt = size.prompt_tokens + size.tokens // 2 - few // 2
    prompts = [p["prompt"] for p in bench.problems(some, prompt)]
    kept_decoder(bench.model, 256, prompt + few + sample.BLOCK).close()
    work = (bench.model, TEXT, prompts, [""] * some, 4)
    evaluate(*work, 8, 1.0, 0.95, 1)  # captures its graphs
    seconds, _ = timed(lambda: evaluate(*work, few, 1.0, 0.95, 1), bench.device)
    scaled = seconds * size.tokens / few * EVALUATED / some
    note = f"{EVALUATED} greedy, {4 * EVALUATED} samples; scaled from {number(seconds)} s"
    bench.found("evaluation, s", scaled, note)


def training(bench):
    """train.py itself in this process: three steps, of which the second compares no rules. Its
    random weights predict flatly, so a draw may take its slow way."""
    bench.model.__dict__.pop("kept_decoder", None)  # whose config.json is read here
    size, out = bench.size, bench.folder / "run"
    flags = f"--preset paper --model {bench.folder} --random-init --data tiny --out {out} --steps 3"
    flags += f" --device {bench.device} --dtype bf16 --eval-problems 8 --eval-samples 0"
    flags += f" --max-new-tokens {size.tokens} --prompts {size.prompts} --rank {size.rank}"
    given = sys.argv
    try:
        sys.argv = ["train.py", *flags.split()]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main()
    finally:
        sys.argv = given
    for metrics in read_rows(out / "metrics.jsonl"):
        parts = [number(metrics[f"seconds_{part}"]) for part in ("rollout", "update")]
        note = f"rollout {parts[0]} s, update {parts[1]} s, skipped {metrics['skipped']}"
        bench.found(
            f"train.py, step {metrics['step']}, tokens/s", metrics["tokens_per_second"], note
        )


BLOCKS = {  # name: (what it does, the seconds that it should take on a GPU)
    "facts": (facts, 30),
    "right": (right, 30),
    "profile": (decode_profile, 15),
    "paper": (paper, 30),
    "update": (update_profile, 8),
    "ragged": (ragged, 20),
    "pools": (pools, 15),
    "attention": (gpu_variants.attention_variants, 20),
    "draws": (gpu_variants.draw_variants, 8),
    "fits": (fits, 25),
    "evaluation": (evaluation, 15),
    "training": (training, 40),
}

# ---- One after the other -------------------------------------------------------------------------


def free():
    """Give back what the last block no longer uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def at_most(seconds):
    """Raise TimeoutError in what runs inside after so many seconds."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(bench, names):
    """Run these blocks, each if it still fits; return whether all went well."""
    well = True
    for name in names:
        block, seconds = BLOCKS[name]
        now = bench.seconds()
        print(f"\n## {name}, at {now:.0f} s\n", flush=True)
        left = MOST_SECONDS - now
        if seconds > left:
            print(f"LEFT OUT: {name} takes {seconds} s, and {left:.0f} s are left", flush=True)
            well = False
            continue
        try:
            free()  # where an alarm would be lost, in the collector
            with at_most(min(left, 3 * seconds)):
                block(bench)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-3:]
            where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in last)
            print(f"FAILED: {name}: {one_line(error)} (at {where})", flush=True)
            well = False
    return well


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--only", default=",".join(BLOCKS), help="which blocks")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        check_choice("only", name, BLOCKS)
    use_device(args.device)
    size = SimpleNamespace(**SMALL if args.small else FULL)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, size, Path(folder))
        print("python bench/gpu.py", *sys.argv[1:])
        print(f"{bench.card}, {torch.get_num_threads()} threads")
        well = run(bench, names)
    bench.table()
    print(f"\n{bench.seconds():.0f} s, {'all well' if well else 'NOT all well'}")
    sys.exit(not well)


if __name__ == "__main__":
    run_cli(main)
