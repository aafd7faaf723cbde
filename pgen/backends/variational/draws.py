"""Draws of latents from a guide, shaped as the program shapes them; what was summed out is drawn exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.algorithms.factor_graph import FactorGraph
from pgen.algorithms.sum_product import marginals as exact_marginals
from pgen.algorithms.sum_product import sample as exact_draws
from pgen.backends.variational.joint import PARTICLES, Coupling, Lane
from pgen.backends.variational.mixture import Mixture, plain
from pgen.backends.variational.objectives import weigh
from pgen.enumeration import Enumeration
from pgen.guides.statements import Node
from pgen.problem import Problem
from pgen.structure import Structure

_SCALARS = 2**20  # values of sites that are in memory at once
_SIDE_BY_SIDE = 16  # particles that a lot should hold where rows can be split instead
_COMPONENTS = 256  # draws of the other latents that a marginal is averaged over


def whole(problem: Problem) -> Problem:
    """The problem with all its rows in memory."""
    return problem.take(torch.arange(problem.rows or 0)) if problem.source is not None else problem


def sizes(n: int, rows: int, structure: Structure) -> Iterator[int]:
    """`n` particles in lots that fit side by side."""
    lot = max(1, _SCALARS // (rows * _width(structure)))
    for start in range(0, n, lot):
        yield min(lot, n - start)


def rows_at_once(n: int, structure: Structure) -> int:
    """Rows to take at a time, where each is given `n` particles."""
    return max(1, _SCALARS // (min(n, _SIDE_BY_SIDE) * _width(structure)))


def _width(structure: Structure) -> int:
    """Values of sites per row."""
    widths = []
    for site in structure:
        plates = [structure.plates[p].size for p in site.plates if p not in structure.data_plates]
        widths.append(math.prod(site.event_shape) * math.prod(plates))
    return max(1, sum(widths))


def drawn(
    coupling: Coupling, problem: Problem, n: int, wanted: Sequence[str], weights: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """`n` draws of the wanted latents, `[n, ...]` as the program shapes them.

    Log importance weights of the draws, `[n, rows]` or `[n]`, are added to `weights`, in lots.
    """
    held = whole(problem)
    parts: dict[str, list[Tensor]] = {s: [] for s in wanted}
    own = [s for s in wanted if s in coupling.order]
    for size in sizes(n, held.rows or 1, coupling.structure):
        guides = coupling.draw(held, size)
        values = {s: _naturally([g[s] for g in guides], size, coupling) for s in own}
        if weights is not None or len(own) < len(wanted):
            lanes = coupling.follow(held, guides, size)
            if weights is not None:
                program, guide = coupling.program_terms(lanes), coupling.guide_terms(guides)
                weights.append(weigh(coupling, held, program, guide, size).log_weights)
            if coupling.summed:
                lanes = _settled(coupling, held, lanes, size)
            values |= {
                s: _naturally([lane.program[s] for lane in lanes], size, coupling)
                for s in wanted
                if s not in values
            }
        for s in wanted:
            parts[s].append(values[s])
    return {s: torch.cat(v) for s, v in parts.items()}


def _settled(coupling: Coupling, problem: Problem, lanes: Sequence[Lane], size: int) -> list[Lane]:
    """The program's statements with the summed latents drawn from their exact conditional law."""
    plain = replace(coupling, summed=())
    out = []
    for lane in lanes:
        count = size if len(lanes) == 1 else 1
        graph, found = _graph(coupling, lane)
        chosen = {name: index[0] for name, index in exact_draws(graph, 1).items()}
        nodes = dict(lane.guide)
        for name, index in chosen.items():
            support = found.supports[name]
            nodes[name] = lane.program[name]._replace(
                value=_lay(support[index], lane.program[name], coupling, graph.keep)
            )
        out.extend(plain.follow(problem, [nodes], count))
    return out


def _graph(coupling: Coupling, lane: Lane) -> tuple[FactorGraph, Enumeration]:
    """The factors of one lane over what was summed out, its particles (if several) kept apart."""
    found = lane.factors
    if found is None:
        raise ValueError("nothing was summed out in this lane")
    alive = [name for name in found.factors if name not in coupling.barren]
    several = any(PARTICLES in found.factors[name].names for name in alive)
    return found.graph(alive, (PARTICLES,) if several else ()), found


def _lay(value: Tensor, node: Node, coupling: Coupling, keep: tuple[str, ...]) -> Tensor:
    """Values `[*keep, *plates, *event]` in the layout of a run: plates along their dimensions."""
    frames = {f.dim: f.size for f in node.frames}
    event = value.shape[value.dim() - len(node.law.event_shape) :]
    depth = coupling.nesting + 1 if keep else max([0, *(-d for d in frames)])
    return value.reshape(*(frames.get(d, 1) for d in range(-depth, 0)), *event)


