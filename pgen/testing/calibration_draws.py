"""Draws that are worth as many independent ones: chains are continued and thinned until they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pgen.metrics.chains import ess_bulk

Ask = Callable[[int], Mapping[str, Tensor]]
"""Gives so many posterior draws of one data set, by site, in chains one after the other."""

_MOST = 50  # dependent draws asked for at most, per independent one that is wanted
_LEAST = 8  # draws of a chain from which it can be told what they are worth


def thinned(
    ask: Ask, sites: Sequence[str], draws: int, first: int, independent: bool = False
) -> tuple[dict[str, Tensor], float, bool]:
    """Evenly spaced draws that are worth as many independent ones.

    Dependent draws make ranks at both ends too frequent, which would look like a posterior that is too narrow.

    Args:
        ask: gives so many draws, in chains one after the other.
        sites: those looked at.
        draws: how many are wanted.
        first: how many to begin with.
        independent: whether they are known to be independent.

    Returns:
        The draws, by site; how many draws are worth the number wanted; whether there were half as many.
    """
    count, most = max(draws, first), _MOST * draws
    while True:
        drawn = ask(count)
        have = len(drawn[sites[0]])
        worth = float(have) if independent else _worth([drawn[s] for s in sites], getattr(drawn, "chains", 1))
        if worth >= draws or have >= most or have < count:
            break
        more = 1.2 * have * draws / worth if worth > 0 else 2.0 * have
        count = min(most, max(math.ceil(more), 2 * have))
    index = torch.linspace(0, have - 1, draws, dtype=torch.float64).round().long()
    need = have * draws / max(worth, 1.0)
    enough = (
        2 * worth >= draws
    )  # half as many widen the ranks by one percent of their variance at L = 99: not seen
    return {s: drawn[s][index.to(drawn[s].device)] for s in sites}, min(need, float(most)), enough


def _worth(drawn: Sequence[Tensor], chains: int) -> float:
    """The least effective sample size of any scalar; 0 where there is no telling."""
    have = len(drawn[0])
    if have % chains or have // chains < _LEAST:  # one after the other: what is alike lies side by side
        chains = 1
    sizes = [ess_bulk(v.reshape(chains, have // chains, -1)).amin() for v in drawn if v.numel()]
    worth = float(torch.stack(sizes).amin())
    return 0.0 if math.isnan(worth) else min(worth, float(have))
