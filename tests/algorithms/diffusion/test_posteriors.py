"""Split Gibbs, DDRM, DPS as published, inpainting and editing, each against a law it must have."""

import itertools
import math

import pytest
import torch

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.operators import Blur, Dense, Downsample, Mask
from pgen.algorithms.diffusion.posteriors import (
    DDRM,
    DPSStep,
    LinearGaussian,
    Replacement,
    SplitGibbs,
    repaint_grid,
    sdedit,
)
from pgen.algorithms.diffusion.posteriors.replacement import repaint
from pgen.algorithms.diffusion.posteriors.split_gibbs import gaussian_step, langevin_step
from pgen.algorithms.diffusion.solve import solve
from pgen.algorithms.diffusion.solvers import Ancestral, Euler, Heun
from pgen.testing.statistics import (
    StatisticalFailure,
    assert_distribution,
    assert_mean,
    assert_moments,
)

double = {"dtype": torch.float64}
MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.8, -1.0]], **double)
SEEN = LinearGaussian(Dense(MATRIX), torch.tensor([1.2, -0.5], **double), 0.25, offset=0.1)
ROUND = Mixture(torch.zeros(1, 3, **double), scale=1.0)
N = 5000


def levels(top, bottom, steps):
    return torch.linspace(math.log(top), math.log(bottom), steps + 1, **double).exp()


def gaussian_posterior(prior_precision, prior_mean, noise):
    """Mean and Cholesky root of N(prior_mean, 1 / prior_precision) given SEEN with this noise covariance."""
    weight = MATRIX.mT @ torch.linalg.inv(noise)
    covariance = torch.linalg.inv(prior_precision * torch.eye(3, **double) + weight @ MATRIX)
    mean = (prior_precision * prior_mean + weight @ (SEEN.y - SEEN.offset)) @ covariance
    return mean, torch.linalg.cholesky(covariance)


def check(x, law, slack=0.0):
    """Draws against a Gaussian: means and covariances of whitened numbers."""
    mean, root = law
    white = torch.linalg.solve_triangular(root, (x - mean).mT, upper=False).mT
    square = white.unsqueeze(-1) * white.unsqueeze(-2)
    assert_mean(white, 0.0, slack=slack, what="mean")
    assert_mean(square, torch.eye(3, **double), slack=slack, what="covariance")


# --- split Gibbs ---


def test_the_gaussian_step_is_exact(seed):
    x = torch.tensor([0.3, -1.0, 2.0], **double).expand(N, -1)
    z = gaussian_step(SEEN, x, 0.7, Field(ROUND, Streams(seed, N)))
    law = gaussian_posterior(1 / 0.49, x[0], 0.25 * torch.eye(2, **double))
    check(z, law)
    with pytest.raises(StatisticalFailure):
        check(gaussian_step(SEEN, x, 0.8, Field(ROUND, Streams(seed, N))), law)


def test_langevin_steps_have_the_same_law(seed):
    x = torch.tensor([0.3, -1.0, 2.0], **double).expand(N, -1)
    z, size = langevin_step(
        SEEN.log_likelihood, x, 0.7, Field(ROUND, Streams(seed, N)), 40, torch.ones(N, **double)
    )
    check(z, gaussian_posterior(1 / 0.49, x[0], 0.25 * torch.eye(2, **double)), slack=0.02)
    assert size.shape == (N,)


@pytest.mark.parametrize("kind", ["gaussian", "any"])
def test_split_gibbs_draws_from_the_split_posterior(kind, seed):
    # With the spring integrated out, x has the posterior of noise R + rho^2 A A'.
    rho = 0.3
    likelihood = SEEN if kind == "gaussian" else SEEN.log_likelihood
    sampler = SplitGibbs(likelihood, (2.0, 1.0, 0.5, *[rho] * 25), steps=30, moves=10)
    field = Field(ROUND, Streams(seed, 3000))
    x = sampler.sample(torch.zeros(3000, 3, **double), field)
    law = gaussian_posterior(
        1.0, torch.zeros(3, **double), 0.25 * torch.eye(2, **double) + rho**2 * MATRIX @ MATRIX.mT
    )
    check(x, law, slack=0.06)  # 30 steps of ancestral sampling, 25 sweeps
    assert field.evaluations == 28 * 30
    with pytest.raises(StatisticalFailure):
        check(x, gaussian_posterior(1.0, torch.zeros(3, **double), 0.6 * torch.eye(2, **double)), slack=0.06)


