r"""Conditional denoisers: what every algorithm here needs to know of an observation, in one look.

    D_y(x, sigma) = D(x, sigma) + sigma^2 grad_x log g(x, sigma),    g(x, sigma) about p(y | x_sigma = x)

is E[x_0 | x_sigma, y] where g is p(y | x_sigma) (Tweedie's formula, for the conditional law); the methods differ in g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser

LogLikelihood = Callable[[Tensor], Tensor]
"""log p(y | x_0) in nats, from `[B, *event]` to `[B]`; differentiable, row by row; constants in x_0 may be missing."""


class Look(NamedTuple):
    """What a guide sees of values at a noise level.

    Attributes:
        prior: D(x, sigma), `[B, *event]`.
        posterior: D_y(x, sigma), `[B, *event]`.
        log_twist: log g(x, sigma), `[B]`, in nats.
    """

    prior: Tensor
    posterior: Tensor
    log_twist: Tensor


class Guide(Protocol):
    """A conditional denoiser; as a callable it is a `Denoiser`, for `Field` and any solver."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x, y], for x `[B, *event]`, sigma `[B]`."""
        ...

    def look(self, x: Tensor, sigma: Tensor) -> Look:
        """That, with the prior's denoiser and the twist, from one evaluation of the prior."""
        ...

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0), `[B]`, what is to be had without noise."""
        ...


def watched(prior: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf equal to x, and D there, to be differentiated (call with gradients enabled)."""
    leaf = x.detach().requires_grad_()
    return leaf, prior(leaf, sigma)


def log_likelihood_and_gradient(log_likelihood: LogLikelihood, x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y | x_0) `[B]` and its gradient `[B, *event]`, at x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = log_likelihood(leaf)
        if not value.requires_grad:  # a constant
            return value, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def over_event(x: Tensor) -> Tensor:
    """Sums over everything but the rows, `[B]`."""
    return x.reshape(len(x), -1).sum(-1)
