"""Means, intervals and p-values over seeds and problems.

Outcomes are x (S, P): S seeds, that is runs, by P problems that every run is evaluated on. Both are
samples, of the runs and of the problems that one could have had.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass
class Estimate:
    """A mean, its 95 % interval, the two-sided p of its being 0, and the number of seeds."""

    mean: float
    low: float
    high: float
    p: float = math.nan
    seeds: int = 1


def t_tail(t, df):
    """P(|T| >= |t|) for Student's t with any df > 0. With T = sqrt(df) tan(a) the density is
    cos(a)^(df - 1) over its integral, which is smooth: the midpoint rule does."""
    whole = math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2)) * math.sqrt(math.pi) / 2
    end = math.atan2(abs(t), math.sqrt(df))
    angles = (np.arange(2000) + 0.5) * end / 2000
    inside = (np.cos(angles) ** (df - 1)).mean() * end / whole
    return max(0.0, 1.0 - float(inside))


@cache
def t_quantile(df):
    """The t that |T| exceeds with probability 0.05, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 0.05 else (low, middle)
    return high


def crossed(x) -> Estimate:
    """The mean of x (S, P) over seeds and problems as crossed random effects: analysis of variance,
    with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946, 110-114), and no less
    variance than seeds or problems alone show. With one of either it is Student's t."""
    x = np.asarray(x, dtype=np.float64)
    S = len(x)
    if x.size < 2:
        return Estimate(x.item() if x.size else math.nan, math.nan, math.nan, math.nan, S)
    # What seeds, problems and both together add to the variance of the mean; one seed adds nothing.
    mean = float(x.mean())
    seeds = x.mean(axis=1, keepdims=True) - mean  # (S, 1)
    problems = x.mean(axis=0) - mean  # (P,)
    squares = [(part**2).mean() for part in (seeds, problems, x - mean - seeds - problems)]
    dfs = np.maximum([S - 1, x.shape[1] - 1, (S - 1) * (x.shape[1] - 1)], 1)
    parts = squares / dfs
    variance = max(parts[0] + parts[1] - parts[2], parts[0], parts[1])
    if variance < 1e-24:
        return Estimate(mean, mean, mean, 1.0 if mean == 0 else 0.0, S)
    df = variance**2 / (parts**2 / dfs).sum()
    df = min(max(float(df), 1.0), 1e5)
    spread = t_quantile(df) * math.sqrt(variance)
    return Estimate(mean, mean - spread, mean + spread, t_tail(mean / math.sqrt(variance), df), S)


def holm(ps):
    """Holm's p-values (Scand. J. Statist. 6, 1979, 65-70): with these, the chance of one false
    claim among all of them is held. NaN stays, and does not count."""
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted, largest = list(ps), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def ratio(x, y) -> Estimate:
    """The mean of x over that of y, both (S, 1) of the same seeds, by Fieller's theorem (J. R.
    Statist. Soc. B 16, 1954, 175-185): its interval has the r at which the mean of x - r y can be
    0. Where y cannot be told from 0 there is none (NaN)."""
    x, y = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    n, mean = len(x), float(x.mean() / y.mean())
    if n < 2:
        return Estimate(mean, math.nan, math.nan, seeds=n)
    # The ends are the roots of a r^2 - 2 b r + c.
    scale = t_quantile(n - 1) ** 2 / n
    (xx, xy), (_, yy) = np.cov(x, y)
    a = y.mean() ** 2 - scale * yy
    b = x.mean() * y.mean() - scale * xy
    c = x.mean() ** 2 - scale * xx
    root = math.sqrt(max(0.0, b**2 - a * c))
    low, high = ((b - root) / a, (b + root) / a) if a > 0 else (math.nan, math.nan)
    return Estimate(mean, low, high, seeds=n)
