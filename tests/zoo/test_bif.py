"""Bayesian networks from BIF files, against variable elimination in numpy that shares nothing with pgen's."""

from __future__ import annotations

import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from pgen.backends.exact import Exact
from pgen.errors import DataError
from pgen.fitting import fit
from pgen.run import Run
from pgen.zoo.bif import Network, parse_bif, read_bif

QUIET = Run(progress=False)
FOLDER = (
    Path(os.environ.get("PGEN_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    / "bayesian_networks"
)
SMALL = ["asia", "cancer", "earthquake", "sachs", "survey"]
LARGE = ["alarm", "andes", "child", "hailfinder", "hepar2", "insurance", "water", "win95pts"]

CHEST = """
network chest { property author = "nobody"; }
variable travel { type discrete [ 2 ] { yes, no }; }
variable smoke { type discrete [ 2 ] { yes, no }; }
variable infection { type discrete [ 3 ] { "none", mild, severe }; property position = (1, 2); }
variable tumour { type discrete [ 2 ] { yes, no }; }
variable shadow { type discrete [ 2 ] { yes, no }; }
variable breath { type discrete [ 2 ] { short, fine }; }
probability ( breath | shadow, smoke ) {
  default 0.3, 0.7;
  (yes, yes) 0.9, 0.1;
}
probability ( travel ) { table 0.05, 0.95; }
probability ( smoke ) { table 0.4, 0.6; } // a comment
probability ( infection | travel ) { (yes) 0.7, 0.2, 0.1; (no) 0.95, 0.04, 0.01; }
probability ( tumour | smoke ) { table 0.1, 0.9, 0.01, 0.99; }
probability ( shadow | infection, tumour ) {
  (none, no) 0.0, 1.0; (none, yes) 1.0, 0.0;
  (mild, no) 0.5, 0.5; (mild, yes) 1.0, 0.0;
  (severe, no) 1.0, 0.0; (severe, yes) 1.0, 0.0;
}
"""


def eliminate(network: Network, evidence: dict[str, int], query: str | None) -> np.ndarray:
    """The table of p(query, evidence), summing out the variable of least degree."""
    factors = []
    for node in network.nodes:
        names, table = [*node.parents, node.name], node.table.numpy()
        index = tuple(evidence.get(name, slice(None)) for name in names)
        factors.append(([name for name in names if name not in evidence], table[index]))
    left = {name for names, _ in factors for name in names} - {query}
    while left:
        degree = {v: len({u for names, _ in factors if v in names for u in names}) for v in left}
        chosen = min(sorted(left), key=degree.__getitem__)
        left.remove(chosen)
        touching = [f for f in factors if chosen in f[0]]
        scope = [*sorted({u for names, _ in touching for u in names} - {chosen}), chosen]
        product = np.ones(())
        for names, table in touching:
            order = sorted(range(len(names)), key=lambda i: scope.index(names[i]))
            shape = [table.shape[names.index(u)] if u in names else 1 for u in scope]
            product = product * table.transpose(order).reshape(shape)
        factors = [f for f in factors if chosen not in f[0]] + [(scope[:-1], product.sum(-1))]
    total = np.ones(())
    for _, table in factors:
        total = total * table
    return total


def states_of(network: Network, seed: int) -> dict[str, int]:
    """A joint state with positive probability: one run of the program."""
    with torch.random.fork_rng(), poutine.trace() as tracer:
        torch.manual_seed(seed)
        network.program()
    return {name: int(site["value"]) for name, site in tracer.trace.nodes.items() if site["type"] == "sample"}


def compare(network: Network, evidence: dict[str, int], queries: list[str]) -> None:
    data = {name: torch.tensor(state) for name, state in evidence.items()} or None
    fitted = fit(network.program, None, Exact(), run=QUIET)
    exact = eliminate(network, evidence, None)
    assert float(fitted.log_prob(data).value) == pytest.approx(float(np.log(exact)), abs=1e-9)
    laws = fitted.marginals(data)
    assert set(laws) == {node.name for node in network.nodes} - set(evidence)
    for query in queries:
        table = eliminate(network, evidence, query)
        np.testing.assert_allclose(laws[query].probs.numpy(), table / table.sum(), atol=1e-9)


def test_a_file_becomes_nodes_with_normalised_tables(tmp_path):
    path = tmp_path / "chest.bif.gz"
    path.write_bytes(gzip.compress(CHEST.encode()))
    network = read_bif(path)
    names = [node.name for node in network.nodes]
    assert all(
        names.index(parent) < names.index(node.name) for node in network.nodes for parent in node.parents
    )
    assert network["infection"].states == ("none", "mild", "severe")
    torch.testing.assert_close(network["tumour"].table, torch.tensor([[0.1, 0.9], [0.01, 0.99]]).double())
    expected = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.3, 0.7], [0.3, 0.7]]]).double()
    torch.testing.assert_close(network["breath"].table, expected)
    assert network.evidence(smoke="no")["smoke"] == 1


