"""Grids of noise levels: formulas, ends, and what the adapted ones gain."""

from __future__ import annotations

import math

import pytest
import torch

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.grids import adapted, default, karras, log_snr, uniform_time
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.schedules import EDM, VE, VP, RectifiedFlow, SubVP
from pgen.algorithms.diffusion.solve import require_grid, solve, start
from pgen.algorithms.diffusion.solvers import DPMSolverPP, UniPC

torch.manual_seed(0)
MIXTURE = Mixture(torch.randn(10, 2, dtype=torch.float64), 0.25)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 18, 1000])
@pytest.mark.parametrize(
    "make", [karras, log_snr, lambda *a, **k: karras(*a, 1.0, **k), lambda *a, **k: karras(*a, math.inf, **k)]
)
def test_ends_and_order(make, n: int, zero: bool) -> None:
    grid = make(n, 0.002, 80.0, zero=zero)
    assert grid.dtype == torch.float64
    assert grid.shape == (n + 1,)
    assert torch.equal(require_grid(grid), grid)
    assert math.isclose(float(grid[0]), 80.0)
    if zero:
        assert float(grid[-1]) == 0
        assert n == 1 or math.isclose(float(grid[-2]), 0.002)
    else:
        assert math.isclose(float(grid[-1]), 0.002)


def test_formulas() -> None:
    """EDM's equation 5, and equal ratios."""
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    grid = karras(n, low, high, rho)
    for i in range(n):
        paper = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        assert math.isclose(float(grid[i]), paper)
    assert float(grid[-1]) == 0
    ratios = log_snr(9, low, high)[:-1].log().diff()
    assert torch.allclose(ratios, ratios[:1].expand(8))
    assert torch.allclose(karras(9, low, high, 1e6), log_snr(9, low, high), rtol=1e-4)


@pytest.mark.parametrize("schedule", [VE(), VP(), VP("cosine"), SubVP(), EDM(), RectifiedFlow()], ids=str)
def test_uniform_times(schedule) -> None:
    grid = uniform_time(20, schedule)
    assert torch.equal(require_grid(grid), grid)
    assert float(grid[-1]) == 0
    times = schedule.time(grid[:-1])
    assert torch.allclose(times, times[0] * torch.linspace(1, 0.05, 20, dtype=torch.float64), rtol=1e-4)
    assert math.isclose(float(grid[0]), schedule.sigma_max, rel_tol=1e-5)
    short = uniform_time(20, schedule, zero=False)
    assert math.isclose(float(short[-1]), schedule.sigma_min, rel_tol=1e-4)
    assert len(short) == 21


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 50, 1000])
def test_default(n: int) -> None:
    for spread in (0.01, 0.5, 1.0, 30.0):
        grid = default(n, 0.002, 80.0, spread=spread)
        assert torch.equal(require_grid(grid), grid)
        assert len(grid) == n + 1
        assert float(grid[0]) <= 80.0 * (1 + 1e-9)
        assert n == 1 or float(grid[-2]) >= 0.002 * (1 - 1e-9)


@pytest.mark.parametrize("bad", [(0, 0.1, 1.0), (3, 0.0, 1.0), (3, 2.0, 1.0), (3, 1.0, math.inf)])
def test_no_grid(bad) -> None:
    with pytest.raises(ValueError, match="expected"):
        karras(*bad)
    with pytest.raises(ValueError, match="rho"):
        karras(3, 0.1, 1.0, 0.0)
    with pytest.raises(ValueError, match="expected"):
        default(0)


def gap(grid: torch.Tensor, solver, seed: int) -> float:
    """Mean distance from what the equation itself makes of the same start."""
    x = start(Streams(seed, 400), (2,), grid[0], MIXTURE.means)
    exact = solve(x, karras(300, 0.002, float(grid[0])), Field(MIXTURE), UniPC(4))
    return float((solve(x, grid, Field(MIXTURE), solver) - exact).norm(dim=1).mean())


@pytest.mark.parametrize("solver", [UniPC(3), DPMSolverPP(2)], ids=str)
def test_adapted_grids_are_better_on_rows_not_seen(solver) -> None:
    begin = default(5)
    field = Field(MIXTURE)
    x = start(Streams(1, 128), (2,), begin[0], MIXTURE.means)
    found = adapted(begin, field, x, solver)
    assert torch.equal(require_grid(found.grid), found.grid)
    assert float(found.grid[0]) == float(begin[0])
    assert float(found.grid[-1]) == 0
    assert len(found.grid) == 6
    assert found.evaluations == field.evaluations
    assert found.error < found.before
    assert gap(found.grid, solver, seed=2) < 0.85 * gap(begin, solver, seed=2)


def test_adapted_keeps_a_last_level() -> None:
    begin = log_snr(4, 0.1, 10.0, zero=False)
    x = start(Streams(1, 64), (2,), 10.0, MIXTURE.means)
    found = adapted(begin, Field(MIXTURE), x, rounds=2)
    assert math.isclose(float(found.grid[-1]), 0.1)
    assert math.isclose(float(found.grid[0]), 10.0)
    assert found.error <= found.before


def test_default_needs_fewer_evaluations() -> None:
    """Half of the error of EDM's levels at 5 and 10 evaluations, or less, with the same solver."""
    for n in (5, 10):
        assert gap(default(n), UniPC(3), 3) < 0.5 * gap(karras(n, 0.002, 80.0), UniPC(3), 3)
