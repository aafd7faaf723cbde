"""What a plugin provides: the answers of its hooks, checked and read as named things."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from packaging.utils import canonicalize_name

from pgen.plugins.loader import Plugin

KINDS = {
    "pgen_backends": "backend",
    "pgen_conversions": "conversion",
    "pgen_datasets": "dataset",
    "pgen_observers": "observer",
    "pgen_programs": "program",
}
"""For each hook, the kind of thing that it provides."""


@dataclass(frozen=True)
class Provided:
    """One thing that a plugin provides through a hook: a backend, conversion, program, data set, observer."""

    kind: str
    name: str
    value: Any
    plugin: Plugin

    @property
    def qualified(self) -> str:
        """The name that no other distribution can take: `distribution:name`."""
        return f"{self.plugin.distribution}:{self.name}"

    def answers_to(self, name: str) -> bool:
        """Whether `name`, plain or qualified, means this thing."""
        distribution, colon, plain = name.rpartition(":")
        mine = canonicalize_name(self.plugin.distribution)
        return plain == self.name and (not colon or canonicalize_name(distribution) == mine)


def _backends(answer: Any) -> Iterator[tuple[Any, Any]]:
    for item in _items(answer):
        methods = [getattr(item, name, None) for name in ("examine", "fit")]
        if not (inspect.isclass(item) and hasattr(item, "name") and all(callable(m) for m in methods)):
            raise TypeError(f"classes with a string `name` and methods `examine` and `fit`, not {item!r}")
        if not is_dataclass(item):
            raise TypeError(f"classes decorated by @dataclass(frozen=True), which {item.__name__} lacks")
        try:
            item()
        except Exception as error:
            made = f"{item.__name__}() raised {type(error).__name__}: {error}"
            raise TypeError(f"classes whose options all have defaults; {made}") from error
        yield item.name, item


def _conversions(answer: Any) -> Iterator[tuple[Any, Any]]:
    for item in _items(answer):
        if inspect.isclass(item) or not hasattr(item, "name") or not callable(getattr(item, "convert", None)):
            raise TypeError(f"instances of pgen.conversion.Conversion, not {item!r}")
        yield item.name, item


def _makers(answer: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(answer, Mapping):
        raise TypeError(f"a mapping from names to callables, not {answer!r}")
    for name, maker in answer.items():
        if not callable(maker):
            raise TypeError(f"a mapping from names to callables; {name!r} is {maker!r}")
        yield name, maker


def _items(answer: Any) -> Iterable[Any]:
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise TypeError(f"a list, not {answer!r}")
    return answer


READERS: dict[str, Callable[[Any], Iterator[tuple[Any, Any]]]] = {
    "backend": _backends,
    "conversion": _conversions,
    "dataset": _makers,
    "observer": _makers,
    "program": _makers,
}


def read(hook: str, answer: Any) -> dict[str, Any]:
    """The things in the answer of a hook, by name; raises TypeError or ValueError saying what it must be."""
    things: dict[str, Any] = {}
    for name, value in READERS[KINDS[hook]](answer):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise ValueError(f"names of letters, digits and . _ + -, not {name!r}")
        if name in things:
            raise ValueError(f"each name once, not {name!r} twice")
        things[name] = value
    return things
