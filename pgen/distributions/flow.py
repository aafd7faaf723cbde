"""A normalising flow of zuko, or what behaves like one, as a distribution for a `pyro.sample` site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.capability import Capability
from pgen.distributions.quiet import zuko
from pgen.distributions.rows import expand_context
from pgen.errors import OptionError, ProgramError
from pgen.handlers import Lent

_UNSAID = zuko.distributions.NormalizingFlow  # does not say its support; asking raises


class Flow(TorchDistribution):
    r"""The law of $x = f_c(z)$ for an invertible $f_c$ and a simple base law of $z$.

    .. math::
        \log p(x \mid c) = \log p_z\big(f_c^{-1}(x)\big)
        + \log \left| \det \frac{\partial f_c^{-1}(x)}{\partial x} \right|

    Values of any event shape are flattened for the flow and shaped back. The last `rsample` is remembered
    with its log density, so that asking for the log density of a draw just made, as every ELBO does, inverts
    nothing.

    Args:
        flow: a `zuko.flows` flow (`NSF`, `MAF`, ...), or any callable from a context, or from nothing, to a
            distribution over vectors with `log_prob` and `rsample` (and, where it has one,
            `rsample_and_log_prob`).
        event_shape: shape of one value; None for that of the flow, a vector.
        context: what the law is conditioned on, shape `[*batch_shape, c]`, or None.
        validate_args: whether values are checked against the support; None for torch's default.

    Raises:
        OptionError: `event_shape` has not as many scalars as the flow.

    References:
        Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015.
        Papamakarios et al., *Normalizing Flows for Probabilistic Modeling and Inference*, 2021.

    Example:
        >>> import zuko
        >>> law = Flow(zuko.flows.NSF(6, transforms=2), event_shape=(2, 3))
        >>> law.log_prob(law.rsample((5,))).shape
        torch.Size([5])
    """

    capabilities = frozenset({Capability.SAMPLE, Capability.RSAMPLE, Capability.LOG_PROB})
    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    has_rsample = True

    def __init__(
        self,
        flow: Callable[..., Any],
        event_shape: tuple[int, ...] | Size | None = None,
        *,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.flow = flow
        self.context = context
        self.law = _unchecked(flow() if context is None else flow(context))
        own = Size(self.law.event_shape)
        event_shape = own if event_shape is None else Size(event_shape)
        if len(own) != 1 or math.prod(event_shape) != own[0]:
            raise OptionError(
                f"Flow: the flow is over event shape {tuple(own)}, and values were said to have shape "
                f"{tuple(event_shape)}; "
                f"give a flow over vectors of {math.prod(event_shape)} scalars, e.g. "
                f"zuko.flows.NSF({math.prod(event_shape)})"
            )
        self._last: tuple[Tensor, int, Tensor] | None = None
        super().__init__(Size(self.law.batch_shape), event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the flow, shaped as a value; all reals where the flow does not say."""
        own = None if isinstance(self.law, _UNSAID) else self.law.support
        if own is not None and len(self.event_shape) == own.event_dim:
            return own
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def passes(self) -> int:
        """Times that networks run for a draw, one after the other: many where a transformation is autoregressive."""
        transform = getattr(self.law, "transform", None)
        parts = getattr(transform, "transforms", [transform])
        return sum(getattr(part, "passes", 1) for part in parts)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Flow:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Flow, _instance)
        new.flow = self.flow
        new.context = expand_context(self.context, Size(batch_shape))
        new.law = _unchecked(
            (self.law if self.context is not None else self.flow()).expand(Size(batch_shape))
        )
        new._last = None
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Flow:
        """The same law, whose networks are called in a context: where their tensors are lent to them."""
        new = self.expand(self.batch_shape)
        new.flow = Lent(self.flow, context)
        return new

    def _lent(self) -> AbstractContextManager[Any]:
        return self.flow.context() if isinstance(self.flow, Lent) else nullcontext()

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density in nats.

        Args:
            value: shape `[..., *batch_shape, *event_shape]`.

        Returns:
            Shape `[..., *batch_shape]`.
        """
        if self._validate_args:
            self._validate_sample(value)
        if self._last is not None and self._last[0] is value and self._last[1] == value._version:
            return self._last[2]
        with self._lent():
            return self.law.log_prob(self._flat(value))

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draws with pathwise gradients, shape `[*sample_shape, *batch_shape, *event_shape]`."""
        value, log_prob = self.rsample_and_log_prob(sample_shape)
        self._last = (value, value._version, log_prob)
        return value

    def rsample_and_log_prob(self, sample_shape: _size = ()) -> tuple[Tensor, Tensor]:
        """Draws with pathwise gradients and their log density, in one pass through the flow."""
        with self._lent():
            if hasattr(self.law, "rsample_and_log_prob"):
                flat, log_prob = self.law.rsample_and_log_prob(Size(sample_shape))
            else:
                flat = self.law.rsample(Size(sample_shape))
                log_prob = self.law.log_prob(flat)
        return self._shaped(flat), log_prob

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws without gradients, shape `[*sample_shape, *batch_shape, *event_shape]`."""
        with self._lent():
            return self._shaped(self.law.rsample(Size(sample_shape)))

    def _flat(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape[: value.ndim - len(self.event_shape)], -1)

    def _shaped(self, flat: Tensor) -> Tensor:
        if flat.shape[-1] != math.prod(self.event_shape):
            raise ProgramError(
                f"the flow drew values of shape {tuple(flat.shape)}; expected [..., "
                f"{math.prod(self.event_shape)}]"
            )
        return flat.reshape(*flat.shape[:-1], *self.event_shape)


def _unchecked(law: Any) -> Any:
    """A flow whose base looks at no values: `Flow` has looked already, and a look at values cannot be recorded."""
    part = law
    while part is not None:
        part._validate_args = False
        part = getattr(part, "base", None) or getattr(part, "base_dist", None)
    return law
