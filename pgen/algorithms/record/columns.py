"""Tensors of many chains, laid out so that the chain is the fastest index in memory.

`vmap` puts chains first, `[C, 3, 3]`, and memory follows: an operation along one of the small dimensions runs over
three numbers at a time. With the chains last in memory (the shapes stay what they are) it runs over all chains at once.
Element-wise operations and views keep the layout of what they read, so it is set where tensors come in and where other
operations make them. Reductions and the like forget it, unless they are done on views whose shape is as memory is; along
three values they may be additions, too, which take 5 microseconds in place of 27 for 256 chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.builder import Builder, is_free
from pgen.algorithms.record.sums import VIEWS
from pgen.algorithms.record.tape import Op, Ref, Tape, perform

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
#: What can be done with chains last.
_INSIDE = {
    aten.sum.dim_IntList: "reduce", aten.amax.default: "reduce", aten.amin.default: "reduce",
    aten.logsumexp.default: "reduce", aten.all.dim: "reduce", aten.any.dim: "reduce",
    aten.cat.default: "cat", aten.stack.default: "stack", aten.index_select.default: "select",
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
    return _Columns(tape, values, guarded, chains).run()


class _Columns:
    """Writes the tape; what has no effect but its result is performed as it is written, so that layouts are known."""

    def __init__(self, tape: Tape, values: Values, guarded: set[int], chains: int) -> None:
        self.tape, self.guarded, self.chains = tape, guarded, chains
        self.before = values
        self.values = tape.start([values[i] for i in tape.inputs])
        self.ops: list[Op] = []
        self.names: dict[int, int] = {}
        self.views: dict[
            int, tuple[Ref, list[int]]
        ] = {}  # what permuted tensors are views of, in which order
        self.fresh = tape.fresh()

    def run(self) -> Tape:
        tape, names = self.tape, self.names
        for i in tape.inputs:
            if i not in self.guarded and _in_rows(self.values[i], self.chains):
                names[i] = self.turned(Ref(i)).index
        for old in tape.ops:
            op = old.renamed(names)
            free = is_free(op, self.guarded)
            found = self.inside(op) if free else None
            if found is not None:
                names[op.out.index] = found.index
                continue
            self.ops.append(op)
            if free:
                perform(op, self.values)
            else:
                self.values.update((i, self.before[i]) for i in op.gives())
            if not free or not isinstance(op.out, Ref):
                continue
            if torch.Tag.pointwise in op.func.tags:
                if self.spread(op):
                    names[op.out.index] = self.element_wise(op).index
            elif op.func not in _KEEP and _in_rows(self.values[op.out.index], self.chains):
                names[op.out.index] = self.turned(op.out).index
        return Tape(tape.inputs, tape.constants, self.ops, [names.get(i, i) for i in tape.outputs], tape.live)

    def emit(self, func: Any, *args: Any, **kwargs: Any) -> Ref:
        out = Ref(self.fresh)
        self.fresh += 1
        self.ops.append(Op(func, args, kwargs, out))
        perform(self.ops[-1], self.values)
        return out

    def turned(self, it: Ref) -> Ref:
        """The same tensor, chains last in memory."""
        away = self.away(it)
        view = self.permuted(it, away)
        return self.back(self.emit(aten.clone.default, view, memory_format=torch.contiguous_format), away)

    def permuted(self, it: Ref, order: Sequence[int]) -> Ref:
        """A view with its dimensions in another order; views of views are views of the first."""
        order = [d % len(order) for d in order]
        if it.index in self.views:
            it, before = self.views[it.index]
            order = [before[d] for d in order]
        if order == [*range(len(order))]:
            return it
        out = self.emit(aten.permute.default, it, order)
        if it.index not in self.guarded:
            self.views[out.index] = it, order
        return out

    def away(self, it: Ref) -> list[int]:
        """The dimensions, that of the chains last."""
        shape = self.values[it.index].shape
        at = shape.index(self.chains)
        return [*(d for d in range(len(shape)) if d != at), at]

    def back(self, it: Ref, order: Sequence[int]) -> Ref:
        """A tensor whose dimensions come in this order, in their own."""
        return self.permuted(it, [order.index(d) for d in sorted(order)])

    def inside(self, op: Op) -> Ref | None:
        """What would forget the layout, done on tensors whose chains come last as in memory."""
        if op.func is aten.permute.default:
            return self.permuted(*op.args)
        kind = _INSIDE.get(op.func)
        if kind is None or op.kwargs or len(op.args) < 2:
            return None
        first = op.args[0]
        many = list(first) if isinstance(first, (list, tuple)) else [first]
        if not all(isinstance(it, Ref) and self.chains in self.values[it.index].shape for it in many):
            return None
        away = self.away(many[0])
        if any(self.away(it) != away for it in many) or not any(self.in_columns(it) for it in many):
            return None
        size = len(away) + (kind == "stack")
        dims = [d % size for d in (op.args[1] if isinstance(op.args[1], (list, tuple)) else [op.args[1]])]
        if not dims or (away[-1] in dims and kind != "stack"):
            return None
        inner = [self.permuted(it, away) for it in many]
        if kind == "reduce":
            keep = len(op.args) > 2 and bool(op.args[2])
            places = [away.index(d) for d in dims]
            along = places if isinstance(op.args[1], (list, tuple)) else places[0]
            left = away if keep else [d for d in away if d not in dims]
            order = [sorted(left).index(d) for d in left]
            return self.back(self.emit(op.func, inner[0], along, keep), order)
        if kind == "stack":
            (dim,) = dims
            order = [d + (d >= dim) for d in away]
            at = sum(d < dim for d in away[:-1])
            order.insert(at, dim)
            return self.back(self.emit(op.func, inner, at), order)
        (dim,) = dims
        what = inner if kind == "cat" else inner[0]
        return self.back(self.emit(op.func, what, away.index(dim), *op.args[2:]), away)

    def spread(self, op: Op) -> bool:
        """Whether an element-wise operation lost the layout to an argument that all chains share."""
        out = self.values[op.out.index]
        if self.chains not in out.shape or out.stride(out.shape.index(self.chains)) == 1:
            return False
        known = [i for i in op.reads() if self.chains in self.values[i].shape]
        return 0 < len(known) < len(op.reads()) and all(self.in_columns(Ref(i)) for i in known)

    def element_wise(self, op: Op) -> Ref:
        """The operation on views whose last dimension is that of the chains, which then is last in memory, too."""
        away = self.away(op.out)

        def aligned(it: Any) -> Any:
            if not isinstance(it, Ref) or not self.values[it.index].dim():
                return it
            while self.values[it.index].dim() < len(away):
                it = self.emit(aten.unsqueeze.default, it, 0)
            return self.permuted(it, away)

        self.ops.pop()
        return self.back(self.emit(op.func, *map(aligned, op.args), **op.kwargs), away)

    def in_columns(self, it: Ref) -> bool:
        """Whether chains come last in memory, though not in the shape."""
        value = self.values[it.index]
        at = value.shape.index(self.chains)
        return value.stride(at) == 1 and at < value.dim() - 1


def _chains(tape: Tape, values: Values) -> int | None:
    """How many chains there are: the rows of the only matrix that comes in."""
    matrices = {values[i].shape[0] for i in tape.inputs if values[i].dim() == 2}
    (chains,) = matrices if len(matrices) == 1 else (0,)
    return chains if chains >= _FEWEST_CHAINS else None


def _in_rows(value: Tensor, chains: int) -> bool:
    if value.dim() < 2 or not value.is_floating_point() or chains not in value.shape:
        return False
    inner = value.shape[value.shape.index(chains) + 1 :]
    if not value.is_contiguous() or inner.numel() == 1:
        return False
    return inner.numel() <= _WIDEST or inner[-1] <= _SHORT
