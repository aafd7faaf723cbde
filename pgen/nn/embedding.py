"""What networks are told of a noise level and a condition, as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgen.errors import DataError, OptionError


class NoiseEmbedding(nn.Module):
    """Fourier features of the noise feature, through a perceptron, and a context added to it.

    Args:
        width: of the embedding.
        context: size of a context vector; 0 for none.
        frequencies: number of Fourier features; their frequencies are quantiles of a half-normal law.

    Raises:
        DataError: (when called) the context is missing or of a wrong size.

    Example:
        >>> NoiseEmbedding(16, context=3)(torch.zeros(5), torch.zeros(5, 3)).shape
        torch.Size([5, 16])
    """

    frequencies: Tensor

    def __init__(self, width: int, context: int = 0, frequencies: int = 16) -> None:
        super().__init__()
        if min(width, frequencies) < 1 or context < 0:
            raise OptionError(
                f"NoiseEmbedding(width={width}, context={context}, frequencies={frequencies}): expected positive whole "
                "numbers"
            )
        level = (torch.arange(frequencies, dtype=torch.float64) + 0.5) / frequencies
        frequency = 2 * math.pi * torch.special.ndtri((1 + level) / 2)
        self.register_buffer("frequencies", frequency.to(torch.get_default_dtype()))
        self.first, self.second = nn.Linear(2 * frequencies + 1, width), nn.Linear(width, width)
        self.context = nn.Linear(context, width) if context else None
        self.null = nn.Parameter(torch.zeros(context)) if context else None  # stands for no condition

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Embed noise features `[B]` and a context `[B, c]`: `[B, width]`."""
        phase = noise.unsqueeze(-1) * self.frequencies
        hidden = self.second(
            F.silu(self.first(torch.cat([noise.unsqueeze(-1), phase.sin(), phase.cos()], -1)))
        )
        if self.context is None or self.null is None:
            if context is not None:
                raise DataError(
                    f"a network without a context got one of shape {tuple(context.shape)}; expected none"
                )
            return F.silu(hidden)
        if context is None or context.shape[-1:] != self.null.shape:
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            raise DataError(
                f"got {got} as context; expected [B, {len(self.null)}], with rows of NaN for no condition"
            )
        missing = context.isnan().any(-1, keepdim=True)
        return F.silu(hidden + self.context(torch.where(missing, self.null, context)))
