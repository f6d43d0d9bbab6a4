"""The draw from a large vocabulary in less time: without a sort of it and without a running sum
over all of it, each of which takes a GPU about as long as to read a quarter of the weights."""

import torch
import torch.nn.functional as F

FEW = 1024  # tokens that nearly always hold the nucleus of a trained model; also those of a part


def draw(probs, u, top_p, top_k, top_p_filter, inverse_cdf):
    """Return the tokens (B,) that the two plain functions of sample.py, which it is given, draw
    from probs (B, V) with uniforms u (B,); they are asked about fewer tokens."""
    if top_p < 1 and top_k <= 0:
        mass = probs.sum(-1, keepdim=True, dtype=torch.float64)  # (B, 1)
        ids = nucleus_ids(probs, top_p * mass)
        if ids is not None:
            nucleus = top_p_filter(probs.gather(1, ids), top_p, mass=mass)
            return ids.gather(1, inverse_cdf(nucleus, u)[:, None])[:, 0]
    probs = top_p_filter(probs, top_p, top_k)
    # First the part of FEW tokens that u falls into, then the token of that part.
    parts = F.pad(probs, (0, -probs.shape[1] % FEW)).unflatten(1, (-1, FEW))  # (B, V / FEW, FEW)
    masses = parts.sum(-1, dtype=torch.float64)  # (B, V / FEW)
    chosen = inverse_cdf(masses, u)[:, None]  # (B, 1)
    mass = masses.gather(1, chosen)
    before = masses.cumsum(-1).gather(1, chosen) - mass
    u = (u[:, None] * masses.sum(-1, keepdim=True) - before) / mass  # where in that part
    part = parts.take_along_dim(chosen[:, :, None], dim=1)[:, 0]  # (B, FEW)
    token = chosen[:, 0] * FEW + inverse_cdf(part, u[:, 0].clamp(max=1))
    return token.clamp(max=probs.shape[1] - 1)  # with NaN


def nucleus_ids(probs, mass):
    """Return the ids (B, FEW), increasing, of the likeliest tokens of probs (B, V), if they hold
    the nucleus of every row: the fewest of the likeliest that have a mass (B, 1). Else None.

    They hold it for sure if those that are likelier than the least likely of them have that mass:
    then all tokens that are as likely as the last of the nucleus are here. To ask this is to wait
    for the device, once a token.
    """
    few, ids = probs.topk(FEW, sorted=False)
    least = few.amin(-1, keepdim=True)
    sure = few.double().masked_fill(few == least, 0).sum(-1, keepdim=True)
    return ids.sort(-1).values if bool((sure >= mass).all()) else None
