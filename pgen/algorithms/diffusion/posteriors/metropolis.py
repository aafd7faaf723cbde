r"""Metropolis moves for a denoiser: exact in the end, though the density is never known.

All that a Metropolis step asks of a density is a ratio between two points, and that is an integral of the score along
the line between them:

    log p(x') - log p(x) = int_0^1 <s(x + u (x' - x)), x' - x> du,    s = (D - x) / sigma^2

a smooth function on an interval, to which a few Gauss-Legendre nodes do justice: with the scores at both ends, which
Langevin proposals need anyway, a step costs some evaluations and leaves p_sigma(x) p(y | x) as it is. Needs a denoiser
whose score is a gradient (a network's is so to its training error, its line integral then being the best guess).

References:
    Roberts & Tweedie, Exponential convergence of Langevin distributions, Bernoulli 1996 (MALA). Sjöberg, Lindqvist &
    Önnheim, MCMC-Correction of Score-Based Diffusion Models for Model Composition, 2023 (the line integral).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, Field, per_row, score_of
from pgen.algorithms.diffusion.posteriors.guide import (
    LogLikelihood,
    log_likelihood_and_gradient,
    over_event,
)
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian
from pgen.algorithms.diffusion.posteriors.resampling import uniform_rows


def log_ratio(denoiser: Denoiser, x: Tensor, other: Tensor, sigma: Tensor, nodes: int = 4) -> Tensor:
    """log p_sigma(other) - log p_sigma(x), `[B]`, in nats, by Gauss-Legendre integration of the score.

    Exact for Gaussians with two nodes; for others, the error falls geometrically in the nodes, faster the closer the
    points.

    Args:
        denoiser: D.
        x: `[B, *event]`.
        other: `[B, *event]`.
        sigma: noise levels, `[B]`.
        nodes: evaluations. One after another, as a denoiser's rows may have conditions of their own.

    Example:
        >>> standard = lambda x, sigma: x / (1 + sigma[:, None] ** 2)
        >>> log_ratio(standard, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1))
        tensor([-0.5000])
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    apart = other - x
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for place, weight in zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
        at = x + place * apart
        total = total + weight * over_event(score_of(denoiser(at, sigma), at, sigma) * apart)
    return total


class Metric(Protocol):
    """A covariance M that proposals follow."""

    def apply(self, v: Tensor) -> Tensor:
        """M v."""
        ...

    def draw(self, like: Tensor, field: Field) -> Tensor:
        """N(0, M)."""
        ...

    def square(self, v: Tensor) -> Tensor:
        """v' M^-1 v, `[B]`."""
        ...


@dataclass(frozen=True)
class Euclidean:
    """The identity."""

    def apply(self, v: Tensor) -> Tensor:
        """v."""
        return v

    def draw(self, like: Tensor, field: Field) -> Tensor:
        """Standard normal numbers."""
        return field.noise(like)

    def square(self, v: Tensor) -> Tensor:
        """The squared length."""
        return over_event(v.square())


@dataclass(frozen=True, eq=False)
class Conditioned:
    """The posterior covariance of a prior N(., v I): (I / v + A' R^-1 A)^-1, never made in full.

    Attributes:
        observation: linear and Gaussian.
        variance: v: of the prior, locally.
    """

    observation: LinearGaussian
    variance: float = 1.0

    def apply(self, v: Tensor) -> Tensor:
        """v less what the observation explains of it."""
        c = self.variance
        return c * (v - self._explained(c * self.observation.operator(v)))

    def draw(self, like: Tensor, field: Field) -> Tensor:
        """A draw of the prior, corrected by a draw of the observation (Matheron's rule)."""
        free = self.variance**0.5 * field.noise(like)
        seen = self.observation.operator(free)
        seen = seen + field.noise(seen) / self.observation.root(seen)
        return free - self.variance * self._explained(seen)

    def square(self, v: Tensor) -> Tensor:
        """|v|^2 / variance + |R^-1/2 A v|^2."""
        seen = self.observation.operator(v)
        return over_event(v.square()) / self.variance + over_event(
            (self.observation.root(seen) * seen).square()
        )

    def _explained(self, seen: Tensor) -> Tensor:
        spread = seen.new_full((len(seen),), self.variance)
        return self.observation.operator.adjoint(self.observation.solve(seen, spread))


