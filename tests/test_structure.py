"""What a program's structure says: sites, plates, parents, roles; and that looking at it leaves no trace."""

import sys
import threading
from typing import ClassVar

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pgen.capability import Capability
from pgen.errors import DataError, ProgramError
from pgen.inspection import structure_of
from pgen.problem import Problem

ROWS = {"x": torch.randn(7)}


def edges(structure):
    return set(structure.graph.edges)


def parents(structure):
    return {s.name: set(s.parents) for s in structure}


# --- the ways in which programs are written ---


def generative(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu + z, 1.0))


def pyros_way(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu + z, 1.0), obs=data)


def either_way(x=None, n=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x) if x is not None else n):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu + z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("program", "data"),
    [
        (generative, ROWS),
        (pyros_way, ROWS["x"]),
        (pyros_way, {"data": ROWS["x"]}),
        (either_way, ROWS),
        (poutine.condition(generative, data={}), ROWS),
    ],
    ids=["generative", "obs=, a tensor", "obs=, a mapping", "either", "a handler around it"],
)
def test_one_program_written_in_several_ways_has_one_structure(program, data):
    structure = structure_of(program, data)
    assert list(structure.sites) == ["mu", "z", "x"]
    assert structure.latents == ("mu", "z")
    assert structure.observed == ("x",)
    assert structure.data_plate == "data"
    assert edges(structure) == {("mu", "x"), ("z", "x")}
    assert not structure.local("mu")
    assert structure.local("z")
    assert structure.local("x")
    assert nx.is_directed_acyclic_graph(structure.graph)
    assert all(flags["certain"] for *_, flags in structure.graph.edges(data=True))


def test_a_site_says_what_it_is():
    def program(n):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(torch.ones(4)))
            pyro.sample("x", dist.Normal(torch.stack([k, k], -1) * 1.0, scale).to_event(1))

    s = structure_of(program, {"x": torch.randn(5, 2)}).sites
    assert s["scale"].distribution == "Gamma"
    assert s["scale"].plates == ()
    assert s["scale"].batch_shape == s["scale"].event_shape == torch.Size()
    assert s["scale"].support.check(torch.tensor(0.5))
    assert not s["scale"].enumerable
    assert not s["scale"].discrete
    assert s["k"].distribution == "Categorical"
    assert s["k"].enumerable
    assert s["k"].cardinality == 4
    assert s["k"].discrete
    assert s["k"].plates == ("data",)
    assert Capability.ENUMERATE in s["k"].capabilities
    assert s["k"].dtype == torch.int64
    assert s["x"].distribution == "Normal"
    assert s["x"].event_shape == (2,)
    assert s["x"].observed
    assert {Capability.SAMPLE, Capability.RSAMPLE, Capability.LOG_PROB} <= s["x"].capabilities


@pytest.mark.parametrize(
    ("law", "measure"), [(dist.Poisson(2.0), "mass"), (dist.Normal(0.0, 1.0), "density"), (None, "mixed")]
)
def test_observed_sites_have_a_measure(law, measure):
    def program():
        pyro.sample("x", law or dist.Normal(0.0, 1.0))
        if law is None:
            pyro.sample("y", dist.Poisson(1.0))

    data = {"x": torch.tensor(1.0)} | ({"y": torch.tensor(2.0)} if law is None else {})
    assert structure_of(program, data).measure == measure


def test_data_may_be_observed_at_any_subset_of_the_sites():
    assert structure_of(generative, {"x": ROWS["x"], "mu": torch.tensor(0.5)}).latents == ("z",)
    nothing = structure_of(generative, None)  # stands for one example
    assert nothing.observed == ()
    assert nothing.data_plate == "data"
    assert structure_of(generative, {"z": torch.tensor([0.0, 1.0])}).latents == ("mu", "x")


def test_a_program_of_fixed_size_has_no_data_plate():
    def schools():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(mu, 1.0))

    structure = structure_of(schools, {"y": torch.randn(8)})
    assert structure.data_plate is None
    assert structure.sites["y"].plates == ("schools",)
    assert structure.plates["schools"].size == 8
    assert not structure.local("y")


