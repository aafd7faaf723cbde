"""Recordings compiled by torch's inductor: one native function in place of hundreds of calls.

    draws      random operations, and what these need: by torch, in the function's order
    the rest   compiled, from inputs, captured tensors and draws to results

The compiler runs in a process of its own (see `compiling.py`); here nothing of it is ever loaded. What it leaves is a
library on disk, which this and later processes load in a millisecond.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pgen.algorithms.record.compiling import Order
from pgen.algorithms.record.draws import apart, by_shape, with_masks
from pgen.algorithms.record.libraries import Libraries
from pgen.algorithms.record.machine import processor
from pgen.algorithms.record.products import with_products
from pgen.algorithms.record.replay import Replay, buffered
from pgen.algorithms.record.tape import Tape
from pgen.algorithms.record.verify import Trial, aside

_EVERY = 16  # calls between looks at the other process
_SAID = "said"  # the file with its complaints
_ROOT = str(Path(__file__).parents[3])


class NotCompiled(UserWarning):
    """A recording is replayed operation by operation, since it could not be compiled."""


@dataclass(frozen=True)
class Inductor:
    """Makes compiled replays: a `compiler` for `Recorded`.

    Captured tensors go in by reference at every call, so an optimiser may change them in place.

    Attributes:
        folder: where libraries are kept; by default `pgen/compiled` in the user's cache directory (`XDG_CACHE_HOME`, or
            `~/.cache`). To load a library is to run it: a folder that others can write to is refused.
        wait: until the compiler is done; else operations are replayed one by one until then, and from some call on
            results differ from before by round-off, which call being a matter of the clock.
        compare: a library that comes later with the operations, before it takes their place. A caller who compares
            replays with the function anyway, and knows how far they may be apart, can do without.
    """

    folder: Path | None = None
    wait: bool = True
    compare: bool = True

    def __call__(self, tape: Tape, inputs: Sequence[Tensor]) -> Replay:
        """The compiled replay of a tape.

        Args:
            tape: operations.
            inputs: an example.

        Raises:
            RuntimeError: it cannot be compiled; the message says why.
        """
        libraries = Libraries.at(self.folder)
        task = Task.of(tape, inputs)
        found = libraries.find(task.name)
        if found is not None:
            return task.loaded(found)
        compiling = Compiling(task, libraries)
        if not self.wait:
            return _Later(compiling, tape, inputs, self.compare)
        return compiling.result()


@dataclass(frozen=True)
class Task:
    """What is compiled, and what is done around it.

    Attributes:
        draws: gives what depends on chance, from the inputs.
        rest: the operations to compile, whose inputs are those of the tape, captured tensors, and draws.
        captured: the captured tensors.
        order: the same operations as plain values.
        outputs: for each result its place among the compiled ones, or minus one minus its place among the inputs.
    """

    draws: Replay
    rest: Tape
    captured: tuple[Tensor, ...]
    order: Order
    outputs: tuple[int, ...]

    @staticmethod
    def of(tape: Tape, inputs: Sequence[Tensor]) -> Task:
        """Take a tape apart."""
        with aside():
            trial = Trial.on(tape, inputs)
            values = trial.values(tape)
            tape = by_shape(with_masks(with_products(tape, values), values), values)
            draws, rest, drawn = apart(tape)
            captured = tuple(rest.constants.values())
            with trial.copies() as copies:
                tensors = [*copies, *captured, *draws(*copies)]
        if any(t.device.type != "cpu" for t in tensors):
            raise RuntimeError("only tensors in main memory are compiled for")
        given = [*tape.inputs, *rest.constants, *drawn]
        made = {i for op in rest.ops for i in op.gives()} - set(given)
        results = list(dict.fromkeys(i for i in tape.outputs if i in made))
        outputs = tuple(results.index(i) if i in made else -1 - given.index(i) for i in tape.outputs)
        rest = Tape(given, {}, rest.ops, results)
        example = [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]
        return Task(draws, rest, captured, Order.of(rest, example), outputs)

    @cached_property
    def name(self) -> str:
        """The same for the same operations on the same kind of machine."""
        machine = (torch.__version__, torch.backends.cpu.get_cpu_capability(), processor(), sys.platform)
        written = repr((machine, torch.get_num_threads(), self.order))
        return hashlib.sha256(written.encode()).hexdigest()[:32]

    def loaded(self, library: Path) -> Replay:
        """The replay, with the library."""
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)  # type: ignore[attr-defined]
        run, captured, draws, outputs = runner.run, self.captured, self.draws, self.outputs
        if outputs == tuple(range(len(outputs))):
            return lambda *inputs: tuple(run([*inputs, *captured, *draws(*inputs)]))

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = [*inputs, *captured, *draws(*inputs)]
            found = run(given)
            return tuple(found[at] if at >= 0 else given[-1 - at] for at in outputs)

        return replay


class Compiling:
    """A process that compiles a task; it ends with this object, if not before."""

    def __init__(self, task: Task, libraries: Libraries) -> None:
        self._task, self._libraries = task, libraries
        self._work = Path(tempfile.mkdtemp(prefix="work-", dir=libraries.folder))
        self._process = started(task, libraries.folder, self._work)
        self._end = weakref.finalize(self, _stop, self._process, self._work)

    def is_done(self) -> bool:
        """Whether the process has ended, in one way or another."""
        return self._process.poll() is not None

    def result(self) -> Replay:
        """The compiled replay, after some waiting if need be.

        Raises:
            RuntimeError: it failed; the message says why.
        """
        failed = self._process.wait() != 0
        said = (self._work / _SAID).read_text(errors="replace")
        self._end()
        library = self._libraries.find(self._task.name)
        if failed or library is None:
            raise RuntimeError(_told(said))
        return self._task.loaded(library)


class _Later:
    """A replay, operation by operation, that becomes the compiled one when that is there."""

    def __init__(self, compiling: Compiling, tape: Tape, inputs: Sequence[Tensor], compare: bool) -> None:
        with aside():
            self._replay = buffered(tape, Trial.on(tape, inputs).values(tape))
        self._compiling: Compiling | None = compiling
        self._tape, self._compare, self._calls = tape, compare, 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._calls += 1
        if self._compiling is not None and self._calls % _EVERY == 0 and self._compiling.is_done():
            self._swap(self._compiling, inputs)
        return self._replay(*inputs)

    def _swap(self, compiling: Compiling, inputs: Sequence[Tensor]) -> None:
        self._compiling = None
        try:
            compiled = compiling.result()
        except RuntimeError as error:
            why: str | None = str(error)
        else:
            why = self._difference(compiled, inputs) if self._compare else None
            if why is None:
                self._replay = compiled
                return
        warnings.warn(f"not compiled, so slower: {why}", NotCompiled, stacklevel=4)

    def _difference(self, compiled: Replay, inputs: Sequence[Tensor]) -> str | None:
        with aside():
            trial = Trial.on(self._tape, inputs)
            found = trial.outcome(compiled).differs(trial.outcome(self._replay))
        return None if found is None else f"compiled, it gives other numbers: {found}"


def started(task: Task, folder: Path, work: Path) -> subprocess.Popen[bytes]:
    """A process that compiles a task into a library in a folder, with another folder for all else."""
    code = f"import sys; sys.path.insert(0, {_ROOT!r}); from pgen.algorithms.record import compiling; compiling.main()"
    # Pipes would wait for the other side to read.
    with tempfile.TemporaryFile() as file, (work / _SAID).open("wb") as said:
        pickle.dump((torch.get_num_threads(), str(folder), str(work), task.name, task.order), file)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=file, stdout=subprocess.DEVNULL, stderr=said
        )


def _stop(process: subprocess.Popen[bytes], work: Path) -> None:
    process.kill()
    process.wait()
    shutil.rmtree(work, ignore_errors=True)


def _told(said: str) -> str:
    """The line of a compiler's complaints that says most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["the compiler failed"])[-1][:300]
