"""Self-conditioning: a network that is given its own first guess, and is a function of its inputs all the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgen.errors import DataError


class SelfConditioned(nn.Module):
    r"""A network that sees its own first guess beside its input, to be put inside `Preconditioned`.

    .. math:: F(z) = N([z, g]), \qquad g = N([z, 0])

    While training, a random half of the rows is given no guess (zeros), so that the first guess is learned as well, and no
    gradient goes into guesses. In evaluation mode the guess is always made, and gradients go through all of it. The
    authors' sampler hands a guess from step to step; here each evaluation makes its own, and takes twice the time: so F
    depends on its inputs alone, and whatever takes a denoiser (solvers, likelihoods, posteriors) can have it.

    Args:
        network: `network(z, noise[, context])`, of values of twice the channels (the first dimension of an event) to
            values of the given ones: `UNet(2, outputs=1)`, `DenoiserMLP(4, outputs=2)`.
        share: of the rows that are given a guess while training.

    Raises:
        DataError: (when called) the network's answer does not have the shape of its input.

    References:
        Chen, Zhang & Hinton, Analog Bits: Generating Discrete Data using Diffusion Models with Self-Conditioning,
        ICLR 2023.

    Example:
        >>> from pgen.nn import DenoiserMLP, Preconditioned
        >>> denoiser = Preconditioned(SelfConditioned(DenoiserMLP(4, outputs=2)), sigma_data=1.0)
        >>> denoiser(torch.zeros(5, 2), torch.ones(5)).shape
        torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module, share: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.share = share

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x `[B, *event]`, noise features `[B]` and a context `[B, c]` to the shape of x."""
        if x.dim() < 2:
            raise DataError(
                "SelfConditioned got numbers without an event shape; expected values [B, channels, ...]: "
                "Diffusion(..., event_shape=(1,))"
            )
        if not self.training:
            return self._given(self._given(torch.zeros_like(x), x, noise, context), x, noise, context)
        with torch.no_grad():
            guess = self._given(torch.zeros_like(x), x, noise, context)
            has = torch.rand(len(x), dtype=x.dtype, device=x.device) < self.share
            guess = torch.where(has.reshape(-1, *[1] * (x.dim() - 1)), guess, 0.0)
        return self._given(guess, x, noise, context)

    def _given(self, guess: Tensor, x: Tensor, noise: Tensor, context: Tensor | None) -> Tensor:
        both = torch.cat([x, guess], 1)
        found = self.network(both, noise) if context is None else self.network(both, noise, context)
        if found.shape != x.shape:
            raise DataError(
                f"SelfConditioned: the network gave {tuple(found.shape)} for values {tuple(x.shape)} and guesses; expected "
                "the shape of the values: UNet(2 * channels, outputs=channels)"
            )
        return found
