"""What a Markov chain kernel is: the small vocabulary that every kernel here is written in.

    target(q) -> (log density [C], gradient [C, d])        any unnormalised density, C chains at once
    kernel.init(q, target)            -> state              q: positions [C, d]
    kernel.step(state, tuning, target) -> state, info       one iteration of every chain

A kernel is a frozen dataclass; its fields are its hyperparameters. A state is a named tuple of tensors whose first
dimension is the chain, and the first field is the position. What adaptation sets (step size, scale, trajectory
length) is in a `Tuning`, so that a recorded step takes it as an input and need not be recorded anew.

The scale takes the place of a mass matrix. Momenta live in whitened coordinates x, q = scale x, where they are
standard normal; `push` takes a momentum to a velocity of q, `pull` takes a gradient in q to one in x. With scale =
chol(Σ) that is Hamiltonian dynamics with inverse mass matrix Σ: kinetic energy, U-turns and noise are those of the
plain kernel in x. One idea serves random walks, Langevin and Hamiltonian kernels, diagonal and dense.

Randomness is torch's global generator, so a step can be recorded and stays random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], tuple[Tensor, Tensor]]


class Tuning(NamedTuple):
    """What adaptation sets.

    Attributes:
        step_size: `[]`.
        scale: square root of the (estimated) posterior covariance: a standard deviation `[]`, one for each dimension
            `[d]`, or a lower-triangular Cholesky factor `[d, d]`.
        length: `[]`; trajectory length in whitened time, for kernels whose trajectories have one.
    """

    step_size: Tensor
    scale: Tensor
    length: Tensor


class Info(NamedTuple):
    """What a step reports, `[C]` each.

    Attributes:
        accept: acceptance probability (its mean over the trajectory, for NUTS), in [0, 1].
        energy: the energy H of the state that was kept, where there is one; else minus the log density.
        diverging: whether the integration error was so large that the trajectory was cut.
        evaluations: gradient (or density) evaluations spent.
    """

    accept: Tensor
    energy: Tensor
    diverging: Tensor
    evaluations: Tensor


class Kernel(Protocol):
    """A Markov kernel over C chains; hyperparameters are fields."""

    def init(self, position: Tensor, target: LogDensity) -> Any:
        """The state at a position `[C, d]`."""
        ...

    def step(self, state: Any, tuning: Tuning, target: LogDensity) -> tuple[Any, Info]:
        """One iteration of every chain."""
        ...


def untuned(position: Tensor, step_size: float = 0.1, length: float = 1.0) -> Tuning:
    """Tuning to begin with: unit scale."""
    new = position.new_tensor
    return Tuning(new(step_size), torch.ones_like(position[0]), new(length))


def push(scale: Tensor, momentum: Tensor) -> Tensor:
    """From whitened coordinates to those of the position: `scale @ p`, for p `[..., d]`."""
    return momentum * scale if scale.dim() < 2 else momentum @ scale.mT


def pull(scale: Tensor, gradient: Tensor) -> Tensor:
    """A gradient by the position as a gradient by whitened coordinates: `scale.T @ g`, for g `[..., d]`."""
    return gradient * scale if scale.dim() < 2 else gradient @ scale


def where(mask: Tensor, new: Any, old: Any) -> Any:
    """Choose, chain by chain, between two states of one type: `new` where `mask` `[C]` holds."""
    return type(old)(
        *(
            torch.where(mask.reshape(mask.shape + (1,) * (o.dim() - 1)), n, o)
            for n, o in zip(new, old, strict=True)
        )
    )
