"""Heads: from the numbers that a network gives for one scalar to the law of that scalar.

A head is a frozen value with a `size` (how many numbers it takes), a `support`, and a call from a tensor of
shape `[..., size]` to a distribution of batch shape `[...]`. To make one, write a class with these three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pgen.errors import OptionError


class Head(Protocol):
    """What `Autoregressive` needs of a conditional law."""

    @property
    def size(self) -> int:
        """How many numbers describe the law of one scalar."""
        ...

    @property
    def support(self) -> constraints.Constraint:
        """Where one scalar lives."""
        ...

    def __call__(self, parameters: Tensor) -> TorchDistribution:
        """The law: batch shape `[...]` from `parameters` of shape `[..., size]`."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """A zero or a one, from one logit.

    >>> Bernoulli()(torch.zeros(3, 1)).log_prob(torch.ones(3)).shape
    torch.Size([3])
    """

    size = 1
    support = constraints.boolean

    def __call__(self, parameters: Tensor) -> TorchDistribution:
        """The law of batch shape `[...]`."""
        return dist.Bernoulli(logits=parameters[..., 0])


@dataclass(frozen=True)
class Categorical:
    """One of `levels` values 0, 1, ..., unordered: a free logit each.

    >>> Categorical(5)(torch.zeros(3, 5)).batch_shape
    torch.Size([3])
    """

    levels: int

    def __post_init__(self) -> None:
        """Refuse fewer than two levels."""
        _check_levels("Categorical", self.levels)

    @property
    def size(self) -> int:
        """A logit for each level."""
        return self.levels

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.integer_interval(0, self.levels - 1)

    def __call__(self, parameters: Tensor) -> TorchDistribution:
        """The law of batch shape `[...]`."""
        return dist.Categorical(logits=parameters)


@dataclass(frozen=True)
class Ordinal:
    r"""One of `levels` *ordered* values, such as grey levels, from a few numbers.

    Neighbouring levels share their evidence, so far fewer examples teach it than a free logit for each level;
    the two end levels, where real measurements pile up, keep a logit of their own. See `ordinal_logits`.

    >>> Ordinal(17).size, Ordinal(17)(torch.zeros(3, 6)).logits.shape
    (6, torch.Size([3, 17]))
    """

    levels: int
    rank: int = 6

    def __post_init__(self) -> None:
        """Refuse fewer than two levels or fewer than three numbers."""
        _check_levels("Ordinal", self.levels)
        if self.rank < 3:
            raise OptionError(
                f"Ordinal(rank={self.rank}): needs at least 3 numbers (two ends and a slope); the default is "
                "6"
            )

    @property
    def size(self) -> int:
        """Numbers for each scalar."""
        return self.rank

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.integer_interval(0, self.levels - 1)

    def __call__(self, parameters: Tensor) -> TorchDistribution:
        """The law of batch shape `[...]`."""
        return dist.Categorical(logits=ordinal_logits(parameters, self.levels))


@dataclass(frozen=True)
class GaussianMixture:
    """A real number, from a mixture of `components` Gaussians: logits, means and log scales (Bishop 1994).

    Means are counted from places spread over [-2, 2], where standardised data are, so that zeros are a good
    start. Scales are at least `floor`, so that no component can collapse onto a point and no density run to
    infinity.

    >>> GaussianMixture(5)(torch.zeros(3, 15)).batch_shape
    torch.Size([3])
    """

    components: int = 5
    floor: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse no components."""
        _check_components("GaussianMixture", self.components)

    @property
    def size(self) -> int:
        """A logit, a mean and a log scale for each component."""
        return 3 * self.components

    @property
    def support(self) -> constraints.Constraint:
        """The real line."""
        return constraints.real

    def __call__(self, parameters: Tensor) -> TorchDistribution:
        """The law of batch shape `[...]`."""
        logits, shifts, log_scales = parameters.unflatten(-1, (3, self.components)).unbind(-2)
        means = shifts + _apart(self.components, 2.0, shifts)
        normal = dist.Normal(means, log_scales.exp() + self.floor)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), normal)


