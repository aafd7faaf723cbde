r"""The warm-up of ChEES-HMC: scale, step size and trajectory length, each of them from all chains at once.

Every iteration is followed by

- a step of dual averaging for the step size, towards a mean acceptance probability;
- a step of Adam up the ChEES criterion for the length T. Chain by chain its gradient by log T is, whitened,
  :math:`t\, (|x' - E x'|^2 - |x - E x|^2)\; (x' - E x') \cdot p'`, for a trajectory that took the time t from x to
  x' and got there with momentum p'; the average over chains is weighted by acceptance probability.

At the end of windows the scale is estimated anew: from positions and gradients of one iteration while chains are on
their way, later from the draws of the window. Step sizes are in whitened units and stay of order 1, so that their search
begins anew where it was.

With 64 chains or more, a hundred iterations tell more than a thousand of four chains.

The paper pools acceptance by the harmonic mean. One chain in a funnel's neck then rules the steps of all; the
arithmetic mean is the default here.

References:
    An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo (Hoffman, Radul & Sountsov,
    AISTATS 2021): algorithm 1 and section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.adaptation.metric import (
    Moments,
    Spread,
    arrived,
    curvature,
    gathered,
    lost,
    matched,
    nothing,
    scale_of,
)
from pgen.algorithms.adaptation.step_size import Averaging, DualAveraging, averaged, crossing
from pgen.algorithms.kernels.base import Info, LogDensity, Tuning
from pgen.algorithms.kernels.chees import ChEES, Runner
from pgen.algorithms.kernels.hmc import Phase
from pgen.algorithms.kernels.iterate import Wrap, unwrapped

FIRST = 2.0  # length to begin with: near the best for a normal target
#: Parts of the warm-up after which the scale is made from gradients, and chains that are lost begin anew.
ARRIVALS = (1 / 16, 1 / 8, 3 / 16)
WINDOWS = (1 / 4, 1 / 2, 4 / 5)  # the scale from the draws since the last one
SETTLED = 1 / 4  # from here on the length is learnt: on its way to typical places it would run off
EARLY = 4  # strides at most before the first of these, and twice as many after each
PORTION = 64  # iterations of draws in memory


class LengthSearch(NamedTuple):
    """Adam on the logarithm of the trajectory length; `[]` each.

    Attributes:
        count: iterations since the average began.
        square: running mean of squared gradients.
        log_length: to be tried next.
        average: of what was tried; the result.
    """

    count: Tensor
    square: Tensor
    log_length: Tensor
    average: Tensor


class Learnt(NamedTuple):
    """A warm-up on its way: tensors only, so that it can be saved and go on elsewhere.

    Attributes:
        state: of the chains.
        tuning: in force.
        step: the search for the step size.
        length: the search for the trajectory length.
        draws: moments of positions in the window in progress.
        slopes: moments of gradients in it.
        iteration: `[]`; how many are done.
    """

    state: Runner
    tuning: Tuning
    step: Averaging
    length: LengthSearch
    draws: Moments
    slopes: Moments
    iteration: Tensor


@dataclass(frozen=True)
class ChEESWarmup:
    """Learns the tuning of `ChEES` from all chains together.

        learnt = warmup.begin(position, target)
        learnt = warmup.advance(learnt, target, 100, wrap)      # in blocks of any size
        state, tuning = warmup.finish(learnt)

    Attributes:
        kernel: what to warm up.
        iterations: of the whole warm-up; the windows are parts of it.
        accept: acceptance probability to aim at, in the mean over chains.
        harmonic: take the harmonic mean, as in the paper (which aims at 0.651), and not the arithmetic one.
        learning_rate: of Adam, by which log T changes in an iteration.
        thrift: κ; what is climbed is ChEES / T^κ. 0 in the paper; 1 would be ChEES for its price. Some thrift keeps T
            from the plateau beyond the first maximum.
        dense: whether the scale is a Cholesky factor or standard deviations.
        longest: bound of T. In a funnel the criterion has no end.
        widest: bound of a stride in whitened units; beyond it the integrator gains nothing, and may become unstable.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> target = lambda q: (-(q / 5).square().sum(-1) / 2, -q / 25)  # standard deviations 5
        >>> warmup = ChEESWarmup(ChEES(), iterations=100)
        >>> learnt = warmup.begin(torch.randn(64, 2), target)
        >>> state, tuning = warmup.finish(warmup.advance(learnt, target, 100))
        >>> bool(((tuning.scale.diagonal() / 5 - 1).abs() < 0.15).all())
        True
    """

    kernel: ChEES
    iterations: int = 100
    accept: float = 0.8
    harmonic: bool = False
    learning_rate: float = 0.05
    thrift: float = 0.5
    dense: bool = True
    longest: float = 20.0
    widest: float = 1.7

    def __post_init__(self) -> None:
        """Refuse what adapts nothing."""
        if self.iterations < 1:
            raise ValueError(f"ChEESWarmup(iterations={self.iterations}): expected at least 1")
        if not 0 < self.accept < 1:
            raise ValueError(f"ChEESWarmup(accept={self.accept}): expected a probability between 0 and 1")
        for name in ("learning_rate", "longest", "widest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ChEESWarmup({name}={getattr(self, name)}): expected a positive number")

    def begin(self, position: Tensor, target: LogDensity, scale: Tensor | None = None) -> Learnt:
        """Before the first iteration, at positions `[C, d]`.

        Args:
            position: where the chains start; best where the density is not far from typical.
            target: the log density and its gradient.
            scale: a first guess, such as Pathfinder's; if there is none, from gradients at the positions.
        """
        state = self.kernel.init(position, target)
        state = resettled(state, target)
        if scale is None:
            scale = trusted(curvature(state.position, state.gradient, self.dense), self.dense)
        scale = shaped(scale, self.dense)
        one = position.new_ones(())
        guess = crossing(state.chains, scale, target, one).clamp(max=self.widest)
        length = LengthSearch(0 * one, 0 * one, (FIRST * one).log(), (FIRST * one).log())
        return Learnt(
            state,
            Tuning(guess, scale, FIRST * one),
            self._rule.init(guess),
            length,
            nothing(position, self.dense),
            nothing(position, self.dense),
            torch.zeros((), dtype=torch.int64, device=position.device),
        )

    def advance(self, learnt: Learnt, target: LogDensity, iterations: int, wrap: Wrap = unwrapped) -> Learnt:
        """So many iterations more, or up to the end; waits for the device once in each.

        Args:
            learnt: what the last block gave, or `begin`.
            target: the log density and its gradient.
            iterations: how many.
            wrap: as in `ChEES.run`.
        """
        pieces, learn = self.kernel.pieces(target, wrap), wrap(self._learn)
        done, first = torch.stack([learnt.iteration, learnt.state.iteration]).tolist()
        accept, settled = (
            learnt.step.log_step.new_tensor(x) for x in (self.accept, SETTLED * self.iterations)
        )
        last = min(done + iterations, self.iterations)
        seen: list[Runner] = []
        for i in range(done, last):
            tuning = learnt.tuning
            strides = self.kernel.strides(first + i - done, float(tuning.length / tuning.step_size))
            strides = min(strides, EARLY << sum(end <= i for end in (*self.arrivals, *self.windows)))
            state, info, begin, end = self.kernel.travel(learnt.state, tuning, pieces, strides)
            tuning, step, length = learn(
                tuning, learnt.step, learnt.length, accept, learnt.iteration >= settled, begin, end, info
            )
            learnt = learnt._replace(
                state=state, tuning=tuning, step=step, length=length, iteration=learnt.iteration + 1
            )
            seen.append(state)
            if len(seen) == PORTION or i + 1 == last or i + 1 in self.windows:
                there = arrived(state.log_density)
                learnt = learnt._replace(
                    draws=gathered(learnt.draws, torch.stack([s.position for s in seen]), there),
                    slopes=gathered(learnt.slopes, torch.stack([s.gradient for s in seen]), there),
                )
                seen = []
            if i + 1 in self.arrivals:
                learnt = self._arrived(learnt, target)
                seen.clear()
            elif i + 1 in self.windows:
                found = matched(learnt.draws, learnt.slopes)
                state = resettled(learnt.state, target)
                learnt = self._rescaled(learnt._replace(state=state), found)
        return learnt

    def finish(self, learnt: Learnt) -> tuple[Runner, Tuning]:
        """The state of the chains, and the tuning to sample with: averages of what was tried."""
        step_size = learnt.step.averaged.clamp(max=self.widest)
        length = torch.maximum(learnt.length.average.exp(), step_size)
        return learnt.state, Tuning(step_size, learnt.tuning.scale, length)

    @property
    def arrivals(self) -> tuple[int, ...]:
        """The iterations after which gradients give the scale."""
        return milestones(self.iterations, ARRIVALS)

    @property
    def windows(self) -> tuple[int, ...]:
        """The iterations after which draws give the scale."""
        return milestones(self.iterations, WINDOWS)

    @property
    def _rule(self) -> DualAveraging:
        return DualAveraging(self.accept)

    @property
    def _learn(self) -> Learn:
        return Learn(self.harmonic, self.learning_rate, self.thrift, self.longest, self.widest)

    def _arrived(self, learnt: Learnt, target: LogDensity) -> Learnt:
        """Chains that are lost go where others are, and the scale comes from where those are."""
        state = resettled(learnt.state, target)
        found = curvature(state.position, state.gradient, self.dense)
        return self._rescaled(learnt._replace(state=state), found)

    def _rescaled(self, learnt: Learnt, found: Spread) -> Learnt:
        """A new scale, and the searches begun anew where they are."""
        scale = trusted(found, self.dense)
        step_size = learnt.step.averaged.clamp(max=self.widest)
        search = learnt.length
        return learnt._replace(
            tuning=Tuning(step_size, scale, learnt.tuning.length),
            step=self._rule.init(step_size),
            length=search._replace(count=torch.zeros_like(search.count), average=search.log_length),
            draws=nothing(learnt.state.position, self.dense),
            slopes=nothing(learnt.state.position, self.dense),
        )


@dataclass(frozen=True)
class Learn:
    """What is learnt from one iteration of all chains; straight-line code.

    The attributes are those of `ChEESWarmup` of the same names.
    """

    harmonic: bool
    learning_rate: float
    thrift: float
    longest: float
    widest: float

    def __call__(
        self,
        tuning: Tuning,
        step: Averaging,
        length: LengthSearch,
        wanted: Tensor,
        settled: Tensor,
        begin: Phase,
        end: Phase,
        info: Info,
    ) -> tuple[Tuning, Averaging, LengthSearch]:
        """Tuning and searches a step on; `wanted` is the acceptance to aim at, and the length changes if `settled`."""
        accept = 1 / (1 / info.accept).mean() if self.harmonic else info.accept.mean()
        step = averaged(step, wanted, accept)
        step_size = step.step_size.clamp(max=self.widest)
        length = self._length(length, tuning, settled, begin, end, info)
        longest = torch.maximum(length.log_length.exp(), step_size)  # at least a stride
        return Tuning(step_size, tuning.scale, longest), step, length

    def _length(
        self, search: LengthSearch, tuning: Tuning, settled: Tensor, begin: Phase, end: Phase, info: Info
    ) -> LengthSearch:
        """Adam, without momentum, on an estimate of the gradient of ChEES by log T."""
        weight = info.accept / info.accept.sum().clamp(min=torch.finfo(info.accept.dtype).tiny)
        sound = (info.accept > 0).unsqueeze(-1)
        landed = torch.where(sound, end.position, begin.position)
        off = torch.cat([begin.position - begin.position.mean(0), landed - weight @ landed])
        before, after = whitened(tuning.scale, off).chunk(2)
        gain = after.square().sum(-1) - before.square().sum(-1)
        time = tuning.step_size * info.evaluations / 2
        outward = (after * torch.where(sound, end.momentum, 0.0)).sum(-1)
        slope = weight @ (time * gain * outward - self.thrift / 4 * gain.square())
        count = search.count + 1
        square = torch.where(
            search.square > 0, torch.lerp(slope.square(), search.square, 0.95), slope.square()
        )
        rate = slope / (square.sqrt() + torch.finfo(slope.dtype).tiny)
        log_length = search.log_length + settled * self.learning_rate * rate
        # Shorter than a stride makes no difference, and the way back would be long.
        log_length = torch.maximum(log_length, tuning.step_size.log()).clamp(max=math.log(self.longest))
        average = torch.lerp(search.average, log_length, count**-0.5)
        return LengthSearch(count, square, log_length, average)


# --- shared with other warm-ups ---


def milestones(iterations: int, parts: tuple[float, ...]) -> tuple[int, ...]:
    """Parts of a number of iterations, at least 1 each.

    Example:
        >>> milestones(100, (1 / 8, 1 / 2))
        (12, 50)
    """
    return tuple(max(round(part * iterations), 1) for part in parts)


def trusted(found: Spread, dense: bool) -> Tensor:
    """The scale of a covariance, of the shape wanted."""
    return shaped(scale_of(found, dense), dense)


def shaped(scale: Tensor, dense: bool) -> Tensor:
    """The scale as `[d, d]` if dense, else as `[d]`: of one shape and layout, for one recording."""
    if dense and scale.dim() == 1:
        return torch.diag(scale)
    return scale.norm(dim=-1) if scale.dim() == 2 and not dense else scale.contiguous()


def resettled(state: Any, target: LogDensity) -> Any:
    """A state whose `lost` chains are where others are, chosen at random.

    Densities and gradients are computed anew: each chain may have a target of its own.
    """
    away = lost(state.log_density)
    if bool(away.all()) or not bool(away.any()):
        return state
    home = (~away).nonzero().squeeze(-1)
    source = torch.arange(len(away), device=away.device)
    source[away] = home[torch.randint(len(home), (int(away.sum()),), device=away.device)]
    moved = type(state)(*(field[source] if field.dim() else field for field in state))
    log_density, gradient = target(moved.position)
    return moved._replace(log_density=log_density, gradient=gradient)


def whitened(scale: Tensor, vectors: Tensor) -> Tensor:
    """Vectors `[..., d]` of the position's coordinates in whitened ones."""
    return (
        vectors / scale
        if scale.dim() == 1
        else torch.linalg.solve_triangular(scale, vectors.mT, upper=False).mT
    )
