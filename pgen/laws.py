"""The law of a site as its program says it: the program is run up to the site, and no further.

Where nothing that differs between rows bears upon it, the law is one for all rows, and is given as that of a single one:
what `pyro.plate` repeated is taken back.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor

from pgen.errors import DataError, OptionError
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure


def law_at(problem: Problem, structure: Structure, name: str) -> Any:
    """The law of a site given the data: `[rows]` laws, or one where they are the same for all rows.

    Args:
        problem: the program with the data asked about.
        structure: of the problem.
        name: of the site.

    Raises:
        OptionError: there is no such site.
        DataError: the law depends on a latent whose value the data does not hold.
    """
    site = site_of(structure, name)
    free = [p for p in site.parents if p in structure.latents]
    if free:
        raise DataError(
            f"the law of {name!r} depends on {', '.join(map(repr, free))}, which the data does not hold; expected values: "
            f"fitted.law({name!r}, {{{free[0]!r}: value}}). With latents integrated out it is drawn by fitted.sample(n)[{name!r}]"
        )
    shared = not site.inputs and not any(map(structure.local, site.parents))
    asked = _any_rows(problem, structure) if shared else problem
    kept = {k: v for k, v in asked.observations.items() if k != name}
    own = {k: v for k, v in problem.adapters.items() if k != name}
    with validating(False), torch.no_grad():
        fn = _met(replace(asked, observations=kept, adapters=own), name)
    dims = [structure.plates[p].dim for p in site.plates if p in structure.data_plates]
    for dim in sorted(dims) if shared else ():
        one = without(fn, dim)
        if one is None:
            return fn
        fn = one
    return fn


def site_of(structure: Structure, name: str) -> Any:
    """A site with a law, by name.

    Raises:
        OptionError: there is none; the message lists those there are.
    """
    having = [s.name for s in structure if not s.factor]
    if name not in having:
        raise OptionError(
            f"law({name!r}): {structure.name} has no such site; its sites: {', '.join(map(repr, having))}"
        )
    return structure.sites[name]


def _any_rows(problem: Problem, structure: Structure) -> Problem:
    """Two rows of the problem, whichever, of which nothing is observed: two, so that what is repeated can be told."""
    shown = {k: v for k, v in problem.observations.items() if k in structure.sites and not structure.local(k)}
    some = replace(problem, observations={}, missing=frozenset())
    if some.rows:
        some = some.take(torch.arange(2) % some.rows)
    return replace(
        some,
        observations=shown,
        missing=problem.missing.intersection(shown),
        rows=2,
        size=2,
        total=2,
    )


class _Found(Exception):
    """The site was met: there is nothing more to run."""


class _Stop(Messenger):
    """End the run at a site, keeping its law."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.fn = name, None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            self.fn = msg["fn"]
            raise _Found


def _met(problem: Problem, name: str) -> Any:
    stop = _Stop(name)
    try:
        with stop:
            problem()
    except _Found:
        pass
    return stop.fn


def without(fn: Any, dim: int) -> Any | None:
    """The law without one of its batch dimensions, along which it was repeated; None where that cannot be told.

    Args:
        fn: of a batch shape.
        dim: which dimension of it, negative.

    Example:
        >>> without(dist.Normal(torch.zeros(3, 1), 1.0).expand([3, 5]), -1).batch_shape
        torch.Size([3])
        >>> without(dist.Normal(torch.zeros(5), 1.0), -1) is None
        True
    """
    at = len(fn.batch_shape) + dim
    if at < 0:
        return fn
    left = Size(s for i, s in enumerate(fn.batch_shape) if i != at)
    if isinstance(fn, torch.distributions.Independent):
        inner = without(fn.base_dist, dim - fn.reinterpreted_batch_ndims)
        return None if inner is None else inner.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        inner = without(fn.base_dist, dim)
        mask = _one(fn._mask, dim) if isinstance(fn._mask, Tensor) else fn._mask
        return None if inner is None or mask is None else inner.mask(mask)
    if isinstance(fn, dist.ExpandedDistribution):
        before = fn.base_dist.batch_shape
        return fn.base_dist.expand(left) if at < len(left) - len(before) + 1 else None
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        parts: Any = without(fn.mixture_distribution, dim), without(fn.component_distribution, dim - 1)
        return None if None in parts else type(fn)(*parts, validate_args=False)
    try:
        # pgen's own laws hold all that is their rows' in a context: without one, any batch shape will do.
        found = fn.expand(left) if getattr(fn, "context", fn) is None else _rebuilt(fn, dim)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    fits = found is not None and (found.batch_shape, found.event_shape) == (left, fn.event_shape)
    return found if fits else None


_SAME = (
    ("logits", "probs"),
    ("scale_tril", "covariance_matrix"),
    ("scale_tril", "precision_matrix"),
    ("covariance_matrix", "precision_matrix"),
)
"""Pairs of parameters of which a law takes one."""


def _rebuilt(fn: Any, dim: int) -> Any | None:
    """A law of the same class, made from parameters without a dimension; None where they differ along it."""
    accepted = [n for n in inspect.signature(type(fn)).parameters if n != "validate_args"]
    held = [n for n in accepted if n in vars(fn)] or list(fn.arg_constraints)
    for one, other in _SAME:  # what was computed on demand says nothing more
        held = [n for n in held if n != other or one not in held]
    made: dict[str, Any] = {}
    for name in held:
        value = getattr(fn, name)
        constraint = fn.arg_constraints.get(name)
        if isinstance(value, Tensor) and constraint is not None:
            value = _one(value, dim - constraint.event_dim)
            if value is None:
                return None
        made[name] = value
    return type(fn)(**made, validate_args=False)


def _one(value: Tensor, dim: int) -> Tensor | None:
    """A tensor without a dimension that it does not have, or that only repeats it; None where it has another one."""
    if value.dim() < -dim:
        return value
    return value.select(dim, 0) if value.stride(dim) == 0 or value.shape[dim] == 1 else None
