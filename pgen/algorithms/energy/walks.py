"""How chains of values move: any kernel of `pgen.algorithms.kernels`, on any space, for any unnormalised density.

    walk(x [C, *event], log_density, step_size [] or [d]) -> Walked

leaves exp(log_density) invariant (`ULA` nearly so). It serves training, where it is recorded with the loss around it, as
well as sampling and annealing, where `log_density` is that of a rung. Nothing in it follows the gradient of what is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pgen.algorithms.energy.space import Space
from pgen.algorithms.kernels.base import Kernel, LogDensity, Tuning
from pgen.algorithms.kernels.gibbs import Gibbs, GibbsWithGradients
from pgen.algorithms.kernels.langevin import MALA
from pgen.algorithms.kernels.mixed import refresh

Density = Callable[[Tensor], Tensor]
"""Values `[C, *event]` to `[C]`: a log density up to a constant."""


class Walked(NamedTuple):
    """Where chains came.

    Attributes:
        position: `[C, *event]`.
        accept: mean acceptance over chains and steps, `[]`.
    """

    position: Tensor
    accept: Tensor


class Walk(Protocol):
    """Moves chains of values."""

    @property
    def target_accept(self) -> float | None:
        """What its step size should be adapted to; None if it has none."""
        ...

    def __call__(self, x: Tensor, log_density: Density, step_size: Tensor) -> Walked:
        """So many steps of every chain."""
        ...


def with_gradient(log_density: Density) -> LogDensity:
    """Log density and its gradient in the values, none of them part of a graph.

    The function that is made raises ValueError where there is no gradient.

    >>> with_gradient(lambda x: -x.square().sum(-1) / 2)(torch.ones(1, 2))
    (tensor([-1.]), tensor([[-1., -1.]]))
    """

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = log_density(x)
            gradient = (
                torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
            )
        if gradient is None:
            raise ValueError(
                "the energy has no gradient in the values that it is given (does it look them up by x.long(), detach them, or leave "
                "torch?), and this kernel moves by it; write it as a function of the numbers, such as (x * weights).sum(-1), or move "
                "counted numbers by discrete=Gibbs(cardinalities)"
            )
        return value.detach(), gradient

    return target


@dataclass(frozen=True)
class Moves:
    """A kernel for what is measured and one for what is counted, in turn, where a space has both.

    Attributes:
        space: of the values.
        continuous: a kernel on unconstrained vectors (`init`, `step`), such as `MALA()`, `HMC()`, `ULA()`.
        discrete: a kernel on indices: `GibbsWithGradients` (bits) or `Gibbs`.
        steps: how many of each.
        target_accept: of the continuous kernel.
        reverse: whether the continuous kernel is first, so that moves are those of `reverse=False` backwards in time.
    """

    space: Space
    continuous: Kernel | None = None
    discrete: Any = None
    steps: int = 1
    target_accept: float | None = 0.574
    reverse: bool = False

    def __post_init__(self) -> None:
        """Check that there is a kernel for each kind of numbers."""
        if self.steps < 1:
            raise ValueError(f"steps is at least 1, got {self.steps}")
        for kernel, there, kind in (
            (self.continuous, self.space.dims, "continuous"),
            (self.discrete, len(self.space.cardinalities), "discrete"),
        ):
            if there and kernel is None:
                raise ValueError(
                    f"the space has {there} {kind} numbers, and there is no {kind} kernel to move them"
                )

    def backwards(self) -> Moves:
        """The same moves reversed in time, for kernels that are each reversible, and sweeps of `Gibbs` block by block."""
        discrete = self.discrete
        if isinstance(discrete, Gibbs) and discrete.scan == "systematic":
            blocks = discrete.blocks or tuple((i,) for i in range(len(discrete.cardinalities)))
            discrete = replace(discrete, blocks=tuple(reversed(blocks)))
        return replace(self, discrete=discrete, reverse=not self.reverse)

    def __call__(self, x: Tensor, log_density: Density, step_size: Tensor) -> Walked:
        """So many steps of every chain."""
        q, z = self.space.apart(x.detach())
        together = self.space.together

        def of_q(q: Tensor, z: Tensor) -> Tensor:
            return log_density(together(q, z)) + self.space.volume(q)

        def of_z(q: Tensor) -> Any:
            if isinstance(self.discrete, Gibbs):
                return lambda z: _row_by_row(lambda q, z: log_density(together(q, z)), q, z)
            values = torch.arange(max(self.space.cardinalities), dtype=q.dtype, device=q.device)
            return with_gradient(lambda code: log_density(together(q, code @ values)))

        unit = torch.ones((), dtype=q.dtype, device=q.device)
        tuning = Tuning(unit, step_size * torch.ones_like(q[0]), unit)
        accept, state = torch.ones((), dtype=q.dtype, device=q.device), None
        total = torch.zeros_like(accept)
        for turn in range(self.steps + self.reverse):
            if self.discrete is not None and turn >= self.reverse:
                target = of_z(q)
                found = self.discrete.init(z, target)
                z = self.discrete.step(found, None, target)[0].position  # the tuning is the other kernel's
            if self.continuous is not None and turn < self.steps:
                target = with_gradient(lambda q, z=z: of_q(q, z))  # type: ignore[misc]
                if state is None:
                    state = self.continuous.init(q, target)
                elif self.discrete is not None:
                    state = refresh(self.continuous, state, target)
                state, info = self.continuous.step(state, tuning, target)
                q, total = state.position, total + info.accept.mean() / self.steps
        return Walked(together(q, z), total if self.continuous is not None else accept)


def _row_by_row(density: Callable[[Tensor, Tensor], Tensor], q: Tensor, z: Tensor) -> Tensor:
    """The density at several z of every chain, which are given side by side, and asked for as rows i of chain i mod C."""
    each = len(z) // len(q)
    turned = z.unflatten(0, (len(q), each)).transpose(0, 1).flatten(0, 1)
    return density(q.repeat(each, 1), turned).detach().unflatten(0, (each, len(q))).mT.reshape(-1)


@dataclass(frozen=True)
class Sweeps:
    """The block Gibbs sweeps that an energy knows itself; what it is an energy of is not asked.

    Attributes:
        sweep: rows `[C, *event]` to rows, one sweep.
        steps: how many.
    """

    sweep: Callable[[Tensor], Tensor]
    steps: int = 1
    target_accept: float | None = None

    def __call__(self, x: Tensor, log_density: Density, step_size: Tensor) -> Walked:
        """So many sweeps of every chain."""
        with torch.no_grad():
            for _ in range(self.steps):
                x = self.sweep(x)
        return Walked(x, torch.ones((), dtype=x.dtype, device=x.device))


@dataclass(frozen=True)
class Usual:
    """The kernels that suit a space, unless told otherwise: MALA; for bits, Gibbs with gradients; else Gibbs."""

    space: Space

    @cached_property
    def continuous(self) -> Kernel | None:
        """For what is measured."""
        return MALA() if self.space.dims else None

    @cached_property
    def discrete(self) -> Any:
        """For what is counted."""
        sizes = self.space.cardinalities
        if not sizes:
            return None
        return GibbsWithGradients(sizes) if self.space.binary else Gibbs(sizes)

    def walk(self, steps: int = 1) -> Moves:
        """A walk of so many steps."""
        return Moves(self.space, self.continuous, self.discrete, steps)
