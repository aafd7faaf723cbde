"""The guide's side of a fit: one made from the program, or the user's own, called with what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor

from pgen.calling import name_of, signature_of
from pgen.errors import PgenError, ProgramError
from pgen.guides.amortized import Amortized
from pgen.guides.automatic import Automatic
from pgen.guides.automatic import Kind as Joint
from pgen.guides.families import Family
from pgen.guides.plan import Globals
from pgen.guides.statements import Nodes, record
from pgen.inspection import inspect_problem
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.structure import Structure

Kind = Literal["auto", "amortized"] | Joint

Guide = Callable[[Problem], Callable[[], object]]
"""From a problem to a Pyro program of no arguments that draws its latents."""


@dataclass(frozen=True)
class Proposal:
    """A guide, and what is known of it.

    Attributes:
        owner: what holds its learned tensors; None where they are the program's own.
        guide: from a problem to a program of no arguments that draws the latents.
        order: the latents in the order of drawing, auxiliary ones among them.
        graph: dependence among them, parents -> site.
        row_plates: its plates over the rows.
        nesting: batch dimensions that it uses.
        fixed: it has a law of its own for every row, so that all rows of the fitted data always go together.
        shown: like `guide`, with other values for what is observed; these may have dimensions for particles.
        deaf: latents whose laws read no data, so that they are those of the fitted data whatever is asked about.
    """

    owner: object
    guide: Guide
    order: tuple[str, ...]
    graph: nx.DiGraph
    row_plates: frozenset[str] = frozenset()
    nesting: int = 0
    fixed: bool = False
    shown: Callable[[Problem, Mapping[str, Tensor]], Callable[[], object]] | None = None
    deaf: frozenset[str] = frozenset()


def automatic(
    kind: Kind,
    problem: Problem,
    structure: Structure,
    summed: Sequence[str],
    *,
    pooled: bool = False,
    family: Family = "normal",
) -> Proposal:
    """A guide made from the program.

    Args:
        kind: `"auto"` and `"amortized"` read the data by networks; the others are one joint law of all
            latents.
        problem: the program on its data.
        structure: its structure.
        summed: latents that are left to exact sums.
        pooled: latents outside the rows are read off the data too, so that any data set can be asked about.
        family: of the laws that networks give continuous latents.
    """
    guide: Amortized | Automatic
    if kind == "auto" or kind == "amortized":
        globals_: Globals = "pooled" if pooled else "free"
        guide = Amortized.of(problem, structure, family=family, marginalised=summed, globals_=globals_)
    else:
        guide = Automatic.of(problem, structure, kind, marginalised=summed)
    read = guide.read

    def on(problem: Problem) -> Callable[[], object]:
        seen = read(problem)
        return lambda: guide(*seen)

    def shown(problem: Problem, observed: Mapping[str, Tensor]) -> Callable[[], object]:
        seen = read(problem)
        return lambda: guide({**seen.observed, **observed}, seen.plates)

    return Proposal(
        guide,
        on,
        tuple(guide.order),
        guide.graph,
        frozenset(structure.data_plates),
        max(structure.nesting, guide.layout.nesting),
        guide.fixed,
        shown,
        guide.free if isinstance(guide, Amortized) else frozenset(guide.sites),
    )


def prior(structure: Structure) -> Proposal:
    """The program's latents, drawn as the program draws them: where there was nothing to fit."""
    graph = nx.DiGraph(structure.graph.subgraph(structure.latents))
    return Proposal(
        None,
        lambda problem: problem,
        structure.latents,
        graph,
        frozenset(structure.data_plates),
        structure.nesting,
    )


