"""Heun's method with churn, as of EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class Heun:
    r"""The second-order method of EDM: algorithm 1, and with `churn` algorithm 2.

        u = s (1 + churn);  x_u = x_s + s_noise sqrt(u^2 - s^2) z     where s_min <= s <= s_max, else u = s
        d = (x_u - D(x_u, u)) / u;  x' = x_u + (t - u) d
        x_t = x_u + (t - u) (d + (x' - D(x', t)) / t) / 2             unless t = 0: then x_t = x'

    Order 2; two evaluations a step, one in the step to 0.

    Attributes:
        churn: relative increase of the noise level before each step; `Heun.churned` has it from EDM's S_churn.
        s_min: least noise level with churn.
        s_max: largest.
        s_noise: standard deviation of that noise, 1 or a little more.

    References:
        Karras, Aittala, Aila & Laine, Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS 2022.
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.churn < 0 or self.s_noise < 0 or not 0 <= self.s_min <= self.s_max:
            raise ValueError(
                f"Heun(churn={self.churn}, s_min={self.s_min}, s_max={self.s_max}, s_noise={self.s_noise}): "
                "expected churn >= 0, s_noise >= 0 and 0 <= s_min <= s_max"
            )

    @classmethod
    def churned(
        cls, s_churn: float, steps: int, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0
    ) -> Heun:
        """With EDM's S_churn, which is shared by all steps: churn = min(s_churn / steps, sqrt(2) - 1)."""
        return cls(min(s_churn / steps, math.sqrt(2) - 1), s_min, s_max, s_noise)

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next."""
        s, t = float(t), float(t_next)
        if self.churn and self.s_min <= s <= self.s_max:
            u = s * (1 + self.churn)
            x = x.add(fn.noise(x), alpha=self.s_noise * math.sqrt(u**2 - s**2))
            s = u
        denoised = fn(x, s)
        guess = torch.lerp(denoised, x, t / s)
        if t == 0.0:
            return guess
        # x + (t - s) ((x - D) / s + (x' - D') / t) / 2, with x - D in terms of x' and D, which keeps it to three passes.
        half = (t - s) / 2
        slope = guess - fn(guess, t)
        return torch.lerp(x, guess, 0.5).add_(slope, alpha=half / t)
