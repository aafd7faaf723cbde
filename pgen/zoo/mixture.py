"""A Gaussian mixture: one discrete latent for each row, which can be summed out exactly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Mixture(nn.Module):
    r"""Each row comes from one of a few Gaussians with independent coordinates.

    .. math:: k \sim \text{Categorical}(\pi), \qquad x \mid k \sim N\big(\mu_k,\; \text{diag}(\sigma_k^2)\big)

    Sites: `component`, latent; `x`, the data. Weights, means and scales are learned.

    Args:
        features: scalars of one observation.
        components: Gaussians in the mixture.
        spread: standard deviation of the first means, which are drawn at random so that components differ.

    Example:
        >>> from pyro import poutine
        >>> trace = poutine.trace(Mixture(features=2, components=3)).get_trace(5)
        >>> trace.nodes["x"]["value"].shape
        torch.Size([5, 2])
    """

    def __init__(self, features: int = 2, components: int = 8, spread: float = 1.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(spread * torch.randn(components, features))
        self.log_scales = nn.Parameter(torch.zeros(components, features))

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            k = pyro.sample("component", dist.Categorical(logits=self.logits))
            return pyro.sample("x", dist.Normal(self.means[k], self.log_scales[k].exp()).to_event(1))
