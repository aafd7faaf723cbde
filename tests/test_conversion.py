"""Conversions: what a law is given, it has; the most exact, then cheapest path is taken."""

import math
from dataclasses import replace
from typing import ClassVar

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.capability import Capability, Exactness, capabilities_of
from pgen.conversion import CORE, Adapter, Conversion, Conversions, Converted, exactness_of, inside
from pgen.errors import UnknownName
from pgen.handlers import Adapt
from pgen.testing import statistics as stats

C = Capability
CONVERSIONS = Conversions()


class Energies(dist.TorchDistribution):
    """An unnormalised law on 0..K-1: nothing but its log density and its support."""

    arg_constraints: ClassVar = {}
    capabilities = frozenset({C.LOG_DENSITY, C.ENUMERATE})
    has_enumerate_support = True

    def __init__(self, table):
        self.table = table
        super().__init__(table.shape[:-1], validate_args=False)

    @property
    def support(self):
        return dist.constraints.integer_interval(0, self.table.shape[-1] - 1)

    def log_density(self, value):
        table = self.table.expand((*value.shape, self.table.shape[-1]))
        return table.gather(-1, value.long()[..., None])[..., 0]

    def enumerate_support(self, expand=True):
        values = torch.arange(self.table.shape[-1]).reshape(-1, *[1] * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def expand(self, batch_shape, _instance=None):
        return Energies(self.table.expand((*batch_shape, self.table.shape[-1])))


class PathwiseOnly(dist.TorchDistribution):
    arg_constraints: ClassVar = {}
    capabilities = frozenset({C.RSAMPLE})
    has_rsample = True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return self.loc + torch.randn(torch.Size(sample_shape) + self.batch_shape)


def convert(law, wanted):
    return Adapter(CONVERSIONS.path(capabilities_of(law), wanted))(law)


TABLE = torch.tensor([[0.0, 1.0, -2.0], [3.0, 3.0, 3.5]])


def test_an_exact_sum_normalises():
    law = convert(Energies(TABLE), C.LOG_PROB)
    values = law.enumerate_support()
    assert torch.allclose(law.log_prob(values).T, TABLE.log_softmax(-1))
    assert torch.allclose(law.log_prob(values).logsumexp(0), torch.zeros(2), atol=1e-6)


def test_a_table_draws():
    law = convert(Energies(TABLE), C.SAMPLE)
    drawn = law.sample((20_000,))
    assert drawn.shape == (20_000, 2)
    stats.assert_frequencies(drawn, TABLE.softmax(-1))


def test_a_table_of_vectors_draws():
    one_hot = dist.OneHotCategorical(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    law = Converted(one_hot, (CONVERSIONS.named("table"),))
    drawn = law.sample((5000,))
    assert drawn.shape == (5000, 2, 2)
    assert bool((drawn.sum(-1) == 1).all())
    stats.assert_frequencies(drawn.argmax(-1), one_hot.probs)


def test_a_score_is_the_gradient_of_the_density():
    law = convert(dist.Normal(torch.tensor([1.0, -2.0]), 2.0), C.SCORE)
    x = torch.tensor([0.5, 4.0])
    assert torch.allclose(law.score(x), -(x - torch.tensor([1.0, -2.0])) / 4)
    many = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    x = torch.randn(5, 2)
    assert torch.allclose(convert(many, C.SCORE).score(x), -x @ many.precision_matrix, atol=1e-5)


def test_a_score_can_be_differentiated_again():
    x = torch.tensor([0.3], requires_grad=True)
    score = convert(dist.Normal(0.0, 2.0), C.SCORE).score(x)
    assert torch.allclose(torch.autograd.grad(score, x)[0], torch.tensor([-0.25]))
    with torch.no_grad():
        assert not convert(dist.Normal(0.0, 2.0), C.SCORE).score(torch.tensor([0.3])).requires_grad


def test_a_density_is_a_log_prob_and_a_draw_carries_no_gradient():
    normal = dist.Normal(0.0, 1.0)
    x = torch.tensor(0.7)
    assert torch.equal(convert(normal, C.LOG_DENSITY).log_density(x), normal.log_prob(x))
    loc = torch.zeros(3, requires_grad=True)
    law = convert(PathwiseOnly(loc), C.SAMPLE)
    assert not law.sample((2,)).requires_grad
    assert law.rsample((2,)).requires_grad


def test_converted_laws_are_otherwise_what_they_were():
    base = dist.Gamma(torch.tensor([2.0, 3.0]), 1.0)
    law = convert(base, C.SCORE)
    assert isinstance(law, Converted)
    assert law.batch_shape == (2,)
    assert law.event_shape == ()
    assert law.support is base.support
    assert law.has_rsample
    assert law.concentration is base.concentration
    assert law.expand([4, 2]).batch_shape == (4, 2)
    assert law.expand([4, 2]).score(torch.ones(4, 2)).shape == (4, 2)
    assert law.capabilities == capabilities_of(base) | {C.LOG_DENSITY, C.SCORE}
    with pytest.raises(AttributeError):
        law.nonsense


# --- paths ---


def names(path):
    return None if path is None else [c.name for c in path]


def step(name, needs, gives, exactness=Exactness.EXACT, cost=1.0):
    return Conversion(name, frozenset(needs), gives, exactness, cost, lambda law: {})


def test_nothing_is_needed_for_what_is_there():
    assert CONVERSIONS.path(frozenset({C.SAMPLE}), C.SAMPLE) == ()


def test_no_way_is_no_path():
    assert CONVERSIONS.path(frozenset({C.SAMPLE}), C.LOG_PROB) is None
    assert CONVERSIONS.path(frozenset(), C.SAMPLE) is None


def test_several_needs_meet():
    assert names(CONVERSIONS.path(frozenset({C.ENUMERATE, C.LOG_DENSITY}), C.SAMPLE)) == [
        "exact-sum",
        "table",
    ]


def test_exactness_comes_before_cost_and_cost_before_nothing():
    costly, cheap, cheaper = (
        step("costly", {C.SAMPLE}, C.LOG_PROB, cost=100.0),
        step("cheap", {C.SAMPLE}, C.LOG_PROB, Exactness.ESTIMATE, 1.0),
        step("cheaper", {C.SAMPLE}, C.LOG_PROB, Exactness.ESTIMATE, 0.5),
    )
    assert names(Conversions((cheap, costly, cheaper)).path(frozenset({C.SAMPLE}), C.LOG_PROB)) == ["costly"]
    assert names(Conversions((cheap, cheaper)).path(frozenset({C.SAMPLE}), C.LOG_PROB)) == ["cheaper"]


def test_a_long_exact_path_beats_a_short_estimate():
    long = (step("a", {C.SAMPLE}, C.RATIO, cost=5.0), step("b", {C.RATIO}, C.LOG_PROB, cost=5.0))
    short = step("short", {C.SAMPLE}, C.LOG_PROB, Exactness.ESTIMATE, 0.1)
    path = Conversions((short, *long)).path(frozenset({C.SAMPLE}), C.LOG_PROB)
    assert names(path) == ["a", "b"]
    assert exactness_of(path) is Exactness.EXACT
    assert exactness_of((*path, short)) is Exactness.ESTIMATE
    assert exactness_of(()) is Exactness.EXACT


def test_circles_end():
    circle = (step("there", {C.SAMPLE}, C.SCORE), step("back", {C.SCORE}, C.SAMPLE))
    assert Conversions(circle).path(frozenset({C.SAMPLE}), C.LOG_PROB) is None


def test_the_path_is_the_best_of_all(seed):
    """Against brute force over all orders of application, on random graphs of conversions."""
    generator = torch.Generator().manual_seed(seed)

    def roll(n):
        return int(torch.randint(n, (), generator=generator))

    kinds = list(C)
    for _ in range(40):
        installed = tuple(
            step(
                f"c{i}",
                {kinds[roll(6)] for _ in range(1 + roll(2))},
                kinds[roll(6)],
                [Exactness.EXACT, Exactness.ESTIMATE][roll(2)],
                1.0 + roll(5),
            )
            for i in range(7)
        )
        has, wanted = frozenset({kinds[0]}), kinds[1 + roll(5)]
        found = Conversions(installed).path(has, wanted)
        best = brute_force(installed, has, wanted)
        assert (found is None) == (best is None)
        if found is not None and wanted not in has:
            assert -exactness_of(found).strength == best[0]
            reached = set(has)
            for c in found:
                assert c.needs <= reached
                reached.add(c.gives)
            assert wanted in reached


def brute_force(installed, has, wanted):
    """The best (weakness, cost) by relaxation over sets of capabilities."""
    frontier, seen = {has: (-4, 0.0)}, {}
    while frontier:
        state = min(frontier, key=frontier.get)
        merit = frontier.pop(state)
        seen[state] = merit
        for c in installed:
            if c.needs <= state and c.gives not in state:
                after, reached = state | {c.gives}, (max(merit[0], -c.exactness.strength), merit[1] + c.cost)
                if after not in seen and reached < frontier.get(after, (1, math.inf)):
                    frontier[after] = reached
    reached = [merit for state, merit in seen.items() if wanted in state]
    return min(reached, default=None)


def test_via_goes_through_what_was_asked_for():
    slow = step("slow", {C.LOG_DENSITY}, C.LOG_PROB, Exactness.ESTIMATE, 50.0)
    graph = Conversions((*CORE, slow))
    has = frozenset({C.ENUMERATE, C.LOG_DENSITY})
    assert names(graph.path(has, C.LOG_PROB)) == ["exact-sum"]
    assert names(graph.path(has, C.LOG_PROB, via="slow")) == ["slow"]
    assert names(graph.path(has, C.SAMPLE, via="slow")) == ["slow", "table"]
    assert graph.path(frozenset({C.SAMPLE}), C.LOG_PROB, via="slow") is None
    with pytest.raises(UnknownName, match="no conversion 'sloww'; installed: density"):
        graph.path(has, C.LOG_PROB, via="sloww")


def test_the_graph_can_be_looked_at():
    graph = CONVERSIONS.graph
    assert isinstance(graph, nx.DiGraph)
    assert (C.LOG_PROB, "density") in graph.edges
    assert ("density", C.LOG_DENSITY) in graph.edges
    assert graph.nodes["exact-sum"]["exactness"] == "exact"
    assert nx.has_path(graph, C.LOG_PROB, C.SCORE)


# --- purposes ---


def test_conversions_for_another_purpose_are_passed_over():
    has = frozenset({C.LOG_DENSITY})
    gradient = replace(step("gradient", {C.LOG_DENSITY}, C.LOG_PROB, Exactness.SURROGATE), purpose="learning")
    number = replace(
        step("number", {C.LOG_DENSITY}, C.LOG_PROB, Exactness.ESTIMATE, 90.0), purpose="answering"
    )
    last = replace(step("last", {C.LOG_DENSITY}, C.LOG_PROB, Exactness.UNNORMALIZED), purpose="fallback")
    graph = Conversions((gradient, number, last))
    assert names(graph.path(has, C.LOG_PROB)) == ["number"]
    assert names(graph.path(has, C.LOG_PROB, purpose="learning")) == ["gradient"]
    assert names(graph.path(has, C.LOG_PROB, purpose="fallback")) == ["last"]
    assert graph.path(has, C.LOG_PROB, via="gradient") is None
    assert names(graph.path(has, C.LOG_PROB, via=number)) == ["number"]


def test_a_conversion_is_asked_whether_it_can_be_used_at_a_site():
    has = frozenset({C.LOG_DENSITY})
    picky = replace(
        step("picky", {C.LOG_DENSITY}, C.LOG_PROB),
        unless=lambda site, structure: None if site == "here" else "elsewhere",
    )
    graph = Conversions((picky,))
    assert names(graph.path(has, C.LOG_PROB, at=("here", None))) == ["picky"]
    assert graph.path(has, C.LOG_PROB, at=("there", None)) is None
    assert graph.path(has, C.LOG_PROB, picky, at=("there", None)) is None


# --- adapting a program ---


def test_laws_are_converted_within_what_wraps_them():
    adapter = Adapter(CONVERSIONS.path(frozenset({C.ENUMERATE, C.LOG_DENSITY}), C.LOG_PROB))
    wrapped = adapter(Energies(TABLE).to_event(1))
    assert wrapped.batch_shape == ()
    logits = TABLE.log_softmax(-1)
    torch.testing.assert_close(wrapped.log_prob(torch.tensor([0, 2])), logits[0, 0] + logits[1, 2])
    masked = adapter(Energies(TABLE).mask(torch.tensor([True, False])))
    torch.testing.assert_close(
        masked.log_prob(torch.tensor([0, 2])), torch.stack([logits[0, 0], torch.tensor(0.0)])
    )
    assert adapter.normalisers == []
    assert inside(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda law: law).batch_shape == ()


def test_what_is_found_is_kept_over_expansions():
    law = Adapter((CONVERSIONS.named("exact-sum"),), {"a": torch.nn.Module()}, {"b": 1})(Energies(TABLE[0]))
    wide = law.expand([4])
    assert wide.memories is law.memories
    assert wide.found is law.found


def program(n):
    with pyro.plate("data", n):
        k = pyro.sample("k", Energies(TABLE[0]))
        pyro.sample("x", dist.Normal(k.float(), 1.0))


def test_one_site_is_adapted_in_place():
    path = CONVERSIONS.path(frozenset({C.ENUMERATE, C.LOG_DENSITY}), C.SAMPLE)
    with Adapt({"k": Adapter(path)}):
        trace = poutine.trace(program).get_trace(20_000)
    trace.compute_log_prob()
    k = trace.nodes["k"]["value"]
    stats.assert_frequencies(k, TABLE[0].softmax(-1))
    assert torch.allclose(trace.nodes["k"]["log_prob"], TABLE[0].log_softmax(-1)[k], atol=1e-6)
    assert (
        isinstance(trace.nodes["x"]["fn"], dist.Normal) or type(trace.nodes["x"]["fn"]).__name__ == "Normal"
    )
