r"""The warm-up of MEADS: everything from the largest eigenvalues, fold by fold.

With :math:`\lambda` the largest eigenvalue of a covariance matrix, of whitened gradients g and positions x, the step size
and the damping at iteration t are

.. math:: \varepsilon = \min\bigl(1,\ \tfrac{1}{2} \lambda(g)^{-1/2}\bigr), \qquad
          \gamma = \max\bigl(\lambda(x)^{-1/2},\ 1 / (t\varepsilon)\bigr)

Chains are in folds, and what moves a fold is read off another, so that no chain steers itself.

Three things differ from the paper. There chains go on adapting while they are sampled, with one fold at rest in each
iteration, which keeps the target invariant; here adaptation ends with the warm-up, its draws do not count, no fold
rests, and what follows is a kernel with fixed tuning. And the scale, which there is a fold's standard deviations at
every iteration, is that of all chains, from `metric.py`, and may be dense. The eigenvalues are estimated without the bias
that few chains give (`largest_eigenvalue`): with 32 chains in 100 dimensions steps are 3.5 times as long, and draws from
as many gradients 4 times as good, as by the paper's estimate.

References:
    Tuning-free generalized Hamiltonian Monte Carlo (Hoffman & Sountsov, AISTATS 2022): algorithm 3 and section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.adaptation.chees import (
    PORTION,
    WINDOWS,
    ChEESWarmup,
    Learnt,
    milestones,
    resettled,
    trusted,
    whitened,
)
from pgen.algorithms.adaptation.metric import Moments, Spread, arrived, gathered, matched, nothing
from pgen.algorithms.kernels.base import LogDensity, Tuning, pull
from pgen.algorithms.kernels.chees import ChEES
from pgen.algorithms.kernels.iterate import Wrap, unwrapped
from pgen.algorithms.kernels.meads import MEADS, Persistent, Step

APPROACH = 1 / 5  # of the iterations, and
LONGEST_APPROACH = 100  # iterations at most


class Means(NamedTuple):
    """Means since the last window over iterations and folds, `[]`: of log ε, of -log γ, and their count."""

    log_step: Tensor
    log_length: Tensor
    count: Tensor


class Tuned(NamedTuple):
    """A warm-up on its way: tensors only, so that it can be saved and go on elsewhere.

    Attributes:
        state: of the chains.
        scale: in force, `[d]` or `[d, d]`.
        means: of step and length.
        draws: moments of positions in the window in progress.
        slopes: moments of gradients in it.
        iteration: `[]`; how many are done.
        approach: of ChEES-HMC, where the way begins.
    """

    state: Persistent
    scale: Tensor
    means: Means
    draws: Moments
    slopes: Moments
    iteration: Tensor
    approach: Learnt


@dataclass(frozen=True)
class MEADSWarmup:
    """Learns the tuning of `MEADS` from all chains together; used as `ChEESWarmup` is.

    Attributes:
        iterations: of the whole warm-up, of one gradient each but for the approach: the first fifth, at most 100, are
            those of `ChEESWarmup`. Far from the mass, steps for the steepest of all gradients get nowhere.
        folds: of chains, dealt anew in every iteration; their number divides that of the chains.
        cautious: the part of 1 / sqrt(λ(g)) that is taken as a step.
        dense: whether the scale is a Cholesky factor or standard deviations.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> target = lambda q: (-(q / 5).square().sum(-1) / 2, -q / 25)  # standard deviations 5
        >>> warmup = MEADSWarmup(iterations=200)
        >>> tuned = warmup.begin(torch.randn(64, 2), target)
        >>> state, tuning = warmup.finish(warmup.advance(tuned, target, 200))
        >>> bool(((tuning.scale.diagonal() / 5 - 1).abs() < 0.25).all())
        True
    """

    iterations: int = 1000
    folds: int = 4
    cautious: float = 0.5
    dense: bool = True

    def __post_init__(self) -> None:
        """Refuse what adapts nothing."""
        if self.iterations < 1 or self.folds < 2:
            raise ValueError(
                f"MEADSWarmup(iterations={self.iterations}, folds={self.folds}): expected at least 1 iteration and 2 folds"
            )
        if not self.cautious > 0:
            raise ValueError(f"MEADSWarmup(cautious={self.cautious}): expected a positive number")

    def begin(self, position: Tensor, target: LogDensity, scale: Tensor | None = None) -> Tuned:
        """Before the first iteration, at positions `[C, d]`.

        Args:
            position: where the chains start: at different places.
            target: the log density and its gradient.
            scale: a first guess, such as Pathfinder's; if there is none, from gradients at the positions.

        Raises:
            ValueError: the chains do not make folds of two or more.
        """
        chains = len(position)
        if chains % self.folds or chains < 2 * self.folds:
            raise ValueError(
                f"{chains} chains do not make {self.folds} folds of two or more: take a multiple of {self.folds} chains, "
                f"such as {max(2, round(chains / self.folds)) * self.folds}"
            )
        approach = self._chees.begin(position, target, scale)
        zero = position.new_zeros(())
        return Tuned(
            MEADS().init(approach.state.position, target),
            approach.tuning.scale,
            Means(zero, zero, zero),
            nothing(position, self.dense),
            nothing(position, self.dense),
            torch.zeros((), dtype=torch.int64, device=position.device),
            approach,
        )

    def advance(self, tuned: Tuned, target: LogDensity, iterations: int, wrap: Wrap = unwrapped) -> Tuned:
        """So many iterations more, or up to the end; waits for the device at the ends of windows only."""
        done = int(tuned.iteration)
        last = min(done + iterations, self.iterations)
        if done < (near := self._chees.iterations):
            tuned = self._approached(tuned, target, min(last, near) - done, wrap)
            done = min(last, near)
        adapt, windows = wrap(Adapt(self, target)), milestones(self.iterations, WINDOWS)
        seen: list[Persistent] = []
        for i in range(done + 1, last + 1):
            state, means = adapt(tuned.state, tuned.scale, tuned.means, tuned.iteration)
            tuned = tuned._replace(state=state, means=means, iteration=tuned.iteration + 1)
            seen.append(state)
            if len(seen) == PORTION or i == last or i in windows:
                there = arrived(state.log_density)
                tuned = tuned._replace(
                    draws=gathered(tuned.draws, torch.stack([s.position for s in seen]), there),
                    slopes=gathered(tuned.slopes, torch.stack([s.gradient for s in seen]), there),
                )
                seen = []
            if i in windows:
                found = matched(tuned.draws, tuned.slopes)
                state = resettled(state, target)
                tuned = self._rescaled(tuned._replace(state=state), found)
        return tuned

    def finish(self, tuned: Tuned) -> tuple[Persistent, Tuning]:
        """The state of the chains, and the tuning to sample with."""
        return tuned.state, Tuning(tuned.means.log_step.exp(), tuned.scale, tuned.means.log_length.exp())

    @property
    def _chees(self) -> ChEESWarmup:
        return ChEESWarmup(
            ChEES(), min(max(1, round(APPROACH * self.iterations)), LONGEST_APPROACH), dense=self.dense
        )

    def _approached(self, tuned: Tuned, target: LogDensity, iterations: int, wrap: Wrap) -> Tuned:
        """So many iterations of ChEES-HMC more; after the last one, MEADS begins where the chains are."""
        approach = self._chees.advance(tuned.approach, target, iterations, wrap)
        tuned = tuned._replace(approach=approach, iteration=tuned.iteration + iterations)
        if int(approach.iteration) < self._chees.iterations:
            return tuned
        state, tuning = self._chees.finish(approach)
        return tuned._replace(state=MEADS().init(state.position, target), scale=tuning.scale)

    def _rescaled(self, tuned: Tuned, found: Spread) -> Tuned:
        """A new scale; the next iteration has all the weight in the means."""
        return tuned._replace(
            scale=trusted(found, self.dense),
            means=tuned.means._replace(count=torch.zeros_like(tuned.means.count)),
            draws=nothing(tuned.state.position, self.dense),
            slopes=nothing(tuned.state.position, self.dense),
        )


@dataclass(frozen=True)
class Adapt:
    """One iteration of the warm-up; straight-line code."""

    warmup: MEADSWarmup
    target: LogDensity

    def __call__(
        self, state: Persistent, scale: Tensor, means: Means, iteration: Tensor
    ) -> tuple[Persistent, Means]:
        """Deal chains into folds; each fold moves by the step and damping of the one before it."""
        folds = self.warmup.folds
        order = torch.randperm(len(state.position), device=scale.device)
        gradients = pull(scale, state.gradient)[order].unflatten(0, (folds, -1))
        positions = state.position - state.position.mean(0)  # of all: a mean of few would be a part of each
        positions = whitened(scale, positions)[order].unflatten(0, (folds, -1))
        step = (self.warmup.cautious * largest_eigenvalue(gradients).rsqrt()).clamp(max=1.0)  # [folds]
        damping = torch.maximum(largest_eigenvalue(positions).rsqrt(), 1 / ((iteration + 1) * step))
        of_chains = torch.stack([step, 1 / damping], -1).roll(1, 0).repeat_interleave(positions.shape[1], 0)
        steps, lengths = torch.empty_like(of_chains).index_copy(0, order, of_chains).split(1, -1)
        state, _ = Step(self.target)(state, Tuning(steps, scale, lengths))
        weight = 1 / (means.count + 1)
        return state, Means(
            torch.lerp(means.log_step, step.log().mean(), weight),
            torch.lerp(means.log_length, -damping.log().mean(), weight),
            means.count + 1,
        )


def largest_eigenvalue(rows: Tensor) -> Tensor:
    r"""About the largest eigenvalue of the second moments S of the law of rows `[..., n, d]`: :math:`\mathrm{tr} S^2 / \mathrm{tr} S`.

    It lies between the mean and the largest eigenvalue, and close to that if one is far larger than others. Both traces are
    estimated without bias,

    .. math:: \mathrm{tr} S = \mathrm{mean}_i |x_i|^2, \qquad \mathrm{tr} S^2 = \mathrm{mean}_{i \ne j} (x_i \cdot x_j)^2

    and what comes out is never less than the mean eigenvalue. The traces of the rows' own moments, which the paper takes,
    are larger by about `tr S / n` (its section 3.1): in 100 dimensions with 8 rows, thirteen times as large.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> found = largest_eigenvalue(torch.randn(1000, 8, 100))  # all eigenvalues are 1
        >>> bool((found.mean() - 1).abs() < 0.1)
        True
    """
    count, dimensions = rows.shape[-2:]
    gram = rows @ rows.mT if count < dimensions else rows.mT @ rows
    norms = rows.square().sum(-1)
    others = gram.square().sum((-2, -1)) - norms.square().sum(-1)
    mean = norms.mean(-1)
    return torch.maximum(others / (count * (count - 1) * mean), mean / dimensions)
