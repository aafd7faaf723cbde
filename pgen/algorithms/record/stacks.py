"""Pieces of a tensor put together again are a part of that tensor.

    stack([x[0], x[1], x[2]])            ->   x[0:3]
    stack([x[4], x[1], x[1]])            ->   x.index_select(0, [4, 1, 1])
    stack([x[0], y[0], x[1], y[1]])      ->   cat([x, y]).index_select(0, [0, 2, 1, 3])

A loop over time takes its data apart and puts its results together, and so does its gradient. Once steps are done at
once (see `together.py`), every piece costs a call, and is a part of what was whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pgen.algorithms.record.builder import Builder
from pgen.algorithms.record.tape import Op, Ref

aten = torch.ops.aten

_FEWEST = 4  # pieces
_WASTE = 4  # times as many numbers as are wanted may be brought together
_MOST = 1 << 22  # numbers in what is brought together


class _Piece(NamedTuple):
    """A slice of a tensor along a dimension."""

    whole: int
    dim: int
    at: int


def restacked(b: Builder, op: Op) -> Ref | None:
    """A stack of slices, from the tensors that they are slices of."""
    parts = op.args[0]
    if len(parts) < _FEWEST or op.kwargs:
        return None
    pieces = [_piece(b, part) for part in parts]
    dims = {piece.dim for piece in pieces if piece is not None}
    if len(dims) != 1:
        return None
    (dim,) = dims
    wholes = list(
        dict.fromkeys(
            part.index if piece is None else piece.whole for part, piece in zip(parts, pieces, strict=True)
        )
    )
    singles = {part.index for part, piece in zip(parts, pieces, strict=True) if piece is None}
    if len(wholes) > max(1, len(parts) // 4) or not _alike(b, wholes, singles, dim):
        return None
    start: dict[int, int] = {}
    total = 0
    for i in wholes:
        start[i] = total
        total += 1 if i in singles else b.values[i].shape[dim]
    one = b.value(parts[0]).numel()
    if len(wholes) > 1 and (total > _WASTE * len(parts) or total * one > _MOST):
        return None
    at = [
        start[part.index] if piece is None else start[piece.whole] + piece.at
        for part, piece in zip(parts, pieces, strict=True)
    ]
    refs = [b.emit(aten.unsqueeze.default, Ref(i), dim) if i in singles else Ref(i) for i in wholes]
    base = refs[0] if len(refs) == 1 else b.emit(aten.cat.default, refs, dim)
    found = selected(b, base, dim, at)
    rank = b.value(found).dim()
    to = (op.args[1] if len(op.args) > 1 else 0) % rank
    if to != dim:
        order = [d for d in range(rank) if d != dim]
        order.insert(to, dim)
        found = b.emit(aten.permute.default, found, order)
    if b.drawing and b.value(found).stride() != b.value(op.out).stride():
        # random numbers are drawn in the order of memory, and tensors made like this one lie as it does
        return b.emit(aten.clone.default, found, memory_format=torch.contiguous_format)
    return found


def sum_of_selected(b: Builder, op: Op) -> Ref | None:
    """A sum of slices in another order, in the order in which they are there."""
    made = b.maker(op.args[0], aten.index_select.default)
    if made is None or op.kwargs or not op.args[1] or not b.is_constant(made.args[2]):
        return None
    source, dim, index = made.args
    rank, at = b.value(source).dim(), b.value(index)
    if dim % rank not in {d % rank for d in op.args[1]} or len(at) != b.value(source).shape[dim]:
        return None
    if not torch.equal(at.sort().values, torch.arange(len(at), device=at.device)):
        return None
    return b.emit(op.func, source, *op.args[1:])


def selected(b: Builder, whole: Ref, dim: int, at: Sequence[int]) -> Ref:
    """Slices of a tensor along a dimension, by their places: a view of it where the places are evenly spaced."""
    n, size = len(at), b.value(whole).shape[dim]
    step = at[1] - at[0] if n > 1 else 1
    if step > 0 and all(later - earlier == step for earlier, later in itertools.pairwise(at)):
        if step == 1 and n == size:
            return whole
        return b.emit(aten.slice.Tensor, whole, dim, at[0], at[-1] + 1, step)
    index = b.constant(torch.tensor(at, device=b.value(whole).device))
    return b.emit(aten.index_select.default, whole, dim, index)


def _piece(b: Builder, part: Ref) -> _Piece | None:
    """What a tensor is a slice of, if it is one."""
    made = b.maker(part, aten.select.int, aten.unbind.int)
    if made is None:
        return None
    whole = made.args[0].index
    dim = made.args[1] if len(made.args) > 1 else 0
    rank, size = b.values[whole].dim(), b.values[whole].shape[dim]
    if made.func is aten.select.int:
        return _Piece(whole, dim % rank, made.args[2] % size)
    return _Piece(whole, dim % rank, made.gives().index(part.index))


def _alike(b: Builder, wholes: Sequence[int], singles: set[int], dim: int) -> bool:
    """Whether tensors can be brought together along a dimension."""
    kinds = set()
    for i in wholes:
        value = b.values[i]
        shape = list(value.shape)
        if i not in singles:
            del shape[dim]
        kinds.add((tuple(shape), value.dtype, value.device))
    return len(kinds) == 1
