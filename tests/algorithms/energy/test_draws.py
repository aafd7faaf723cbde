"""Long runs: draws of the density they are given on every space, by kernels, leaps or sweeps; and of no other."""

import math

import pytest
import torch
from torch.distributions import constraints

from pgen.algorithms.energy.adapted import AdaptedRun
from pgen.algorithms.energy.draws import Following, LongRun
from pgen.algorithms.energy.space import Space
from pgen.algorithms.kernels.discrete_langevin import DiscreteLangevin
from pgen.algorithms.kernels.gibbs import Gibbs, GibbsWithGradients
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import ULA
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.kernels.walk import RandomWalk
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
        LongRun(chains=CHAINS, warmup=100, leaps=0, continuous=RandomWalk()),
        LongRun(chains=CHAINS, warmup=120, leaps=0, continuous=ULA(), step_size=0.15),
        LongRun(chains=CHAINS, warmup=10, steps=1, leaps=0, continuous=NUTS()),
    ],
    ids=["leaps", "steps", "hmc", "random-walk", "ula", "nuts"],
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


def test_steps_that_are_not_corrected_are_as_long_as_they_are_asked_to_be():
    """Those of 0.7 standard deviations leave a variance that is a sixth too large, or more."""
    how = LongRun(chains=CHAINS, warmup=60, leaps=0, continuous=ULA(), step_size=0.7)
    with pytest.raises(StatisticalFailure, match="variance"):
        assert_moments(drawn(how), MEAN, SD)


# --- bits and other counted numbers ---

BITS = Space.of(constraints.boolean, (12,))
COUPLING = torch.diag(torch.full((11,), 0.8), 1)


def ising(x):
    """A ring that is cut open, of twelve spins in a field."""
    spin = 2 * x - 1
    return ((spin @ COUPLING) * spin).sum(-1) + 0.1 * spin.sum(-1)


def enumerated(f):
    """Probabilities of how many spins are up, and whether the first two are alike: 26 of them."""
    every = BITS.every(torch.empty(0))
    return torch.zeros(26, dtype=torch.double).index_add(0, told(every), f(every).double().softmax(0))


def told(x):
    return (2 * x.sum(-1) + (x[:, 0] == x[:, 1])).long()


@pytest.mark.parametrize("kernel", [Gibbs, GibbsWithGradients, DiscreteLangevin])
def test_kernels_of_bits_draw_from_an_ising_chain(kernel):
    warmup = 100 if kernel is GibbsWithGradients else 30
    x = drawn(LongRun(chains=CHAINS, warmup=warmup, leaps=0, steps=2, discrete=kernel), ising, BITS)
    assert_frequencies(told(x), enumerated(ising))
    with pytest.raises(StatisticalFailure):
        assert_frequencies(told(x), enumerated(lambda x: 1.1 * ising(x)))


def test_langevin_steps_follow_their_own_acceptance():
    following = Following(None, DiscreteLangevin((2, 2), step_size=0.5))
    before = following.begin(0.1, MEAN)
    after = following.after(before, torch.tensor([1.0, 1.0]))
    assert float(after[0]) == float(before[0])
    assert float(after[1]) > float(before[1])
    assert float(following.after(before, torch.tensor([0.0, 0.0]))[1]) < float(before[1])


@pytest.mark.parametrize("kernel", [Gibbs, GibbsWithGradients, DiscreteLangevin])
def test_rows_of_a_conditional_density_stay_with_their_law(kernel):
    """Three laws of a number with three values; row i is of law i mod 3, also where several values of it are tried."""
    space, field = Space.of(constraints.integer_interval(0, 2), (1,)), torch.tensor([-1.0, 0.0, 1.0])

    def f(x):
        return x[:, 0] * field.repeat(len(x) // 3)

    torch.manual_seed(0)
    start = space.together(*space.uniform(3 * CHAINS, torch.empty(0)))
    x = LongRun(warmup=20, leaps=0, discrete=kernel)(f, start, space, len(start)).reshape(CHAINS, 3)
    law = (torch.arange(3) * field.unsqueeze(1)).softmax(1)
    assert_frequencies(x, law)
    with pytest.raises(StatisticalFailure):
        assert_frequencies(x, law.roll(1, 0))


def test_a_kernel_that_is_asked_for_takes_the_place_of_the_energys_sweep():
    space, how = Space.of(constraints.boolean, (1,)), LongRun(warmup=1, steps=1, discrete=Gibbs, leaps=0)
    x = drawn(how, lambda x: x[:, 0], space, 50, sweep=torch.zeros_like)
    assert bool((x != 0).any())


def test_kernels_with_a_warm_up_of_their_own_want_measured_numbers():
    with pytest.raises(ValueError, match="NUTS moves numbers that are measured, and 12 here are counted"):
        drawn(AdaptedRun(NUTS()), ising, BITS, 10)


@pytest.mark.parametrize(("n", "chains"), [(3, 32), (100, 100), (101, 104), (10_000, 500)])
def test_enough_chains_are_run_for_what_is_learned_from_all_of_them(n, chains):
    assert AdaptedRun().count(n) == chains
    assert AdaptedRun().count(n, conditional=True) % n == 0
    assert AdaptedRun().count(n, conditional=True) % 4 == 0
    assert AdaptedRun().count(n, conditional=True) >= 32


@pytest.mark.parametrize(
    "options",
    [{"warmup": 1}, {"thin": 0}, {"chains": 8}],
    ids=str,
)
def test_wrong_settings_of_adapted_runs_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaptedRun(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"warmup": -1},
        {"step_size": 0.0},
        {"target_accept": 1.0},
        {"thin": 0},
        {"chains": 0},
        {"steps": 0},
        {"leaps": -1},
    ],
    ids=str,
)
def test_wrong_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LongRun(**options)
