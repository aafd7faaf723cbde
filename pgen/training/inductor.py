"""Recordings compiled by torch's inductor: kernels that do several operations at once.

    draws      random operations, and what they need: as torch does them, in the program's order
    the rest   one compiled function of inputs, captured tensors and draws

Inductor's own random numbers on the CPU are others than torch's, and 8 to 12 times slower. Parameters and buffers go in
by reference at every call, since an optimiser changes them in place.
"""

from __future__ import annotations

import operator
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from pgen.algorithms.record import NotCompiled, Op, Ref, Replay, Tape, replay_of
from pgen.algorithms.record.tape import mapped
from pgen.training.products import LINEAR, by_onednn, pays, with_products

aten = torch.ops.aten


def compiled(tape: Tape, inputs: Sequence[Tensor]) -> Replay:
    """The replay of a tape, compiled. Takes seconds, less in later processes: torch keeps what it compiled on disk.

    Args:
        tape: the operations.
        inputs: an example; may be changed.
    """
    return Parts.of(tape, inputs).compiled()


def compiled_in_the_background(tape: Tape, inputs: Sequence[Tensor]) -> Replay:
    """The replay of a tape, operation by operation until another process has compiled it, and left that on disk."""
    return _Later(Parts.of(tape, inputs), replay_of(tape))


@dataclass(frozen=True)
class Parts:
    """A tape in two.

    Attributes:
        draws: gives what depends on chance, from the inputs.
        rest: the operations that are compiled.
        given: numbers of their inputs: those of the tape, captured tensors, and draws.
        captured: the captured tensors.
        example: tensors for all that is given.
    """

    draws: Replay
    rest: Tape
    given: list[int]
    captured: list[Tensor]
    example: list[Tensor]

    @staticmethod
    def of(tape: Tape, inputs: Sequence[Tensor]) -> Parts:
        """Take a tape apart; draws random numbers."""
        draws, rest, drawn = _apart(_prepared(tape, inputs))
        captured = list(rest.constants.values())
        given = [*tape.inputs, *rest.constants, *drawn]
        return Parts(draws, rest, given, captured, [*inputs, *captured, *draws(*inputs)])

    def compiled(self) -> Replay:
        """A replay."""
        function, draws, captured = _compiled(self.rest, self.given, self.example), self.draws, self.captured
        return lambda *inputs: tuple(function(*inputs, *captured, *draws(*inputs)))


class _Later:
    """A replay that becomes a compiled one when another process is done.

    A thread would not do: the compiler puts the state of torch's random generator back where it found it.
    """

    def __init__(self, parts: Parts, plain: Replay) -> None:
        self._parts, self._replay = parts, plain
        ops = [
            (op.func._schema.name, op.func._overloadname, op.args, op.kwargs, op.out) for op in parts.rest.ops
        ]
        shapes = [(t.shape, t.stride(), t.dtype, t.device) for t in parts.example]
        code = "from pgen.training.inductor import _warm; _warm()"
        task = (torch.get_num_threads(), ops, parts.given, parts.rest.outputs, shapes)
        with tempfile.TemporaryFile() as file:  # a pipe would wait for the other process to read
            pickle.dump(task, file)
            file.seek(0)
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-c", code], stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._process is not None and self._process.poll() is not None:
            done, self._process = self._process.returncode == 0, None
            if done:
                self._replay = self._parts.compiled()
            else:
                warnings.warn("not compiled, so slower: the compiler failed", NotCompiled, stacklevel=2)
        return self._replay(*inputs)

    def __del__(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _warm() -> None:
    """Compile what is read from standard input, so that it is on disk: what the other process does."""
    threads, written, given, outputs, shapes = pickle.load(sys.stdin.buffer)  # noqa: S301 - of our own making
    torch.set_num_threads(threads)
    ops: list[Op] = []
    for name, overload, args, kwargs, out in written:
        namespace, _, function = name.partition("::")
        ops.append(Op(getattr(getattr(getattr(torch.ops, namespace), function), overload), args, kwargs, out))
    example = [torch.empty_strided(size, stride, dtype=t, device=d) for size, stride, t, d in shapes]
    _compiled(Tape(inputs=[], constants={}, ops=ops, outputs=outputs), given, example)


def _compiled(tape: Tape, given: Sequence[int], example: list[Any]) -> Callable[..., Sequence[Tensor]]:
    from torch import _inductor  # the compiler: more than a second, for those who want it

    with torch.no_grad():
        return _inductor.compile(_graph(tape, given), example)


COMPILERS: dict[str, Callable[[Tape, Sequence[Tensor]], Replay] | None] = {
    "auto": by_onednn if pays() else None,
    "inductor": compiled,
    "background": compiled_in_the_background,
}
"""Who makes replays, by the name that a run gives."""


def _prepared(tape: Tape, inputs: Sequence[Tensor]) -> Tape:
    """Products as this machine does them best; dropout as a mask, drawn, and a product: a mask needs a shape only."""
    values = tape.run(inputs)
    tape = with_products(tape, values)
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


def _apart(tape: Tape) -> tuple[Replay, Tape, list[int]]:
    """A replay of what draws; the tape of what is left; and the numbers that go from one to the other."""
    needed: set[int] = set()
    for op in tape.ops:
        if op.random:
            needed.update((*op.reads(), *op.gives()))
    draws, rest = list[Op](), list[Op]()
    for op in reversed(tape.ops):
        if op.random or not needed.isdisjoint((*op.gives(), *op.writes())):
            draws.append(op)
            needed.update(op.reads())
        else:
            rest.append(op)
    draws, rest = draws[::-1], rest[::-1]
    read = {i for op in rest for i in op.reads()} | set(tape.outputs)
    drawn = [
        i
        for i in dict.fromkeys(i for op in draws for i in op.gives())
        if i in read and i not in tape.constants
    ]
    drawn = [i for i in drawn if i not in tape.inputs]
    constants = {i: constant for i, constant in tape.constants.items() if i in read}
    return (
        replay_of(replace(tape, ops=draws, outputs=drawn)),
        replace(tape, constants=constants, ops=rest),
        drawn,
    )


@cache
def _opaque() -> Any:
    """oneDNN's product as an operation that the compiler leaves alone: it would want the weights frozen."""
    library = torch.library.Library("pgen", "FRAGMENT")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("linear", lambda x, weight, bias: LINEAR(x, weight, bias, "none", [], ""), "CPU")
    library.impl("linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]), "Meta")
    _opaque.library = library  # type: ignore[attr-defined] - it lives as long as this
    return torch.ops.pgen.linear.default


def _graph(tape: Tape, given: Sequence[int]) -> fx.GraphModule:
    """The operations as torch's compiler takes them; captured tensors and draws are inputs like all others."""
    graph: fx.Graph = fx.Graph()
    nodes: dict[int, Any] = {i: graph.placeholder(f"v{i}") for i in given}

    def named(tree: Any) -> Any:
        return mapped(tree, lambda leaf: nodes[leaf.index] if isinstance(leaf, Ref) else leaf)

    for op in tape.ops:
        func, args = (_opaque(), op.args[:3]) if op.func is LINEAR else (op.func, op.args)
        node = graph.call_function(func, named(args), named(op.kwargs))
        if isinstance(op.out, Ref):
            nodes[op.out.index] = node
            continue
        for place, out in enumerate(op.out or ()):
            if isinstance(out, Ref):
                nodes[out.index] = graph.call_function(operator.getitem, (node, place))
    graph.output(tuple(nodes[i] for i in tape.outputs))
    return fx.GraphModule(nn.Module(), graph)
