"""The evidence of every row by itself, where rows share no latent: all rows are annealed at once.

Given the parameters, a row is a problem of its own, with its own latents. Tempered particles walk from a normal law like
its prior, which reaches every mode that its posterior can have, to the posterior itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pgen.algorithms.annealing_rows import TemperedRows
from pgen.algorithms.kernels.base import LogDensity
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.path import Path, gaussian
from pgen.algorithms.progress import followed
from pgen.algorithms.record import Recorded, Unrecordable
from pgen.capability import Capability, Estimate, Exactness
from pgen.density import Density
from pgen.evaluation import functions_of
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.sampling import observed_scalars
from pgen.structure import Structure

_DRAWS = 200  # of the prior
_TAIL = 0.005  # of them, at either end, whose distance does not count
_WIDER = 1.25  # than the prior: the reference has to cover its tails
_PARTICLES = 64
_AT_ONCE = 2**16  # particles of all rows that are moved together


def independent(structure: Structure) -> bool:
    """Whether every site belongs to one row of the data, so that rows have evidences of their own."""
    return bool(structure.data_plates and structure.latents) and all(map(structure.local, structure.sites))


def evidence_by_row(
    problem: Problem,
    structure: Structure,
    finite: Sequence[str],
    islands: int,
    lift: bool,
) -> Estimate:
    r"""$\log p(x_r)$ for every row r, by tempered SMC; the standard error comes from the spread of islands.

    Args:
        problem: the program with its data.
        structure: its structure; see `independent`.
        finite: latents that are summed out.
        islands: groups of particles of each row.
        lift: compute in double precision.
    """
    count = problem.rows or 1
    problem = problem.take(torch.arange(count, device=problem.device))
    size = max(1, min(count, _AT_ONCE // (islands * _PARTICLES)))
    density = Density.of(_row(problem, 0), structure, finite)
    dtype = torch.float64 if lift else density.dtype
    targets = together(problem, density, lift)
    try:
        each = islands * _PARTICLES
        targets(range(size))(torch.zeros(size * each, density.size, dtype=dtype, device=problem.device))
    except (Unrecordable, RuntimeError):  # what the program does depends on values
        targets = apart(problem, structure, finite, lift)
    values, errors = list[Tensor](), list[Tensor]()
    for start in followed(range(0, count, size), "weighing rows by particles"):
        # The last rows are made up to as many: one recording serves all.
        index = [min(row, count - 1) for row in range(start, start + size)]
        likely = prior(problem.take(torch.tensor(index, device=problem.device)), structure, density)
        path = whitened(targets(index), likely.to(dtype), islands * _PARTICLES)
        found = TemperedRows(HMC(steps=4), _PARTICLES, islands, keep=0.9).run(path, size)
        values.append(found.estimate)
        errors.append(found.stderr)
    return Estimate(
        torch.cat(values)[:count],
        Exactness.UNNORMALIZED if structure.factors else Exactness.ESTIMATE,
        stderr=torch.cat(errors)[:count],
        measure=structure.measure,
        dims=observed_scalars(problem, structure),
        particles=_PARTICLES * islands,
    )


def together(problem: Problem, density: Density, lift: bool) -> Callable[[Sequence[int]], LogDensity]:
    """Targets of some rows, `[R C, d]` row by row, in one recording that takes their data as inputs."""
    dtype = torch.float64 if lift else density.dtype
    observed, given = (
        {
            k: v.unsqueeze(1).to(dtype if lift and v.is_floating_point() else v.dtype)
            for k, v in group.items()
            if v.dim()
        }
        for group in (problem.observations, problem.inputs)
    )

    def on_rows(positions: Tensor, *seen: Tensor) -> tuple[Tensor, Tensor]:
        parts = iter(seen)
        return density.on_many(positions, {k: next(parts) for k in observed}, {k: next(parts) for k in given})

    recorded = Recorded(on_rows, lift=lift, fallback=False)

    def targets(rows: Sequence[int]) -> LogDensity:
        index = torch.tensor(rows, device=problem.device)
        seen = [v[index] for v in (*observed.values(), *given.values())]
        return lambda positions: recorded(positions, *seen)

    return targets


def apart(
    problem: Problem, structure: Structure, finite: Sequence[str], lift: bool
) -> Callable[[Sequence[int]], LogDensity]:
    """The same by a function for each row, one after the other."""

    @functools.cache
    def of_row(row: int) -> LogDensity:
        return functions_of(Density.of(_row(problem, row), structure, finite), lift=lift).target

    def targets(rows: Sequence[int]) -> LogDensity:
        def target(positions: Tensor) -> tuple[Tensor, Tensor]:
            found = [of_row(row)(part) for row, part in zip(rows, positions.chunk(len(rows)), strict=True)]
            return torch.cat([value for value, _ in found]), torch.cat([slope for _, slope in found])

        return target

    return targets


def _row(problem: Problem, row: int) -> Problem:
    """A row as a problem of its own."""
    return problem.take(torch.tensor([row], device=problem.device)).whole()


def prior(problem: Problem, structure: Structure, density: Density) -> Tensor:
    """Draws of the latents of every row before its data are seen, unconstrained: `[n, R, d]`.

    Where a latent cannot be drawn: uniform on (-2, 2), as chains begin.

    Args:
        problem: of R rows.
        structure: of the program.
        density: of one row.
    """
    rows, device = problem.rows or 1, problem.device
    if not all(
        {Capability.SAMPLE, Capability.RSAMPLE} & structure.sites[s.name].capabilities for s in density.slots
    ):
        return 4 * torch.rand(_DRAWS, rows, density.size, dtype=density.dtype, device=device) - 2
    again = problem.take(torch.arange(rows, device=device).repeat(_DRAWS)).whole()
    with validating(False), torch.no_grad():
        nodes: Any = poutine.trace(again).get_trace().nodes
    parts = list[Tensor]()
    for slot in density.slots:
        site, node = structure.sites[slot.name], nodes[slot.name]
        (dim,) = (structure.plates[p].dim for p in site.plates if p in structure.data_plates)
        u = biject_to(node["fn"].support).inv(node["value"]).movedim(len(site.batch_shape) + dim, 0)
        parts.append(u.reshape(_DRAWS, rows, slot.size))
    found = torch.cat(parts, -1)
    return torch.where(torch.isfinite(found), found, 0.0)


def whitened(target: LogDensity, likely: Tensor, each: int) -> Path:
    """From a standard normal to the target, where each row is centred and scaled as draws of its prior are, widened.

    Args:
        target: at vectors `[R * each, d]`, row by row.
        likely: the draws, `[n, R, d]`.
        each: particles of a row.
    """
    ends = likely.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=likely.dtype, device=likely.device), dim=0)
    spread = likely.clamp(ends[0], ends[1]).transpose(0, 1)
    deviation = spread.std(1).clamp_min(1e-12)
    centre = spread.mean(1).repeat_interleave(each, 0)
    scale = (_WIDER * deviation).repeat_interleave(each, 0)
    volume = scale.log().sum(-1)

    def seen(x: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(centre + scale * x)
        return value + volume, gradient * scale

    return Path(seen, *gaussian(torch.zeros_like(centre[0]), torch.ones_like(centre[0])))
