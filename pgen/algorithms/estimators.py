"""Gradient estimators for draws that have no path: the score function, with what makes its variance bearable.

An expectation `E_q[cost]` has the gradient `E_q[cost grad log q]` (Williams, 1992). Anything that the draw
does not influence can be subtracted from the cost without moving the mean: the costs of other particles
(`leave_one_out`), of earlier steps (`moving_average`), the terms of other rows and of sites upstream
(`downstream`, `local_cost`).

Sitewise terms have dimensions with names (`particles` and the plates that a site is in), so that the row of a
local latent meets only the cost of its own row.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import networkx as nx
import torch
from torch import Tensor

from pgen.algorithms.bounds import Bound, power_mean

_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class Term:
    """A term of the objective, in nats: `value` has one dimension for each name in `dims`, in that order."""

    value: Tensor
    dims: tuple[str, ...]

    def sum_to(self, dims: Iterable[str]) -> Term:
        """The same term with every dimension that is not in `dims` summed out."""
        keep = set(dims)
        over = [index for index, name in enumerate(self.dims) if name not in keep]
        return Term(self.value.sum(over) if over else self.value, tuple(n for n in self.dims if n in keep))

    def detach(self) -> Term:
        """The same term, without a gradient."""
        return Term(self.value.detach(), self.dims)

    def __mul__(self, factor: float | Tensor) -> Term:
        """The term times a number."""
        return Term(self.value * factor, self.dims)

    def align(self, dims: Sequence[str]) -> Tensor:
        """The value in the order of `dims`, of size 1 where the term lacks a dimension.

        Example:
            >>> Term(torch.ones(3, 2), ("rows", "particles")).align(("particles", "words", "rows")).shape
            torch.Size([2, 1, 3])
        """
        order = [self.dims.index(name) for name in dims if name in self.dims]
        if len(order) < len(self.dims):
            raise ValueError(f"a term over {self.dims} cannot be aligned to {tuple(dims)}: sum_to them first")
        sizes = iter(self.value.permute(order).shape)
        return self.value.permute(order).reshape([next(sizes) if name in self.dims else 1 for name in dims])


def local_cost(terms: Iterable[Term], dims: Sequence[str]) -> Tensor:
    """The sum of terms as a site over `dims` sees them: its own row of shared plates, the rest summed out.

    A term that lacks one of the site's dimensions depends on all its rows (a mean over the plate, say) and is
    given to each of them, undivided.
    """
    total: Tensor | None = None
    for term in terms:
        value = term.sum_to(dims).align(dims)
        total = value if total is None else total + value
    return torch.zeros([1] * len(dims)) if total is None else total


def downstream(site: str, guide: nx.DiGraph, depends: Mapping[_Name, Iterable[str]]) -> set[_Name]:
    """The terms that a draw of `site` in the guide can influence.

    Everything else is decided before the draw, or beside it, and only adds noise to its cost.

    Args:
        site: a site of the guide.
        guide: the guide's dependencies, parents -> site.
        depends: for each term, the sites whose values it was computed from.

    Example:
        >>> chain = nx.DiGraph([("a", "b")])
        >>> depends = {"log p(a)": ["a"], "log p(x)": ["a", "b"], "log q(b)": ["b", "a"]}
        >>> sorted(downstream("b", chain, depends))
        ['log p(x)', 'log q(b)']
    """
    reach = {site} | nx.descendants(guide, site)
    return {name for name, sites in depends.items() if not reach.isdisjoint(sites)}


def score_function(log_guide: Tensor, cost: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    r"""A scalar whose gradient is `sum (cost - baseline) grad log q`, to be added to a loss.

    Args:
        log_guide: `log q` at the draws.
        cost: what the draws cost, broadcastable against `log_guide`; no gradient flows into it here.
        baseline: anything independent of the draw given its parents.

    References:
        Simple statistical gradient-following algorithms for connectionist reinforcement learning (Williams,
        1992).
    """
    return ((cost - baseline).detach() * log_guide).sum()


def leave_one_out(cost: Tensor) -> Tensor:
    """For each particle the mean cost of the others, along the leading dimension, of size `K >= 2`.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
        tensor([4.0000, 3.5000, 1.5000])

    References:
        Buy 4 REINFORCE samples, get a baseline for free! (Kool, van Hoof & Welling, 2019).
    """
    return (cost.sum(0) - cost) / (cost.shape[0] - 1)


def moving_average(average: Tensor, cost: Tensor, decay: float = 0.9) -> Tensor:
    """The average of past costs after one more step; at this step the baseline is the average before it."""
    return torch.lerp(cost.detach().mean(), average, decay)


def vimco(log_weights: Tensor, log_guide: Tensor, alpha: float = 0.0) -> Bound:
    r"""The importance-weighted bound for discrete draws, each particle with its own control variate.

    The learning signal of particle `k` is the bound minus the bound with `w_k` replaced by the geometric mean
    of the other weights. Reparameterised draws beside the discrete ones keep their path through
    `log_weights`.

    Args:
        log_weights: `log p(x, z_k) - log q(z_k | x)`, `[K, *rows]`, `K >= 2`.
        log_guide: the part of `log q` that belongs to draws without a path, `[K, *rows]`.
        alpha: order of the Renyi bound to use in place of the importance-weighted one (0).

    References:
        Variational Inference for Monte Carlo Objectives (Mnih & Rezende, ICML 2016), arXiv:1602.06725.
    """
    value = power_mean(log_weights, 1 - alpha)
    signal = (value - without_each(log_weights, 1 - alpha)).detach()
    return Bound(value.detach(), -value.sum() - (signal * log_guide).sum())


def without_each(log_weights: Tensor, power: float = 1.0) -> Tensor:
    """For each particle, the bound had its weight been the geometric mean of the others, `[K, *rows]`."""
    particles = log_weights.shape[0]
    diagonal = torch.eye(particles, dtype=torch.bool, device=log_weights.device)
    diagonal = diagonal.reshape(particles, particles, *[1] * (log_weights.dim() - 1))
    others = leave_one_out(log_weights)
    return power_mean(torch.where(diagonal, others, log_weights.unsqueeze(1)), power)
