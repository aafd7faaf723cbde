"""Predictor-corrector sampling: any solver, and Langevin steps that repair what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field, per_row
from pgen.algorithms.diffusion.solvers.ancestral import Ancestral
from pgen.algorithms.diffusion.solvers.state import Solver, moved, only_down, value


@dataclass(frozen=True)
class PredictorCorrector:
    r"""A step of any solver, then Langevin steps at the noise level reached.

        x <- x + e g + sqrt(2 e) z,    g = (D - x) / t^2,    e = 2 (snr |z| / |g|)^2

    Here `|z|` is its expectation, sqrt(D), and `|g|` either its largest possible expectation, sqrt(D) / t, so that
    e = 2 snr^2 t^2, which depends on no sample (`rule="level"`); or that of the row itself (`"norm"`), the original
    rule taken row by row, so that no sample depends on its batch; e is then at most t^2, where Langevin steps
    are still stable. The original lengthens the steps where data are wider than the noise, and is biased there: its
    steps depend on where they start from. No correction at noise level 0.

    Evaluations a step: the predictor's and `steps`.

    Attributes:
        predictor: any solver.
        snr: signal-to-noise ratio of the corrector.
        steps: of the corrector at each noise level.
        rule: `"level"` or `"norm"`.

    References:
        Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, ICLR 2021, algorithms 1
        and 4.
    """

    predictor: Solver = field(default_factory=Ancestral)
    snr: float = 0.16
    steps: int = 1
    rule: str = "level"

    def __post_init__(self) -> None:
        if self.snr <= 0 or self.steps < 0:
            raise ValueError(
                f"PredictorCorrector(snr={self.snr}, steps={self.steps}): expected snr > 0 and steps >= 0"
            )
        if self.rule not in ("level", "norm"):
            raise ValueError(f"PredictorCorrector(rule={self.rule!r}): expected 'level' or 'norm'")

    @property
    def only_down(self) -> bool:
        """As the predictor."""
        return only_down(self.predictor)

    def step(self, state: Any, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Any:
        """From noise level t to t_next, in the predictor's state."""
        state = self.predictor.step(state, t, t_next, fn)
        t = float(t_next)
        if t == 0.0:
            return state
        x = value(state)
        for _ in range(self.steps):
            away = fn(x, t) - x
            if self.rule == "level":
                push = 2 * self.snr**2  # e / t^2
                x = x.add(away, alpha=push).add_(fn.noise(x), alpha=math.sqrt(2 * push) * t)
            else:
                rows = per_row(self._relative(away, t), x)
                x = torch.addcmul(x, away, rows).addcmul_(fn.noise(x), rows.mul(2).sqrt(), value=t)
        return moved(state, x)

    def _relative(self, away: Tensor, t: float) -> Tensor:
        """e / t^2 of each row, `[B]`."""
        square = away.reshape(len(away), -1).square().mean(-1) / t**2
        return (2 * self.snr**2 / square.clamp(min=1e-12)).clamp(max=1.0)
