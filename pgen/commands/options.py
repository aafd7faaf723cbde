"""`key=value` words of a command line as values for a dataclass: checked by name, typed by annotation."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pgen.errors import OptionError

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOTHING = ("none", "null")
_NARROW_FIRST = {type(None): 0, bool: 1, int: 2, float: 3, Literal: 4, str: 9}
"""Of joined types, the narrower is tried first: `8` for `int | float | str` is an int."""


class _Unfit(ValueError):
    """A word that no value of the type is written as."""


def pairs(words: Iterable[str], flag: str) -> dict[str, str]:
    """`["lr=1e-3"]` as `{"lr": "1e-3"}`; `flag` is what the words were given by.

    >>> pairs(["lr=1e-3", "name=a=b"], "--set")
    {'lr': '1e-3', 'name': 'a=b'}
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise OptionError(f"{flag} {word}: expected key=value, for example {flag} particles=8")
        if key in found:
            raise OptionError(f"{flag} {key}: given twice, as {found[key]!r} and as {value!r}; give it once")
        found[key] = value
    return found


def typed(kind: type, words: Iterable[str], *, flag: str, owner: str) -> dict[str, Any]:
    """Words `key=value` as values for the fields of a dataclass.

    Args:
        kind: the dataclass.
        words: what the user wrote.
        flag: what the words were given by, for messages: "--set".
        owner: whose options they are, for messages: "backend 'variational'".

    Raises:
        OptionError: a word that is no `key=value`, an option that there is not, a value of another type.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind) if f.init}
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for key, text in pairs(words, flag).items():
        if key not in known:
            listed = ", ".join(f"{k}={d}" if (d := default_of(f)) else k for k, f in known.items())
            raise OptionError(
                f"{flag} {key}={text}: {owner} has no option {key!r}{near(key, known)} It has "
                f"{listed or 'none'}"
            )
        try:
            values[key] = _read(text, hints.get(key, Any))
        except _Unfit:
            expected = _described(hints.get(key, Any))
            raise OptionError(
                f"{flag} {key}={text}: option {key!r} of {owner} takes {expected}, not {text!r}"
            ) from None
    return values


def plain(text: str) -> Any:
    """A word as the number, truth value or nothing that it looks like, else as itself.

    >>> [plain(t) for t in ("8", "1e-3", "true", "none", "iwae", "64,64")]
    [8, 0.001, True, None, 'iwae', (64, 64)]
    """
    for kind in (type(None), bool, int, float):
        try:
            return _read(text, kind)
        except _Unfit:
            continue
    return tuple(plain(part) for part in text.split(",")) if "," in text else text


def near(name: str, known: Collection[str]) -> str:
    """How a sentence about an unknown name ends: `"; did you mean 'particles'?"`, or a full stop."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else "."


def default_of(field: Field[Any]) -> str:
    """The default of an option, as it would be written; empty where there is none."""
    if field.default is not MISSING:
        return (
            field.default
            if isinstance(field.default, str)
            else getattr(field.default, "__name__", repr(field.default))
        )
    return "" if field.default_factory is MISSING else repr(field.default_factory())


def _hints(kind: type) -> dict[str, Any]:
    """Resolved annotations; none where a stranger's cannot be resolved (then words are read as they look)."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError, AttributeError):
        return {}


def _read(text: str, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return plain(text)
    if origin in (Union, types.UnionType):
        return _first(text, sorted((a for a in args if a is not Any), key=_rank) + [Any] * (Any in args))
    if origin is Literal:
        return _one_of(text, {str(choice).lower(): choice for choice in args})
    if origin in (tuple, list, Sequence):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        of = [a for a in args if a is not Ellipsis] or [Any]
        if origin is tuple and Ellipsis not in args and args and len(args) != len(parts):
            raise _Unfit
        return tuple(_read(part, of[min(i, len(of) - 1)]) for i, part in enumerate(parts))
    if origin in (dict, Mapping):
        entries = dict(_entry(part) for part in text.split(",") if part.strip())
        return {key: _read(value, args[1] if len(args) == 2 else Any) for key, value in entries.items()}
    return _read_plain(text, hint)


def _read_plain(text: str, hint: Any) -> Any:
    if hint is type(None):
        return _one_of(text, dict.fromkeys(_NOTHING))
    if hint is bool:
        return _one_of(text, _WORDS)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of(text, {str(choice.value).lower(): choice for choice in hint})
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise _Unfit from None
    if hint in (str, Path):
        return hint(text)
    raise _Unfit


def _first(text: str, hints: Iterable[Any]) -> Any:
    for hint in hints:
        try:
            return _read(text, hint)
        except _Unfit:
            continue
    raise _Unfit


def _one_of(text: str, choices: Mapping[str, Any]) -> Any:
    if text.lower() not in choices:
        raise _Unfit
    return choices[text.lower()]


def _entry(part: str) -> tuple[str, str]:
    key, colon, value = part.strip().partition(":")
    if not (key and colon and value):
        raise _Unfit
    return key, value


def _rank(hint: Any) -> int:
    return _NARROW_FIRST.get(get_origin(hint) or hint, 5)


def _described(hint: Any) -> str:
    """A type as a user of the command line reads it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [_described(a) for a in sorted(args, key=_rank)]
        sayable = [p for p in dict.fromkeys(parts) if p != _UNSAYABLE]
        return (
            " or ".join([p for p in sayable if p != "none"] + [p for p in sayable if p == "none"])
            or _UNSAYABLE
        )
    if origin is Literal:
        return ", ".join(str(a) for a in args)
    if origin in (tuple, list, Sequence):
        return (
            f"{' and '.join(dict.fromkeys(_described(a) for a in args if a is not Ellipsis)) or 'values'}, "
            "separated by commas"
        )
    if origin in (dict, Mapping):
        return "name:value, separated by commas"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(str(choice.value) for choice in hint)
    names = {
        type(None): "none",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
    }
    return names.get(hint, "a value" if hint is Any else _UNSAYABLE)


_UNSAYABLE = "what only Python code can give"
