"""The demo: handwritten digits, one program fitted in three ways, two others beside it, and one table.

The variational autoencoder is written once (`pgen.zoo.VAE`: a prior and a decoder, no guide). Three
objectives of the variational backend fit it, each with a guide made from the program. MADE and a spline flow
are fitted by the exact backend. Every number is the log of a probability *mass* of whole pixels, on images
that no fit has seen, so that they can stand in one column; whether it is exact, a bound or an estimate stands
beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pgen.commands.output import emit, row_numbers, say, show
from pgen.comparison import Comparison, ComparisonRow, evaluate, scaled_distance
from pgen.errors import CheckpointError
from pgen.fitting import fit
from pgen.fitting import make_backend as backend
from pgen.history import History
from pgen.isolation import isolated
from pgen.pictures import compare_images, loss_curve
from pgen.protocols import Backend
from pgen.run import Run
from pgen.zoo import VAE, Data, MaskedAutoencoder, SplineFlow
from pgen.zoo.datasets import digits


@dataclass(frozen=True)
class Entry:
    """One line of the table: a program, a backend, and how long they get."""

    title: str
    program: Callable[..., Any]
    backend: Backend
    steps: int
    lr: float
    weight_decay: float = 0.01


def entries(seed: int) -> list[Entry]:
    """What the demo fits: one VAE in three ways, and two programs whose likelihood needs no guide."""
    with isolated(seed):
        vae, made, flow = VAE(), MaskedAutoencoder(), SplineFlow(features=64, levels=17)

    weighted = {"evaluate": "importance"}
    return [
        Entry("VAE by ELBO", vae, backend("variational"), 600, 2e-3),
        Entry("VAE by IWAE", vae, backend("variational", objective="iwae", **weighted), 400, 2e-3),
        Entry(
            "VAE by wake-sleep", vae, backend("variational", objective="wake-sleep", **weighted), 400, 2e-3
        ),
        Entry("MADE", made, backend("exact"), 400, 3e-3, weight_decay=0.05),
        Entry("spline flow", flow, backend("exact"), 200, 8e-3, weight_decay=2.0),
    ]


def demo(out: Path, seed: int = 0, effort: float = 1.0, as_json: bool = False) -> Comparison:
    """Fit, evaluate and draw; print the table.

    Args:
        out: folder for the pictures.
        seed: of everything.
        effort: factor of the numbers of steps.
        as_json: print the numbers as JSON instead of the table.

    Raises:
        CheckpointError: the folder cannot be made.
        DataError: scikit-learn, which brings the digits, is not installed.
    """
    with _one_thread():
        return _demo(out, seed, effort, as_json)


@contextmanager
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share: on a busy machine, threads that wait for each other cost most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _demo(out: Path, seed: int, effort: float, as_json: bool) -> Comparison:
    start = time.perf_counter()
    _make(out)
    data = digits()
    rows = []
    for entry in entries(seed):
        steps = max(1, round(entry.steps * effort))
        if not as_json:
            say(f"{entry.title}: {steps} steps by {entry.backend.name}")
        run = Run(
            steps=steps,
            optimizer="adamw",
            lr=entry.lr,
            weight_decay=entry.weight_decay,
            schedule="cosine",
            warmup_steps=steps // 10,
            ema=0.99,
            validation=data.valid,
        )
        rows.append(_row(entry, data, run, seed))
    # The splits follow the order in which the digits were written, so that real digits differ from real digits too.
    yardstick = scaled_distance(data.valid["x"].float(), data.test["x"].float())
    rows.append(
        ComparisonRow("real digits", None, distance=yardstick, note="the validation split, as a yardstick")
    )
    pictures = [_draw(rows, data, out / "samples.png", seed), _draw_losses(rows, out / "loss.png")]
    seconds = time.perf_counter() - start
    table = Comparison(tuple(rows), f"{len(data.test['x'])} digits that no fit has seen")
    if as_json:
        emit(
            {
                "on": table.on,
                "rows": [row_numbers(r) for r in rows],
                "seconds": seconds,
                "pictures": [str(p) for p in pictures],
            }
        )
    else:
        show(table)
        say(f"wrote {' and '.join(map(str, pictures))}; {seconds:.0f} s in all")
    return table


def _row(entry: Entry, data: Data, run: Run, seed: int) -> ComparisonRow:
    start = time.perf_counter()
    fitted = fit(entry.program, {"x": data.train["x"]}, entry.backend, run=run, seed=seed)
    seconds = time.perf_counter() - start
    row = evaluate(entry.title, fitted, {"x": data.test["x"]}, seconds=seconds, seed=seed)
    validation = fitted.history.validation[-1][1]
    return replace(row, note=f"{entry.backend.name}; loss on the validation digits {validation:.2f}")


def _draw(rows: list[ComparisonRow], data: Data, path: Path, seed: int, columns: int = 16) -> Path:
    """A line of real digits, and a line of draws from each fit."""
    lines = {"real digits": data.test["x"][:columns]}
    lines |= {r.name: r.fitted.sample(columns, seed=seed)["x"] for r in rows if r.fitted is not None}
    return compare_images(lines, path, shape=data.image, columns=columns)


def _draw_losses(rows: list[ComparisonRow], path: Path, window: int = 20) -> Path:
    """The loss of each fit by step, averaged over a few steps."""
    histories: dict[str, History] = {r.name: r.fitted.history for r in rows if r.fitted is not None}
    lines = {}
    for name, history in histories.items():
        loss = history["loss"]
        kernel = torch.ones(1, 1, min(window, len(loss)), dtype=loss.dtype) / min(window, len(loss))
        lines[name] = torch.nn.functional.conv1d(loss[None, None], kernel)[0, 0].tolist()
    return loss_curve(lines, path, title="nats per image, on the batch")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be made: {error.strerror or error}") from error
