"""Losses and gradients, replayed: a player's loss is run once, and from then on its tensor operations are repeated.

    first step        as written, with the checks of the data that a program makes then
    second            recorded, and replayed
    from then on      replayed; at replays 1, 2, 4, 8, ... also run as written, and compared

What changes between steps goes in by name: parameters, buffers, the batch, the number of the step. What a recording
cannot hold is run as written for good, and why is in the history: numbers read off tensors, Python's counters, random
numbers that are not torch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record import Compiler, Recording, Unrecordable, where_raised
from pgen.algorithms.record.recording import recording_of
from pgen.algorithms.record.verify import aside
from pgen.problem import Problem
from pgen.threads import Work, use_threads
from pgen.training.agreement import Moment, alike, roundoff
from pgen.training.players import Evaluation, Player, Step, clone, evaluate
from pgen.training.watch import changed, plain_values

Context = Callable[[], AbstractContextManager[Any]]

FEWEST_STEPS = 100
"""A run of fewer steps is not worth a recording, which takes the time of about 25 of them."""
MOST_KINDS = 8
"""Shapes of batches that are recorded; where there are more, all are run as written."""


@dataclass
class Take:
    """One recording of a loss and its gradient, ready to be repeated.

    Attributes:
        recording: from the tensors of a batch and the number of the step to the loss, metrics, gradients and the new
            values of buffers that the program replaces.
        watched: captured tensors that nobody should change.
        metrics: by name: None for those that come out, else what it always is.
        gradients: whether there is one, by parameter.
        buffers: those that the recording reads.
        renewed: the names of buffers that come out.
        batch: held, since it may be known by its address.
        tolerance: relative, of a comparison.
        threads: to compute with.
        replays: how many there were.
        compared: the last of them that was compared.
    """

    recording: Recording
    watched: list[tuple[Tensor, int]]
    metrics: Mapping[str, float | None]
    gradients: tuple[bool, ...]
    buffers: Mapping[str, Tensor]
    renewed: tuple[str, ...]
    batch: Problem
    tolerance: float
    threads: int
    replays: int = 0
    compared: int = 0

    def stale(self) -> list[Tensor]:
        """Captured tensors that somebody changed after all."""
        return [tensor for tensor, version in self.watched if tensor._version != version]


class Replays:
    """Evaluates one player: by replays where it can be.

    Attributes:
        name: the player's.
        player: its parameters and loss.
        obstacle: why its loss is run as written; None while nothing stands in the way.
        trouble: why a recording of it is not compiled.
    """

    def __init__(
        self,
        name: str,
        player: Player,
        tensors: Sequence[Tensor],
        buffers: MutableMapping[str, Tensor],
        *,
        fixed: bool = False,
        compiler: Compiler | None = None,
        wait: int = 0,
    ) -> None:
        """Begin without a recording.

        Args:
            name: of the player.
            player: whose loss it is.
            tensors: the parameters of all players, any of which the loss may read.
            buffers: tensors that losses change in place, or replace in this mapping.
            fixed: every batch is the same object, so that data may decide what is done.
            compiler: makes a faster replay.
            wait: evaluations as written before there is a recording, where it is not known how many there will be.
        """
        self.name, self.player = name, player
        self.obstacle: str | None = None
        self.trouble: str | None = None
        self._live, self._buffers, self._fixed, self._compiler = list(tensors), buffers, fixed, compiler
        self._number = torch.zeros(())
        self._threads, self._wait = torch.get_num_threads(), wait
        self._takes: dict[Any, Take] = {}

    def __call__(self, batch: Problem, step: Step, context: Context) -> Evaluation:
        """Loss, metrics and gradient on a batch; draws random numbers, and changes buffers, as the program does."""
        self._wait -= 1
        if self._wait >= 0 or self.obstacle is not None or step.first or step.steps < FEWEST_STEPS:
            return self._as_written(batch, step, context)
        key = id(batch) if self._fixed else _kind(batch)
        take = self._takes.get(key)
        if take is None or take.stale():
            return self._first(key, batch, step, context)
        take.replays += 1
        if take.replays & (take.replays - 1) == 0:
            return self._compared(take, batch, step, context)
        return self._replayed(take, batch, step)

    def _as_written(self, batch: Problem, step: Step, context: Context) -> Evaluation:
        return evaluate(self.name, self.player, batch, step, context())

    def _data(self, batch: Problem) -> list[Tensor]:
        """The tensors that are given to a recording: a batch that never changes is part of it."""
        return (
            [self._number]
            if self._fixed
            else [self._number, *batch.inputs.values(), *batch.observations.values()]
        )

    # --- recording ------------------------------------------------------------------------------------------

    def _first(self, key: Any, batch: Problem, step: Step, context: Context) -> Evaluation:
        """Evaluate as written, and record meanwhile."""
        stale = self._takes.pop(key).stale() if key in self._takes else ()
        self._live.extend(stale)
        if len(self._takes) == MOST_KINDS:
            self.obstacle = f"its batches come in more than {MOST_KINDS} shapes"
            return self._as_written(batch, step, context)
        before, done = self._moment(), list[tuple[Evaluation, Moment]]()
        try:
            take = self._take(batch, step, context, done)
        except Exception as error:  # whatever it is, running the program as it is shows whether it is one
            self.obstacle = _told(error)
        else:  # a run that is resumed here goes on, to the last digit, as it would have
            self._takes[key] = take
            if self._compiler is not None:
                self._compile(take, batch, step, before, done[0])
            before.restore(self._buffers)
            return self._replayed(take, batch, step)
        if done:
            found, after = done[0]
            after.restore(self._buffers)
            return found
        before.restore(self._buffers)
        return self._as_written(batch, step, context)

    def _take(
        self, batch: Problem, step: Step, context: Context, done: list[tuple[Evaluation, Moment]]
    ) -> Take:
        """A recording; what the program did meanwhile, and how it left things, is added to `done`."""
        self._number = self._number.to(torch.get_default_dtype()).fill_(step.index)
        earlier, names = dict(self._buffers), [[*batch.inputs], [*batch.observations]]
        seen, work = _Seen(step), Work()

        def run(number: Tensor, *data: Tensor) -> list[Tensor]:
            given, tensors = batch, iter(data)
            if not self._fixed:
                inputs, observations = ({name: next(tensors) for name in part} for part in names)
                given = replace(batch, inputs=inputs, observations=observations)
            with work:
                found = evaluate(self.name, self.player, given, seen.at(number), context())
            # A program may put another tensor in the place of a buffer.
            new = {name: t.detach() for name, t in self._buffers.items() if t is not earlier[name]}
            with aside():
                done.append((Evaluation(*map(clone, found)), self._moment()))
            seen.renewed = tuple(new)
            for name in new:
                self._buffers[name] = earlier[name]
            return [*_tensors_of(found), *new.values()]

        plain = plain_values(self.player.loss) | plain_values(batch)
        live = [*self._live, *earlier.values()]
        recording = recording_of(run, self._data(batch), live=live)
        path = changed(plain, plain_values(self.player.loss) | plain_values(batch))
        if path is not None:
            seen.as_written(f"changes {path} whenever it is run")
        if seen.why is not None:
            raise Unrecordable(f"it {seen.why}", None)
        found, own = done[0][0], {id(tensor) for tensor in live}
        return Take(
            recording=recording,
            watched=[(tensor, version) for tensor, version, _ in recording.watched if id(tensor) not in own],
            metrics={k: None if isinstance(m, Tensor) else m for k, m in found.metrics.items()},
            gradients=tuple(g is not None for g in found.gradients),
            buffers=earlier,
            renewed=seen.renewed,
            batch=batch,
            tolerance=min(2048 * roundoff([found.loss, *self._live], context), 0.05),
            threads=work.threads(self._threads),
        )

    def _compile(
        self, take: Take, batch: Problem, step: Step, before: Moment, expected: tuple[Evaluation, Moment]
    ) -> None:
        """Replay by what a compiler makes of the operations, if that gives what the program gave."""
        plain, exact = take.recording, take.tolerance
        use_threads(take.threads)  # which is compiled in
        try:
            with aside():
                replay = self._compiler(plain.tape, [t.clone() for t in self._data(batch)])  # type: ignore[misc]
            # The order of operations is the compiler's: it keeps half of the digits.
            take.recording, take.tolerance = replace(plain, replay=replay), max(exact, (exact / 2048) ** 0.5)
            before.restore(self._buffers)
            if alike(
                (self._replayed(take, batch, step), self._moment()),
                expected,
                take.tolerance,
            ):
                return
            self.trouble = "compiled, its operations give other numbers"
        except Exception as error:  # whatever a compiler may come up with
            self.trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        take.recording, take.tolerance = plain, exact

    # --- replaying ------------------------------------------------------------------------------------------

    def _replayed(self, take: Take, batch: Problem, step: Step) -> Evaluation:
        self._number.fill_(step.index)
        use_threads(take.threads)
        with torch.no_grad():
            for name, tensor in take.buffers.items():
                if self._buffers[name] is not tensor:  # a run as written replaced it
                    self._buffers[name] = tensor.copy_(self._buffers[name])
            left = iter(take.recording.replay(*self._data(batch)))
            loss = next(left)
            metrics = {name: next(left) if value is None else value for name, value in take.metrics.items()}
            gradients = [next(left) if there else None for there in take.gradients]
            for name in take.renewed:
                take.buffers[name].copy_(next(left))
        return Evaluation(loss, metrics, gradients)

    def _compared(self, take: Take, batch: Problem, step: Step, context: Context) -> Evaluation:
        """The replay, if the program gives the same; else what the program gives, and no replays any more."""
        before = self._moment()
        found = self._replayed(take, batch, step)
        after = self._moment()
        before.restore(self._buffers)
        expected = self._as_written(batch, step, context)
        if alike((found, after), (expected, self._moment()), take.tolerance):
            after.restore(self._buffers)
            take.compared = take.replays
            return found
        self.obstacle = (
            f"at step {step.index} a replay gave the loss {found.loss.item():.6g} where the program gave "
            f"{expected.loss.item():.6g}: it uses something that torch does not see, such as random numbers of "
            "Python's or a file"
        )
        steps = take.replays - take.compared - 1
        late = f"; so may the {steps} steps before have gone wrong: use Run(compile=False)" if steps else ""
        warnings.warn(f"player {self.name!r}: {self.obstacle}{late}", RuntimeWarning, stacklevel=6)
        return expected

    def warning(self) -> str | None:
        """What the history should say, if the losses were not evaluated as fast as could be."""
        if self.obstacle is not None:
            return f"player {self.name!r} was run as written, which is slower than replays: {self.obstacle}"
        if self.trouble is not None:
            return f"player {self.name!r} was replayed without being compiled: {self.trouble}"
        return None

    def _moment(self) -> Moment:
        return Moment.of(self._live, self._buffers)


class _Seen(Step):
    """A step as a recording meets it: its number is a tensor that replays renew, and reading it off is noted."""

    why: str | None
    renewed: tuple[str, ...]

    def __init__(self, step: Step) -> None:
        self.__dict__.update(vars(step), why=None, renewed=())

    def at(self, number: Tensor) -> _Seen:
        """The step with that number."""
        self.__dict__["_number"] = number
        return self

    def __getattribute__(self, name: str) -> Any:
        if name == "index":
            self.as_written("turns on the number of the step: step.index; compute with step.number, a tensor")
        return super().__getattribute__(name)

    @property
    def first(self) -> bool:
        return self.__dict__["index"] == 0

    @property
    def number(self) -> Tensor:
        return self.__dict__["_number"]

    def as_written(self, why: str) -> None:
        self.__dict__["why"] = why


def _kind(batch: Problem) -> Any:
    """What a recording depends on besides the values of tensors."""
    data = [
        (k, v.shape, v.stride(), v.dtype)
        for part in (batch.inputs, batch.observations)
        for k, v in part.items()
    ]
    return (batch.rows, batch.size, batch.total, batch.missing, *data)


def _tensors_of(found: Evaluation) -> list[Tensor]:
    metrics = [m for m in found.metrics.values() if isinstance(m, Tensor)]
    return [found.loss, *metrics, *(g for g in found.gradients if g is not None)]


def _told(error: Exception) -> str:
    """What went wrong, and in which of the user's lines: the first cause that says that nothing can be recorded."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Unrecordable):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, Unrecordable):
        return f"{cause.operation}" + (f" at {cause.where}" if cause.where else "")
    where, said = where_raised(error.__traceback__), str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" + (f" at {where}" if where else "")
