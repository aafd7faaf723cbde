"""The same operation on many tensors, done at once: fifty steps of a loop cost what one does.

A program that loops in Python (over time, over groups) repeats its operations, and so does its gradient. Operations of
one kind that do not wait for each other are stacked: operands along a new first dimension (what all share is
broadcast), one batched operation by `vmap`, slices of its result for whoever wants one.

Which operations to do together is decided on an agenda, as in "On-the-fly operation batching in dynamic computation
graphs" (Neubig, Goldberg, Dyer, 2017). A kind of which all are ready is done at once. Where there is none, what most
others wait for goes first, so that those that can wait do, until all of their kind are ready.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.builder import Builder, is_free
from pgen.algorithms.record.recorder import tape_of
from pgen.algorithms.record.stacks import selected
from pgen.algorithms.record.tape import Op, Ref, Tape, mapped

Values = dict[int, Tensor]

aten = torch.ops.aten

_FEWEST = 4  # operations worth stacking
_LARGEST = 1 << 14  # numbers in a tensor: beyond, the arithmetic outweighs the call
_MOST = 1 << 22  # numbers in a stack
_NOISE = 4  # operations that a batched one may take


@dataclass(frozen=True)
class _Member:
    """A slice of a stack."""

    stack: int
    at: int


class _Agenda:
    """What is ready, and in which order kinds are done."""

    def __init__(self, tape: Tape, kinds: Sequence[Any], guarded: set[int]) -> None:
        ops = tape.ops
        made: dict[int, int] = dict.fromkeys((*tape.inputs, *tape.constants), -1)
        for at, op in enumerate(ops):
            for i in op.gives():
                made.setdefault(i, at)
        self.keys = [at if kind is None else kind for at, kind in enumerate(kinds)]
        self.waiting: list[int] = [0] * len(ops)
        self.readers: list[list[int]] = [[] for _ in ops]
        last = None
        for at, op in enumerate(ops):
            before = {made[i] for i in op.reads()} - {-1, at}
            if not is_free(op, guarded):  # in order among themselves
                before |= {last} if last is not None else set()
                last = at
            self.waiting[at] = len(before)
            for other in before:
                self.readers[other].append(at)
        self.height = [0] * len(ops)  # how many wait for one another behind each
        for at in reversed(range(len(ops))):
            self.height[at] = 1 + max((self.height[reader] for reader in self.readers[at]), default=0)
        self.left = Counter(self.keys)
        self.ready: dict[Any, list[int]] = defaultdict(list)
        self.highest: dict[Any, int] = defaultdict(int)  # of those that are ready
        for at, n in enumerate(self.waiting):
            if n == 0:
                self._enter(at)

    def _enter(self, at: int) -> None:
        key = self.keys[at]
        self.ready[key].append(at)
        self.highest[key] = max(self.highest[key], self.height[at])

    def take(self) -> list[int] | None:
        """The operations to do next, all of one kind; None when all are done."""
        if not self.ready:
            return None
        key = next((k for k, found in self.ready.items() if len(found) == self.left[k]), None)
        if key is None:
            key = max(self.ready, key=self.highest.__getitem__)
        chosen = sorted(self.ready.pop(key))
        del self.highest[key]
        self.left[key] -= len(chosen)
        for at in chosen:
            for reader in self.readers[at]:
                self.waiting[reader] -= 1
                if self.waiting[reader] == 0:
                    self._enter(reader)
        return chosen


class _Stacker:
    """Writes the tape with stacked operations."""

    def __init__(self, tape: Tape, values: Values, guarded: set[int]) -> None:
        self.tape, self.guarded = tape, guarded
        self.b = Builder(tape, values, guarded)
        self.members: dict[int, _Member] = {}  # numbers that are slices of a stack
        self.single: dict[int, int] = {}  # and their own tensors, where someone wants one
        self.sizes: dict[int, int] = {}
        self.known: dict[Any, Tape | None] = {}

    def run(self) -> Tape:
        ops = self.tape.ops
        agenda = _Agenda(self.tape, [self.kind(op) for op in ops], self.guarded)
        while (chosen := agenda.take()) is not None:
            groups: dict[Any, list[Op]] = defaultdict(list)
            for at in chosen:
                groups[self.sources(ops[at])].append(ops[at])
            for group in groups.values():
                if len(group) < _FEWEST or not self.stacked(group):
                    for op in group:
                        self.b.ops.append(op.renamed(self.singles(op.reads())))
        names = self.singles(self.tape.outputs)
        outputs = [names.get(i, i) for i in self.tape.outputs]
        return self.b.written(outputs)

    def kind(self, op: Op) -> Any:
        """What operations must have in common to be done at once; None if it has to be done alone."""
        values, given = self.b.values, op.gives()
        if not isinstance(op.out, Ref) or not is_free(op, self.guarded):
            return None
        if not op.reads() or any(
            values[i].numel() > _LARGEST or values[i].is_meta for i in (*op.reads(), *given)
        ):
            return None
        shapes = tuple((values[i].shape, values[i].dtype, values[i].device) for i in op.reads())
        return op.func, _hashable((op.args, tuple(op.kwargs.items()))), shapes

    def sources(self, op: Op) -> Any:
        """Where its operands come from: operations whose operands lie in the same stacks go together."""
        return tuple(self._source(i) for i in op.reads())

    def _source(self, i: int) -> Any:
        if i in self.members:
            return "stack", self.members[i].stack
        return ("constant",) if i in self.b.constants else ("other",)

    def singles(self, numbers: Sequence[int]) -> dict[int, int]:
        """Tensors of their own for slices of stacks."""
        names = {}
        for i in numbers:
            if i in self.members:
                if i not in self.single:
                    member = self.members[i]
                    self.single[i] = self.b.emit(aten.select.int, Ref(member.stack), 0, member.at).index
                names[i] = self.single[i]
        return names

    def stacked(self, group: list[Op]) -> bool:
        """Do all at once, if that is cheaper."""
        n, values = len(group), self.b.values
        group.sort(key=lambda op: [self.members[i].at if i in self.members else -1 for i in op.reads()])
        columns = list(zip(*(op.reads() for op in group), strict=True))
        shared = [len(set(column)) == 1 for column in columns]
        if all(shared) or n * values[group[0].gives()[0]].numel() > _MOST:
            return False
        costs = sum(self.cost(column) for column, same in zip(columns, shared, strict=True) if not same)
        batched = self.batched(group[0], tuple(shared), n)
        if batched is None or costs + len(batched.ops) + 1 > 0.7 * n:
            return False
        operands = [
            Ref(column[0]) if same else self.stack(column)
            for column, same in zip(columns, shared, strict=True)
        ]
        names = {
            i: self.singles([o.index]).get(o.index, o.index)
            for i, o in zip(batched.inputs, operands, strict=True)
        }
        for i, constant in batched.constants.items():
            names[i] = self.b.constant(constant).index
        for op in batched.ops:
            new = op.renamed(names)
            found = self.b.emit(new.func, *new.args, **new.kwargs)
            names[op.out.index] = found.index
        result = names[batched.outputs[0]]
        self.sizes[result] = n
        for at, op in enumerate(group):
            self.members[op.out.index] = _Member(result, at)
        return True

    def cost(self, column: Sequence[int]) -> float:
        """Of bringing operands together, in operations."""
        if all(i in self.b.constants for i in column):
            return 0.0
        if all(i in self.members for i in column):
            at = [self.members[i].at for i in column]
            return 0.0 if at == list(range(self.sizes[self.members[column[0]].stack])) else 1.0
        return 1.0 + 0.15 * len(column)

    def stack(self, column: Sequence[int]) -> Ref:
        """Operands along a new first dimension."""
        b = self.b
        if all(i in b.constants for i in column):
            return b.constant(torch.stack([b.constants[i] for i in column]))
        if all(i in self.members for i in column):
            whole = self.members[column[0]].stack
            return selected(b, Ref(whole), 0, [self.members[i].at for i in column])
        names = self.singles(column)
        return b.emit(aten.stack.default, [Ref(names.get(i, i)) for i in column])

    def batched(self, op: Op, shared: tuple[bool, ...], n: int) -> Tape | None:
        """The operations that do one operation on stacks, if they are few."""
        operands = [self.b.values[i] for i in op.reads()]
        key = (self.kind(op), shared, n)
        if key not in self.known:
            self.known[key] = _batched(op, operands, shared, n)
        return self.known[key]


def _batched(op: Op, operands: Sequence[Tensor], shared: Sequence[bool], n: int) -> Tape | None:
    def one(*tensors: Tensor) -> Tensor:
        left = iter(tensors)
        args, kwargs = mapped(
            (op.args, op.kwargs), lambda leaf: next(left) if isinstance(leaf, Ref) else leaf
        )
        return op.func(*args, **kwargs)

    stacks = [t if same else torch.stack([t] * n) for t, same in zip(operands, shared, strict=True)]
    try:
        tape, _ = tape_of(torch.vmap(one, tuple(None if same else 0 for same in shared)), stacks)
    except RuntimeError:
        return None
    fine = all(o.movable and isinstance(o.out, Ref) for o in tape.ops)
    return tape if fine and len(tape.ops) <= _NOISE and len(tape.outputs) == 1 and tape.ops else None


def _hashable(tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        return tuple(_hashable(item) for item in tree)
    if isinstance(tree, Ref):
        return Ref
    return (type(tree), repr(tree)) if isinstance(tree, (int, float, complex)) else tree


def together(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    """The tape with operations of one kind done at once, where that makes fewer."""
    return unbound(_Stacker(tape, values, guarded).run(), values, guarded)


def unbound(tape: Tape, values: Values, guarded: set[int]) -> Tape:
    """Slices of a stack, of which many are wanted, by one operation."""
    wanted: dict[int, dict[int, Op]] = defaultdict(dict)
    for op in tape.ops:
        if op.func is aten.select.int and op.args[1] == 0 and op.args[2] >= 0 and is_free(op, guarded):
            wanted[op.args[0].index].setdefault(op.args[2], op)
    many = {i: found for i, found in wanted.items() if len(found) >= max(3, values[i].shape[0] // 4)}
    replaced = {id(op) for found in many.values() for op in found.values()}
    ops: list[Op] = []
    done: set[int] = set()
    for op in tape.ops:
        if id(op) not in replaced:
            ops.append(op)
        elif (source := op.args[0].index) not in done:
            done.add(source)
            out = [
                many[source][at].out if at in many[source] else None for at in range(values[source].shape[0])
            ]
            ops.append(Op(aten.unbind.int, (op.args[0], 0), {}, out))
    return Tape(tape.inputs, tape.constants, ops, tape.outputs, tape.live)
