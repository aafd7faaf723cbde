"""Random walk and Langevin kernels: what they leave invariant, and by how much where they do not."""

import math
from dataclasses import dataclass

import pytest
import torch

from pgen.algorithms.kernels.base import push, where
from pgen.algorithms.kernels.hmc import Phase, State, metropolis, standard_normal
from pgen.algorithms.kernels.iterate import iterate
from pgen.algorithms.kernels.langevin import MALA, ULA, _step
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.testing.statistics import StatisticalFailure, assert_moments
from tests.algorithms.kernel_laws import FLOAT, Half, LogGamma, Normal, assert_invariant, tuned

KERNELS = [(RandomWalk(), 1.2), (MALA(), 1.0)]


@pytest.mark.parametrize(("kernel", "step"), KERNELS)
@pytest.mark.parametrize("scale", ["unit", "diagonal", "dense"])
def test_a_normal_target_is_left_invariant(kernel, step, scale):
    target = Normal()
    scales = {"unit": torch.ones(3, **FLOAT) / 2, "diagonal": target.covariance.diagonal().sqrt() / 2}
    assert_invariant(kernel, target, tuned(step, scales.get(scale, target.root)))


@pytest.mark.parametrize(("kernel", "step"), KERNELS)
def test_a_skewed_target_is_left_invariant(kernel, step):
    _, info = assert_invariant(kernel, LogGamma(), tuned(step, torch.ones(2, **FLOAT)))
    assert 0.3 < info.accept.mean() < 0.95  # so that the decision matters


@pytest.mark.parametrize(("kernel", "step"), KERNELS)
def test_a_proposal_that_is_not_a_number_is_refused(kernel, step):
    draws, info = assert_invariant(kernel, Half(), tuned(step, torch.ones(1, **FLOAT)))
    assert draws.max() < 1
    assert info.accept.min() == 0


@pytest.mark.parametrize(("kernel", "step"), [*KERNELS, (ULA(), 0.5)])
def test_chains_find_the_target_from_afar(kernel, step):
    target = Normal()
    start = kernel.init(target.mean + 10 * torch.ones(2000, 3, **FLOAT), target)
    state, _, _ = iterate(kernel, start, tuned(step, target.root), target, 150)
    whitened = torch.linalg.solve_triangular(target.root, (state.position - target.mean).T, upper=False).T
    bias = 1 / (1 - 0.25 / 4) if isinstance(kernel, ULA) else 1.0
    assert_moments(whitened, 0.0, bias**0.5)


@pytest.mark.parametrize("step", [0.5, 1.0, 1.5])
def test_the_bias_of_the_unadjusted_algorithm_is_the_known_one(step):
    """On a standard normal x' = (1 - ε²/2) x + ε ξ: its variance is 1 / (1 - ε²/4), and MALA's is 1."""

    def target(q):
        return -q.square().sum(-1) / 2, -q

    variance = 1 / (1 - step**2 / 4)
    tuning = tuned(step, torch.ones(2, **FLOAT))
    start = torch.randn(20_000, 2, **FLOAT) * math.sqrt(variance)
    state, _, info = iterate(ULA(), ULA().init(start, target), tuning, target, 3)
    assert_moments(state.position, 0.0, math.sqrt(variance))
    assert (info.accept == 1).all()
    state, _, _ = iterate(MALA(), MALA().init(torch.randn_like(start), target), tuning, target, 3)
    assert_moments(state.position, 0.0, 1.0)
    with pytest.raises(StatisticalFailure):  # not the target
        assert_moments(start, 0.0, 1.0)


