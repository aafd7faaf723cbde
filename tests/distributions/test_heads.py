"""Heads: the masses that they say."""

import pytest
import torch

from pgen.distributions import (
    Bernoulli,
    Categorical,
    GaussianMixture,
    LogisticMixture,
    Ordinal,
    ordinal_logits,
)


@pytest.mark.parametrize(
    "head", [Bernoulli(), Categorical(5), Ordinal(17), GaussianMixture(4), LogisticMixture(17, 3)]
)
def test_a_head_takes_its_size_and_keeps_the_batch(head):
    law = head(torch.randn(3, 2, head.size))
    assert law.batch_shape == (3, 2)
    assert law.event_shape == ()
    assert head.support.check(law.sample()).all()


def test_ordinal_logits_are_the_formula():
    c = torch.randn(6, dtype=torch.float64)
    u = torch.linspace(-1, 1, 17, dtype=torch.float64)
    expected = sum(c[d + 1] * u**d for d in range(1, 5))
    expected[0] += c[0]
    expected[-1] += c[1]
    torch.testing.assert_close(ordinal_logits(c, 17), expected)


def test_ordinal_of_degree_two_is_a_rounded_gaussian():
    logits = ordinal_logits(torch.tensor([0.0, 0.0, 2.0, -5.0]), 9).log_softmax(-1)
    second = logits.diff().diff()
    torch.testing.assert_close(second, second[:1].expand_as(second))


def test_logistic_mixture_masses_are_differences_of_cdfs():
    head = LogisticMixture(9, components=2)
    numbers = torch.randn(4, head.size, dtype=torch.float64)
    logits, locations, log_scales = numbers.view(4, 3, 2).unbind(1)
    edges = (torch.arange(8, dtype=torch.float64) + 0.5) / 4 - 1
    locations = locations + torch.tensor([-0.8, 0.8])  # what they are counted from
    cdf = torch.sigmoid((edges[:, None, None] - locations) / log_scales.exp())
    ends = torch.zeros_like(cdf[:1])
    cells = torch.cat([ends, cdf, ends + 1]).diff(dim=0)
    masses = (cells * logits.softmax(-1)).sum(-1).T
    torch.testing.assert_close(head(numbers).probs, masses)


def test_logistic_mixture_is_finite_far_out():
    numbers = torch.tensor([0.0, 50.0, -4.0], requires_grad=True)
    law = LogisticMixture(256, components=1)(numbers)
    score = law.log_prob(torch.tensor(0))
    (gradient,) = torch.autograd.grad(score, numbers)
    assert score.isfinite()
    assert gradient.isfinite().all()
