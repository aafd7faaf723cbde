"""Draws agree with reference posteriors: means, standard deviations and quantiles, for every kind of kernel.

What is allowed is in `tests.posteriors.row`: a tenth of a standard deviation, a tenth of its size, and 4 standard errors
for the chance in the draws. A sampler that hardly moves has wide standard errors, so that effective draws are asked for,
too: at `ENOUGH` a mean may be off by 0.3 standard deviations at most. Where standard errors are known a right sampler fails
a coordinate with probability below 1e-4, and far below it where effective draws are many.
"""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest

import pgen
from tests import posteriors
from tests.posteriors import DATABASE, STAND_INS, Reference, compared, complaints

QUICK = (
    "eight_schools_noncentered",
    "kidscore_momiq",
    "garch11",
    "earnings",
    "surgical",
    "switching",
    "arma",
    "years",
    "roaches",
)
"""Those of the default suite: a funnel made easy, a flat prior, a support that moves, strong correlation, deterministic
sites, two modes, a series, predictors far from zero, a centred hierarchy. Everything else, and the other kernels, under
`make slow`."""

ENOUGH = 400
"""Effective draws of every coordinate that a default fit must give."""

FEW = {
    "meads": {"horseshoe", "eight_schools_centered", "accel", "switching"},
}
"""Where a kernel is known to be slow: funnels, and modes far apart. Half of `ENOUGH` will do there."""


def posterior(name):
    """The posterior, or a skip where posteriordb is not there."""
    try:
        return posteriors.posterior(name)
    except posteriors.NoData as error:
        pytest.skip(str(error))


def draws_of(program, arguments, seed, **options):
    """Draws `[chains, draws, ...]` of every latent and deterministic site, in double precision."""
    backend = pgen.backend("mcmc", **options)
    run = pgen.Run(progress=False, precision="float64")
    fitted = pgen.fit(program, None, backend, kwargs=arguments, run=run, seed=seed)
    tree = fitted.draws().to_arviz()
    return {k: v.values for k, v in tree["posterior"].data_vars.items()}


def check(name, seed, least, **options):
    """Fit and compare; every coordinate must have at least so many effective draws."""
    target = posterior(name)
    found = draws_of(target.program, target.arguments, seed, **options)
    wrong = complaints(compared(found, target.references), least)
    assert not wrong, "\n".join([name, *wrong])


@pytest.mark.parametrize("name", QUICK)
def test_draws_agree_with_the_reference(name, seed):
    check(name, seed, 600, kernel="chees", chains=64, draws=100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", ["chees", "nuts", "meads"])
@pytest.mark.parametrize("name", [*DATABASE, *STAND_INS])
def test_every_kernel_agrees_with_the_reference(name, kernel, seed):
    check(name, seed, ENOUGH // 2 if name in FEW.get(kernel, ()) else ENOUGH, kernel=kernel)


# --- the check itself --------------------------------------------------------------------------------------


def gamma(size, seed, shift=0.0, scale=1.0):
    """Independent draws `[4, size / 4]` of a skewed law of mean 3 and sd 1, or off by so much."""
    x = np.random.default_rng(seed).gamma(9.0, 1 / 3, size)
    return {"x": (3 + shift + scale * (x - 3)).reshape(4, -1)}


def gamma_reference():
    """Of 10,000 draws, as posteriordb has."""
    x = np.random.default_rng(0).gamma(9.0, 1 / 3, 10_000)
    quantiles = {q: float(np.quantile(x, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return {"x": Reference(float(x.mean()), float(x.std()), 10_000, 3 + 6 / 9, quantiles)}


def test_right_draws_pass(seed):
    assert not complaints(compared(gamma(4000, seed), gamma_reference()))


@pytest.mark.parametrize("error", [{"shift": 0.3}, {"shift": -0.3}, {"scale": 1.2}, {"scale": 0.8}])
def test_draws_that_are_off_fail(error, seed):
    assert complaints(compared(gamma(4000, seed, **error), gamma_reference()))


def test_right_moments_of_another_shape_fail(seed):
    x = np.random.default_rng(seed).normal(3.0, 1.0, (4, 5000))
    skewed = gamma_reference()["x"]
    far = Reference(skewed.mean, skewed.sd, skewed.size, 3.0, {0.05: 3 - 1.2, 0.95: 3 + 2.2})
    (only,) = compared({"x": x}, {"x": far})
    assert only.quantile > 1
    assert max(only.mean, only.sd) < 1


def test_stuck_chains_fail(seed):
    x = gamma(4000, seed)["x"]
    assert complaints(compared({"x": np.repeat(x[:, :20], 50, axis=1)}, gamma_reference()), 1000)


def test_infinite_draws_fail():
    x = np.full((4, 1000), np.nan)
    assert complaints(compared({"x": x}, gamma_reference()))


def test_a_wrong_prior_fails(seed):
    """What the check is for: eight schools with a scale of one is not eight schools."""
    target = posterior("eight_schools_noncentered")

    def narrow(J, y, sigma):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("schools", J):
            theta = pyro.deterministic("theta", mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0)))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    found = draws_of(narrow, target.arguments, seed, kernel="chees", chains=64, draws=100)
    rows = compared(found, target.references)
    assert [r.worst > 1 for r in rows if r.name == "tau"] == [True]


@pytest.mark.parametrize("name", STAND_INS)
def test_references_are_complete(name):
    stored = json.loads((posteriors.STORED / f"{name}.json").read_text())
    assert stored["max_rhat"] < 1.005
    assert stored["min_ess"] > 3000
    for row in stored["parameters"].values():
        assert row["sd"] > 0
        assert row["q05"] < row["q25"] < row["q50"] < row["q75"] < row["q95"]
