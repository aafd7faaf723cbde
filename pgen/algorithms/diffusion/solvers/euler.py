"""Euler's method, which is DDIM without noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class Euler:
    r"""One Euler step of dx/dsigma = (x - D) / sigma.

        x_t = x_s + (t - s) (x_s - D) / s = D + (t / s) (x_s - D)

    The denoised value being held, this is also the exponential integrator of first order and DDIM with eta = 0, at any
    scale of a schedule. Order 1; one evaluation a step.

    References:
        Song, Meng & Ermon, Denoising Diffusion Implicit Models, ICLR 2021, equation 13.
    """

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next."""
        return torch.lerp(fn(x, t), x, float(t_next) / float(t))
