"""Integers as a continuous law seen through a coarse scale: a mass for what a flow only has a density of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.types import _size

from pgen.capability import Capability, capabilities_of
from pgen.errors import Intractable, OptionError


class Quantized(TorchDistribution):
    r"""The law of the cells that a continuous law falls into: integers $0, \ldots, L - 1$ for each scalar.

    With cells of width $w$ from $a$ on, and $y$ from the base law of density $p$,

    .. math::
        P(x) = \int_{[0, 1)^D} p\big(a + w (x + u)\big)\, w^D \, du
        \;\ge\; \exp \mathbb{E}_u \log \Big[ p\big(a + w (x + u)\big)\, w^D \Big].

    The left side is a probability *mass*; the right one, uniform dequantisation, bounds it from below. So
    what is reported for integer data is always a mass or a bound on one, and can stand beside that of a
    `Categorical`; the density itself, whose value depends on the width, never shows.

    `bound(value)` is a stochastic lower bound on $\log P$: the log of the mean over K uniform draws, whose
    mean grows with `particles` towards the mass (Burda et al. 2016); one particle is the classical bound
    (Theis et al. 2016). There is no `log_prob`. For a mass that is exact, see the heads of `Autoregressive`.

    A base without a density of its own that bounds it (a `Diffusion`) serves as well: the bound is then the mean of its
    bounds. What it lacks to be drawn from, this law lacks too; where it has a denoiser, conversions find it here.

    Where the base is not confined to the cells, `bound` leaves out the tails beyond the end cells (it stays a
    lower bound), and `sample` moves what falls there to the end cells.

    Args:
        base: the continuous law; its event shape is that of the integers.
        levels: the number L of cells for each scalar.
        low: where the first cell begins.
        width: width of a cell.
        particles: uniform draws for one evaluation of the bound.
        validate_args: whether values are checked against the support; None for torch's default.

    Raises:
        OptionError: fewer than two levels, no particles or a width that is not positive; or a base that has neither a
            density nor a bound on it.
        Intractable: `log_prob` was asked for; it is a `NotImplementedError` too.

    References:
        Theis, van den Oord and Bethge, *A note on the evaluation of generative models*, 2016.

    Example:
        >>> import pyro.distributions as dist
        >>> law = Quantized(dist.Normal(torch.full((2,), 2.0), 1.0).to_event(1), levels=5)
        >>> law.bound(law.sample((3,))).shape
        torch.Size([3])
    """

    arg_constraints: Mapping[str, constraints.Constraint] = {}  # type: ignore[override]
    has_rsample = False

    def __init__(
        self,
        base: TorchDistribution,
        levels: int,
        *,
        low: float = 0.0,
        width: float = 1.0,
        particles: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if levels < 2 or particles < 1 or width <= 0:
            raise OptionError(
                f"Quantized(levels={levels}, width={width}, particles={particles}): expected at least 2 "
                "levels and 1 particle and a positive "
                "width, e.g. Quantized(base, levels=256, width=1 / 256)"
            )
        if not {Capability.LOG_PROB, Capability.BOUND, Capability.DENOISER} & capabilities_of(base):
            raise OptionError(
                f"Quantized: {type(base).__name__} has neither a log_prob nor a bound on it; expected a continuous law with one, "
                "such as a Flow or a Diffusion"
            )
        self.base = base
        self.levels, self.low, self.width, self.particles = levels, low, width, particles
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """A bound on the mass; draws and a denoiser where the base has them."""
        own = capabilities_of(self.base)
        found = {Capability.BOUND} | (own & {Capability.DENOISER})
        if own & {Capability.SAMPLE, Capability.RSAMPLE}:
            found.add(Capability.SAMPLE)
        return frozenset(found)

    @property
    def support(self) -> constraints.Constraint:
        """The cells, at every place."""
        return constraints.independent(
            constraints.integer_interval(0, self.levels - 1), len(self.event_shape)
        )

    def expand(self, batch_shape: Size, _instance: Any = None) -> Quantized:
        """The same law, its batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Quantized, _instance)
        new.base = self.base.expand(Size(batch_shape))
        new.levels, new.low, new.width, new.particles = self.levels, self.low, self.width, self.particles
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Integers, shape `[*sample_shape, *batch_shape, *event_shape]`."""
        return self.cells(self.base.sample(Size(sample_shape)))

    def cells(self, value: Tensor) -> Tensor:
        """The integers whose cells real values fall into; those beyond the end cells count as in them."""
        return torch.floor((value - self.low) / self.width).clamp(0, self.levels - 1).long()

    def inside(self, value: Tensor) -> Tensor:
        """Uniform draws from the cells of integers, one for each: real values of the same shape."""
        if not value.is_floating_point():
            able = Capability.DENOISER in self.capabilities
            value = value.to(self.like.dtype if able else torch.get_default_dtype())
        return self.low + self.width * (value + torch.rand_like(value))

    @property
    def volume(self) -> float:
        """Log volume of a cell, in nats: what a log density at a cell has less than the log of its mass."""
        return math.prod(self.event_shape) * math.log(self.width)

    @property
    def schedule(self) -> Any:
        """Noise levels of the base, where it has a denoiser."""
        return self.base.schedule  # type: ignore[attr-defined]

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Quantized:
        """The same law, whose base runs its network in a context, if it runs one."""
        inner = getattr(self.base, "within", None)
        if inner is None:
            return self
        return self._over(inner(context))

    @property
    def context(self) -> Any:
        """What the base is conditioned on, or None."""
        return getattr(self.base, "context", None)

    def conditioned(self, context: Tensor | None) -> Quantized:
        """The same law under another context, where the base has one."""
        return self._over(self.base.conditioned(context))  # type: ignore[attr-defined]

    def guided(self, scale: float) -> Quantized:
        """The law of a guided base, where it has a denoiser."""
        return self._over(self.base.guided(scale))  # type: ignore[attr-defined]

    def _over(self, base: Any) -> Quantized:
        new = Quantized(base, self.levels, low=self.low, width=self.width, particles=self.particles)
        new._validate_args = self._validate_args
        return new

    @property
    def unplaced(self) -> Any:
        """The base for a single value, where all of the batch have the same and it has a denoiser; else None."""
        return getattr(self.base, "unplaced", None)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that values of the base have, where it has a denoiser."""
        return self.base.like  # type: ignore[attr-defined]

    def denoise(self, value: Tensor, sigma: Tensor | float) -> Tensor:
        """Real values denoised by the base, where it has a denoiser."""
        return self.base.denoise(value.to(self.like.dtype), sigma)  # type: ignore[attr-defined]

    def bound(self, value: Tensor) -> Tensor:
        """A stochastic lower bound on the log mass, in nats: fresh uniform draws at every call.

        Args:
            value: integers of shape `[..., *batch_shape, *event_shape]`.

        Returns:
            Shape `[..., *batch_shape]`.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = np.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        inside = self.inside(value.expand(self.particles, *shape))
        if Capability.LOG_PROB in capabilities_of(self.base):
            log = torch.logsumexp(self.base.log_prob(inside), 0) - math.log(self.particles)
        else:  # the mean of bounds is one, the log of the mean of their exponentials is none
            log = self.base.bound(inside).mean(0)  # type: ignore[attr-defined]
        return log + self.volume

    def log_prob(self, value: Tensor) -> NoReturn:
        """Not to be had: raises Intractable."""
        raise Intractable(
            "Quantized has no exact log_prob: the mass of a cell is an integral over "
            f"{math.prod(self.event_shape)} dimensions of "
            f"{type(self.base).__name__}. It lacks Capability.LOG_PROB and has Capability.BOUND: use "
            "bound(value)"
        )
