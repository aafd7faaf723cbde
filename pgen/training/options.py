"""What every option of a run may be, and how it is written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgen.training.optimizers import OPTIMIZERS, SCHEDULES, width_of


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return (
            isinstance(value, Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and fits(float(value))
        )

    return check


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _named(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _callable_or(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: callable(value) or fits(value)


_positive = _number(lambda value: value > 0)


def _is_rates(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(name, str) and _positive(rate) for name, rate in value.items())
    return _positive(value)


def _is_validation(value: Any) -> bool:
    # A number is a fraction; anything else is data, and is judged by how it meets the program.
    return not isinstance(value, (Real, str)) or (isinstance(value, float) and 0 < value < 1)


def _is_device(value: Any) -> bool:
    """Whether this machine has it; asked without starting it, which takes seconds and forbids forking."""
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        return False
    if isinstance(value, Integral) or device.type == "cpu":
        return not isinstance(value, Integral)
    if device.type == "mps":
        return torch.backends.mps.is_available()
    module = getattr(torch, device.type, None)
    there = getattr(module, "is_available", lambda: False)()
    return bool(there) and (device.index or 0) < module.device_count()  # type: ignore[union-attr]


def _is_average(value: Any) -> bool:
    """Whether this names an average of parameters."""
    if not isinstance(value, str):
        return _positive(value)
    try:
        return width_of(value) > 0
    except ValueError:
        return False


def devices_of(value: Any) -> tuple[str, ...]:
    """The names of the devices that an option stands for; none where it leaves the choice open.

    >>> devices_of(1), devices_of(["cpu", "cpu"])
    ((), ('cpu', 'cpu'))
    """
    if isinstance(value, (tuple, list)):
        return tuple(str(torch.device(each)) for each in value)
    there = torch.cuda.device_count() if value != 1 and torch.cuda.is_available() else 0
    return tuple(f"cuda:{i}" for i in range(there if value == "auto" else min(there, int(value))))


def _are_devices(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_device, value)) and len({torch.device(v).type for v in value}) == 1
    if isinstance(value, str):
        return value == "auto"
    return _whole(1)(value) and (value == 1 or len(devices_of(value)) == value)


def _are_observers(value: Any) -> bool:
    calls = ("start", "step", "finish")
    return isinstance(value, (tuple, list)) and all(
        callable(getattr(each, call, None)) and not isinstance(each, type) for each in value for call in calls
    )


_optimizers, _schedules = ", ".join(map(repr, OPTIMIZERS)), ", ".join(map(repr, SCHEDULES))
_single = "(reserved: a run uses one machine now)"

EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (_maybe(_whole(0)), "a whole number of at least 0, or None for the backend's default"),
    "batch_size": (_maybe(_whole(1)), "a whole number of at least 1, or None for the backend's default"),
    "optimizer": (
        _callable_or(_named(*OPTIMIZERS)),
        f"{_optimizers} or a callable from parameters to a torch.optim.Optimizer",
    ),
    "lr": (
        _maybe(_is_rates),
        "a number above 0, or a mapping of players to such, for example {'critic': 1e-4}",
    ),
    "schedule": (_callable_or(_named(*SCHEDULES)), f"{_schedules} or a callable (step, steps) -> factor"),
    "warmup_steps": (_whole(0), "a whole number of at least 0"),
    "clip_norm": (_maybe(_positive), "a number above 0, or None not to clip gradients"),
    "weight_decay": (_maybe(_number(lambda value: value >= 0)), "a number of at least 0, or None"),
    "ema": (
        _maybe(_is_average),
        "a decay below 1, for example 0.999, a half-life in steps from 1 on, 'power:' and a share, or None",
    ),
    "validation": (
        _maybe(_is_validation),
        "a fraction of the data between 0.0 and 1.0, data of their own, or None",
    ),
    "validate_every": (_maybe(_whole(1)), "a whole number of at least 1, or None"),
    "patience": (_maybe(_whole(1)), "a whole number of at least 1, or None not to stop early"),
    "device": (
        _maybe(_is_device),
        "a device of this machine, for example 'cpu' or 'cuda', or None to stay where the data is",
    ),
    "precision": (
        _maybe(_named("float32", "float64", "bfloat16")),
        "'float32', 'float64', 'bfloat16' or None",
    ),
    "checkpoint_every": (_maybe(_whole(1)), "a whole number of at least 1, or None"),
    "directory": (
        _maybe(lambda value: isinstance(value, (str, Path)) and str(value) != ""),
        "a path, or None",
    ),
    "progress": (
        _maybe(lambda value: isinstance(value, bool)),
        "True, False, or None for True on a terminal",
    ),
    "observers": (_are_observers, "a tuple of objects with the methods start, step and finish"),
    "seed": (_whole(0), "a whole number of at least 0"),
    "devices": (
        _are_devices,
        "1, a number of CUDA devices of this machine, 'auto' for all of them, or a tuple of the names of devices of "
        "one kind, for example ('cuda:0', 'cuda:1')",
    ),
    "nodes": (lambda value: value == 1, f"1 {_single}"),
    "strategy": (lambda value: value is None, f"None {_single}"),
    "compile": (
        lambda value: value is None or value is False or value in ("auto", "inductor", "background"),
        "'auto', 'inductor', 'background', False not to replay, or None for 'auto'",
    ),
}

_NUMBERS = ("seed", "lr", "warmup_steps", "clip_norm", "weight_decay", "ema", "patience", "validate_every")
DETERMINING = frozenset({"optimizer", "schedule", "precision", "validation", *_NUMBERS})
"""The options that a run shares with every run that goes on from its checkpoints."""


def shown(value: Any) -> str:
    """The value in an error or a repr: short."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}>"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"<{type(value).__name__}>"


def as_json(value: Any) -> Any:
    """The value as JSON: what is not a number or a string is named, not stored."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(v, Real) for v in value.values()):
        return {str(k): float(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [v if isinstance(v, str) else type(v).__name__ for v in value]
    if isinstance(value, (Path, torch.device)):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
