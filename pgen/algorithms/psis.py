"""Pareto-smoothed importance sampling: weights with a tamed tail, and a number that says how it was.

The largest importance ratios are replaced by the expected order statistics of a generalised Pareto
distribution fitted to them. Its shape, k-hat, tells how heavy the tail is: below 0.5 the ratios have a
variance, above 0.7 no practical number of draws will do.

Draws come first and any rows after: `[S, *rows]`; all rows are smoothed at once.

References:
    Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao & Gabry, JMLR 25, 2024),
    arXiv:1507.02646. A new and efficient estimation method for the generalized Pareto distribution (Zhang &
    Stephens, Technometrics 2009).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST_TAIL = 5  # draws; fewer say nothing about a tail


class Smoothed(NamedTuple):
    """Normalised log weights `[S, *rows]` (each column sums to one) and the tail shape `khat` `[*rows]`."""

    log_weights: Tensor
    khat: Tensor


class Pareto(NamedTuple):
    """A generalised Pareto distribution on the positive numbers: `shape` k and `scale` sigma."""

    shape: Tensor
    scale: Tensor

    def quantile(self, probability: Tensor) -> Tensor:
        """The inverse of the distribution function, `sigma ((1 - p)^-k - 1) / k`."""
        decay = -torch.log1p(-probability)
        safe = torch.where(self.shape == 0, 1.0, self.shape)
        return self.scale * torch.where(self.shape == 0, decay, torch.expm1(safe * decay) / safe)


def psis(log_weights: Tensor) -> Smoothed:
    r"""Smooth and normalise importance weights; report the tail shape k-hat.

    The tail is the largest `min(S / 5, 3 sqrt(S))` ratios. Where it is shorter than five draws (`S < 21`)
    nothing is smoothed and `khat` is NaN: it cannot be told. Where all ratios in it are equal (to rounding)
    there is no tail and `khat` is `-inf`.

    Args:
        log_weights: log importance ratios up to a constant, `[S, *rows]`.

    Example:
        >>> smoothed = psis(torch.zeros(100, 2))
        >>> smoothed.khat, smoothed.log_weights.exp().sum(0)
        (tensor([-inf, -inf]), tensor([1.0000, 1.0000]))
    """
    draws = log_weights.shape[0]
    length = tail_length(draws)
    if length < SHORTEST_TAIL:
        unknown = log_weights.new_full(log_weights.shape[1:], math.nan)
        return Smoothed(log_weights - log_weights.logsumexp(0), unknown)
    # Differences of close exponentials follow: single precision would invent tails.
    shifted = log_weights.double() - log_weights.double().amax(0)
    ordered, order = shifted.sort(0)
    tail = ordered[-length:]
    cutoff = ordered[-length - 1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    noise = 8 * torch.finfo(log_weights.dtype).eps * log_weights.double().abs().amax(0).clamp(min=1)
    flat = tail[-1] - cutoff <= noise

    fitted = fit_pareto(torch.where(flat, _ramp(tail), tail.exp() - cutoff.exp()))
    middle = (torch.arange(length, dtype=tail.dtype, device=tail.device) + 0.5) / length
    smooth = (
        (fitted.quantile(_column(middle, tail)) + cutoff.exp()).log().clamp(max=0.0)
    )  # no more than the largest
    ordered = torch.cat([ordered[:-length], torch.where(flat, tail, smooth)])
    smoothed = torch.empty_like(ordered).scatter_(0, order, ordered)
    smoothed = smoothed - smoothed.logsumexp(0)
    khat = torch.where(flat, -math.inf, fitted.shape)
    return Smoothed(smoothed.to(log_weights.dtype), khat.to(log_weights.dtype))


def fit_pareto(exceedances: Tensor) -> Pareto:
    r"""The generalised Pareto distribution of positive numbers in ascending order, `[M, *rows]`.

    An empirical-Bayes estimate: the profile likelihood is averaged over a fixed grid of `30 + sqrt(M)`
    points, and the shape is shrunk towards 0.5 as ten more observations would.

    Example:
        >>> middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> fit_pareto(Pareto(torch.tensor(0.3), torch.tensor(2.0)).quantile(middles))
        Pareto(shape=tensor(0.3030, dtype=torch.float64), scale=tensor(1.9970, dtype=torch.float64))
    """
    count = exceedances.shape[0]
    largest = exceedances[-1]
    exceedances = exceedances.clamp(min=1e-12 * largest)  # ties with the cutoff would divide by zero
    points = 30 + math.isqrt(count)
    grid = torch.arange(1, points + 1, dtype=exceedances.dtype, device=exceedances.device) - 0.5
    quartile = exceedances[math.floor(count / 4 + 0.5) - 1]
    slope = 1 / largest + (1 - (points / _column(grid, exceedances)).sqrt()) / (
        3 * quartile
    )  # [points, *rows]
    shape = torch.log1p(-slope.unsqueeze(1) * exceedances).mean(1)
    profile = count * ((-slope / shape).log() - shape - 1)
    slope = (profile.softmax(0) * slope).sum(0)
    shape = torch.log1p(-slope * exceedances).mean(0)
    scale = -shape / slope
    return Pareto((count * shape + 5) / (count + 10), scale)


def tail_length(draws: int) -> int:
    """How many of the largest ratios are smoothed: `min(S / 5, 3 sqrt(S))`."""
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


def khat_limit(draws: int) -> float:
    """The k-hat above which `draws` do not suffice: `min(1 - 1 / log10(S), 0.7)`.

    Example:
        >>> khat_limit(100), khat_limit(100_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(draws), 0.7) if draws > 1 else -math.inf


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Kish's `1 / sum_s w_s^2` of normalised weights, `[S, *rows]` to `[*rows]`.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -50.0]]))
        tensor([2., 1.])
    """
    return 1 / log_weights.softmax(0).square().sum(0)


def _column(vector: Tensor, like: Tensor) -> Tensor:
    """`vector` `[M]` with dimensions of size 1 appended, to broadcast against `[M, *rows]`."""
    return vector.reshape(-1, *[1] * (like.dim() - 1))


def _ramp(like: Tensor) -> Tensor:
    """1, 2, 3 and so on in each row: in place of a tail that has no spread, so that the fit stays finite."""
    return _column(torch.arange(1, len(like) + 1, dtype=like.dtype, device=like.device), like).expand_as(like)
