"""A space seen in coordinates of another unit in every row, so that chains of several widths can move in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.energy.reference import Law, Reference, References
from pgen.algorithms.energy.space import Space

_DRAWS = 256  # of a law, by which its width is told


@dataclass(frozen=True)
class Scaled:
    """The coordinates q of a space as q = factor u, where kernels move u: a `Space` as far as `Moves` is concerned.

    Attributes:
        space: of the values.
        factor: `[R, d]`; row i of values has that of i mod R.

    Example:
        >>> from torch.distributions import constraints
        >>> frame = Scaled(Space.of(constraints.real, (1,)), torch.tensor([[10.0], [1.0]]))
        >>> u, z = frame.apart(torch.tensor([[30.0], [3.0]]))
        >>> u
        tensor([[3.],
                [3.]])
        >>> frame.together(u, z)
        tensor([[30.],
                [ 3.]])
    """

    space: Space
    factor: Tensor

    @property
    def dims(self) -> int:
        """See `Space`."""
        return self.space.dims

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """See `Space`."""
        return self.space.cardinalities

    @property
    def binary(self) -> bool:
        """See `Space`."""
        return self.space.binary

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates u `[C, d]` and indices `[C, m]`."""
        q, z = self.space.apart(x)
        return q / self._rows(q), z

    def together(self, u: Tensor, z: Tensor) -> Tensor:
        """Values `[C, *event]`."""
        return self.space.together(u * self._rows(u), z)

    def volume(self, u: Tensor) -> Tensor:
        """Log determinant `[C]` of the change from q to values: the factor is a constant of each row."""
        return self.space.volume(u * self._rows(u))

    def _rows(self, u: Tensor) -> Tensor:
        return self.factor.repeat(len(u) // len(self.factor), 1)


def widths(law: Law, space: Space, laws: int = 1) -> Tensor:
    """Standard deviations of the coordinates of a law, of each of several, as draws tell them: `[laws, d]`."""
    with torch.no_grad():
        drawn = law.sample(_DRAWS * laws)
        fitted = Reference(drawn, space) if laws == 1 else References(drawn, space, laws)
        return fitted.root.diagonal(dim1=-2, dim2=-1).reshape(laws, space.dims)


def scaled_to(law: Law, space: Space, laws: int = 1) -> Scaled:
    """A space in units of the standard deviations of a law."""
    return Scaled(space, widths(law, space, laws))
