"""Diffusion posterior sampling: the likelihood at the denoised value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, Field, per_row
from pgen.algorithms.diffusion.posteriors.guide import (
    LogLikelihood,
    Look,
    log_likelihood_and_gradient,
    over_event,
    watched,
)
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian


@dataclass(frozen=True, eq=False)
class DPS:
    r"""A conditional denoiser for any differentiable likelihood, which is taken at the denoised value.

        g(x, sigma) = p(y | D)^a,    D_y = D + sigma^2 J' a grad log p(y | D)
        a = width / (width + r),     r^2 = sigma^2 v / (sigma^2 + v)

    Published with a = 1, which is overconfident at large noise levels, where x_0 is not yet known: a likelihood much
    narrower than the prior pulls too hard for any grid, and kills the particles of modes that are still to move.
    A finite `width` (see `width_of`) tempers it: over r, the distance at which x_0 may be from D, log g then changes by
    about 1 nat. `limit` bounds the pull. As a twist of particles each is right in the end.

    Attributes:
        prior: the denoiser D.
        likelihood: log p(y | x_0), `[B]`, in nats.
        width: over which distance of x_0 the log likelihood changes by a nat; infinite: as published.
        data_variance: v, the prior's variance.
        limit: the pull D_y - D of a row is at most this many noise levels per number (in root mean square).

    References:
        Chung, Kim, Mccann, Klasky & Ye, Diffusion Posterior Sampling for General Noisy Inverse Problems, ICLR 2023.
    """

    prior: Denoiser
    likelihood: LogLikelihood
    width: float = math.inf
    data_variance: float = 1.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.width, self.data_variance, self.limit) <= 0:
            raise ValueError(
                f"DPS(width={self.width}, data_variance={self.data_variance}, limit={self.limit}): expected positive "
                "numbers"
            )

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """About E[x_0 | x_sigma = x, y]."""
        return self.look(x, sigma).posterior

    def look(self, x: Tensor, sigma: Tensor) -> Look:
        """See `Guide`."""
        with torch.enable_grad():
            leaf, denoised = watched(self.prior, x, sigma)
            log_twist = self._temper(sigma) * self.likelihood(denoised)
            (gradient,) = torch.autograd.grad(log_twist.sum(), leaf)
        shift = bounded(per_row(sigma, x) ** 2 * gradient, sigma, self.limit)
        return Look(denoised.detach(), denoised.detach() + shift, log_twist.detach())

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0), `[B]`."""
        return self.likelihood(x0)

    def _temper(self, sigma: Tensor) -> Tensor | float:
        if math.isinf(self.width):
            return 1.0
        spread = (sigma**2 * self.data_variance / (sigma**2 + self.data_variance)).sqrt()
        return self.width / (self.width + spread)


@dataclass(frozen=True, eq=False)
class DPSStep:
    r"""DPS as published: an ancestral step, then one along the gradient of the misfit's norm.

        x_t' = ancestral step;    x_t = x_t' - scale grad_x_s |y - A D(x_s, s)|

    The paper states it in the variance-preserving scale, with a thousand steps; here the second part is multiplied by
    sqrt((1 + s^2) (1 + t^2)), which is the same. A solver: the field it is given is the prior's.

    Attributes:
        observation: what was seen; the noise's variance is not used.
        scale: the paper's zeta', 0.3 (deblurring, super-resolution) to 1.
    """

    observation: LinearGaussian
    scale: float = 0.5

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, fn: Field) -> Tensor:
        """From noise level t down to t_next."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            denoised = fn(leaf, t)
            misfit = over_event(self.observation.residual(denoised).square()).sqrt()
            (gradient,) = torch.autograd.grad(misfit.sum(), leaf)
        s, low = float(t), float(t_next)
        keep = (low / s) ** 2
        moved = torch.lerp(denoised.detach(), x.detach(), keep) + low * math.sqrt(1 - keep) * fn.noise(x)
        # d/dx_VP = sqrt(1 + s^2) d/dx, and a shift in x_VP at t is one of sqrt(1 + t^2) times it in x.
        stretch = math.sqrt((1 + s**2) * (1 + low**2))
        return moved - self.scale * stretch * gradient


def width_of(likelihood: LogLikelihood, x0: Tensor) -> float:
    """A width for `DPS`: one over the median length of the log likelihood's gradient.

    Args:
        likelihood: log p(y | x_0), `[B]`.
        x0: where it is looked at, `[B, *event]`: draws of the prior, or any that are like them.

    Example:
        >>> width_of(lambda x: -10 * x[:, 0].abs(), torch.ones(4, 3))
        0.1
    """
    _, gradient = log_likelihood_and_gradient(likelihood, x0)
    return round(1 / max(float(over_event(gradient.square()).sqrt().median()), 1e-12), 12)


def bounded(shift: Tensor, sigma: Tensor, limit: float) -> Tensor:
    """Shifts `[B, *event]`, those longer than limit sigma sqrt(D) shortened to that."""
    if math.isinf(limit):
        return shift
    size = over_event(shift.square()).sqrt()
    most = limit * sigma * math.sqrt(max(shift[0].numel(), 1))
    return shift * per_row((most / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1), shift)
