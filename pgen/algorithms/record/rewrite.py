"""Rules that make arithmetic cheaper without changing it, to round-off.

    unchanged     x + 0, x * 1: x, however it lies in memory
    never         exp(x) < 0 is false; what is masked or chosen by constants is not masked or chosen
    unexpanded    f(expand(x)) = expand(f(x)): element by element, what repeats is computed once
    merged        (x - a) - b = x - (a + b), (x a) b = x (a b), -(x a) = x (-a), for constants a and b
    doubled       x a + x a = x (2 a): the gradient of a square
    one_view      a view of a view is a view
    one_sum       a sum of a sum is a sum
    not_indexed   x[[0, 1, 2]] is x
    restacked     slices of a tensor put together again (see `stacks.py`)
    one_total     sums of many terms (see `sums.py`)

Each is a function of the builder and one operation, and gives what to put in the place of the result, or None.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from pgen.algorithms.record.builder import Builder
from pgen.algorithms.record.stacks import restacked, sum_of_selected
from pgen.algorithms.record.sums import VIEWS, is_zero, one_total
from pgen.algorithms.record.tape import Op, Ref, memory
from pgen.algorithms.record.verify import layout

aten = torch.ops.aten

_EXPAND = aten.expand.default
_ADD, _SUB, _NEG = aten.add.Tensor, aten.sub.Tensor, aten.neg.default
_MUL, _DIV = aten.mul.Tensor, aten.div.Tensor


#: Operations that do nothing to a tensor with this number, and whether it may come first.
NEUTRAL: dict[Any, tuple[float, bool]] = {
    aten.add.Tensor: (0.0, True), aten.sub.Tensor: (0.0, False), aten.add.Scalar: (0.0, False),
    aten.sub.Scalar: (0.0, False), aten.mul.Tensor: (1.0, True), aten.mul.Scalar: (1.0, False),
    aten.div.Tensor: (1.0, False), aten.div.Scalar: (1.0, False), aten.pow.Tensor_Scalar: (1.0, False),
}  # fmt: skip
_POSITIVE = (aten.exp.default, aten.sigmoid.default, aten.softplus.default, aten.square.default)


def unchanged(b: Builder, op: Op) -> Ref | None:
    """What a neutral number is added to, or multiplied by."""
    if len(op.args) != 2 or op.kwargs:
        return None
    neutral, both = NEUTRAL[op.func]
    for kept, other in [(op.args[0], op.args[1]), (op.args[1], op.args[0])][: 1 + both]:
        if isinstance(kept, Ref) and _all(b, other, neutral) and b.like(kept, op) is not None:
            return kept
    return None


def never(b: Builder, op: Op) -> Ref | None:
    """Whether a positive number is below zero: a support's check that a bijection onto it has made needless."""
    least = op.args[1]
    below = (op.func is aten.lt.Scalar and least <= 0) or (op.func is aten.le.Scalar and least < 0)
    if not below or b.maker(op.args[0], *_POSITIVE) is None:
        return None
    value = b.value(op.out)
    return b.constant(value.new_zeros(()).expand(value.shape))


def decided(b: Builder, op: Op) -> Ref | None:
    """What a constant mask leaves as it is, or a constant condition chooses."""
    if op.func is aten.where.self:
        condition, yes, no = op.args
        kept = yes if _all(b, condition, True) else no if _all(b, condition, False) else None
    else:
        kept = op.args[0] if _all(b, op.args[1], False) else None
    return b.like(kept, op) if isinstance(kept, Ref) else None


def _all(b: Builder, argument: Any, number: float) -> bool:
    """Whether an argument is this number, in every element and in every run."""
    if not b.is_constant(argument):
        return False
    if not isinstance(argument, Ref):
        return argument == number
    value = b.value(argument)
    return not value.is_meta and bool((value == number).all())


