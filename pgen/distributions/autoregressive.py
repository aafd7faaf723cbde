"""A law written as a product of conditionals, all computed by one masked network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.capability import Capability
from pgen.distributions.heads import Head
from pgen.distributions.rows import call_on_rows, expand_context
from pgen.errors import OptionError, ProgramError
from pgen.handlers import Lent


class Autoregressive(TorchDistribution):
    r"""A joint law as a product of conditionals, in some order of the scalars.

    .. math:: \log p(x \mid c) = \sum_i \log p(x_{o(i)} \mid x_{o(1)}, \ldots, x_{o(i-1)}, c)

    One pass of `network` gives the numbers of all conditionals at once, so `log_prob` is exact and takes one
    pass. Drawing is ancestral and takes one pass for each scalar, batched over draws.

    How to make a network for it: a callable from values of shape `[rows, *event_shape]` (and a context of
    shape `[rows, c]`, where one is given) to numbers of shape `[rows, *event_shape, head.size]`, of which
    those at a place depend only on the values *earlier* in the order. `pgen.nn.MADE` and `pgen.nn.CausalConv`
    are two; `check_order()` tells whether another one is.

    Args:
        network: gives the numbers of every conditional.
        event_shape: shape of one value.
        head: turns the numbers at one place into a law, such as `Categorical(17)`, `Ordinal(17)`,
            `Bernoulli()`, `GaussianMixture(5)` or `LogisticMixture(256)`.
        context: what the law is conditioned on, shape `[*batch_shape, c]`, or None.
        order: a permutation of the flattened places, first drawn first; None for the raster order, or for
            `network.order` where the network has one.
        validate_args: whether the order is checked, and values against the support; None for torch's
            default.

    Raises:
        OptionError: `order` is not a permutation of the places.
        ProgramError: (when used) the network gives numbers of a wrong shape.

    References:
        Larochelle and Murray, *The Neural Autoregressive Distribution Estimator*, 2011.
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, 2015.

    Example:
        >>> from pgen.distributions import Categorical
        >>> from pgen.nn import MADE
        >>> law = Autoregressive(MADE(8, levels=3, outputs=3), (8,), Categorical(3))
        >>> law.log_prob(law.sample((5,))).shape
        torch.Size([5])
    """

    capabilities = frozenset({Capability.SAMPLE, Capability.LOG_PROB})
    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    has_rsample = False

    def __init__(
        self,
        network: Callable[..., Tensor],
        event_shape: tuple[int, ...] | Size,
        head: Head,
        *,
        context: Tensor | None = None,
        order: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.network = network
        self.head = head
        self.context = context
        self.order = getattr(network, "order", None) if order is None else order
        batch_shape = Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, Size(event_shape), validate_args=validate_args)
        # Reading the order keeps a loss from being recorded; it is done where all else is checked too.
        places = math.prod(event_shape)
        if self._validate_args and self.order is not None and sorted(self.order.tolist()) != [*range(places)]:
            raise OptionError(
                f"Autoregressive: order {self.order.tolist()} is not a permutation of the {places} places of "
                f"event shape {tuple(event_shape)}; for a random order: order=torch.randperm({places})"
            )

    @property
    def support(self) -> constraints.Constraint:
        """The head's support at every place."""
        return constraints.independent(self.head.support, len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> Autoregressive:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Autoregressive, _instance)
        new.network, new.head, new.order = self.network, self.head, self.order
        new.context = expand_context(self.context, Size(batch_shape))
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Autoregressive:
        """The same law, whose network is called in a context: where its tensors are lent to it."""
        new = self.expand(self.batch_shape)
        new.network = Lent(self.network, context)
        return new

    def conditionals(self, value: Tensor) -> TorchDistribution:
        """The law of every place given the places before it in `value`: batch shape `[*value.shape]`.

        Args:
            value: shape `[..., *batch_shape, *event_shape]`.
        """
        numbers = call_on_rows(self.network, value, self.event_shape, self.batch_shape, self.context)
        if numbers.shape != (*value.shape, self.head.size):
            raise ProgramError(
                f"the network of Autoregressive gave numbers of shape {tuple(numbers.shape)} for values of "
                f"shape {tuple(value.shape)}; "
                f"expected {(*value.shape, self.head.size)}: {self.head} takes {self.head.size} for each "
                "scalar"
            )
        return self.head(numbers)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log probability in nats: mass for discrete heads, density for continuous ones.

        Args:
            value: shape `[..., *batch_shape, *event_shape]`.

        Returns:
            Shape `[..., *batch_shape]`.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = value.expand(np.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        scores = _scores(self.conditionals(value), value)
        return scores.flatten(scores.ndim - len(self.event_shape)).sum(-1) if self.event_shape else scores

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw values, place after place: shape `[*sample_shape, *batch_shape, *event_shape]`."""
        shape = Size(sample_shape) + self.batch_shape
        places = math.prod(self.event_shape)
        value = self._blank(shape + self.event_shape)
        flat = value.view(*shape, places)
        for place in range(places) if self.order is None else self.order.tolist():
            # Only this place is needed; taking it from the numbers keeps the head's work small.
            numbers = call_on_rows(self.network, value, self.event_shape, self.batch_shape, self.context)
            here = numbers.reshape(*shape, places, self.head.size)[..., place, :]
            flat[..., place] = self.head(here).sample()
        return value

    def check_order(self, values: Tensor, others: Tensor, tolerance: float = 1e-5) -> None:
        """Check that the network keeps to the order: no place hears of itself or of a later one.

        For every place, the values there and later are exchanged for others and the law at that place must
        not change; all places are tried in one batch. A network that peeks gives log probabilities that are
        too high, and nothing else shows it. Try it on a network with weights that matter, in evaluation mode.

        Args:
            values: one value, shape `[*event_shape]`.
            others: another, which should differ from it at every place.
            tolerance: by how much log probabilities may differ (nats), for the rounding of batched
                arithmetic.

        Raises:
            ProgramError: names the first place, in the order, whose law changes.
        """
        if self.batch_shape:
            raise OptionError(
                "check_order: the law has a batch shape; check it with a single context: Autoregressive(..., "
                "context=c[0])"
            )
        places = math.prod(self.event_shape)
        straight = torch.arange(places, device=values.device)
        order = straight if self.order is None else self.order.to(values.device)
        rank = torch.empty_like(order).scatter_(0, order, straight)
        later = rank[None, :] >= rank[:, None]  # row i: what place i must not hear of
        mixed = torch.where(later, others.reshape(1, -1), values.reshape(1, -1))
        both = torch.stack([values.reshape(1, -1).expand_as(mixed), mixed])
        shape = (2, places, *self.event_shape)
        with torch.no_grad():
            scores = _scores(self.conditionals(both.view(shape)), values.expand(shape)).flatten(2)
        change = (scores[0] - scores[1]).diagonal().abs()
        bad = [int(p) for p in order.tolist() if not float(change[p]) <= tolerance]
        if bad:
            raise ProgramError(
                f"the network of Autoregressive breaks the order: the law at place {bad[0]} changes by "
                f"{float(change[bad[0]]):.3g} nats with values that come no earlier ({len(bad)} of {places} "
                "places are affected). Mask its connections, as pgen.nn.MADE does"
            )

    def _blank(self, shape: Size) -> Tensor:
        """Somewhere to write draws; a network that keeps to the order never hears what it held before."""
        device = self.context.device if self.context is not None else _device_of(self.network)
        dtype = self.context.dtype if self.context is not None else _dtype_of(self.network)
        support = self.head.support
        counts = support.is_discrete and support is not constraints.boolean
        return torch.zeros(shape, dtype=torch.long if counts else dtype, device=device)


def _scores(law: TorchDistribution, value: Tensor) -> Tensor:
    """Log probability of every scalar; torch's Bernoulli wants its zeros and ones as real numbers."""
    boolean = isinstance(law, torch.distributions.Bernoulli)
    return law.log_prob(value.to(law.logits.dtype) if boolean else value)


def _parameters(network: Callable[..., Tensor]) -> list[Tensor]:
    return list(getattr(network, "parameters", tuple)())


def _device_of(network: Callable[..., Tensor]) -> torch.device | None:
    return next((p.device for p in _parameters(network)), None)


def _dtype_of(network: Callable[..., Tensor]) -> torch.dtype:
    return next((p.dtype for p in _parameters(network) if p.is_floating_point()), torch.get_default_dtype())
