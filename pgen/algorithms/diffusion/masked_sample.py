r"""Drawing from a masked diffusion: each place has its hour, and is drawn then from what is shown.

In the reverse process a hidden place is revealed in a step from time t to s with probability (m(t) - m(s)) / m(t),
whatever the values are. So the step at which each is revealed can be drawn beforehand: the one in which m passes a uniform
number of the place's own. Steps in which nothing is revealed cost nothing, a row is shown to the network at most L times
however fine the grid is, and the limit of infinitely many steps is one place at a time in a random order (Zheng et al.,
*Masked diffusion models are secretly time-agnostic masked models*, ICLR 2025).

Two uniform numbers for each place, when and what, are all the randomness there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.diffusion.masked import Predict, predicted
from pgen.algorithms.diffusion.masked_views import LogLinear, MaskSchedule
from pgen.algorithms.diffusion.noise import Streams

LOG_LINEAR = LogLinear()


def infilled(
    predict: Predict,
    tokens: Tensor,
    known: Tensor,
    streams: Streams,
    levels: int,
    *,
    steps: int | None = None,
    schedule: MaskSchedule = LOG_LINEAR,
) -> Tensor:
    """Draw the places that are not known, given those that are.

    Args:
        predict: the network.
        tokens: values `[B, L]`; what they are where not known does not matter.
        known: where they are given, `[B, L]`.
        streams: the rows' random numbers.
        levels: how many values a token takes.
        steps: of equal length in time; None for infinitely many: one place at a time.
        schedule: the chance of being hidden at a time.

    Returns:
        Values `[B, L]`.
    """
    when, what = (uniforms(streams, draw, tokens.shape[1], tokens.device) for draw in (0, 1))
    return reveal(predict, tokens, ranks(when, known, steps, schedule), what, levels)


def uniforms(streams: Streams, draw: int, places: int, device: torch.device | None = None) -> Tensor:
    """Uniform numbers `[rows, places]`, each row's from its own stream."""
    like = torch.empty(0, dtype=torch.float64, device=device)
    return torch.special.ndtr(streams.normal(draw, (places,), like))


def ranks(when: Tensor, known: Tensor, steps: int | None, schedule: MaskSchedule) -> Tensor:
    """At which step each place is revealed, steps in which a row has nothing to reveal left out: `[B, L]`.

    Args:
        when: uniform numbers `[B, L]`; the largest come first.
        known: places that are shown from the start, `[B, L]`; their rank is -1.
        steps: of equal length in time; None for infinitely many: one place at a time.
        schedule: the chance of being hidden at a time.
    """
    hour = 1 - when
    if steps is not None:
        times = torch.arange(1, steps, dtype=when.dtype, device=when.device) / steps
        hour = torch.searchsorted(schedule.masked(times), when).neg()
    hour = hour.masked_fill(known, 2)  # after all others
    ordered, order = hour.sort(-1)
    moves = (ordered[:, 1:] != ordered[:, :-1]).long().cumsum(-1)
    dense = torch.zeros_like(order).scatter(-1, order[:, 1:], moves)
    return dense.masked_fill(known, -1)


def reveal(predict: Predict, tokens: Tensor, rank: Tensor, what: Tensor, levels: int) -> Tensor:
    """Draw the hidden places, those of rank 0 first, each given all of lower rank.

    Args:
        predict: the network.
        tokens: values `[B, L]`; what they are at hidden places does not matter.
        rank: of every place, `[B, L]`; negative where known.
        what: uniform numbers `[B, L]`.
        levels: how many values a token takes.

    Returns:
        Values `[B, L]`.
    """
    tokens = tokens.masked_fill(rank >= 0, levels)
    last = int(rank.max()) if rank.numel() else -1
    for step in range(last + 1):
        rows = (rank == step).any(-1).nonzero()[:, 0]  # only those in which something happens
        here = rank[rows] == step
        log_probs = predicted(predict, tokens[rows], rows)[here]
        tokens[rows] = tokens[rows].masked_scatter(here, drawn(log_probs, what[rows][here]))
    return tokens


def drawn(log_probs: Tensor, what: Tensor) -> Tensor:
    """Where the distribution function `[n, levels]` passes a uniform number `[n]`.

    In double precision: single precision draws the likely too often (Zheng et al., 2025), and levels of probability
    zero now and then.
    """
    reached = log_probs.double().exp().cumsum(-1)
    return (reached <= what.double()[:, None] * reached[:, -1:]).sum(-1).clamp_max(log_probs.shape[-1] - 1)
