"""Posteriors of latents with denoisers: from what is observed to a guide, from noise to draws.

    linear and Gaussian    y = A x + e: guides that know the covariance of what is not yet known
    anything with a density    guides that differentiate the likelihood at the denoised value

By themselves guides are approximations (DPS, PiGDM, MMPS, DDRM); as twists of particles (TDS) they are corrected, up to
the number of particles; Metropolis moves at the end, whose ratio is a line integral of the score, correct what is left
within modes and make copies of a particle different again. They need scores at little noise, which only denoisers have
that are exact or nearly so: where scores at two levels disagree, there are no moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field, score_of
from pgen.algorithms.diffusion.grids import karras
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.operators import Dense
from pgen.algorithms.diffusion.posteriors import (
    DDRM,
    DPS,
    LGD,
    MMPS,
    Guide,
    LinearGaussian,
    LineMALA,
    PiGDM,
    SplitGibbs,
    Twisted,
    refine,
)
from pgen.algorithms.diffusion.posteriors.dps import width_of
from pgen.algorithms.diffusion.posteriors.metropolis import Conditioned, Euclidean
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import Ancestral, UniPC
from pgen.backends.score.evidence import Evidence, Linear
from pgen.backends.score.prior import Prior
from pgen.capability import Capability, Refusal
from pgen.choice import refusal_text
from pgen.errors import Refused
from pgen.problem import Problem
from pgen.structure import Structure

Kind = Literal["auto", "tds", "mmps", "pigdm", "ddrm", "dps", "lgd", "split-gibbs"]
KINDS = ("auto", "tds", "mmps", "pigdm", "ddrm", "dps", "lgd", "split-gibbs")
LINEAR = ("mmps", "pigdm", "ddrm")

_NUMBERS = 1 << 23
"""In the particles of the rows that are run together, at most."""
_SOME, _STEPS = 64, 24  # draws of the prior that tell its scale, and steps to each
_BLUR = 0.1  # noise that moves may leave, relative to the spread of the prior
_APART = 0.25  # how far scores at two levels may lie apart that are called the same
_MATRIX = 64  # observed numbers up to which their covariance given a noisy value is made in full


@dataclass(frozen=True)
class Inference:
    """How posteriors are drawn.

    Attributes:
        kind: the algorithm.
        particles: for each row, at least; of the algorithms with particles.
        steps: noise levels.
        moves: Metropolis moves at the end.
    """

    kind: Kind = "auto"
    particles: int = 512
    steps: int = 100
    moves: int = 20


@dataclass(frozen=True)
class Inferred:
    """Draws of latents, and what was learned on the way.

    Attributes:
        values: by site, `[n, *shape]`.
        log_evidence: log probability of what is observed given nothing, `[rows]`; None where the algorithm has none.
        effective: least effective number of particles on the way, `[rows]`; likewise.
    """

    values: Mapping[str, Tensor]
    log_evidence: Tensor | None
    effective: Tensor | None


def infer(problem: Problem, structure: Structure, n: int, how: Inference) -> Inferred:
    """Draw the latents that the data bear upon, for every row of the data.

    Args:
        problem: the program with its data; its learned tensors are installed.
        structure: of the problem.
        n: draws.
        how: the algorithm.

    Raises:
        Refused: a latent has no denoiser, or the likelihood is not what the algorithm needs; names a site.
    """
    names = tuple(s for s in structure.latents if s in structure.evidenced)
    for name in names:
        if Capability.DENOISER not in structure.sites[name].capabilities:
            _refuse(
                structure,
                name,
                "a denoiser",
                f"{structure.sites[name].distribution} can only be drawn or weighed",
            )
        if getattr(structure.sites[name].support, "is_discrete", False):
            _refuse(
                structure, name, "real values", "whole numbers are not what is denoised, only seen through"
            )
        above = [p for p in structure.sites[name].parents if p in structure.latents]
        if above:
            _refuse(
                structure,
                name,
                "a law that no other latent changes",
                f"it depends on the latent {above[0]!r}",
            )
    seen = tuple(
        s
        for s in (*structure.observed, *structure.factors)
        if any(p in names for p in structure.sites[s].parents)
    )
    apart = bool(structure.data_plates) and all(map(structure.local, (*names, *seen)))
    found: list[tuple[Tensor, Inferred]] = []
    axes: dict[str, int | None] = {}
    for index in _slices(problem, structure, names, apart, n, how):
        some = problem.take(index) if apart else problem
        prior = Prior.of(some, structure, names, apart)
        axes = {b.name: None if b.axis is None else b.axis + 1 for b in prior.blocks}
        evidence = Evidence(some, structure, prior, seen, apart)
        linear = evidence.linear()
        if linear is None and how.kind in LINEAR:
            why = f"the algorithm {how.kind!r} knows of observations that are linear in the latents, with normal noise of one size; this one is not"
            _refuse(structure, seen[0], "a linear-Gaussian likelihood", why)
        for rows in _alike(linear, prior.rows):
            if len(rows) == prior.rows:
                part = _Row(prior, evidence, linear, how)
            else:
                some = problem.take(index[rows])
                inner = Prior.of(some, structure, names, apart)
                part = _Row(
                    inner, Evidence(some, structure, inner, seen, apart), linear and linear.of(rows), how
                )
            found.append((index[rows] if apart else rows, part.draws(n)))
    return _joined(found, axes)


def _refuse(structure: Structure, site: str, missing: str, why: str) -> None:
    refusal = Refusal(site, missing, why)
    raise Refused(f"the posterior of {structure.name}: {refusal_text(refusal)}", refusal)


def _slices(
    problem: Problem, structure: Structure, names: Sequence[str], apart: bool, n: int, how: Inference
) -> Iterator[Tensor]:
    """Rows of the data, as many together as memory allows."""
    rows = (problem.rows or 1) if apart else 1
    if not apart:
        yield torch.arange(rows)
        return
    size = Prior.of(problem.take(torch.arange(1)), structure, names, apart).size
    each = max(1, _NUMBERS // (size * max(n, how.particles)))
    yield from torch.arange(rows).split(each)


def _alike(linear: Linear | None, rows: int) -> list[Tensor]:
    """Rows whose observations have one matrix; all of them where there is none."""
    left = torch.arange(rows)
    if linear is None:
        return [left]
    groups = []
    while len(left):
        first = linear.matrix[left[0]]
        far = (linear.matrix[left] - first).abs().flatten(1).amax(1) > 1e-5 * first.abs().amax()
        far = far.to(left.device)
        groups.append(left[~far])
        left = left[far]
    return groups


@dataclass(frozen=True)
class _Row:
    """Rows of the data whose observations are of one kind."""

    prior: Prior
    evidence: Evidence
    linear: Linear | None
    how: Inference

    def draws(self, n: int) -> Inferred:
        kind = self.how.kind
        if kind in ("auto", "tds"):
            return self._particles(n)
        like = self._rows(n)
        streams = self._streams(len(like))
        field = Field(self.prior.denoiser, streams)
        if kind == "split-gibbs":
            levels = torch.logspace(0, -2, 30, dtype=torch.float64) * math.sqrt(self.variance)
            target = self._observation(n) or self.evidence.log_likelihood
            x = SplitGibbs(target, tuple(levels.tolist()), floor=self.prior.sigma_min).sample(like, field)
            return Inferred(self.prior.values(x), None, None)
        observation = self._observation(n)
        if kind == "ddrm" and observation is not None:
            solver = DDRM(observation)
            x = solve(solver.init(self.prior.sigma_max, like, field), self._grid(), field, solver)
        else:
            x = start(streams, like.shape[1:], self.prior.sigma_max, like)
            x = solve(x, self._grid(), Field(self._guide(kind, n), streams), Ancestral())
        return Inferred(self.prior.values(x.detach()), None, None)

    def _particles(self, n: int) -> Inferred:
        """Twisted particles, drawn from by their weights, then moved."""
        count = max(self.how.particles, n)
        like = self._rows(count)
        field = self._field(len(like))
        guide = self._guide(self._best(), count)
        found = Twisted(count).sample(guide, field, self._grid(), like)
        uniform = torch.rand(self.prior.rows, dtype=torch.float64, device=like.device)
        x = found.draws(n, uniform)
        order = torch.argsort(torch.rand(x.shape[:2], device=x.device), 1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand_as(x)).reshape(-1, x.shape[-1])
        level = self.steady if self.how.moves else None
        if level is not None:
            x = self._moved(x, n, level)
        evidence = found.log_evidence + (0.0 if self.linear is None else self._lost())
        return Inferred(self.prior.values(x), evidence, found.effective.amin(0))

    def _moved(self, x: Tensor, n: int, sigma: float) -> Tensor:
        observation = self._observation(n)
        target = self.evidence.log_likelihood if observation is None else observation.log_likelihood
        metric = Euclidean() if observation is None else Conditioned(observation, self._local(sigma))
        kernel = LineMALA(target, sigma, metric=metric)
        return refine(kernel, x, self._field(len(x)), self.how.moves).x

    def _best(self) -> Kind:
        if self.linear is None:
            return "dps"
        return "mmps" if self.linear.y.shape[-1] <= _MATRIX else "pigdm"

    def _guide(self, kind: str, count: int) -> Guide:
        denoiser, observation, v = self.prior.denoiser, self._observation(count), self.variance
        if kind in LINEAR and observation is not None:
            return MMPS(denoiser, observation) if kind == "mmps" else PiGDM(denoiser, observation, v)
        likelihood = self.evidence.log_likelihood if observation is None else observation.log_likelihood
        if kind == "lgd":
            return LGD(denoiser, likelihood, v, limit=1.0)
        # Tempered, as is right for particles; by itself as published, but for a bound on the pull.
        if self.how.kind == "dps":
            return DPS(denoiser, likelihood, limit=1.0)
        return DPS(denoiser, likelihood, width_of(likelihood, self.some.flatten(0, 1)), v)

    def _observation(self, count: int) -> LinearGaussian | None:
        if self.linear is None:
            return None
        y = self.linear.y.repeat_interleave(count, 0).to(self.prior.like)
        return LinearGaussian(Dense(self.linear.matrix[0].to(self.prior.like)), y, 1.0)

    def _lost(self) -> Tensor:
        """What scaling took from log densities, `[rows]`."""
        linear: Any = self.linear
        return linear.constant.double() + linear.y.shape[-1] * math.log(2 * math.pi) / 2

    @cached_property
    def some(self) -> Tensor:
        """Draws of the prior, to know its scale by: `[rows, 64, size]`."""
        like = self._rows(_SOME)
        streams = self._streams(len(like))
        x = start(streams, like.shape[1:], self.prior.sigma_max, like)
        grid = karras(_STEPS, self.prior.sigma_min, self.prior.sigma_max)
        found = solve(x, grid, Field(self.prior.denoiser, streams), UniPC(3, variable="sigma"))
        return found.reshape(self.prior.rows, _SOME, -1)

    @cached_property
    def steady(self) -> float | None:
        """The least noise level from which scores are to be trusted, for moves along them; None: none is low enough.

        A score is (D - x) / sigma^2: a learned D is never so right that its error can be divided by any sigma. Where
        noise is less than the detail of the law, scores at two levels are the same; where the network's errors are
        divided by too little, they are not.
        """
        x = self.some.flatten(0, 1)
        noise = Field(self.prior.denoiser, self._streams(len(x))).noise(x)
        level, most = self.prior.sigma_min, _BLUR * math.sqrt(self.variance)
        field = Field(self.prior.denoiser)
        while level <= most:
            at = x + level * noise
            fine, coarse = (score_of(field(at, s), at, s) for s in (level, 2 * level))
            apart = (fine - coarse).norm(dim=1) / coarse.norm(dim=1).clamp(min=1e-12)
            if float(apart.median()) < _APART:
                return level
            level *= 2
        return None

    def _local(self, sigma: float) -> float:
        """Variance of the prior as its curvature has it, within modes: of a Gaussian, its variance."""
        x = self.some.flatten(0, 1)
        field = self._field(len(x))
        step = sigma * field.noise(x)
        turn = score_of(field(x + step, sigma), x + step, sigma) - score_of(field(x, sigma), x, sigma)
        curvature = -(step * turn).sum(1) / step.square().sum(1)
        return min(self.variance, 1 / max(float(curvature.median()), 1 / self.variance))

    @cached_property
    def variance(self) -> float:
        """Variance of the prior, for one number."""
        return float(self.some.var(1).mean().clamp(min=1e-12))

    def _grid(self) -> Tensor:
        top, bottom = math.log(self.prior.sigma_max), math.log(self.prior.sigma_min)
        return torch.linspace(top, bottom, self.how.steps + 1, dtype=torch.float64).exp()

    def _rows(self, count: int) -> Tensor:
        return self.prior.like.new_zeros(self.prior.rows * count, self.prior.size)

    def _field(self, rows: int) -> Field:
        return Field(self.prior.denoiser, self._streams(rows))

    def _streams(self, rows: int) -> Streams:
        return Streams(int(torch.randint(1 << 62, ())), rows)


def _joined(found: Sequence[tuple[Tensor, Inferred]], axes: Mapping[str, int | None]) -> Inferred:
    """The rows of all parts, in their order."""
    order = torch.cat([rows for rows, _ in found]).argsort()
    values = {}
    for name, axis in axes.items():
        parts = [part.values[name] for _, part in found]
        values[name] = (
            parts[0] if axis is None else torch.cat(parts, axis).index_select(axis, order.to(parts[0].device))
        )

    def together(read: Any) -> Tensor | None:
        parts = [read(part) for _, part in found]
        return None if any(p is None for p in parts) else torch.cat(parts)[order.to(parts[0].device)]

    return Inferred(values, together(lambda p: p.log_evidence), together(lambda p: p.effective))
