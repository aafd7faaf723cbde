"""Stochastic-gradient kernels against what they do to a normal posterior, in closed form.

There gradients are linear, so position (and momentum) are a linear recursion driven by noise, and its stationary
covariance is known at every step size and batch size: the bias is tested, not only that there is little of it.
"""

import math

import pytest
import torch

from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.iterate import iterate
from pgen.algorithms.kernels.stochastic import SGHMC, SGLD, Roller, Schedule
from pgen.testing.statistics import StatisticalFailure, assert_mean, assert_moments
from tests.algorithms.kernel_laws import FLOAT, LogGamma, tuned

SIZE, BATCH = 100, 10


class Conjugate:
    """N(q, 1) data and a N(0, 1) prior; gradients from batches drawn with replacement, one for each chain.

    The posterior is N(sum / (n + 1), 1 / (n + 1)); the noise of a gradient has variance n² s² / batch.
    """

    def __init__(self, batch=BATCH):
        self.data = torch.linspace(-1, 2, SIZE, **FLOAT)
        self.batch = batch
        self.precision = SIZE + 1.0
        self.mean = float(self.data.sum() / self.precision)
        self.noise = SIZE**2 * float(self.data.var(correction=0)) / batch

    def __call__(self, q):
        seen = self.data[torch.randint(SIZE, (len(q), self.batch))]
        gradient = -q + SIZE * (seen.mean(-1, keepdim=True) - q)
        return -gradient.square().sum(-1) / (2 * self.precision), gradient

    def langevin_variance(self, step):
        """Of q' = (1 - h² Λ / 2) q + h² noise / 2 + h ξ."""
        keep = 1 - step**2 * self.precision / 2
        return (step**2 + step**4 * self.noise / 4) / (1 - keep**2)

    def hamiltonian_covariance(self, step, decay, variance):
        """Of (q, p), p' = (1 - α) p - h Λ q + h noise + sqrt(2 α - h² V) ξ, q' = q + h p'; by doubling."""
        kick = torch.tensor([[1.0, 0.0], [-step * self.precision, 1 - decay]], **FLOAT)
        drift = torch.tensor([[1.0, step], [0.0, 1.0]], **FLOAT)
        moves = drift @ kick
        shock = drift[:, 1:] * math.sqrt(step**2 * self.noise + max(2 * decay - step**2 * variance, 0.0))
        total = shock @ shock.T
        for _ in range(60):  # sum over t of Mᵗ N Mᵗ', twice as many terms each time
            total, moves = total + moves @ total @ moves.T, moves @ moves
        return total


@pytest.mark.parametrize("step", [0.03, 0.1])
def test_sgld_has_the_bias_that_theory_says(step):
    target = Conjugate()
    variance = target.langevin_variance(step)
    start = target.mean + math.sqrt(variance) * torch.randn(20_000, 1, **FLOAT)
    state, _, _ = iterate(SGLD(), SGLD().init(start, target), tuned(step, torch.ones(1, **FLOAT)), target, 10)
    assert_moments(state.position, target.mean, math.sqrt(variance))
    assert state.iteration == 10
    with pytest.raises(StatisticalFailure):  # the posterior itself is noticed to be another
        assert_moments(state.position, target.mean, target.precision**-0.5)


def test_the_bias_of_sgld_goes_with_the_squared_step():
    target = Conjugate()
    excess = [target.langevin_variance(step) * target.precision - 1 for step in (0.02, 0.01, 0.005)]
    assert excess[0] / excess[1] == pytest.approx(4, rel=0.02)
    assert excess[1] / excess[2] == pytest.approx(4, rel=0.02)


def test_sgld_from_afar_with_small_steps_finds_the_exact_posterior():
    """At h = 0.01 the variance is 2 % too large, less than 1,000 chains notice (22 %)."""
    target, step = Conjugate(), 0.01
    assert target.langevin_variance(step) * target.precision < 1.025
    kernel = SGLD()
    state = kernel.init(torch.zeros(1000, 1, **FLOAT), target)
    for size, steps in ((0.05, 60), (step, 800)):  # exp(-t h² Λ / 2) of the way is left
        state, _, _ = iterate(kernel, state, tuned(size, torch.ones(1, **FLOAT)), target, steps)
    assert_moments(state.position, target.mean, target.precision**-0.5)


