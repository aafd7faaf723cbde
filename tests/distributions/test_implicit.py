"""Implicit laws: they draw, with gradients, and say so when asked for more."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pgen.capability import Capability, capabilities_of
from pgen.distributions import Implicit
from pgen.errors import Intractable, OptionError, PgenError, ProgramError


def noise(size=4):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def test_a_linear_generator_draws_the_gaussian_that_it_must():
    generator = nn.Linear(4, 2)
    n = 40_000
    draws = Implicit(generator, noise(), (2,)).sample((n,))
    weight, bias = generator.weight.detach(), generator.bias.detach()
    covariance = weight @ weight.T
    # Whitened draws are standard: means within 4.9 / sqrt(n), as 6 such assertions at 1e-6 in all ask for.
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (draws - bias).T, upper=False).T
    off = 5.2 / math.sqrt(n)
    assert (white.mean(0).abs() < off).all()
    assert (((white**2).mean(0) - 1).abs() < off * math.sqrt(2)).all()
    assert float((white[:, 0] * white[:, 1]).mean().abs()) < off
    # The test can fail: a wrong location is seen.
    assert ((white + 0.1).mean(0).abs() > off).all()


def test_it_declares_draws_only():
    law = Implicit(nn.Linear(4, 2), noise(), (2,))
    assert capabilities_of(law) == {Capability.SAMPLE, Capability.RSAMPLE}
    assert law.support.event_dim == 1
    with pytest.raises(NotImplementedError, match="lacks Capability.LOG_PROB"):
        law.log_prob(torch.zeros(2))
    assert issubclass(Intractable, PgenError)


def test_gradients_reach_the_generator():
    generator = nn.Linear(4, 2)
    Implicit(generator, noise(), (2,)).rsample((3,)).sum().backward()
    assert generator.weight.grad.abs().sum() > 0
    assert not Implicit(generator, noise(), (2,)).sample((3,)).requires_grad


class Image(nn.Module):
    """A generator of images that wants exactly one batch dimension, and a context."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 + 3, 16)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, e, context):
        return self.conv(self.linear(torch.cat([e, context], -1)).view(-1, 1, 4, 4))[:, 0]


def test_shapes_context_and_convolutions():
    law = Implicit(Image(), noise(), (4, 4), context=torch.randn(5, 3))
    assert (law.batch_shape, law.event_shape) == ((5,), (4, 4))
    assert law.sample((2, 3)).shape == (2, 3, 5, 4, 4)
    assert law.expand((6, 5)).sample((2,)).shape == (2, 6, 5, 4, 4)


def test_discrete_noise_and_another_support():
    coins = dist.Bernoulli(torch.full((4,), 0.5)).to_event(1)
    positive = torch.distributions.constraints.positive
    law = Implicit(nn.Sequential(nn.Linear(4, 2), nn.Softplus()), coins, (2,), support=positive)
    assert law.support.check(law.rsample((10,))).all()
    assert law.support.event_dim == 1


def test_errors_say_what_to_do():
    with pytest.raises(OptionError, match=r"batch shape \(4,\).*to_event\(1\)"):
        Implicit(nn.Linear(4, 2), dist.Normal(torch.zeros(4), 1.0), (2,))
    with pytest.raises(ProgramError, match=r"values of shape \(2,\) each; expected \(3,\)"):
        Implicit(nn.Linear(4, 2), noise(), (3,)).sample((7,))
