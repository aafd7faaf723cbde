"""Worlds that a program makes up: latents and the data they gave, drawn together, so that the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pgen.capability import Capability
from pgen.errors import DataError, OptionError, ProgramError
from pgen.fitted import Learned
from pgen.handlers import Substitute
from pgen.inspection import inspect_problem
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Data, Problem
from pgen.run import Run
from pgen.sampling import particles, split, spread, vectorizes
from pgen.structure import Structure

#: a function of draws by site, `[n, ...]` each, and of the data by observed site, that gives `[n, ...]`
Quantity = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

LIKELIHOOD, JOINT = "log likelihood", "log joint"
_VALUES = 2**21  # numbers held at once by runs side by side


@dataclass(frozen=True)
class Worlds:
    """Draws of a whole program: R data sets of the shape of a given one, and the latents behind each.

    Attributes:
        problem: the program, what it learned fixed, on the given data.
        structure: its structure.
        latents: true values by site, `[R, ...]`.
        observed: data by site, `[R, ...]`; NaN where the given data has NaN.
        carried: the argument in which a site's data comes, where it does.
        parallel: whether the program runs side by side.
    """

    problem: Problem
    structure: Structure
    latents: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]
    carried: Mapping[str, str]
    parallel: bool

    @staticmethod
    def drawn(problem: Problem, structure: Structure, count: int) -> Worlds:
        """Run the program forward so many times, on the inputs and in the shape of its data.

        Raises:
            ProgramError: it cannot be drawn from, or it holds factors.
            DataError: nothing is observed, or what is observed cannot be replaced.
        """
        _require_drawable(structure)
        with torch.no_grad(), validating(False):
            parallel = vectorizes(problem, structure)
            values = _forward(problem, structure, count, parallel)
            given = poutine.trace(problem).get_trace().nodes
        latents = {s: values[s] for s in structure.latents}
        observed = {s: _hidden(values[s], problem, s) for s in structure.observed}
        carried = {s: key for s in observed if (key := _argument(problem, given[s]["value"])) is not None}
        worlds = Worlds(problem, structure, latents, observed, carried, parallel)
        worlds._require_observed()
        return worlds

    @property
    def count(self) -> int:
        """How many there are, R."""
        return next(iter(self.observed.values())).shape[0]

    def data(self, index: int) -> dict[str, Tensor]:
        """One data set as `pgen.fit` takes it."""
        problem = self.at(index)
        return {**problem.inputs, **problem.observations}

    def at(self, index: int) -> Problem:
        """The program on one data set."""
        inputs = dict(self.problem.inputs)
        seen: dict[str, Tensor] = {}
        for site, values in self.observed.items():
            key = self.carried.get(site)
            if key is None:
                seen[site] = values[index]
            else:
                inputs[key] = values[index].reshape(inputs[key].shape)
        return replace(self.problem, inputs=inputs, observations=seen)

    def log_terms(self, index: int, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log likelihood and log joint density of n values of the latents with one data set, `[n]` each.

        Modrák et al. (2023): without a quantity that looks at the data, a posterior that ignores it is not found out.
        """
        sites = {*self.structure.latents, *self.structure.observed}
        if any(Capability.LOG_PROB not in self.structure.sites[s].capabilities for s in sites):
            return {}
        n = len(next(iter(latents.values())))
        seen = {s: v[index].expand(n, *v.shape[1:]) for s, v in self.observed.items()}
        elements = sum(v[0].numel() for v in (*latents.values(), *seen.values()))
        chunk = max(1, _VALUES // max(1, elements)) if self.parallel else 1
        parts = []
        with torch.no_grad(), validating(False):
            for rows in torch.arange(n).split(chunk):
                some = ({s: v[rows] for s, v in group.items()} for group in (latents, seen))
                parts.append(self._log_terms(*some))
        likelihood, prior = (torch.cat(terms) for terms in zip(*parts, strict=True))
        least = -torch.inf  # values outside the support have a density that is not a number
        return {
            LIKELIHOOD: likelihood.nan_to_num(least, neginf=least),
            JOINT: (likelihood + prior).nan_to_num(least, neginf=least),
        }

    def _log_terms(self, latents: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        structure, count = self.structure, len(next(iter(latents.values())))
        if self.parallel:
            latents, seen = ({s: spread(v, structure, s) for s, v in g.items()} for g in (latents, seen))
            problem = replace(self.problem, observations=seen)
            trace = poutine.trace(Substitute(latents)(particles(problem, structure, count))).get_trace()
        else:
            latents, seen = ({s: v[0] for s, v in group.items()} for group in (latents, seen))
            problem = replace(self.problem, observations=seen)
            trace = poutine.trace(Substitute(latents)(problem)).get_trace()
        trace.compute_log_prob(lambda name, node: name in structure.sites)

        def total(sites: Sequence[str]) -> Tensor:
            terms = (trace.nodes[s]["log_prob"] for s in sites)
            summed = (t.reshape(count, -1).sum(1) if self.parallel else t.sum()[None] for t in terms)
            return sum(summed, torch.zeros(count, dtype=torch.float64, device=self.problem.device))

        return total(structure.observed), total(structure.latents)

    def _require_observed(self) -> None:
        """Give the program its first data set as `pgen.fit` does, and see that it observes it."""
        with torch.no_grad(), validating(False):
            nodes = poutine.trace(self.problem.with_data(self.data(0))).get_trace().nodes
        for site, values in self.observed.items():
            mine = values[0]
            if not bool(((nodes[site]["value"] == mine) | mine.isnan()).all()):
                raise DataError(
                    f"site {site!r} of {self.structure.name} observes something computed from an argument, so that data "
                    f"simulated there cannot be given back; write it without obs= and give {{{site!r}: ...}} as data"
                )


def template(
    program: Callable[..., Any],
    data: Data,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    rows: int | None,
    observed: Sequence[str],
    run: Run,
) -> tuple[Problem, Structure]:
    """The program on data that shows which sites are observed and in what shape, learned tensors fixed.

    Raises:
        OptionError: `rows` or `observed` that the program does not have.
    """
    problem = Problem.of(program, data, args, kwargs)
    problem = problem.to(run.device, torch.float64 if run.precision == "float64" else None)
    if problem.source is not None:
        problem = problem.take(torch.arange(problem.rows or 0))
    if rows is not None or observed:
        forward = problem.forward(rows)
        with torch.no_grad():
            nodes = poutine.trace(forward).get_trace().nodes
        known = [name for name, node in nodes.items() if node["type"] == "sample"]
        for site in observed:
            if site not in known:
                raise OptionError(f"observed names {site!r}, which is no site; there are {', '.join(known)}")
        seen = [*problem.observations, *observed]
        values = {s: nodes[s]["value"] for s in seen}
        values |= {s: v for s, v in problem.observations.items() if rows is None}
        problem = problem.with_data({**forward.inputs, **values})
    structure, problem = inspect_problem(problem)
    if structure.params:
        fixed = Learned(program, Parameters.of(problem).frozen())
        structure, problem = inspect_problem(replace(problem, program=fixed))
    return problem, structure


def coordinates(values: Mapping[str, Tensor], most: int) -> Iterator[tuple[str, str, Tensor]]:
    """Name, site and flat index of the scalars that values `[n, ...]` hold; of many, evenly spread ones."""
    for site, value in values.items():
        shape = value.shape[1:]
        size = shape.numel()
        index = torch.arange(size) if size <= most else torch.linspace(0, size - 1, most).round().long()
        for i in index:
            where = [int(k) for k in torch.unravel_index(i, shape)] if shape else []
            yield (f"{site}[{','.join(map(str, where))}]" if shape else site), site, i


def _require_drawable(structure: Structure) -> None:
    if structure.factors:
        raise ProgramError(
            f"{structure.name} has the factor {structure.factors[0]!r}: run forward, the program does not draw from the "
            "joint law that its posterior belongs to, so that no truth is known; leave the factor out, or write it as an "
            "observed site"
        )
    for site in structure:
        if not site.capabilities & {Capability.SAMPLE, Capability.RSAMPLE}:
            raise ProgramError(
                f"site {site.name!r} ({site.distribution}) of {structure.name} cannot be drawn, so that no truth is known; "
                "give it a law that can"
            )
    if not structure.observed or not structure.latents:
        missing = "data" if not structure.observed else "latents"
        raise DataError(
            f"{structure.name} has no {missing} here: calibration is about latents given data; give data={{site: ...}} for "
            "some sites and not for all (only shapes count), or n=rows with observed=[site]"
        )


def _forward(problem: Problem, structure: Structure, count: int, parallel: bool) -> dict[str, Tensor]:
    forward = problem.forward()
    sites = (*structure.latents, *structure.observed)
    runs: list[dict[str, Tensor]] = []
    if not parallel:
        for _ in range(count):
            nodes = poutine.trace(forward).get_trace().nodes
            runs.append({s: torch.as_tensor(nodes[s]["value"]).unsqueeze(0) for s in sites})
    done, some = len(runs), 1
    while done < count:  # a first run tells how many go side by side
        nodes = poutine.trace(particles(forward, structure, some)).get_trace().nodes
        values = {s: split(nodes[s]["value"], structure, s) for s in sites}
        runs.append({s: v.expand(some, *v.shape[1:]) for s, v in values.items()})
        done += some
        each = sum(v[0].numel() for v in values.values())
        some = min(count - done, max(1, _VALUES // each))
    return {s: torch.cat([r[s] for r in runs]) for s in sites}


def _hidden(values: Tensor, problem: Problem, site: str) -> Tensor:
    """Simulated data, missing where the given data is."""
    if site not in problem.missing:
        return values
    return values.masked_fill(problem.observations[site].isnan().expand(values.shape[1:]), torch.nan)


def _argument(problem: Problem, value: Any) -> str | None:
    """The argument that holds what was observed."""
    return next(
        (k for k, v in problem.inputs.items() if v.shape == value.shape and torch.equal(v, value)), None
    )
