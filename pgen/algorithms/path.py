"""The geometric path from a density that one can sample to one that one wants.

    log pi_beta(q) = (1 - beta) log reference(q) + beta log target(q),   0 <= beta <= 1

Annealed importance sampling, tempered SMC and parallel tempering all walk on it. They keep the two densities and their
gradients apart (a `Cloud`), so that moving to another temperature costs no evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Kernel, LogDensity, Tuning, pull, push

Recorder = Callable[[Callable[..., Any]], Callable[..., Any]]


class Cloud(NamedTuple):
    """Positions and the two halves of the path there.

    Attributes:
        position: `[C, d]`.
        base: log density of the reference, `[C]`.
        base_gradient: `[C, d]`.
        ratio: log density of the target over that of the reference, `[C]`; finite (very low where the target is 0).
        ratio_gradient: `[C, d]`; 0 where it is not a number.
    """

    position: Tensor
    base: Tensor
    base_gradient: Tensor
    ratio: Tensor
    ratio_gradient: Tensor

    def at(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Log density `[C]` and gradient `[C, d]` at inverse temperature `beta`, `[]` or `[C]`."""
        column = beta.unsqueeze(-1)
        return self.base + beta * self.ratio, self.base_gradient + column * self.ratio_gradient

    def take(self, index: Tensor) -> Cloud:
        """The rows named by `index` `[C]`."""
        return Cloud(*(part[index] for part in self))


class Path(NamedTuple):
    """A target and where to come from.

    Attributes:
        target: log density, unnormalised, and its gradient.
        reference: log density, *normalised*, and its gradient. None: flat, so that the path is that of the powers
            `target ** beta` (for parallel tempering only).
        sample: n to n independent draws of the reference, `[n, d]`.
    """

    target: LogDensity
    reference: LogDensity | None = None
    sample: Callable[[int], Tensor] | None = None

    def evaluate(self, position: Tensor) -> Cloud:
        """Both densities at `position` `[C, d]`."""
        density, gradient = self.target(position)
        if self.reference is None:
            base, base_gradient = torch.zeros_like(density), torch.zeros_like(position)
        else:
            base, base_gradient = self.reference(position)
        # Minus infinity times beta = 0 would not be a number; what is this low is never kept.
        least = math.sqrt(torch.finfo(density.dtype).max)
        ratio = (density - base).nan_to_num(nan=-least, posinf=-least, neginf=-least)
        ratio_gradient = (gradient - base_gradient).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return Cloud(position, base, base_gradient, ratio, ratio_gradient)

    def at(self, beta: Tensor) -> LogDensity:
        """The density at inverse temperature `beta`, `[]` or `[C]`, as kernels take it."""
        return lambda position: self.evaluate(position).at(beta)


def path_of(target: Path | LogDensity) -> Path:
    """A plain density as a path of its powers."""
    return target if isinstance(target, Path) else Path(target)


def gaussian(mean: Tensor, scale: Tensor) -> tuple[LogDensity, Callable[[int], Tensor]]:
    """A normal distribution as a reference: its density, with gradient, and its sampler.

    Args:
        mean: `[d]`.
        scale: standard deviations `[d]` or a Cholesky factor `[d, d]`, as in `Tuning`.

    Example:
        >>> density, sample = gaussian(torch.zeros(2), torch.ones(2))
        >>> density(torch.ones(1, 2))
        (tensor([-2.8379]), tensor([[-1., -1.]]))
        >>> Path(target=density, reference=density, sample=sample).evaluate(sample(3)).ratio
        tensor([0., 0., 0.])
    """
    diagonal = scale if scale.dim() == 1 else scale.diagonal()
    constant = -diagonal.log().sum() - mean.numel() * math.log(2 * math.pi) / 2
    whiten = scale.reciprocal() if scale.dim() == 1 else torch.linalg.inv(scale)

    def density(q: Tensor) -> tuple[Tensor, Tensor]:
        z = push(whiten, q - mean)
        return constant - z.square().sum(-1) / 2, -pull(whiten, z)

    def sample(n: int) -> Tensor:
        return mean + push(scale, torch.randn(n, mean.numel(), dtype=mean.dtype, device=mean.device))

    return density, sample


# --- walking on it ---


class Ladder(NamedTuple):
    """Inverse temperatures and how the kernel is tuned at each.

    Attributes:
        beta: `[n + 1]`, rising from 0 to 1.
        tuning: for the last n of them, each field with n in front.
    """

    beta: Tensor
    tuning: Tuning

    def tuned(self, rung: int) -> Tuning:
        """The tuning at `beta[rung]`, rung 1..n."""
        return Tuning(*(field[rung - 1] for field in self.tuning))

    def finer(self, times: int) -> Ladder:
        """Every step in `times` equal ones: the bounds of annealed importance sampling close in as 1 / times."""
        share = torch.arange(1, times + 1, dtype=self.beta.dtype, device=self.beta.device) / times
        steps = torch.lerp(self.beta[:-1, None], self.beta[1:, None], share).flatten()
        tuning = Tuning(*(field.repeat_interleave(times, 0) for field in self.tuning))
        return Ladder(torch.cat([self.beta[:1], steps]), tuning)


