r"""ChEES-HMC: many chains, one trajectory length, no tree; what to record is a short straight line.

All chains of an iteration take the same number of steps, so that nothing waits for the longest. How far they go is
learnt across chains, by stochastic gradient ascent on the change in the estimator of the expected square,

.. math:: \mathrm{ChEES} = \tfrac{1}{4}\, E\Bigl[ \bigl( |x' - E x'|^2 - |x - E x|^2 \bigr)^2 \Bigr],

here in whitened coordinates x, so that no direction dominates. `ChEESWarmup` does that, and
estimates step size and scale; `ChEES` draws.

The lengths of iterations are spread over `[(1 - jitter) T, T]` by the van der Corput sequence (Halton's in base 2).

A stride is the two-stage splitting of Blanes, Casas & Sanz-Serna, at the price of two leapfrog steps:

.. math:: p \mathrel{+}= b\varepsilon g, \quad x \mathrel{+}= \tfrac{\varepsilon}{2} p, \quad
          p \mathrel{+}= (1 - 2b)\varepsilon g, \quad x \mathrel{+}= \tfrac{\varepsilon}{2} p, \quad
          p \mathrel{+}= b\varepsilon g

With b = 1/4 it is two leapfrog steps. With b = 0.2118 the energy error on a normal target is far smaller at strides
as long as ε = 1.8: where the scale fits, one stride is a trajectory.

References:
    An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo (Hoffman, Radul & Sountsov,
    AISTATS 2021). Numerical integrators for the hybrid Monte Carlo method (Blanes, Casas & Sanz-Serna, SIAM Journal
    on Scientific Computing 36, 2014), arXiv:1405.3153, equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, LogDensity, Tuning, pull, push
from pgen.algorithms.kernels.hmc import Phase, State, initial, metropolis, standard_normal
from pgen.algorithms.kernels.iterate import Wrap, unwrapped


class Runner(NamedTuple):
    """State of `ChEES`: that of the chains, and where in its sequence of lengths the kernel is, `[]`."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor
    iteration: Tensor

    @property
    def chains(self) -> State:
        """Position, log density and gradient."""
        return State(self.position, self.log_density, self.gradient)


@dataclass(frozen=True)
class Stride:
    """One stride on, up to its last kick, which is joined with the first of the next."""

    target: LogDensity
    kick: float

    def __call__(self, phase: Phase, first: Tensor, tuning: Tuning) -> Phase:
        """Kick by a part `first` `[]` of the step, drift, kick, drift; straight-line code."""
        position, momentum, gradient, log_density = phase
        for part in (first, 1 - 2 * self.kick):
            momentum = torch.addcmul(momentum, part * tuning.step_size, pull(tuning.scale, gradient))
            position = torch.addcmul(position, tuning.step_size, push(tuning.scale, momentum), value=0.5)
            log_density, gradient = self.target(position)
        return Phase(position, momentum, gradient, log_density)


@dataclass(frozen=True)
class Land:
    """The last kick; then take the end of the trajectory or stay. Gives the end, too."""

    kick: float

    def __call__(
        self, state: Runner, begin: Phase, phase: Phase, tuning: Tuning
    ) -> tuple[Runner, Info, Phase]:
        """Straight-line code."""
        slope = pull(tuning.scale, phase.gradient)
        end = phase._replace(momentum=torch.addcmul(phase.momentum, tuning.step_size, slope, value=self.kick))
        chains, info = metropolis(state.chains, begin, end, 1)
        return Runner(*chains, state.iteration + 1), info, end


class Pieces(NamedTuple):
    """The straight-line pieces of an iteration: record each once, and repeat the strides."""

    stride: Callable[[Phase, Tensor, Tuning], Phase]
    land: Callable[[Runner, Phase, Phase, Tuning], tuple[Runner, Info, Phase]]


