r"""Guidance: denoisers out of denoisers, pushed towards a condition or away from a worse model.

    classifier-free     D(x, none) + w (D(x, c) - D(x, none))
    autoguidance        D_bad(x) + w (D_good(x) - D_bad(x))
    classifier          D(x) + w sigma^2 grad_x log p(y | x, sigma)

In all of them w = 1 is no guidance beyond the condition itself: the first two are then D(x, c) and D_good, and the
third is the denoiser of x_0 given y, by Bayes' rule, if the classifier is exact. w > 1 sharpens; its result is the
denoiser of no law (guided scores are not gradients of diffused densities), so samples are biased towards the condition.

References:
    Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, NeurIPS 2021 (classifier).
    Ho & Salimans, Classifier-Free Diffusion Guidance, 2022.
    Karras, Aittala, Kynkaanniemi, Lehtinen, Aila & Laine, Guiding a Diffusion Model with a Bad Version of Itself,
    NeurIPS 2024 (autoguidance).
    Kynkaanniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality, NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, per_row

ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`denoiser(x, sigma, context)`: x `[B, *event]`, sigma `[B]`, context `[B, c]`, a row of NaN meaning no condition."""

Scale = float | Callable[[Tensor], Tensor]
"""Strength of guidance: a number, or a function of the noise levels `[B]`, for example `within(0.3, 5.0, 2.0)`."""


def given(denoiser: Callable[..., Tensor], context: Tensor | None) -> Denoiser:
    """The denoiser under a condition `[B, c]`, or `[c]`, the same for all rows; None leaves it as it is."""
    if context is None:
        return denoiser
    return lambda x, sigma: denoiser(x, sigma, context.expand(len(x), -1))


def without_condition(context: Tensor) -> Tensor:
    """The context that says that there is none: NaN, of the same shape."""
    return torch.full_like(context, torch.nan)


def drop_condition(context: Tensor, u: Tensor, rate: float = 0.1) -> Tensor:
    """Take the condition from some rows, so that a denoiser learns to do with and without.

    Args:
        context: `[B, c]`.
        u: numbers uniform on [0, 1], `[B]`: rows below the rate lose their condition.
        rate: the share that does.
    """
    return torch.where((u < rate).unsqueeze(-1), without_condition(context), context)


def within(low: float, high: float, scale: float) -> Callable[[Tensor], Tensor]:
    """Guidance at noise levels between two, none (scale 1) outside."""
    return lambda sigma: torch.where((sigma >= low) & (sigma <= high), scale, 1.0).to(sigma)


def classifier_free(denoiser: ConditionalDenoiser, scale: Scale) -> ConditionalDenoiser:
    """Conditional and unconditional denoiser of one network, extrapolated; both in one call of twice the rows.

    Args:
        denoiser: takes a condition, and rows of NaN for none.
        scale: w; 1 is the conditional denoiser (and still evaluates both), 0 the unconditional one.
    """

    def guided(x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        context = context.expand(len(x), -1)
        both = torch.cat([context, without_condition(context)])
        with_it, without = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return without + _strength(scale, sigma, x) * (with_it - without)

    return guided


def autoguidance(
    good: Callable[..., Tensor], bad: Callable[..., Tensor], scale: Scale
) -> Callable[..., Tensor]:
    """Away from a worse model of the same: smaller, trained for shorter, or without the condition.

    Args:
        good: the denoiser.
        bad: the worse one.
        scale: w; 1 is the good denoiser.
    """

    def guided(x: Tensor, sigma: Tensor, *context: Tensor) -> Tensor:
        worse = bad(x, sigma, *context)
        return worse + _strength(scale, sigma, x) * (good(x, sigma, *context) - worse)

    return guided


def classifier(
    denoiser: Callable[..., Tensor], log_prob: Callable[[Tensor, Tensor], Tensor], scale: Scale = 1.0
) -> Callable[..., Tensor]:
    """Towards values that a classifier of noisy values believes in; with an exact one and scale 1, exact.

    Args:
        denoiser: of the values alone.
        log_prob: log p(y | x, sigma) for the y wanted, `[B]` nats from x `[B, *event]` and sigma `[B]`; differentiable.
        scale: w.
    """

    def guided(x: Tensor, sigma: Tensor, *context: Tensor) -> Tensor:
        # torch.func.grad works where gradients are switched off, and within vmap
        slope = torch.func.grad(lambda x: log_prob(x, sigma).sum())(x)
        return denoiser(x, sigma, *context) + _strength(scale, sigma, x) * per_row(sigma**2, x) * slope

    return guided


def _strength(scale: Scale, sigma: Tensor, like: Tensor) -> Tensor | float:
    return per_row(scale(sigma), like) if callable(scale) else scale
