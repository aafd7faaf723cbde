r"""Pathfinder: normals along the way to a mode, the best of which is a start for Markov chains.

L-BFGS climbs the log density from P starting points at once. At every iterate θ, with gradient g, its estimate H of
the inverse Hessian gives a normal, :math:`N(\theta + H g, H)`; of each path the one with the highest evidence lower
bound (ELBO) is kept. On a density without a maximum, such as a funnel's, that is one from the middle of the way.
Draws of all paths are then weighed by density, the weights Pareto-smoothed, and some resampled.

H is a diagonal and a matrix of rank 2J, from the last J differences of positions, S, and of gradients, Y:

.. math:: H = \mathrm{diag}(\alpha) + \beta\, \gamma\, \beta^\top, \qquad
          \beta = [\mathrm{diag}(\alpha)\, Y,\ S]

References:
    Pathfinder: parallel quasi-Newton variational inference (Zhang, Carpenter, Gelman & Vehtari, JMLR 23, 2022),
    arXiv:2108.03782: algorithms 1 to 5. The line search is the bisection for weak Wolfe conditions of Lewis &
    Overton (Mathematical Programming 141, 2013), algorithm 2.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import LogDensity, where
from pgen.algorithms.psis import psis

SUFFICIENT = 1e-4  # of the rise that the slope promises is enough
FLATTENED = 0.9  # of the slope must be gone at the end of a step
CURVED = 1e-12  # the least s'y / y'y that counts as curvature


class Found(NamedTuple):
    """What Pathfinder finds.

    Attributes:
        position: starting points for chains, `[C, d]`: distinct draws, resampled by smoothed importance weights.
        mean: that of the normal with the highest ELBO, `[d]`.
        scale: square root of its covariance, a Cholesky factor `[d, d]`, or standard deviations `[d]`.
        elbo: the ELBO of each path's best normal, from fresh draws, `[P]`, in nats; minus infinity where a path
            found nothing, or its normal has draws of density zero.
        khat: tail shape of the importance weights, `[]`: above 0.7 the normals are a poor stand-in for the
            target (and still a fair start).
        evaluations: evaluations of the target, of P rows each.
    """

    position: Tensor
    mean: Tensor
    scale: Tensor
    elbo: Tensor
    khat: Tensor
    evaluations: int


class Memory(NamedTuple):
    """What L-BFGS remembers of P paths: `alpha` `[P, d]`; the last J steps and gradient changes `[P, J, d]`.

    Rows of zeros have not been filled yet and change nothing.
    """

    alpha: Tensor
    steps: Tensor
    changes: Tensor


class Normal(NamedTuple):
    r"""Normals `N(mean, H)`, with :math:`H = D (I + Q (L L^\top - I) Q^\top) D`, D the diagonal `root`.

    Attributes:
        mean: `[P, d]`.
        root: square root of α, `[P, d]`.
        basis: Q, orthonormal columns, `[P, d, k]`.
        factor: L, lower triangular, `[P, k, k]`.
        valid: whether H is positive definite and all is finite, `[P]`.
    """

    mean: Tensor
    root: Tensor
    basis: Tensor
    factor: Tensor
    valid: Tensor

    def draw(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise `[P, d]` as one draw of each, `[P, d]`, and its log density, `[P]`."""
        inside = (noise.unsqueeze(-2) @ self.basis).squeeze(-2)
        moved = noise + self._along((self.factor @ inside.unsqueeze(-1)).squeeze(-1) - inside)
        half_log_det = self.root.log().sum(-1) + self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = self.mean.shape[-1] / 2 * math.log(2 * math.pi)
        return self.mean + self.root * moved, -noise.square().sum(-1) / 2 - half_log_det - constant

    def covariance(self) -> Tensor:
        """H as matrices, `[P, d, d]`."""
        half = self.root.unsqueeze(-1) * self.basis
        excess = self.factor @ self.factor.mT - torch.eye(
            self.factor.shape[-1], dtype=half.dtype, device=half.device
        )
        return torch.diag_embed(self.root.square()) + half @ excess @ half.mT

    def variance(self) -> Tensor:
        """The diagonal of H, `[P, d]`."""
        stretched = self.basis @ self.factor
        excess = stretched.square().sum(-1) - self.basis.square().sum(-1)
        return self.root.square() * (1 + excess)

    def _along(self, coefficients: Tensor) -> Tensor:
        return (self.basis @ coefficients.unsqueeze(-1)).squeeze(-1)