def test_the_ratio_is_that_of_the_two_proposal_densities():
    """Metropolis and Hastings' ratio with the Gaussian proposal densities written out."""
    target, step = LogGamma(), 0.7
    scale = torch.tensor([[0.8, 0.0], [0.3, 1.1]], **FLOAT)
    state = MALA().init(target.draw(50), target)
    begin, end = _step(state, standard_normal(state.position), tuned(step, scale), target)

    def proposal(gradient, q):
        mean = q + step**2 / 2 * gradient @ scale @ scale.T
        return torch.distributions.MultivariateNormal(mean, scale_tril=step * scale)

    forth = proposal(state.gradient, state.position).log_prob(end.position)
    back = proposal(end.gradient, end.position).log_prob(state.position)
    expected = end.log_density - state.log_density + back - forth
    torch.manual_seed(1)
    _, info = metropolis(state, begin, end, 1)
    torch.testing.assert_close(info.accept, expected.clamp(max=0.0).exp())


@pytest.mark.parametrize("kernel", [RandomWalk(), ULA(), MALA()])
def test_a_scale_is_a_change_of_coordinates(kernel):
    """With scale S the chain of q = S x is S times the chain of x with scale 1: the same noise, the same decisions."""
    target = LogGamma()
    scale = torch.tensor([[0.8, 0.0], [0.3, 1.1]], **FLOAT)

    def whitened(x):
        log_density, gradient = target(push(scale, x))
        return log_density, gradient @ scale

    x = torch.randn(20, 2, **FLOAT)
    paths = []
    for start, density, s in ((push(scale, x), target, scale), (x, whitened, torch.ones(2, **FLOAT))):
        torch.manual_seed(3)
        paths.append(iterate(kernel, kernel.init(start, density), tuned(0.6, s), density, 10)[1])
    torch.testing.assert_close(paths[0], push(scale, paths[1]))


def test_ula_stays_where_the_next_place_is_not_a_number():
    kernel, target = ULA(), Half()
    state = kernel.init(torch.full((100, 1), 0.9, **FLOAT), target)
    state, info = kernel.step(state, tuned(1.0, torch.ones(1, **FLOAT)), target)
    stayed = state.position[:, 0] == 0.9
    assert (stayed == info.diverging).all()
    assert stayed.any()
    assert state.position.max() < 1


# --- broken specimens ---


@dataclass(frozen=True)
class AlwaysAccepts(MALA):
    def step(self, state, tuning, target):
        begin, end = _step(state, standard_normal(state.position), tuning, target)
        _, info = metropolis(state, begin, end, 1)
        return State(end.position, end.log_density, end.gradient), info


@dataclass(frozen=True)
class ForgetsTheProposal(MALA):
    """Accepts by the ratio of densities, as if the proposal were symmetric."""

    def step(self, state, tuning, target):
        begin, end = _step(state, standard_normal(state.position), tuning, target)
        return metropolis(state, begin, end._replace(momentum=begin.momentum), 1)


@dataclass(frozen=True)
class LooksBackFromTheWrongPlace(MALA):
    """The reverse proposal with the gradient of where it came from."""

    def step(self, state, tuning, target):
        begin, end = _step(state, standard_normal(state.position), tuning, target)
        momentum = begin.momentum + tuning.step_size * state.gradient
        return metropolis(state, begin, Phase(end.position, momentum, end.gradient, end.log_density), 1)


@dataclass(frozen=True)
class AcceptsHalf(RandomWalk):
    """A coin in place of the ratio."""

    def step(self, state, tuning, target):
        _, info = super().step(state, tuning, target)
        position = state.position + tuning.step_size * torch.randn_like(state.position)
        taken = torch.rand(len(position)) < 0.5
        return where(taken, type(state)(position, target(position)[0]), state), info


@pytest.mark.parametrize(
    "kernel", [AlwaysAccepts(), ForgetsTheProposal(), LooksBackFromTheWrongPlace(), AcceptsHalf()]
)
def test_a_kernel_without_detailed_balance_is_noticed(kernel):
    with pytest.raises(StatisticalFailure):
        assert_invariant(kernel, LogGamma(), tuned(1.0, torch.ones(2, **FLOAT)))
