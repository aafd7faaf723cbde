"""Editing without a likelihood: start from a guide image instead of noise."""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.solve import require_grid, solve
from pgen.algorithms.diffusion.solvers.state import Solver


def sdedit(guide: Tensor, grid: Tensor, prior: Field, solver: Solver, *, sigma: float) -> Tensor:
    """Draws near a guide: noise is added to it, and taken away by the prior. More noise: more likely, less like it.

    Args:
        guide: `[B, *event]`.
        grid: noise levels, decreasing; those below sigma are used.
        prior: the denoiser and the random numbers.
        solver: any.
        sigma: noise level to start from.

    Raises:
        ValueError: no level of the grid is below sigma.

    References:
        Meng et al., SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, ICLR 2022.
    """
    levels = require_grid(grid)
    below = levels[levels < sigma]
    if not len(below):
        raise ValueError(f"sdedit(sigma={sigma}): no noise level of the grid is below it ({levels.tolist()})")
    return solve(
        guide + sigma * prior.noise(guide), torch.cat([below.new_tensor([sigma]), below]), prior, solver
    )