def test_sites_unrolled_per_row_make_a_program_of_fixed_size():
    def coins(data):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        for i in range(len(data)):
            pyro.sample(f"x{i}", dist.Bernoulli(p), obs=data[i])

    structure = structure_of(coins, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]))
    assert structure.data_plate is None
    assert structure.observed == ("x0", "x1", "x2", "x3", "x4")
    assert parents(structure)["x3"] == {"p"}


def test_sites_unrolled_in_a_sequential_plate():
    def coins(data):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        for i in pyro.plate("data", len(data)):
            pyro.sample(f"x{i}", dist.Bernoulli(p), obs=data[i])

    structure = structure_of(coins, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert structure.data_plate is None
    assert structure.observed == ("x0", "x1", "x2", "x3")


def test_unrolled_time_inside_the_data_plate():
    def walk(n, steps=3):
        with pyro.plate("data", n):
            z = torch.zeros(n)
            for t in range(steps):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 0.1))

    structure = structure_of(walk, {f"x{t}": torch.randn(6) for t in range(3)})
    assert structure.data_plate == "data"
    assert edges(structure) == {("z0", "z1"), ("z1", "z2"), ("z0", "x0"), ("z1", "x1"), ("z2", "x2")}


def test_a_markov_chain_through_pyro_markov():
    def hmm(data, hidden=3):
        transition = pyro.sample(
            "transition", dist.Dirichlet(torch.ones(hidden)).expand([hidden]).to_event(1)
        )
        with pyro.plate("sequences", data.shape[0], dim=-1):
            x = torch.zeros(data.shape[0], dtype=torch.long)
            for t in pyro.markov(range(data.shape[1])):
                x = pyro.sample(f"x{t}", dist.Categorical(transition[x]), infer={"enumerate": "parallel"})
                pyro.sample(f"y{t}", dist.Normal(x.float(), 1.0), obs=data[:, t])

    structure = structure_of(hmm, torch.randn(4, 3))
    assert parents(structure)["x0"] == {"transition"}
    assert parents(structure)["x2"] == {"transition", "x1"}
    assert parents(structure)["y2"] == {"x2"}
    assert structure.data_plate == "sequences"


def test_nested_plates():
    def groups(n, k=3):
        with pyro.plate("groups", k, dim=-1):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", n, dim=-2):
                pyro.sample("x", dist.Normal(mu, 1.0))

    structure = structure_of(groups, {"x": torch.randn(5, 3)})
    assert structure.data_plate == "data"
    assert structure.sites["x"].plates == ("groups", "data")
    assert structure.sites["mu"].plates == ("groups",)
    assert not structure.local("mu")
    assert structure.nesting == 2
    assert (structure.plates["groups"].dim, structure.plates["data"].dim) == (-1, -2)


def test_two_plates_over_the_rows():
    def program(n):
        with pyro.plate("first", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("second", n):
            pyro.sample("x", dist.Normal(z, 1.0))

    assert structure_of(program, ROWS).data_plates == ("first", "second")


def test_a_plate_as_long_as_the_few_rows_looked_at_is_not_mistaken_for_the_rows():
    def program(n):
        with pyro.plate("three", 3, dim=-2):
            pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("two", 2, dim=-2):
            pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    for rows in (2, 3, 5, 9):
        assert structure_of(program, {"x": torch.randn(rows)}).data_plates == ("data",)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 100, 5000])
def test_any_number_of_rows_finds_the_data_plate(rows):
    assert structure_of(generative, {"x": torch.randn(rows)}).data_plate == "data"


def test_a_subsampling_plate():
    def program(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])

    structure = structure_of(program, torch.randn(10))
    assert structure.plates["data"].subsampled
    assert structure.observed == ("x",)
    assert parents(structure)["x"] == {"mu"}


# --- modules ---


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        self.sigma = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, covariates, y=None):
        mean = self.linear(covariates).squeeze(-1)
        with pyro.plate("data", covariates.shape[0]):
            return pyro.sample("y", dist.Normal(mean, self.sigma), obs=y)


