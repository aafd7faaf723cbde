r"""From noise to data along a grid of noise levels: any solver, any grid, any denoiser.

x = start(streams, (3, 32, 32), grid[0], like)
x = solve(x, grid, Field(denoiser, streams), DPMSolverPP())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.solvers.state import Solver, moved, only_down, value

OnStep = Callable[[Tensor, float], Tensor | None]
"""Is told the values and the noise level after every step, and may return other values to go on with."""


def solve(x: Tensor, grid: Tensor, field: Field, solver: Solver, *, on_step: OnStep | None = None) -> Tensor:
    """Carry values along a grid of noise levels.

    Down to data, or up: a deterministic solver then encodes, and one of the reverse-time equation refuses. A grid that ends with 0 ends in data without noise.
    Gradients flow through; no input is changed. Whoever needs no gradient says `torch.no_grad()`.

    Args:
        x: values at noise level grid[0], `[B, *event]`.
        grid: noise levels, `[steps + 1]`, strictly decreasing or increasing; positive, but that the last may be 0.
        field: the denoiser and the rows' random numbers.
        solver: anything with `step`.
        on_step: called after every step.

    Returns:
        The values at noise level grid[-1], `[B, *event]`.

    Raises:
        ValueError: the grid is none, or goes up where the solver only goes down.

    Example:
        >>> from pgen.algorithms.diffusion.solvers import Euler
        >>> grid = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
        >>> solve(torch.tensor([[4.0]]), grid, Field(lambda x, sigma: 0 * x), Euler(), on_step=lambda x, s: print(s, x))
        1.0 tensor([[2.]])
        0.0 tensor([[0.]])
        tensor([[0.]])
    """
    levels = require_grid(grid)
    if levels[-1] > levels[0] and only_down(solver):
        raise ValueError(
            f"{solver} takes noise away, and the grid goes up, from noise level {levels[0]:.4g} to {levels[-1]:.4g}; expected "
            "a decreasing grid, or a solver without noise, such as UniPC(3): it encodes data"
        )
    state: Tensor | object = x
    for t, t_next, level in zip(levels[:-1], levels[1:], levels[1:].tolist(), strict=True):
        state = solver.step(state, t, t_next, field)
        if on_step is not None:
            other = on_step(value(state), level)
            if other is not None:
                state = moved(state, other)
    return value(state)


def start(
    streams: Streams,
    shape: Sequence[int],
    sigma: float | Tensor,
    like: Tensor,
    *,
    mean: Tensor | float = 0.0,
    variance: Tensor | float = 0.0,
) -> Tensor:
    r"""Values to start from: mean + sqrt(sigma^2 + variance) z.

    With mean and variance of the data (per number, or one for all) a start at a moderate noise level is right in its
    first two moments; without them it must be far above the data's spread.

    Args:
        streams: the rows' random numbers, of which the draw 0 is taken: fields begin with 1.
        shape: of an event.
        sigma: the first noise level.
        like: a tensor to take dtype and device from.
        mean: of the data, to be broadcast with an event.
        variance: of the data, to be broadcast with an event.
    """
    noise = streams.normal(0, shape, like)
    level = float(sigma)
    if isinstance(variance, Tensor):
        return noise * (level**2 + variance.to(noise)).sqrt() + mean
    return noise * math.sqrt(level**2 + variance) + mean


def require_grid(grid: Tensor) -> Tensor:
    """The grid on the CPU, in float64.

    Raises:
        ValueError: it is no grid.
    """
    levels = grid.detach().to("cpu", torch.float64)
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(
            f"got a grid of shape {tuple(grid.shape)}; expected two or more noise levels, [steps + 1]"
        )
    steps = levels.diff()
    if not bool(((steps < 0).all() | (steps > 0).all()) & (levels[:-1] > 0).all() & (levels[-1] >= 0)):
        raise ValueError(
            f"got the grid {[float(f'{v:.4g}') for v in levels[:12].tolist()]}{'...' if len(levels) > 12 else ''}; expected "
            "strictly decreasing (or increasing) positive noise levels, of which the last may be 0"
        )
    return levels