def even_ladder(rungs: int, tuning: Tuning, power: float = 3.0) -> Ladder:
    """`beta = (t / n) ** power` for t = 0..n, one tuning for all: for a start, dense where priors are left behind.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> even_ladder(4, untuned(torch.zeros(1, 2)), power=2.0).beta
        tensor([0.0000, 0.0625, 0.2500, 0.5625, 1.0000])
    """
    if rungs < 1:
        raise ValueError(f"a ladder needs at least 1 rung, got {rungs}")
    size = tuning.step_size
    beta = torch.linspace(0, 1, rungs + 1, dtype=size.dtype, device=size.device) ** power
    return Ladder(beta, Tuning(*(field.expand(rungs, *field.shape) for field in tuning)))


class Walk(NamedTuple):
    """The moves at one temperature: straight-line code over tensors, to be called as it is or recorded.

    Attributes:
        kernel: leaves the tempered density invariant.
        path: where it is tempered.
        moves: how many times the kernel is applied. The path is evaluated once more at the end, to have its two
            halves apart.
        accept: acceptance to adapt the step size to on the way; None leaves it.
    """

    kernel: Kernel
    path: Path
    moves: int
    accept: float | None = None

    def __call__(self, cloud: Cloud, beta: Tensor, tuning: Tuning) -> tuple[Cloud, Tuning, Tensor]:
        """The cloud `moves` steps later, the step size adapted, and the mean acceptance `[]`."""
        position, tuning, accept = self.move(cloud, beta, tuning)
        return self.path.evaluate(position), tuning, accept

    def move(self, cloud: Cloud, beta: Tensor, tuning: Tuning) -> tuple[Tensor, Tuning, Tensor]:
        """The same without the last evaluation: positions `[C, d]` only."""
        state = self.kernel.init(cloud.position, lambda _: cloud.at(beta))  # known there already
        total = torch.zeros_like(beta)
        for _ in range(self.moves):
            state, info = self.kernel.step(state, tuning, self.path.at(beta))
            accept = info.accept.mean()
            total = total + accept
            if self.accept is not None:
                tuning = tuning._replace(step_size=tuning.step_size * (accept - self.accept).exp())
        return state.position, tuning, total / self.moves


class Frames(NamedTuple):
    """Coordinates u of G groups of rows, each with its own scale: `q = scale u`.

    Attributes:
        scale: of each group, `[G, 1, d]` or lower-triangular `[G, d, d]`.
        dense: whether it is the latter.
    """

    scale: Tensor
    dense: bool

    def push(self, u: Tensor) -> Tensor:
        """From u to q, `[C, d]`, C a multiple of G."""
        rows = u.unflatten(0, (len(self.scale), -1))
        return (rows @ self.scale.mT if self.dense else rows * self.scale).flatten(0, 1)

    def pull(self, gradient: Tensor) -> Tensor:
        """A gradient by q as one by u."""
        rows = gradient.unflatten(0, (len(self.scale), -1))
        return (rows @ self.scale if self.dense else rows * self.scale).flatten(0, 1)

    def solve(self, q: Tensor) -> Tensor:
        """From q to u."""
        rows = q.unflatten(0, (len(self.scale), -1))
        if not self.dense:
            return (rows / self.scale).flatten(0, 1)
        return torch.linalg.solve_triangular(self.scale.mT, rows, upper=True, left=False).flatten(0, 1)

    def path(self, path: Path) -> Path:
        """The path, seen in u."""

        def seen(density: LogDensity) -> LogDensity:
            def inner(u: Tensor) -> tuple[Tensor, Tensor]:
                value, gradient = density(self.push(u))
                return value, self.pull(gradient)

            return inner

        return Path(seen(path.target), None if path.reference is None else seen(path.reference))

    def cloud(self, cloud: Cloud) -> Cloud:
        """The cloud, seen in u."""
        return Cloud(
            self.solve(cloud.position),
            cloud.base,
            self.pull(cloud.base_gradient),
            cloud.ratio,
            self.pull(cloud.ratio_gradient),
        )


def root(covariance: Tensor, points: int, dense: bool) -> Tensor:
    """Standard deviations of variances `[..., d]`, or the Cholesky factor of covariances `[..., d, d]` of so many points.

    Correlations are shrunk by d / (S + d), so that the factor exists for any number S of points.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1) if dense else covariance
    deviation = variance.clamp_min(torch.finfo(variance.dtype).eps ** 2).sqrt()
    if not dense:
        return deviation
    size = variance.shape[-1]
    correlation = covariance / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))
    one = torch.eye(size, dtype=variance.dtype, device=variance.device)
    correlation = correlation * (1 - one) * (points / (points + size)) + one
    return deviation.unsqueeze(-1) * torch.linalg.cholesky_ex(correlation).L


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The recorder that records nothing."""
    return function
