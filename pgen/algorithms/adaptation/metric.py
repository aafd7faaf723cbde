r"""The scale of a target: its standard deviations, or a Cholesky factor of its covariance, from the draws of all chains.

Two estimates. `covariance` pools what all chains drew, within and between them: right once the chains have forgotten where they
began. `curvature` also asks the gradients, and takes the geometric mean of the covariance of the draws and the inverse
covariance of the gradients,

    Σ = cov(x) # cov(∇)⁻¹

which minimises the Fisher divergence between the whitened target and a standard normal. For a normal target it is
exact, up to rounding, from any d + 2 points, wherever they are: the way to a good scale before the chains have arrived.

References: Preconditioning Hamiltonian Monte Carlo by Minimizing Fisher Divergence (Seyboldt, Carlson & Carpenter,
2026), arXiv:2603.18845. Updating formulae and a pairwise algorithm for computing sample variances (Chan, Golub & LeVeque,
    1979). Stan Reference Manual, HMC algorithm parameters: the shrinkage of few draws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PRIOR = 5.0  # draws' worth of shrinkage


class Moments(NamedTuple):
    """Moments of what every chain has drawn.

    Attributes:
        count: `[C]`; draws of each chain that count.
        mean: `[C, d]`; of each chain.
        scatter: `[d]` or `[d, d]`; squared deviations from the mean of the own chain, summed over chains.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor


class Spread(NamedTuple):
    """A covariance `[d]` or `[d, d]`, and how many independent draws it is worth, `[]`."""

    covariance: Tensor
    effective: Tensor


def nothing(position: Tensor, dense: bool) -> Moments:
    """Moments of no draws of chains at `position` `[C, d]`."""
    d = position.shape[1]
    return Moments(
        torch.zeros_like(position[:, 0]),
        torch.zeros_like(position),
        position.new_zeros((d, d) if dense else (d,)),
    )


def gathered(moments: Moments, draws: Tensor, kept: Tensor | None = None) -> Moments:
    """The moments with `draws` `[n, C, d]` of the chains `kept` `[C]` added; exact, in whatever portions."""
    chains = draws.shape[1]
    kept = torch.ones(chains, dtype=torch.bool, device=draws.device) if kept is None else kept
    draws = torch.where(kept[:, None], draws, moments.mean)
    mean = draws.mean(0)
    added = draws.shape[0] * kept.to(draws.dtype)
    total = moments.count + added
    share = added / total.clamp(min=1.0)
    shift = mean - moments.mean
    inner = draws - mean
    dense = moments.scatter.dim() == 2
    scatter = moments.scatter + _squares(inner.reshape(-1, inner.shape[-1]), dense)
    scatter = scatter + _squares(shift * (moments.count * share).sqrt()[:, None], dense)
    return Moments(total, moments.mean + shift * share[:, None], scatter)


def covariance(moments: Moments) -> Spread:
    """The covariance of all draws around their common mean, without shrinkage.

    The number of independent draws is taken from how much the means of chains differ: n correlated draws of a
    chain whose mean has variance v are worth (variance / v) independent ones.
    """
    count = moments.count
    chains = (count > 0).sum()
    total = count.sum().clamp(min=2.0)
    mean = (count[:, None] * moments.mean).sum(0) / total
    apart = (moments.mean - mean) * (count > 0)[:, None]
    dense = moments.scatter.dim() == 2
    found = (moments.scatter + _squares(apart * count[:, None].sqrt(), dense)) / (total - 1)
    variance = found.diagonal() if dense else found
    of_means = apart.square().sum(0) / (chains - 1).clamp(min=1)
    tiny = torch.finfo(found.dtype).tiny
    worth = (variance.clamp(min=tiny) / of_means.clamp(min=tiny)).median()
    return Spread(found, chains * torch.minimum(worth.clamp(min=1.0), total / chains.clamp(min=1)))


def scale_of(spread: Spread, dense: bool | None = None) -> Tensor:
    """A scale for kernels: standard deviations `[d]`, or a Cholesky factor `[d, d]`.

    Args:
        spread: the covariance and its worth. To the diagonal of the correlations 0.005 / (worth + 5) is added.
        dense: whether to keep correlations; by default where the spread of their eigenvalues is twice what noise
            alone would give (Marchenko & Pastur, 1967), and there are twice as many draws as dimensions.
    """
    found, worth = spread
    if found.dim() == 1:
        return _sound(found).sqrt()
    deviation = _sound(found.diagonal()).sqrt()
    if dense is False:
        return deviation
    d = len(deviation)
    correlation = (found / deviation / deviation[:, None]).nan_to_num(nan=0.0)
    correlation.diagonal().add_(1e-3 * PRIOR / (worth + PRIOR))
    if dense is None:
        if bool(worth < 2 * d):
            return deviation
        values = torch.linalg.eigvalsh(correlation)
        root = (d / worth).sqrt()
        noise = ((1 + root) / (1 - root)) ** 2
        if bool(values[-1] < 2 * noise * values[0].clamp(min=0.0)):
            return deviation
    factor, failed = torch.linalg.cholesky_ex(correlation)
    return deviation if bool(failed) else deviation[:, None] * factor


