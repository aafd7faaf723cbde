"""Quantiles of beta distributions, which torch lacks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_NODES = 200
_STEPS = 40  # Newton steps at most; three to six are usual


def beta_quantile(probability: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Quantiles of Beta(a, b), all of one shape after broadcasting; to about 1e-10.

    On the logistic scale, x = 1 / (1 + exp(-u)), the density is smooth and log-concave,

    .. math:: f(u) = x^a (1 - x)^b / B(a, b),

    so that Gauss and Legendre's rule gives the distribution function and Newton's method inverts it.

    Args:
        probability: in (0, 1).
        a: at least about 1.
        b: at least about 1.

    >>> beta_quantile(torch.tensor(0.25), torch.tensor(1.0), torch.tensor(1.0)).item()
    0.25
    """
    p, a, b = torch.broadcast_tensors(*(t.double() for t in (probability, a, b)))
    nodes, weights = (torch.from_numpy(t).to(p.device) for t in np.polynomial.legendre.leggauss(_NODES))
    norm = a.lgamma() + b.lgamma() - (a + b).lgamma()
    spread = (torch.polygamma(1, a) + torch.polygamma(1, b)).sqrt()
    reach = 9 * spread + 36 / a  # what lies further below is less than exp(-36)

    def density(u: Tensor, *like: Tensor) -> Tensor:
        one, other, constant = like
        return (one * logsigmoid(u) + other * logsigmoid(-u) - constant).exp()

    u = a.digamma() - b.digamma() + spread * torch.special.ndtri(p)
    for _ in range(_STEPS):
        points = u[..., None] + (nodes - 1) * reach[..., None] / 2
        below = (density(points, a[..., None], b[..., None], norm[..., None]) * weights).sum(-1) * reach / 2
        step = ((below - p) / density(u, a, b, norm)).clamp(-spread, spread)
        u = u - step
        if not bool((step.abs() > 1e-12 * spread).any()):
            break
    return u.sigmoid().to(probability.dtype)
