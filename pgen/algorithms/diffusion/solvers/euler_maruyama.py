"""Euler-Maruyama on the reverse-time stochastic differential equation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class EulerMaruyama:
    r"""One Euler-Maruyama step in the variance sigma^2, in which the noise is a Brownian motion.

        x_t = x_s + (1 + eta) / 2 (s^2 - t^2) (D - x_s) / s^2 + sqrt(eta (s^2 - t^2)) z

    Steps must be short: the noise is added at once, and taken away only by the next steps. The last step, to noise level
    0, is to D. Weak order 1; one evaluation a step.

    Attributes:
        eta: variance of the noise relative to that of the reverse-time equation; 0 is the ordinary equation, in sigma^2.

    References:
        Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, ICLR 2021, equation 6 and
        appendix E.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"EulerMaruyama(eta={self.eta}): expected eta >= 0")

    @property
    def only_down(self) -> bool:
        """With noise, there is no step to a larger noise level."""
        return self.eta > 0

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next."""
        s, t = float(t), float(t_next)
        denoised = fn(x, s)
        if t == 0.0:
            return denoised
        out = torch.lerp(x, denoised, (1 + self.eta) / 2 * (1 - (t / s) ** 2))
        return out.add_(fn.noise(x), alpha=math.sqrt(self.eta * (s**2 - t**2))) if self.eta else out
