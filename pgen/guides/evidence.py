"""What a guide sees of a problem: values of the observed sites and of the arguments, and the plates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pgen.capability import Capability
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.structure import Site, Structure

_STATISTICS_ROWS = 2048  # rows that means and standard deviations are taken from
_PRIOR_ROWS = 64
_PRIOR_RUNS = 16
_LAW_DRAWS = 64  # from the law of a latent in each of them
_LAW_NUMBERS = 200_000  # at most in those

INPUT = "input:"
"""Prefix of the names of arguments among the observed values."""


class Slot(NamedTuple):
    """A plate as a guide opens it: size, dimension, and the indices where the program takes a subsample."""

    size: int
    dim: int
    index: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of elements along the dimension."""
        return self.size if self.index is None else len(self.index)


class Seen(NamedTuple):
    """What a guide is called with: `guide(*reader(problem))`."""

    observed: Mapping[str, Tensor]
    plates: Mapping[str, Slot]


class Reader:
    """Reads observed values and plates off a problem, without running its program where that can be avoided.

    A site observed through the data needs no run; neither does one observed by `obs=` whose value is an
    argument, or a reshaped one. Where values are computed by the program, where it draws a subsample of its
    own, or where shapes differ from those met at construction, the program is run once (without gradients)
    and read.

    Call it inside `parameters.installed()`, as for any run of the program.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0, 1))
        ...         pyro.sample("x", dist.Normal(z, 1), obs=x)
        >>> from pgen.inspection import structure_of
        >>> problem = Problem.of(model, torch.zeros(5))
        >>> seen = Reader(problem, structure_of(problem))(problem.take(torch.arange(2)))
        >>> seen.observed["x"].shape, seen.plates["rows"]
        (torch.Size([2]), Slot(size=2, dim=-1, index=None))
    """

    def __init__(self, problem: Problem, structure: Structure) -> None:
        """Run the program once on a few rows, to learn where its observed values come from."""
        self._structure = structure
        few = rows_of(problem, 3)
        with torch.random.fork_rng(), Parameters.of(few).installed():
            trace = _trace(few)
        self._shapes = _row_shapes(few)
        self._sources: dict[str, tuple[str, torch.Size] | None] = {}
        for name in structure.observed:
            value = trace.nodes[name]["value"]
            same = (key for key, held in few.inputs.items() if _same_memory(value, held))
            key = next(same, None)
            self._sources[name] = None if key is None else (key, value.shape[1:])
        self._subsampled = any(plate.subsampled for plate in structure.plates.values())
        aliases = {source[0] for source in self._sources.values() if source is not None}
        self.inputs = tuple(k for k in problem.inputs if k not in aliases)
        """Names of the arguments that are not themselves the values of an observed site."""

    def __call__(self, problem: Problem) -> Seen:
        """The observed values (arguments under the name `input:NAME`) and the plates of a problem."""
        held = problem.take(torch.arange(problem.rows or 0)) if problem.source is not None else problem
        observed = self._without_a_run(held)
        if observed is not None:
            plates = {
                name: Slot(
                    held.rows if name in self._structure.data_plates and held.rows else plate.size, plate.dim
                )
                for name, plate in self._structure.plates.items()
            }
        else:
            with torch.no_grad():
                trace = _trace(held)
            observed = {
                name: trace.nodes[name]["value"] for name in self._structure.observed if name in trace.nodes
            }
            observed.update({k: v for k, v in held.observations.items() if k in observed})
            plates = _plates_of(trace)
        return Seen(
            {**observed, **{INPUT + k: held.inputs[k] for k in self.inputs if k in held.inputs}}, plates
        )

    def _without_a_run(self, problem: Problem) -> dict[str, Tensor] | None:
        if self._subsampled or _row_shapes(problem) != self._shapes:
            return None
        found: dict[str, Tensor] = {}
        for name, source in self._sources.items():
            if name in problem.observations:
                found[name] = problem.observations[name]
            elif source is not None and source[0] in problem.inputs:
                value = problem.inputs[source[0]]
                found[name] = value.reshape(value.shape[:1] + source[1])
            else:
                return None
        return found


@dataclass(frozen=True)
class Probe:
    """What a guide is shaped and scaled by: data, draws from the prior, and plates that are not exchangeable.

    Attributes:
        seen: observed values and plates of up to 2,048 rows.
        draws: for each latent, values [runs, *batch, *event] of runs of the program as it starts out.
        laws: for each continuous latent, more values [n, *batch, *event], from its laws in those runs.
        positional: plates whose elements have laws of their own (pixels, time steps), so that position
            matters.
    """

    seen: Seen
    draws: Mapping[str, Tensor]
    laws: Mapping[str, Tensor]
    positional: frozenset[str]

    @staticmethod
    def of(problem: Problem, structure: Structure, reader: Reader, *, whole: bool = False) -> Probe:
        """Run a program some times, leaving the global state of torch and Pyro as it was.

        `whole` takes all rows, for guides with parameters of their own for each.
        """
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            some = problem if whole else rows_of(problem, _STATISTICS_ROWS)
            with Parameters.of(some).installed():
                seen = reader(some)
                few = rows_of(problem, _PRIOR_ROWS)
                traces = [_trace(few) for _ in range(_PRIOR_RUNS)]
            draws = {
                name: torch.stack([t.nodes[name]["value"] for t in traces]) for name in structure.latents
            }
            laws = {
                name: torch.cat([_from_law(t.nodes[name], structure.sites[name]) for t in traces])
                for name in structure.latents
                if not structure.sites[name].discrete
            }
            return Probe(seen, draws, laws, positional_plates(rows_of(problem, 3), structure))


