r"""What solvers call: a denoiser with its samples' random numbers and a count of its evaluations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgen.algorithms.diffusion.noise import Streams

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""From values `[B, *event]` and noise levels `[B]` to E[x0 | x0 + sigma eps = x], `[B, *event]`."""


class Field:
    """A denoiser over rows, as solvers are given it.

    `field(x, sigma)` is the denoised x; `field.noise(x)` are fresh standard normal numbers for every row of x, each from
    the row's own stream.

    Args:
        denoiser: from values `[B, *event]` and noise levels `[B]` to values `[B, *event]`.
        streams: the rows' random numbers; None where none will be drawn.

    Attributes:
        evaluations: how often the denoiser was called.
    """

    def __init__(self, denoiser: Denoiser, streams: Streams | None = None) -> None:
        self.denoiser = denoiser
        self.streams = streams
        self.evaluations = 0
        self.draws = 0

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x0 + sigma eps = x].

        Args:
            x: values `[B, *event]`.
            sigma: noise level, a number or `[B]`.
        """
        self.evaluations += 1
        if isinstance(sigma, Tensor) and sigma.dim():
            levels = sigma.to(x)
        else:
            levels = x.new_full(x.shape[:1], float(sigma))
        return self.denoiser(x, levels)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers, shape of `like` `[B, *event]`: new ones at every call.

        Raises:
            ValueError: the field has no random numbers.
        """
        if self.streams is None:
            raise ValueError(
                "this solver draws noise, and the field has none; expected Field(denoiser, Streams(seed, rows=len(x)))"
            )
        self.draws += 1
        return self.streams.normal(self.draws, like.shape[1:], like)


def per_row(level: Tensor, like: Tensor) -> Tensor:
    """Numbers `[B]` to be multiplied with rows `[B, *event]`."""
    return level.reshape(level.shape + (1,) * (like.dim() - level.dim()))


def score_of(denoised: Tensor, x: Tensor, sigma: Tensor | float) -> Tensor:
    r"""Tweedie's formula: the gradient of the log density at noise level sigma is (D(x, sigma) - x) / sigma^2."""
    level = per_row(sigma, x) if isinstance(sigma, torch.Tensor) else sigma
    return (denoised - x) / level**2
