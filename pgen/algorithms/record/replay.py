"""A tape as one Python function: straight-line source, one call for each operation, nothing between them.

Calls go through torch's own functions (`torch.add`) where their arguments are those of the operation, since these parse
them in C: half the time of calling the operation itself. Large tensors have buffers (see `buffers.py`), or are let go
where they are read last.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.buffers import Plan, into_of, plan_of
from pgen.algorithms.record.tape import Op, Ref, Tape

Replay = Callable[..., tuple[Tensor, ...]]

#: Operations whose torch function takes the same arguments by position.
_SAME = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "exp",
        "log",
        "log1p",
        "expm1",
        "abs",
        "sign",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "square",
        "sigmoid",
        "tanh",
        "sin",
        "cos",
        "lgamma",
        "digamma",
        "erf",
        "erfc",
        "floor",
        "ceil",
        "round",
        "where",
        "maximum",
        "minimum",
        "logical_and",
        "logical_or",
        "logical_not",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "isnan",
        "isfinite",
        "mm",
        "bmm",
        "matmul",
        "addmm",
        "mv",
        "dot",
        "cumsum",
        "cumprod",
        "logsumexp",
        "cat",
        "stack",
        "gather",
        "index_select",
        "masked_fill",
        "clamp",
        "clamp_min",
        "clamp_max",
        "pow",
        "atan2",
        "rsub",
        "sum",
        "amax",
        "amin",
        "logaddexp",
        "tril",
        "triu",
    ]
)
#: Of these, the ones that take a dimension and a flag behind it.
_FLAGGED = frozenset({"sum", "logsumexp", "amax", "amin"})
#: Of these, the ones that torch's function would read otherwise with a third number.
_TWO = frozenset({"add", "sub", "rsub"})
#: Views whose tensor method takes the same arguments.
_METHODS = frozenset(
    [
        "view",
        "unsqueeze",
        "squeeze",
        "select",
        "expand",
        "permute",
        "transpose",
        "t",
        "detach",
        "diagonal",
        "reshape",
        "unbind",
    ]
)
_LARGE = 1 << 14  # bytes
_LONG = 500  # operations


def replay_of(tape: Tape, sizes: Mapping[int, int] | None = None, plan: Plan | None = None) -> Replay:
    """A function from the inputs, one by one, to the tuple of outputs.

    Args:
        tape: the operations.
        sizes: bytes of each tensor, to let large ones go early.
        plan: buffers for large ones.
    """
    bound: dict[str, Any] = {f"v{i}": constant for i, constant in tape.constants.items()}
    plan = plan or Plan((), {})
    done = _finished(tape, sizes or {})
    known = {*tape.constants, *tape.inputs}
    lines: list[str] = []
    if plan.buffers:
        # Whoever runs at the same time takes another set, made when the last one is out.
        bound.update(idle=[], fresh=lambda: [buffer.new() for buffer in plan.buffers])
        lines = [
            "buffers = idle.pop() if idle else fresh()",
            f"{_each('b', range(len(plan.buffers)))}= buffers",
        ]
    for at, op in enumerate(tape.ops):
        lines.append(f"{_assigned(op, known)}{_call(op, bound, plan.place.get(at))}")
        known.update(op.gives())
        lines.extend(f"v{i} = None" for i in done.get(at, ()))
    if plan.buffers:
        lines.append("idle.append(buffers)")
    lines.append(f"return ({_each('v', tape.outputs)})")
    replay = compiled_source("replay", [f"v{i}" for i in tape.inputs], lines, bound)
    return uncollected(replay) if len(tape.ops) > _LONG else replay


def uncollected(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, without searches for garbage while it runs.

    A long replay has thousands of tensors at hand. Python takes that for a reason to look through all objects that there
    are, tapes among them, in every other call; there is no garbage, and it took a third of the time.
    """

    def run(*args: Any) -> Any:
        if not gc.isenabled():
            return fn(*args)
        gc.disable()
        try:
            return fn(*args)
        finally:
            gc.enable()

    return run


def buffered(tape: Tape, values: Mapping[int, Tensor]) -> Replay:
    """A replay that keeps memory for what is large; `values` are the tensors of a run of the tape."""
    return replay_of(tape, {i: value.nbytes for i, value in values.items()}, plan_of(tape, values))


def _each(letter: str, numbers: Iterable[int]) -> str:
    return "".join(f"{letter}{i}, " for i in numbers)


def rebuilder_of(shape: Any) -> Callable[[Sequence[Tensor]], Any]:
    """A function from outputs to a nested result; `shape` is the result with `Ref`s to places among the outputs."""
    bound: dict[str, Any] = {}
    if type(shape) is tuple and shape == tuple(Ref(i) for i in range(len(shape))):
        return lambda o: o
    return compiled_source("rebuild", ["o"], [f"return {_built(shape, bound)}"], bound)


