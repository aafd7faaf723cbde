"""What a program keeps outside of tensors: counters, flags, lengths of lists. A replay would leave them as they are.

Torch cannot tell that a loss reads `self.calls` and adds one to it. So all plain values that can be reached from it are
written down before and after one call: by its closure, its globals, the attributes of its objects.
"""

from __future__ import annotations

import functools
import pickle
import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

_MOST = 20_000  # values looked at
_LONG = 1_000  # items of a list or dict, from which on only their number is looked at
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LIBRARIES = frozenset(
    {"torch", "pyro", "numpy", "networkx", "zuko", "builtins", "functools", "collections", "typing"}
)
_MODULES_OWN = frozenset(vars(nn.Module()))


def plain_values(root: object) -> dict[str, Any]:
    """Every plain value that can be reached, by the path to it; of what can grow, its length; random states.

    Example:
        >>> kept = {"calls": 0}
        >>> def program():
        ...     kept["calls"] += 1
        >>> before = plain_values(program)
        >>> program()
        >>> changed(before, plain_values(program))
        'kept.calls'
    """
    found: dict[str, Any] = {
        "the state of random": hash(random.getstate()),
        "the state of numpy.random": hash(pickle.dumps(np.random.get_state())),  # noqa: NPY002 - theirs, looked at
    }
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", root)]
    while left and len(found) < _MOST:
        path, value = left.pop()
        if isinstance(value, _PLAIN):
            found[path] = value
        elif id(value) not in seen and not isinstance(value, (Tensor, np.ndarray, type, types.ModuleType)):
            seen.add(id(value))
            if isinstance(value, (dict, set, list)):
                found[f"len({path})"] = len(value)
            left += [(f"{path}.{key}".strip("."), part) for key, part in _parts(value)]
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The path to a value that is another now, or None."""
    return next(
        (path for path, value in before.items() if path in after and not _same(after[path], value)), None
    )


def _same(left: Any, right: Any) -> bool:
    return bool(left == right or (left != left and right != right))


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a value holds, by name."""
    if isinstance(value, types.FunctionType):
        return [] if _is_librarys(value.__module__) else _captured(value)
    if isinstance(value, types.MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, functools.partial):
        return [("", value.func), *_numbered(value.args), *_items(value.keywords)]
    if isinstance(value, dict):
        return _items(value) if len(value) < _LONG else []
    if isinstance(value, (list, tuple)):
        return _numbered(value) if len(value) < _LONG else []
    if isinstance(value, nn.Module):
        own = vars(value)
        kept = [(k, v) for k, v in own.items() if k not in _MODULES_OWN]
        return [*kept, *_items(own["_modules"]), ("", getattr(type(value), "forward", None))]
    if hasattr(value, "__dict__") and not _is_librarys(type(value).__module__):
        return [*_items(vars(value)), ("", getattr(type(value), "__call__", None))]  # noqa: B004 - to search it
    return []


def _numbered(values: Any) -> list[tuple[str, Any]]:
    return [(str(i), v) for i, v in enumerate(values)]


def _items(mapping: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    return [(str(k), v) for k, v in mapping.items()]


def _captured(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Closure, defaults, and those globals that the code names."""
    found = []
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((key, cell.cell_contents))
        except ValueError:  # a cell that is still empty
            continue
    found += _numbered(function.__defaults__ or ())
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found + [(n, function.__globals__[n]) for n in sorted(names) if n in function.__globals__]


def _is_librarys(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
