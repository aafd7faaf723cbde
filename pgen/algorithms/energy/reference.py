"""A normalised law close to the data: where chains begin, what leaps propose, what noise-contrastive learning compares with.

Unconstrained coordinates are normal with the mean and the covariance of the data; indices are independent, with the
frequencies of the data, each value counted once more than seen, so that none is impossible.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.space import Space


class Law(Protocol):
    """A normalised law of values."""

    def sample(self, n: int) -> Tensor:
        """Draws `[n, *event]`."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities `[n]`, in nats."""
        ...


class Reference(nn.Module):
    """A normal law of coordinates times a product law of indices, fitted to data; nothing in it is learned.

    Args:
        data: `[N, *event]`, two rows or more.
        space: of the values.
        widen: factor on the standard deviations of coordinates.

    Raises:
        ValueError: fewer than two rows.

    Example:
        >>> from torch.distributions import constraints
        >>> law = Reference(torch.tensor([[0.0], [2.0]]), Space.of(constraints.real, (1,)))
        >>> law.log_prob(torch.tensor([[1.0]]))  # variance 2
        tensor([-1.2655])
        >>> law.sample(3).shape
        torch.Size([3, 1])
    """

    mean: Tensor
    root: Tensor
    log_mass: Tensor

    def __init__(self, data: Tensor, space: Space, widen: float = 1.0) -> None:
        super().__init__()
        if len(data) < 2:
            raise ValueError(f"a law is fitted to two rows or more, got {len(data)}")
        self.space = space
        q, z = space.apart(data.detach())
        n, d = q.shape
        variance = ((q - q.mean(0)).square().sum(0) / (n - 1)).clamp(min=1e-12)
        # Fewer rows than coordinates leave directions without variance: towards the diagonal, the more the fewer there are.
        share = min(1.0, d / n) if d > 1 else 0.0
        covariance = (1 - share) * (q - q.mean(0)).mT @ (q - q.mean(0)) / (n - 1)
        covariance = covariance + torch.diag((share + 1e-6) * variance)
        self.register_buffer("mean", q.mean(0))
        self.register_buffer("root", widen * torch.linalg.cholesky(covariance) if d else covariance)
        sizes = space.cardinalities
        mass = q.new_full((len(sizes), max(sizes, default=1)), -math.inf)
        for i, k in enumerate(sizes):
            seen = torch.bincount(z[:, i], minlength=k) + 1
            mass[i, :k] = (seen / seen.sum()).log().to(mass)
        self.register_buffer("log_mass", mass)

    def sample(self, n: int) -> Tensor:
        """Draws `[n, *event]`."""
        noise = torch.randn(n, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        q = self.mean + noise @ self.root.mT
        below = self.log_mass.exp().cumsum(1)[:, :-1]  # the last value is what is left, whatever the rounding
        u = torch.rand(n, len(below), 1, dtype=q.dtype, device=q.device)
        return self.space.together(q, (u > below).sum(-1))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities `[n]` of values `[n, *event]`."""
        q, z = self.space.apart(x)
        white = torch.linalg.solve_triangular(self.root, (q - self.mean).mT, upper=False)
        normal = (
            -white.square().sum(0) / 2
            - self.root.diagonal().log().sum()
            - len(self.mean) / 2 * math.log(2 * math.pi)
        )
        mass = self.log_mass.expand(len(z), *self.log_mass.shape).gather(2, z.unsqueeze(2)).sum((1, 2))
        return normal + mass - self.space.volume(q)


class References(nn.Module):
    """A `Reference` of each of several laws, row i of values being of the one numbered i mod `laws`.

    Args:
        data: `[N laws, *event]`, N at least 2.
        space: of the values.
        laws: how many.
        widen: factor on the standard deviations of coordinates.

    Example:
        >>> from torch.distributions import constraints
        >>> data = torch.tensor([[0.0], [10.0], [2.0], [30.0]])  # 0 and 2 of the first law, 10 and 30 of the second
        >>> law = References(data, Space.of(constraints.real, (1,)), laws=2)
        >>> law.log_prob(torch.tensor([[1.0], [20.0]]))
        tensor([-1.2655, -3.5681])
    """

    mean: Tensor
    root: Tensor
    log_mass: Tensor

    def __init__(self, data: Tensor, space: Space, laws: int, widen: float = 1.0) -> None:
        super().__init__()
        self.space, self.laws = space, laws
        each = [Reference(part, space, widen) for part in data.reshape(-1, laws, *data.shape[1:]).unbind(1)]
        for name in ("mean", "root", "log_mass"):
            self.register_buffer(name, torch.stack([getattr(law, name) for law in each]))

    def sample(self, n: int) -> Tensor:
        """Draws `[n, *event]`, n a multiple of the number of laws."""
        like, each = self.mean, n // self.laws
        noise = torch.randn(each, *like.shape, dtype=like.dtype, device=like.device)
        q = like + (self.root @ noise.unsqueeze(-1)).squeeze(-1)
        below = self.log_mass.exp().cumsum(2)[..., :-1]
        u = torch.rand(each, *below.shape[:2], 1, dtype=like.dtype, device=like.device)
        return self.space.together(q.flatten(0, 1), (u > below).sum(-1).flatten(0, 1))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities `[n]` of values `[n, *event]`."""
        q, z = self.space.apart(x)
        away = (q.reshape(len(q) // self.laws, *self.mean.shape) - self.mean).permute(1, 2, 0)
        white = torch.linalg.solve_triangular(self.root, away, upper=False)
        spread = self.root.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)
        normal = -white.square().sum(1) / 2 - spread - q.shape[1] / 2 * math.log(2 * math.pi)
        table = self.log_mass.repeat(len(z) // self.laws, 1, 1)
        mass = table.gather(2, z.unsqueeze(2)).sum((1, 2))
        return normal.mT.reshape(-1) + mass - self.space.volume(q)


class Pool(nn.Module):
    """A law whose draws were made beforehand, for one that takes long to draw from: an autoregressive flow, say.

    What is drawn is picked from them, with replacement; so it is the law itself only as far as they are many.

    Args:
        law: densities are its own.
        size: draws that are made.
        together: so many at a time.

    Example:
        >>> from torch.distributions import constraints
        >>> law = Pool(Reference(torch.tensor([[0.0], [2.0]]), Space.of(constraints.real, (1,))), size=10)
        >>> len(law.sample(1000).unique())
        10
    """

    draws: Tensor

    def __init__(self, law: Law, size: int, together: int = 1024) -> None:
        super().__init__()
        self.law = law
        with torch.no_grad():
            parts = [law.sample(min(together, size - i)) for i in range(0, size, together)]
        self.register_buffer("draws", torch.cat(parts))

    def sample(self, n: int) -> Tensor:
        """Draws `[n, *event]`, some of them the same."""
        return self.draws.index_select(0, torch.randint(len(self.draws), (n,), device=self.draws.device))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities `[n]`."""
        return self.law.log_prob(x)


def closest(draws: Tensor, *laws: Law | None) -> Law:
    """The law under which draws `[N, *event]` are most probable: the one nearest to theirs."""
    known = [law for law in laws if law is not None]
    if len(known) == 1:
        return known[0]
    return max(known, key=lambda law: float(law.log_prob(draws).mean()))
