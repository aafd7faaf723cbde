"""Quantised laws: what is reported of integers is a mass, or a lower bound on one."""

import math

import pyro.distributions as dist
import pytest
import torch

from pgen.capability import Capability, capabilities_of
from pgen.distributions import Flow, Quantized
from pgen.distributions.quiet import zuko
from pgen.errors import Intractable, OptionError

MEAN, SCALE, LEVELS = torch.tensor([2.0, 3.1], dtype=torch.float64), 0.8, 6


def normal(width=1.0, low=0.0):
    """The same law of integers, on another scale."""
    return dist.Normal(MEAN * width + low, torch.tensor(SCALE, dtype=torch.float64) * width).to_event(1)


def log_mass(value, tails=False):
    """Exact, by the normal's cdf; with the tails in the end cells or without."""
    law = torch.distributions.Normal(MEAN, SCALE)
    low, high = value.double(), value.double() + 1
    if tails:
        low, high = torch.where(low <= 0, -math.inf, low), torch.where(high >= LEVELS, math.inf, high)
    return (law.cdf(high) - law.cdf(low)).log().sum(-1)


VALUES = torch.cartesian_prod(torch.arange(LEVELS), torch.arange(LEVELS)).double()


def bounds(particles, width=1.0, low=0.0, repeats=1000):
    law = Quantized(normal(width, low), LEVELS, low=low, width=width, particles=particles)
    draws = law.bound(VALUES.expand(repeats, *VALUES.shape))
    return draws.mean(0), draws.std(0) / math.sqrt(repeats)


@pytest.mark.parametrize("width", [1.0, 0.25, 3.0])
def test_the_bound_is_below_the_mass_and_rises_to_it(width):
    exact = log_mass(VALUES)
    means = []
    for particles in (1, 4, 16):
        mean, error = bounds(particles, width, low=-1.5)
        # 36 cells, three widths and three counts at 1e-6 in all: 5.9 standard errors.
        assert (mean <= exact + 5.9 * error + 1e-9).all()
        means.append(mean)
    assert (means[0] < means[1] + 0.1).all()
    assert (means[1] < means[2] + 0.1).all()
    assert float((exact - means[2]).max()) < 0.3
    assert float((exact - means[0]).max()) > 0.1, "one particle is not tight in the tails"


def test_forgetting_the_width_is_seen():
    """A density in place of a mass is off by D log(width): the check above would fail."""
    mean, error = bounds(32, width=0.25)
    density = mean - 2 * math.log(0.25)
    assert (density > log_mass(VALUES) + 5.9 * error).all()


def test_draws_fall_into_the_cells_tails_included():
    law = Quantized(normal(), LEVELS)
    draws = law.sample((50_000,))
    assert draws.dtype == torch.long
    assert law.support.check(draws).all()
    counts = torch.bincount(draws @ torch.tensor([LEVELS, 1]), minlength=LEVELS**2).double()
    expected = 50_000 * log_mass(VALUES, tails=True).exp()
    keep = expected > 5
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    assert float(torch.special.gammaincc(keep.sum().double() / 2, statistic / 2)) > 1e-6


def test_it_declares_a_bound_and_no_log_prob():
    law = Quantized(Flow(zuko.flows.MAF(3)), 4)
    assert capabilities_of(law) == {Capability.SAMPLE, Capability.BOUND}
    assert law.support.is_discrete
    with pytest.raises(
        Intractable, match=r"lacks Capability.LOG_PROB and has Capability.BOUND: use bound\(value\)"
    ):
        law.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match="support"):
        Quantized(Flow(zuko.flows.MAF(3)), 4, validate_args=True).bound(torch.tensor([0, 4, 0]))


def test_shapes_and_gradients():
    flow = zuko.flows.MAF(3)
    law = Quantized(Flow(flow), 4, particles=5).expand((7,))
    x = law.sample((2,))
    assert x.shape == (2, 7, 3)
    assert law.bound(x).shape == (2, 7)
    assert law.bound(x[0, 0]).shape == (7,)
    law.bound(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_errors_say_what_to_do():
    for wrong in ({"levels": 1}, {"levels": 4, "width": 0.0}, {"levels": 4, "particles": 0}):
        with pytest.raises(OptionError, match="expected at least 2 levels"):
            Quantized(normal(), **wrong)
