"""Sums of many terms: what is linear is done to the sum, and what is left is added at once.

    f(a) + f(b) + f(c) + x   ->   f(a + b + c) + x        for linear f
    a + b + c + d            ->   stack([a, b, c, d]).sum(0)

Autograd adds up the gradients of every use of a value, after taking each through all the operations that lead back to
it. These are linear, and most are the same for every use, so one passage is enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from pgen.algorithms.record.builder import Builder
from pgen.algorithms.record.tape import Op, Ref

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.squeeze.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.detach.default,
        aten.alias.default, aten._reshape_alias.default, aten.reshape.default,
    }
)  # fmt: skip
_ADD = aten.add.Tensor
#: Linear in their first argument, the others being what they are.
_FIRST = VIEWS | {
    aten.neg.default, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.sum.dim_IntList, aten.expand.default,
    aten.slice_backward.default, aten.select_backward.default,
}  # fmt: skip
#: Linear in each of two.
_EITHER = frozenset({aten.mul.Tensor, aten.mm.default, aten.bmm.default})
_MANY = 4  # terms that are stacked to be added
_LARGEST = 1 << 14  # numbers in a term: beyond, stacking costs more than it saves
_SMALL = 1 << 16  # numbers in a sum's argument: beyond, adding first costs more than summing twice


def one_total(b: Builder, op: Op) -> Ref | None:
    """A tree of additions, from its root."""
    if not _adds(b, op) or (b.uses[op.out.index] == 1 and _adds(b, b.reader.get(op.out.index))):
        return None
    terms, changed = _total(b, list(op.args))
    if not changed and all(len(group) < _MANY for group in _by_shape(b, terms).values()):
        return None
    return b.like(_added(b, terms), op)


def _adds(b: Builder, op: Op | None) -> bool:
    """Whether an operation adds two tensors of one type."""
    if op is None or op.func is not _ADD or op.kwargs or not all(isinstance(a, Ref) for a in op.args):
        return False
    kinds = {b.value(a).dtype for a in (*op.args, op.out)}
    return len(kinds) == 1 and b.value(op.out).is_floating_point()


def _total(b: Builder, terms: list[Ref]) -> tuple[list[Ref], bool]:
    """Terms of the same total, fewer if some share a linear operation."""
    leaves = []
    while terms:
        term = terms.pop()
        made = b.maker(term, _ADD)
        if made is not None and b.only(term) and _adds(b, made):
            terms.extend(made.args)
        else:
            leaves.append(term)
    changed = False
    while (found := _largest(b, leaves)) is not None:
        group, place = found
        ops = [b.made[term.index] for term in group]
        inner, _ = _total(b, [op.args[at] for op, at in zip(ops, place, strict=True)])
        first, at = ops[0], place[0]
        args = (*first.args[:at], _added(b, inner), *first.args[at + 1 :])
        done = set(group)
        leaves = [term for term in leaves if term not in done] + [b.emit(first.func, *args, **first.kwargs)]
        changed = True
    return leaves, changed


def _by_shape(b: Builder, terms: Sequence[Ref]) -> dict[torch.Size, list[Ref]]:
    """Terms that can be stacked, together."""
    found: dict[torch.Size, list[Ref]] = defaultdict(list)
    for term in terms:
        if b.value(term).numel() <= _LARGEST:
            found[b.value(term).shape].append(term)
    return found


def _largest(b: Builder, terms: Sequence[Ref]) -> tuple[list[Ref], list[int]] | None:
    """Most terms that share a linear operation, with the places of their own arguments."""
    groups: dict[Any, list[tuple[Ref, int]]] = defaultdict(list)
    for term in terms:
        made = b.made.get(term.index)
        if made is None or not isinstance(made.out, Ref) or not b.only(term):
            continue
        for at in _linear_in(b, made):
            own = b.value(made.args[at])
            others = (_key(made.args[:at]), _key(made.args[at + 1 :]), _key(tuple(made.kwargs.items())))
            if made.func is aten.mul.Tensor:
                others = (_key(made.args[1 - at]),)
            elif made.func in _EITHER:
                others = (at, *others)
            groups[made.func, own.shape, own.dtype, others].append((term, at))
    largest: list[tuple[Ref, int]] = max(groups.values(), key=len, default=[])
    best = list({term: (term, at) for term, at in largest}.values())
    return ([term for term, _ in best], [at for _, at in best]) if len(best) > 1 else None


def _linear_in(b: Builder, op: Op) -> tuple[int, ...]:
    """Places of arguments in each of which an operation is linear, the others being what they are."""
    if op.func in _EITHER:
        places: tuple[int, ...] = (0, 1)
    elif op.func in _FIRST:
        if op.func is aten.sum.dim_IntList and b.value(op.args[0]).numel() > _SMALL:
            return ()
        places = () if op.kwargs else (0,)
    elif op.func is aten.where.self and not op.kwargs and is_zero(b, op.args[2]):
        places = (1,)
    elif op.func is aten.masked_fill.Scalar and op.args[2] == 0:
        places = (0,)
    elif op.func is aten.index_put.default and len(op.args) > 3 and op.args[3] and is_zero(b, op.args[0]):
        places = (2,)
    elif op.func is aten.constant_pad_nd.default and (len(op.args) < 3 or op.args[2] == 0):
        places = (0,)
    else:
        places = ()
    kind = b.value(op.out).dtype
    return tuple(at for at in places if isinstance(op.args[at], Ref) and b.value(op.args[at]).dtype == kind)


def is_zero(b: Builder, argument: Any) -> bool:
    """Whether an argument is zero in every element and every run."""
    if not (isinstance(argument, Ref) and b.is_constant(argument)) or b.value(argument).is_meta:
        return False
    return bool((b.value(argument) == 0).all())


def _key(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple(_key(item) for item in tree)
    return (type(tree), repr(tree)) if isinstance(tree, (int, float)) else tree


def _added(b: Builder, terms: Sequence[Ref]) -> Ref:
    """The sum of all terms."""
    left = list(terms)
    for group in _by_shape(b, terms).values():
        if len(group) >= _MANY:
            total = b.emit(aten.sum.dim_IntList, b.emit(aten.stack.default, group), [0])
            done = set(group)
            left = [total, *(term for term in left if term not in done)]
    left.sort(key=lambda term: b.value(term).numel())
    total = left[0]
    for term in left[1:]:
        total = b.emit(_ADD, total, term)
    return total
