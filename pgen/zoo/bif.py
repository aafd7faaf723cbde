"""Bayesian networks from files: reads the Bayesian interchange format (BIF) and runs it as a Pyro program.

    network = read_bif("asia.bif.gz")
    fitted = pgen.fit(network.program, None, "exact")
    fitted.marginals(network.evidence(dysp="yes"))["lung"].probs

The format: `variable NAME { type discrete [K] { state, ... }; }` and `probability ( NAME | PARENT, ... )`
with either one `table` or a row of probabilities for each combination of the parents' states. Source:
Cozman 1998, "The interchange format for Bayesian networks".
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.errors import DataError


@dataclass(frozen=True)
class Node:
    """A discrete variable and its law given its parents.

    Attributes:
        name: as in the file.
        states: names of its values, in order; a value is the index of its state.
        parents: names of its parents.
        table: probabilities, float64 `[*states of each parent, states]`; the last dimension sums to one.
    """

    name: str
    states: tuple[str, ...]
    parents: tuple[str, ...]
    table: Tensor


@dataclass(frozen=True, eq=False)
class Network:
    """A discrete Bayesian network: `program` is a Pyro program with one site per node.

    Attributes:
        nodes: parents before children.
    """

    nodes: tuple[Node, ...]

    @cached_property
    def _logits(self) -> dict[str, Tensor]:
        # As logits, since probs would have its zeros replaced by a small number.
        return {node.name: node.table.log() for node in self.nodes}

    def __getitem__(self, name: str) -> Node:
        """The node of that name."""
        return next(node for node in self.nodes if node.name == name)

    def program(self, n: int | None = None) -> dict[str, Tensor]:
        """The network as a Pyro program: one joint draw, or `n` of them in a plate "data"."""
        if n is None:
            return self._draw()
        with pyro.plate("data", n):
            return self._draw()

    def _draw(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for node in self.nodes:
            table = self._logits[node.name]
            logits = table[tuple(values[parent] for parent in node.parents)] if node.parents else table
            values[node.name] = pyro.sample(node.name, dist.Categorical(logits=logits))
        return values

    def evidence(self, mapping: Mapping[str, str] | None = None, /, **states: str) -> dict[str, Tensor]:
        """States by name as data: `evidence(smoke="yes")` gives `{"smoke": tensor(0)}`.

        Raises:
            DataError: no such node or state.
        """
        found: dict[str, Tensor] = {}
        for name, state in {**(mapping or {}), **states}.items():
            node = next((node for node in self.nodes if node.name == name), None)
            if node is None:
                raise DataError(
                    f"the network has no node {name!r}; it has {', '.join(n.name for n in self.nodes)}"
                )
            if state not in node.states:
                raise DataError(f"node {name!r} has no state {state!r}; it has {', '.join(node.states)}")
            found[name] = torch.tensor(node.states.index(state))
        return found


def read_bif(path: str | os.PathLike[str]) -> Network:
    """Read a `.bif` or `.bif.gz` file. Probabilities are rounded in such files: rows are made to sum to one.

    Raises:
        DataError: the text is not BIF, or a table is incomplete or no probability; the message says which.
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    return parse_bif(raw.decode("utf-8"), name=os.fspath(path))


_VARIABLE = re.compile(
    r"variable\s+(?P<name>\S+)\s*\{[^{}]*?type\s+discrete\s*\[\s*(?P<size>\d+)\s*\]\s*\{(?P<states>[^}]*)\}\s*;[^}]*\}"
)
_PROBABILITY = re.compile(
    r"probability\s*\(\s*(?P<name>[^|()]+?)\s*(?:\|(?P<parents>[^()]*))?\)\s*\{(?P<body>[^}]*)\}"
)
_ENTRY = re.compile(r"(?P<head>table|default|\((?P<key>[^()]*)\))(?P<numbers>[^;]*);")


