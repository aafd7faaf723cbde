r"""MEADS: generalised Hamiltonian Monte Carlo, one gradient an iteration, tuned by the largest eigenvalues.

The momentum is kept from one iteration to the next, in part:

.. math:: p \leftarrow \sqrt{1 - \alpha}\; p + \sqrt{\alpha}\; \xi, \qquad \alpha = 1 - e^{-2 \varepsilon \gamma}

followed by one leapfrog step, which is accepted if it gains the logarithm of |u|; u is uniform on [-1, 1] and is itself
kept: it moves on by α/2 an iteration, so that rejections, which turn the momentum back, come in clusters, with long
runs between them. The damping γ is 1 / `Tuning.length`.

`MEADSWarmup` reads step size, damping and scale off many chains.

References:
    Tuning-free generalized Hamiltonian Monte Carlo (Hoffman & Sountsov, AISTATS 2022): algorithms 1 and 2. Non-reversibly
    updating a uniform [0, 1] value for Metropolis accept/reject decisions (Neal, 2020), arXiv:2001.11950.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, LogDensity, Tuning, where
from pgen.algorithms.kernels.hmc import (
    DIVERGENT,
    Phase,
    gained,
    initial,
    log_joint,
    standard_normal,
    trajectory,
)
from pgen.algorithms.kernels.iterate import Wrap, unwrapped


class Persistent(NamedTuple):
    """State of `MEADS`: positions, momenta (whitened) and gradients `[C, d]`; log densities and u `[C]`."""

    position: Tensor
    momentum: Tensor
    gradient: Tensor
    log_density: Tensor
    threshold: Tensor


@dataclass(frozen=True)
class Step:
    """One iteration of every chain; straight-line code."""

    target: LogDensity

    def __call__(self, state: Persistent, tuning: Tuning) -> tuple[Persistent, Info]:
        """The step size and length may be `[]` or, one for each chain, `[C, 1]`."""
        renewed = -torch.expm1(-2 * tuning.step_size / tuning.length)
        momentum = (1 - renewed).sqrt() * state.momentum + renewed.sqrt() * standard_normal(state.momentum)
        half = renewed.squeeze(-1) / 2 if renewed.dim() else renewed / 2
        threshold = torch.remainder(state.threshold + 1 + half, 2) - 1
        begin = Phase(state.position, momentum, state.gradient, state.log_density)
        end = trajectory(begin, tuning.step_size, tuning.scale, self.target, 1)
        old, new = log_joint(begin.log_density, begin.momentum), log_joint(end.log_density, end.momentum)
        gain = gained(new, old)
        taken = threshold.abs().log() < gain
        there = Persistent(*end, threshold * torch.exp(-gain))
        back = Persistent(state.position, -momentum, state.gradient, state.log_density, threshold)
        info = Info(
            accept=gain.clamp(max=0.0).exp(),
            energy=-torch.where(taken, new, old),
            diverging=gain < -DIVERGENT,
            evaluations=torch.ones_like(gain),
        )
        return where(taken, there, back), info


@dataclass(frozen=True)
class MEADS:
    """Generalised Hamiltonian Monte Carlo with a persistent threshold.

    Attributes:
        thin: iterations, of one gradient each, for every draw of `run`.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> target = lambda q: (-q.square().sum(-1) / 2, -q)
        >>> kernel, position = MEADS(thin=3), torch.zeros(4, 2)
        >>> tuning = untuned(position, step_size=0.5)
        >>> state, draws, info = kernel.run(kernel.init(position, target), tuning, target, 5)
        >>> draws.shape, info.evaluations[:, 0]
        (torch.Size([5, 4, 2]), tensor([3., 3., 3., 3., 3.]))
    """

    thin: int = 1

    def __post_init__(self) -> None:
        """Refuse draws that are none."""
        if self.thin < 1:
            raise ValueError(f"MEADS(thin={self.thin}): expected at least 1 iteration a draw")

    def init(self, position: Tensor, target: LogDensity) -> Persistent:
        """The state at positions `[C, d]`, with fresh momenta and thresholds."""
        _, log_density, gradient = initial(position, target)
        threshold = torch.rand_like(log_density) * 2 - 1
        return Persistent(position, standard_normal(position), gradient, log_density, threshold)

    def step(self, state: Persistent, tuning: Tuning, target: LogDensity) -> tuple[Persistent, Info]:
        """One iteration of every chain; recordable."""
        return Step(target)(state, tuning)

    def run(
        self, state: Persistent, tuning: Tuning, target: LogDensity, draws: int, wrap: Wrap = unwrapped
    ) -> tuple[Persistent, Tensor, Info]:
        """`draws` draws of every chain, `thin` iterations each; see `ChEES.run`.

        Of the iterations of a draw, `Info` has the mean acceptance probability, the last energy, and whether any
        diverged.
        """
        step = wrap(Step(target))
        positions: list[Tensor] = []
        infos: list[Info] = []
        for _ in range(draws):
            batch = []
            for _ in range(self.thin):
                state, info = step(state, tuning)
                batch.append(info)
            positions.append(state.position)
            infos.append(_together(batch))
        return (
            state,
            torch.stack(positions),
            Info(*(torch.stack(field) for field in zip(*infos, strict=True))),
        )


def _together(infos: list[Info]) -> Info:
    """One report of several iterations."""
    if len(infos) == 1:
        return infos[0]
    accept, _, diverging, evaluations = (torch.stack(field) for field in zip(*infos, strict=True))
    return Info(accept.mean(0), infos[-1].energy, diverging.any(0), evaluations.sum(0))
