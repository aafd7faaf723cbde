"""The scales of a prior that is known by its denoiser: its moments, its spread, and where its scores can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field, score_of
from pgen.algorithms.diffusion.grids import karras
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.solve import solve
from pgen.algorithms.diffusion.solvers import UniPC
from pgen.algorithms.diffusion.terminal import Terminal, matched
from pgen.backends.score.prior import Prior

_SOME, _STEPS = 64, 24  # draws of the prior that tell its scale, and steps to each
_BLUR = 0.1  # noise that moves may leave, relative to the spread of the prior
_APART = 0.25  # how far scores at two levels may lie apart that are called the same
_FULL = 1 << 20  # numbers in the covariances of all rows at the largest noise level, at most


@dataclass(frozen=True)
class Scales:
    """What algorithms are set by.

    Attributes:
        prior: the latents.
    """

    prior: Prior

    def start(self, field: Field, like: Tensor) -> Tensor:
        """Values at the largest noise level, `[rows * particles, size]`, which is seldom so large that they are but noise."""
        law, noise = self.terminal, field.noise(like).reshape(self.prior.rows, -1, self.prior.size)
        if law.full:
            moved = noise @ self._root.mT
        else:
            moved = (law.spread.to(noise) + law.sigma**2).sqrt().unsqueeze(1) * noise
        return (law.mean.unsqueeze(1).to(noise) + moved).reshape(like.shape)

    @cached_property
    def terminal(self) -> Terminal:
        """The normal law at the largest noise level, of each row."""
        prior = self.prior
        full = prior.rows * prior.size**2 <= _FULL
        like = prior.like.new_zeros(prior.rows, prior.size)
        return matched(Field(prior.denoiser), prior.sigma_max, like, "full" if full else "scalar")

    @cached_property
    def _root(self) -> Tensor:
        eye = torch.eye(self.prior.size, dtype=torch.float64, device=self.prior.like.device)
        root = torch.linalg.cholesky(self.terminal.spread.double() + self.prior.sigma_max**2 * eye)
        return root.to(self.prior.like)

    @cached_property
    def some(self) -> Tensor:
        """Draws of the prior: `[rows, 64, size]`."""
        like = self.prior.like.new_zeros(self.prior.rows * _SOME, self.prior.size)
        field = self.field(len(like))
        grid = karras(_STEPS, self.prior.sigma_min, self.prior.sigma_max)
        found = solve(self.start(field, like), grid, field, UniPC(3, variable="sigma"))
        return found.reshape(self.prior.rows, _SOME, -1)

    @cached_property
    def variance(self) -> float:
        """Variance of the prior, for one number."""
        return float(self.some.var(1).mean().clamp(min=1e-12))

    @cached_property
    def steady(self) -> float | None:
        """The least noise level from which scores are to be trusted, for moves along them; None: none is low enough.

        A score is (D - x) / sigma^2: a learned D is never so right that its error can be divided by any sigma. Where
        noise is less than the detail of the law, scores at two levels are the same; where the network's errors are
        divided by too little, they are not.
        """
        x = self.some.flatten(0, 1)
        noise = self.field(len(x)).noise(x)
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

    def local(self, sigma: float) -> float:
        """Variance of the prior as its curvature has it, within modes: of a Gaussian, its variance."""
        x = self.some.flatten(0, 1)
        field = self.field(len(x))
        step = sigma * field.noise(x)
        turn = score_of(field(x + step, sigma), x + step, sigma) - score_of(field(x, sigma), x, sigma)
        curvature = -(step * turn).sum(1) / step.square().sum(1)
        return min(self.variance, 1 / max(float(curvature.median()), 1 / self.variance))

    def field(self, rows: int) -> Field:
        """The denoiser, with random numbers of its own."""
        return Field(self.prior.denoiser, self.streams(rows))

    def streams(self, rows: int) -> Streams:
        """Random numbers for so many rows."""
        return Streams(int(torch.randint(1 << 62, ())), rows)
