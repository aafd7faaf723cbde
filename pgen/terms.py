"""A program's log density taken apart: one term for every element of every site; or made linear in its choices.

Both are for kernels that move discrete latents: terms say which of them can be moved at once, and what a change of one is
worth; one-hot codes say, by one gradient, about what every change is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to

from pgen.handlers import only_named
from pgen.unconstrained import Constrain, log_prob_of

#: Laws whose values are the same everywhere.
FIXED = (
    torch.distributions.Bernoulli,
    torch.distributions.Categorical,
    torch.distributions.OneHotCategorical,
)


class Apart(Constrain):
    """Keeps the log density as terms instead of adding it up.

    Attributes:
        terms: log probabilities by site, element by element, where the law is a product over them (`to_event`) too; and the
            volume of each site's change of variables, under "|" and its name.
    """

    def __init__(self, parts: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        super().__init__(parts, given, weigh=False)
        self.terms: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        name = msg["name"]
        if name in self.parts and not msg["is_observed"]:
            transform = biject_to(msg["fn"].support)
            self.terms["|" + name] = transform.log_abs_det_jacobian(self.parts[name], msg["value"])

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        name, fn = msg["name"], msg["fn"]
        if only_named(msg) or type(fn).__name__ == "_Subsample":
            return
        scale, mask = msg["scale"], self._mask(msg)
        dims = 0
        while isinstance(fn, torch.distributions.Independent):
            dims, fn = dims + fn.reinterpreted_batch_ndims, fn.base_dist
        log = log_prob_of(fn, msg["value"])
        if name in self.given and not isinstance(fn, FIXED):  # formulas give numbers outside of supports, too
            log = torch.where(fn.support.check(msg["value"]), log, -math.inf)
        self.terms[name] = scale_and_mask(log, _for_events(scale, dims), _for_events(mask, dims))


class Relaxed(Constrain):
    """Adds up a log density that is differentiable by one-hot codes `[*batch, K]` of the values in `given`.

    The law of a coded site is linear in its code. What the rest of the program makes of values between two corners is
    its own business.
    """

    def __init__(
        self, parts: Mapping[str, Tensor], given: Mapping[str, Tensor], codes: Mapping[str, Tensor]
    ) -> None:
        super().__init__(parts, given, weigh=True)
        self.codes = codes

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.codes:
            super()._pyro_post_sample(msg)
            return
        log = _linear(msg["fn"], self.codes[msg["name"]])
        self.total = self.total + scale_and_mask(log, msg["scale"], self._mask(msg)).sum()


def elementwise(fn: Any) -> Any:
    """The law of one element of a site that is a product over its elements."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _linear(fn: Any, code: Tensor) -> Tensor:
    if isinstance(fn, torch.distributions.Independent):
        dims = list(range(-fn.reinterpreted_batch_ndims, 0))
        return _linear(fn.base_dist, code).sum(dims) if dims else _linear(fn.base_dist, code)
    table = log_prob_of(fn, fn.enumerate_support(expand=False))
    return (code * table.movedim(0, -1)).sum(-1)


def _for_events(value: Any, dims: int) -> Any:
    """A scale or mask of batch dimensions, for log probabilities with event dimensions behind them."""
    if not isinstance(value, Tensor) or not value.dim() or not dims:
        return value
    return value.reshape((*value.shape, *[1] * dims))
