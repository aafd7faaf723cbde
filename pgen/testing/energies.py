"""Reference programs with a site that is known up to a constant, and what is known of them: Gaussians and mixtures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.distributions import Energy

_WEIGHTS, _MEANS, _SCALES = (0.6, 0.4), (-1.0, 1.5), (0.75, 0.5)
_CONSTANT = 2.5  # that energies have too much, so that exp(-E) is no density
_PRECISION, _MEAN, _NOISE = 4.0, 0.5, 0.75  # of the latent, which tilts N(0, 1), and of what is observed


def _hills(x: Tensor) -> Tensor:
    weights, means, scales = (x.new_tensor(v) for v in (_WEIGHTS, _MEANS, _SCALES))
    each = (weights / scales).log() - ((x - means) / scales).square() / 2
    return _CONSTANT - each.logsumexp(-1)


def _tilt(z: Tensor) -> Tensor:
    z = z[..., 0]
    return (_PRECISION - 1) * z.square() / 2 - _PRECISION * _MEAN * z - _CONSTANT


def energy(n: int) -> None:
    """x_i, a mixture of two Gaussians of which only an energy is given."""
    with pyro.plate("data", n):
        pyro.sample("x", Energy(_hills, (1,)))


def energy_latent(n: int) -> None:
    """z_i ~ N(0.5, 1/4), as an energy that tilts N(0, 1), seen through x_i ~ N(z_i, 0.75^2)."""
    with pyro.plate("data", n):
        z = pyro.sample("z", Energy(_tilt, (1,), base=dist.Normal(torch.zeros(1), 1.0).to_event(1)))
        pyro.sample("x", dist.Normal(z[..., 0], _NOISE))


def hills() -> Any:
    """The law of a value of `energy`, batch shape `[1]`."""
    weights, means, scales = (torch.tensor([v], dtype=torch.float64) for v in (_WEIGHTS, _MEANS, _SCALES))
    return torch.distributions.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales))


def prior() -> Any:
    """The law of the latent, batch shape `[1]`."""
    return dist.Normal(torch.tensor([_MEAN], dtype=torch.float64), _PRECISION**-0.5)


def seen() -> Any:
    """The law of an observation."""
    return dist.Normal(torch.tensor(_MEAN, dtype=torch.float64), math.hypot(_PRECISION**-0.5, _NOISE))


def posterior(data: Mapping[str, Tensor]) -> Any:
    """The law of the latents given x, batch shape `[rows, 1]`."""
    x = data["x"].detach().double()[:, None]
    precision = _PRECISION + _NOISE**-2
    mean = (_PRECISION * _MEAN + x * _NOISE**-2) / precision
    return dist.Normal(mean, torch.full_like(mean, precision**-0.5))
