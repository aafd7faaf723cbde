"""A small U-Net over images of any size from 8 x 8 upwards, told the noise level and a context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgen.errors import DataError, OptionError
from pgen.nn.embedding import NoiseEmbedding


class UNet(nn.Module):
    """Residual blocks at falling resolution and back up, with skips across, for images `[B, C, H, W]`.

    Every block is two 3x3 convolutions with group normalisation and SiLU, modulated by an embedding of noise level and
    context. Going down halves the image (odd sides round up), going up goes back to the size that was; so sides need
    not be powers of two. The output is zero at first.

    Args:
        channels: of the images.
        width: channels of the first resolution.
        multipliers: channels of each resolution, in units of `width`.
        blocks: residual blocks at each resolution, going down; one more going up.
        attention: at which resolutions (0 the finest) pixels attend to each other; the coarsest one's middle always
            has attention unless this is empty.
        dropout: share of hidden channels left out while training.
        context: size of a context vector; 0 for none.
        outputs: channels of the output; None: those of the images.

    Raises:
        OptionError: a size is not a positive whole number, or there is no such resolution.
        DataError: (when called) an image has other channels, or the context is missing or of a wrong size.

    References:
        Ronneberger, Fischer & Brox, U-Net, MICCAI 2015. Ho, Jain & Abbeel, NeurIPS 2020.

    Example:
        >>> net = UNet(1, width=16, context=10)
        >>> net(torch.zeros(2, 1, 9, 11), torch.zeros(2), torch.zeros(2, 10)).shape
        torch.Size([2, 1, 9, 11])
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        *,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        context: int = 0,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        _check_unet(channels, width, multipliers, blocks, attention)
        self.channels = channels
        embedded = 4 * width
        self.embedding = NoiseEmbedding(embedded, context)
        sizes = [width * m for m in multipliers]
        self.first = nn.Conv2d(channels, sizes[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        size, skips = sizes[0], [sizes[0]]
        for level, wide in enumerate(sizes):
            for _ in range(blocks):
                self.down.append(_Block(size, wide, embedded, dropout, level in attention))
                size = wide
                skips.append(size)
            if level + 1 < len(sizes):
                self.down.append(_Down(size))
                skips.append(size)
        self.middle = nn.ModuleList(
            [
                _Block(size, size, embedded, dropout, bool(attention)),
                _Block(size, size, embedded, dropout, False),
            ]
        )
        for level, wide in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(_Block(size + skips.pop(), wide, embedded, dropout, level in attention))
                size = wide
            if level:
                self.up.append(_Up(size))
        self.norm = _norm(size)
        self.last = nn.Conv2d(size, channels if outputs is None else outputs, 3, padding=1)
        _zero(self.last)

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images `[B, C, H, W]`, noise features `[B]` and a context `[B, c]` to `[B, outputs, H, W]`."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise DataError(f"UNet got values of shape {tuple(x.shape)}; expected [B, {self.channels}, H, W]")
        embedded = self.embedding(noise, context)
        hidden = self.first(x)
        skips = [hidden]
        for module in self.down:
            hidden = module(hidden, embedded)
            skips.append(hidden)
        for module in self.middle:
            hidden = module(hidden, embedded)
        for module in self.up:
            if isinstance(module, _Up):
                hidden = module(hidden, skips[-1].shape[-2:])
            else:
                hidden = module(torch.cat([hidden, skips.pop()], 1), embedded)
        return self.last(F.silu(self.norm(hidden)))


class _Block(nn.Module):
    """Two convolutions beside a skip, and attention; the second convolution is zero at first."""

    def __init__(self, inputs: int, outputs: int, embedded: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedded, 2 * outputs)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attention else nn.Identity()
        _zero(self.conv2)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedded)[..., None, None].chunk(2, 1)
        hidden = self.dropout(F.silu(self.norm2(hidden) * (1 + scale) + shift))
        return self.attention(self.skip(x) + self.conv2(hidden))


class _Attention(nn.Module):
    """Every pixel looks at every other, in heads of up to 64 channels; adds nothing at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 64))
        self.norm, self.inner = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.outer = nn.Conv2d(channels, channels, 1)
        _zero(self.outer)

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        split = self.inner(self.norm(x)).reshape(rows, 3, self.heads, channels // self.heads, height * width)
        query, key, value = split.transpose(-1, -2).unbind(1)
        weights = (query @ key.mT / math.sqrt(channels // self.heads)).softmax(-1)
        # written out: the fused kernels have no second derivative, which energies and divergences ask for
        return x + self.outer((weights @ value).transpose(-1, -2).reshape(rows, channels, height, width))


class _Down(nn.Module):
    """Half the size, odd sides rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.conv(x)


class _Up(nn.Module):
    """The size that a skip has: each pixel repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        twice = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.conv(twice[..., : size[0], : size[1]])


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of 4 channels or more, at most 32 of them."""
    groups = min(32, max(1, channels // 4))
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check_unet(
    channels: int, width: int, multipliers: Sequence[int], blocks: int, attention: Sequence[int]
) -> None:
    sizes = (channels, width, blocks, *multipliers)
    if not multipliers or min(sizes) < 1 or not set(attention) <= set(range(len(multipliers))):
        raise OptionError(
            f"UNet({channels}, width={width}, multipliers={tuple(multipliers)}, blocks={blocks}, "
            f"attention={tuple(attention)}): expected positive whole numbers, and attention at resolutions from 0 to "
            f"{len(multipliers) - 1}"
        )
