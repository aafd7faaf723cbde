"""Queries on a program whose likelihood can be had exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import torch
from pyro import poutine
from torch import Tensor

from pgen.backends.exact.groups import Group, groups_of, predicted
from pgen.backends.exact.joint import axes_of
from pgen.backends.exact.laws import Law, join
from pgen.backends.exact.solution import Solution
from pgen.capability import Estimate, Exactness, Refusal
from pgen.choice import refusal_text, weakest
from pgen.errors import Refused
from pgen.history import History
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.sampling import draw, observed_scalars, onward
from pgen.structure import Structure

_PROOF_ROWS = 4  # rows at which a group is shown to be Gaussian or conjugate
T = TypeVar("T")


class Integrated:
    """A program whose latents are summed out or integrated out, group by group.

    Args:
        problem: what was fitted.
        structure: its structure.
        parameters: the learned tensors.
        max_table: most numbers in one table.
        inexact: sites whose log probability is a bound or an estimate, and which.
    """

    def __init__(
        self,
        problem: Problem,
        structure: Structure,
        parameters: Parameters,
        max_table: int,
        inexact: Mapping[str, Exactness] | None = None,
    ) -> None:
        self.problem = problem
        self.structure = structure
        self.parameters = parameters
        self.max_table = max_table
        self.inexact = inexact or {}
        self.history = History()

    def tensors(self) -> Mapping[str, Tensor]:
        """The learned tensors."""
        return self.parameters.state()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved tensors over."""
        self.parameters.load(tensors)

    def sample(self, n: int) -> Mapping[str, Tensor]:
        """Joint draws of every site, by running the program forward."""
        with self.parameters.installed():
            return draw(self.problem, self.structure, n)

    def groups(self, structure: Structure, latents: Collection[str]) -> list[Group]:
        """The groups of some latents.

        Raises:
            Refused: one that cannot be integrated exactly.
        """
        found = groups_of(structure, latents, self.max_table)
        if isinstance(found, Refusal):
            raise Refused(
                f"exact inference in {structure.name}: {refusal_text(found)}. Given these data, another backend can go on with "
                "what was learned: pgen.fit(fitted.program, data, 'mcmc')",
                found,
            )
        return found

    def log_prob(self, problem: Problem, structure: Structure) -> Estimate:
        """Exact log probability of the observed values, all other sites integrated out."""
        groups = self.groups(structure, structure.evidenced)
        parts = self._solved(problem, structure, groups, lambda solution: solution.evidence())
        return Estimate(
            torch.cat(parts).to(dtype=_dtype(structure, groups)),
            self._kind(structure),
            measure=structure.measure,
            dims=observed_scalars(problem, structure, together=structure.tied),
        )

    def _kind(self, structure: Structure) -> Exactness:
        """How exact the evidence is: a bound on the law of a site bounds it where that site is observed."""
        if structure.factors:
            return Exactness.UNNORMALIZED
        return weakest(kind for site, kind in self.inexact.items() if structure.sites[site].observed)

    def posterior(self, problem: Problem, structure: Structure, n: int) -> Mapping[str, Tensor]:
        """Exact joint draws of every unobserved site; no normaliser matters."""
        problem = problem.learning
        given = structure.evidenced
        finite = (s for s in predicted(structure, given) if structure.sites[s].enumerable)
        groups = self.groups(structure, given.union(finite))
        parts = self._solved(problem, structure, groups, lambda solution: solution.draws(n))
        values = {}
        for name in parts[0]:
            axis = self._row_axis(structure, name, parts[0][name].shape[1:])
            value = parts[0][name] if axis is None else torch.cat([p[name] for p in parts], axis + 1)
            values[name] = value.to(structure.sites[name].dtype)
        missing = [name for name in structure.latents if name not in values]
        if missing:
            with self.parameters.installed():
                values |= onward(problem, structure, n, values, missing)
        return values

    def marginals(self, problem: Problem, structure: Structure) -> Mapping[str, Any]:
        """Exact laws of unobserved sites; one whose law has no closed form is left out. No normaliser matters."""
        problem = problem.learning
        given = structure.evidenced
        further = predicted(structure, given)
        try:
            laws = self._laws(problem, structure, given | further)
        except Refused:
            finite = frozenset(s for s in further if structure.sites[s].enumerable)
            laws = self._laws(problem, structure, given | finite)
        found = {name: law.distribution() for name, law in laws.items()}
        alone = [
            s
            for s in structure.latents
            if s not in found and not any(p in structure.latents for p in structure.sites[s].parents)
        ]
        if alone:
            with self.parameters.installed(), torch.no_grad():
                nodes = poutine.trace(problem).get_trace().nodes
            found |= {name: nodes[name]["fn"] for name in alone}
        return {name: found[name] for name in structure.latents if name in found}

    def prove(self) -> bool:
        """Settle that the groups are what they look like, at the present values of the parameters.

        Returns:
            Whether the program takes the values of its finite latents one by one only.

        Raises:
            Refused: one of them is not; names a site.
        """
        groups = self.groups(self.structure, self.structure.evidenced)
        problem = self.problem.learning
        if not self.structure.tied and problem.rows is not None:
            problem = problem.take(torch.arange(min(_PROOF_ROWS, problem.rows)))
        return (
            any(self._solved(problem, self.structure, groups, lambda solution: solution.apart))
            if groups
            else False
        )

    def _laws(self, problem: Problem, structure: Structure, latents: Collection[str]) -> dict[str, Law]:
        groups = self.groups(structure, latents)
        parts = self._solved(problem, structure, groups, lambda solution: solution.laws())
        found = {}
        for name in parts[0]:
            law = parts[0][name]
            if len(parts) > 1:
                batch = law.distribution().batch_shape
                axis = self._row_axis(structure, name, batch + structure.sites[name].event_shape)
                law = law if axis is None else join([part[name] for part in parts], axis)
            site = structure.sites[name]
            found[name] = law if site.enumerable else law.to(site.dtype)
        return found

    def _row_axis(self, structure: Structure, name: str, shape: torch.Size) -> int | None:
        axes = axes_of(structure, name, shape)
        return None if structure.data_plate is None else axes.get(structure.data_plate)

    def _solved(
        self,
        problem: Problem,
        structure: Structure,
        groups: Sequence[Group],
        query: Callable[[Solution], T],
    ) -> list[T]:
        """Ask a query of the problem, a part of its rows at a time where they are independent."""

        def ask(some: Problem) -> T:
            return query(Solution.of(some, structure, groups, max_table=self.max_table, proof=True))

        precise = any(group.method != "finite" for group in groups)
        found = []
        with torch.no_grad():
            for some in _slices(problem, structure, groups, self.max_table):
                if precise:
                    found.append(self._precisely(some, ask))
                else:
                    with self.parameters.installed():
                        found.append(ask(some))
        return found

    def _precisely(self, problem: Problem, work: Callable[[Problem], T]) -> T:
        """Work in double precision, unless the program insists on another."""
        twin = self.parameters.frozen()
        twin.buffers = dict(twin.buffers)
        try:
            with _default_dtype(torch.float64), twin.to(dtype=torch.float64).installed():
                return work(problem.to(dtype=torch.float64))
        except (RuntimeError, TypeError):
            with self.parameters.installed():
                return work(problem)