def test_a_pyro_module_with_random_weights():
    structure = structure_of(Regression(), {"covariates": torch.randn(6, 2), "y": torch.randn(6)})
    assert structure.latents == ("linear.weight", "linear.bias")
    assert structure.observed == ("y",)
    assert parents(structure)["y"] == {"linear.weight", "linear.bias"}
    assert structure.sites["y"].inputs == ("covariates",)
    assert len(structure.sites["y"].params) == 1
    assert "sigma" in structure.sites["y"].params[0]
    assert structure.data_plate == "data"


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Linear(3, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[0], 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def test_a_bound_method_of_a_module():
    structure = structure_of(VAE().model, torch.ones(5, 3))
    assert structure.sites["obs"].params == ("decoder.bias", "decoder.weight")
    assert structure.sites["z"].params == ()
    assert structure.latents == ("z",)


def test_learned_tensors_from_closures_modules_and_params():
    network = nn.Linear(1, 1)

    def program(n):
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(network(z[:, None])[:, 0], scale))

    structure = structure_of(program, ROWS)
    assert structure.sites["z"].params == ("loc",)
    assert structure.sites["x"].params == ("network.bias", "network.weight", "scale")
    assert set(structure.params) == {"loc", "scale", "network.bias", "network.weight"}


# --- dependence ---


def test_observed_data_that_is_used_again_makes_an_edge():
    def autoregressive(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(x, 1.0))
            pyro.sample("z", dist.Normal(x * y, 1.0))

    data = {k: torch.randn(4) for k in "xyz"}
    assert edges(structure_of(autoregressive, data)) == {("x", "y"), ("x", "z"), ("y", "z")}

    def given(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    structure = structure_of(given, (torch.randn(4), torch.randn(4)))
    assert edges(structure) == {("x", "y")}  # the raw argument, once observed, is that site


def test_an_input_is_not_a_parent_of_the_site_it_is_observed_at():
    def program(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(2 * x, 1.0), obs=y)

    site = structure_of(program, (torch.randn(4), torch.randn(4))).sites["y"]
    assert site.inputs == ("x",)


def test_an_array_written_element_by_element_and_read_back():
    def chain(n):
        with pyro.plate("data", n):
            states = torch.zeros(n, 4)
            for t in range(4):
                before = states[:, t - 1].clone() if t else torch.zeros(n)
                states[:, t] = pyro.sample(f"z{t}", dist.Normal(before, 1.0))
            pyro.sample("x", dist.Normal(states[:, 2], 1.0))

    found = parents(structure_of(chain, ROWS))
    assert found["z3"] == {"z2"}
    assert found["x"] == {"z2"}


def test_stack_and_unstack_keep_elements_apart():
    def program():
        values = torch.stack([pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(3)])
        for i in range(3):
            pyro.sample(f"x{i}", dist.Normal(values[i], 1.0))

    data = {f"x{i}": torch.tensor(0.0) for i in range(3)}
    assert edges(structure_of(program, data)) == {(f"z{i}", f"x{i}") for i in range(3)}


def test_through_vmap_out_and_indexing_by_a_latent():
    table = torch.randn(3, 2)

    def program():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        out = torch.empty(2)
        torch.mul(torch.vmap(torch.sin)(z), 2.0, out=out)
        pyro.sample("x", dist.Normal(out, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(table[k], 1.0).to_event(1))

    structure = structure_of(program, {"x": torch.zeros(2), "y": torch.zeros(2)})
    assert edges(structure) == {("z", "x"), ("k", "y")}
    assert not structure.leaks


def test_values_that_pass_through_deterministic_sites():
    def program(n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.deterministic("w", 2 * z)
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(w, 1.0))

    structure = structure_of(program, ROWS)
    assert list(structure.sites) == ["z", "x"]
    assert parents(structure)["x"] == {"z"}


def test_what_a_reparameterisation_leaves_is_no_site():
    def program(n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0))

    structure = structure_of(poutine.reparam(program, {"w": LocScaleReparam(0.0)}), ROWS)
    assert list(structure.sites) == ["z", "w_decentered", "x"]
    assert list(structure.observed) == ["x"]
    assert parents(structure)["x"] == {"z", "w_decentered"}


def test_a_support_that_moves_is_said():
    def program():
        top = pyro.sample("top", dist.Gamma(1.0, 1.0))
        pyro.sample("z", dist.Uniform(torch.zeros(()), top))

    site = structure_of(program, None).sites["z"]
    assert site.support_parents == ("top",)
    assert site.parents == ("top",)


def test_a_mask_or_scale_made_from_a_latent_is_a_dependence():
    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with poutine.mask(mask=z.bool()):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert parents(structure_of(program, {"x": torch.tensor(0.0)}))["x"] == {"z"}


def test_a_value_that_leaves_torch_is_reported_with_file_and_line():
    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("before", dist.Normal(z, 1.0))
        loc = 1.0 if z.item() else -1.0  # here
        pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    structure = structure_of(program, {"x": torch.tensor(0.3)})
    (leak,) = structure.leaks
    line = program.__code__.co_firstlineno + 3
    assert leak.where == f"{__file__}:{line}"
    assert leak.labels == {"z"}
    assert structure.sites["before"].certain
    assert not structure.sites["x"].certain
    assert "z" in structure.sites["x"].parents
    assert not structure.graph.edges["z", "x"]["certain"]
    assert structure.graph.edges["z", "before"]["certain"]
    assert f"{__file__}:{line}" in repr(structure)


def test_a_branch_on_a_latent_is_a_leak():
    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(1.0 if z > 0 else -1.0, 1.0))

    structure = structure_of(program, {"x": torch.tensor(0.3)})
    assert structure.leaks
    assert "z" in structure.sites["x"].parents


