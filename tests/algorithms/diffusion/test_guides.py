"""Conditional denoisers, and observations, against Gaussian and mixture priors, where the truth is a formula."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.operators import (
    Dense,
    Downsample,
    Function,
    Greyscale,
    Mask,
    as_matrix,
)
from pgen.algorithms.diffusion.posteriors import (
    DPS,
    LGD,
    MMPS,
    LinearGaussian,
    PiGDM,
    condition,
    width_of,
)
from pgen.algorithms.diffusion.posteriors.mmps import conjugate_gradient
from pgen.algorithms.diffusion.solve import solve
from pgen.algorithms.diffusion.solvers import Heun

double = {"dtype": torch.float64}


def fixed(*shape, seed=1):
    return torch.randn(*shape, **double, generator=torch.Generator().manual_seed(seed))


MATRIX = fixed(2, 3)
LEVELS = torch.tensor([0.05, 0.4, 1.0, 3.0, 30.0], **double)


def evidence(prior, observation, x, sigma):
    """log p(y | x_sigma), exactly, for one row: from p(x_sigma | y) p(y) / p(x_sigma)."""
    matrix = as_matrix(observation.operator, prior.event_shape, prior.means)
    spread = torch.as_tensor(observation.variance, **double).expand(observation.y.shape).reshape(-1)
    shifted = Mixture(  # the law of A x_0
        prior.means @ matrix.mT,
        covariance=matrix @ prior.covariance() @ matrix.mT + spread.diag(),
        weights=prior.log_weights.exp(),
    )
    whole = shifted.log_prob((observation.y - observation.offset).reshape(1, -1))
    return whole + condition(prior, observation).log_prob(x, sigma) - prior.log_prob(x, sigma)


ROOT = fixed(3, 3, seed=3)
GAUSSIAN = Mixture(fixed(1, 3, seed=2), covariance=ROOT @ ROOT.mT + 0.1 * torch.eye(3, **double))
ROUND = Mixture(torch.zeros(1, 3, **double), scale=1.5)
SEEN = LinearGaussian(Dense(MATRIX), torch.tensor([0.7, -0.4], **double), 0.3)
UNEVEN = LinearGaussian(
    Dense(MATRIX), torch.tensor([0.7, -0.4], **double), torch.tensor([0.3, 0.02], **double), offset=0.5
)


@pytest.mark.parametrize("observation", [SEEN, UNEVEN], ids=["one variance", "several"])
@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (GAUSSIAN, lambda o: MMPS(GAUSSIAN, o)),
        (GAUSSIAN, lambda o: MMPS(GAUSSIAN, o, iterations=2)),
        (ROUND, lambda o: MMPS(ROUND, o)),
        (ROUND, lambda o: PiGDM(ROUND, o, data_variance=1.5**2)),
    ],
    ids=["mmps", "mmps-cg", "mmps-round", "pigdm"],
)
def test_guides_are_exact_for_gaussian_priors(prior, guide, observation):
    x = fixed(len(LEVELS), 3, seed=4) * LEVELS[:, None].clamp(min=1)
    look = guide(observation).look(x, LEVELS)
    assert torch.allclose(look.prior, prior(x, LEVELS))
    assert torch.allclose(look.posterior, condition(prior, observation)(x, LEVELS), atol=1e-8)
    assert torch.allclose(guide(observation)(x, LEVELS), look.posterior)
    if guide(observation).__dict__.get("iterations") is None:  # with conjugate gradients, no determinant
        exact = torch.cat(
            [evidence(prior, observation, row[None], level) for row, level in zip(x, LEVELS, strict=True)]
        )
        assert torch.allclose(look.log_twist, exact, atol=1e-7)
    assert not look.posterior.requires_grad
    assert not look.log_twist.requires_grad


def test_another_prior_variance_is_noticed():
    x, sigma = fixed(1, 3), torch.ones(1, **double)
    wrong = PiGDM(ROUND, SEEN, data_variance=1.0)(x, sigma)
    assert float((wrong - condition(ROUND, SEEN)(x, sigma)).abs().max()) > 0.01


def test_the_posterior_of_a_mixture_is_a_denoiser_with_bayes_score():
    prior = Mixture(fixed(3, 2, seed=5) * 2, scale=torch.tensor([0.3, 0.5, 1.0], **double))
    observation = LinearGaussian(Mask(torch.tensor([True, False])), torch.tensor([0.5], **double), 0.2)
    x = fixed(4, 2, seed=6).requires_grad_()
    level = torch.full((4,), 1e-3, **double)
    total = prior.log_prob(x) + observation.log_likelihood(x)
    (score,) = torch.autograd.grad(total.sum(), x)
    found = condition(prior, observation).score(x.detach(), level)
    assert torch.allclose(found, score, atol=1e-3)
    with pytest.raises(ValueError, match="one observation"):
        condition(prior, LinearGaussian(observation.operator, torch.zeros(4, 1), 1.0))


def test_rows_may_have_observations_of_their_own():
    y = fixed(4, 2, seed=7)
    x, sigma = fixed(4, 3, seed=8), LEVELS[:4]
    for make in (
        lambda o: MMPS(GAUSSIAN, o),
        lambda o: MMPS(GAUSSIAN, o, 1),
        lambda o: PiGDM(GAUSSIAN, o),
        lambda o: DPS(GAUSSIAN, o.log_likelihood),
        lambda o: LGD(GAUSSIAN, o.log_likelihood),
    ):
        together = make(LinearGaussian(Dense(MATRIX), y, 0.3)).look(x, sigma)
        for row in range(4):
            alone = make(LinearGaussian(Dense(MATRIX), y[row], 0.3)).look(
                x[row : row + 1], sigma[row : row + 1]
            )
            for a, b in zip(together, alone, strict=True):
                assert torch.allclose(a[row], b[0], rtol=1e-9)


def test_guides_take_images():
    prior = Mixture(torch.zeros(1, 3, 4, 4, **double), scale=1.0)
    x, sigma = fixed(2, 3, 4, 4), torch.tensor([0.5, 2.0], **double)
    for operator in (
        Downsample(2),
        Greyscale(),
        Mask(fixed(4, 4) > 0),
        Function(lambda v: v.mean(-3), (3, 4, 4)),
    ):
        observation = LinearGaussian(operator, operator(fixed(3, 4, 4, seed=9)), 0.1)
        exact = condition(prior, observation)(x, sigma)
        assert torch.allclose(PiGDM(prior, observation)(x, sigma), exact)
        assert torch.allclose(MMPS(prior, observation)(x, sigma), exact)
        assert torch.allclose(
            MMPS(prior, observation, iterations=1)(x, sigma), exact, atol=1e-7
        )  # A A' = s^2 I


def test_a_solver_integrates_a_guide():
    exact = condition(GAUSSIAN, SEEN)
    grid = torch.linspace(math.log(50), math.log(0.01), 40, **double).exp()
    x = 50 * fixed(5, 3)
    found = solve(x, grid, Field(MMPS(GAUSSIAN, SEEN), Streams(0, 5)), Heun())
    assert torch.allclose(found, solve(x, grid, Field(exact), Heun()), atol=1e-8)


# --- any likelihood ---


def laplace(x0):
    return -(x0 @ MATRIX.mT - 0.3).abs().sum(-1)


def test_dps_is_the_likelihood_of_the_denoised_value():
    x, sigma = fixed(5, 3), LEVELS
    keep = (1.5**2 / (1.5**2 + sigma**2))[:, None]
    denoised = keep * x
    look = DPS(ROUND, laplace).look(x, sigma)
    slope = -torch.sign(denoised @ MATRIX.mT - 0.3) @ MATRIX
    assert torch.allclose(look.log_twist, laplace(denoised))
    assert torch.allclose(look.posterior, denoised + sigma[:, None] ** 2 * keep * slope)


def test_tempering_leaves_about_a_nat_over_the_spread():
    width, sigma = width_of(laplace, fixed(50, 3)), torch.tensor([1e-3, 1.0, 100.0], **double)
    published, tempered = DPS(ROUND, laplace), DPS(ROUND, laplace, width, data_variance=1.5**2)
    x = fixed(3, 3)
    spread = (sigma**2 * 1.5**2 / (sigma**2 + 1.5**2)).sqrt()
    share = width / (width + spread)
    assert torch.allclose(tempered.look(x, sigma).log_twist, share * published.look(x, sigma).log_twist)
    pull = (published(x, sigma) - ROUND(x, sigma)) * share[:, None]
    assert torch.allclose(tempered(x, sigma) - ROUND(x, sigma), pull)
    slopes = MATRIX.mT @ torch.tensor([[1.0, 1.0], [1.0, -1.0]], **double)
    lengths = slopes.norm(dim=0)
    assert float(lengths.min()) - 1e-9 <= 1 / width <= float(lengths.max()) + 1e-9


def test_the_pull_can_be_bounded():
    sharp = lambda x0: 1e6 * laplace(x0)  # noqa: E731
    for guide in (DPS(ROUND, sharp, limit=0.5), LGD(ROUND, sharp, limit=0.5)):
        look = guide.look(fixed(5, 3), LEVELS)
        pull = (look.posterior - look.prior).square().mean(-1).sqrt()
        assert bool((pull <= 0.5 * LEVELS + 1e-9).all())


def test_lgd_averages_the_likelihood():
    # exp(a x) averaged over N(D, r^2) is exp(a D + a^2 r^2 / 2).
    prior = Mixture(torch.zeros(1, 1, **double), scale=1.0)
    x, sigma = torch.zeros(1, 1, **double), torch.ones(1, **double)
    slope = lambda x0: 1.5 * x0[:, 0]  # noqa: E731
    look = LGD(prior, slope, samples=2**14).look(x, sigma)
    assert float(look.log_twist) == pytest.approx(1.5**2 * 0.5 / 2, abs=0.06)
    few = LGD(prior, slope, data_variance=1e-12).look(x, sigma)
    assert torch.allclose(few.posterior, DPS(prior, slope)(x, sigma))


# --- observations ---


@pytest.mark.parametrize("observation", [SEEN, UNEVEN], ids=["one variance", "several"])
def test_the_algebra_of_an_observation(observation):
    residual, spread = fixed(4, 2), torch.tensor([0.0, 0.1, 1.0, 50.0], **double)
    noise = torch.as_tensor(observation.variance, **double).expand(2).diag()
    full = noise + spread[:, None, None] * (MATRIX @ MATRIX.mT)
    assert torch.allclose(
        observation.solve(residual, spread), torch.linalg.solve(full, residual[..., None])[..., 0]
    )
    law = torch.distributions.MultivariateNormal(torch.zeros(2, **double), full)
    assert torch.allclose(observation.log_density(residual, spread), law.log_prob(residual))
    x0 = fixed(4, 3)
    exact = torch.distributions.MultivariateNormal(x0 @ MATRIX.mT + observation.offset, noise)
    assert torch.allclose(observation.log_likelihood(x0), exact.log_prob(observation.y))


def test_known_singular_values_and_the_full_matrix_agree():
    operator = Mask(fixed(4, 4) > 0) @ Downsample(1)  # the same, its singular values unknown
    y = operator(fixed(2, 4, 4))
    known = LinearGaussian(Mask(fixed(4, 4) > 0), y, 0.2)
    full = LinearGaussian(operator, y, 0.2)
    residual, spread = known.residual(fixed(3, 2, 4, 4)), torch.tensor([0.1, 1.0, 9.0], **double)
    assert torch.allclose(known.solve(residual, spread), full.solve(residual, spread))
    assert torch.allclose(known.log_density(residual, spread), full.log_density(residual, spread))


def test_conjugate_gradients_solve_row_by_row():
    full = fixed(3, 4, 4)
    full = full @ full.mT + torch.eye(4, **double)
    right = torch.stack([torch.zeros(4, **double), fixed(4), 1e3 * fixed(4, seed=2)])
    found = conjugate_gradient(lambda v: (full @ v[..., None])[..., 0], right, 4)
    assert torch.allclose(found, torch.linalg.solve(full, right[..., None])[..., 0])


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="variance=0"):
        LinearGaussian(Dense(MATRIX), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="data_variance=-1"):
        PiGDM(ROUND, SEEN, -1.0)
    with pytest.raises(ValueError, match="iterations=0"):
        MMPS(ROUND, SEEN, 0)
    with pytest.raises(ValueError, match="limit=0"):
        DPS(ROUND, laplace, limit=0.0)
    with pytest.raises(ValueError, match="samples even"):
        LGD(ROUND, laplace, samples=3)
    big = LinearGaussian(Downsample(1) @ Downsample(1), torch.zeros(65, 65), 1.0)
    with pytest.raises(ValueError, match="in full"):
        big.solve(torch.zeros(1, 65, 65), torch.ones(1))


@pytest.mark.parametrize("shape", ["isotropic", "several", "shared", "own"])
def test_mixtures_draw_from_their_posteriors_of_many_observations_at_once(shape):
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": torch.float64, "generator": generator}
    root = torch.randn(3, 3, 3, **kind)
    own = root @ root.mT / 3 + 0.3 * torch.eye(3, dtype=torch.float64)
    spread = {
        "isotropic": {"scale": 0.7},
        "several": {"scale": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)},
        "shared": {"covariance": own[0]},
        "own": {"covariance": own},
    }[shape]
    prior = Mixture(2 * torch.randn(3, 3, **kind), weights=torch.tensor([1.0, 2.0, 3.0]), **spread)
    matrix, y, many = torch.randn(2, 3, **kind), torch.randn(3, 2, **kind), 60_000
    drawn, log_evidence = prior.linear_posterior(matrix, y, many, generator=generator)
    noise = torch.eye(2, dtype=torch.float64)
    for row in range(3):
        exact = prior.posterior(matrix, y[row], noise)
        # One in a million means is off by 4.9 standard errors by chance; 3 times 3 of them are looked at in each case.
        share, centre = exact.log_weights.exp(), exact.means
        mean = share @ centre
        covariance = (share[:, None, None] * exact.covariance()).sum(0)
        covariance = covariance + (centre - mean).mT @ (share[:, None] * (centre - mean))
        error = (drawn[row].mean(0) - mean) / (covariance.diagonal() / many).sqrt()
        assert float(error.abs().max()) < 5.5
        assert torch.allclose(drawn[row].mT.cov(), covariance, atol=0.05 * float(covariance.diagonal().max()))
        laws = matrix @ prior.covariance() @ matrix.mT + noise
        each = torch.distributions.MultivariateNormal(prior.means @ matrix.mT, laws).log_prob(y[row])
        assert torch.allclose(log_evidence[row], (prior.log_weights + each).logsumexp(0))
    other = prior.linear_posterior(matrix, y, many, sigma=1.0, generator=generator)[1]
    assert float((other - log_evidence).abs().min()) > 1e-3  # noise on x counts
