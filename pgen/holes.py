"""Missing values in arguments: what a program observes as it was given may hold NaN, like what is observed by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem


def observed_by_name(problem: Problem) -> Problem:
    """The same problem, where arguments that hold NaN are observed by the names of the sites too.

    That is, at each site that the program gives such an argument by `obs=`, untouched: whole, or a piece of it
    (`obs=y`, `obs=table[:, 2]`). A site that is observed by name may have missing values.
    """
    given = list(_holed(problem))
    if not given:
        return problem
    try:
        found = _passed(problem, given)
        if problem.rows is None or not found:
            return problem.holding(found)
        few = problem.take(torch.arange(problem.rows + 1) % problem.rows)
        again = _passed(few, list(_holed(few)))
    except Exception:  # the program cannot have NaN there, or not so many rows: its inspection will say so
        return problem
    rows = (problem.rows, problem.rows + 1)
    aligned = all(
        name in again and (found[name].shape[:1], again[name].shape[:1]) == ((rows[0],), (rows[1],))
        for name in found
    )
    return (problem if aligned else problem.whole()).holding(found)


def telling_rows(problem: Problem, few: int, most: int = 0) -> Tensor:
    """A few rows to look at, those with NaN among them: the first of every column, and `most` where only some is missing.

    Args:
        problem: with rows.
        few: how many rows, recycled, whether there is NaN or not.
        most: how many more.
    """
    count = problem.rows or 0
    index = [torch.arange(few) % count]
    seen = problem.source is None  # else rows are read one by one, and who knows what is in the others
    tensors = {**problem.inputs, **problem.observations} if seen else dict[str, Tensor]()
    for name, value in tensors.items():
        if (name not in problem.holed and name not in problem.missing) or not value.ndim:
            continue
        gone = value.isnan().reshape(count, -1).cpu()
        first = gone.int().argmax(0)[gone.any(0)]
        partly = (gone.any(1) & ~gone.all(1)).nonzero()[:most, 0]
        index += [first.unique(), partly]
    return torch.cat(index)


def _holed(problem: Problem) -> Iterator[Tensor]:
    """Arguments that hold NaN; of those that are passed unchanged only where no rows are taken of anything."""
    yield from (problem.inputs[name] for name in problem.holed)
    if problem.rows is None:
        unchanged = (t for t in tree_leaves((problem.args, dict(problem.kwargs))) if isinstance(t, Tensor))
        yield from (t for t in unchanged if t.is_floating_point() and bool(t.isnan().any()))


def _passed(problem: Problem, given: Sequence[Tensor]) -> dict[str, Tensor]:
    """What sites observe that is memory of these tensors, and holds NaN."""
    watch = _Watch(given)

    def run() -> None:
        with watch:
            problem()

    with torch.no_grad(), validating(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        Parameters.of(problem, run=run)
    return watch.found


class _Watch(Messenger):
    """Sees which sites observe memory of the given tensors."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.roots = {id(t if t._base is None else t._base) for t in given}
        self.found: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if id(value if value._base is None else value._base) in self.roots and bool(value.isnan().any()):
            self.found[msg["name"]] = value.clone()
