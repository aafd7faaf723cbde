r"""Random numbers of each sample's own: sample i of a seed is the same whatever is drawn beside it.

Rows are numbered, and noise is drawn by blocks of rows, each block and each draw from a generator of its own, whose
seed is a hash of (seed, draw, block). Where fewer rows are wanted than a block has, it is drawn whole and cut: so a row's
numbers depend on its number alone, at the speed of torch's own generator, and are the same on every device, as they are
drawn on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
_MASK = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """One 63-bit number from several: splitmix64 over them (Steele, Lea & Flood, OOPSLA 2014)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + (number & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Streams:
    """Standard normal numbers by row, one independent stream for each.

    Attributes:
        seed: of the samples; or one for each row, which then does not depend on its place.
        rows: how many.
        first: number of the first row, where they are a part of more.

    Example:
        >>> few, many = Streams(7, rows=2), Streams(7, rows=200)
        >>> like = torch.empty(0)
        >>> torch.equal(few.normal(3, (5,), like), many.normal(3, (5,), like)[:2])
        True
    """

    seed: int | Sequence[int]
    rows: int
    first: int = 0

    def normal(self, draw: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """The numbers of one draw, `[rows, *shape]`, of `like`'s dtype and device.

        Args:
            draw: which one: another number, other (independent) numbers.
            shape: of one row.
            like: a tensor to take dtype and device from.
        """
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        generator = torch.Generator()
        size = math.prod(shape)
        if not isinstance(self.seed, int):
            out = torch.empty(self.rows, size, dtype=dtype)
            for row, seed in zip(out, self.seed, strict=True):
                _fill(row, generator.manual_seed(mixed(seed, draw)))
            return out.reshape(self.rows, *shape).to(like)
        begin, end = self.first // BLOCK, -(-(self.first + self.rows) // BLOCK)
        out = torch.empty((end - begin) * BLOCK, size, dtype=dtype)
        for block in range(begin, end):
            part = out[(block - begin) * BLOCK : (block - begin + 1) * BLOCK]
            _fill(part, generator.manual_seed(mixed(self.seed, draw, block)))
        skip = self.first - begin * BLOCK
        return out[skip : skip + self.rows].reshape(self.rows, *shape).to(like)

    def part(self, first: int, rows: int) -> Streams:
        """The streams of some rows, numbered from 0 within these."""
        if isinstance(self.seed, int):
            return Streams(self.seed, rows, self.first + first)
        return Streams(self.seed[first : first + rows], rows)


def _fill(out: Tensor, generator: torch.Generator) -> None:
    """Standard normal numbers in place; whole vectors of torch's kernel, which does the last ones differently."""
    if out.numel() >= 16:
        out.normal_(generator=generator)
    else:
        out.copy_(
            torch.empty(16, dtype=out.dtype).normal_(generator=generator)[: out.numel()].view(out.shape)
        )
