"""Weights of exponential Adams methods against integrals in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from pgen.algorithms.diffusion.solvers.weights import VARIABLES, adams, combined

LEVELS = [2.0, 2.6, 4.1, 4.5]


@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("t", [1.999, 1.0, 0.01, 1e-6])
def test_polynomials_in_log_sigma_are_integrated_exactly(t: float, rate: float) -> None:
    """r int_0^h exp(-r (h - tau)) tau^k dtau by its recursion in k, which is stable for long steps."""
    s = LEVELS[0]
    h = math.log(s / t)
    for order in (1, 2, 3, 4):
        weights = adams(LEVELS[:order], s, t, rate=rate)
        assert math.isclose(sum(weights), 1 - (t / s) ** rate, rel_tol=1e-9)
        tau = [math.log(s / level) for level in LEVELS[:order]]
        exact = -math.expm1(-rate * h)
        for k in range(1, order):
            exact = h**k - k / rate * exact
            found = sum(w * a**k for w, a in zip(weights, tau, strict=True))
            assert math.isclose(found, exact, rel_tol=1e-6, abs_tol=1e-12)


@pytest.mark.parametrize("variable", ["sigma", "angle"])
def test_down_to_zero(variable: str) -> None:
    """The step to 0 is the polynomial's value there, and the limit of steps to ever lower levels."""
    at = adams(LEVELS, 2.0, 0.0, variable=variable)
    near = adams(LEVELS, 2.0, 1e-8, variable=variable)
    assert torch.allclose(torch.tensor(at), torch.tensor(near), atol=1e-6)
    phi = VARIABLES[variable]
    values = [1 + phi(level) - 2 * phi(level) ** 3 for level in LEVELS]
    assert math.isclose(sum(w * v for w, v in zip(at, values, strict=True)), 1.0, rel_tol=1e-9)


def test_combined() -> None:
    x, *values = torch.randn(4, 5, 3, dtype=torch.float64)
    weights = [0.7, -0.3, 0.2]
    want = 0.4 * x + sum(w * v for w, v in zip(weights, values, strict=True))
    assert torch.allclose(combined(x, 0.4, values, weights), want)
    assert torch.allclose(combined(x, 0.4, values[:1], [0.6]), 0.4 * x + 0.6 * values[0])
