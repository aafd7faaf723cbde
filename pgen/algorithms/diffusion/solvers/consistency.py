"""Sampling from a consistency model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class Consistency:
    r"""Multi-step sampling of a consistency model: to data at once, and back to the next noise level.

        x_0 = f(x_s, s),    x_t = x_0 + sqrt(t^2 - sigma_min^2) z

    The field is the consistency function f, which maps every point of a path of the ordinary differential equation to its
    end. (With a denoiser in its place this is no sampler of the data's law.) One evaluation a step.

    Attributes:
        sigma_min: the noise level of f's answers.

    References:
        Song, Dhariwal, Chen & Sutskever, Consistency Models, ICML 2023, algorithm 1.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if self.sigma_min < 0:
            raise ValueError(f"Consistency(sigma_min={self.sigma_min}): expected sigma_min >= 0")

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next."""
        found, t = fn(x, t), float(t_next)
        if t <= self.sigma_min:
            return found
        return found.add(fn.noise(x), alpha=math.sqrt(t**2 - self.sigma_min**2))
