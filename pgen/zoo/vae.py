"""A variational autoencoder's program: the decoder. How latents are inferred is the backend's business."""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pgen.distributions import Bernoulli, Categorical, Head, Ordinal
from pgen.errors import OptionError

Likelihood = Literal["ordinal", "categorical", "bernoulli"]


class VAE(nn.Module):
    r"""Independent Gaussian latents, decoded into the law of every pixel (Kingma and Welling 2014).

    .. math:: z \sim N(0, I), \qquad x_i \mid z \sim \text{Head}\big(f(z)_i\big)

    Sites: `z`, latent; `x`, the data. There is no encoder here: a guide belongs to inference, and the
    variational backend makes one from the program. `Encoder` is one by hand, to compare.

    Args:
        latents: scalars of `z`.
        features: scalars of `x`.
        levels: levels of a pixel.
        hidden: width of the decoder's hidden layer.
        dropout: share of hidden units left out at random while training.
        likelihood: `"ordinal"`, a categorical whose logits are smooth in the level; `"categorical"`, with
            free logits; `"bernoulli"`, for black and white; None for `"bernoulli"` where there are two levels
            and `"ordinal"` where there are more.

    Raises:
        OptionError: a Bernoulli likelihood for more than two levels.

    Example:
        >>> from pyro import poutine
        >>> poutine.trace(VAE()).get_trace(5).nodes["x"]["value"].shape
        torch.Size([5, 64])
    """

    zero: Tensor

    def __init__(
        self,
        latents: int = 16,
        features: int = 64,
        levels: int = 17,
        hidden: int = 256,
        dropout: float = 0.3,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(latents), persistent=False)
        self.head = head_for(levels, likelihood)
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
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            return pyro.sample("x", self.head(self.decoder(z)).to_event(1))


class Encoder(nn.Module):
    r"""A guide for `VAE` by hand: $q(z \mid x) = N\big(\mu(x), \text{diag}(\sigma(x)^2)\big)$.

    Args:
        latents: as in the program.
        features: as in the program.
        levels: as in the program.
        hidden: width of both hidden layers.
    """

    def __init__(self, latents: int = 16, features: int = 64, levels: int = 17, hidden: int = 256) -> None:
        super().__init__()
        self.levels = levels
        self.network = nn.Sequential(
            nn.Linear(features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latents),
        )

    def forward(self, x: Tensor) -> None:
        """The guide: `x` holds pixels, shape `[n, features]`."""
        pixels = x.to(next(self.parameters()).dtype)
        numbers = self.network(pixels * (2.0 / (self.levels - 1)) - 1.0)
        mean, scale = numbers.chunk(2, -1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(mean, nn.functional.softplus(scale) + 1e-4).to_event(1))


def head_for(levels: int, likelihood: Likelihood | None = None) -> Head:
    """The law of one pixel of so many levels.

    Raises:
        OptionError: no such likelihood, or a Bernoulli for more than two levels.
    """
    chosen = likelihood or ("bernoulli" if levels == 2 else "ordinal")
    if chosen == "ordinal":
        return Ordinal(levels)
    if chosen == "categorical":
        return Categorical(levels)
    if chosen == "bernoulli" and levels == 2:
        return Bernoulli()
    raise OptionError(
        f"likelihood={likelihood!r} for {levels} levels; expected 'ordinal' or 'categorical', or 'bernoulli' "
        "with levels=2"
    )
