r"""Weights of |x_0 - D(x_0 + sigma eps, sigma)|^2 as functions of the noise level: what a denoiser learns first.

A weighting does not move the optimum, which is E[x_0 | x] at every noise level on its own; it divides a network's
capacity and its gradients among the levels. What counts is the weight times the density of the levels trained on.

    Uniform         1 / sigma^2                             the noise, predicted with a plain square loss
    FlowMatching    (1 + 1 / sigma)^2                       the velocity eps - x_0
    V               1 + 1 / sigma^2                         v
    EDM             (sigma^2 + s^2) / (sigma s)^2           the network within the preconditioning
    MinSNR          min(1 / sigma^2, gamma)                 the noise, where there is much of it
    SoftMinSNR      1 / (sigma^2 + 1 / gamma)               the same, smoothly
    Likelihood      1 / (sigma^3 p(sigma))                  the bound on the log density (see `bound`)

References:
    Song, Durkan, Murray & Ermon, Maximum Likelihood Training of Score-Based Diffusion Models, NeurIPS 2021 (likelihood).
    Karras, Aittala, Aila & Laine, NeurIPS 2022 (EDM).
    Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, ICCV 2023.
    Crowson et al., Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers, ICML 2024
    (soft min-SNR).
    Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, CVPR 2024 (learned variance).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pgen.algorithms.diffusion.schedules import Schedule

Weighting = Callable[[Tensor], Tensor]
"""From noise levels `[B]` to weights `[B]` of the squared error of the denoised value: any function will do."""


@dataclass(frozen=True)
class Uniform:
    """1 / sigma^2: squared error of the predicted noise."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels."""
        return 1 / sigma**2


@dataclass(frozen=True)
class FlowMatching:
    """(1 + 1 / sigma)^2: squared error of the predicted velocity eps - x_0."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels."""
        return (1 + 1 / sigma) ** 2


@dataclass(frozen=True)
class V:
    """1 + 1 / sigma^2: squared error of the predicted v."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels."""
        return 1 + 1 / sigma**2


@dataclass(frozen=True)
class EDM:
    """(sigma^2 + s^2) / (sigma s)^2: squared error of what the preconditioned network itself gives.

    Attributes:
        sigma_data: s, the standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _require_positive(self, "sigma_data", self.sigma_data)

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels."""
        return 1 / sigma**2 + 1 / self.sigma_data**2


@dataclass(frozen=True)
class MinSNR:
    """min(1 / sigma^2, gamma): low noise counts no more than noise level 1 / sqrt(gamma).

    Attributes:
        gamma: the largest weight; the authors' 5 is for data of variance about 1.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(self, "gamma", self.gamma)

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels."""
        return (1 / sigma**2).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR:
    """1 / (sigma^2 + 1 / gamma): half the harmonic mean of 1 / sigma^2 and gamma.

    Attributes:
        gamma: the weight without noise.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(self, "gamma", self.gamma)

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels."""
        return 1 / (sigma**2 + 1 / self.gamma)


@dataclass(frozen=True)
class Likelihood:
    r"""1 / (sigma^3 p(sigma)) within a schedule's range and 0 beyond, p the density of the levels that it trains on.

    The mean loss then is the integral of |x_0 - D|^2 / sigma^3 over the noise levels, which up to what is constant is
    minus the bound on the log density of x_0, in nats (per scalar, where errors are averaged over an event). Where
    levels are uniform in their logarithm (`VE`), it is proportional to `Uniform`, and varies least; where the schedule
    hardly ever goes, weights are huge.

    Attributes:
        schedule: whose training levels.
    """

    schedule: Schedule

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """Log levels, and log of d log sigma / du there, at quantiles u that are dense at both ends."""
        u = torch.special.ndtr(torch.linspace(-4.7, 4.7, 4097, dtype=torch.float64))
        log, slope = torch.func.jvp(lambda u: self.schedule.training(u).log(), (u,), (torch.ones_like(u),))[
            :2
        ]
        return log, slope.log()

    def __call__(self, sigma: Tensor) -> Tensor:
        """Weights at noise levels: 1 / sigma^2 times d log sigma / du, within the range."""
        levels, slopes = (table.to(sigma) for table in self._table)
        log = sigma.detach().log()
        right = torch.searchsorted(levels, log.contiguous()).clamp(1, len(levels) - 1)
        low, high = levels[right - 1], levels[right]
        part = ((log - low) / (high - low)).clamp(0, 1)
        weight = torch.exp(torch.lerp(slopes[right - 1], slopes[right], part)) / sigma**2
        low, high = (
            self.schedule.sigma_min * (1 - 1e-5),
            self.schedule.sigma_max * (1 + 1e-5),
        )  # rounding at its ends
        return torch.where((sigma >= low) & (sigma <= high), weight, 0.0)


class LearnedVariance(nn.Module):
    r"""Losses of all noise levels made equally large, by a learned log mean loss u(sigma).

        loss / exp(u(sigma)) + u(sigma)

    whose minimum over u is log E[loss | sigma] + 1: it is the likelihood of an error whose variance is learned, and what
    remains of the loss has mean 1 at every level. Trained along with the denoiser, unused afterwards.

    Args:
        frequencies: number of Fourier features of log sigma / 4.

    Example:
        >>> LearnedVariance()(torch.tensor([2.0, 3.0]), torch.tensor([0.1, 10.0]))  # u is 0 at first
        tensor([2., 3.], grad_fn=<AddBackward0>)
    """

    frequencies: Tensor

    def __init__(self, frequencies: int = 32) -> None:
        super().__init__()
        if frequencies < 1:
            raise ValueError(f"LearnedVariance(frequencies={frequencies}): expected 1 or more")
        self.register_buffer("frequencies", torch.arange(1, frequencies + 1) * (math.pi / 8))
        self.last = nn.Linear(2 * frequencies, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def log_mean(self, sigma: Tensor) -> Tensor:
        """u, the log of the mean loss at noise levels `[B]`."""
        phase = (sigma.log() / 4).unsqueeze(-1) * self.frequencies
        decay = 1 / torch.arange(1, len(self.frequencies) + 1, device=phase.device, dtype=phase.dtype)
        waves = torch.cat([phase.sin() * decay, phase.cos() * decay], -1)
        return self.last(waves.to(self.last.weight.dtype)).squeeze(-1)

    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """Losses per row `[B]` at noise levels `[B]`, balanced."""
        u = self.log_mean(sigma)
        return loss / u.exp() + u


def _require_positive(weighting: object, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{type(weighting).__name__}({name}={value}): expected a positive number")
