"""Checkpoints of a run in progress: nested state to tensors and JSON and back; the newest good one."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pgen import store
from pgen.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,18})")


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one run in a folder of their own, the newest two kept.

    Attributes:
        directory: the folder; each checkpoint is a folder `step-00000000` in it, written whole by
            `pgen.store`.
        terms: the options and shapes that determine the run. A checkpoint that was written under others is
            refused: going on from it would give something that is neither the old run nor the new one.
        every: steps from one to the next.
        keep: how many to keep, so that a damaged one has a predecessor.
    """

    directory: Path
    terms: Mapping[str, Any]
    every: int
    keep: int = 2

    def save(self, step: int, state: Any, series: Mapping[str, Tensor]) -> None:
        """Write the state after that many steps, with the metric series so far."""
        tensors: dict[str, Tensor] = {f"history/{name}": values for name, values in series.items()}
        packed = pack(state, "state", tensors)
        store.save(self.directory / f"step-{step:08d}", tensors, {"terms": dict(self.terms), "state": packed})
        found = self._found()
        for stale in [*found[self.keep :], *self.directory.glob(".step-*")]:
            shutil.rmtree(stale, ignore_errors=True)

    def newest(self) -> tuple[Any, dict[str, Tensor]] | None:
        """State and metric series of the newest checkpoint that is whole, or None if there is none at all.

        Raises:
            CheckpointError: all are damaged, or the newest belongs to another run.
        """
        damaged: list[CheckpointError] = []
        for path in self._found():
            try:
                tensors, metadata = store.load(path)
            except CheckpointError as error:
                damaged.append(error)
                continue
            for error in damaged:
                warnings.warn(
                    f"skipped a damaged checkpoint, going on from {path.name}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._require_same_run(path, metadata.get("terms"))
            state = unpack(metadata.get("state"), tensors, path)
            return state, {
                k.removeprefix("history/"): v for k, v in tensors.items() if k.startswith("history/")
            }
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read; remove it to start anew. {damaged[0]}"
            ) from damaged[0]
        return None

    def _found(self) -> list[Path]:
        """The checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            (p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)),
            key=lambda p: int(p.name[5:]),
            reverse=True,
        )

    def _require_same_run(self, path: Path, terms: Any) -> None:
        here = json.loads(json.dumps(dict(self.terms)))
        if not isinstance(terms, dict):
            raise CheckpointError(f"{path}: not the checkpoint of a run; use another directory")
        for name in here.keys() | terms.keys():
            if terms.get(name) != here.get(name):
                raise CheckpointError(
                    f"{path}: written by a run with {name} = {_brief(terms.get(name))}, but this run has "
                    f"{_brief(here.get(name))}; give this run another directory, or remove the old one to "
                    "start anew"
                )


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state as JSON; its tensors go into `tensors`, by their place in it.

    Args:
        value: tensors, None, bool, int, float, str, and dicts (keys str or int), lists and tuples of those.
        path: where the value is, for the names of tensors and for errors.
        tensors: receives the tensors.

    Raises:
        CheckpointError: something of another type, which could not be saved without pickle.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        if any(type(key) not in (int, str) for key in value):
            raise CheckpointError(f"{path}: keys {list(value)[:3]!r}; expected strings or integers")
        return {"dict": [[key, pack(v, f"{path}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    raise CheckpointError(
        f"{path} is {type(value).__name__}, which cannot be saved without pickle; expected tensors, "
        "numbers, strings, dicts and lists. Run without checkpoint_every, or with another optimizer"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """The inverse of `pack`; `path` is the checkpoint, for errors."""
    try:
        return _unpack(packed, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not the checkpoint of a run; {type(error).__name__}: {error}"
        ) from error


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        if packed is None or isinstance(packed, (bool, int, float, str)):
            return packed
        raise TypeError(f"unexpected {type(packed).__name__}")
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {key: _unpack(v, tensors) for key, v in value}
    if kind == "list":
        return [_unpack(v, tensors) for v in value]
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in value)
    raise ValueError(f"unknown kind {kind!r}")


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
