"""The assertions fail on the truth as seldom, and on the stated error as often, as they say."""

import math

import pyro.distributions as dist
import pytest
import torch

from pgen.testing import statistics as stats

ROUNDS = 400


def failures(assertion, rounds=ROUNDS):
    """How many of so many rounds fail."""
    count = 0
    for _ in range(rounds):
        try:
            assertion()
        except stats.StatisticalFailure:
            count += 1
    return count


def at_most(probability, rounds=ROUNDS, alpha=1e-6):
    """What a binomial count exceeds with probability alpha at most (summed exactly)."""
    tail, k = 1.0, 0
    while tail > alpha:
        tail -= math.comb(rounds, k) * probability**k * (1 - probability) ** (rounds - k)
        k += 1
    return k - 1


NORMAL = dist.Normal(1.0, 2.0)
THREE = torch.tensor([0.2, 0.5, 0.3])
#: each assertion, as a function of n draws, an error of a given size (0: the claim is true), and alpha
ASSERTIONS = {
    "mean, known sd": lambda n, off, a: stats.assert_mean(
        NORMAL.sample((n,)) + 2.0 * off, 1.0, std=2.0, alpha=a
    ),
    "mean, estimated sd": lambda n, off, a: stats.assert_mean(NORMAL.sample((n,)) + 2.0 * off, 1.0, alpha=a),
    "mean of ten": lambda n, off, a: stats.assert_mean(
        NORMAL.sample((n, 10)) + 2.0 * off * torch.eye(10)[3], 1.0, std=2.0, alpha=a
    ),
    "moments": lambda n, off, a: stats.assert_moments(NORMAL.sample((n,)) + 2.0 * off, 1.0, 2.0, alpha=a),
    "distribution": lambda n, off, a: stats.assert_distribution(
        NORMAL.sample((n, 2)) + 2.0 * off, NORMAL.cdf, alpha=a
    ),
    "two samples": lambda n, off, a: stats.assert_same_distribution(
        NORMAL.sample((n,)), NORMAL.sample((n,)) + 2.0 * off, alpha=a
    ),
    "frequencies": lambda n, off, a: stats.assert_frequencies(
        dist.Categorical(THREE + off * torch.tensor([0.5, -0.5, 0.0])).sample((n,)), THREE, alpha=a
    ),
    "estimate": lambda n, off, a: stats.assert_estimate(
        NORMAL.sample((n,)).mean()[None] + 2.0 * off,
        torch.ones(1),
        torch.tensor([2.0 / math.sqrt(n)]),
        alpha=a,
    ),
    "lower bound": lambda n, off, a: stats.assert_lower_bound(
        NORMAL.sample((n,)).mean()[None] + 2.0 * off,
        torch.ones(1),
        torch.tensor([2.0 / math.sqrt(n)]),
        alpha=a,
    ),
}


@pytest.mark.parametrize("name", ASSERTIONS)
def test_the_truth_fails_as_seldom_as_stated(name):
    assert failures(lambda: ASSERTIONS[name](500, 0.0, 0.05)) <= at_most(0.05)


@pytest.mark.parametrize("name", ["mean, known sd", "mean of ten", "estimate"])
def test_the_stated_error_is_noticed_as_often_as_stated(name):
    n = stats.draws_needed(0.2, alpha=0.05, beta=0.05, components=10 if "ten" in name else 1)
    missed = ROUNDS - failures(lambda: ASSERTIONS[name](n, 0.2, 0.05))
    assert missed <= at_most(0.05)


def test_the_stated_error_of_a_distribution_is_noticed():
    distance = 2 * float(dist.Normal(0.0, 1.0).cdf(torch.tensor(0.1))) - 1  # a shift by 0.2 sd
    n = stats.draws_needed_for_cdf(distance, alpha=0.05, beta=0.05)
    missed = 100 - failures(lambda: ASSERTIONS["distribution"](n, 0.2, 0.05), 100)
    assert missed <= at_most(0.05, 100)


@pytest.mark.parametrize("name", ASSERTIONS)
def test_a_tenth_of_a_standard_deviation_is_noticed_at_one_in_a_million(name):
    with pytest.raises(stats.StatisticalFailure):
        ASSERTIONS[name](60_000, 0.1, stats.ALPHA)


def test_the_error_rate_is_shared_by_all_components():
    # 1000 components at 5 % each would fail every time; together they fail in one round of twenty.
    rounds = 100
    count = failures(lambda: stats.assert_mean(torch.randn(50, 1000), 0.0, std=1.0, alpha=0.05), rounds)
    assert count <= at_most(0.05, rounds)


