"""A problem solved: each group of latents integrated by its method, and the rest of the density beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pgen.algorithms.factor_graph import Factor
from pgen.backends.exact.conjugate import ConjugatePart
from pgen.backends.exact.finite import FinitePart
from pgen.backends.exact.gaussian import GaussianPart
from pgen.backends.exact.groups import Group
from pgen.backends.exact.joint import Joint, by_row
from pgen.backends.exact.laws import Law
from pgen.enumeration import enumerate_sites
from pgen.problem import Problem
from pgen.structure import Structure


class Part(Protocol):
    """Some latents, integrated out."""

    def evidence(self) -> Tensor:
        """Log of the integral: `[rows]`, or a scalar where the rows are tied."""
        ...

    def draws(self, n: int) -> dict[str, Tensor]:
        """Joint draws of the latents, `[n, *batch, *event]`."""
        ...

    def laws(self) -> dict[str, Law]:
        """Marginals of the latents."""
        ...


@dataclass(frozen=True)
class Solution:
    """A problem solved.

    Attributes:
        parts: the groups of latents, integrated out.
        rest: log probabilities of the sites that no latent enters.
        rows: the plate of the data, if each row has an answer of its own.
        problem: that was solved.
    """

    parts: tuple[Part, ...]
    rest: Mapping[str, Factor]
    rows: str | None
    problem: Problem

    @staticmethod
    def of(
        problem: Problem,
        structure: Structure,
        groups: Sequence[Group],
        *,
        max_table: int,
        proof: bool = False,
        apart: bool = False,
    ) -> Solution:
        """Integrate groups of latents; all other latents must be such that they integrate to one.

        Args:
            problem: the program with its data; its learned tensors are installed.
            structure: of the problem.
            groups: to integrate.
            max_table: most numbers in one table.
            proof: whether to settle that groups are what they look like, or to trust that this was done.
            apart: whether the program takes the values of its finite latents one by one only.

        Raises:
            Refused: a group that cannot be integrated; names a site.
        """
        rows = None if structure.tied else structure.data_plate
        finite = [group for group in groups if group.method == "finite"]
        summed = {name for group in finite for name in group.latents}
        drawn = [name for name in structure.latents if name not in summed]
        lawful = [name for group in groups if group.method == "conjugate" for name in group.latents]
        joint = Joint.of(problem, structure, rows, drawn, lawful)
        taken = frozenset[str]().union(*(group.sites for group in groups), structure.latents)
        parts: list[Part] = []
        factors: Mapping[str, Factor] = {}
        if finite:
            part = FinitePart.of(joint.run, structure, finite, rows, max_table, proof, apart)
            parts.append(part)
            factors = part.enumeration.factors
        elif any(name not in taken for name in structure.sites):
            factors = enumerate_sites(joint.run, structure).factors
        for group in groups:
            if group.method == "gaussian":
                parts.append(GaussianPart.of(joint, group, proof))
            elif group.method == "conjugate":
                parts.append(ConjugatePart.of(joint, group, proof))
        rest = {name: factor for name, factor in factors.items() if name not in taken}
        return Solution(tuple(parts), rest, rows, problem)

    @property
    def apart(self) -> bool:
        """Whether the program had to be run on the values of its finite latents one by one."""
        return any(isinstance(part, FinitePart) and part.enumeration.apart for part in self.parts)

    def evidence(self) -> Tensor:
        """Log probability of the observed values: `[rows]`, or `[1]` where the rows are tied.

        What is observed once for all rows is shared out evenly among them.
        """
        total: Tensor | float = 0.0
        for part in self.parts:
            total = total + part.evidence()
        for factor in self.rest.values():
            if self.rows is not None and self.rows in factor.names:
                total = total + by_row(factor, self.rows)
            elif self.rows is not None:
                total = total + factor.log.sum() / (self.problem.total or self.problem.rows or 1)
            else:
                total = total + factor.log.sum()
        total = torch.as_tensor(total)
        return total.reshape(1) if self.rows is None else total.expand(self.problem.rows or 1)

    def draws(self, n: int) -> dict[str, Tensor]:
        """Joint draws of the latents, `[n, *batch, *event]`."""
        return {name: value for part in self.parts for name, value in part.draws(n).items()}

    def laws(self) -> dict[str, Law]:
        """Marginals of the latents."""
        return {name: law for part in self.parts for name, law in part.laws().items()}
