r"""Noise paired with data so that paths from one to the other are short and cross little.

Within a batch, rows of noise are exchanged so that sum_i |x_i - eps_i|^2 is least: data and noise keep their own laws, but
are no longer independent, and the paths (1 - t) x + t eps become straighter, to be integrated in fewer steps, learned with
less variance. See `losses` for what is lost: the denoiser then is no score.

With a condition c the noise must stay independent of it, or what is drawn from fresh noise has another law. So rows are
paired as (x_i, c_i) with (eps_j, c_j), at a cost for conditions that differ: little is exchanged where they all do, and
classes are coupled each for itself.

References:
    Tong et al., Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport, TMLR 2024.
    Pooladian et al., Multisample Flow Matching, ICML 2023.
    Jonker & Volgenant, A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems, Computing 38,
    1987. Cuturi, Sinkhorn Distances, NeurIPS 2013.
    Chemseddine, Hagemann, Steidl & Wald, Conditional Wasserstein Distances with Applications in Bayesian OT Flow Matching,
    2024 (conditions).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def coupled(
    x: Tensor, noise: Tensor, *, context: Tensor | None = None, context_weight: float = 1000.0
) -> Tensor:
    """The rows of the noise in the order in which they are nearest to the data.

    Args:
        x: data, `[B, *event]`.
        noise: shape of x.
        context: conditions, `[B, c]`, rows of NaN for none: rows are exchanged where conditions are about equal.
        context_weight: cost of a squared difference of conditions, relative to one of values.

    Returns:
        The noise, rearranged. Takes about 5 ms for 128 rows, 50 ms for 512, on the CPU.
    """
    cost = -2 * x.reshape(len(x), -1) @ noise.reshape(len(x), -1).mT  # what an exchange can change
    if context is not None:
        missing = context.isnan()
        known = torch.cat([torch.where(missing, 0.0, context), missing.to(context)], -1).double()
        cost = (
            cost
            + context_weight * torch.cdist(known, known, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        )
    return noise[assignment(cost)]


def assignment(cost: Tensor) -> Tensor:
    """The permutation p that makes sum_i cost[i, p[i]] least, exactly: shortest augmenting paths from good prices.

    Prices of columns come from a few sweeps of Sinkhorn's algorithm; rows that want the same column bid for it; for those
    left, the shortest path of reassignments is found, one row at a time.

    Args:
        cost: `[n, n]`, finite.

    Returns:
        Columns of the rows, `[n]`, on the device of the costs.

    Raises:
        ValueError: the costs are no square matrix of finite numbers.

    Example:
        >>> assignment(torch.tensor([[1.0, 2.0, 9.0], [1.0, 9.0, 9.0], [5.0, 4.0, 3.0]]))
        tensor([1, 0, 2])
    """
    table = cost.detach().to("cpu", torch.float64).numpy()
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not np.isfinite(table).all():
        raise ValueError(
            f"assignment: got costs {tuple(cost.shape)}; expected a square matrix of finite numbers"
        )
    if not len(table):
        return torch.empty(0, dtype=torch.long, device=cost.device)
    prices = _sinkhorn_prices(table)
    row_of, column_of = np.full(len(table), -1), np.full(len(table), -1)
    left = _bid(table, prices, row_of, column_of)
    for row in left:
        _augment(table, prices, row_of, column_of, row)
    return torch.from_numpy(column_of).to(cost.device)


def _sinkhorn_prices(cost: Floats) -> Floats:
    """Dual variables of the columns, nearly: entropic transport at a falling temperature."""
    prices = np.zeros(len(cost))
    spread = cost.std()
    if not spread > 0:
        return prices
    for share in (0.1, 0.03, 0.01, 0.003):
        heat = share * spread
        slack = (prices - cost) / heat
        kernel = np.exp(slack - slack.max(1, keepdims=True))
        columns = np.ones(len(cost))
        for _ in range(10):
            rows = 1 / np.maximum(kernel @ columns, 1e-100)
            columns = 1 / np.maximum(rows @ kernel, 1e-100)
        prices = prices + heat * np.log(columns)
    return prices


def _bid(cost: Floats, prices: Floats, row_of: Indices, column_of: Indices) -> list[int]:
    """Give rows the columns they like best; those outbid look again. In place; returns the rows left without."""
    for row, column in enumerate((cost - prices).argmin(1)):
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    waiting = np.flatnonzero(column_of < 0).tolist()
    left: list[int] = []
    for _ in range(2 * len(cost)):
        if not waiting:
            break
        row = waiting.pop()
        slack = cost[row] - prices
        best = int(slack.argmin())
        least, slack[best] = slack[best], np.inf
        second = int(slack.argmin())
        gap = slack[second] - least
        if gap > 0 and np.isfinite(gap):
            prices[best] -= gap  # still this row's best column, no longer anyone else's
        elif row_of[best] >= 0 and np.isfinite(gap):
            best = second
        rival = int(row_of[best])
        if rival >= 0:
            column_of[rival] = -1
            (waiting if gap > 0 else left).append(rival)
        row_of[best], column_of[row] = row, best
    return waiting + left


def _augment(cost: Floats, prices: Floats, row_of: Indices, column_of: Indices, start: int) -> None:
    """Dijkstra's algorithm over columns from a free row to a free column, then reassign along the path; in place."""
    distance = cost[start] - prices
    open_distance = distance.copy()
    previous = np.full(len(cost), start)
    closed = np.zeros(len(cost), bool)
    while True:
        column = int(open_distance.argmin())
        reach, row = open_distance[column], int(row_of[column])
        if row < 0:
            break
        closed[column] = True
        open_distance[column] = np.inf
        through = cost[row] - prices
        through += reach - through[column]
        better = (through < distance) & ~closed
        distance[better] = open_distance[better] = through[better]
        previous[better] = row
    prices[closed] += distance[closed] - reach
    while True:
        row = int(previous[column])
        row_of[column] = row
        column, column_of[row] = int(column_of[row]), column
        if row == start:
            return
