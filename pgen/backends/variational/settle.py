"""What is decided about a guide and a program before the first step: one run of both, looked at closely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyro.distributions as dist
import torch

from pgen.algorithms.factor_graph import Intractable
from pgen.backends.variational.joint import Coupling, Lane, agrees
from pgen.capability import Refusal
from pgen.errors import PgenError, ProgramError, Refused
from pgen.guides.proposal import Proposal
from pgen.guides.statements import record
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.structure import Structure


def couple(proposal: Proposal, structure: Structure, summed: Sequence[str]) -> Coupling:
    """A guide beside a program, nothing run yet."""
    return Coupling(
        structure=structure,
        guide=proposal.guide,
        order=proposal.order,
        graph=proposal.graph,
        row_plates=frozenset(structure.data_plates) | proposal.row_plates,
        summed=tuple(summed),
        nesting=max(structure.nesting, proposal.nesting),
    )


def settle(coupling: Coupling, problem: Problem, *, analytic: bool, particles: bool) -> Coupling:
    """Run guide and program once, with validation; decide what is known in closed form, and how to run.

    Args:
        coupling: what is known so far.
        problem: some rows.
        analytic: whether divergences in closed form are wanted.
        particles: whether several particles will be asked for.

    Raises:
        ProgramError: a local latent that the guide draws outside the plate of the rows, or a draw that does
            not fit.
    """
    with torch.random.fork_rng(), torch.no_grad(), validating(True):
        try:
            lanes = replace(coupling, check=True).weigh(problem, 1)
            guide = coupling.guide_terms([lane.guide for lane in lanes])
            coupling.program_terms(lanes)
        except PgenError:
            raise
        except Exception as error:
            raise ProgramError(
                f"{coupling.structure.name} raised {type(error).__name__} at values that its guide drew: "
                f"{error}"
            ) from error
    for name in coupling.order:
        if coupling.rows is not None and name in coupling.structure.sites:
            _require_same_rows(coupling, name, guide[name].dims)
    scored = tuple(n for n in coupling.order if not _has_path(lanes[0].guide[n].law))
    known = [n for n in coupling.order if analytic and _closed_form(coupling, lanes[0], n)]
    apart = lanes[0].factors is not None and lanes[0].factors.apart
    settled = replace(coupling, scored=scored, analytic=frozenset(known), apart=apart)
    return replace(settled, vectorized=not particles or agrees(settled, problem))


def unsummable(problem: Problem, structure: Structure, sites: Sequence[str]) -> Refusal | None:
    """Why the named latents cannot be summed out together, the others held at a draw; None if they can."""
    trial = Coupling(
        structure=structure,
        guide=lambda problem: problem,
        row_plates=frozenset(structure.data_plates),
        summed=tuple(sites),
        nesting=structure.nesting,
    )
    try:
        with torch.random.fork_rng(), torch.no_grad(), Parameters.of(problem).installed():
            nodes = record(problem)
            trial.follow(problem, [{s: nodes[s] for s in structure.latents if s not in trial.summed}], 1)
    except Refused as error:
        return error.refusal if isinstance(error.refusal, Refusal) else Refusal(None, "a sum", str(error))
    except Intractable as error:
        return Refusal(
            error.variables[0] if error.variables else None, "a sum of reasonable size", str(error)
        )
    return None


def _require_same_rows(coupling: Coupling, name: str, dims: tuple[str, ...]) -> None:
    local = coupling.structure.local(name)
    if local and coupling.rows not in dims:
        plate = coupling.rows
        raise ProgramError(
            f"the guide draws {name!r} outside the plate of the rows, but {coupling.structure.name} draws it "
            f"inside; put it there in the guide too: with pyro.plate({plate!r}, n): pyro.sample({name!r}, "
            "...)"
        )
    if not local and coupling.rows in dims:
        raise ProgramError(
            f"the guide draws {name!r} inside the plate of the rows, but {coupling.structure.name} draws it "
            "once for all rows; draw it outside of the plate in the guide too"
        )


def _has_path(law: torch.distributions.Distribution) -> bool:
    base = law
    while isinstance(
        base, (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
    ):
        base = base.base_dist
    return base.has_rsample or isinstance(base, dist.Delta)


def _closed_form(coupling: Coupling, lane: Lane, name: str) -> bool:
    """Whether `KL(q || p)` at a site is known, and known of the laws that the run has at hand.

    The program's law must have been computed from latents drawn before the site in the guide, and from none
    that is
    summed out; scale and mask must be the same on both sides.
    """
    if name not in coupling.structure.sites:
        return False
    site = coupling.structure.sites[name]
    before = set(coupling.order[: coupling.order.index(name)])
    if not site.certain or not {p for p in site.parents if p in coupling.structure.latents} <= before:
        return False
    q, p = lane.guide[name], lane.program[name]
    if (
        q.mask is not p.mask
        or (q.scale is not p.scale and q.scale != p.scale)
        or isinstance(q.law, dist.Delta)
    ):
        return False
    try:
        with torch.no_grad():
            divergence = torch.distributions.kl_divergence(q.law, p.law)
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return False
    return divergence.shape == q.law.batch_shape == p.law.batch_shape and bool(
        torch.isfinite(divergence).all()
    )
