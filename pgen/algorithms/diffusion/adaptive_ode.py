r"""The probability-flow equation with steps chosen by their error: a step size of its own for every row.

    dx / dlog(sigma) = x - D(x, sigma)

Dormand and Prince's embedded pair of orders 5 and 4, six evaluations a step (the last stage of one step is the first of
the next), a proportional-integral controller, and their quartic for values between steps. As each row has its own noise
level and its own step, a sample depends on nothing but itself: not on what happens to be solved beside it.

References:
    Dormand & Prince, A family of embedded Runge-Kutta formulae, J. Comput. Appl. Math. 6, 1980.
    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sections II.4 to II.6, Springer, 1993.
    Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field, per_row

_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_BETWEEN = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 5.0  # of the factor by which a step changes
_PROPORTIONAL, _INTEGRAL = 0.7 / 5, 0.4 / 5


class Path(NamedTuple):
    """A solution between its steps: every row's own sequence of quartics in log noise level.

    Attributes:
        start: log noise level at which each attempted step starts, `[S, B]`.
        width: its width in log noise level, negative towards data, `[S, B]`; 0 where the row did not move.
        x: values at the start of each attempt and at the end, `[S + 1, B, *event]`.
        slope: derivatives there in log noise level.
        bend: what each quartic has beyond the cubic, `[S, B, *event]`.
    """

    start: Tensor
    width: Tensor
    x: Tensor
    slope: Tensor
    bend: Tensor

    def at(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Values and their derivatives in log noise level.

        Args:
            level: logarithms of noise levels, one for each row, `[B]`.

        Returns:
            Two tensors `[B, *event]`.
        """
        moved = self.width != 0
        part = (level - self.start) / torch.where(moved, self.width, 1.0)
        # The step whose interval holds the level; at the ends rounding may leave none: then the nearest.
        index = torch.where(moved, (part - 0.5).abs(), math.inf).argmin(0)
        return self.within(index, part.gather(0, index.unsqueeze(0))[0])

    def within(self, index: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """The same at a fraction `[B]` of attempt `index`, `[B]`."""
        here, rows = index.to(self.x.device), torch.arange(len(index), device=self.x.device)
        start, end = self.x[here, rows], self.x[here + 1, rows]
        width = per_row(self.width.gather(0, index.unsqueeze(0))[0].to(start.dtype).to(start.device), start)
        t = per_row(part.to(start.dtype).to(start.device), start)
        rise = end - start
        enter = self.slope[here, rows] * width - rise
        leave = rise - self.slope[here + 1, rows] * width - enter
        bend = self.bend[here, rows]
        value = start + t * (rise + (1 - t) * (enter + t * (leave + (1 - t) * bend)))
        change = rise + (1 - 2 * t) * enter + t * (2 - 3 * t) * leave + 2 * t * (1 - t) * (1 - 2 * t) * bend
        return value, change / torch.where(width == 0, 1.0, width)


class Solution(NamedTuple):
    """Where an adaptive solver arrived.

    Attributes:
        x: values `[B, *event]`.
        evaluations: of the denoiser for each row, `[B]`; a row that is done waits for the others, and its waiting
            is not counted.
        rejected: attempted steps that were taken back, `[B]`.
        path: the way there, where it was asked for.
    """

    x: Tensor
    evaluations: Tensor
    rejected: Tensor
    path: Path | None = None


def adaptive_ode(
    x: Tensor,
    sigma_start: float,
    sigma_end: float,
    field: Field,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    *,
    noise_units: bool = False,
    dense: bool = False,
    most: int = 10_000,
) -> Solution:
    r"""Solve the probability-flow equation between two noise levels, in either direction.

    A step is accepted where the root mean square of error / (atol + rtol |x|) over a row is at most 1. The denoiser is
    always called with all rows in their order, so it may carry a context for each of them.

    Args:
        x: values `[B, *event]` at `sigma_start`.
        sigma_start: noise level to start from.
        sigma_end: noise level to end at; smaller: towards data, larger: towards noise.
        field: the denoiser.
        rtol: tolerance relative to x.
        atol: absolute tolerance.
        noise_units: absolute tolerances are multiples of the noise level. A density at noise level sigma changes over
            distances of order sigma, so this is what a likelihood needs.
        dense: keep the path, three tensors like x for every step; there is none where start and end are one level.
        most: evaluations of the denoiser for any row.

    Raises:
        ValueError: noise levels or tolerances that are not positive.
        RuntimeError: rows that need more evaluations, or whose values are not finite.

    Example:
        >>> from pgen.algorithms.diffusion.mixture import Mixture
        >>> unit = Mixture(torch.zeros(1, 1, dtype=torch.float64), scale=1.0)
        >>> x = torch.tensor([[1.0], [-3.0]], dtype=torch.float64)
        >>> adaptive_ode(x, 1e-3, 3.0**0.5, Field(unit), 1e-7, 1e-7).x  # x sqrt(1 + sigma^2)
        tensor([[ 2.0000],
                [-6.0000]], dtype=torch.float64)
    """
    require_levels(sigma_start, sigma_end, rtol, atol)
    batch, device = len(x), x.device
    clock = {
        "dtype": torch.float64
    }  # levels and steps live on the CPU: one number a row, decided upon at every step
    end, way = math.log(sigma_end), math.copysign(1.0, sigma_end - sigma_start)
    level = torch.full((batch,), math.log(sigma_start), **clock)
    evaluations, rejected = torch.ones(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    before = torch.ones(batch, **clock)
    shrunk = torch.zeros(batch, dtype=torch.bool)
    slope = x - field(x, level.exp())
    size = error_norm(slope, x, x, level.exp(), rtol, atol, noise_units).clamp(min=1e-6)
    step = (0.5 * size ** (-1 / 5)).nan_to_num(1e-3).clamp(1e-6, 1.0)
    values, steepness = [x], [slope]
    starts: list[Tensor] = []
    widths: list[Tensor] = []
    bends: list[Tensor] = []
    while True:
        left = (end - level) * way
        going = left > 0
        if not going.any():
            break
        require_progress(going & ((evaluations + 6 > most) | (step < 1e-12)), level.exp(), evaluations, step)
        last = step * (1 + 1e-8) >= left
        h = torch.where(going, torch.where(last, left, step), 0.0) * way
        new, slopes = _attempt(x, slope, level, h, field)
        width = per_row(h.to(x.dtype).to(device), x)
        error = error_norm(
            width * _weighted(_ERROR, slopes), x, new, (level + h).exp(), rtol, atol, noise_units
        )
        good = going & (error <= 1)
        evaluations += 6 * going
        rejected += going & ~good
        if dense:
            starts.append(level)
            widths.append(torch.where(good, h, 0.0))
            bends.append(width * _weighted(_BETWEEN, slopes))
        floor = error.nan_to_num(math.inf).clamp(min=1e-10)
        factor = _SAFETY * floor ** (-_PROPORTIONAL) * before**_INTEGRAL
        factor = torch.where(
            good, factor.clamp(_LEAST, _MOST), (_SAFETY * floor ** (-1 / 5)).clamp(_LEAST, 1.0)
        )
        factor = torch.where(shrunk, factor.clamp(max=1.0), factor)
        step = torch.where(going & ~(good & last), h.abs() * factor, step)
        level = torch.where(good, torch.where(last, end, level + h), level)
        before, shrunk = torch.where(good, floor.clamp(min=1e-4), before), going & ~good
        taken = per_row(good.to(device), x)
        x, slope = torch.where(taken, new, x), torch.where(taken, slopes[-1], slope)
        if dense:
            values.append(x)
            steepness.append(slope)
    path = Path(*map(torch.stack, (starts, widths, values, steepness, bends))) if dense and starts else None
    return Solution(x, evaluations, rejected, path)


@dataclass(frozen=True)
class AdaptiveODE:
    """The same as a solver: between two levels of a grid, as many steps as the tolerance takes.

    The levels of the grid are where the steps end, so a grid of the first and the last level is the cheapest.

    Attributes:
        rtol: tolerance relative to x.
        atol: absolute tolerance.
        sigma_min: a last level of 0 is reached by solving to this one (or not at all, where the step starts below it),
            and taking the denoised value there.
        most: evaluations of the denoiser for any row and step.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    sigma_min: float = 0.002
    most: int = 10_000

    def __post_init__(self) -> None:
        require_levels(self.sigma_min, self.sigma_min, self.rtol, self.atol)

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to noise level t_next."""

        def follow(x: Tensor, start: float, end: float) -> Tensor:
            return adaptive_ode(x, start, end, fn, self.rtol, self.atol, most=self.most).x

        return between(x, float(t), float(t_next), fn, follow, self.sigma_min)


def between(
    x: Tensor,
    start: float,
    end: float,
    field: Field,
    follow: Callable[[Tensor, float, float], Tensor],
    sigma_min: float,
) -> Tensor:
    """A step of an equation that has no end at 0: there, `follow` it to `sigma_min`, if that is still ahead, and denoise."""
    if end == 0 and start <= sigma_min:
        return field(x, start)
    level = end if end > 0 else sigma_min
    x = follow(x, start, level)
    return field(x, level) if end == 0 else x


def _attempt(x: Tensor, slope: Tensor, level: Tensor, h: Tensor, field: Field) -> tuple[Tensor, list[Tensor]]:
    """One step of Dormand and Prince's pair: the new values, and the slopes at all stages."""
    width = per_row(h.to(x.dtype).to(x.device), x)
    slopes, new = [slope], x
    for node, weights in zip(_NODES[1:], _STAGES):
        new = x + width * _weighted(weights, slopes)
        slopes.append(new - field(new, (level + node * h).exp()))
    return new, slopes


def _weighted(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    """sum_i weights[i] terms[i]."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:]):
        if weight:
            total = torch.add(total, term, alpha=weight)
    return total


def error_norm(
    error: Tensor, x: Tensor, new: Tensor, sigma: Tensor, rtol: float, atol: float, noise_units: bool = False
) -> Tensor:
    """Root mean square of error / (atol + rtol |x|) for every row, `[B]`, float64 on the CPU."""
    with torch.no_grad():
        least = sigma * atol if noise_units else torch.full_like(sigma, atol)
        scale = per_row(least.to(x.dtype).to(x.device), x) + rtol * torch.maximum(x.abs(), new.abs())
        ratio = (error / scale).reshape(len(x), -1)
        return ratio.square().mean(1).sqrt().cpu().double()


def require_levels(start: float, end: float, rtol: float, atol: float) -> None:
    """Refuse noise levels and tolerances that are none."""
    if not (0 < start < math.inf and 0 < end < math.inf):
        raise ValueError(
            f"got noise levels {start} and {end}; expected positive ones (the equation has no end at 0: "
            "solve to a small level, and denoise there)"
        )
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"got rtol={rtol} and atol={atol}; expected them not negative, one of them positive")


def require_progress(stuck: Tensor, sigma: Tensor, evaluations: Tensor, step: Tensor) -> None:
    """Refuse to go on, naming the rows that do not get on."""
    if stuck.any():
        rows = stuck.nonzero()[:, 0].tolist()
        first = rows[0]
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise RuntimeError(
            f"the adaptive solver does not get on with {len(rows)} of {len(sigma)} rows ({shown}): row {first} is at "
            f"noise level {float(sigma[first]):.3g} with steps of {float(step[first]):.1e} in log noise level after "
            f"{int(evaluations[first])} evaluations. A denoiser that is not finite there, jumps, or is computed in too "
            "low a precision for rtol and atol does this; or allow more evaluations by most="
        )
