"""Tempering and annealing give separate modes their weights, on every space, where chains that only move do not."""

import math

import pytest
import torch
from torch.distributions import constraints

from pgen.algorithms.energy import tempered
from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.annealed_draws import AnnealedRun
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.reference import Reference, References
from pgen.algorithms.energy.scaled import Scaled
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.tempered import TemperedRun
from pgen.algorithms.energy.walks import Moves
from pgen.algorithms.kernels.discrete_langevin import DiscreteLangevin
from pgen.algorithms.kernels.langevin import MALA
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_mean, assert_moments

COLUMNS = 2000
FEW = Annealing(pilot=100, moves=1)
WEIGHTS = torch.tensor([0.3, 0.7])


def two_hills(d):
    """Normal laws of unit variance whose means are 10 apart, of weights 0.3 and 0.7; and the mean of the heavier."""
    mean = torch.full((d,), 5 / math.sqrt(d))

    def f(x):
        light, heavy = ((x + s * mean).square().sum(-1) / -2 for s in (1, -1))
        return torch.logaddexp(WEIGHTS[0].log() + light, WEIGHTS[1].log() + heavy)

    return f, mean


def real(d):
    return Space.of(constraints.real, (d,))


def wide(d):
    """A law that covers both hills."""
    torch.manual_seed(0)
    mean = two_hills(d)[1]
    return Reference(torch.where(torch.rand(2000, 1) < 0.5, mean, -mean) + torch.randn(2000, d), real(d), 1.3)


def which(x):
    return (x.sum(1) > 0).long()


def run(d):
    """Columns that all begin at the lighter hill."""
    f, mean = two_hills(d)
    law = wide(d)
    return TemperedRun(columns=COLUMNS, warmup=120, steps=1).run(
        f, law, real(d), COLUMNS, start=-mean.expand(COLUMNS, d)
    )


# --- two hills, ten standard deviations apart ---


@pytest.mark.parametrize("d", [2, 8])
def test_chains_that_only_move_get_the_weights_wrong(d):
    f, _ = two_hills(d)
    torch.manual_seed(0)
    x = LongRun(chains=COLUMNS, warmup=100, leaps=0)(f, torch.randn(COLUMNS, d), real(d), COLUMNS)
    with pytest.raises(StatisticalFailure):
        assert_frequencies(which(x), WEIGHTS)


@pytest.mark.parametrize("d", [2, 8])
def test_tempering_gets_the_weights_right(d):
    """One draw of each column, so they are independent; a share that is off by 0.07 is noticed."""
    x, mean = run(d).position, two_hills(d)[1]
    assert_frequencies(which(x), WEIGHTS)
    assert_moments(x - torch.where(which(x).bool()[:, None], mean, -mean), 0.0, 1.0)


def test_swaps_that_always_accept_do_not(monkeypatch):
    right = tempered.swaps
    monkeypatch.setattr(
        tempered, "swaps", lambda ratio, beta, parity: right(torch.zeros_like(ratio), beta, parity)
    )
    x = run(2).position
    with pytest.raises(StatisticalFailure):
        assert_frequencies(which(x), WEIGHTS)


@pytest.mark.slow
def test_without_swaps_nobody_hears_of_the_other_hill(monkeypatch):
    def none(ratio, beta, parity):
        return torch.arange(len(beta)).expand(ratio.shape), torch.ones_like(ratio[:, 1:])

    monkeypatch.setattr(tempered, "swaps", none)
    found = run(2)
    assert bool((which(found.position) == 0).all())
    assert int(found.trips.sum()) == 0


@pytest.mark.parametrize("d", [2, 8])
def test_clouds_get_the_weights_right(d):
    """100 clouds side by side, which share their ladder and nothing else: shares of each are independent of the others'."""
    f, _ = two_hills(d)
    each, clouds = 200, 100
    law = wide(d)
    x = AnnealedRun(particles=each, after=0)(f, law, real(d), each * clouds, laws=clouds)
    share = which(x).double().reshape(each, clouds).mean(0)
    assert_mean(share, 0.7, slack=0.005)  # the bias is in proportion to 1 / each
    with pytest.raises(StatisticalFailure):
        assert_mean(share, 0.6, slack=0.005)


# --- what is told ---


def test_round_trips_are_as_many_as_rejections_allow():
    """Replicas that forget at every rung where they were make 1 / (2 + 2 sum r / (1 - r)) round trips a step; these do nearly."""
    found = run(2)
    trips = found.trips.double()
    assert found.steps == 60
    assert_mean(trips, float(found.ideal_trips), slack=0.25 * float(found.ideal_trips))
    assert bool((found.rejection > 0.05).all() & (found.rejection < 0.6).all())
    assert bool(((found.accept - 0.574).abs() < 0.05).all())
    assert float(found.beta[0]) == 0.0
    assert float(found.beta[-1]) == 1.0


def test_columns_give_as_many_draws_as_are_asked_for():
    f, _ = two_hills(2)
    law = wide(2)
    how = TemperedRun(columns=50, warmup=5, thin=2, steps=1, pilot=FEW)
    assert how(f, law, real(2), 120).shape == (120, 2)
    assert how(f, law, real(2), 3).shape == (3, 2)
    cloud = AnnealedRun(particles=50, after=1, steps=1)
    assert cloud(f, law, real(2), 7).shape == (7, 2)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_draws():
    f, _ = two_hills(2)
    for how in (
        TemperedRun(columns=40, warmup=4, steps=1, pilot=FEW),
        AnnealedRun(particles=60, after=1, steps=1),
    ):
        found = []
        for _ in range(2):
            law = wide(2)
            torch.manual_seed(3)
            found.append(how(f, law, real(2), 40))
        assert torch.equal(*found)


