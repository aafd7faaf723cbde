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
    assert first_way((1,), context=True) == "quadrature"


def test_numbers_are_of_the_energys_type():
    net = torch.nn.Linear(1, 1).double()
    assert like_of(Adapter((BY_NAME["quadrature"],))(Energy(net, (1,)))).dtype is torch.float64


# --- a constant for every row ---

CONTEXT = torch.linspace(-1.5, 1.5, 4)[:, None]


def around(x, c):
    """A normal law of precision 1 + c^2 around c, in every number."""
    return (1 + c[..., :1].square()).squeeze(-1) * (x - c).square().sum(-1) / 2


def conditional_data(d):
    x = torch.randn(4, d, generator=torch.Generator().manual_seed(0))
    truth = dist.Normal(CONTEXT, (1 + CONTEXT.square()).rsqrt()).log_prob(x).sum(-1)
    return {"c": CONTEXT, "x": x}, truth


def conditioned(d, energy=around, support=constraints.real):
    def program(c):
        with pyro.plate("data", len(c)):
            pyro.sample("x", Energy(energy, (d,), support=support, context=c))

    return program


@pytest.mark.parametrize("d", [1, 2])
def test_rows_have_constants_of_their_own(d):
    data, truth = conditional_data(d)
    fitted = pgen.fit(conditioned(d), data, "exact")
    found = fitted.log_prob()
    torch.testing.assert_close(found.value, truth, atol=1e-4, rtol=0.0)
    assert found.solver_error.shape == (4,)
    fewer = {name: value[1:3] for name, value in data.items()}
    torch.testing.assert_close(fitted.log_prob(fewer).value, truth[1:3], atol=1e-4, rtol=0.0)


def test_rows_of_bits_have_constants_of_their_own():
    def energy(x, c):
        return -(x * c).sum(-1)

    x = torch.randint(2, (4, 18), generator=torch.Generator().manual_seed(0)).float()
    program = conditioned(18, energy, constraints.boolean)
    found = pgen.fit(
        program, {"c": CONTEXT, "x": x}, pgen.backend("exact", via={"x": "enumeration"})
    ).log_prob()
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, dist.Bernoulli(logits=CONTEXT).log_prob(x).sum(-1))


def test_annealing_knows_the_error_of_every_row():
    data, truth = conditional_data(3)
    way = annealed_by(Annealing(chains=300, most=100), LongRun(chains=200, warmup=60))
    found = pgen.fit(conditioned(3), data, pgen.backend("exact", via={"x": way})).log_prob(seed=1)
    assert_estimate(found.value, truth, found.stderr)
    assert float(found.stderr.max()) < 0.2
    assert found.shared is None  # no row's error is another's
    with pytest.raises(StatisticalFailure):
        assert_estimate(found.value, truth.flip(0), found.stderr)


def test_rows_in_a_plate_of_their_own_add_up():
    def program(c):
        with pyro.plate("data", len(c), dim=-2), pyro.plate("twice", 2, dim=-1):
            pyro.sample("x", Energy(around, (1,), context=c[:, None]))

    x = torch.randn(4, 2, 1, generator=torch.Generator().manual_seed(0))
    truth = dist.Normal(CONTEXT[:, None], (1 + CONTEXT.square()).rsqrt()[:, None]).log_prob(x).sum((1, 2))
    found = pgen.fit(
        program, {"c": CONTEXT, "x": x}, pgen.backend("exact", via={"x": "quadrature"})
    ).log_prob()
    torch.testing.assert_close(found.value, truth, atol=1e-4, rtol=0.0)
    assert found.solver_error.shape == (4,)


def test_laws_of_latents_have_no_constant_to_keep():
    def program(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", Energy(around, (1,), context=z))

    data = {"x": torch.zeros(3, 1)}
    with pytest.raises(pgen.errors.Refused, match="for every value of z"):
        pgen.fit(program, data, pgen.backend("variational", via={"x": "quadrature"}))
    offer = pgen.explain(program, data)["variational"].answer
    assert offer.paths["x"][0] == "unnormalised"
    assert offer.learning["x"] == ("contrastive-divergence",)


def test_a_conditional_energy_is_learned_by_its_likelihood():
    """y given c is N(w c, 1); w is what regression finds."""

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, c):
            with pyro.plate("data", len(c)):
                pyro.sample("y", Energy(lambda y, c: (y - self.w * c).square().sum(-1) / 2, (1,), context=c))

    generator = torch.Generator().manual_seed(0)
    c = torch.randn(50, 1, generator=generator)
    y = 1.7 * c + torch.randn(50, 1, generator=generator)
    run = pgen.Run(steps=150, lr=0.05, batch_size=50, progress=False)
    fitted = pgen.fit(
        Line(), {"c": c, "y": y}, pgen.backend("exact", via={"y": "quadrature-likelihood"}), run=run
    )
    assert abs(float(fitted.parameters["w"]) - float((c * y).sum() / c.square().sum())) < 1e-2


def test_a_likelihood_summed_in_blocks_has_its_gradient():
    """Two numbers take 66,049 nodes, more than are evaluated at once: on the way back they are evaluated again."""

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_a = torch.nn.Parameter(torch.tensor(-1.0))

        def forward(self, n):
            with pyro.plate("data", n):
                pyro.sample("x", Energy(lambda x: self.log_a.exp() * x.square().sum(-1) / 2, (2,)))

    x = 2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    run = pgen.Run(steps=90, lr=0.03, batch_size=300, progress=False)
    fitted = pgen.fit(Bowl(), {"x": x}, pgen.backend("exact", via={"x": "quadrature-likelihood"}), run=run)
    assert abs(float(fitted.parameters["log_a"]) + float(x.square().mean().log())) < 0.05
