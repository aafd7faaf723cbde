"""Discrete latents that are moved in turn: laws against enumeration, who is moved with whom, and what is said about it.

Chains are independent of each other: their last draws are independent draws, and frequencies are tested at 1e-6.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.algorithms.kernels.gibbs import GibbsWithGradients
from pgen.algorithms.kernels.local import LocalGibbs
from pgen.backends.mcmc.blankets import blankets
from pgen.backends.mcmc.discrete import in_turn
from pgen.backends.mcmc.flips import Flips
from pgen.density import Density
from pgen.errors import Refused
from pgen.inspection import inspect_problem
from pgen.metrics.chains import diagnose
from pgen.problem import Problem
from pgen.testing.statistics import StatisticalFailure, assert_frequencies

CHAINS = 2000
FEW = {"chains": CHAINS, "warmup": 40, "draws": 100}  # draws are made a hundred at a time


def last(program, data=None, **options):
    """The last draw of each chain."""
    fitted = pgen.fit(program, data, pgen.backend("mcmc", **(FEW | options)))
    return {name: values[:, -1] for name, values in fitted.draws().by_chain().items()}


def code(z, sizes):
    z = z.reshape(len(z), -1).long()
    return sum(c * math.prod(sizes[i + 1 :]) for i, c in enumerate(z.unbind(1)))


def states(*sizes):
    return torch.tensor(list(itertools.product(*map(range, sizes))))


def sampler_of(program, data=None, held=("z",)):
    structure, problem = inspect_problem(Problem.of(program, data))
    torch.manual_seed(0)
    return in_turn(Density.of(problem.whole(), structure, (), held), True, lambda fn: fn, None, None, 1)


# --- grids ---


def coupling(s):
    return 0.4 * s[..., 1:, :] * s[..., :-1, :], 0.4 * s[..., 1:] * s[..., :-1]


def field(s):
    return 0.1 * s * torch.arange(9.0).reshape(3, 3) / 4


def ising_in_plates():
    with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 3, dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("field", field(2 * z - 1))
    down, across = coupling(2 * z - 1)
    pyro.factor("down", down)
    pyro.factor("across", across)


def ising_in_one_sum():
    z = pyro.sample("z", dist.Bernoulli(0.5).expand([3, 3]).to_event(2))
    s = 2 * z - 1
    pyro.factor("energy", sum(e.sum() for e in (*coupling(s), field(s))))


def ising_law(strength=1.0):
    s = 2.0 * states(*[2] * 9).reshape(-1, 3, 3) - 1
    log = sum(e.flatten(1).sum(1) * strength for e in coupling(s)) + field(s).flatten(1).sum(1)
    return log.double().softmax(0)


@pytest.mark.parametrize("program", [ising_in_plates, ising_in_one_sum])
def test_spins_against_enumeration(program):
    z = last(program)["z"]
    assert_frequencies(code(z, [2] * 9), ising_law())
    with pytest.raises(StatisticalFailure):  # the check notices a coupling that is off by half
        assert_frequencies(code(z, [2] * 9), ising_law(0.5))


def test_a_grid_takes_two_colours_and_a_sum_takes_one_for_each():
    apart, together = (
        sampler_of(ising_in_plates).kernel.discrete,
        sampler_of(ising_in_one_sum).kernel.discrete,
    )
    assert sorted(map(len, apart.colours)) == [4, 5]
    assert len(together.colours) == 9


def test_looking_up_a_table_by_neighbours():
    table = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    prior = torch.tensor([0.2, 0.3, 0.5])

    def potts():
        with pyro.plate("sites", 5):
            z = pyro.sample("z", dist.Categorical(prior))
        pyro.factor("pairs", table[z[1:], z[:-1]])

    kernel = sampler_of(potts).kernel.discrete
    assert sorted(map(len, kernel.colours)) == [2, 3]
    z = states(*[3] * 5)
    law = (prior.log()[z].sum(1) + table[z[:, 1:], z[:, :-1]].sum(1)).double().softmax(0)
    assert_frequencies(code(last(potts)["z"], [3] * 5), law)


def test_different_kinds_together():
    """Labels, flags, one-hot codes and plain numbers with a list, coupled by one statement."""

    def program():
        with pyro.plate("two", 2):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(0.3))
        c = pyro.sample("c", dist.OneHotCategorical(torch.tensor([0.6, 0.4])))
        d = pyro.sample("d", dist.Binomial(2, 0.5))
        pyro.sample("y", dist.Normal(a.sum() + 2 * b.sum() - c[1] + d, 1.0), obs=torch.tensor(3.0))

    sizes = (3, 3, 2, 2, 2, 3)
    v = states(*sizes).double()
    log = torch.tensor([0.2, 0.3, 0.5]).double().log()[v[:, :2].long()].sum(1)
    log = log + (v[:, 2:4] * math.log(0.3 / 0.7)).sum(1) + v[:, 4] * math.log(0.4 / 0.6)
    log = log + torch.tensor([1.0, 2.0, 1.0]).double().log()[v[:, 5].long()]
    log = log - (3 - v[:, :2].sum(1) - 2 * v[:, 2:4].sum(1) + v[:, 4] - v[:, 5]) ** 2 / 2
    found = last(program, enumerate="none")
    z = torch.cat([found["a"], found["b"], found["c"].argmax(-1, True), found["d"].reshape(-1, 1)], 1)
    assert_frequencies(code(z, sizes), log.softmax(0))


# --- with continuous latents ---

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] * 0.8 + 0.5 * torch.randn(12, generator=torch.Generator().manual_seed(1))


def selection(x, y):
    with pyro.plate("columns", 4):
        g = pyro.sample("g", dist.Bernoulli(0.3))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ (g * b), 0.7), obs=y)


def test_variables_of_a_regression_are_selected_as_often_as_they_should_be():
    g = states(*[2] * 4).double()
    covariance = (X.double() * g[:, None]) @ X.double().T + 0.49 * torch.eye(12)
    evidence = dist.MultivariateNormal(torch.zeros(12).double(), covariance).log_prob(Y.double())
    law = (evidence + (g * math.log(0.3 / 0.7)).sum(1)).softmax(0)
    found = last(selection, {"x": X, "y": Y}, warmup=150)
    assert_frequencies(code(found["g"], [2] * 4), law)
    unused = found["b"][:, 3][found["g"][:, 3] == 0].double()  # has its prior
    assert abs(float(unused.mean())) < 5 / len(unused) ** 0.5


def test_a_topic_model_summed_out_and_in_turn_agree():
    words = torch.randint(0, 5, (4, 8), generator=torch.Generator().manual_seed(0))

    def topics(w):
        phi = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6]])
        with pyro.plate("documents", 4, dim=-2):
            theta = pyro.sample("theta", dist.Beta(1.0, 2.0))
            with pyro.plate("words", 8, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(theta))
                pyro.sample("w", dist.Categorical(phi[z.long()]), obs=w)

    found = {}
    for way in ("auto", "none"):
        backend = pgen.backend("mcmc", enumerate=way, chains=64, warmup=100, draws=100)
        draws = pgen.fit(topics, words, backend).draws().by_chain()
        found[way] = [diagnose(draws[name].double().flatten(2), (0.5,)) for name in ("theta", "z")]
    for one, other in zip(found["auto"], found["none"], strict=True):
        error = (one.mcse_mean**2 + other.mcse_mean**2).sqrt()
        assert bool(((one.mean - other.mean).abs() < 5.5 * error).all())
    kernel = sampler_of(topics, words).kernel.discrete
    assert len(kernel.colours) == 1  # given the rest, words are independent


# --- numbers without an end ---


def test_a_count_that_was_seen_in_part():
    """n animals, each seen with probability p: 17 were."""

    def program():
        n = pyro.sample("n", dist.Poisson(12.0))
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("seen", dist.Binomial(n, p), obs=torch.tensor(17.0))

    n = torch.arange(17, 60).double()
    log = n * math.log(12.0) - torch.lgamma(n + 1)
    log = log + torch.lgamma(n + 1) - torch.lgamma(n - 16)  # n over 17, up to a constant
    log = log + torch.lgamma(n - 17 + 2) - torch.lgamma(n + 4)
    found = last(program, warmup=200)["n"]
    assert_frequencies((found - 17).clamp(max=42), log.softmax(0))


def test_a_support_that_depends_on_a_count():
    def program():
        n = pyro.sample("n", dist.Poisson(3.0))
        k = pyro.sample("k", dist.Binomial(n, 0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(2.5))

    n, k = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    binomial = (
        torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1) - n * math.log(2)
    )
    log = n * math.log(3.0) - torch.lgamma(n + 1) + binomial - (k - 2.5) ** 2 / 2
    law = torch.where(k <= n, log, -math.inf).double().flatten().softmax(0)
    assert "k moved in turn by whole numbers (Metropolis), not summed out: its values depend on 'n'" in why(
        program
    )
    found = last(program, warmup=150)
    assert_frequencies(found["n"].clamp(max=13) * 14 + found["k"].clamp(max=13), law)


def test_steps_grow_with_the_counts_and_elements_move_at_once():
    def program(y):
        with pyro.plate("rows", len(y)):
            n = pyro.sample("n", dist.Poisson(torch.tensor([0.5, 30.0, 5000.0])))
            pyro.sample("y", dist.Normal(n, 1000.0), obs=y)

    y = torch.tensor([1.0, 30.0, 5000.0])
    assert len(sampler_of(program, y, ("n",)).kernel.discrete.colours) == 1
    draws = (
        pgen.fit(program, y, pgen.backend("mcmc", chains=64, warmup=200, draws=200)).draws().by_chain()["n"]
    )
    found = diagnose(draws.double(), (0.5,))
    # With so much noise, the posterior is the prior, but for a shift of a thousandth of its variance.
    for i, rate in enumerate((0.5, 30.0, 5000.0)):
        shift = rate * (float(y[i]) - rate) / 1e6
        assert abs(float(found.mean[i]) - rate - shift) < 5 * float(found.mcse_mean[i])
        assert float(found.ess_bulk[i]) > 1000


# --- terms and elements ---


def test_a_thousand_elements_are_told_apart():
    def program():
        with pyro.plate("sites", 1000):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.factor("pairs", 1.0 * (z[1:] == z[:-1]))

    kernel = sampler_of(program).kernel.discrete
    true = {(i, i + 1) for i in range(999)}
    pairs = [s for s in kernel.scopes if len(s) > 1]
    assert true <= {(min(s), max(s)) for s in pairs} | {
        p for s in pairs for p in itertools.combinations(s, 2)
    }
    assert sum(len(s) for s in pairs) < 2.1 * len(true)
    assert len(kernel.colours) <= 4


def test_what_left_torch_may_depend_on_everything():
    def program():
        with pyro.plate("sites", 4):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("hidden", torch.as_tensor(z.numpy()[1:] * z.numpy()[:-1]))

    structure, problem = inspect_problem(Problem.of(program))
    density = Density.of(problem.whole(), structure, (), ("z",))
    flips = Flips.of(density)
    found = blankets(density, flips, torch.zeros(0), torch.randint(2, (4, 4)))
    assert found.scopes == ((0, 1, 2, 3),)


@pytest.mark.parametrize("informative", [True, False])
def test_gradients_where_very_many_elements_all_meet(informative):
    """Only where the program has gradients by one-hot codes, and these say what changes are worth."""

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5).expand([310]).to_event(1))
        value = z if informative else torch.tensor([0.0, 1.0])[z.long()]
        pyro.factor("energy", -0.5 * (value.sum() - 100) ** 2 / 400)

    kernel = sampler_of(program).kernel
    assert isinstance(kernel.discrete, GibbsWithGradients if informative else LocalGibbs)
    if informative:
        draws = (
            pgen.fit(program, None, pgen.backend("mcmc", chains=16, warmup=20, draws=100))
            .draws()
            .by_chain()["z"]
        )
        total = diagnose(draws.double().sum(-1), (0.5,))
        n = torch.arange(311).double()
        choose = torch.lgamma(torch.tensor(311.0).double()) - torch.lgamma(n + 1) - torch.lgamma(311 - n)
        law = (choose - 0.5 * (n - 100) ** 2 / 400).softmax(0)
        assert abs(float(total.mean) - float((law * n).sum())) < 5 * float(total.mcse_mean)


# --- what is said, saved and refused ---


def why(program, data=None, **options):
    rows = pgen.explain(program, data)
    return next(r.answer.why for r in rows if r.backend == "mcmc")


def test_explain_says_why_each_latent_is_moved_as_it_is():
    said = why(selection, {"x": X, "y": Y})
    assert "b moved by hmc" in said
    assert "g drawn in turn, each given all others (Gibbs), not summed out: 'y' depends on 'g'" in said

    def counts():
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(n, 1.0), obs=torch.tensor(2.0))

    assert "n moved in turn by whole numbers (Metropolis), not summed out: there is no list" in why(counts)
    assert "z moved in turn, element by element" in why(ising_in_one_sum)


def test_what_is_neither_listed_nor_counted_is_refused():
    def program():
        m = pyro.sample("m", dist.Multinomial(5, torch.ones(3) / 3))
        pyro.sample("y", dist.Normal(m[0], 1.0), obs=torch.tensor(2.0))

    with pytest.raises(Refused, match=r"'m' lacks elements that are single numbers"):
        pgen.fit(program, None, "mcmc")


def test_chains_go_on_where_they_were():
    backend = pgen.backend("mcmc", chains=4, warmup=20, draws=100)
    whole = pgen.fit(
        selection, {"x": X, "y": Y}, pgen.backend("mcmc", chains=4, warmup=20, draws=200), seed=3
    )
    part = pgen.fit(selection, {"x": X, "y": Y}, backend, seed=3)
    part.resume(100)
    for name, values in whole.draws().items():
        torch.testing.assert_close(values, part.draws()[name], rtol=0, atol=0)


def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("components", 3):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(m[z], s), obs=y)


@pytest.mark.slow
def test_exchangeable_components_summed_out_and_in_turn_agree_and_labels_are_said_to_switch():
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0))
    y = noise + torch.tensor([-5.0, 0.0, 5.0]).repeat(20)
    found = []
    for way in ("auto", "none"):
        fitted = pgen.fit(mixture, y, pgen.backend("mcmc", enumerate=way, chains=64, draws=200), seed=1)
        draws = fitted.draws().by_chain()
        order = draws["m"].argsort(-1)
        invariant = [draws["m"].gather(-1, order), draws["w"].gather(-1, order), draws["s"].unsqueeze(-1)]
        together = (draws["z"][..., :-1] == draws["z"][..., 1:]).double()
        found.append(diagnose(torch.cat([*(v.double() for v in invariant), together], -1), (0.5,)))
        assert len(order[:, -1].unique(dim=0)) == 6  # every order is some chain's
        assert any("Labels are switched" in w for w in fitted.summary().warnings)
    one, other = found
    error = (one.mcse_mean**2 + other.mcse_mean**2).sqrt().nan_to_num() + 1e-3
    assert bool(((one.mean - other.mean).abs() < 5.5 * error).all())
    assert float(other.ess_bulk[:7].min()) > 1000
