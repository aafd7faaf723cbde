"""A bar for queries that take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pgen.algorithms.progress import heard

_PATIENCE, _INTERVAL = 1.0, 0.1  # seconds: before anything is drawn, and between two drawings


class WaitingBar:
    """One line on how far a loop has come, from one second on; gone when the loop ends.

    Args:
        stream: where it is drawn.
        patience: seconds before anything is drawn.
    """

    def __init__(self, stream: TextIO, patience: float) -> None:
        self.patience = patience
        self._console = Console(file=stream, force_terminal=True)
        self._bar: Progress | None = None
        self._begun = self._drawn = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note, and draw if it is time."""
        now = time.perf_counter()
        if not done or done == total:
            self.clear()
            self._begun = self._drawn = now
        elif now - self._begun >= self.patience and now - self._drawn >= _INTERVAL:
            self._draw(what, done, total)
            self._drawn = now

    def clear(self) -> None:
        """Leave nothing standing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
            task = self._bar.add_task(what, total=total)
            self._bar.tasks[task].start_time = self._begun
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, refresh=True)


@contextmanager
def waiting(shown: bool | None = None) -> Iterator[None]:
    """Show how far long loops have come.

    Args:
        shown: None: if standard error is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        with heard(None):
            yield
        return
    bar = WaitingBar(sys.stderr, _PATIENCE)
    try:
        with heard(bar):
            yield
    finally:
        bar.clear()
