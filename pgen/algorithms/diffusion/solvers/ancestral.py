"""Ancestral sampling, as of DDPM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class Ancestral:
    r"""Each step draws from the law of x_t given x_s and x_0, D in the place of x_0.

        x_t = D + (t / s)^2 (x_s - D) + t sqrt(1 - t^2 / s^2) z

    With the thousand noise levels of a schedule this is DDPM's sampler (its smaller variance), and the exponential
    Euler method of the reverse-time stochastic differential equation. Weak order 1; one evaluation a step.

    References:
        Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, NeurIPS 2020, algorithm 2 and equation 7.
    """

    only_down: ClassVar[bool] = True

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t down to t_next."""
        s, t = float(t), float(t_next)
        keep = (t / s) ** 2
        out = torch.lerp(fn(x, s), x, keep)
        return out.add_(fn.noise(x), alpha=t * math.sqrt(1 - keep)) if t else out
