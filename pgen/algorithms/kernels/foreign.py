"""Kernels that others wrote: what they may leave out, and what is made of it.

    kernel.init(q, target)             -> state        a tensor `[C, d]`, or a tuple of tensors that begins with it
    kernel.step(state, tuning, target) -> state, info  `target(q)` gives log densities `[C]` and gradients `[C, d]`

`info` is the acceptance probability of each chain `[C]`; or None, for a kernel that never rejects; or a named tuple with any
fields of `Info`. `tuning.step_size` is then tuned to the kernel's attribute `target_accept` (0.8, if it has none), in units
of `tuning.scale`, the learnt standard deviations `[d]` or Cholesky factor `[d, d]` (see `push` and `pull`). Without an
acceptance there is nothing to tune to: the step size is one at which a leapfrog step would be accepted as often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, LogDensity, Tuning


class Only(NamedTuple):
    """The state of a kernel that remembers nothing but where it is."""

    position: Tensor


class Told(NamedTuple):
    """What a kernel without energies reports, `[C]` each; see `Info`."""

    accept: Tensor
    diverging: Tensor
    evaluations: Tensor


@dataclass(frozen=True, eq=False)
class Foreign:
    """A kernel of the user's, made to fit.

    Args:
        kernel: any object with `init(position, target)` and `step(state, tuning, target)`.
        accept: what its step size is tuned to; None: what it says itself.

    Example:
        >>> class Refresh:  # of a standard normal
        ...     def init(self, position, target):
        ...         return position
        ...     def step(self, position, tuning, target):
        ...         return torch.randn_like(position), None
        >>> kernel = Foreign(Refresh())
        >>> state, info = kernel.step(kernel.init(torch.zeros(4, 2), None), None, None)
        >>> state.position.shape, info.accept
        (torch.Size([4, 2]), tensor([0.8000, 0.8000, 0.8000, 0.8000]))
    """

    kernel: Any
    accept: float | None = None

    @property
    def target_accept(self) -> float:
        """Acceptance that the step size is tuned to."""
        return float(getattr(self.kernel, "target_accept", 0.8) if self.accept is None else self.accept)

    def init(self, position: Tensor, target: LogDensity) -> Any:
        """The state at positions `[C, d]`."""
        return self._checked(self.kernel.init(position, target), position, "init")

    def step(self, state: Any, tuning: Tuning, target: LogDensity) -> tuple[Any, Any]:
        """One iteration of every chain."""
        own = state.position if isinstance(state, Only) else state
        found = self.kernel.step(own, tuning, target)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                f"{self._name}.step returned {type(found).__name__}; expected a pair: the next state, and info"
            )
        new = self._checked(found[0], state[0], "step")
        return new, self._told(found[1], state[0])

    @property
    def _name(self) -> str:
        return type(self.kernel).__name__

    def _checked(self, state: Any, position: Tensor, where: str) -> Any:
        state = Only(state) if isinstance(state, Tensor) else state
        first = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(first, Tensor) or first.shape != position.shape:
            given = tuple(first.shape) if isinstance(first, Tensor) else type(state).__name__
            raise TypeError(
                f"{self._name}.{where} gave a state that begins with {given}; expected the positions, a tensor "
                f"{tuple(position.shape)}, or a tuple of tensors that begins with them"
            )
        return state

    def _told(self, info: Any, position: Tensor) -> Any:
        if isinstance(info, Info):
            return info
        one = torch.ones_like(position[:, 0])
        accept = info if isinstance(info, Tensor) else getattr(info, "accept", None)
        accept = one * self.target_accept if accept is None else accept.to(one).expand_as(one)
        diverging = getattr(info, "diverging", one > 1)
        evaluations = getattr(info, "evaluations", one)
        energy = getattr(info, "energy", None)
        if energy is not None:
            return Info(accept, energy, diverging, evaluations)
        return Told(accept, diverging, evaluations)
