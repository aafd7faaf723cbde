"""Passes over a tape: what is always the same is computed once, what is done twice is done once, what changes nothing goes.

A program run through Pyro, vmap and autograd does little arithmetic and much housekeeping: it makes zeros, expands
ones, looks at scalars as vectors. The operations are known with the shapes and values of one run, so:

    without_writes   x.masked_fill_(m, v)  ->  y = x.masked_fill(m, v), where nobody else sees x's memory
    folded           what depends on no input and on no chance is a constant
    plain            x * 1, x + 0, x ** 1, views that change nothing: x itself
    shared           the same operation on the same tensors, once
    alive            what nobody reads is not done

What writes to memory that others see, and what draws random numbers, stays where it is, as often as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.tape import Op, Ref, Tape, refs_in, renamed

Values = dict[int, Tensor]

aten = torch.ops.aten
#: Of a tensor they read the shape only.
_SHAPE_ONLY = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
#: They give their first argument, if it has the shape, strides and type of the result already.
_LOOKS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.detach.default,
    aten.alias.default, aten._to_copy.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
    aten.slice.Tensor, aten.permute.default, aten.squeeze.dim, aten.squeeze.default, aten.clone.default,
    aten.contiguous.default, aten._reshape_alias.default,
}  # fmt: skip
_LARGEST = 1 << 24  # numbers in a constant worth keeping


def simplified(tape: Tape, values: Values) -> Tape:
    """The tape after all passes; `values` are the tensors of one run, by number."""
    tape, values = without_writes(tape, values)
    guarded = _guarded(tape, values)
    tape = _folded(tape, values, guarded)
    tape = _plain(tape, values, guarded)
    tape = _shared(tape, guarded)
    return _alive(tape)


def without_writes(tape: Tape, values: Values) -> tuple[Tape, Values]:
    """In-place operations on memory that nobody else reads afterwards become plain ones with a result of their own."""
    outside = {_memory(values[i]) for i in (*tape.inputs, *tape.constants)}
    last: dict[int, int] = {}  # last operation that reads each number
    born: dict[int, int] = {}  # operation that made it
    for at, op in enumerate(tape.ops):
        for i in op.reads():
            last[i] = at
        for i in op.gives():
            born.setdefault(i, at)
    for i in tape.outputs:
        last[i] = len(tape.ops)
    sharing: dict[int, set[int]] = {}
    for i, value in values.items():
        sharing.setdefault(_memory(value), set()).add(i)
    names: dict[int, int] = {}
    values, fresh, ops = dict(values), max(values, default=0) + 1, []
    for at, op in enumerate(tape.ops):
        written = op.writes()
        plain = _functional(op.func) if len(written) == 1 else None
        (target,) = written if len(written) == 1 else (-1,)
        whole = target >= 0 and values[target].untyped_storage().nbytes() == values[target].nbytes
        seen = target < 0 or any(
            last.get(i, -1) > at and born.get(i, -1) < at
            for i in sharing[_memory(values[target])] - {target, *op.gives()}
        )
        if plain is None or not whole or seen or _memory(values[target]) in outside:
            ops.append(Op(op.func, renamed(op.args, names), renamed(op.kwargs, names), renamed(op.out, names)))
            continue
        new, fresh = fresh, fresh + 1
        values[new] = values[target]
        ops.append(Op(plain, renamed(op.args, names), renamed(op.kwargs, names), Ref(new)))
        for i in {target, *op.gives()}:
            names[i] = new
    kept = Tape(tape.inputs, tape.constants, ops, [names.get(i, i) for i in tape.outputs])
    return kept, values


def _functional(func: Any) -> Any:
    """The operation without a trailing underscore, of the same overload."""
    name, overload = func._schema.name.split("::")[1], func._overloadname
    if not name.endswith("_") or name.endswith("__") or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    if name in ("copy_", "zero_", "fill_", "resize_", "set_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, overload, None) if packet is not None else None


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _guarded(tape: Tape, values: Values) -> set[int]:
    """Numbers of tensors whose memory is written in place somewhere: left exactly as they are."""
    written = {_memory(values[i]) for op in tape.ops for i in op.writes()}
    return {i for i, value in values.items() if _memory(value) in written}


def _free(op: Op, guarded: set[int]) -> bool:
    """Whether an operation can be moved, merged or left out."""
    return not op.random and not op.writes() and guarded.isdisjoint([*op.reads(), *op.gives()])


def _folded(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    constants = {i: c for i, c in tape.constants.items()}
    known = set(constants) - guarded
    ops = []
    for op in tape.ops:
        shape_only = op.func in _SHAPE_ONLY
        fixed = _free(op, guarded) and (shape_only or all(i in known for i in op.reads()))
        fixed = fixed and torch.Tag.nondeterministic_bitwise not in op.func.tags and "empty" not in op.name
        if fixed and all(values[i].numel() <= _LARGEST for i in op.gives()):
            for i in op.gives():
                constants[i] = _compressed(values[i].detach())
                known.add(i)
        else:
            ops.append(op)
    return Tape(tape.inputs, constants, ops, tape.outputs)


def _compressed(value: Tensor) -> Tensor:
    """The same tensor, holding one slice where all slices along a dimension are equal."""
    if value.dim() == 0 or value.numel() < 2:
        return value
    small = value
    for dim, size in enumerate(value.shape):
        if size > 1:
            one = small.narrow(dim, 0, 1)
            if bool((small == one).all()):
                small = one
    return value if small.shape == value.shape else small.clone().expand(value.shape)


def _plain(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    names: dict[int, int] = {}
    ops = []
    for op in tape.ops:
        op = Op(op.func, renamed(op.args, names), renamed(op.kwargs, names), op.out)
        same = _same_as(op, values, tape.constants) if _free(op, guarded) and isinstance(op.out, Ref) else None
        if same is None:
            ops.append(_cheaper(op, values) if _free(op, guarded) else op)
        else:
            names[op.out.index] = same
    return Tape(tape.inputs, tape.constants, ops, [names.get(i, i) for i in tape.outputs])


def _same_as(op: Op, values: Values, constants: Values) -> int | None:
    """The number of an argument that is the result already."""
    if op.func in _LOOKS:
        (source,) = [a.index for a in op.args if isinstance(a, Ref)][:1] or (-1,)
        return source if source >= 0 and _alike(values[source], values[op.out.index]) else None
    rule = _NEUTRAL.get(op.func)
    if rule is None or len(op.args) < 2:
        return None
    neutral, both = rule
    pairs = [(op.args[0], op.args[1])] + ([(op.args[1], op.args[0])] if both else [])
    if op.kwargs.get("alpha", 1) != 1 or op.kwargs.get("rounding_mode"):
        return None
    for kept, other in pairs:
        if isinstance(kept, Ref) and _is_all(other, neutral, constants):
            if _alike(values[kept.index], values[op.out.index]):
                return kept.index
    return None


_NEUTRAL: dict[Any, tuple[float, bool]] = {
    aten.add.Tensor: (0.0, True), aten.sub.Tensor: (0.0, False), aten.add.Scalar: (0.0, False),
    aten.sub.Scalar: (0.0, False), aten.mul.Tensor: (1.0, True), aten.mul.Scalar: (1.0, False),
    aten.div.Tensor: (1.0, False), aten.div.Scalar: (1.0, False), aten.pow.Tensor_Scalar: (1.0, False),
}  # fmt: skip


def _is_all(argument: Any, number: float, constants: Values) -> bool:
    if isinstance(argument, Ref):
        value = constants.get(argument.index)
        return value is not None and bool((value == number).all())
    return isinstance(argument, (int, float)) and argument == number


def _alike(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def _cheaper(op: Op, values: Values) -> Op:
    """The same result by an operation that costs less."""
    if op.func is aten.sum.dim_IntList and len(op.args) >= 2 and op.args[1]:
        source, result = values[op.args[0].index], values[op.out.index]
        if source.numel() == result.numel() and source.dtype == result.dtype and source.is_contiguous():
            return Op(aten.view.default, (op.args[0], list(result.shape)), {}, op.out)
    return op


def _shared(tape: Tape, guarded: set[int]) -> Tape:
    names: dict[int, int] = {}
    seen: dict[Any, Any] = {}
    ops = []
    for op in tape.ops:
        op = Op(op.func, renamed(op.args, names), renamed(op.kwargs, names), op.out)
        key = (op.func, _hashable(op.args), _hashable(op.kwargs)) if _free(op, guarded) else None
        if key is not None and key in seen:
            names.update(zip(refs_in(op.out), refs_in(seen[key]), strict=True))
            continue
        if key is not None:
            seen[key] = op.out
        ops.append(op)
    return Tape(tape.inputs, tape.constants, ops, [names.get(i, i) for i in tape.outputs])


def _hashable(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple(_hashable(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _hashable(item)) for key, item in tree.items())
    return (type(tree), tree) if isinstance(tree, (int, float, bool)) else tree


def _alive(tape: Tape) -> Tape:
    needed, ops = set(tape.outputs), []
    for op in reversed(tape.ops):
        if op.random or op.writes() or not needed.isdisjoint(op.gives()):
            ops.append(op)
            needed.update(op.reads())
    constants = {i: c for i, c in tape.constants.items() if i in needed}
    return Tape(tape.inputs, constants, ops[::-1], tape.outputs)


def lifted(tape: Tape, low: torch.dtype, high: torch.dtype) -> Tape:
    """The same operations in another precision: constants and explicit types of `low` become `high`."""

    def lift(tree: Any) -> Any:
        if tree is low:
            return high
        if isinstance(tree, (tuple, list)):
            return type(tree)(lift(item) for item in tree)
        if isinstance(tree, dict):
            return {key: lift(item) for key, item in tree.items()}
        return tree

    constants = {i: c.to(high) if c.dtype == low else c for i, c in tape.constants.items()}
    ops = [Op(op.func, lift(op.args), lift(op.kwargs), op.out) for op in tape.ops]
    return Tape(tape.inputs, constants, ops, tape.outputs)


Pass = Callable[[Tape, Sequence[Tensor]], Tape]
