"""Right posteriors pass as often as stated, and wrong ones fail, each with the fault named."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen import pictures
from pgen.capability import Exactness, Offer, Query, Rank, Refusal
from pgen.draws import Draws
from pgen.errors import DataError, Diverged, OptionError, ProgramError, Refused, Unanswerable
from pgen.history import History
from pgen.inspection import structure_of
from pgen.problem import Problem
from pgen.registry import Registry
from pgen.testing import SUITED, Calibration, assert_mean, coverage, sbc
from pgen.testing import calibration_bands as bands
from pgen.testing.calibration_draws import thinned
from pgen.testing.calibration_worlds import JOINT, LIKELIHOOD, Worlds

QUIET = pgen.Run(progress=False)
PROGRAMS = {p.name: p for p in SUITED}


def at_most(probability, rounds, alpha=1e-6):
    """What a binomial count exceeds with probability alpha at most."""
    n = torch.arange(rounds + 1, dtype=torch.float64)
    choose = math.lgamma(rounds + 1) - torch.lgamma(n + 1) - torch.lgamma(rounds - n + 1)
    mass = (choose + n * math.log(probability) + (rounds - n) * math.log1p(-probability)).exp()
    return int((mass.flip(0).cumsum(0).flip(0) > alpha).sum()) - 1


# --- a backend that knows the answer, and its faulty twins ----------------------------------------------------------


def normal_mean(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(mu, 1.0))


FOUR = {"x": torch.zeros(4)}


@dataclass(frozen=True)
class Closed:
    """The exact posterior of `normal_mean`: drawn with `scale` times its width, `shift` widths off, and so on."""

    name: ClassVar[str] = "closed"

    scale: float = 1.0
    shift: float = 0.0
    prior: float = 1.0
    deaf: bool = False
    memory: float = 0.0  # of the chain that its draws make
    confesses: bool = True  # whether it says that its draws depend on each other
    learns: bool = False
    broken: bool = False

    def examine(self, structure):
        exactness = Exactness.ESTIMATE if self.memory and self.confesses else Exactness.EXACT
        return Offer({Query.POSTERIOR: exactness}, Rank.POSSIBLE, "in the book")

    def fit(self, problem, structure, run):
        return ClosedAnswers(self, problem)


class ClosedAnswers:
    def __init__(self, backend, problem):
        self.backend, self.fitted_to = backend, problem
        self.history = History()

    def tensors(self):
        return {"seen": self.fitted_to.observations["x"]} if self.backend.learns else {}

    def posterior(self, problem, structure, n):
        b = self.backend
        if b.broken:
            return {"mu": torch.full((n,), torch.nan)}
        x = (self.fitted_to if b.learns else problem).observations["x"]
        precision = b.prior**-2 + len(x) * (not b.deaf)
        mean, sd = x.sum() * (not b.deaf) / precision, precision**-0.5
        chains = 2 if b.memory and n % 2 == 0 else 1
        noise = torch.randn(n // chains, chains)
        if b.memory:
            state, steps = noise[0], [noise[0]]
            for one in noise[1:] * math.sqrt(1 - b.memory**2):
                state = b.memory * state + one
                steps.append(state)
            noise = torch.stack(steps)
        return Draws({"mu": mean + sd * (b.shift + b.scale * noise.T.reshape(-1))}, chains=chains)


FAULTS = {
    "narrow": (Closed(scale=0.6), "mu", "posterior too narrow"),
    "wide": (Closed(scale=1.6), "mu", "posterior too wide"),
    "shifted": (Closed(shift=0.6), "mu", "posterior biased high"),
    "wrong prior": (Closed(prior=0.3), LIKELIHOOD, "draws less probable than the truth"),
    "deaf": (Closed(deaf=True), LIKELIHOOD, "draws less probable than the truth"),
}
SMALL = {
    "narrow": (Closed(scale=0.8), "mu", "posterior too narrow"),
    "wide": (Closed(scale=1.2), "mu", "posterior too wide"),
    "shifted": (Closed(shift=0.3), "mu", "posterior biased high"),
    "wrong prior": (Closed(prior=0.5), LIKELIHOOD, "draws less probable than the truth"),
}


def test_a_right_posterior_passes(seed):
    found = sbc(normal_mean, Closed(), data=FOUR, run=QUIET, alpha=1e-6, seed=seed)
    assert found.passed, found
    assert [row.quantity for row in found] == ["mu", LIKELIHOOD, JOINT]
    assert found.ranks.shape == (200, 3)
    assert found.short == 0
    assert "calibrated" in str(found)
    assert found.coverage().passed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_posterior_fails_and_the_fault_is_named(fault, seed):
    """300 data sets: none of these is missed with probability above 1e-6."""
    backend, quantity, words = FAULTS[fault]
    found = sbc(normal_mean, backend, data=FOUR, replicates=300, draws=99, run=QUIET, seed=seed)
    assert not found.passed
    assert words in found[quantity].verdict, found
    assert words in str(found)
    if (
        fault == "deaf"
    ):  # the prior is calibrated, on average over data sets: only what looks at the data tells
        assert found["mu"].passed


@pytest.mark.slow
@pytest.mark.parametrize("fault", SMALL)
def test_a_posterior_that_is_a_little_wrong_fails_too(fault, seed):
    """1,500 data sets: missed with probability below 1e-6."""
    backend, quantity, words = SMALL[fault]
    found = sbc(normal_mean, backend, data=FOUR, replicates=1500, draws=99, run=QUIET, seed=seed)
    assert words in found[quantity].verdict, found


def test_a_backend_that_is_fitted_to_other_data_is_found_out(seed):
    with pytest.raises(OptionError, match="a fit already"):
        sbc(normal_mean, pgen.fit(normal_mean, FOUR, Closed()), data=FOUR, refit=True, run=QUIET)
    learned = Closed(learns=True)
    assert sbc(normal_mean, learned, data=FOUR, replicates=40, run=QUIET, alpha=1e-6, seed=seed).passed
    for backend in (learned, pgen.fit(normal_mean, FOUR, learned)):
        once = sbc(normal_mean, backend, data=FOUR, replicates=40, refit=False, run=QUIET, seed=seed)
        assert not once.passed
        assert "too narrow" in once["mu"].verdict


# --- tests of uniformity ----------------------------------------------------------------------------------------------


def test_p_values_of_the_ecdf_are_exact():
    """All 5^4 outcomes of 4 ranks from 0 to 4, by brute force."""
    draws, count = 4, 4
    ranks = torch.tensor(list(itertools.product(range(draws + 1), repeat=count))).T
    z = bands.cuts_of(draws) / (draws + 1)
    lower, upper = bands._tails(count, z)
    reached = (ranks[None] < bands.cuts_of(draws)[:, None, None]).sum(1)
    rows = torch.arange(draws)[:, None]
    depth = torch.minimum(lower[rows, reached], upper[rows, reached]).amin(0)
    expected = (depth[None] <= depth[:, None] + 1e-12).double().mean(1)
    assert torch.allclose(bands.band_p_values(ranks, draws), expected, atol=1e-12)


@pytest.mark.parametrize(("count", "draws"), [(20, 9), (200, 199), (1500, 999)])
def test_the_band_is_left_as_seldom_as_it_says(count, draws, seed):
    rounds = 300 if count > 1000 else 1000
    z, low, high = bands.band(count, draws, 0.05)
    ranks = torch.randint(draws + 1, (count, rounds))
    ecdf = (ranks[:, None] < bands.cuts_of(draws)[:, None]).double().mean(0)
    outside = ((ecdf < low[:, None] - 1e-9) | (ecdf > high[:, None] + 1e-9)).any(0)
    assert int(outside.sum()) <= at_most(0.05, rounds)
    assert bool((low <= z).all())
    assert bool((z <= high).all())
    assert int(outside.sum()) >= at_most(0.01, rounds, 0.5)  # nor much too wide


def test_p_values_of_the_moments_hold_far_in_the_tails():
    """Against the law of a sum of 30 ranks from 0 to 9, by convolution."""
    count, draws = 30, 9
    law = torch.ones(1, dtype=torch.float64)
    for _ in range(count):
        law = sum(torch.nn.functional.pad(law, (k, draws - k)) for k in range(draws + 1)) / (draws + 1)
    assert float(law.sum()) == pytest.approx(1.0)
    for total in (150, 170, 180, 200, 220, 230):
        ranks = torch.full((count, 1), total // count)
        ranks[: total % count] += 1
        p = float(bands.moment_p_values(ranks, draws)[0])
        tail = 2 * float(law[total:].sum() - law[total] / 2)  # the mid-p-value: the sum moves in steps
        assert p == pytest.approx(min(1.0, tail), rel=0.05), total


def uniform(count, draws, columns):
    return torch.randint(draws + 1, (count, columns))


@pytest.mark.parametrize(("count", "draws"), [(20, 9), (100, 19), (200, 199)])
def test_uniform_ranks_fail_as_seldom_as_they_should(count, draws, seed):
    rounds = 2000
    found = bands.uniformity(uniform(count, draws, rounds), draws)
    for alpha in (0.05, 0.01, 1e-3):
        assert int((found.p <= alpha).sum()) <= at_most(alpha, rounds)
        for p in (found.band, found.mean, found.spread):
            assert int((p <= alpha).sum()) <= at_most(1.1 * alpha, rounds)
    assert_mean(found.lean, 0.0, std=1.0)
    assert_mean(found.width, 0.0, std=1.0)


def test_the_whole_verdict_gives_false_alarms_as_seldom_as_stated(seed):
    """1,000 calibrations of an exact posterior: correlated coordinates, log likelihood and log joint of each."""
    rounds, count, draws, alpha = 1000, 100, 19, 0.05
    many = rounds * count
    theta = torch.randn(many, 2, dtype=torch.float64)
    y = theta @ torch.tensor([1.0, 0.8], dtype=torch.float64) + 0.5 * torch.randn(many, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.8], dtype=torch.float64)
    covariance = torch.linalg.inv(torch.eye(2).double() + 4 * torch.outer(weights, weights))
    mean = 4 * y[:, None] * (covariance @ weights)
    both = torch.cat([theta[None], dist.MultivariateNormal(mean, covariance).sample((draws,))])
    likelihood = dist.Normal(both @ weights, 0.5).log_prob(y)
    prior = dist.Normal(0.0, 1.0).log_prob(both).sum(-1)
    values = torch.cat([both, likelihood[..., None], (likelihood + prior)[..., None]], -1)
    ranks = bands.ranks_of(values[0], values[1:]).reshape(rounds, count, 4)
    p = bands.uniformity(ranks.movedim(1, 0).reshape(count, -1), draws).p.reshape(rounds, 4)
    failed = torch.stack([bands.holm(row) for row in p]).amin(1) <= alpha
    assert int(failed.sum()) <= at_most(alpha, rounds)
    assert int(failed.sum()) > 5  # and not because nothing ever fails
    one = Calibration("", "", ("a", "b", "c", "d"), ranks[0], draws, alpha)
    assert one.passed == (not bool(failed[0]))


@pytest.mark.parametrize(
    ("count", "scale", "shift", "power"),
    [
        (200, 0.8, 0.0, 0.55),
        (200, 1.2, 0.0, 0.2),
        (200, 1.0, 0.3, 0.65),
        (500, 0.8, 0.0, 0.97),
        (500, 1.2, 0.0, 0.85),
        (500, 1.0, 0.3, 0.99),
    ],
)
def test_faults_are_noticed_as_often_as_stated(count, scale, shift, power, seed):
    rounds, draws = 600, 199
    truth = torch.randn(count, rounds)  # in posterior standard deviations about the posterior mean
    u = dist.Normal(0.0, 1.0).cdf((truth - shift) / scale)
    ranks = torch.binomial(torch.full_like(u, draws), u).long()
    missed = int((bands.uniformity(ranks, draws).p > 1e-3).sum())
    assert missed <= at_most(1 - power, rounds)


def test_ranks_that_are_off_by_one_are_noticed(seed):
    """Few draws make it a large error: the truth counted among them takes rank 0 away."""
    truth, draws = torch.randn(600, 1), torch.randn(9, 600, 1)
    right = bands.ranks_of(truth, draws)
    assert float(bands.uniformity(right, 9).p) > 1e-6
    wrong = (right + 1).clamp_max(9)
    assert float(bands.uniformity(wrong, 9).p) < 1e-6


def test_ties_are_settled_at_random(seed):
    """Exchangeable coins have uniform ranks; ranks without chance do not."""
    coins = torch.randint(2, (20, 4000))
    ranks = bands.ranks_of(coins[0], coins[1:])
    assert float(bands.uniformity(ranks[:, None], 19).p) > 1e-6
    below = (coins[1:] < coins[0]).sum(0)
    assert float(bands.uniformity(below[:, None], 19).p) < 1e-6


# --- dependent draws ----------------------------------------------------------------------------------------------------


def test_chains_are_thinned_until_they_are_worth_their_number(seed):
    options = {"data": FOUR, "replicates": 100, "draws": 39, "run": QUIET, "seed": seed}
    found = sbc(normal_mean, Closed(memory=0.9), alpha=1e-6, **options)
    assert found.passed, found
    assert found.short <= 5  # what chains are worth is estimated
    raw = sbc(normal_mean, Closed(memory=0.99, confesses=False), **options)
    assert "too narrow" in raw["mu"].verdict


def test_chains_that_never_get_there_are_confessed(seed):
    stuck = Closed(memory=0.9999)
    found = sbc(normal_mean, stuck, data=FOUR, replicates=20, draws=9, run=QUIET, seed=seed)
    assert found.short > 10
    assert f"in {found.short} of them draws were worth less than half" in found.summary


def test_thinning_takes_evenly_from_every_chain():
    drawn, need, enough = thinned(lambda n: {"z": torch.arange(n)}, ["z"], 10, 100, independent=True)
    assert enough
    assert need == pytest.approx(10)
    assert drawn["z"].tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


# --- what is simulated ----------------------------------------------------------------------------------------------------


def worlds_of(program, data, count, **kwargs):
    problem = Problem.of(program, data, **kwargs)
    return Worlds.drawn(problem, structure_of(problem), count)


def test_worlds_are_joint_draws_of_whole_data_sets(seed):
    regression = PROGRAMS["regression"]
    worlds = worlds_of(regression.program, regression.data, 10_000)
    covariates = regression.data["covariates"].double()
    assert worlds.parallel
    assert worlds.latents["w"].shape == (10_000, 2)
    assert worlds.observed["y"].shape == (10_000, 5)
    residual = worlds.observed["y"].double() - worlds.latents["w"].double() @ covariates.T
    assert_mean(residual, 0.0, std=0.5)
    assert_mean(worlds.latents["w"], 0.0, std=1.0)
    assert_mean(worlds.latents["w"].square(), 1.0)
    data = worlds.data(3)
    assert torch.equal(data["covariates"], regression.data["covariates"])
    assert torch.equal(data["y"], worlds.observed["y"][3])


def test_log_terms_are_those_of_the_program(seed):
    regression = PROGRAMS["regression"]
    worlds = worlds_of(regression.program, regression.data, 5)
    w = torch.randn(7, 2)
    terms = worlds.log_terms(2, {"w": w})
    likelihood = (
        dist.Normal(w @ regression.data["covariates"].T, 0.5).log_prob(worlds.observed["y"][2]).sum(-1)
    )
    assert torch.allclose(terms[LIKELIHOOD].float(), likelihood, atol=1e-3)
    prior = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    assert torch.allclose(terms[JOINT].float(), likelihood + prior, atol=1e-3)
    alone = Worlds(**{**vars(worlds), "parallel": False}).log_terms(2, {"w": w})
    assert torch.allclose(terms[JOINT], alone[JOINT], atol=1e-4)


def test_data_goes_back_the_way_it_came(seed):
    """Through an argument that the program observes by obs=, and with what is missing still missing."""

    def pyros_way(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu * y, 1.0), obs=x)

    data = {"x": torch.zeros(3), "y": torch.tensor([1.0, 2.0, 3.0])}
    worlds = worlds_of(pyros_way, data, 4)
    assert worlds.carried == {"x": "x"}
    assert torch.equal(worlds.data(1)["x"], worlds.observed["x"][1])
    assert torch.equal(worlds.data(1)["y"], data["y"])
    assert sbc(pyros_way, "exact", data=data, replicates=20, run=QUIET, alpha=1e-6).passed

    holes = {"x": torch.tensor([1.0, math.nan, 1.0])}
    worlds = worlds_of(normal_mean, holes, 4)
    assert worlds.observed["x"].isnan().tolist() == [[False, True, False]] * 4
    assert bool(worlds.log_terms(0, {"mu": torch.zeros(2)})[JOINT].isfinite().all())


def test_data_that_cannot_be_given_back_is_refused():
    def transformed(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x.log())

    with pytest.raises(DataError, match="computed from an argument"):
        sbc(transformed, "exact", data={"x": torch.ones(3) * 2}, run=QUIET)


def test_programs_that_learn_keep_what_they_have(seed):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, n):
            mu = pyro.sample("mu", dist.Normal(0.0, self.scale))
            with pyro.plate("data", n):
                pyro.sample("x", dist.Normal(mu, 1.0))

    program = Scaled()
    found = sbc(program, "exact", data=FOUR, replicates=20, run=QUIET, alpha=1e-6, seed=seed)
    assert found.passed
    assert "nothing to learn" in found.how
    assert program.scale.item() == 2.0
    wrong = sbc(program, Closed(prior=0.2), data=FOUR, replicates=60, run=QUIET, seed=seed)
    assert not wrong.passed


# --- how posteriors are had ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Together(Closed):
    """Answers for all data sets in one batch."""

    def posteriors(self, problem, structure, run, data, n):
        x = data["x"]
        precision = 1.0 + x.shape[1]
        return list((x.sum(1) / precision)[:, None] + precision**-0.5 * torch.randn(len(x), n))

    def fit(self, problem, structure, run):
        raise AssertionError("not one by one")


def test_a_backend_may_fit_many_data_sets_together(seed):
    class Mapped(Together):
        def posteriors(self, *args):
            return [{"mu": draws} for draws in super().posteriors(*args)]

    found = sbc(normal_mean, Mapped(), data=FOUR, run=QUIET, alpha=1e-6, seed=seed)
    assert found.passed
    assert found.how == "fitted together"

    class Unwilling(Closed):
        def posteriors(self, *args):
            return None

    alone = sbc(normal_mean, Unwilling(), data=FOUR, replicates=20, run=QUIET)
    assert alone.how != "fitted together"
    with pytest.raises(AssertionError, match="one by one"):
        sbc(normal_mean, Mapped(), data=FOUR, run=QUIET, refit=True)


@pytest.mark.parametrize("name", ["gaussian-mean", "beta-bernoulli", "mixture"])
def test_the_exact_backend_is_calibrated(name, seed):
    """As far as 30 data sets tell; a false alarm in 10^6 runs."""
    reference = PROGRAMS[name]
    found = sbc(
        reference.program, "exact", data=reference.data, replicates=30, run=QUIET, alpha=1e-6, seed=seed
    )
    assert found.passed, found


def test_an_amortized_guide_is_asked_about_all_data_sets(seed):
    """One guide of one linear-Gaussian latent per row is exact when trained; untrained, it is not calibrated."""
    reference = PROGRAMS["linear-gaussian"]
    data = {"x": 3.0 * torch.randn(200)}
    backend = pgen.backend("variational", guide="amortized")
    trained = pgen.fit(reference.program, data, backend, run=pgen.Run(steps=400, lr=0.03, progress=False))
    options = {"data": {"x": torch.zeros(3)}, "replicates": 40, "run": QUIET, "seed": seed}
    found = sbc(reference.program, trained, **options)
    assert found.passed, found
    raw = pgen.fit(reference.program, data, backend, run=pgen.Run(steps=0, progress=False))
    assert not sbc(reference.program, raw, **options).passed


def test_results_repeat_and_state_is_left_alone(seed):
    before = torch.get_rng_state()
    runs = [sbc(normal_mean, Closed(), data=FOUR, replicates=20, run=QUIET, seed=s).ranks for s in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# --- what is reported --------------------------------------------------------------------------------------------------------


def test_coverage_counts_the_truths_inside():
    """Ranks 0 to 19 once each: the interval between draws k and L - k + 1 holds L + 1 - 2 k of them."""
    ranks = torch.arange(20)[:, None]
    found = Calibration("p", "b", ("mu",), ranks, 19, 0.01).coverage([0.5, 0.9])
    assert [(r.level, r.nominal, r.empirical) for r in found] == [(0.5, 0.5, 0.5), (0.9, 0.9, 0.9)]
    assert found.passed
    low, high = found.rows[1].low, found.rows[1].high
    assert (low, high) == pytest.approx((0.68302, 0.98765), abs=1e-4)  # Clopper and Pearson for 18 of 20
    narrow = Calibration("p", "b", ("mu",), torch.tensor([[0], [19]] * 10), 19, 0.01).coverage([0.5])
    assert not narrow.passed
    assert narrow.rows[0].empirical == 0.0
    assert "0.000" in str(narrow)
    with pytest.raises(OptionError, match=r"0\.999.*draws="):
        Calibration("p", "b", ("mu",), ranks, 19, 0.01).coverage([0.999])


def test_coverage_of_a_program(seed):
    right = coverage(normal_mean, Closed(), data=FOUR, run=QUIET, alpha=1e-6, seed=seed)
    assert right.passed, right
    assert len(right) == 3 * 4
    wrong = coverage(normal_mean, Closed(scale=0.5), data=FOUR, levels=[0.8], run=QUIET, seed=seed)
    assert wrong.failures[0].quantity == "mu"
    assert wrong.failures[0].high < 0.8


def test_quantities_of_ones_own(seed):
    found = sbc(
        normal_mean,
        Closed(shift=0.5),
        data=FOUR,
        run=QUIET,
        seed=seed,
        quantities={
            "error": lambda draws, data: draws["mu"] - data["x"].mean(),
            "nothing": lambda d, _: 0 * d["mu"],
        },
    )
    assert "biased high" in found["error"].verdict
    assert found["nothing"].p > 1e-6


def test_of_many_scalars_some_are_looked_at(seed):
    reference = PROGRAMS["linear-gaussian"]
    found = sbc(
        reference.program, "exact", data={"x": torch.zeros(50)}, coordinates=3, replicates=20, run=QUIET
    )
    assert [row.quantity for row in found] == ["z[0]", "z[24]", "z[49]", LIKELIHOOD, JOINT]


def test_no_data_but_a_size():
    found = sbc(normal_mean, "exact", n=3, observed=["x"], replicates=20, run=QUIET)
    assert found.quantities == ("mu", LIKELIHOOD, JOINT)
    with pytest.raises(OptionError, match="no site"):
        sbc(normal_mean, "exact", n=3, observed=["y"], run=QUIET)
    with pytest.raises(DataError, match="no data here"):
        sbc(normal_mean, "exact", run=QUIET)


def test_the_picture(tmp_path, seed):
    found = sbc(normal_mean, Closed(scale=0.5), data=FOUR, run=QUIET, seed=seed)
    path = pictures.rank_ecdf(found, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="no quantity 'nu'"):
        pictures.rank_ecdf(found, path, quantities=["nu"])


def test_what_cannot_be_calibrated_is_refused():
    def factored(n):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("soft", -mu.square())
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(mu, 1.0))

    @dataclass(frozen=True)
    class Mute(Closed):
        def examine(self, structure):
            return Offer({Query.SAMPLE: Exactness.EXACT}, Rank.POSSIBLE, "no posterior")

    @dataclass(frozen=True)
    class Unwilling(Closed):
        def examine(self, structure):
            return Refusal("mu", "patience", "not today")

    def flat(n):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(mu, 1.0))

    with pytest.raises(ProgramError, match="factor 'soft'"):
        sbc(factored, Closed(), data=FOUR, run=QUIET)
    with pytest.raises(ProgramError, match="'mu'.*cannot be drawn"):
        sbc(flat, Closed(), data=FOUR, run=QUIET)
    with pytest.raises(Unanswerable, match="no posterior"):
        sbc(normal_mean, Mute(), data=FOUR, run=QUIET)
    with pytest.raises(Refused, match="not today"):
        sbc(normal_mean, Unwilling(), data=FOUR, run=QUIET)
    with pytest.raises(Diverged, match="'mu' are not numbers") as caught:
        sbc(normal_mean, Closed(broken=True), data=FOUR, run=QUIET)
    assert caught.value.__notes__ == ["in data set 0 of pgen.testing.sbc"]
    for options in ({"replicates": 5}, {"draws": 3}, {"alpha": 0.0}, {"refit": "no"}, {"coordinates": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            sbc(normal_mean, Closed(), data=FOUR, **options)


# --- the built-in backends, at length ----------------------------------------------------------------------------------------


def installed(name, **options):
    if name not in Registry.installed().backends:
        pytest.skip(f"backend {name!r} is not installed")
    return pgen.backend(name, **options)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("program", ["regression", "linear-gaussian", "mixture"])
@pytest.mark.parametrize("name", ["exact", "variational", "mcmc"])
def test_built_in_backends_are_calibrated(name, program, seed):
    """Three programs whose posterior every one of them can have exactly; a false alarm in 10^4 runs."""
    reference = PROGRAMS[program]
    guides = {"regression": "full-rank", "linear-gaussian": "mean-field", "mixture": "auto"}
    options = {"guide": guides[program]} if name == "variational" else {}
    run = pgen.Run(steps=400, lr=0.05, progress=False) if name == "variational" else QUIET
    backend = installed(name, **options)
    found = sbc(
        reference.program, backend, data=reference.data, replicates=60, run=run, alpha=1e-4, seed=seed
    )
    assert found.passed, found
    assert found.coverage().passed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_biased_kernel_fails(seed):
    """Langevin on the square of the density: posterior standard deviations too small by a factor of 0.7."""
    langevin = pytest.importorskip("pgen.algorithms.kernels.langevin")

    @dataclass(frozen=True)
    class Sharpened:
        inner: object = langevin.MALA()

        def init(self, position, target):
            return self.inner.init(position, squared(target))

        def step(self, state, tuning, target):
            return self.inner.step(state, tuning, squared(target))

    def squared(target):
        def twice(position):
            density, gradient = target(position)
            return 2 * density, 2 * gradient

        return twice

    reference = PROGRAMS["regression"]
    options = {"data": reference.data, "replicates": 500, "run": QUIET, "seed": seed}
    backend = installed("mcmc", kernel=Sharpened(), chains=32, draws=100)
    found = sbc(reference.program, backend, **options)
    for quantity in ("w[0]", "w[1]"):
        assert "too narrow" in found[quantity].verdict, found
    assert not found.coverage([0.8]).passed
    right = installed("mcmc", kernel=langevin.MALA(), chains=32, draws=100)
    assert sbc(reference.program, right, alpha=1e-4, **options).passed
