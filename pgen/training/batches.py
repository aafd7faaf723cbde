"""Which rows a step sees, and which random numbers it draws: pure functions of the seed and the step.

With nothing else to remember, a run resumed at step i goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pgen.problem import Problem


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose, independent of those of every other purpose.

    >>> derive(0, "step", 1) == derive(0, "step", 1), derive(0, "step", 1) == derive(0, "step", 2)
    (True, False)
    """
    return (
        int.from_bytes(hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest(), "little") >> 1
    )


def generators(devices: Sequence[torch.device]) -> list[torch.Generator]:
    """The generators that torch draws from by default on the CPU and on these devices."""
    found = [torch.default_generator]
    for device in dict.fromkeys(devices):
        if device.type == "cuda":
            torch.cuda.init()
            found.append(
                torch.cuda.default_generators[
                    device.index if device.index is not None else torch.cuda.current_device()
                ]
            )
    return list({id(g): g for g in found}.values())


@contextmanager
def forked(devices: Sequence[torch.device]) -> Iterator[list[torch.Generator]]:
    """Lend torch's default generators, to be seeded at will, and give them back as they were.

    Seeding them one by one costs a microsecond, where `torch.manual_seed` visits every kind of accelerator.
    """
    lent = generators(devices)
    states = [generator.get_state() for generator in lent]
    try:
        yield lent
    finally:
        for generator, state in zip(lent, states, strict=True):
            generator.set_state(state)


def permutation(n: int, seed: int) -> Tensor:
    """An order of n rows, drawn on the CPU so that it is the same on every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def split(rows: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, both in ascending order; at least one of each."""
    held = min(max(1, round(fraction * rows)), rows - 1)
    order = permutation(rows, derive(seed, "held out"))
    return order[held:].sort().values, order[:held].sort().values


@dataclass
class Batches:
    """The batch of every step: `batches(step)` is a `Problem` on some of the rows.

    Epoch e visits the rows in an order drawn from (seed, e). The orders are laid end to end and cut into
    batches of equal size, so that each row is seen exactly once per epoch, no row is dropped and no batch is
    short; a batch that spans two epochs may hold a row twice. With no more rows than the batch size, or none,
    every batch is the whole.

    Attributes:
        problem: the whole.
        size: rows per batch.
        seed: determines every batch.
        rows: the rows to draw from, where that is not all of them.
        total: the number of rows that a batch stands for, where that is not all of them.
        device: where batches are moved to (None: nowhere).
        dtype: what floating-point data are cast to (None: nothing).
    """

    problem: Problem
    size: int
    seed: int
    rows: Tensor | None = None
    total: int | None = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _whole: Problem | None = field(default=None, init=False, repr=False)

    @property
    def count(self) -> int | None:
        """The number of rows to draw from."""
        return self.problem.rows if self.rows is None else self.rows.numel()

    @property
    def fixed(self) -> bool:
        """Whether every batch is the whole, one and the same object."""
        return self.count is None or self.count <= self.size

    def __call__(self, step: int) -> Problem:
        """The batch of that step."""
        count = self.count
        if count is None or self.fixed:
            if self._whole is None:
                every = torch.arange(count) if self.rows is None and count is not None else self.rows
                self._whole = self._moved(self.problem if every is None else self._taken(every))
            return self._whole
        epoch, start = divmod(step * self.size, count)
        index = self._order(epoch)[start : start + self.size]
        if index.numel() < self.size:
            index = torch.cat([index, self._order(epoch + 1)[: self.size - index.numel()]])
        return self._moved(self._taken(index))

    def slices(self) -> Iterator[Problem]:
        """All rows once, in order, in batches of at most the batch size."""
        count = self.count
        if count is None or count <= self.size:
            yield self(0)
            return
        every = torch.arange(count) if self.rows is None else self.rows
        for index in every.split(self.size):
            yield self._moved(self._taken(index))

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            count = self.count or 0
            order = permutation(count, derive(self.seed, "order", epoch))
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            order = order if self.rows is None else self.rows[order]
            # Where the data is, so that a step does not wait for indices to cross over.
            self._orders[epoch] = order.to(self.problem.device)
        return self._orders[epoch]

    def _taken(self, index: Tensor) -> Problem:
        taken = self.problem.take(index)
        return taken if self.total is None else replace(taken, total=self.total)

    def _moved(self, problem: Problem) -> Problem:
        return problem if self.device is None and self.dtype is None else problem.to(self.device, self.dtype)
