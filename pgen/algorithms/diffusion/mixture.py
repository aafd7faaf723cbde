r"""Gaussian mixtures: the laws for which everything in diffusion is known exactly.

With x_0 ~ sum_k w_k N(m_k, C_k) and x = x_0 + sigma eps,

    p_sigma(x) = sum_k w_k N(x; m_k, C_k + sigma^2 I)
    D(x, sigma) = E[x_0 | x] = sum_k r_k(x) (m_k + C_k (C_k + sigma^2 I)^-1 (x - m_k)),    r_k = P(k | x)

and given y = A x_0 + N(0, R), x_0 is a Gaussian mixture again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Mixture:
    r"""A Gaussian mixture as a denoiser: `mixture(x, sigma)` is E[x0 | x0 + sigma eps = x], exactly.

    Args:
        means: of the components, `[K, *event]`.
        scale: standard deviations: a number, or one for each component `[K]`; or
        covariance: `[K, D, D]` or `[D, D]` for all, D the number of scalars of an event.
        weights: `[K]`, up to a constant; None: equal ones.

    Example:
        >>> mixture = Mixture(torch.tensor([[-1.0], [1.0]]), scale=0.1)
        >>> mixture(torch.tensor([[0.9]]), torch.tensor([0.2]))
        tensor([[0.9800]])
    """

    def __init__(
        self,
        means: Tensor,
        scale: Tensor | float | None = None,
        *,
        covariance: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        if (scale is None) == (covariance is None):
            raise ValueError("Mixture: expected one of scale (standard deviations) and covariance")
        self.event_shape = means.shape[1:]
        self.means = means.reshape(len(means), -1)
        k, d = self.means.shape
        weights = means.new_ones(k) if weights is None else weights.to(means)
        self.log_weights = torch.log_softmax(weights.log(), 0)
        self.basis: Tensor | None = None
        if covariance is None:
            spread = torch.as_tensor(scale, dtype=means.dtype, device=means.device)
            self.variances = spread.expand(k).square().unsqueeze(-1)  # [K, 1]
        else:
            values, basis = torch.linalg.eigh(covariance)
            self.variances = values.clamp(min=0).expand(k, d)  # [K, D], along the eigenvectors
            self.basis = basis  # [D, D] or [K, D, D]

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x0 + sigma eps = x], shape of x `[..., *event]`; sigma a number or `[...]`."""
        z, level = self._flat(x, sigma)
        log, _ = self._terms(z, level)
        share = log.softmax(-1)  # [..., K]
        if self.variances.shape[-1] == 1:  # isotropic: no [..., K, D] is ever made
            keep = self.variances[:, 0] / (self.variances[:, 0] + level**2)  # [..., K]
            shrunk = share * keep
            found = shrunk.sum(-1, keepdim=True) * z + (share - shrunk) @ self.means
        else:
            along = self._along(z)
            keep = self.variances / (self.variances + level.unsqueeze(-1) ** 2)
            found = self._back(share.unsqueeze(-1) * keep * along) + share @ self.means
        return found.reshape(x.shape)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Log density of x0 + sigma eps at x, in nats, `[...]`."""
        return self._terms(*self._flat(x, sigma))[0].logsumexp(-1)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Gradient of that log density, shape of x."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        level = level.reshape(level.shape + (1,) * len(self.event_shape))
        return (self(x, sigma) - x) / level**2

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws of x0, `[n, *event]`."""
        device = self.means.device
        index = torch.multinomial(self.log_weights.exp(), n, True, generator=generator)
        noise = torch.randn(
            n, self.means.shape[1], dtype=self.means.dtype, device=device, generator=generator
        )
        noise = noise * self.variances[index].sqrt()
        if self.basis is not None and self.basis.dim() == 2:
            noise = noise @ self.basis.mT
        elif self.basis is not None:
            for k, basis in enumerate(self.basis):  # no [n, D, D] is ever made
                mine = index == k
                noise[mine] = noise[mine] @ basis.mT
        return (self.means[index] + noise).reshape(n, *self.event_shape)

    def posterior(self, operator: Tensor, y: Tensor, covariance: Tensor) -> Mixture:
        """The law of x0 given y = A x0 + N(0, R): a mixture again.

        Args:
            operator: A, `[m, D]`.
            y: `[m]`.
            covariance: R, `[m, m]`.
        """
        full = self.covariance()  # [K, D, D]
        cross = full @ operator.mT  # [K, D, m]
        spread = operator @ cross + covariance
        root = torch.linalg.cholesky(spread)
        miss = y - self.means @ operator.mT  # [K, m]
        white = torch.linalg.solve_triangular(root, miss.unsqueeze(-1), upper=False).squeeze(-1)
        log = self.log_weights - white.square().sum(-1) / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        gain = torch.cholesky_solve(cross.mT, root).mT  # [K, D, m]
        means = self.means + (gain @ miss.unsqueeze(-1)).squeeze(-1)
        left = full - gain @ cross.mT
        return Mixture(
            means.reshape(-1, *self.event_shape), covariance=(left + left.mT) / 2, weights=log.softmax(0)
        )

    def covariance(self) -> Tensor:
        """Covariances of the components, `[K, D, D]`."""
        k, d = self.means.shape
        if self.basis is None:
            eye = torch.eye(d, dtype=self.means.dtype, device=self.means.device)
            return self.variances.unsqueeze(-1) * eye
        basis = self.basis.expand(k, d, d)
        return basis * self.variances.unsqueeze(-2) @ basis.mT

    def to(self, *args: object, **kwargs: object) -> Mixture:
        """The same on another device or in another dtype."""
        new = object.__new__(Mixture)
        new.event_shape = self.event_shape
        for name in ("means", "log_weights", "variances", "basis"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value.to(*args, **kwargs))
        return new

    def _flat(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        if x.shape[x.dim() - len(self.event_shape) :] != self.event_shape:
            raise ValueError(
                f"Mixture: got values of shape {tuple(x.shape)}; expected [..., {', '.join(map(str, self.event_shape))}]"
            )
        batch = x.shape[: x.dim() - len(self.event_shape)]
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return x.reshape(*batch, -1), level.unsqueeze(-1)

    def _terms(self, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Log weight times density of every component, `[..., K]`, and squared distances."""
        d = self.means.shape[1]
        variances = self.variances.to(z)
        if variances.shape[-1] == 1:
            total = variances[:, 0] + level**2
            square = (
                z.square().sum(-1, keepdim=True)
                - 2 * z @ self.means.to(z).mT
                + self.means.to(z).square().sum(-1)
            )
            quad, logdet = square / total, d * total.log()
        else:
            total = variances + level.unsqueeze(-1) ** 2
            square = self._along(z).square()
            quad, logdet = (square / total).sum(-1), total.log().sum(-1)
        return self.log_weights.to(z) - (quad + logdet + d * math.log(2 * math.pi)) / 2, quad

    def _along(self, z: Tensor) -> Tensor:
        """z - m_k along the eigenvectors, `[..., K, D]`."""
        away = z.unsqueeze(-2) - self.means
        assert self.basis is not None
        if self.basis.dim() == 2:
            return away @ self.basis
        return torch.einsum("...kd,kde->...ke", away, self.basis)

    def _back(self, along: Tensor) -> Tensor:
        """Back from the eigenvectors, summed over components, `[..., D]`."""
        assert self.basis is not None
        if self.basis.dim() == 2:
            return along.sum(-2) @ self.basis.mT
        return torch.einsum("...ke,kde->...d", along, self.basis)
