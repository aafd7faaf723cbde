r"""A flow of coupling layers, each a conditional affine map of a monotonic rational-quadratic spline, cheap both ways.

    noise z -> data x:    x_moved = shift + exp(log_scale) spline(z_moved),   shift, log_scale, spline = network(kept)

Transforms and networks are zuko's; what is decided here is which elements are kept and which are moved in each layer.
An element can be told of another where that is kept and it is moved; so that everyone is told of everyone somewhere,
the layers in which an element moves must not all be among those of another. The most elements that k layers do for is
then C(k, k // 2) (Sperner): five do for ten, eight for seventy. Two halves that take turns, as is usual, leave out all
pairs within a half.

Durkan, Bekasov, Murray, Papamakarios: Neural spline flows (NeurIPS 2019). Dinh, Sohl-Dickstein, Bengio: Density estimation
using Real NVP (ICLR 2017). Sperner: Ein Satz über Untermengen einer endlichen Menge (1928).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pgen.distributions.quiet import zuko

_BINS = 8
_SHAPES = ((_BINS,), (_BINS,), (_BINS - 1,), (), ())
_FEWEST = 3


def couplings(features: int) -> zuko.lazy.LazyComposedTransform:
    """The learned part of a flow of so many elements, from noise to data; the identity at first."""
    options: dict[str, Any] = {"univariate": _bent, "shapes": _SHAPES}
    masks: Any = ~moving(features).T
    layers: list[Any] = [zuko.flows.GeneralCouplingTransform(features, mask=m, **options) for m in masks]
    for layer in layers:
        for parameter in (layer.hyper[-1] if features > 1 else layer).parameters():
            nn.init.zeros_(parameter)
    return zuko.lazy.LazyComposedTransform(*layers)


def _bent(widths: Tensor, heights: Tensor, slopes: Tensor, shift: Tensor, log_scale: Tensor) -> Transform:
    return zuko.transforms.ComposedTransform(
        zuko.transforms.MonotonicRQSTransform(widths, heights, slopes),
        zuko.transforms.MonotonicAffineTransform(shift, log_scale),
    )


def moving(features: int) -> Tensor:
    """Whether each element moves in each layer, `[features, layers]`: for any two, a layer where one moves and not the other.

    Example:
        >>> moving(3).int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    if features == 1:
        return torch.ones(1, 1, dtype=torch.bool)
    layers = next(k for k in itertools.count(_FEWEST) if math.comb(k, k // 2) >= features)
    codes = torch.zeros(math.comb(layers, layers // 2), layers)
    for code, ones in zip(codes, itertools.combinations(range(layers), layers // 2), strict=True):
        code[list(ones)] = 1.0
    counts, left = torch.zeros(layers), torch.ones(len(codes), dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(features):  # the code whose layers move the fewest so far
        best = int(torch.where(left, codes @ counts, math.inf).argmin())
        left[best] = False
        counts += codes[best]
        chosen.append(codes[best] > 0)
    found = torch.stack(chosen)
    return found[:, found.any(0)]


class Coupled(Transform):
    """The layers as they are now, from noise to data.

    A value and its determinant come together, so both are kept for the question after the value.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Callable[[], Any]) -> None:
        """Read the parameters."""
        super().__init__(cache_size=1)
        self.flow = flow()
        self._volume: Tensor | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, self._volume = self.flow.call_and_ladj(x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        self._volume = None
        return self.flow.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log determinant of the map from `x` to `y`."""
        if self._volume is None or self._cached_x_y[0] is not x or self._cached_x_y[1] is not y:
            return self.flow.call_and_ladj(x)[1]
        return self._volume
