"""Samplers that come from a reference: parallel tempering, and tempered particles.

The reference is the normal law of the places where chains would begin, widened: of draws of the prior, of a Pathfinder
run, or of another fit, which is thereby corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.annealing import TemperedSMC, cloud_scale
from pgen.algorithms.kernels.base import Info, LogDensity, pull, push
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.iterate import Wrap, iterate
from pgen.algorithms.path import Path, gaussian
from pgen.algorithms.tempering import ParallelTempering, Replicas, Temperatures
from pgen.backends.mcmc.ledger import Block
from pgen.backends.mcmc.samplers import Moving, thinned

_WIDER = 1.5
_ROUNDS = 8


class Reference(NamedTuple):
    """A normal law, `mean + scale @ x` for standard normal x: `[d]`, and `[d]` or `[d, d]`."""

    mean: Tensor
    scale: Tensor

    def path(self, target: LogDensity) -> Path:
        """From this law to the target, in whitened coordinates."""
        volume = (self.scale if self.scale.dim() == 1 else self.scale.diagonal()).log().sum()

        def whitened(x: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = target(self.place(x))
            return value + volume, pull(self.scale, gradient)

        return Path(whitened, *gaussian(torch.zeros_like(self.mean), torch.ones_like(self.mean)))

    def place(self, x: Tensor) -> Tensor:
        """Positions of whitened ones `[..., d]`."""
        return self.mean + push(self.scale, x)


def reference_of(positions: Tensor, wider: float = _WIDER) -> Reference:
    """The normal law of `positions` `[n, d]`, its scale `wider` times as large."""
    n, d = positions.shape
    weight = positions.new_full((n,), 1 / n)
    return Reference(
        positions.mean(0), wider * cloud_scale(positions, weight, dense=10 * d <= n and d <= 200)
    )


class Columns(NamedTuple):
    """Replicas at their temperatures, the reference of the hottest, and the rounds of warm-up done."""

    replicas: Replicas
    tuning: Temperatures
    reference: Reference
    done: Tensor


@dataclass
class Tempered:
    """Parallel tempering: each chain a column of replicas at rising temperatures."""

    kernel: ParallelTempering
    target: LogDensity
    wrap: Wrap
    chains: int
    thin: int = 1

    @property
    def warmup(self) -> int:
        """Iterations of warm-up."""
        return sum(2**k for k in range(1, _ROUNDS + 1))

    def begin(self, position: Tensor) -> Columns:
        """The state before warm-up; the reference is made from positions `[n, d]`."""
        reference = reference_of(position)
        x = torch.randn_like(position[:1].expand(self.chains, -1))
        path = reference.path(self.target)
        return Columns(
            self.kernel.init(x, path), self.kernel.untuned(x), reference, torch.tensor(0, device="cpu")
        )

    def warm(self, state: Columns) -> tuple[Columns, int]:
        """A round of the warm-up, and how many iterations it took."""
        steps = 2 ** (int(state.done) + 1)
        path = state.reference.path(self.target)
        replicas, tuning = self.kernel.warm_round(
            state.replicas, state.tuning, path, steps, accept=0.8, record=self.wrap
        )
        return Columns(replicas, tuning, state.reference, state.done + 1), steps

    def warmed(self, state: Columns) -> bool:
        """Whether all rounds are done."""
        return int(state.done) >= _ROUNDS

    def ready(self, state: Columns) -> Columns:
        """The same state."""
        return state

    def run(self, state: Columns, draws: int) -> tuple[Columns, Block]:
        """So many draws of each chain."""
        kernel: Any = self.kernel
        path: Any = state.reference.path(self.target)
        tuning: Any = state.tuning
        replicas, x, info = iterate(
            kernel,
            state.replicas,
            tuning,
            path,
            draws * self.thin,
            self.wrap,
        )
        return state._replace(replicas=replicas), thinned(state.reference.place(x), info, self.thin)


@dataclass
class Particles:
    """Tempered sequential Monte Carlo: a chain is an island, its draws are particles."""

    target: LogDensity
    wrap: Wrap
    chains: int
    warmup: int = 0

    def begin(self, position: Tensor) -> Moving:
        """The reference, made from positions `[n, d]`."""
        return Moving((), reference_of(position))

    def warm(self, state: Moving) -> tuple[Moving, int]:
        """Nothing to learn beforehand."""
        return state, 0

    def warmed(self, state: Moving) -> bool:
        """Always."""
        return True

    def ready(self, state: Moving) -> Moving:
        """The same state."""
        return state

    def run(self, state: Moving, draws: int) -> tuple[Moving, Block]:
        """As many particles in each island, from the reference to the target."""
        smc = TemperedSMC(HMC(steps=6), particles=draws, islands=self.chains, moves=4, accept=0.8)
        arrived = smc.run(state.tuning.path(self.target), record=self.wrap)
        # Islands differ in how well they did: particles are drawn by what their island is worth.
        x = arrived.draws().reshape(arrived.position.shape)
        x = x.flatten(0, 1)[torch.randperm(x.shape[0] * x.shape[1], device=x.device)].reshape(x.shape)
        positions = state.tuning.place(x.transpose(0, 1))
        ones = torch.ones_like(positions[..., 0])
        stats = Info(
            arrived.accept.mean() * ones,
            self.target(positions.flatten(0, 1))[0].reshape(ones.shape).neg(),
            ones > 1,
            len(arrived.accept) * 24 * ones,
        )
        return state, thinned(positions, stats, 1)
