"""UniPC: exponential Adams methods, predictor and corrector at one evaluation a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.solvers.weights import VARIABLES, adams, combined


class Predicted(NamedTuple):
    """Values predicted, not yet corrected.

    Attributes:
        x: values `[B, *event]`.
        levels: noise levels at which the denoiser was called, the latest first.
        denoised: what it answered.
        weights: of these in the prediction of x.
    """

    x: Tensor
    levels: tuple[float, ...] = ()
    denoised: tuple[Tensor, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class UniPC:
    r"""UniPC-p in its data-predicting form: what is evaluated for a step corrects the step before it.

        D_s = D(x_s, s)
        x_s <- x_s + sum_j (c_j - p_j) D_j        the step to s again, its polynomial now also through D_s
        x_t  = (t / s) x_s + sum_j p'_j D_j        through the last p values

    p are `adams` weights on p values and c on p + 1: any choice of the paper's B(h) comes down to these where its linear
    system is solved. As x_s enters linearly, both are one sum. Order p + 1; one evaluation a step. The last step is
    not corrected, and the one to 0 is to D_s.

    Attributes:
        order: p, 1 to 4.
        variable: of the polynomial: `"log"` (sigma) is the paper's; in `"sigma"` it reaches 0, and few steps do better.

    References:
        Zhao, Bai, Rao, Zhou & Lu, UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models,
        NeurIPS 2023, algorithms 1 and 2.
    """

    order: int = 3
    variable: str = "sigma"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4) or self.variable not in VARIABLES:
            raise ValueError(
                f"UniPC(order={self.order}, variable={self.variable!r}): expected order 1 to 4 and one of {', '.join(VARIABLES)}"
            )

    def step(
        self, state: Tensor | Predicted, t: Tensor | float, t_next: Tensor | float, fn: Field
    ) -> Predicted:
        """From noise level t to t_next."""
        s, t = float(t), float(t_next)
        if isinstance(state, Tensor):
            state = Predicted(state)
        denoised = (fn(state.x, s), *state.denoised)
        levels = (s, *state.levels)
        fix = [0.0] * len(levels)
        if state.levels:
            fix = adams(levels, state.levels[0], s, variable=self.variable)
            fix[1:] = [c - p for c, p in zip(fix[1:], state.weights, strict=True)]
        if t == 0.0 and self.variable == "log":
            return Predicted(denoised[0])
        weights = adams(levels[: self.order], s, t, variable=self.variable)
        keep = t / s
        both = [keep * c for c in fix]
        for j, p in enumerate(weights):
            both[j] += p
        x = combined(state.x, keep, denoised, both)
        return Predicted(x, levels[: self.order], denoised[: self.order], tuple(weights))
