"""Pathfinder: L-BFGS algebra against matrices written out, normals found exactly, bounds that are bounds."""

import math

import pytest
import torch

from pgen.algorithms.pathfinder import (
    Memory,
    Pathfinder,
    Point,
    _factors,
    _line_search,
    inverse_hessian,
    normal_at,
    updated,
)
from pgen.testing.statistics import assert_lower_bound
from tests.algorithms.kernel_laws import FLOAT, Half, LogGamma, Normal


def normalised(target):
    """The density of a `Normal`, integral 1."""
    constant = torch.logdet(target.covariance) / 2 + len(target.mean) / 2 * math.log(2 * math.pi)

    def density(q):
        log_density, gradient = target(q)
        return log_density - constant, gradient

    return density


def walked(dimensions=5, history=4, pairs=3, paths=6):
    """A memory after some pairs of steps and gradient changes with curvature between them."""
    target = Normal(dimensions)
    empty = torch.zeros(paths, history, dimensions, **FLOAT)
    memory = Memory(torch.ones(paths, dimensions, **FLOAT), empty, empty)
    step = change = torch.zeros(paths, dimensions, **FLOAT)
    for _ in range(pairs):
        step = torch.randn(paths, dimensions, **FLOAT)
        change = step @ target.precision
        memory = updated(memory, step, change)
    return memory, step, change


@pytest.mark.parametrize(("dimensions", "history", "pairs"), [(5, 4, 3), (5, 4, 9), (2, 6, 4), (1, 1, 2)])
def test_the_inverse_hessian_maps_the_last_change_to_the_last_step(dimensions, history, pairs):
    """The secant equation H y = s; also for memories that are not full, and with more of it than dimensions."""
    memory, step, change = walked(dimensions, history, pairs)
    torch.testing.assert_close(inverse_hessian(memory, change), step)


