"""Chains that are in a place of hardly any mass, such as a mode of weight zero, told from what they drew lately.

The mass of the place where a chain is goes, up to a constant, as exp of its mean log density times the volume that it
covers (Laplace's approximation, with the chain's own mean and spread).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import LogDensity

_FEWEST = 8  # chains: fewer do not tell what is usual
_NATS = 5.0  # below, a place counts for less than a hundredth
_DEVIATIONS = 5.0
_SHARE = 1 / 8  # of the chains, to stand for a place
_USUAL = 1.4826  # standard deviation of a normal law by its median absolute deviation
_EVERY = 3  # draws, whose densities are looked at


def hopeless(target: LogDensity, positions: Tensor) -> Tensor:
    """Chains `[C]` whose place counts for less than a hundredth, from their last draws `[n, C, d]`.

    Either one by one, below the median by more than five nats and five usual deviations, or as a group: between it and
    a better group is a gap of as much, and the masses of both, from all draws of each, differ by more than five nats.
    """
    chains = positions.shape[1]
    if chains < _FEWEST:
        return torch.zeros(chains, dtype=torch.bool, device=positions.device)
    heights = torch.stack([target(position)[0] for position in positions[::_EVERY]]).mean(0)
    masses = heights + _log_volume(positions.transpose(0, 1))
    below = ~(masses > masses.median() - (_NATS + _DEVIATIONS * _deviation(masses)))
    return below | _lower_group(positions, heights, masses)


def _lower_group(positions: Tensor, heights: Tensor, masses: Tensor) -> Tensor:
    """Chains below the lowest gap that tells a group of small mass from the rest."""
    order = masses.nan_to_num(float("-inf")).argsort(descending=True)
    ranked = masses[order]
    least = max(4, round(_SHARE * len(ranked)))
    none = torch.zeros_like(masses, dtype=torch.bool)
    for n in range(least, len(ranked)):
        gap = ranked[n - 1] - ranked[n]
        if not float(gap) > _NATS + _DEVIATIONS * float(_deviation(ranked[:n])):
            continue
        upper, lower = order[:n], order[n:]
        better = heights[upper].mean() + _log_volume(positions[:, upper].flatten(0, 1)[None])
        worse = heights[lower].mean() + _log_volume(positions[:, lower].flatten(0, 1)[None])
        if float(better - worse) > _NATS:
            return none.index_fill(0, lower, True)
    return none


def _deviation(masses: Tensor) -> Tensor:
    return _USUAL * (masses - masses.median()).abs().median()


def _log_volume(draws: Tensor) -> Tensor:
    """Half the log determinant of the covariance of draws `[..., n, d]`; without correlations where there are few."""
    n, d = draws.shape[-2:]
    tiny = torch.finfo(draws.dtype).tiny
    if n < 4 * d:
        return 0.5 * draws.var(-2).clamp_min(tiny).log().sum(-1)
    off = draws - draws.mean(-2, keepdim=True)
    scale = off.square().mean(-2, keepdim=True).sqrt().clamp_min(tiny**0.5)
    correlation = (off / scale).mT @ (off / scale) / n
    spread = torch.linalg.eigvalsh(correlation).clamp_min(1e-12).log().sum(-1)
    return 0.5 * spread + scale.squeeze(-2).log().sum(-1)