def unexpanded(b: Builder, op: Op) -> Ref | None:
    """Element-wise operations on what is not expanded yet."""
    if torch.Tag.pointwise not in op.func.tags or not any(b.maker(a, _EXPAND) for a in op.args):
        return None
    if any(isinstance(a, (list, tuple)) for a in op.args) or any(
        isinstance(v, Ref) for v in op.kwargs.values()
    ):
        return None
    small = [made.args[0] if (made := b.maker(a, _EXPAND)) else a for a in op.args]
    found = b.emit(op.func, *small, **op.kwargs)
    value, result = b.value(found), b.value(op.out)
    if value.dtype != result.dtype:  # scalars promote less
        return None
    return found if value.shape == result.shape else b.emit(_EXPAND, found, list(result.shape))


def views_of_expanded(b: Builder, op: Op) -> Ref | None:
    """Expand last, so that `unexpanded` finds it."""
    made = b.maker(op.args[0], _EXPAND)
    if made is None:
        return None
    source, whole = b.value(made.args[0]), b.value(op.args[0])
    small = made.args[0]
    if source.dim() < whole.dim():
        small = b.emit(aten.reshape.default, small, [1] * (whole.dim() - source.dim()) + list(source.shape))
    found = b.emit(op.func, small, *op.args[1:])
    return b.emit(_EXPAND, found, list(b.value(op.out).shape))


def one_view(b: Builder, op: Op) -> Ref | None:
    """A chain of views as one view of where it began, if that can be had."""
    source, result = op.args[0], b.value(op.out)
    while (made := b.maker(source, *VIEWS)) is not None and memory(b.value(made.args[0])) == memory(result):
        source = made.args[0]
    base = b.value(source)
    if base.numel() != result.numel() or base.dtype != result.dtype or memory(base) != memory(result):
        return None
    if base.shape == result.shape and base.stride() == result.stride():
        return source
    if op.func is aten.reshape.default and source == op.args[0]:
        return None
    try:
        there = base.view(result.shape)
    except RuntimeError:
        return None
    return (
        b.emit(aten.reshape.default, source, list(result.shape)) if layout(there) == layout(result) else None
    )


def sum_viewed(b: Builder, op: Op) -> Ref | None:
    """A sum that keeps its dimensions, without them."""
    made = b.maker(op.args[0], aten.sum.dim_IntList)
    if made is None or made.kwargs or len(made.args) < 3 or not made.args[2] or not made.args[1]:
        return None
    rank = b.value(made.args[0]).dim()
    dims = {d % rank for d in made.args[1]}
    left = [n for d, n in enumerate(b.value(made.args[0]).shape) if d not in dims]
    if list(b.value(op.out).shape) != left or not b.only(op.args[0]):
        return None
    return b.emit(aten.sum.dim_IntList, made.args[0], made.args[1])


def one_sum(b: Builder, op: Op) -> Ref | None:
    """A sum over some dimensions of a sum over others."""
    inner = b.maker(op.args[0], aten.sum.dim_IntList)
    if (
        inner is None
        or op.kwargs
        or inner.kwargs
        or not b.only(op.args[0])
        or not (op.args[1] and inner.args[1])
    ):
        return None
    if len(inner.args) > 2 and inner.args[2]:
        return None
    rank = b.value(inner.args[0]).dim()
    first = {d % rank for d in inner.args[1]}
    left = [d for d in range(rank) if d not in first]
    second = {left[d % len(left)] for d in op.args[1]}
    keep = len(op.args) > 2 and op.args[2]
    if keep:
        return None
    return b.like(b.emit(aten.sum.dim_IntList, inner.args[0], sorted(first | second)), op)


def as_terms(b: Builder, op: Op) -> tuple[Ref, int, list[tuple[Any, int]]] | None:
    """x and the constants that an operation adds to it: `sign x + Σ sign c`."""
    if op.func is _NEG:
        return op.args[0], -1, []
    if op.func in (_ADD, _SUB, aten.add.Scalar, aten.sub.Scalar) and len(op.args) == 2 and not op.kwargs:
        one, other = op.args
        sign = -1 if op.func in (_SUB, aten.sub.Scalar) else 1
        if isinstance(one, Ref) and not b.is_constant(one) and b.is_constant(other):
            return one, 1, [(other, sign)]
        if isinstance(other, Ref) and b.is_constant(one) and not b.is_constant(other):
            return other, sign, [(one, 1)]
    if (
        op.func is aten.rsub.Scalar
        and len(op.args) == 2
        and isinstance(op.args[0], Ref)
        and not b.is_constant(op.args[0])
    ):
        return op.args[0], -1, [(op.args[1], 1)]
    return None


