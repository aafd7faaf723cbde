"""A hierarchical variational autoencoder's program: two layers of latents, one above the other."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pgen.nn import MLP
from pgen.zoo.vae import Likelihood, head_for


class HVAE(nn.Module):
    r"""What an image is about, then how it looks, then its pixels (Sønderby et al. 2016).

    .. math::
        a \sim N(0, I), \qquad z \mid a \sim N\big(\mu(a), \text{diag}(\sigma(a)^2)\big), \qquad
        x_i \mid z \sim \text{Head}\big(f(z)_i\big)

    Sites: `above` and `z`, latent; `x`, the data.

    Args:
        above: scalars of the upper latent.
        latents: scalars of the lower latent `z`.
        features: scalars of `x`.
        levels: levels of a pixel.
        hidden: width of the hidden layers.
        dropout: share of the decoder's hidden units left out at random while training.
        likelihood: see `VAE`.

    Raises:
        OptionError: a Bernoulli likelihood for more than two levels.

    Example:
        >>> from pyro import poutine
        >>> poutine.trace(HVAE()).get_trace(5).nodes["z"]["value"].shape
        torch.Size([5, 16])
    """

    zero: Tensor

    def __init__(
        self,
        above: int = 8,
        latents: int = 16,
        features: int = 64,
        levels: int = 17,
        hidden: int = 256,
        dropout: float = 0.3,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(above), persistent=False)
        self.head = head_for(levels, likelihood)
        self.prior = MLP(above, 2 * latents, hidden=(hidden,))
        self.decoder = nn.Sequential(
            nn.Linear(latents, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, features * self.head.size),
            nn.Unflatten(-1, (features, self.head.size)),
        )

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            above = pyro.sample("above", dist.Normal(self.zero, 1.0).to_event(1))
            mean, scale = self.prior(above).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(mean, softplus(scale) + 1e-3).to_event(1))
            return pyro.sample("x", self.head(self.decoder(z)).to_event(1))
