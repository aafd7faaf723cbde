"""Reference programs with a site that can only be denoised, and what is known of them: Gaussian mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.distributions import VE, Diffusion, MixtureDenoiser

_MEANS = ((-1.5, 0.5), (1.0, 1.0), (0.5, -1.5))
_WEIGHTS = (0.5, 0.3, 0.2)
_SCALE, _LEAST = 0.6, 0.01  # of the components; noise that a diffusion's law keeps
_WAY, _NOISE = (1.0, -0.5), 0.75  # what of a latent is observed, and the noise's standard deviation
_LAW = Diffusion(
    MixtureDenoiser(torch.tensor(_MEANS), _SCALE, weights=torch.tensor(_WEIGHTS)), VE(_LEAST, 40.0), (2,)
)


def denoised(n: int) -> None:
    """x_i in the plane, a mixture of three Gaussians of which only the denoiser is given."""
    with pyro.plate("data", n):
        pyro.sample("x", _LAW)


def denoised_latent(n: int) -> None:
    """z_i of that mixture, seen through y_i ~ N(z_i0 - z_i1 / 2, 0.75^2)."""
    with pyro.plate("data", n):
        z = pyro.sample("z", _LAW)
        pyro.sample("y", dist.Normal(z[..., 0] - 0.5 * z[..., 1], _NOISE))


def exact() -> MixtureDenoiser:
    """The law of a value, with the noise that it keeps."""
    scale = (_SCALE**2 + _LEAST**2) ** 0.5
    return MixtureDenoiser(_f64(_MEANS), scale, weights=_f64(_WEIGHTS))


def coordinates(means: Tensor, variances: Tensor, weights: Tensor) -> Any:
    """Mixtures of Gaussians, coordinate by coordinate.

    Args:
        means: `[..., K, 2]`.
        variances: the same, or what broadcasts.
        weights: `[..., K]`.
    """
    each = dist.Normal(means.mT, variances.sqrt().expand_as(means).mT)
    return torch.distributions.MixtureSameFamily(
        dist.Categorical(weights.unsqueeze(-2).expand_as(means.mT)), each
    )


def prior() -> Any:
    """The law of each coordinate of a value, batch shape `[2]`."""
    law = exact()
    return coordinates(law.means, law.variances, law.log_weights.exp())


def seen() -> Any:
    """The law of an observation."""
    law, way = exact(), _f64(_WAY)
    spread = (law.variances[:, 0] * way.square().sum() + _NOISE**2).sqrt()
    return torch.distributions.MixtureSameFamily(
        dist.Categorical(law.log_weights.exp()), dist.Normal(law.means @ way, spread)
    )


def posterior(data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Means `[rows, 3, 2]`, covariance `[2, 2]` and weights `[rows, 3]` of the latents' mixtures, given y."""
    law, way, y = exact(), _f64(_WAY), data["y"].detach().double()
    variance = law.variances[0, 0]
    gain = variance * way / (variance * way.square().sum() + _NOISE**2)
    miss = y[:, None] - law.means @ way  # [rows, 3]
    weights = (law.log_weights - miss.square() / (2 * variance * way.square().sum() + 2 * _NOISE**2)).softmax(
        -1
    )
    covariance = variance * (torch.eye(2, dtype=torch.float64) - gain[:, None] * way)
    return law.means + miss[..., None] * gain, covariance, weights


def product(data: Mapping[str, Tensor]) -> Tensor:
    """The posterior mean of the product of a latent's coordinates, `[rows]`."""
    means, covariance, weights = posterior(data)
    return (weights * (means.prod(-1) + covariance[0, 1])).sum(-1)


def _f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
