"""SDE-DPM-Solver++: multi-step methods for the reverse-time stochastic differential equation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.solvers.state import History, history
from pgen.algorithms.diffusion.solvers.weights import adams, combined


@dataclass(frozen=True)
class SDEDPMSolverPP:
    r"""SDE-DPM-Solver++: a polynomial through denoised values, and noise, both integrated exactly.

        x_t = (t / s)^(1 + eta) x_s + sum_j w_j D_j + t sqrt(1 - (t / s)^(2 eta)) z

    w: `adams` weights in log sigma. eta = 0 is the ordinary equation; order 1 with eta = 1 is `Ancestral`. One
    evaluation a step; the step to 0 is to D.

    Attributes:
        order: of the polynomial, 1 to 3.
        eta: variance of the noise relative to that of the reverse-time equation.

    References:
        Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022, section 5.
        Gonzalez et al., SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling, NeurIPS 2023.
    """

    order: int = 2
    eta: float = 1.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3) or self.eta < 0:
            raise ValueError(
                f"SDEDPMSolverPP(order={self.order}, eta={self.eta}): expected order 1, 2 or 3 and eta >= 0"
            )

    @property
    def only_down(self) -> bool:
        """With noise, there is no step to a larger noise level."""
        return self.eta > 0

    def step(self, state: Tensor | History, t: Tensor | float, t_next: Tensor | float, fn: Field) -> History:
        """From noise level t down to t_next."""
        s, t = float(t), float(t_next)
        state = history(state)
        state = state.seen(s, fn(state.x, s), self.order)
        if t == 0.0:
            return state._replace(x=state.denoised[0])
        rate = 1 + self.eta
        weights = adams(state.levels, s, t, rate=rate)
        x = combined(state.x, (t / s) ** rate, state.denoised, weights)
        noise = t * math.sqrt(1 - (t / s) ** (2 * self.eta))
        return state._replace(x=x.add_(fn.noise(x), alpha=noise) if noise else x)
