"""LoRA (arXiv 2106.09685, eq. 3): y = W x + (alpha / r) B A x. W is frozen, A and B are trained.

The layer keeps the two terms apart, so one set of weights is two models: the adapted one, and under
`adapter_off(model)` the base one, bit for bit. ARCA's residual, the policy divergence and the KL
penalty all turn that switch; no reference model is copied, and nothing is merged into W.
Adapters are read and written in PEFT's format (adapter_config.json, adapter_model.safetensors).
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from system.errors import UserError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    """What is trained, by name: model.layers.0.mlp.up_proj.lora_A.weight, ..."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


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