class Point(NamedTuple):
    """An iterate of each path: position `[P, d]`, log density `[P]`, gradient `[P, d]`."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Pathfinder:
    """Multi-path Pathfinder, batched over its paths.

    The target is only ever called with as many rows as there are paths, so that one recording of it serves.

    Attributes:
        history: J, how many differences the inverse Hessian is made of.
        iterations: of L-BFGS, at most.
        elbo_draws: evaluations per iterate and path for the ELBO; in antithetic pairs.
        draws: per path, to resample from.
        tolerance: a path ends where the log density rises by less, relative to its size.
        dense: whether `Found.scale` is a Cholesky factor or standard deviations.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> def target(q):  # mean 3, standard deviation 2
        ...     return -(q - 3).square().sum(-1) / 8, (3 - q) / 4
        >>> found = Pathfinder().run(torch.randn(8, 2, dtype=torch.float64), target, chains=16)
        >>> found.mean, found.scale.diagonal(), found.position.shape
        (tensor([3., 3.], dtype=torch.float64), tensor([2.0000, 2.0000], dtype=torch.float64), torch.Size([16, 2]))
    """

    history: int = 6
    iterations: int = 100
    elbo_draws: int = 10
    draws: int = 20
    tolerance: float = 1e-10
    dense: bool = True

    def __post_init__(self) -> None:
        """Refuse counts of nothing."""
        counts = {n: getattr(self, n) for n in ("history", "iterations", "elbo_draws", "draws")}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"Pathfinder({name}={value}): expected at least 1")
        if not self.tolerance >= 0:
            raise ValueError(f"Pathfinder(tolerance={self.tolerance}): expected a number of at least 0")

    def run(self, start: Tensor, target: LogDensity, chains: int) -> Found:
        """Climb from `start` `[P, d]`, and choose starting points for so many chains.

        Raises:
            ValueError: there are fewer draws to resample from than chains; or no path met a normal of finite ELBO.
        """
        paths = len(start)
        if chains > paths * self.draws:
            raise ValueError(
                f"{chains} chains need {chains} distinct draws, and {paths} paths of {self.draws} draws give "
                f"{paths * self.draws}: raise Pathfinder(draws=...) to {math.ceil(chains / paths)} or more"
            )
        counted = _Counted(target)
        normal, elbo = self.climb(start, counted)
        if not bool(elbo.isfinite().any()):
            raise ValueError(
                f"none of {paths} paths met a finite ELBO: the log density or its gradient is not finite near the "
                "starting points; start elsewhere"
            )
        drawn = [normal.draw(torch.randn_like(start)) for _ in range(self.draws)]
        positions = torch.cat([position for position, _ in drawn])
        reached = torch.cat([counted(position)[0] for position in positions.split(paths)])
        weights = _rounded(reached - torch.cat([log_density for _, log_density in drawn]), reached)
        weights = torch.where(elbo.isfinite().repeat(self.draws), weights, -math.inf)
        weights = weights.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
        # From fresh draws: an ELBO that was the highest of many is also the luckiest.
        elbo = weights.reshape(self.draws, paths).mean(0)
        best = Normal(*(field[_certain(weights.reshape(self.draws, paths)).argmax()] for field in normal))
        best = Normal(*(field[elbo.argmax()] for field in normal))
        smoothed = psis(weights)
        # The largest of log weights plus Gumbel noise: draws in proportion to weights, each no more than once.
        noise = -torch.empty_like(weights).exponential_().log()
        ranked = (smoothed.log_weights.clamp(min=-1e30) + noise).topk(chains).indices
        scale = torch.linalg.cholesky(best.covariance()) if self.dense else best.variance().sqrt()
        return Found(positions[ranked], best.mean, scale, elbo, smoothed.khat, counted.calls)

    def climb(self, start: Tensor, target: LogDensity) -> tuple[Normal, Tensor]:
        """The best normal of each path, and a lower bound of its ELBO, `[P]` (algorithm 1)."""
        point = Point(start, *target(start))
        empty = start.new_zeros(len(start), self.history, start.shape[-1])
        memory = Memory(torch.ones_like(start), empty, empty)
        best = normal_at(point, memory)
        highest = torch.full_like(point.log_density, -math.inf)
        active = point.log_density.isfinite()
        # The same noise for all iterates: what decides is their difference, not whose draws were luckier.
        half = torch.randn_like(start.expand(-(-self.elbo_draws // 2), *start.shape))
        noise = torch.cat([half, -half])[: self.elbo_draws]
        for iteration in range(self.iterations):
            moved, rose = _line_search(point, inverse_hessian(memory, point.gradient), target, iteration == 0)
            moved = where(active & rose, moved, point)
            memory = updated(memory, moved.position - point.position, point.gradient - moved.gradient)
            gain = moved.log_density - point.log_density
            point = moved
            normal = normal_at(point, memory)
            score = torch.where(active & rose, _score(normal, noise, target), -math.inf)
            best = where(score > highest, normal, best)
            highest = torch.maximum(highest, score)
            active = active & rose & (gain > self.tolerance * point.log_density.abs().clamp(min=1.0))
            if not bool(active.any()):
                break
        return best, highest


def _rounded(weights: Tensor, terms: Tensor) -> Tensor:
    """Differences without the digits that cancellation made up: they would look like a tail of the weights."""
    digit = 512 * torch.finfo(weights.dtype).eps * terms[terms.isfinite()].abs().amax().clamp(min=1.0)
    return (weights / digit).round() * digit


def _score(normal: Normal, noise: Tensor, target: LogDensity) -> Tensor:
    """The `_certain` ELBO of each normal, from these draws; minus infinity where it is none."""
    drawn = [normal.draw(one) for one in noise]
    weights = torch.stack([target(position)[0] - log_density for position, log_density in drawn])
    return torch.where(normal.valid, _certain(weights), -math.inf)


def _certain(weights: Tensor) -> Tensor:
    """An ELBO less its standard error, from log weights `[draws, P]`; minus infinity where one is not finite.

    Of many noisy estimates the highest are the luckiest. Less the standard error, which vanishes as q comes near p,
    the best is also one whose ELBO is known.
    """
    error = weights.std(0) / math.sqrt(len(weights)) if len(weights) > 1 else 0.0
    return (weights.mean(0) - error).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


# --- the inverse Hessian ---


def updated(memory: Memory, step: Tensor, change: Tensor) -> Memory:
    """Remember a step s and the change y of the (negative) gradient over it, where there is curvature between them.

    The diagonal follows Gilbert & Lemaréchal (1989), as in Zhang et al., algorithm 3.
    """
    alpha = memory.alpha
    b = (step * change).sum(-1, keepdim=True)
    curved = b > CURVED * change.square().sum(-1, keepdim=True)
    curved = curved & b.isfinite()
    b = torch.where(curved, b, 1.0)
    a = (change.square() * alpha).sum(-1, keepdim=True)
    c = (step.square() / alpha).sum(-1, keepdim=True)
    c = torch.where(curved, c, 1.0)
    inverse = a / (b * alpha) + change.square() / b - a * step.square() / (b * c * alpha.square())
    positive = curved & (inverse > 0).all(-1, keepdim=True)
    shift = curved.unsqueeze(-1)
    return Memory(
        torch.where(positive, 1 / inverse, alpha),
        torch.where(shift, torch.cat([memory.steps[:, 1:], step.unsqueeze(1)], 1), memory.steps),
        torch.where(shift, torch.cat([memory.changes[:, 1:], change.unsqueeze(1)], 1), memory.changes),
    )


def _factors(memory: Memory) -> tuple[Tensor, Tensor]:
    """β `[P, d, 2J]` and γ `[P, 2J, 2J]`."""
    alpha, steps, changes = memory
    products = steps @ changes.mT  # s_i . y_j
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    filled = diagonal > 0
    triangle = products.triu() + torch.diag_embed((~filled).to(products.dtype))
    identity = torch.eye(len(products[0]), dtype=products.dtype, device=products.device)
    inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
    weighted = alpha.unsqueeze(1) * changes
    corner = inverse.mT @ (torch.diag_embed(diagonal) + changes @ weighted.mT) @ inverse
    gamma = torch.cat(
        [
            torch.cat([torch.zeros_like(inverse), -inverse], -1),
            torch.cat([-inverse.mT, corner], -1),
        ],
        -2,
    )
    return torch.cat([weighted, steps], 1).mT, gamma


def inverse_hessian(memory: Memory, vector: Tensor) -> Tensor:
    """H times a vector, `[P, d]`."""
    beta, gamma = _factors(memory)
    return memory.alpha * vector + (beta @ (gamma @ (beta.mT @ vector.unsqueeze(-1)))).squeeze(-1)


def normal_at(point: Point, memory: Memory) -> Normal:
    """The normal of an iterate: one Newton step ahead of it, with covariance H (algorithm 4)."""
    beta, gamma = _factors(memory)
    root = memory.alpha.sqrt()
    basis, triangle = torch.linalg.qr(beta / root.unsqueeze(-1))
    inner = triangle @ gamma @ triangle.mT
    inner = inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    factor, failed = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
    mean = point.position + inverse_hessian(memory, point.gradient)
    return Normal(mean, root, basis, factor, (failed == 0) & mean.isfinite().all(-1))


# --- the climb ---


def _line_search(
    point: Point,
    direction: Tensor,
    target: LogDensity,
    first: bool,
    trials: int = 20,
) -> tuple[Point, Tensor]:
    """Along each direction to a point that satisfies the weak Wolfe conditions; whether there was a rise at all.

    Halve the step while the rise is less than the slope promised, double it while the slope has not flattened.
    """
    slope = (direction * point.gradient).sum(-1)
    uphill = slope > 0
    direction = torch.where(uphill.unsqueeze(-1), direction, point.gradient)
    slope = torch.where(uphill, slope, point.gradient.square().sum(-1))
    size = torch.ones_like(slope)
    if first:  # no curvature is known yet
        size = size / point.gradient.norm(dim=-1).clamp(min=1.0)
    low, high = torch.zeros_like(size), torch.full_like(size, math.inf)
    best, done = point, torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(trials):
        position = point.position + size.unsqueeze(-1) * direction
        trial = Point(position, *target(position))
        sound = trial.log_density.isfinite() & trial.gradient.isfinite().all(-1)
        risen = sound & (trial.log_density >= point.log_density + SUFFICIENT * size * slope)
        flat = (trial.gradient * direction).sum(-1) <= FLATTENED * slope
        # Any sufficient rise is kept, so that a search that runs out of trials has something to show.
        best = where(risen & ~done, trial, best)
        done = done | (risen & flat)
        if bool(done.all()):
            break
        high = torch.where(done | risen, high, size)
        low = torch.where(~done & risen, size, low)
        size = torch.where(done, size, torch.where(high.isinf(), 2 * low, (low + high) / 2))
    return best, best.log_density > point.log_density


class _Counted:
    """A target that counts its evaluations."""

    def __init__(self, target: LogDensity) -> None:
        self.target, self.calls = target, 0

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.target(position)
