"""Values that are missing in part, where a law knows its own conditionals, as an energy does: what is missing given the rest.

Rows that lack the same numbers go together. What is missing is one more site then, which a backend draws as any other, and whose
log probability it takes off that of the whole:

    log p(known) = log p(known, rest) - log p(rest | known)        for any value of the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from pgen.capability import Estimate, Exactness
from pgen.choice import weakest
from pgen.draws import Draws
from pgen.errors import DataError, Unanswerable
from pgen.handlers import missing_in_part, value_inside, whole
from pgen.problem import Problem
from pgen.structure import Structure

Ask = Callable[..., tuple[Problem, Structure]]
"""Of data, and what it is completed by (see `Observe`)."""
Draw = Callable[[Problem, Structure, int], Draws]
Answer = Callable[[Problem, Structure], Estimate]
Tensors = Mapping[str, Tensor]
_EXAMPLES = 1000  # rows are enough to know what is usual


def lacking(structure: Structure, data: Any) -> tuple[str, ...]:
    """Sites whose values are missing in part in the data, and whose laws know how to go on."""
    if not isinstance(data, Mapping):
        return ()
    sites = [structure.sites[k] for k in data if k in structure.sites]
    return tuple(
        s.name
        for s in sites
        if s.completes and missing_in_part(torch.as_tensor(data[s.name]), len(s.event_shape))
    )


def patterns(structure: Structure, data: Mapping[str, Any]) -> Iterator[tuple[Tensor | None, Tensors]]:
    """The rows that lack the same numbers: their indices (None for all at once), and their data.

    Raises:
        DataError: rows lack different numbers, and are not independent.
    """
    names = lacking(structure, data)
    tensors = {key: torch.as_tensor(value) for key, value in data.items()}
    if not all(structure.local(name) for name in names):  # one value for all rows
        yield None, tensors
        return
    rows = len(tensors[names[0]])
    gone = torch.cat([tensors[name].isnan().reshape(rows, -1) for name in names], 1)
    found, which = gone.unique(dim=0, return_inverse=True)
    if len(found) == 1:
        yield None, tensors
        return
    if structure.tied or any(
        not structure.local(name) or value.shape[:1] != (rows,)
        for name, value in tensors.items()
        if name in structure.sites
    ):
        raise DataError(
            f"{names[0]!r} lacks other numbers in other rows ({len(found)} patterns of NaN), and rows are not independent; "
            "expected the same in all rows, or rows that share no latent"
        )
    for i in range(len(found)):
        index = (which == i).nonzero()[:, 0]
        yield index, {key: value[index] for key, value in tensors.items()}


def completed(structure: Structure, data: Mapping[str, Any], n: int, ask: Ask, draw: Draw) -> Draws:
    """Draws of all latents, and of the sites that are lacking: whole values.

    Args:
        structure: of the program.
        data: with NaN where something is missing.
        n: draws.
        ask: makes the problem, what is missing being latent, and its structure.
        draw: draws the latents of it.

    Raises:
        DataError: rows lack different numbers, and are not independent.
    """
    names = lacking(structure, data)
    parts: list[tuple[Tensor | None, Draws]] = []
    for index, some in patterns(structure, data):
        problem, found = ask(some, {})
        drawn = draw(problem, found, n)
        filled = {name: _whole(structure, name, some[name], drawn.get(name), n) for name in names}
        parts.append((index, Draws({**drawn.sites, **filled}, chains=drawn.chains, stats=drawn.stats)))
    order = _order(parts)
    if order is None:
        return parts[0][1]
    sites = {}
    for name in parts[0][1]:
        site, first = structure.sites[name], parts[0][1][name]
        axis = first.ndim - len(site.event_shape) + structure.plates[structure.data_plate or ""].dim
        sites[name] = torch.cat([drawn[name] for _, drawn in parts], axis).index_select(axis, order)
    return Draws(sites)


def evidence(
    structure: Structure,
    data: Mapping[str, Any],
    ask: Ask,
    answer: Answer,
    rest: Answer,
    examples: Tensors,
) -> Estimate:
    """Log probability of values that are missing in part.

    Args:
        structure: of the program.
        data: with NaN where something is missing.
        ask: makes a problem and its structure.
        answer: the log probability of one whose values are whole.
        rest: that of what is missing, given what is not.
        examples: values of some sites, which tell what is usual. For the identity any value will do; a usual one keeps its digits.

    Raises:
        DataError: something that was observed depends on a value that is missing in part.
        Unanswerable: the backend knows a bound only, and one bound less another is none.
    """
    parts: list[tuple[Tensor | None, Estimate]] = []
    for index, some in patterns(structure, data):
        names = lacking(structure, some)
        for name in names:
            below = [s for s in some if s in structure.sites and s in nx.descendants(structure.graph, name)]
            if below:
                raise DataError(
                    f"site {name!r} is missing in part, and {', '.join(below)} depends on it: the log probability of what is "
                    f"known takes an integral over the rest; leave {', '.join(below)} out of the data, or give whole values"
                )
        filled = {
            name: _filled(structure, name, data[name], some[name], examples.get(name)) for name in names
        }
        found = answer(*ask({**some, **filled}))
        if names:
            gone = {name: some[name].isnan() for name in names}
            values = {name: _rest(structure, name, filled[name], gone[name]) for name in names}
            alone = {key: v for key, v in some.items() if key in names or key not in structure.sites}
            problem, other = ask(alone, values)
            beside = [s for s in other.observed if s not in names]
            if beside:  # and would count twice
                raise DataError(
                    f"site {names[0]!r} is missing in part, and the program observes {beside[0]!r} by itself; expected a program that "
                    f"leaves it open: an argument that may be None, or data by name, {{{beside[0]!r}: ...}}"
                )
            found = less(found, rest(problem, other))
        parts.append((index, found))
    order = _order(parts)
    return parts[0][1] if order is None else joined([found for _, found in parts], order)


def less(first: Estimate, other: Estimate) -> Estimate:
    """What is left of a log probability when that of a part is taken off, given the rest.

    Raises:
        Unanswerable: one of them is a bound.

    Example:
        >>> both, rest = Estimate(torch.tensor([-3.0]), "exact", dims=2), Estimate(torch.tensor([-1.0]), "exact", dims=1)
        >>> less(both, rest).value, less(both, rest).dims
        (tensor([-2.]), 1)
    """
    bounds = [e.kind for e in (first, other) if e.kind in (Exactness.LOWER_BOUND, Exactness.UPPER_BOUND)]
    if bounds:
        raise Unanswerable(
            f"log_prob of what is known of a value needs the log probability of the whole and of the rest; the backend has a "
            f"{bounds[0].value}, and one bound less another is none. Ask one that estimates it: pgen.fit(fitted.program, data, "
            "'mcmc')"
        )
    random = first.stderr is not None or other.stderr is not None
    errors = [e for e in (first.solver_error, other.solver_error) if e is not None]
    ends: dict[str, Any] = {}
    for end, off in (("lower", "upper"), ("upper", "lower")):
        mine, theirs = getattr(first, end), getattr(other, off)
        ends[end] = None
        if mine is not None or theirs is not None:
            own = first.value if mine is None and first.stderr is None else mine
            its = other.value if theirs is None and other.stderr is None else theirs
            ends[end] = None if own is None or its is None else own - its
    return replace(
        first,
        value=first.value - other.value,
        kind=weakest((first.kind, other.kind)),
        stderr=_square_sum(first.stderr, other.stderr) if random else None,
        solver_error=torch.stack(errors).sum(0) if errors else None,
        dims=None if first.dims is None or other.dims is None else first.dims - other.dims,
        khat=None,
        **ends,
    )


def joined(parts: list[Estimate], order: Tensor) -> Estimate:
    """Estimates of different rows as one, the rows in this order."""

    def rows(name: str) -> Tensor | None:
        mine = [getattr(part, name) for part in parts]
        if all(part is None for part in mine):
            return None
        if name in ("lower", "upper") and any(part is None for part in mine):
            return None
        filled = [torch.zeros_like(p.value) if m is None else m for m, p in zip(mine, parts, strict=True)]
        return torch.cat(filled).index_select(0, order)

    dims = {part.dims for part in parts}
    shared = [part.shared for part in parts]
    return replace(
        parts[0],
        value=torch.cat([part.value for part in parts]).index_select(0, order),
        kind=weakest(part.kind for part in parts),
        stderr=rows("stderr"),
        solver_error=rows("solver_error"),
        lower=rows("lower"),
        upper=rows("upper"),
        shared=None if any(s is None for s in shared) else torch.stack(shared).min(),  # type: ignore[arg-type]
        dims=dims.pop() if len(dims) == 1 else None,
        khat=None,
    )


def _square_sum(first: Tensor | None, other: Tensor | None) -> Tensor | None:
    if first is None or other is None:
        return other if first is None else first
    return (first.square() + other.square()).sqrt()


def _order(parts: list[tuple[Tensor | None, Any]]) -> Tensor | None:
    """Where the rows of parts, one after the other, belong; None for a single part that has them all."""
    found = [index for index, _ in parts if index is not None]
    return torch.cat(found).argsort() if found else None


def _filled(structure: Structure, name: str, all_rows: Any, value: Tensor, examples: Tensor | None) -> Tensor:
    """Values whose missing numbers are usual ones: medians of what is known of others."""
    shape = structure.sites[name].event_shape
    seen = [
        torch.as_tensor(rows).to(value).reshape(-1, shape.numel())
        for rows in (all_rows, examples)
        if rows is not None
    ]
    usual = torch.cat([rows[:_EXAMPLES] for rows in seen]).nanmedian(0).values.reshape(shape)
    usual = torch.where(usual.isnan(), value_inside(structure.sites[name], value), usual)
    return torch.where(value.isnan(), usual, value)


def _rest(structure: Structure, name: str, value: Tensor, gone: Tensor) -> Tensor:
    """The numbers that are missing, `[*batch, missing]`."""
    size = structure.sites[name].event_shape.numel()
    batch = value.shape[: value.ndim - len(structure.sites[name].event_shape)]
    which = gone.reshape(-1, size)[0].nonzero()[:, 0]
    return value.reshape(*batch, size).index_select(-1, which)


def _whole(structure: Structure, name: str, value: Tensor, rest: Tensor | None, n: int) -> Tensor:
    """Values with what is missing filled in, `[n, ...]`."""
    if rest is None:
        return value.expand(n, *value.shape)
    return whole(value, rest, len(structure.sites[name].event_shape))