def users(guide: Callable[..., Any], problem: Problem, structure: Structure) -> Proposal:
    """A user's callable or module.

    It is called with data by name where its arguments name data (inputs or observations of the program; `n`
    is the number of rows), otherwise with the same arguments as the program, as in Pyro's own examples.

    Raises:
        ProgramError: the guide raises, observes a site, or draws one that the program does not have.
    """
    bound = bind(guide, problem)
    nodes = _try_once(guide, problem, bound)
    _require_same_sites(guide, nodes, structure)
    try:
        found, seen = inspect_problem(bound)
    except PgenError as error:
        raise ProgramError(f"the guide {_name(guide)}: {error}") from error
    rows = set(found.data_plates)
    fixed = problem.rows is not None and seen.rows is None
    if fixed:  # it cannot be run on fewer rows: the plates over them are known by their size
        rows = {p.name for p in found.plates.values() if p.size == problem.rows}
        fixed = any(not rows.isdisjoint(found.sites[s].plates) for s in found.latents)
    graph = nx.DiGraph(found.graph.subgraph(found.latents))
    for i, name in enumerate(found.latents):
        if not found.sites[name].certain:
            graph.add_edges_from((earlier, name) for earlier in found.latents[:i])
    return Proposal(guide, caller(guide), found.latents, graph, frozenset(rows), found.nesting, fixed)


def caller(guide: Callable[..., Any]) -> Guide:
    """From a problem to the guide called on it."""

    def on(problem: Problem) -> Callable[[], object]:
        held = problem.take(torch.arange(problem.rows or 0)) if problem.source is not None else problem
        args, kwargs = bind(guide, held).arguments()
        return lambda: guide(*args, **kwargs)

    return on


def bind(guide: Callable[..., Any], problem: Problem) -> Problem:
    """The guide with the arguments it asks for: data by name, or what the program is called with."""
    names, required, open_ended = _arguments(guide)
    known = {**problem.observations, **problem.inputs}
    positional = dict(zip(_arguments(problem.program)[0], problem.args, strict=False))
    given = {**positional, **problem.kwargs}
    size = next(
        (n for n in names if n not in known and n not in given and (n == "n" or n == problem.size_name)), None
    )
    if not open_ended and all(n in known or n in given or n == size for n in required):
        return replace(
            problem,
            program=guide,
            inputs={n: known[n] for n in names if n in known},
            observations={},
            missing=frozenset(),
            args=(),
            kwargs={n: given[n] for n in names if n in given},
            positional=(),
            size_name=size,
            adapters={},
            source=None,
        )
    return replace(problem, program=guide, observations={}, missing=frozenset(), adapters={}, source=None)


def _try_once(guide: Callable[..., Any], problem: Problem, bound: Problem) -> Nodes:
    """Run a guide once: one that makes its parameters on the first call then has them; errors are plain."""
    clones = Parameters.of(problem, owners={"guide": guide}, run=lambda: None)
    with torch.random.fork_rng(), torch.no_grad(), clones.installed():
        try:
            return record(bound)
        except TypeError as error:
            wanted = ", ".join(_arguments(guide)[0]) or "nothing"
            data = ", ".join((*problem.observations, *problem.inputs)) or "none"
            raise ProgramError(
                f"the guide {_name(guide)} takes ({wanted}) and cannot be called beside "
                f"{_name(problem.program)} ({error}). Its arguments may name data ({data}) and the number of "
                "rows (n), or be those of the program, in order"
            ) from error
        except Exception as error:
            raise ProgramError(f"the guide {_name(guide)} raised {type(error).__name__}: {error}") from error


def _require_same_sites(guide: Callable[..., Any], nodes: Nodes, structure: Structure) -> None:
    drawn = {n: node for n, node in nodes.items() if not node.subsample}
    for name, node in drawn.items():
        if node.observed:
            raise ProgramError(
                f"the guide {_name(guide)} observes {name!r}; a guide only draws latents: leave out obs="
            )
        if name not in structure.latents and not node.auxiliary:
            raise ProgramError(
                f"the guide {_name(guide)} draws {name!r}, and {structure.name} has no latent of that name; "
                f"its latents: {', '.join(structure.latents) or 'none'}. Rename the site, or mark it as the "
                "guide's own: pyro.sample(..., infer={'is_auxiliary': True})"
            )


def _arguments(function: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Names of a function's arguments, those that are required, and whether it takes any number of them."""
    signature = signature_of(function)
    if signature is None:
        return [], [], True
    parameters = signature.parameters.values()
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in plain if p.default is p.empty]
    return [p.name for p in plain], required, any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _name(function: Callable[..., Any]) -> str:
    return repr(name_of(function))
