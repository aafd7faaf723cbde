r"""The law at the largest noise level: where an ODE likelihood ends and sampling starts.

At noise level sigma data of mean m and covariance C are close to N(m, C + sigma^2 I), and only in the limit to
N(0, sigma^2 I): a mean that is left out biases the log density by -|m|^2 / (2 sigma^2) and more for every single value,
which for values that are not centred is many nats. The denoiser itself knows both moments. For a Gaussian

    D(x, sigma) = m + C (C + sigma^2 I)^-1 (x - m)

so m is where D(x) = x, and C = sigma^2 J (I - J)^-1 with J its Jacobian there; for any other data what is left is of the
third order in their width over sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.divergence import Jacobian
from pgen.algorithms.diffusion.field import Field


@dataclass(frozen=True, eq=False)
class Terminal:
    """A normal law of values with noise, N(mean, spread + sigma^2 I).

    Attributes:
        sigma: noise level.
        mean: `[*event]`, or `[B, *event]` with one law for every row.
        spread: covariance of the values without noise: variances, broadcast against `mean`; or `[D, D]` or `[B, D, D]`
            where `full`.
        full: whether `spread` holds matrices.

    Example:
        >>> Terminal(3.0, torch.zeros(2), torch.tensor(7.0)).log_prob(torch.zeros(1, 2))
        tensor([-4.6105])
    """

    sigma: float
    mean: Tensor
    spread: Tensor
    full: bool = False

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats at values `[B, *event]`, `[B]`."""
        z = x - self.mean.to(x)
        d = z[0].numel()
        constant = d * math.log(2 * math.pi)
        if not self.full:
            total = (self.spread.to(x) + self.sigma**2).expand(z.shape)
            return -(z.square() / total + total.log()).reshape(len(z), -1).sum(1) / 2 - constant / 2
        root = self._root(x)
        white = torch.linalg.solve_triangular(root, z.reshape(len(z), d, 1), upper=False)
        return -white.square().sum((1, 2)) / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - constant / 2

    def sample(self, noise: Tensor) -> Tensor:
        """Values from standard normal numbers `[B, *event]`: from `field.noise`, so that each row has its own."""
        mean = self.mean.to(noise)
        if not self.full:
            return mean + (self.spread.to(noise) + self.sigma**2).sqrt() * noise
        moved = self._root(noise) @ noise.reshape(len(noise), -1, 1)
        return mean + moved.reshape(noise.shape)

    def _root(self, like: Tensor) -> Tensor:
        eye = torch.eye(self.spread.shape[-1], dtype=like.dtype, device=like.device)
        return torch.linalg.cholesky(self.spread.to(like) + self.sigma**2 * eye)


def standard(sigma_max: float, like: Tensor, variance: float = 0.0) -> Terminal:
    """N(0, (variance + sigma_max^2) I): for data that are centred and have this variance.

    Args:
        sigma_max: noise level.
        like: one event, for its shape, dtype and device.
        variance: 1 is what variance-preserving diffusions assume; 0 the usual choice for variance-exploding ones.
    """
    return Terminal(
        sigma_max, torch.zeros_like(like), torch.full((), variance, dtype=like.dtype, device=like.device)
    )


def matched(
    field: Field,
    sigma_max: float,
    like: Tensor,
    covariance: str = "auto",
    *,
    repeats: int = 2,
    probes: int = 16,
) -> Terminal:
    r"""The normal law whose mean and covariance the denoiser itself has at the largest noise level.

    Args:
        field: the denoiser.
        sigma_max: noise level.
        like: values `[B, *event]`, for their shape, dtype and device: each row gets its own law, as a denoiser may
            carry a context for each of them; without one, a single row is enough.
        covariance: `"full"` takes one product with the Jacobian for every scalar of an event and a matrix for every row;
            `"diagonal"` and `"scalar"` take `probes`; `"auto"`: full up to 128 scalars, then scalar.
        repeats: evaluations for the mean. Each makes its error smaller by (width of the data / sigma_max)^2.
        probes: random directions for the variances: fixed ones, so that the law is the same at every call.

    Example:
        >>> from pgen.algorithms.diffusion.mixture import Mixture
        >>> field = Field(Mixture(torch.tensor([[3.0, 4.0]]), scale=2.0))
        >>> law = matched(field, 50.0, torch.empty(1, 2))
        >>> law.mean.round(decimals=2), law.spread.round(decimals=2)
        (tensor([[3., 4.]]), tensor([[[4., 0.],
                 [0., 4.]]]))
    """
    d = like[0].numel()
    if covariance not in ("auto", "full", "diagonal", "scalar"):
        raise ValueError(
            f"matched(covariance={covariance!r}): expected 'auto', 'full', 'diagonal' or 'scalar'"
        )
    if covariance == "auto":
        covariance = "full" if d <= 128 else "scalar"
    level = like.new_full(like.shape[:1], float(sigma_max))
    with torch.no_grad():
        mean = torch.zeros_like(like)
        for _ in range(repeats):
            mean = field(mean, sigma_max)
        product = Jacobian(field.denoiser).at(mean, level)
        if covariance == "full":
            eye = torch.eye(d, dtype=like.dtype, device=like.device).reshape(d, 1, *like.shape[1:])
            columns = product(eye.expand(d, *like.shape)).reshape(d, len(like), d).permute(1, 2, 0)
            values, basis = torch.linalg.eigh((columns + columns.mT) / 2)
            spread = (basis * _variance(values, sigma_max).unsqueeze(-2)) @ basis.mT
            return Terminal(sigma_max, mean, spread, full=True)
        count = min(probes, d)
        numbers = torch.randn(count, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        signs = torch.where(numbers < 0, -1.0, 1.0).to(like).reshape(count, 1, *like.shape[1:])
        along = (signs * product(signs.expand(count, *like.shape))).mean(0)
        if covariance == "scalar":
            along = along.reshape(len(like), -1).mean(1).reshape(-1, *(1,) * (like.dim() - 1))
        return Terminal(sigma_max, mean, _variance(along, sigma_max))


def _variance(share: Tensor, sigma: float) -> Tensor:
    """From what a denoiser keeps, c / (c + sigma^2), to c; what cannot be, is clipped."""
    share = share.clamp(min=0.0, max=0.999)
    return sigma**2 * share / (1 - share)
