"""Laws of losses and weightings: their minimum, their equality with each other, what a weighted mean adds up to."""

import math

import pytest
import torch

from pgen.algorithms.diffusion import losses, weightings
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.predictions import denoiser_from
from pgen.algorithms.diffusion.schedules import EDM, VE, VP, RectifiedFlow, SubVP
from pgen.testing.statistics import StatisticalFailure, assert_mean

SCHEDULES = [VE(), VP(), VP("cosine"), SubVP(), EDM(), EDM(log_mean=0.5, log_std=0.6), RectifiedFlow()]


def test_flow_matching_is_denoising_with_its_own_weight():
    def velocity(x, t):
        return torch.sin(3 * x) + t[:, None] * x

    x, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    t = torch.rand(50, dtype=torch.float64)
    denoiser = denoiser_from(velocity, "velocity", RectifiedFlow())
    weighted = losses.denoising(denoiser, x, t / (1 - t), noise, weightings.FlowMatching())
    torch.testing.assert_close(losses.flow_matching(velocity, x, t, noise), weighted)


def test_the_error_of_the_exact_denoiser_is_orthogonal_to_all_functions_of_what_it_sees():
    n = 20_000  # notices correlations of 0.07
    law = Mixture(torch.tensor([[-1.0], [2.0]]), scale=0.5)
    x, noise, sigma = law.sample(n), torch.randn(n, 1), torch.exp(torch.randn(n))

    def slopes(denoiser):
        """Derivatives of the loss along some changes of the denoiser."""
        seen = x + sigma[:, None] * noise
        part = torch.zeros(n, 3, requires_grad=True)
        tests = torch.stack([torch.ones_like(seen), seen.sin(), seen.cos() * sigma[:, None]], -1)
        loss = losses.denoising(
            lambda v, s: denoiser(v, s) + (tests * part[:, None]).sum(-1),
            x,
            sigma,
            noise,
            weightings.SoftMinSNR(),
        )
        return torch.autograd.grad(loss.sum(), part)[0]

    assert_mean(slopes(law), 0.0)
    with pytest.raises(StatisticalFailure):
        assert_mean(slopes(lambda v, s: law(v, 1.3 * s)), 0.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_likelihood_weight_makes_any_training_law_an_integral_over_levels(schedule):
    def error(sigma):  # sigma^3 times a normal density of log sigma: integrates to one over sigma^3
        z = (sigma.log() - 0.2) / 0.3
        return sigma**2 * torch.exp(-(z**2) / 2) / (0.3 * math.sqrt(2 * math.pi))

    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    sigma = schedule.training(u)
    mean = (weightings.Likelihood(schedule)(sigma) * error(sigma)).mean()
    assert abs(float(mean) - 1) < 2e-4
    assert abs(float((weightings.Uniform()(sigma) * error(sigma)).mean()) - 1) > 0.1


def test_the_likelihood_counts_the_range_of_the_schedule_alone():
    outside = torch.tensor([0.001, 0.5, 100.0])
    assert (weightings.Likelihood(EDM())(outside) > 0).tolist() == [False, True, False]


def test_the_likelihood_weight_of_levels_uniform_in_logarithm_is_uniform():
    schedule = VE(0.01, 100.0)
    sigma = schedule.training(torch.rand(100, dtype=torch.float64))
    expected = math.log(1e4) * weightings.Uniform()(sigma)
    torch.testing.assert_close(weightings.Likelihood(schedule)(sigma), expected)


def test_weights_are_these_functions():
    s = torch.tensor([0.1, 1.0, 10.0])
    torch.testing.assert_close(weightings.MinSNR(5.0)(s), torch.tensor([5.0, 1.0, 0.01]))
    torch.testing.assert_close(
        weightings.SoftMinSNR(5.0)(s), torch.tensor([1 / 0.21, 1 / 1.2, 1 / 100.2]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(weightings.EDM(0.5)(s), (s**2 + 0.25) / (0.5 * s) ** 2)
    torch.testing.assert_close(weightings.FlowMatching()(s), (1 + 1 / s) ** 2)


def test_the_learned_variance_finds_the_mean_loss_of_every_level():
    """At its minimum, losses over their learned mean average to one everywhere."""
    balance = weightings.LearnedVariance()
    optimizer = torch.optim.Adam(balance.parameters(), 0.05)
    log_mean = lambda sigma: torch.tanh(sigma.log())  # noqa: E731
    for _ in range(400):
        sigma = torch.exp(1.5 * torch.randn(512) - 0.5)
        loss = log_mean(sigma).exp() * torch.empty(512).exponential_()
        optimizer.zero_grad()
        balance(loss, sigma).mean().backward()
        optimizer.step()
    sigma = torch.linspace(-2.5, 1.5, 9).exp()
    assert (balance.log_mean(sigma) - log_mean(sigma)).abs().max() < 0.25


def test_errors_are_averaged_over_events_of_any_shape():
    for event in ((), (4,), (2, 3, 1)):
        x = torch.zeros(5, *event)
        loss = losses.denoising(lambda x, s: x, x, torch.full((5,), 2.0), torch.ones_like(x))
        torch.testing.assert_close(loss, torch.ones(5))


def test_contexts_reach_the_denoiser_row_by_row():
    context = torch.arange(5.0).unsqueeze(-1)
    loss = losses.denoising(
        lambda x, s, c: c, torch.zeros(5, 1), torch.ones(5), torch.randn(5, 1), context=context
    )
    torch.testing.assert_close(loss, context.squeeze(-1) ** 2)
    flow = losses.flow_matching(
        lambda x, t, c: c, torch.zeros(5, 1), torch.rand(5), torch.zeros(5, 1), context=context
    )
    torch.testing.assert_close(flow, context.squeeze(-1) ** 2)


@pytest.mark.parametrize("make", [weightings.EDM, weightings.MinSNR, weightings.SoftMinSNR])
def test_impossible_weightings_are_refused(make):
    with pytest.raises(ValueError, match="expected a positive number"):
        make(0.0)
