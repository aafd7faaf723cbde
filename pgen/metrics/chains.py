r"""Have Markov chains forgotten where they started, and what are their draws worth: R-hat, ESS, MCSE, E-BFMI.

Draws are `[chains, draws, *event]`; every coordinate of the event is judged on its own, all of them at once. Each
chain is cut into halves, so that a drift shows as a disagreement, and one chain can be judged too (the middle
draw of an odd number is left out). Rank-normalised means: values are replaced by normal quantiles of their ranks

.. math:: z = \Phi^{-1}\Big(\frac{r - 3/8}{S + 1/4}\Big)

so that the answer exists and means the same whatever the tails. Effective sample sizes are :math:`S / \tau`,

.. math:: \tau = -1 + 2 \sum_k P_k, \qquad P_k = \hat\rho_{2k} + \hat\rho_{2k+1}, \qquad
    \hat\rho_t = 1 - \frac{W - \frac{1}{C} \sum_c \hat\gamma_{c,t}}{\widehat{\text{var}}^+},

the sum stopped where a pair is negative and made to decrease (Geyer's initial monotone sequence).

A coordinate with a NaN, or fewer than four draws, gives NaN; one that never varies counts every draw, and has no
R-hat (NaN). Numbers are float64 whatever the draws are.

References:
    Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and localization: an
    improved R-hat, Bayesian Analysis 16(2). Geyer (1992), Practical Markov chain Monte Carlo, Statistical
    Science 7(4). Betancourt (2016), Diagnosing suboptimal cotangent disintegrations, arXiv:1604.00695.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.metrics.beta import beta_quantile
from pgen.metrics.ranks import Ranked, in_order, quantile, rank_scores

_AT_ONCE = 1 << 20  # values judged at a time: they and what is made of them stay in cache
_SHORT = 256  # up to so many draws a matrix product gives all lags sooner than a Fourier transform


class Diagnosis(NamedTuple):
    """What `diagnose` finds, `[*event]` each.

    Attributes:
        mean: of all draws.
        sd: standard deviation of all draws.
        quantiles: `[len(probs), *event]`.
        mcse_mean: Monte Carlo standard error of `mean`.
        ess_bulk: effective sample size for the middle of the distribution.
        ess_tail: the lesser effective sample size of the 5 % and 95 % quantiles.
        r_hat: 1 where chains agree; above about 1.01 they do not.
        ess_half: effective sample size of half a chain, judged by its own autocorrelation and not by other chains.
    """

    mean: Tensor
    sd: Tensor
    quantiles: Tensor
    mcse_mean: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    r_hat: Tensor
    ess_half: Tensor


# --- what users call ---


def diagnose(draws: Tensor, probs: Sequence[float] = (0.05, 0.5, 0.95)) -> Diagnosis:
    """Everything that a summary prints; draws are sorted once.

    Args:
        draws: `[chains, draws, *event]`, of any dtype.
        probs: of the quantiles.

    >>> found = diagnose(torch.arange(8.0).reshape(2, 4))
    >>> found.mean.item(), found.quantiles[1].item()
    (3.5, 3.5)
    """
    scores = _scores(draws)

    def each(x: Tensor) -> tuple[Tensor, ...]:
        halves, every = _split(x), x.flatten(1)
        ranked = Ranked.of(halves)
        ordered = ranked.values if halves.numel() == x.numel() else in_order(every)
        z = _judged(ranked.normal(scores))
        sd = _spread(every)
        tails = torch.minimum(*(_ess_quantile(x, ordered, p) for p in (0.05, 0.95)))
        worst = torch.fmax(z.r_hat, _r_hat(ranked.folded().normal(scores)))
        quantiles = torch.stack([quantile(ordered, p) for p in probs], -1) if probs else every[:, :0]
        return every.mean(-1), sd, quantiles, sd / _ess(halves).sqrt(), z.ess, tails, worst, z.alone

    found = _each(draws, each)
    found = Diagnosis(*found)._replace(quantiles=found[2].movedim(-1, 0))
    if _few(draws) and draws.shape[0] * draws.shape[1]:  # there is a mean, but nothing to say of its error
        every = _real(draws).flatten(0, 1)
        quantiles = every.quantile(every.new_tensor(probs), 0)
        found = found._replace(mean=every.mean(0), sd=every.std(0), quantiles=quantiles)
    return found


def r_hat(draws: Tensor) -> Tensor:
    """Split R-hat: the greater one of rank-normalised draws and of rank-normalised distances to the median.

    The first is sensitive to chains that differ in location, the second to those that differ in scale.

    Args:
        draws: `[chains, draws, *event]`.

    Returns:
        `[*event]`.
    """
    scores = _scores(draws)

    def each(x: Tensor) -> tuple[Tensor]:
        ranked = Ranked.of(_split(x))
        return (torch.fmax(_r_hat(ranked.normal(scores)), _r_hat(ranked.folded().normal(scores))),)

    return _each(draws, each)[0]


def r_hat_by_chance(ess_half: Tensor, chains: int, alarm: float) -> Tensor:
    r"""The R-hat that chains in agreement exceed with probability `alarm`.

    Half-chains of one law have means that differ by their Monte Carlo error. With m of them, each worth e draws,

    .. math:: \hat R^2 \approx 1 + \frac{1}{e - 1} \frac{\chi^2_{m - 1}}{m - 1},

    so that the greatest R-hat of many coordinates, or any R-hat of short chains, passes 1.01 by chance. The quantile
    of chi-square is that of Wilson and Hilferty (1931).

    Args:
        ess_half: effective sample size of half a chain.
        chains: how many whole ones there are.
        alarm: probability, divided by the number of coordinates that are looked at.

    >>> bool(r_hat_by_chance(torch.tensor(500.0), 4, 1e-4) < 1.01 < r_hat_by_chance(torch.tensor(50.0), 4, 1e-4))
    True
    """
    spread = 2 / (9 * (2 * chains - 1))
    score = -torch.special.ndtri(torch.tensor(alarm, dtype=torch.float64, device="cpu")).to(ess_half)
    return (1 + (1 - spread + score * math.sqrt(spread)) ** 3 / (ess_half - 1)).sqrt()


def ess_bulk(draws: Tensor) -> Tensor:
    """Effective sample size of rank-normalised draws: how well the middle of the distribution is known."""
    scores = _scores(draws)
    return _each(draws, lambda x: (_ess(Ranked.of(_split(x)).normal(scores)),))[0]


def ess_tail(draws: Tensor, probs: tuple[float, float] = (0.05, 0.95)) -> Tensor:
    """The lesser effective sample size of two quantiles: how well the tails are known."""

    def each(x: Tensor) -> tuple[Tensor]:
        ordered = in_order(x.flatten(1))
        return (torch.minimum(*(_ess_quantile(x, ordered, p) for p in probs)),)

    return _each(draws, each)[0]


def ess_quantile(draws: Tensor, prob: float) -> Tensor:
    """Effective sample size of a quantile: that of the indicator of lying at or below it."""
    return _each(draws, lambda x: (_ess_quantile(x, in_order(x.flatten(1)), prob),))[0]


def ess_mean(draws: Tensor) -> Tensor:
    """Effective sample size of the mean: that of the draws as they are (they need a variance)."""
    return _each(draws, lambda x: (_ess(_split(x)),))[0]


def mcse_mean(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean."""
    return _each(draws, lambda x: (_spread(x.flatten(1)) / _ess(_split(x)).sqrt(),))[0]


