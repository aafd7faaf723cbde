r"""Langevin kernels: one step up the gradient, plus noise; with or without a correction.

In whitened coordinates x, where q = S x and g is the gradient by x, both propose

.. math:: x' = x + \tfrac{1}{2} \varepsilon^2 g + \varepsilon\, \xi, \qquad \xi \sim N(0, I)

which is one leapfrog step of size ε from a fresh momentum ξ. The scale S preconditions: SSᵀ is the matrix in front
of the gradient, and of the noise.

`ULA` takes every proposal, and has a bias that shrinks with ε: on a standard normal its stationary variance is
:math:`1 / (1 - \varepsilon^2 / 4)`. `MALA` accepts or rejects, and has none. As the proposal is a leapfrog step,
its Metropolis-Hastings ratio, in which the two proposal densities stand, is the change of the Hamiltonian:

.. math:: \log\frac{\pi(x')\, N(x;\, x' + \varepsilon^2 g' / 2,\, \varepsilon^2)}
                   {\pi(x)\, N(x';\, x + \varepsilon^2 g / 2,\, \varepsilon^2)}
          = \log\frac{\pi(x')}{\pi(x)} + \frac{|\xi|^2 - |\xi'|^2}{2},
          \qquad \xi' = \xi + \tfrac{1}{2} \varepsilon\, (g + g')

References:
    Exponential convergence of Langevin distributions and their discrete approximations (Roberts & Tweedie,
    Bernoulli 2, 1996). Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal, JRSS-B
    60, 1998): accept 0.574 of the proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, LogDensity, Tuning, where
from pgen.algorithms.kernels.hmc import (
    Phase,
    State,
    initial,
    metropolis,
    standard_normal,
    standard_normals,
    trajectory,
)


@dataclass(frozen=True)
class ULA:
    """The unadjusted Langevin algorithm: biased, and so useful only with small steps, or as a proposal.

    A chain stays where it is, and its step is reported as diverging, if log density or gradient are not finite at
    the end of the step. What is not finite never becomes a number again, so the gradients on the way were finite.

    Attributes:
        moves: of a step. What is asked of the density is asked after the last of them only, and a recorded step
            leaves out what computes it on the way.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> target = lambda q: (-q.square().sum(-1) / 2, -q)
        >>> state = ULA().init(torch.zeros(4, 2), target)
        >>> state, info = ULA().step(state, untuned(state.position), target)
        >>> info.accept
        tensor([1., 1., 1., 1.])
    """

    moves: int = 1

    def __post_init__(self) -> None:
        if self.moves < 1:
            raise ValueError(f"ULA(moves=...) is at least 1, got {self.moves}")

    def init(self, position: Tensor, target: LogDensity) -> State:
        """The state at positions `[C, d]`."""
        return initial(position, target)

    def step(self, state: State, tuning: Tuning, target: LogDensity) -> tuple[State, Info]:
        """`moves` moves of every chain; recordable."""
        end = state
        for noise in standard_normals(state.position, self.moves):
            phase = _step(end, noise, tuning, target)[1]
            end = State(phase.position, phase.log_density, phase.gradient)
        # A sum is finite only where its terms are.
        sound = (end.log_density + end.gradient.sum(-1)).isfinite()
        kept = where(sound, end, state)
        ones = torch.ones_like(kept.log_density)
        return kept, Info(
            accept=sound.to(ones.dtype),
            energy=-kept.log_density,
            diverging=~sound,
            evaluations=ones * self.moves,
        )


@dataclass(frozen=True)
class MALA:
    """The Metropolis-adjusted Langevin algorithm: Hamiltonian Monte Carlo of one step.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> target = lambda q: (-q.square().sum(-1) / 2, -q)
        >>> state = MALA().init(torch.zeros(4, 2), target)
        >>> state, info = MALA().step(state, untuned(state.position), target)
        >>> bool((info.accept > 0.9).all())
        True
    """

    def init(self, position: Tensor, target: LogDensity) -> State:
        """The state at positions `[C, d]`."""
        return initial(position, target)

    def step(self, state: State, tuning: Tuning, target: LogDensity) -> tuple[State, Info]:
        """One proposal to every chain; recordable."""
        begin, end = _step(state, standard_normal(state.position), tuning, target)
        return metropolis(state, begin, end, 1)


def _step(state: State, noise: Tensor, tuning: Tuning, target: LogDensity) -> tuple[Phase, Phase]:
    """The Langevin proposal, as the end of a leapfrog step, and its beginning."""
    begin = Phase(state.position, noise, state.gradient, state.log_density)
    return begin, trajectory(begin, tuning.step_size, tuning.scale, target, 1)
