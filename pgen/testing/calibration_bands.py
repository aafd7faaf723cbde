r"""Are these ranks uniform: tests with exact or checked error rates, and what is wrong in words.

Where truth and draws have one law, the rank of the truth among L draws is uniform on 0, 1, ..., L. R independent ranks
give the counts $N_k = \#\{r < k\}$, each binomial with $z_k = k / (L + 1)$, and

- `band_p_values`: the smallest two-sided binomial tail probability over all k, turned into a p-value by the exact law
  of the path $N_1, N_2, \ldots$, a Markov chain. Its level sets are the simultaneous bands of a rank ECDF;
- `moment_p_values`: mean and dispersion of the ranks, the directions of a posterior that is off, too narrow or too wide;
- `chi_square_p_values`: counts in bins, for what is wrong in some corner only.

References:
    Talts et al. (2018), arXiv:1804.06788. Säilynoja, Bürkner & Vehtari (2022), Statistics and Computing 32(2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_POINTS = 100  # the ECDF is looked at in so many places at most
_REACH = 4.25  # half the window of counts followed, in units of sqrt(R): 8.5 standard deviations where they are largest
_BINS = 20
_EXPECTED = 10  # least expected count of a bin
_STEEPEST = 200.0  # largest tilt of a saddlepoint
_ROUNDING = 1 + 1e-9  # tails that are equal differ by so much


def ranks_of(truth: Tensor, draws: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rank of the truth among draws: how many are smaller, ties counted at random.

    Uniform on 0, ..., L where truth and draws are exchangeable, continuous or not.

    Args:
        truth: `[...]`.
        draws: `[L, ...]`.
        generator: of the random numbers that settle ties.

    Returns:
        Whole numbers from 0 to L, `[...]`.
    """
    below, tied = (draws < truth).sum(0), (draws == truth).sum(0)
    chance = torch.rand(below.shape, dtype=torch.float64, generator=generator).to(below.device)
    return below + (chance * (tied + 1)).floor().long()


def band_p_values(ranks: Tensor, draws: int) -> Tensor:
    """P-value of uniformity by the worst point of the rank ECDF, exact for finite R and L.

    Args:
        ranks: `[R, Q]`, from 0 to `draws`.
        draws: L.

    Returns:
        One p-value per column, `[Q]`; below 1e-14 they are only known to be that small.
    """
    count = ranks.shape[0]
    cuts = cuts_of(draws)
    lower, upper = _tails(count, cuts / (draws + 1))
    reached = (ranks.T[:, None, :] < cuts[:, None]).sum(-1)  # [Q, K]
    index = torch.arange(len(cuts))
    depth = _ROUNDING * torch.minimum(lower[index, reached], upper[index, reached]).amin(1)  # [Q]
    return _outside(count, cuts / (draws + 1), depth, lower, upper)