def test_split_gibbs_ends_with_little_noise():
    sampler = SplitGibbs(SEEN, (0.005,), floor=0.01)
    assert sampler._grid(0.005).tolist() == [0.005, 0.0]
    assert len(sampler._grid(1.0)) == 21


# --- DDRM ---


def test_ddrm_starts_from_noise_around_what_was_seen(seed):
    blur = Blur(torch.tensor([0.25, 0.5, 0.25], **double), (6,))
    y = blur(torch.randn(6, **double))
    solver, field = DDRM(LinearGaussian(blur, y, 0.01)), Field(ROUND, Streams(seed, N))
    c = blur.svd().project(solver.init(5.0, torch.zeros(N, 6, **double), field))
    values = blur.svd().values
    assert_moments(c, blur.svd().project_output(y) / values, torch.full_like(values, 5.0))  # less n, plus n


def test_ddrm_takes_over_what_is_seen_without_noise(seed):
    truth = torch.randn(2, 4, 4, **double)
    prior = Mixture(torch.zeros(1, 2, 4, 4, **double), scale=1.0)
    for operator in (Downsample(2), Mask(torch.rand(4, 4) > 0.5), Blur(torch.ones(2, 2), (4, 4))):
        solver = DDRM(LinearGaussian(operator, operator(truth), 1e-16))
        field = Field(prior, Streams(seed, 3))
        grid = levels(50, 1e-7, 20)
        x = solver.init(grid[0], truth.expand(3, -1, -1, -1), field)
        x = solve(x, grid, field, solver)
        assert torch.allclose(
            operator(x), operator(truth).expand(3, *[-1] * operator(truth).dim()), atol=1e-5
        )


def test_ddrm_without_eta_is_euler_where_nothing_is_seen(seed):
    x = torch.randn(2, 3, **double)
    field = Field(ROUND, Streams(seed, 2))
    blind = LinearGaussian(Mask(torch.tensor([True, False, False])), torch.zeros(1, **double), 1.0)
    assert torch.allclose(
        DDRM(blind, eta=0.0).step(x, 2.0, 1.0, field)[:, 1:], Euler().step(x, 2.0, 1.0, field)[:, 1:]
    )


def test_ddrm_has_the_noise_of_its_level(seed):
    # Given x_0 = D, all coordinates have standard deviation t: eta^2 + (1 - eta^2), or (t^2 - n^2) + n^2 over y.
    truth = torch.tensor([0.5, -1.0, 2.0], **double)
    field = Field(lambda x, sigma: truth.expand_as(x), Streams(seed, N))
    mask, t, s = Mask(torch.tensor([True, True, False])), 0.6, 1.5
    for sd in (0.2, 1.0):  # clear, vague
        y = truth[:2] + sd * torch.randn(N, 2, **double)
        x = truth + s * torch.randn(N, 3, **double)
        found = DDRM(LinearGaussian(mask, y, sd**2)).step(x, s, t, field)
        assert_moments((found - truth) / t, 0.0, 1.0)


def test_ddrm_needs_singular_values():
    composed = Downsample(2) @ Mask(torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="`svd` is known"):
        DDRM(LinearGaussian(composed, torch.zeros(2), 0.1))
    with pytest.raises(ValueError, match="eta=2"):
        DDRM(SEEN, eta=2.0)


# --- DPS as published ---


def test_dps_steps_along_the_misfit_in_the_paper_s_scale(seed):
    x, s, t = torch.randn(4, 3, **double), 2.0, 1.5
    assert torch.allclose(
        DPSStep(SEEN, scale=0.0).step(x, s, t, Field(ROUND, Streams(seed, 4))),
        Ancestral().step(x, s, t, Field(ROUND, Streams(seed, 4))),
    )
    # In the paper's variables u = x / sqrt(1 + s^2), the gradient of |y - A D(u)| with D = x / (1 + s^2).
    u = x / math.sqrt(1 + s**2)
    residual = SEEN.y - SEEN.offset - u / math.sqrt(1 + s**2) @ MATRIX.mT
    gradient = -(residual / residual.norm(dim=1, keepdim=True)) @ MATRIX / math.sqrt(1 + s**2)
    moved = DPSStep(SEEN, scale=0.3).step(x, s, t, Field(ROUND, Streams(seed, 4)))
    base = Ancestral().step(x, s, t, Field(ROUND, Streams(seed, 4)))
    assert torch.allclose((moved - base) / math.sqrt(1 + t**2), -0.3 * gradient)


