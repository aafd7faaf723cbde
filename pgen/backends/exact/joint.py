"""The joint log density of a program as a function of the latents that one cares about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pgen.algorithms.factor_graph import Factor
from pgen.enumeration import enumerate_sites
from pgen.factoring import plate_name
from pgen.handlers import Substitute
from pgen.problem import Problem
from pgen.structure import Structure


@dataclass(frozen=True)
class Joint:
    """A problem whose latents all have a value, so that those of interest can be varied one group at a time.

    Attributes:
        problem: the program with its data.
        structure: of the problem.
        rows: the plate of the data, if each row has an answer of its own.
        values: one draw of every latent that is not summed out, in the shape that the program gives it.
        laws: of some of them, as the program gives them.
    """

    problem: Problem
    structure: Structure
    rows: str | None
    values: Mapping[str, Tensor]
    laws: Mapping[str, Any]

    @staticmethod
    def of(
        problem: Problem,
        structure: Structure,
        rows: str | None,
        latents: Collection[str],
        lawful: Collection[str] = (),
    ) -> Joint:
        """Draw the latents named, and keep the laws of some of them; nothing is run where there are none."""
        if not latents:
            return Joint(problem, structure, rows, {}, {})
        with torch.no_grad():
            values = _read(problem, latents, "value")
        # The laws anew, at values that carry no gradient, so that they themselves may.
        laws = _read(Substitute(values)(problem), lawful, "fn") if lawful else {}
        return Joint(problem, structure, rows, values, laws)

    def run(self) -> Any:
        """Run the program with the latents at their values."""
        return Substitute(self.values)(self.problem)()

    def read(self, values: Mapping[str, Tensor]) -> Mapping[str, Factor]:
        """Log probability of every site, with some latents at other values."""
        return enumerate_sites(Substitute({**self.values, **values})(self.problem), self.structure).factors


def _read(run: Any, sites: Collection[str], what: str) -> dict[str, Any]:
    nodes: Any = poutine.trace(run).get_trace().nodes
    return {name: nodes[name][what] for name in sites}


def by_row(factor: Factor, rows: str) -> Tensor:
    """A site's log probability, summed over all but the rows of the data."""
    log = factor.log.movedim(factor.names.index(rows), 0)
    return log.flatten(1).sum(1) if log.dim() > 1 else log


def axes_of(structure: Structure, name: str, value: torch.Size) -> dict[str, int]:
    """Plates of a latent, with the axes of its value that lie along them."""
    site = structure.sites[name]
    batch = len(value) - len(site.event_shape)
    return {plate_name(structure, p): batch + structure.plates[p].dim for p in site.plates}
