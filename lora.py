"""LoRA (arXiv 2106.09685, eq. 3): y = W x + (alpha / r) B A x. W is frozen, A and B are trained.

The layer keeps the two terms apart, so one set of weights is two models: the adapted one and, under
`adapter_off(model)`, the base one, bit for bit. ARCA's residual, the policy divergence and the KL
penalty all use that switch. This file imports nothing of ours and can be copied out alone.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer and its correction; A and B are fp32, products in the dtype of x."""

    def __init__(self, base: nn.Linear, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        self.scale = alpha / rank
        place = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)  # (r, D_in)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)  # (D_out, r)
        self.on = True  # adapter_off sets it to False

    def forward(self, x):
        if not self.on:
            return self.base(x)
        A = self.lora_A.weight.to(x.dtype)
        B = self.lora_B.weight.to(x.dtype)
        rows = x.flatten(0, -2)  # (N, D_in)
        low = F.linear(rows, A)  # (N, r)
        y = self.base(rows).addmm_(low, B.T, alpha=self.scale)  # (N, D_out)
        return y.view(*x.shape[:-1], -1)


def lora_layers(model) -> dict[str, LoRALinear]:
    """Return the LoRA layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def lora_parameters(model) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name: model.layers.0.mlp.up_proj.lora_A.weight, ..."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def linear_layers(model) -> list[str]:
    """Return the names of the layers that can be adapted: all linear ones but the head."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]


def attach(model, names, rank, alpha):
    """Freeze the model; put a LoRA layer, A and B unset, in the place of each named layer."""
    model.requires_grad_(False)
    for name in names:
        layer = LoRALinear(model.get_submodule(name), rank, alpha)
        model.set_submodule(name, layer)


def add_lora(model, rank, alpha, targets=ALL_LINEAR, seed=0):
    """Freeze the model and adapt each linear layer whose last name is a target; return the model.
    B is 0, so the adapted model starts as the base one. A is normal with variance 1 / D_in and
    depends on the seed alone. ValueError if the rank is below 1 or the model has no such target."""
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} is below 1")
    names = [name for name in linear_layers(model) if name.split(".")[-1] in targets]
    absent = set(targets) - {name.split(".")[-1] for name in names}
    if absent:
        raise ValueError(f"no linear layer is called {min(absent)}: targets are {ALL_LINEAR}")
    attach(model, names, rank, alpha)
    rng = torch.Generator().manual_seed(seed)  # on the CPU: every device starts from the same A
    for layer in lora_layers(model).values():
        A = torch.randn(layer.lora_A.weight.shape, generator=rng)
        layer.lora_A.weight.data.copy_(A / math.sqrt(layer.base.in_features))
        layer.lora_B.weight.data.zero_()
    return model.eval()


@contextmanager
def adapter_off(model):
    """Run the base model: inside, LoRA layers act as their frozen layers; after it, as before."""
    before = [(layer, layer.on) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.on = False
        yield model
    finally:
        for layer, on in before:
            layer.on = on
