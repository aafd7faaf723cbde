"""Laws of consistency models: what is constant along the paths has no loss, grids double, gradients go one way."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.consistency import (
    Curriculum,
    consistency_distillation,
    consistency_training,
    end_of_path,
    heun,
    pseudo_huber,
)
from pgen.nn.denoisers import DenoiserMLP, Preconditioned
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_mean

F64, LOW, S = torch.float64, 0.01, 0.7


def gaussian(x, sigma):
    """The denoiser of N(0, S^2)."""
    return x * (S**2 / (S**2 + sigma**2))[:, None]


def consistent(x, sigma):
    """Its consistency function: the path's end at noise level LOW."""
    return x * torch.sqrt((S**2 + LOW**2) / (S**2 + sigma**2))[:, None]


def levels(n, intervals, u=None):
    curriculum = Curriculum(1, first=intervals, last=intervals, sigma_min=LOW, sigma_max=20.0)
    return curriculum.levels(0, torch.rand(n, dtype=F64) if u is None else u)


def test_what_is_constant_along_the_paths_has_no_distillation_loss():
    x, noise = S * torch.randn(500, 1, dtype=F64), torch.randn(500, 1, dtype=F64)

    def loss(model, intervals):
        lower, upper = levels(500, intervals, (torch.arange(500, dtype=F64) + 0.5) / 500)
        return float(consistency_distillation(model, gaussian, x, lower, upper, noise, c=1e-8).mean())

    assert loss(consistent, 1000) < 1e-4
    # Heun's error in one step is of third order; the loss is per unit of noise level, so it falls with the square
    assert 3.0 < loss(consistent, 200) / loss(consistent, 400) < 5.0
    assert loss(gaussian, 1000) > 0.05  # a denoiser is no consistency function


def test_heun_follows_the_path_to_second_order():
    x, upper = torch.randn(50, 1, dtype=F64), torch.full((50,), 2.0, dtype=F64)

    def error(h):
        lower = upper - h
        exact = x * torch.sqrt((S**2 + lower**2) / (S**2 + upper**2))[:, None]
        return float((heun(gaussian, x, upper, lower) - exact).abs().max())

    assert 2.8 < math.log2(error(0.2) / error(0.1)) < 3.3


def test_training_without_a_teacher_has_the_same_gradient_on_average():
    """With a square distance and close levels: E[x_a | x_b] is where the path through x_b comes from."""
    n, h = 20_000, 0.02
    upper = torch.full((n,), 1.0, dtype=F64)
    x, noise = S * torch.randn(n, 1, dtype=F64), torch.randn(n, 1, dtype=F64)
    lower = upper - h

    def slopes(model):
        weight = torch.zeros(n, 1, dtype=F64, requires_grad=True)
        loss = consistency_training(
            lambda v, s: model(v, s) + weight * v, x, lower, upper, noise, target=model, c=1e3
        )
        return torch.autograd.grad(1e3 * loss.sum(), weight)[0]

    assert_mean(slopes(consistent), 0.0, slack=0.03)
    with pytest.raises(StatisticalFailure):
        assert_mean(slopes(gaussian), 0.0, slack=0.03)


def test_gradients_go_through_the_upper_level_alone():
    model = Preconditioned(DenoiserMLP(2, hidden=(8,)), sigma_min=LOW)
    teacher = Preconditioned(DenoiserMLP(2, hidden=(8,)))
    lower, upper = levels(6, 20, torch.rand(6))
    x, noise = torch.randn(2, 6, 2)
    for loss in (
        consistency_distillation(model, teacher, x, lower, upper, noise),
        consistency_training(model, x, lower, upper, noise),
    ):
        assert loss.shape == (6,)
        loss.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert model.network.last.weight.grad.abs().sum() > 0
    target = Preconditioned(DenoiserMLP(2, hidden=(8,)), sigma_min=LOW)
    consistency_training(model, x, lower, upper, noise, target=target).sum().backward()
    assert all(p.grad is None for p in target.parameters())


