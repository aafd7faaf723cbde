"""Running a program many times at once: by its own rows, by an outer plate where that is right, by a loop elsewhere."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pgen.handlers import Substitute
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure

_ONWARD = 256  # draws of predicted sites made side by side
_CHUNK = 64  # draws run side by side where every draw needs a row of inputs of its own


def draw(
    problem: Problem, structure: Structure, n: int, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`n` independent joint draws of every site of the program, each of shape [n, ...].

    Sites inside the data plate contribute one row per draw; every draw has its own value of the sites outside it.
    Inputs of the program (covariates) are recycled row by row.

    Args:
        problem: the program; its observations are ignored, its inputs are used.
        structure: its structure.
        n: number of draws.
        given: values `[n, ...]` of latent sites that are not to be drawn, such as posterior draws of global ones.
    """
    shared = [s for s in structure.latents if not structure.local(s)]
    with torch.no_grad():
        if structure.data_plates and not shared:
            values = {s: _to_rows(v, structure, s) for s, v in (given or {}).items()}
            trace = poutine.trace(_substituted(problem.forward(n), values)).get_trace()
            return {s: _rows(trace.nodes[s]["value"], structure, s, n) for s in _drawn(structure)}
        if not vectorizes(problem, structure):
            return _loop(problem, structure, n, given)
        if structure.data_plates and problem.inputs:
            parts = []
            for start in range(0, n, _CHUNK):
                index = torch.arange(start, min(n, start + _CHUNK))
                some = {k: v[index.to(v.device)] for k, v in (given or {}).items()}
                rows = problem.take(index % (problem.rows or 1)).forward(len(index))
                parts.append(_side_by_side(rows, structure, len(index), some, diagonal=True))
            return {s: torch.cat([p[s] for p in parts]) for s in parts[0]}
        forward = problem.forward(1 if structure.data_plates else None)
        return _side_by_side(forward, structure, n, given or {}, diagonal=bool(structure.data_plates))


