"""Inpainting by putting in what is known, at the noise level where the solver is; and RePaint, which goes back and forth."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.solve import require_grid
from pgen.algorithms.diffusion.solvers.ancestral import Ancestral
from pgen.algorithms.diffusion.solvers.state import Solver


@dataclass(frozen=True, eq=False)
class Replacement:
    """A solver around a solver: after each step, known elements are replaced by themselves with fresh noise.

    Simple and fast, and no posterior: what is filled in hears of what is known only at its own noise level. Going back up
    (`repaint_grid`) harmonises the two. A step upwards adds noise.

    Attributes:
        known: values, `[B, *event]` or `[*event]`; anything where the mask is false.
        mask: what is known: booleans, `[*event]` or broadcastable.
        solver: of one step, whose state is the values.

    References:
        Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, ICLR 2021, appendix I.2.

    Example:
        >>> from pgen.algorithms.diffusion.noise import Streams
        >>> field = Field(lambda x, sigma: 0 * x, Streams(0, rows=1))
        >>> half = Replacement(torch.tensor([3.0, 0.0]), torch.tensor([True, False]))
        >>> half.step(torch.zeros(1, 2), 1.0, 0.0, field)
        tensor([[3., 0.]])
    """

    known: Tensor
    mask: Tensor
    solver: Solver = field(default_factory=Ancestral)

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next, down or up."""
        high, low = float(t), float(t_next)
        if low > high:
            return x + math.sqrt(low**2 - high**2) * fn.noise(x)
        x = self.solver.step(x, t, t_next, fn)
        known = self.known.to(x).expand_as(x)
        noisy = known + low * fn.noise(x) if low else known
        return torch.where(self.mask.to(x.device), noisy, x)


def repaint_grid(grid: Tensor, jump: int = 10, resamplings: int = 10) -> list[tuple[float, float]]:
    """The steps of RePaint: every stretch of `jump` steps is gone down, up again, and down, `resamplings` times in all.

    Args:
        grid: noise levels, decreasing.
        jump: steps of a stretch; the paper's is 10 of 250.
        resamplings: how often each is gone down.

    Returns:
        Pairs of noise levels, from and to; to be given to `Replacement.step` one by one.

    References:
        Lugmayr, Danelljan, Romero, Yu, Timofte & Van Gool, RePaint, CVPR 2022.

    Example:
        >>> repaint_grid(torch.tensor([3.0, 2.0, 1.0]), jump=1, resamplings=2)
        [(3.0, 2.0), (2.0, 3.0), (3.0, 2.0), (2.0, 1.0), (1.0, 2.0), (2.0, 1.0)]
    """
    if jump < 1 or resamplings < 1:
        raise ValueError(f"repaint_grid(jump={jump}, resamplings={resamplings}): expected positive integers")
    levels = require_grid(grid).tolist()
    steps = list[tuple[float, float]]()
    for first in range(0, len(levels) - 1, jump):
        stretch = levels[first : first + jump + 1]
        down = list(itertools.pairwise(stretch))
        steps += ([*down, (stretch[-1], stretch[0])]) * (resamplings - 1) + down
    return steps


def repaint(
    x: Tensor, grid: Tensor, prior: Field, replacement: Replacement, *, jump: int = 10, resamplings: int = 10
) -> Tensor:
    """Inpainting by RePaint, from values at noise level grid[0] to the last: `[B, *event]`. See `repaint_grid`."""
    for t, t_next in repaint_grid(grid, jump, resamplings):
        x = replacement.step(x, t, t_next, prior)
    return x
