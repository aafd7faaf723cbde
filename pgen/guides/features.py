"""How values become features of a network, and supports become unconstrained vectors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from pgen.errors import OptionError, ProgramError
from pgen.structure import Site, Structure

MAX_CLASSES = 64
"""A finite support of up to so many values is given to networks as indicators, a larger one as numbers."""
_WIDE = 16  # whole-number arguments with more elements than this are given as numbers


def innermost(support: Any) -> Any:
    """A constraint without its `independent` wrappers."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def levels(support: Any) -> tuple[int, int] | None:
    """Least value and number of values of a finite range of whole numbers; None for other supports."""
    base = innermost(support)
    if base is constraints.boolean:
        return 0, 2
    if isinstance(base, constraints.integer_interval):
        low, high = torch.as_tensor(base.lower_bound).min(), torch.as_tensor(base.upper_bound).max()
        return int(low), int(high - low) + 1
    return None


def is_real(support: Any) -> bool:
    """Whether a support is all of the real numbers, vectors or arrays."""
    return innermost(support) is constraints.real


def settle(site: Site, structure: Structure) -> Any:
    """The support of a site, its bounds as plain numbers wherever they are equal, so that it fits any batch.

    Raises:
        ProgramError: the support depends on another site or on learned tensors, or differs from row to row.
    """
    if site.support_params:
        msg = (
            f"site {site.name!r}: its support {site.support} depends on learned tensors "
            f"({', '.join(site.support_params)}) and would move in training, but a guide needs one that "
            f"stays. Draw a fraction and scale it: u = pyro.sample('{site.name}_fraction', dist.Uniform(0, "
            f"1)), then pyro.deterministic({site.name!r}, low + (high - low) * u)."
        )
        raise ProgramError(msg)
    if site.support_parents:
        name, parent = site.name, site.support_parents[0]
        msg = (
            f"site {name!r}: its support {site.support} depends on "
            f"{', '.join(map(repr, site.support_parents))}, but a guide needs one that stays. Draw a "
            f"fraction and scale it: u = pyro.sample('{name}_fraction', "
            f"dist.Uniform(0, 1)), then {name} = pyro.deterministic({name!r}, {parent} * u)"
        )
        raise ProgramError(msg)
    return _settled(site.support, site, structure)


def _settled(support: Any, site: Site, structure: Structure) -> Any:
    if isinstance(support, constraints.independent):
        base = _settled(support.base_constraint, site, structure)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    bounds = [v for v in vars(support).values() if isinstance(v, Tensor)]
    if not bounds:
        return support
    dims = [
        p.dim - len(site.event_shape) for p in structure.plates.values() if p.name in structure.data_plates
    ]
    return type(support)(*(_plain(v, dims, site) for v in vars(support).values()))


def _plain(bound: Any, row_dims: Sequence[int], site: Site) -> Any:
    """A bound as a number if all its elements are equal, without its row dimensions if all rows are equal."""
    if not isinstance(bound, Tensor):
        return bound
    if bool((bound == bound.flatten()[0]).all()):
        return bound.flatten()[0].item()
    for dim in row_dims:
        if bound.ndim >= -dim and bound.shape[dim] > 1:
            first = bound.narrow(dim, 0, 1)
            if not bool((bound == first).all()):
                msg = (
                    f"site {site.name!r}: its support {site.support} differs from row to row, but a guide "
                    "needs one that stays. Draw a value in a fixed range and rescale it with "
                    "pyro.deterministic."
                )
                raise ProgramError(msg)
            bound = first
    return bound.detach().clone()


class Unconstrain:
    """The bijection from unconstrained vectors to the support of one site.

    Attributes:
        support: the settled support.
        shape: event shape of an unconstrained value; `numel` is its number of elements.

    Raises:
        ProgramError: no bijection to the support is known.
    """

    def __init__(self, site: Site, structure: Structure) -> None:
        """Find the bijection and try it once."""
        self.support = settle(site, structure)
        self.event_dim = len(site.event_shape)
        try:
            transform = biject_to(self.support)
            whole = (*site.batch_shape, *site.event_shape)
            shape = torch.Size(transform.inverse_shape(torch.Size(whole)))
            at_zero = torch.zeros(shape, dtype=site.dtype)
            transform.log_abs_det_jacobian(at_zero, transform(at_zero))
        except NotImplementedError as error:
            msg = (
                f"site {site.name!r}: no bijection from real vectors to its support {site.support} is "
                "known, so no guide can be made for it. Give a guide of your own, or register the bijection "
                "with torch.distributions.biject_to.register."
            )
            raise ProgramError(msg) from error
        self.shape = shape[len(site.batch_shape) :]
        self.numel = self.shape.numel()
        self.real = is_real(self.support)

    def transform(self, like: Tensor) -> Transform:
        """A fresh bijection that remembers its last value, with bounds on the device of `like`."""
        return biject_to(_moved(self.support, like)).with_cache()

    def flat(self, value: Tensor) -> Tensor:
        """Values [..., *event] as unconstrained vectors [..., numel]."""
        free: Any = value if self.real else self.transform(value).inv(value)
        return free.reshape(*free.shape[: free.ndim - len(self.shape)], self.numel)


