"""Straight lines tell linear programs from bent ones; values stand in where nobody can draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 0.3], [2.0, 1.0]])


def linear(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T + 1.0, 0.7).to_event(1))


def network(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z @ WEIGHT.T).tanh(), 0.7).to_event(1))


def scaled(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(3), z[..., :1].exp()).to_event(1))


def kinked(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z @ WEIGHT.T).relu(), 0.7).to_event(1))


def chain(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(0.9 * mu, 0.1))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + torch.zeros(3), 1e-2).to_event(1))


@pytest.mark.parametrize(
    ("program", "bent"), [(linear, ()), (chain, ()), (network, ("x",)), (scaled, ("x",)), (kinked, ("x",))]
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_sites_that_bend_are_named(program, bent, scale):
    assert pgen.structure_of(program, {"x": scale * torch.randn(20, 3)}).bent == bent


def test_a_network_is_refused_and_a_matrix_is_not():
    data = {"x": torch.randn(20, 3)}
    refused = pgen.explain(network, data)["exact"]
    assert not refused.offered
    assert (refused.answer.site, refused.answer.missing) == ("z", "linear use")
    assert pgen.explain(linear, data)["exact"].offered
    assert pgen.fit(linear, data).backend.name == "exact"


def improper(n):
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(mu, 2.0))


def test_a_flat_prior_is_fitted_and_says_that_nothing_is_normalised():
    x = torch.randn(200) + 3.0
    fitted = pgen.fit(improper, {"x": x}, "variational", run=pgen.Run(steps=600, lr=0.05, progress=False))
    assert pgen.Query.SAMPLE not in fitted.offer.answers
    assert fitted.log_prob(seed=0).kind == "unnormalized"
    marginal = fitted.marginals(seed=0)["mu"]
    assert float(marginal.mean) == pytest.approx(
        float(x.mean()), abs=0.02
    )  # the posterior is N(mean, 2 / sqrt(200))
    assert float(marginal.variance) ** 0.5 == pytest.approx(2.0 / 200**0.5, rel=0.1)