def test_a_preconditioner_is_a_change_of_coordinates():
    """SGLD with scale S samples the same posterior; its bias is that of step h S."""
    target, scale = Conjugate(), 0.1
    step = 1.0
    variance = target.langevin_variance(step * scale)
    start = target.mean + math.sqrt(variance) * torch.randn(20_000, 1, **FLOAT)
    tuning = tuned(step, torch.full((1, 1), scale, **FLOAT))
    state, _, _ = iterate(SGLD(), SGLD().init(start, target), tuning, target, 10)
    assert_moments(state.position, target.mean, math.sqrt(variance))


def test_a_shrinking_step_forgets_its_bias():
    """Draws weighted by ε_t: closer to the posterior than draws at the first step, as ε_t has gone down 14-fold."""
    target, first = Conjugate(), 0.1
    schedule = Schedule(decay=0.6, offset=10.0)
    kernel = SGLD(schedule)
    tuning = tuned(first, torch.ones(1, **FLOAT))
    state = kernel.init(torch.full((4000, 1), target.mean, **FLOAT), target)
    state, _, _ = iterate(kernel, state, tuning, target, 800)
    last = float(schedule.step_size(tuning.step_size, state.iteration))
    assert last**2 == pytest.approx(first**2 * 81**-0.6)
    spread = state.position.var() * target.precision
    at_first = target.langevin_variance(first) * target.precision
    at_last = target.langevin_variance(last) * target.precision
    assert at_first > 3  # what a constant step would give
    assert spread == pytest.approx(at_last, rel=0.15)  # follows its step, 6 standard errors of a variance


def test_the_schedules():
    first = torch.tensor(2.0, **FLOAT)
    count = torch.tensor([0, 1, 30])
    constant, shrinking = Schedule(), Schedule(decay=1.0, offset=10.0)
    assert (constant.learning_rate(first, count) == 4).all()
    torch.testing.assert_close(shrinking.learning_rate(first, count), 4 / (1 + count.to(torch.float64) / 10))


def test_a_step_with_rmsprop_is_that_of_the_paper():
    """Algorithm 1 of Li et al., with their ε = h² and gradients of the whole posterior."""

    def target(q):
        return -q.square().sum(-1), torch.tensor([-3.0, 40.0], **FLOAT).expand_as(q)

    kernel, step = SGLD(rmsprop=0.9, floor=1e-3), 0.2
    state = kernel.init(torch.zeros(50_000, 2, **FLOAT), target)
    assert (state.square == torch.tensor([9.0, 1600.0], **FLOAT)).all()
    state = state._replace(square=torch.ones_like(state.square))
    state, _ = kernel.step(state, tuned(step, torch.ones(2, **FLOAT)), target)
    v = 0.9 + 0.1 * torch.tensor([9.0, 1600.0], **FLOAT)
    torch.testing.assert_close(state.square[0], v)
    metric = 1 / (1e-3 + v.sqrt())
    gradient = torch.tensor([-3.0, 40.0], **FLOAT)
    assert_moments(state.position, step**2 / 2 * metric * gradient, step * metric.sqrt())


def test_rmsprop_makes_directions_alike():
    """Two coordinates of standard deviations 1 and 100: one step size serves both."""
    deviation = torch.tensor([1.0, 100.0], **FLOAT)

    def target(q):
        return -(q / deviation).square().sum(-1) / 2, -q / deviation.square()

    kernel = SGLD(rmsprop=0.99)
    state = kernel.init(torch.randn(4000, 2, **FLOAT) * deviation, target)
    moved, _, _ = iterate(kernel, state, tuned(0.1, torch.ones(2, **FLOAT)), target, 5)
    distance = (moved.position - state.position).square().mean(0).sqrt()
    plain, _, _ = iterate(SGLD(), state._replace(), tuned(0.1, torch.ones(2, **FLOAT)), target, 5)
    unhelped = (plain.position - state.position).square().mean(0).sqrt()
    assert distance[1] / distance[0] > 5 * unhelped[1] / unhelped[0]


