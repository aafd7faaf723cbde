r"""The twisted diffusion sampler: sequential Monte Carlo from noise to data, steered by a conditional denoiser.

Particles at noise level s go to t < s by the conditional denoiser's ancestral step q, and are weighted for the prior's:

    x_t ~ q(x_t | x_s) = N(D_y + (t/s)^2 (x_s - D_y), v I),     p(x_t | x_s) = N(D + (t/s)^2 (x_s - D), v I)
    w   = p(x_t | x_s) g(x_t, t) / (q(x_t | x_s) g(x_s, s)),    v = t^2 (1 - t^2 / s^2)

with g(x, sigma) about p(y | x_sigma), and the likelihood itself at the last level. The g telescope: whatever they are,
the weighted particles converge, in their number, to the law of x_0 given y under the prior's own ancestral sampler (on
this grid), and the mean weights multiply to an unbiased estimate of p(y) under it. Good twists make few particles do.

References:
    Wu, Trippe, Naesseth, Blei & Cunningham, Practical and Asymptotically Exact Conditional Sampling in Diffusion Models,
    NeurIPS 2023. Chopin & Papaspiliopoulos, An Introduction to Sequential Monte Carlo, 2020 (chapter 10).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.posteriors.guide import Guide, over_event
from pgen.algorithms.diffusion.posteriors.resampling import effective_size, systematic, uniform_rows
from pgen.algorithms.diffusion.solve import require_grid


class Particles(NamedTuple):
    """Weighted draws of x_0 given y, for every observation.

    Attributes:
        x: `[observations, particles, *event]`.
        log_weight: normalised, `[observations, particles]`.
        log_evidence: log p(y), `[observations]`, in nats; its exponential is unbiased. Normalised as the likelihood is.
        effective: effective sample sizes at each noise level, before any resampling, `[levels, observations]`.
    """

    x: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    effective: Tensor

    def draws(self, n: int, uniform: Tensor) -> Tensor:
        """Equally weighted draws by systematic resampling, `[observations, n, *event]`.

        Args:
            n: for each observation.
            uniform: a number in [0, 1) for each, `[observations]`.
        """
        index = systematic(self.log_weight, uniform, n)
        rows = torch.arange(len(index), device=index.device).unsqueeze(1)
        return self.x[rows, index]


@dataclass(frozen=True)
class Twisted:
    """Twisted sequential Monte Carlo; see the module.

    Rows are observations x particles, the particles of an observation side by side: B = observations * particles.

    Attributes:
        particles: for each observation.
        threshold: an observation's particles are resampled when their effective size falls below this part of them;
            1: at every step, 0: never.

    Raises:
        ValueError: a setting is out of its range.
    """

    particles: int
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.particles < 1 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"Twisted(particles={self.particles}, threshold={self.threshold}): expected 1 or more particles and a "
                "threshold in [0, 1]"
            )

    def sample(
        self, guide: Guide, field: Field, grid: Tensor, like: Tensor, *, start: Tensor | None = None
    ) -> Particles:
        """From noise to weighted particles.

        Args:
            guide: conditional denoiser, twist and likelihood; its prior may be `field`, which then counts evaluations.
            field: whose random numbers are taken.
            grid: noise levels, decreasing; the last is where the likelihood is had. A 0 at the end is left out.
            like: of the shape of all particles, `[B, *event]`.
            start: draws of the prior with noise of level grid[0], of that shape; None: noise alone.

        Raises:
            ValueError: the rows are not a multiple of the particles, or the grid is none.
        """
        levels = require_grid(grid).tolist()
        levels = levels[:-1] if levels[-1] == 0 else levels
        if len(levels) < 2:
            raise ValueError(f"got the noise levels {grid.tolist()}; expected two or more that are not 0")
        groups, rest = divmod(len(like), self.particles)
        if rest or not groups:
            raise ValueError(
                f"got {len(like)} rows and {self.particles} particles; expected a multiple: observations x particles"
            )
        with torch.no_grad():
            x = levels[0] * field.noise(like) if start is None else start
            return self._sample(guide, field, levels, x, groups)

    def _sample(self, guide: Guide, field: Field, levels: list[float], x: Tensor, groups: int) -> Particles:
        shape = (groups, self.particles)
        look = guide.look(x, x.new_full((len(x),), levels[0]))
        log_weight = look.log_twist.double().reshape(shape)
        log_evidence = torch.zeros(groups, dtype=torch.float64, device=x.device)
        effective = []
        for s, t in itertools.pairwise(levels):
            size = effective_size(log_weight)
            effective.append(size)
            low = size < self.threshold * self.particles
            # Drawn though not needed: an observation's numbers must not hang on when others resample.
            uniform = uniform_rows(field, x)[:: self.particles]
            if bool(low.any()):
                index = self._parents(log_weight, low, uniform)
                x, look = x[index], type(look)(*(part[index] for part in look))
                mean = log_weight.logsumexp(1) - math.log(self.particles)
                log_evidence = log_evidence + torch.where(low, mean, 0.0)
                log_weight = torch.where(low.unsqueeze(1), 0.0, log_weight)
            keep = (t / s) ** 2
            spread = t * math.sqrt(1 - keep)
            noise = field.noise(x)
            x = torch.lerp(look.posterior, x, keep) + spread * noise
            # log p/q: the same noise, seen from the two means, (1 - keep) (D_y - D) apart.
            apart = (1 - keep) / spread * (look.posterior - look.prior)
            step = -over_event(apart * (apart / 2 + noise))
            before = look.log_twist
            if t == levels[-1]:
                after = guide.log_likelihood(x)
            else:
                look = guide.look(x, x.new_full((len(x),), t))
                after = look.log_twist
            log_weight = log_weight + (step + after - before).double().reshape(shape)
        effective.append(effective_size(log_weight))
        log_evidence = log_evidence + log_weight.logsumexp(1) - math.log(self.particles)
        return Particles(
            x.reshape(shape + x.shape[1:]), log_weight.log_softmax(1), log_evidence, torch.stack(effective)
        )

    def _parents(self, log_weight: Tensor, low: Tensor, uniform: Tensor) -> Tensor:
        """Which rows go on, `[B]`: each observation's own, unless it is to be resampled."""
        groups = len(log_weight)
        own = torch.arange(self.particles, device=low.device).expand(groups, -1)
        first = torch.arange(groups, device=low.device).unsqueeze(1) * self.particles
        drawn = systematic(log_weight, uniform)
        return (first + torch.where(low.unsqueeze(1), drawn, own)).reshape(-1)
