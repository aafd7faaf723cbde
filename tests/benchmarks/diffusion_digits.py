"""Digits, 8 x 8 pixels of 17 levels, through the public API: likelihoods, samplers, and students of one and two steps.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m tests.benchmarks.diffusion_training digits consistency

Everything is learned from the 1,000 training images and measured on the 447 test images. Nats are of a mass: the diffusion's
are of the density at a random point of each cell plus the log volume of the cell, in the mean below the log mass. A classifier's
accuracy (`pgen.metrics.c2st`) is 0.5 where draws cannot be told from images; that of training against test images is the floor.
"""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pgen
from pgen.backends.score import Score
from pgen.metrics import c2st, energy_distance
from pgen.zoo import CausalImage, DenoisingDiffusion, MaskedAutoencoder
from pgen.zoo.datasets import digits

OUT = Console(width=130)
SEEDS = (1, 2)  # of draws
STEPS, STUDENT = 2400, 1200


def program(dropout: float = 0.1) -> DenoisingDiffusion:
    """The program: teacher's and students' networks have the same names and shapes."""
    return DenoisingDiffusion(features=64, levels=17, image=(8, 8), width=16, dropout=dropout)


def learned(program: Any, data: Any, backend: Any, **run: Any) -> tuple[Any, float]:
    """A fit, and its processor time."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = pgen.fit(program, data, backend, run=pgen.Run(progress=False, **run), seed=0)
    return fitted, time.process_time() - start


@functools.cache
def teacher() -> tuple[Any, float]:
    """The denoising model."""
    torch.manual_seed(0)
    return learned(program(), digits().train, "score", steps=STEPS, batch_size=64, lr=3e-3)


def told_apart(fitted: Any, truth: Tensor) -> list[object]:
    """C2ST and energy distance of draws to held-out images, and milliseconds for a draw."""
    start = time.perf_counter()
    drawn = [fitted.sample(len(truth), seed=seed)["x"] for seed in SEEDS]
    spent = 1e3 * (time.perf_counter() - start) / (len(SEEDS) * len(truth))
    accuracy = torch.tensor([c2st(d, truth).accuracy for d in drawn])
    apart = torch.tensor([float(energy_distance(d.float(), truth.float())) for d in drawn])
    return [*(f"{v.mean():.3f} ± {v.std() / len(v) ** 0.5:.3f}" for v in (accuracy, apart)), f"{spent:.2f}"]


def floor(data: Any) -> list[object]:
    """The same for training images."""
    images, truth = data.train["x"][: len(data.test["x"])], data.test["x"]
    apart = float(energy_distance(images.float(), truth.float()))
    return [f"{c2st(images, truth).accuracy:.3f}", f"{apart:.3f}", ""]


def figures() -> None:
    """Likelihoods beside those of autoregressive models, and two samplers."""
    data = digits()
    truth = data.test["x"]
    some = {"x": truth[:64]}
    fitted, spent = teacher()
    nats = Table(
        "model",
        "kind",
        "nats an image",
        "of the first 64",
        "seconds to learn",
        title="digits: log mass",
        title_justify="left",
    )
    for name, rival, options in (
        ("MADE", MaskedAutoencoder, {"steps": 400, "lr": 3e-3, "weight_decay": 0.05}),
        ("causal convolutions", CausalImage, {"steps": 300, "lr": 5e-3, "weight_decay": 0.01}),
    ):
        torch.manual_seed(0)
        options |= {"optimizer": "adamw", "warmup_steps": options["steps"] // 10, "ema": 0.99}
        other, took = learned(rival(), data.train, "exact", **options)
        nats.add_row(name, "exact", _mean(other, data.test), _mean(other, some), f"{took:.0f}")
    bounded = pgen.fit(fitted.program, None, Score(evaluate="bound", bound_particles=32))
    nats.add_row("diffusion", "bound", _mean(bounded, data.test), _mean(bounded, some), f"{spent:.0f}")
    flowing = pgen.fit(fitted.program, None, Score(divergence="hutchinson", probes=4, tolerance=1e-3))
    nats.add_row("diffusion", "flow", "", _mean(flowing, some), "")
    OUT.print(nats)
    table = Table(
        "draws", "C2ST", "energy distance", "ms a draw", title="digits: draws", title_justify="left"
    )
    table.add_row("training images", *floor(data))
    for name, solver, steps in (
        ("UniPC, 18 steps", "unipc", 18),
        ("Heun, 18 steps", "heun", 18),
        ("ancestral, 1000 steps", "ancestral", 1000),
    ):
        drawing = pgen.fit(fitted.program, None, Score(solver=solver, steps=steps))
        table.add_row(name, *told_apart(drawing, truth))
    OUT.print(table)


def students() -> None:
    """A student of the denoising model, and one of the data alone, beside the model itself."""
    data = digits()
    truth = data.test["x"]
    fitted, spent = teacher()
    table = Table(
        "draws",
        "C2ST",
        "energy distance",
        "ms a draw",
        "seconds to learn",
        title="digits: few steps",
        title_justify="left",
    )
    table.add_row("training images", *floor(data), "")
    for solver, steps in (("heun", 18), ("unipc", 8), ("unipc", 2), ("unipc", 1)):
        drawing = pgen.fit(fitted.program, None, Score(solver=solver, steps=steps))
        table.add_row(f"teacher, {solver} {steps}", *told_apart(drawing, truth), f"{spent:.0f}")
    for name, way, steps in (
        ("distilled", Score(loss="consistency", teacher=fitted), STUDENT),
        ("of data alone", Score(loss="consistency"), STEPS),
    ):
        torch.manual_seed(0)
        student, took = learned(program(dropout=0.0), data.train, way, steps=steps, batch_size=64, lr=1e-3)
        for jumps in (1, 2, 4):
            drawing = pgen.fit(student.program, None, Score(loss="consistency", steps=jumps))
            table.add_row(f"{name}, {jumps} step(s)", *told_apart(drawing, truth), f"{took:.0f}")
    OUT.print(table)


def _mean(fitted: Any, data: Any) -> str:
    """Mean and standard error of what is random in the estimates, not of the choice of images."""
    mean = fitted.log_prob(data, seed=0).mean()
    return f"{float(mean.value):.2f}" + ("" if mean.kind == "exact" else f" ± {float(mean.stderr):.2f}")
