"""Families of conditional laws: from outputs of a network to a distribution over the support of a site."""

from __future__ import annotations

import math
from typing import Literal, cast

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform, ReshapeTransform

from pgen.distributions.quiet import zuko
from pgen.errors import OptionError, ProgramError
from pgen.guides.features import Unconstrain, innermost, levels
from pgen.structure import Site

Family = Literal["normal", "low-rank", "full", "flow"]
FAMILIES: tuple[Family, ...] = ("normal", "low-rank", "full", "flow")

MAX_CHOLESKY = 2000
"""The largest covariance that is factorised: beyond it, memory and time grow out of hand."""
GAIN = 5.0
"""Free parameters count so many times: a learning rate for networks is slow for one that stands alone."""
_CONTEXT = 32  # outputs of the network that a flow is conditioned on
_MAX_LEVELS = 1024
_SMALLEST = 1e-8  # keeps a scale positive where softplus underflows


class Continuous(nn.Module):
    r"""A location-scale family in unconstrained space, pushed to the support.

    .. math:: z = T(m + s\,(\mu + \sigma \odot \epsilon))

    with $\mu, \sigma$ from the network, $m, s$ centre and scale of the prior, $T$ the bijection to the
    support, and $\epsilon$ standard Gaussian (`"normal"`), correlated (`"low-rank"`, `"full"`) or from a
    conditional flow (`"flow"`). Over real vectors a Gaussian stays a plain one, so that analytic divergences
    apply.

    Attributes:
        size: number of outputs that it reads; the first `located` of them move the location.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, site: Site, unconstrain: Unconstrain, family: Family, initial_scale: float, rank: int
    ) -> None:
        super().__init__()
        if not initial_scale > 0 or rank < 1:
            msg = f"initial_scale={initial_scale}, rank={rank}: both must be positive, the rank whole."
            raise OptionError(msg)
        numel = unconstrain.numel
        self.unconstrain = unconstrain
        self.event_dim = len(site.event_shape)
        self.family: Family = "normal" if numel == 1 and family in ("full", "low-rank") else family
        self.numel = self.located = numel
        self.rank = rank = min(rank, numel)
        if self.family == "full":
            require_cholesky(f"site {site.name!r}", numel)
        extra = {"normal": 0, "low-rank": numel * rank, "full": numel * (numel - 1) // 2, "flow": _CONTEXT}
        self.size = 2 * numel + extra[self.family]
        self.raw_scale = math.log(math.expm1(initial_scale))
        self.register_buffer("loc", torch.zeros(numel))
        self.register_buffer("scale", torch.ones(numel))
        self.flow = conditional_flow(numel, _CONTEXT) if self.family == "flow" else None

    def spread(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Outputs [copies * size] to start from: each of several copies at a centre [copies, K] of its own."""
        self.standardise(loc.mean(0), scale.mean(0))
        outputs = self.initial().repeat(len(loc), 1)
        offset = (loc - self.loc) / self.scale
        outputs[:, : self.numel] += torch.where(offset.isfinite(), offset, 0.0)
        return outputs.flatten()

    def initial(self) -> Tensor:
        """Outputs to start from: the prior's centre; a small factor, whose gradient vanishes at zero."""
        outputs = torch.zeros(self.size)
        if self.family == "low-rank":
            outputs[2 * self.numel :].normal_(std=0.1)
        return outputs

    def standardise(self, loc: Tensor, scale: Tensor) -> None:
        """Choose the centre and the unit of each unconstrained element; unusable units become one."""
        usable = torch.isfinite(scale) & (scale > 0) & torch.isfinite(loc)
        self.loc.copy_(torch.where(usable, loc, 0.0))
        self.scale.copy_(torch.where(usable, scale, 1.0))

    def forward(self, outputs: Tensor) -> dist.TorchDistribution:
        """The law of the site, batch shape `outputs.shape[:-1]`."""
        loc, scale, rest = self._parts(outputs)
        batch, shape = loc.shape[:-1], self.unconstrain.shape
        if self.family == "normal":
            base = dist.Normal(loc.reshape(batch + shape), scale.reshape(batch + shape)).to_event(len(shape))
            return self._pushed(base, [])
        transforms = [] if len(shape) == 1 else [ReshapeTransform(torch.Size((self.numel,)), shape)]
        if self.flow is not None:
            base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
            affine = AffineTransform(loc, scale, event_dim=1)
            return self._pushed(base, [self.flow(rest).transform.inv, affine, *transforms])
        if self.family == "full":
            base = dist.MultivariateNormal(loc, scale_tril=self._triangle(scale, rest))
        else:
            factor = rest.unflatten(-1, (self.numel, self.rank)) / math.sqrt(self.rank)
            base = dist.LowRankMultivariateNormal(loc, scale.unsqueeze(-1) * factor, scale.square())
        return self._pushed(base, transforms)

    def affine(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale `[..., numel]` of a `"normal"` law, unconstrained."""
        return self._parts(outputs)[:2]

    def residual(self, outputs: Tensor, value: Tensor) -> Tensor:
        """Values as unconstrained vectors [..., numel], centred, scaled and decorrelated by their own law.

        What depends linearly on these has a well-conditioned dependence: they are the noise behind the value.
        """
        loc, scale, rest = self._parts(outputs)
        centred = self.unconstrain.flat(value) - loc
        if self.family != "full":
            return centred / scale
        return torch.linalg.solve_triangular(
            self._triangle(scale, rest), centred.unsqueeze(-1), upper=False
        ).squeeze(-1)

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, raw, rest = outputs.split([self.numel, self.numel, self.size - 2 * self.numel], dim=-1)
        scale = self.scale * (nn.functional.softplus(raw + self.raw_scale) + _SMALLEST)
        return self.loc + self.scale * mean, scale, rest

    def _triangle(self, scale: Tensor, rest: Tensor) -> Tensor:
        return lower_triangle(rest / math.sqrt(self.numel), scale)

    def _pushed(self, base: dist.TorchDistribution, transforms: list) -> dist.TorchDistribution:
        if not self.unconstrain.real:
            transforms = [*transforms, self.unconstrain.transform(self.loc)]
        return dist.TransformedDistribution(base, transforms) if transforms else base


class Discrete(nn.Module):
    """A finite law with free probabilities for each element, values coded as by the site's own."""

    located = 0

    def __init__(self, site: Site) -> None:
        super().__init__()
        base, found = innermost(site.support), levels(site.support)
        self.event_dim = len(site.event_shape)
        self.shape = site.event_shape
        self.kind = "levels"
        if base is constraints.boolean:
            self.kind, self.size = "boolean", self.shape.numel()
        elif base is constraints.one_hot:
            self.kind, self.size = "one-hot", self.shape.numel()
        elif found is not None and found[1] <= _MAX_LEVELS:
            self.low, self.classes = found
            self.dtype = site.dtype
            self.size = self.shape.numel() * self.classes
        else:
            msg = (
                f"site {site.name!r}: a guide needs a finite support of at most {_MAX_LEVELS} values, but "
                f"{site.distribution} there has {site.support}. Truncate it (a Categorical over 0..K), sum "
                "it out, or give a guide of your own."
            )
            raise ProgramError(msg)

    def initial(self) -> Tensor:
        """Outputs to start from: all values equally likely."""
        return torch.zeros(self.size)

    def forward(self, outputs: Tensor) -> dist.TorchDistribution:
        """The law of the site, batch shape `outputs.shape[:-1]`."""
        batch = outputs.shape[:-1]
        if self.kind == "boolean":
            return dist.Bernoulli(logits=outputs.reshape(batch + self.shape)).to_event(self.event_dim)
        if self.kind == "one-hot":
            return dist.OneHotCategorical(logits=outputs.reshape(batch + self.shape)).to_event(
                self.event_dim - 1
            )
        logits = outputs.reshape((*batch, *self.shape, self.classes))
        plain = self.low == 0 and self.dtype == torch.long
        law = dist.Categorical(logits=logits) if plain else Levels(logits, self.low, self.dtype)
        return law.to_event(self.event_dim)


class Levels(dist.Categorical):
    """A categorical law over `low`, `low + 1`, ..., with values of a given dtype, as a Binomial has."""

    def __init__(self, logits: Tensor, low: int = 0, dtype: torch.dtype = torch.float32) -> None:
        """Keep the offset and the dtype."""
        super().__init__(logits=logits, validate_args=False)
        self.low = low
        self.dtype = dtype

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The whole numbers from `low` on, as many as there are logits."""
        return constraints.integer_interval(self.low, self.low + self._num_events - 1)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw values."""
        return (super().sample(torch.Size(sample_shape)) + self.low).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of values."""
        return super().log_prob((value - self.low).round().long())

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values."""
        return (super().enumerate_support(expand) + self.low).to(self.dtype)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Levels:
        """The same law at more batch positions."""
        logits = cast("Tensor", self.logits)
        return Levels(logits.expand(*batch_shape, self._num_events), self.low, self.dtype)


def conditional_flow(features: int, context: int) -> zuko.flows.Flow:
    """A neural spline flow whose two directions both cost two passes (couplings); one element: plain splines.

    References:
        Durkan, Bekasov, Murray, Papamakarios: Neural spline flows (NeurIPS 2019).
    """
    passes = 2 if features > 1 else None
    return zuko.flows.NSF(features, context, transforms=3, hidden_features=(64, 64), passes=passes)


def lower_triangle(below: Tensor, diagonal: Tensor) -> Tensor:
    """Cholesky factors [..., D, D]: `diag(diagonal) (I + B)`, B strictly lower, of D (D - 1) / 2 numbers."""
    size = diagonal.shape[-1]
    rows, columns = torch.tril_indices(size, size, -1, device=below.device)
    flat = below.new_zeros(*below.shape[:-1], size * size).index_copy(-1, rows * size + columns, below)
    return diagonal.unsqueeze(-1) * (
        flat.unflatten(-1, (size, size)) + torch.eye(size, dtype=below.dtype, device=below.device)
    )


def require_cholesky(where: str, size: int) -> None:
    """Raise unless a covariance of that size may be factorised."""
    if size > MAX_CHOLESKY:
        msg = (
            f"{where}: a full covariance over {size} dimensions would need a Cholesky factor of "
            f"{size} x {size}; the limit is {MAX_CHOLESKY}. Use 'low-rank' or a diagonal family."
        )
        raise OptionError(msg)