def flattener_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """A function from arguments nested like these to the list of their tensors."""
    bound: dict[str, Any] = {}
    places: list[str] = []

    def walk(tree: Any, path: str) -> None:
        if isinstance(tree, Tensor):
            places.append(path)
        elif isinstance(tree, dict):
            for key, item in tree.items():
                walk(item, f"{path}[{_named(key, bound)}]")
        elif isinstance(tree, (tuple, list)):
            for at, item in enumerate(tree):
                walk(item, f"{path}[{at}]")

    walk(args, "a")
    walk(kwargs, "k")
    return compiled_source("flat", ["a", "k"], [f"return [{', '.join(places)}]"], bound)


def compiled_source(
    name: str, arguments: Sequence[str], lines: Sequence[str], bound: Mapping[str, Any]
) -> Any:
    """A function of this body."""
    source = "\n    ".join([f"def {name}({', '.join(arguments)}):", *lines])
    scope = dict(bound)
    exec(compile(source, "<recorded>", "exec"), scope)  # noqa: S102 - source made here, of operations only
    return scope[name]


def _built(tree: Any, bound: dict[str, Any]) -> str:
    if isinstance(tree, Ref):
        return f"o[{tree.index}]"
    if isinstance(tree, dict):
        items = "".join(f"{_named(key, bound)}: {_built(item, bound)}, " for key, item in tree.items())
        return f"{{{items}}}"
    if isinstance(tree, (tuple, list)):
        items = "".join(f"{_built(item, bound)}, " for item in tree)
        if type(tree) in (tuple, list):
            return f"({items})" if type(tree) is tuple else f"[{items}]"
        return f"{_named(type(tree), bound)}({items if hasattr(tree, '_fields') else f'({items})'})"
    return _named(tree, bound)


def _named(value: Any, bound: dict[str, Any]) -> str:
    name = f"k{len(bound)}"
    bound[name] = value
    return name


def _finished(tape: Tape, sizes: Mapping[int, int]) -> dict[int, list[int]]:
    """After which operation each large tensor is read no more."""
    kept = {*tape.outputs, *tape.constants, *tape.inputs}
    last: dict[int, int] = {}
    for at, op in enumerate(tape.ops):
        last.update(dict.fromkeys((*op.reads(), *op.gives()), at))
    done: dict[int, list[int]] = {}
    for i, at in last.items():
        if i not in kept and sizes.get(i, 0) >= _LARGE:
            done.setdefault(at, []).append(i)
    return done


def _assigned(op: Op, known: set[int]) -> str:
    """The names for what an operation gives; in-place operations give what has one already."""
    given = op.gives()
    if not given or known.issuperset(given):
        return ""
    if isinstance(op.out, Ref):
        return f"v{op.out.index} = "
    return "".join(f"v{o.index}, " if isinstance(o, Ref) else "_, " for o in op.out) + "= "


def _call(op: Op, bound: dict[str, Any], buffer: int | None = None) -> str:
    name = op.func._schema.name.partition("::")[2]
    arguments = [_written(a, bound) for a in op.args]
    keywords = [f"{k}={_written(v, bound)}" for k, v in op.kwargs.items()]
    into = into_of(op) if buffer is not None else None
    if into is not None:
        function, argument = f"i_{name}_{op.func._overloadname}", into[1]
        bound[function] = into[0]
        return f"{function}({', '.join((*arguments, *keywords, f'{argument}=b{buffer}'))})"
    if op.func.namespace == "aten" and not op.kwargs:
        if name in _METHODS and isinstance(op.args[0], Ref):
            return f"{arguments[0]}.{name}({', '.join(arguments[1:])})"
        if name == "slice" and len(op.args) >= 4 and isinstance(op.args[1], int) and op.args[1] >= 0:
            start, end = op.args[2] or 0, op.args[3]
            step = op.args[4] if len(op.args) > 4 else 1
            if end is not None and start >= 0 and end >= 0 and step == 1:
                return f"{arguments[0]}[{':, ' * op.args[1]}{start}:{end}]"
        if name in _SAME and _reads_alike(name, op.args):
            bound[f"f_{name}"] = getattr(torch, name)
            return f"f_{name}({', '.join(arguments)})"
    function = f"o_{op.func.namespace}_{name}_{op.func._overloadname}".replace(".", "_")
    bound[function] = op.func
    return f"{function}({', '.join((*arguments, *keywords))})"


def _reads_alike(name: str, args: tuple[Any, ...]) -> bool:
    """Whether torch's function of the same name reads these arguments as the operation does."""
    if not args or not isinstance(args[0], (Ref, list, tuple)) or (name in _TWO and len(args) > 2):
        return False
    if any(isinstance(a, (torch.dtype, torch.device, str, type(None))) for a in args):
        return False
    return name in _FLAGGED or not any(isinstance(a, bool) for a in args)


def _written(value: Any, bound: dict[str, Any]) -> str:
    """An argument as source; what has no literal is bound to a name."""
    if isinstance(value, Ref):
        return f"v{value.index}"
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_written(v, bound) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if value else ''})"
    return _named(value, bound)
