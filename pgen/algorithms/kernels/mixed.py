"""A kernel for continuous and discrete variables together: one of each kind, in turn.

Given z, the continuous q move by any kernel of this package; given q, the discrete z move by one of `gibbs` or `local`. Each
leaves its conditional, and so the joint density, invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, Kernel, LogDensity, Tuning
from pgen.algorithms.kernels.iterate import Wrap, unwrapped
from pgen.algorithms.kernels.local import LocalGibbs, LocalState, number

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
            [C], [C, m, K]` for `GibbsWithGradients`, `(q, z [C, J, m]) -> [C, J, T]` for `LocalGibbs`.
    """

    continuous: JointDensity
    discrete: Callable[[Tensor, Tensor], Any]


class MixedTuning(NamedTuple):
    """The tuning of the continuous kernel, and the longest steps `[m]` of variables that `LocalGibbs` moves by steps."""

    continuous: Tuning
    widths: Tensor


class MixedState(NamedTuple):
    """Where the chains are.

    Attributes:
        position: continuous, `[C, d]`.
        choices: discrete, `[C, m]`.
        continuous: the state of the continuous kernel.
        accept: `[m]`; how often the proposals of each discrete variable were accepted in the last step, over the chains,
            where they are proposed one by one; else 1.
    """

    position: Tensor
    choices: Tensor
    continuous: Any
    accept: Tensor


