"""Exponential Adams-Bashforth methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.solvers.state import History, history
from pgen.algorithms.diffusion.solvers.weights import VARIABLES, adams, combined


@dataclass(frozen=True)
class ExponentialAdamsBashforth:
    r"""A polynomial through the last denoised values, integrated exactly (as DEIS's tAB methods).

        x_t = (t / s) x_s + sum_j w_j D_j,    w_j = int e^-(h - tau) l_j(tau) dtau over tau in [0, h]

    One evaluation a step. The first steps are of the orders that they can be.

    Attributes:
        order: number of values, 1 to 4; order 1 is `Euler`.
        variable: of the polynomial: `"log"` (sigma), `"sigma"` or `"angle"`, arctan(sigma). The last two reach 0.

    References:
        Zhang & Chen, Fast Sampling of Diffusion Models with Exponential Integrator, ICLR 2023.
    """

    order: int = 3
    variable: str = "sigma"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4) or self.variable not in VARIABLES:
            raise ValueError(
                f"ExponentialAdamsBashforth(order={self.order}, variable={self.variable!r}): "
                f"expected order 1 to 4 and one of {', '.join(VARIABLES)}"
            )

    def step(self, state: Tensor | History, t: Tensor | float, t_next: Tensor | float, fn: Field) -> History:
        """From noise level t to t_next."""
        s, t = float(t), float(t_next)
        state = history(state)
        state = state.seen(s, fn(state.x, s), self.order)
        if t == 0.0 and self.variable == "log":  # where no polynomial in log sigma reaches
            return state._replace(x=state.denoised[0])
        weights = adams(state.levels, s, t, variable=self.variable)
        return state._replace(x=combined(state.x, t / s, state.denoised, weights))
