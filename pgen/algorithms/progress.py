"""How far a loop has come: loops tell, and whoever waits may listen.

A loop that may take long says so by what it loops over, `followed(range(n), "annealing")`. Nothing comes of it unless somebody
listens (`heard`), as the queries of a fit do at a terminal. Of loops within loops only the outermost is told of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]
"""Of what is done, how many steps are done (0 at the beginning), and how many there are."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)
_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def heard(listener: Listener | None) -> Iterator[None]:
    """Let somebody listen, or (None) nobody."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def followed(steps: Sequence[T], what: str) -> Iterator[T]:
    """The steps of a loop, one by one, telling how many are done.

    Example:
        >>> told = []
        >>> with heard(lambda *step: told.append(step)):
        ...     total = sum(i for i in followed(range(3), "adding"))
        >>> total, told[0], told[-1]
        (3, ('adding', 0, 3), ('adding', 3, 3))
    """
    listener = None if _INSIDE.get() else _LISTENER.get()
    if listener is None:
        yield from steps
        return
    _INSIDE.set(True)
    try:
        for done, step in enumerate(steps):
            listener(what, done, len(steps))
            yield step
        listener(what, len(steps), len(steps))
    finally:
        _INSIDE.set(False)
