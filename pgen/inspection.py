"""Inspecting a program: one run, element by element, that touches no global state, and gives its structure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.capability import Capability, capabilities_of
from pgen.errors import DataError, PgenError, ProgramError
from pgen.handlers import StandIn, only_named
from pgen.isolation import isolated, validating
from pgen.linearity import bent_sites
from pgen.parameters import Parameters
from pgen.problem import Data, Problem, _name, _parameters_of
from pgen.provenance import Leak, Provenance
from pgen.structure import Plate, Site, Structure

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
    if problem.rows is None:
        return _structure(_inspect(problem, follow=True), problem, ()), problem
    few = 3 if problem.rows != 3 else 2
    try:
        run = _inspect(problem.take(torch.arange(few) % problem.rows), follow=True)
    except PgenError:  # perhaps only because the program cannot take fewer rows: its full run will tell
        run = None
    if run is not None:
        other = problem if problem.rows <= _LIGHT_ROWS else problem.take(torch.arange(5) % problem.rows)
        grown = _grown(run, few, _inspect(other, follow=False), other.rows)
        if grown:
            return _structure(run, problem, grown), problem
    whole = problem.whole()
    return _structure(_inspect(whole, follow=True), whole, ()), whole


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
    watch = _Watch(problem, Provenance() if follow else None)
    at: _Progress = _Progress()
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
                    with watch.provenance:
                        problem()
            if follow:
                with parameters.installed(), StandIn():
                    bent = _bent(problem, watch.sites)
    except PgenError:
        raise
    except Exception as error:
        raise ProgramError(
            f"{_name(problem.program)} raised {type(error).__name__} {at}: {error}{_hint(problem, error)}"
        ) from error
    unknown = [k for k in problem.observations if k not in watch.sites]
    if unknown:
        from_data = [k for k in (*problem.inputs, problem.size_name) if k]
        raise DataError(
            f"data key {unknown[0]!r} names neither an argument nor a site of {_name(problem.program)}; "
            f"its arguments: {', '.join(from_data + _open_arguments(problem)) or 'none'}; its sites: {', '.join(watch.sites) or 'none'}"
        )
    for name in problem.missing:
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
        if (found := frozenset(_only(leak.labels, "site")))
    ]
    return _Inspected(watch.sites, watch.plates, watch.uncertain, clean, tuple(parameters.tensors), bent)


def _bent(problem: Problem, sites: Mapping[str, Site]) -> tuple[str, ...]:
    latents = [s.name for s in sites.values() if not s.observed and _is_real(s.support)]
    dense = [s.name for s in sites.values() if s.capabilities & {Capability.LOG_PROB, Capability.LOG_DENSITY}]
    return bent_sites(problem, latents, dense) if latents else ()


def _is_real(support: Any) -> bool:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return support in (torch.distributions.constraints.real, torch.distributions.constraints.real_vector)


def _hint(problem: Problem, error: Exception) -> str:
    """What to do about an argument that nothing filled, or float64 data (NumPy's default) meeting float32 weights."""
    if problem.size_name not in (None, "n"):
        return f"; its open argument {problem.size_name!r} was given the number of rows: name it in the data"
    double = [k for k, v in problem.inputs.items() if v.dtype is torch.float64]
    if not double or "dtype" not in str(error) or torch.get_default_dtype() is torch.float64:
        return ""
    return f"; {double[0]!r} is float64: give {double[0]}.float(), or fit in double with Run(precision='float64')"


def _open_arguments(problem: Problem) -> list[str]:
    return [
        n for n in _parameters_of(problem.program)[0] if n not in problem.inputs and n != problem.size_name
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
        name=_name(problem.program),
        missing=problem.missing,
        bent=run.bent,
    )


def _is_plate(msg: Any) -> bool:
    """A plate announces itself as a sample statement."""
    return type(msg["fn"]).__name__ == "_Subsample"


class _Progress(Messenger):
    """Knows which site a run has reached."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.last = ""

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_plate(msg):
            self.current = msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if not _is_plate(msg):
            self.last, self.current = msg["name"], ""

    def __str__(self) -> str:
        if self.current:
            return f"at site {self.current!r}"
        return f"after site {self.last!r}" if self.last else "before its first site"


class _Watch(_Progress):
    """Records every site of a run, and gives each value a label of its own."""

    def __init__(self, problem: Problem, provenance: Provenance | None) -> None:
        super().__init__()
        self.problem = problem
        self.provenance = provenance
        self.sites: dict[str, Site] = {}
        self.position: dict[str, int] = {}
        self.plates: dict[str, Plate] = {}
        self.uncertain: dict[str, frozenset[str]] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if self.provenance is None or not isinstance(value, Tensor) or "$$$" in msg["name"]:
            return
        if not _only(self._labels(value), "param"):  # one that is met for the first time
            self.provenance.write(value, {f"param:{msg['name']}": True}, keep=True)

    def _pyro_post_sample(self, msg: Any) -> None:
        self._record(msg)
        super()._pyro_post_sample(msg)

    def _record(self, msg: Any) -> None:
        fn, value, name = msg["fn"], msg["value"], msg["name"]
        if name in self.sites:
            raise ProgramError(
                f"{_name(self.problem.program)} has two sites named {name!r}; give every pyro.sample statement a name of its own, "
                f"in a loop for example f'{name}_{{i}}'"
            )
        if _is_plate(msg):
            return
        for frame in msg["cond_indep_stack"]:
            if frame.dim is not None:
                subsampled = frame.full_size is not None and frame.full_size != frame.size
                self.plates[frame.name] = Plate(frame.name, frame.size, frame.dim, subsampled)
        if only_named(msg):
            return
        factor = isinstance(_base(fn), dist.Unit)
        if msg["is_observed"] and not factor:
            _check_value(name, fn, value)
        capabilities, labels = self._examine(fn, value, msg, factor)
        parents = _only(labels, "site") - {name}
        before = frozenset(
            p
            for leak in (self.provenance.leaks if self.provenance else [])
            for p in _only(leak.labels, "site")
        ) - {name}
        self.uncertain[name] = before - parents
        cardinality = _cardinality(fn) if Capability.ENUMERATE in capabilities and not factor else None
        support = _support(fn)
        order = sorted((s for s in parents | before if s in self.position), key=self.position.__getitem__)
        self.position[name] = len(self.position)
        self.sites[name] = Site(
            name=name,
            distribution="factor" if factor else type(_base(fn)).__name__,
            capabilities=capabilities if cardinality is not None else capabilities - {Capability.ENUMERATE},
            support=support,
            event_shape=torch.Size() if factor else torch.Size(fn.event_shape),
            batch_shape=torch.Size(fn.batch_shape),
            plates=tuple(f.name for f in msg["cond_indep_stack"] if f.dim is not None),
            parents=tuple(order),
            observed=bool(msg["is_observed"]) or factor,
            enumerable=cardinality is not None,
            params=tuple(sorted(_only(labels, "param"))),
            inputs=tuple(sorted(_only(labels, "input"))),
            support_parents=tuple(sorted(_only(self._labels(_tensors_of(support)), "site"))),
            support_params=tuple(sorted(_only(self._labels(_tensors_of(support)), "param"))),
            cardinality=cardinality,
            factor=factor,
            certain=not self.uncertain[name],
            dtype=value.dtype if isinstance(value, Tensor) else torch.get_default_dtype(),
        )
        if self.provenance is not None and isinstance(value, Tensor) and not factor:
            if msg["is_observed"]:
                # Later uses of the very data that was observed here depend on this site.
                self.provenance.write(value, {f"site:{name}": True}, keep=True)
            msg["value"] = value.clone()
            self.provenance.mark(msg["value"], f"site:{name}")

    def _labels(self, *tensors: Any) -> frozenset[str]:
        return self.provenance.labels(*tensors) if self.provenance is not None else frozenset()

    def _examine(
        self, fn: Any, value: Any, msg: Any, factor: bool
    ) -> tuple[frozenset[Capability], frozenset[str]]:
        """What the law can do, and what it was computed from: by its density, by a draw where it has none."""
        capabilities = capabilities_of(fn)
        labels = self._labels(msg["mask"], msg["scale"])
        if factor:
            return frozenset({Capability.LOG_DENSITY}), labels | self._labels(fn.log_prob(value))
        density = density_of(fn, capabilities)
        if density is not None:
            try:
                labels |= self._labels(density(value))
            except NotImplementedError:
                capabilities, density = capabilities - {Capability.LOG_PROB, Capability.LOG_DENSITY}, None
            except RuntimeError as error:
                if not msg["is_observed"] or value.is_floating_point():
                    raise
                raise DataError(
                    f"site {msg['name']!r}: {type(_base(fn)).__name__} cannot take the observed values, which are {value.dtype} "
                    f"({error}); give them as floating-point numbers: data.float()"
                ) from error
        if msg["is_observed"]:
            labels -= {f"site:{msg['name']}"} | {
                f"input:{k}" for k in self.problem.inputs
            } - self._input_labels(fn)
            if density is None and Capability.SAMPLE in capabilities:
                labels |= self._labels(fn.sample())
        else:
            labels |= self._labels(value)
        return capabilities, labels

    def _input_labels(self, fn: Any) -> frozenset[str]:
        """Inputs that the law itself was computed from, as opposed to the observed value."""
        found = self._labels(_tensors_of(fn))
        return frozenset(label for label in found if label.startswith("input:"))


def density_of(fn: Any, capabilities: frozenset[Capability]) -> Callable[[Tensor], Tensor] | None:
    """The log density of a distribution, normalised or not; None where it has neither."""
    if Capability.LOG_PROB in capabilities:
        return fn.log_prob
    if Capability.LOG_DENSITY in capabilities:
        return getattr(fn, "log_density", fn.log_prob)
    return None


def _only(labels: Any, kind: str) -> frozenset[str]:
    return frozenset(label.partition(":")[2] for label in labels if label.startswith(f"{kind}:"))


def _base(fn: Any) -> Any:
    while isinstance(
        fn, (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)
    ):
        fn = fn.base_dist
    return fn


def _support(fn: Any) -> Any:
    try:
        return fn.support
    except NotImplementedError:
        return torch.distributions.constraints.real


def _tensors_of(thing: Any, depth: int = 0) -> list[Tensor]:
    """Tensors held by a distribution or constraint, through its wrappers."""
    if isinstance(thing, Tensor):
        return [thing]
    if depth > 5:
        return []
    if isinstance(thing, (list, tuple)):
        return [t for part in thing for t in _tensors_of(part, depth + 1)]
    if isinstance(
        thing,
        (
            torch.distributions.Distribution,
            torch.distributions.constraints.Constraint,
            torch.distributions.Transform,
        ),
    ):
        return [t for part in vars(thing).values() for t in _tensors_of(part, depth + 1)]
    return []


def _cardinality(fn: Any) -> int | None:
    try:
        return int(fn.enumerate_support(expand=False).shape[0])
    except (NotImplementedError, ValueError, RuntimeError):
        return None


def _check_value(name: str, fn: Any, value: Tensor) -> None:
    expected = torch.Size(fn.batch_shape) + torch.Size(fn.event_shape)
    try:
        # torch's own would import its compiler's symbolic algebra, which takes a second.
        fits = np.broadcast_shapes(value.shape, expected) == tuple(expected)
    except ValueError:
        fits = False
    event = len(fn.event_shape)
    if not fits or (event and value.shape[-event:] != expected[-event:]):
        raise DataError(
            f"site {name!r}: the observed value has shape {tuple(value.shape)}, but {type(_base(fn)).__name__} there has shape "
            f"{tuple(expected)} (batch {tuple(fn.batch_shape)} + event {tuple(fn.event_shape)}); put the statement inside "
            "pyro.plate('data', n) with n the number of rows, or reshape the data"
        )
    if vars(_base(fn)).get("_validate_args") is False:  # the program says that it knows better
        return
    support = _support(fn)
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    try:
        inside = support.check(value)
    except (NotImplementedError, AttributeError):
        return
    if not bool(inside.all()):
        bad = tuple((~inside).nonzero()[0].tolist())
        raise DataError(
            f"site {name!r}: observed value {value[bad].tolist()} at index {bad} lies outside the support "
            f"{support} of {type(_base(fn)).__name__}; give values inside it, or change the distribution at that site"
        )