def _slices(
    problem: Problem, structure: Structure, groups: Sequence[Group], max_table: int
) -> Iterator[Problem]:
    """The problem in slices of rows whose tensors stay within the limit; whole, where the rows are tied."""
    if problem.rows is None or structure.tied:
        yield problem
        return
    step = max(1, max_table // _numbers_per_row(structure, groups))
    for start in range(0, problem.rows, step):
        yield problem.take(torch.arange(start, min(problem.rows, start + step)))


def _numbers_per_row(structure: Structure, groups: Sequence[Group]) -> int:
    """Numbers in the largest tensor that a row needs, as far as the structure tells."""
    finite = {name for group in groups if group.method == "finite" for name in group.latents}
    worst = 1
    for site in structure:
        plates = [structure.plates[p].size for p in site.plates if p not in structure.data_plates]
        values = [structure.sites[p].cardinality or 1 for p in (*site.parents, site.name) if p in finite]
        worst = max(worst, math.prod(plates) * math.prod(values) * site.event_shape.numel())
    for group in groups:
        if group.method == "gaussian":
            width = sum(structure.sites[name].event_shape.numel() for name in group.latents)
            worst = max(worst, width**2)
    return worst


def _dtype(structure: Structure, groups: Sequence[Group]) -> torch.dtype | None:
    """Of answers that were worked out in double precision: the widest type at the sites of the program."""
    if all(group.method == "finite" for group in groups):
        return None
    found = [site.dtype for site in structure if site.dtype.is_floating_point]
    return reduce(torch.promote_types, found) if found else torch.get_default_dtype()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