def parse_bif(text: str, name: str = "text") -> Network:
    r"""A network from BIF text; `name` is what error messages call it.

    >>> network = parse_bif('''
    ...     variable rain { type discrete [ 2 ] { yes, no }; }
    ...     variable wet { type discrete [ 2 ] { yes, no }; }
    ...     probability ( rain ) { table 0.2, 0.8; }
    ...     probability ( wet | rain ) { (yes) 0.9, 0.1; (no) 0.1, 0.9; }
    ... ''')
    >>> [(node.name, node.parents) for node in network.nodes]
    [('rain', ()), ('wet', ('rain',))]
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    states = {m["name"]: _split(m["states"]) for m in _VARIABLE.finditer(text)}
    for match in _VARIABLE.finditer(text):
        if len(states[match["name"]]) != int(match["size"]):
            raise DataError(
                f"{name}: variable {match['name']!r} declares {match['size']} states, and lists "
                f"{match['states'].strip()}"
            )
    nodes: dict[str, Node] = {}
    for match in _PROBABILITY.finditer(text):
        node = match["name"]
        parents = _split(match["parents"] or "")
        unknown = [other for other in (node, *parents) if other not in states]
        if unknown:
            raise DataError(
                f"{name}: probability of {node!r} mentions {unknown[0]!r}, which no variable block declares"
            )
        nodes[node] = Node(node, states[node], parents, _table(name, node, parents, states, match["body"]))
    missing = sorted(states.keys() - nodes.keys())
    if missing or not nodes:
        raise DataError(
            f"{name} is not a complete BIF file: "
            + (f"no probability of {', '.join(missing)}" if missing else "no variable found")
        )
    graph = nx.DiGraph([(parent, node.name) for node in nodes.values() for parent in node.parents])
    graph.add_nodes_from(nodes)
    if not nx.is_directed_acyclic_graph(graph):
        raise DataError(
            f"{name}: the parents form a cycle, {' -> '.join(edge[0] for edge in nx.find_cycle(graph))}"
        )
    order = nx.lexicographical_topological_sort(graph, key=list(nodes).index)
    return Network(tuple(nodes[node] for node in order))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip('"') for part in text.split(",") if part.strip())


def _table(
    name: str, node: str, parents: tuple[str, ...], states: Mapping[str, tuple[str, ...]], body: str
) -> Tensor:
    shape = [len(states[other]) for other in (*parents, node)]
    table = torch.full(shape, float("nan"), dtype=torch.float64)
    rows: dict[tuple[str, ...], list[float]] = {}
    for match in _ENTRY.finditer(body):
        try:
            numbers = [float(number) for number in _split(match["numbers"])]
        except ValueError as error:
            raise DataError(
                f"{name}: probability of {node!r} holds {match['numbers'].strip()!r}; expected numbers"
            ) from error
        expected = table.numel() if match["head"] == "table" else shape[-1]
        if len(numbers) != expected:
            raise DataError(
                f"{name}: {match['head']} of node {node!r} has {len(numbers)} numbers; expected {expected}"
            )
        if match["head"] == "table":
            table = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
        elif match["head"] == "default":
            table = torch.where(table.isnan(), torch.tensor(numbers, dtype=torch.float64), table)
        else:
            rows[_split(match["key"])] = numbers
    for key, numbers in rows.items():
        if len(key) != len(parents) or any(state not in states[p] for p, state in zip(parents, key)):
            raise DataError(
                f"{name}: node {node!r} has a row for ({', '.join(key)}), which are no states of {parents}"
            )
        table[tuple(states[p].index(state) for p, state in zip(parents, key))] = torch.tensor(
            numbers, dtype=torch.float64
        )
    total = table.sum(-1, keepdim=True)
    bad = ~((table >= 0).all(-1, keepdim=True) & ((total - 1).abs() < 0.05))
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist()[:-1])
        row = ", ".join(states[p][i] for p, i in zip(parents, where))
        raise DataError(
            f"{name}: row ({row}) of node {node!r} is {table[where].tolist()}; expected probabilities that "
            "sum to one"
        )
    return table / total