def mcse_sd(draws: Tensor) -> Tensor:
    r"""Monte Carlo standard error of the standard deviation.

    By the delta method, with the effective sample size of the squared deviations :math:`(x - \bar x)^2`.
    """

    def each(x: Tensor) -> tuple[Tensor]:
        squares = (x - x.mean((1, 2), keepdim=True)).square()
        mean = squares.mean((1, 2))
        variance = (squares.square().mean((1, 2)) - mean.square()) / _ess(_split(squares))
        return ((variance / mean / 4).sqrt(),)

    return _each(draws, each)[0]


def mcse_quantile(draws: Tensor, prob: float) -> Tensor:
    """Monte Carlo standard error of a quantile.

    Half the distance between the draws whose ranks are the 16 % and 84 % quantiles of Beta(S p + 1, S (1 - p) + 1),
    the law of the true probability below the estimate when S is the effective sample size.
    """

    def each(x: Tensor) -> tuple[Tensor]:
        ordered = in_order(x.flatten(1))
        size = ordered.shape[-1]
        effective = _ess_quantile(x, ordered, prob)[:, None]
        sides = torch.tensor([0.1586553, 0.8413447], dtype=x.dtype, device=x.device)
        places = beta_quantile(sides, effective * prob + 1, effective * (1 - prob) + 1) * size - 1
        inside = places.nan_to_num().clamp(0, size - 1)
        ends = ordered.gather(-1, torch.stack([inside[:, 0].floor(), inside[:, 1].ceil()], -1).long())
        return (torch.where(effective[:, 0].isnan(), torch.nan, (ends[:, 1] - ends[:, 0]) / 2),)

    return _each(draws, each)[0]


