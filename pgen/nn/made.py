"""Masked networks: the numbers at a place depend only on the values earlier in an order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgen.errors import DataError, OptionError


class MaskedLinear(nn.Linear):
    """A linear map some of whose connections are cut.

    Args:
        mask: boolean, shape `[outputs, inputs]`; False cuts the connection.
        bias: whether to add a bias.

    >>> layer = MaskedLinear(torch.tensor([[True, False]]), bias=False)
    >>> bool(layer(torch.tensor([0.0, 7.0])) == 0)
    True
    """

    mask: Tensor

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__(mask.shape[1], mask.shape[0], bias=bias)
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        return F.linear(input, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    r"""A masked autoencoder: one pass gives each place its numbers, from the places earlier in the order.

    Every hidden unit has a degree $m$: it hears of the first $m + 1$ places of the order, and the place of
    rank $q$ hears of units of degree less than $q$. Layers of equal width are residual. With a context some
    units hear of that alone, and everybody hears of them. A direct linear connection, masked too, joins
    values to numbers.

    Values that are levels 0, 1, ... are heard as two features, the level in [-1, 1] and whether it is zero.

    Args:
        features: the number of places D.
        outputs: how many numbers each place gets (a head's `size`).
        levels: the number of levels of a value, or None for real values, heard as they are (standardise
            them).
        hidden: widths of the hidden layers.
        dropout: share of hidden units left out at random while training.
        context: size of a context vector; 0 for none.
        order: a permutation of the places, first drawn first; None for the raster order.

    Raises:
        OptionError: `order` is not a permutation, or a width is not positive.
        DataError: (when called) values have not as many places as the network, or the context is missing or
            of a wrong size.

    References:
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, 2015.

    Example:
        >>> MADE(64, 6, levels=17)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 8, 8, 6])
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        levels: int | None = None,
        hidden: Sequence[int] = (512, 512),
        dropout: float = 0.0,
        context: int = 0,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        order = torch.arange(features) if order is None else order
        if sorted(order.tolist()) != list(range(features)):
            raise OptionError(
                f"MADE: order {order.tolist()} is not a permutation of 0..{features - 1}; e.g. "
                f"torch.randperm({features})"
            )
        if features < 1 or outputs < 1 or not hidden or min(hidden) < 1:
            raise OptionError(
                f"MADE(features={features}, outputs={outputs}, hidden={tuple(hidden)}): sizes must be "
                "positive, e.g. MADE(64, 6)"
            )
        self.features, self.outputs, self.levels = features, outputs, levels
        self.register_buffer("order", order)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(features))
        heard = rank.repeat_interleave(1 if levels is None else 2)
        lowest = -1 if context else 0
        degrees = [heard, *(lowest + torch.arange(width) % max(1, features - 1 - lowest) for width in hidden)]
        spoken = rank.repeat_interleave(outputs)
        self.layers = nn.ModuleList(
            MaskedLinear(high[:, None] >= low[None]) for low, high in pairwise(degrees)
        )
        self.last = MaskedLinear(spoken[:, None] > degrees[-1][None])
        self.direct = MaskedLinear(spoken[:, None] > heard[None], bias=False)
        self.context = nn.Linear(context, hidden[0]) if context else None
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.last.weight)  # begin with conditionals that hear of nothing
        nn.init.zeros_(self.direct.weight)

    def forward(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Numbers `[rows, *shape, outputs]` from values `[rows, *shape]` and a context `[rows, c]`."""
        flat = value.flatten(1)
        if flat.shape[1] != self.features:
            raise DataError(
                f"MADE got values of shape {tuple(value.shape)}; expected {self.features} places in a row: "
                f"MADE({flat.shape[1]}, ...)"
            )
        x = level_features(flat, self.levels, self.last.weight.dtype).flatten(1)
        hidden = self._first(x, context)
        for layer in self.layers[1:]:
            step = self.dropout(F.silu(layer(hidden)))
            hidden = hidden + step if step.shape == hidden.shape else step
        numbers = self.last(hidden) + self.direct(self.dropout(x))
        return numbers.unflatten(1, (*value.shape[1:], self.outputs))

    def _first(self, x: Tensor, context: Tensor | None) -> Tensor:
        heard = hear_context("MADE", self.context, context)
        hidden = self.layers[0](x)
        return self.dropout(F.silu(hidden if heard is None else hidden + heard))


def level_features(value: Tensor, levels: int | None, dtype: torch.dtype) -> Tensor:
    """What a network hears of values: levels in [-1, 1] and whether they are zero; real values as they are.

    Args:
        value: shape `[...]`.
        levels: the number of levels, or None for real values.
        dtype: of the result.

    Returns:
        Shape `[..., 2]`, or `[..., 1]` for real values.
    """
    number = value.to(dtype)
    if levels is None:
        return number[..., None]
    return torch.stack([number * (2.0 / (levels - 1)) - 1.0, (value == 0).to(dtype)], -1)


def hear_context(name: str, layer: nn.Linear | None, context: Tensor | None) -> Tensor | None:
    """What a network hears of its context, or None where it has none.

    Raises:
        DataError: there is a context and the network has no ear for it, or the reverse, or its size is wrong.
    """
    if layer is None and context is None:
        return None
    size = 0 if layer is None else layer.in_features
    if layer is None or context is None or context.shape[-1] != size:
        got = "none" if context is None else f"one of size {context.shape[-1]}"
        raise DataError(
            f"{name} got {got} as context, and was made for {size or 'none'}: {name}(..., "
            "context=SIZE)(value, context)"
        )
    return layer(context)
