"""Draws from a density known up to a constant: long chains, many side by side.

Chains move by any kernel of the space and leap to draws of a reference law (see `contrastive.leap`), each of which leaves the
density invariant. During warm-up the step size follows the acceptance, and the reference law, with the scale of the steps, is
fitted to where the chains are. After it nothing is adapted.

How good the draws are is a matter of mixing: where neither steps nor leaps join two modes, chains stay in the one that they
began in. Chains of persistent contrastive divergence, which have been moving since learning began, are the best beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.energy.contrastive import leap
from pgen.algorithms.energy.reference import Law, Reference, closest
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density, Moves, Sweeps, Usual, Walk
from pgen.algorithms.kernels.base import Info, Kernel, Tuning
from pgen.algorithms.kernels.discrete_langevin import DiscreteLangevin
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import ULA
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.algorithms.progress import followed

_FITS = 5  # of the reference law during warm-up
_SELDOM = 0.002  # of chains that leap in a call
_RATE = 0.2  # of the logarithm of the step size
_LONGEST = (1.0, 3.0)  # logarithms of the two step sizes
_LANGEVIN = 0.574
_AIMS: tuple[tuple[type, float | None], ...] = ((HMC, 0.651), (NUTS, 0.8), (RandomWalk, 0.234), (ULA, None))


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
        discrete: kernel for what is counted, or its class (`Gibbs`), where it is not known yet how many values there are;
            Gibbs with gradients for bits by default, else Gibbs.
        step_size: to begin with, in standard deviations of the chains; of `ULA`, which accepts everything, for good
            (a variance is then too large by about a quarter of its square, and without end from 0.8 on).
        target_accept: what the step size is adapted to; None: what suits the kernel.

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
    step_size: float = 1.0
    target_accept: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("warmup", 0), ("thin", 1), ("chains", 1), ("steps", 1), ("leaps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        if not self.step_size > 0:
            raise ValueError(f"step_size is positive, got {self.step_size}")
        if self.target_accept is not None and not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept is a probability between 0 and 1, got {self.target_accept}")

    def count(self, n: int, conditional: bool = False) -> int:
        """Chains for n draws; where every draw is of a law of its own, a multiple of n."""
        return n if conditional else min(n, self.chains)

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
            sweep: the energy's own Gibbs sweep, in the place of kernels, unless a kernel is asked for.
        """
        walk, following = self._walk(space, sweep)
        x, log_step = start.detach().clone(), following.begin(self.step_size, start)
        leaps, block = self.leaps, max(1, self.warmup // _FITS)
        call: Any = None
        scale = start.new_ones(())
        with torch.no_grad():
            for i in followed(range(0, self.warmup, block), "warming chains up"):
                call, scale = self._call(call, f, x, space, walk, reference, leaps)
                leapt = torch.zeros_like(log_step[0])
                for _ in range(min(block, self.warmup - i)):
                    x, accept, gone = call(x, log_step.exp(), scale)
                    leapt = leapt + gone / block
                    log_step = following.after(log_step, accept)
                if (
                    leaps and float(leapt) <= _SELDOM
                ):  # where leaps are never taken they only cost evaluations
                    leaps, call = 0, None
            kept = [x]
            if n > len(x):
                call, scale = self._call(call, f, x, space, walk, reference, leaps)
            for _ in followed(range(1, math.ceil(n / len(x))), "drawing by chains"):
                for _ in range(self.thin):
                    x, _, _ = call(x, log_step.exp(), scale)
                kept.append(x)
        return torch.cat(kept)[:n]

    def _walk(self, space: Space, sweep: Callable[[Tensor], Tensor] | None) -> tuple[Walk, Following]:
        if sweep is not None and self.continuous is None and self.discrete is None:
            return Sweeps(sweep, self.steps), Following()
        continuous, discrete = kernels_of(space, self.continuous, self.discrete)
        aim = None if continuous is None else self.target_accept or aim_of(continuous)
        return Moves(space, continuous, discrete, self.steps, aim), Following(aim, discrete)

    def _call(
        self, call: Any, f: Density, x: Tensor, space: Space, walk: Walk, reference: Law | None, leaps: int
    ) -> tuple[Any, Tensor]:
        """One call of the walk, with leaps that suit where chains are, if there are any; and a scale that does."""
        fitted = Reference(x, space, widen=1.2) if len(x) > 1 else None
        law = reference if fitted is None else closest(x, fitted, reference)
        scale = fitted.root.diagonal() if fitted is not None and space.dims else x.new_ones(())
        if call is not None and not leaps:
            return call, scale
        tuned = isinstance(walk, Moves) and isinstance(walk.discrete, DiscreteLangevin)

        def move(x: Tensor, step: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gone = torch.zeros_like(step[0])
            if leaps and law is not None:
                x, gone = leap(x, f, law, leaps)
            heard = Heard(walk.discrete, step[1]) if tuned else None  # type: ignore[attr-defined]
            how: Any = walk if heard is None else replace(walk, discrete=heard)  # type: ignore[type-var]
            position, accept = how(x, f, step[0] * scale)
            other = torch.ones_like(accept) if heard is None else heard.accept.mean()
            return position, torch.stack([accept, other]), gone

        return move, scale  # not recorded: there are too few calls to make up for it


class Following(NamedTuple):
    """Step sizes that follow the acceptance: of the kernel for what is measured, and of `DiscreteLangevin`.

    Attributes:
        aim: acceptance that the first is adapted to; None for a kernel whose step size stays.
        discrete: the kernel for what is counted.
    """

    aim: float | None = None
    discrete: Any = None

    def begin(self, step_size: float, like: Tensor) -> Tensor:
        """Logarithms of the two, `[2]`."""
        return like.new_tensor([step_size, getattr(self.discrete, "step_size", 1.0)]).log()

    def after(self, log_step: Tensor, accept: Tensor) -> Tensor:
        """What they are after a call that accepted so many, `[2]`."""
        langevin = isinstance(self.discrete, DiscreteLangevin)
        aims = log_step.new_tensor([self.aim or math.nan, _LANGEVIN if langevin else math.nan])
        moved = log_step + _RATE * (accept - aims).nan_to_num(nan=0.0)
        moved = torch.minimum(moved, log_step.new_tensor(_LONGEST)).clamp(min=-12.0)
        return torch.where(aims.isnan(), log_step, moved)


@dataclass
class Heard:
    """A kernel with a step size, or none, that remembers how often each chain accepted.

    Attributes:
        kernel: what moves.
        step_size: of a kernel that takes it from a tuning, `[]`; None: the tuning is what it is.
        accepts: `[C]`, one for each step.
    """

    kernel: Any
    step_size: Tensor | None = None
    accepts: list[Tensor] = field(default_factory=list)

    @property
    def accept(self) -> Tensor:
        """Mean over steps, `[C]`."""
        return torch.stack(self.accepts).mean(0)

    def init(self, position: Tensor, target: Any) -> Any:
        """The state of the kernel."""
        return self.kernel.init(position, target)

    def step(self, state: Any, tuning: Tuning | None, target: Any) -> tuple[Any, Info]:
        """A step of the kernel."""
        if self.step_size is not None:
            tuning = Tuning(self.step_size, self.step_size, self.step_size)
        state, info = self.kernel.step(state, tuning, target)
        self.accepts.append(info.accept)
        return state, info


def kernels_of(space: Any, continuous: Kernel | None, discrete: Any) -> tuple[Kernel | None, Any]:
    """The kernels for what is measured and for what is counted, None where there is nothing to move; the usual ones for None.

    >>> from torch.distributions import constraints
    >>> kernels_of(Space.of(constraints.boolean, (2,)), HMC(), DiscreteLangevin)
    (None, DiscreteLangevin(cardinalities=(2, 2), step_size=0.5, dtype=None))
    """
    usual = Usual(space)
    if isinstance(discrete, type) and space.cardinalities:
        discrete = discrete(space.cardinalities)
    return (
        (continuous or usual.continuous) if space.dims else None,
        (discrete or usual.discrete) if space.cardinalities else None,
    )


def aim_of(kernel: Any) -> float | None:
    """The acceptance at which a kernel moves fastest; None for one that accepts everything.

    >>> aim_of(HMC()), aim_of(ULA())
    (0.651, None)
    """
    return next((aim for kind, aim in _AIMS if isinstance(kernel, kind)), _LANGEVIN)