def onward(
    problem: Problem, structure: Structure, n: int, given: Mapping[str, Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    """Draw sites that no observed value bears upon, given draws of the others: by running the program."""
    if n and vectorizes(problem, structure):
        parts = []
        for start in range(0, n, _ONWARD):
            some = {k: spread(v[start : start + _ONWARD], structure, k) for k, v in given.items()}
            count = min(_ONWARD, n - start)
            nodes: Any = (
                poutine.trace(particles(Substitute(some)(problem), structure, count)).get_trace().nodes
            )
            drawn = {s: split(nodes[s]["value"], structure, s) for s in wanted}
            parts.append({s: v.expand(count, *v.shape[1:]) for s, v in drawn.items()})
        return {s: torch.cat([part[s] for part in parts]) for s in wanted}
    kept: dict[str, list[Tensor]] = {s: [] for s in wanted}
    for i in range(n):
        some = {k: v[i] for k, v in given.items()}
        nodes: Any = poutine.trace(Substitute(some)(problem)).get_trace().nodes
        for s in wanted:
            kept[s].append(nodes[s]["value"])
    return {s: torch.stack(values) for s, values in kept.items()}


def particles(problem: Any, structure: Structure, n: int) -> Any:
    """The program under an outermost plate of `n` particles, left of every batch dimension in use."""
    plate = pyro.plate("_particles", n, dim=-1 - structure.nesting)

    def vectorized(*args: Any, **kwargs: Any) -> Any:
        with plate:
            return problem(*args, **kwargs)

    return vectorized


def vectorizes(problem: Problem, structure: Structure) -> bool:
    """Whether the program can be run for many particles at once: two side by side give what two runs give.

    A program that sums, indexes or multiplies without regard to leading dimensions goes silently wrong under an outer
    plate; so the log probabilities of every site are compared with those of separate runs.
    """

    def has_density(name: str, node: Any = None) -> bool:
        return name in structure.sites and structure.sites[name].weighable

    probe = problem.take(torch.arange(2) % problem.rows) if problem.rows is not None else problem
    try:
        with torch.random.fork_rng(), torch.no_grad(), validating(False):
            torch.manual_seed(1)
            both = poutine.trace(particles(probe, structure, 2)).get_trace()
            both.compute_log_prob(has_density)
            if any(len(both.nodes[s]["fn"].batch_shape) > structure.nesting + 1 for s in structure.sites):
                return False
            for k in range(2):
                values = {s: split(both.nodes[s]["value"], structure, s)[k] for s in structure.latents}
                single = poutine.trace(Substitute(values)(probe)).get_trace()
                single.compute_log_prob(has_density)
                for s in filter(has_density, structure.sites):
                    mine, theirs = both.nodes[s]["log_prob"], single.nodes[s]["log_prob"]
                    if mine.dim() > structure.nesting:
                        mine = mine[k]
                    mine, theirs = torch.broadcast_tensors(mine, theirs)
                    if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True):
                        return False
    except Exception:
        return False
    return True


def split(value: Tensor, structure: Structure, site: str, event: int | None = None) -> Tensor:
    """A value drawn under `particles`, as [n, *batch_shape, *event_shape] of the site alone.

    `event` is the number of event dimensions of the value: those of the site, unless it is a log probability.
    """
    law = structure.sites[site]
    event = len(law.event_shape) if event is None else event
    lead = value.dim() - event - structure.nesting
    batch = value.shape[max(lead, 0) : value.dim() - event]
    natural = batch[len(batch) - len(law.batch_shape) :]
    if lead <= 0:
        return value.expand((1, *value.shape)).reshape((1, *natural, *value.shape[value.dim() - event :]))
    return value.reshape((value.shape[0], *natural, *value.shape[value.dim() - event :]))


def spread(value: Tensor, structure: Structure, site: str) -> Tensor:
    """The reverse: values [n, *batch_shape, *event_shape] laid out for `particles`."""
    law = structure.sites[site]
    natural = value.shape[1:]
    batch = natural[: len(natural) - len(law.event_shape)]
    return value.reshape((value.shape[0], *(1,) * (structure.nesting - len(batch)), *natural))


def _substituted(program: Any, values: Mapping[str, Tensor]) -> Any:
    return Substitute(values)(program) if values else program


def _drawn(structure: Structure) -> list[str]:
    return [s for s in structure.sites if not structure.sites[s].factor]


def _rows(value: Tensor, structure: Structure, site: str, n: int) -> Tensor:
    """A value of one run on n rows, rows first; what has no rows is the same for all."""
    axis = _row_axis(value, structure, site)
    return value.expand((n, *value.shape)) if axis is None else value.movedim(axis, 0)


def _to_rows(value: Tensor, structure: Structure, site: str) -> Tensor:
    """The reverse: values [n, ...], one for each row, with the rows where the program has them."""
    law = structure.sites[site]
    plate = next((structure.plates[p] for p in law.plates if p in structure.data_plates), None)
    return value if plate is None else value.movedim(0, len(law.batch_shape) + plate.dim)


def _row_axis(value: Tensor, structure: Structure, site: str) -> int | None:
    law = structure.sites[site]
    plate = next((structure.plates[p] for p in law.plates if p in structure.data_plates), None)
    return None if plate is None else value.dim() - len(law.event_shape) + plate.dim


def _side_by_side(
    forward: Problem, structure: Structure, n: int, given: Mapping[str, Tensor], diagonal: bool
) -> dict[str, Tensor]:
    """One run under an outer plate of n; `diagonal` keeps row i of draw i (the only row, where there is one)."""
    laid = {s: spread(v, structure, s) for s, v in given.items()}
    trace = poutine.trace(_substituted(particles(forward, structure, n), laid)).get_trace()
    out = {}
    for s in _drawn(structure):
        value = split(trace.nodes[s]["value"], structure, s)
        value = value.expand((n, *value.shape[1:]))
        axis = _row_axis(value[0], structure, s) if diagonal else None
        if axis is not None:
            rows = value.movedim(axis + 1, 1)
            index = torch.arange(n, device=value.device)
            value = rows[index, index % rows.shape[1]]
        out[s] = value
    return out


def _loop(
    problem: Problem, structure: Structure, n: int, given: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {s: [] for s in _drawn(structure)}
    for i in range(n):
        one = problem.take(torch.tensor([i % problem.rows])) if problem.rows else problem
        forward = one.forward(1 if structure.data_plates else None)
        trace = poutine.trace(_substituted(forward, {k: v[i] for k, v in (given or {}).items()})).get_trace()
        for s in kept:
            value = trace.nodes[s]["value"]
            axis = _row_axis(value, structure, s)
            kept[s].append(value if axis is None else value.select(axis, 0))
    return {s: torch.stack(v) for s, v in kept.items()}


def observed_scalars(problem: Problem, structure: Structure, together: bool = False) -> int:
    """Observed scalars per row; those of all rows `together`, as they are where there are no rows."""
    count, rows = 0, problem.rows or 1 if together else 1
    for s in structure.observed:
        law = structure.sites[s]
        plates = [structure.plates[p].size for p in law.plates if p not in structure.data_plates]
        count += math.prod(law.event_shape) * math.prod(plates) * (rows if structure.local(s) else 1)
    return count
