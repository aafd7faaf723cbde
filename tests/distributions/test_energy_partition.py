"""log Z on every kind of support against laws that are known, computed once, and with errors that are owned to."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pgen
from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.draws import LongRun
from pgen.conversion import Adapter, Normaliser
from pgen.distributions import Energy
from pgen.distributions.energy_partition import CONVERSIONS, annealed_by, kept, like_of, normalised_by
from pgen.errors import Unanswerable
from pgen.testing.statistics import StatisticalFailure, assert_estimate

BY_NAME = {c.name: c for c in CONVERSIONS}
CUT = constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[1, 1])
LEVELS = torch.tensor([0.3, -1.0, 0.8])


def mixed(x):
    """N(2 k, 1) for a bit k of log odds 0.7."""
    return (x[..., 0] - 2 * x[..., 1]).square() / 2 - 0.7 * x[..., 1]


def mixed_law(x):
    bit = dist.Bernoulli(logits=torch.tensor(0.7)).log_prob(x[..., 1])
    return dist.Normal(2 * x[..., 1], 1.0).log_prob(x[..., 0]) + bit


#: name: energy, shape, support, way, normalised log density
KNOWN = {
    "scalar": (lambda x: 2 * x.square(), (), constraints.real, "quadrature", dist.Normal(0.0, 0.5).log_prob),
    "positive": (
        lambda x: 3 * x[..., 0] - 2 * x[..., 0].log(),
        (1,),
        constraints.positive,
        "quadrature",
        lambda x: dist.Gamma(3.0, 3.0).log_prob(x[..., 0]),
    ),
    "interval": (
        lambda x: -(x.log() + 2 * (1 - x).log()).sum(-1),
        (2,),
        constraints.unit_interval,
        "quadrature",
        lambda x: dist.Beta(2.0, 3.0).log_prob(x).sum(-1),
    ),
    "simplex": (
        lambda x: -(torch.tensor([2.0, 1.0, 3.0]) * x.log()).sum(-1),
        (3,),
        constraints.simplex,
        "quadrature",
        lambda x: dist.Dirichlet(torch.tensor([3.0, 2.0, 4.0])).log_prob(x),
    ),
    "mixed": (mixed, (2,), CUT, "quadrature", mixed_law),
    "levels": (
        lambda x: -LEVELS[x.long()].sum(-1),
        (9,),
        constraints.integer_interval(0, 2),
        "enumeration",
        lambda x: LEVELS.log_softmax(0)[x.long()].sum(-1),
    ),
}


def law_of(name):
    energy, shape, support, _, _ = KNOWN[name]
    return Energy(energy, shape, support=support)


def values(law, n=20):
    torch.manual_seed(0)
    return law.space.together(*law.space.uniform(n, torch.empty(0)))


@pytest.mark.parametrize("name", KNOWN)
def test_constants_are_right_on_every_support(name):
    law, way, truth = law_of(name), BY_NAME[KNOWN[name][3]], KNOWN[name][4]
    x, adapter = values(law), Adapter((way,))
    torch.testing.assert_close(adapter(law).log_prob(x), truth(x), atol=2e-4, rtol=1e-4)
    (found,) = adapter.normalisers
    assert (found.error is None) == (way.name == "enumeration")  # a sum has none


@pytest.mark.parametrize("name", ["positive", "simplex", "mixed", "levels"])
def test_annealing_is_within_its_error_on_every_support(name):
    torch.manual_seed(1)
    law, truth = law_of(name), KNOWN[name][4]
    way = annealed_by(Annealing(chains=300), LongRun(chains=300, warmup=100, thin=5))
    x, adapter = values(law), Adapter((way,))
    error = (adapter(law).log_prob(x) - truth(x)).mean()
    (found,) = adapter.normalisers
    assert float(found.stderr) < 0.1
    assert_estimate(error[None], torch.zeros(1), found.stderr[None])
    with pytest.raises(StatisticalFailure):
        assert_estimate(error[None] + 1.0, torch.zeros(1), found.stderr[None])


def test_a_constant_is_computed_once_and_again_when_the_energy_has_changed():
    scale, calls = torch.nn.Parameter(torch.tensor(1.0)), []

    def compute(law):
        calls.append(1)
        return Normaliser(torch.tensor(2.0))

    exactness = BY_NAME["quadrature"].exactness
    way = normalised_by("counted", compute, exactness, 1.0, lambda site, structure: None)
    law = Adapter((way,))(Energy(lambda x: scale * x.square().sum(-1), (2,)).expand([5]))
    for _ in range(3):
        torch.testing.assert_close(law.log_prob(torch.zeros(5, 2)), torch.full((5,), -2.0))
    assert len(calls) == 1
    kept(law.expand([7]), "counted", compute)
    assert len(calls) == 1  # the same law, over other rows
    with torch.no_grad():
        scale.mul_(1.01)
    law.log_prob(torch.zeros(5, 2))
    assert len(calls) == 2


def test_what_cannot_be_integrated_says_so():
    law = Adapter((BY_NAME["quadrature"],))(Energy(lambda x: -x.square().sum(-1), (1,)))
    with pytest.raises(Unanswerable, match=r"log Z of Energy\(1,\) by quadrature"):
        law.log_prob(torch.zeros(1))


def first_way(event_shape, support=constraints.real, context=False):
    def energy(x, c=0.0):
        return (x - c).square().sum(-1)

    def program(c):
        with pyro.plate("data", len(c)):
            given = {"context": c} if context else {}
            pyro.sample("x", Energy(energy, event_shape, support=support, **given))

    data = {"c": torch.randn(3, 1), "x": torch.zeros(3, *event_shape)}
    return pgen.explain(program, data)["exact"].answer.paths["x"][0]


def test_the_way_follows_the_size_of_the_space():
    assert first_way((1,)) == first_way((2,)) == "quadrature"
    assert first_way((3,)) == "annealed-importance"
    assert first_way((2,), CUT) == "quadrature"
    assert first_way((10,), constraints.boolean) == "exact-sum"
    assert first_way((18,), constraints.boolean) == "enumeration"
    assert first_way((40,), constraints.boolean) == "annealed-importance"
    assert first_way((1,), context=True) == "unnormalised"  # a constant for every row


def test_numbers_are_of_the_energys_type():
    net = torch.nn.Linear(1, 1).double()
    assert like_of(Adapter((BY_NAME["quadrature"],))(Energy(net, (1,)))).dtype is torch.float64