@dataclass(frozen=True)
class ChEES:
    """Hamiltonian Monte Carlo with shared, jittered trajectory lengths.

    Attributes:
        jitter: by which part of `Tuning.length` trajectories may be shorter; 1 in the paper. Half is enough to break
            resonances, and mixes faster where the scale fits.
        kick: b above; 1/4 for leapfrog steps.
        most: strides of a trajectory.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> target = lambda q: (-q.square().sum(-1) / 2, -q)
        >>> kernel, position = ChEES(), torch.zeros(4, 2)
        >>> tuning = untuned(position, step_size=1.0, length=2.0)
        >>> state, draws, info = kernel.run(kernel.init(position, target), tuning, target, 5)
        >>> draws.shape, info.evaluations[:, 0]
        (torch.Size([5, 4, 2]), tensor([4., 2., 4., 2., 4.]))
    """

    jitter: float = 0.5
    kick: float = 0.2118
    most: int = 256

    def __post_init__(self) -> None:
        """Refuse what integrates nothing."""
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"ChEES(jitter={self.jitter}): expected a part, from 0 to 1")
        if not 0 < self.kick < 0.5:
            raise ValueError(f"ChEES(kick={self.kick}): expected 0 < kick < 1/2; 1/4 makes leapfrog steps")
        if self.most < 1:
            raise ValueError(f"ChEES(most={self.most}): expected at least one stride")

    def init(self, position: Tensor, target: LogDensity) -> Runner:
        """The state at positions `[C, d]`."""
        start = torch.zeros((), dtype=torch.int64, device=position.device)
        return Runner(*initial(position, target), start)

    def step(self, state: Runner, tuning: Tuning, target: LogDensity) -> tuple[Runner, Info]:
        """One iteration of every chain. Not recordable, as it reads the number of strides: `run` records parts."""
        state, _, info = self.run(state, tuning, target, 1)
        return state, Info(*(field[0] for field in info))

    def run(
        self, state: Runner, tuning: Tuning, target: LogDensity, draws: int, wrap: Wrap = unwrapped
    ) -> tuple[Runner, Tensor, Info]:
        """`draws` iterations of every chain, with one tuning; waits for the device once.

        Args:
            state: where the chains are.
            tuning: step size (of a stride), scale, and length of the longest trajectory.
            target: the log density and its gradient.
            draws: how many, of every chain.
            wrap: applied to the pieces of an iteration, as `functools.cache(record)`; see `NUTS.run`.

        Returns:
            the state after the last draw, the draws `[draws, C, d]`, and what is known about each, `[draws, C]`.
        """
        pieces = self.pieces(target, wrap)
        ratio = tuning.length / tuning.step_size
        first, ratio = torch.stack([state.iteration.to(ratio.dtype), ratio]).tolist()
        positions: list[Tensor] = []
        infos: list[Info] = []
        for i in range(draws):
            state, info, _, _ = self.travel(state, tuning, pieces, self.strides(int(first) + i, ratio))
            positions.append(state.position)
            infos.append(info)
        return (
            state,
            torch.stack(positions),
            Info(*(torch.stack(field) for field in zip(*infos, strict=True))),
        )

    def pieces(self, target: LogDensity, wrap: Wrap = unwrapped) -> Pieces:
        """The pieces of an iteration, wrapped."""
        return Pieces(wrap(Stride(target, self.kick)), wrap(Land(self.kick)))

    def travel(
        self, state: Runner, tuning: Tuning, pieces: Pieces, strides: int
    ) -> tuple[Runner, Info, Phase, Phase]:
        """One iteration of so many strides; also where its trajectories began and ended, for adaptation."""
        begin = Phase(state.position, standard_normal(state.position), state.gradient, state.log_density)
        single, double = tuning.step_size.new_tensor([self.kick, 2 * self.kick]).unbind()
        phase = pieces.stride(begin, single, tuning)
        for _ in range(strides - 1):
            phase = pieces.stride(phase, double, tuning)
        state, info, end = pieces.land(state, begin, phase, tuning)
        # Here and not in `land`, whose recording serves any number of strides.
        return state, info._replace(evaluations=torch.full_like(info.accept, 2 * strides)), begin, end

    def strides(self, iteration: int, ratio: float) -> int:
        """How many strides an iteration takes, when the longest trajectory is `ratio` strides long."""
        length = ratio * (1 - self.jitter * (1 - van_der_corput(iteration + 1)))
        return min(max(round(length), 1), self.most) if math.isfinite(length) else 1


def van_der_corput(index: int) -> float:
    """The bits of a positive integer mirrored at the point: 1/2, 1/4, 3/4, 1/8 and so on.

    Example:
        >>> [van_der_corput(i) for i in range(1, 6)]
        [0.5, 0.25, 0.75, 0.125, 0.625]
    """
    mirrored, digit = 0.0, 0.5
    while index:
        mirrored += digit * (index & 1)
        index, digit = index >> 1, digit / 2
    return mirrored