def band(count: int, draws: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The simultaneous band of the ECDF of uniform ranks, that is left with probability `alpha` at most.

    Args:
        count: R, the number of ranks.
        draws: L.
        alpha: probability that the ECDF of uniform ranks leaves it anywhere.

    Returns:
        Where it is looked at in (0, 1), and the lowest and highest ECDF there, `[K]` each.
    """
    cuts = cuts_of(draws)
    z = cuts / (draws + 1)
    lower, upper = _tails(count, z)
    tries = alpha / 2 * torch.logspace(0, -math.log10(4 * len(cuts)), 200, dtype=torch.float64)
    leaves = _outside(count, z, tries, lower, upper) <= alpha
    depth = tries[leaves].max() if bool(leaves.any()) else tries[-1]
    low = (lower <= depth).sum(1).double()
    high = count - (upper <= depth).sum(1).double()
    return z, low / count, high / count


def cuts_of(draws: int) -> Tensor:
    """The ranks before which the ECDF is looked at: all of 1, ..., L, or evenly spread ones."""
    return torch.linspace(1, draws, min(draws, _POINTS), dtype=torch.float64).round()


def _tails(count: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """P(N <= n) and P(N >= n) for binomial N, `[K, R + 1]` each."""
    n = torch.arange(count + 1, dtype=torch.float64)
    choose = math.lgamma(count + 1) - torch.lgamma(n + 1) - torch.lgamma(count - n + 1)
    mass = (choose + n * z.log()[:, None] + (count - n) * torch.log1p(-z)[:, None]).exp()
    return mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)


def _outside(count: int, z: Tensor, depth: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Probability `[Q]` that the path of counts is anywhere as deep in a tail as `depth` `[Q]`.

    Forward recursion over the points: given N at one point, the increment to the next is binomial. What leaves is
    added up as it leaves, so that small probabilities keep their digits.
    """
    half = min(count, math.ceil(_REACH * math.sqrt(count)) + 2)
    window = torch.arange(-half, half + 1)
    factorial = torch.lgamma(torch.arange(count + 1, dtype=torch.float64) + 1)
    alive = torch.ones(len(depth), 1, dtype=torch.float64)
    left = torch.zeros(len(depth), dtype=torch.float64)
    here, before = torch.zeros(1, dtype=torch.long), 0.0
    for i, now in enumerate(z.tolist()):
        there = round(count * now) + window
        there = there[(there >= 0) & (there <= count)]
        chance = (now - before) / (1 - before)
        more, rest = (there - here[:, None]), (count - there)
        move = factorial[count - here][:, None] - factorial[more.clamp_min(0)] - factorial[rest]
        move = move + more.double() * math.log(chance) + rest.double() * math.log1p(-chance)
        alive = alive @ move.exp().masked_fill_(more < 0, 0.0)
        lost = 1.0 - left - alive.sum(1)  # beyond the window
        out = torch.minimum(lower[i, there], upper[i, there]) <= depth[:, None]
        left = left + (alive * out).sum(1) + torch.where(lost > 1e-14, lost, 0.0)
        alive = alive.masked_fill(out, 0.0)
        here, before = there, now
    return left.clamp(0.0, 1.0)


def chi_square_p_values(ranks: Tensor, draws: int) -> Tensor:
    """P-value of uniformity by the counts in up to 20 bins that expect at least 10 ranks each, `[Q]`."""
    bins = bins_of(ranks.shape[0], draws)
    if bins < 2:
        return torch.ones(ranks.shape[1], dtype=torch.float64)
    where = torch.arange(draws + 1) * bins // (draws + 1)
    expected = torch.bincount(where) * (ranks.shape[0] / (draws + 1))
    index = where[ranks].T
    seen = torch.zeros(ranks.shape[1], bins, dtype=torch.float64)
    seen.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    statistic = ((seen - expected).square() / expected).sum(1)
    return torch.special.gammaincc(torch.tensor((bins - 1) / 2, dtype=torch.float64), statistic / 2)


def bins_of(count: int, draws: int) -> int:
    """How many bins so many ranks fill."""
    return max(1, min(_BINS, count // _EXPECTED, draws + 1))


def moment_p_values(ranks: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """P-values of mean and dispersion of the ranks: the tests for a posterior that is off, or of the wrong width.

    By the saddlepoint approximation (Lugannani & Rice, 1980), whose relative error stays small far in the tails.

    Args:
        ranks: `[R, Q]`, from 0 to `draws`.
        draws: L.

    Returns:
        Two-sided p-values of mean and dispersion, `[Q]` each.
    """
    centred = torch.arange(draws + 1, dtype=torch.float64) - draws / 2
    mean, spread = (_mean_p_values(values, ranks) for values in (centred, centred.square()))
    return mean, spread


def _mean_p_values(values: Tensor, ranks: Tensor) -> Tensor:
    """P-value of the mean of `values[ranks]` over R uniform ranks."""
    values = (values - values.mean()) / values.std(correction=0)
    count = ranks.shape[0]
    reached = values[ranks].mean(0)
    edge = 1.0 - 1e-6
    reached = reached.clamp(float(values.min()) * edge, float(values.max()) * edge)
    low, high = torch.full_like(reached, -_STEEPEST), torch.full_like(reached, _STEEPEST)
    for _ in range(60):  # bisection for the tilt t that has the mean reached: K'(t) = x
        tilt = (low + high) / 2
        below = (tilt[:, None] * values).softmax(1) @ values < reached
        low, high = torch.where(below, tilt, low), torch.where(below, high, tilt)
    weights = (tilt[:, None] * values).softmax(1)
    cumulant = (tilt[:, None] * values).logsumexp(1) - math.log(len(values))
    variance = weights @ values.square() - (weights @ values).square()
    w = (2 * count * (tilt * reached - cumulant)).clamp_min(0.0).sqrt()
    u = tilt.abs() * (count * variance).sqrt()
    normal = torch.special.erfc(w / math.sqrt(2.0))
    correction = (-w.square() / 2).exp() * math.sqrt(2 / math.pi) * (1 / u - 1 / w)
    return torch.where(w < 1e-2, normal, normal + correction).clamp(0.0, 1.0)


class Uniformity(NamedTuple):
    """How uniform ranks are, `[Q]` each.

    Attributes:
        p: p-value of all four tests together (Bonferroni): the one to go by.
        band: of the rank ECDF.
        mean: of the mean of the ranks.
        spread: of their dispersion.
        chi_square: of their counts in bins.
        lean: score of the mean: positive where the truth ranks high, and the draws are too low.
        width: score of the dispersion: positive where the truth ranks at the ends, and the draws are too narrow.
    """

    p: Tensor
    band: Tensor
    mean: Tensor
    spread: Tensor
    chi_square: Tensor
    lean: Tensor
    width: Tensor


def uniformity(ranks: Tensor, draws: int) -> Uniformity:
    """All tests of ranks `[R, Q]` from 0 to `draws`."""
    path, bins = band_p_values(ranks, draws), chi_square_p_values(ranks, draws)
    mean, spread = moment_p_values(ranks, draws)
    # With ten ranks a bin, chi-square's tail at 1e-6 is up to four times as heavy as its limit: it gets a lesser share.
    least = torch.stack([path, mean, spread, 4 * bins]).amin(0)
    return Uniformity((4 * least).clamp_max(1.0), path, mean, spread, bins, *scores(ranks, draws))


def holm(p: Tensor) -> Tensor:
    """P-values adjusted for their number: those up to alpha are false alarms with probability alpha at most, in all.

    >>> [round(p, 3) for p in holm(torch.tensor([0.01, 0.5, 0.02])).tolist()]
    [0.03, 0.5, 0.04]

    References:
        Holm (1979), Scandinavian Journal of Statistics 6(2).
    """
    order = p.argsort()
    weights = torch.arange(len(p), 0, -1, dtype=p.dtype, device=p.device)
    adjusted = (p[order] * weights).cummax(0).values.clamp_max(1.0)
    return torch.empty_like(p).scatter_(0, order, adjusted)


def scores(ranks: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and dispersion of the ranks as standard scores, `[Q]` each, about normal where ranks are uniform.

    The first is positive where the truth ranks high (draws too low), the second where it ranks at the ends too often
    (draws too narrow).
    """
    count, levels = ranks.shape[0], draws + 1
    u = (ranks.double() + 0.5) / levels - 0.5
    second = (1 - levels**-2) / 12  # moments of the uniform law on the midpoints of `levels` cells
    fourth = (1 - levels**-2) * (1 - 7 / 3 * levels**-2) / 80
    spread = max(fourth - second**2, 1e-12)
    return u.mean(0) * math.sqrt(count / second), (u.square().mean(0) - second) * math.sqrt(count / spread)
