"""Chains that begin where another fit says: at draws of an energy that it observed, those that suit the data."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.distributions import Energy
from pgen.errors import OptionError, Refused
from pgen.testing.statistics import StatisticalFailure, assert_mean

QUIET = pgen.Run(progress=False)
CENTRES = torch.tensor([[-6.0, 0.0], [6.0, 3.0], [0.0, -6.0]])


def apart(x):
    """Three hills that no chain walks between."""
    return -torch.logsumexp(-(x.unsqueeze(-2) - CENTRES).square().sum(-1) / 0.5, -1)


def labels(x):
    """All but certain on a hill, and flat beside it: no slope leads from one to another."""
    return -5 * (x.unsqueeze(-2) - CENTRES).square().sum(-1).clamp(max=4.0)


def labelled(n):
    with pyro.plate("data", n):
        x = pyro.sample("x", Energy(apart, (2,), base=dist.Normal(torch.zeros(2), 6.0).to_event(1)))
        pyro.sample("y", dist.Categorical(logits=labels(x)))


def single():
    x = pyro.sample("x", Energy(apart, (2,), base=dist.Normal(torch.zeros(2), 6.0).to_event(1)))
    pyro.sample("y", dist.Categorical(logits=labels(x)))


def means(y):
    """exp(-|x - c|^2 / 0.5) under N(0, 36): precision 4 + 1/36 around 4 c / (4 + 1/36); the label is all but certain."""
    return CENTRES[y] * 4 / (4 + 1 / 36)


def test_values_given_their_labels_begin_in_the_right_modes():
    x = CENTRES[torch.arange(30) % 3] + 0.5 * torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    fitted = pgen.fit(labelled, {"x": x, "y": torch.arange(30) % 3}, "exact")
    asked = {"y": torch.tensor([0, 2, 1, 1])}
    with pytest.raises(Refused, match=r"fit\(fitted.program, data, 'mcmc'\)"):
        fitted.posterior(asked)
    plain, begun = (
        pgen.fit(
            fitted.program, asked, pgen.backend("mcmc", chains=20, warmup=100, draws=100, **how), run=QUIET
        )
        for how in ({}, {"init": fitted})
    )
    drawn = begun.posterior(n=1000, seed=0)["x"]
    assert_mean(drawn, means(asked["y"]), std=torch.tensor(0.5), slack=0.05)
    assert float((drawn - means(asked["y"])).norm(dim=-1).max()) < 4  # in no other mode
    assert float((plain.posterior(n=1000, seed=0)["x"] - means(asked["y"])).norm(dim=-1).max()) > 4


def test_a_value_without_rows_begins_in_the_right_mode():
    fitted = pgen.fit(single, {"x": CENTRES[0], "y": torch.tensor(0)}, "exact")
    backend = pgen.backend("mcmc", chains=20, warmup=100, draws=100, init=fitted)
    drawn = pgen.fit(single, {"y": torch.tensor(2)}, backend, run=QUIET).posterior(n=1000, seed=0)["x"]
    assert_mean(drawn, means(torch.tensor(2)), std=torch.full((2,), 0.5), slack=0.05)
    with pytest.raises(StatisticalFailure):
        assert_mean(drawn, means(torch.tensor(1)), std=torch.full((2,), 0.5), slack=0.05)


def test_a_fit_that_does_not_draw_the_latents_is_named():
    def other(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def more(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x.sum(-1) + z.exp(), 1.0))

    fitted = pgen.fit(other, {"x": torch.zeros(4, 3)}, "exact")
    backend = pgen.backend("mcmc", init=fitted)
    with pytest.raises(OptionError, match="without a site 'z'"):
        pgen.fit(more, {"y": torch.zeros(4)}, backend, run=QUIET)
    with pytest.raises(OptionError, match=r"draws 'x' with shape \(4, 3\); expected \(4, 2\)"):
        pgen.fit(labelled, {"y": torch.zeros(4, dtype=torch.long)}, backend, run=QUIET)
