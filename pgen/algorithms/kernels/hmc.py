r"""Hamiltonian Monte Carlo: follow a frictionless particle for a while, then accept or go back.

    p ~ N(0, I);  (q', p') = leapfrog^steps(q, p);  accept with probability min(1, exp(H(q, p) - H(q', p')))

with H = -log density + |p|²/2 in whitened coordinates. `leapfrog` and `trajectory` serve every other kernel that
follows the same dynamics.

A proposal whose density or gradient is not finite is never taken: the energy of such a point is taken as infinite.

References:
    Hybrid Monte Carlo (Duane, Kennedy, Pendleton & Roweth, Physics Letters B 195, 1987). MCMC Using Hamiltonian
    Dynamics (Neal, Handbook of Markov Chain Monte Carlo, 2011), arXiv:1206.1901; section 3.2 for the jitter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, LogDensity, Tuning, pull, push, where

_SMALL = 1 << 19  # numbers that are drawn in one call
DIVERGENT = 1000.0  # nats of energy gained, as in Stan: no accurate trajectory comes near it


class State(NamedTuple):
    """Where the chains are: position `[C, d]`, log density `[C]` and its gradient `[C, d]`."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


class Phase(NamedTuple):
    """A point of phase space: position, whitened momentum and gradient `[C, d]`; log density `[C]`."""

    position: Tensor
    momentum: Tensor
    gradient: Tensor
    log_density: Tensor


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo with a fixed number of steps.

    Attributes:
        steps: leapfrog steps a trajectory.
        jitter: each trajectory of each chain takes steps of `step_size * u`, u uniform on `[1 - jitter, 1 + jitter]`:
            with one length for all, a trajectory may come back to where it began, for ever.

    Example:
        >>> def normal(q): return -0.5 * q.square().sum(-1), -q
        >>> _ = torch.manual_seed(0)
        >>> kernel, state = HMC(steps=8), initial(torch.zeros(1000, 2), normal)
        >>> tuning = Tuning(torch.tensor(0.2), torch.ones(2), torch.tensor(1.0))
        >>> state, info = kernel.step(state, tuning, normal)
        >>> bool(info.accept.mean() > 0.95)
        True
    """

    steps: int = 10
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"HMC(steps=...) is at least 1, got {self.steps}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"HMC(jitter=...) is a fraction in [0, 1), got {self.jitter}")

    def init(self, position: Tensor, target: LogDensity) -> State:
        """The state at a position `[C, d]`."""
        return initial(position, target)

    def step(self, state: State, tuning: Tuning, target: LogDensity) -> tuple[State, Info]:
        """One trajectory of every chain, accepted or not; recordable."""
        step_size = tuning.step_size
        if self.jitter:
            chains = state.position.new_empty(state.position.shape[0], 1)
            step_size = step_size * chains.uniform_(1 - self.jitter, 1 + self.jitter)
        begin = Phase(state.position, standard_normal(state.position), state.gradient, state.log_density)
        end = trajectory(begin, step_size, tuning.scale, target, self.steps)
        return metropolis(state, begin, end, self.steps)


def initial(position: Tensor, target: LogDensity) -> State:
    """The state of a Hamiltonian or Langevin kernel at a position `[C, d]`."""
    return State(position, *target(position))


def leapfrog(
    q: Tensor, p: Tensor, gradient: Tensor, step_size: Tensor, scale: Tensor, target: LogDensity
) -> Phase:
    """One leapfrog step of every chain; volume-preserving, reversible, of second order.

        p += ε/2 scaleᵀ∇;  q += ε scale p;  p += ε/2 scaleᵀ∇(q)

    Args:
        q: positions `[C, d]`.
        p: whitened momenta `[C, d]`.
        gradient: of the log density at `q`, `[C, d]`.
        step_size: `[]`, `[C]` or `[C, 1]`.
        scale: `[]`, `[d]` or lower-triangular `[d, d]`; see `Tuning`.
        target: the log density and its gradient.
    """
    return trajectory(Phase(q, p, gradient, q[:, 0]), step_size, scale, target, 1)


def trajectory(begin: Phase, step_size: Tensor, scale: Tensor, target: LogDensity, steps: int) -> Phase:
    """`steps` leapfrog steps, the half kicks between them joined; `step_size` `[]`, `[C]` or `[C, 1]`."""
    if step_size.dim() == 1:
        step_size = step_size.unsqueeze(-1)
    diagonal = scale.dim() < 2
    if diagonal:  # one product with the step size, and not two at every step
        step_size = step_size * scale
    q, p, gradient, log_density = begin
    for n in range(steps):
        force = gradient if diagonal else pull(scale, gradient)
        p = torch.addcmul(p, step_size, force, value=1.0 if n else 0.5)
        q = torch.addcmul(q, step_size, p if diagonal else push(scale, p))
        log_density, gradient = target(q)
    p = torch.addcmul(p, step_size, gradient if diagonal else pull(scale, gradient), value=0.5)
    return Phase(q, p, gradient, log_density)


def log_joint(log_density: Tensor, momentum: Tensor) -> Tensor:
    """Minus the energy, `log density - |p|²/2`, `[C]`."""
    return torch.add(log_density, (momentum * momentum).sum(-1), alpha=-0.5)


def gained(new: Tensor, old: Tensor) -> Tensor:
    """How far the log joint density rose, `[C]`; `-inf` (never accept) where `new` is not a finite number."""
    return torch.nan_to_num(new - old, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def metropolis(state: State, begin: Phase, end: Phase, evaluations: int) -> tuple[State, Info]:
    """Take the end of a trajectory or stay, by the Metropolis rule; the momentum is dropped."""
    old = log_joint(begin.log_density, begin.momentum)
    new = log_joint(end.log_density, end.momentum)
    gain = gained(new, old)
    taken = torch.rand_like(gain).log() < gain
    return (
        where(taken, State(end.position, end.log_density, end.gradient), state),
        Info(
            accept=gain.clamp(max=0.0).exp(),
            energy=-torch.where(taken, new, old),
            diverging=gain < -DIVERGENT,
            evaluations=torch.full_like(gain, evaluations),
        ),
    )


def standard_normal(like: Tensor) -> Tensor:
    """Standard normal noise in the shape and type of `like`, drawn in single precision.

    Double-precision normals cost four times as much, more than the rest of a small kernel. 24 random bits leave the
    law exact to 1e-7 up to 5.7 standard deviations. Of a matrix with its columns side by side in memory they are drawn
    that way: torch fills what is not contiguous one number at a time.
    """
    if _in_columns(like):
        return standard_normal(like.mT).mT
    if like.dtype != torch.float64:
        return torch.randn_like(like)
    return torch.randn(like.shape, dtype=torch.float32, device=like.device).to(torch.float64)


def standard_normals(like: Tensor, n: int) -> tuple[Tensor, ...]:
    """`n` of them; as long as they are small in one call, since a call takes longer than such numbers do."""
    if n == 1 or n * like.numel() > _SMALL:
        return tuple(standard_normal(like) for _ in range(n))
    turned = _in_columns(like)
    shape = like.mT.shape if turned else like.shape
    wide = like.dtype == torch.float64
    found = torch.randn(n, *shape, dtype=torch.float32 if wide else like.dtype, device=like.device)
    found = found.to(torch.float64) if wide else found
    return (found.mT if turned else found).unbind(0)


def _in_columns(like: Tensor) -> bool:
    return like.dim() == 2 and like.stride(0) == 1 and not like.is_contiguous()
