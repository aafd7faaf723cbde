"""Surrogates have the gradients that they are to have; laws of strangers are learned too; what was learned is doubted."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.algorithms.energy.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from pgen.algorithms.energy.learning import Learned
from pgen.algorithms.energy.matching import ScoreMatching
from pgen.capability import Capability
from pgen.conversion import Adapter
from pgen.distributions import Energy
from pgen.distributions.energy_learning import conditional, doubt, learned_by, on_rows, start_of
from pgen.errors import OptionError
from pgen.testing.statistics import StatisticalFailure, assert_mean

A = nn.Parameter(torch.tensor(2.0))
LAW = Energy(lambda x: A * x.square().sum(-1) / 2, (2,))


class Site:
    parents = inputs = ()
    improper = False


def converted(objective, data, law=LAW):
    way = learned_by(objective)
    memory = way.memory(law, data, Site())
    return Adapter((way,), {way.name: memory})(law), memory


# --- gradients ---


def test_a_surrogate_has_the_gradient_of_the_likelihood():
    """d/da log p = 1/a - |x|^2 / 2 in two dimensions; chains begin at the data, 20 steps from which they have forgotten."""
    torch.manual_seed(0)
    x = math.sqrt(0.5) * torch.randn(500, 2)
    law, _ = converted(ContrastiveDivergence(steps=20, regularisation=0.0), x)
    normaliser = float(1 / A.detach())
    expected = normaliser - float(x.square().sum(1).mean()) / 2
    found = torch.stack([torch.autograd.grad(law.log_prob(x).mean(), A)[0] for _ in range(100)])
    assert_mean(found, expected, slack=0.01)
    with pytest.raises(StatisticalFailure):
        assert_mean(found, expected - normaliser, slack=0.01)


def test_rows_of_plates_are_kept():
    x = torch.randn(6, 3, 2)
    law, memory = converted(ContrastiveDivergence(steps=1), x.reshape(-1, 2), LAW.expand([6, 3]))
    assert law.log_prob(x).shape == (6, 3)
    assert "energy_gap" in memory.told


class Thrice:
    """An objective whose surrogate is 3 f(x), to be told from f."""

    def memory(self, data, space, **options):
        return nn.Module()

    def __call__(self, f, x, memory):
        return Learned(3 * f(x), {})


def test_a_latent_surrogate_is_the_density_in_value_and_in_the_values_gradient():
    """And what is learned has the gradient of the objective: draws of the guide are its data."""
    law, memory = converted(Thrice(), None)
    z = torch.randn(5, 2, requires_grad=True)
    found = law.log_prob(z)
    torch.testing.assert_close(found, LAW.log_density(z))
    by_value, by_learned = torch.autograd.grad(found.sum(), (z, A))
    torch.testing.assert_close(by_value, -A * z)
    torch.testing.assert_close(by_learned, 3 * -z.square().sum() / 2)
    assert not memory.observed
    seen, _ = converted(Thrice(), z.detach())  # observed: the surrogate as it is
    torch.testing.assert_close(seen.log_prob(z.detach()), 3 * LAW.log_density(z.detach()))


def test_held_out_rows_are_given_the_density_unless_there_is_a_score():
    x = torch.randn(20, 2)
    law, memory = converted(ContrastiveDivergence(), x)
    memory.eval()
    assert not memory.scores
    torch.testing.assert_close(law.log_prob(x), LAW.log_density(x))
    law, memory = converted(ScoreMatching(), x)
    memory.eval()
    assert memory.scores
    assert not torch.allclose(law.log_prob(x), LAW.log_density(x))


# --- strangers ---


class Stranger(dist.TorchDistribution):
    """A law of a third party: a density up to a constant and nothing else. Pyro copies it over plates."""

    capabilities = frozenset({Capability.LOG_DENSITY})
    arg_constraints = {}  # noqa: RUF012
    support = constraints.independent(constraints.real, 1)

    def __init__(self, a, batch_shape=()):
        self.a = a
        super().__init__(torch.Size(batch_shape), torch.Size((1,)), validate_args=False)

    def log_density(self, x):
        return -self.a.exp() * x[..., 0].square() / 2


class Careless(Stranger):
    """It copies itself, and does not say that its copies are alike."""

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.a, batch_shape)


class Strangers(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a = kind, nn.Parameter(torch.tensor(0.0))

    def forward(self, n):
        with pyro.plate("data", n):
            pyro.sample("x", self.kind(self.a))


STRANGE = {"x": 2 * torch.randn(500, 1, generator=torch.Generator().manual_seed(1))}


def test_a_stranger_is_learned_weighed_and_drawn():
    run = pgen.Run(steps=200, lr=0.03, batch_size=500, progress=False)
    fitted = pgen.fit(Strangers(Stranger), STRANGE, "exact", run=run)
    sd = math.exp(-float(fitted.parameters["a"]) / 2)
    assert abs(sd - float(STRANGE["x"].square().mean().sqrt())) < 0.2
    expected = dist.Normal(0.0, sd).log_prob(STRANGE["x"][:, 0])
    torch.testing.assert_close(fitted.log_prob().value, expected, atol=1e-3, rtol=0.0)
    assert fitted.sample(4)["x"].shape == (4, 1)


def test_a_stranger_whose_rows_may_differ_is_asked_to_say_so():
    with pytest.raises(OptionError, match="site 'x' cannot be learned by persistent"):
        pgen.fit(Strangers(Careless), STRANGE, "exact", run=pgen.Run(steps=2, progress=False))
    law = Careless(torch.tensor(0.0), (3,))
    assert conditional(law)
    with pytest.raises(OptionError, match=r"Careless\.conditional = False"):
        on_rows(law, torch.Size())
    assert not conditional(Stranger(torch.tensor(0.0)).expand([3]))


# --- where chains begin, and doubts ---


def test_chains_begin_where_learning_left_them_else_at_the_base():
    x = torch.randn(300, 2) + 7
    law, memory = converted(PersistentContrastiveDivergence(chains=40), x)
    start, leap = start_of(law, torch.Size((10,)))
    assert start.shape == (10, 2)
    assert leap is None
    assert bool((start[:, None] == memory.inner.position).all(-1).any(1).all())
    tilted = Energy(lambda x: x.sum(-1), (2,), base=dist.Normal(torch.full((2,), -9.0), 0.1).to_event(1))
    start, leap = start_of(tilted, torch.Size((10,)))
    assert bool((start + 9).abs().max() < 1)
    assert leap is not None
    assert start_of(LAW, torch.Size((10,)))[0].abs().max() < 10


@pytest.mark.parametrize(
    ("energy", "metrics", "told"),
    [
        (lambda x: -x.square().sum(-1), {}, "does not fall off"),
        (lambda x: x[..., 0], {}, "does not fall off"),
        (lambda x: x.square().sum(-1), {"spread": torch.full((20,), 9.0)}, "9.0 times as wide"),
        (lambda x: x.square().sum(-1), {"accept": torch.full((20,), 0.01)}, "hardly move"),
        (lambda x: x.square().sum(-1), {"accept": torch.full((20,), 0.6), "spread": torch.ones(20)}, None),
        (lambda x: x.abs().sum(-1), {}, None),
    ],
)
def test_what_is_suspicious_is_told(energy, metrics, told):
    found = doubt(Energy(energy, (2,)), metrics)
    assert (found is None) if told is None else (told in found)


def test_supports_that_end_are_not_asked_about_far_away():
    assert doubt(Energy(lambda x: -x.sum(-1), (2,), support=constraints.unit_interval), {}) is None
    assert doubt(Energy(lambda x: -x.sum(-1), (2,), support=constraints.boolean), {}) is None