def test_frequencies_see_what_cannot_happen_and_pool_what_hardly_does():
    with pytest.raises(stats.StatisticalFailure, match="chi-square inf"):
        stats.assert_frequencies(torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.5, 0.0]))
    with pytest.raises(stats.StatisticalFailure, match=r"none of 0\.\.1"):
        stats.assert_frequencies(torch.tensor([0, 2]), torch.tensor([0.5, 0.5]))
    rare = torch.tensor([0.999, *[0.001 / 50] * 50])
    assert failures(
        lambda: stats.assert_frequencies(dist.Categorical(rare).sample((500,)), rare, alpha=0.01), 100
    ) <= at_most(0.01, 100)


def test_frequencies_per_component():
    probabilities = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    draws = dist.Categorical(probabilities).sample((5000,))
    stats.assert_frequencies(draws, probabilities)
    with pytest.raises(stats.StatisticalFailure, match="component 1"):
        stats.assert_frequencies(draws, torch.tensor([[0.5, 0.5], [0.2, 0.8]]))


def test_a_variance_that_is_off_is_noticed():
    with pytest.raises(stats.StatisticalFailure, match="variance"):
        stats.assert_moments(1.1 * torch.randn(30_000), 0.0, 1.0)


@pytest.mark.parametrize(
    "assertion",
    [
        lambda nan: stats.assert_mean(nan, 0.0),
        lambda nan: stats.assert_distribution(nan, dist.Normal(0.0, 1.0).cdf),
        lambda nan: stats.assert_estimate(nan, torch.zeros(100), torch.ones(100)),
        lambda nan: stats.assert_estimate(torch.zeros(100), torch.zeros(100), nan),
        lambda nan: stats.assert_lower_bound(nan, torch.zeros(100)),
    ],
)
def test_what_is_not_a_number_never_passes(assertion):
    draws = torch.zeros(100)
    draws[7] = math.nan
    with pytest.raises(stats.StatisticalFailure):
        assertion(draws)


def test_a_bound_without_noise_may_exceed_the_truth_by_rounding_only():
    truth = torch.tensor([-3.0, -100.0])
    stats.assert_lower_bound(truth + torch.tensor([1e-5, 1e-3]), truth)
    stats.assert_lower_bound(truth - 5.0, truth)
    with pytest.raises(stats.StatisticalFailure, match="component 0 of 2"):
        stats.assert_lower_bound(truth + torch.tensor([1e-2, 0.0]), truth)


def test_a_constant_must_be_right():
    stats.assert_mean(torch.full((10,), 2.0), 2.0)
    with pytest.raises(stats.StatisticalFailure):
        stats.assert_mean(torch.full((10,), 2.0), 2.01)


def test_slack_is_an_error_that_is_forgiven():
    draws = torch.randn(10_000) + 0.2
    stats.assert_mean(draws, 0.0, slack=0.25)
    with pytest.raises(stats.StatisticalFailure):
        stats.assert_mean(draws, 0.0, slack=0.1)


def test_a_failure_says_statistic_threshold_and_probability():
    with pytest.raises(stats.StatisticalFailure) as caught:
        stats.assert_mean(
            torch.randn(100, 3) + torch.tensor([0.0, 5.0, 0.0]), 0.0, std=1.0, what="posterior of 'z'"
        )
    failure = caught.value
    assert isinstance(failure, AssertionError)
    assert failure.statistic > failure.threshold > 5
    assert failure.probability < failure.alpha == 1e-6
    for part in ("posterior of 'z'", "component 1 of 3", f"{failure.threshold:.4g}", "1e-06"):
        assert part in str(failure)


def test_sample_sizes_are_inverse_to_discrepancies():
    for delta in (0.05, 0.1, 0.2):
        n = stats.draws_needed(delta, components=4)
        assert (
            stats.discrepancy_noticed(n, components=4)
            <= delta
            < stats.discrepancy_noticed(n - 1, components=4)
        )
    assert stats.draws_needed(0.2) == 2326
    assert stats.draws_needed(0.05) == 37211


def test_distribution_functions_take_every_shape():
    loc = torch.tensor([[0.0], [3.0]])
    stats.assert_distribution(dist.Normal(loc, 1.0).sample((2000,)), dist.Normal(loc, 1.0).cdf)
    with pytest.raises(stats.StatisticalFailure, match="component 1 of 2"):
        stats.assert_distribution(
            dist.Normal(loc + torch.tensor([[0.0], [1.0]]), 1.0).sample((2000,)), dist.Normal(loc, 1.0).cdf
        )