class Moves(NamedTuple):
    """Where chains are.

    Attributes:
        x: `[B, *event]`.
        gradient: of the log target, `[B, *event]`.
        log_likelihood: `[B]`.
        step_size: of each chain, `[B]`.
        accept: mean acceptance probability so far (of the last steps, in `refine`), `[B]`.
    """

    x: Tensor
    gradient: Tensor
    log_likelihood: Tensor
    step_size: Tensor
    accept: Tensor


@dataclass(frozen=True, eq=False)
class LineMALA:
    r"""The Metropolis-adjusted Langevin algorithm for p_sigma(x) p(y | x), by line integrals of the score.

        x' = x + h/2 M grad log p_sigma(x) p(y | x) + sqrt(h) M^(1/2) z

    Attributes:
        log_likelihood: log p(y | x), `[B]`; for the prior itself: `lambda x: x.new_zeros(len(x))`.
        sigma: noise level of the prior.
        nodes: of the line integral.
        metric: M.
    """

    log_likelihood: LogLikelihood
    sigma: float
    nodes: int = 4
    metric: Metric = Euclidean()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.sigma <= 0 or self.nodes < 1:
            raise ValueError(f"LineMALA(sigma={self.sigma}, nodes={self.nodes}): expected positive numbers")

    def init(self, x: Tensor, field: Field, step_size: float | Tensor) -> Moves:
        """Chains at x `[B, *event]`; step sizes of all or each."""
        log_likelihood, gradient = self._target(x, field)
        step = torch.as_tensor(step_size, dtype=x.dtype, device=x.device).expand(len(x))
        return Moves(x, gradient, log_likelihood, step, torch.zeros_like(step))

    def step(self, state: Moves, field: Field) -> Moves:
        """A proposal, accepted or not; `accept` is then its probability."""
        x, step = state.x, per_row(state.step_size, state.x)
        proposed = x + step / 2 * self.metric.apply(state.gradient)
        proposed = proposed + step.sqrt() * self.metric.draw(x, field)
        log_likelihood, gradient = self._target(proposed, field)
        sigma = x.new_full((len(x),), self.sigma)
        log = log_ratio(field, x, proposed, sigma, self.nodes) + log_likelihood - state.log_likelihood
        there = self.metric.square(proposed - x - step / 2 * self.metric.apply(state.gradient))
        back = self.metric.square(x - proposed - step / 2 * self.metric.apply(gradient))
        log = log + (there - back) / (2 * state.step_size)
        accept = torch.nan_to_num(log, nan=-torch.inf).clamp(max=0).exp()
        taken = uniform_rows(field, x).to(accept) < accept
        row = per_row(taken, x)
        return Moves(
            torch.where(row, proposed, x),
            torch.where(row, gradient, state.gradient),
            torch.where(taken, log_likelihood, state.log_likelihood),
            state.step_size,
            accept,
        )

    def _target(self, x: Tensor, field: Field) -> tuple[Tensor, Tensor]:
        log_likelihood, gradient = log_likelihood_and_gradient(self.log_likelihood, x)
        return log_likelihood, gradient + score_of(field(x, self.sigma), x, self.sigma)


def refine(
    kernel: LineMALA,
    x: Tensor,
    field: Field,
    steps: int,
    *,
    step_size: float = 0.1,
    accept: float = 0.574,
) -> Moves:
    """Some moves from x: in the first half each chain's step size follows its acceptance, in the second it rests.

    Args:
        kernel: the moves.
        x: where to begin, `[B, *event]`.
        field: the prior, and the random numbers.
        steps: how many, adapting ones included.
        step_size: to begin with.
        accept: acceptance to adapt to; 0.574 is best in many dimensions (Roberts & Rosenthal, 1998).
    """
    with torch.no_grad():
        state = kernel.init(x, field, step_size)
        half, seen = steps // 2, torch.zeros_like(state.step_size)
        for n in range(steps):
            state = kernel.step(state, field)
            if n < half:
                gain = 2 / (n + 1) ** 0.6
                state = state._replace(step_size=state.step_size * (gain * (state.accept - accept)).exp())
            else:
                seen = seen + state.accept / (steps - half)
    return state._replace(accept=seen)
