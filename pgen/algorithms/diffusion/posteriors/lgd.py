"""Loss-guided diffusion: the likelihood averaged over what x_0 may still be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, per_row
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.posteriors.dps import bounded
from pgen.algorithms.diffusion.posteriors.guide import LogLikelihood, Look, watched


@dataclass(frozen=True, eq=False)
class LGD:
    r"""A conditional denoiser for any differentiable likelihood, which is averaged over Gaussian perturbations.

        g(x, sigma) = mean_k p(y | D + r z_k),    r^2 = sigma^2 v / (sigma^2 + v)

    The z_k (in pairs of opposite sign) are the same for all rows and noise levels, so that g is a function. One evaluation
    of the prior, `samples` of the likelihood.

    Attributes:
        prior: the denoiser D.
        likelihood: log p(y | x_0), `[B]`, in nats.
        data_variance: v, the prior's variance.
        samples: k, even.
        limit: see `DPS`.
        seed: of the perturbations.

    References:
        Song et al., Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation, ICML 2023.
    """

    prior: Denoiser
    likelihood: LogLikelihood
    data_variance: float = 1.0
    samples: int = 16
    limit: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.samples < 2 or self.samples % 2 or self.data_variance <= 0 or self.limit <= 0:
            raise ValueError(
                f"LGD(data_variance={self.data_variance}, samples={self.samples}, limit={self.limit}): expected "
                "positive numbers, samples even"
            )

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """About E[x_0 | x_sigma = x, y]."""
        return self.look(x, sigma).posterior

    def look(self, x: Tensor, sigma: Tensor) -> Look:
        """See `Guide`."""
        half = Streams(self.seed, self.samples // 2).normal(0, x.shape[1:], x)
        spread = per_row((sigma**2 * self.data_variance / (sigma**2 + self.data_variance)).sqrt(), x)
        with torch.enable_grad():
            leaf, denoised = watched(self.prior, x, sigma)
            # One by one: the likelihood of a row belongs to that row.
            terms = [self.likelihood(denoised + spread * z) for z in torch.cat([half, -half])]
            log_twist = torch.stack(terms).logsumexp(0) - math.log(self.samples)
            (gradient,) = torch.autograd.grad(log_twist.sum(), leaf)
        shift = bounded(per_row(sigma, x) ** 2 * gradient, sigma, self.limit)
        return Look(denoised.detach(), denoised.detach() + shift, log_twist.detach())

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0), `[B]`."""
        return self.likelihood(x0)
