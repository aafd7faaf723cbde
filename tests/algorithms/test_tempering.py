"""Parallel tempering against laws in closed form, at every temperature.

Columns are independent of each other, so their last states are independent draws; every assertion fails by chance once
in a million.
"""

import math

import pytest
import torch

from pgen.algorithms import tempering
from pgen.algorithms.kernels.base import untuned
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import MALA
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.algorithms.path import Path, gaussian
from pgen.algorithms.record import record
from pgen.algorithms.tempering import (
    ParallelTempering,
    Temperatures,
    even_beta,
    interpolate,
    round_trip_rate,
)
from pgen.testing.statistics import (
    StatisticalFailure,
    assert_distribution,
    assert_frequencies,
    assert_moments,
)

double = {"dtype": torch.float64}
CHAINS = 4000


# --- a Gaussian: the law at every temperature is Gaussian ---


MEAN, DEVIATION, WIDE = torch.tensor([2.0, -1.0], **double), torch.tensor([0.5, 0.2], **double), 3.0


def narrow(q):
    z = (q - MEAN) / DEVIATION
    return -z.square().sum(1) / 2, -z / DEVIATION


def path(sampled=True):
    reference, sample = gaussian(torch.zeros(2, **double), torch.full((2,), WIDE, **double))
    return Path(narrow, reference, sample if sampled else None)


def tempered_law(beta, target):
    """Mean and standard deviation `[T, d]`."""
    wide = 0.0 if target is narrow else (1 - beta[:, None]) / WIDE**2
    precision = wide + beta[:, None] / DEVIATION**2
    return beta[:, None] * MEAN / DEVIATION**2 / precision, precision.rsqrt()


def exact(kernel, tuning, target):
    """Replicas that are exact draws at their temperatures."""
    mean, deviation = tempered_law(tuning.beta, target)
    position = mean + deviation * torch.randn(CHAINS, *mean.shape, **double)
    state = kernel.init(position[:, -1], target)
    cloud = tempering._evaluate(tempering.path_of(target), position)
    return state._replace(cloud=cloud, position=position[:, -1])


def check(state, tuning, target):
    mean, deviation = tempered_law(tuning.beta, target)
    score = (state.cloud.position - mean) / deviation
    assert_distribution(score, torch.special.ndtr, what="law at each temperature")
    assert_moments(score, 0.0, 1.0, what="law at each temperature")


KERNELS = {"mala": (MALA(), 0.8), "hmc": (HMC(steps=4), 0.4), "walk": (RandomWalk(), 1.5)}


def uneven(kernel, target):
    """A tuning whose step sizes and scales differ between temperatures."""
    count = kernel.temperatures
    beta = torch.linspace(kernel.hottest, 1, count, **double) ** (2 if kernel.hottest == 0 else 1)
    _, deviation = tempered_law(beta, target)
    steps = KERNELS[{MALA: "mala", HMC: "hmc", RandomWalk: "walk"}[type(kernel.kernel)]][1]
    spread = torch.linspace(0.6, 1.1, count, **double)
    return Temperatures(beta, steps * spread, deviation.sqrt(), torch.tensor(1.0, **double))


@pytest.mark.parametrize("inner", KERNELS)
@pytest.mark.parametrize("target", ["refreshed", "path", "powers"])
def test_exact_draws_stay_exact_at_every_temperature(inner, target):
    target = {"refreshed": path(), "path": path(sampled=False), "powers": narrow}[target]
    hottest = 0.05 if target is narrow else 0.0
    kernel = ParallelTempering(KERNELS[inner][0], temperatures=5, hottest=hottest, moves=2)
    tuning = uneven(kernel, target)
    state = exact(kernel, tuning, target)
    for _ in range(6):
        state, info = kernel.step(state, tuning, target)
    check(state, tuning, target)
    torch.testing.assert_close(state.position, state.cloud.position[:, -1])
    density, _ = state.cloud.at(tuning.beta)
    torch.testing.assert_close(info.energy, -density[:, -1])


