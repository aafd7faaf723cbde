"""Values moved by a law that can denoise: to noise and back without chance, or part of the way and back with some.

    encode    the probability flow from the least noise level to the largest: a value's own noise
    decode    the same flow down: the inverse of `encode`
    edited    some noise is added, and taken away by the law (SDEdit)

What one law encodes another decodes: `target.decode(source.encode(x))` translates between models that were never
trained together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from pgen.algorithms.diffusion import grids
from pgen.algorithms.diffusion.adaptive_ode import adaptive_ode
from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.posteriors.editing import sdedit
from pgen.algorithms.diffusion.solvers import Solver
from pgen.distributions.denoising import VARIANCE, Denoising, over_rows
from pgen.errors import DataError, OptionError


@torch.no_grad()
def encode(law: Denoising, value: Tensor, tolerance: float) -> Tensor:
    """The noise `[..., *batch_shape, *event_shape]` at which a value's path begins, of scale one.

    Args:
        law: whose path.
        value: `[..., *batch_shape, *event_shape]`.
        tolerance: of the solver, for values of the order of 1.
    """
    x = _flowed(law, value, "encode", "value", tolerance, up=True)
    return x / math.hypot(law.schedule.sigma_max, math.sqrt(VARIANCE))


@torch.no_grad()
def decode(law: Denoising, noise: Tensor, tolerance: float) -> Tensor:
    """The value at which the path from some noise ends: what `encode` is the inverse of.

    Args:
        law: whose path.
        noise: `[..., *batch_shape, *event_shape]`, of scale one.
        tolerance: of the solver, for values of the order of 1.
    """
    scale = math.hypot(law.schedule.sigma_max, math.sqrt(VARIANCE))
    return _flowed(law, noise * scale, "decode", "noise", tolerance, up=False)


@torch.no_grad()
def edited(
    law: Denoising, value: Tensor, sigma: float, solver: Solver, steps: int, seed: int | None
) -> Tensor:
    """Draws near a value, `[..., *batch_shape, *event_shape]`: noise of level sigma is added and taken away again.

    Args:
        law: that takes it away.
        value: `[..., *batch_shape, *event_shape]`.
        sigma: how much.
        solver: what takes the steps.
        steps: how many.
        seed: of the noise; None: from torch's global generator.
    """
    low, high = law.schedule.sigma_min, law.schedule.sigma_max
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not low < sigma <= high:
        raise OptionError(
            f"edited(sigma={sigma!r}): expected a noise level of the schedule, above {low:g} and at most {high:g}; more of it "
            "makes the result more likely, and less like the value"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"edited(steps={steps!r}): expected a whole number of at least 1")
    lead, rows = _rows_of(law, value, "edited", "value")
    if not len(rows):
        return rows.reshape(lead + law.event_shape)
    streams = Streams(int(torch.randint(1 << 62, ())) if seed is None else seed, len(rows))
    grid = grids.karras(steps, low, float(sigma))
    found = sdedit(rows, grid, Field(over_rows(law, lead), streams), solver, sigma=float(sigma))
    return found.reshape(lead + law.event_shape)


def _flowed(law: Denoising, value: Tensor, asked: str, what: str, tolerance: float, *, up: bool) -> Tensor:
    if not 0 < tolerance < 1:
        raise OptionError(f"{asked}(tolerance={tolerance!r}): expected a number between 0 and 1")
    lead, rows = _rows_of(law, value, asked, what)
    ends = law.schedule.sigma_min, law.schedule.sigma_max
    start, end = ends if up else ends[::-1]
    if len(rows):
        rows = adaptive_ode(rows, start, end, Field(over_rows(law, lead)), rtol=tolerance, atol=tolerance).x
    return rows.reshape(lead + law.event_shape)


def _rows_of(law: Any, value: Tensor, asked: str, what: str) -> tuple[Size, Tensor]:
    """The leading shape of values, and the values as flat rows of numbers that can have noise."""
    held = value.dim() - len(law.event_shape)
    try:
        lead = torch.broadcast_shapes(value.shape[: max(0, held)], law.batch_shape)
    except RuntimeError:
        lead, held = Size(), -1
    if held < 0 or value.shape[held:] != law.event_shape:
        sizes = ", ".join(map(str, (*law.batch_shape, *law.event_shape)))
        raise DataError(
            f"{asked}: {what} has shape {tuple(value.shape)}; expected [..., {sizes}]: batch and event shape of {law}"
        )
    real = value if value.is_floating_point() else value.to(law.like.dtype)
    return lead, real.expand(lead + law.event_shape).reshape(lead.numel(), *law.event_shape)
