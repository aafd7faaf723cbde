r"""Tempered SMC for many independent problems at once, each with a ladder of its own.

The algorithm is that of `annealing.TemperedSMC`; a problem is a row, and what was one number there is one for each row
here: the inverse temperature, the step size, the evidence. One evaluation serves the particles of all rows, so that
the evidences of a thousand small problems cost about as many calls as one. Rows that have arrived wait for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.annealing import Evidence, evidence_below, next_beta, systematic
from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.path import Cloud, Frames, Path, root


class Rows(NamedTuple):
    """R rows of G islands of N particles on their way up.

    Attributes:
        cloud: `[R G N]` particles, row by row, island by island.
        log_weight: normalised within each island, `[R, G, N]`.
        log_evidence: of the density reached so far, `[R, G]`.
        beta: the inverse temperature reached, `[R]`.
        step_size: of the kernel, `[R]`.
    """

    cloud: Cloud
    log_weight: Tensor
    log_evidence: Tensor
    beta: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class TemperedRows:
    """Tempered SMC over R rows; see `TemperedSMC`, whose islands, resampling and scales of other islands these are.

    Args:
        kernel: what moves the particles.
        particles: N, in each island of each row.
        islands: G, of each row; two at least, for the scale of one comes from the others.
        moves: steps of the kernel at each temperature.
        accept: acceptance to adapt the step sizes to.
        keep: fraction of the conditional effective sample size kept from one temperature to the next, in (0, 1).
        threshold: fraction of the effective sample size to resample below, in (0, 1].
        step_size: to begin with.
        longest: temperatures after which to give up.

    Raises:
        ValueError: a setting is out of its range, or the path has no sampler.
        RuntimeError: `run` did not arrive.
    """

    kernel: HMC
    particles: int = 64
    islands: int = 16
    moves: int = 2
    accept: float = 0.8
    keep: float = 0.8
    threshold: float = 0.5
    step_size: float = 0.5
    longest: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("particles", 2), ("islands", 2), ("moves", 1), ("longest", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, most in (("accept", 1), ("keep", 1), ("threshold", 1 + 1e-6)):
            if not 0 < getattr(self, name) < most:
                raise ValueError(f"{name} is a fraction between 0 and 1, got {getattr(self, name)}")

    def run(self, path: Path, rows: int) -> Evidence:
        """The evidence of every row, `[R]` in each field.

        Args:
            path: over `[R G N, d]` particles, row by row, with a reference and its sampler.
            rows: R.
        """
        state = self.init(path, rows)
        for _ in range(self.longest):
            if bool((state.beta >= 1).all()):
                return torch.vmap(evidence_below)(state.log_evidence)
            state = self.step(state, path)
        raise RuntimeError(
            f"{int((state.beta < 1).sum())} of {rows} rows have not arrived after {self.longest} temperatures, the "
            f"coldest being at {float(state.beta.min()):.3g}: their reference is too far from the target; take a closer "
            "one, lower keep= or raise longest="
        )

    def init(self, path: Path, rows: int) -> Rows:
        """The cloud at the reference."""
        if path.sample is None or path.reference is None:
            raise ValueError(
                "annealing starts from draws of a normalised reference: give Path(target, reference=, sample=)"
            )
        cloud = path.evaluate(path.sample(rows * self.islands * self.particles))
        level = cloud.ratio.new_full((rows, self.islands, self.particles), -math.log(self.particles))
        nought = torch.zeros_like(level[:, 0, 0])
        return Rows(
            cloud, level, torch.zeros_like(level[..., 0]), nought, torch.full_like(nought, self.step_size)
        )

    def step(self, state: Rows, path: Path) -> Rows:
        """One temperature further in every row that has not arrived: reweight, resample, move."""
        cloud, log_weight, log_evidence, beta, step_size = state
        rows, islands, particles = log_weight.shape
        ratio = cloud.ratio.reshape(log_weight.shape)
        there = torch.vmap(partial(next_beta, keep=self.keep))(ratio, log_weight, beta)
        log_weight = log_weight + (there - beta)[:, None, None] * ratio
        increment = log_weight.logsumexp(-1, keepdim=True)
        log_evidence, log_weight = log_evidence + increment.squeeze(-1), log_weight - increment

        size = (-(2 * log_weight).logsumexp(-1, keepdim=True)).exp()
        poor = (size < self.threshold * particles) | (there >= 1)[:, None, None]
        chosen = systematic(log_weight.flatten(0, 1)).reshape(log_weight.shape)
        device = log_weight.device
        chosen = torch.where(poor, chosen, torch.arange(particles, device=device))
        first = particles * torch.arange(rows * islands, device=device).reshape(rows, islands, 1)
        cloud = cloud.take((first + chosen).reshape(-1))
        log_weight = torch.where(poor, -math.log(particles), log_weight)

        position, step_size = self._moved(
            cloud, path, there, step_size, self._frames(cloud.position, log_weight)
        )
        return Rows(path.evaluate(position), log_weight, log_evidence, there, step_size)

    def _moved(
        self, cloud: Cloud, path: Path, beta: Tensor, step_size: Tensor, frames: Frames
    ) -> tuple[Tensor, Tensor]:
        each = self.islands * self.particles
        betas, seen = beta.repeat_interleave(each), frames.cloud(cloud)
        target: Any = frames.path(path).at(betas)
        state = self.kernel.init(seen.position, lambda _: seen.at(betas))
        unit, length = torch.ones_like(seen.position[0]), torch.ones_like(beta[0])
        for _ in range(self.moves):
            tuning = Tuning(step_size.repeat_interleave(each).unsqueeze(-1), unit, length)
            state, info = self.kernel.step(state, tuning, target)
            step_size = step_size * (info.accept.reshape(len(beta), -1).mean(1) - self.accept).exp()
        return frames.push(state.position), step_size

    def _frames(self, position: Tensor, log_weight: Tensor) -> Frames:
        """For each island, the scale of the other islands of its row."""
        others = self.islands - 1
        points, size = others * self.particles, position.shape[1]
        dense = 10 * size <= points and size <= 50
        at = position.unflatten(0, log_weight.shape)  # [R, G, N, d]
        at, weight = at - at.mean((1, 2), keepdim=True), log_weight.exp().unsqueeze(-1)
        first = (weight * at).sum(2)
        second = (weight * at).mT @ at if dense else (weight * at.square()).sum(2)
        first, second = ((part.sum(1, keepdim=True) - part) / others for part in (first, second))
        outer = first.unsqueeze(-1) * first.unsqueeze(-2) if dense else first.square()
        scale = root(second - outer, points, dense).flatten(0, 1)
        return Frames(scale if dense else scale.unsqueeze(1), dense)
