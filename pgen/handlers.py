"""Pyro effect handlers: observing by name, scaling the rows, adding particles, adapting a site's distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.capability import Capability, capabilities_of


def only_named(msg: Any) -> bool:
    """Whether a site only names a value: `pyro.deterministic`, and what a reparameterisation leaves in a site's place."""
    fn = msg["fn"]
    left = (
        isinstance(fn, dist.MaskedDistribution) and fn._mask is False and isinstance(fn.base_dist, dist.Delta)
    )
    return bool((msg["infer"] or {}).get("_deterministic")) or (msg["is_observed"] and left)


class Observe(Messenger):
    """Observe values at sites by name; those named in `missing` hold NaN, which is integrated out element by element.

    `fallback` holds values that are used only where the program leaves the site of that name unobserved. With `completing`,
    a value that is missing in part at a law that knows its own conditionals (`given`) leaves another site in its place: what
    is missing, given the rest; observed at the value that `completing` has for it, a latent where it has none.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        missing: Collection[str] = (),
        fallback: Mapping[str, Tensor] | None = None,
        completing: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep the values."""
        super().__init__()
        self.completing = completing
        self._parts: dict[str, tuple[Tensor, int]] = {}
        self.values = values
        self.missing = missing
        self.fallback = fallback or {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if type(msg["fn"]).__name__ == "_Subsample":
            return
        if name in self.values:
            value = self.values[name]
        elif name in self.fallback and not msg["is_observed"]:
            value = self.fallback[name]
        else:
            return
        event_dim = len(msg["fn"].event_shape)
        if self.completing is not None and name in self.missing and missing_in_part(value, event_dim):
            given, rest = getattr(msg["fn"], "given", None), self.completing.get(name)
            if given is not None:
                self._parts[name] = (value, event_dim)
                msg["fn"], msg["value"], msg["is_observed"] = given(value), rest, rest is not None
                return
        if name in self.missing:
            msg["fn"], value = without_missing(name, msg["fn"], value)
        msg["value"] = value
        msg["is_observed"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if (
            msg["name"] in self._parts
        ):  # recorded already as what it is, the rest: the program goes on with the whole
            value, event_dim = self._parts[msg["name"]]
            msg["value"] = whole(value, msg["value"], event_dim)


def whole(value: Tensor, rest: Tensor, event_dim: int) -> Tensor:
    """A value whose missing numbers are filled in, the same in all rows.

    Args:
        value: `[*batch, *event]`, with NaN.
        rest: what is missing, `[..., *batch, missing]`.
        event_dim: number of dimensions of an event.

    >>> whole(torch.tensor([[1.0, torch.nan, 3.0]]), torch.tensor([[2.0]]), 1)
    tensor([[1., 2., 3.]])
    """
    flat = value.flatten(value.ndim - event_dim)
    gone = flat.reshape(-1, flat.shape[-1])[0].isnan().nonzero()[:, 0]
    lead = torch.broadcast_shapes(flat.shape[:-1], rest.shape[:-1])
    filled = flat.expand(*lead, flat.shape[-1]).index_copy(-1, gone, rest.to(value).expand(*lead, len(gone)))
    return filled.reshape(*lead, *value.shape[value.ndim - event_dim :])


def missing_in_part(value: Tensor, event_dim: int) -> bool:
    """Whether an event has NaN beside numbers."""
    if not event_dim or not value.is_floating_point():
        return False
    gone = value.isnan().flatten(-event_dim)
    return bool((gone.any(-1) & ~gone.all(-1)).any())


_GAUSSIAN = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)


def without_missing(name: str, fn: Any, value: Tensor) -> tuple[Any, Tensor]:
    """The law of what is there, and the value with what is missing filled in, which counts for nothing.

    Exact: what is not observed integrates to one. Where elements depend on each other, as in a multivariate normal,
    events may be missing as a whole; those of Gaussian laws in part too.

        N(x; mu, S) with some elements missing is N(x'; mu', S') with x' = mu' = 0 at these, S' = 1 / 2pi on the
        diagonal and 0 beside it.

    An event of another law that is missing in part keeps its NaN, which no support holds.
    """
    base, dims = (
        (fn.base_dist, fn.reinterpreted_batch_ndims)
        if isinstance(fn, torch.distributions.Independent)
        else (fn, 0)
    )
    present = ~torch.isnan(value)
    event = len(base.event_shape)
    shape = torch.Size(np.broadcast_shapes(tuple(base.batch_shape + base.event_shape), tuple(value.shape)))
    batch = shape[: len(shape) - event]
    if isinstance(base, _GAUSSIAN):
        return _gaussian_of(base.expand(batch), present.expand(shape)).to_event(dims), torch.where(
            present, value, 0.0
        ).expand(shape)
    there = present.flatten(-event).any(-1) if event else present
    inside = value_inside(base, value)
    filled = torch.where(there.reshape(there.shape + (1,) * event), value, inside)
    return base.expand(batch).mask(there.expand(batch)).to_event(dims), filled.expand(shape)


def _gaussian_of(fn: Any, present: Tensor) -> dist.MultivariateNormal:
    """The law of the elements that are present; the others are independent of all, and have density 1 at 0."""
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    alone = torch.eye(present.shape[-1], dtype=fn.loc.dtype, device=fn.loc.device) / (2 * math.pi)
    covariance = torch.where(both, fn.covariance_matrix, alone)
    return dist.MultivariateNormal(torch.where(present, fn.loc, 0.0), covariance)


def value_inside(fn: Any, like: Tensor) -> Tensor:
    """Some value of the support of a law: a number, or an event."""
    try:
        inside = torch.distributions.biject_to(fn.support)
        return inside(like.new_zeros(inside.inverse_shape(fn.event_shape))).to(like)
    except NotImplementedError:  # discrete
        if not fn.event_shape:
            return torch.as_tensor(getattr(fn.support, "lower_bound", 0)).to(like)
        first = (
            torch.arange(fn.event_shape[-1], device=like.device) == 0
        )  # all counts, or the one, in the first place
        return (first * torch.as_tensor(getattr(fn, "total_count", 1)).unsqueeze(-1)).to(like)


class ScaleRows(Messenger):
    """Scale the log probability of every site inside the plates of the rows: a batch stands for all of them."""

    def __init__(self, plates: Collection[str], factor: float) -> None:
        """Name the plates (of the rows) and the factor."""
        super().__init__()
        self.plates = plates
        self.factor = factor

    def _pyro_sample(self, msg: Any) -> None:
        # A plate that subsamples scales its sites itself.
        if any(f.name in self.plates and f.full_size in (None, f.size) for f in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.factor


class Adapt(Messenger):
    """Replace the distribution at named sites by a converted one, so that hybrids need no new backend."""

    def __init__(self, adapters: Mapping[str, Callable[[dist.Distribution], dist.Distribution]]) -> None:
        """Keep a function from distribution to distribution for each site."""
        super().__init__()
        self.adapters = adapters

    def _pyro_sample(self, msg: Any) -> None:
        adapt = self.adapters.get(msg["name"])
        if adapt is not None:
            msg["fn"] = adapt(msg["fn"])


class Keep(Messenger):
    """Let laws that run a network when they are asked, not when they are made, run it with the tensors lent now.

    They have a method `within(context)`: the same law, entering the context whenever it runs its network.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Keep what lends the tensors."""
        super().__init__()
        self.context = context

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = self._kept(msg["fn"])

    def _kept(self, fn: Any) -> Any:
        if isinstance(fn, torch.distributions.Independent):
            inner = self._kept(fn.base_dist)
            return fn if inner is fn.base_dist else inner.to_event(fn.reinterpreted_batch_ndims)
        if isinstance(fn, dist.MaskedDistribution):
            inner = self._kept(fn.base_dist)
            return fn if inner is fn.base_dist else inner.mask(fn._mask)
        within: Callable[..., Any] | None = getattr(fn, "within", None)
        return fn if within is None else within(self.context)


class Lent:
    """A function that is called in a context; in all else the function itself, as it is there."""

    pgen_fixed = True  # what is lent to it is learned elsewhere

    def __init__(self, fn: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Keep both; of a function that is lent something already, both contexts, that which it had first within."""
        self._fn, self.context = fn, context
        if isinstance(fn, Lent):
            self._fn, self.context = fn._fn, partial(_nested, context, fn.context)

    def __call__(self, *args: Any) -> Any:
        """Call the function in the context."""
        with self.context():
            return self._fn(*args)

    def parameters(self) -> list[Tensor]:
        """Its tensors to be learned, as they are in the context."""
        return self._held("parameters")

    def buffers(self) -> list[Tensor]:
        """Its other tensors."""
        return self._held("buffers")

    def __getattr__(self, name: str) -> Any:
        """What else it offers, such as its own posterior: methods are called in the context, too."""
        if name.startswith("_") or name == "context":  # not yet there, in a copy that is being made
            raise AttributeError(name)
        with self.context():
            found = getattr(self._fn, name)
        if not callable(found):
            return found

        def lent(*args: Any, **kwargs: Any) -> Any:
            with self.context():
                return found(*args, **kwargs)

        return lent

    def _held(self, name: str) -> list[Tensor]:
        with self.context():
            return list(getattr(self._fn, name, tuple)())


@contextmanager
def _nested(
    outer: Callable[[], AbstractContextManager[Any]], inner: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    with outer(), inner():
        yield


class StandIn(Messenger):
    """Give latents that nobody can draw (an improper prior, an energy) some value inside their support.

    To have a value where a run needs one: nothing is said about how probable it is.
    """

    def __init__(self, sites: Collection[str] | None = None) -> None:
        """Name the sites; None: look at every one."""
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if self.sites is not None and msg["name"] not in self.sites:
            return
        if msg["is_observed"] or msg["value"] is not None or type(fn).__name__ == "_Subsample":
            return
        if not capabilities_of(fn) & {Capability.SAMPLE, Capability.RSAMPLE}:
            like: Tensor = getattr(fn, "like", torch.empty(0))
            msg["value"] = _inside(fn.support, torch.Size(fn.batch_shape) + torch.Size(fn.event_shape), like)
            msg["done"] = True


def _inside(support: Any, shape: torch.Size, like: Tensor) -> Tensor:
    """Some value inside a support: the least of whole numbers, the middle of real ones."""
    least = support
    while isinstance(least, torch.distributions.constraints.independent):
        least = least.base_constraint
    if least.is_discrete:
        return like.new_zeros(shape) + getattr(least, "lower_bound", 0)
    inside = torch.distributions.biject_to(support)
    return inside(like.new_zeros(inside.inverse_shape(shape)))


class Substitute(Messenger):
    """Set the values of named sites as if they had been drawn: they stay latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        """Keep the values."""
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
