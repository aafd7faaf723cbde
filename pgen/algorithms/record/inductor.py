"""Recordings compiled by torch's inductor: one native function in place of hundreds of calls.

    draws      random operations, and what these need: by torch, in the function's order
    the rest   compiled, from inputs, captured tensors and draws to results

Inductor's own random numbers on the CPU are others than torch's, and 8 to 12 times slower.

The compiler runs in a process of its own. It is large, takes a while to import, and changes settings, warnings and the
state of torch's random generator on its way; here nothing of it is ever loaded. What it leaves is a library on disk,
which this and later processes load in a millisecond.
"""

from __future__ import annotations

import hashlib
import operator
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.buffers import plan_of
from pgen.algorithms.record.replay import Replay, replay_of
from pgen.algorithms.record.tape import Op, Ref, Tape, mapped
from pgen.algorithms.record.verify import Trial, aside

_EVERY = 16  # calls between looks at the other process
_ROOT = str(Path(__file__).parents[3])


class NotCompiled(UserWarning):
    """A recording is replayed operation by operation, since it could not be compiled."""


@dataclass(frozen=True)
class Inductor:
    """Makes compiled replays: a `compiler` for `Recorded`.

    Attributes:
        folder: where libraries are kept; by default `pgen/compiled` in the user's cache directory (`XDG_CACHE_HOME`, or
            `~/.cache`).
        wait: until the compiler is done; else operations are replayed one by one until then, and from some call on
            results differ from before by round-off, which call being a matter of the clock.
    """

    folder: Path | None = None
    wait: bool = True

    def __call__(self, tape: Tape, inputs: Sequence[Tensor]) -> Replay:
        """The compiled replay of a tape.

        Args:
            tape: operations.
            inputs: an example.

        Raises:
            RuntimeError: it cannot be compiled; the message says why.
        """
        task = _Task.of(tape, inputs)
        path = self._place() / f"{task.name()}.so"
        if not path.exists():
            process = _started(task, path)
            if not self.wait:
                return _Later(task, path, process, tape, inputs)
            _, error = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(_told(error))
        return task.loaded(path)

    def _place(self) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "pgen" / "compiled"


@dataclass(frozen=True)
class _Task:
    """What is compiled, and what is done around it.

    Attributes:
        draws: gives what depends on chance, from the inputs.
        rest: the operations to compile, whose inputs are those of the tape, captured tensors, and draws.
        captured: the captured tensors.
        example: shapes, strides, types and devices of all inputs.
        outputs: for each result its place among the compiled ones, or minus one minus its place among the inputs.
    """

    draws: Replay
    rest: Tape
    captured: tuple[Tensor, ...]
    example: tuple[Any, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def of(tape: Tape, inputs: Sequence[Tensor]) -> _Task:
        """Take a tape apart."""
        draws, rest, drawn = _apart(tape)
        given = [*tape.inputs, *rest.constants, *drawn]
        captured = tuple(rest.constants.values())
        with aside(), Trial.on(tape, inputs).copies() as copies:
            tensors = [*copies, *captured, *draws(*copies)]
        if any(t.device.type != "cpu" for t in tensors):
            raise RuntimeError("only tensors in main memory are compiled for")
        example = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
        made = {i for op in rest.ops for i in op.gives()} - set(given)
        results = list(dict.fromkeys(i for i in tape.outputs if i in made))
        outputs = tuple(results.index(i) if i in made else -1 - given.index(i) for i in tape.outputs)
        return _Task(draws, Tape(given, {}, rest.ops, results), captured, example, outputs)

    def name(self) -> str:
        """The same for the same operations on the same kind of machine."""
        machine = (
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
            sys.platform,
        )
        return hashlib.sha256(repr((machine, self.written(), self.example)).encode()).hexdigest()[:32]

    def written(self) -> Any:
        """The operations as plain values."""
        numbers = {i: at for at, i in enumerate(self.rest.inputs)}
        for op in self.rest.ops:
            for i in op.gives():
                numbers.setdefault(i, len(numbers))

        def plain(tree: Any) -> Any:
            return mapped(tree, lambda leaf: Ref(numbers[leaf.index]) if isinstance(leaf, Ref) else leaf)

        ops = [
            (op.func._schema.name, op.func._overloadname, plain(op.args), plain(op.kwargs), plain(op.out))
            for op in self.rest.ops
        ]
        return ops, [numbers[i] for i in self.rest.outputs]

    def loaded(self, path: Path) -> Replay:
        """The replay, with the library."""
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)  # type: ignore[attr-defined]
        run, captured, draws, outputs = runner.run, self.captured, self.draws, self.outputs
        if outputs == tuple(range(len(outputs))):
            return lambda *inputs: tuple(run([*inputs, *captured, *draws(*inputs)]))

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = [*inputs, *captured, *draws(*inputs)]
            found = run(given)
            return tuple(found[at] if at >= 0 else given[-1 - at] for at in outputs)

        return replay


