"""Inspecting a program: one run, element by element, that touches no global state, and gives its structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from pgen.calling import hides_names, name_of, parameters_of
from pgen.capability import Capability
from pgen.errors import DataError, PgenError, ProgramError
from pgen.handlers import StandIn
from pgen.holes import observed_by_name, telling_rows
from pgen.isolation import isolated, validating
from pgen.linearity import bent_sites
from pgen.parameters import Parameters
from pgen.problem import Data, Problem
from pgen.provenance import Leak, Provenance
from pgen.sites import Progress, Watch, only
from pgen.structure import Plate, Site, Structure
from pgen.tensors import ONLY_OBSERVED, not_finite

# Up to so many rows, all of them are run once, so that bad data is found before any work is done.
_LIGHT_ROWS = 2048


def structure_of(
    program: Callable[..., Any] | Problem,
    data: Data = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Structure:
    """Inspect a program on its data: one run that touches no global state.

    The run uses a few rows where the program lets itself be run on fewer; a second one, on another number of rows,
    tells which plates are those of the data.

    Raises:
        DataError: a key is neither an argument nor a site, a value has the wrong shape or lies outside the support.
        ProgramError: the program itself raises.
    """
    return inspect_problem(
        program if isinstance(program, Problem) else Problem.of(program, data, args, kwargs)
    )[0]


def inspect_problem(problem: Problem) -> tuple[Structure, Problem]:
    """The structure, and the problem as it may be run: with rows only where they can be taken apart."""
    with isolated(0):  # threads take turns: Pyro's handler stack belongs to the process
        structure, problem = _inspect_problem(problem)
    drawn = {Capability.SAMPLE, Capability.RSAMPLE}
    undrawable = frozenset(n for n in structure.latents if not structure.sites[n].capabilities & drawn)
    return structure, replace(problem, undrawable=undrawable)


def _inspect_problem(problem: Problem) -> tuple[Structure, Problem]:
    problem = observed_by_name(problem)
    if problem.rows is None:
        return _structure(_inspect(problem, follow=True), problem, ()), problem
    telling = telling_rows(problem, 3 if problem.rows != 3 else 2)
    few = len(telling) + (len(telling) == problem.rows)
    try:
        run = _inspect(problem.take(telling[torch.arange(few) % len(telling)]), follow=True)
    except PgenError:  # perhaps only because the program cannot take fewer rows: its full run will tell
        run = None
    if run is not None:
        other = problem if problem.rows <= _LIGHT_ROWS else problem.take(_others(problem, few))
        try:
            second = _inspect(other, follow=False)
        except DataError:
            if other is not problem and problem.source is None:
                _inspect(
                    problem, follow=False
                )  # all of the data, so that its rows are called by their numbers
            raise
        grown = _grown(run, few, second, other.rows)
        if grown:
            return _structure(run, problem, grown), problem
    whole = problem.whole()
    return _structure(_inspect(whole, follow=True), whole, ()), whole


def _others(problem: Problem, few: int) -> Tensor:
    """Rows of a large problem, not as few, with those that are missing in part."""
    rows = telling_rows(problem, 5, most=_LIGHT_ROWS)
    return rows if len(rows) != few else torch.cat([rows, rows[:1]])


def _grown(run: _Inspected, few: int, second: _Inspected, rows: int | None) -> tuple[str, ...]:
    """The plates that have as many copies as there are rows; none, unless all else is the same in both runs."""
    if run.sites.keys() != second.sites.keys():
        return ()
    grown = tuple(
        n
        for n, p in run.plates.items()
        if p.size == few and n in second.plates and second.plates[n].size == rows
    )
    for name, site in run.sites.items():
        other = second.sites[name]
        same = (site.batch_shape, site.event_shape) == (other.batch_shape, other.event_shape)
        if not same and not any(p in grown for p in site.plates):
            return ()
    return grown


@dataclass
class _Inspected:
    sites: dict[str, Site]
    plates: dict[str, Plate]
    uncertain: dict[str, frozenset[str]]
    leaks: list[Leak]
    params: tuple[str, ...]
    bent: tuple[str, ...]


def _inspect(problem: Problem, follow: bool) -> _Inspected:
    watch = Watch(problem, Provenance() if follow else None)
    at: Progress = Progress()
    bent: tuple[str, ...] = ()
    try:
        with torch.no_grad(), validating(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            with at:
                parameters = Parameters.of(problem)
            at = watch
            with parameters.installed(), StandIn(), watch:
                if watch.provenance is None:
                    problem()
                else:
                    for name, tensor in parameters.tensors.items():
                        watch.provenance.mark(tensor, f"param:{name}")
                    for name, tensor in problem.inputs.items():
                        watch.provenance.mark(tensor, f"input:{name}")
                        if name in problem.holed:
                            watch.provenance.write(tensor, {f"nan:{name}": tensor.isnan()}, keep=True)
                    with watch.provenance:
                        problem()
            if follow:
                with parameters.installed(), StandIn():
                    bent = _bent(problem, watch.sites)
    except PgenError:
        raise
    except Exception as error:
        said = str(error).partition("Trace Shapes")[0].rstrip()
        told = f"{name_of(problem.program)} raised {type(error).__name__} {at}: {said}"
        for key in problem.holed:
            hint = f"{told.splitlines()[0]}. {ONLY_OBSERVED[0].upper()}{ONLY_OBSERVED[1:]}"
            raise DataError(not_finite(key, problem.inputs[key], "argument", hint)) from error
        raise ProgramError(f"{told}{_hint(problem, error)}") from error
    unknown = [k for k in problem.observations if k not in watch.sites]
    if unknown:
        from_data = [k for k in (*problem.inputs, problem.size_name) if k]
        wrapped = (
            "; it takes **kwargs: where it is a wrapper, functools.wraps tells which arguments it passes on"
            if hides_names(problem.program)
            else ""
        )
        raise DataError(
            f"data key {unknown[0]!r} names neither an argument nor a site of {name_of(problem.program)}; "
            f"its arguments: {', '.join(from_data + _open_arguments(problem)) or 'none'}; its sites: {', '.join(watch.sites) or 'none'}{wrapped}"
        )
    for name in problem.missing:
        if name in watch.sites and (not watch.sites[name].observed or name in (problem.completing or {})):
            continue  # what is missing is a site of its own, and the value is whole
        children = [s.name for s in watch.sites.values() if name in s.parents]
        if children:
            raise DataError(
                f"site {name!r} has missing values (NaN), and {', '.join(children)} depends on it; only sites that nothing depends on "
                "can be observed in part: drop those rows, or give the site's complete values"
            )
    leaks = watch.provenance.leaks if watch.provenance else []
    clean = [
        Leak(found, leak.operation, leak.where)
        for leak in leaks
        if (found := frozenset(only(leak.labels, "site")))
    ]
    return _Inspected(watch.sites, watch.plates, watch.uncertain, clean, tuple(parameters.tensors), bent)


def _bent(problem: Problem, sites: Mapping[str, Site]) -> tuple[str, ...]:
    latents = [s.name for s in sites.values() if not s.observed and _is_real(s.support)]
    dense = [s.name for s in sites.values() if s.weighable]
    return bent_sites(problem, latents, dense) if latents else ()


def _is_real(support: Any) -> bool:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return support in (torch.distributions.constraints.real, torch.distributions.constraints.real_vector)


def _hint(problem: Problem, error: Exception) -> str:
    """What to do about an argument that nothing filled, or numbers of another type than the program's own."""
    if problem.size_name not in (None, "n"):
        return f"; its open argument {problem.size_name!r} was given the number of rows: name it in the data"
    told = str(error)
    if "used as indices must be long" in told:
        return "; draws of Bernoulli are floating-point numbers: index by z.long()"
    default = torch.get_default_dtype()
    if "dtype" not in told and "scalar type" not in told:
        return ""
    named = (
        {f"args[{i}]": a for i, a in enumerate(problem.args)} | dict(problem.kwargs) | dict(problem.inputs)
    )
    for name, value in named.items():
        if isinstance(value, Tensor) and value.dtype not in (default, torch.bool):
            double = value.dtype is torch.float64
            other = ", or fit in double with Run(precision='float64')" if double else ""
            kind = str(value.dtype).removeprefix("torch.")
            return f"; {name!r} is {kind}: give {name}{'.float()' if default is torch.float32 else '.double()'}{other}"
    if "ouble" in told and default is torch.float32:
        return (
            "; some of the program's own numbers are float64, as numpy's are, and its draws float32: fit in double with "
            "Run(precision='float64'), or make these numbers float32"
        )
    return ""


def _open_arguments(problem: Problem) -> list[str]:
    return [
        n for n in parameters_of(problem.program)[0] if n not in problem.inputs and n != problem.size_name
    ]


def _structure(run: _Inspected, problem: Problem, data_plates: tuple[str, ...]) -> Structure:
    graph = nx.DiGraph()
    for site in run.sites.values():
        graph.add_node(site.name, observed=site.observed, plates=site.plates)
    for site in run.sites.values():
        for parent in site.parents:
            graph.add_edge(parent, site.name, certain=parent not in run.uncertain.get(site.name, ()))
    return Structure(
        sites=run.sites,
        graph=graph,
        plates=run.plates,
        data_plates=data_plates,
        leaks=tuple(dict.fromkeys(run.leaks)),
        params=run.params,
        name=name_of(problem.program),
        missing=problem.missing,
        bent=run.bent,
    )