def _moved(support: Any, like: Tensor) -> Any:
    if isinstance(support, constraints.independent):
        return constraints.independent(
            _moved(support.base_constraint, like), support.reinterpreted_batch_ndims
        )
    if any(isinstance(v, Tensor) for v in vars(support).values()):
        return type(support)(*(v.to(like) if isinstance(v, Tensor) else v for v in vars(support).values()))
    return support


class Features(nn.Module):
    """Values of a site or argument as features: standardised numbers, or indicators of a finite support.

    Missing elements (NaN) of an observed site count as average, and are marked by features of their own.

    Attributes:
        outputs: number of features.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        support: Any = None,
        unconstrain: Unconstrain | None = None,
        dtype: torch.dtype | None = None,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.event_dim = len(event_shape)
        self.unconstrain = unconstrain
        self.missing = missing
        numel = torch.Size(event_shape).numel() if unconstrain is None else unconstrain.numel
        found = levels(support)
        whole = support is None and dtype is not None and not dtype.is_floating_point and numel <= _WIDE
        self.low, self.classes = (
            found if found and 2 < found[1] <= MAX_CLASSES else (0, MAX_CLASSES if whole else 0)
        )
        numbers = 0 if self.classes and not whole else numel
        self.outputs = numel * self.classes + numbers + (numel if missing else 0)
        self.numbers = bool(numbers)
        self.register_buffer("loc", torch.zeros(numel))
        self.register_buffer("scale", torch.ones(numel))

    def standardise(self, loc: Tensor, scale: Tensor) -> None:
        """Choose the centre and the unit of each element; units that are zero or not finite become one."""
        usable = torch.isfinite(scale) & (scale > 0) & torch.isfinite(loc)
        self.loc.copy_(torch.where(usable, loc, 0.0))
        self.scale.copy_(torch.where(usable, scale, 1.0))

    def forward(self, value: Tensor) -> Tensor:
        """Map values [..., *event] to features [..., outputs]."""
        if self.unconstrain is not None:
            flat = self.unconstrain.flat(value)
        else:
            flat = value.reshape(value.shape[: value.ndim - self.event_dim] + self.loc.shape)
        flat = flat.to(self.loc.dtype)
        parts = []
        if self.classes:
            values = torch.arange(self.low, self.low + self.classes, device=flat.device)
            parts.append((flat.unsqueeze(-1) == values).to(flat.dtype).flatten(-2))
        if self.numbers:
            parts.append(torch.nan_to_num((flat - self.loc) / self.scale, nan=0.0, posinf=0.0, neginf=0.0))
        if self.missing:
            parts.append(torch.isnan(flat).to(flat.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def centre(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of observed values [n, D], NaN left out."""
    present = ~torch.isnan(samples)
    count = present.sum(0).clamp(min=1)
    filled = torch.where(present, samples, 0.0)
    mean = filled.sum(0) / count
    deviation = torch.where(present, samples - mean, 0.0)
    return mean, (deviation.square().sum(0) / count).sqrt()


def robust_centre(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Median and scaled interquartile range [D] of draws [n, D]: a Gaussian's mean and standard deviation.

    Laws without moments (a Cauchy prior) have these too.
    """
    ordered = torch.nan_to_num(samples).sort(0).values
    n = len(ordered)
    low, high = ordered[n // 4], ordered[n - 1 - n // 4]
    return ordered[(n - 1) // 2 : n // 2 + 1].mean(0), (high - low) / 1.349


def matrix(values: Tensor, event_dim: int) -> Tensor:
    """Values [..., *event] as a matrix [n, numel]."""
    split = values.ndim - event_dim
    return values.reshape(values.shape[:split].numel(), values.shape[split:].numel())


def require_latents(guide: str, structure: Structure, names: Collection[str]) -> None:
    """Raise unless all names are latents of the program."""
    if unknown := sorted(set(names) - set(structure.latents)):
        msg = (
            f"{guide}(marginalised={unknown}): these are not latents of {structure.name}; its latents are "
            f"{', '.join(map(repr, structure.latents)) or 'none'}."
        )
        raise OptionError(msg)
