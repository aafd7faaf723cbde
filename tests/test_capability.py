"""The vocabulary: what a distribution says it can do, it can; a number never passes for what it is not."""

import math
from typing import ClassVar

import pyro.distributions as dist
import pytest
import torch

from pgen.capability import Capability, Estimate, Exactness, Offer, Query, Rank, Refusal, capabilities_of
from pgen.distributions.quiet import zuko
from pgen.errors import MeasureError

C = Capability
NORMAL = dist.Normal(0.0, 1.0)
t = torch.tensor

LAWS = {
    "Normal": lambda: dist.Normal(t([0.0, 1.0]), 1.0),
    "Normal, event": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "Normal, masked": lambda: dist.Normal(torch.zeros(3), 1.0).mask(t([True, False, True])),
    "Normal, expanded": lambda: dist.Normal(0.0, 1.0).expand([4]),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
    "TransformedDistribution": lambda: dist.TransformedDistribution(NORMAL, [dist.transforms.ExpTransform()]),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "StudentT": lambda: dist.StudentT(3.0),
    "Uniform": lambda: dist.Uniform(0.0, 2.0),
    "LKJCholesky": lambda: dist.LKJCholesky(2, 1.0),
    "VonMises": lambda: dist.VonMises(0.0, 1.0),
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "Categorical": lambda: dist.Categorical(torch.ones(4)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(torch.ones(4)),
    "Binomial": lambda: dist.Binomial(3, 0.5),
    "Poisson": lambda: dist.Poisson(2.0),
    "Geometric": lambda: dist.Geometric(0.5),
    "NegativeBinomial": lambda: dist.NegativeBinomial(2.0, 0.5),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(2.0, gate=t(0.5)),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(t([0.0, 1.0]), 1.0)),
    "Delta": lambda: dist.Delta(t(1.0), event_dim=0),
    "zuko flow": lambda: zuko.flows.NSF(2, transforms=1, hidden_features=[4])(),
    "GaussianHMM": lambda: dist.GaussianHMM(
        NORMAL.expand([1]).to_event(1), torch.eye(1), NORMAL.expand([3, 1]).to_event(1), torch.eye(1),
        NORMAL.expand([3, 1]).to_event(1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_a_law_can_do_what_it_says(name):
    law = LAWS[name]()
    found = capabilities_of(law)
    assert C.LOG_PROB in found
    assert C.SAMPLE in found
    drawn = law.sample((5,))
    assert drawn.shape == (5, *law.batch_shape, *law.event_shape)
    assert law.log_prob(drawn).shape == (5, *law.batch_shape)
    if C.RSAMPLE in found:
        assert law.has_rsample
        law.rsample((2,))
    else:
        assert not law.has_rsample
    if C.ENUMERATE in found:
        values = law.enumerate_support(expand=False)
        total = law.log_prob(values).logsumexp(0).exp()
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Normal", {C.SAMPLE, C.RSAMPLE, C.LOG_PROB}),
        ("Normal, event", {C.SAMPLE, C.RSAMPLE, C.LOG_PROB}),
        ("Bernoulli", {C.SAMPLE, C.LOG_PROB, C.ENUMERATE}),
        ("OneHotCategorical", {C.SAMPLE, C.LOG_PROB, C.ENUMERATE}),
        ("Binomial", {C.SAMPLE, C.LOG_PROB, C.ENUMERATE}),
        ("Poisson", {C.SAMPLE, C.LOG_PROB}),
    ],
)
def test_capabilities_of_known_laws(name, expected):
    assert capabilities_of(LAWS[name]()) == expected


def test_events_of_several_discrete_scalars_cannot_be_listed():
    assert C.ENUMERATE not in capabilities_of(dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
    assert C.ENUMERATE in capabilities_of(dist.Bernoulli(torch.full((3,), 0.5)).to_event(0))


def test_improper_and_unit_laws_have_a_density_only():
    improper = dist.ImproperUniform(dist.constraints.real, torch.Size(), torch.Size())
    assert capabilities_of(improper) == {C.LOG_DENSITY}
    assert capabilities_of(dist.Unit(t(0.0))) == {C.LOG_DENSITY}


class Declared(dist.TorchDistribution):
    arg_constraints: ClassVar = {}
    capabilities = frozenset({C.DENOISER, C.SAMPLE})


class Half(dist.TorchDistribution):
    """Defines a density and no way to draw."""

    arg_constraints: ClassVar = {}

    def log_prob(self, value):
        return -value.abs()


class Drawn(dist.TorchDistribution):
    arg_constraints: ClassVar = {}
    has_rsample = True

    def rsample(self, sample_shape=()):
        return torch.randn(torch.Size(sample_shape))


def test_strangers_declare_or_are_looked_at():
    assert capabilities_of(Declared(validate_args=False)) == {C.DENOISER, C.SAMPLE}
    assert capabilities_of(Half(validate_args=False)) == {C.LOG_PROB}
    assert capabilities_of(Drawn(validate_args=False)) == {C.SAMPLE, C.RSAMPLE}


def test_wrappers_pass_declarations_on():
    inner = Declared(torch.Size([2]), validate_args=False)
    assert capabilities_of(dist.Independent(inner, 1)) == {C.DENOISER, C.SAMPLE}


def test_promises_have_an_order():
    strengths = [
        e.strength
        for e in (
            Exactness.EXACT,
            Exactness.LOWER_BOUND,
            Exactness.ESTIMATE,
            Exactness.SURROGATE,
            Exactness.UNNORMALIZED,
        )
    ]
    assert strengths == sorted(strengths, reverse=True)
    assert len(set(strengths)) == 5
    assert Exactness.UPPER_BOUND.strength == Exactness.LOWER_BOUND.strength


def test_offers_are_true_and_refusals_false():
    assert Offer({Query.SAMPLE: Exactness.EXACT}, Rank.SUITED, "why")
    assert not Refusal("z", "log_prob", "why")
    assert Rank.IDEAL > Rank.SUITED > Rank.POSSIBLE


# --- Estimate ---


def mass(values, **options):
    return Estimate(t(values), "exact", **{"measure": "mass", "dims": 2, **options})


def test_a_kind_is_a_word():
    assert mass([-1.0]).kind == "exact"
    assert mass([-1.0]).kind is Exactness.EXACT
    assert Estimate(t([0.0]), Exactness.LOWER_BOUND).kind == "lower bound"
    with pytest.raises(ValueError, match="sure"):
        Estimate(t([0.0]), "sure")


def test_nats_and_bits():
    estimate = mass([-2 * math.log(2), -6 * math.log(2)])
    assert torch.equal(estimate.nats, estimate.value)
    assert estimate.bits_per_dim() == pytest.approx(2.0)
    density = Estimate(t([-2 * math.log(2)]), "exact", measure="density", dims=2)
    assert density.bits_per_dim(cell=1 / 256) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("estimate", "cell", "match"),
    [
        (
            Estimate(t([0.0]), "exact", measure="density", dims=1),
            None,
            r"got a density and cell=None.*bits_per_dim\(cell=1/256\)",
        ),
        (Estimate(t([0.0]), "exact", measure="mixed", dims=1), None, "got a mixed"),
        (mass([0.0]), 0.5, "got a mass and cell=0.5"),
        (mass([0.0], dims=None), None, "dims is None"),
    ],
)
def test_bits_are_refused_where_they_mean_nothing(estimate, cell, match):
    with pytest.raises(MeasureError, match=match):
        estimate.bits_per_dim(cell)


def test_the_mean_carries_the_error_of_the_estimation():
    estimate = Estimate(t([-1.0, -3.0]), "estimate", stderr=t([0.3, 0.4]))
    mean = estimate.mean()
    assert float(mean.value) == -2.0
    assert float(mean.stderr) == pytest.approx(0.25)
    assert mean.kind == "estimate"
    assert mass([-1.0, -3.0]).mean().stderr is None


def test_an_error_that_rows_share_is_not_averaged_out():
    shared = t(0.3)
    estimate = Estimate(t([-1.0, -3.0]), "estimate", stderr=t([0.3, 0.4]), shared=shared)
    own = (0.4**2 - 0.3**2) / 4
    assert float(estimate.mean().stderr) == pytest.approx(math.sqrt(own + 0.3**2))
    many = Estimate(torch.zeros(1000), "estimate", stderr=torch.full((1000,), 0.3), shared=shared)
    assert float(many.mean().stderr) == pytest.approx(0.3)


def test_an_interval_is_as_wide_as_its_error():
    low, high = Estimate(t([1.0, 2.0]), "estimate", stderr=t([0.5, 0.0])).interval(0.95)
    assert ((high - low) / 2).tolist() == pytest.approx([1.959964 * 0.5, 0.0], abs=1e-5)
    assert ((high + low) / 2).tolist() == pytest.approx([1.0, 2.0])
    assert [float(end) for end in mass([-1.0]).interval()] == [-1.0, -1.0]
    with pytest.raises(MeasureError, match="no standard error"):
        Estimate(t([1.0]), "lower bound").interval()


def test_bounds_have_means():
    mean = Estimate(t([1.0, 3.0]), "estimate", lower=t([0.0, 2.0]), upper=t([2.0, 4.0])).mean()
    assert (float(mean.lower), float(mean.upper)) == (1.0, 3.0)


def test_differences_know_what_they_are():
    exact = mass([-1.0, -2.0]) - mass([-2.0, -2.0])
    assert exact.kind == "exact"
    assert exact.value.tolist() == [1.0, 0.0]
    noisy = Estimate(t([-1.0]), "estimate", t([0.3])) - Estimate(t([-1.0]), "estimate", t([0.4]))
    assert float(noisy.stderr) == pytest.approx(0.5)
    bound = Estimate(t([-1.0]), "lower bound") - Estimate(t([-2.0]), "exact")
    assert bound.kind == "estimate"  # the difference of a bound and a value bounds nothing in general


def test_a_density_is_not_subtracted_from_a_mass():
    with pytest.raises(MeasureError, match="cannot compare a mass with a density"):
        mass([0.0]) - Estimate(t([0.0]), "exact", measure="density")
    with pytest.raises(TypeError):
        mass([0.0]) - 1.0


def test_it_prints_what_it_is():
    text = repr(Estimate(t([-1.0, -2.0]), "lower bound", stderr=t([0.1, 0.1])))
    for part in ("-1.5", "±", "nats", "lower bound", "log density", "2 rows"):
        assert part in text