def test_the_program_has_the_law_of_the_file():
    network = parse_bif(CHEST)
    names = [node.name for node in network.nodes]
    total = 0.0
    for state in itertools.product(*(range(len(node.states)) for node in network.nodes)):
        at = dict(zip(names, state))
        p = np.prod(
            [float(node.table[tuple(at[q] for q in (*node.parents, node.name))]) for node in network.nodes]
        )
        conditioned = poutine.condition(network.program, {k: torch.tensor(v) for k, v in at.items()})
        assert float(poutine.trace(conditioned).get_trace().log_prob_sum().exp()) == pytest.approx(
            p, abs=1e-12
        )
        total += p
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize(
    "evidence", [{}, {"breath": 0}, {"shadow": 0, "infection": 0}, {"travel": 1, "breath": 1}]
)
def test_any_evidence_is_answered_exactly(evidence):
    network = parse_bif(CHEST)
    compare(network, evidence, [node.name for node in network.nodes if node.name not in evidence])


def test_rows_of_evidence_are_answered_row_by_row():
    network = parse_bif(CHEST)
    fitted = fit(network.program, None, Exact(), run=QUIET)
    rows = {"breath": torch.tensor([0, 1, 0]), "smoke": torch.tensor([0, 0, 1])}
    values, laws = fitted.log_prob(rows).value, fitted.marginals(rows)
    for i in range(3):
        one = {name: int(column[i]) for name, column in rows.items()}
        assert float(values[i]) == pytest.approx(float(np.log(eliminate(network, one, None))), abs=1e-9)
        table = eliminate(network, one, "tumour")
        np.testing.assert_allclose(laws["tumour"].probs[i].numpy(), table / table.sum(), atol=1e-9)


def test_a_hundred_rows_are_drawn_in_one_plate():
    network = parse_bif(CHEST)
    with poutine.trace() as tracer:
        network.program(100)
    assert tracer.trace.nodes["shadow"]["value"].shape == (100,)
    pyro.clear_param_store()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[ 3 ]", "[ 2 ]"), "'infection' declares 2 states"),
        (("table 0.4, 0.6", "table 0.4, 0.6, 0.1"), "'smoke' has 3 numbers; expected 2"),
        (("table 0.4, 0.6", "table 0.4, 0.7"), "expected probabilities that sum to one"),
        (("table 0.4, 0.6", "table 0.4, x"), "expected numbers"),
        (("(yes) 0.7, 0.2, 0.1;", ""), r"row \(yes\) of node 'infection' is \[nan"),
        (("(yes) 0.7", "(maybe) 0.7"), r"has a row for \(maybe\)"),
        (("shadow | infection", "shadow | fever"), "mentions 'fever', which no variable block declares"),
        (("probability ( travel ) { table 0.05, 0.95; }", ""), "no probability of travel"),
        (
            ("( travel ) { table 0.05, 0.95; }", "( travel | breath ) { default 0.5, 0.5; }"),
            "the parents form a cycle",
        ),
    ],
)
def test_a_bad_file_is_refused_and_says_where(change, message):
    with pytest.raises(DataError, match=message):
        parse_bif(CHEST.replace(*change), name="chest.bif")


@pytest.mark.parametrize(
    ("evidence", "message"), [({"fever": "yes"}, "no node 'fever'"), ({"smoke": "maybe"}, "no state 'maybe'")]
)
def test_unknown_evidence_is_refused(evidence, message):
    with pytest.raises(DataError, match=message):
        parse_bif(CHEST).evidence(evidence)


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_published_networks_are_answered_exactly(name):
    path = FOLDER / f"{name}.bif.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there; set PGEN_SHARED_DATA to the folder that holds bayesian_networks/")
    network = read_bif(path)
    truth = states_of(network, seed=len(name))
    order = [node.name for node in network.nodes]
    seen = {node: truth[node] for node in order[len(order) // 2 :: 4]}
    hidden = [node for node in order if node not in seen]
    compare(network, seen, hidden[:: max(1, len(hidden) // 5)])
    compare(network, {}, order[-2:])
