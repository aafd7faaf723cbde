"""Draws of latents with denoisers given rows of data: the algorithms, each set to the scale of the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
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
    Replacement,
    SplitGibbs,
    Twisted,
    refine,
    repaint,
)
from pgen.algorithms.diffusion.posteriors.dps import width_of
from pgen.algorithms.diffusion.posteriors.metropolis import Conditioned, Euclidean
from pgen.algorithms.diffusion.solve import solve
from pgen.algorithms.diffusion.solvers import Ancestral
from pgen.backends.score.evidence import Evidence, Linear
from pgen.backends.score.inference import LEVELS, PARTICLES, Inference, Inferred
from pgen.backends.score.prior import Prior
from pgen.backends.score.scales import Scales

MATRIX = 64
"""Observed numbers up to which their covariance given a noisy value is made in full."""
_BELOW = 1e-5  # of a matrix's largest element: nothing


@dataclass(frozen=True)
class Conditional:
    """Latents given rows of the data whose observations, where they are linear, have one matrix.

    Attributes:
        prior: the latents of these rows.
        evidence: what is observed.
        linear: the same, where it is linear and Gaussian.
        how: the algorithm; its particles are a number.
    """

    prior: Prior
    evidence: Evidence
    linear: Linear | None
    how: Inference

    def draws(self, n: int) -> Inferred:
        """So many, of each row."""
        kind = self.how.kind
        if kind in ("auto", "exact") and self.linear is not None and self.prior.conjugate is not None:
            return self._exactly(n)
        if kind in PARTICLES:
            return self._particles(n)
        like = self._rows(n)
        streams = self.scales.streams(len(like))
        field = Field(self.prior.denoiser, streams)
        observation = self._observation(n)
        if kind == "split-gibbs":
            levels = torch.logspace(0, -2, 30, dtype=torch.float64) * math.sqrt(self.scales.variance)
            target = observation or self.evidence.log_likelihood
            x = SplitGibbs(target, tuple(levels.tolist()), floor=self.prior.sigma_min).sample(like, field)
        elif kind == "ddrm" and observation is not None:
            solver = DDRM(observation)
            x = solve(solver.init(self.prior.sigma_max, like, field), self._grid(), field, solver)
        elif kind in ("replacement", "repaint"):
            solver = self._replacement(n)
            x = self.scales.start(field, like)
            x = (solve if kind == "replacement" else repaint)(x, self._grid(), field, solver)
        else:
            x = self.scales.start(field, like)
            x = solve(x, self._grid(), Field(self._guide(kind, n), streams), Ancestral())
        return Inferred(self.prior.values(x.detach()))

    def _exactly(self, n: int) -> Inferred:
        """By the prior's own knowledge of its posterior."""
        linear: Any = self.linear
        conjugate: Any = self.prior.conjugate
        x, log_evidence = conjugate.linear_posterior(
            linear.matrix[0], linear.y, n, sigma=self.prior.sigma_min
        )
        x = x.to(self.prior.like).reshape(self.prior.rows * n, self.prior.size)
        return Inferred(self.prior.values(x), log_evidence.double() + self._lost(), exact=True)

    def _particles(self, n: int) -> Inferred:
        """Twisted particles, drawn from by their weights, then moved."""
        count = max(self.how.particles or 0, n)
        like = self._rows(count)
        field = self.scales.field(len(like))
        guide = self._guide(self._best(), count)
        begin = self.scales.start(field, like)
        found = Twisted(count).sample(guide, field, self._grid(), like, start=begin)
        uniform = torch.rand(self.prior.rows, dtype=torch.float64, device=like.device)
        x = found.draws(n, uniform)
        order = torch.argsort(torch.rand(x.shape[:2], device=x.device), 1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand_as(x)).reshape(-1, x.shape[-1])
        level = self.scales.steady if self.how.moves else None
        if level is not None:
            x = self._moved(x, n, level)
        evidence = found.log_evidence + (0.0 if self.linear is None else self._lost())
        return Inferred(self.prior.values(x), evidence, found.effective.amin(0))

    def _moved(self, x: Tensor, n: int, sigma: float) -> Tensor:
        observation = self._observation(n)
        target = self.evidence.log_likelihood if observation is None else observation.log_likelihood
        metric = Euclidean() if observation is None else Conditioned(observation, self.scales.local(sigma))
        kernel = LineMALA(target, sigma, metric=metric)
        return refine(kernel, x, self.scales.field(len(x)), self.how.moves).x

    def _best(self) -> str:
        if self.linear is None:
            return "dps"
        return "mmps" if self.linear.y.shape[-1] <= MATRIX else "pigdm"

    def _guide(self, kind: str, count: int) -> Guide:
        denoiser, observation, v = self.prior.denoiser, self._observation(count), self.scales.variance
        if kind in ("mmps", "pigdm") and observation is not None:
            return MMPS(denoiser, observation) if kind == "mmps" else PiGDM(denoiser, observation, v)
        likelihood = self.evidence.log_likelihood if observation is None else observation.log_likelihood
        if kind == "lgd":
            return LGD(denoiser, likelihood, v, limit=1.0)
        # Tempered, as is right for particles; by itself as published, but for a bound on the pull.
        if self.how.kind == "dps":
            return DPS(denoiser, likelihood, limit=1.0)
        return DPS(denoiser, likelihood, width_of(likelihood, self.scales.some.flatten(0, 1)), v)

    def _observation(self, count: int) -> LinearGaussian | None:
        if self.linear is None:
            return None
        y = self.linear.y.repeat_interleave(count, 0).to(self.prior.like)
        return LinearGaussian(Dense(self.linear.matrix[0].to(self.prior.like)), y, 1.0)

    def _replacement(self, count: int) -> Replacement:
        """Elements that were seen, each the mean of what was seen of it, weighted by precision."""
        linear: Any = self.linear
        matrix = linear.matrix[0] * picks(linear.matrix[0])
        weight = matrix.square().sum(0)
        known = (linear.y @ matrix) / torch.where(weight > 0, weight, 1.0)
        return Replacement(known.repeat_interleave(count, 0).to(self.prior.like), weight > 0)

    def _lost(self) -> Tensor:
        """What scaling took from log densities, `[rows]`."""
        linear: Any = self.linear
        return linear.constant.double() + linear.y.shape[-1] * math.log(2 * math.pi) / 2

    @cached_property
    def scales(self) -> Scales:
        """Of the prior."""
        return Scales(self.prior)

    def _grid(self) -> Tensor:
        top, bottom = math.log(self.prior.sigma_max), math.log(self.prior.sigma_min)
        return torch.linspace(top, bottom, (self.how.levels or LEVELS) + 1, dtype=torch.float64).exp()

    def _rows(self, count: int) -> Tensor:
        return self.prior.like.new_zeros(self.prior.rows * count, self.prior.size)


def picks(matrix: Tensor) -> Tensor:
    """Where a matrix `[..., m, D]` is not nothing: where each row has one such element at most, single elements are seen."""
    return matrix.abs() > _BELOW * matrix.abs().amax()
