"""What is carried from step to step: values, and for methods with a memory the denoised values behind them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from pgen.algorithms.diffusion.field import Field


@runtime_checkable
class Solver(Protocol):
    """A solver of the diffusion equations: an object with this one method, hyperparameters being its fields.

    The state is the values `[B, *event]` themselves. One that needs a memory returns a NamedTuple or a frozen dataclass
    with a field `x` instead, and takes either: a bare tensor is its first step.

    One whose noise is that of the reverse-time equation, which takes away as much as the next steps can, has no step
    towards noise: it says so by an attribute `only_down = True`, and `solve` refuses grids that go up.
    """

    def step(self, state: Any, t: Any, t_next: Any, fn: Field, /) -> Any:
        """From noise level t to t_next (numbers, or tensors without dimensions).

        Args:
            state: the values `[B, *event]`, or what the last step returned.
            t: the noise level of the state.
            t_next: the noise level wanted; 0 for data.
            fn: `fn(x, sigma)` is the denoised x, `fn.noise(x)` fresh normal numbers.
        """
        ...


class History(NamedTuple):
    """Values and the denoised values of the levels passed, the latest first.

    Attributes:
        x: values `[B, *event]`.
        levels: noise levels at which the denoiser was called.
        denoised: what it answered.
    """

    x: Tensor
    levels: tuple[float, ...] = ()
    denoised: tuple[Tensor, ...] = ()

    def seen(self, level: float, denoised: Tensor, keep: int) -> History:
        """With one more evaluation, `keep` of them in all."""
        return History(self.x, (level, *self.levels)[:keep], (denoised, *self.denoised)[:keep])


def only_down(solver: object) -> bool:
    """Whether a solver has no step to a larger noise level."""
    return bool(getattr(solver, "only_down", False))


def value(state: Any) -> Tensor:
    """The values of a solver's state."""
    return state if isinstance(state, Tensor) else state.x


def moved(state: Any, x: Tensor) -> Any:
    """The state with other values and the same memory."""
    if isinstance(state, Tensor):
        return x
    return state._replace(x=x) if hasattr(state, "_replace") else dataclasses.replace(state, x=x)


def history(state: Any) -> History:
    """The state of a method with a memory, at its first step too."""
    return History(state) if isinstance(state, Tensor) else state