def _naturally(nodes: Sequence[Node], size: int, coupling: Coupling) -> Tensor:
    """Values of one site in all lanes, `[size, *batch, *event]`: the batch as the program alone has it."""
    if len(nodes) > 1 or size == 1:
        return torch.stack([node.value for node in nodes])
    node = nodes[0]
    event = len(node.law.event_shape)
    batch = node.value.shape[: node.value.dim() - event]
    if len(batch) <= coupling.nesting or not any(f.name == PARTICLES for f in node.frames):
        return node.value.expand((size, *node.value.shape))
    inner = -min([0, *(f.dim for f in node.frames if f.name != PARTICLES)])
    inner = max(inner, _unplated(batch[1:]))
    kept = batch[len(batch) - inner :] if inner else ()
    return node.value.reshape(size, *kept, *node.value.shape[len(batch) :])


def _unplated(batch: Sequence[int]) -> int:
    """Dimensions from the right up to the last that is not of size one."""
    return max([0, *(len(batch) - i for i, size in enumerate(batch) if size > 1)])


def pick(values: Tensor, index: Tensor, rows: int | None) -> Tensor:
    """Resampled draws: by one index for a whole draw, `[n]`, or one for every row, `[n, rows]`."""
    if rows is None:
        return values[index]
    moved = values.movedim(rows + 1, 1)
    spread = index.reshape(*index.shape, *(1,) * (moved.dim() - 2)).expand(-1, -1, *moved.shape[2:])
    return moved.gather(0, spread).movedim(1, rows + 1)


def row_axis(values: Tensor, structure: Structure, site: str) -> int | None:
    """Which dimension of one draw of a site (of values `[n, ...]`) is that of the rows."""
    law = structure.sites[site]
    plate = next((structure.plates[p] for p in law.plates if p in structure.data_plates), None)
    return None if plate is None else values.dim() - 1 - len(law.event_shape) + plate.dim


def marginals(coupling: Coupling, problem: Problem, structure: Structure) -> dict[str, Any]:
    """The law of each latent given the data: see `Posterior.marginals`."""
    held = whole(problem)
    found: dict[str, Any] = {}
    (alone,) = coupling.draw(held, 1)
    dependent = [s for s in coupling.order if s in structure.sites and coupling.graph.in_degree(s)]
    for s in coupling.order:
        if s in structure.sites and s not in dependent:
            found[s] = plain(alone[s].law)
    if dependent and coupling.vectorized:
        (together,) = coupling.draw(held, max(2, next(sizes(_COMPONENTS, held.rows or 1, structure))))
        for s in dependent:
            law = together[s].law
            if not isinstance(law, dist.Delta) and law.batch_shape[:1] != alone[s].law.batch_shape[:1]:
                found[s] = Mixture(law, alone[s].law.batch_shape)
    if coupling.summed:
        found |= _summed_marginals(coupling, held)
    rest = [s for s in structure.latents if s not in found]
    for s, values in (drawn(coupling, held, 1000, rest) if rest else {}).items():
        moved = values.movedim(0, values.dim() - 1 - len(structure.sites[s].event_shape))
        weights = torch.zeros(
            moved.shape[: moved.dim() - len(structure.sites[s].event_shape)], device=values.device
        )
        found[s] = dist.Empirical(moved, weights)
    return found


def _summed_marginals(coupling: Coupling, problem: Problem) -> dict[str, Any]:
    """Exact laws of the summed latents, averaged over draws of the guide's."""
    count = max(2, next(sizes(_COMPONENTS, problem.rows or 1, coupling.structure))) if coupling.order else 1
    lanes = coupling.follow(problem, coupling.draw(problem, count), count)
    found = {}
    for name in coupling.summed:
        tables = []
        for lane in lanes:
            graph, _ = _graph(coupling, lane)
            table = exact_marginals(graph)[name]  # [*keep, *plates, values]
            tables.append(table if graph.keep else table.unsqueeze(0))
        probs = torch.cat(tables).mean(0)
        node = lanes[0].program[name]
        plates = {f.dim: f.size for f in node.frames if f.name != PARTICLES}
        probs = probs.reshape(*(plates.get(d, 1) for d in range(min([0, *plates]), 0)), -1)
        found[name] = _law_over(_graph(coupling, lanes[0])[1].supports[name], probs, node)
    return found


def _law_over(support: Tensor, probs: Tensor, node: Node) -> Any:
    """A law over a finite support, of the plainest kind that there is."""
    if support.dim() == 1 and torch.equal(
        support, torch.arange(len(support), device=support.device).to(support)
    ):
        if isinstance(node.law, dist.Bernoulli):
            return dist.Bernoulli(probs=probs[..., 1])
        return dist.Categorical(probs=probs)
    shape = (*probs.shape, *support.shape[1:])
    return dist.Empirical(support.expand(shape), probs.log())
