"""Autoregressive programs: one site, an exact log probability, one value drawn after the other."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pgen.distributions import Autoregressive, GaussianMixture, Head
from pgen.nn import MADE, CausalConv
from pgen.zoo.vae import Likelihood, head_for


class MaskedAutoencoder(nn.Module):
    r"""MADE (Germain et al. 2015): every scalar from those before it, by one masked network.

    .. math:: p(x) = \prod_i p(x_i \mid x_1, \ldots, x_{i-1})

    Site: `x`, the data. Levels get an ordinal law (see `VAE` for others), real values a mixture of Gaussians.

    Args:
        features: scalars of `x`.
        levels: levels of a scalar, or None for real values.
        hidden: width of both hidden layers.
        dropout: share of hidden units left out at random while training.
        likelihood: see `VAE`; for levels only.
        order: a permutation of the scalars, first drawn first; None for the order in which they stand. Programs
            of several orders, their probabilities averaged, are better than each of them.

    Example:
        >>> from pyro import poutine
        >>> poutine.trace(MaskedAutoencoder(features=4, hidden=32)).get_trace(5).nodes["x"]["value"].shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        features: int = 64,
        levels: int | None = 17,
        hidden: int = 512,
        dropout: float = 0.3,
        likelihood: Likelihood | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.head: Head = GaussianMixture(8) if levels is None else head_for(levels, likelihood)
        self.network = MADE(
            features, self.head.size, levels=levels, hidden=(hidden, hidden), dropout=dropout, order=order
        )

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", Autoregressive(self.network, (self.features,), self.head))


class CausalImage(nn.Module):
    r"""An image, pixel after pixel, each from those above and to its left, by causal convolution (PixelCNN).

    Weights are shared by all pixels, so it needs fewer images than `MaskedAutoencoder`; it costs more to
    train and draw from.

    Site: `x`, the data: the flattened image.

    Args:
        image: height and width.
        levels: levels of a pixel.
        channels: width of the network.
        window: side of the causal window, odd.
        dropout: share of hidden units left out at random while training.
        likelihood: see `VAE`.

    Example:
        >>> from pyro import poutine
        >>> poutine.trace(CausalImage((4, 4), channels=8)).get_trace(5).nodes["x"]["value"].shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        image: tuple[int, int] = (8, 8),
        levels: int = 17,
        channels: int = 96,
        window: int = 7,
        dropout: float = 0.3,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.pixels = image[0] * image[1]
        self.head = head_for(levels, likelihood)
        self.network = CausalConv(
            image, self.head.size, levels=levels, channels=channels, window=window, dropout=dropout
        )

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", Autoregressive(self.network, (self.pixels,), self.head))
