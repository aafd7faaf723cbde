r"""Noise schedules: paths from data to noise, all of them one path seen at different scales.

    x_t = scale(t) (x_0 + sigma(t) eps),    eps ~ N(0, I),    t from 0 (data) to 1 (noise)

Divided by its scale, every linear Gaussian diffusion is x_0 + sigma eps: one denoiser E[x_0 | x_0 + sigma eps] serves
all of them, and one ordinary differential equation, dx/dsigma = (x - D(x, sigma)) / sigma, which is what the solvers
here integrate. A schedule then says which noise levels there are, which of them to train on, and how values are scaled
where something is expressed in its own terms.

References:
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, ICLR 2021 (VE, VP, sub-VP).
    Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, ICML 2021 (cosine).
    Karras, Aittala, Aila & Laine, Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS 2022 (EDM).
    Liu, Gong & Liu, Flow Straight and Fast, ICLR 2023; Lipman et al., Flow Matching, ICLR 2023 (straight paths).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """What a schedule is: implement these, and everything here takes it.

    Times, noise levels and scales are tensors of one shape, any shape.
    """

    @property
    def sigma_min(self) -> float:
        """The least noise level: the law of a diffusion is that of its data with this much noise."""
        ...

    @property
    def sigma_max(self) -> float:
        """The largest noise level, where data can no longer be told from noise."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level, noise-to-signal ratio, at times in [0, 1]; increasing."""
        ...

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level: the inverse of `sigma`."""
        ...

    def scale(self, t: Tensor) -> Tensor:
        """What data are multiplied by at a time."""
        ...

    def training(self, u: Tensor) -> Tensor:
        """The noise levels to train on, as quantiles: noise levels at `u` uniform on [0, 1]."""
        ...


@dataclass(frozen=True)
class _Path:
    """What most schedules share: training times uniform over the path."""

    def training(self, u: Tensor) -> Tensor:
        """Noise levels at uniform times."""
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)  # type: ignore[attr-defined]
        low, high = self.time(ends).tolist()  # type: ignore[attr-defined]
        return self.sigma(low + (high - low) * u)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class VE(_Path):
    r"""Variance exploding: sigma(t) = sigma_min (sigma_max / sigma_min)^t, scale 1.

    Attributes:
        sigma_min: least noise level.
        sigma_max: largest; about the largest distance between two data (Song & Ermon, NeurIPS 2020).

    Example:
        >>> VE(0.01, 100.0).sigma(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000e-02, 1.0000e+00, 1.0000e+02])
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        require_range(self, self.sigma_min, self.sigma_max)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at times in [0, 1]."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def scale(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class VP(_Path):
    r"""Variance preserving: scale(t)^2 (1 + sigma(t)^2) = 1, so that data of variance 1 keep it.

    `"linear"`: scale^2 = exp(-beta_min t - (beta_max - beta_min) t^2 / 2), the limit of DDPM's schedule.
    `"cosine"`: scale = cos((t + s) / (1 + s) pi/2) / cos(s / (1 + s) pi/2) with s = 0.008.

    Attributes:
        kind: `"linear"` or `"cosine"`.
        beta_min: rate of the noise at time 0, for `"linear"`.
        beta_max: rate of the noise at time 1, for `"linear"`.
        sigma_min: least noise level.
        sigma_max: largest; None: that at time 1, and at most 1000.

    Example:
        >>> schedule, t = VP(), torch.tensor(0.3)
        >>> torch.allclose(schedule.scale(t) ** 2 * (1 + schedule.sigma(t) ** 2), torch.tensor(1.0))
        True
    """

    kind: str = "linear"
    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.002
    sigma_max: float = None  # type: ignore[assignment]

    _OFFSET = 0.008

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"VP(kind={self.kind!r}): expected 'linear' or 'cosine'")
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"VP(beta_min={self.beta_min}, beta_max={self.beta_max}): expected 0 < beta_min <= beta_max"
            )
        if self.sigma_max is None:
            end = float(self.sigma(torch.tensor(1.0, dtype=torch.float64)))
            object.__setattr__(self, "sigma_max", min(end, 1000.0))
        require_range(self, self.sigma_min, self.sigma_max)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at times in [0, 1]."""
        if self.kind == "linear":
            return torch.expm1(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2).sqrt()
        scale = self.scale(t).clamp(min=1e-6)
        return (1 - scale**2).clamp(min=0).sqrt() / scale

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""
        if self.kind == "linear":
            b, a = self.beta_min, self.beta_max - self.beta_min
            c = torch.log1p(sigma**2)
            return 2 * c / (b + torch.sqrt(b * b + 2 * a * c))
        s = self._OFFSET
        start = math.cos(s / (1 + s) * math.pi / 2)
        return torch.acos(start / torch.sqrt(1 + sigma**2)) * 2 / math.pi * (1 + s) - s

    def scale(self, t: Tensor) -> Tensor:
        """What data are multiplied by."""
        if self.kind == "linear":
            return torch.exp(-(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2) / 2)
        s = self._OFFSET
        return torch.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)


@dataclass(frozen=True)
class SubVP(_Path):
    r"""Sub-VP: the scale of VP, the standard deviation 1 - scale^2, which is never larger than that of VP.

    Attributes:
        beta_min: rate at time 0.
        beta_max: rate at time 1.
        sigma_min: least noise level.
        sigma_max: largest; None: that at time 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.002
    sigma_max: float = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"SubVP(beta_min={self.beta_min}, beta_max={self.beta_max}): expected 0 < beta_min <= beta_max"
            )
        if self.sigma_max is None:
            object.__setattr__(self, "sigma_max", float(self.sigma(torch.tensor(1.0, dtype=torch.float64))))
        require_range(self, self.sigma_min, self.sigma_max)

    def _rate(self, t: Tensor) -> Tensor:
        return (self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2) / 2  # -log scale

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level, 1 / scale - scale, at times in [0, 1]."""
        return 2 * torch.sinh(self._rate(t))

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""
        b, a = self.beta_min, self.beta_max - self.beta_min
        c = 2 * torch.asinh(sigma / 2)
        return 2 * c / (b + torch.sqrt(b * b + 2 * a * c))

    def scale(self, t: Tensor) -> Tensor:
        """What data are multiplied by."""
        return torch.exp(-self._rate(t))


@dataclass(frozen=True)
class EDM:
    r"""Karras et al.: the noise level is the time (rescaled to [0, 1]), spaced by rho; log-normal for training.

        sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

    Attributes:
        sigma_min: least noise level.
        sigma_max: largest.
        rho: curvature of the path; 1 is uniform in the noise level.
        log_mean: mean of the logarithm of the noise levels trained on, relative to `sigma_data`'s 0.5.
        log_std: its standard deviation.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self) -> None:
        require_range(self, self.sigma_min, self.sigma_max)
        if self.rho <= 0 or self.log_std <= 0:
            raise ValueError(f"EDM(rho={self.rho}, log_std={self.log_std}): expected positive numbers")

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at times in [0, 1]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + t * (high - low)) ** self.rho

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (sigma ** (1 / self.rho) - low) / (high - low)

    def scale(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def training(self, u: Tensor) -> Tensor:
        """Log-normal noise levels."""
        tail = 1e-6  # float32 reaches the ends of the interval
        return torch.exp(self.log_mean + self.log_std * torch.special.ndtri(u.clamp(tail, 1 - tail)))


@dataclass(frozen=True)
class RectifiedFlow(_Path):
    r"""Straight paths, x_t = (1 - t) x_0 + t eps: scale 1 - t, noise level t / (1 - t).

    Attributes:
        sigma_min: least noise level.
        sigma_max: largest: the path ends just before its data are gone.
    """

    sigma_min: float = 0.001
    sigma_max: float = 1000.0

    def __post_init__(self) -> None:
        require_range(self, self.sigma_min, self.sigma_max)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at times in [0, 1)."""
        return t / (1 - t)

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level."""
        return sigma / (1 + sigma)

    def scale(self, t: Tensor) -> Tensor:
        """What data are multiplied by."""
        return 1 - t


def require_range(schedule: object, low: float, high: float) -> None:
    """Refuse noise levels that are none.

    Raises:
        ValueError: not 0 < low < high < infinity.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"{type(schedule).__name__}(sigma_min={low}, sigma_max={high}): expected 0 < sigma_min < sigma_max < inf"
        )
