"""What others see of a tape besides numbers: where its tensors lie in memory.

A tape may give one tensor twice, or an input for what the function computed anew, when both hold the same numbers. A
caller who changes a result in place would see the difference: such results are copied. And what draws random numbers
draws them in the order of memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pgen.algorithms.record.tape import Op, Ref, Tape, memory
from pgen.algorithms.record.verify import layout

aten = torch.ops.aten
Values = dict[int, Tensor]


class Entangled(RuntimeError):
    """Results that shared memory no longer do."""


def independent(tape: Tape, values: Values, first: Tape, at_first: Values, captured: Collection[int]) -> Tape:
    """The tape with copies of those results that share memory which they did not share on the first tape.

    Args:
        tape: simplified.
        values: tensors of a run of it.
        first: as it was recorded.
        at_first: tensors of a run of that.
        captured: memory of tensors that belong to others.

    Raises:
        Entangled: results shared memory on the first tape and do not on this one.
    """
    pairs = zip(tape.inputs, first.inputs, strict=True)
    shared = {memory(values[i]): memory(at_first[j]) for i, j in pairs} | {m: m for m in captured}
    taken = set(shared.values())
    private = {memory(c) for c in tape.constants.values()} - set(captured)
    ops, fresh = list(tape.ops), tape.fresh()
    outputs: list[int] = []
    made: dict[tuple[int, int], int] = {}
    for i, j in zip(tape.outputs, first.outputs, strict=True):
        mine, its = memory(values[i]), memory(at_first[j])
        if (i, j) in made:  # given twice
            outputs.append(made[i, j])
            continue
        if shared.get(mine, its) != its or mine in private or layout(values[i]) != layout(at_first[j]):
            ops.extend(_copy(i, values[i], at_first[j], fresh))
            outputs.append(fresh)
            made[i, j] = fresh
            mine = -fresh - 1  # memory of its own
            fresh += 3
        else:
            outputs.append(i)
        if mine not in shared and its in taken:
            raise Entangled("results that share memory with something else")
        shared[mine] = its
        taken.add(its)
    return Tape(tape.inputs, tape.constants, ops, outputs, tape.live)


def steady(tape: Tape, values: Values, first: Tape, at_first: Values) -> Tape:
    """The tape with what draws random numbers, or writes, reading tensors laid out in memory as on the first tape.

    Numbers are drawn in the order of memory: `rand_like` of a transposed tensor gives others than of a tensor in rows.
    Such operations are never moved or left out, so the two tapes have the same ones.
    """
    kept = (op for op in first.ops if not op.movable)
    ops: list[Op] = []
    fresh = tape.fresh()
    for op in tape.ops:
        if not op.movable:
            names = {}
            for i, j in zip(op.reads(), next(kept).reads(), strict=True):
                if layout(values[i]) != layout(at_first[j]):
                    ops.extend(_copy(i, values[i], at_first[j], fresh))
                    names[i] = fresh
                    fresh += 3
            op = op.renamed(names)
        ops.append(op)
    return Tape(tape.inputs, tape.constants, ops, tape.outputs, tape.live)


def _copy(number: int, value: Tensor, like: Tensor, fresh: int) -> Sequence[Op]:
    """A copy with the layout of another tensor, as number `fresh`; `fresh + 1` and `+ 2` serve on the way."""
    source, size, stride = Ref(number), list(like.shape), list(like.stride())
    if layout(value) != layout(like):
        return [
            Op(aten.new_empty_strided.default, (source, size, stride), {}, Ref(fresh)),
            Op(aten.copy_.default, (Ref(fresh), source), {}, Ref(fresh)),
        ]
    if layout(value.clone()) == layout(like):
        return [Op(aten.clone.default, (source,), {}, Ref(fresh))]
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    return [
        Op(aten.as_strided.default, (source, [extent], [1]), {}, Ref(fresh + 1)),
        Op(aten.clone.default, (Ref(fresh + 1),), {}, Ref(fresh + 2)),
        Op(aten.as_strided.default, (Ref(fresh + 2), size, stride), {}, Ref(fresh)),
    ]
