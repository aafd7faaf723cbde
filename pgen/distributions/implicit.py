"""A law that one can draw from, and nothing else: noise pushed through a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.capability import Capability
from pgen.distributions.rows import call_on_rows, expand_context
from pgen.errors import Intractable, OptionError, ProgramError
from pgen.handlers import Lent


class Implicit(TorchDistribution):
    r"""The law of $x = g(\epsilon, c)$ for a noise $\epsilon$ and a generator that need not be invertible.

    It draws, with pathwise gradients, and has no density that could be computed; what learns it compares
    draws with data (Goodfellow et al. 2014, Mohamed and Lakshminarayanan 2016).

    Args:
        generator: a callable from noise of shape `[rows, *noise.event_shape]` (and a context of shape `[rows,
            c]`, where one is given) to values of shape `[rows, *event_shape]`.
        noise: the law of one noise value, of empty batch shape.
        event_shape: shape of one value.
        context: what the law is conditioned on, shape `[*batch_shape, c]`, or None.
        support: where values live; real by default.
        validate_args: unused by a law without `log_prob`; taken for uniformity.

    Raises:
        OptionError: the noise has a batch shape.
        ProgramError: (when drawn from) the generator gives values of a wrong shape.
        Intractable: `log_prob` was asked for; it is a `NotImplementedError` too.

    Example:
        >>> import pyro.distributions as dist
        >>> noise = dist.Normal(torch.zeros(4), 1.0).to_event(1)
        >>> Implicit(torch.nn.Linear(4, 2), noise, (2,)).rsample((5,)).shape
        torch.Size([5, 2])
    """

    capabilities = frozenset({Capability.SAMPLE, Capability.RSAMPLE})
    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    has_rsample = True

    def __init__(
        self,
        generator: Callable[..., Tensor],
        noise: TorchDistribution,
        event_shape: tuple[int, ...] | Size,
        *,
        context: Tensor | None = None,
        support: constraints.Constraint = constraints.real,
        validate_args: bool | None = None,
    ) -> None:
        if noise.batch_shape:
            raise OptionError(
                f"Implicit: the noise has batch shape {tuple(noise.batch_shape)}; give the law of one noise "
                "value, e.g. "
                f"dist.Normal(torch.zeros(16), 1.0).to_event(1)"
            )
        self.generator = generator
        self.noise = noise
        self.context = context
        self._support = support
        batch_shape = Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, Size(event_shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """As declared; real by default."""
        missing = len(self.event_shape) - self._support.event_dim
        return constraints.independent(self._support, missing) if missing > 0 else self._support

    def expand(self, batch_shape: Size, _instance: Any = None) -> Implicit:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Implicit, _instance)
        new.generator, new.noise, new._support = self.generator, self.noise, self._support
        new.context = expand_context(self.context, Size(batch_shape))
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Implicit:
        """The same law, whose generator is called in a context: where its tensors are lent to it."""
        new = self.expand(self.batch_shape)
        new.generator = Lent(self.generator, context)
        return new

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draws with pathwise gradients, shape `[*sample_shape, *batch_shape, *event_shape]`."""
        shape = Size(sample_shape) + self.batch_shape
        noise = self.noise.rsample(shape) if self.noise.has_rsample else self.noise.sample(shape)
        value = call_on_rows(self.generator, noise, self.noise.event_shape, self.batch_shape, self.context)
        if value.shape != shape + self.event_shape:
            raise ProgramError(
                f"the generator of Implicit gave values of shape {tuple(value.shape[len(shape) :])} each; "
                f"expected {tuple(self.event_shape)}, "
                "the event shape it was declared with"
            )
        return value

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws without gradients, shape `[*sample_shape, *batch_shape, *event_shape]`."""
        return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> NoReturn:
        """Not to be had: raises Intractable."""
        raise Intractable(
            "Implicit has no log_prob: it only draws (sample, rsample), since its generator need not be "
            "invertible and its noise may have "
            "fewer dimensions than its values. It lacks Capability.LOG_PROB; use a backend that learns from "
            "draws (adversarial, a "
            "two-sample distance), or a law with a density: Flow(zuko.flows.NSF(...)) or a latent with a "
            "noisy likelihood"
        )