def test_contexts_reach_model_teacher_and_target():
    seen = []

    def network(x, sigma, context):
        seen.append(context)
        return x

    context = torch.randn(4, 3)
    lower, upper = levels(4, 20, torch.rand(4))
    x, noise = torch.randn(2, 4, 2)
    consistency_distillation(network, network, x, lower, upper, noise, context=context)
    assert len(seen) == 4
    assert all(torch.equal(c, context) for c in seen)


def test_the_network_is_the_identity_at_the_least_level():
    network = DenoiserMLP(3)
    torch.nn.init.normal_(network.last.weight)
    model, x = Preconditioned(network, sigma_min=LOW), torch.randn(5, 3)
    torch.testing.assert_close(model(x, torch.full((5,), LOW)), x)
    assert (model(x, torch.full((5,), 2 * LOW)) - x).abs().max() > 1e-4


def test_the_grid_doubles_at_equal_parts_of_the_run():
    curriculum = Curriculum(900, first=10, last=40)
    found = [curriculum.intervals(step) for step in range(900)]
    assert found == [10] * 300 + [20] * 300 + [40] * 300
    assert Curriculum(10, first=10, last=35).intervals(9) == 20  # never beyond
    grid = curriculum.grid(0)
    torch.testing.assert_close(grid[[0, -1]], torch.tensor([0.002, 80.0], dtype=F64))
    assert (grid.diff() > 0).all()


def test_levels_are_neighbours_with_log_normal_frequencies():
    curriculum, n = Curriculum(1, first=12, last=12), 20_000
    grid = curriculum.grid(0)
    lower, upper = curriculum.levels(0, torch.rand(n, dtype=F64))
    place = torch.searchsorted(grid, lower * (1 - 1e-12))
    torch.testing.assert_close(grid[place + 1], upper)
    below = torch.special.ndtr((grid.log() + 1.1) / 2.0)
    assert_frequencies(place, below.diff() / below.diff().sum())
    with pytest.raises(StatisticalFailure):
        assert_frequencies(place, torch.ones(12, dtype=F64) / 12)


def test_the_distance_is_square_when_small_and_linear_when_large():
    error = torch.tensor([[1e-6, 0.0], [300.0, 400.0]], dtype=F64)
    found = pseudo_huber(error, 0.01)
    torch.testing.assert_close(found[0], torch.tensor(1e-12 / 0.02, dtype=F64))
    torch.testing.assert_close(found[1], torch.tensor(500 - 0.01, dtype=F64), rtol=1e-6, atol=0)
    slope = torch.func.grad(lambda e: pseudo_huber(e).sum())(torch.zeros(2, 3))
    assert torch.equal(slope, torch.zeros(2, 3))  # not NaN where there is no error


def test_impossible_curricula_are_refused():
    with pytest.raises(ValueError, match="1 <= first <= last"):
        Curriculum(100, first=20, last=10)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        Curriculum(100, sigma_min=2.0, sigma_max=1.0)


def test_any_network_is_the_identity_at_the_least_level_through_a_step_of_euler():
    network, x = gaussian, torch.randn(5, 3, dtype=F64)
    model = end_of_path(network, LOW)
    least, sigma = torch.full((5,), LOW, dtype=F64), torch.rand(5, dtype=F64) + 0.1
    assert torch.equal(model(x, least), x)
    step = x + (LOW - sigma)[:, None] * (x - network(x, sigma)) / sigma[:, None]
    torch.testing.assert_close(model(x, sigma), step)
    assert (model(x, sigma) - network(x, sigma)).abs().max() > 1e-3


def test_the_step_may_be_a_tensor():
    curriculum, u = Curriculum(100, first=5, last=40, sigma_min=LOW), torch.rand(200, dtype=F64)
    for step in (0, 30, 99):
        for found, expected in zip(
            curriculum.levels(torch.tensor(float(step)), u), curriculum.levels(step, u), strict=True
        ):
            assert torch.equal(found, expected)
        assert len(curriculum.grid(step)) == curriculum.intervals(step) + 1
