"""Memory for large intermediate results, kept from one replay to the next.

The C library gives large blocks back to the system when they are let go and fetches them anew, page by page: three
additions of 2 MB take 1.4 ms that way and 0.15 ms in memory that is there. So what is large, and stays inside, is
written into buffers that belong to the recording; those whose contents are read no more are used again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.tape import Op, Ref, Tape, memory

aten = torch.ops.aten

_LARGE = 1 << 15  # bytes

_OUT = [
    "neg",
    "exp",
    "log",
    "log1p",
    "expm1",
    "abs",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sigmoid",
    "tanh",
    "sin",
    "cos",
    "maximum",
    "minimum",
    "clamp",
    "clamp_min",
    "clamp_max",
    "softplus",
    "mm",
    "bmm",
    "addmm",
    "addcmul",
    "erf",
    "lgamma",
    "digamma",
    "silu",
    "logaddexp",
    "amax",
]
#: Operations that can write their result where they are told, by what they do so, and the name of that argument.
_INTO: dict[Any, tuple[Any, str]] = {
    **{getattr(aten, name).default: (getattr(aten, name).out, "out") for name in _OUT},
    **{getattr(aten, name).Tensor: (getattr(aten, name).out, "out") for name in ("add", "sub", "mul", "div")},
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Scalar_out, "out"), aten.where.self: (aten.where.self_out, "out"),
    aten.sum.dim_IntList: (aten.sum.IntList_out, "out"),
    aten.softplus_backward.default: (aten.softplus_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """A piece of memory.

    Attributes:
        shape, stride, dtype, device: of the tensors that are written to it.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def new(self) -> Tensor:
        """The memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Plan:
    """Where results go.

    Attributes:
        buffers: to allocate once.
        place: for operations by position, the buffer that takes the result, by position.
    """

    buffers: tuple[Buffer, ...]
    place: Mapping[int, int]


def plan_of(tape: Tape, values: Mapping[int, Tensor]) -> Plan:
    """Buffers for large results that nobody outside sees."""
    seen = {memory(values[i]) for i in (*tape.outputs, *tape.inputs, *tape.constants)}
    for op in tape.ops:
        if not op.movable:  # it may write there, or keep it
            seen.update(memory(values[i]) for i in (*op.reads(), *op.gives()))
    last: dict[int, int] = {}
    for at, op in enumerate(tape.ops):
        last.update((memory(values[i]), at) for i in (*op.reads(), *op.gives()))
    buffers: list[Buffer] = []
    place: dict[int, int] = {}
    idle: dict[Buffer, list[int]] = defaultdict(list)
    ends: dict[int, list[int]] = defaultdict(list)  # buffers that are read last by an operation
    for at, op in enumerate(tape.ops):
        into = into_of(op)
        value = values[op.out.index] if into is not None else None
        if value is not None and value.nbytes >= _LARGE and memory(value) not in seen and _is_dense(value):
            kind = Buffer(value.shape, value.stride(), value.dtype, value.device)
            # Element by element, a result may take the place of what it is made of; the others need it to the end.
            ready = [b for b in ends[at] if buffers[b] == kind] if _in_place(op, values) else []
            if ready:
                chosen = ready[0]
                ends[at].remove(chosen)
            elif idle[kind]:
                chosen = idle[kind].pop()
            else:
                chosen = len(buffers)
                buffers.append(kind)
            place[at] = chosen
            ends[last[memory(value)]].append(chosen)
        for b in ends.pop(at, ()):
            idle[buffers[b]].append(b)
    return Plan(tuple(buffers), place)


def into_of(op: Op) -> tuple[Any, str] | None:
    """How an operation writes its result where it is told."""
    return _INTO.get(op.func) if isinstance(op.out, Ref) else None


def _is_dense(value: Tensor) -> bool:
    return value.untyped_storage().nbytes() == value.nbytes and value.storage_offset() == 0


def _in_place(op: Op, values: Mapping[int, Tensor]) -> bool:
    """Whether an operation reads every number where it writes its result, and nowhere else."""
    if torch.Tag.pointwise not in op.func.tags:
        return False
    result = values[op.out.index]
    return all(
        v.shape == result.shape and v.stride() == result.stride()
        for v in (values[i] for i in op.reads())
        if v.nbytes >= _LARGE
    )
