"""Running a program at a place in unconstrained space: its latents from real numbers, and real numbers from latents.

Each latent site goes through the bijection of its own law's support, made anew in every run: a support may depend on
other latents. What is here runs under `vmap`, and raises nothing at places where a law is no law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from pgen.capability import Capability
from pgen.errors import ProgramError
from pgen.handlers import only_named

_MISSING = "_unobserved"  # how Pyro names the part of a site that `obs_mask` leaves out


class Constrain(Messenger):
    """Gives latents their values from unconstrained parts, and adds up log densities and volumes.

    Attributes:
        parts: unconstrained values by site.
        given: values of latents as they are, by site.
        weigh: whether to add up log densities.
        total: their sum, over all sites.
        volume: log |det| of the bijections, summed.
        values: of the latents in `parts`, and of deterministic sites.
        met: names of the sites so far.
    """

    def __init__(self, parts: Mapping[str, Tensor], given: Mapping[str, Tensor], weigh: bool) -> None:
        super().__init__()
        self.parts, self.given, self.weigh = parts, given, weigh
        self.total: Any = 0.0
        self.volume: Any = 0.0
        self.values: dict[str, Tensor] = {}
        self.met: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            return
        if name in self.parts:
            transform, free = biject_to(msg["fn"].support), self.parts[name]
            value = transform(free)
            self.volume = self.volume + transform.log_abs_det_jacobian(free, value).sum()
            self.values[name] = value
        elif name in self.given:
            value = self.given[name]
        elif msg["fn"].has_enumerate_support:
            # Summed out, or moved by others: here some value will do.
            value = _first_value(msg["fn"])
        else:
            return
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if only_named(msg):
            self.values[msg["name"]] = msg["value"]
            return
        if not self.weigh or type(fn).__name__ == "_Subsample":
            return
        log = log_prob_of(fn, msg["value"])
        self.total = self.total + scale_and_mask(log, msg["scale"], self._mask(msg)).sum()

    def _mask(self, msg: Any) -> Any:
        """The mask of a site; none for the missing part of a value that was observed through `obs_mask`.

        Pyro draws that part at all elements and masks it where data are, which leaves these elements without a law: they
        would drift off. Given the law of the site they integrate to one, and nothing looks at them.
        """
        name, mask = msg["name"], msg["mask"]
        self.met.add(name)
        if name in self.given:  # moved by other kernels, it must not drift off either
            return None
        partly = name.endswith(_MISSING) and name.removesuffix(_MISSING) + "_observed" in self.met
        return None if partly and name in self.parts else mask


class Unconstrain(Messenger):
    """Sets latents to given values, and finds their unconstrained counterparts.

    Attributes:
        values: by site.
        found: unconstrained, by site.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.found: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values and not msg["is_observed"]:
            value = self.values[name]
            self.found[name] = biject_to(msg["fn"].support).inv(value)
        elif msg["fn"].has_enumerate_support and not msg["is_observed"]:
            value = _first_value(msg["fn"])
        else:
            return
        msg["value"], msg["done"] = value, True


def bijection_of(name: str, fn: Any) -> Any:
    """From the real numbers to the support of a site's law.

    Raises:
        ProgramError: there is none.
    """
    try:
        return biject_to(fn.support)
    except NotImplementedError as error:
        raise ProgramError(
            f"site {name!r}: its support {fn.support} has no bijection from the real numbers, so no gradient-based "
            "kernel can move it; give the site a law with a continuous support"
        ) from error


class Tolerant(TorchFunctionMode):
    """Factors what is not positive definite as NaN: the density is no number there, and nothing is raised.

    One chain that proposes such a place must not stop the others.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.linalg.cholesky, torch.cholesky, Tensor.cholesky):
            matrix, upper = args[0], kwargs.get("upper", args[1] if len(args) > 1 else False)
            factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
            return torch.where((failed == 0)[..., None, None], factor, math.nan)
        return func(*args, **kwargs)


def log_prob_of(fn: Any, value: Tensor) -> Tensor:
    """The log probability of a value, written so that it batches and that its gradient costs little.

    torch masks the logits of a multinomial by index, which vmap cannot do; and its Bernoulli, under vmap, comes apart
    into thirty operations where `x l - softplus(l)` is three.
    """
    if isinstance(fn, torch.distributions.Independent):
        log = log_prob_of(fn.base_dist, value)
        return log.sum(list(range(-fn.reinterpreted_batch_ndims, 0))) if fn.reinterpreted_batch_ndims else log
    if isinstance(fn, torch.distributions.Multinomial):
        counts = torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1)
        return counts + torch.where(value == 0, 0.0, value * fn.logits).sum(-1)
    if isinstance(fn, torch.distributions.Bernoulli) and "logits" in fn.__dict__:
        return value * fn.logits - torch.nn.functional.softplus(fn.logits)
    declared = getattr(fn, "capabilities", None)
    if declared is not None and Capability.LOG_PROB not in declared:
        return fn.log_density(value)
    return fn.log_prob(value)


def _first_value(fn: Any) -> Tensor:
    """The first value of a finite support, in the shape of a draw."""
    value = fn.enumerate_support(expand=False)[0]
    return value.expand(fn.batch_shape + fn.event_shape) if not fn.event_shape else value