@pytest.mark.parametrize("known", [True, False])
def test_sghmc_has_the_bias_that_theory_says(known):
    """Where the noise of gradients is known it is taken off; what is left is the bias of the integrator."""
    target, step, length = Conjugate(), 0.01, 0.05
    decay, variance = step / length, Conjugate().noise if known else 0.0
    covariance = target.hamiltonian_covariance(step, decay, variance)
    root = torch.linalg.cholesky(covariance)
    phase = torch.randn(20_000, 2, **FLOAT) @ root.T
    kernel = SGHMC(gradient_variance=variance)
    start = Roller(target.mean + phase[:, :1], phase[:, 1:], torch.zeros((), dtype=torch.int64))
    state, _, _ = iterate(kernel, start, tuned(step, torch.ones(1, **FLOAT), length), target, 10)
    assert_moments(state.position, target.mean, covariance[0, 0].sqrt())
    assert_moments(state.momentum, 0.0, covariance[1, 1].sqrt())
    off = float(covariance[0, 0]) * target.precision - 1
    assert (off < 0.01) if known else (off > 0.15)


def test_sghmc_without_friction_to_balance_is_noticed():
    """The naive algorithm of the paper's section 3.1: momenta without friction heat up."""
    target, step = Conjugate(), 0.01
    kernel = SGHMC()
    tuning = tuned(step, torch.ones(1, **FLOAT), 1e6)
    covariance = target.hamiltonian_covariance(step, step / 0.05, target.noise)
    start = torch.randn(4000, 1, **FLOAT) * covariance[0, 0].sqrt() + target.mean
    state, _, _ = iterate(kernel, kernel.init(start, target), tuning, target, 200)
    with pytest.raises(StatisticalFailure):
        assert_moments(state.position, target.mean, covariance[0, 0].sqrt())


@pytest.mark.parametrize("kernel", [SGLD(), SGLD(rmsprop=0.9), SGHMC()])
def test_a_chain_whose_gradient_is_not_a_number_stays(kernel):
    def target(q):
        return -q.square().sum(-1), torch.where(q < 1, -q, torch.nan)

    start = torch.tensor([[0.5], [2.0]], **FLOAT)
    state = kernel.init(start, target)
    state, info = kernel.step(state, tuned(0.1, torch.ones(1, **FLOAT)), target)
    assert state.position[1] == 2.0
    assert state.position[0] != 0.5
    assert info.diverging.tolist() == [False, True]
    assert state.iteration == 1


@pytest.mark.parametrize("kernel", [SGLD(Schedule(0.6, 10.0), rmsprop=0.9), SGHMC(Schedule(0.6, 10.0))])
def test_all_there_is_is_in_the_state(kernel):
    target = LogGamma()
    tuning = Tuning(torch.tensor(0.1, **FLOAT), torch.ones(2, **FLOAT), torch.tensor(1.0, **FLOAT))
    torch.manual_seed(0)
    whole, _, _ = iterate(kernel, kernel.init(torch.zeros(3, 2, **FLOAT), target), tuning, target, 7)
    torch.manual_seed(0)
    half, _, _ = iterate(kernel, kernel.init(torch.zeros(3, 2, **FLOAT), target), tuning, target, 3)
    half, _, _ = iterate(kernel, type(half)(*(t.clone() for t in half)), tuning, target, 4)
    assert all(torch.equal(one, other) for one, other in zip(whole, half, strict=True))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Schedule(decay=-1.0), "decay >= 0"),
        (lambda: Schedule(offset=0.0), "offset > 0"),
        (lambda: SGLD(rmsprop=1.0), "rmsprop < 1"),
        (lambda: SGHMC(gradient_variance=-1.0), "at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_weighted_draws_average_to_the_posterior_mean():
    """Welling & Teh, equation 11: the mean of draws weighted by ε_t, over 500 chains."""
    target, schedule = Conjugate(), Schedule(decay=0.6, offset=10.0)
    kernel, tuning = SGLD(schedule), tuned(0.05, torch.ones(1, **FLOAT))
    state = kernel.init(torch.full((500, 1), target.mean, **FLOAT), target)
    _, draws, _ = iterate(kernel, state, tuning, target, 500)
    weight = schedule.learning_rate(tuning.step_size, torch.arange(500))
    average = (weight[:, None, None] * draws).sum(0) / weight.sum()
    assert_mean(average, target.mean)
