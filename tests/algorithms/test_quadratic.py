"""Gaussian answers from a log density alone, against closed forms in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pgen.algorithms.elimination import colouring
from pgen.algorithms.quadratic import Gaussian, NotQuadratic, Shape, gaussian, prove

LIKE = torch.zeros((), dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_factor_analysis_equals_its_closed_form_row_by_row() -> None:
    loadings, noise, x = random(5, 2), 0.7, random(40, 5, seed=1)

    def log_joint(outer: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + Normal(z @ loadings.mT, noise).log_prob(x).sum(-1), LIKE

    found = gaussian(log_joint, Shape(0, 40, 2), LIKE)
    prove(log_joint, found)
    covariance = loadings @ loadings.mT + noise**2 * torch.eye(5, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).log_prob(x)
    torch.testing.assert_close(found.blocks, exact)
    precision = torch.eye(2, dtype=torch.float64) + loadings.mT @ loadings / noise**2
    torch.testing.assert_close(found.inner, x @ loadings @ precision.inverse() / noise**2)
    torch.testing.assert_close(found.covariances()[1], precision.inverse().expand(40, 2, 2))


def test_its_gradient_is_that_of_the_closed_form() -> None:
    loadings, x = random(4, 2).requires_grad_(), random(10, 4, seed=1)

    def log_joint(outer: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return -(z**2).sum(-1) / 2 + Normal(z @ loadings.mT, 0.5).log_prob(x).sum(-1), LIKE

    ours = torch.autograd.grad(gaussian(log_joint, Shape(0, 10, 2), LIKE).log_normalizer, loadings)[0]
    covariance = loadings @ loadings.mT + 0.25 * torch.eye(4, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance).log_prob(x).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(exact, loadings)[0])


def groups(count: int, x: Tensor) -> tuple:
    """mu ~ N(0, 2), theta_g ~ N(mu, 1), x_g ~ N(theta_g, 0.5)."""

    def log_joint(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        theta = inner[:, 0]
        blocks = Normal(outer[0], 1.0).log_prob(theta) + Normal(theta, 0.5).log_prob(x)
        return blocks, Normal(0.0, 2.0).log_prob(outer).sum()

    return log_joint, Shape(1, count, 1)


def test_a_hierarchy_of_groups_equals_its_joint_gaussian() -> None:
    x = random(7)
    log_joint, shape = groups(7, x)
    found = gaussian(log_joint, shape, LIKE)
    prove(log_joint, found)
    covariance = 4.0 * torch.ones(7, 7, dtype=torch.float64) + 1.25 * torch.eye(7, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(7, dtype=torch.float64), covariance)
    torch.testing.assert_close(found.log_normalizer, exact.log_prob(x))
    # Posterior of (mu, theta) by conditioning the joint covariance of latents and data.
    prior = torch.block_diag(LIKE.new_tensor([[4.0]]), torch.eye(7, dtype=torch.float64))
    prior[1:, 1:] += 4.0
    prior[0, 1:] = prior[1:, 0] = 4.0
    gain = prior[:, 1:] @ covariance.inverse()
    posterior = prior - gain @ prior[1:]
    mean = gain @ x
    torch.testing.assert_close(torch.cat([found.outer, found.inner[:, 0]]), mean)
    outer, inner = found.covariances()
    torch.testing.assert_close(torch.cat([outer.flatten(), inner.flatten()]), posterior.diagonal())


def test_draws_have_the_posterior_covariance() -> None:
    # n draws of 4 unit-free coordinates: an empirical covariance entry scaled by its standard deviations has
    # standard error at most sqrt(2 / n); 5.5 of them on 10 entries and 5.5 on 4 means: below 1e-6 in all.
    x, n = random(3), 40_000
    log_joint, shape = groups(3, x)
    found = gaussian(log_joint, shape, LIKE)
    outer, inner = found.sample(n)
    draws = torch.cat([outer, inner[:, :, 0]], -1).detach()
    dense_precision = torch.zeros(4, 4, dtype=torch.float64)
    dense_precision[0, 0] = 0.25 + 3
    dense_precision[1:, 1:] = 5 * torch.eye(3, dtype=torch.float64)
    dense_precision[0, 1:] = dense_precision[1:, 0] = -1.0
    covariance = dense_precision.inverse()
    sd = covariance.diagonal().sqrt()
    mean = torch.cat([found.outer, found.inner[:, 0]]).detach()
    assert (((draws.mean(0) - mean) / sd).abs() < 5.5 / math.sqrt(n)).all()
    scaled = (draws.T.cov() - covariance) / sd / sd[:, None]
    assert (scaled.abs() < 5.5 * math.sqrt(2 / n)).all()
    # A posterior that forgets the coupling does not pass.
    assert ((draws.T.cov() - covariance.diag().diag()) / sd / sd[:, None]).abs().max() > 5.5 * math.sqrt(
        2 / n
    )


def chain(length: int) -> tuple:
    x = random(length)

    def log_joint(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        z = inner[0]
        steps = Normal(0.9 * z[:-1], 0.5).log_prob(z[1:]).sum() + Normal(0.0, 1.0).log_prob(z[0])
        return (steps + Normal(z, 0.3).log_prob(x).sum())[None], LIKE

    return log_joint, x


def test_a_chain_takes_three_backward_passes_whatever_its_length() -> None:
    log_joint, x = chain(60)
    near = {i: [j for j in range(i - 2, i + 3) if j != i and 0 <= j < 60] for i in range(60)}
    colours = [colour for _, colour in sorted(colouring(near).items())]
    assert len(set(colours)) == 3
    pairs = torch.tensor([(i, j) for i in range(60) for j in (i - 1, i, i + 1) if 0 <= j < 60])
    found = gaussian(log_joint, Shape(0, 1, 60, colours, pairs), LIKE)
    dense = gaussian(log_joint, Shape(0, 1, 60), LIKE)
    prove(log_joint, found)
    torch.testing.assert_close(found.log_normalizer, dense.log_normalizer)
    # Kalman filter.
    mean, variance, total = LIKE, LIKE + 1.0, LIKE
    for value in x:
        total = total + Normal(mean, (variance + 0.09).sqrt()).log_prob(value)
        gain = variance / (variance + 0.09)
        mean, variance = 0.9 * (mean + gain * (value - mean)), 0.81 * (1 - gain) * variance + 0.25
    torch.testing.assert_close(found.log_normalizer, total)


def test_a_wrong_claim_about_interactions_is_found_out() -> None:
    log_joint, _ = chain(6)
    pairs = torch.tensor([(i, i) for i in range(6)])
    found = gaussian(log_joint, Shape(0, 1, 6, list(range(6)), pairs), LIKE)
    with pytest.raises(NotQuadratic, match="differs from a straight line"):
        prove(log_joint, found)


@pytest.mark.parametrize(
    "bend", [lambda z: 0.01 * z**3, lambda z: torch.relu(z + 3), torch.tanh, lambda z: z.exp() * 1e-3]
)
def test_what_is_not_quadratic_is_refused(bend) -> None:
    def log_joint(outer: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return -(z**2).sum(-1) / 2 - (1.0 - bend(z)).square().sum(-1), LIKE

    found = gaussian(log_joint, Shape(0, 3, 1), LIKE)
    with pytest.raises(NotQuadratic, match="differs from a straight line"):
        prove(log_joint, found)


@pytest.mark.parametrize("edge", [1.0, 3.0, -3.0])
def test_a_step_that_leaves_every_gradient_as_it_was_is_refused(edge: float) -> None:
    def log_joint(outer: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return -(z**2).sum(-1) / 2 - 12.5 * (z > edge).to(z).sum(-1), LIKE

    found = gaussian(log_joint, Shape(0, 3, 1), LIKE)
    with pytest.raises(NotQuadratic, match="differs from a parabola"):
        prove(log_joint, found)


def test_a_bend_where_only_a_wide_prior_reaches_is_refused() -> None:
    def log_joint(outer: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return -(z**2).sum(-1) / 2 - 1e4 * (1.0 - z.clamp(max=3.0)).square().sum(-1) / 2, LIKE

    found = gaussian(log_joint, Shape(0, 1, 1), LIKE)
    with pytest.raises(NotQuadratic):
        prove(log_joint, found)


def test_a_density_that_does_not_fall_off_is_refused() -> None:
    with pytest.raises(NotQuadratic, match="does not fall off along an inner latent"):
        gaussian(lambda outer, z: (z.sum(-1), LIKE), Shape(0, 1, 1), LIKE)
    with pytest.raises(NotQuadratic, match="does not fall off along an outer latent"):
        gaussian(lambda outer, z: (LIKE.new_zeros(1), outer.square().sum()), Shape(2, 1, 0), LIKE)


def test_single_precision_is_proved_to_its_own_accuracy() -> None:
    def log_joint(outer: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return -(z**2).sum(-1) / 2 - (z @ z.new_ones(3, 4) - 2).square().sum(-1), z.new_zeros(())

    found = gaussian(log_joint, Shape(0, 5, 3), torch.zeros(()))
    prove(log_joint, found)
    assert isinstance(found, Gaussian)
    assert found.inner.dtype == torch.float32
