"""Twisted sequential Monte Carlo: unbiased evidence, posterior draws, resampling. False alarms once in a million."""

import itertools
import math

import pytest
import torch

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.operators import Dense
from pgen.algorithms.diffusion.posteriors import (
    DPS,
    LGD,
    MMPS,
    LinearGaussian,
    Particles,
    PiGDM,
    Twisted,
    effective_size,
    systematic,
)
from pgen.testing.statistics import StatisticalFailure, assert_mean

double = {"dtype": torch.float64}
MATRIX = torch.tensor([[1.0, 0.5], [0.0, 0.8]], **double)
SEEN = LinearGaussian(Dense(MATRIX), torch.tensor([1.2, -0.5], **double), 0.25)
VARIANCE = 0.6
PRIOR = Mixture(torch.zeros(1, 2, **double), scale=math.sqrt(VARIANCE))
GRID = torch.linspace(math.log(5), math.log(0.05), 13, **double).exp()


def reached(grid):
    """Variance of every number at the end of ancestral sampling on a grid, for the prior N(0, VARIANCE I): exactly."""
    levels = grid.tolist()
    total = levels[0] ** 2
    for s, t in itertools.pairwise(levels):
        keep = (t / s) ** 2
        denoise = VARIANCE / (VARIANCE + s**2)
        total = (keep + (1 - keep) * denoise) ** 2 * total + t**2 * (1 - keep)
    return total


def exact(grid):
    """log p(y), and mean and covariance of x_0 given y, under that sampler."""
    spread = reached(grid) * torch.eye(2, **double)
    whole = MATRIX @ spread @ MATRIX.mT + 0.25 * torch.eye(2, **double)
    gain = spread @ MATRIX.mT @ torch.linalg.inv(whole)
    law = torch.distributions.MultivariateNormal(torch.zeros(2, **double), whole)
    return law.log_prob(SEEN.y), gain @ SEEN.y, spread - gain @ MATRIX @ spread


def run(guide, seed, groups, particles, grid=GRID, prior=PRIOR, **options):
    field = Field(prior, Streams(seed, groups * particles))
    like = prior.means[0].expand(groups * particles, -1)
    return Twisted(particles, **options).sample(guide, field, grid, like)


TWISTS = {
    "mmps": MMPS(PRIOR, SEEN),
    "mmps-cg": MMPS(PRIOR, SEEN, 1),
    "pigdm": PiGDM(PRIOR, SEEN, VARIANCE),
    "dps": DPS(PRIOR, SEEN.log_likelihood, limit=0.5),
    "dps-tempered": DPS(PRIOR, SEEN.log_likelihood, width=0.4, data_variance=VARIANCE),
    "lgd": LGD(PRIOR, SEEN.log_likelihood, VARIANCE),
}


@pytest.mark.parametrize(
    ("name", "threshold"), [*((name, 0.5) for name in TWISTS), ("pigdm", 0.0), ("pigdm", 1.0)]
)
def test_the_evidence_is_unbiased_whatever_the_twist(name, threshold, seed):
    found = run(TWISTS[name], seed, groups=3000, particles=4, threshold=threshold)
    ratio = (found.log_evidence - exact(GRID)[0]).exp()
    assert float(ratio.std()) < 2  # or the next line says little: 3,000 draws notice 0.18 standard deviations
    assert_mean(ratio, 1.0, what="evidence")


class Unweighted:
    """A guide that says the prior went where the proposal did: p / q is left out."""

    def __init__(self, guide):
        self.guide = guide

    def look(self, x, sigma):
        look = self.guide.look(x, sigma)
        return look._replace(prior=look.posterior)

    def log_likelihood(self, x0):
        return self.guide.log_likelihood(x0)


class Narrower(Unweighted):
    """A guide whose likelihood at the end is another."""

    def look(self, x, sigma):
        return self.guide.look(x, sigma)

    def log_likelihood(self, x0):
        return 1.5 * self.guide.log_likelihood(x0)


@pytest.mark.parametrize("broken", [Unweighted, Narrower])
def test_a_missing_factor_is_noticed(broken, seed):
    found = run(broken(MMPS(PRIOR, SEEN)), seed, groups=3000, particles=4)
    with pytest.raises(StatisticalFailure):
        assert_mean((found.log_evidence - exact(GRID)[0]).exp(), 1.0)


@pytest.mark.parametrize("name", TWISTS)
def test_weighted_particles_have_the_posterior(name, seed):
    found = run(TWISTS[name], seed, groups=50, particles=400)
    _, mean, covariance = exact(GRID)
    weight = found.log_weight.exp().unsqueeze(-1)
    means = (weight * found.x).sum(1)
    squares = (weight * (found.x - mean).square()).sum(1)
    # A weighted mean of P particles is off by about 1 / P.
    assert_mean(means, mean, slack=2 / 400, what="mean")
    assert_mean(squares, covariance.diagonal(), slack=2 / 400, what="variance")


