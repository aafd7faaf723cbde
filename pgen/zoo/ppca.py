"""Probabilistic principal component analysis: a latent-variable program with closed answers to everything."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pgen.errors import OptionError


class PPCA(nn.Module):
    r"""A few independent factors, seen through a linear map and noise (Tipping and Bishop 1999).

    .. math:: z \sim N(0, I_K), \qquad x \mid z \sim N(W z + b,\; \sigma^2 I_D)

    Sites: `z`, latent; `x`, the data. Everything is Gaussian, so `log_evidence` and `posterior` are exact:
    the yardstick for every backend that has to approximate them.

    Args:
        features: scalars D of one observation.
        latents: factors K.
        noise: first value of the standard deviation of the noise.

    Example:
        >>> program = PPCA(features=3, latents=2)
        >>> program.log_evidence(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, features: int = 64, latents: int = 8, noise: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, latents) / latents**0.5)
        self.bias = nn.Parameter(torch.zeros(features))
        self.log_noise = nn.Parameter(torch.tensor(float(noise)).log())

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        zero = self.bias.new_zeros(self.weight.shape[1])
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            return pyro.sample(
                "x", dist.Normal(z @ self.weight.T + self.bias, self.log_noise.exp()).to_event(1)
            )

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""Exact $\log N(x;\, b,\, W W^\top + \sigma^2 I)$ of rows `[n, D]`, shape `[n]`."""
        variance = (2 * self.log_noise).exp().expand(len(self.bias))
        return dist.LowRankMultivariateNormal(self.bias, self.weight, variance).log_prob(x)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        r"""Exact law of the factors given rows `[n, D]`: $N(M^{-1} W^\top (x - b),\; \sigma^2 M^{-1})$.

        Here $M = W^\top W + \sigma^2 I$.
        """
        variance = (2 * self.log_noise).exp()
        precision = self.weight.T @ self.weight / variance + torch.eye(self.weight.shape[1]).to(self.weight)
        mean = torch.linalg.solve(precision, self.weight.T @ (x - self.bias).T / variance).T
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    @classmethod
    def most_likely(cls, x: Tensor, latents: int = 8) -> PPCA:
        """The program of highest likelihood for rows `[n, D]`, from their principal components.

        Raises:
            OptionError: there are not fewer factors than features.
        """
        rows, features = x.shape
        if not 0 < latents < features:
            raise OptionError(
                f"PPCA.most_likely: {latents} factors of {features} features; expected 1 to {features - 1}"
            )
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / rows)
        variance = values[:-latents].mean()
        program = cls(features, latents).to(x)
        with torch.no_grad():
            scales = (values[-latents:] - variance).clamp_min(0).sqrt()
            program.weight.copy_(vectors[:, -latents:] * scales)
            program.bias.copy_(mean)
            program.log_noise.copy_(variance.log() / 2)
        return program
