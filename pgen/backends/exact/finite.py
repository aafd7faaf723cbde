"""Groups of finite latents: one enumerated run of the program, then variable elimination."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from pgen.algorithms.factor_graph import Factor, FactorGraph, ImpossibleEvidence, Intractable
from pgen.algorithms.sum_product import log_partition, marginals, sample
from pgen.backends.exact.groups import Group
from pgen.backends.exact.laws import Law, finite_law
from pgen.capability import Refusal
from pgen.enumeration import Enumeration, enumerate_sites
from pgen.errors import DataError, Refused
from pgen.structure import Structure


@dataclass(frozen=True)
class FinitePart:
    """All finite groups of a problem together; where they do not touch, elimination keeps them apart.

    Attributes:
        structure: of the problem.
        enumeration: the factors of its sites.
        sites: those that the finite latents enter.
        rows: the plate of the data, if each row has an answer of its own.
        max_table: most numbers in one table.
    """

    structure: Structure
    enumeration: Enumeration
    sites: frozenset[str]
    rows: str | None
    max_table: int

    @staticmethod
    def of(
        run: Callable[[], object],
        structure: Structure,
        groups: Collection[Group],
        rows: str | None,
        max_table: int,
        proof: bool = False,
        apart: bool = False,
    ) -> FinitePart:
        """Run the program with all values of the latents of these groups.

        With `proof`, its answers are compared with those for single values; `apart`, it is only run on such.
        """
        latents = [name for group in groups for name in group.latents]
        sites = frozenset[str]().union(*(group.sites for group in groups))
        found = enumerate_sites(run, structure, latents, check=proof, apart=apart)
        return FinitePart(structure, found, sites, rows, max_table)

    def evidence(self) -> Tensor:
        """Log of the sum over all values: `[rows]`, or a scalar where the rows are tied."""
        graph = self._graph(() if self.rows is None else (self.rows,))
        dtype = reduce(torch.promote_types, (factor.log.dtype for factor in graph.factors))
        with _named():
            total = log_partition(
                graph if torch.is_grad_enabled() else _precise(graph), max_table=self.max_table
            )
        return total.to(dtype)

    def draws(self, n: int) -> dict[str, Tensor]:
        """Joint draws of the latents, `[n, *batch, *event]`."""
        with _named():
            indices = sample(_precise(self._graph()), n, max_table=self.max_table)
        return {name: self.enumeration.values(name, index) for name, index in indices.items()}

    def laws(self) -> dict[str, Law]:
        """Marginals of the latents."""
        graph = self._graph()
        found: dict[str, Law] = {}
        with _named():
            tables = marginals(_precise(graph), max_table=self.max_table)
        for name, table in tables.items():
            probs = table.reshape(self.enumeration.shapes[name] + table.shape[-1:])
            probs = probs.to(self.enumeration.factors[name].log.dtype)
            found[name] = finite_law(self.structure.sites[name], self.enumeration.supports[name], probs)
        return found

    def _graph(self, keep: Collection[str] = ()) -> FactorGraph:
        return self.enumeration.graph(self.sites, keep)


def _precise(graph: FactorGraph) -> FactorGraph:
    """In double precision: the tables are small, and a long chain adds up many rounded numbers."""
    return replace(graph, factors=tuple(Factor(f.names, f.log.double()) for f in graph.factors))


@contextmanager
def _named() -> Iterator[None]:
    """Say in pgen's words what the algorithms found."""
    try:
        yield
    except Intractable as error:
        site = error.variables[0] if error.variables else None
        raise Refused(
            f"site {site!r}: {error}", Refusal(site, "a sum of bearable size", str(error))
        ) from error
    except ImpossibleEvidence as error:
        raise DataError(f"the observed values have probability zero under the program: {error}") from error
