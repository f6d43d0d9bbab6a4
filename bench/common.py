"""What the benches share: models and work to do, clocks, memory, the limits of the machine."""

import copy
import ctypes
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from data.problems import TINY, add_prompts, load_problems
from fast.linear import hasten
from hf.checkpoint import Tokenizer, load_model, load_tokenizer, random_model
from hf.peft import load_adapter, save_adapter
from lora import add_lora, lora_parameters
from model import Config
from run.flags import check_choice
from train import Settings

# name: hidden, intermediate, layers, heads, key-value heads (arXiv 2505.09388, table 1)
SHAPES = {"0.6B": (1024, 3072, 28, 16, 8), "1.7B": (2048, 6144, 28, 16, 8)}
SHAPES["small"] = (64, 128, 2, 4, 2)  # nobody's: for trying a bench out
TEXT = SimpleNamespace(eos_ids=[], decode=lambda ids: "x" * len(ids))  # no completion ends

# ---- Models and work -----------------------------------------------------------------------------


def config_of(shape):
    """The Config of a Qwen3 of that shape."""
    check_choice("shape", shape, SHAPES)
    hidden, inner, layers, heads, kv = SHAPES[shape]
    vocabulary = 4096 if shape == "small" else 151936
    return Config(vocabulary, hidden, inner, layers, heads, kv, 128, 1e-6, 1e6, True, False, True)


def write_config(shape, folder):
    """config.json of that shape: all that `train.py --random-init` reads."""
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    config |= {key: value for key, value in vars(config_of(shape)).items() if key in config}
    (folder / "config.json").write_bytes(json.dumps(config).encode())


def write_random(shape, folder, dtype):
    """That model as a checkpoint that anyone loads, with the embedded model's tokenizer."""
    model = random_model(config_of(shape), "cpu", dtype)
    write_config(shape, folder)
    state = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata=dict(format="pt"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)


def adapted(model, rank=16, alpha=32.0):
    """The model with an adapter that does something: B is not zero."""
    add_lora(model, rank, alpha)
    torch.manual_seed(0)
    for name, p in lora_parameters(model).items():
        if "lora_B" in name:
            p.data.copy_(0.005 * torch.randn(p.shape))  # drawn here, so the same on every device
    return model


def settings(**changes):
    """Return train.py's Settings for a bench: plain GRPO, completions of at most 64 tokens."""
    return Settings(**dict(credit="uniform", max_new_tokens=64) | changes)


