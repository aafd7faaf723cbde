"""Laws of faithful inversion, checked by networkx's own d-separation and, for Gaussians, in nats."""

import random

import networkx as nx
import pytest
import torch

from pgen.algorithms.inversion import Inverse, elimination_order, invert, markov_boundary

TREE = nx.DiGraph([("a", "b"), ("a", "c"), ("b", "x"), ("c", "y")])
#: What Pyro's `get_dependencies` gives for TREE, read as a factorisation.
UNFAITHFUL = Inverse(("b", "c", "a"), {"b": ("x",), "c": ("y",), "a": ("b", "c")})


def random_model(seed, nodes=9, density=0.3):
    """A random DAG and a split of its nodes into latent, observed and integrated out."""
    source = random.Random(seed)
    names = [f"v{i}" for i in range(nodes)]
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from(
        (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if source.random() < density
    )
    roles = {name: source.choices(["latent", "observed", "hidden"], [5, 4, 1])[0] for name in names}
    return graph, [n for n in names if roles[n] == "latent"], [n for n in names if roles[n] == "observed"]


def false_independences(graph, inverse, observed):
    """The latents whose inverse claims an independence that the posterior lacks (ordered Markov property)."""
    found, known = [], set(observed)
    for node in inverse.order:
        given = set(inverse.parents[node])
        others = known - given
        if others and not nx.is_d_separator(graph, {node}, others, given):
            found.append(node)
        known.add(node)
    return found


def superfluous(graph, inverse):
    """The pairs of a latent and an inverse parent that it does not need."""
    pairs = [(node, parent) for node in inverse.order for parent in inverse.parents[node]]
    return [(n, p) for n, p in pairs if nx.is_d_separator(graph, {n}, {p}, set(inverse.parents[n]) - {p})]


MODELS = [(seed, order) for seed in range(60) for order in ("reverse", "forward")]


@pytest.mark.parametrize(("seed", "order"), MODELS)
def test_the_inverse_is_a_minimal_independence_map_of_the_posterior(seed, order):
    graph, latents, observed = random_model(seed, nodes=5 + seed % 6, density=0.2 + 0.01 * (seed % 30))
    inverse = invert(graph, latents, observed, order=order)
    assert sorted(inverse.order) == latents
    assert not false_independences(graph, inverse, observed)
    assert not superfluous(graph, inverse)


@pytest.mark.parametrize(("seed", "order"), MODELS[:40])
def test_every_separation_in_the_inverse_holds_in_the_model(seed, order):
    """Not only the defining ones: any two latents, given the observed and any third group."""
    graph, latents, observed = random_model(seed)
    inverse = invert(graph, latents, observed, order=order).graph
    inverse.add_nodes_from(observed)
    source = random.Random(seed)
    for _ in range(60 if len(latents) > 1 else 0):
        first, second = source.sample(latents, 2)
        given = {n for n in latents if n not in (first, second) and source.random() < 0.5} | set(observed)
        if nx.is_d_separator(inverse, {first}, {second}, given):
            assert nx.is_d_separator(graph, {first}, {second}, given)


@pytest.mark.parametrize(("seed", "order"), MODELS)
def test_drawing_order_is_topological(seed, order):
    graph, latents, observed = random_model(seed)
    inverse = invert(graph, latents, observed, order=order)
    known = set(observed)
    for node in inverse.order:
        assert set(inverse.parents[node]) <= known
        known.add(node)
    assert nx.is_directed_acyclic_graph(inverse.graph)
    for i, earlier in enumerate(inverse.order):
        for later in inverse.order[i + 1 :]:
            assert not nx.has_path(graph, *((later, earlier) if order == "reverse" else (earlier, later)))


def test_an_unfaithful_inverse_is_caught():
    assert false_independences(TREE, UNFAITHFUL, ["x", "y"]) == ["b", "c"]
    assert not false_independences(TREE, invert(TREE, ["a", "b", "c"], ["x", "y"]), ["x", "y"])


def test_a_superfluous_edge_is_caught():
    complete = Inverse(("a", "b", "c"), {"a": ("x", "y"), "b": ("x", "y", "a"), "c": ("x", "y", "a", "b")})
    assert superfluous(TREE, complete) == [("b", "y"), ("c", "x"), ("c", "b")]


def test_rank_draws_outer_sites_first():
    """A summary of local latents is drawn before them, because locals must be drawn given globals."""
    graph = nx.DiGraph([("mu", "theta"), ("theta", "y"), ("theta", "total"), ("total", "z")])
    inverse = invert(graph, ["mu", "theta", "total"], ["y", "z"], rank={"theta": 1})
    assert inverse.order == ("mu", "total", "theta")
    assert inverse.parents["theta"] == ("y", "mu", "total")


def test_what_is_integrated_out_leaves_its_dependence():
    graph = nx.DiGraph([("h", "a"), ("h", "b"), ("a", "x"), ("b", "y")])
    assert invert(graph, ["a", "b"], ["x", "y"]).parents == {"a": ("x", "y"), "b": ("y", "a")}


def test_latents_that_the_data_say_nothing_about_keep_their_prior():
    graph = nx.DiGraph([("z", "x"), ("z", "next"), ("next", "after")])
    inverse = invert(graph, ["z", "next", "after"], ["x"])
    assert inverse.parents == {"z": ("x",), "next": ("z",), "after": ("next",)}


def test_forward_and_reverse_of_a_chain_are_both_short():
    """For a hidden chain each latent needs one neighbour and the observations on its far side."""
    steps = 30
    graph = nx.DiGraph()
    for t in range(steps):
        graph.add_edge(("z", t), ("x", t))
        if t:
            graph.add_edge(("z", t - 1), ("z", t))
    latents, observed = [("z", t) for t in range(steps)], [("x", t) for t in range(steps)]
    forward = invert(graph, latents, observed, order="forward")
    assert forward.parents["z", 4] == (*(("x", t) for t in range(5)), ("z", 5))
    reverse = invert(graph, latents, observed)
    assert reverse.parents["z", 4] == (*(("x", t) for t in range(4, steps)), ("z", 3))


def test_elimination_prefers_little_fill_in():
    """Of two roots, the one with fewer neighbours goes first, whatever their order in the list."""
    graph = nx.DiGraph([("hub", leaf) for leaf in "pqrs"] + [("lone", "p")])
    assert elimination_order(graph, ["hub", "lone", *"pqrs"], [], order="forward")[0] == "lone"


def test_the_markov_boundary_holds_spouses_and_skips_barren_nodes():
    graph = nx.DiGraph(
        [("u", "v"), ("v", "child"), ("spouse", "child"), ("v", "barren"), ("other", "barren")]
    )
    assert markov_boundary(graph, "v", {"u", "child", "spouse", "other"}) == {"u", "child", "spouse"}


def gaussian_gap(graph, inverse, observed, weights):
    """Nats that the best such Gaussian loses: the sum of H(v | parents), minus H(latents | observed)."""
    nodes = list(nx.topological_sort(graph))
    place = {node: i for i, node in enumerate(nodes)}
    matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for parent, child in graph.edges:
        matrix[place[child], place[parent]] = weights[parent, child]
    root = torch.linalg.inv(torch.eye(len(nodes), dtype=torch.float64) - matrix)
    covariance = root @ root.T

    def entropy(of, given):
        def half_logdet(group):
            index = [place[n] for n in group]
            return torch.logdet(covariance[index][:, index]) / 2 if index else torch.zeros(())

        return half_logdet([*of, *given]) - half_logdet(list(given))

    return float(
        sum(entropy([n], inverse.parents[n]) for n in inverse.order) - entropy(inverse.order, observed)
    )


@pytest.mark.parametrize(("seed", "order"), MODELS[:40])
def test_a_faithful_inverse_holds_the_exact_posterior_of_a_gaussian_network(seed, order):
    graph, latents, observed = random_model(seed)
    source = random.Random(seed)
    weights = {edge: source.choice([-1, 1]) * source.uniform(0.5, 1.5) for edge in graph.edges}
    assert abs(gaussian_gap(graph, invert(graph, latents, observed, order=order), observed, weights)) < 1e-9


def test_an_unfaithful_inverse_loses_nats():
    assert gaussian_gap(TREE, UNFAITHFUL, ["x", "y"], dict.fromkeys(TREE.edges, 1.0)) > 0.05