class Pushforward(dist.TorchDistribution):
    """Draws, and no density."""

    arg_constraints: ClassVar = {}
    has_rsample = True
    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(torch.as_tensor(loc).shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return torch.sin(self.loc + torch.randn(torch.Size(sample_shape) + self.batch_shape))

    def expand(self, batch_shape, _instance=None):
        return Pushforward(self.loc.expand(batch_shape))


@pytest.mark.parametrize("observe", [True, False])
def test_an_implicit_site_has_parents_too(observe):
    def program(n):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            x = pyro.sample("x", Pushforward(mu.expand(n)))
            pyro.sample("y", dist.Normal(x, 1.0))

    data = {"y": torch.randn(5)} | ({"x": torch.zeros(5)} if observe else {})
    structure = structure_of(program, data)
    assert edges(structure) == {("mu", "x"), ("x", "y")}
    assert structure.sites["x"].capabilities == {Capability.SAMPLE, Capability.RSAMPLE}
    assert structure.sites["x"].observed == observe


def test_factors_are_soft_evidence():
    energy = nn.Linear(1, 1)

    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("energy", energy(x[:, None])[:, 0])

    structure = structure_of(program, ROWS)
    assert structure.factors == ("energy",)
    assert structure.observed == ("x",)
    assert structure.latents == ()
    assert structure.sites["energy"].factor
    assert structure.sites["energy"].params == ("energy.bias", "energy.weight")
    assert structure.sites["energy"].parents == ("x",)
    assert structure.sites["energy"].plates == ("data",)


# --- five programs in the style of Pyro's examples ---


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0, 1))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def mixture(data, components=3):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(components)))
    with pyro.plate("components", components):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], 1.0), obs=data)


def lda(words, topics=2, vocabulary=5):
    with pyro.plate("topics", topics):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(vocabulary)))
    with pyro.plate("documents", words.shape[0], dim=-1):
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(topics)))
        with pyro.plate("words", words.shape[1], dim=-2):
            word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics))
            pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=words.T)


def baseball(at_bats, hits):
    m = pyro.sample("m", dist.Uniform(0, 1))
    kappa = pyro.sample("kappa", dist.Pareto(1, 1.5))
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        return pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


def sparse_gamma(x):
    with pyro.plate("latent", x.shape[1], dim=-1), pyro.plate("data", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Gamma(0.1, 0.1))
    with pyro.plate("top", 2, dim=-2), pyro.plate("bottom", x.shape[1], dim=-1):
        w = pyro.sample("w", dist.Gamma(0.3, 0.1))
    mean = (z[:, :2] @ w) + 1e-3
    with pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        pyro.sample("obs", dist.Poisson(mean), obs=x)


