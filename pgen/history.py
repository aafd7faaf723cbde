"""What happened while a program was fitted: a metric per step, and how the run ended."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pgen.errors import CheckpointError, ProgramError, UnknownName

Stopped = Literal["finished", "early", "interrupted", "failed"]


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """The record of a finished run: `history["loss"]` is a float64 tensor with one entry per step.

    Where several players optimise, the metrics of each carry its name, as in `history["critic.loss"]`, and
    `history["loss"]` is that of the first.

    Attributes:
        metrics: series by name, each of length `steps`; NaN where a step did not report it.
        validation: pairs (steps done, loss on held-out data), in nats per row.
        steps: steps that count; those undone by a roll-back do not.
        seconds: wall time of training, over all sittings if the run was resumed.
        stopped: "finished", "early" (held-out loss stopped improving), "interrupted" (Ctrl-C) or "failed".
        seed: the seed that, with the options of the run, determines every number here.
        best: the step whose parameters were kept, where that is not the last one.
        warnings: what went wrong without being fatal: roll-backs, parameters that no loss depends on.

    Example:
        >>> history = History(metrics={"loss": torch.tensor([3.0, 1.0])}, steps=2, seconds=0.5)
        >>> history
        History(2 steps in 0.5 s (4/s), finished; loss 3 -> 1)
        >>> history["loss"][-1].item()
        1.0
    """

    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    validation: tuple[tuple[int, float], ...] = ()
    steps: int = 0
    seconds: float = 0.0
    stopped: Stopped = "finished"
    seed: int = 0
    best: int | None = None
    warnings: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        """The series of that name."""
        if name in self.metrics:
            return self.metrics[name]
        players = [full for full in self.metrics if full.endswith(f".{name}")]
        if players:
            return self.metrics[players[0]]
        raise UnknownName(f"no metric {name!r} was recorded; there are {', '.join(self.metrics) or 'none'}")

    def __contains__(self, name: object) -> bool:
        """Whether `history[name]` answers."""
        return name in self.metrics or any(full.endswith(f".{name}") for full in self.metrics)

    def __len__(self) -> int:
        """The number of steps."""
        return self.steps

    def __bool__(self) -> bool:
        """Always true: an empty history is a history."""
        return True

    @property
    def steps_per_second(self) -> float:
        """Speed, over the whole run."""
        return self.steps / self.seconds if self.seconds > 0 else 0.0

    def __repr__(self) -> str:
        """One line."""
        if not self.steps:
            return (
                f"History(nothing to train, {self.stopped})"
                if self.stopped == "finished"
                else f"History(0 steps, {self.stopped})"
            )
        parts = [
            f"{self.steps} steps in {self.seconds:.3g} s ({self.steps_per_second:.3g}/s), {self.stopped}"
        ]
        if "loss" in self:
            loss = self["loss"]
            parts.append(f"loss {_short(loss[0])} -> {_short(loss[-1])}")
        if self.validation:
            step, value = min(
                self.validation, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf
            )
            parts.append(f"held-out {_short(self.validation[-1][1])}, lowest {_short(value)} at step {step}")
        if self.warnings:
            parts.append(f"{len(self.warnings)} warning{'s' if len(self.warnings) > 1 else ''}")
        return f"History({'; '.join(parts)})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        return {
            "metrics": {name: [_number(v) for v in series.tolist()] for name, series in self.metrics.items()},
            "validation": [[step, _number(value)] for step, value in self.validation],
            "steps": self.steps,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "seed": self.seed,
            "best": self.best,
            "warnings": list(self.warnings),
        }

    @staticmethod
    def from_json(described: Mapping[str, Any] | str) -> History:
        """The history that `to_json` described (or its text); None becomes NaN.

        Raises:
            CheckpointError: the description has other keys or types.
        """
        try:
            value = json.loads(described) if isinstance(described, str) else dict(described)
            if value["stopped"] not in get_args(Stopped):
                raise ValueError(f"stopped is {value['stopped']!r}")
            return History(
                metrics={
                    str(k): torch.tensor([_value(v) for v in s], dtype=torch.float64)
                    for k, s in value["metrics"].items()
                },
                validation=tuple((int(step), _value(v)) for step, v in value["validation"]),
                steps=int(value["steps"]),
                seconds=float(value["seconds"]),
                stopped=value["stopped"],
                seed=int(value["seed"]),
                best=None if value["best"] is None else int(value["best"]),
                warnings=tuple(str(w) for w in value["warnings"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"expected a history as `History.to_json` writes it; {type(error).__name__}: {error}"
            ) from error


class Recorder:
    """Builds a history: metrics are added as tensors and moved to the host in blocks, so no step waits."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.steps = 0
        self.series: dict[str, array[float]] = {}
        self.validation: list[tuple[int, float]] = []
        self._pending: list[Mapping[str, Any]] = []

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep the metrics of one step; tensors stay where they are until `flush`."""
        self._pending.append(metrics)

    def flush(self) -> list[dict[str, float]]:
        """Move the pending steps to the host, one transfer per device and dtype; gives their numbers."""
        block = _to_host(self._pending)
        self._pending = []
        for metrics in block:
            for name, value in metrics.items():
                if name not in self.series:
                    self.series[name] = array("d", [math.nan]) * self.steps
                self.series[name].append(value)
            self.steps += 1
            for series in self.series.values():
                if len(series) < self.steps:
                    series.append(math.nan)
        return block

    def truncate(self, steps: int) -> None:
        """Forget everything after that many steps."""
        self._pending = []
        self.steps = min(self.steps, steps)
        for series in self.series.values():
            del series[self.steps :]
        self.validation = [(step, value) for step, value in self.validation if step <= self.steps]

    def tensors(self) -> dict[str, Tensor]:
        """The series so far, float64."""
        return {
            name: torch.tensor(series.tolist(), dtype=torch.float64) for name, series in self.series.items()
        }

    def restore(
        self, steps: int, series: Mapping[str, Tensor], validation: Sequence[tuple[int, float]]
    ) -> None:
        """Go on from saved series."""
        self._pending = []
        self.steps = steps
        self.series = {name: array("d", values.double().tolist()) for name, values in series.items()}
        self.validation = [(int(step), float(value)) for step, value in validation]


def _to_host(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    numbers: list[dict[str, float]] = [dict.fromkeys(metrics, 0.0) for metrics in steps]
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, str, Tensor]]] = {}
    for i, metrics in enumerate(steps):
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                numbers[i][name] = float(value)
            elif value.numel() == 1:
                groups.setdefault((value.device, value.dtype), []).append((i, name, value.reshape(())))
            else:
                raise ProgramError(
                    f"metric {name!r} has shape {tuple(value.shape)}; expected one number per step: "
                    "reduce it, for example by .mean()"
                )
    for entries in groups.values():
        moved = torch.stack([value for _, _, value in entries]).tolist()
        for (i, name, _), number in zip(entries, moved, strict=True):
            numbers[i][name] = float(number)
    return numbers


def _short(value: float | Tensor) -> str:
    return f"{float(value):.5g}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _value(number: Any) -> float:
    return math.nan if number is None else float(number)
