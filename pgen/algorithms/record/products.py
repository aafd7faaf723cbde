"""Matrix products by oneDNN where torch would ask Intel's library on a processor of another make.

MKL takes slow paths on AMD's processors: a product of 128 x 784 by 784 x 400 in float32 takes it 0.75 ms, and oneDNN,
which is part of torch too, 0.36. Both are exact to round-off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.machine import is_amd
from pgen.algorithms.record.replay import Replay, buffered, replay_of
from pgen.algorithms.record.tape import Op, Ref, Tape
from pgen.algorithms.record.verify import Trial, aside

LEAST = 2**20
"""Multiply-adds from which on the call, which costs microseconds more, pays."""

aten = torch.ops.aten
LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
"""`x @ weight.T + bias` by oneDNN."""


def pays() -> bool:
    """Whether this processor is better served by oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and is_amd()


def by_onednn(tape: Tape, inputs: Sequence[Tensor]) -> Replay:
    """The replay of a tape with large products by oneDNN: a `compiler` for `Recorded`.

    Args:
        tape: operations.
        inputs: an example.
    """
    with aside():
        values = Trial.on(tape, inputs).values(tape)
    changed = with_products(tape, values)
    if changed.ops == tape.ops:
        return buffered(tape, values)
    return replay_of(changed, {i: value.nbytes for i, value in values.items()})


def with_products(tape: Tape, values: Mapping[int, Tensor]) -> Tape:
    """The tape with large products by oneDNN, where that pays.

    Args:
        tape: operations.
        values: the tensors of a run of it.
    """
    if not pays():
        return tape
    fresh, ops = tape.fresh(), list[Op]()
    for op in tape.ops:
        if not _is_large(op, values):
            ops.append(op)
            continue
        bias, left, right = op.args if op.func is aten.addmm.default else (None, *op.args)
        # It multiplies by the transpose: a layer's weights are kept that way.
        ops.append(Op(aten.t.default, (right,), {}, Ref(fresh)))
        ops.append(Op(LINEAR, (left, Ref(fresh), bias, "none", [], ""), {}, op.out))
        fresh += 1
    return replace(tape, ops=ops)


def _is_large(op: Op, values: Mapping[int, Tensor]) -> bool:
    if op.func not in (aten.mm.default, aten.addmm.default) or op.kwargs:
        return False
    tensors = [values[a.index] for a in op.args if isinstance(a, Ref)]
    left, right = tensors[-2:]
    alike = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    bias = len(tensors) == 2 or tensors[0].ndim == 1
    return alike and bias and left.shape[0] * left.shape[1] * right.shape[1] >= LEAST
