"""Every law of a guide is the pushforward that it claims to be, over the support of its site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pgen.errors import OptionError, ProgramError
from pgen.guides.families import FAMILIES, Continuous, Discrete, Levels, lower_triangle
from pgen.guides.features import Unconstrain
from pgen.inspection import structure_of

CONTINUOUS = {
    "real": dist.Normal(0.0, 1.0),
    "real vector": dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "real matrix": dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
    "positive": dist.Gamma(2.0, 1.0),
    "positive vector": dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
    "interval": dist.Uniform(-2.0, 3.0),
    "interval vector": dist.Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 4.0])).to_event(1),
    "greater than": dist.Pareto(2.0, 3.0),
    "unit": dist.Beta(2.0, 2.0),
    "simplex": dist.Dirichlet(torch.ones(4)),
    "correlation": dist.LKJCholesky(3, 1.0),
    "ordered": dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
    ),
}


def site_of(law):
    structure = structure_of(lambda: pyro.sample("z", law))
    return structure.sites["z"], structure


def head_of(law, family):
    site, structure = site_of(law)
    return Continuous(site, Unconstrain(site, structure), family, 0.7, 2)


def coordinates(value, kind):
    """As many free coordinates of a value as its support has dimensions."""
    if kind == "simplex":
        return value[..., :-1]
    if kind == "correlation":
        rows, columns = torch.tril_indices(value.shape[-1], value.shape[-1], -1)
        return value[..., rows, columns]
    return value.reshape(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_log_prob_is_the_change_of_variables_by_autograd(kind, family):
    head = head_of(CONTINUOUS[kind], family).double()
    law = head(torch.randn(head.size, dtype=torch.double) * 0.5)
    pushed = isinstance(law, dist.TransformedDistribution)
    base, transforms = (law.base_dist, law.transforms) if pushed else (law, [])
    start = base.sample()

    def push(flat):
        value = flat.reshape(start.shape)
        for transform in transforms:
            value = transform(value)
        return coordinates(value, kind)

    jacobian = torch.autograd.functional.jacobian(push, start.reshape(-1))
    value = start
    for transform in transforms:
        value = transform(value)
    expected = base.log_prob(start) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(law.log_prob(value), expected, rtol=1e-4, atol=1e-4)
    anew = value.clone()  # not met before, so that nothing comes from a cache
    torch.testing.assert_close(law.log_prob(anew), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_draws_have_the_shape_support_and_gradient_of_the_site(kind, family):
    site, _ = site_of(CONTINUOUS[kind])
    head = head_of(CONTINUOUS[kind], family)
    outputs = (0.3 * torch.randn(5, head.size)).requires_grad_()
    law = head(outputs)
    assert law.batch_shape == (5,)
    assert law.event_shape == site.event_shape
    value = law.expand((4, 5)).rsample()
    assert value.shape == (4, 5, *site.event_shape)
    assert site.support.check(value).all()
    assert torch.autograd.grad(value.sum() + law.log_prob(value[0]).sum(), outputs)[0].isfinite().all()


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_unconstraining_is_undone_by_constraining(kind):
    site, structure = site_of(CONTINUOUS[kind])
    code = Unconstrain(site, structure)
    free = torch.randn(20, code.numel, dtype=torch.double)
    value = code.transform(free)(free.reshape(20, *code.shape))
    torch.testing.assert_close(code.flat(value), free)


def test_over_real_vectors_a_gaussian_stays_plain():
    """So that divergences known in closed form apply."""
    head = head_of(CONTINUOUS["real vector"], "normal")
    law = head(torch.randn(5, head.size))
    prior = CONTINUOUS["real vector"].expand((5,))
    assert torch.distributions.kl_divergence(law, prior).shape == (5,)


@pytest.mark.parametrize("family", ["low-rank", "full"])
def test_correlated_families_have_the_covariance_that_they_say(family):
    head = head_of(CONTINUOUS["real vector"], family)
    outputs = torch.randn(head.size)
    law = head(outputs)
    draws = law.sample((40_000,))
    # six standard errors; that of an entry of a sample covariance is at most sqrt(2 / n) of the variances
    spread = law.variance.max()
    assert (torch.cov(draws.T) - law.covariance_matrix).abs().max() < 6 * spread * (2 / 40_000) ** 0.5
    assert (law.covariance_matrix - torch.diag(law.variance)).abs().max() > 0.01


def test_a_cholesky_factor_is_lower_with_the_given_diagonal():
    below, diagonal = torch.randn(2, 6), torch.rand(2, 4) + 0.1
    factor = lower_triangle(below, diagonal)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.diagonal(dim1=-2, dim2=-1), diagonal)
    assert lower_triangle(torch.zeros(0), torch.ones(1)).shape == (1, 1)


def test_the_median_of_the_prior_is_where_it_starts():
    head = head_of(CONTINUOUS["positive"], "normal")
    head.standardise(torch.tensor([1.5]), torch.tensor([0.5]))
    law = head(head.initial())
    torch.testing.assert_close(law.base_dist.mean, torch.tensor(1.5))
    torch.testing.assert_close(law.base_dist.stddev, torch.tensor(0.35))


DISCRETE = {
    "boolean": dist.Bernoulli(0.3),
    "boolean vector": dist.Bernoulli(torch.full((2,), 0.3)).to_event(1),
    "categorical": dist.Categorical(torch.ones(4)),
    "categorical vector": dist.Categorical(torch.ones(2, 3)).to_event(1),
    "one-hot": dist.OneHotCategorical(torch.ones(4)),
    "binomial": dist.Binomial(5, torch.tensor(0.4)),
}


@pytest.mark.parametrize("kind", DISCRETE)
def test_discrete_draws_are_coded_as_the_site_codes_them(kind):
    site, _ = site_of(DISCRETE[kind])
    head = Discrete(site)
    law = head(torch.randn(7, head.size)).expand((6, 7))
    value = law.sample()
    own = DISCRETE[kind].sample()
    assert value.shape == (6, 7, *own.shape)
    assert value.dtype == own.dtype
    assert DISCRETE[kind].log_prob(value).isfinite().all()


@pytest.mark.parametrize("kind", ["boolean", "categorical", "one-hot", "binomial"])
def test_discrete_masses_sum_to_one_over_the_support_of_the_site(kind):
    site, _ = site_of(DISCRETE[kind])
    law = Discrete(site)(torch.randn(Discrete(site).size))
    own = DISCRETE[kind].enumerate_support()
    torch.testing.assert_close(law.log_prob(own).logsumexp(0), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(law.enumerate_support().to(own.dtype), own)


def test_shifted_levels_draw_what_they_score():
    law = Levels(torch.tensor([0.0, 1.0, 2.0]), low=5)
    draws = law.sample((3000,))
    assert set(draws.tolist()) == {5.0, 6.0, 7.0}
    assert constraints.integer_interval(5, 7).check(draws).all()
    frequency = (draws.unsqueeze(-1) == torch.tensor([5.0, 6.0, 7.0])).float().mean(0)
    # five standard errors of a frequency of at most a half
    assert (frequency - law.log_prob(torch.tensor([5.0, 6.0, 7.0])).exp()).abs().max() < 5 * 0.5 / 3000**0.5


def test_what_no_family_covers_is_refused_by_name():
    with pytest.raises(ProgramError, match="site 'z': a guide needs a finite support"):
        Discrete(site_of(dist.Poisson(3.0))[0])
    site, structure = site_of(dist.ProjectedNormal(torch.ones(3)))
    with pytest.raises(ProgramError, match="site 'z': no bijection"):
        Unconstrain(site, structure)
    with pytest.raises(OptionError, match="2001 x 2001"):
        head_of(dist.Normal(torch.zeros(2001), 1.0).to_event(1), "full")
    with pytest.raises(OptionError, match="initial_scale=0"):
        Continuous(site, Unconstrain(*site_of(dist.Normal(0.0, 1.0))), "normal", 0, 1)