def not_indexed(b: Builder, op: Op) -> Ref | None:
    """Looking up all values in order, as an enumerated program does, is a view; and so is its gradient."""
    source, indices = op.args[0], op.args[1]
    places = [at for at, index in enumerate(indices) if index is not None]
    if len(places) != 1 or not b.is_constant(indices[places[0]]):
        return None
    at, index = places[0], b.value(indices[places[0]])
    size = b.value(source).shape[at]
    if index.is_meta or index.dtype != torch.int64 or index.numel() != size:
        return None
    if not torch.equal(index.reshape(-1), torch.arange(size, device=index.device)):
        return None
    shape = list(b.value(source).shape)
    if op.func is aten.index.Tensor:
        return b.emit(aten.reshape.default, source, [*shape[:at], *index.shape, *shape[at + 1 :]])
    if len(op.args) < 4 or not op.args[3] or not is_zero(b, source):
        return None
    value = b.value(op.args[2])
    if (
        list(value.shape) != [*shape[:at], *index.shape, *shape[at + 1 :]]
        or value.dtype != b.value(source).dtype
    ):
        return None
    return b.emit(aten.reshape.default, op.args[2], shape)


def merged_terms(b: Builder, op: Op) -> Ref | None:
    """Constants that are added one after the other, added at once."""
    outer = as_terms(b, op)
    if outer is None or not b.only(outer[0]) or not _one_type(b, outer[0], op):
        return None
    made = b.made.get(outer[0].index)
    inner = as_terms(b, made) if made is not None else None
    if inner is None:
        return None
    x, sign, terms = inner[0], inner[1] * outer[1], [(c, s * outer[1]) for c, s in inner[2]] + outer[2]
    if not terms:
        return x if sign > 0 else None
    total = _sum(b, terms)
    if total is None or not _narrow(b, total, op):
        return None
    found = b.emit(_ADD, x, total) if sign > 0 else b.emit(_SUB, total, x) if isinstance(total, Ref) else None
    found = b.emit(aten.rsub.Scalar, x, total) if found is None else found
    return b.like(found, op)


def _sum(b: Builder, terms: list[tuple[Any, int]]) -> Any:
    total: Any = None
    for constant, sign in terms:
        if total is None:
            total = constant if sign > 0 else _applied(b, _NEG, constant)
        else:
            total = _applied(b, _ADD if sign > 0 else _SUB, total, constant)
    return total


def as_factor(b: Builder, op: Op) -> tuple[Ref, Any, bool] | None:
    """x and the constant by which an operation multiplies it, or divides it."""
    if op.kwargs or len(op.args) > 2:
        return None
    if op.func is _NEG:
        return op.args[0], -1.0, False
    one, other = (*op.args, None)[:2]
    scales = op.func in (_MUL, aten.mul.Scalar, _DIV, aten.div.Scalar)
    if scales and isinstance(one, Ref) and not b.is_constant(one) and b.is_constant(other):
        return one, other, op.func in (_DIV, aten.div.Scalar)
    if op.func is _MUL and b.is_constant(one) and isinstance(other, Ref) and not b.is_constant(other):
        return other, one, False
    return None


def merged_factors(b: Builder, op: Op) -> Ref | None:
    """Constants that multiply one after the other, multiplied at once."""
    outer = as_factor(b, op)
    if outer is None or not b.only(outer[0]) or not _one_type(b, outer[0], op):
        return None
    made = b.made.get(outer[0].index)
    inner = as_factor(b, made) if made is not None else None
    if inner is None:
        return None
    if inner[2]:
        factor = (
            _applied(b, _DIV, outer[1], inner[1]) if not outer[2] else _quotient(b, 1.0, inner[1], outer[1])
        )
    else:
        factor = _applied(b, _DIV if outer[2] else _MUL, inner[1], outer[1])
    if factor is None or not _narrow(b, factor, op) or not _finite(b, factor):
        return None
    return b.like(b.emit(_MUL, inner[0], factor), op)


