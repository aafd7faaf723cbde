"""Metropolis moves by line integrals: the ratio is right, and the law stays. False alarms once in a million."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.operators import Dense
from pgen.algorithms.diffusion.posteriors import LinearGaussian, LineMALA, condition, log_ratio, refine
from pgen.algorithms.diffusion.posteriors.metropolis import Conditioned, Euclidean
from pgen.testing.statistics import StatisticalFailure, assert_distribution, assert_mean, assert_moments

double = {"dtype": torch.float64}
PRIOR = Mixture(torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.0, 2.0]], **double), scale=0.6)
SEEN = LinearGaussian(Dense(torch.tensor([[1.0, 0.3]], **double)), torch.tensor([0.4], **double), 0.3)
SIGMA = 0.05
CHAINS = 4000


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_the_line_integral_of_the_score_is_the_log_ratio(sigma):
    x = torch.randn(20, 2, **double)
    other = x + 0.5 * torch.randn(20, 2, **double)
    level = torch.full((20,), sigma, **double)
    true = PRIOR.log_prob(other, level) - PRIOR.log_prob(x, level)
    errors = [float((log_ratio(PRIOR, x, other, level, nodes) - true).abs().max()) for nodes in (2, 4, 8, 16)]
    assert errors[3] < 1e-5
    assert errors[3] < errors[1] + 1e-9 < errors[0] + 1e-8
    back = log_ratio(PRIOR, other, x, level, 8)
    assert torch.allclose(back, -log_ratio(PRIOR, x, other, level, 8))


def test_two_nodes_are_exact_for_gaussians():
    prior = Mixture(torch.tensor([[1.0, 2.0]], **double), scale=0.7)
    x, other, level = (
        torch.randn(5, 2, **double),
        torch.randn(5, 2, **double),
        torch.full((5,), 0.3, **double),
    )
    true = prior.log_prob(other, level) - prior.log_prob(x, level)
    assert torch.allclose(log_ratio(prior, x, other, level, 2), true)


def test_events_of_any_shape():
    prior = Mixture(torch.zeros(1, 2, 3, **double), scale=1.0)
    x, level = torch.randn(4, 2, 3, **double), torch.ones(4, **double)
    found = log_ratio(prior, x, 0 * x, level)
    assert torch.allclose(found, x.square().flatten(1).sum(1) / 4)
    scalar = Mixture(torch.zeros(1, **double), scale=1.0)
    assert torch.allclose(log_ratio(scalar, x[:, 0, 0], 0 * x[:, 0, 0], level), x[:, 0, 0].square() / 4)


def noisy_posterior():
    """The law of x = x_0 + SIGMA eps given y ~ N(A x, R): what the moves leave alone."""
    covariance = PRIOR.covariance() + SIGMA**2 * torch.eye(2, **double)
    wide = Mixture(PRIOR.means, covariance=covariance, weights=PRIOR.log_weights.exp())
    return condition(wide, SEEN)


def check(x, law):
    """Three projections of draws against a mixture's."""
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, -0.6]], **double):
        mean = law.means @ direction
        deviation = (direction @ law.covariance() @ direction).sqrt()

        def cdf(v, mean=mean, deviation=deviation):
            z = (v.unsqueeze(-1) - mean) / deviation
            return (law.log_weights.exp() * torch.special.ndtr(z)).sum(-1)

        assert_distribution(x @ direction, cdf, what="projection")


METRICS = {"euclidean": Euclidean(), "conditioned": Conditioned(SEEN, 0.36)}


@pytest.mark.parametrize("name", METRICS)
def test_moves_leave_the_posterior_alone(name, seed):
    law = noisy_posterior()
    x = law.sample(CHAINS, generator=torch.Generator().manual_seed(seed))
    kernel = LineMALA(SEEN.log_likelihood, SIGMA, nodes=6, metric=METRICS[name])
    field = Field(PRIOR, Streams(seed, CHAINS))
    with torch.no_grad():
        state = kernel.init(x, field, 0.6 if name == "euclidean" else 1.5)
        accept = []
        for _ in range(15):
            state = kernel.step(state, field)
            accept.append(float(state.accept.mean()))
    assert 0.3 < accept[-1] < 0.9  # rejection matters here
    check(state.x, law)


class Unadjusted(LineMALA):
    """Accepts everything."""

    def step(self, state, field):
        other = super().step(state, field)
        drift = state.x + state.step_size[:, None] / 2 * state.gradient
        x = drift + state.step_size[:, None].sqrt() * field.noise(state.x)
        log_likelihood, gradient = self._target(x, field)
        return other._replace(x=x, gradient=gradient, log_likelihood=log_likelihood)


@pytest.mark.parametrize(
    "kernel",
    [
        Unadjusted(SEEN.log_likelihood, SIGMA),
        LineMALA(SEEN.log_likelihood, 2.0),
        LineMALA(lambda x: -SEEN.log_likelihood(x), SIGMA),
    ],
    ids=["no rejection", "another noise level", "another sign"],
)
def test_wrong_moves_are_noticed(kernel, seed):
    law = noisy_posterior()
    x = law.sample(CHAINS, generator=torch.Generator().manual_seed(seed))
    field = Field(PRIOR, Streams(seed, CHAINS))
    with torch.no_grad():
        state = kernel.init(x, field, 0.6)
        for _ in range(15):
            state = kernel.step(state, field)
    with pytest.raises(StatisticalFailure):
        check(state.x, law)


def test_refining_repairs_draws_and_finds_its_step_size(seed):
    prior = Mixture(torch.zeros(1, 3, **double), scale=1.0)
    far = torch.full((2000, 3), 4.0, **double)
    kernel = LineMALA(lambda x: x.new_zeros(len(x)), 0.1, nodes=2)
    state = refine(kernel, far, Field(prior, Streams(seed, 2000)), 80, step_size=1e-3)
    assert 0.4 < float(state.accept.mean()) < 0.8
    assert_moments(state.x, 0.0, math.sqrt(1.01))


def test_a_chain_does_not_see_the_others(seed):
    x = torch.randn(6, 2, **double)
    kernel = LineMALA(SEEN.log_likelihood, SIGMA)
    many = refine(kernel, x, Field(PRIOR, Streams(seed, 6)), 10)
    few = refine(kernel, x[:2], Field(PRIOR, Streams(seed, 2)), 10)
    assert torch.allclose(many.x[:2], few.x)


def test_the_conditioned_metric_is_the_posterior_covariance(seed):
    metric = Conditioned(SEEN, 0.7)
    a = SEEN.operator.matrix
    full = torch.linalg.inv(torch.eye(2, **double) / 0.7 + a.mT @ a / SEEN.variance)
    v = torch.randn(5, 2, **double)
    assert torch.allclose(metric.apply(v), v @ full)
    assert torch.allclose(metric.square(v), (v @ torch.linalg.inv(full) * v).sum(-1))
    n = 10_000
    draws = metric.draw(v.new_empty(n, 2), Field(PRIOR, Streams(seed, n)))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(full), draws.mT, upper=False).mT
    assert_moments(white, 0.0, 1.0)
    assert_mean(white[:, 0] * white[:, 1], 0.0, std=1.0)


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="sigma=0"):
        LineMALA(SEEN.log_likelihood, 0.0)