@dataclass(eq=False)
class Work:
    """The same for all: a checkpoint, an adapter, and how much to write to which problems."""

    folder: Path
    adapter: Path  # in PEFT's format
    device: str
    dtype: torch.dtype
    tokenizer: Tokenizer
    problems: list[dict]  # with the token ids of their prompts
    samples: int
    tokens: int  # at most, of a completion
    micro_batch_tokens: int

    def prompts(self):
        return [p["prompt"] for p in self.problems]

    @cached_property
    def model(self):
        """Our model, with the adapter; one for all of ours, since none of them changes it."""
        model = hasten(load_model(self.folder, self.device, self.dtype))  # as load_base does
        return load_adapter(model, self.adapter)

    def ends(self, free):
        """Our tokenizer; unless completions are free to end, nothing ends them."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.eos_ids = self.tokenizer.eos_ids if free else []
        return tokenizer


def prepare(model, scratch, adapter="", device="cpu", dtype="fp32", prompts=8, **sizes) -> Work:
    """Work on `tiny`, a name of SHAPES or a checkpoint folder; what is made goes to `scratch`."""
    folder, dtype = Path(model), dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    if model == "tiny":
        folder = TINY
    elif model in SHAPES:
        folder = Path(scratch) / model
        folder.mkdir()
        write_random(model, folder, dtype)
    if not adapter:
        adapter = Path(scratch) / "adapter"
        save_adapter(adapted(load_model(folder)), adapter)
    tokenizer = load_tokenizer(folder)
    problems = [add_prompts(p, tokenizer) for p in load_problems("tiny")[:prompts]]
    return Work(folder, Path(adapter), device, dtype, tokenizer, problems, **sizes)


# ---- Time and memory -----------------------------------------------------------------------------


def on_gpu(device):
    return str(device).startswith("cuda")


def timed(function, device):
    """The seconds that a call takes, and what it returns."""
    wait = torch.cuda.synchronize if on_gpu(device) else lambda: None
    wait()
    started = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - started, result


def per_call(function, device, calls=20):
    """The seconds of one of many calls in a row, once kernels are ready and graphs captured."""
    if not on_gpu(device):
        return timed(function, device)[0]
    for _ in range(3):
        function()
    seconds, _ = timed(lambda: [function() for _ in range(calls)], device)
    return seconds / calls


def held(device, what="VmRSS"):
    """Bytes held now, or with VmHWM at most since `forget_peak`; None where nobody counts them."""
    if on_gpu(device):
        peak = what == "VmHWM"
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(what))


def forget_peak(device):
    """Start to look for the peak here: what loading took is given back and forgotten."""
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    elif held(device) is not None:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is not in use
        Path("/proc/self/clear_refs").write_bytes(b"5")  # VmHWM becomes VmRSS


# ---- Limits --------------------------------------------------------------------------------------


def product_speed(device, dtype, n=0):
    """FLOP/s of a product of n x n matrices, the best of several: a limit of what is computed."""
    n = n or (8192 if on_gpu(device) else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(5))


def copy_speed(device):
    """Bytes/s, read and written, of a copy, the best of several: a limit of what is read."""
    a = torch.zeros(2**30 if on_gpu(device) else 2**27, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * a.numel() / min(timed(lambda: b.copy_(a), device)[0] for _ in range(5))


def sizes_of(model):
    """Weights of the layers' products, of the head, and of the adapter."""
    head = model.lm_head.weight.numel()
    named = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    lora = sum(p.numel() for n, p in named if "lora_" in n)
    return sum(p.numel() for n, p in named) - lora, head, lora


def attended(starts, lengths):
    """The sum over all tokens after `starts` of how many tokens they look at."""
    return sum(sum(range(a + 1, a + n + 1)) for a, n in zip(starts, lengths, strict=True))


def sampling_work(model, prompts, lengths, adapter=False):
    """(FLOPs, bytes) that sampling needs: the layers for all tokens, the head for drawn ones; all
    weights once a position, and the cache that each token looks at. lengths: of each row."""
    c, (layers, head, lora) = model.config, sizes_of(model)
    layers += lora * adapter
    starts = [p for p in prompts for _ in range(len(lengths) // len(prompts))]
    read = [n - 1 for n in lengths]  # the last token drawn is not read
    seen = attended(starts, read) * c.num_hidden_layers * c.head_dim
    flops = 2 * layers * (sum(prompts) + sum(read)) + 2 * head * sum(lengths)
    number = model.lm_head.weight.element_size()
    reads = (layers + head) * max(lengths) + 2 * seen * c.num_key_value_heads
    return flops + 4 * seen * c.num_attention_heads, reads * number


def update_work(model, prompts, lengths, base_pass=True):
    """FLOPs that an update needs: forward and backward through frozen layers (2 + 2 a weight and
    token), with their gradient through the adapter (2 + 4) and only at completions through the head
    (2 + 2), and ARCA's base pass (2). What is computed again is not counted, nor padding."""
    c, (layers, head, lora) = model.config, sizes_of(model)
    starts = [p for p in prompts for _ in range(len(lengths) // len(prompts))]
    read = sum(prompts) + sum(lengths) - len(lengths)  # a prompt once for all its completions
    seen = attended([0] * len(prompts), prompts) + attended(starts, [n - 1 for n in lengths])
    seen *= c.num_hidden_layers * c.head_dim
    once = 2 * layers * read + 4 * seen * c.num_attention_heads
    back = 2 * layers * read + 8 * seen * c.num_attention_heads
    return once * (1 + base_pass) + back + 6 * lora * read + 4 * head * sum(lengths)


# ---- Tables --------------------------------------------------------------------------------------


def number(x):
    """Three digits, or all those before the point."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def middle(values):
    """Two cells: the median, and from the least to the most."""
    if not values:
        return "", ""
    return number(statistics.median(values)), f"{number(min(values))} to {number(max(values))}"


def one_line(error):
    """What an exception says, cut to a line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:250]


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
