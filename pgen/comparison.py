"""Fits side by side: one table of how exact each number is, the number, a two-sample distance, and the time it took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pgen.capability import Estimate, Query
from pgen.choice import refusal_text
from pgen.errors import DataError, MeasureError, OptionError, Refused
from pgen.fitted import Fitted
from pgen.fitting import UnusedOption, fit
from pgen.metrics.two_sample import energy_distance
from pgen.problem import Data
from pgen.protocols import Backend
from pgen.run import Run
from pgen.tables import as_text


@dataclass(frozen=True)
class ComparisonRow:
    """One fit in a comparison; what it could not answer is None, and `note` says why."""

    name: str
    fitted: Fitted | None
    kind: str | None = None
    nats: float | None = None
    stderr: float | None = None
    bits_per_dim: float | None = None
    measure: str | None = None
    distance: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Rows of a comparison: prints as a table, iterates as rows."""

    rows: tuple[ComparisonRow, ...]
    on: str = "held-out data"

    def __iter__(self) -> Iterator[ComparisonRow]:
        """The rows, in the order asked for."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many fits were compared."""
        return len(self.rows)

    def __getitem__(self, name: str) -> ComparisonRow:
        """The row of that name."""
        return next(r for r in self.rows if r.name == name)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The table."""
        table = Table(
            "fit",
            "log probability is",
            "nats / row",
            "bits / dim",
            "distance",
            "seconds",
            "note",
            caption=f"on {self.on}",
        )
        for r in self.rows:
            error = "" if r.stderr is None else f" ± {r.stderr:.2g}"
            table.add_row(
                escape(r.name),
                "-" if r.kind is None else f"{r.kind} (log {r.measure})",
                "-" if r.nats is None else f"{r.nats:.2f}{error}",
                "-" if r.bits_per_dim is None else f"{r.bits_per_dim:.3f}",
                "-" if r.distance is None else f"{r.distance:.4f}",
                "-" if r.seconds is None else f"{r.seconds:.1f}",
                escape(r.note),
            )
        yield table

    def __str__(self) -> str:
        """The table as plain text."""
        return as_text(self)

    def __repr__(self) -> str:
        """The table as plain text."""
        return str(self)


def compare(
    program: Callable[..., Any],
    data: Data,
    backends: Sequence[str | Backend] | Mapping[str, str | Backend],
    *,
    test: Data = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    run: Run | None = None,
    seed: int | None = None,
) -> Comparison:
    """Fit one program by several backends and evaluate each on the same data.

    Args:
        program: the program.
        data: what it is fitted to.
        backends: names or backends; a mapping gives them labels, which several of one kind need.
        test: held-out data to evaluate on; the training data if None (and the table says so).
        args: passed to the program unchanged.
        kwargs: passed to the program unchanged.
        run: steps, batches, device; the same for all.
        seed: makes everything repeatable.

    A backend that refuses the program gets a row that says why.

    Raises:
        OptionError: two backends have the same label.
    """
    named = backends if isinstance(backends, Mapping) else {_label(b): b for b in backends}
    if len(named) < len(backends):
        labels = [_label(b) for b in backends]
        twice = next(label for label in labels if labels.count(label) > 1)
        raise OptionError(
            f"compare: {labels.count(twice)} of the backends are called {twice!r}; expected a mapping that tells them apart, such as "
            f"{{'one': pgen.backend({twice!r}, ...), 'other': pgen.backend({twice!r}, ...)}}"
        )
    rows = []
    for name, backend in named.items():
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UnusedOption
                )  # one run for all: each takes what it has a use for
                fitted = fit(program, data, backend, args=args, kwargs=kwargs, run=run, seed=seed)
        except Refused as error:
            note = refusal_text(error.refusal) if error.refusal is not None else str(error)
            rows.append(ComparisonRow(name, None, note=note))
            continue
        rows.append(evaluate(name, fitted, test, seconds=time.perf_counter() - start, seed=seed))
    return Comparison(tuple(rows), "training data" if test is None else "held-out data")


def evaluate(
    name: str,
    fitted: Fitted,
    test: Data = None,
    *,
    seconds: float | None = None,
    seed: int | None = None,
    draws: int = 500,
) -> ComparisonRow:
    """One row of a comparison: a fit evaluated on held-out data."""
    estimate: Estimate | None = None
    bits = None
    if Query.LOG_PROB in fitted.offer.answers:
        estimate = fitted.log_prob(test, seed=seed)
        try:
            bits = estimate.bits_per_dim()
        except MeasureError:
            bits = None
    distance, note = None, ""
    if Query.SAMPLE in fitted.offer.answers:
        try:
            distance = _distance(fitted, test, draws, seed)
        except DataError as error:
            note = str(error)
    mean = None if estimate is None else estimate.mean()
    return ComparisonRow(
        name=name,
        fitted=fitted,
        kind=None if estimate is None else estimate.kind.value,
        nats=None if mean is None else float(mean.value),
        stderr=None if mean is None or mean.stderr is None else float(mean.stderr),
        bits_per_dim=bits,
        measure=None if estimate is None else estimate.measure,
        distance=distance,
        seconds=seconds,
        note=note,
    )


def _distance(fitted: Fitted, test: Data, draws: int, seed: int | None) -> float | None:
    """Energy distance between draws and data over all observed sites, scaled by the data's spread."""
    problem, structure = fitted._asked(test)
    seen = {k: v for k, v in problem.observations.items() if k in structure.observed and structure.local(k)}
    seen |= {k: v for k, v in problem.inputs.items() if k in structure.observed and structure.local(k)}
    if not seen or problem.rows is None:
        return None
    drawn = fitted.sample(min(draws, problem.rows), seed=seed)
    rows = min(draws, problem.rows)
    mine = torch.cat([_flat(drawn[k], rows) for k in seen], -1)
    return scaled_distance(mine, torch.cat([_flat(v[:rows], rows) for v in seen.values()], -1))


def scaled_distance(drawn: Tensor, data: Tensor) -> float:
    """Energy distance between two samples `[n, d]` and `[m, d]`, in units of the data's spread."""
    scale = data.std(0).square().sum().sqrt().clamp_min(1e-12)
    return float(energy_distance(drawn / scale, data / scale))


def _flat(value: Tensor, rows: int) -> Tensor:
    return value.reshape(rows, -1).to(torch.get_default_dtype())


def _label(backend: str | Backend) -> str:
    return backend if isinstance(backend, str) else backend.name
