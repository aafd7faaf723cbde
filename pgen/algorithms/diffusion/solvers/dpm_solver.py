"""DPM-Solver++: multi-step methods in log noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.solvers.state import History, history
from pgen.algorithms.diffusion.solvers.weights import adams, combined


@dataclass(frozen=True)
class DPMSolverPP:
    r"""DPM-Solver++(2M) and (3M), the ordinary differential equation.

        order 2:  x_t = (t / s) x_s + (1 - t / s) ((1 + 1 / 2r) D_s - 1 / 2r D_r),   r = log(s_r / s) / log(s / t)
        order 3:  D is the parabola through three values in log sigma, integrated exactly

    The original's third-order formula halves the second difference, whereby its order is 2; this one does not.
    The first steps, and the step to 0, are of the orders that they can be. One evaluation a step.

    Attributes:
        order: 2 or 3.

    References:
        Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022, algorithm 2.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            raise ValueError(f"DPMSolverPP(order={self.order}): expected 2 or 3")

    def step(self, state: Tensor | History, t: Tensor | float, t_next: Tensor | float, fn: Field) -> History:
        """From noise level t to t_next."""
        s, t = float(t), float(t_next)
        state = history(state)
        state = state.seen(s, fn(state.x, s), self.order)
        now, *past = state.denoised
        if t == 0.0 or not past:
            return state._replace(x=torch.lerp(now, state.x, t / s))
        if len(past) == 1:
            ratio = math.log(state.levels[1] / s) / math.log(s / t)
            return state._replace(x=torch.lerp(now, past[0], -0.5 / ratio).lerp_(state.x, t / s))
        return state._replace(x=combined(state.x, t / s, state.denoised, adams(state.levels, s, t)))
