r"""Draws from an energy by parallel tempering, on any space: replicas on a ladder of inverse temperatures that trade places.

    log f_t = (1 - beta_t) log reference + beta_t f,        0 = beta_1 < ... < beta_T = 1

Every column has T replicas. All of all columns move in one batch, each in units of its own rung; the hottest are drawn afresh from
the reference. Then neighbours swap, even pairs at one step and odd ones at the next (`pgen.algorithms.tempering.swaps`), so that the cold
replicas, which are draws of the density, hear of modes that steps never join.

A pilot (`Annealing.climb`) spaces the ladder at equal shares of the length of the route, and says how many rungs it takes: between
rungs that are s apart in that length, about 2 Phi(-s / sqrt 2) of the swaps are accepted. What matters then is the barrier, the sum of
rejection rates, which no number of rungs makes smaller; it is told, with the round trips that were made.

`pgen.algorithms.tempering` is the kernel for vectors with a gradient, which adapts its ladder as it goes.

References:
    Non-Reversible Parallel Tempering: a Scalable Highly Parallel MCMC Scheme (Syed, Bouchard-Côté, Deligiannidis & Doucet, JRSS-B
    2021), arXiv:1905.02939. Exchange Monte Carlo Method and Application to Spin Glass Simulations (Hukushima & Nemoto, Journal of
    the Physical Society of Japan 65, 1996).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.draws import Heard, aim_of, kernels_of
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.route import Tilted, finite
from pgen.algorithms.energy.scaled import Scaled, widths
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density, Moves
from pgen.algorithms.kernels.base import Kernel
from pgen.algorithms.record import record
from pgen.algorithms.tempering import round_trip_rate, swaps

_ROWS = 20_000  # particles of the pilot, of all laws together
_FEW = 50  # of each at least
_LEAST = 32  # columns: step sizes follow what all of them accept


class Columns(NamedTuple):
    """C columns of T replicas.

    Attributes:
        position: hot to cold, `[T, C, *event]`.
        parity: whether odd pairs are to swap next, `[1]`.
        from_hot: whether the replica was last at the hot end, not at the cold one, `[C, T]`.
        trips: arrivals at the cold end from the hot one so far, `[C]`.
    """

    position: Tensor
    parity: Tensor
    from_hot: Tensor
    trips: Tensor


class Tempered(NamedTuple):
    """Draws, and how well replicas travelled while they were made and in the second half of the warm-up.

    Attributes:
        position: `[n, *event]`; draw i is of column i mod C.
        beta: inverse temperatures, `[T]`.
        step_size: at the last T - 1 of them, in standard deviations of the reference, `[T - 1]`.
        accept: mean acceptance of the kernel there, `[T - 1]`.
        rejection: mean rejection rate of swaps between neighbours, `[T - 1]`; its sum is the barrier.
        trips: of each column from the hot end to the cold one, `[C]`.
        steps: in which they were made.
    """

    position: Tensor
    beta: Tensor
    step_size: Tensor
    accept: Tensor
    rejection: Tensor
    trips: Tensor
    steps: int

    @property
    def ideal_trips(self) -> Tensor:
        """Round trips of a column to be had with these rejection rates, if replicas forgot at every rung where they were, `[]`."""
        return self.steps * round_trip_rate(self.rejection)


@dataclass(frozen=True)
class TemperedRun:
    """Draws by parallel tempering.

    Attributes:
        columns: at most so many side by side; each gives as many draws as it takes.
        warmup: steps before the first draw.
        thin: steps between two draws of a column.
        steps: of the kernels between swaps.
        spacing: of the rungs in the length of the route; 0.75 accepts about 0.6 of the swaps.
        most: temperatures, however long the route.
        pilot: what measures it.
        continuous: kernel for what is measured; MALA by default.
        discrete: kernel for what is counted, or its class; see `LongRun`.

    Raises:
        ValueError: a setting is out of its range.
        RuntimeError: (when drawn) the pilot did not arrive.

    Example:
        Two modes, of weights 0.2 and 0.8; all columns begin in the lighter one.

        >>> from torch.distributions import constraints
        >>> from pgen.algorithms.energy.reference import Reference
        >>> def f(x): return torch.logaddexp(-(x + 6).square() / 2, math.log(4) - (x - 6).square() / 2).sum(-1)
        >>> space = Space.of(constraints.real, (1,))
        >>> _ = torch.manual_seed(0)
        >>> wide = Reference(8 * torch.randn(1000, 1), space)
        >>> found = TemperedRun().run(f, wide, space, 500, start=torch.full((500, 1), -6.0))
        >>> bool(((found.position < 0).double().mean() - 0.2).abs() < 0.1)
        True
    """

    columns: int = 500
    warmup: int = 100
    thin: int = 10
    steps: int = 2
    spacing: float = 0.75
    most: int = 64
    pilot: Annealing = Annealing(keep=0.9, moves=1)  # noqa: RUF009 - frozen
    continuous: Kernel | None = None
    discrete: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("columns", 1), ("warmup", 0), ("thin", 1), ("steps", 1), ("most", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        if not self.spacing > 0:
            raise ValueError(f"spacing is positive, got {self.spacing}")

    def __call__(self, f: Density, reference: Law, space: Space, n: int, *, laws: int = 1) -> Tensor:
        """Draws `[n, *event]`; see `run`."""
        return self.run(f, reference, space, n, laws=laws).position

    def run(
        self,
        f: Density,
        reference: Law,
        space: Space,
        n: int,
        *,
        laws: int = 1,
        start: Tensor | None = None,
    ) -> Tempered:
        """Draws, and how they came about.

        Args:
            f: log density up to a constant, rows to numbers.
            reference: at the hot end; normalised, as wide as the density or wider.
            space: of the values.
            n: draws, a multiple of `laws`.
            laws: how many densities `f` is: row i is of the one numbered i mod `laws`, as are draws. Each draw then has a
                column of its own.
            start: where columns begin, `[C, *event]`, all replicas of one at the same place; None: where the pilot arrived.
        """
        wide = widths(reference, space, laws)
        continuous, discrete = kernels_of(space, self.continuous, self.discrete)
        aim = None if continuous is None else aim_of(continuous)
        with torch.no_grad():
            beta, size, cloud = self._ladder(f, reference, space, laws, wide)
            columns = n if laws > 1 else max(_LEAST, min(n, self.columns))
            if start is None:
                start = cloud[torch.randint(len(cloud), (columns // laws,), device=cloud.device)].flatten(
                    0, 1
                )
            columns, count = len(start), len(beta)
            hot = torch.arange(count, device=beta.device).expand(columns, count) == 0
            parity = torch.zeros(1, dtype=torch.long, device=beta.device)
            trips = torch.zeros(columns, dtype=torch.long, device=beta.device)
            state = Columns(start.expand(count, *start.shape).contiguous(), parity, hot, trips)

            def step(state: Columns, size: Tensor) -> tuple[Columns, Tensor, Tensor]:
                return self._step(state, beta, size, f, reference, space, wide, continuous, discrete)

            step = record(step)  # type: ignore[assignment]
            told, kept, before = list[tuple[Tensor, Tensor]](), list[Tensor](), trips
            for i in range(self.warmup):
                if i == self.warmup // 2:
                    told, before = list[tuple[Tensor, Tensor]](), state.trips
                state, accept, rejection = step(state, size)
                told.append((accept, rejection))
                if aim is not None:
                    size = size * ((i + 1) ** -0.5 * (accept - aim)).exp()
            kept.append(state.position[-1])
            while sum(map(len, kept)) < n:
                for _ in range(self.thin):
                    state, accept, rejection = step(state, size)
                    told.append((accept, rejection))
                kept.append(state.position[-1])
        if not told:
            told = [(torch.ones_like(size), torch.ones_like(size))]
        accepts, rejections = (torch.stack(part).mean(0) for part in zip(*told, strict=True))
        return Tempered(torch.cat(kept)[:n], beta, size, accepts, rejections, state.trips - before, len(told))

    def _ladder(
        self, f: Density, reference: Law, space: Space, laws: int, wide: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse temperatures `[T]`, step sizes at the last T - 1, and where the pilot arrived, `[P, laws, *event]`."""
        continuous, discrete = kernels_of(space, self.continuous, self.discrete)
        aim = None if continuous is None else aim_of(continuous)
        frame: Any = Scaled(space, wide)
        particles = self.pilot.pilot if laws == 1 else max(_FEW, min(self.pilot.pilot, _ROWS // laws))
        pilot = replace(self.pilot, pilot=particles)
        climb = pilot.climb(
            Tilted(reference, f, Moves(frame, continuous, discrete, self.steps, aim)), laws=laws
        )
        rungs = min(self.most - 1, max(1, math.ceil(float(climb.length[-1]) / self.spacing)))
        beta, size = climb.ladder(rungs)
        return beta, size, climb.position.unflatten(0, (particles, laws))

    def _step(
        self,
        state: Columns,
        beta: Tensor,
        size: Tensor,
        f: Density,
        reference: Law,
        space: Space,
        wide: Tensor,
        continuous: Kernel | None,
        discrete: Any,
    ) -> tuple[Columns, Tensor, Tensor]:
        """Every replica moves, then some swap; also the acceptance and the rejection rates, `[T - 1]` each."""
        position, parity, from_hot, trips = state
        count, columns = position.shape[:2]
        # Rows rung by rung: row i is of column i mod C, and so of law i mod `laws`.
        warmth = beta[1:].repeat_interleave(columns)
        units = wide.repeat(columns // len(wide), 1) * size.reshape(-1, 1, 1)

        def tilted(x: Tensor) -> Tensor:
            share = warmth.repeat(len(x) // len(warmth))
            return (1 - share) * reference.log_prob(x) + share * f(x)

        heard = None if continuous is None else Heard(continuous)
        frame: Any = Scaled(space, units.flatten(0, 1))
        moves = Moves(frame, heard, discrete, self.steps)
        moved = moves(position[1:].flatten(0, 1), tilted, torch.ones_like(beta[0])).position
        x = torch.cat([reference.sample(columns).to(moved), moved])
        accept = torch.ones_like(size) if heard is None else heard.accept.reshape(count - 1, columns).mean(1)

        ratio = finite(f(x) - reference.log_prob(x)).reshape(count, columns)
        index, rejection = swaps(ratio.mT, beta, parity)
        x = x.reshape(position.shape)
        there = index.mT.reshape(count, columns, *(1,) * (x.dim() - 2)).expand(x.shape)
        from_hot = from_hot.gather(1, index)
        trips = trips + from_hot[:, -1]
        ends = torch.zeros_like(from_hot[:, :1])
        from_hot = torch.cat([~ends, from_hot[:, 1:-1], ends], 1)
        return Columns(x.gather(0, there), 1 - parity, from_hot, trips), accept, rejection.mean(0)
