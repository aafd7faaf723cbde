"""The training loop: players take turns on batches; what diverges is undone; what is learned is not lost.

    player.loss(batch, step) -> loss, metrics        each player, in order, on the same batch
    gradient of that loss, for that player's parameters only; its optimiser moves them
    every few steps the metrics of a block go to the host and are looked at:
        finite      -> go on; now and then keep a copy of everything
        not finite  -> back to the copy, half the learning rate, other random numbers

No step waits for the device, and everything about step i is a function of the seed and i.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgen.errors import CheckpointError, Diverged
from pgen.history import History, Recorder, Stopped
from pgen.observers import Audience
from pgen.threads import threads_restored
from pgen.training.batches import Batches, derive, forked
from pgen.training.checkpoints import Checkpoints
from pgen.training.learner import Learner
from pgen.training.optimizers import Average
from pgen.training.players import Step, clone, copy_into, finite

CHECK_EVERY = 10
"""Steps between two looks at the metrics: a look waits for the device."""
CHECK_SECONDS = 0.25
"""Where steps are slow, look this often, so that progress shows."""
SNAPSHOT_EVERY = 100
"""Steps between two copies to go back to."""
MAX_ROLL_BACKS = 3


class _Bad(Exception):
    """Numbers that are not finite: in what, at which step."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.what, self.step = what, step


