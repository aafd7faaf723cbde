r"""Sliced score matching: a score learned from data alone, its Jacobian seen along random directions.

    v . J(x) v + |s(x)|^2 / 2,    J = ds/dx,  E[v v'] = I

whose mean over data and directions is E|s - grad log p|^2 / 2 up to a constant, by integration by parts: the law of the
data must have a smooth density (so noise is added to data on a manifold), and a score network must be differentiable
twice. Denoising score matching has the same minimum for data with Gaussian noise, at less cost and variance; this one
needs no noise, and no knowledge of it.

References:
    Hyvarinen, Estimation of Non-Normalized Statistical Models by Score Matching, JMLR 6, 2005.
    Song, Garg, Shi & Ermon, Sliced Score Matching, UAI 2019 (here with their variance reduction: |s|^2 for (v . s)^2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sliced(score: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor) -> Tensor:
    """Sliced score matching loss of each row, a sum over the event.

    Args:
        score: from `[B, *event]` to its shape, each row for itself; twice differentiable. At a noise level:
            `lambda x: score_of(denoiser(x, sigma), x, sigma)`.
        x: data, `[B, *event]`.
        directions: of mean 0 and covariance I: standard normal, or signs (which vary less); shape of x, or
            `[M, *x.shape]` for M of them, averaged.

    Returns:
        `[B]`; differentiable in what the score depends on.

    Example:
        >>> sliced(lambda x: -x, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0]]))  # -2 + 5 / 2
        tensor([0.5000])
    """
    several = directions if directions.dim() > x.dim() else directions.unsqueeze(0)
    value, pull = torch.func.vjp(score, x)[:2]
    curvature = torch.stack([(pull(v)[0] * v).reshape(len(x), -1).sum(-1) for v in several]).mean(0)
    return curvature + value.reshape(len(x), -1).square().sum(-1) / 2