# --- inpainting ---


def test_what_is_known_stays(seed):
    known, mask = torch.randn(5, 3, **double), torch.tensor([True, False, True])
    grid = torch.cat([levels(20, 0.01, 20), torch.zeros(1, **double)])
    solver = Replacement(known, mask)
    x = solve(20 * torch.randn(5, 3, **double), grid, Field(ROUND, Streams(seed, 5)), solver)
    assert torch.equal(x[:, mask], known[:, mask])
    found = repaint(20 * x, grid, Field(ROUND, Streams(seed, 5)), solver, jump=5, resamplings=3)
    assert torch.equal(found[:, mask], known[:, mask])


def test_known_elements_have_the_noise_of_the_level(seed):
    solver = Replacement(torch.ones(3, **double), torch.tensor([True, True, False]))
    field = Field(ROUND, Streams(seed, N))
    x = solver.step(torch.zeros(N, 3, **double), 2.0, 1.5, field)
    assert_moments(x[:, :2], 1.0, 1.5)
    up = solver.step(torch.zeros(N, 3, **double), 1.5, 2.5, field)
    assert_moments(up, 0.0, 2.0)


def test_going_back_and_forth_harmonises(seed):
    # Two numbers of correlation 0.95, the first known: replacement alone leaves the second too little bound to it.
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]], **double)
    prior = Mixture(torch.zeros(1, 2, **double), covariance=covariance)
    solver = Replacement(torch.tensor([2.0, 0.0], **double), torch.tensor([True, False]))
    grid = torch.cat([levels(20, 0.05, 20), torch.zeros(1, **double)])
    start = 20 * torch.randn(1000, 2, **double)
    once = solve(start, grid, Field(prior, Streams(seed, 1000)), solver)[:, 1]
    often = repaint(start, grid, Field(prior, Streams(seed, 1000)), solver, jump=1, resamplings=10)[:, 1]
    assert abs(float(often.mean()) - 1.9) < 0.5 * abs(float(once.mean()) - 1.9)


def test_the_steps_of_repaint():
    grid = levels(8, 1, 7)
    steps = repaint_grid(grid, jump=3, resamplings=4)
    assert steps[0][0] == float(grid[0])
    assert steps[-1][1] == float(grid[-1])
    assert all(a[1] == b[0] for a, b in itertools.pairwise(steps))
    assert sum(t < s for s, t in steps) == 4 * 7
    plain = list(zip(grid.tolist()[:-1], grid.tolist()[1:], strict=True))
    assert repaint_grid(grid, resamplings=1) == plain
    with pytest.raises(ValueError, match="jump=0"):
        repaint_grid(grid, jump=0)


# --- editing ---


def test_sdedit_with_much_noise_draws_from_the_prior_and_with_little_keeps_the_guide(seed):
    prior = Mixture(torch.zeros(1, 2, **double), scale=1.0)
    grid = levels(200, 0.01, 150)
    guide = torch.full((3000, 2), 4.0, **double)
    x = sdedit(guide, grid, Field(prior, Streams(seed, 3000)), Heun(), sigma=199.0)
    assert_mean(x, 0.0, slack=0.03)
    assert_mean(x.square(), 1.0, slack=0.03)
    near = sdedit(guide, grid, Field(prior, Streams(seed, 3000)), Heun(), sigma=0.02)
    assert float((near - guide).abs().max()) < 0.2
    with pytest.raises(ValueError, match="no noise level"):
        sdedit(guide, grid, Field(prior, Streams(seed, 3000)), Heun(), sigma=0.001)


def test_a_linear_gaussian_posterior_of_a_round_prior_by_distribution(seed):
    # One number, to see the whole law rather than moments.
    prior = Mixture(torch.zeros(1, 1, **double), scale=1.0)
    seen = LinearGaussian(Dense(torch.ones(1, 1, **double)), torch.tensor([1.0], **double), 0.5)
    z = gaussian_step(seen, torch.zeros(N, 1, **double), 1.0, Field(prior, Streams(seed, N)))
    assert_distribution(z, lambda v: torch.special.ndtr((v - 2 / 3) * math.sqrt(3)))
