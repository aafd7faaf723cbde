"""Log probabilities by rows of the data, part by part, with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.capability import Exactness
from pgen.problem import Problem
from pgen.structure import Structure


@dataclass(frozen=True)
class Row:
    """A part of the log probability of every row, `[rows]`, and its errors."""

    value: Tensor
    stderr: Tensor | None = None
    solver_error: Tensor | None = None
    evaluations: int | None = None
    kind: Exactness = Exactness.ESTIMATE

    @staticmethod
    def none(structure: Structure, problem: Problem) -> Row:
        """Nothing."""
        rows = 1 if structure.tied else problem.rows or 1
        return Row(torch.zeros(rows, device=problem.device), kind=Exactness.EXACT)

    def plus(self, other: Row) -> Row:
        """The sum; independent errors add up in squares, those of solvers as they are."""
        errors = [e.square() for e in (self.stderr, other.stderr) if e is not None]
        solvers = [e for e in (self.solver_error, other.solver_error) if e is not None]
        spent = [e for e in (self.evaluations, other.evaluations) if e is not None]
        return Row(
            self.value + other.value,
            sum(errors[1:], errors[0]).sqrt() if errors else None,
            sum(solvers[1:], solvers[0]) if solvers else None,
            sum(spent) if spent else None,
            min(self.kind, other.kind, key=lambda e: e.strength),
        )

    @staticmethod
    def joined(parts: Sequence[Row]) -> Row:
        """One part of the rows after the other."""

        def cat(values: list[Tensor | None]) -> Tensor | None:
            there = [v for v in values if v is not None]
            return torch.cat(there) if there else None

        spent = [p.evaluations for p in parts if p.evaluations is not None]
        return Row(
            torch.cat([p.value for p in parts]),
            cat([p.stderr for p in parts]),
            cat([p.solver_error for p in parts]),
            max(spent) if spent else None,
            min((p.kind for p in parts), key=lambda e: e.strength),
        )


def by_row(structure: Structure, name: str, value: Tensor) -> Tensor:
    """Values `[*batch]` of a site, summed over all but the rows of the data: `[rows]`, or `[1]` where these are tied."""
    plates = structure.sites[name].plates
    plate = next((structure.plates[p] for p in plates if p in structure.data_plates), None)
    if structure.tied or plate is None:
        return value.sum().reshape(1)
    rows = value.movedim(value.dim() + plate.dim, 0)
    return rows.reshape(len(rows), -1).sum(1)
