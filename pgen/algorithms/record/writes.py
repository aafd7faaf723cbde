"""In-place operations on memory that nobody else reads afterwards become plain ones with a result of their own.

    x.masked_fill_(m, v)   ->   y = x.masked_fill(m, v), and x is called y from there on

Autograd, vmap and distributions write into tensors that they made a moment ago. On a tape such writes stand in the way
of everything else, since an operation can be moved, merged or left out only if what it reads does not change. What
others see (inputs, constants, views that are read later) stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.tape import Op, Ref, Tape, bind, memory, perform, renamed, with_values
from pgen.algorithms.record.verify import layout

aten = torch.ops.aten


def without_writes(
    tape: Tape, values: dict[int, Tensor], inputs: Sequence[Tensor]
) -> tuple[Tape, dict[int, Tensor]]:
    """The tape with as few writes as can be, and the tensors of a run of it.

    Args:
        tape: operations.
        values: tensors of one run.
        inputs: for another run, the result of which is given.
    """
    seen = _Seen(tape, values)
    names: dict[int, int] = {}
    fresh = tape.fresh()
    current = tape.start(inputs)
    ops = []
    for at, op in enumerate(tape.ops):
        new = op.renamed(names)
        if not names.keys().isdisjoint(op.gives()):
            new = Op(new.func, new.args, new.kwargs, renamed(op.out, names))
        target = seen.only_target(at)
        plain = _functional(op.func) if target is not None else None
        if target is None or plain is None:
            perform(new, current)
            ops.append(new)
            continue
        before = current[names.get(target, target)]
        found = plain(*with_values(new.args, current), **with_values(new.kwargs, current))
        if found.dtype != before.dtype or found.shape != before.shape or layout(found) != layout(before):
            perform(new, current)
            ops.append(new)
            continue
        ops.append(Op(plain, new.args, new.kwargs, Ref(fresh)))
        bind(Ref(fresh), found, current)
        names.update(dict.fromkeys({target, *op.gives()}, fresh))
        fresh += 1
    outputs = [names.get(i, i) for i in tape.outputs]
    return Tape(tape.inputs, tape.constants, ops, outputs, tape.live), current


class _Seen:
    """Who looks at whose memory, and when."""

    def __init__(self, tape: Tape, values: dict[int, Tensor]) -> None:
        self.tape, self.values = tape, values
        self.outside = {memory(values[i]) for i in (*tape.inputs, *tape.constants)}
        self.last: dict[int, int] = {}  # the last operation that reads each number
        self.born: dict[int, int] = {}  # the operation that made it
        for at, op in enumerate(tape.ops):
            for i in op.reads():
                self.last[i] = at
            for i in op.gives():
                self.born.setdefault(i, at)
        for i in tape.outputs:
            self.last[i] = len(tape.ops)
        self.sharing: dict[int, set[int]] = {}
        for i, value in values.items():
            self.sharing.setdefault(memory(value), set()).add(i)

    def only_target(self, at: int) -> int | None:
        """What an operation writes to, if it is one tensor whose memory nobody else will read."""
        op = self.tape.ops[at]
        written = op.writes()
        if len(written) != 1 or torch.Tag.inplace_view in op.func.tags:
            return None
        (target,) = written
        value = self.values[target]
        place = memory(value)
        if place in self.outside or value.untyped_storage().nbytes() != value.nbytes:
            return None
        others = self.sharing[place] - {target, *op.gives()}
        if any(self.last.get(i, -1) > at and self.born.get(i, -1) < at for i in others):
            return None
        return target


@lru_cache(maxsize=1024)
def _functional(func: Any) -> Any:
    """The operation without the underscore at its end, of the same overload."""
    name, overload = func._schema.name.split("::")[1], func._overloadname
    tags = func.tags
    if (
        func.namespace != "aten"
        or not name.endswith("_")
        or name.endswith("__")
        or name in ("resize_", "set_")
    ):
        return None
    if torch.Tag.nondeterministic_seeded in tags:
        return None
    packet = getattr(aten, name[:-1], None)
    plain = getattr(packet, overload, None) if packet is not None else None
    if plain is None or plain._schema.is_mutable or len(plain._schema.returns) != 1:
        return None
    return plain
