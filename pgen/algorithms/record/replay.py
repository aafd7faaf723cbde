"""A tape as one Python function: straight-line source, one call for each operation, nothing between them.

Calls go through torch's own functions (`torch.add`) where their arguments are those of the operation, since these parse
them in C: half the time of calling the operation itself. Large tensors are let go where they are read last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.tape import Op, Ref, Tape

Replay = Callable[..., tuple[Tensor, ...]]

#: Operations whose torch function takes the same arguments by position.
_SAME = (
    "add sub mul div neg exp log log1p expm1 abs sign sqrt rsqrt reciprocal square sigmoid tanh sin cos lgamma digamma erf "
    "erfc floor ceil round where maximum minimum logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not "
    "eq ne lt le gt ge isnan isfinite mm bmm matmul addmm mv dot cumsum cumprod logsumexp cat stack gather index_select "
    "masked_fill clamp clamp_min clamp_max pow atan2 rsub sum amax amin logaddexp softmax log_softmax any all tril triu"
).split()
#: Views whose tensor method takes the same arguments.
_METHODS = "view unsqueeze squeeze select expand permute transpose t detach diagonal reshape unbind".split()
_LARGE = 1 << 14  # bytes


def replay_of(tape: Tape, sizes: dict[int, int] | None = None) -> Replay:
    """A function from the inputs, one by one, to the tuple of outputs.

    Args:
        tape: the operations.
        sizes: bytes of each tensor, to let large ones go early.
    """
    bound: dict[str, Any] = {f"v{i}": constant for i, constant in tape.constants.items()}
    lines = [f"def replay({', '.join(f'v{i}' for i in tape.inputs)}):"]
    kept = {*tape.outputs, *tape.constants, *tape.inputs}
    last: dict[int, int] = {}
    for at, op in enumerate(tape.ops):
        for i in (*op.reads(), *op.gives()):
            last[i] = at
    for at, op in enumerate(tape.ops):
        lines.append(f"    {_assigned(op)}{_call(op, bound)}")
        done = [
            i
            for i in {*op.reads(), *op.gives()}
            if last[i] == at and i not in kept and (sizes or {}).get(i, 0) >= _LARGE
        ]
        if done:
            lines.append(f"    {' = '.join(f'v{i}' for i in sorted(done))} = None")
    given = {*tape.constants, *tape.inputs}
    returned = [f"v{i}.clone()" if i in given else f"v{i}" for i in tape.outputs]
    lines.append(f"    return ({', '.join(returned)}{',' if returned else ''})")
    scope: dict[str, Any] = dict(bound)
    exec(compile("\n".join(lines), "<recorded>", "exec"), scope)  # noqa: S102 - source made here, of operations only
    return scope["replay"]


def _assigned(op: Op) -> str:
    if isinstance(op.out, Ref):
        return f"v{op.out.index} = "
    if isinstance(op.out, (tuple, list)) and any(isinstance(o, Ref) for o in op.out):
        return ", ".join(f"v{o.index}" if isinstance(o, Ref) else "_" for o in op.out) + ", = " if len(
            op.out
        ) == 1 else ", ".join(f"v{o.index}" if isinstance(o, Ref) else "_" for o in op.out) + " = "
    return ""


def _call(op: Op, bound: dict[str, Any]) -> str:
    name = op.func._schema.name.partition("::")[2]
    arguments = [_written(a, bound) for a in op.args]
    keywords = [f"{k}={_written(v, bound)}" for k, v in op.kwargs.items()]
    if op.func.namespace == "aten" and not op.kwargs:
        if name in _METHODS and isinstance(op.args[0], Ref):
            return f"{arguments[0]}.{name}({', '.join(arguments[1:])})"
        if name == "slice" and len(op.args) >= 4 and isinstance(op.args[1], int) and op.args[1] >= 0:
            start, end = op.args[2] or 0, op.args[3]
            step = op.args[4] if len(op.args) > 4 else 1
            if end is not None and start >= 0 and end >= 0 and step == 1:
                return f"{arguments[0]}[{':, ' * op.args[1]}{start}:{end}]"
        if name in _SAME and not _is_odd(op):
            bound[f"f_{name}"] = getattr(torch, name)
            return f"f_{name}({', '.join(arguments)})"
    function = f"o_{name}_{op.func._overloadname}"
    bound[function] = op.func
    return f"{function}({', '.join((*arguments, *keywords))})"


def _is_odd(op: Op) -> bool:
    """Whether torch's function of the same name would read these arguments otherwise."""
    if any(isinstance(a, (torch.dtype, torch.device, type(None), bool)) for a in op.args):
        return op.func._schema.name not in ("aten::sum", "aten::logsumexp", "aten::amax", "aten::amin") or any(
            isinstance(a, (torch.dtype, type(None))) for a in op.args
        )
    return not isinstance(op.args[0], (Ref, list, tuple))


def _written(value: Any, bound: dict[str, Any]) -> str:
    """An argument as source; what has no literal is bound to a name."""
    if isinstance(value, Ref):
        return f"v{value.index}"
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_written(v, bound) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if value else ''})"
    name = f"k{len(bound)}"
    bound[name] = value
    return name
