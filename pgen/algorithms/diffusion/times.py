r"""Where in the schedule to train: quantiles u in [0, 1], spread more evenly than by chance, or to where losses are large.

`schedule.training(u)` are the noise levels; masked diffusion takes u as its times. Each of the batch's numbers is uniform
by itself, so that any mean over them is unbiased; together they cover the interval, so that it varies less:

    antithetic      u and 1 - u                         half the randomness; removes what is odd in u
    stratified      one in each of B equal cells        error of a mean over u: B^(-3/2) instead of B^(-1/2)
    lattice         (u + i / B) mod 1                   one number shifts an even grid

Row i has the i-th cell: rows are supposed to come in random order. `Importance` draws from a histogram learned from the
losses instead, and gives the ratio that keeps their mean unbiased.

References:
    Kingma, Salimans, Poole & Ho, Variational Diffusion Models, NeurIPS 2021 (lattice).
    Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, ICML 2021 (by the losses' second moment).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def antithetic(u: Tensor) -> Tensor:
    """`[n]` uniform numbers and their mirror images, `[2 n]`."""
    return torch.cat([u, 1 - u])


def stratified(u: Tensor) -> Tensor:
    """`[B]` uniform numbers, the i-th moved into the i-th of B cells."""
    return (torch.arange(len(u), device=u.device, dtype=u.dtype) + u) / len(u)


def lattice(u: Tensor, n: int) -> Tensor:
    """`[n]` numbers on an even grid, shifted by one uniform number.

    Example:
        >>> lattice(torch.tensor(0.3), 4)
        tensor([0.3000, 0.5500, 0.8000, 0.0500])
    """
    return (u + torch.arange(n, device=u.device, dtype=u.dtype) / n) % 1


class Importance(NamedTuple):
    r"""Quantiles drawn where losses are large: a histogram over [0, 1], proportional to the root mean square loss.

    A histogram q makes mean(loss / q) unbiased for the mean loss, and of least variance where q is proportional to
    sqrt(E[loss^2 | u]). Part of q is uniform, so that no ratio exceeds 1 / share.

        u, ratio = state.draw(lattice(shift, B))
        loss = losses.denoising(denoiser, x, schedule.training(u), noise)
        (ratio * loss).mean().backward()
        state = state.update(u, loss)

    Attributes:
        square: running mean of the squared loss in each cell, `[K]`.
        mass: what this mean rests on, between 0 (nothing yet) and 1, `[K]`.
        decay: of the running mean, for one loss.
        share: uniform part.
    """

    square: Tensor
    mass: Tensor
    decay: float = 0.99
    share: float = 0.1

    @staticmethod
    def start(
        cells: int = 64, *, decay: float = 0.99, share: float = 0.1, like: Tensor | None = None
    ) -> Importance:
        """Knowing nothing: uniform.

        Args:
            cells: of the histogram.
            decay: of the running means; a cell remembers about 1 / (1 - decay) of its losses.
            share: uniform part, positive.
            like: a tensor to take dtype and device from.

        Raises:
            ValueError: a number is out of range.
        """
        if cells < 1 or not 0 <= decay < 1 or not 0 < share <= 1:
            raise ValueError(
                f"Importance.start(cells={cells}, decay={decay}, share={share}): expected 1 or more cells, "
                "0 <= decay < 1 and 0 < share <= 1"
            )
        zeros = torch.zeros(cells) if like is None else like.new_zeros(cells)
        return Importance(zeros, zeros, decay, share)

    def density(self) -> Tensor:
        """q in each cell, `[K]`, of mean 1."""
        size = (self.square / self.mass.clamp(min=1e-12)).sqrt()
        known = self.mass > 0
        mean = (size * known).sum() / known.sum().clamp(min=1)
        size = torch.where(known, size, mean)  # of what was not seen, the mean is believed
        total = size.mean()
        relative = torch.where(total > 0, size / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)
        return (1 - self.share) * relative + self.share

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles with density q out of uniform numbers, and what their losses are to be multiplied by, 1 / q.

        Args:
            u: uniform numbers, `[B]`; evenly spread ones stay so.
        """
        density = self.density()
        cells = len(density)
        ends = density.cumsum(0) / cells
        ends = ends / ends[-1]
        cell = torch.searchsorted(ends, u.to(ends).contiguous(), right=True).clamp(max=cells - 1)
        begin = ends[cell] - density[cell] / cells
        part = ((u.to(ends) - begin) * cells / density[cell]).clamp(0, 1)
        return (cell + part) / cells, 1 / density[cell]

    def update(self, u: Tensor, loss: Tensor) -> Importance:
        """The histogram after these losses (not multiplied by the ratio) at these quantiles, both `[B]`."""
        cells = len(self.square)
        cell = (u * cells).long().clamp(0, cells - 1)
        square = loss.detach().to(self.square).square()
        count = torch.zeros_like(self.square).index_add(0, cell, torch.ones_like(square))
        sums = torch.zeros_like(self.square).index_add(0, cell, square)
        keep = self.decay**count
        new = (1 - keep) * sums / count.clamp(min=1)
        return self._replace(square=keep * self.square + new, mass=keep * self.mass + (1 - keep))
