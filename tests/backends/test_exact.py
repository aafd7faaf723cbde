"""The exact backend: conformance, learning, any evidence, and refusals that name a site."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pgen.backends.exact import Exact
from pgen.backends.exact.mode import At
from pgen.capability import Offer, Query
from pgen.errors import DataError, OptionError, Refused
from pgen.fitting import fit
from pgen.inspection import structure_of
from pgen.run import Run
from pgen.testing import conformance

QUIET = Run(progress=False)
WEIGHTS = torch.tensor([0.2, 0.3, 0.5])
MEANS = torch.tensor([-1.0, 0.5, 2.0])
X = torch.tensor([0.3, -1.2, 2.0])

test_the_most_probable_values_conform = conformance(Exact(estimate="map"))


def mixture(n):
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[k], 1.0))


# --- learning --------------------------------------------------------------------------------------------


def test_fully_observed_programs_reach_their_maximum_likelihood():
    data = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def coin(n):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", n):
            pyro.sample("x", dist.Bernoulli(p))

    fitted = fit(coin, {"x": data}, Exact(), run=Run(steps=400, lr=0.05, progress=False))
    best = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert float(fitted.log_prob().value.mean()) == pytest.approx(best, abs=1e-4)
    assert Query.POSTERIOR not in fitted.offer.answers


def test_the_gradient_is_that_of_the_evidence():
    """One step of plain gradient descent on a mixture moves by the gradient of its closed form."""
    start = torch.tensor([0.0, 0.5, 1.0])

    def program(n):
        means = pyro.param("means", start.clone())
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(means[k], 1.0))

    run = Run(steps=1, optimizer="sgd", lr=1.0, clip_norm=None, progress=False)
    fitted = fit(program, {"x": X}, Exact(), run=run)
    means = start.clone().requires_grad_()
    (WEIGHTS.log() + dist.Normal(means, 1.0).log_prob(X[:, None])).logsumexp(-1).mean().backward()
    torch.testing.assert_close(fitted.parameters["means"], start + means.grad)


def test_the_most_probable_values_are_the_mode():
    def program(n):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mu + k, rate.rsqrt()))

    fitted = fit(program, {"x": X}, Exact(estimate="map"), run=QUIET)
    assert set(fitted.offer.answers) == {Query.SAMPLE}
    assert fitted.sample(4)["x"].shape == (4,)

    def density(mu: Tensor, rate: Tensor) -> Tensor:
        each = torch.stack([dist.Normal(mu + k, rate.rsqrt()).log_prob(X) for k in (0.0, 1.0)])
        prior = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Gamma(3.0, 2.0).log_prob(rate)
        return prior + (each.logsumexp(0) - math.log(2)).sum()

    mu, rate = (fitted.parameters[name].clone().requires_grad_() for name in ("mu", "rate"))
    slopes = torch.autograd.grad(density(mu, rate), (mu, rate))
    assert all(abs(float(slope)) < 2e-3 for slope in slopes)


# --- any evidence ----------------------------------------------------------------------------------------


def test_sites_that_no_evidence_bears_upon_are_predicted():
    fitted = fit(mixture, None, Exact(), run=QUIET)
    torch.testing.assert_close(fitted.marginals()["k"].probs.flatten(), WEIGHTS)
    draws = fitted.posterior({"k": torch.tensor([0, 2])}, n=10_000, seed=3)["x"]
    error = 5.5 / math.sqrt(10_000)  # of a mean with unit standard deviation: two-sided 4e-8 each
    assert (draws.mean(0) - MEANS[[0, 2]]).abs().max() < error
    assert float(fitted.log_prob({"k": torch.tensor([0, 2])}).value.sum()) == pytest.approx(
        math.log(0.1), abs=1e-5
    )


def test_what_is_impossible_has_no_posterior():
    def program():
        a = pyro.sample("a", dist.Categorical(logits=torch.tensor([0.0, 0.0])))
        table = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
        pyro.sample("b", dist.Categorical(logits=table[a]))

    fitted = fit(program, None, Exact(), run=QUIET)
    evidence = {"b": torch.tensor(2)}
    assert fitted.log_prob(evidence).value == -math.inf
    with pytest.raises(DataError, match="have probability zero"):
        fitted.marginals(evidence)


# --- refusals --------------------------------------------------------------------------------------------


def neural(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.tanh(z), 0.1))


def not_conjugate(n):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Bernoulli(p**2))


def logistic(n):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Bernoulli(logits=w))


def both(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(mu * k, 1.0))


def heavy(n):
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(0.0, s))


def branching(n):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    loc = 1.0 if k > 0 else -1.0
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(loc, 1.0))


def coupled(n):
    with pyro.plate("rows", 12, dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.5))
    with pyro.plate("columns", 9, dim=-2):
        b = pyro.sample("b", dist.Bernoulli(0.5))
    with pyro.plate("rows", 12, dim=-1), pyro.plate("columns", 9, dim=-2):
        pyro.sample("x", dist.Normal(a * b, 1.0), obs=torch.zeros(9, 12))


def undeclared(n):
    k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(3)))
    pyro.sample("x", dist.Normal(k.sum(), 1.0))


REFUSED = {
    "logistic": (logistic, "x", "a Gaussian law"),
    "mixed": (both, "mu", "a finite support"),
    "heavy": (heavy, "s", "a law that can be integrated"),
    "branching": (branching, "k", "uses that stay in torch"),
    "coupled": (coupled, "a", "a sum of bearable size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_site_and_what_it_lacks(case):
    program, site, missing = REFUSED[case]
    data = None if program is coupled else {"x": X.round().clamp(0, 1)}
    kwargs = {"n": 3} if program is coupled else None
    answer = Exact().examine(structure_of(program, data, kwargs=kwargs))
    assert not isinstance(answer, Offer)
    assert (answer.site, answer.missing) == (site, missing)


@pytest.mark.parametrize(
    ("program", "site", "missing"),
    [
        (neural, "z", "linear use"),
        (not_conjugate, "p", "a conjugate likelihood"),
        (undeclared, "k", "a plate around its batch dimensions"),
    ],
)
def test_what_only_looks_exact_is_refused_by_the_numbers(program, site, missing):
    data = {"x": torch.tensor(1.0) if program is undeclared else X.round().clamp(0, 1)}
    with pytest.raises(Refused) as caught:
        fit(program, data, Exact(), run=QUIET, kwargs={"n": 3} if program is undeclared else None)
    assert (caught.value.refusal.site, caught.value.refusal.missing) == (site, missing)


def test_a_program_that_indexes_lists_is_refused_with_its_line():
    def program():
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal([0.0, 1.0, 2.0][z], 1.0), obs=torch.tensor(1.0))

    answer = Exact().examine(structure_of(program))
    assert answer.site == "z"
    assert "test_exact.py:" in answer.why


@pytest.mark.parametrize("options", [{"estimate": "mean"}, {"max_table": 0}])
def test_options_are_checked(options):
    with pytest.raises(OptionError, match=f"Exact\\({next(iter(options))}="):
        Exact(**options)


def test_points_are_set_in_free_coordinates():
    with At({"rate": torch.tensor(0.0)}):
        assert pyro.sample("rate", dist.Gamma(1.0, 1.0)) == 1.0