def test_the_inverse_hessian_is_that_of_the_bfgs_updates_one_by_one():
    memory, _, _ = walked(history=4, pairs=4)
    matrix = torch.diag_embed(memory.alpha)
    identity = torch.eye(5, **FLOAT)
    for s, y in zip(memory.steps.unbind(1), memory.changes.unbind(1), strict=True):
        rho = 1 / (s * y).sum(-1)[:, None, None]
        left = identity - rho * s.unsqueeze(-1) * y.unsqueeze(-2)
        matrix = left @ matrix @ left.mT + rho * s.unsqueeze(-1) * s.unsqueeze(-2)
    vector = torch.randn(6, 5, **FLOAT)
    torch.testing.assert_close(inverse_hessian(memory, vector), (matrix @ vector.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize(("dimensions", "history"), [(5, 2), (5, 6), (1, 3)])
def test_the_normal_has_the_covariance_h_and_its_density(dimensions, history):
    memory, _, _ = walked(dimensions, history, history)
    point = Point(
        torch.randn(6, dimensions, **FLOAT), torch.zeros(6, **FLOAT), torch.randn(6, dimensions, **FLOAT)
    )
    normal = normal_at(point, memory)
    beta, gamma = _factors(memory)
    covariance = torch.diag_embed(memory.alpha) + beta @ gamma @ beta.mT
    assert normal.valid.all()
    torch.testing.assert_close(normal.covariance(), covariance)
    torch.testing.assert_close(normal.variance(), covariance.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(
        normal.mean, point.position + (covariance @ point.gradient.unsqueeze(-1)).squeeze(-1)
    )
    draw, log_density = normal.draw(torch.randn(6, dimensions, **FLOAT))
    law = torch.distributions.MultivariateNormal(normal.mean, covariance)
    torch.testing.assert_close(log_density, law.log_prob(draw))
    # A draw is linear in the noise: the images of unit vectors make a square root of the covariance.
    units = torch.eye(dimensions, **FLOAT).unsqueeze(1).expand(-1, 6, -1)
    root = torch.stack([normal.draw(unit)[0] - normal.mean for unit in units], -1)
    torch.testing.assert_close(root @ root.mT, covariance)


def test_steps_without_curvature_are_forgotten():
    memory, step, change = walked()
    same = updated(memory, step, -change)
    assert all(torch.equal(one, other) for one, other in zip(memory, same, strict=True))
    same = updated(memory, step * 0, change * 0)
    assert all(torch.equal(one, other) for one, other in zip(memory, same, strict=True))


def test_the_line_search_rises_enough_and_flattens_the_slope():
    target = LogGamma()
    position = torch.tensor([[-8.0, 0.5], [3.0, 2.0], [0.1, -0.1]], **FLOAT)
    point = Point(position, *target(position))
    found, rose = _line_search(point, point.gradient, target, False)
    assert rose.all()
    slope = point.gradient.square().sum(-1)
    size = (found.position - position).norm(dim=-1) / point.gradient.norm(dim=-1)
    assert (found.log_density >= point.log_density + 1e-4 * size * slope).all()
    assert ((found.gradient * point.gradient).sum(-1) <= 0.9 * slope).all()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dimensions", [1, 20])
def test_an_isotropic_normal_is_found_exactly(dimensions, dense):
    """One difference of gradients tells the curvature; all importance weights are 1."""
    deviation = 3.0

    def target(q):
        z = (q - 7) / deviation
        constant = dimensions * (math.log(deviation) + math.log(2 * math.pi) / 2)
        return -z.square().sum(-1) / 2 - constant, -z / deviation

    found = Pathfinder(dense=dense).run(torch.randn(4, dimensions, **FLOAT) * 10, target, chains=8)
    torch.testing.assert_close(found.mean, torch.full((dimensions,), 7.0, **FLOAT), rtol=1e-4, atol=1e-4)
    expected = torch.full((dimensions,), deviation, **FLOAT)
    torch.testing.assert_close(found.scale, torch.diag(expected) if dense else expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.elbo, torch.zeros(4, **FLOAT), rtol=0, atol=1e-6)
    assert found.position.shape == (8, dimensions)


@pytest.mark.parametrize("dimensions", [2, 4])
def test_a_correlated_normal_is_found(dimensions):
    """The mean, and the covariance as well as a quasi-Newton method learns it: within 0.1 nats of the target."""
    target = Normal(dimensions, correlation=0.5)
    finder = Pathfinder(history=30, tolerance=1e-14, elbo_draws=40, draws=200)
    found = finder.run(10 * torch.randn(8, dimensions, **FLOAT), normalised(target), chains=50)
    torch.testing.assert_close(found.mean, target.mean, rtol=0, atol=0.05)
    law = torch.distributions.MultivariateNormal(found.mean, scale_tril=found.scale)
    exact = torch.distributions.MultivariateNormal(target.mean, target.covariance)
    assert torch.distributions.kl_divergence(law, exact) < 0.1
    assert found.elbo.max() == pytest.approx(0, abs=0.1)  # log of the integral


def test_the_bound_is_one_and_orders_paths():
    """log Gamma(2) has integral 1 in one dimension: the ELBO stays below 0, and the best is the normal kept."""
    target = LogGamma(2)
    paths, draws = 16, 2000
    found = Pathfinder(draws=draws).run(torch.randn(paths, 2, **FLOAT) * 2, target, chains=paths)
    assert_lower_bound(
        found.elbo, torch.zeros(paths, **FLOAT), torch.full((paths,), 1.0, **FLOAT) / draws**0.5
    )
    best = torch.distributions.MultivariateNormal(found.mean, scale_tril=found.scale)
    q = best.sample((20_000,))
    weights = target(q)[0] - best.log_prob(q)
    assert weights.mean() > found.elbo.median() - 0.05
    laplace = torch.distributions.MultivariateNormal(  # the mode, log 2, with curvature 2
        torch.full((2,), math.log(2), **FLOAT), torch.eye(2, **FLOAT) / 2
    )
    q = laplace.sample((20_000,))
    assert weights.mean() > (target(q)[0] - laplace.log_prob(q)).mean() - 0.05


def test_a_density_without_a_maximum_is_stopped_on_the_way():
    """Neal's funnel: L-BFGS runs down the neck; the best normal is one from before."""

    def funnel(q):
        v, x = q[:, :1], q[:, 1:]
        n = x.shape[1]
        log_density = (
            -(v.square() / 18).squeeze(-1) - (x.square() * (-v).exp()).sum(-1) / 2 - n * v.squeeze(-1) / 2
        )
        slope = -v / 9 + ((x.square() * (-v).exp()).sum(-1, keepdim=True) - n) / 2
        return log_density, torch.cat([slope, -x * (-v).exp()], -1)

    found = Pathfinder().run(torch.randn(16, 10, **FLOAT), funnel, chains=32)
    assert found.elbo.max() > -10
    assert found.position[:, 0].median() > -9  # not at the bottom
    assert found.position.isfinite().all()


def test_starting_points_are_distinct_and_weighted():
    """Half of the paths begin near the lesser of two modes, which has a tenth of the mass."""

    def modes(q):
        far = torch.stack(
            [-(q + 5).square().sum(-1) / 2 + math.log(0.9), -(q - 5).square().sum(-1) / 2 + math.log(0.1)]
        )
        weight = far.softmax(0)
        return far.logsumexp(0), -(q + 5) * weight[0, :, None] - (q - 5) * weight[1, :, None]

    start = torch.randn(20, 2, **FLOAT) + 5 * torch.tensor([1.0, -1.0] * 10, **FLOAT)[:, None]
    found = Pathfinder(draws=50).run(start, modes, chains=200)
    assert len({tuple(row) for row in found.position.tolist()}) == 200
    part = (found.position[:, 0] > 0).double().mean()
    assert 0.02 < part < 0.25  # 0.1 of 200, with standard deviation 0.02; 0.5 unweighted


def test_the_target_is_called_with_one_shape():
    shapes = set()
    target = Normal()

    def watched(q):
        shapes.add(q.shape)
        return target(q)

    found = Pathfinder().run(torch.randn(8, 3, **FLOAT), watched, chains=40)
    assert shapes == {(8, 3)}
    assert found.evaluations > 30


def test_a_path_through_what_is_not_a_number_is_survived():
    start = torch.tensor([[0.5], [2.0], [-3.0]], **FLOAT)
    found = Pathfinder(elbo_draws=1, draws=50).run(start, Half(), chains=20)
    assert found.elbo[1] == -math.inf
    assert (found.position < 1).all()


def test_what_cannot_be_done_is_said():
    target = Normal()
    with pytest.raises(ValueError, match=r"draws=.* to 25 or more"):
        Pathfinder().run(torch.zeros(4, 3, **FLOAT), target, chains=100)
    with pytest.raises(ValueError, match="start elsewhere"):
        Pathfinder().run(torch.full((4, 1), 3.0, **FLOAT), Half(), chains=4)
    with pytest.raises(ValueError, match="history=0"):
        Pathfinder(history=0)
    with pytest.raises(ValueError, match="tolerance"):
        Pathfinder(tolerance=-1.0)
