r"""Statistical assertions with a stated error rate: what to assert of random numbers, how many to draw.

Every assertion takes `alpha`, the probability that it fails although the claim is true, split evenly over the
components that it looks at (Bonferroni). `draws_needed` says how many draws make it notice a discrepancy of a
given size with probability `1 - beta`. At `alpha = beta = 1e-6`, a suite of a thousand assertions fails by
chance once in a thousand runs, whatever the seed, and a mean that is off by a tenth of a standard deviation
takes 9,303 draws to be noticed.

>>> draws_needed(0.1)
9303

References:
    The tightest constant in the Dvoretzky-Kiefer-Wolfowitz inequality (Massart, 1990), Annals of Probability
    18(3). Two-sample Dvoretzky-Kiefer-Wolfowitz inequalities (Wei and Dudley, 2012), Statistics & Probability
    Letters 82(3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ALPHA = 1e-6
BETA = 1e-6

_MIN_EXPECTED = 10.0
"""A cell expected to hold fewer draws is pooled with others, for the sake of chi-square's tail."""


class StatisticalFailure(AssertionError):
    """A claim about random numbers that the draws contradict.

    Attributes:
        statistic: what was computed from the draws, at the worst component.
        threshold: what it would have had to stay below.
        probability: how likely draws at least this bad are if the claim is true (all components considered).
        alpha: how likely a failure is if the claim is true.
    """

    def __init__(
        self, what: str, statistic: float, threshold: float, probability: float, alpha: float
    ) -> None:
        """Say all of it in one line."""
        self.statistic, self.threshold, self.probability, self.alpha = (
            statistic,
            threshold,
            probability,
            alpha,
        )
        super().__init__(
            f"{what}: statistic {statistic:.4g} exceeds {threshold:.4g}; if the claim were true, draws "
            "as bad as these would have "
            f"probability {probability:.2g}, and this assertion fails by chance with probability {alpha:.2g}"
        )


# --- how many draws ---


def z_threshold(alpha: float = ALPHA, components: int = 1, sides: int = 2) -> float:
    """What a standard normal exceeds with probability `alpha`, over all components and sides together.

    >>> round(z_threshold(0.05), 3)
    1.96
    """
    return -float(torch.special.ndtri(torch.tensor(alpha / (components * sides), dtype=torch.float64)))


def draws_needed(discrepancy: float, alpha: float = ALPHA, beta: float = BETA, components: int = 1) -> int:
    r"""How many draws `assert_mean` needs to notice a mean off by `discrepancy` standard deviations.

    .. math:: n = \left((z_{1-\alpha/2m} + z_{1-\beta}) / \delta\right)^2

    Args:
        discrepancy: the error to be noticed, in standard deviations of one draw.
        alpha: probability of failing although the mean is right.
        beta: probability of passing although the mean is off by `discrepancy`.
        components: number of components looked at together.
    """
    return math.ceil(((z_threshold(alpha, components) + z_threshold(beta, sides=1)) / discrepancy) ** 2)


def discrepancy_noticed(draws: int, alpha: float = ALPHA, beta: float = BETA, components: int = 1) -> float:
    """The smallest error of a mean that so many draws show, in standard deviations.

    >>> round(discrepancy_noticed(9303), 3)
    0.1
    """
    return (z_threshold(alpha, components) + z_threshold(beta, sides=1)) / math.sqrt(draws)


def draws_needed_for_cdf(
    distance: float, alpha: float = ALPHA, beta: float = BETA, components: int = 1
) -> int:
    """How many draws `assert_distribution` needs to notice a distribution function off by `distance`.

    >>> draws_needed_for_cdf(0.05)
    11607
    """
    both = math.sqrt(math.log(2 * components / alpha) / 2) + math.sqrt(math.log(2 / beta) / 2)
    return math.ceil((both / distance) ** 2)


# --- assertions ---


def assert_mean(
    draws: Tensor,
    mean: Tensor | float,
    *,
    std: Tensor | float | None = None,
    alpha: float = ALPHA,
    slack: Tensor | float = 0.0,
    what: str = "mean",
) -> None:
    """Assert that independent draws have this mean, component by component (a z-test).

    Args:
        draws: `[n, ...]`.
        mean: the claimed mean, broadcastable to `[...]`.
        std: standard deviation of a draw, if known; estimated from the draws otherwise (have a few thousand
            then).
        alpha: probability of failing although the claim is true, over all components.
        slack: an error of the mean that is tolerated, in the units of the draws.
        what: named in the failure.

    Raises:
        StatisticalFailure: the draws contradict the claim.
    """
    x = draws.detach().double()
    n = x.shape[0]
    target = torch.as_tensor(mean, dtype=torch.float64, device=x.device).expand(x.shape[1:])
    spread = (
        x.std(0)
        if std is None
        else torch.as_tensor(std, dtype=torch.float64, device=x.device).expand(x.shape[1:])
    )
    error = (x.mean(0) - target).abs() - torch.as_tensor(slack, dtype=torch.float64, device=x.device)
    # A component that does not vary must be right to rounding.
    rounding = 1e-6 * target.abs().clamp_min(1.0)
    assert_standard_normal(
        error.clamp_min(0.0) / (spread / math.sqrt(n)).clamp_min(rounding), alpha=alpha, what=what
    )


