"""Linear layers with 16-bit weights on a processor that has no 16-bit arithmetic, where PyTorch
takes three to seven times as long as in fp32. Here they take as long, and half of the memory."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import HALF, WideProduct

NATIVE = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x, weight, bias=None):
    """Return F.linear(x, weight, bias) of a weight that is not trained."""
    if NATIVE or weight.dtype not in HALF or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    y = WideProduct.apply(x.reshape(-1, x.shape[-1]), weight)
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear by the function above."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def hasten(model):
    """Let the frozen model's linear layers compute by `linear`; return the model."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return model