EXAMPLES = {
    "eight schools": (
        eight_schools,
        (torch.randn(8), torch.ones(8)),
        {"mu": set(), "tau": set(), "eta": set(), "obs": {"mu", "tau", "eta"}},
        "schools",
    ),
    "mixture": (
        mixture,
        torch.randn(9),
        {"weights": set(), "locs": set(), "assignment": {"weights"}, "obs": {"locs", "assignment"}},
        "data",
    ),
    "topics": (
        lda,
        torch.randint(5, (4, 6)),
        {
            "topic_words": set(),
            "doc_topics": set(),
            "word_topics": {"doc_topics"},
            "doc_words": {"topic_words", "word_topics"},
        },
        "documents",
    ),
    "baseball": (
        baseball,
        (torch.full((6,), 10.0), torch.arange(6.0)),
        {"m": set(), "kappa": set(), "phi": {"m", "kappa"}, "obs": {"phi"}},
        "num_players",
    ),
    "sparse gamma": (sparse_gamma, torch.ones(6, 4), {"z": set(), "w": set(), "obs": {"z", "w"}}, "data"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_programs_as_in_pyros_examples(name):
    program, data, expected, plate = EXAMPLES[name]
    structure = structure_of(program, data)
    assert parents(structure) == expected
    assert structure.data_plate == plate
    assert not structure.leaks


# --- errors ---


def test_a_program_that_raises_is_told_with_its_site():
    def program(n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.expand(n) @ torch.ones(n + 1), 1.0))

    with pytest.raises(ProgramError, match="program raised RuntimeError after site 'z'") as caught:
        structure_of(program, ROWS)
    assert caught.value.__cause__ is not None

    def early():
        raise KeyError("oh")

    with pytest.raises(ProgramError, match="early raised KeyError before its first site: 'oh'"):
        structure_of(early)

    def bad_law():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, -torch.ones(())))

    with pytest.raises(ProgramError, match="bad_law raised ValueError after site 'a'"):
        structure_of(bad_law)

    def bad_draw():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", Pushforward(torch.zeros(2)).to_event(1), obs=torch.zeros(3))

    with pytest.raises(DataError, match="site 'z'"):
        structure_of(bad_draw)


def test_a_duplicate_site_is_told():
    def program():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="program has two sites named 'z'"):
        structure_of(program)


def test_an_unknown_key_lists_arguments_and_sites():
    with pytest.raises(DataError) as caught:
        structure_of(generative, {"y": ROWS["x"]})
    text = str(caught.value)
    assert "data key 'y' names neither an argument nor a site of generative" in text
    assert "its arguments: n" in text
    assert "its sites: mu, z, x" in text


def test_a_value_of_the_wrong_shape_says_both_shapes():
    with pytest.raises(DataError) as caught:
        structure_of(generative, {"x": torch.randn(5, 3)})
    text = str(caught.value)
    assert "site 'x'" in text
    assert "Normal" in text
    assert "(5, 3)" in text or "(3, 3)" in text


def test_a_value_outside_the_support_says_where_and_which():
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Beta(2.0, 2.0))

    with pytest.raises(DataError) as caught:
        structure_of(program, {"x": torch.tensor([0.5, 0.25, 0.125, 1.5])})
    text = str(caught.value)
    assert "site 'x'" in text
    assert "1.5" in text
    assert "(3,)" in text
    assert "Beta" in text


def test_integers_where_a_law_takes_floats_only():
    def coin(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Bernoulli(0.5))

    with pytest.raises(
        DataError,
        match=r"site 'x': Bernoulli cannot take the observed values, which are torch.int64 .*data.float\(\)",
    ):
        structure_of(coin, {"x": torch.tensor([0, 1, 1])})


def test_bad_data_beyond_the_first_rows_is_found():
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Poisson(1.0))

    data = torch.ones(500)
    data[431] = 0.5
    with pytest.raises(DataError, match=r"\(431,\)"):
        structure_of(program, {"x": data})


