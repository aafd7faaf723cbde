"""Long runs: draws of the density they are given on every space, by kernels, leaps or sweeps; and of no other."""

import math

import pytest
import torch
from torch.distributions import constraints

from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.space import Space
from pgen.algorithms.kernels.gibbs import Gibbs
from pgen.algorithms.kernels.hmc import HMC
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_mean, assert_moments

CHAINS = 4000
REAL = Space.of(constraints.real, (2,))
MEAN, SD = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])


def bowl(x):
    """Normal, with `MEAN` and `SD`."""
    return -((x - MEAN) / SD).square().sum(1) / 2


def drawn(how, f=bowl, space=REAL, n=CHAINS, **options):
    torch.manual_seed(0)
    start = space.together(*space.uniform(min(n, how.chains), torch.empty(0)))
    return how(f, start, space, n, **options)


@pytest.mark.parametrize(
    "how",
    [
        LongRun(chains=CHAINS, warmup=60),
        LongRun(chains=CHAINS, warmup=80, leaps=0),
        LongRun(chains=CHAINS, warmup=20, leaps=0, continuous=HMC(steps=5)),
    ],
    ids=["leaps", "steps", "hmc"],
)
def test_draws_have_the_moments_of_the_density(how):
    """One draw of each chain: they are independent."""
    assert_moments(drawn(how), MEAN, SD)
    with pytest.raises(StatisticalFailure):
        assert_moments(drawn(how, lambda x: 1.3 * bowl(x)), MEAN, SD)


def test_positive_numbers_carry_their_volume():
    space = Space.of(constraints.positive, (1,))
    gamma = torch.distributions.Gamma(3.0, 2.0, validate_args=False)
    x = drawn(LongRun(chains=CHAINS, warmup=60), lambda x: gamma.log_prob(x)[:, 0], space)
    assert_moments(x, 1.5, math.sqrt(3) / 2)


@pytest.mark.parametrize("discrete", [None, Gibbs((3, 3))], ids=["usual", "gibbs"])
def test_counted_numbers_have_their_frequencies(discrete):
    space = Space.of(constraints.integer_interval(0, 2), (2,))
    table = torch.tensor([[0.0, 1.0, -1.0], [0.5, -0.5, 0.0], [1.0, 0.0, 0.3]])

    def f(x):
        return table[x[:, 0].long(), x[:, 1].long()]

    x = drawn(LongRun(chains=CHAINS, warmup=10, discrete=discrete), f, space)
    assert_frequencies((3 * x[:, 0] + x[:, 1]).long(), table.flatten().softmax(0))


def test_chains_give_as_many_draws_as_are_asked_for():
    how = LongRun(chains=300, warmup=30, thin=10)
    assert drawn(how, n=700).shape == (700, 2)
    assert drawn(how, n=5).shape == (5, 2)
    later = drawn(LongRun(chains=1000, warmup=60, thin=10), n=3000)
    assert_mean(later[-1000:, 0], 1.0, std=0.5)  # each of another chain
    assert bool((later[:1000] != later[1000:2000]).any())


def test_the_same_seed_gives_the_same_draws():
    how = LongRun(chains=50, warmup=20)
    assert torch.equal(drawn(how, n=100), drawn(how, n=100))


def test_an_energys_own_sweep_takes_the_place_of_kernels():
    how = LongRun(chains=CHAINS, warmup=2, leaps=0)
    assert_moments(drawn(how, sweep=lambda x: MEAN + SD * torch.randn_like(x)), MEAN, SD)


@pytest.mark.parametrize(
    "options", [{"warmup": -1}, {"thin": 0}, {"chains": 0}, {"steps": 0}, {"leaps": -1}], ids=str
)
def test_wrong_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LongRun(**options)
