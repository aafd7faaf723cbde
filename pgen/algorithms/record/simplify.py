"""The same result by fewer operations: what is always the same is computed once, and what changes nothing goes.

A program run through Pyro, vmap and autograd does little arithmetic and much housekeeping: it makes zeros, expands
ones, looks at scalars as vectors. The operations are known with the shapes and values of one run, so:

    without_writes   what is written in place where nobody else looks gets a name of its own (see `writes.py`)
    folded           what depends on no input and on no chance is a constant
    plain            x * 1, x + 0, x ** 1, views that change nothing: x itself
    shared           the same operation on the same tensors, once
    alive            what nobody reads is not done
    slim             constants that repeat one number hold it once
    rewritten        cheaper arithmetic (see `rewrite.py`, `sums.py`)
    together         the same operation on many tensors, at once (see `together.py`)
    columned         small dimensions outside, chains inside (see `columns.py`), where that pays (see `cost.py`)

Each gives a tape that can be run, and no pass is trusted: the fastest tape that gives the right numbers is taken. What
writes to memory that others see, and what draws random numbers, stays where it is, as often as it was. Numbers
stay what they were, to round-off; the sign of a zero may change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.builder import Builder, is_free
from pgen.algorithms.record.columns import columned, unrolled
from pgen.algorithms.record.cost import cost
from pgen.algorithms.record.outputs import steady
from pgen.algorithms.record.rewrite import NEUTRAL, RULES
from pgen.algorithms.record.tape import Op, Ref, Tape, memory
from pgen.algorithms.record.together import together
from pgen.algorithms.record.verify import Trial, close
from pgen.algorithms.record.writes import without_writes

Values = dict[int, Tensor]

aten = torch.ops.aten
#: Of a tensor they read the shape only.
_SHAPE_ONLY = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.fill.Scalar, aten.zero.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
#: They give their first argument, if it has the shape, strides and type of the result already.
_LOOKS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.detach.default,
    aten.alias.default, aten._to_copy.default, aten.lift_fresh_copy.default, aten.lift_fresh.default,
    aten.slice.Tensor, aten.permute.default, aten.squeeze.dim, aten.squeeze.default, aten.clone.default,
    aten.contiguous.default, aten._reshape_alias.default, aten.copy.default,
}  # fmt: skip
#: Element-wise, though torch does not say so.
_POINTWISE = {
    aten.softplus_backward.default, aten.sigmoid_backward.default, aten.tanh_backward.default,
    aten.silu_backward.default, aten.gelu_backward.default, aten.elu_backward.default,
    aten.threshold_backward.default, aten.leaky_relu_backward.default, aten.hardtanh_backward.default,
}  # fmt: skip
_RIGID = {aten.view.default, aten._unsafe_view.default}
MISTAKES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
_LARGEST = 1 << 25  # bytes in a constant worth keeping
_COMPARED = 1 << 16  # bytes in a constant worth comparing with others
_ROUNDS = 4
_GAIN = 0.9  # another way of doing the same has to promise this


def simplified(tape: Tape, values: Values, trial: Trial | None = None) -> Tape:
    """The fastest tape that gives what a tape gives.

    Args:
        tape: as it was recorded.
        values: the tensors of one run, by number.
        trial: inputs for more runs; by default those of that run.
    """
    return fastest(tape, values, trial or Trial.on(tape, [values[i] for i in tape.inputs]))[0]


def fastest(tape: Tape, values: Values, trial: Trial) -> tuple[Tape, str | None]:
    """The same, with why it is not a faster one, should a pass have gone wrong."""
    found: list[Tape] = []
    trouble = None
    try:
        found.extend(versions(tape, values, trial))
    except MISTAKES as error:
        trouble = f"{type(error).__name__}: {error}"
    if not found:
        return tape, trouble
    expected, as_was = trial.outcome(tape.results), trial.values(found[0])
    for way in reversed(found):
        try:
            way = steady(way, trial.values(way), found[0], as_was)
            difference = trial.outcome(way.results).differs(expected, strides=False)
        except MISTAKES as error:
            difference = f"{type(error).__name__}: {error}"
        if difference is None:
            return way, trouble
        trouble = trouble or difference
    return tape, trouble


def versions(tape: Tape, values: Values, trial: Trial) -> Iterator[Tape]:
    """Tapes that do the same, the fastest last; on the first one tensors lie in memory as they did."""
    with trial.copies() as copies:
        tape, values = without_writes(tape, values, copies)
    tape = alive(tape)
    yield tape
    guarded = guarded_in(tape, values)
    tape = pliable(tape, guarded)
    tape = shorter(distinct(folded(tape, values, guarded), guarded), values, guarded)
    tape, values = slimmed(tape, values, trial)
    yield tape
    tape = rewritten(tape, values, guarded)
    yield tape
    tape = rewritten(together(tape, values, guarded), values, guarded)
    tape, values = slimmed(tape, values, trial)
    yield tape
    small = shared(Builder(tape, values, guarded).run([(None, unrolled)]), guarded)
    best, least = tape, cost(tape, values)
    for way in (small, columned(tape, values, guarded), columned(small, values, guarded)):
        if way is None:
            continue
        found = trial.values(way)
        way = shorter(way, found, guarded)
        price = cost(way, found)
        if price < _GAIN * least:
            best, least = way, price
    yield best


def pliable(tape: Tape, guarded: set[int]) -> Tape:
    """With views that copy where a view cannot be had: what comes before them may get another layout."""
    ops = [
        Op(aten.reshape.default, op.args, {}, op.out) if op.func in _RIGID and is_free(op, guarded) else op
        for op in tape.ops
    ]
    return Tape(tape.inputs, tape.constants, ops, tape.outputs, tape.live)


def rewritten(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    """After all rules, again and again, until the tape gets no shorter."""
    for _ in range(_ROUNDS):
        before = len(tape.ops)
        tape = Builder(tape, values, guarded).run(RULES)
        tape = shorter(distinct(folded(tape, values, guarded), guarded), values, guarded)
        if len(tape.ops) == before:
            break
    return tape


def shorter(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    """Without what changes nothing, is done twice, or for nothing."""
    return alive(shared(plain(tape, values, guarded), guarded))


def guarded_in(tape: Tape, values: Values) -> set[int]:
    """Numbers of tensors whose memory is written in place somewhere: left exactly as they are."""
    places = {memory(values[i]) for op in tape.ops for i in op.writes()}
    return {i for i, value in values.items() if memory(value) in places} if places else set()


def folded(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    """Constants in place of operations that have the same result in every run."""
    constants = dict(tape.constants)
    known = set(constants) - guarded - tape.live
    ops = []
    for op in tape.ops:
        fixed = is_free(op, guarded) and (op.func in _SHAPE_ONLY or known.issuperset(op.reads()))
        fixed = fixed and torch.Tag.nondeterministic_bitwise not in op.func.tags and "empty" not in op.name
        results = {i: values[i].detach() for i in op.gives()} if fixed else {}
        if results and all(r.nbytes <= _LARGEST for r in results.values()):
            constants.update(results)
            known.update(results)
        else:
            ops.append(op)
    return Tape(tape.inputs, constants, ops, tape.outputs, tape.live)


def distinct(tape: Tape, guarded: set[int]) -> Tape:
    """With constants that are equal, bit by bit, as one."""
    names: dict[int, int] = {}
    seen: dict[Any, int] = {}
    for i, constant in tape.constants.items():
        if i in tape.live or i in guarded or constant.nbytes > _COMPARED or constant.is_meta:
            continue
        bits = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = (constant.shape, constant.stride(), constant.dtype, constant.device, bits)
        first = seen.setdefault(kind, i)
        if first != i:
            names[i] = first
    constants = {i: c for i, c in tape.constants.items() if i not in names}
    ops = [op.renamed(names) for op in tape.ops]
    return Tape(tape.inputs, constants, ops, [names.get(i, i) for i in tape.outputs], tape.live)


def slimmed(tape: Tape, values: Values, trial: Trial) -> tuple[Tape, Values]:
    """The tape with slim constants, if it runs with these, and the tensors of a run."""
    slimmer = slim(tape)
    # What is read by memory may not be where it was.
    with contextlib.suppress(RuntimeError):
        found = trial.values(slimmer)
        if all(close(found[i], values[i], strides=False) for i in tape.outputs):
            return slimmer, found
    return tape, trial.values(tape)


def slim(tape: Tape) -> Tape:
    """With constants that hold one slice where all slices along a dimension are equal.

    Only where element-wise operations alone read them: others may go by the memory.
    """
    kept = {*tape.outputs, *tape.live}
    for op in tape.ops:
        if torch.Tag.pointwise not in op.func.tags and op.func not in _POINTWISE:
            kept.update(op.reads())
    constants = {i: c if i in kept else compressed(c) for i, c in tape.constants.items()}
    return Tape(tape.inputs, constants, tape.ops, tape.outputs, tape.live)


def compressed(value: Tensor) -> Tensor:
    """The same tensor, holding one slice where all slices along a dimension are equal, bit by bit."""
    if value.dim() == 0 or value.numel() < 2 or value.is_complex() or value.is_meta:
        return value
    small = value
    for dim, size in enumerate(value.shape):
        if size > 1:
            one = small.narrow(dim, 0, 1)
            if bool((small == one).all()) and bool((small.signbit() == one.signbit()).all()):
                small = one
    return value if small.shape == value.shape else small.clone().expand(value.shape)


def plain(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    """Without operations that give one of their arguments."""
    names: dict[int, int] = {}
    ops = []
    for op in tape.ops:
        op = op.renamed(names)
        free = isinstance(op.out, Ref) and is_free(op, guarded)
        same = _same_as(op, values, tape) if free else None
        if same is None:
            ops.append(_cheaper(op, values) if free else op)
        else:
            names[op.out.index] = same
    return Tape(tape.inputs, tape.constants, ops, [names.get(i, i) for i in tape.outputs], tape.live)


def _same_as(op: Op, values: Values, tape: Tape) -> int | None:
    """The number of an argument that is the result already."""
    if op.func in _LOOKS:
        source = op.args[1] if op.func is aten.copy.default else op.args[0]
        found = isinstance(source, Ref) and _alike(values[source.index], values[op.out.index])
        return source.index if found else None
    rule = NEUTRAL.get(op.func)
    if rule is None or len(op.args) != 2 or op.kwargs:
        return None
    neutral, both = rule
    for kept, other in [(op.args[0], op.args[1]), (op.args[1], op.args[0])][: 1 + both]:
        alike = isinstance(kept, Ref) and _alike(values[kept.index], values[op.out.index])
        if alike and is_all(other, neutral, tape):
            return kept.index
    return None


def is_all(argument: Any, number: float, tape: Tape) -> bool:
    """Whether an argument is this number, in every element and in every run."""
    if isinstance(argument, Ref):
        value = None if argument.index in tape.live else tape.constants.get(argument.index)
        return value is not None and not value.is_meta and bool((value == number).all())
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
            return Op(aten.reshape.default, (op.args[0], list(result.shape)), {}, op.out)
    return op


def shared(tape: Tape, guarded: set[int]) -> Tape:
    """The same operation on the same tensors, once."""
    names: dict[int, int] = {}
    seen: dict[Any, Any] = {}
    ops = []
    for op in tape.ops:
        op = op.renamed(names)
        key = (op.func, _hashable(op.args), _hashable(op.kwargs)) if is_free(op, guarded) else None
        if key is not None and key in seen:
            names.update(zip(op.gives(), seen[key], strict=True))
            continue
        if key is not None:
            seen[key] = op.gives()
        ops.append(op)
    return Tape(tape.inputs, tape.constants, ops, [names.get(i, i) for i in tape.outputs], tape.live)


def _hashable(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple(_hashable(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _hashable(item)) for key, item in tree.items())
    return (type(tree), repr(tree)) if isinstance(tree, (int, float, complex)) else tree


def alive(tape: Tape) -> Tape:
    """Without operations whose results nobody reads."""
    ops: list[Op] = []
    needed = set(tape.outputs)
    for op in reversed(tape.ops):
        if not op.movable or not needed.isdisjoint(op.gives()):
            ops.append(op)
            needed.update(op.reads())
    constants = {i: c for i, c in tape.constants.items() if i in needed}
    return Tape(tape.inputs, constants, ops[::-1], tape.outputs, tape.live)
