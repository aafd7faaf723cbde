"""What is computed from a law that can denoise: draws, log densities, bounds; each a frozen set of options.

They ask of a law no more than `denoise(value, sigma)`, `schedule`, `event_shape`, `batch_shape`, and `like`, a tensor of
the dtype and on the device of its values: any law that declares `Capability.DENOISER` has them. A law over integers that
sees a real one through cells (`Quantized`) has `inside`, `cells` and `volume` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Size, Tensor

from pgen.algorithms.diffusion import grids, likelihood
from pgen.algorithms.diffusion.bound import Bound
from pgen.algorithms.diffusion.divergence import Divergence, Exact, Hutchinson, HutchPP
from pgen.algorithms.diffusion.field import Denoiser, Field
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.schedules import Schedule
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import Solver, UniPC

_AT_ONCE = 1 << 24
"""Numbers in the values that a denoiser is given in one call, at most."""


class Denoising(Protocol):
    """A law that can denoise."""

    schedule: Schedule

    @property
    def event_shape(self) -> Size:
        """Shape of one value."""
        ...

    @property
    def batch_shape(self) -> Size:
        """Shape of the values that have laws of their own."""
        ...

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of values."""
        ...

    def denoise(self, value: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x0 + sigma eps = value], for values `[..., *batch_shape, *event_shape]`."""
        ...


def over_rows(law: Denoising, lead: Size) -> Denoiser:
    """The denoiser of a law over flat rows: of values `[*lead, *event_shape]`, or of several such one after the other."""

    def denoiser(rows: Tensor, sigma: Tensor) -> Tensor:
        return law.denoise(rows.reshape(-1, *lead, *law.event_shape), sigma.reshape(-1, *lead)).reshape(
            rows.shape
        )

    return denoiser


def in_parts(
    law: Denoising, shape: Size, seed: int | None, rows: Callable[[Denoising, Size, Streams], Tensor]
) -> Tensor:
    """Draws of a law, as many at a time as memory allows.

    Args:
        law: to draw from.
        shape: of independent draws.
        seed: of the draws, each of which then depends on its number alone; None: of torch's global generator.
        rows: draws `[rows, *event_shape]` of real values, given the law, the leading dimensions that they are the rows of,
            and their random numbers.

    Returns:
        Values `[*shape, *batch_shape, *event_shape]`.
    """
    lead = Size(shape) + law.batch_shape
    n = math.prod(lead)
    if not n:
        return law.like.new_zeros(lead + law.event_shape)
    each = max(1, _AT_ONCE // max(1, math.prod(law.event_shape)))
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    if n > each and not law.batch_shape:
        counts = [min(each, n - i) for i in range(0, n, each)]
        parts = [rows(law, Size((m,)), Streams(seed, m, each * i)) for i, m in enumerate(counts)]
        found = torch.cat(parts)
    else:
        found = rows(law, lead, Streams(seed, n))
    found = found.reshape(lead + law.event_shape)
    cells: Callable[[Tensor], Tensor] | None = getattr(law, "cells", None)
    return found if cells is None else cells(found)


Grid = Callable[[int, float, float], Tensor]
"""From a number of steps and the least and largest noise levels to levels `[steps + 1]`, ending with 0."""


@dataclass(frozen=True)
class Reversed:
    """Draws: from noise to data, along a grid of noise levels.

    Attributes:
        solver: what takes the steps.
        steps: how many.
        grid: noise levels.
    """

    solver: Solver = field(default_factory=lambda: UniPC(3, variable="sigma"))
    steps: int = 32
    grid: Grid = grids.karras

    def draw(self, law: Denoising, shape: Size, seed: int | None = None) -> Tensor:
        """Values `[*shape, *batch_shape, *event_shape]`, differentiable in what the denoiser holds.

        Args:
            law: to draw from.
            shape: of independent draws.
            seed: of the draws, each of which then depends on its number alone; None: of torch's global generator.
        """
        return in_parts(law, shape, seed, self._rows)

    def _rows(self, law: Denoising, lead: Size, streams: Streams) -> Tensor:
        schedule = law.schedule
        grid = self.grid(self.steps, schedule.sigma_min, schedule.sigma_max)
        x = start(streams, law.event_shape, grid[0], law.like.new_empty(0), variance=VARIANCE)
        return solve(x, grid, Field(over_rows(law, lead), streams), self.solver)


VARIANCE = 1.0
"""Of the data per scalar, as far as it matters at the largest noise level: next to nothing."""


class Weighed(NamedTuple):
    """Log densities, or bounds on them, in nats.

    Attributes:
        value: `[..., *batch_shape]`.
        stderr: of what is random in it, likewise; None where nothing is.
        solver_error: of what was solved, likewise; None where nothing was.
        evaluations: of the denoiser for one value, at most.
    """

    value: Tensor
    stderr: Tensor | None
    solver_error: Tensor | None
    evaluations: int


@dataclass(frozen=True)
class Flowing:
    """Log densities, by the probability flow to pure noise.

    Attributes:
        divergence: `"exact"`, `"hutchinson"` or `"hutch++"`; `"auto"`: exact up to 128 scalars, then `"hutch++"`.
        probes: directions of an estimated divergence.
        tolerance: of the solver, in units of the noise level.
        error: of the integral of divergences, in nats.
    """

    divergence: str = "auto"
    probes: int = 30
    tolerance: float = 1e-4
    error: float = 1e-3

    def log_prob(self, law: Denoising, value: Tensor, seed: int = 0) -> Weighed:
        """Estimates `[..., *batch_shape]`; differentiable in values and denoiser where gradients are on.

        Args:
            law: with the denoiser.
            value: at the least noise level. Of a law over integers, a random value of each one's cell is taken.
            seed: of the probes: the same ones at every call, so that this is a function.
        """
        lead, rows = _rows_of(law, value)
        if not len(rows):
            return Weighed(rows.new_zeros(lead), None, None, 0)
        alone: Any = getattr(law, "unplaced", None)
        graph = torch.is_grad_enabled() and (rows.requires_grad or _learns(law))
        found = likelihood.log_prob(
            rows,
            Field(over_rows(law, lead) if alone is None else alone.denoise, Streams(seed, len(rows))),
            law.schedule.sigma_min,
            law.schedule.sigma_max,
            divergence=self._way(math.prod(law.event_shape)),
            tolerance=self.tolerance,
            error=self.error,
            flat=alone is not None,
            differentiable=graph,
        )
        spent = int((found.evaluations + found.products).max())
        errors = [None if e is None else e.to(rows).reshape(lead) for e in (found.stderr, found.solver_error)]
        return Weighed(found.value.reshape(lead) + volume_of(law), errors[0], errors[1], spent)

    def _way(self, d: int) -> Divergence | str:
        if self.divergence == "hutchinson":
            return Hutchinson(self.probes)
        if self.divergence == "exact" or (self.divergence == "auto" and d <= _SMALL):
            return Exact()
        return HutchPP(max(6, self.probes))


_SMALL = 128


@dataclass(frozen=True)
class Bounded:
    """Lower bounds on log densities, at noise levels and noise drawn anew each time.

    Attributes:
        particles: evaluations for each value.
        antithetic: use every noise with both signs.
    """

    particles: int = 1
    antithetic: bool = False

    def bound(self, law: Denoising, value: Tensor) -> Tensor:
        """An unbiased estimate of the bound, `[..., *batch_shape]`, differentiable in values and denoiser."""
        lead, rows = _rows_of(law, value)
        if not len(rows):
            return rows.new_zeros(lead)
        noise = torch.randn(self.particles, *rows.shape, dtype=rows.dtype, device=rows.device)
        shift = torch.rand((), dtype=rows.dtype, device=rows.device)
        found = self._bound(law)(rows, over_rows(law, lead), shift, noise)
        return found.reshape(lead) + volume_of(law)

    def log_prob(self, law: Denoising, value: Tensor) -> Weighed:
        """The bound from all particles, with its standard error, from independent parts of them."""
        lead, rows = _rows_of(law, value)
        denoiser = over_rows(law, lead)
        kind = {"dtype": rows.dtype, "device": rows.device}
        # What the denoiser, which sees nothing there, takes for the mean of the data.
        blind = denoiser(torch.zeros_like(rows), rows.new_full((len(rows),), law.schedule.sigma_max)).detach()
        bound = replace(self._bound(law), antithetic=True, mean=blind.mean(0))
        several = -(-_FORESEEN // len(rows))
        bound = bound.fitted(rows, denoiser, torch.randn(several, *rows.shape, **kind), levels=_LEVELS)
        each = max(1, self.particles // (2 * _REPEATS))
        noise = torch.randn(_REPEATS, each, *rows.shape, **kind)
        found, stderr = bound.with_error(rows, denoiser, torch.rand(_REPEATS, **kind), noise)
        spent = 1 + 2 * _REPEATS * each + _LEVELS * several
        return Weighed(found.reshape(lead) + volume_of(law), stderr.reshape(lead), None, spent)

    def _bound(self, law: Denoising) -> Bound:
        low, high = law.schedule.sigma_min, law.schedule.sigma_max
        return Bound(low, high, variance=VARIANCE, antithetic=self.antithetic)


_REPEATS = 8
_FORESEEN, _LEVELS = 200, 9  # values and noise levels at which errors are looked at first


def _rows_of(law: Denoising, value: Tensor) -> tuple[Size, Tensor]:
    """Leading dimensions of values, and the values as real numbers in flat rows `[rows, *event_shape]`."""
    inside: Callable[[Tensor], Tensor] | None = getattr(law, "inside", None)
    real = value if inside is None else inside(value)
    if not real.is_floating_point():
        real = real.to(law.like.dtype)
    lead = Size(np.broadcast_shapes(real.shape[: real.dim() - len(law.event_shape)], law.batch_shape))
    return lead, real.expand(lead + law.event_shape).reshape(math.prod(lead), *law.event_shape)


def volume_of(law: Denoising) -> float:
    """Log volume of the cells of a law over integers; 0 of any other."""
    return float(getattr(law, "volume", 0.0))


def _learns(law: Denoising) -> bool:
    """Whether gradients are wanted in what the denoiser holds."""
    held = getattr(getattr(law, "denoiser", None), "parameters", None)
    context = getattr(law, "context", None)
    return (callable(held) and any(p.requires_grad for p in held())) or (
        context is not None and context.requires_grad
    )