def e_bfmi(energy: Tensor) -> Tensor:
    r"""Energy fraction of missing information, chain by chain; below 0.3 momenta cannot reach all energies.

    .. math:: \frac{\sum_n (E_n - E_{n-1})^2 / (S - 1)}{\text{var}(E)}

    Args:
        energy: `[chains, draws]`, the Hamiltonian of each kept state.

    Returns:
        `[chains]`; NaN where the energy never varies.
    """
    energy = _real(energy)
    still = energy.amax(-1) == energy.amin(-1)
    return torch.where(still, torch.nan, energy.diff(dim=-1).square().mean(-1) / _variance(energy))


def autocorrelation(draws: Tensor) -> Tensor:
    """Autocorrelation of each chain at every lag, 1 at lag 0: `[chains, draws, *event]` (biased, so that it decays)."""
    x = _real(draws)
    x = x - x.mean(1, keepdim=True)
    size = _fast_length(2 * x.shape[1])
    power = torch.fft.rfft(x, n=size, dim=1).abs().square()
    covariance = torch.fft.irfft(power, n=size, dim=1)[:, : x.shape[1]]
    return covariance / covariance[:, :1]


# --- how, on coordinates [d, chains, draws] ---


def _each(draws: Tensor, judge: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`judge` all coordinates, so many at a time that they fit into cache; what was judged in vain is NaN."""
    few = _few(draws)
    chains, count, *event = draws.shape
    flat = draws.detach().reshape(chains, count, math.prod(event))
    if few:
        flat = flat.new_full((1, 4, flat.shape[-1]), torch.nan, dtype=torch.float64)
    parts = []
    for part in flat.split(max(1, _AT_ONCE // max(1, flat.shape[0] * flat.shape[1])), -1):
        x = _real(part.permute(2, 0, 1)).contiguous()
        bad = x.isnan().any(-1).any(-1)
        parts.append([torch.where(_like(bad, r), torch.nan, r) for r in judge(x)])
    return tuple(torch.cat(p).reshape((*event, *p[0].shape[1:])) for p in zip(*parts, strict=True))


def _scores(draws: Tensor) -> Tensor:
    """Scores for all halves of chains together."""
    size = 4 if _few(draws) else draws.shape[0] * (draws.shape[1] // 2) * 2
    return rank_scores(size, _real(draws.new_empty(())))


def _few(draws: Tensor) -> bool:
    """Whether nothing can be said of chains; four draws of NaN stand for them."""
    if draws.dim() < 2:
        raise ValueError(f"draws have shape {tuple(draws.shape)}; expected [chains, draws, *event]")
    return draws.shape[1] < 4 or not draws.shape[0]


def _like(mask: Tensor, other: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (other.dim() - 1))


def _real(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


def _split(x: Tensor) -> Tensor:
    """Halves of chains `[d, 2 chains, draws // 2]`; the order of chains does not matter."""
    half = x.shape[-1] // 2
    if 2 * half == x.shape[-1]:
        return x.reshape(x.shape[0], 2 * x.shape[1], half)
    return torch.cat([x[..., :half], x[..., -half:]], 1)


def _variance(x: Tensor) -> Tensor:
    """Unbiased variance along the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred.square_().sum(-1) / (x.shape[-1] - 1)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation along the last dimension: of equal values exactly zero, which rounding would hide."""
    return torch.where(x.amax(-1) == x.amin(-1), 0.0, _variance(x).sqrt())


def _r_hat(x: Tensor) -> Tensor:
    r"""The root of :math:`\widehat{\text{var}}^+ / W` of chains `[d, chains, draws]` (Gelman and Rubin 1992)."""
    within, count = _variance(x).mean(-1), x.shape[-1]
    return ((count - 1) / count + _variance(x.mean(-1)) / within).sqrt()


def _ess(x: Tensor) -> Tensor:
    return _judged(x).ess


class _Judged(NamedTuple):
    """Of chains together: effective sample size, R-hat; of one chain: effective sample size by its own memory."""

    ess: Tensor
    r_hat: Tensor
    alone: Tensor


def _judged(x: Tensor) -> _Judged:
    """Judge chains `[d, chains, draws]` by their autocovariances."""
    chains, count = x.shape[1:]
    size = chains * count
    still = x.amax((1, 2)) == x.amin((1, 2))
    means = x.mean(-1)
    covariance = _covariance(x - means[..., None])
    within = covariance[:, :1] * count / (count - 1)
    total = covariance[:, :1] + (_variance(means)[:, None] if chains > 1 else 0.0)
    ess = torch.where(
        still, float(size), size / _time(covariance, within, total).clamp_min(1 / math.log10(size))
    )
    # A chain's variance about its own mean lacks what its mean varies by, a share of 1 / ess, found by iteration.
    # No more than half the draws: where they alternate, what they do to the scale still lasts.
    least, most = 1.5, max(1.5, count / 2)
    alone = torch.full_like(ess, most)
    for _ in range(3):
        own = within * alone[:, None] / (alone[:, None] - 1)
        alone = (count / _time(covariance, within, own)).clamp(least, most)
    return _Judged(ess, (total / within).sqrt()[:, 0], alone)


def _time(covariance: Tensor, within: Tensor, total: Tensor) -> Tensor:
    """Integrated autocorrelation time by Geyer's initial monotone sequence, `[d]`; NaN where there is none."""
    count = covariance.shape[-1]
    rho = 1 - (within - covariance) / total
    rho[:, 0] = 1.0
    # Pairs from lag 0 on; the last one starts at least two lags before the end.
    last = max(0, (count - 3) // 2)
    pairs = rho[:, : 2 * last + 2].unflatten(-1, (-1, 2)).sum(-1)
    stop = (pairs > 0).long().cumprod(-1).sum(-1, keepdim=True).clamp_max(last)
    before = torch.arange(last + 1, device=rho.device) < stop
    even = rho.gather(-1, 2 * stop)[:, 0]
    kept = (even > 0) | (pairs.gather(-1, stop)[:, 0] >= 0)
    time = -1 + 2 * torch.where(before, pairs.cummin(-1).values, 0.0).sum(-1) + torch.where(kept, even, 0.0)
    return torch.where(pairs[:, 0].isfinite(), time, torch.nan)


def _covariance(x: Tensor) -> Tensor:
    """Autocovariance at every lag, averaged over chains: `[d, draws]`, from centred chains `[d, chains, draws]`."""
    count, chains = x.shape[-1], x.shape[1]
    if count > _SHORT and len(x):
        size = _fast_length(2 * count)
        spectrum = torch.fft.rfft(x, n=size)
        power = (spectrum.real.square() + spectrum.imag.square()).mean(
            1
        )  # linear: one inverse for all chains
        return torch.fft.irfft(power, n=size)[:, :count] / count
    products = torch.nn.functional.pad(x.mT @ x, (0, count))
    # A lag is a diagonal: rows that begin one later each make it a column.
    lags = products.as_strided((len(x), count, count), (2 * count * count, 2 * count + 1, 1))
    return lags.sum(1) / (count * chains)


def _ess_quantile(x: Tensor, ordered: Tensor, prob: float) -> Tensor:
    return _ess(_split((x <= quantile(ordered, prob)[:, None, None]).to(x.dtype)))


def _fast_length(least: int) -> int:
    """The least length from `least` on whose only prime factors are 2, 3 and 5."""
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
