"""Reading the sites of a program off one run: laws, values, plates, and what each was computed from."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any, Self

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.calling import name_of
from pgen.capability import Capability, capabilities_of
from pgen.conversion import Converted
from pgen.errors import DataError, ProgramError
from pgen.handlers import only_named
from pgen.problem import Problem
from pgen.provenance import Provenance
from pgen.structure import Plate, Site
from pgen.tensors import ONLY_OBSERVED, not_finite


def is_plate(msg: Any) -> bool:
    """A plate announces itself as a sample statement."""
    return type(msg["fn"]).__name__ == "_Subsample"


class Progress(Messenger):
    """Knows which site a run has reached."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.last = ""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_plate(msg):
            self.current = msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_plate(msg):
            self.last, self.current = msg["name"], ""

    def __str__(self) -> str:
        if self.current:
            return f"at site {self.current!r}"
        return f"after site {self.last!r}" if self.last else "before its first site"


class Watch(Progress):
    """Records every site of a run, and gives each value a label of its own."""

    def __init__(self, problem: Problem, provenance: Provenance | None) -> None:
        super().__init__()
        self.problem = problem
        self.provenance = provenance
        self.sites: dict[str, Site] = {}
        self.position: dict[str, int] = {}
        self.plates: dict[str, Plate] = {}
        self.uncertain: dict[str, frozenset[str]] = {}
        self.chosen: set[str] = set()  # plates whose copies the program names
        self.dice: Any = None  # after the latest site

    def __enter__(self) -> Self:
        self.dice = _dice()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        # An index that the program drew itself, just before, is as random as one that Pyro draws.
        if is_plate(msg) and msg["value"] is not None and _dice() == self.dice:
            self.chosen.add(msg["name"])
        super()._pyro_sample(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        if self.provenance is None or not isinstance(value, Tensor) or "$$$" in msg["name"]:
            return
        if not only(self._labels(value), "param"):  # one that is met for the first time
            self.provenance.write(value, {f"param:{msg['name']}": True}, keep=True)

    def _pyro_post_sample(self, msg: Any) -> None:
        self._record(msg)
        super()._pyro_post_sample(msg)
        self.dice = _dice()

    def _record(self, msg: Any) -> None:
        fn, value, name = msg["fn"], msg["value"], msg["name"]
        if name in self.sites:
            raise ProgramError(
                f"{name_of(self.problem.program)} has two sites named {name!r}; give every pyro.sample statement a name of its own, "
                f"in a loop for example f'{name}_{{i}}'"
            )
        if is_plate(msg):
            return
        for frame in msg["cond_indep_stack"]:
            if frame.dim is not None:
                subsampled = frame.full_size is not None and frame.full_size != frame.size
                chosen = subsampled and frame.name in self.chosen
                self.plates[frame.name] = Plate(frame.name, frame.size, frame.dim, subsampled, chosen)
        if only_named(msg):
            return
        factor = isinstance(_base(fn), dist.Unit)
        self._refuse_holes(name, fn, value)
        if msg["is_observed"] and not factor:
            if only(
                self._labels(_tensors_of(_support(fn))), "site"
            ):  # another one at other values of the latents
                _stop_checking(fn)
            _check_value(name, fn, value)
            _check_repeats(name, fn, value, {f.dim for f in msg["cond_indep_stack"]})
        capabilities, labels = self._examine(fn, value, msg, factor)
        parents = only(labels, "site") - {name}
        before = frozenset(
            p
            for leak in (self.provenance.leaks if self.provenance else [])
            for p in only(leak.labels, "site")
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
            completes=callable(getattr(_base(fn), "given", None)),
            params=tuple(sorted(only(labels, "param"))),
            inputs=tuple(sorted(only(labels, "input"))),
            support_parents=tuple(sorted(only(self._labels(_tensors_of(support)), "site"))),
            support_params=tuple(sorted(only(self._labels(_tensors_of(support)), "param"))),
            cardinality=cardinality,
            factor=factor,
            certain=not self.uncertain[name],
            dtype=value.dtype if isinstance(value, Tensor) else torch.get_default_dtype(),
            improper=isinstance(_base(fn), dist.ImproperUniform),
        )
        if self.provenance is not None and isinstance(value, Tensor) and not factor:
            if msg["is_observed"]:
                # Later uses of the very data that was observed here depend on this site.
                self.provenance.write(value, {f"site:{name}": True}, keep=True)
            msg["value"] = value.clone()
            self.provenance.mark(msg["value"], f"site:{name}")

    def _refuse_holes(self, name: str, fn: Any, value: Any) -> None:
        """Raise if a law, or what is observed of it, was computed from what is missing in an argument."""
        for key in only(self._labels(value, _tensors_of(fn)), "nan"):
            told = f"site {name!r} is computed from them: {ONLY_OBSERVED}"
            raise DataError(not_finite(key, self.problem.inputs[key], "argument", told))

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
        while isinstance(
            fn, Converted
        ):  # what conversions compute depends on nothing else, and may take long
            fn = fn.base
        density = density_of(fn, capabilities_of(fn))
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
            if density is None and Capability.SAMPLE in capabilities_of(fn):
                labels |= self._labels(fn.sample())
        else:
            labels |= self._labels(value)
        if Capability.DENOISER in capabilities:
            labels |= self._labels(_base(fn).denoise(value, 1.0)) - {f"site:{msg['name']}"}
        return capabilities, labels

    def _input_labels(self, fn: Any) -> frozenset[str]:
        """Inputs that the law itself was computed from, as opposed to the observed value."""
        found = self._labels(_tensors_of(fn))
        return frozenset(label for label in found if label.startswith("input:"))


def _dice() -> Any:
    """The state of all random generators of the process."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), rest


def _stop_checking(fn: Any) -> None:
    """Let a law, and those that it is made of, take any value."""
    while isinstance(fn, torch.distributions.Distribution):
        fn._validate_args = False
        fn = getattr(fn, "base_dist", None)


def density_of(fn: Any, capabilities: frozenset[Capability]) -> Callable[[Tensor], Tensor] | None:
    """The log density of a distribution, normalised or not; None where it has neither."""
    if Capability.LOG_PROB in capabilities:
        return fn.log_prob
    if Capability.LOG_DENSITY not in capabilities:
        return None
    if isinstance(fn, torch.distributions.Independent):
        inner, dims = density_of(fn.base_dist, capabilities), fn.reinterpreted_batch_ndims
        return inner if inner is None or not dims else lambda value: inner(value).sum(list(range(-dims, 0)))
    if isinstance(fn, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        return density_of(fn.base_dist, capabilities)
    return getattr(fn, "log_density", None) or fn.log_prob


def only(labels: Any, kind: str) -> frozenset[str]:
    """The names of one kind among labels `kind:name`."""
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


def _check_repeats(name: str, fn: Any, value: Tensor, plates: Collection[int | None]) -> None:
    """Raise where data in a plate would count several times, along a dimension that no plate has made.

    A column `[n, 1]` beside a vector `[n]` gives a law of shape `[n, n]`: each row with the inputs of every other.
    """
    event, batch = len(fn.event_shape), tuple(fn.batch_shape)
    held = tuple(value.shape[: value.ndim - event])
    if not held or not any(dim is not None for dim in plates):
        return
    for dim in range(-len(batch), -len(held)):
        if batch[dim] > 1 and dim not in plates:
            raise DataError(
                f"site {name!r}: the law there has batch shape {batch}, and the observed value {tuple(value.shape)} would count "
                f"{batch[dim]} times, as no plate is at dimension {dim}; an argument may be a column too many: x[:, 0], or "
                "x.squeeze(-1)"
            )


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
    if event and value.is_floating_point():
        gone = value.isnan().flatten(-event)
        partly = (gone.any(-1) & ~gone.all(-1)).nonzero()
        if len(partly):
            law, seen = _base(fn), ""
            while isinstance(law, Converted):
                law = _base(law.base)
            if Capability.DENOISER in capabilities_of(law):
                seen = (
                    f"; or leave {name!r} latent and say what was seen of it, pyro.sample('seen', dist.Normal("
                    f"{name}[..., there], 0.05).to_event(1)), which a posterior then fills in"
                )
            if Capability.LOG_DENSITY in capabilities_of(law):
                seen = (
                    "; or ask a fit for what is missing: fitted.posterior({"
                    + repr(name)
                    + ": ...}) draws it given the rest, whose law is "
                    f"fitted.law({name!r}).given(value)"
                )
            raise DataError(
                f"site {name!r}: {len(partly)} of its observed events are missing in part (NaN), the first at index "
                f"{tuple(partly[0].tolist())}; the elements of {type(law).__name__} depend on each other, so that only all "
                f"of an event can be missing: make it NaN altogether, or leave these rows out{seen}"
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
