"""What follows a run: progress, TensorBoard, JSON lines. Observers only watch: none can change a result."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pgen.errors import OptionError
from pgen.history import History
from pgen.registry import hookimpl


class Observer(Protocol):
    """Three calls; to write one, implement them. An observer that raises is reported once and dropped."""

    def start(self, run: Any, total: int) -> None:
        """Training begins: the `Run`, and the number of steps."""

    def step(self, index: int, metrics: Mapping[str, float]) -> None:
        """Metrics of step `index`, some steps late (they come in blocks); after a roll-back, once more.

        Held-out losses come in a call of their own, under "validation".
        """

    def finish(self, history: History) -> None:
        """Training ended, in whatever way; called also where it failed."""


class Audience:
    """Observers, called in order and kept from harming the run or each other."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Begin with all of them."""
        self.observers = list(observers)

    def start(self, run: Any, total: int) -> None:
        """Call `start` of each."""
        self._call("start", run, total)

    def step(self, index: int, metrics: Mapping[str, float]) -> None:
        """Call `step` of each, with a copy of the metrics."""
        if self.observers:
            self._call("step", index, metrics)

    def finish(self, history: History) -> None:
        """Call `finish` of each."""
        self._call("finish", history)

    def _call(self, method: str, *args: Any) -> None:
        for observer in list(self.observers):
            try:
                getattr(observer, method)(*(dict(a) if isinstance(a, Mapping) else a for a in args))
            except Exception as error:  # a stranger's code: whatever it raises, the run goes on
                self.observers.remove(observer)
                warnings.warn(
                    f"the observer {type(observer).__name__} failed in {method}() and is dropped; training "
                    f"goes on. {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )


@dataclass
class ProgressBar:
    """One line: loss, steps per second, time left. Redrawn at most ten times a second, and without a thread.

    Attributes:
        stream: where it is drawn; None means standard error.
        interval: least seconds between two drawings.
    """

    stream: TextIO | None = None
    interval: float = 0.1
    _progress: Progress | None = field(default=None, init=False, repr=False)
    _task: TaskID = field(default=TaskID(0), init=False, repr=False)
    _begun: tuple[float, int | None] = field(default=(0.0, None), init=False, repr=False)
    _drawn: float = field(default=0.0, init=False, repr=False)
    _shown: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def start(self, run: Any, total: int) -> None:
        """Draw an empty bar."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        console = Console(file=self.stream if self.stream is not None else sys.stderr)
        self._progress = Progress(*columns, console=console, auto_refresh=False, transient=False)
        self._task = self._progress.add_task("training", total=total, speed="")
        self._begun = (time.perf_counter(), None)
        self._progress.start()

    def step(self, index: int, metrics: Mapping[str, float]) -> None:
        """Take note, and draw if it is time."""
        if self._progress is None:
            return
        loss = next(
            (value for name, value in metrics.items() if name == "loss" or name.endswith(".loss")), None
        )
        if loss is not None:
            self._shown["loss"] = loss
        if "validation" in metrics:
            self._shown["held out"] = metrics["validation"]
        now = time.perf_counter()
        if self._begun[1] is None:
            self._begun = (self._begun[0], index)
        if now - self._drawn >= self.interval:
            self._draw(index + 1, now)

    def finish(self, history: History) -> None:
        """Draw the last state and leave it standing."""
        if self._progress is None:
            return
        if history.steps:
            self._draw(history.steps, time.perf_counter())
        self._progress.stop()
        self._progress = None

    def _draw(self, done: int, now: float) -> None:
        if self._progress is None:
            return
        self._drawn = now
        speed = (done - (self._begun[1] or 0)) / max(now - self._begun[0], 1e-9)
        text = "  ".join(f"{name} {value:.5g}" for name, value in self._shown.items())
        self._progress.update(
            self._task,
            completed=done,
            description=text or "training",
            speed=f"{speed:.3g} steps/s",
            refresh=True,
        )


@dataclass
class JsonLines:
    """One JSON object per line, appended to a file: {"step": 7, "loss": 1.25}. NaN becomes null.

    Attributes:
        path: the file; its folder is made if need be.
    """

    path: str | Path
    _file: TextIO | None = field(default=None, init=False, repr=False)

    def start(self, run: Any, total: int) -> None:
        """Open the file."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by `finish`

    def step(self, index: int, metrics: Mapping[str, float]) -> None:
        """Write a line."""
        if self._file is not None:
            line = {"step": index, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def finish(self, history: History) -> None:
        """Write how it ended, and close the file."""
        if self._file is not None:
            end = {"stopped": history.stopped, "steps": history.steps, "seconds": round(history.seconds, 3)}
            self._file.write(json.dumps(end) + "\n")
            self._file.close()
            self._file = None


@dataclass
class TensorBoard:
    """Scalars for TensorBoard, through tensorboardX (`pip install 'pgen-ppl[tensorboard]'`).

    Attributes:
        directory: where event files are written.
    """

    directory: str | Path
    _writer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Fail here, not in the middle of a run, where the package is missing."""
        _tensorboardx()

    def start(self, run: Any, total: int) -> None:
        """Open an event file."""
        self._writer = _tensorboardx().SummaryWriter(logdir=str(self.directory))

    def step(self, index: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name.replace(".", "/"), value, index)

    def finish(self, history: History) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _tensorboardx() -> Any:
    try:
        import tensorboardX  # an optional extra
    except ImportError as error:
        raise OptionError(
            "TensorBoard(...) needs the package tensorboardX, which is not installed: pip install "
            "'pgen-ppl[tensorboard]'"
        ) from error
    return tensorboardX


@hookimpl
def pgen_observers() -> Mapping[str, Callable[..., Any]]:
    """The observers of this file, by name."""
    return {"jsonl": JsonLines, "progress": ProgressBar, "tensorboard": TensorBoard}