def doubled(b: Builder, op: Op) -> Ref | None:
    """What is a multiple by a constant, added to itself: a multiple by twice the constant."""
    if op.kwargs or len(op.args) != 2 or not isinstance(op.args[0], Ref) or op.args[0] != op.args[1]:
        return None
    made = b.made.get(op.args[0].index) if b.uses[op.args[0].index] == 2 else None
    inner = as_factor(b, made) if made is not None else None
    if inner is None or inner[2] or not _one_type(b, inner[0], op):
        return None
    factor = _applied(b, _MUL, _unrepeated(b, inner[1]), 2.0)
    return b.like(b.emit(_MUL, inner[0], factor), op) if _narrow(b, factor, op) else None


def _quotient(b: Builder, one: Any, first: Any, second: Any) -> Any:
    return _applied(b, _DIV, one, _applied(b, _MUL, first, second))


def _applied(b: Builder, func: Any, *args: Any) -> Any:
    """An operation on constants: numbers stay numbers."""
    if not any(isinstance(a, Ref) for a in args):
        return None if func is _DIV and args[1] == 0 else _ON_NUMBERS[func](*map(float, args))
    if isinstance(args[0], Ref):
        return b.emit(func, *args)
    if func is _DIV:  # a number over a tensor
        return b.emit(_MUL, b.emit(aten.reciprocal.default, args[1]), args[0])
    if func is _SUB:
        return b.emit(aten.rsub.Scalar, args[1], args[0])
    return b.emit(func, args[1], args[0])


_ON_NUMBERS: dict[Any, Any] = {
    _NEG: operator.neg, _ADD: operator.add, _SUB: operator.sub, _MUL: operator.mul, _DIV: operator.truediv,
}  # fmt: skip


def _unrepeated(b: Builder, constant: Any) -> Any:
    """A constant without the dimensions along which it only repeats, but for one place."""
    if isinstance(constant, Ref):
        value = b.value(constant)
        for d, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
            if size > 1 and stride == 0:
                constant = b.emit(aten.slice.Tensor, constant, d, 0, 1)
    return constant


def _narrow(b: Builder, constant: Any, op: Op) -> bool:
    """Whether a constant takes less room than the result that it serves."""
    if not isinstance(constant, Ref):
        return True
    value, result = b.value(constant), b.value(op.out)
    return value.dtype == result.dtype and (
        value.numel() <= max(1, result.numel() // 2) or value.numel() <= _SMALL
    )


def _one_type(b: Builder, argument: Ref, op: Op) -> bool:
    kind = b.value(op.out).dtype
    return kind.is_floating_point and b.value(argument).dtype == kind


def _finite(b: Builder, constant: Any) -> bool:
    value = b.value(constant) if isinstance(constant, Ref) else torch.tensor(float(constant))
    return not value.is_meta and bool(torch.isfinite(value).all())


_SMALL = 1 << 16


RULES = (
    (None, unexpanded),
    (frozenset(NEUTRAL), unchanged),
    (frozenset({aten.lt.Scalar, aten.le.Scalar}), never),
    (frozenset({aten.masked_fill.Scalar, aten.where.self}), decided),
    (
        frozenset({aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.t.default}),
        views_of_expanded,
    ),
    (frozenset({aten.reshape.default}), sum_viewed),
    (VIEWS, one_view),
    (frozenset({aten.sum.dim_IntList}), one_sum),
    (frozenset({aten.sum.dim_IntList}), sum_of_selected),
    (frozenset({aten.index.Tensor, aten.index_put.default}), not_indexed),
    (frozenset({_ADD, _SUB, _NEG, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar}), merged_terms),
    (frozenset({_MUL, _DIV, _NEG, aten.mul.Scalar, aten.div.Scalar}), merged_factors),
    (frozenset({aten.stack.default}), restacked),
    (frozenset({_ADD}), doubled),
    (frozenset({_ADD}), one_total),
)
