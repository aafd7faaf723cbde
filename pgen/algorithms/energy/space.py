"""The space that an energy lives on: numbers that are measured, and numbers that are counted, side by side.

A value `[C, *event]` is taken apart into unconstrained coordinates q `[C, d]` and indices z `[C, m]`, and put together
again. Densities on q carry the volume of the change of variables:

    log pi(q, z) = log p(x(q, z)) + log |dx / dq|
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint


class Part(NamedTuple):
    """Neighbours in the flattened event that have one kind of support.

    Attributes:
        constraint: of one number, or, for a part that cannot be taken apart (a simplex), of the whole event.
        start: the first of them.
        size: how many.
        cardinality: number of values of each, 0, 1, ... above `least`; 0 where they are measured.
        least: the smallest value.
    """

    constraint: Constraint
    start: int
    size: int
    cardinality: int = 0
    least: int = 0


@dataclass(frozen=True)
class Space:
    """The values of a support.

    Attributes:
        parts: in the order of the flattened event.
        event_shape: shape of one value.

    Example:
        Two real numbers and a bit.

        >>> support = constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[2, 1])
        >>> space = Space.of(support, (3,))
        >>> space.dims, space.cardinalities
        (2, (2,))
        >>> q, z = space.apart(torch.tensor([[0.5, -1.0, 1.0]]))
        >>> q, z
        (tensor([[ 0.5000, -1.0000]]), tensor([[1]]))
        >>> space.together(q, z)
        tensor([[ 0.5000, -1.0000,  1.0000]])
    """

    parts: tuple[Part, ...]
    event_shape: Size

    @staticmethod
    def of(support: Constraint, event_shape: tuple[int, ...] | Size) -> Space:
        """The space of a support, for values of a shape.

        Raises:
            ValueError: a support that is neither a finite range of whole numbers nor one that torch maps real numbers to,
                or pieces (`constraints.cat`) whose lengths do not add up to the event.
        """
        event_shape, total = Size(event_shape), math.prod(event_shape)
        base = support
        while isinstance(base, constraints.independent):
            base = base.base_constraint
        if not isinstance(base, constraints.cat):
            return Space((_part(base, 0, total, event_shape),), event_shape)
        if base.dim != -1:
            raise ValueError(
                f"constraints.cat(..., dim={base.dim}) joins values of a batch; expected dim=-1, which joins the numbers of each"
            )
        if len(event_shape) != 1 or sum(base.lengths) != total:
            raise ValueError(
                f"constraints.cat of lengths {tuple(base.lengths)} needs values of shape ({sum(base.lengths)},), got the "
                f"event shape {tuple(event_shape)}"
            )
        parts, start = list[Part](), 0
        for piece, length in zip(base.cseq, base.lengths, strict=True):
            while isinstance(piece, constraints.independent):
                piece = piece.base_constraint
            parts.append(_part(piece, start, length, Size((length,))))
            start += length
        return Space(tuple(parts), event_shape)

    @cached_property
    def measured(self) -> tuple[Part, ...]:
        """Parts with a density."""
        return tuple(part for part in self.parts if not part.cardinality)

    @cached_property
    def counted(self) -> tuple[Part, ...]:
        """Parts with a finite list of values."""
        return tuple(part for part in self.parts if part.cardinality)

    @cached_property
    def dims(self) -> int:
        """Length of the vector of unconstrained coordinates."""
        return sum(self.free(part) for part in self.measured)

    @cached_property
    def cardinalities(self) -> tuple[int, ...]:
        """Numbers of values of the indices, one by one."""
        return tuple(part.cardinality for part in self.counted for _ in range(part.size))

    @property
    def binary(self) -> bool:
        """Whether all indices are bits."""
        return all(k == 2 for k in self.cardinalities)

    @property
    def states(self) -> int:
        """Number of values in all; 0 where some are measured."""
        return 0 if self.dims else math.prod(self.cardinalities)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates `[C, d]` and indices `[C, m]` of values `[C, *event]`."""
        q = [self._transform(part).inv(self._piece(x, part)).reshape(len(x), -1) for part in self.measured]
        z = [(self._piece(x, part).reshape(len(x), -1) - part.least).round().long() for part in self.counted]
        empty = x.new_zeros(len(x), 0)
        return torch.cat(q, 1) if q else empty, torch.cat(z, 1) if z else empty.long()

    def together(self, q: Tensor, z: Tensor) -> Tensor:
        """Values `[C, *event]` of coordinates and indices; indices may be fractions, on the way between two of them."""
        if len(self.parts) == 1:
            return self._value(self.parts[0], z if self.parts[0].cardinality else q).to(q.dtype)
        pieces, d, m = list[Tensor](), 0, 0
        for part in self.parts:
            if part.cardinality:
                found = self._value(part, z[:, m : m + part.size])
                m += part.size
            else:
                width = self.free(part)
                found = self._value(part, q[:, d : d + width])
                d += width
            pieces.append(found.reshape(len(q), -1).to(q.dtype))
        return torch.cat(pieces, 1).reshape(len(q), *self.event_shape)

    def volume(self, q: Tensor) -> Tensor:
        """Log determinant `[C]` of the change from coordinates `[C, d]` to values."""
        total, d = q.new_zeros(len(q)), 0
        for part in self.measured:
            width = self.free(part)
            piece = q[:, d : d + width].reshape(len(q), *self._free_shape(part))
            d += width
            if part.constraint is constraints.real:
                continue
            transform = self._transform(part)
            log = transform.log_abs_det_jacobian(piece, transform(piece))
            total = total + log.reshape(len(q), -1).sum(1)
        return total

    def uniform(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal coordinates, and indices drawn evenly."""
        q = torch.randn(n, self.dims, dtype=like.dtype, device=like.device)
        sizes = torch.tensor(self.cardinalities, dtype=like.dtype, device=like.device)
        z = (torch.rand(n, len(self.cardinalities), dtype=like.dtype, device=like.device) * sizes).long()
        return q, z

    def every(self, like: Tensor) -> Tensor:
        """All values of a finite space, `[states, *event]`.

        Raises:
            ValueError: some are measured.
        """
        if self.dims:
            raise ValueError(
                "a support that is measured has no list of values; integrate by quadrature instead"
            )
        return self.numbered(torch.arange(self.states, device=like.device), like)

    def numbered(self, code: Tensor, like: Tensor, q: Tensor | None = None) -> Tensor:
        """Values `[C, *event]` whose indices have these numbers `[C]` in the order of `every`, with coordinates q if any."""
        return self.together(like.new_zeros(len(code), 0) if q is None else q, self.digits(code))

    def digits(self, code: Tensor) -> Tensor:
        """Indices `[C, m]` of their numbers `[C]`, 0 to the product of the cardinalities."""
        columns, weight = [code.new_zeros(len(code), 0)], math.prod(self.cardinalities)
        for k in self.cardinalities:
            weight //= k
            columns.append((code // weight % k).unsqueeze(1))
        return torch.cat(columns, 1)

    # --- one part -------------------------------------------------------------------------------------------

    def _piece(self, x: Tensor, part: Part) -> Tensor:
        if len(self.parts) == 1:
            return x
        return x.reshape(len(x), -1)[:, part.start : part.start + part.size]

    def _value(self, part: Part, free: Tensor) -> Tensor:
        if part.cardinality:
            shape = self.event_shape if len(self.parts) == 1 else (part.size,)
            return free.reshape(len(free), *shape) + part.least
        return self._transform(part)(free.reshape(len(free), *self._free_shape(part)))

    def _transform(self, part: Part) -> Any:
        return biject_to(part.constraint)

    def _free_shape(self, part: Part) -> Size:
        whole = self.event_shape if len(self.parts) == 1 else Size((part.size,))
        return Size(self._transform(part).inverse_shape(whole))

    def free(self, part: Part) -> int:
        """Number of unconstrained coordinates of a measured part."""
        return math.prod(self._free_shape(part))


def _part(constraint: Constraint, start: int, size: int, shape: Size) -> Part:
    if constraint.is_discrete:
        least = 0 if constraint is constraints.boolean else getattr(constraint, "lower_bound", None)
        most = 1 if constraint is constraints.boolean else getattr(constraint, "upper_bound", None)
        whole = all(isinstance(end, int) or _is_scalar(end) for end in (least, most))
        if constraint.event_dim or least is None or most is None or not whole:
            raise ValueError(
                f"support {constraint}: counted values have a finite list, boolean or integer_interval(0, K - 1); got one "
                "without"
            )
        return Part(constraint, start, size, int(most) - int(least) + 1, int(least))
    try:
        biject_to(constraint).inverse_shape(shape)
    except NotImplementedError as error:
        raise ValueError(
            f"support {constraint}: torch knows no map of real numbers onto it; expected real, positive, interval, simplex, "
            "boolean, integer_interval, or constraints.cat of these"
        ) from error
    return Part(constraint, start, size)


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0