@dataclass
class Training:
    """The loop over steps, and the state that it changes.

    Attributes:
        learners: the players with their optimisers, in the order of their turns. The loss of the first one is
            the one that is followed on held-out data.
        batches: the batch of every step.
        steps: how many.
        seed: determines the random numbers of every step.
        rate: factor of the learning rates by step.
        audience: observers.
        buffers: tensors that losses change in place (batch-norm statistics); undone and saved with the
            parameters.
        devices: whose random generators are seeded, besides the CPU's.
        context: makes the context in which losses are computed (autocast).
        average: moving average of all parameters, put in their place at the end and for held-out losses.
        held_out: rows to validate on.
        validate_every: steps between validations.
        patience: validations without a new lowest loss before stopping; the best parameters are put back.
        checkpoints: where to write checkpoints, and to go on from.
    """

    learners: Sequence[Learner]
    batches: Batches
    steps: int
    seed: int
    rate: Callable[[int], float]
    audience: Audience
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    devices: Sequence[torch.device] = ()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    average: Average | None = None
    held_out: Batches | None = None
    validate_every: int = 100
    patience: int | None = None
    checkpoints: Checkpoints | None = None

    def __post_init__(self) -> None:
        """Begin at step 0."""
        self.step = 0
        self.roll_backs = 0
        self.warnings: list[str] = []
        self.best: dict[str, Any] | None = None  # loss, step, stale (validations since), values, buffers
        self.recorder = Recorder()
        self._tensors = [tensor for learner in self.learners for tensor in learner.tensors]
        self._generators: list[torch.Generator] = []
        self._snapshot: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._earlier = 0.0  # seconds of earlier sittings

    def run(self, options: object = None) -> History:
        """Train to the end; `options` is what observers are told. Random generators are left as they were."""
        stopped: Stopped = "failed"
        with forked(self.devices) as self._generators, torch.enable_grad(), threads_restored():
            self.audience.start(options, self.steps)
            try:
                self._resume()
                self._snapshot = self._copy()
                try:
                    stopped = self._loop()
                except KeyboardInterrupt:
                    self._settle()
                    stopped = "interrupted"
                self._conclude()
            finally:
                for learner in self.learners:
                    learner.release()
                history = self._history(stopped)
                self.audience.finish(history)
        return history

    # --- the loop -------------------------------------------------------------------------------------------

    def _loop(self) -> Stopped:
        looked = time.perf_counter()
        while self.step < self.steps and not self._stale():
            try:
                self._take_step()
                slow = time.perf_counter() - looked > CHECK_SECONDS
                if self._milestone():
                    self._look()
                    self._pass_milestone()
                elif self.step == 1 or self.step % CHECK_EVERY == 0 or slow:
                    self._look()
                else:
                    continue
                looked = time.perf_counter()
            except _Bad as bad:
                self._roll_back(bad)
        return "early" if self._stale() else "finished"

    def _take_step(self) -> None:
        index = self.step
        self._seed("step", index, self.roll_backs)
        rate = self.rate(index) * 0.5**self.roll_backs
        step, metrics = Step(index, self.steps), dict[str, float | Tensor]()
        try:
            batch = self.batches(index)
            for learner in self.learners:
                metrics.update(learner.learn(batch, step, rate, self.context))
        except Exception as error:
            # Parameters that are not finite often show as an error first: Pyro refuses them, Cholesky fails.
            numerical = isinstance(error, (ArithmeticError, torch.linalg.LinAlgError)) and index > 0
            if numerical or not finite(self._tensors):
                told = str(error).strip().split("\n")[0]
                kind = type(error).__name__.lstrip("_")
                raise _Bad(f"the program raised {kind}: {told}", index) from error
            raise
        self.recorder.add(metrics)
        self.step += 1
        if self.average is not None:
            self.average.update()

    def _seed(self, *path: int | str) -> None:
        seed = derive(self.seed, *path)
        for generator in self._generators:
            generator.manual_seed(seed)

    def _look(self) -> None:
        """Bring the block of metrics to the host, show it, and raise where it is not finite."""
        first = self.recorder.steps
        for index, metrics in enumerate(self.recorder.flush(), start=first):
            for learner in self.learners:
                for name, meaning in learner.watched.items():
                    if not math.isfinite(metrics.get(name, 0.0)):
                        raise _Bad(f"the {meaning} of player {learner.name!r} is {metrics[name]}", index)
            self.audience.step(index, metrics)

    def _milestone(self) -> bool:
        return (
            self.step % SNAPSHOT_EVERY == 0 or self.step == self.steps or self._validates() or self._saves()
        )

    def _validates(self) -> bool:
        return self.held_out is not None and (self.step % self.validate_every == 0 or self.step == self.steps)

    def _saves(self) -> bool:
        return self.checkpoints is not None and (
            self.step % self.checkpoints.every == 0 or self.step == self.steps
        )

    def _pass_milestone(self) -> None:
        if not finite(self._tensors):
            raise _Bad("a parameter is not finite", self.step - 1)
        if self._validates():
            self._validate()
        # A run that goes on from a checkpoint can only roll back to it, so this one does so too.
        if self.step % SNAPSHOT_EVERY == 0 or self._saves():
            self._snapshot = self._copy()
        if self.checkpoints is not None and (self._saves() or self._stale()):
            self._save(self.checkpoints)

    def _save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint; a disk that refuses it is no reason to lose what was learned."""
        try:
            state = {**self._state(), "seconds": self._seconds()}
            checkpoints.save(self.step, state, self.recorder.tensors())
        except CheckpointError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self.warnings.append(f"step {self.step}: went on without a checkpoint. {error}")
            warnings.warn(self.warnings[-1], RuntimeWarning, stacklevel=5)

    def _validate(self) -> None:
        loss = self._held_out_loss()
        self.recorder.validation.append((self.step, loss))
        self.audience.step(self.step - 1, {"validation": loss})
        if self.patience is None:
            return
        if self.best is None or loss < self.best["loss"] or not math.isfinite(self.best["loss"]):
            values = self._tensors if self.average is None else self.average.values
            kept = {"values": clone(_numbered(values)), "buffers": clone(self.buffers)}
            self.best = {"loss": loss, "step": self.step, "stale": 0, **kept}
        else:
            self.best = {**self.best, "stale": self.best["stale"] + 1}

    def _held_out_loss(self) -> float:
        """The first player's loss over the held-out rows, always with the same random numbers."""
        buffers = clone(self.buffers)
        if self.average is not None:
            self.average.swap()
        try:
            total, rows = 0.0, 0
            for i, batch in enumerate(self.held_out.slices() if self.held_out is not None else ()):
                self._seed("validation", i)
                player, step = self.learners[0].player, Step(self.step, self.steps, training=False)
                with self.context(), player.within(step):
                    loss, _ = player.loss(batch, step)
                count = batch.rows or 1
                total, rows = total + loss.detach().item() * count, rows + count
            return total / rows
        finally:
            if self.average is not None:
                self.average.swap()
            copy_into(self.buffers, buffers)

    def _stale(self) -> bool:
        return self.patience is not None and self.best is not None and self.best["stale"] >= self.patience

    # --- going back -----------------------------------------------------------------------------------------

    def _roll_back(self, bad: _Bad) -> None:
        self._load(self._snapshot)
        self.recorder.truncate(self.step)
        if self.roll_backs >= MAX_ROLL_BACKS:
            raise self._diverged(bad) from bad.__cause__
        self.roll_backs += 1
        back = f"went back to step {self.step} with {0.5**self.roll_backs:g} of the learning rate"
        self.warnings.append(f"step {bad.step}: {bad.what}; {back}")
        if bad.step > 0:  # before anything was learned, other random numbers are tried without a word
            warnings.warn(self.warnings[-1], RuntimeWarning, stacklevel=5)

    def _diverged(self, bad: _Bad) -> Diverged:
        again = (
            f"step {bad.step} of {self.steps}: {bad.what}, and so it was before {self.roll_backs} roll-backs"
        )
        if bad.step == 0:
            return Diverged(
                f"{again}. Nothing was learned yet, so look at the data (values outside the support of "
                "their site, or huge) and at the initial values of the parameters"
            )
        return Diverged(
            f"{again}, each with half the learning rate. The parameters of step {self.step} are kept. Try a "
            "lower learning rate, for example Run(lr=1e-4, warmup_steps=100), a smaller clip_norm or "
            "precision='float64', and look for data that the program gives probability zero"
        )

    def _settle(self) -> None:
        """After an interruption: keep what was learned, if it is finite."""
        try:
            self._look()
            if not finite(self._tensors):
                raise _Bad("a parameter is not finite", self.step)
        except _Bad:
            self._load(self._snapshot)
        self.recorder.truncate(self.step)

    def _conclude(self) -> None:
        if self.best is not None:
            copy_into(_numbered(self._tensors), self.best["values"])
            copy_into(self.buffers, self.best["buffers"])
        elif self.average is not None:
            copy_into(_numbered(self._tensors), _numbered(self.average.values))
        for learner in self.learners:
            told = None if learner.replays is None else learner.replays.warning()
            if told is not None:
                self.warnings.append(told)
            if learner.untouched and self.step:
                names = ", ".join(map(repr, learner.untouched))
                self.warnings.append(
                    f"player {learner.name!r}: no loss depends on {names}, which keep their values"
                )

    # --- state ----------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """Everything that training changes; the tensors are the live ones."""
        average = self.average
        return {
            "step": self.step,
            "players": {learner.name: learner.state() for learner in self.learners},
            "buffers": dict(self.buffers),
            "average": None
            if average is None
            else {"values": _numbered(average.values), "updates": average.updates},
            "best": self.best,
            "roll_backs": self.roll_backs,
            "warnings": list(self.warnings),
            "validation": list(self.recorder.validation),
        }

    def _copy(self) -> dict[str, Any]:
        """The same with tensors of its own; the best so far, which nobody writes to, is shared."""
        state = self._state()
        best = state.pop("best")
        return {**clone(state), "best": best}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of this run; roll-backs, warnings and history stay."""
        for learner in self.learners:
            learner.load(state["players"][learner.name])
        copy_into(self.buffers, state["buffers"])
        if self.average is not None:
            copy_into(_numbered(self.average.values), state["average"]["values"])
            self.average.updates = state["average"]["updates"]
        self.best = state["best"]
        self.step = state["step"]

    def _resume(self) -> None:
        found = self.checkpoints.newest() if self.checkpoints is not None else None
        if found is None or self.checkpoints is None:
            return
        state, series = found
        try:
            if state["step"] > self.steps:
                raise ValueError(f"it is at step {state['step']}, and this run has only {self.steps} steps")
            self._load(state)
            self.roll_backs, self.warnings = state["roll_backs"], list(state["warnings"])
            self._earlier = float(state["seconds"])
            self.recorder.restore(self.step, series, state["validation"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.checkpoints.directory}: the newest checkpoint is not one of this run: {error}. Give "
                "this run another directory, or remove the checkpoints to start anew"
            ) from error

    def _seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._began

    def _history(self, stopped: Stopped) -> History:
        return History(
            metrics=self.recorder.tensors(),
            validation=tuple(self.recorder.validation),
            steps=self.recorder.steps,
            seconds=self._seconds(),
            stopped=stopped,
            seed=self.seed,
            best=None if self.best is None else self.best["step"],
            warnings=tuple(self.warnings),
        )


def _numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}
