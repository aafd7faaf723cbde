"""Marginals as Pyro distributions, kept as tensors until the rows of a large problem are joined again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from pgen.structure import Site


@dataclass(frozen=True)
class Law:
    """A distribution over the value of a site, before it is made.

    Attributes:
        make: from the tensors to the distribution.
        tensors: by name; their leading dimensions are the batch shape of the site.
    """

    make: Callable[..., Any]
    tensors: Mapping[str, Tensor]

    def to(self, dtype: torch.dtype) -> Law:
        """The same in another precision."""
        return Law(self.make, {name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def distribution(self) -> Any:
        """The Pyro distribution."""
        return self.make(**self.tensors)


def join(laws: Sequence[Law], axis: int) -> Law:
    """One law of the rows of several, along a batch axis."""
    if len(laws) == 1:
        return laws[0]
    return Law(laws[0].make, {k: torch.cat([law.tensors[k] for law in laws], axis) for k in laws[0].tensors})


class Finite(dist.TorchDistribution):
    """A law over a finite list of values, for supports that no named distribution has.

    Args:
        support: the values `[K, *event]`.
        probs: their probabilities `[*batch, K]`.
    """

    arg_constraints: Mapping[str, Any] = {"probs": torch.distributions.constraints.simplex}  # type: ignore[override]
    has_enumerate_support = True

    def __init__(self, support: Tensor, probs: Tensor, validate_args: bool | None = None) -> None:
        self.values = support
        self.probs = probs
        super().__init__(probs.shape[:-1], support.shape[1:], validate_args)

    @property
    def support(self) -> Any:
        """Any value; `log_prob` is -inf outside the list."""
        real = torch.distributions.constraints.real
        return torch.distributions.constraints.independent(real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """The mean, element by element."""
        return torch.tensordot(self.probs, self.values.to(self.probs.dtype), 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws `[*sample, *batch, *event]`."""
        return self.values[dist.Categorical(self.probs).sample(torch.Size(sample_shape))]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of each value."""
        event = len(self.event_shape)
        lists = self.values.reshape((len(self.values),) + (1,) * (value.dim() - event) + self.event_shape)
        same = (
            (value.unsqueeze(0) == lists).flatten(value.dim() - event + 1).all(-1)
            if event
            else value == lists
        )
        return torch.where(same.movedim(0, -1), self.probs, self.probs.new_zeros(())).sum(-1).log()

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The list of values."""
        batch = self.batch_shape if expand else (1,) * len(self.batch_shape)
        values = self.values.reshape((-1,) + (1,) * len(self.batch_shape) + self.event_shape)
        return values.expand((-1, *batch, *self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Finite:
        """The same over another batch shape."""
        return Finite(self.values, self.probs.expand((*batch_shape, self.probs.shape[-1])), False)


def finite_law(site: Site, support: Tensor, probs: Tensor) -> Law:
    """The law of a finite site in its own coding of values, from probabilities `[*batch, K]`."""
    if site.distribution == "Categorical":
        return Law(dist.Categorical, {"probs": probs})
    if site.distribution == "Bernoulli":
        return Law(dist.Bernoulli, {"probs": probs[..., 1]})
    if site.distribution == "OneHotCategorical":
        return Law(dist.OneHotCategorical, {"probs": probs})
    return Law(lambda probs: Finite(support, probs), {"probs": probs})


def gaussian_law(site: Site, mean: Tensor, covariance: Tensor) -> Law:
    """The law of a Gaussian site from its mean `[*batch, E]` and covariance `[*batch, E, E]`, events flat."""
    shape = site.event_shape
    if not shape:
        tensors = {"loc": mean[..., 0], "scale": covariance[..., 0, 0].sqrt()}
        return Law(dist.Normal, tensors)
    tensors = {"loc": mean, "covariance_matrix": covariance}
    if len(shape) == 1:
        return Law(dist.MultivariateNormal, tensors)
    reshape = ReshapeTransform(torch.Size([shape.numel()]), shape)
    return Law(lambda **t: dist.TransformedDistribution(dist.MultivariateNormal(**t), reshape), tensors)
