r"""Which places to hide: four ways to draw views of a value whose weighted scores add up to the same bound.

| views | hides | passes | variance |
|---|---|---|---|
| `Times` | each place with a chance m(t), at a random time t | any | infinite: the weight is m'(t) / m(t), and t is near 0 often enough |
| `Counts` | k places, k = 1..L in equal shares | any | finite; `Times` with the time integrated out, given how many are hidden |
| `Orders` | what is yet to come, along whole random orders | L each | none at all where the conditionals are those of one law |
| `EveryView` | every set of places | 2^L - 1 | none |

`Times` is the loss of Sahoo et al. and of Shi et al. (2024). Given that k of L places are hidden, its weight at a
log-linear schedule has mean (L + 1) / k and k is uniform on 0..L, of which 0 counts nothing: that is `Counts`, which is
therefore never worse (Rao and Blackwell). One more is an object with `__call__(tokens) -> Views` whose
weights have, summed over views, for every set H of k places the mean 1 / (k binom(L, k)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pgen.algorithms.diffusion.masked import Views

MOST = 12
"""Places of which all sets are listed, at most, unless one says otherwise."""


class Viewing(Protocol):
    """How views are drawn; random numbers are torch's own."""

    def __call__(self, tokens: Tensor) -> Views:
        """Views of tokens `[B, L]`, of which only shape and device matter."""
        ...


class MaskSchedule(Protocol):
    """The chance of being hidden at time t in [0, 1], rising from 0 to 1."""

    def masked(self, t: Tensor) -> Tensor:
        """The chance m(t)."""
        ...

    def rate(self, t: Tensor) -> Tensor:
        """Its relative growth m'(t) / m(t)."""
        ...


@dataclass(frozen=True)
class LogLinear:
    """m(t) = t: as many places are revealed in one interval of time as in another of its length."""

    def masked(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def rate(self, t: Tensor) -> Tensor:
        """1 / t."""
        return 1 / t


@dataclass(frozen=True)
class Cosine:
    """m(t) = sin(pi t / 2): few places at first, when little is known, and many at last (Chang et al., 2022)."""

    def masked(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return (t * math.pi / 2).sin()

    def rate(self, t: Tensor) -> Tensor:
        """(pi / 2) / tan(pi t / 2)."""
        return (math.pi / 2) / (t * math.pi / 2).tan().clamp_min(0).nan_to_num()


SCHEDULES: dict[str, MaskSchedule] = {"log-linear": LogLinear(), "cosine": Cosine()}


@dataclass(frozen=True)
class Counts:
    """Hide k of L places, k spread evenly over 1..L across views and rows, which of them at random.

    Attributes:
        views: how many for each row; L of them take each k once.
    """

    views: int = 1

    def __post_init__(self) -> None:
        """Check."""
        _positive("Counts", "views", self.views)

    def __call__(self, tokens: Tensor) -> Views:
        """Draw."""
        (rows, places), device = tokens.shape, tokens.device
        k = (spread(self.views, rows, device) * places).long().clamp_max(places - 1)[..., None] + 1
        order = torch.rand(self.views, rows, places, device=device).argsort(-1)
        first = torch.arange(places, device=device) < k
        hidden = torch.zeros_like(first).scatter(-1, order, first)
        return Views(hidden, hidden * (places / (k.double() * self.views)))


@dataclass(frozen=True)
class Times:
    """Hide each place with the chance m(t), at times spread evenly across views and rows.

    Attributes:
        views: how many for each row.
        schedule: m.
    """

    views: int = 1
    schedule: MaskSchedule = field(default_factory=LogLinear)

    def __post_init__(self) -> None:
        """Check."""
        _positive("Times", "views", self.views)

    def __call__(self, tokens: Tensor) -> Views:
        """Draw."""
        (rows, places), device = tokens.shape, tokens.device
        t = 1 - spread(self.views, rows, device)[..., None]  # never 0
        hidden = torch.rand(self.views, rows, places, device=device) < self.schedule.masked(t)
        return Views(hidden, hidden * (self.schedule.rate(t) / self.views))


@dataclass(frozen=True)
class Orders:
    """Reveal all places one after the other, in random orders; each is scored when its turn comes.

    Attributes:
        orders: how many for each row.
    """

    orders: int = 1

    def __post_init__(self) -> None:
        """Check."""
        _positive("Orders", "orders", self.orders)

    def __call__(self, tokens: Tensor) -> Views:
        """Draw."""
        (rows, places), device = tokens.shape, tokens.device
        rank = torch.rand(self.orders, rows, places, device=device).argsort(-1)
        hidden, weight = along(rank, places)
        return Views(hidden.flatten(0, 1), weight.flatten(0, 1) / self.orders)


@dataclass(frozen=True)
class EveryView:
    """Every set of hidden places, weighted by its chance: the bound itself, without random numbers.

    Attributes:
        limit: the most places for which so many views are made.
    """

    limit: int = MOST

    def __call__(self, tokens: Tensor) -> Views:
        """List them.

        Raises:
            ValueError: there are more places than `limit`.
        """
        (rows, places), device = tokens.shape, tokens.device
        hidden = every_set(places, self.limit, device)[1:]
        k = hidden.sum(-1, keepdim=True)
        binomial = torch.tensor([math.comb(places, n) for n in range(places + 1)], device=device)[k]
        weight = hidden / (k * binomial).double()
        return Views(*(t[:, None].expand(-1, rows, -1) for t in (hidden, weight)))


def along(rank: Tensor, steps: int) -> Views:
    """Views along an order: at step j, what has a rank of j or more is hidden, and what has rank j is scored.

    Args:
        rank: of every place, `[..., B, L]`; negative for one shown from the start, `steps` or more for one
            that is never shown.
        steps: how many to take.

    Returns:
        Shapes `[..., steps, B, L]`.
    """
    step = torch.arange(steps, device=rank.device)[:, None, None]
    now = rank.unsqueeze(-3)
    return Views(now >= step, (now == step).double())


def every_set(places: int, limit: int, device: torch.device | None = None) -> Tensor:
    """All sets of places as rows of booleans, `[2^L, L]`: bit i of a row's number says whether place i is in it.

    Raises:
        ValueError: there are more places than `limit`.
    """
    if places > limit:
        raise ValueError(
            f"{places} places have 2^{places} sets of hidden ones; expected at most {limit} places to list them all; "
            "for more: Counts(views) or Orders(orders), which draw some"
        )
    numbers = torch.arange(2**places, device=device)[:, None]
    return (numbers >> torch.arange(places, device=device)) & 1 == 1


def spread(views: int, rows: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1), `[views, rows]`, evenly spread; each row has one in each `views`-th of the interval.

    One random shift moves them all, so that each number is uniform in its part and averages over a row's views are
    unbiased for that row alone, while those over rows gain from the even spread.
    """
    shift = torch.rand((), dtype=torch.float64, device=device)
    within = (shift + torch.arange(rows, device=device) / max(1, rows)) % 1
    return (within + torch.arange(views, device=device)[:, None]) / views


def _positive(name: str, what: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}({what}={value}): expected 1 or more")
