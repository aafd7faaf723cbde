"""Tensors of many chains, laid out so that the chain is the fastest index in memory.

`vmap` puts chains first, `[C, 3, 3]`, and memory follows: an operation along one of the small dimensions runs over
three numbers at a time. With the chains last in memory (the shapes stay what they are) it runs over all chains at once.
Element-wise operations and views keep the layout of what they read, so it is set where tensors come in and where other
operations make them. Reductions forget it; along three values they are done as additions, which keep it, and which take
5 microseconds in place of 27 for 256 chains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.record.builder import Builder, is_free
from pgen.algorithms.record.sums import VIEWS
from pgen.algorithms.record.tape import Op, Ref, Tape

aten = torch.ops.aten
Values = dict[int, Tensor]

_FEWEST_CHAINS = 32
_WIDEST = 64  # numbers per chain, beyond which rows are long enough
_WORTH = 8  # tensors with small dimensions that pay for the copies
_SHORT = 16  # numbers in a small dimension
_FEW = 4  # values along which reductions are unrolled
_LEAST, _MOST = 256, 1 << 22  # numbers in the result of such a reduction

_UNROLLED = {
    aten.sum.dim_IntList: aten.add.Tensor, aten.amax.default: aten.maximum.default,
    aten.amin.default: aten.minimum.default, aten.all.dim: aten.logical_and.default, aten.any.dim: aten.logical_or.default,
}  # fmt: skip
_KEEP = VIEWS | {aten.expand.default, aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.clone.default}


def unrolled(b: Builder, op: Op) -> Ref | None:
    """A reduction along a few values as that many operations on all the rest."""
    step = _UNROLLED.get(op.func)
    if step is None or op.kwargs or len(op.args) < 2 or b.value(op.args[0]).dtype != b.value(op.out).dtype:
        return None
    dims = op.args[1] if isinstance(op.args[1], (list, tuple)) else [op.args[1]]
    value = b.value(op.args[0])
    if (
        len(dims) != 1
        or not 2 <= value.shape[dims[0]] <= _FEW
        or not _LEAST <= b.value(op.out).numel() <= _MOST
    ):
        return None
    _, fastest = min((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1 and s > 0)
    if fastest > _SHORT:
        return None
    first, *rest = b.emit_all(aten.unbind.int, value.shape[dims[0]], op.args[0], dims[0])
    for part in rest:
        first = b.emit(step, first, part)
    keep = len(op.args) > 2 and op.args[2]
    return b.emit(aten.unsqueeze.default, first, dims[0] % value.dim()) if keep else first


def columned(tape: Tape, values: Values, guarded: set[int]) -> Tape | None:
    """The tape with chains last in memory; None where that would gain nothing."""
    chains = _chains(tape, values)
    if chains is None or sum(_in_rows(values[i], chains) for op in tape.ops for i in op.gives()) < _WORTH:
        return None
    ops: list[Op] = []
    names: dict[int, int] = {}
    fresh = tape.fresh()

    def turn(i: int) -> None:
        nonlocal fresh
        value = values[i]
        at = value.shape.index(chains)
        away = [d for d in range(value.dim()) if d != at] + [at]
        back = [away.index(d) for d in range(value.dim())]
        ops.append(Op(aten.permute.default, (Ref(i), away), {}, Ref(fresh)))
        kwargs = {"memory_format": torch.contiguous_format}
        ops.append(Op(aten.clone.default, (Ref(fresh),), kwargs, Ref(fresh + 1)))
        ops.append(Op(aten.permute.default, (Ref(fresh + 1), back), {}, Ref(fresh + 2)))
        names[i] = fresh + 2
        fresh += 3

    for i in tape.inputs:
        if i not in guarded and _in_rows(values[i], chains):
            turn(i)
    for op in tape.ops:
        ops.append(op.renamed(names))
        keeps = torch.Tag.pointwise in op.func.tags or op.func in _KEEP
        if (
            not keeps
            and isinstance(op.out, Ref)
            and is_free(op, guarded)
            and _in_rows(values[op.out.index], chains)
        ):
            turn(op.out.index)
    return Tape(tape.inputs, tape.constants, ops, [names.get(i, i) for i in tape.outputs], tape.live)


def _chains(tape: Tape, values: Values) -> int | None:
    """How many chains there are: the rows of the only matrix that comes in."""
    matrices = {values[i].shape[0] for i in tape.inputs if values[i].dim() == 2}
    (chains,) = matrices if len(matrices) == 1 else (0,)
    return chains if chains >= _FEWEST_CHAINS else None


def _in_rows(value: Tensor, chains: int) -> bool:
    if value.dim() < 2 or not value.is_floating_point() or chains not in value.shape:
        return False
    inner = value.shape[value.shape.index(chains) + 1 :].numel()
    return value.is_contiguous() and 1 < inner <= _WIDEST
