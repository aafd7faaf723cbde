"""The same operations in another precision.

A program written in single precision makes its constants in that; its density is wanted in double, for a sampler adds
up many small differences. Carrying over the tape costs nothing at run time, where casts around a single-precision
program would keep its round-off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pgen.algorithms.record.tape import Op, Ref, Tape, mapped, renamed

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128, torch.float16: torch.complex32}


def lifted(tape: Tape, types: Mapping[int, torch.dtype], low: torch.dtype, high: torch.dtype) -> Tape:
    """The same operations in another precision: what was `low` becomes `high`.

    Args:
        tape: operations.
        types: of every tensor on it.
        low: torch's default type when the tape was recorded.
        high: another.
    """
    become = {low: high}
    if low in _COMPLEX and high in _COMPLEX:
        become[_COMPLEX[low]] = _COMPLEX[high]
    names: dict[int, int] = {}
    ops: list[Op] = []
    fresh = tape.fresh()

    def cast(i: int) -> int:
        nonlocal fresh
        fresh += 1
        kind = become.get(types[i], high)
        ops.append(Op(torch.ops.aten._to_copy.default, (Ref(i),), {"dtype": kind}, Ref(fresh - 1)))
        return fresh - 1

    constants = {}
    for i, constant in tape.constants.items():
        changes = constant.dtype in become
        if changes and i in tape.live:  # it will have other values: cast in every run
            names[i] = cast(i)
        constants[i] = constant.to(become[constant.dtype]) if changes and i not in tape.live else constant
    for op in tape.ops:
        args, kwargs = (mapped(part, lambda leaf: _lifted(leaf, become)) for part in (op.args, op.kwargs))
        own = names
        if (args, kwargs) == (op.args, op.kwargs) and any(types[i] in become for i in op.gives()):
            if not op.reads():
                kwargs = _typed(op, kwargs, high)
            elif not any(types[i].is_floating_point or types[i].is_complex for i in op.reads()):
                own = {i: cast(i) for i in op.reads()}  # whole numbers make those of torch's default type
        ops.append(Op(op.func, renamed(args, own), renamed(kwargs, own), op.out))
    return Tape(tape.inputs, constants, ops, [names.get(i, i) for i in tape.outputs], tape.live)


def _lifted(leaf: Any, become: Mapping[torch.dtype, torch.dtype]) -> Any:
    return become.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _typed(op: Op, kwargs: dict[str, Any], high: torch.dtype) -> dict[str, Any]:
    """The arguments of what makes numbers of torch's default type, with the type said."""
    takes = any(a.name == "dtype" for a in op.func._schema.arguments)
    return {**kwargs, "dtype": high} if takes else kwargs
