"""Normalisers of sites whose density is known up to a constant: what they add to the error of an answer, and where they are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pgen.capability import Estimate
from pgen.conversion import Adapter, Normaliser
from pgen.problem import Problem
from pgen.structure import Structure


def normalised(
    first: Estimate, problem: Problem, structure: Structure, adapters: Mapping[str, Adapter]
) -> Estimate:
    """A log probability from which log Z of some sites is taken off, that it was computed without.

    Args:
        first: the log probability, in which sites count up to a constant.
        problem: with its data.
        structure: of the program.
        adapters: conversions to a normalised log probability, by site. What they find is kept.
    """
    if not adapters:
        return first
    whole = replace(problem, adapters={**problem.adapters, **adapters})
    with torch.no_grad():
        known: Any = poutine.trace(whole).get_trace()
        loose: Any = poutine.trace(poutine.replay(problem, known)).get_trace()
        for name in adapters:
            value = known.nodes[name]["value"]
            log_z = loose.nodes[name]["fn"].log_prob(value) - known.nodes[name]["fn"].log_prob(value)
            found, _ = _by_row(structure, problem.rows, name, Normaliser(log_z), first.value)
            first = replace(first, value=first.value - found.value)
    return with_normalisers(first, structure, problem.rows, adapters)


def with_normalisers(
    first: Estimate, structure: Structure, rows: int | None, adapters: Mapping[str, Any]
) -> Estimate:
    """A log probability with the errors of the normalisers that went into it: log Z is taken off once for each copy of a site.

    Args:
        first: the log probability.
        structure: of the program.
        rows: of the problem, which its plate of rows has; the structure was found on a few.
        adapters: by site, those of the problem.
    """
    for name, adapt in adapters.items():
        if name not in structure.sites or not isinstance(adapt, Adapter):
            continue
        for log_z in adapt.normalisers:
            own, common = _by_row(structure, rows, name, log_z, first.value)
            first = _less(first, own, common)
    return first


def _by_row(
    structure: Structure, rows: int | None, site: str, log_z: Normaliser, value: Tensor
) -> tuple[Normaliser, bool]:
    """What a row has of a site's normalisers, and whether all rows have the same.

    Errors of several normalisers of a row add up, as at worst they do.
    """
    plates = [structure.plates[p] for p in structure.sites[site].plates]
    kept = {p.dim for p in plates if p.name in structure.data_plates and not structure.tied}
    sizes = {p.dim: rows if rows and p.name in structure.data_plates else p.size for p in plates}
    copies = math.prod(size for dim, size in sizes.items() if dim not in kept)
    alone = not log_z.value.ndim

    def of_rows(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        if alone:
            return (copies * part).to(value)
        lead = [1] * max(part.ndim, *(-p.dim for p in plates))
        for plate in plates:
            lead[plate.dim] = len(value) if plate.dim in kept else sizes[plate.dim]
        wide = part.expand(torch.broadcast_shapes(part.shape, torch.Size(lead)))
        gone = [d for d in range(-wide.ndim, 0) if d not in kept]
        return (wide.sum(gone) if gone else wide).reshape(value.shape).to(value)

    parts = (log_z.value, log_z.stderr, log_z.lower, log_z.upper, log_z.error)
    return Normaliser(*map(of_rows, parts)), alone or structure.tied  # type: ignore[arg-type]


def _less(first: Estimate, log_z: Normaliser, common: bool) -> Estimate:
    """An estimate from which log Z was taken, with what is known of log Z."""
    value, stderr, solver, shared = first.value, first.stderr, first.solver_error, first.shared
    if log_z.stderr is not None:
        mine = log_z.stderr
        stderr = mine.expand_as(value) if stderr is None else (stderr.square() + mine.square()).sqrt()
        if common:
            shared = mine if shared is None else (shared.square() + mine.square()).sqrt()
    if log_z.error is not None:
        mine = log_z.error.expand_as(value)
        solver = mine if solver is None else solver + mine
    ends: dict[str, Any] = {}
    for end, own, other in (("lower", first.lower, log_z.upper), ("upper", first.upper, log_z.lower)):
        if other is not None and (own is not None or first.stderr is None):  # what is random is no bound
            ends[end] = (value if own is None else own) + log_z.value - other
    return replace(first, stderr=stderr, solver_error=solver, shared=shared, **ends)
