"""Pseudo-inverse guided diffusion: x_0 given x_sigma taken for an isotropic Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, per_row
from pgen.algorithms.diffusion.posteriors.guide import Look, watched
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian


@dataclass(frozen=True, eq=False)
class PiGDM:
    r"""A conditional denoiser from x_0 | x_sigma about N(D, r^2 I), r^2 = sigma^2 v / (sigma^2 + v).

        g(x, sigma) = N(y; A D, R + r^2 A A'),    D_y = D + sigma^2 J' A' (R + r^2 A A')^-1 (y - A D)

    J = dD/dx is taken by differentiation, r as constant. Exact where the prior is N(m, v I).

    Attributes:
        prior: the denoiser D.
        observation: what was seen.
        data_variance: v, the prior's variance; 1 for data of unit variance, as in the paper.

    References:
        Song, Vahdat, Mardani & Kautz, Pseudoinverse-Guided Diffusion Models for Inverse Problems, ICLR 2023.
    """

    prior: Denoiser
    observation: LinearGaussian
    data_variance: float = 1.0

    def __post_init__(self) -> None:
        """Check the variance."""
        if self.data_variance <= 0:
            raise ValueError(f"PiGDM(data_variance={self.data_variance}): expected a positive number")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """About E[x_0 | x_sigma = x, y]."""
        return self.look(x, sigma).posterior

    def look(self, x: Tensor, sigma: Tensor) -> Look:
        """See `Guide`."""
        spread = sigma**2 * self.data_variance / (sigma**2 + self.data_variance)
        with torch.enable_grad():
            leaf, denoised = watched(self.prior, x, sigma)
            with torch.no_grad():
                residual = self.observation.residual(denoised)
                pull = self.observation.operator.adjoint(self.observation.solve(residual, spread))
            (gradient,) = torch.autograd.grad(denoised, leaf, pull)
        denoised = denoised.detach()
        log_twist = self.observation.log_density(residual, spread)
        return Look(denoised, denoised + per_row(sigma, x) ** 2 * gradient, log_twist)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0), `[B]`."""
        return self.observation.log_likelihood(x0)
