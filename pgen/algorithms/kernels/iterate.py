"""Iterate any kernel: by its own `run` where it has one, step by step where not.

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
