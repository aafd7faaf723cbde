"""Draws by name: of the law that they are asked for, at the sites where they can be had; refused by name elsewhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.algorithms.energy.annealed_draws import AnnealedRun
from pgen.algorithms.energy.continued import Continued
from pgen.algorithms.energy.contrastive import PersistentContrastiveDivergence, ShortRun
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.tempered import TemperedRun
from pgen.capability import Capability
from pgen.conversion import CORE, Adapter, Conversions
from pgen.distributions import Energy
from pgen.distributions.energy_conversions import CONVERSIONS, continued_by, drawn_by, hot, tempered_by
from pgen.distributions.energy_learning import learned_by, on_rows
from pgen.errors import Refused, Unanswerable
from pgen.nn import RBM
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_moments

MEAN, SD = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
MEASURED = ("mala", "hmc", "random-walk", "ula", "nuts", "chees", "meads")
COUNTED = ("gibbs", "gibbs-with-gradients", "discrete-langevin")
TEMPERED = ("annealed", "parallel-tempering")
VALUES = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))


def bowl():
    pyro.sample("x", Energy(lambda x: ((x - MEAN) / SD).square().sum(-1) / 2, (2,)))


def product(x):
    return 0.4 * x[..., 0] * (x[..., 1] - 1.3)


def counted():
    """Two numbers with three values each."""
    pyro.sample("x", Energy(product, (2,), support=constraints.integer_interval(0, 2)))


def both():
    support = constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[1, 1])
    pyro.sample("x", Energy(lambda x: (x[..., 0] - x[..., 1]).square() / 2, (2,), support=support))


def fit(program, name, backend="exact"):
    return pgen.fit(program, None, pgen.backend(backend, via={"x": name}))


# --- every name ---


@pytest.mark.parametrize("name", [*MEASURED, *TEMPERED])
def test_a_normal_law_by_name(name):
    """As many draws as there are chains, so that they are independent (those of a cloud nearly)."""
    fitted = fit(bowl, name)
    torch.manual_seed(0)
    x = fitted.sample(500)["x"]
    assert_moments(x, MEAN, SD)
    with pytest.raises(StatisticalFailure):
        assert_moments(x, MEAN, 1.5 * SD)


@pytest.mark.parametrize("name", COUNTED)
def test_counted_numbers_by_name(name):
    torch.manual_seed(0)
    x = fit(counted, name).sample(500)["x"]
    assert_frequencies(3 * x[:, 0] + x[:, 1], (-product(VALUES)).softmax(0))
    with pytest.raises(StatisticalFailure):
        assert_frequencies(3 * x[:, 0] + x[:, 1], product(VALUES).softmax(0))


def test_where_no_name_is_given_chains_are_taken():
    path = Conversions((*CORE, *CONVERSIONS)).path(frozenset({Capability.LOG_DENSITY}), Capability.SAMPLE)
    assert [c.name for c in path] == ["chains"]


def test_a_number_beside_a_bit_is_moved_as_usual():
    """By name of a kernel for either of the two; the bit is fair, and the number normal around it."""
    torch.manual_seed(0)
    x = fit(both, "gibbs").sample(1000)["x"]
    assert_moments(x[:, 0] - x[:, 1], 0.0, 1.0)
    assert_frequencies(x[:, 1], torch.tensor([0.5, 0.5]))


# --- where they cannot be used ---


@pytest.mark.parametrize("backend", ["exact", "variational"])
@pytest.mark.parametrize(
    ("program", "name", "told"),
    [
        *((counted, name, "gibbs, gibbs-with-gradients and discrete-langevin") for name in MEASURED),
        *((bowl, name, "counted numbers, and here all 2 are measured; mala") for name in COUNTED),
        *((both, name, "1 here are counted; hmc, mala") for name in ("nuts", "chees", "meads")),
    ],
)
def test_wrong_sites_are_refused_by_name(backend, program, name, told):
    with pytest.raises(Refused, match=rf"via='{name}' cannot be used there.*{told}"):
        fit(program, name, backend)


# --- several laws ---


@pytest.mark.parametrize(
    "way",
    [
        drawn_by(LongRun(warmup=60, leaps=0), name="long"),
        tempered_by(AnnealedRun(particles=100, after=10, steps=1), name="annealed"),
        pytest.param(tempered_by(TemperedRun(warmup=40), name="parallel-tempering"), marks=pytest.mark.slow),
        *(c for c in CONVERSIONS if c.name == "chees"),
    ],
    ids=lambda way: way.name,
)
def test_conditional_energies_have_draws_for_every_row(way):
    context = torch.tensor([[-3.0], [0.0], [3.0]])
    law = Adapter((way,))(Energy(lambda x, c: 2 * (x - c).square().sum(-1), (2,), context=context))
    torch.manual_seed(0)
    x = law.sample((300,))
    assert x.shape == (300, 3, 2)
    assert_moments(x, context.expand(3, 2), 0.5)
    with pytest.raises(StatisticalFailure):
        assert_moments(x.roll(1, 1), context.expand(3, 2), 0.5)
    assert law.sample().shape == (3, 2)


def test_draws_of_rows_that_are_alike_are_of_one_law():
    law = Adapter((tempered_by(AnnealedRun(particles=50, after=1, steps=1), name="annealed"),))(
        Energy(lambda x: x.square().sum(-1), (2,)).expand([4])
    )
    assert law.sample((5,)).shape == (5, 4, 2)


# --- where they come from ---


def test_the_base_is_at_the_hot_end_else_what_short_chains_see():
    base = dist.Normal(torch.tensor([30.0, 0.0]), 1.0).to_event(1)
    law = Energy(lambda x: x.sum(-1), (2,), base=base)
    found = hot(law, on_rows(law, torch.Size()), torch.Size())
    assert torch.allclose(found.log_prob(MEAN.expand(3, 2)), base.log_prob(MEAN).expand(3))
    law = Energy(lambda x: ((x - 40) / SD).square().sum(-1) / 2, (2,))
    torch.manual_seed(0)
    found = hot(law, on_rows(law, torch.Size()), torch.Size())
    assert bool(((found.mean - 40).abs() < SD).all())
    assert bool((found.root.diagonal() > SD).all())


def test_an_energy_with_a_way_of_its_own_is_annealed_along_it():
    torch.manual_seed(0)
    energy = RBM(6, 3)
    nn.init.normal_(energy.weight, std=0.7)
    law = Energy(energy, (6,), support=constraints.boolean)
    way = tempered_by(AnnealedRun(after=5), name="annealed")
    x = Adapter((way,))(law).sample((1000,))
    every = law.enumerate_support()
    code = (x * 2 ** torch.arange(5, -1, -1)).sum(-1)
    assert_frequencies(code, law.log_density(every).double().softmax(0))


# --- chains that were learned with ---


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def forward(self, n=400):
        law = Energy(lambda x: (x - self.mean).square().sum(-1) / 2, (2,))
        with pyro.plate("rows", n):
            pyro.sample("x", law)


@pytest.mark.parametrize(
    ("objective", "how"),
    [
        (ShortRun(steps=20, leaps=2), Continued(from_noise=True, calls=1, leaps=2)),
        (PersistentContrastiveDivergence(chains=500, steps=5), Continued(calls=5)),
    ],
    ids=["short-run", "persistent"],
)
def test_chains_go_on_as_they_were_learned_with(objective, how):
    torch.manual_seed(0)
    x = torch.randn(400, 2) + 2
    learned = learned_by(objective)
    draws = continued_by(how, learned.name, name="as-learned")
    fitted = pgen.fit(
        Bowl(),
        {"x": x},
        pgen.backend("exact", via={"x": (learned, draws)}),
        run=pgen.Run(steps=100, lr=0.1, seed=0),
    )
    drawn = fitted.sample(500, seed=1)["x"]
    assert drawn.shape == (500, 2)
    assert bool((drawn.mean(0) - 2).abs().max() < 0.5)
    assert bool((drawn.std(0) - 1).abs().max() < 0.4)


@pytest.mark.parametrize("name", ["short-run-draws", "persistent-chains"])
def test_chains_that_nobody_left_are_asked_for_in_vain(name):
    with pytest.raises(
        Unanswerable, match=f"by {name}: it goes on with the chains .* not learned; expected via="
    ):
        fit(bowl, name).sample(3)


def test_what_fails_says_what_was_asked_for():
    """A law to begin with that is nowhere near: the cloud does not arrive."""
    far = Energy(lambda x: torch.full_like(x[..., 0], torch.nan), (2,))
    with pytest.raises(Unanswerable, match=r"draws of Energy\(2,\) by annealed"):
        Adapter((tempered_by(AnnealedRun(), name="annealed"),))(far).sample((3,))
