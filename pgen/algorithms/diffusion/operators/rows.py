"""Operators that pick or average: masks, block means, grey from colours; and any matrix.

The first three have orthogonal rows of one length, A A' = s^2 I: that is their singular value decomposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgen.algorithms.diffusion.operators.base import LinearOperator, Spectrum, require_shape


class _OrthogonalRows(LinearOperator):
    """An operator with A A' = s^2 I."""

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def svd(self) -> Spectrum:
        """V' = A / s."""
        gain = self.gain
        values = torch.tensor(gain, dtype=torch.float64)
        return Spectrum(values, lambda x: self(x) / gain, lambda c: self.adjoint(c) / gain, self)


class Mask(_OrthogonalRows):
    """The elements where a mask is true, `[..., *mask.shape]` to `[..., n]`.

    Args:
        mask: of booleans; for images with channels, `[H, W]` keeps or drops all channels of a pixel together.

    Raises:
        ValueError: nothing is kept, or the mask is not of booleans.

    Example:
        >>> keep = Mask(torch.tensor([True, False, True]))
        >>> keep(torch.tensor([1.0, 2.0, 3.0])), keep.adjoint(torch.tensor([1.0, 3.0]))
        (tensor([1., 3.]), tensor([1., 0., 3.]))
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError(
                f"Mask: expected booleans, one of them true; got {mask.dtype}, {mask.sum()} true"
            )
        super().__init__(1.0)
        self.mask = mask
        self.index = mask.reshape(-1).nonzero()[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        """What is kept, `[..., n]`."""
        require_shape(self, x, self.mask.shape)
        return x.reshape((*x.shape[: x.dim() - self.mask.dim()], -1))[..., self.index.to(x.device)]

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros elsewhere."""
        index = self.index.to(y.device).expand(y.shape)
        full = y.new_zeros((*y.shape[:-1], self.mask.numel())).scatter(-1, index, y)
        return full.reshape(y.shape[:-1] + self.mask.shape)


class Downsample(_OrthogonalRows):
    """Means of blocks: every side of `[..., n_1, ..., n_k]` divided by a factor.

    Args:
        factor: side of a block; it must divide the sides of what is given.
        dims: how many trailing dimensions: 2 for images, 1 for series.

    Example:
        >>> Downsample(2, dims=1)(torch.tensor([1.0, 3.0, 10.0, 20.0]))
        tensor([ 2., 15.])
    """

    def __init__(self, factor: int, dims: int = 2) -> None:
        if factor < 1 or dims < 1:
            raise ValueError(f"Downsample(factor={factor}, dims={dims}): expected positive integers")
        super().__init__(factor ** (-dims / 2))
        self.factor, self.dims = factor, dims

    def __call__(self, x: Tensor) -> Tensor:
        """Block means."""
        sides = x.shape[x.dim() - self.dims :]
        if any(side % self.factor for side in sides):
            raise ValueError(
                f"Downsample({self.factor}): got sides {tuple(sides)}, expected multiples of the factor"
            )
        blocks = [size for side in sides for size in (side // self.factor, self.factor)]
        inside = [-2 * i - 1 for i in range(self.dims)]
        return x.reshape(x.shape[: x.dim() - self.dims] + tuple(blocks)).mean(inside)

    def adjoint(self, y: Tensor) -> Tensor:
        """Every mean shared out over its block."""
        for dim in range(-self.dims, 0):
            y = y.repeat_interleave(self.factor, dim)
        return y / self.factor**self.dims


class Greyscale(_OrthogonalRows):
    """A weighted mean over channels, kept as one channel: `[..., C, H, W]` to `[..., 1, H, W]`.

    Args:
        weights: of the channels, `[C]`; None: those of luma (ITU-R BT.601) for red, green and blue.
        dim: which dimension the channels are, counted from the end.

    Example:
        >>> Greyscale()(torch.ones(3, 1, 1)).shape
        torch.Size([1, 1, 1])
    """

    def __init__(self, weights: Tensor | None = None, dim: int = -3) -> None:
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) if weights is None else weights
        if dim >= 0 or weights.dim() != 1:
            raise ValueError(
                f"Greyscale(weights {tuple(weights.shape)}, dim={dim}): expected [C] and a negative dim"
            )
        super().__init__(float(weights.double().square().sum().sqrt()))
        self.weights = weights.reshape(-1, *[1] * (-dim - 1))
        self.dim = dim

    def __call__(self, x: Tensor) -> Tensor:
        """The weighted sum."""
        return (x * self.weights.to(x)).sum(self.dim, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """The grey, weighted, in every channel."""
        return y * self.weights.to(y)


@dataclass(frozen=True, eq=False)
class Dense(LinearOperator):
    """Any matrix, applied to flattened events.

    Attributes:
        matrix: `[m, D]`.
        event_shape: of what it takes, D numbers; None: `(D,)`.

    Example:
        >>> float(Dense(torch.tensor([[3.0, 4.0]])).svd().values)
        5.0
    """

    matrix: Tensor
    event_shape: tuple[int, ...] | None = None
    _svd: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.matrix.dim() != 2 or math.prod(self._event) != self.matrix.shape[1]:
            raise ValueError(
                f"Dense: got matrix {tuple(self.matrix.shape)}, event_shape {self.event_shape}; expected [m, D] and a "
                "shape of D numbers"
            )

    @property
    def _event(self) -> tuple[int, ...]:
        return self.matrix.shape[1:] if self.event_shape is None else tuple(self.event_shape)

    def __call__(self, x: Tensor) -> Tensor:
        """A x, `[..., m]`."""
        return x.reshape((*x.shape[: x.dim() - len(self._event)], -1)) @ self.matrix.to(x).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, `[..., *event_shape]`."""
        return (y @ self.matrix.to(y)).reshape(y.shape[:-1] + self._event)

    def svd(self) -> Spectrum:
        """By `torch.linalg.svd`, once; singular values at rounding error of the largest are taken for zero."""
        if not self._svd:
            _, values, right = torch.linalg.svd(self.matrix.double(), full_matrices=False)
            least = values.max() * max(self.matrix.shape) * torch.finfo(self.matrix.dtype).eps
            self._svd.append((values[values > least], right[values > least]))
        values, right = self._svd[0]
        flat = Dense(right, self._event)
        return Spectrum(values, flat, flat.adjoint, self)
