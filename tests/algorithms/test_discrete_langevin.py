"""Discrete Langevin proposals against enumeration.

Chains are independent, so chi-square tests over all states hold their rate (1e-6) whatever the kernel's autocorrelation.
"""

from dataclasses import dataclass

import pytest
import torch

from pgen.algorithms.adaptation.step_size import DualAveraging
from pgen.algorithms.kernels.base import untuned
from pgen.algorithms.kernels.discrete_langevin import DiscreteLangevin, _of
from pgen.algorithms.kernels.gibbs import RelaxedState, one_hot, pick_of, report
from pgen.algorithms.record import record
from pgen.testing.statistics import StatisticalFailure, assert_frequencies
from tests.algorithms.test_gibbs import CHAINS, SIZES, Ising, Table, run

DOUBLE = {"dtype": torch.float64}


@pytest.fixture
def table():
    source = torch.Generator().manual_seed(8)
    return Table(torch.randn(SIZES, generator=source, **DOUBLE))


@pytest.mark.parametrize("step_size", [0.4, 2.0, 50.0])
def test_exact_draws_stay_exact(step_size, table):
    kernel = DiscreteLangevin(SIZES, step_size, torch.float64)
    state, info = run(kernel, table.draw(CHAINS), table.relaxed, 3)
    table.check(state.position)
    torch.testing.assert_close(state.log_density, table(state.position))
    torch.testing.assert_close(
        state.gradient, table.relaxed(one_hot(state.position, SIZES, torch.float64))[1]
    )
    torch.testing.assert_close(info.energy, -state.log_density)
    assert (info.evaluations == 1).all()


def test_the_law_is_found_from_a_corner(table):
    kernel = DiscreteLangevin(SIZES, 2.0, torch.float64)
    state, info = run(kernel, torch.zeros(CHAINS, 3, dtype=torch.long), table.relaxed, 40)
    table.check(state.position)
    assert 0.3 < info.accept.mean() < 0.95  # so that the decision matters


def test_ising_states():
    model = Ising()
    kernel = DiscreteLangevin((2,) * 9, 0.8, torch.float64)
    state, info = run(kernel, torch.zeros(CHAINS, 9, dtype=torch.long), model.relaxed, 60)
    code = (state.position * 2 ** torch.arange(8, -1, -1)).sum(1)
    assert_frequencies(code, model.law, what="all 512 states")
    assert info.accept.mean() > 0.5


def test_independent_variables_are_always_accepted_in_the_limit_of_small_steps():
    """Where the density is linear, the proposals of single changes are balanced: rejection is of second order."""
    field = torch.randn(6, 3, **DOUBLE)

    def target(x):
        return (x * field).sum((1, 2)), field.expand_as(x)

    start = torch.zeros(2000, 6, dtype=torch.long)
    rates = [
        run(DiscreteLangevin((3,) * 6, step, torch.float64), start, target, 30)[1].accept.mean()
        for step in (0.2, 1.0, 5.0)
    ]
    assert rates[0] > 0.98
    assert rates[0] > rates[1] > rates[2]


def test_the_step_size_adapts_by_acceptance():
    model, rule = Ising(), DualAveraging(accept=0.574)
    kernel = DiscreteLangevin((2,) * 9, dtype=torch.float64)
    state = kernel.init(torch.zeros(500, 9, dtype=torch.long), model.relaxed)
    tuning = untuned(torch.zeros(1, 9, **DOUBLE))
    at = rule.init(torch.tensor(0.3, **DOUBLE))
    for _ in range(300):
        state, info = kernel.step(state, tuning._replace(step_size=at.step_size), model.relaxed)
        at = rule.update(at, info.accept.mean())
    rates = []
    for _ in range(30):
        state, info = kernel.step(state, tuning._replace(step_size=at.averaged), model.relaxed)
        rates.append(info.accept.mean())
    assert abs(torch.stack(rates).mean() - 0.574) < 0.03


@dataclass(frozen=True)
class ForgetsTheWayBack(DiscreteLangevin):
    """Accepts by the ratio of densities, as if the proposal were symmetric."""

    def step(self, state, tuning, target):
        logits = self._logits(state.position, state.gradient, self.step_size)
        new = pick_of(logits.exp()).squeeze(2)
        found = RelaxedState(new, *target(one_hot(new, self.cardinalities, self.dtype)))
        taken = torch.rand_like(found.log_density).log() < found.log_density - state.log_density
        kept = RelaxedState(
            *(torch.where(taken.reshape(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(found, state))
        )
        return kept, report(taken.double(), kept.log_density, 1)


@dataclass(frozen=True)
class AlwaysAccepts(DiscreteLangevin):
    """The unadjusted sampler, which is biased."""

    def step(self, state, tuning, target):
        logits = self._logits(state.position, state.gradient, self.step_size)
        new = pick_of(logits.exp()).squeeze(2)
        found = RelaxedState(new, *target(one_hot(new, self.cardinalities, self.dtype)))
        return found, report(torch.ones_like(found.log_density), found.log_density, 1)


@dataclass(frozen=True)
class LooksBackFromTheWrongPlace(DiscreteLangevin):
    """The way back by the gradient of where it came from."""

    def step(self, state, tuning, target):
        logits = self._logits(state.position, state.gradient, self.step_size)
        new = pick_of(logits.exp()).squeeze(2)
        found = RelaxedState(new, *target(one_hot(new, self.cardinalities, self.dtype)))
        back = self._logits(new, state.gradient, self.step_size)
        gain = found.log_density + _of(back, state.position) - state.log_density - _of(logits, new)
        taken = torch.rand_like(gain).log() < gain
        kept = RelaxedState(
            *(torch.where(taken.reshape(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(found, state))
        )
        return kept, report(taken.double(), kept.log_density, 1)


@pytest.mark.parametrize("broken", [ForgetsTheWayBack, AlwaysAccepts, LooksBackFromTheWrongPlace])
def test_a_kernel_without_detailed_balance_is_noticed(broken, table):
    state, _ = run(broken(SIZES, 2.0, torch.float64), table.draw(CHAINS), table.relaxed, 15)
    with pytest.raises(StatisticalFailure):
        table.check(state.position)


def test_a_recorded_step_is_the_step():
    kernel, field = DiscreteLangevin(SIZES, dtype=torch.float64), torch.randn(3, 4, **DOUBLE)

    def target(x):
        return ((x * field).sum((1, 2)), field.expand_as(x))

    state = kernel.init(torch.zeros(7, 3, dtype=torch.long), target)
    step = record(lambda state: kernel.step(state, None, target), fallback=False)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = kernel.step(state, None, target)
        torch.manual_seed(seed)
        found = step(state)
        torch.testing.assert_close(found, expected)
        state = found[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiscreteLangevin(()), "cardinalities"),
        (lambda: DiscreteLangevin((2,), step_size=0.0), "step_size"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()
