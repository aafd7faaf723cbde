"""Draws from an energy by kernels that come with a warm-up of their own: NUTS, ChEES and MEADS.

`LongRun` adapts a step size, with the scale of a law that is fitted to the chains. These kernels want more: a scale that knows
correlations, a trajectory length, a damping; `pgen.algorithms.adaptation` finds them from all chains together. They move
what is measured, in unconstrained coordinates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.adaptation.chees import ChEESWarmup
from pgen.algorithms.adaptation.meads import MEADSWarmup
from pgen.algorithms.adaptation.warmup import Warmup
from pgen.algorithms.energy.draws import aim_of
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density, with_gradient
from pgen.algorithms.kernels.base import LogDensity
from pgen.algorithms.kernels.chees import ChEES
from pgen.algorithms.kernels.iterate import Wrap, iterate
from pgen.algorithms.kernels.meads import MEADS
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.record import record

_LEAST = 32  # chains: what is learned from all of them has to be learned from several
_FOLD = 4  # MEADS deals its chains to so many folds
_DENSE = 200  # numbers, up to which correlations are learned


@dataclass(frozen=True)
class AdaptedRun:
    """Draws by many chains of a kernel that is warmed up as its authors say.

    Attributes:
        kernel: `NUTS()`, `ChEES()`, `MEADS()`; or any other, whose step size and scale are learned in windows.
        warmup: iterations before the first draw.
        thin: iterations between two draws of one chain, and after warm-up before the first.
        chains: at most so many side by side; 32 at least.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> from torch.distributions import constraints
        >>> _ = torch.manual_seed(0)
        >>> space = Space.of(constraints.real, (2,))
        >>> how = AdaptedRun(ChEES(), warmup=60)
        >>> draws = how(lambda x: -(x / 5).square().sum(-1) / 2, torch.randn(500, 2), space, 500)
        >>> bool((draws.std(0) / 5 - 1).abs().max() < 0.2)
        True
    """

    kernel: Any = NUTS()  # noqa: RUF009 - frozen
    warmup: int = 200
    thin: int = 5
    chains: int = 500

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("warmup", 20), ("thin", 1), ("chains", _LEAST)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")

    def count(self, n: int, conditional: bool = False) -> int:
        """Chains for n draws; where every draw is of a law of its own, a multiple of n."""
        if conditional:
            enough = n >= _LEAST and n % _FOLD == 0
            return n if enough else n * _FOLD * -(-_LEAST // (n * _FOLD))
        return _FOLD * -(-max(_LEAST, min(n, self.chains)) // _FOLD)

    def __call__(
        self,
        f: Density,
        start: Tensor,
        space: Space,
        n: int,
        *,
        reference: Law | None = None,
        sweep: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draws `[n, *event]`; see `LongRun`. Neither the reference nor the sweep is used.

        Raises:
            ValueError: some numbers are counted.
        """
        if space.cardinalities or not space.dims:
            raise ValueError(
                f"{type(self.kernel).__name__} moves numbers that are measured, and {len(space.cardinalities)} here are counted; "
                "expected LongRun(continuous=HMC()), which moves both kinds in turn"
            )
        q, none = space.apart(start.detach())

        def density(q: Tensor) -> Tensor:
            return f(space.together(q, none.new_zeros(len(q), 0))) + space.volume(q)

        target, wrap = with_gradient(density), functools.cache(record)
        with torch.no_grad():
            state, tuning = self._warmed(q, target, wrap)
            kept = list[Tensor]()
            while sum(map(len, kept)) < n:
                state, positions, _ = iterate(self.kernel, state, tuning, target, self.thin, wrap)
                kept.append(space.together(positions[-1], none))
        return torch.cat(kept)[:n]

    def _warmed(self, q: Tensor, target: LogDensity, wrap: Wrap) -> tuple[Any, Any]:
        """The state before the first draw, and the tuning."""
        dense = q.shape[1] <= _DENSE
        if isinstance(self.kernel, (ChEES, MEADS)):
            pooled: Any = (
                ChEESWarmup(self.kernel, self.warmup, dense=dense)
                if isinstance(self.kernel, ChEES)
                else MEADSWarmup(self.warmup, dense=dense)
            )
            return pooled.finish(pooled.advance(pooled.begin(q, target), target, self.warmup, wrap))
        windows = Warmup(self.kernel, self.warmup, aim_of(self.kernel) or 0.8)
        at = windows.advance(windows.init(q, target), target, len(windows.plan), wrap)
        return at.state, at.tuning
