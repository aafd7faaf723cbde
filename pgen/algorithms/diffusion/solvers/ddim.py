"""DDIM: from no noise at all to that of ancestral sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class DDIM:
    r"""Denoising diffusion implicit models.

        x_t = D + sqrt(t^2 - v^2) / s (x_s - D) + v z,    v = eta t sqrt(1 - t^2 / s^2)

    eta = 0 is `Euler`, eta = 1 `Ancestral`. For small steps this is the stochastic differential equation whose noise has
    eta^2 times the variance of the reverse-time one. Order 1; one evaluation a step.

    Attributes:
        eta: noise, in [0, 1].

    References:
        Song, Meng & Ermon, Denoising Diffusion Implicit Models, ICLR 2021, equations 12 and 16.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM(eta={self.eta}): expected 0 <= eta <= 1")

    @property
    def only_down(self) -> bool:
        """With noise, there is no step to a larger noise level."""
        return self.eta > 0

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next."""
        s, t = float(t), float(t_next)
        noise = self.eta * t * math.sqrt(max(1 - (t / s) ** 2, 0.0))
        out = torch.lerp(fn(x, s), x, math.sqrt(t**2 - noise**2) / s)
        return out.add_(fn.noise(x), alpha=noise) if noise else out