def assert_standard_normal(z: Tensor, *, alpha: float = ALPHA, sides: int = 2, what: str = "z-score") -> None:
    """Assert that scores could be those of standard normals: none too large (or, two-sided, too small).

    Raises:
        StatisticalFailure: one of them is.
    """
    scores = z.detach().double().reshape(-1)
    if not scores.numel():
        return
    scores = scores.abs() if sides == 2 else scores
    worst = math.inf if bool(torch.isnan(scores).any()) else float(scores.max())
    threshold = z_threshold(alpha, scores.numel(), sides)
    if worst > threshold:
        tail = 0.5 * math.erfc(worst / math.sqrt(2.0))
        raise StatisticalFailure(
            _at(what, scores), worst, threshold, min(1.0, tail * sides * scores.numel()), alpha
        )


def assert_moments(
    draws: Tensor, mean: Tensor | float, std: Tensor | float, *, alpha: float = ALPHA, what: str = "moments"
) -> None:
    """Assert that independent draws have this mean and this standard deviation, component by component.

    Raises:
        StatisticalFailure: the draws contradict the claim.
    """
    x = draws.detach().double()
    m, s = (torch.as_tensor(v, dtype=torch.float64, device=x.device).expand(x.shape[1:]) for v in (mean, std))
    assert_mean(x, m, std=s, alpha=alpha / 2, what=f"{what}: mean")
    assert_mean((x - m).square(), s.square(), alpha=alpha / 2, what=f"{what}: variance")


def assert_frequencies(
    draws: Tensor, probabilities: Tensor, *, alpha: float = ALPHA, what: str = "frequencies"
) -> None:
    """Assert that independent draws of a category have these probabilities (a chi-square test).

    Args:
        draws: categories `0, 1, ..., K-1`, shape `[n, ...]`.
        probabilities: `[..., K]`, broadcastable to the components of the draws.
        alpha: probability of failing although the claim is true, over all components.
        what: named in the failure.

    Raises:
        StatisticalFailure: the draws contradict the claim, for example by being where the probability is
            zero.
    """
    n = draws.shape[0]
    index = draws.detach().reshape(n, -1).long()
    p = (
        probabilities.detach()
        .double()
        .expand((*draws.shape[1:], probabilities.shape[-1]))
        .reshape(index.shape[1], -1)
    )
    if (
        bool((index < 0).any())
        or bool((index >= p.shape[1]).any())
        or bool((index != draws.reshape(n, -1)).any())
    ):
        raise StatisticalFailure(f"{what}: a draw is none of 0..{p.shape[1] - 1}", math.inf, 0.0, 0.0, alpha)
    counts = torch.zeros_like(p).scatter_add_(1, index.T, torch.ones_like(index.T, dtype=p.dtype))
    tails, statistics = zip(*(_chi_square(c, e) for c, e in zip(counts, p * n)), strict=True)
    worst = min(range(len(tails)), key=tails.__getitem__)
    if tails[worst] < alpha / len(tails):
        threshold = -math.log10(alpha / len(tails))
        raise StatisticalFailure(
            f"{what}, component {worst}: chi-square {statistics[worst]:.4g}, minus the logarithm of its "
            "tail probability",
            -math.log10(max(tails[worst], 1e-300)),
            threshold,
            min(1.0, tails[worst] * len(tails)),
            alpha,
        )


def assert_distribution(
    draws: Tensor, cdf: Callable[[Tensor], Tensor], *, alpha: float = ALPHA, what: str = "distribution"
) -> None:
    """Assert that independent draws have this continuous distribution function, component by component.

    The Kolmogorov-Smirnov statistic is held against the Dvoretzky-Kiefer-Wolfowitz bound with Massart's
    constant, so that the false-alarm rate holds for every number of draws.

    Args:
        draws: `[n, ...]`.
        cdf: distribution function of every component, from `[n, ...]` to probabilities of the same shape.
        alpha: probability of failing although the claim is true, over all components.
        what: named in the failure.

    Raises:
        StatisticalFailure: the draws contradict the claim.
    """
    n = draws.shape[0]
    if bool(torch.isnan(draws).any()):
        raise StatisticalFailure(f"{what}: a draw is not a number", math.inf, 0.0, 0.0, alpha)
    u = cdf(draws.detach()).double().reshape(n, -1).sort(0).values
    steps = torch.arange(n + 1, dtype=torch.float64, device=u.device)[:, None] / n
    distance = torch.maximum((steps[1:] - u).amax(0), (u - steps[:-1]).amax(0))
    _assert_distance(distance, 2.0 * n, alpha, what)


