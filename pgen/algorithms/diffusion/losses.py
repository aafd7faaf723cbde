r"""Denoising score matching and flow matching: square losses whose minimum is the denoiser, or the velocity.

    denoising       w(sigma) |x_0 - D(x_0 + sigma eps, sigma)|^2
    flow matching   |eps - x_0 - u((1 - t) x_0 + t eps, t)|^2

Errors are averaged over the scalars of an event, so that losses of events of different size compare. Noise and noise
levels are arguments: nothing here draws random numbers. With noise independent of the data, the two are one loss under
two names: flow matching is denoising at sigma = t / (1 - t) with weight (1 + 1 / sigma)^2. Where noise is coupled with the
data (`coupling`), the minimum still generates the data's law when its equation is integrated, but (D - x) / sigma^2 is no
longer the score of anything: no log density by `likelihood`, no posterior by guidance, no stochastic solver.

References:
    Vincent, A Connection Between Score Matching and Denoising Autoencoders, Neural Computation 23(7), 2011.
    Karras, Aittala, Aila & Laine, NeurIPS 2022. Lipman et al., Flow Matching for Generative Modeling, ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pgen.algorithms.diffusion.field import per_row
from pgen.algorithms.diffusion.guidance import given
from pgen.algorithms.diffusion.weightings import Uniform, Weighting

_UNIFORM = Uniform()


def denoising(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weighting: Weighting = _UNIFORM,
    *,
    context: Tensor | None = None,
) -> Tensor:
    """Weighted squared error of denoised values, mean over an event.

    Args:
        denoiser: `denoiser(x, sigma)`, or with a context as third argument.
        x: data, `[B, *event]`.
        sigma: noise levels, `[B]`.
        noise: standard normal, shape of x.
        weighting: of squared errors by noise level.
        context: conditions, `[B, c]`; rows of NaN for none.

    Returns:
        One loss for each row, `[B]`.

    Example:
        >>> import torch
        >>> ones = torch.ones(2, 3)
        >>> denoising(lambda x, sigma: x, ones, torch.tensor([0.1, 5.0]), ones)  # is off by the noise
        tensor([1.0000, 1.0000])
    """
    found = given(denoiser, context)(x + per_row(sigma, x) * noise, sigma)
    return weighting(sigma) * per_event(found - x)


def flow_matching(
    velocity: Callable[..., Tensor], x: Tensor, t: Tensor, noise: Tensor, *, context: Tensor | None = None
) -> Tensor:
    """Squared error of the velocity along straight paths from data (t = 0) to noise (t = 1), mean over an event.

    Args:
        velocity: `velocity(x_t, t)`, or with a context as third argument.
        x: data, `[B, *event]`.
        t: times in [0, 1], `[B]`.
        noise: standard normal, shape of x; coupled with x or not.
        context: conditions, `[B, c]`.

    Returns:
        One loss for each row, `[B]`.
    """
    part = per_row(t, x)
    found = given(velocity, context)((1 - part) * x + part * noise, t)
    return per_event(noise - x - found)


def per_event(error: Tensor) -> Tensor:
    """Mean square of each row `[B, *event]`, `[B]`; of a scalar event, its square."""
    return error.reshape(len(error), -1).square().mean(-1)