def _apart(tape: Tape) -> tuple[Replay, Tape, list[int]]:
    """A replay of what draws; the tape of what is left; and the numbers that go from one to the other."""
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


class _Later:
    """A replay, operation by operation, that becomes the compiled one when that is there."""

    def __init__(
        self, task: _Task, path: Path, process: subprocess.Popen[str], tape: Tape, inputs: Sequence[Tensor]
    ) -> None:
        with aside():
            values = Trial.on(tape, inputs).values(tape)
        self._replay = replay_of(tape, {i: v.nbytes for i, v in values.items()}, plan_of(tape, values))
        self._task, self._path, self._tape, self._calls = task, path, tape, 0
        self._process: subprocess.Popen[str] | None = process
        self._end = weakref.finalize(self, process.kill)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._calls += 1
        if self._process is not None and self._calls % _EVERY == 0 and self._process.poll() is not None:
            self._swap(self._process, inputs)
        return self._replay(*inputs)

    def _swap(self, process: subprocess.Popen[str], inputs: Sequence[Tensor]) -> None:
        self._process = None
        self._end.detach()
        _, error = process.communicate()
        why = _told(error) if process.returncode != 0 else None
        if why is None:
            compiled = self._task.loaded(self._path)
            trial = Trial.on(self._tape, inputs)
            with aside():
                why = trial.outcome(compiled).differs(trial.outcome(self._replay))
            if why is None:
                self._replay = compiled
                return
        warnings.warn(f"not compiled, so slower: {why}", NotCompiled, stacklevel=4)


def _started(task: _Task, path: Path) -> subprocess.Popen[str]:
    """A process that compiles a task into a library at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = f"import sys; sys.path.insert(0, {_ROOT!r}); from pgen.algorithms.record import inductor; inductor._compile()"
    with tempfile.TemporaryFile() as file:  # a pipe would wait for the other process to read
        pickle.dump((torch.get_num_threads(), str(path), task.written(), task.example), file)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def _compile() -> None:
    """Compile what is read from standard input: what the other process does."""
    from torch import _inductor, fx  # the compiler: more than a second, and only there

    threads, path, (ops, outputs), example = pickle.load(sys.stdin.buffer)  # noqa: S301 - of our own making
    torch.set_num_threads(threads)
    graph = fx.Graph()
    nodes: dict[int, Any] = {i: graph.placeholder(f"v{i}") for i in range(len(example))}
    for name, overload, args, kwargs, out in ops:
        namespace, _, function = name.partition("::")
        func = getattr(getattr(getattr(torch.ops, namespace), function), overload or "default")
        args, kwargs = mapped(
            (args, kwargs), lambda leaf: nodes[leaf.index] if isinstance(leaf, Ref) else leaf
        )
        node = graph.call_function(func, args, kwargs)
        if isinstance(out, Ref):
            nodes[out.index] = node
        else:
            for place, part in enumerate(out or ()):
                if isinstance(part, Ref):
                    nodes[part.index] = graph.call_function(operator.getitem, (node, place))
    graph.output(tuple(nodes[i] for i in outputs))
    tensors = tuple(torch.empty_strided(size, stride, dtype=kind) for size, stride, kind in example)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        options = {"aot_inductor.output_path": str(Path(folder) / "model.so")}
        made = _inductor.aot_compile(fx.GraphModule(torch.nn.Module(), graph), tensors, options=options)
        os.replace(str(made), path)


def _told(error: str | None) -> str:
    """The line of a compiler's complaints that says most."""
    lines = [line.strip() for line in (error or "").splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower()]
    return (said or lines or ["the compiler failed"])[-1][:300]