@dataclass(frozen=True)
class LogisticMixture:
    r"""One of `levels` ordered values: a mixture of logistic laws, rounded (Salimans et al. 2017).

    .. math:: P(k) = \sum_j \pi_j \left[ F_j\big(k + \tfrac12\big) - F_j\big(k - \tfrac12\big) \right],

    where the two end levels take the tails, so that masses sum to one exactly. Locations are in units of half
    the range, from -1 (level 0) to 1 (the last level), as are scales; zeros stand for places spread over it.

    >>> bool(torch.isclose(LogisticMixture(17)(torch.randn(3, 15)).probs.sum(-1), torch.ones(3)).all())
    True
    """

    levels: int
    components: int = 5

    def __post_init__(self) -> None:
        """Refuse fewer than two levels and no components."""
        _check_levels("LogisticMixture", self.levels)
        _check_components("LogisticMixture", self.components)

    @property
    def size(self) -> int:
        """A logit, a location and a log scale for each component."""
        return 3 * self.components

    @property
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.integer_interval(0, self.levels - 1)

    def __call__(self, parameters: Tensor) -> TorchDistribution:
        """The law of batch shape `[...]`."""
        logits, shifts, log_scales = parameters.unflatten(-1, (3, self.components)).unbind(-2)
        locations = shifts + _apart(self.components, 0.8, shifts)
        step = 2.0 / (self.levels - 1)
        edges = (
            torch.arange(self.levels - 1, device=parameters.device, dtype=parameters.dtype) * step
            - 1.0
            + step / 2
        )
        z = (edges - locations[..., None]) * torch.exp(-log_scales)[..., None]
        below, above = logsigmoid(z), logsigmoid(-z)
        # F(b) - F(a) = F(b) (1 - F(a)) (1 - exp(a - b)): a product, so nothing cancels far out in the tails
        inside = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(z[..., :-1] - z[..., 1:]))
        masses = torch.cat([below[..., :1], inside, above[..., -1:]], -1)
        return dist.Categorical(logits=torch.logsumexp(logits.log_softmax(-1)[..., None] + masses, -2))


def ordinal_logits(coefficients: Tensor, levels: int) -> Tensor:
    r"""Logits of ordered levels from a few coefficients.

    .. math::
        \ell_k = c_0 [k = 0] + c_1 [k = L - 1] + \sum_{d=1}^{r-2} c_{d+1} u_k^d,
        \qquad u_k = \tfrac{2k}{L-1} - 1.

    Degree two alone is a rounded Gaussian; the ends stand apart because measurements are clipped there.

    Args:
        coefficients: shape `[..., r]`, at least three.
        levels: the number of levels L.

    Returns:
        Logits of shape `[..., levels]`, not normalised.

    >>> ordinal_logits(torch.tensor([0.0, 0.0, 1.0]), 5)
    tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """
    u = torch.linspace(-1.0, 1.0, levels, device=coefficients.device, dtype=coefficients.dtype)
    powers = u ** torch.arange(1, coefficients.shape[-1] - 1, device=u.device)[:, None]
    ends = torch.stack([(u == -1.0).to(u), (u == 1.0).to(u)])
    return coefficients @ torch.cat([ends, powers])


def _apart(components: int, reach: float, like: Tensor) -> Tensor:
    """Places spread over [-reach, reach], so that components differ from the first step on; zero for one."""
    if components == 1:
        return like.new_zeros(1)
    return torch.linspace(-reach, reach, components, device=like.device, dtype=like.dtype)


def _check_levels(name: str, levels: int) -> None:
    if levels < 2:
        raise OptionError(
            f"{name}(levels={levels}): a discrete value has at least 2 levels, e.g. {name}(17) for 0..16"
        )


def _check_components(name: str, components: int) -> None:
    if components < 1:
        raise OptionError(f"{name}(components={components}): a mixture has at least 1 component")