def test_what_is_remembered_is_what_is_there():
    kernel, target = ParallelTempering(MALA(), 5), path()
    tuning = uneven(kernel, target)
    state = exact(kernel, tuning, target)
    for _ in range(3):
        state, _ = kernel.step(state, tuning, target)
    for found, expected in zip(state.cloud, tempering._evaluate(target, state.cloud.position), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flaw", ["sign", "always"])
def test_the_check_fails_wrong_swaps(flaw, monkeypatch):
    right = tempering._swap

    def wrong(cloud, from_hot, beta, parity):
        return right(cloud, from_hot, -beta if flaw == "sign" else 0 * beta, parity)

    monkeypatch.setattr(tempering, "_swap", wrong)
    kernel, target = ParallelTempering(MALA(), 5), path()
    tuning = uneven(kernel, target)
    state = exact(kernel, tuning, target)
    for _ in range(6):
        state, _ = kernel.step(state, tuning, target)
    with pytest.raises(StatisticalFailure):
        check(state, tuning, target)


def test_the_check_fails_a_density_in_other_units():
    """As if the coordinates of the inner kernel had not been undone."""
    kernel, target = ParallelTempering(RandomWalk(), 5), path()
    tuning = uneven(kernel, target)
    state = exact(kernel, tuning, target)
    flat = Path(lambda q: narrow(q / 2), target.reference, target.sample)
    for _ in range(6):
        state, _ = kernel.step(state, tuning, flat)
    with pytest.raises(StatisticalFailure):
        check(state, tuning, target)


# --- far modes ---


SHARES = torch.tensor([0.3, 0.7], **double)


def bimodal(q):
    """Unit normals at -8 and 8 in each of three dimensions, 28 standard deviations apart, weighing 0.3 and 0.7."""
    left, right = (-(q - side).square().sum(1) / 2 + share.log() for side, share in zip((-8.0, 8.0), SHARES))
    density = torch.logaddexp(left, right)
    share = (right - density).exp().unsqueeze(1)
    return density, -(q + 8.0) * (1 - share) - (q - 8.0) * share


@pytest.fixture(scope="module")
def tempered():
    """All columns start in the light mode."""
    torch.manual_seed(1)
    start = torch.randn(CHAINS // 2, 3, **double) - 8
    reference, sample = gaussian(torch.zeros(3, **double), torch.full((3,), 9.0, **double))
    target = Path(bimodal, reference, sample)
    kernel = ParallelTempering(MALA(), temperatures=6, moves=2)
    tuning = kernel.untuned(start, step_size=0.5)
    _, tuning = kernel.warm_up(kernel.init(start[:500], target), tuning, target, rounds=6)
    state = kernel.init(start, target)
    step, rejections = record(lambda state, tuning: kernel.step(state, tuning, target)), []
    for _ in range(240):  # the start is forgotten by a factor of e every 25 steps
        state, info = step(state, tuning)
        rejections.append(info.rejection.mean(0))
    assert step.obstacle is None
    return state, tuning, info, torch.stack(rejections[20:]).mean(0)


def test_tempering_weighs_far_modes(tempered):
    state, _, _, _ = tempered
    right = (state.position[:, 0] > 0).long()
    assert_frequencies(right, SHARES, what="modes")
    within = state.position - 16.0 * right.unsqueeze(1) + 8
    assert_distribution(within, torch.special.ndtr, what="within modes")


def test_plain_hmc_fails_at_that():
    start = torch.randn(CHAINS, 3, **double) - 8
    kernel, tuning = HMC(steps=10), untuned(start, 0.3)
    state = kernel.init(start, bimodal)
    for _ in range(40):
        state, _ = kernel.step(state, tuning, bimodal)
    assert (state.position < 0).all()  # not one chain of thousands crossed
    with pytest.raises(StatisticalFailure):
        assert_frequencies((state.position[:, 0] > 0).long(), SHARES)


def test_the_ladder_is_made_even(tempered):
    _, tuning, info, rejection = tempered
    assert tuning.beta[0] == 0
    assert tuning.beta[-1] == 1
    assert rejection.max() - rejection.min() < 0.15
    assert (info.accepts.mean(0) - 0.574).abs().max() < 0.15


def test_round_trips_come_about_as_often_as_theory_says(tempered):
    """Theory is for replicas that mix at once, so a bound in practice; the way there is to be counted out."""
    state, _, _, rejection = tempered
    rate = state.trips.double().mean() / 240
    assert 0.5 * round_trip_rate(rejection) < rate < 1.1 * round_trip_rate(rejection)


# --- parts ---


def test_swaps_that_are_never_rejected_carry_replicas_straight_through():
    """Even-odd swaps of equal densities: replica 0 climbs a rung a step, then comes back."""
    kernel = ParallelTempering(RandomWalk(), temperatures=4, hottest=0.999999)
    start = torch.zeros(2, 1, **double)
    state = kernel.init(start, lambda q: (0 * q.sum(1), 0 * q))
    mark = torch.arange(4.0, **double)[:, None].expand(2, 4, 1)
    state = state._replace(cloud=state.cloud._replace(position=mark))
    tuning = kernel.untuned(start, step_size=1e-12)
    places, trips = [], []
    for _ in range(8):
        state, _ = kernel.step(state, tuning, lambda q: (0 * q.sum(1), 0 * q))
        places.append(int(state.cloud.position[0, :, 0].round().tolist().index(0.0)))
        trips.append(int(state.trips[0]))
    assert places == [1, 2, 3, 3, 2, 1, 0, 0]
    assert trips[2] == 1


def test_interpolation_reads_straight_lines():
    at, values = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 5.0]])
    x = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])
    expected = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 3.0], [2.0, 5.0]])
    torch.testing.assert_close(interpolate(x, at, values), expected)


def test_an_even_ladder_stays():
    beta = torch.linspace(0, 1, 6, **double) ** 2
    torch.testing.assert_close(even_beta(beta, torch.full((5,), 0.3, **double)), beta)
    silent = even_beta(beta, torch.zeros(5, **double))  # nothing was ever rejected
    assert (silent[1:] > silent[:-1]).all()


def test_the_seed_decides():
    kernel, target = ParallelTempering(MALA(), 4), path()
    tuning = uneven(kernel, target)
    state = kernel.init(torch.zeros(5, 2, **double), target)
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(kernel.step(state, tuning, target)[0].position)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParallelTempering(MALA(), temperatures=1), "temperatures"),
        (lambda: ParallelTempering(MALA(), hottest=1.0), "hottest"),
        (lambda: ParallelTempering(MALA(), moves=0), "moves"),
        (lambda: ParallelTempering(MALA()).init(torch.zeros(2, 2), narrow), "reference"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_round_trip_without_rejection_takes_two_steps():
    assert math.isclose(round_trip_rate(torch.zeros(7)), 0.5)
