"""The Radon transform of an image: sums along parallel rays, as in tomography."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgen.algorithms.diffusion.operators.base import LinearOperator, require_shape


class Radon(LinearOperator):
    r"""Line integrals at some angles: `[..., H, W]` to `[..., angles, detectors]`, by bilinear interpolation.

    At angle theta, the ray of the detector at u from the centre goes through the points

        (column, row) = centre + u (cos theta, sin theta) + v (-sin theta, cos theta)

    and the image is read at unit steps of v. Outside the image it is zero. Kept as a matrix, of about 4 H numbers a ray
    that are not zero (sparse, where it is large), so that the adjoint (back-projection) is exact.

    Args:
        angles: in radians: a tensor, or a number of them, to be spread evenly over [0, pi).
        size: of the image, `(H, W)`.
        detectors: rays per angle, one pixel apart; None: as many as the longer side.

    Example:
        >>> image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> Radon(torch.tensor([0.0]), (2, 2))(image)
        tensor([[4., 6.]])
    """

    def __init__(self, angles: Tensor | int, size: Sequence[int], detectors: int | None = None) -> None:
        if isinstance(angles, int):
            angles = torch.arange(angles, dtype=torch.float64) * (math.pi / angles)
        height, width = self.size = tuple(size)
        self.angles = angles.double().cpu()
        self.detectors = max(self.size) if detectors is None else detectors
        if angles.dim() != 1 or not len(angles) or self.detectors < 1:
            raise ValueError(
                f"Radon: got angles {tuple(angles.shape)}, {detectors} detectors; expected some of both"
            )
        steps = math.ceil(math.hypot(height, width))
        steps += (steps - height) % 2  # so that at angle 0 the points are pixels
        u = torch.arange(self.detectors, dtype=torch.float64) - (self.detectors - 1) / 2
        v = torch.arange(steps, dtype=torch.float64) - (steps - 1) / 2
        cos, sin = self.angles.cos()[:, None, None], self.angles.sin()[:, None, None]
        column = (width - 1) / 2 + u[:, None] * cos - v * sin  # [angles, detectors, steps]
        row = (height - 1) / 2 + u[:, None] * sin + v * cos
        ray = torch.arange(len(angles) * self.detectors).reshape(len(angles), -1, 1).expand_as(row)
        places, weights = list[Tensor](), list[Tensor]()
        for right in (0, 1):  # the four neighbours of a point
            for below in (0, 1):
                j, i = column.floor() + right, row.floor() + below
                weight = (1 - (column - j).abs()) * (1 - (row - i).abs())
                inside = (weight > 1e-12) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
                places.append(torch.stack([ray[inside], (i * width + j).long()[inside]]))
                weights.append(weight[inside])
        shape = (len(angles) * self.detectors, height * width)
        at, values = torch.cat(places, 1), torch.cat(weights)
        self._matrices: dict[object, tuple[Tensor, Tensor]] = {}
        self._matrix = torch.sparse_coo_tensor(at, values, shape, check_invariants=True).coalesce()

    def __call__(self, x: Tensor) -> Tensor:
        """The sinogram."""
        require_shape(self, x, self.size)
        matrix, _ = self._as(x)
        found = _times(matrix, x.reshape(-1, matrix.shape[1]))
        return found.reshape((*x.shape[:-2], len(self.angles), self.detectors))

    def adjoint(self, y: Tensor) -> Tensor:
        """Back-projection."""
        _, transposed = self._as(y)
        found = _times(transposed, y.reshape(-1, transposed.shape[1]))
        return found.reshape(y.shape[:-2] + self.size)

    def _as(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix and its transpose on a device, in a dtype."""
        kind = (like.device, like.dtype)
        if kind not in self._matrices:
            matrix = self._matrix.to(device=like.device, dtype=like.dtype)
            small = matrix.shape.numel() <= _SMALL
            both = (matrix.to_dense(), matrix.t().to_dense()) if small else (matrix, matrix.t().coalesce())
            self._matrices[kind] = both
        return self._matrices[kind]


_SMALL = 1 << 22
"""Numbers in a matrix that is kept in full: faster, and `torch.vmap` knows how to multiply it."""


def _times(matrix: Tensor, rows: Tensor) -> Tensor:
    """A matrix, sparse or not, times each row."""
    return torch.sparse.mm(matrix, rows.mT).mT if matrix.is_sparse else rows @ matrix.mT