def assert_same_distribution(
    first: Tensor, second: Tensor, *, alpha: float = ALPHA, what: str = "two samples"
) -> None:
    """Assert that two sets of independent draws have one distribution, component by component.

    The bound on the false-alarm rate is proven for equal numbers of draws from 458 on (Wei and Dudley, 2012).

    Args:
        first: `[n, ...]`.
        second: `[m, ...]`.
        alpha: probability of failing although the claim is true, over all components.
        what: named in the failure.

    Raises:
        StatisticalFailure: the draws contradict the claim.
    """
    a, b = (
        t.detach().double().reshape(t.shape[0], -1).sort(0).values.T.contiguous() for t in (first, second)
    )
    both = torch.cat([a, b], 1)
    gap = (
        torch.searchsorted(a, both, right=True) / a.shape[1]
        - torch.searchsorted(b, both, right=True) / b.shape[1]
    )
    _assert_distance(
        gap.abs().amax(1), 2.0 * a.shape[1] * b.shape[1] / (a.shape[1] + b.shape[1]), alpha, what
    )


def assert_estimate(
    value: Tensor,
    truth: Tensor,
    stderr: Tensor,
    *,
    alpha: float = ALPHA,
    rounding: float = 1e-4,
    what: str = "estimate",
) -> None:
    """Assert that estimates lie as near to the truth as their standard errors say.

    Raises:
        StatisticalFailure: one is further away, or a standard error is negative or not a number.
    """
    _assert_errors(value - truth, stderr, alpha, 2, rounding, truth, what)


def assert_lower_bound(
    value: Tensor,
    truth: Tensor,
    stderr: Tensor | None = None,
    *,
    alpha: float = ALPHA,
    rounding: float = 1e-4,
    what: str = "lower bound",
) -> None:
    """Assert that values exceed the truth by no more than their standard errors (or rounding) allow.

    Raises:
        StatisticalFailure: one does.
    """
    _assert_errors(
        value - truth, torch.zeros_like(value) if stderr is None else stderr, alpha, 1, rounding, truth, what
    )


def _assert_errors(
    error: Tensor, stderr: Tensor, alpha: float, sides: int, rounding: float, truth: Tensor, what: str
) -> None:
    if not bool((stderr >= 0).all()):
        raise StatisticalFailure(f"{what}: a standard error is negative or NaN", math.inf, 0.0, 0.0, alpha)
    floor = rounding * truth.detach().double().abs().clamp_min(1.0)
    error = error.detach().double()
    error = torch.where(error.abs() <= floor, torch.zeros_like(error), error)
    scale = (
        stderr.detach().double().square()
        + (floor / z_threshold(alpha, max(1, error.numel()), sides)).square()
    ).sqrt()
    assert_standard_normal(error / scale, alpha=alpha, sides=sides, what=what)


def _assert_distance(distance: Tensor, rate: float, alpha: float, what: str) -> None:
    """P(distance > d) <= 2 exp(-rate d^2) for each of the components."""
    worst = math.inf if bool(torch.isnan(distance).any()) else float(distance.max())
    threshold = math.sqrt(math.log(2 * distance.numel() / alpha) / rate)
    if worst > threshold:
        probability = min(1.0, 2 * distance.numel() * math.exp(-min(700.0, rate * worst**2)))
        raise StatisticalFailure(
            _at(f"{what}: distance of distribution functions", distance), worst, threshold, probability, alpha
        )


def _chi_square(counts: Tensor, expected: Tensor) -> tuple[float, float]:
    """Tail probability and statistic; cells that expect few draws are pooled, smallest first."""
    if bool((counts[expected == 0] > 0).any()):
        return 0.0, math.inf
    order = expected.argsort()
    counts, expected = counts[order], expected[order]
    pooled = (
        int((expected.cumsum(0) < _MIN_EXPECTED).sum()) + 1 if bool((expected < _MIN_EXPECTED).any()) else 1
    )
    cells = torch.cat([counts[:pooled].sum()[None], counts[pooled:]])
    means = torch.cat([expected[:pooled].sum()[None], expected[pooled:]])
    if cells.numel() < 2:
        return 1.0, 0.0
    statistic = ((cells - means).square() / means).sum()
    tail = torch.special.gammaincc(
        torch.tensor((cells.numel() - 1) / 2, dtype=torch.float64), statistic.cpu() / 2
    )
    return float(tail), float(statistic)


def _at(what: str, values: Tensor) -> str:
    """Name the worst component where there are several."""
    return (
        what
        if values.numel() == 1
        else f"{what} (component {int(values.nan_to_num(math.inf).argmax())} of {values.numel()})"
    )
