"""Making one recording: run the function, check that the tape repeats it, shorten the tape, check again."""

from __future__ import annotations

import contextlib
import enum
import gc
import itertools
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record.inductor import NotCompiled
from pgen.algorithms.record.outputs import independent
from pgen.algorithms.record.precision import lifted
from pgen.algorithms.record.recorder import Recorder, Unrecordable, recorded_run, tensors_in
from pgen.algorithms.record.replay import Replay, buffered, rebuilder_of, replay_of
from pgen.algorithms.record.simplify import MISTAKES, fastest
from pgen.algorithms.record.tape import Ref, Tape, mapped, memory
from pgen.algorithms.record.verify import Outcome, Trial, World, aside, copied, dice, unseen

Compiler = Callable[[Tape, Sequence[Tensor]], Replay]


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_STATIC = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


@dataclass(frozen=True)
class Recording:
    """One tape ready to run.

    Attributes:
        tape: the operations, simplified.
        recorded: how many there were before.
        replay: the function, from input tensors to output tensors.
        rebuild: from those to the result in its own shape.
        watched: captured tensors, with their versions (-1 for those that are read anew) and places in memory.
        written: places among the inputs of those that are changed in place.
        held: memory of captured tensors.
        trouble: why the tape is not simplified, or not compiled, where that went wrong.
    """

    tape: Tape
    recorded: int
    replay: Replay
    rebuild: Callable[[Sequence[Tensor]], Any]
    watched: tuple[tuple[Tensor, int, int], ...]
    written: tuple[int, ...]
    held: frozenset[int]
    trouble: str | None = None

    def stale(self) -> list[Tensor]:
        """Captured tensors that someone changed since."""
        return [
            t
            for t, version, place in self.watched
            if (t._version != version and version >= 0) or t.data_ptr() != place
        ]

    def entangled(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a change in place would be seen through another input or a captured tensor."""
        places = [memory(t) for t in tensors]
        return any(places[i] in self.held or places.count(places[i]) > 1 for i in self.written)


@dataclass(frozen=True)
class _Taped:
    """One run of a function: its tape, and what came of it."""

    tape: Tape
    result: Any
    trial: Trial
    outcome: Outcome
    recorder: Recorder


def recording_of(
    fn: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    live: Sequence[Tensor] = (),
    simplify: bool = True,
    lift: bool = False,
    compiler: Compiler | None = None,
) -> Recording:
    """Record a function of tensors.

    Args:
        fn: takes the tensors one by one.
        tensors: of the kind that the recording is for. They are not changed, nor is anything else.
        live: captured tensors that others change.
        simplify: shorten the tape.
        lift: in double precision (see `precision.py`).
        compiler: makes the replay of a tape.

    Raises:
        Unrecordable: the operations depend on values, or a replay does not repeat the function.
    """
    collecting = gc.isenabled()
    gc.disable()  # a tape is many small objects, none of them garbage yet: searching them takes half of the time
    try:
        return _recording(fn, tensors, live, simplify, lift, compiler)
    finally:
        if collecting:
            gc.enable()


def _recording(
    fn: Callable[..., Any],
    tensors: Sequence[Tensor],
    live: Sequence[Tensor],
    simplify: bool,
    lift: bool,
    compiler: Compiler | None,
) -> Recording:
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_quantized:
            raise Unrecordable(
                f"an argument of type {type(tensor).__name__}, {tensor.layout}", None, "not recorded"
            )
    taped = _lifted(fn, tensors, live) if lift else _taped(fn, tensors, live)
    recorder, trial = taped.recorder, taped.trial
    captured = {memory(recorder.originals[i]) for i in recorder.captured}
    with aside():
        with trial.copies() as copies:
            first = taped.tape.run(copies)
            again = Outcome([copied(first[i]) for i in taped.tape.outputs], copies, trial.world.found())
        difference = again.differs(taped.outcome)
        if difference is not None:
            raise Unrecordable(
                f"{difference} is not repeated",
                None,
                "a replay of the operations gives other numbers than the function",
            )
        tape, found, trouble = None, None, None
        if simplify:
            tape, found, trouble = _shorter(taped, first, captured)
        if tape is None or found is None:
            tape = independent(taped.tape, first, taped.tape, first, captured)
            found = replay_of(tape)
    if compiler is not None:
        found, trouble = _compiled(compiler, tape, taped, found, trouble)
    anew = {memory(t) for t in live} | {memory(tensor) for tensor, _ in recorder.saved}
    watched = [recorder.originals[i] for i in recorder.captured]
    return Recording(
        tape=tape,
        recorded=len(taped.tape.ops),
        replay=found,
        rebuild=rebuilder_of(taped.result),
        watched=tuple((t, _version(t, anew), t.data_ptr()) for t in watched if not t.is_inference()),
        written=_written(taped.tape, first),
        held=frozenset(captured),
        trouble=trouble,
    )


def _taped(fn: Callable[..., Any], tensors: Sequence[Tensor], live: Sequence[Tensor]) -> _Taped:
    with aside():
        inputs = [copied(t) for t in tensors]
        mine = [copied(t) for t in inputs]
    recorder, before = Recorder(mine, live), dice()
    try:
        with unseen():
            tape, result = recorded_run(fn, recorder)
        world = World(before, tuple(recorder.generators.values()), tuple(recorder.saved))
        with aside():
            results = [copied(t) for t in tensors_in(result)]
            outcome = Outcome(results, mine, world.found())
    finally:
        World(before, tuple(recorder.generators.values()), tuple(recorder.saved)).restore()
    places = itertools.count()
    shape = mapped(result, lambda leaf: Ref(next(places)) if isinstance(leaf, Tensor) else _static(leaf))
    return _Taped(tape, shape, Trial(inputs, world), outcome, recorder)


def _shorter(
    taped: _Taped, first: dict[int, Tensor], captured: Collection[int]
) -> tuple[Tape | None, Replay | None, str | None]:
    """A faster tape that gives what the tape gives, with its replay; and why it is not the fastest."""
    trial, difference = taped.trial, None
    tape, trouble = fastest(taped.tape, first, trial)
    try:
        tape = independent(tape, trial.values(tape), taped.tape, first, captured)
        values = trial.values(tape)
        replay = buffered(tape, values)
        difference = trial.outcome(replay).differs(taped.outcome)
        if difference is None:
            return tape, replay, trouble
    except MISTAKES as error:
        difference = f"{type(error).__name__}: {error}"
    return None, None, trouble or difference


def _lifted(fn: Callable[..., Any], tensors: Sequence[Tensor], live: Sequence[Tensor]) -> _Taped:
    """In double precision: the tape of a run in the function's own, carried over; else with casts around it."""
    low, high = torch.get_default_dtype(), torch.float64
    if low == high or all(t.dtype != high for t in tensors):
        return _taped(fn, tensors, live)
    taped = _taped(fn, [t.to(low) if t.dtype == high else t for t in tensors], live)
    trial = Trial([copied(t) for t in tensors], taped.trial.world)
    if not taped.recorder.saved and not any(op.random for op in taped.tape.ops):
        with contextlib.suppress(RuntimeError, TypeError), aside():
            types = {i: v.dtype for i, v in taped.trial.values(taped.tape).items()}
            tape = lifted(taped.tape, types, low, high)
            outcome = trial.outcome(tape.results)
            if all(_roughly(a, b) for a, b in zip(outcome.results, taped.outcome.results, strict=True)):
                return replace(taped, tape=tape, trial=trial, outcome=outcome)

    def cast(*leaves: Tensor) -> Any:
        found = fn(*(t.to(low) if t.dtype == high else t for t in leaves))
        return mapped(
            found, lambda leaf: leaf.to(high) if isinstance(leaf, Tensor) and leaf.dtype == low else leaf
        )

    return _taped(cast, tensors, live)


def _roughly(fine: Tensor, rough: Tensor) -> bool:
    return torch.allclose(fine.to(rough.dtype), rough, rtol=1e-2, atol=1e-2, equal_nan=True)


def _static(leaf: Any) -> Any:
    """What is not a tensor in a result: a recording gives it as it was."""
    if not isinstance(leaf, _STATIC):
        raise Unrecordable(
            f"a result that holds a {type(leaf).__name__}",
            None,
            "it may hold tensors that a replay does not see; give nested tuples, lists and dicts of tensors",
        )
    return leaf


def _version(tensor: Tensor, anew: Collection[int]) -> int:
    return -1 if memory(tensor) in anew else tensor._version


def _written(tape: Tape, values: dict[int, Tensor]) -> tuple[int, ...]:
    """Which of the inputs are changed in place."""
    places = {memory(values[i]) for op in tape.ops for i in op.writes()}
    return tuple(at for at, i in enumerate(tape.inputs) if memory(values[i]) in places)


def _compiled(
    compiler: Compiler, tape: Tape, taped: _Taped, found: Replay, trouble: str | None
) -> tuple[Replay, str | None]:
    """A compiled replay, if it can be had and gives the right numbers."""
    try:
        with aside():
            compiled = compiler(tape, [copied(t) for t in taped.trial.inputs])
            difference = taped.trial.outcome(compiled).differs(taped.outcome)
        if difference is None:
            return compiled, trouble
        why = f"compiled, it gives other numbers: {difference}"
    except Exception as error:  # whatever a compiler may come up with
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(f"not compiled, so slower: {why}", NotCompiled, stacklevel=5)
    return found, why