def test_modes_get_their_weights(seed):
    # y leaves two modes of unequal weight; a guide alone takes one or the other by where noise began.
    prior = Mixture(torch.tensor([[-3.0, 2.0], [3.0, 2.0], [0.0, -4.0]], **double), scale=0.5)
    seen = LinearGaussian(Dense(torch.tensor([[0.1, 1.0]], **double)), torch.tensor([2.6], **double), 0.2)
    grid = torch.linspace(math.log(30), math.log(0.02), 61, **double).exp()
    found = run(MMPS(prior, seen), seed, groups=40, particles=400, grid=grid, prior=prior)
    right = (found.log_weight.exp() * (found.x[..., 0] > 0)).sum(1)
    exact_posterior = prior.posterior(seen.operator.matrix, seen.y, 0.2 * torch.eye(1, **double))
    share = exact_posterior.log_weights.exp()[1]
    assert 0.6 < float(share) < 0.9
    assert_mean(right, share, slack=0.02, what="weight of a mode")


def test_any_likelihood(seed):
    # Poisson counts with rate exp(x_1); the posterior by quadrature.
    prior = Mixture(torch.tensor([[-1.0], [1.5]], **double), scale=0.5)
    count = 3.0

    def poisson(x0):
        return count * x0[:, 0] - x0[:, 0].exp() - math.lgamma(count + 1)

    x = torch.linspace(-5, 6, 4001, **double)[:, None]
    density = (prior.log_prob(x, 0.02) + poisson(x)).exp()
    step = 11 / 4000
    evidence, mean = float(density.sum() * step), float((density * x[:, 0]).sum() / density.sum())
    grid = torch.linspace(math.log(20), math.log(0.02), 61, **double).exp()
    for guide in (DPS(prior, poisson, width=0.5, data_variance=2.0), LGD(prior, poisson, limit=1.0)):
        found = run(guide, seed, groups=100, particles=100, grid=grid, prior=prior)
        # 60 steps leave the sampler's law about a hundredth from the mixture's.
        assert_mean(found.log_evidence.exp() / evidence, 1.0, slack=0.03, what="evidence")
        means = (found.log_weight.exp() * found.x[..., 0]).sum(1)
        assert_mean(means, mean, slack=0.04, what="mean")


def test_an_observation_does_not_see_the_others(seed):
    y = torch.randn(3, 2, **double).repeat_interleave(8, 0)
    several = run(MMPS(PRIOR, LinearGaussian(Dense(MATRIX), y, 0.25)), seed, groups=3, particles=8)
    alone = run(MMPS(PRIOR, LinearGaussian(Dense(MATRIX), y[:8], 0.25)), seed, groups=1, particles=8)
    assert torch.allclose(several.x[0], alone.x[0])
    assert torch.allclose(several.log_evidence[0], alone.log_evidence[0])
    again = run(MMPS(PRIOR, LinearGaussian(Dense(MATRIX), y[:8], 0.25)), seed, groups=1, particles=8)
    assert torch.equal(alone.x, again.x)


def test_draws_follow_the_weights():
    x = torch.arange(4.0).reshape(1, 4, 1).repeat(2, 1, 1)
    weight = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = Particles(x, weight.log(), torch.zeros(2), torch.zeros(1, 2)).draws(4, torch.full((2,), 0.5))
    assert found[..., 0].tolist() == [[0, 0, 1, 2], [3, 3, 3, 3]]


def test_a_zero_at_the_end_of_the_grid_is_left_out(seed):
    longer = torch.cat([GRID, torch.zeros(1, **double)])
    guide = MMPS(PRIOR, SEEN)
    assert torch.equal(run(guide, seed, 1, 4, longer).x, run(guide, seed, 1, 4).x)


def test_systematic_resampling_is_fair_and_even():
    log_weight = torch.randn(3, 7, **double)
    weight = log_weight.softmax(-1)
    points = (torch.arange(2000, **double) + 0.5) / 2000
    index = systematic(log_weight.unsqueeze(1).expand(3, 2000, 7), points.expand(3, -1), 10)  # [3, 2000, 10]
    counts = torch.nn.functional.one_hot(index, 7).sum(-2).double()
    low, high = (10 * weight).floor().unsqueeze(1), (10 * weight).ceil().unsqueeze(1)
    assert bool(((counts >= low) & (counts <= high)).all())
    assert torch.allclose(counts.mean(1), 10 * weight, atol=2e-3)
    assert bool((index.diff(dim=-1) >= 0).all())


def test_systematic_resampling_never_draws_what_has_no_weight():
    log_weight = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert systematic(log_weight, torch.tensor(u, **double)).tolist() in (
            [1, 1, 1, 3, 3],
            [1, 1, 3, 3, 3],
        )


def test_effective_size():
    assert float(effective_size(torch.zeros(5))) == pytest.approx(5)
    assert float(effective_size(torch.tensor([0.0, -1e4]))) == pytest.approx(1)


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="threshold in"):
        Twisted(4, threshold=2.0)
    with pytest.raises(ValueError, match="two or more that are not 0"):
        Twisted(7).sample(
            MMPS(PRIOR, SEEN), Field(PRIOR, Streams(0, 7)), torch.tensor([1.0, 0.0]), torch.zeros(7, 2)
        )
    with pytest.raises(ValueError, match="7 rows and 4 particles"):
        Twisted(4).sample(MMPS(PRIOR, SEEN), Field(PRIOR, Streams(0, 7)), GRID, torch.zeros(7, 2))
