"""A diffusion as a program: one site, a denoising network; and, for levels, a bound on their mass."""

from __future__ import annotations

import math

import pyro
from torch import Tensor, nn

from pgen.distributions import EDM, Diffusion, Quantized, Schedule
from pgen.nn import DenoiserMLP, Preconditioned, UNet

_LEAST = 1 / 12
"""Least noise level, of a cell's width: below, there is nothing to learn but the edges of cells, which networks get wrong."""


class DenoisingDiffusion(nn.Module):
    r"""Data as what is left when noise is removed, by a network that is told how much there is.

    .. math:: D_\theta(x, \sigma) \approx E[x_0 \mid x_0 + \sigma \varepsilon = x]

    Site: `x`, the data. With `levels`, the data are whole numbers, and the site is the diffusion seen through as many
    cells over $[-1, 1]$: its likelihood is then bounded from below and stays a *mass*.

    Args:
        features: scalars of `x`.
        levels: levels of a scalar, or None for real values.
        image: height and width, for a convolutional network; None for a perceptron.
        width: of the network: channels of a convolutional one, hidden units of a perceptron.
        blocks: of the perceptron.
        sigma_data: standard deviation of the data (over $[-1, 1]$, where there are levels).
        schedule: noise levels; None: `EDM`, whose least one is then a twelfth of a cell's width, where there are levels.
        dropout: share of hidden channels left out at random while training a convolutional network.

    Example:
        >>> import torch
        >>> DenoisingDiffusion(features=2).law().denoise(torch.zeros(5, 2), 1.0).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int = 64,
        levels: int | None = None,
        image: tuple[int, int] | None = None,
        width: int | None = None,
        blocks: int = 3,
        sigma_data: float = 0.7,
        schedule: Schedule | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.features, self.levels = features, levels
        if schedule is None:
            schedule = EDM() if levels is None else EDM(sigma_min=_LEAST * 2.0 / levels)
        self.schedule = schedule
        network: nn.Module
        if image is None:
            network = DenoiserMLP(features, hidden=(width or 256,) * blocks)
        else:
            network = _Flat(UNet(features // math.prod(image), width=width or 32, dropout=dropout), image)
        self.denoiser = Preconditioned(network, sigma_data=sigma_data)

    def law(self) -> Diffusion | Quantized:
        """The law of `x`."""
        law = Diffusion(self.denoiser, self.schedule, (self.features,))
        return law if self.levels is None else Quantized(law, self.levels, low=-1.0, width=2.0 / self.levels)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", self.law())


class _Flat(nn.Module):
    """A network of images as one of vectors."""

    def __init__(self, network: UNet, image: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.image = network, image

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        images = x.reshape(len(x), -1, *self.image)
        return self.network(images, noise).reshape(x.shape)
