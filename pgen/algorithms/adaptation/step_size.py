r"""The step size at which proposals are accepted as often as they should be.

    dual averaging:  x ← μ - √t / (γ (t + t₀)) Σ (δ - α);   x̄ ← t^-κ x + (1 - t^-κ) x̄

with x = log step size, α the acceptance probability, averaged over chains, δ the one that is wanted. While adapting use
exp x, afterwards exp x̄.

References: The No-U-Turn Sampler (Hoffman & Gelman, JMLR 15, 2014), arXiv:1111.4246, sections 3.2 and algorithm 4.
Primal-dual subgradient methods for convex problems (Nesterov, Mathematical Programming 120, 2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import LogDensity
from pgen.algorithms.kernels.hmc import Phase, State, gained, log_joint, standard_normal, trajectory


class Averaging(NamedTuple):
    """Where dual averaging stands; all `[]`: x, x̄, Σ (δ - α), t and μ."""

    log_step: Tensor
    log_mean: Tensor
    shortfall: Tensor
    count: Tensor
    centre: Tensor

    @property
    def step_size(self) -> Tensor:
        """To adapt with."""
        return self.log_step.exp()

    @property
    def averaged(self) -> Tensor:
        """To sample with, once adapted."""
        return self.log_mean.exp()


@dataclass(frozen=True)
class DualAveraging:
    """Dual averaging of the log step size.

    Attributes:
        accept: the acceptance probability to aim at, δ: 0.8 for NUTS, 0.651 for Hamiltonian, 0.574 for Langevin kernels.
        gain: γ, how strongly x is held near μ.
        delay: t₀, how much the first iterations are held back.
        decay: κ in (0.5, 1], how fast the average forgets.

    Example:
        >>> rule = DualAveraging(accept=0.6)
        >>> at = rule.init(torch.tensor(10.0))
        >>> for _ in range(300):
        ...     at = rule.update(at, torch.exp(-at.step_size))  # of this many are accepted
        >>> bool((at.averaged - 0.5108).abs() < 0.01)  # -log 0.6
        True
    """

    accept: float = 0.8
    gain: float = 0.05
    delay: float = 10.0
    decay: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.accept < 1:
            raise ValueError(f"DualAveraging(accept=...) is a probability between 0 and 1, got {self.accept}")

    def init(self, step_size: Tensor) -> Averaging:
        """Begin at, and stay near, `step_size` `[]`."""
        log_step = step_size.log()
        zero = torch.zeros_like(log_step)
        return Averaging(log_step, log_step, zero, zero, log_step)

    def update(self, at: Averaging, accept: Tensor) -> Averaging:
        """After iterations at `at.step_size` whose mean acceptance probability was `accept` `[]`."""
        return averaged(at, self.accept, accept, self.gain, self.delay, self.decay)


def averaged(
    at: Averaging,
    wanted: Tensor | float,
    accept: Tensor,
    gain: float = 0.05,
    delay: float = 10.0,
    decay: float = 0.75,
) -> Averaging:
    """`DualAveraging.update`, with the acceptance probability that is wanted as an argument."""
    count = at.count + 1
    shortfall = at.shortfall + wanted - accept.nan_to_num(nan=0.0)
    log_step = at.centre - count.sqrt() / (gain * (count + delay)) * shortfall
    return Averaging(log_step, torch.lerp(at.log_mean, log_step, count**-decay), shortfall, count, at.centre)


def crossing(
    state: State, scale: Tensor, target: LogDensity, guess: Tensor, accept: float = 0.8, tries: int = 60
) -> Tensor:
    """A step size to begin with: doubled or halved from `guess` until one leapfrog step is accepted about that often.

    One size for all chains, by their mean acceptance probability; chains that cannot move (where density or gradient are
    not finite) have no say.

    Args:
        state: positions, log densities, gradients.
        scale: see `Tuning`.
        target: the log density and its gradient.
        guess: `[]`.
        accept: the mean acceptance probability to cross.
        tries: at most so many steps are tried.
    """
    begin = Phase(state.position, standard_normal(state.position), state.gradient, state.log_density)
    before = log_joint(begin.log_density, begin.momentum)
    sound = (before + begin.gradient.sum(-1)).isfinite()
    direction = 0
    for _ in range(tries):
        end = trajectory(begin, guess, scale, target, 1)
        chance = gained(log_joint(end.log_density, end.momentum), before).clamp(max=0.0).exp()
        often = float(chance[sound].mean()) if bool(sound.any()) else math.nan
        now = 1 if often > accept else -1
        if direction == 0:
            direction = now
        if now != direction:
            break
        guess = guess * 2.0**direction
    return guess
