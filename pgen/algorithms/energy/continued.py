"""Draws by the very chains that an energy was learned with: as they moved then, with the step size that they came to.

    from noise     short runs: the reference law, moved by one call. What short-run learning fits are these draws, not the density
    from where     persistent chains go on: they have been moving since learning began, under a density that changed slowly
    they stopped

Nothing is adapted. Both are draws of the density only as far as chains have come by then.

References:
    Nijkamp, Hill, Zhu & Wu, Learning non-convergent non-persistent short-run MCMC, NeurIPS 2019.
    Tieleman, Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.energy.contrastive import Chains, leap
from pgen.algorithms.energy.learning import at_least
from pgen.algorithms.energy.walks import Density
from pgen.algorithms.record import record


@dataclass(frozen=True)
class Continued:
    """Chains go on as they were learned with.

    Attributes:
        from_noise: whether they begin at the reference law; else where learning left them.
        calls: of the walk that they were learned with, each of as many steps as in learning, before the first draw.
        thin: calls between two draws of a chain, where more draws are asked for than chains were left.
        leaps: draws of the reference law that are offered at each call, as in learning.
    """

    from_noise: bool = False
    calls: int = 10
    thin: int = 10
    leaps: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("calls", 0), ("thin", 1), ("leaps", 0)):
            at_least(name, getattr(self, name), least)

    def __call__(self, f: Density, chains: Chains, n: int) -> Tensor:
        """Draws `[n, *event]`.

        Args:
            f: log density up to a constant; row i of rows is of the law that draw i is of.
            chains: what learning left behind.
            n: draws.

        Raises:
            ValueError: chains are to go on, and none were left.
        """
        if not self.from_noise and not len(chains.position):
            raise ValueError(
                "no chains stayed from learning; expected those of PersistentContrastiveDivergence"
            )

        def move(x: Tensor, step: Tensor) -> Tensor:
            if self.leaps:
                x, _ = leap(x, f, chains.reference, self.leaps)
            return chains.walk(x, f, step).position

        looks = hasattr(getattr(chains.walk, "continuous", None), "run")
        call: Any = move if looks else record(move)
        with torch.no_grad():
            step = chains.log_step.exp() * chains.frame.scale
            if self.from_noise:
                x = chains.reference.sample(n)
            else:
                x = chains.position[torch.randperm(len(chains.position), device=step.device)[:n]].clone()
            for _ in range(self.calls):
                x = call(x, step)
            kept = [x]
            while sum(map(len, kept)) < n:
                for _ in range(self.thin):
                    x = call(x, step)
                kept.append(x)
        return torch.cat(kept)[:n]
