"""What is observed, as a function of the latents: any likelihood, or the numbers of a linear-Gaussian one.

The program says it. Run with its latents at given values, every observed site tells its log probability: a log likelihood,
differentiable, for whatever law is there. And where the laws are normal, with means that are seen to be linear in the
latents and spreads that are seen not to change, the matrix is read off a few runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pgen.backends.score.prior import Prior
from pgen.handlers import Substitute
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure

LARGEST = 1 << 26
"""Numbers in the matrices of all rows, at most."""

T = TypeVar("T")


class Linear(NamedTuple):
    """Observations y = A x + e with e standard normal: scaled and shifted to be so.

    Attributes:
        matrix: A, of every row of the data, `[rows, m, D]`.
        y: `[rows, m]`.
        constant: log density of y without the square, `[rows]`, in nats.
    """

    matrix: Tensor
    y: Tensor
    constant: Tensor

    def of(self, rows: Tensor) -> Linear:
        """Of some rows."""
        return Linear(*(part[rows] for part in self))


@dataclass(frozen=True)
class Evidence:
    """What is observed given the latents of a `Prior`.

    Attributes:
        problem: the program with its data; its learned tensors are installed.
        structure: of the problem.
        prior: the latents.
        sites: that are observed and depend on them, and factors that do.
        apart: whether rows are independent.
    """

    problem: Problem
    structure: Structure
    prior: Prior
    sites: tuple[str, ...]
    apart: bool

    def log_likelihood(self, flat: Tensor) -> Tensor:
        """Log likelihood in nats, `[rows * particles]`, of vectors `[rows * particles, size]`; differentiable."""

        def total(nodes: Mapping[str, Any]) -> Tensor:
            found: Tensor | float = 0.0
            for name in self.sites:
                found = found + self._by_row(name, nodes[name]["log_prob"]).sum(-1)
            return torch.as_tensor(found).expand(self.prior.rows)

        return self._for_all(total, flat, weighed=True).mT.reshape(-1)

    def linear(self) -> Linear | None:
        """The observations, if they are linear in the latents and Gaussian, as far as runs of the program tell."""
        try:
            return self._linear()
        except (NotImplementedError, _NotGaussian):
            return None

    def _linear(self) -> Linear | None:
        rows, size = self.prior.rows, self.prior.size
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(rows, 2, size, generator=generator, dtype=torch.float64).to(self.prior.like)
        one, other = points[:, :1], points[:, 1:]
        trial = torch.cat([torch.zeros_like(one), one, other, one + other, -2 * one], 1)
        mean, log_scale, y = self._whitened(trial)  # [rows, 5, m] each
        zero, bend = mean[:, 0], mean[:, 3] - mean[:, 1] - mean[:, 2] + mean[:, 0]
        turn = mean[:, 4] + 2 * mean[:, 1] - 3 * zero
        noise = 1e-4 * (mean - zero.unsqueeze(1)).abs().amax((0, 1)) + 1e-5 * mean.abs().amax((0, 1)) + 1e-8
        steady = (log_scale - log_scale[:, :1]).abs().amax() < 1e-5 and (y - y[:, :1]).abs().amax() < 1e-4 * (
            1 + y.abs().amax()
        )
        if not steady or bool(((bend.abs() > noise) | (turn.abs() > noise)).any()):
            return None
        m = mean.shape[-1]
        if rows * m * size > LARGEST:
            return None
        unit = torch.eye(size, dtype=mean.dtype, device=mean.device)
        step = max(1, LARGEST // (16 * rows * max(m, size)))
        columns = [
            self._whitened(part.expand(rows, *part.shape))[0] - zero.unsqueeze(1) for part in unit.split(step)
        ]
        constant = log_scale[:, 0].sum(-1)
        return Linear(torch.cat(columns, 1).mT.contiguous(), y[:, 0] - zero, constant)

    def _whitened(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means, log of the normalising factors, and observed values, scaled to unit variance: `[rows, P, m]` each."""

        def read(nodes: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            parts = [_white(nodes[name]) for name in self.sites]
            found = [
                torch.cat(
                    [self._by_row(name, part[i], 1) for name, part in zip(self.sites, parts, strict=True)], -1
                )
                for i in range(3)
            ]
            return found[0], found[1], found[2]

        with torch.no_grad():
            found = self._for_all(read, points.reshape(-1, points.shape[-1]), weighed=False)
        return tuple(part.movedim(0, 1) for part in found)  # type: ignore[return-value]

    def _for_all(self, read: Callable[[Mapping[str, Any]], T], flat: Tensor, weighed: bool) -> T:
        """What is read off a run for every particle, particles first."""
        values = self.prior.values(flat)

        def one(some: Mapping[str, Tensor]) -> T:
            trace: Any = poutine.trace(Substitute(some)(self.problem)).get_trace()
            if weighed:
                trace.compute_log_prob(lambda name, _: name in self.sites)
            return read(trace.nodes)

        with validating(False):
            try:
                return torch.vmap(one)(values)
            except (RuntimeError, ValueError):  # a program that vmap cannot run
                count = len(next(iter(values.values())))
                found = [one({k: v[i] for k, v in values.items()}) for i in range(count)]
        if isinstance(found[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]
        return torch.stack(found)  # type: ignore[arg-type, return-value]

    def _by_row(self, name: str, value: Tensor, events: int = 0) -> Tensor:
        """Elements of a site, the row of the data first and all else flat: `[rows, elements]`.

        Args:
            name: of the site.
            value: `[*batch]`, or with a flat event behind it, where `events` is 1.
            events: 0 or 1.
        """
        plates = self.structure.sites[name].plates
        plate = next((self.structure.plates[p] for p in plates if p in self.structure.data_plates), None)
        if not self.apart or plate is None:
            return value.reshape(1, -1).expand(self.prior.rows, -1)
        axis = value.dim() - events + plate.dim
        return value.movedim(axis, 0).reshape(value.shape[axis], -1)


class _NotGaussian(Exception):
    """A law that is no normal one."""


def _white(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log of the normalising factor and value of a normal law, in units of its spread, `[*batch, event]` each.

    Raises:
        _NotGaussian: it is another law, or weighted.
    """
    fn, value = node["fn"], node["value"]
    if node["type"] != "sample" or not (isinstance(node["scale"], (int, float)) and node["scale"] == 1):
        raise _NotGaussian
    events = len(fn.event_shape)
    masks = [(node["mask"], events)]
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Normal):
        shape = torch.broadcast_tensors(fn.loc, value)[0].shape
        spread = fn.scale.expand(shape)
        mean, y = fn.loc.expand(shape) / spread, value.expand(shape) / spread
        log = -spread.log() - math.log(2 * math.pi) / 2
    elif isinstance(fn, torch.distributions.MultivariateNormal):
        root = fn.scale_tril
        mean = torch.linalg.solve_triangular(root, fn.loc.unsqueeze(-1), upper=False).squeeze(-1)
        y = torch.linalg.solve_triangular(root, value.unsqueeze(-1), upper=False).squeeze(-1)
        mean, y = torch.broadcast_tensors(mean, y)
        log = -root.diagonal(dim1=-2, dim2=-1).log() - math.log(2 * math.pi) / 2
        log = log.expand(mean.shape)
    else:
        raise _NotGaussian
    for mask, inner in masks:
        if mask is not None:
            there = torch.as_tensor(mask, device=mean.device)
            there = there.reshape(there.shape + (1,) * inner).to(mean)
            mean, y, log = mean * there, y * there, log * there
    flat = (*mean.shape[: mean.dim() - events], -1)
    return mean.reshape(flat), log.reshape(flat), y.reshape(flat)
