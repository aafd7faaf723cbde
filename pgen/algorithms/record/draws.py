"""What depends on chance, apart from the rest of a tape: a compiler's random numbers would be others than torch's.

    draws      random operations, and what these need: by torch, in the function's order
    the rest   from inputs, captured tensors and draws to results

Inductor's own random numbers on the CPU take 8 to 12 times as long as torch's, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pgen.algorithms.record.replay import Replay, replay_of
from pgen.algorithms.record.tape import Op, Ref, Tape

aten = torch.ops.aten

_BY_SHAPE = {aten.randn_like.default: aten.randn.default, aten.rand_like.default: aten.rand.default}


def apart(tape: Tape) -> tuple[Replay, Tape, list[int]]:
    """A replay of what draws; the tape of what is left; and the numbers that go from one to the other.

    Captured tensors that the rest does not read are left out of it.
    """
    needed: set[int] = set()
    for op in tape.ops:
        if op.random:
            needed.update((*op.reads(), *op.gives()))
    draws: list[Op] = []
    rest: list[Op] = []
    for op in reversed(tape.ops):
        if op.random or not needed.isdisjoint((*op.gives(), *op.writes())):
            draws.append(op)
            needed.update(op.reads())
        else:
            rest.append(op)
    draws, rest = draws[::-1], rest[::-1]
    read = {i for op in rest for i in op.reads()} | set(tape.outputs)
    given = dict.fromkeys(i for op in draws for i in op.gives())
    drawn = [i for i in given if i in read and i not in tape.constants and i not in tape.inputs]
    constants = {i: constant for i, constant in tape.constants.items() if i in read}
    return (
        replay_of(replace(tape, ops=draws, outputs=drawn)),
        replace(tape, constants=constants, ops=rest),
        drawn,
    )


def by_shape(tape: Tape, values: Mapping[int, Tensor]) -> Tape:
    """The tape with draws of so many numbers, in place of draws in the shape of a result, which then had to be there.

    A second step's noise would wait for the first step, and so would all of that be left to torch.

    Args:
        tape: operations.
        values: the tensors of a run of it.
    """
    ops = list[Op]()
    for op in tape.ops:
        found = values[op.out.index] if op.func in _BY_SHAPE else None
        if found is not None and found.is_contiguous():
            options = {"dtype": found.dtype, "device": found.device}
            op = Op(_BY_SHAPE[op.func], (list(found.shape),), options, op.out)
        ops.append(op)
    return replace(tape, ops=ops)


def with_masks(tape: Tape, values: Mapping[int, Tensor]) -> Tape:
    """The tape with every dropout as a mask, which is drawn and needs a shape only, and a product.

    Args:
        tape: operations.
        values: the tensors of a run of it.
    """
    fresh, ops = tape.fresh(), list[Op]()
    for op in tape.ops:
        if op.func is not aten.native_dropout.default or not op.args[2] or not 0 < op.args[1] < 1:
            ops.append(op)
            continue
        x, rate, (out, mask) = op.args[0], op.args[1], op.out
        like = values[x.index]
        options = {"dtype": torch.bool, "device": like.device}
        ops += [
            Op(aten.empty.memory_format, (list(like.shape),), options, mask),
            Op(aten.bernoulli_.float, (mask, 1 - rate), {}, mask),
            Op(aten.mul.Tensor, (x, mask), {}, Ref(fresh)),
            Op(aten.mul.Tensor, (Ref(fresh), 1 / (1 - rate)), {}, out),
        ]
        fresh += 1
    return replace(tape, ops=ops)
