"""A kernel for continuous and discrete variables together: one of each kind, in turn.

Given z, the continuous q move by any kernel of this package; given q, the discrete z move by one of `gibbs`. Each
leaves its conditional, and so the joint density, invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, Kernel, LogDensity, Tuning

JointDensity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DiscreteKernel(Protocol):
    """A kernel on indices; what its target returns is between the two."""

    def init(self, position: Tensor, target: Any) -> Any:
        """The state at a position `[C, m]`."""
        ...

    def step(self, state: Any, tuning: Tuning | None, target: Any) -> tuple[Any, Info]:
        """One sweep."""
        ...


class Joint(NamedTuple):
    """A density of continuous q `[C, d]` and discrete z `[C, m]`.

    Attributes:
        continuous: `(q, z)` to log density `[C]` and gradient by q `[C, d]`.
        discrete: what the discrete kernel needs, with q before it: `(q, z) -> [R]` for `Gibbs`, `(q, x one-hot) ->
            [C], [C, m, K]` for `GibbsWithGradients`.
    """

    continuous: JointDensity
    discrete: Callable[[Tensor, Tensor], Any]


class MixedState(NamedTuple):
    """Continuous `[C, d]` and discrete `[C, m]` positions, and the state of the continuous kernel."""

    position: Tensor
    choices: Tensor
    continuous: Any


@dataclass(frozen=True)
class Mixed:
    """Alternate a discrete kernel on z given q with a continuous one on q given z.

    The target is a `Joint`, or for `Gibbs` just `(q, z) -> log density, gradient by q` (whose gradients are then
    computed for nothing in the discrete half). What the continuous kernel remembers of its density is made anew
    after every change of z (`refresh`).

    Args:
        continuous: any kernel of this package.
        discrete: `Gibbs` or `GibbsWithGradients`.
        sweeps: steps of the discrete kernel per step of the continuous one.
    """

    continuous: Kernel
    discrete: DiscreteKernel
    sweeps: int = 1

    def __post_init__(self) -> None:
        """Check the number of sweeps."""
        if self.sweeps < 1:
            raise ValueError(f"sweeps must be at least 1, got {self.sweeps}")

    def init(self, position: tuple[Tensor, Tensor], target: Joint | JointDensity) -> MixedState:
        """The state at q `[C, d]` and z `[C, m]`."""
        q, z = position
        return MixedState(q, z, self.continuous.init(q, _given_choices(target, z)))

    def step(
        self, state: MixedState, tuning: Tuning, target: Joint | JointDensity
    ) -> tuple[MixedState, Info]:
        """Sweeps over z, then a step of q. The acceptance that is reported is that of the continuous kernel."""
        q, z, inner = state
        discrete = _given_position(target, q)
        sweep = self.discrete.init(z, discrete)
        evaluations = torch.ones_like(q[:, 0])
        for _ in range(self.sweeps):
            sweep, info = self.discrete.step(sweep, None, discrete)
            evaluations = evaluations + info.evaluations
        continuous = _given_choices(target, sweep.position)
        inner = refresh(self.continuous, inner, continuous)
        inner, info = self.continuous.step(inner, tuning, continuous)
        info = info._replace(evaluations=info.evaluations + evaluations + 1)
        return MixedState(inner.position, sweep.position, inner), info


def refresh(kernel: Kernel, state: Any, target: LogDensity) -> Any:
    """The same state under another target: `log_density` and `gradient` anew, momenta and counters as they were.

    A kernel whose state remembers more of its density has a method `refresh(state, target)` of its own.
    """
    own = getattr(kernel, "refresh", None)
    if own is not None:
        return own(state, target)
    fresh = kernel.init(state.position, target)
    names = {"log_density", "gradient"} & set(state._fields)
    return state._replace(**{name: getattr(fresh, name) for name in names})


def _given_choices(target: Joint | JointDensity, z: Tensor) -> LogDensity:
    joint = target.continuous if isinstance(target, Joint) else target
    return lambda q: joint(q, z)


def _given_position(target: Joint | JointDensity, q: Tensor) -> Callable[[Tensor], Any]:
    """The density of rows of z, as many in a row for every chain as are asked for."""

    def repeated(rows: int) -> Tensor:
        return q if rows == len(q) else q.repeat_interleave(rows // len(q), 0)

    if isinstance(target, Joint):
        return lambda z: target.discrete(repeated(len(z)), z)
    return lambda z: target(repeated(len(z)), z)[0]
