"""Annealed Langevin dynamics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True)
class AnnealedLangevin:
    r"""Langevin steps at each noise level, started from where those at the last one ended.

        x <- x + a / 2 g + sqrt(a) z,    g = (D - x) / t^2,    a = step_size t^2

    They go on at the level reached, t_next, so that the values are then a sample of it; the step to noise level 0 is to D
    (Jolicoeur-Martineau et al.). Nothing carries values over from level to level but these steps: levels must be close,
    a ratio of at most about 1 + 1 / sqrt(2 D) for D numbers an event (Song & Ermon 2020), or the steps many.

    Evaluations a step: `steps`.

    Attributes:
        step_size: relative to t^2, in (0, 2). The original's 2e-5 at a least noise level of 0.01 is 0.2.
        steps: at each level.

    References:
        Song & Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, NeurIPS 2019, algorithm 1.
        Song & Ermon, Improved Techniques for Training Score-Based Generative Models, NeurIPS 2020.
        Jolicoeur-Martineau et al., Adversarial Score Matching and Improved Sampling, ICLR 2021.
    """

    step_size: float = 0.2
    steps: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.step_size < 2 or self.steps < 1:
            raise ValueError(
                f"AnnealedLangevin(step_size={self.step_size}, steps={self.steps}): "
                "expected 0 < step_size < 2 and steps >= 1"
            )

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to t_next."""
        if float(t_next) == 0.0:
            return fn(x, t)
        level = float(t_next)
        for _ in range(self.steps):
            x = x.lerp(fn(x, level), self.step_size / 2)
            x = x.add_(fn.noise(x), alpha=math.sqrt(self.step_size) * level)
        return x