def _from_law(node: Any, site: Site) -> Tensor:
    """Draws [n, *batch, *event] from the law of a site in one run; of a law that draws no more, or dearly, the value."""
    value = node["value"]
    if not site.capabilities & {Capability.SAMPLE, Capability.RSAMPLE}:
        return value.unsqueeze(0)
    count = max(1, min(_LAW_DRAWS, _LAW_NUMBERS // max(1, value.numel())))
    try:
        drawn = node["fn"].sample(torch.Size((count,)))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return value.unsqueeze(0)
    return drawn if drawn.shape[1:] == value.shape else value.unsqueeze(0)


def positional_plates(problem: Problem, structure: Structure) -> frozenset[str]:
    """The plates, other than those of the rows, whose elements follow different laws: order carries meaning.

    The program is run with every value made equal along each plate and its learned tensors shaken: a law that
    still differs along a plate was written so, with a constant or a parameter for each element. Sites
    computed from
    arguments are left out: an argument may differ from element to element and be no more than data.
    """
    plates = [
        p
        for p in structure.plates.values()
        if p.name not in structure.data_plates and not p.subsampled and p.size > 1
    ]
    if not plates:
        return frozenset()
    parameters = Parameters.of(problem)
    with torch.no_grad():
        for tensor in parameters.tensors.values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
        with parameters.installed(), _Level(structure, {p.name: p.dim for p in plates}) as run:
            problem()
    return frozenset(p.name for p in plates if p.name in run.uneven)


class _Level(poutine.messenger.Messenger):
    """Makes the value at each site equal along the named plates; notes along which of them its law is not."""

    def __init__(self, structure: Structure, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.structure = structure
        self.dims = dims
        self.uneven: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        site = self.structure.sites.get(msg["name"])
        if site is None or site.factor or not isinstance(msg["value"], Tensor):
            return
        within = [self.dims[plate] for plate in site.plates if plate in self.dims]
        value = msg["value"]
        for dim in within:
            value = _first(value, dim - len(site.event_shape))
        msg["value"] = value
        if site.inputs or not within:
            return
        try:
            density = msg["fn"].log_prob(value)
        except NotImplementedError:
            return
        for dim in within:
            if bool((density - _first(density, dim)).abs().max() > 1e-4 * (1 + density.abs().max())):
                self.uneven.update(p for p in site.plates if self.dims.get(p) == dim)


def _first(value: Tensor, dim: int) -> Tensor:
    """A value with the first slice along a dimension (from the right) in place of all."""
    return value if value.ndim < -dim else value.narrow(dim, 0, 1).expand_as(value)


def rows_of(problem: Problem, most: int) -> Problem:
    """The problem on at most so many of its rows, evenly spaced."""
    if problem.rows is None or (problem.rows <= most and problem.source is None):
        return problem
    return problem.take(torch.arange(min(problem.rows, most)) * problem.rows // min(problem.rows, most))


def _trace(problem: Problem) -> Any:
    """A trace of a run that the handlers around it (a trace, a plate of particles) do not see."""
    with poutine.block():
        return poutine.trace(problem).get_trace()


def _plates_of(trace: Any) -> dict[str, Slot]:
    """The plates that are open at some site of a trace."""
    found: dict[str, Slot] = {}
    for node in trace.nodes.values():
        for frame in node.get("cond_indep_stack", ()) if node["type"] == "sample" else ():
            if frame.dim is not None and frame.name not in found:
                index = trace.nodes[frame.name]["value"] if frame.full_size != frame.size else None
                found[frame.name] = Slot(frame.full_size or frame.size, frame.dim, index)
    return found


def _row_shapes(problem: Problem) -> dict[str, torch.Size]:
    """Shape of one row of everything that the problem holds (the whole shape where there are no rows)."""
    skip = 0 if problem.rows is None else 1
    return {k: v.shape[skip:] for k, v in {**problem.inputs, **problem.observations}.items()}


def _same_memory(value: Any, held: Tensor) -> bool:
    """Whether a value is an argument itself, or another shape of it with rows in front."""
    return (
        isinstance(value, Tensor)
        and value.ndim > 0
        and held.ndim > 0
        and value.data_ptr() == held.data_ptr()
        and value.dtype == held.dtype
        and value.numel() == held.numel()
        and value.shape[0] == held.shape[0]
        and value.is_contiguous()
        and held.is_contiguous()
    )
