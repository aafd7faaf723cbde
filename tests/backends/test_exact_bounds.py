"""Sites that have a bound in the place of a log probability: what is offered, and that it holds."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.distributions import Quantized

LEVELS = 5
LOC = torch.tensor([1.0, 3.5])


def law(loc, particles=1):
    return Quantized(dist.Normal(loc, 1.0), LEVELS, particles=particles)


def single(n):
    with pyro.plate("data", n):
        pyro.sample("x", law(LOC[0]))


def mixture(n):
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", law(LOC[k]))


def mass(x, loc):
    """Exact mass of each cell under the normal law: what the bound is a bound on."""
    normal = dist.Normal(loc, 1.0)
    return (normal.cdf(x + 1.0) - normal.cdf(x.double())).log()


@pytest.mark.parametrize(
    ("program", "truth"),
    [
        (single, lambda x: mass(x, LOC[0])),
        (mixture, lambda x: torch.logsumexp(torch.tensor([0.3, 0.7]).log() + mass(x[:, None], LOC), -1)),
    ],
)
def test_the_answer_is_a_lower_bound_and_says_so(program, truth):
    x = torch.arange(LEVELS).repeat(2000)
    fitted = pgen.fit(program, {"x": x}, "exact", seed=0)
    assert fitted.offer.answers[pgen.Query.LOG_PROB] == "lower bound"
    assert pgen.Query.POSTERIOR not in fitted.offer.answers
    estimate = fitted.log_prob(seed=1)
    assert (estimate.kind, estimate.measure) == ("lower bound", "mass")
    gap = (truth(x) - estimate.value).view(2000, LEVELS)  # mean over draws of the noise is not below zero
    error = gap.std(0) / 2000**0.5
    assert (gap.mean(0) > -5 * error).all()  # one-sided, five cells: 1.4e-6
    assert gap.mean() > 5 * gap.std() / gap.numel() ** 0.5  # and with one particle, it is loose


def test_the_most_probable_value_cannot_be_had_from_a_bound():
    answer = pgen.explain(mixture, {"x": torch.tensor([1, 2])})["exact"].answer
    assert isinstance(answer, pgen.Offer)
    with pytest.raises(pgen.errors.Refused, match="bound-for-log-prob, which is lower bound"):
        pgen.fit(mixture, {"x": torch.tensor([1, 2])}, pgen.backend("exact", estimate="map"))


def test_a_latent_law_that_is_only_bounded_is_refused():
    def latent(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", law(LOC[0]))
            pyro.sample("x", dist.Normal(z.float(), 1.0))

    assert not pgen.explain(latent, {"x": torch.tensor([1.0, 2.0])})["exact"].offered