def curvature(position: Tensor, gradient: Tensor, dense: bool) -> Spread:
    """The geometric mean of the covariance of points and the inverse covariance of gradients there.

    Args:
        position: `[n, d]`.
        gradient: of the log density there, `[n, d]`.
        dense: whether correlations are wanted; there must be more points than dimensions, else they are not given.
    """
    sound = (position.sum(-1) + gradient.sum(-1)).isfinite()
    position, gradient = position[sound], gradient[sound]
    n, d = position.shape
    worth = position.new_tensor(float(n))
    if n < 2:
        return Spread(position.new_ones(d), worth)
    variance = _sound((position.var(0) / _sound(gradient.var(0))).sqrt())
    if not dense or n < d + 2:
        return Spread(variance, worth)
    deviation = variance.sqrt()  # the rest in units of it, for the sake of rounding
    x, g = (position - position.mean(0)) / deviation, (gradient - gradient.mean(0)) * deviation
    ridge = 1 + 100 * torch.finfo(x.dtype).eps * torch.eye(d, dtype=x.dtype, device=x.device)
    root, failed = torch.linalg.cholesky_ex(x.mT @ x / n * ridge)
    if bool(failed):
        return Spread(variance, worth)
    values, vectors = torch.linalg.eigh(root.mT @ (g.mT @ g / n * ridge) @ root)
    # Gradients far from the mode may be collinear, up to rounding: what is below it is noise of either sign.
    least = 100 * d * torch.finfo(x.dtype).eps * values[-1].clamp(min=torch.finfo(x.dtype).tiny)
    half = root @ (vectors * values.clamp(min=least) ** -0.25)
    return Spread(half @ half.mT * deviation * deviation[:, None], worth)


def matched(draws: Moments, slopes: Moments) -> Spread:
    """The geometric mean of the covariance of draws and the inverse covariance of gradients, from their moments.

    As `curvature`, for more points than can be kept: right for a normal target before chains have mixed. Without
    correlations where there are fewer points than four a dimension.
    """
    x, g = covariance(draws).covariance, covariance(slopes).covariance
    worth = draws.count.sum()
    tiny = torch.finfo(x.dtype).tiny
    if x.dim() == 1:
        return Spread((x / g.clamp(min=tiny)).sqrt(), worth)
    deviation = (x.diagonal() / g.diagonal().clamp(min=tiny)).pow(0.25)
    if bool(worth < 4 * len(deviation)):
        return Spread(deviation.square(), worth)
    outer = torch.outer(deviation, deviation)  # in these units both are of order 1
    ridge = 1e-6 * torch.eye(len(deviation), dtype=x.dtype, device=x.device)
    root, failed = torch.linalg.cholesky_ex(x / outer + ridge)
    if bool(failed) or not bool(root.isfinite().all()):
        return Spread(deviation.square(), worth)
    values, vectors = torch.linalg.eigh(root.mT @ (g * outer + ridge) @ root)
    half = root @ (vectors * values.clamp(min=tiny).pow(-0.25))
    return Spread(half @ half.mT * outer, worth)


def lost(log_density: Tensor, slack: float = 1.0) -> Tensor:
    """Chains `[C]` whose log density is hopelessly below that of the others: they have not arrived.

    Below the median by ten times the usual deviation from it, and by d-independent 10 nats, times `slack`; or not finite.
    """
    finite = log_density.isfinite()
    if not bool(finite.any()):
        return ~finite
    centre = log_density[finite].median()
    usual = 1.4826 * (log_density[finite] - centre).abs().median()
    return ~finite | (log_density < centre - slack * (10 * usual + 10))


def arrived(log_density: Tensor) -> Tensor:
    """Chains `[C]` that are not `lost`; all of them, where none is known to be there."""
    there = ~lost(log_density)
    return there if bool(there.any()) else ~there


def _squares(rows: Tensor, dense: bool) -> Tensor:
    return rows.mT @ rows if dense else rows.square().sum(0)


def _sound(variance: Tensor) -> Tensor:
    """Variances with 1 in place of what is no positive finite number."""
    return torch.where((variance > 0) & variance.isfinite(), variance, torch.ones_like(variance))
