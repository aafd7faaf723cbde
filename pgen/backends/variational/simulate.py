"""Simulations of the program as data for the guide: the sleep phase, and neural posterior estimation.

Where every latent is local, one simulation is one row. Otherwise it is a whole data set: the shared latents,
and all rows drawn given them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pgen.backends.variational.joint import Coupling
from pgen.backends.variational.objectives import Loss
from pgen.errors import ProgramError
from pgen.guides.proposal import Proposal
from pgen.guides.statements import Nodes, record
from pgen.inspection import inspect_problem
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.run import Step
from pgen.sampling import particles, split, vectorizes
from pgen.structure import Structure

_CHUNK = 1000


def as_observed(problem: Problem, structure: Structure) -> tuple[Problem, Structure]:
    """The problem with something observed at the sites that nothing depends on, if it was given no data.

    What is observed there is a simulation: it only shows the guide what its data will look like.
    """
    if structure.observed:
        return problem, structure
    leaves = [
        s.name for s in structure if not s.factor and s.parents and not structure.graph.out_degree(s.name)
    ]
    if not leaves:
        raise ProgramError(
            f"{structure.name} was given no data, and no site of it depends on another: there is nothing to "
            "condition on"
        )
    forward = problem.forward(3 if problem.size_name is not None else None)
    with torch.random.fork_rng(), torch.no_grad(), Parameters.of(problem).installed():
        nodes = record(forward)
    observed = problem.with_data({**problem.inputs, **{s: nodes[s].value for s in leaves}})
    found, observed = inspect_problem(observed)
    return replace(observed, adapters=problem.adapters), replace(found, conversions=structure.conversions)


def simulations(problem: Problem, coupling: Coupling, rows: int | None) -> tuple[Problem, dict[str, Tensor]]:
    """One run of the program forward: a problem that observes it, and the latents behind it."""
    forward = problem.forward(rows)
    nodes = record(forward)
    seen = {s: nodes[s].value for s in coupling.structure.observed}
    values = {s: node.value for s, node in nodes.items() if s not in seen}
    return _showing(forward, problem, seen), values


def _showing(forward: Problem, real: Problem, seen: Mapping[str, Tensor]) -> Problem:
    """A problem in which simulated values are observed, also where they are given as arguments."""
    inputs = dict(forward.inputs)
    if inputs:
        for site, node in record(real).items():
            key = next(
                (k for k, held in real.inputs.items() if site in seen and _same(node.value, held)), None
            )
            if key is not None:
                inputs[key] = seen[site].reshape((-1, *inputs[key].shape[1:]))
    return replace(forward, inputs=inputs, observations=dict(seen), unobserved=False)


_Dream = Callable[[Problem, Step], Loss]


def dreams(budget: int, problem: Problem, coupling: Coupling, proposal: Proposal) -> tuple[Problem, _Dream]:
    """So many simulations as data, and the guide's loss on a batch of them: minus `log q`, per simulation."""
    with torch.no_grad():
        if problem.rows is not None and not coupling.shared:
            return _by_row(budget, problem, coupling)
        return _whole(budget, problem, coupling, proposal)


def _by_row(budget: int, problem: Problem, coupling: Coupling) -> tuple[Problem, _Dream]:
    """Every simulation is a row."""
    structure = coupling.structure
    parts = []
    for start in range(0, budget, _CHUNK):
        dreamt, values = simulations(problem, coupling, min(_CHUNK, budget - start))
        latents = {
            s: values[s].movedim(_row_axis(values[s], structure, s), 0) for s in coupling.order if s in values
        }
        parts.append((dreamt, latents))
    inputs = {k: torch.cat([d.inputs[k] for d, _ in parts]) for k in parts[0][0].inputs}
    observations = {k: torch.cat([d.observations[k] for d, _ in parts]) for k in structure.observed}
    hidden = {k: torch.cat([latents[k] for _, latents in parts]) for k in parts[0][1]}
    data = replace(
        parts[0][0],
        inputs=inputs,
        observations={**observations, **hidden},
        rows=budget,
        size=budget,
        total=budget,
    )

    def loss(batch: Problem, step: Step) -> Loss:
        seen = {k: v for k, v in batch.observations.items() if k in structure.observed}
        drawn = {k: batch.observations[k] for k in hidden}
        values = {k: v.movedim(0, _row_axis(v, structure, k)) for k, v in drawn.items()}
        (nodes,) = coupling.redraw(replace(batch, observations=seen), [values], 1)
        return _minus_log_guide(coupling, [nodes], batch.rows or 1)

    return data, loss


def _whole(budget: int, problem: Problem, coupling: Coupling, proposal: Proposal) -> tuple[Problem, _Dream]:
    """Every simulation is a data set."""
    structure = coupling.structure
    forward = problem.forward(problem.rows)
    if vectorizes(problem, structure):
        parts = []
        for start in range(0, budget, _CHUNK):
            count = min(_CHUNK, budget - start)
            nodes = record(particles(forward, structure, count))
            sites = [s for s in structure.sites if not structure.sites[s].factor]
            split_up = {s: split(nodes[s].value, structure, s) for s in sites}
            parts.append({s: v.expand((count, *v.shape[1:])) for s, v in split_up.items()})
        values = {s: torch.cat([part[s] for part in parts]) for s in parts[0]}
    else:
        runs = [record(forward) for _ in range(budget)]
        values = {s: torch.stack([nodes[s].value for nodes in runs]) for s in structure.sites if s in runs[0]}
    data = replace(
        problem.forward(),
        inputs={},
        observations=values,
        unobserved=False,
        rows=budget,
        size=budget,
        total=budget,
    )

    def loss(batch: Problem, step: Step) -> Loss:
        count = batch.rows or 1
        drawn = {k: v for k, v in batch.observations.items() if k in coupling.order}
        seen = {k: batch.observations[k] for k in structure.observed}
        if proposal.shown is not None and coupling.vectorized and count > 1:
            laid = {
                k: _lay(v, len(structure.sites[k].event_shape), coupling.nesting)
                for k, v in {**drawn, **seen}.items()
            }
            run = proposal.shown(problem, {k: laid[k] for k in seen})
            lanes = [record(coupling.side_by_side(run, count), {k: laid[k] for k in drawn})]
        else:
            shown = [_showing(forward, problem, {k: v[i] for k, v in seen.items()}) for i in range(count)]
            lanes = [
                coupling.redraw(p, [{k: v[i] for k, v in drawn.items()}], 1)[0] for i, p in enumerate(shown)
            ]
        return _minus_log_guide(coupling, lanes, count)

    return data, loss


def _minus_log_guide(coupling: Coupling, lanes: list[Nodes], count: int) -> Loss:
    total = [term.value.sum() for term in coupling.guide_terms(lanes).values()]
    loss = -torch.stack(total).sum() / count
    return loss, {"log_guide": -loss.detach()}


def _lay(value: Tensor, event: int, nesting: int) -> Tensor:
    """Values [B, *batch, *event] with their leading dimension where the plate of particles is."""
    batch = value.dim() - 1 - event
    return value.reshape((value.shape[0], *(1,) * (nesting - batch), *value.shape[1:]))


def _row_axis(value: Tensor, structure: Structure, site: str) -> int:
    law = structure.sites[site]
    plate = next(structure.plates[p] for p in law.plates if p in structure.data_plates)
    return value.dim() - len(law.event_shape) + plate.dim


def _same(value: Tensor, held: Tensor) -> bool:
    """Whether a value is an argument itself, or another shape of it."""
    return value.data_ptr() == held.data_ptr() and value.numel() == held.numel() and value.dtype == held.dtype
