"""Adaptive solvers against closed forms: errors follow tolerances, rows depend on nothing but themselves."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.adaptive_ode import AdaptiveODE, adaptive_ode
from pgen.algorithms.diffusion.adaptive_sde import AdaptiveSDE, adaptive_sde
from pgen.algorithms.diffusion.brownian import BrownianTree
from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams

FLOAT = {"dtype": torch.float64}
MIXTURE = Mixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]], **FLOAT), scale=torch.tensor([0.3, 0.1], **FLOAT))
POINTS = torch.tensor([[-1.1, 0.2], [0.9, 0.4], [0.1, 0.3], [1.5, -0.5]], **FLOAT)
Z = 4.9  # of a normal: a false alarm of 1e-6


def unit(*event, scale=0.5):
    return Mixture(torch.zeros(1, *event, **FLOAT), scale=scale)


def grown(x, low, high, scale=0.5):
    """The flow of N(0, scale^2 I) in closed form."""
    return x * math.sqrt((scale**2 + high**2) / (scale**2 + low**2))


# --- the ordinary equation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(), (3,), (2, 4)])
@pytest.mark.parametrize(("start", "end"), [(0.01, 20.0), (20.0, 0.01)])
def test_flow_of_a_normal_is_its_closed_form(event, start, end):
    x = torch.linspace(-2, 3, 5 * math.prod(event), **FLOAT).reshape(5, *event)
    found = adaptive_ode(x, start, end, Field(unit(*event)), 1e-8, 1e-8)
    torch.testing.assert_close(found.x, grown(x, start, end), rtol=1e-6, atol=1e-6)


def test_a_wrong_denoiser_misses_the_closed_form():
    x = POINTS
    wrong = Field(lambda x, sigma: 0.99 * unit(2)(x, sigma))
    found = adaptive_ode(x, 0.01, 20.0, wrong, 1e-8, 1e-8)
    assert (found.x / grown(x, 0.01, 20.0) - 1).abs().min() > 1e-3


def test_error_follows_tolerance_and_work_its_fifth_root():
    exact = adaptive_ode(POINTS, 0.05, 30.0, Field(MIXTURE), 1e-12, 1e-12).x
    errors, work = [], []
    for tolerance in (1e-4, 1e-6, 1e-8):
        found = adaptive_ode(POINTS, 0.05, 30.0, Field(MIXTURE), tolerance, tolerance)
        errors.append(float(((found.x - exact) / 30).abs().max()))
        work.append(float(found.evaluations.double().mean()))
    for error, tolerance in zip(errors, (1e-4, 1e-6, 1e-8)):
        assert error < 100 * tolerance
    slope = math.log(errors[0] / errors[2]) / math.log(1e4)
    assert 0.7 < slope < 1.3
    order = math.log(1e4) / math.log(work[2] / work[0])
    assert 4 < order < 7.5  # 5, and the first steps cost something


def test_there_and_back():
    noisy = adaptive_ode(POINTS, 0.05, 30.0, Field(MIXTURE), 1e-9, 1e-9).x
    back = adaptive_ode(noisy, 30.0, 0.05, Field(MIXTURE), 1e-9, 1e-9).x
    torch.testing.assert_close(back, POINTS, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solve", [adaptive_ode, adaptive_sde])
def test_a_row_does_not_depend_on_what_is_beside_it(solve):
    x = 30 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), **FLOAT)
    together = solve(x, 30.0, 0.05, Field(MIXTURE, Streams(1, rows=40)), 1e-2, 1e-2)
    assert together.evaluations.unique().numel() > 1  # rows do differ
    for i in (0, 17, 39):
        alone = solve(x[i : i + 1], 30.0, 0.05, Field(MIXTURE, Streams(1, rows=40).part(i, 1)), 1e-2, 1e-2)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-9, atol=1e-9)
        assert alone.evaluations[0] == together.evaluations[i]
        assert alone.rejected[0] == together.rejected[i]


@pytest.mark.parametrize("solve", [adaptive_ode, adaptive_sde])
def test_rows_with_a_context_stay_in_order(solve):
    means = torch.tensor([[-5.0], [0.0], [7.0]], **FLOAT)

    def denoiser(x, sigma):
        keep = 0.01 / (0.01 + sigma.unsqueeze(-1) ** 2)
        return means + keep * (x - means)

    found = solve(torch.zeros(3, 1, **FLOAT), 50.0, 1e-3, Field(denoiser, Streams(0, rows=3)), 1e-2, 1e-2)
    assert ((found.x - means).abs() < 1).all()


def test_values_between_steps():
    low, high = 0.05, 30.0
    path = adaptive_ode(POINTS, low, high, Field(MIXTURE), 1e-7, 1e-7, dense=True).path
    for share in (0.0, 0.23, 0.5, 0.81, 1.0):
        level = math.log(low) + share * math.log(high / low)
        exact = (
            adaptive_ode(POINTS, low, math.exp(level), Field(MIXTURE), 1e-11, 1e-11).x if share else POINTS
        )
        levels = torch.full((4,), level, **FLOAT)
        value, change = path.at(levels)
        torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(change, exact - MIXTURE(exact, math.exp(level)), rtol=1e-4, atol=1e-4)
    cubic = path._replace(bend=torch.zeros_like(path.bend))  # the check sees what a lower order would cost
    middle = torch.full((4,), math.log(low) + 0.5 * math.log(high / low), **FLOAT)
    assert (cubic.at(middle)[0] - path.at(middle)[0]).abs().max() > 3e-6


def test_work_is_counted():
    field = Field(MIXTURE)
    found = adaptive_ode(POINTS, 0.05, 30.0, field)
    assert field.evaluations == found.evaluations.max()


def test_gradients_go_through():
    x = POINTS.clone().requires_grad_()
    adaptive_ode(x, 0.01, 20.0, Field(unit(2)), 1e-8, 1e-8).x.sum().backward()
    torch.testing.assert_close(x.grad, grown(torch.ones_like(x), 0.01, 20.0), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_solved_says_which_rows():
    def broken(x, sigma):
        bad = torch.tensor([False, True]) & (sigma < 1)
        return torch.where(bad.unsqueeze(-1), math.nan, torch.zeros_like(x))

    x = torch.tensor([[1.0], [50.0]], **FLOAT)
    with pytest.raises(RuntimeError, match=r"1 of 2 rows \(1\).*noise level 1"):
        adaptive_ode(x, 10.0, 0.01, Field(broken))
    with pytest.raises(RuntimeError, match="1 of 2 rows"):
        adaptive_sde(x, 10.0, 0.01, Field(broken, Streams(0, rows=2)))
    with pytest.raises(RuntimeError, match="4 of 4 rows .* or allow more evaluations"):
        adaptive_ode(POINTS, 0.05, 30.0, Field(MIXTURE), most=20)


@pytest.mark.parametrize("solve", [adaptive_ode, adaptive_sde])
def test_levels_and_tolerances_are_checked(solve):
    field = Field(MIXTURE, Streams(0, rows=4))
    with pytest.raises(ValueError, match="expected positive"):
        solve(POINTS, 1.0, 0.0, field)
    with pytest.raises(ValueError, match="rtol=-1"):
        solve(POINTS, 1.0, 0.1, field, -1.0)
    with pytest.raises(ValueError, match=r"Streams\(seed"):
        adaptive_sde(POINTS, 1.0, 0.1, Field(MIXTURE))
    with pytest.raises(ValueError, match="go down"):
        adaptive_sde(POINTS, 0.1, 1.0, field)
    with pytest.raises(ValueError, match="positive"):
        AdaptiveODE(sigma_min=0.0)
    with pytest.raises(ValueError, match="rtol=0"):
        AdaptiveSDE(rtol=0.0, atol=0.0)


def test_as_solvers_over_a_grid():
    x = 30 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0), **FLOAT)
    for solver in (AdaptiveODE(1e-6, 1e-6), AdaptiveSDE()):
        state, field = x, Field(MIXTURE, Streams(0, rows=6))
        for t, t_next in [(30.0, 1.0), (1.0, 0.002), (0.002, 0.0)]:
            state = solver.step(state, torch.tensor(t), torch.tensor(t_next), field)
        assert MIXTURE.log_prob(state).min() > -10
    whole = AdaptiveODE(1e-6, 1e-6).step(x, 30.0, 0.0, Field(MIXTURE))
    parts = adaptive_ode(x, 30.0, 0.002, Field(MIXTURE), 1e-9, 1e-9).x
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)  # the last level is as far off as 0.002^2


# --- the reverse diffusion -------------------------------------------------------------------------------------


def variance_of(rows, tolerance):
    """Of samples of N(0, 0.5^2) by the reverse diffusion from its law at noise level 5."""
    field = Field(unit(1), Streams(2, rows=rows))
    x = math.sqrt(0.25 + 25) * field.noise(torch.empty(rows, 1, **FLOAT))
    return adaptive_sde(x, 5.0, 0.02, field, tolerance, tolerance).x[:, 0].var()


def test_law_of_a_normal(monkeypatch):
    # A variance off by 19 % is 4.9 + 4.9 standard errors with 2 (9.8 / 0.19)^2, about 5,300, samples.
    rows, expected = 5_300, 0.25 + 0.02**2
    bound = Z * expected * math.sqrt(2 / rows)
    assert abs(variance_of(rows, 1e-2) - expected) < bound

    class Quiet(BrownianTree):
        def __call__(self, t):
            return 0.85 * super().__call__(t)

    monkeypatch.setattr("pgen.algorithms.diffusion.adaptive_sde.BrownianTree", Quiet)
    assert abs(variance_of(rows, 1e-2) - expected) > bound


def test_paths_converge_as_the_tolerance_falls():
    x = 20 * Streams(5, rows=60).normal(1, (2,), POINTS)
    found = {
        tolerance: adaptive_sde(x, 20.0, 0.1, Field(MIXTURE, Streams(4, rows=60)), tolerance, tolerance).x
        for tolerance in (1e-3, 5e-3, 1e-1)
    }
    miss = [(found[t] - found[1e-3]).abs().mean() for t in (5e-3, 1e-1)]
    assert miss[0] < 0.5 * miss[1]
    other = adaptive_sde(x, 20.0, 0.1, Field(MIXTURE, Streams(6, rows=60)), 5e-3, 5e-3).x
    assert (other - found[5e-3]).abs().mean() > 3 * miss[0]  # another seed is another path
