r"""One Brownian motion for every row, that can be asked at any times, in any order, for nothing stored in advance.

Between two times at which it is known a Brownian motion is normal about the straight line: given W(a) and W(b),

    W(c) ~ N(W(a) + (c - a) / (b - a) (W(b) - W(a)),  (c - a) (b - c) / (b - a))

Halving the interval again and again leads to any time, and the normal numbers of each node of this tree are a function of
(seed, row, node): so a row's path is always the same, whoever asks, when, how often and in what order. A solver may take a
step back and try again on the same path; two solvers with different steps see the same noise.

Intervals are halved by ratio, as the times here (squared noise levels or their inverses) range over many orders of
magnitude. The normal numbers come from a counter: splitmix64 from a starting point that is a hash of seed, row and node,
then Box and Muller's transform, all of it on tensors.

References:
    Li, Wong, Chen & Duvenaud, Scalable Gradients for Stochastic Differential Equations, AISTATS 2020 (virtual trees).
    Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014 (splitmix64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import per_row
from pgen.algorithms.diffusion.noise import Streams, mixed


class BrownianTree:
    r"""Brownian motions W(t) for rows, W(low) = 0.

    Times are rounded to a grid, geometric between the ends; on it all laws are exact. Where rows are large, a tree remembers
    the normal numbers of the last way down, one tensor like x for every level: the next time, if it is near, costs only
    what is new.

    Args:
        streams: the rows' random numbers.
        low: first time, positive.
        high: last time.
        tolerance: the grid's ratio of neighbouring times is at most 1 + tolerance.
        like: values `[B, *event]`, for their shape, dtype and device.
        key: another key, another independent motion of the same streams.

    Example:
        >>> tree = BrownianTree(Streams(0, rows=2), 0.01, 100.0, 1e-3, torch.zeros(2, 3))
        >>> whole, parts = tree.increment(0.02, 5.0), tree.increment(0.02, 1.0) + tree.increment(1.0, 5.0)
        >>> torch.allclose(whole, parts, atol=1e-5)
        True
    """

    def __init__(
        self, streams: Streams, low: float, high: float, tolerance: float, like: Tensor, *, key: int = 0
    ) -> None:
        if not 0 < low < high < math.inf:
            raise ValueError(f"BrownianTree(low={low}, high={high}): expected 0 < low < high < inf")
        if not 0 < tolerance < 1:
            raise ValueError(f"BrownianTree(tolerance={tolerance}): expected a number between 0 and 1")
        if streams.rows != len(like):
            raise ValueError(f"BrownianTree: got streams of {streams.rows} rows for {len(like)} values")
        self.low, self.high = float(low), float(high)
        self._log = math.log(self.low), math.log(self.high / self.low)
        self.depth = max(1, math.ceil(math.log2(self._log[1] / math.log1p(tolerance))))
        self._like = torch.empty_like(like, requires_grad=False)
        self._keys = _row_keys(streams, key).to(like.device)
        self._end = math.sqrt(self.high - self.low) * self._normal(torch.zeros(len(like), dtype=torch.long))
        self._last: list[tuple[Tensor, Tensor]] = []  # at each level: nodes [B], their normals

    def nearest(self, t: Tensor | float) -> Tensor:
        """The grid's times nearest to t, `[B]`, float64 on the CPU."""
        return self._time(self._index(t))

    def __call__(self, t: Tensor | float) -> Tensor:
        """W at the grid's times nearest to t, a number or one for each row `[B]`: `[B, *event]`."""
        index, depth = self._index(t), self.depth
        level = torch.arange(depth).unsqueeze(1)
        place = index >> (depth - level)  # [L, B]: which interval of a level holds the time
        lower, half = place << (depth - level), 1 << (depth - level - 1)
        middle = lower + half
        edge = (index == 0) | (index == 1 << depth)
        last = ((index & -index).double().log2().long() * -1 + depth - 1).where(
            ~edge, -1
        )  # the level that ends there
        a, c, b = self._time(lower), self._time(middle), self._time(lower + 2 * half)
        share, spread = (c - a) / (b - a), ((c - a) * (b - c) / (b - a)).clamp(min=0).sqrt() * (level <= last)
        right, ends = index > middle, level == last
        node = (1 << level) + place
        drawn = self._normal(node).unbind() if self._like.numel() <= _SMALL else None
        below = torch.where(self._on(index == 1 << depth), self._end, torch.zeros_like(self._end))
        above = torch.where(self._on(edge), below, self._end)
        for i in range(int(last.max()) + 1):
            normal = self._remembered(i, node[i], i <= last) if drawn is None else drawn[i]
            here = below + self._rows(share[i]) * (above - below) + self._rows(spread[i]) * normal
            below, above = (
                torch.where(self._on(right[i] | ends[i]), here, below),
                torch.where(self._on(~right[i] | ends[i]), here, above),
            )
        return below

    def increment(self, a: Tensor | float, b: Tensor | float) -> Tensor:
        """W(b) - W(a), `[B, *event]`: normal with variance |b - a|, b and a rounded to the grid."""
        return self(b) - self(a)

    def _remembered(self, level: int, node: Tensor, needed: Tensor) -> Tensor:
        """Normal numbers of a level's nodes: those of the last time, where these are the same nodes."""
        if level == len(self._last):
            self._last.append((torch.full_like(node, -1), torch.zeros_like(self._like)))
        seen, values = self._last[level]
        new = needed & (seen != node)
        if new.any():
            pick = new.nonzero()[:, 0]
            at = pick.to(values.device)
            values = values.index_copy(0, at, self._normal(node[pick], at))
            self._last[level] = torch.where(new, node, seen), values
        return values

    def _normal(self, node: Tensor, rows: Tensor | None = None) -> Tensor:
        """Standard normal numbers of nodes `[..., rows]`: `[..., rows, *event]`."""
        keys = self._keys if rows is None else self._keys[rows]
        start = _scrambled(keys ^ _scrambled(node.to(keys.device) * _GOLDEN))
        event = self._like.shape[1:]
        dtype = self._like.dtype if self._like.dtype in (torch.float32, torch.float64) else torch.float32
        drawn = counted_normal(start.flatten(), math.prod(event), dtype)
        return drawn.reshape(*start.shape, *event).to(self._like.dtype)

    def _index(self, t: Tensor | float) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64).cpu().expand(len(self._like))
        slack = 1e-12 / self._log[1]  # rounding of the logarithms
        place = (times.log() - self._log[0]) / self._log[1]
        if bool(((place < -slack) | (place > 1 + slack) | place.isnan()).any()):
            raise ValueError(
                f"BrownianTree: got times from {float(times.min())} to {float(times.max())}; expected them from "
                f"{self.low} to {self.high}"
            )
        return (place * (1 << self.depth)).round().long().clamp(0, 1 << self.depth)

    def _time(self, index: Tensor) -> Tensor:
        return torch.exp(self._log[0] + self._log[1] * index.double() / (1 << self.depth)).clamp(
            self.low, self.high
        )

    def _rows(self, values: Tensor) -> Tensor:
        return per_row(values.to(self._like.dtype).to(self._like.device), self._like)

    def _on(self, mask: Tensor) -> Tensor:
        return per_row(mask.to(self._like.device), self._like)


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _scrambled(state: Tensor) -> Tensor:
    """splitmix64's function of its state, on 64-bit integers that wrap around."""
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * _FIRST
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * _SECOND
    return state ^ (state >> 31 & (1 << 33) - 1)


def counted_normal(start: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`size` standard normal numbers of each generator, whose states are `start` `[B]`: `[B, size]`."""
    steps = torch.arange(1, (size + 1) // 2 + 1, device=start.device)
    bits = _scrambled(start.unsqueeze(1) + steps * _GOLDEN)
    one, two = bits >> 32 & 0xFFFFFFFF, bits & 0xFFFFFFFF
    radius = (-2 * torch.log((one.to(dtype) + 0.5) / 2.0**32)).sqrt()
    angle = two.to(dtype) * (2 * math.pi / 2.0**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :size]


def _row_keys(streams: Streams, key: int) -> Tensor:
    """A number for every row, from its seed and its own number."""
    if isinstance(streams.seed, int):
        start = mixed(streams.seed, _TREE, key)
        rows = torch.arange(streams.first, streams.first + streams.rows)
        return _scrambled(start + rows * _GOLDEN)
    seeds: Sequence[int] = streams.seed
    return torch.tensor([mixed(seed, _TREE, key) for seed in seeds])


_SMALL = 2**15  # scalars, up to which the numbers of all levels are drawn at once
_TREE = 0x42726F776E  # keeps a tree's numbers apart from those of `Streams.normal`
