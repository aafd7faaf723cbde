"""Writing a tape from another: operations are copied one by one, and some are replaced by what a rule finds better.

A rule sees one operation, who made its arguments, and the tensors of one run; it emits other operations, which are done
at once on those tensors so that their shapes are known. What it emits in vain is thrown out later, since nobody reads
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.tape import Op, Ref, Tape, perform

Values = dict[int, Tensor]


def is_free(op: Op, guarded: set[int]) -> bool:
    """Whether an operation can be moved, merged or left out."""
    return op.movable and guarded.isdisjoint(op.reads()) and guarded.isdisjoint(op.gives())


class Builder:
    """A tape in the making.

    Attributes:
        values: tensors of one run, by number; of new operations too.
        made: who made a number, if it could as well be made later.
        uses: how often a number is read.
        reader: the last operation that reads a number of the old tape.
        constants: tensors that are the same in every run.
        drawing: whether there are random operations.
    """

    def __init__(self, tape: Tape, values: Values, guarded: set[int]) -> None:
        self.tape, self.values, self.guarded = tape, values, guarded
        self.made: dict[int, Op] = {}
        self.uses: Counter[int] = Counter(i for op in tape.ops for i in op.reads())
        self.uses.update(tape.outputs)
        self.reader = {i: op for op in tape.ops for i in op.reads()}
        self.constants = {i: c for i, c in tape.constants.items() if i not in tape.live and i not in guarded}
        self.drawing = any(op.random for op in tape.ops)
        self.ops: list[Op] = []
        self.added: dict[int, Tensor] = {}  # constants that the old tape did not have
        self.fresh = tape.fresh()

    def run(self, rules: Iterable[tuple[frozenset[Any] | None, Callable[[Builder, Op], Ref | None]]]) -> Tape:
        """The tape with the rules applied: each to operations of its kinds (all, if None), until none changes it."""
        names: dict[int, int] = {}
        rules = list(rules)
        for old in self.tape.ops:
            op, new = old.renamed(names), None
            free = is_free(op, self.guarded)
            if free and isinstance(op.out, Ref):
                new = next(
                    (
                        r
                        for kinds, rule in rules
                        if kinds is None or op.func in kinds
                        if (r := rule(self, op))
                    ),
                    None,
                )
            if new is None:
                self.ops.append(op)
                if free:  # what reads memory that changes must not be done later
                    self.made.update(dict.fromkeys(op.gives(), op))
            else:
                names[op.out.index] = new.index
                self.uses[new.index] += self.uses[op.out.index]
        outputs = [names.get(i, i) for i in self.tape.outputs]
        return self.written(outputs)

    def written(self, outputs: list[int]) -> Tape:
        """The tape as it is by now."""
        constants = {**self.tape.constants, **self.added}
        return Tape(self.tape.inputs, constants, self.ops, outputs, self.tape.live)

    def constant(self, value: Tensor) -> Ref:
        """A tensor that is the same in every run."""
        found, self.fresh = Ref(self.fresh), self.fresh + 1
        self.added[found.index] = self.constants[found.index] = self.values[found.index] = value
        return found

    def emit(self, func: Any, *args: Any, **kwargs: Any) -> Ref:
        """The result of another operation."""
        return self._emitted(Op(func, args, kwargs, Ref(self.fresh)))

    def emit_all(self, func: Any, n: int, *args: Any) -> list[Ref]:
        """The n results of an operation that gives a list."""
        return self._emitted(Op(func, args, {}, [Ref(self.fresh + i) for i in range(n)]))

    def _emitted(self, op: Op) -> Any:
        with torch.no_grad():
            perform(op, self.values)
        self.ops.append(op)
        constant = all(i in self.constants for i in op.reads())
        for i in op.gives():
            self.made[i] = op
            if constant:
                self.constants[i] = self.values[i]
        self.fresh += len(op.gives())
        return op.out

    def value(self, argument: Any) -> Tensor:
        """The tensor that a reference stands for."""
        return self.values[argument.index]

    def maker(self, argument: Any, *kinds: Any) -> Op | None:
        """The operation that made an argument, if it is one of these."""
        op = self.made.get(argument.index) if isinstance(argument, Ref) else None
        return op if op is not None and op.func in kinds else None

    def only(self, argument: Ref) -> bool:
        """Whether an argument is read once."""
        return self.uses[argument.index] <= 1

    def is_constant(self, argument: Any) -> bool:
        """Whether an argument is a number, or a tensor that is the same in every run."""
        if isinstance(argument, Ref):
            return argument.index in self.constants
        return isinstance(argument, (int, float)) and not isinstance(argument, bool)

    def like(self, found: Ref, op: Op) -> Ref | None:
        """A result, if it has the shape and type of that of an operation."""
        mine, its = self.value(found), self.value(op.out)
        return found if mine.shape == its.shape and mine.dtype == its.dtype else None
