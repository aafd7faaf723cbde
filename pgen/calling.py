"""What a program is called with: its name and its arguments, seen through Pyro's handlers and Python's wrappers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.trace_messenger import TraceHandler
from torch import nn


def signature_of(program: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a program; None where it has none that Python can tell.

    Pyro's handlers take `(*args, **kwargs)` in the place of the program's own arguments: what is asked is the program
    that they hold, less the arguments that `functools.partial` has filled on the way.

    >>> from pyro import poutine
    >>> str(signature_of(poutine.mask(mask=True)(lambda x, y=None: None)))
    '(x, y=None)'
    """
    if isinstance(program, nn.Module):
        return signature_of(program.forward)
    inner, args, kwargs = held_by(program)
    if inner is program:
        try:
            return inspect.signature(program)
        except (TypeError, ValueError):
            return None
    found = signature_of(inner)
    if found is None or not (args or kwargs):
        return found

    def stand_in(*args: Any, **kwargs: Any) -> None: ...

    stand_in.__signature__ = found  # type: ignore[attr-defined]
    try:
        return inspect.signature(functools.partial(stand_in, *args, **kwargs))
    except (TypeError, ValueError):  # filled with what the program does not take: the call itself will say so
        return found


def name_of(program: Callable[..., Any]) -> str:
    """The name of a program as its author knows it; that of its class where it has none of its own."""
    while not hasattr(program, "__name__"):
        inner, _, _ = held_by(program)
        if inner is program:
            return type(program).__name__
        program = inner
    return str(program.__name__)


def parameters_of(program: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the arguments that data can fill, and whether any further positional ones are taken."""
    signature = signature_of(program)
    if signature is None:
        return [], True
    parameters = signature.parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters if p.kind not in variadic]
    return names, any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


def is_required(program: Callable[..., Any], name: str) -> bool:
    """Whether a program cannot be called without this argument."""
    signature = signature_of(program)
    return signature is not None and signature.parameters[name].default is inspect.Parameter.empty


def hides_names(program: Callable[..., Any]) -> bool:
    """Whether a program takes arguments by any name, as a wrapper without `functools.wraps` does."""
    signature = signature_of(program)
    return signature is not None and any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()
    )


def is_handler(program: Any) -> bool:
    """Whether this is a program in one of Pyro's handlers that are objects: `poutine.trace`, `poutine.reparam`."""
    return isinstance(program, (ReparamHandler, TraceHandler))


def held_by(program: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a handler, a wrapper or a partial call holds, and the arguments it has filled; itself where it is none."""
    if isinstance(program, functools.partial):
        function, args = program.func, program.args
        if args and isinstance(
            args[0], Messenger
        ):  # how Pyro's handlers wrap a function: (handler, function, ...)
            function, args = args[1], args[2:]
        return function, args, dict(program.keywords)
    if hasattr(program, "__signature__"):  # it says itself how it is called
        return program, (), {}
    if is_handler(program):
        return program.fn, (), {}
    return getattr(program, "__wrapped__", program), (), {}
