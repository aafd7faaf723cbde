"""Effective sizes and systematic resampling, for several populations side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field


def effective_size(log_weight: Tensor) -> Tensor:
    """Kong's effective sample size (sum w)^2 / sum w^2, over the last dimension.

    Example:
        >>> effective_size(torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]))
        tensor(2.)
    """
    weight = log_weight.softmax(-1)
    return 1 / weight.square().sum(-1)


def systematic(log_weight: Tensor, uniform: Tensor, n: int | None = None) -> Tensor:
    """Indices of n draws, each index i expected n w_i times and drawn floor(n w_i) or ceil(n w_i) times.

    Args:
        log_weight: of particles, up to a constant, `[..., P]`.
        uniform: one number in [0, 1) for each population, `[...]`.
        n: how many; None: P.

    Returns:
        Ascending indices, `[..., n]`.

    References:
        Kitagawa, Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models, JCGS 1996.

    Example:
        >>> systematic(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor(0.3))
        tensor([0, 0, 2])
    """
    count = log_weight.shape[-1] if n is None else n
    ladder = log_weight.double().softmax(-1).cumsum(-1)
    ladder = ladder / ladder[..., -1:]
    points = torch.arange(count, dtype=torch.float64, device=log_weight.device) + uniform.double().unsqueeze(
        -1
    )
    below_one = 1 - 2**-53  # rounding must not reach past the last particle that has a weight
    return torch.searchsorted(ladder, (points / count).clamp(max=below_one).contiguous(), right=True)


def uniform_rows(field: Field, like: Tensor) -> Tensor:
    """A number in [0, 1) for each row, `[B]`, from the field's normals."""
    normal = field.noise(like.new_empty(len(like), 1))
    return torch.special.ndtr(normal.double())[:, 0].clamp(max=1 - 2**-53)