@dataclass(frozen=True)
class Mixed:
    """Alternate a discrete kernel on z given q with a continuous one on q given z.

    The target is a `Joint`, or for `Gibbs` just `(q, z) -> log density, gradient by q` (whose gradients are then
    computed for nothing in the discrete half). What the continuous kernel remembers of its density is made anew
    after every change of z (`refresh`).

    Args:
        continuous: any kernel of this package; None where there are no continuous variables (q is then `[C, 0]`).
        discrete: `LocalGibbs`, `Gibbs` or `GibbsWithGradients`.
        sweeps: steps of the discrete kernel per step of the continuous one.
        shorter: how often a chain takes a step of q that is 4, 16 or 64 times shorter than usual. One step size cannot suit
            all z: where it is too long, a chain would stay for ever. For kernels that take a step size `[C, 1]`, as `HMC`.
    """

    continuous: Kernel | None
    discrete: DiscreteKernel | LocalGibbs
    sweeps: int = 1
    shorter: float = 0.0

    def __post_init__(self) -> None:
        """Check the number of sweeps."""
        if self.sweeps < 1 or not 0 <= self.shorter < 1:
            raise ValueError(
                f"sweeps must be at least 1, got {self.sweeps}; shorter a probability below 1, got {self.shorter}"
            )

    def init(self, position: tuple[Tensor, Tensor], target: Joint | JointDensity) -> MixedState:
        """The state at q `[C, d]` and z `[C, m]`."""
        q, z = position
        joint = _joint(target)
        inner = () if self.continuous is None else self.continuous.init(q, _at_choices(joint.continuous, z))
        return MixedState(q, z, inner, torch.ones_like(z[0], dtype=q.dtype))

    def step(
        self,
        state: MixedState,
        tuning: Tuning | MixedTuning,
        target: Joint | JointDensity,
        wrap: Wrap = unwrapped,
    ) -> tuple[MixedState, Info]:
        """Sweeps over z, then a step of q. The acceptance that is reported is that of the continuous kernel.

        `wrap` makes the straight-line parts fast; they take q, z and the tuning as inputs.
        """
        q, z, inner, _ = state
        joint = _joint(target)
        of_q, widths = tuning if isinstance(tuning, MixedTuning) else (tuning, None)
        if isinstance(self.discrete, LocalGibbs):
            swept = self._swept_locally(q, z, widths, joint, wrap)
        else:
            swept = self._swept(self.discrete, q, z, joint, wrap)
        z, energy, evaluations, accept = swept
        if self.continuous is None:
            one = torch.ones_like(energy)
            return MixedState(q, z, (), accept), Info(one, energy, one > 1, evaluations)
        inner, info = wrap(Follow(self.continuous, joint.continuous, self.shorter))(inner, z, of_q)
        info = info._replace(evaluations=info.evaluations + evaluations + 1)
        return MixedState(inner.position, z, inner, accept), info

    def _swept(
        self, kernel: DiscreteKernel, q: Tensor, z: Tensor, joint: Joint, wrap: Wrap
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z after the sweeps, its energy and what they cost `[C]`, and acceptances `[m]`."""
        state = wrap(Begin(kernel, joint.discrete))(q, z)
        step = wrap(Sweep(kernel, joint.discrete))
        state, info = step(q, state)
        evaluations = 1 + info.evaluations
        for _ in range(self.sweeps - 1):
            state, info = step(q, state)
            evaluations = evaluations + info.evaluations
        return state.position, info.energy, evaluations, torch.ones_like(z[0], dtype=q.dtype)

    def _swept_locally(
        self, q: Tensor, z: Tensor, widths: Tensor | None, joint: Joint, wrap: Wrap
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel: LocalGibbs = self.discrete  # type: ignore[assignment]
        state = LocalState(z, wrap(Known(joint.discrete))(q, z))
        accept = torch.zeros_like(z[0], dtype=q.dtype)
        for _ in range(self.sweeps):
            state, taken = kernel.sweep(state, widths, joint.discrete, q, wrap)
            accept = accept + taken / self.sweeps
        energy = -state.log_density
        evaluations = torch.full_like(energy, 1 + self.sweeps * kernel.evaluations)
        return state.position, energy, evaluations, accept


@dataclass(frozen=True)
class Follow:
    """A step of the continuous kernel given z; straight-line code if the kernel's is."""

    kernel: Kernel
    target: JointDensity
    shorter: float = 0.0

    def __call__(self, inner: Any, z: Tensor, tuning: Tuning) -> tuple[Any, Info]:
        """What it remembers is of another z."""
        given = _at_choices(self.target, z)
        inner = refresh(self.kernel, inner, given)
        if not self.shorter:
            return self.kernel.step(inner, tuning, given)
        share = torch.rand_like(inner.position[:, :1]) / self.shorter
        power = torch.where(share < 1, torch.floor(3 * share) + 1, 0.0)
        tuning = tuning._replace(step_size=tuning.step_size * 0.25**power)
        inner, info = self.kernel.step(inner, tuning, given)
        # Where usual steps are too long, shorter ones are there to move the chain: only theirs tell of a place not explored.
        return inner, info._replace(diverging=info.diverging & (power[:, 0] > 0))


@dataclass(frozen=True)
class Begin:
    """The state of a discrete kernel at z given q."""

    kernel: DiscreteKernel
    target: Callable[[Tensor, Tensor], Any]

    def __call__(self, q: Tensor, z: Tensor) -> Any:
        """The state."""
        return self.kernel.init(z, _at_position(self.target, q))


@dataclass(frozen=True)
class Sweep:
    """A step of a discrete kernel given q."""

    kernel: DiscreteKernel
    target: Callable[[Tensor, Tensor], Any]

    def __call__(self, q: Tensor, state: Any) -> tuple[Any, Info]:
        """The next state."""
        return self.kernel.step(state, None, _at_position(self.target, q))


@dataclass(frozen=True)
class Known:
    """The terms at z given q."""

    target: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, q: Tensor, z: Tensor) -> Tensor:
        """`[C, T]`."""
        return number(self.target(q, z.unsqueeze(1)).squeeze(1))


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


def _joint(target: Joint | JointDensity) -> Joint:
    if isinstance(target, Joint):
        return target
    return Joint(target, lambda q, z: target(q, z)[0])


def _at_choices(target: JointDensity, z: Tensor) -> LogDensity:
    return lambda q: target(q, z)


def _at_position(target: Callable[[Tensor, Tensor], Any], q: Tensor) -> Callable[[Tensor], Any]:
    """The density of rows of z, as many in a row for every chain as are asked for."""

    def repeated(rows: int) -> Tensor:
        return q if rows == len(q) else q.repeat_interleave(rows // len(q), 0)

    return lambda z: target(repeated(len(z)), z)
