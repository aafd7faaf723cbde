r"""Routes from a density with a known normalising constant to one without.

A route is a family of unnormalised densities :math:`f_\beta`, 0 <= beta <= 1, with draws and log Z at 0, and moves anywhere:

    Tilted    log f_beta = (1 - beta) log reference + beta f        any density, any reference, any walk
    Own       the family `energy.tempered(beta)` of an energy that has one, moved by its own block Gibbs sweeps

References:
    Annealed importance sampling (Neal, Statistics and Computing 2001), arXiv:physics/9803008. On the quantitative analysis of
    deep belief networks (Salakhutdinov & Murray, ICML 2008): the route of a Boltzmann machine, from base rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.walks import Density, Sweeps, Walk, Walked


class Route(Protocol):
    """A family of densities on the way. All but `start` is straight-line code, with `beta` tensors `[]`."""

    @property
    def target_accept(self) -> float | None:
        """Of its moves."""
        ...

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """Exact draws at 0, `[n, *event]`, and log Z there, `[]`."""
        ...

    def gain(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """`log f_high - log f_low`, `[C]`; finite (very low where it is minus infinity)."""
        ...

    def move(self, x: Tensor, beta: Tensor, step_size: Tensor, backwards: bool = False) -> Walked:
        """Moves that leave `f_beta` invariant; `backwards`: their reversal in time."""
        ...


@dataclass(frozen=True)
class Tilted:
    """The geometric route from a reference to any density.

    Attributes:
        reference: normalised, with draws; as wide as the density, or wider.
        log_density: unnormalised.
        walk: how chains move.
    """

    reference: Law
    log_density: Density
    walk: Walk

    @property
    def target_accept(self) -> float | None:
        """Of the walk."""
        return self.walk.target_accept

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws of the reference."""
        x = self.reference.sample(n)
        return x, torch.zeros((), dtype=torch.float64, device=x.device)

    def gain(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The step of beta times the log ratio."""
        ratio = self.log_density(x) - self.reference.log_prob(x)
        return (high - low) * finite(ratio)

    def move(self, x: Tensor, beta: Tensor, step_size: Tensor, backwards: bool = False) -> Walked:
        """The walk under the mixture of exponents."""

        def tilted(x: Tensor) -> Tensor:
            return (1 - beta) * self.reference.log_prob(x) + beta * self.log_density(x)

        walk: Any = self.walk
        if backwards and hasattr(walk, "backwards"):
            walk = walk.backwards()
        return walk(x, tilted, step_size)


@dataclass(frozen=True)
class Own:
    """The route that an energy brings along.

    Attributes:
        tempered: beta (`[]`) to an energy with `sweep`; at 0. with `sample` and an exact `log_partition` too.
        sweeps: at every beta. A sweep is taken to be reversible, as block Gibbs sweeps over two halves are, seen from one.
    """

    tempered: Callable[[Any], Any]
    sweeps: int = 1
    target_accept: float | None = None

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws of the energy at 0."""
        hot = self.tempered(0.0)
        with torch.no_grad():
            return hot.sample(n), hot.log_partition().double()

    def gain(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The difference of two energies."""
        return finite(self.tempered(low)(x) - self.tempered(high)(x))

    def move(self, x: Tensor, beta: Tensor, step_size: Tensor, backwards: bool = False) -> Walked:
        """Sweeps at beta."""
        return Sweeps(self.tempered(beta).sweep, self.sweeps)(x, lambda x: x, step_size)


def finite(ratio: Tensor) -> Tensor:
    """Log ratios, very low where they are no finite number: times an inverse temperature of 0 they are then 0."""
    least = math.sqrt(torch.finfo(ratio.dtype).max)
    return ratio.nan_to_num(nan=-least, posinf=-least, neginf=-least)
