r"""What weights from below and from above say about a partition function.

Chains that go up from a reference have weights with :math:`E[w] = Z`; chains that come down from draws of the density have
weights with :math:`E[1 / w] = 1 / Z`. So the mean log weight going up is a lower bound on log Z in expectation, that coming down
an upper bound. Both together, by the acceptance ratio of Bennett, give an estimate whose error is small as soon as the two kinds
of weights overlap, where each alone may be far off.

The bound from above, and with it the estimate from both sides, is one for exact draws. Draws of chains that have missed a part
of the density give weights that are too small there, and no number tells: have the chains long, and from places far apart.

References:
    Efficient estimation of free energy differences from Monte Carlo data (Bennett, Journal of Computational Physics 22, 1976).
    Equilibrium free energies from nonequilibrium measurements using maximum-likelihood methods (Shirts, Bair, Hooker & Pande,
    Physical Review Letters 91, 2003). Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani
    & Adams, 2015), arXiv:1511.02543.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.annealing import evidence_above, evidence_below

APART = 4.0
"""Standard errors between the two sides from which on the interval is made to hold both."""


class Partition(NamedTuple):
    """A partition function and how well it is known, in nats, `[]` each; several, `[R]`.

    Attributes:
        log_z: the estimate: from both sides where there are two, else from below.
        stderr: of the estimate; `log_z +- 1.96 stderr` is meant to hold log Z 95 times in 100.
        lower: mean log weight going up: its expectation is below log Z.
        lower_stderr: of that.
        upper: mean log weight coming down: above log Z in expectation, for exact draws. None where nothing came down.
        upper_stderr: of that.
        apart: standard errors between the estimate from below alone and that from above alone, None likewise. Many: chains are
            stuck, or draws miss a part of the density.
        effective: number of equal weights that the weights going up are worth; with few, stderr is too small as a rule.
        chains: that went up.
        rungs: of their ladder.
        moves: calls of the walk in all, times the chains in each.
    """

    log_z: Tensor
    stderr: Tensor
    lower: Tensor
    lower_stderr: Tensor
    upper: Tensor | None
    upper_stderr: Tensor | None
    apart: Tensor | None
    effective: Tensor
    chains: int
    rungs: int
    moves: int


def partition_of(up: Tensor, down: Tensor | None = None, *, rungs: int = 1, moves: int = 0) -> Partition:
    """Log Z from independent log weights.

    Args:
        up: `[C]`, whose exponentials have expectation Z; of several partition functions, `[C, R]`.
        down: `[D]`, whose inverse exponentials have expectation 1 / Z; or `[D, R]`.
        rungs: to be reported.
        moves: to be reported.

    Example:
        >>> found = partition_of(torch.tensor([1.0, 3.0]).log())
        >>> found.log_z, found.lower
        (tensor(0.6931, dtype=torch.float64), tensor(0.5493, dtype=torch.float64))
    """
    up = up.double()
    below = evidence_below(up)
    effective = (2 * up.logsumexp(0) - (2 * up).logsumexp(0)).exp()
    spent = (effective, len(up), rungs, moves)
    if down is None:
        return Partition(
            below.estimate, below.stderr, below.bound, below.bound_stderr, None, None, None, *spent
        )
    down = down.double()
    above = evidence_above(down)
    both = (below.stderr.square() + above.stderr.square()).sqrt()
    gap = above.estimate - below.estimate
    apart = gap.abs() / both.clamp_min(1e-12)
    log_z, stderr = bennett(up, down)
    # Weights of one side that contradict those of the other: nothing tells which of them is right.
    reach = torch.maximum(
        (log_z - below.estimate).abs() / 1.96 + below.stderr,
        (log_z - above.estimate).abs() / 1.96 + above.stderr,
    )
    stderr = torch.where(apart > APART, torch.maximum(stderr, reach), stderr)
    sides = (below.bound, below.bound_stderr, above.bound, above.bound_stderr)
    return Partition(log_z, stderr, *sides, apart, *spent)


def bennett(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    r"""Bennett's acceptance ratio: the log Z at which as much is accepted going up as coming down, and its standard error.

    .. math:: \sum_{i \le C} \sigma(u_i - \log Z - m) = \sum_{j \le D} \sigma(\log Z + m - d_j), \qquad m = \log(C / D)

    Args:
        up: log weights u `[C]` of chains going up.
        down: log weights d `[D]` of chains coming down, by the same moves reversed in time.

    Example:
        Normal log weights with variance s^2, around log Z -+ s^2 / 2.

        >>> noise = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
        >>> log_z, stderr = bennett(5.0 + 2 * noise[0] - 2.0, 5.0 + 2 * noise[1] + 2.0)
        >>> bool((log_z - 5).abs() < 4 * stderr), bool(stderr < 0.01)
        (True, True)
    """
    share = math.log(len(up) / len(down))

    def accepted(log_z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(up - log_z - share), torch.sigmoid(log_z + share - down)

    low = torch.minimum(up.amin(0), down.amin(0)) - abs(share) - 1
    high = torch.maximum(up.amax(0), down.amax(0)) + abs(share) + 1
    for _ in range(100):
        middle = (low + high) / 2
        rising, falling = accepted(middle)
        less = rising.sum(0) > falling.sum(0)
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    log_z = (low + high) / 2
    variance = torch.zeros_like(log_z)
    for part in accepted(log_z):
        variance = variance + (part.square().mean(0) / part.mean(0).square() - 1) / len(part)
    return log_z, variance.clamp_min(0).sqrt()
