"""Two-sample distances: exact on small cases; tests of the right size that see a difference."""

import itertools
import math

import pytest
import torch

from pgen.errors import DataError, OptionError
from pgen.metrics import energy_distance, mmd, sliced_wasserstein, two_sample_test

FALSE_ALARM = 1e-6


def binomial_tail(successes, trials, chance):
    """P(at least so many successes)."""
    log = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(chance) + (trials - k) * math.log1p(-chance)
        for k in range(successes, trials + 1)
    ]  # fmt: skip
    return sum(math.exp(v) for v in log)


def by_hand(x, y, kernel):
    """The U-statistic, written as its definition."""
    pairs = [[kernel(a, b) for a, b in itertools.permutations(s, 2)] for s in (x, y)]
    across = [kernel(a, b) for a in x for b in y]
    return sum(sum(p) / len(p) for p in pairs) - 2 * sum(across) / len(across)


def test_mmd_and_energy_are_their_definitions():
    x, y = torch.randn(5, 3), torch.randn(7, 3) + 1
    gauss = lambda a, b: math.exp(-float((a - b).square().sum()) / (2 * 1.3**2))  # noqa: E731
    assert float(mmd(x, y, bandwidth=1.3)) == pytest.approx(by_hand(x, y, gauss), abs=1e-5)
    distance = lambda a, b: -float((a - b).norm())  # noqa: E731
    assert float(energy_distance(x, y)) == pytest.approx(by_hand(x, y, distance), abs=1e-5)


def test_the_median_bandwidth_does_not_depend_on_the_scale():
    x, y = torch.randn(20, 2), torch.randn(30, 2) + 1
    assert float(mmd(1000 * x, 1000 * y)) == pytest.approx(float(mmd(x, y)), abs=1e-4)


def test_energy_distance_of_two_gaussians_is_the_closed_form():
    """On the line, E|a - b| of N(m, s^2) has a closed form; 2,000 rows make 5 standard errors about 0.13."""

    def folded(m, s):
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(
            m / (s * math.sqrt(2))
        )

    truth = 2 * folded(1.0, math.sqrt(2)) - 2 * folded(0.0, math.sqrt(2))
    x, y = torch.randn(2000, 1), torch.randn(2000, 1) + 1
    assert float(energy_distance(x, y)) == pytest.approx(truth, abs=0.13)
    assert abs(float(energy_distance(x, y - 0.5)) - truth) > 0.13


def test_sliced_wasserstein_on_the_line_is_exact():
    x = torch.tensor([[0.0], [2.0]])
    assert float(sliced_wasserstein(x, x + 3.0)) == pytest.approx(3.0, abs=1e-6)
    # Samples of different sizes: quantiles of {0, 2} against {0, 1, 2}, integrated by hand.
    y = torch.tensor([[0.0], [1.0], [2.0]])
    assert float(sliced_wasserstein(x, y)) == pytest.approx(math.sqrt(1 / 3), abs=1e-6)
    assert float(sliced_wasserstein(x.repeat(3, 1), x)) == pytest.approx(0.0, abs=1e-6)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    x = torch.randn(50, 4, dtype=torch.float64)
    shift = torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    # The mean of (theta . shift)^2 is |shift|^2 / D; 4,000 lines, relative error of its root 1.1 %, at 5
    # sigma 6 %.
    assert float(sliced_wasserstein(x, x + shift, projections=4000)) == pytest.approx(2.5, rel=0.06)


@pytest.mark.parametrize("kernel", ["gaussian", "energy"])
def test_the_size_of_the_test_is_right_and_it_has_power(kernel):
    """Under one law p <= 0.05 happens at most so often; with means 0.8 apart, nearly always."""
    trials, false, found = 200, 0, 0
    for trial in range(trials):
        x, y = torch.randn(30, 2), torch.randn(40, 2)
        false += two_sample_test(x, y, kernel=kernel, permutations=99, seed=trial).p_value <= 0.05
        found += two_sample_test(x, y + 0.8, kernel=kernel, permutations=99, seed=trial).p_value <= 0.05
    assert binomial_tail(false, trials, 0.05) > FALSE_ALARM
    assert binomial_tail(found, trials, 0.05) < FALSE_ALARM, "the check on false alarms can fail"
    assert found > 0.9 * trials


def test_p_values_are_uniform_under_one_law():
    """Also in the middle: a test whose p-values are always large would pass the check above."""
    p = [
        two_sample_test(torch.randn(20, 1), torch.randn(20, 1), permutations=99, seed=s).p_value
        for s in range(200)
    ]
    for level in (0.25, 0.5, 0.75):
        below = sum(v <= level for v in p)
        assert binomial_tail(below, 200, level) > FALSE_ALARM
        assert binomial_tail(200 - below, 200, 1 - level) > FALSE_ALARM


def test_the_same_seed_gives_the_same_answer_and_the_global_generator_is_left_alone():
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    state = torch.get_rng_state()
    one, two = (two_sample_test(x, y, seed=7) for _ in range(2))
    assert one == two
    assert float(sliced_wasserstein(x, y, seed=1)) == float(sliced_wasserstein(x, y, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_integers_images_and_identical_rows():
    x = torch.randint(0, 17, (20, 8, 8))
    assert two_sample_test(x, x.clone()).p_value == 1.0
    assert float(mmd(torch.zeros(3, 2), torch.zeros(3, 2))) == 0.0


def test_bad_input_is_named():
    good = torch.randn(5, 2)
    for x, y in ((good[:1], good), (good, torch.randn(5, 3))):
        with pytest.raises(DataError, match="at least two rows each, of one size"):
            mmd(x, y)
    with pytest.raises(DataError, match="not finite"):
        energy_distance(good, good / 0)
    with pytest.raises(OptionError, match="bandwidth"):
        mmd(good, good, bandwidth=0.0)
    with pytest.raises(OptionError, match="permutations=0"):
        two_sample_test(good, good, permutations=0)
