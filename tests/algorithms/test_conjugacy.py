"""Conjugate answers from a log likelihood alone, against textbook updates in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import distributions as d

from pgen.algorithms.conjugacy import FAMILIES, NotConjugate, prove, update

K = torch.tensor


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


COUNTS, HITS, REALS = double(3, 0, 7), double(1, 0, 1, 1), double(0.3, -1.2, 2.0)
CASES = {
    "beta, Bernoulli": (d.Beta(one(2.0), one(3.0)), lambda z: d.Bernoulli(z).log_prob(HITS), (5.0, 4.0)),
    "beta, logits": (
        d.Beta(one(2.0), one(3.0)),
        lambda z: d.Bernoulli(logits=z.log() - torch.log1p(-z)).log_prob(HITS),
        (5.0, 4.0),
    ),
    "beta, geometric": (d.Beta(one(1.0), one(1.0)), lambda z: d.Geometric(z).log_prob(COUNTS), (4.0, 11.0)),
    "beta, negative binomial": (
        d.Beta(one(1.0), one(1.0)),
        lambda z: d.NegativeBinomial(one(4.0), z).log_prob(COUNTS),
        (11.0, 13.0),
    ),
    "gamma, Poisson": (d.Gamma(one(2.0), one(0.5)), lambda z: d.Poisson(z * 3).log_prob(COUNTS), (12.0, 9.5)),
    "exponential, exponential": (
        d.Exponential(one(2.0)),
        lambda z: d.Exponential(z).log_prob(COUNTS),
        (4.0, 12.0),
    ),
    "gamma, precision": (
        d.Gamma(one(2.0), one(0.5)),
        lambda z: d.Normal(one(0.1), z.rsqrt()).log_prob(REALS),
        (3.5, 0.5 + float((REALS - 0.1).square().sum()) / 2),
    ),
    "inverse gamma, variance": (
        d.InverseGamma(one(2.0), one(0.5)),
        lambda z: d.Normal(one(0.1), z.sqrt()).log_prob(REALS),
        (3.5, 0.5 + float((REALS - 0.1).square().sum()) / 2),
    ),
    "normal, normal": (
        d.Normal(one(1.0), one(2.0)),
        lambda z: d.Normal(z, one(1.0)).log_prob(REALS),
        ((0.25 + float(REALS.sum())) / 3.25, 3.25**-0.5),
    ),
    "log-normal, log-normal": (
        d.LogNormal(one(1.0), one(2.0)),
        lambda z: d.LogNormal(z.log(), one(1.0)).log_prob(REALS.exp()),
        ((0.25 + float(REALS.sum())) / 3.25, 3.25**-0.5),
    ),
}


def evidence_by_quadrature(prior: d.Distribution, log_likelihood) -> Tensor:
    """Trapezoidal rule in an unconstrained coordinate, where these integrands fall off fast."""
    transform = d.transform_to(prior.support)
    u = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    z = transform(u)
    z = z.clamp(1e-300, 1 - 1e-15) if isinstance(prior, d.Beta) else z
    jacobian = transform.log_abs_det_jacobian(u, z)
    log_terms = torch.stack([log_likelihood(v).sum() for v in z[::10]])
    return (log_terms + prior.log_prob(z[::10]) + jacobian[::10]).logsumexp(0) + torch.log(one(0.01))


@pytest.mark.parametrize("case", CASES)
def test_scalar_updates_equal_the_textbook(case: str) -> None:
    prior, log_likelihood, expected = CASES[case]
    found = update(log_likelihood, FAMILIES[type(prior).__name__], prior)
    prove(log_likelihood, found, prior)
    torch.testing.assert_close(torch.stack(list(found.parameters.values())), double(*expected))
    evidence = found.likelihood.sum() + found.correction
    torch.testing.assert_close(evidence, evidence_by_quadrature(prior, log_likelihood), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["categorical", "multinomial"])
def test_dirichlet_updates_equal_the_textbook(likelihood: str) -> None:
    alpha, counts = double(0.5, 1.0, 2.0, 4.0), double(3, 0, 1, 2)
    prior = d.Dirichlet(alpha)

    def log_likelihood(z: Tensor) -> Tensor:
        if likelihood == "multinomial":
            return d.Multinomial(6, z).log_prob(counts)
        return d.Categorical(z).log_prob(torch.repeat_interleave(torch.arange(4), counts.long()))

    found = update(log_likelihood, FAMILIES["Dirichlet"], prior)
    prove(log_likelihood, found, prior)
    torch.testing.assert_close(found.parameters["concentration"], alpha + counts)
    exact = torch.lgamma(alpha + counts).sum() - torch.lgamma(alpha).sum()
    exact = exact + torch.lgamma(alpha.sum()) - torch.lgamma((alpha + counts).sum())
    if likelihood == "multinomial":
        exact = exact + torch.lgamma(one(7.0)) - torch.lgamma(counts + 1).sum()
    torch.testing.assert_close(found.likelihood.sum() + found.correction, exact)


def test_elements_of_a_batch_are_told_apart_though_only_their_total_is_seen() -> None:
    prior = d.Beta(double(1.0, 2.0, 3.0), double(1.0, 1.0, 1.0))
    which, hits = torch.tensor([0, 1, 1, 2, 0, 2, 2]), double(1, 0, 1, 1, 1, 0, 0)

    def log_likelihood(z: Tensor) -> Tensor:
        return d.Bernoulli(z[which]).log_prob(hits).sum()

    found = update(log_likelihood, FAMILIES["Beta"], prior)
    prove(log_likelihood, found, prior)
    torch.testing.assert_close(found.parameters["concentration1"], double(3.0, 3.0, 4.0))
    torch.testing.assert_close(found.parameters["concentration0"], double(1.0, 2.0, 3.0))


def test_gradients_reach_the_parameters_of_the_prior() -> None:
    rate = one(0.7).requires_grad_()
    prior = d.Gamma(one(2.0), rate)
    found = update(lambda z: d.Poisson(z).log_prob(COUNTS), FAMILIES["Gamma"], prior)
    ours = torch.autograd.grad(found.likelihood.sum() + found.correction, rate)[0]
    # log p(x) = 2 log rate - 12 log(rate + 3) + constant
    torch.testing.assert_close(ours, 2 / rate.detach() - 12 / (rate.detach() + 3))


@pytest.mark.parametrize(
    ("prior", "log_likelihood"),
    [
        (d.Beta(one(2.0), one(3.0)), lambda z: d.Normal(z, one(1.0)).log_prob(REALS)),
        (d.Gamma(one(2.0), one(3.0)), lambda z: d.Poisson(z + 0.01).log_prob(COUNTS)),
        (d.Gamma(one(2.0), one(3.0)), lambda z: d.Gamma(z, one(1.0)).log_prob(COUNTS + 1)),
        (d.Normal(one(0.0), one(1.0)), lambda z: d.StudentT(one(50.0), z).log_prob(REALS)),
        (d.Beta(double(2.0, 2.0), double(3.0, 1.0)), lambda z: d.Bernoulli(z.prod()).log_prob(HITS)),
        (d.Dirichlet(double(1.0, 1.0, 1.0)), lambda z: d.Categorical(z.square()).log_prob(K([0, 1])) + z[0]),
    ],
)
def test_what_is_not_conjugate_is_refused(prior: d.Distribution, log_likelihood) -> None:
    def attempt() -> None:
        found = update(log_likelihood, FAMILIES[type(prior).__name__], prior)
        prove(log_likelihood, found, prior)

    with pytest.raises(NotConjugate):
        attempt()


BENT = {
    "step of a probability": (
        d.Beta(one(1.0), one(1.0)),
        lambda z: d.Bernoulli(bent(z, 0.7, 0.9, 0.1)).log_prob(HITS),
    ),
    "probability with a ceiling": (
        d.Beta(one(2.0), one(3.0)),
        lambda z: d.Bernoulli(z.clamp(max=0.65)).log_prob(HITS),
    ),
    "probability with floor and ceiling": (
        d.Beta(one(2.0), one(3.0)),
        lambda z: d.Bernoulli(z.clamp(0.1, 0.9)).log_prob(HITS),
    ),
    "step of a rate": (
        d.Gamma(one(2.0), one(0.5)),
        lambda z: d.Poisson(bent(z, 8.0, 20.0, 1.0)).log_prob(COUNTS),
    ),
    "rate with a ceiling": (
        d.Gamma(one(2.0), one(1.0)),
        lambda z: d.Poisson(z.clamp(max=4)).log_prob(double(1, 2, 0)),
    ),
    "step of a location": (
        d.LogNormal(one(0.0), one(1.0)),
        lambda z: d.Normal(bent(z, 3.0, 5.0, 0.0), one(1.0)).log_prob(REALS),
    ),
    "one component of a vector": (
        d.Dirichlet(double(1, 1, 1)),
        lambda z: d.Categorical(torch.where(z > 0.75, 3 * z, z)).log_prob(K([0, 1, 0, 2])),
    ),
    "step in one of many rows": (
        d.Beta(torch.ones(4).double(), torch.ones(4).double()),
        lambda z: d.Binomial(10, bent(z, 0.7, 0.9, 0.1)).log_prob(double(1, 9, 3, 4)),
    ),
    "a step that costs nothing below": (
        d.Gamma(one(2.0), one(1.0)),
        lambda z: d.Poisson(z).log_prob(COUNTS) + bent(z, 12.0, 3.0, 0.0),
    ),
}


def bent(z: Tensor, edge: float, above: float, below: float) -> Tensor:
    return torch.where(z > edge, one(above), one(below))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", BENT)
def test_what_is_conjugate_in_a_part_of_the_support_only_is_refused(case: str, seed: int) -> None:
    prior, log_likelihood = BENT[case]
    torch.manual_seed(seed)
    with torch.no_grad():
        found = update(log_likelihood, FAMILIES[type(prior).__name__], prior)
    with pytest.raises(NotConjugate):
        prove(log_likelihood, found, prior)


@pytest.mark.parametrize("concentration", [0.01, 0.3, 1.0, 1e3])
def test_the_proof_outlasts_round_off_in_the_tails(concentration: float) -> None:
    a, few = one(concentration), double(0, 0, 0)
    nine, lopsided = torch.full((9,), concentration).double(), torch.repeat_interleave(K([0, 4]), 50)
    for prior, log_likelihood in (
        (d.Beta(a, a), lambda z: d.Bernoulli(z).log_prob(few)),
        (d.Beta(a, one(1.0)), lambda z: d.Geometric(z).log_prob(COUNTS)),
        (d.Gamma(a, one(1e-3)), lambda z: d.Poisson(z * 3).log_prob(few)),
        (d.Gamma(a, one(1e3)), lambda z: d.Normal(one(0.1), z.rsqrt()).log_prob(REALS)),
        (d.InverseGamma(a, one(1.0)), lambda z: d.Normal(one(0.1), z.sqrt()).log_prob(REALS)),
        (
            d.LogNormal(one(0.0), a.clamp(max=30)),
            lambda z: d.LogNormal(z.log(), one(1.0)).log_prob(REALS.exp()),
        ),
        (d.Dirichlet(nine), lambda z: d.Categorical(z).log_prob(lopsided)),
    ):
        found = update(log_likelihood, FAMILIES[type(prior).__name__], prior)
        prove(log_likelihood, found, prior)


def test_the_proof_leaves_the_generator_as_a_few_draws_do() -> None:
    prior, log_likelihood, _ = CASES["gamma, Poisson"]
    found = update(log_likelihood, FAMILIES["Gamma"], prior)
    torch.manual_seed(0)
    for source in (prior, found.posterior, found.posterior):
        source.sample()
    after = torch.rand(())
    torch.manual_seed(0)
    prove(log_likelihood, found, prior)
    assert torch.rand(()) == after


def test_single_precision_is_proved_to_its_own_accuracy() -> None:
    prior = d.Dirichlet(torch.ones(20))
    data = torch.randint(20, (500,))
    found = update(lambda z: d.Categorical(z).log_prob(data), FAMILIES["Dirichlet"], prior)
    prove(lambda z: d.Categorical(z).log_prob(data), found, prior)
    counts = torch.bincount(data, minlength=20).float()
    torch.testing.assert_close(found.parameters["concentration"], 1 + counts, rtol=1e-4, atol=1e-3)