# --- other spaces ---

BITS = Space.of(constraints.boolean, (12,))
EVEN = Reference(torch.cat([torch.zeros(50, 12), torch.ones(50, 12)]), BITS)


def magnet(x):
    """Twelve spins that all like each other: nearly all are up, or nearly all down."""
    m = (2 * x - 1).mean(-1)
    return 10 * m.square() + 0.4 * m


def up(f):
    every = BITS.every(torch.empty(0))
    total = torch.zeros(13, dtype=torch.double)
    return total.index_add(0, every.sum(1).long(), f(every).double().softmax(0))


@pytest.mark.parametrize(
    "discrete", [None, pytest.param(DiscreteLangevin, marks=pytest.mark.slow)], ids=["usual", "langevin"]
)
def test_a_magnet_turns_over(discrete):
    """Against the sum over all 4,096 states; all columns begin with all spins down."""
    torch.manual_seed(0)
    start = torch.zeros(600, 12)
    x = TemperedRun(columns=600, warmup=100, discrete=discrete).run(magnet, EVEN, BITS, 600, start=start)
    assert_frequencies(x.position.sum(1), up(magnet))
    alone = LongRun(warmup=30, leaps=0, steps=2, discrete=discrete)(magnet, start, BITS, 600)
    with pytest.raises(StatisticalFailure):
        assert_frequencies(alone.sum(1), up(magnet))


@pytest.mark.slow
def test_a_cloud_of_magnets():
    torch.manual_seed(0)
    each, clouds = 200, 50
    x = AnnealedRun(particles=each, after=0, keep=0.8)(magnet, EVEN, BITS, each * clouds, laws=clouds)
    share = (x.sum(1) > 6).double().reshape(each, clouds).mean(0)
    truth = float(up(magnet)[7:].sum())
    assert_mean(share, truth, slack=0.01)
    with pytest.raises(StatisticalFailure):
        assert_mean(share, truth - 0.15, slack=0.01)


def test_a_number_and_a_bit_that_hold_each_other():
    """Given the bit the number is 10 standard deviations away, and given the number the bit is certain."""
    space = Space.of(
        constraints.cat([constraints.positive, constraints.boolean], dim=-1, lengths=[1, 1]), (2,)
    )

    def f(x):
        """The logarithm of the number is normal around 5 or -5."""
        log = x[:, 0].log()
        return -(log - (10 * x[:, 1] - 5)).square() / 2 - log + torch.lerp(*WEIGHTS.log(), x[:, 1])

    torch.manual_seed(0)
    seen = torch.stack([(6 * torch.randn(500)).exp(), (torch.rand(500) < 0.5).float()], 1)
    start = torch.tensor([math.exp(-5), 0.0]).expand(1000, 2)
    x = TemperedRun(columns=1000, steps=1).run(f, Reference(seen, space), space, 1000, start=start).position
    assert_frequencies(x[:, 1], WEIGHTS)
    assert_moments(x[:, 0].log() - (10 * x[:, 1] - 5), 0.0, 1.0)


@pytest.mark.parametrize(
    "how", [TemperedRun(warmup=60), AnnealedRun(particles=100)], ids=["tempered", "annealed"]
)
def test_laws_side_by_side_keep_their_rows(how):
    """Row i is of law i mod 3, of mean -4, 0 or 4 and of another width; there is one draw of each column."""
    mean, sd, each = torch.tensor([-4.0, 0.0, 4.0]), torch.tensor([0.5, 1.0, 2.0]), 300
    torch.manual_seed(0)
    law = References((mean + 2 * sd * torch.randn(400, 3)).reshape(-1, 1), real(1), 3)

    def f(x):
        rows = len(x) // 3
        return -((x[:, 0] - mean.repeat(rows)) / sd.repeat(rows)).square() / 2

    x = how(f, law, real(1), 3 * each, laws=3).reshape(each, 3)
    assert_moments(x, mean, sd)
    with pytest.raises(StatisticalFailure):
        assert_moments(x.roll(1, 1), mean, sd)


def test_moves_in_other_units_leave_the_density_as_it_is():
    space, factor = real(2), torch.tensor([[0.3, 3.0]])
    torch.manual_seed(0)
    x = torch.randn(4000, 2)
    walk = Moves(Scaled(space, factor), MALA(), None, 20)
    x = walk(x, lambda x: -x.square().sum(-1) / 2, torch.tensor(0.4)).position
    assert_moments(x, 0.0, 1.0)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (TemperedRun, {"columns": 0}),
        (TemperedRun, {"warmup": -1}),
        (TemperedRun, {"thin": 0}),
        (TemperedRun, {"steps": 0}),
        (TemperedRun, {"most": 1}),
        (TemperedRun, {"spacing": 0.0}),
        (AnnealedRun, {"particles": 10}),
        (AnnealedRun, {"keep": 1.0}),
        (AnnealedRun, {"moves": 0}),
        (AnnealedRun, {"after": -1}),
        (AnnealedRun, {"steps": 0}),
    ],
    ids=str,
)
def test_wrong_settings_are_named(how, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        how(**options)