def test_missing_values_only_where_nothing_depends_on_them():
    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0))

    nan = torch.tensor([1.0, float("nan"), 2.0])
    structure = structure_of(program, {"x": torch.ones(3), "y": nan})
    assert structure.missing == {"y"}
    with pytest.raises(DataError, match="site 'x' has missing values .* and y depends on it"):
        structure_of(program, {"x": nan, "y": torch.ones(3)})

    def joint(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))

    assert structure_of(joint, {"x": torch.stack([nan, nan], -1)}).missing == {"x"}


# --- no trace ---


def test_looking_leaves_no_trace():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    pyro.get_param_store().setdefault("mine", torch.tensor(3.0))

    def program(x):
        pyro.param("theirs", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    x = torch.randn(6, 2)
    before = (
        torch.get_rng_state(),
        x.clone(),
        x._version,
        {k: v.clone() for k, v in network.state_dict().items()},
        network.training,
    )
    try:
        structure_of(program, x)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(x, before[1])
        assert x._version == before[2]
        assert all(torch.equal(v, before[3][k]) for k, v in network.state_dict().items())
        assert network.training == before[4]
        assert list(pyro.get_param_store().keys()) == ["mine"]
    finally:
        pyro.clear_param_store()


def test_looking_twice_sees_the_same():
    first, second = structure_of(mixture, torch.arange(9.0)), structure_of(mixture, torch.arange(9.0))
    assert repr(first) == repr(second)
    assert edges(first) == edges(second)


def test_threads_take_turns():
    errors, interval = [], sys.getswitchinterval()

    def look():
        for _ in range(5):
            try:
                assert list(structure_of(generative, ROWS).sites) == ["mu", "z", "x"]
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_validation_that_was_off_stays_off():
    with pyro.validation_enabled(False):
        structure_of(generative, ROWS)
        assert not torch.distributions.Distribution._validate_args


def test_a_structure_can_be_made_from_a_problem():
    problem = Problem.of(generative, ROWS)
    assert repr(structure_of(problem)) == repr(structure_of(generative, ROWS))


def test_it_prints_as_a_program_reads():
    text = repr(structure_of(generative, ROWS))
    assert text.splitlines() == [
        "Structure of generative:",
        "  latent   mu ~ Normal",
        "  latent   z ~ Bernoulli  in data",
        "  observed x | mu, z ~ Normal  in data",
    ]


def test_missing_labels():
    def coins(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    holed = torch.tensor([[1.0, float("nan"), 0.0], [1.0, 1.0, 1.0]])
    assert structure_of(coins, {"x": holed}).missing == {"x"}


def test_a_plate_is_no_site_in_messages():
    def program(x):
        with pyro.plate("data", len(x)):
            raise KeyError("oh")

    with pytest.raises(ProgramError, match="program raised KeyError before its first site"):
        structure_of(program, ROWS)


def test_double_data_on_single_weights_is_told_with_the_fix():
    network = nn.Linear(2, 1)

    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x)[:, 0], 1.0))

    with pytest.raises(
        ProgramError,
        match=r"'x' is float64: give x.float\(\), or fit in double with Run\(precision='float64'\)",
    ):
        structure_of(program, {"x": torch.randn(4, 2, dtype=torch.float64)})


# --- rows that a program chooses ---


def test_copies_that_a_program_names_are_the_same_in_every_run():
    def of(index, draws=0):
        def program():
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            torch.rand(draws)
            with pyro.plate("rows", 100, subsample=index()):
                pyro.sample("x", dist.Normal(m, 1.0))

        return structure_of(program).plates["rows"]

    fixed = torch.arange(0, 100, 5)
    plate = of(lambda: fixed)
    assert (plate.size, plate.subsampled, plate.chosen) == (20, True, True)
    assert not of(lambda: torch.randperm(100)[:20]).chosen
    assert not of(lambda: torch.from_numpy(np.random.permutation(100)[:20])).chosen  # noqa: NPY002
    assert not of(lambda: None).subsampled
