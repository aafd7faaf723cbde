"""Iterate any kernel: by its own `run` where it has one, step by step where not.

    iterate    keeps every position, and what every step reports
    moved      keeps the last: what training an energy and short runs ask for

`NUTS.run` lets chains go at their own pace. A kernel of fixed cost needs no such thing: its step is straight-line code,
recorded once, and repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Kernel, LogDensity, Tuning

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

_TOGETHER, _CHAINS, _NUMBERS = (
    8,
    1 << 15,
    1 << 20,
)  # steps as one; chains, and their numbers, of all steps together
_NARROW, _MANY = 8, 32  # numbers of a chain, and chains


def unwrapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return fn


@dataclass(frozen=True)
class Step:
    """A kernel's step on one target. Two of one kernel and target are equal, so a wrap can remember what it made."""

    kernel: Kernel
    target: LogDensity

    def __call__(self, state: Any, tuning: Tuning) -> tuple[Any, Any]:
        """One iteration of every chain."""
        return self.kernel.step(state, tuning, self.target)


@dataclass(frozen=True)
class Steps:
    """So many steps as one function: the last state, and what the last step reports.

    What only the reports before it need is left out of a recording, and its calls are shared by all steps. Vectors of
    a few numbers leave with the chains side by side in memory, as gradients do not come by themselves.
    """

    step: Step
    times: int

    def __call__(self, state: Any, tuning: Tuning) -> tuple[Any, Any]:
        """That many iterations of every chain."""
        info: Any = None
        for _ in range(self.times):
            state, info = self.step(state, tuning)
        return _side_by_side(state), info


def iterate(
    kernel: Kernel, state: Any, tuning: Tuning, target: LogDensity, draws: int, wrap: Wrap = unwrapped
) -> tuple[Any, Tensor, Any]:
    """`draws` iterations of every chain.

    Args:
        kernel: with `run(state, tuning, target, draws, wrap)`, or only with `step`.
        state: where the chains are.
        tuning: the same for all iterations.
        target: the log density and its gradient.
        draws: how many iterations.
        wrap: applied to the straight-line part before it is repeated, such as `functools.cache(record)`.

    Returns:
        the last state, the positions `[draws, C, d]`, and the `Info`s, stacked: `[draws, C]`.
    """
    run = getattr(kernel, "run", None)
    if run is not None:
        return run(state, tuning, target, draws, wrap)
    step = wrap(Step(kernel, target))
    positions: list[Tensor] = []
    infos: list[Any] = []
    for _ in range(draws):
        state, info = step(state, tuning)
        positions.append(state[0])
        infos.append(info)
    stacked = type(infos[0])(*(torch.stack(parts) for parts in zip(*infos, strict=True)))
    return state, torch.stack(positions), stacked


def moved(
    kernel: Kernel,
    state: Any,
    tuning: Tuning,
    target: LogDensity,
    draws: int,
    wrap: Wrap = unwrapped,
    together: int | None = None,
) -> tuple[Any, Any]:
    """Where `draws` iterations of every chain lead: the last state, and what the last iteration reports.

    For kernels of fixed cost, in as little time as can be had: several steps are wrapped as one function, and vectors
    of a few numbers lie with the chains side by side in memory.

    Args:
        kernel: with `step`.
        state: where the chains are.
        tuning: the same for all iterations.
        target: the log density and its gradient.
        draws: how many iterations.
        wrap: applied to straight-line parts, such as `functools.cache(record)`.
        together: steps in such a part; by default 8, and fewer of large states, whose steps are worth a call
            each. The time and memory that a recording takes to make grow with it.

    Raises:
        ValueError: no iterations, or no steps in a part.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> from pgen.algorithms.kernels.hmc import HMC
        >>> def normal(q): return -0.5 * q.square().sum(-1), -q
        >>> _ = torch.manual_seed(0)
        >>> kernel, start = HMC(steps=5), torch.full((1000, 2), 3.0)
        >>> state, info = moved(kernel, kernel.init(start, normal), untuned(start, 0.5), normal, 20)
        >>> bool(state.position.mean().abs() < 0.1)
        True
    """
    if draws < 1 or (together is not None and together < 1):
        raise ValueError(f"draws and together are at least 1, got {draws} and {together}")
    if together is None:
        q = state[0]
        together = max(1, min(_TOGETHER, _CHAINS // max(1, len(q)), _NUMBERS // max(1, q.numel())))
    state = _side_by_side(state)
    step = Step(kernel, target)
    whole, rest = divmod(draws, together)
    info = None
    for times in (*(together,) * whole, *(rest,) * (rest > 0)):
        state, info = wrap(Steps(step, times))(state, tuning)
    return type(state)(*(part.contiguous() for part in state)), info


def _side_by_side(state: Any) -> Any:
    """A state whose vectors `[C, d]` of a few numbers are laid out by number: loops then run over chains."""
    return type(state)(*map(_laid_out, state))


def _laid_out(part: Tensor) -> Tensor:
    if part.dim() != 2 or not 1 < part.shape[1] <= _NARROW or len(part) < _MANY:
        return part
    return part.mT.contiguous().mT
