"""Draws from a density known up to a constant: long chains, many side by side.

Chains move by any kernel of the space and leap to draws of a reference law (see `contrastive.leap`), each of which leaves the
density invariant. During warm-up the step size follows the acceptance, and the reference law, with the scale of the steps, is
fitted to where the chains are. After it nothing is adapted.

How good the draws are is a matter of mixing: where neither steps nor leaps join two modes, chains stay in the one that they
began in. Chains of persistent contrastive divergence, which have been moving since learning began, are the best beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.energy.contrastive import leap
from pgen.algorithms.energy.reference import Law, Reference, closest
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density, Moves, Sweeps, Usual, Walk
from pgen.algorithms.kernels.base import Kernel
from pgen.algorithms.record import record

_FITS = 5  # of the reference law during warm-up
_SELDOM = 0.002  # of chains that leap in a call
_RATE = 0.2  # of the logarithm of the step size


@dataclass(frozen=True)
class LongRun:
    """Draws by long chains.

    Attributes:
        warmup: calls of the walk before the first draw.
        thin: calls between two draws of one chain.
        chains: at most so many side by side; each gives as many draws as it takes.
        steps: of the kernel in a call.
        leaps: draws of the reference law that are offered to each chain at each call; 0 for none.
        continuous: kernel for what is measured; MALA by default.
        discrete: kernel for what is counted; Gibbs with gradients for bits by default, else Gibbs.

    Raises:
        ValueError: a setting is out of its range.
    """

    warmup: int = 200
    thin: int = 20
    chains: int = 1000
    steps: int = 5
    leaps: int = 8
    continuous: Kernel | None = None
    discrete: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("warmup", 0), ("thin", 1), ("chains", 1), ("steps", 1), ("leaps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")

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
        """Draws `[n, *event]`.

        Args:
            f: log density up to a constant, rows `[C, *event]` to `[C]`.
            start: where chains begin, `[C, *event]`: C of them.
            space: of the values.
            n: draws, a multiple of C, or fewer.
            reference: what leaps may be drawn from, where it is closer than a law that is fitted to the chains.
            sweep: the energy's own Gibbs sweep, in the place of kernels.
        """
        walk = self._walk(space, sweep)
        x, log_step = start.detach().clone(), torch.zeros((), dtype=start.dtype, device=start.device)
        leaps, block = self.leaps, max(1, self.warmup // _FITS)
        move: Any = None
        with torch.no_grad():
            for i in range(0, self.warmup, block):
                move, leapt = self._mover(f, x, space, walk, reference, leaps), torch.zeros_like(log_step)
                for _ in range(min(block, self.warmup - i)):
                    x, accept, gone = move(x, log_step.exp())
                    leapt = leapt + gone / block
                    if walk.target_accept is not None and space.dims:
                        log_step = (log_step + _RATE * (accept - walk.target_accept)).clamp(-12.0, 1.0)
                # Where leaps are never taken they only cost evaluations.
                leaps = leaps if float(leapt) > _SELDOM else 0
            kept = [x]
            if n > len(x):
                move = self._mover(f, x, space, walk, reference, leaps)
            while sum(map(len, kept)) < n:
                for _ in range(self.thin):
                    x, _, _ = move(x, log_step.exp())
                kept.append(x)
        return torch.cat(kept)[:n]

    def _walk(self, space: Space, sweep: Callable[[Tensor], Tensor] | None) -> Walk:
        if sweep is not None:
            return Sweeps(sweep, self.steps)
        usual = Usual(space)
        return Moves(
            space, self.continuous or usual.continuous, self.discrete or usual.discrete, self.steps, 0.574
        )

    def _mover(
        self, f: Density, x: Tensor, space: Space, walk: Walk, reference: Law | None, leaps: int
    ) -> Any:
        """One call of the walk, recorded, with the scale and the leaps that suit where chains are."""
        fitted = Reference(x, space, widen=1.2) if len(x) > 1 else None
        law = reference if fitted is None else closest(x, fitted, reference)
        scale = fitted.root.diagonal() if fitted is not None and space.dims else None

        def move(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gone = torch.zeros_like(step)
            if leaps and law is not None:
                x, gone = leap(x, f, law, leaps)
            position, accept = walk(x, f, step if scale is None else step * scale)
            return position, accept, gone

        return record(move)
