"""Causal convolutions over images: a pixel hears of those above it and to its left."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgen.errors import DataError, OptionError
from pgen.nn.made import hear_context, level_features


class CausalConv2d(nn.Conv2d):
    """A convolution that hears of earlier pixels in raster order, not of the pixel itself nor of later ones.

    Args:
        inputs: channels in.
        outputs: channels out.
        window: side of the square window, odd; its upper half and left are in use.

    Raises:
        OptionError: `window` is even.

    >>> CausalConv2d(1, 4, 3)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, window: int) -> None:
        if window % 2 == 0:
            raise OptionError(
                f"CausalConv2d(window={window}): a window has a middle, so its side is odd; e.g. {window + 1}"
            )
        super().__init__(inputs, outputs, window, padding=window // 2)
        mask = torch.zeros(window, window)
        mask[: window // 2] = 1
        mask[window // 2, : window // 2] = 1
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[rows, inputs, H, W]` to `[rows, outputs, H, W]`."""
        return F.conv2d(input, self.weight * self.mask, self.bias, padding=self.padding)


class CausalConv(nn.Module):
    r"""One wide causal convolution, then residual blocks of 1x1 convolutions that know where they are.

    Weights are shared by all pixels, which is why a thousand images suffice; what is particular to a place
    comes from a learned offset at every block. As the window alone looks at neighbours, the law at a pixel
    depends on `(window // 2)` rows above it.

    Args:
        shape: height and width of an image.
        outputs: how many numbers each pixel gets (a head's `size`).
        levels: the number of levels of a pixel, or None for real values, heard as they are (standardise
            them).
        channels: width of the blocks.
        window: side of the causal window, odd.
        blocks: how many residual blocks.
        dropout: share of hidden units left out at random while training.
        context: size of a context vector; 0 for none.

    Raises:
        DataError: (when called) a row has not `H * W` values, or the context is missing or of a wrong size.

    References:
        van den Oord, Kalchbrenner and Kavukcuoglu, *Pixel Recurrent Neural Networks*, 2016.

    Example:
        >>> CausalConv((8, 8), 6, levels=17)(torch.zeros(5, 64)).shape
        torch.Size([5, 64, 6])
    """

    def __init__(
        self,
        shape: tuple[int, int],
        outputs: int,
        *,
        levels: int | None = None,
        channels: int = 96,
        window: int = 7,
        blocks: int = 2,
        dropout: float = 0.3,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.levels = shape, levels
        self.first = CausalConv2d(1 if levels is None else 2, channels, window)
        self.place = nn.Parameter(0.3 * torch.randn(channels, *shape))
        self.blocks = nn.ModuleList(_Block(channels, shape, dropout) for _ in range(blocks))
        self.last = nn.Conv2d(channels, outputs, 1)
        self.offset = nn.Parameter(torch.zeros(outputs, *shape))
        self.context = nn.Linear(context, channels) if context else None
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.last.weight)  # begin with conditionals that hear of nothing

    def forward(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Numbers `[rows, *value.shape[1:], outputs]` from images, flat or not, and a context `[rows, c]`."""
        height, width = self.shape
        if value[0].numel() != height * width:
            raise DataError(
                f"CausalConv{self.shape} got values of shape {tuple(value.shape)}; expected {height * width} "
                "pixels in a row"
            )
        image = value.reshape(-1, height, width)
        x = level_features(image, self.levels, self.last.weight.dtype).permute(0, 3, 1, 2)
        hidden = self.first(x) + self.place
        heard = hear_context("CausalConv", self.context, context)
        if heard is not None:
            hidden = hidden + heard[..., None, None]
        for block in self.blocks:
            hidden = block(hidden)
        numbers = self.last(self.dropout(F.silu(hidden))) + self.offset
        return numbers.permute(0, 2, 3, 1).reshape(*value.shape, -1)


class _Block(nn.Module):
    """A residual block of two 1x1 convolutions, with an offset for every place; zero at first."""

    def __init__(self, channels: int, shape: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(channels, *shape))
        self.inner, self.outer = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.silu(self.inner(F.silu(hidden + self.place)))
        return hidden + self.outer(self.dropout(inner))
