r"""Integrals over an interval for many rows at once, of functions that may be known with noise only.

The Gauss-Kronrod rule of 5 and 11 nodes on panels of every row's own: where the two rules disagree by more than is asked
for, and by more than noise explains, the row's worst panel is halved. A row's result depends on the row alone.

References:
    Kronrod, Nodes and Weights of Quadrature Formulas, Consultants Bureau, 1965.
    Piessens, de Doncker-Kapenga, Uberhuber & Kahaner, QUADPACK, Springer, 1983 (the error estimate).
    Satterthwaite, An approximate distribution of estimates of variance components, Biometrics Bulletin 2, 1946.
    Welch, Further note on Mrs. Aspin's tables, Biometrika 36, 1949 (degrees of freedom from variances that are themselves
    estimates: v^2 / (f + 2) in the sum, and 2 less, as E v^2 is (1 + 2 / f) times the square of E v).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NODES = (
    0.9840853600948442,
    0.906179845938664,
    0.7541667265708493,
    0.5384693101056831,
    0.2796304131617832,
    0.0,
)
_KRONROD = (
    0.0425820367510811,
    0.1152333166224752,
    0.1868007965564916,
    0.2410403392286485,
    0.2728498019125580,
    0.2829874178574922,
)
_GAUSS = (0.0, 0.2369268850561891, 0.0, 0.4786286704993665, 0.0, 0.5688888888888889)

NODES = torch.tensor([*(-x for x in _NODES), *_NODES[-2::-1]], dtype=torch.float64)
KRONROD = torch.tensor([*_KRONROD, *_KRONROD[-2::-1]], dtype=torch.float64)
GAUSS = torch.tensor([*_GAUSS, *_GAUSS[-2::-1]], dtype=torch.float64)


class Values(NamedTuple):
    """A function at nodes of rows, in float64 on the CPU.

    Attributes:
        value: `[N, B]`.
        variance: of its noise, `[N, B]`; None: there is none.
        freedom: degrees of freedom of each variance.
    """

    value: Tensor
    variance: Tensor | None = None
    freedom: float = math.inf


class Integral(NamedTuple):
    """Integrals of rows.

    Attributes:
        value: `[B]`.
        disagreement: estimated error of the rule, `[B]`.
        variance: from the function's noise, `[B]`; None: there is none.
        freedom: degrees of freedom of that variance, `[B]`.
    """

    value: Tensor
    disagreement: Tensor
    variance: Tensor | None
    freedom: Tensor | None


Function = Callable[[Tensor, Tensor], Values]
"""From nodes `[N, B]` and which rows are in need of values `[B]` (those of other rows are not looked at)."""


def integrate(
    function: Function, low: float, high: float, rows: int, *, error: float, panels: int = 1, most: int = 20
) -> Integral:
    """Integrate from `low` to `high`.

    Args:
        function: of nodes and rows.
        low: lower end.
        high: upper end.
        rows: how many.
        error: what the rules may disagree by, summed over a row's panels.
        panels: to start with.
        most: how often panels of any row are halved; what disagreement is left then, is reported.

    Example:
        >>> integrate(lambda t, _: Values(t.exp()), 0.0, 1.0, rows=1, error=1e-9).value
        tensor([1.7183], dtype=torch.float64)
    """
    ends = torch.linspace(low, high, panels + 1, dtype=torch.float64)
    left, right = ends[:-1, None].expand(-1, rows), ends[1:, None].expand(-1, rows)
    found = _panels(function, left, right, torch.ones(rows, dtype=torch.bool))
    for _ in range(most):
        needed = found.error.sum(0) > error
        if not needed.any():
            break
        worst = found.error.argmax(0, keepdim=True)  # [1, B]
        a, b = left.gather(0, worst), right.gather(0, worst)
        middle = (a + b) / 2
        halves = _panels(function, torch.cat([a, middle]), torch.cat([middle, b]), needed)
        replaced = needed & (torch.arange(len(left)).unsqueeze(1) == worst)
        left = torch.cat([left, middle])
        right = torch.cat([torch.where(replaced, middle, right), b])
        found = _Panels(
            *(
                torch.cat([torch.where(replaced, new[:1], old), torch.where(needed, new[1:], 0.0)])
                for old, new in zip(found, halves)
            )
        )
    value, disagreement, variance, fourth, noisy = (part.sum(0) for part in found)
    if not noisy.any():
        return Integral(value, disagreement, None, None)
    freedom = (variance.square() / fourth.clamp(min=1e-300) - 2).clamp(min=0)
    return Integral(value, disagreement, variance, freedom)


class _Panels(NamedTuple):
    """What is known of panels, each `[P, B]`: sums over panels are those of the integral."""

    value: Tensor
    error: Tensor
    variance: Tensor
    fourth: Tensor  # the sum of squared terms of the variance over their degrees of freedom and 2
    noisy: Tensor


def _panels(function: Function, left: Tensor, right: Tensor, needed: Tensor) -> _Panels:
    count, rows = left.shape
    half = (right - left) / 2
    nodes = (left + right).unsqueeze(1) / 2 + half.unsqueeze(1) * NODES[:, None]  # [P, 11, B]
    seen = function(nodes.reshape(-1, rows), needed)
    f = seen.value.reshape(count, len(NODES), rows)
    value = half * torch.einsum("n,pnb->pb", KRONROD, f)
    with torch.no_grad():
        known = f.detach()
        miss = (half * torch.einsum("n,pnb->pb", KRONROD - GAUSS, known)).abs()
        width = half * torch.einsum("n,pnb->pb", KRONROD, (known - (value / (2 * half)).unsqueeze(1)).abs())
        noise = torch.zeros_like(f) if seen.variance is None else seen.variance.detach().reshape(f.shape)
        terms = (half.unsqueeze(1) * KRONROD[:, None]) ** 2 * noise
        by_chance = (half**2 * torch.einsum("n,pnb->pb", (KRONROD - GAUSS) ** 2, noise)).sqrt()
        miss = (miss - 3 * by_chance).clamp(min=0)
        # QUADPACK's: the rule of 11 nodes is better than what it differs by from that of 5.
        share = (200 * miss / width.clamp(min=1e-300)).clamp(max=1.0)
        error = torch.maximum(miss * share.sqrt(), 1e-15 * value.abs())
        error = torch.where(by_chance > 0, miss, error)
    return _Panels(
        value,
        error,
        terms.sum(1),
        terms.square().sum(1) / (seen.freedom + 2),
        torch.full_like(value, float(seen.variance is not None)),
    )


def student_quantile(probability: float, freedom: Tensor) -> Tensor:
    """Quantile of Student's t, by the expansion in 1 / freedom about the normal one, for probabilities above 1/2.

    Within 1 % from 4 degrees of freedom on at 97.5 %; for fewer than 2, of 2 exactly.
    """
    z = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    v = freedom.clamp(min=2)
    series = torch.full_like(v, z)
    for i, term in enumerate(terms):
        series = series + term / v ** (i + 1)
    a = 4 * probability * (1 - probability)
    two = (2 * probability - 1) * math.sqrt(2 / a) if a > 0 else math.inf
    return torch.where(v <= 2, torch.full_like(series, two), series)
