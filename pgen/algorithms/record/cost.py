"""How long a tape takes, about: enough to choose between two ways of doing the same.

The choice must not depend on a clock, or a run that is resumed would round differently. On processors, what counts is
the number of calls, and how long the innermost loop runs: memory is walked row by row, each of which costs as much as
ten numbers. Figures are of one core, measured with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgen.algorithms.record.sums import VIEWS
from pgen.algorithms.record.tape import Op, Tape

aten = torch.ops.aten
Values = dict[int, Tensor]

_LOOKS = VIEWS | {
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.split_with_sizes.default,
}  # fmt: skip
_REDUCTIONS = frozenset(
    {aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.logsumexp.default, aten.all.dim}
)
#: Nanoseconds a number, beyond reading and writing it.
_SLOW = {
    aten.where.self: 3.4, aten.masked_fill.Scalar: 3.4, aten.exp.default: 1.8, aten.log.default: 2.5,
    aten.log1p.default: 3.0, aten.logsumexp.default: 4.0,
}  # fmt: skip
_CALL, _REDUCE, _LOOK = 1200.0, 1800.0, 900.0
_NUMBER = 0.12
_ROW, _DEEP_ROW = 1.0, 2.8  # in a loop of two levels, or more
_SHORT_SUM = 20.0  # a result that is the sum of a few numbers
_SCATTERED = 1.0  # a number of a sum whose result lies in another order


def cost(tape: Tape, values: Values) -> float:
    """Nanoseconds, of operations that two ways of doing the same may differ in."""
    return sum(_cost(op, values) for op in tape.ops)


def _cost(op: Op, values: Values) -> float:
    if op.func in _LOOKS:
        return _LOOK
    tensors = [values[i] for i in (*op.reads(), *op.gives())]
    if not tensors:
        return _CALL
    largest = max(tensors, key=Tensor.numel)
    numbers = largest.numel()
    if op.func in _REDUCTIONS:
        source = values[op.reads()[0]]
        scattered = not source.is_contiguous()  # results are, always
        slow = tensors[-1].numel() * _SHORT_SUM if scattered or _shortest(source) < 4 else 0.0
        return _REDUCE + numbers * (_SCATTERED if scattered else _NUMBER) + slow
    row, levels = loops(tensors, largest.shape)
    each = _ROW if levels <= 2 else _DEEP_ROW
    return (
        _CALL + numbers * (_NUMBER + _SLOW.get(op.func, 0.0)) + (numbers / row * each if levels > 1 else 0.0)
    )


def _shortest(source: Tensor) -> int:
    """How many numbers lie side by side along one dimension."""
    order = sorted((s, n) for s, n in zip(source.stride(), source.shape, strict=True) if n > 1 and s > 0)
    return order[0][1] if order else 1


def loops(tensors: Sequence[Tensor], shape: torch.Size) -> tuple[int, int]:
    """The length of the innermost loop over tensors that are broadcast to one shape, and how many loops there are."""
    rows = []
    for tensor in tensors:
        lead = len(shape) - tensor.dim()
        if lead < 0 or any(n not in (1, whole) for n, whole in zip(tensor.shape, shape[lead:], strict=True)):
            return 1, 1
        strides = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        rows.append([0] * lead + strides)
    dims = [d for d, n in enumerate(shape) if n > 1]
    dims.sort(key=lambda d: [row[d] for row in rows[::-1]])  # as the result lies
    merged: list[tuple[int, int]] = []  # last dimension and length of each loop
    for d in dims:
        if merged and all(row[d] == row[merged[-1][0]] * shape[merged[-1][0]] for row in rows):
            merged[-1] = d, merged[-1][1] * shape[d]
        else:
            merged.append((d, shape[d]))
    return (merged[0][1] if merged else 1), len(merged)
