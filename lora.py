"""LoRA (arXiv 2106.09685, eq. 3): y = W x + (alpha / r) B A x. W is frozen, A and B are trained.

The layer keeps the two terms apart, so one set of weights is two models: the adapted one, and under
`adapter_off(model)` the base one, bit for bit. ARCA's residual, the policy divergence and the KL
penalty all turn that switch; no reference model is copied, and nothing is merged into W.
Adapters are read and written in PEFT's format (adapter_config.json, adapter_model.safetensors).
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save

from plumbing import files
from plumbing.files import UserError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # what PEFT puts before each of our names
# What PEFT offers beyond this layer. An adapter that uses one of these is refused by name.
UNSUPPORTED = ["use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"]
UNSUPPORTED += ["lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens"]
UNSUPPORTED += ["trainable_token_indices"]
DEFAULTS = dict(r=8, lora_alpha=8.0, lora_dropout=0.0, use_rslora=False, bias="none")  # PEFT's


class LoRALinear(nn.Module):
    """A frozen linear layer and its correction; A and B are fp32, the products in x's dtype."""

    def __init__(self, base: nn.Linear, rank, alpha, dropout=0.0, rslora=False):
        super().__init__()
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)  # rsLoRA: arXiv 2312.03732
        place = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)  # (r, D_in)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)  # (D_out, r)
        self.dropout = nn.Dropout(dropout)  # in train() mode only, and all runs here are in eval()
        self.on = True

    def forward(self, x):
        if not self.on:
            return self.base(x)
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        rows = x.flatten(0, -2)  # (N, D_in)
        low = F.linear(self.dropout(rows) if self.training else rows, A)  # (N, r)
        y = self.base(rows).addmm_(low, B.T, alpha=self.scale)  # (N, D_out)
        return y.view(*x.shape[:-1], -1)


def lora_layers(model) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model) -> dict[str, nn.Parameter]:
    """What is trained, by PEFT's names: ...model.layers.0.mlp.up_proj.lora_A.weight."""
    return {PREFIX + name: p for name, p in model.named_parameters() if "lora_" in name}


def linear_layers(model) -> list[str]:
    """The names of the layers that can be adapted: all but the head."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]


def attach(model, names, rank, alpha, dropout=0.0, rslora=False):
    """Freeze the model and put a LoRA layer in the place of each named linear layer."""
    model.requires_grad_(False)
    for name in names:
        layer = LoRALinear(model.get_submodule(name), rank, alpha, dropout, rslora)
        model.set_submodule(name, layer)


def add_lora(model, rank, alpha, targets=ALL_LINEAR, dropout=0.0, seed=0):
    """Freeze `model` and adapt each linear layer with a last name in `targets`; returns the model.

    B is 0, so the adapted model starts as the base one. A is normal with variance 1 / D_in and
    comes from `seed` alone. UserError on a rank below 1, or a target that the model has not.
    """
    found = [name for name in linear_layers(model) if name.split(".")[-1] in targets]
    if absent := set(targets) - {name.split(".")[-1] for name in found}:
        raise UserError(f"no linear layer is called {min(absent)}: targets are {ALL_LINEAR}")
    if rank < 1:
        raise UserError(f"LoRA rank {rank} is below 1: use --rank 1 or more")
    attach(model, found, rank, alpha, dropout)
    rng = torch.Generator().manual_seed(seed)  # on the CPU: every device starts from the same A
    for layer in lora_layers(model).values():
        A = torch.randn(layer.lora_A.weight.shape, generator=rng)
        layer.lora_A.weight.data.copy_(A / math.sqrt(layer.base.in_features))
        layer.lora_B.weight.data.zero_()
    return model.eval()


@contextmanager
def adapter_off(model):
    """The base path: inside, each LoRA layer is its frozen base layer; then all is as before."""
    before = [(layer, layer.on) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.on = False
        yield model
    finally:
        for layer, on in before:
            layer.on = on


def save_adapter(model, folder, base_model=""):
    """Write the adapter in PEFT's format; PeftModel.from_pretrained(base, folder) loads it."""
    layers, folder = lora_layers(model), Path(folder)
    if not layers:
        raise UserError("this model has no adapter to save: call add_lora first")
    one, last = next(iter(layers.values())), {name.split(".")[-1] for name in layers}
    # Last names, as PEFT writes them, unless a layer of such a name is without an adapter.
    plain = {name.split(".")[-1] for name in linear_layers(model) if not name.endswith(".base")}
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model))
    config.update(r=one.rank, lora_alpha=one.alpha, lora_dropout=one.dropout.p, bias="none")
    config.update(use_rslora=one.rslora, target_modules=sorted(layers if last & plain else last))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "adapter_config.json", config)
    tensors = {name: p.detach().cpu().contiguous() for name, p in lora_parameters(model).items()}
    data = save(tensors, metadata={"format": "pt"})
    files.write_whole(folder / "adapter_model.safetensors", data)


def load_adapter(model, folder):
    """Put the PEFT adapter in `folder` on its base model; returns the model, ready to train on.

    The tensors say which layers are adapted, so every form of target_modules works. UserError on a
    damaged adapter, another model's, or one with a feature of PEFT that we do not compute.
    """
    kinds, folder = {name: type(value) for name, value in DEFAULTS.items()}, Path(folder)
    found = files.read_json(folder / "adapter_config.json")
    config = DEFAULTS | files.checked(found, folder, **kinds)
    asks = [key for key in UNSUPPORTED if config.get(key)]
    asks += ["bias"] * (config["bias"] != "none") + ["lora_dropout"] * (config["lora_dropout"] > 1)
    asks += ["peft_type"] * (config.get("peft_type") != "LORA")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        asks.append("init_lora_weights")  # such as pissa, which alters the base
    if asks:
        raise UserError(f"{folder}: {asks[0]} = {config.get(asks[0])!r} is not supported")
    tensors, _ = files.read_tensors(folder / "adapter_model.safetensors")
    names = sorted({name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in tensors})
    if wrong := set(names) - set(linear_layers(model)):
        raise UserError(f"{folder} adapts {min(wrong)}, which is no plain layer of this model")
    rank, alpha, dropout, rslora, _ = (config[name] for name in DEFAULTS)
    numbers = rank * sum(sum(model.get_submodule(name).weight.shape) for name in names)
    files.check_size(tensors, numbers, folder)
    attach(model, names, rank, alpha, dropout, rslora)
    ours = lora_parameters(model)
    files.check_tensors(tensors, ours, folder)
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])
    return model.eval()
