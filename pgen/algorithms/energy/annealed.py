r"""Partition functions by annealing, with any walk, on any space: first adapt, then measure.

    climb     a pilot cloud goes up the route, resampled on the way; it finds the step sizes, and how far it is from one end to
              the other: the length  int sqrt(Var_beta[d log f_beta / d beta]) d beta
    ladder    rungs at equal shares of that length. With chains that mix, n rungs give log weights of variance length^2 / n
    trial     a few chains up that ladder tell the variance there is; more rungs where it is too large
    ascend    fresh chains up the fixed ladder: their weights have expectation Z, whatever was adapted before
    descend   draws of the density down the same ladder, by the moves reversed in time

`pgen.algorithms.annealing` has the same algorithms for densities of unconstrained vectors and kernels with gradients, a scale
adapted with them.

References:
    Annealed importance sampling (Neal, Statistics and Computing 2001), arXiv:physics/9803008. Annealing between distributions
    by averaging moments (Grosse, Maddison & Salakhutdinov, NIPS 2013): the length of a route. Toward automatic model
    comparison (Zhou, Johansen & Aston, JCGS 2016), arXiv:1303.3123: steps by the conditional effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.annealing import Annealed, next_beta, systematic
from pgen.algorithms.energy.partition import Partition, partition_of
from pgen.algorithms.energy.route import Route
from pgen.algorithms.path import Recorder
from pgen.algorithms.progress import followed
from pgen.algorithms.record import record


class Rungs(NamedTuple):
    """A ladder.

    Attributes:
        beta: `[n + 1]`, rising from 0 to 1.
        step_size: of the walk at the last n of them, `[n]`.
    """

    beta: Tensor
    step_size: Tensor


class Climb(NamedTuple):
    """What the pilot found.

    Attributes:
        position: `[P, *event]`, nearly draws of the density.
        beta: where it stopped on the way, `[k + 1]`, from 0 to 1.
        step_size: at the last k of them, `[k]`.
        length: from 0 to each, `[k + 1]`.
        accept: mean acceptance at the last k of them, `[k]`.
    """

    position: Tensor
    beta: Tensor
    step_size: Tensor
    length: Tensor
    accept: Tensor

    def ladder(self, rungs: int) -> Rungs:
        """So many rungs, at equal shares of the length."""
        share = torch.linspace(0, 1, rungs + 1, dtype=torch.float64, device=self.beta.device)
        place = self.length.double() / self.length[-1].double()
        beta = interpolated(share, place, self.beta.double()).to(self.beta.dtype)
        beta[0], beta[-1] = 0, 1
        sizes = torch.cat([self.step_size[:1], self.step_size]).double().log()
        return Rungs(beta, interpolated(share, place, sizes).exp()[1:].to(self.beta.dtype))


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling in one or both directions, along a ladder that it finds itself.

    Args:
        chains: that go up.
        spread: standard deviation of log weights to aim at; the error of log Z is then about `spread / sqrt(chains)`.
        least: rungs.
        most: rungs, however large the spread.
        pilot: particles that find the ladder.
        trial: chains that find the number of rungs.
        keep: fraction of the conditional effective sample size that a step of the pilot keeps, in (0, 1).
        moves: calls of the walk at each step of the pilot.
        step_size: of the walk, to begin with; adapted where the walk has a `target_accept`.
        longest: steps of the pilot after which to give up.

    Raises:
        ValueError: a setting is out of its range.
        RuntimeError: the pilot did not arrive.

    Example:
        A normal density whose Z is known, from a wider one.

        >>> from torch.distributions import constraints
        >>> from pgen.algorithms.energy.reference import Reference
        >>> from pgen.algorithms.energy.route import Tilted
        >>> from pgen.algorithms.energy.space import Space
        >>> from pgen.algorithms.energy.walks import Usual
        >>> _ = torch.manual_seed(0)
        >>> space = Space.of(constraints.real, (2,))
        >>> wide = Reference(2 * torch.randn(100, 2), space)
        >>> found = Annealing(chains=1000).run(Tilted(wide, lambda x: -x.square().sum(-1) / 2, Usual(space).walk()))
        >>> bool((found.log_z - math.log(2 * math.pi)).abs() < 4 * found.stderr)
        True
    """

    chains: int = 2000
    spread: float = 0.5
    least: int = 20
    most: int = 2000
    pilot: int = 500
    trial: int = 200
    keep: float = 0.8
    moves: int = 3
    step_size: float = 0.3
    longest: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (
            ("chains", 2),
            ("least", 1),
            ("pilot", 10),
            ("trial", 10),
            ("moves", 1),
            ("longest", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (0 < self.keep < 1 and self.spread > 0 and self.step_size > 0 and self.most >= self.least):
            raise ValueError(
                f"keep is between 0 and 1, spread and step_size are positive, most >= least; got keep={self.keep}, "
                f"spread={self.spread}, step_size={self.step_size}, least={self.least}, most={self.most}"
            )

    def run(
        self,
        route: Route,
        draws: Tensor | None = None,
        *,
        laws: int | None = None,
        recorder: Recorder = record,
    ) -> Partition:
        """The partition function of the far end of a route.

        Args:
            route: a `Tilted` or an `Own`.
            draws: `[D, *event]`, independent draws of the density (ends of long chains): they come down, too.
            laws: how many densities the route leads to side by side, row i being of the one numbered i mod `laws`: all by one
                ladder, `chains` chains each (so with draws `[D laws, *event]`). What is found is then `[laws]`.
            recorder: what makes the straight-line parts fast.
        """
        each = 1 if laws is None else laws
        climb = self.climb(route, laws=each, recorder=recorder)
        step = recorder(partial(_up, route))
        rungs, tried = min(self.most, max(self.least, math.ceil((climb.length[-1] / self.spread) ** 2))), 0
        for _ in range(3):
            found = self._rise(route, step, climb.ladder(rungs), self.trial * each)
            tried += rungs * self.trial * each
            over = float(found.log_weight.reshape(-1, each).std(0).max() / self.spread) ** 2
            if over < 1.5 or rungs == self.most:
                break
            rungs = min(self.most, math.ceil(rungs * min(over, 10.0)))
        ladder = climb.ladder(rungs)
        up = self._rise(route, step, ladder, self.chains * each)
        down = None if draws is None else self.descend(route, ladder, draws, recorder=recorder)
        count = self.chains * each + (0 if draws is None else len(draws))
        moves = len(climb.accept) * self.pilot * each * self.moves + tried + rungs * count
        sides = [None if s is None else s.log_weight for s in (up, down)]
        if laws is not None:
            sides = [None if s is None else s.reshape(-1, laws) for s in sides]
        return partition_of(*sides, rungs=rungs, moves=moves)  # type: ignore[arg-type]

    def climb(self, route: Route, *, laws: int = 1, recorder: Recorder = record) -> Climb:
        """A cloud (one of each law) goes up by steps that it makes itself, and reports the way."""
        x, _ = _start(route, self.pilot * laws)
        probe, leave = (
            recorder(partial(_probe, route, self.keep, laws)),
            recorder(partial(_leave, route, self.moves, laws)),
        )
        beta, size = x.new_zeros(()), x.new_tensor(self.step_size)
        betas, sizes, lengths, accepts = [beta], list[Tensor](), [beta], list[Tensor]()
        while bool(beta < 1):
            if len(sizes) == self.longest:
                raise RuntimeError(
                    f"annealing is at inverse temperature {float(beta):.3g} after {self.longest} steps: the reference is too "
                    "far from the density; take a closer one (fitted to chains), lower keep= or raise longest="
                )
            there, length = probe(x, beta)
            x, size, accept = leave(x, beta, there, size)
            beta = there
            for kept, new in zip(
                (betas, sizes, lengths, accepts), (beta, size, lengths[-1] + length, accept)
            ):
                kept.append(new)
        path = torch.stack(lengths)
        # A route that goes nowhere (the density is the reference) still has rungs.
        path = path + 1e-6 * torch.stack(betas)
        return Climb(x, torch.stack(betas), torch.stack(sizes), path, torch.stack(accepts))

    def ascend(self, route: Route, ladder: Rungs, *, recorder: Recorder = record) -> Annealed:
        """Fresh chains up a fixed ladder: `E[exp(log_weight)] = Z`."""
        return self._rise(route, recorder(partial(_up, route)), ladder, self.chains)

    def descend(self, route: Route, ladder: Rungs, draws: Tensor, *, recorder: Recorder = record) -> Annealed:
        """Draws `[D, *event]` of the density down a fixed ladder: `E[exp(-log_weight)] = 1 / Z`, if they are exact."""
        step = recorder(partial(_down, route))
        x, accepts = draws.detach(), list[Tensor]()
        log_weight = torch.zeros(len(x), dtype=torch.float64, device=x.device) + _start(route, 1)[1]
        for t in followed(range(len(ladder.beta) - 1, 0, -1), "annealing down"):
            x, gain, accept = step(x, ladder.beta[t - 1], ladder.beta[t], ladder.step_size[t - 1])
            log_weight = log_weight + gain
            accepts.append(accept)
        return Annealed(x, log_weight, torch.stack(accepts))

    def _rise(self, route: Route, step: Callable[..., Any], ladder: Rungs, chains: int) -> Annealed:
        x, log_z = _start(route, chains)
        log_weight, accepts = log_z.expand(chains), list[Tensor]()
        for t in followed(range(1, len(ladder.beta)), "annealing up"):
            x, gain, accept = step(x, ladder.beta[t - 1], ladder.beta[t], ladder.step_size[t - 1])
            log_weight = log_weight + gain
            accepts.append(accept)
        return Annealed(x, log_weight, torch.stack(accepts))


# --- straight-line parts ---


def _up(
    route: Route, x: Tensor, low: Tensor, high: Tensor, step_size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One rung up: the gain of log weight, then a move there."""
    with torch.no_grad():
        gain = route.gain(x, low, high)
        x, accept = route.move(x, high, step_size)
    return x, gain, accept


def _down(
    route: Route, x: Tensor, low: Tensor, high: Tensor, step_size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One rung down: a move, reversed in time, then what going up from here would gain."""
    with torch.no_grad():
        x, accept = route.move(x, high, step_size, backwards=True)
        return x, route.gain(x, low, high), accept


def _probe(route: Route, keep: float, laws: int, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The next inverse temperature, and the length of the way there."""
    with torch.no_grad():
        small = torch.full_like(beta, 1e-3)
        # The slope ahead, or behind where that is beyond the end.
        low = torch.minimum(beta, 1 - small)
        slope = (route.gain(x, low, low + small) / small).reshape(-1, laws).mT
        level = torch.full_like(slope, -math.log(slope.shape[1]))
        there = next_beta(slope, level, beta, keep)
        return there, (there - beta) * slope.std(1).max()


def _leave(
    route: Route, moves: int, laws: int, x: Tensor, beta: Tensor, there: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Resample each law's cloud by what is gained, and move, the step size following the acceptance."""
    with torch.no_grad():
        gain = route.gain(x, beta, there).reshape(-1, laws).mT
        picked = systematic(gain.log_softmax(1)) * laws + torch.arange(laws, device=x.device).unsqueeze(1)
        x = x[picked.mT.reshape(-1)]
        total = torch.zeros_like(beta)
        for _ in range(moves):
            x, accept = route.move(x, there, size)
            total = total + accept / moves
            if route.target_accept is not None:
                size = size * (accept - route.target_accept).exp()
    return x, size, total


def _start(route: Route, n: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        x, log_z = route.start(n)
    return x.detach(), log_z.detach().double()


def interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear values at `at` of points (x, y), x rising.

    >>> interpolated(torch.tensor([0.25, 2.0]), torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 2.0, 4.0]))
    tensor([0.5000, 3.0000])
    """
    right = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    left = right - 1
    share = ((at - x[left]) / (x[right] - x[left]).clamp_min(1e-300)).clamp(0, 1)
    return torch.lerp(y[left], y[right], share)
