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
            variances = self.variances[:, 0].to(z)
            shrunk = share * variances / (variances + level**2)  # [..., K]
            found = shrunk.sum(-1, keepdim=True) * z + (share - shrunk) @ self.means.to(z)
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

    def linear_posterior(
        self,
        operator: Tensor,
        y: Tensor,
        n: int,
        *,
        sigma: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Exact draws of x given y = A x + N(0, I), for many y at once, and the evidence; x = x0 + sigma eps.

        A component is drawn by its share of the evidence, then a value and an observation from it, and the value is
        moved by what the observation missed, C_k A' S_k^-1 (y - A x - e) with S_k = A C_k A' + I (Matheron's rule):
        no [D, D] matrix is made, nor one for each y.

        Args:
            operator: A, `[m, D]`, D the number of scalars of an event.
            y: `[rows, m]`.
            n: draws for each row; 0 for the evidence alone.
            sigma: noise level of x.
            generator: of the random numbers.

        Returns:
            Draws `[rows, n, *event]` of y's dtype, and log p(y) in nats, `[rows]`, in float64.

        Example:
            >>> prior = Mixture(torch.zeros(1, 2), scale=1.0)
            >>> _, log_evidence = prior.linear_posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [2.0]]), n=0)
            >>> log_evidence
            tensor([-1.2655, -2.2655], dtype=torch.float64)
        """
        matrix, means = operator.double(), self.means.double()
        rows, (m, d) = len(y), matrix.shape
        kind = {"dtype": torch.float64, "device": y.device, "generator": generator}
        variances = self.variances.double() + sigma**2  # [K, 1] or [K, D]
        group = torch.arange(len(means), device=means.device)
        if self.basis is None or self.basis.dim() == 2:  # many components, few covariances
            variances, group = variances.unique(dim=0, return_inverse=True)
        basis = None if self.basis is None else self.basis.double().expand(len(variances), d, d)
        along = matrix if basis is None else matrix @ basis
        cross = along * variances.unsqueeze(1)  # A C_k, [covariances, m, D]
        cross = cross if basis is None else cross @ basis.mT
        eye = torch.eye(m, dtype=torch.float64, device=y.device)
        root = torch.linalg.cholesky(cross @ matrix.mT + eye)  # of S_k, [covariances, m, m]
        log = -root.diagonal(dim1=-2, dim2=-1).log().sum(-1)[group].expand(rows, -1)  # [rows, K]
        seen = means @ matrix.mT
        for g in range(len(root)):
            mine = group == g
            miss = (y.double().unsqueeze(1) - seen[mine]).reshape(-1, m).mT
            white = torch.linalg.solve_triangular(root[g], miss, upper=False).square().sum(0)
            log = log.index_add(1, mine.nonzero()[:, 0], white.reshape(rows, -1), alpha=-0.5)
        log = log + self.log_weights.double()
        log_evidence = log.logsumexp(-1) - m * math.log(2 * math.pi) / 2
        draws = y.new_empty(rows, n, d)
        index = (
            torch.multinomial(log.softmax(-1), n, True, generator=generator)
            if n
            else group[:0].expand(rows, 0)
        )
        for g in group[index].unique().tolist():
            row, column = (group[index] == g).nonzero(as_tuple=True)
            x = torch.randn(len(row), d, **kind) * variances[g].sqrt()
            x = means[index[row, column]] + (x if basis is None else x @ basis[g].mT)
            missed = y[row].double() - x @ matrix.mT - torch.randn(len(row), m, **kind)
            x = x + torch.cholesky_solve(missed.mT, root[g]).mT @ cross[g]
            draws[row, column] = x.to(draws)
        return draws.reshape(rows, n, *self.event_shape), log_evidence

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
