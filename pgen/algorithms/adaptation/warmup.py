r"""Warm-up: find where the mass is, learn its scale, choose the step size; with all chains together.

    search      few iterations of bounded length; then chains that have not arrived begin anew beside one that has
    windows     each longer than the last; at its end the scale is estimated anew, the step size adapted anew
    settling    the step size alone

Stan's 1,000 iterations teach one chain. Here every estimate pools hundreds, so windows are short. Until chains have mixed,
draws say more about where they began than about the target; so the early scales come from gradients too (`curvature`).

Warm-up is a sequence of blocks. In a block nothing is adapted, so chains need not wait for each other. The state between
blocks is a tuple of tensors and one number, and holds all there is: what is stopped there goes on bit for bit.

References: Stan Reference Manual, HMC algorithm parameters (warm-up in windows). The No-U-Turn Sampler (Hoffman & Gelman,
2014). `metric.py` and `step_size.py` for their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pgen.algorithms.adaptation.metric import (
    Moments,
    covariance,
    curvature,
    gathered,
    lost,
    nothing,
    scale_of,
)
from pgen.algorithms.adaptation.step_size import Averaging, DualAveraging, crossing
from pgen.algorithms.kernels.base import Kernel, LogDensity, Tuning, untuned
from pgen.algorithms.kernels.hmc import HMC, State
from pgen.algorithms.kernels.iterate import Wrap, iterate, unwrapped
from pgen.algorithms.kernels.nuts import NUTS

Metric = Literal["auto", "dense", "diagonal", "unit"]
LARGEST_DENSE = 200  # dimensions: beyond, a d × d product per leapfrog step costs more than it saves


class Block(NamedTuple):
    """A stretch of iterations with one tuning.

    Attributes:
        length: iterations.
        window: which window it belongs to; 0 is the search.
        ends: what happens after it: "" nothing, "scale" a window ends, "all" warm-up ends.
        depth: bound on the depth of trees.
    """

    length: int
    window: int
    ends: str
    depth: int


class Adapted(NamedTuple):
    """Where warm-up stands.

    Attributes:
        state: the kernel's.
        tuning: for the next block; after the last, to sample with.
        averaging: of the step size.
        moments: of the draws of this window.
        points: `[m, 2d]`; positions at the ends of blocks of this window, and gradients there.
        pace: `[C, 1]`; the share of the common step size that a chain takes. Below 1 where a chain could not move at all:
            it fell into a narrow place on its way, and shall find out.
        block: how many blocks are done.
    """

    state: Any
    tuning: Tuning
    averaging: Averaging
    moments: Moments
    points: Tensor
    pace: Tensor
    block: int


@dataclass(frozen=True)
class Warmup:
    """Warm-up of a kernel: its step size and the scale of the target.

    For any kernel whose state begins with the position, and whose `Info.accept` rises as the step size falls.

    Attributes:
        kernel: the kernel.
        iterations: of every chain. 150 serve 64 chains and more; a handful of chains takes 600 to 1,000, as in Stan.
        accept: acceptance probability to aim at; see `DualAveraging`.
        metric: "dense" (correlations too), "diagonal", "unit" (the step size alone is adapted), or "auto": dense up to
            200 dimensions, where the draws show correlations that are worth it.

    Example:
        >>> from pgen.algorithms.kernels.nuts import NUTS
        >>> def normal(q): return -0.5 * (q / 100).square().sum(-1), -q / 100**2
        >>> _ = torch.manual_seed(0)
        >>> warmup = Warmup(NUTS(), iterations=60)
        >>> at = warmup.advance(warmup.init(torch.randn(64, 2), normal), normal, len(warmup.plan))
        >>> bool((at.tuning.scale - 100).abs().max() < 10)
        True
    """

    kernel: Kernel
    iterations: int = 150
    accept: float = 0.8
    metric: Metric = "auto"

    def __post_init__(self) -> None:
        if self.iterations < 20:
            raise ValueError(f"Warmup(iterations=...) is at least 20, got {self.iterations}")
        if self.metric not in (known := get_args(Metric)):
            raise ValueError(f"Warmup(metric=...) is one of {', '.join(known)}; got {self.metric!r}")
        DualAveraging(self.accept)  # refuses what is no probability

    @cached_property
    def plan(self) -> tuple[Block, ...]:
        """The blocks. Those at the beginning of a window are short, as its step size is yet to be found.

        Where chains do not wait for each other within an iteration, all blocks are of one.
        """
        search, settling = max(8, self.iterations // 16), max(8, self.iterations // 6)
        windows = [search]
        left = self.iterations - search - settling
        while left:
            length = min(left, int(1.7 * windows[-1]))
            windows.append(length if left - length >= 1.7 * length else left)
            left -= windows[-1]
        blocks: list[Block] = []
        for window, length in enumerate([*windows, settling]):
            depth = _FIRST_DEPTH + 2 * window
            parts = _parts(length) if hasattr(self.kernel, "run") else [1] * length
            blocks += [Block(part, window, "", depth) for part in parts[:-1]]
            blocks.append(Block(parts[-1], window, "scale" if window < len(windows) else "all", depth))
        return tuple(blocks)

    def init(self, position: Tensor, target: LogDensity, tuning: Tuning | None = None) -> Adapted:
        """Where warm-up begins: chains at `position` `[C, d]`; `tuning` as a first guess."""
        guess = untuned(position) if tuning is None else tuning
        _, gradient = target(position)
        if tuning is None and self.metric != "unit":
            guess = guess._replace(scale=scale_of(curvature(position, gradient, dense=False)))
        return self._anew(self.kernel.init(position, target), guess, target, 0)

    def finished(self, at: Adapted) -> bool:
        """Whether `at.tuning` is ready to sample with."""
        return at.block >= len(self.plan)

    def advance(
        self,
        at: Adapted,
        target: LogDensity,
        blocks: int = 1,
        wrap: Wrap = unwrapped,
        progress: Callable[[Adapted], None] | None = None,
    ) -> Adapted:
        """The next `blocks` blocks of the plan, or as many as are left.

        Args:
            at: where warm-up stands.
            target: the log density and its gradient.
            blocks: how many; `len(warmup.plan)` for all.
            wrap: see `iterate`.
            progress: called after every block.
        """
        for _ in range(min(blocks, len(self.plan) - at.block)):
            at = self._block(at, target, wrap)
            if progress is not None:
                progress(at)
        return at

    def _block(self, at: Adapted, target: LogDensity, wrap: Wrap) -> Adapted:
        block = self.plan[at.block]
        kernel = _bounded(self.kernel, block.depth)
        tuning = at.tuning
        if isinstance(kernel, (NUTS, HMC)):
            tuning = tuning._replace(step_size=tuning.step_size * at.pace)
        state, draws, info = iterate(kernel, at.state, tuning, target, block.length, wrap)
        log_density, gradient = _known(state, target)
        accept = info.accept.mean(0)
        stuck = accept < _STUCK
        astray = lost(log_density)
        if bool((stuck | astray).float().mean() < 0.5):
            astray = astray | stuck  # else the step size is to blame
        usual = ~astray & (at.pace[:, 0] == 1)
        rule = DualAveraging(self.accept)
        averaging = rule.update(at.averaging, accept[usual].mean() if bool(usual.any()) else accept.mean())
        pace = torch.where(stuck[:, None], at.pace / 4, (at.pace * 2).clamp(max=1.0))
        points = at.points
        if block.window <= _CURVED:
            points = torch.cat([points, torch.cat([state[0], gradient], 1)[~astray]])
        at = Adapted(
            state,
            at.tuning._replace(step_size=averaging.step_size),
            averaging,
            gathered(at.moments, draws, ~astray),
            points,
            pace if block.length > 1 or block.window == 0 else at.pace,
            at.block + 1,
        )
        if block.ends == "all":
            return at._replace(tuning=at.tuning._replace(step_size=averaging.averaged))
        if block.ends == "scale":
            if block.window == 0:
                arrived = _restarted(state[0], log_density)
                at = at._replace(
                    state=self.kernel.init(arrived, target), points=at.points[-int((~astray).sum()) :]
                )
            tuning = at.tuning._replace(step_size=averaging.averaged)
            return self._anew(
                at.state, tuning._replace(scale=self._scale(at, block.window)), target, at.block
            )
        return at

    def _scale(self, at: Adapted, window: int) -> Tensor:
        d = at.points.shape[1] // 2
        if self.metric == "unit":
            return at.tuning.scale
        dense = {"auto": None, "dense": True, "diagonal": False}[self.metric]
        if window <= _CURVED:
            return scale_of(curvature(at.points[:, :d], at.points[:, d:], self._dense(d)), dense)
        return scale_of(covariance(at.moments), dense)

    def _dense(self, d: int) -> bool:
        return self.metric == "dense" or (self.metric == "auto" and d <= LARGEST_DENSE)

    def _anew(
        self, state: Any, tuning: Tuning, target: LogDensity, block: int, pace: Tensor | None = None
    ) -> Adapted:
        """A window begins: nothing is known about its draws, and its step size is to be found."""
        position = state[0]
        start = State(position, *_known(state, target))
        step_size = crossing(start, tuning.scale, target, tuning.step_size, self.accept)
        averaging = DualAveraging(self.accept).init(step_size)
        d = position.shape[1]
        return Adapted(
            state,
            tuning._replace(step_size=step_size),
            averaging,
            nothing(position, self._dense(d)),
            position.new_empty(0, 2 * d),
            torch.ones_like(position[:, :1]) if pace is None else pace,
            block,
        )


_FIRST_DEPTH = 6
_STUCK = 0.05  # acceptance probability, over a block: such a chain does not move
_CURVED = 1  # windows up to this one ask the gradients for the scale


def _parts(length: int) -> list[int]:
    """Lengths of blocks that make up a window: 1, 1, 1, 2, 2, 3, 4, 5, 6, 8, ..."""
    parts: list[int] = []
    while sum(parts) < length:
        parts.append(min(max(1, round(sum(parts) / 4)), 10, length - sum(parts)))
    return parts


def _known(state: Any, target: LogDensity) -> tuple[Tensor, Tensor]:
    """Log density and gradient where the chains are; most kernels keep them."""
    if hasattr(state, "log_density") and hasattr(state, "gradient"):
        return state.log_density, state.gradient
    return target(state[0])


def _bounded(kernel: Kernel, depth: int) -> Kernel:
    """The kernel with trees of bounded depth, if it grows trees."""
    if isinstance(kernel, NUTS) and kernel.max_depth > depth:
        return replace(kernel, max_depth=depth)
    return kernel


def _restarted(position: Tensor, log_density: Tensor) -> Tensor:
    """Positions `[C, d]`, with those of chains that are far from arriving replaced by those of others.

    Only where the log density is beyond doubt too low: what differs less may be a mode of its own.
    """
    d = position.shape[1]
    astray = lost(log_density, slack=5.0 + d / 2)
    if not bool(astray.any()) or bool(astray.all()):
        return position
    others = (~astray).nonzero().squeeze(-1)
    chosen = others[torch.randint(len(others), astray.shape, device=position.device)]
    return torch.where(astray[:, None], position[chosen], position)
