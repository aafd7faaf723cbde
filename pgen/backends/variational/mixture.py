"""Marginals that torch has no class for: the mean of many laws, and a law of unknown moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.algorithms.bounds import log_mean_exp

_DRAWS = 4096  # for moments that are not known in closed form


class Marginal(dist.TorchDistribution):
    """A law as it is, mean and variance estimated by draws (always the same) if it does not know them.

    Example:
        >>> base, squash = dist.Normal(0.0, 1.0), dist.transforms.SigmoidTransform()
        >>> logistic = dist.TransformedDistribution(base, [squash])
        >>> Marginal(logistic).mean
        tensor(0.4972)
    """

    arg_constraints: Mapping[str, Any] = {}  # type: ignore[override]

    def __init__(self, law: Any) -> None:
        self.law = law
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the law."""
        return self.law.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the law."""
        return self.law.log_prob(value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of the law."""
        return self.law.sample(torch.Size(sample_shape))

    @property
    def mean(self) -> Tensor:
        """Mean, by draws if need be."""
        return moments(self.law)[0]

    @property
    def variance(self) -> Tensor:
        """Variance, by draws if need be."""
        return moments(self.law)[1]

    def expand(self, batch_shape: Any, _instance: Any = None) -> Marginal:
        """The same over another batch shape."""
        return Marginal(self.law.expand(torch.Size(batch_shape)))


def plain(law: Any) -> Any:
    """A law that knows its mean: the law itself if it does."""
    try:
        _ = law.mean
    except NotImplementedError:
        return Marginal(law)
    return law


def moments(law: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of a law, by draws where it does not know them."""
    try:
        return law.mean, law.variance
    except NotImplementedError:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            draws = law.sample((_DRAWS,))
        return draws.mean(0), draws.var(0)


class Mixture(dist.TorchDistribution):
    r"""$\frac1K \sum_k p_k$ over the leading batch dimension of a law.

    Args:
        law: batch shape `[K, *others]`.
        batch_shape: the shape of `others` without dimensions of size one in front that only align it.

    Example:
        >>> mixture = Mixture(dist.Normal(torch.tensor([-2.0, 2.0]), 1.0), ())
        >>> mixture.mean, mixture.variance
        (tensor(0.), tensor(5.))
        >>> mixture.sample((3,)).shape
        torch.Size([3])
    """

    arg_constraints: Mapping[str, Any] = {}  # type: ignore[override]

    def __init__(self, law: Any, batch_shape: torch.Size | tuple[int, ...]) -> None:
        self.law = law
        self.count = law.batch_shape[0]
        super().__init__(torch.Size(batch_shape), law.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the laws."""
        return self.law.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the mean density."""
        lead = value.dim() - len(self.event_shape) - len(self.batch_shape)
        flat = value.reshape(-1, *self.batch_shape, *self.event_shape) if lead else value.unsqueeze(0)
        rows = [log_mean_exp(self.law.log_prob(self._aligned(v))) for v in flat]
        found = torch.stack([r.reshape(self.batch_shape) for r in rows])
        return found.reshape(value.shape[:lead] + self.batch_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws: a component, then a value of it."""
        shape = torch.Size(sample_shape)
        drawn = self.law.sample(shape)  # [*shape, K, *others, *event]
        every = drawn.reshape(shape.numel(), self.count, *self.batch_shape, *self.event_shape)
        index = torch.randint(self.count, (shape.numel(), 1, *self.batch_shape), device=every.device)
        index = index.reshape(*index.shape, *(1,) * len(self.event_shape)).expand(-1, 1, *every.shape[2:])
        return every.gather(1, index).squeeze(1).reshape(shape + self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Mean of the means."""
        return moments(self.law)[0].mean(0).reshape(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Mean of the variances, and the variance of the means."""
        means, variances = moments(self.law)
        spread = variances.mean(0) + means.var(0, correction=0)
        return spread.reshape(self.batch_shape + self.event_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """The same over a larger batch shape."""
        shape = torch.Size(batch_shape)
        return Mixture(self.law.expand((self.count, *shape)), shape)

    def _aligned(self, value: Tensor) -> Tensor:
        """A value of the batch shape, as the laws broadcast it."""
        ones = len(self.law.batch_shape) - 1 - len(self.batch_shape)
        return value.reshape((1,) * max(ones, 0) + value.shape)
