"""What a run directory shows: draws of the data, as images or points; the loss; chains."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from pgen.capability import Query
from pgen.draws import Draws
from pgen.fitted import Fitted
from pgen.history import History
from pgen.pictures import image_grid, loss_curve, scatter, traces


def draw_samples(
    fitted: Fitted, path: Path, *, n: int = 64, seed: int = 0, image: tuple[int, int] | None = None
) -> Path | None:
    """Draw `n` values of the data site and write a picture; None where they are neither images nor points.

    Args:
        fitted: what to draw from.
        path: where to write.
        n: how many.
        seed: of the draws.
        image: height and width, where a value is a flattened image.
    """
    site = _site(fitted, image)
    if site is None or Query.SAMPLE not in fitted.offer.answers:
        return None
    values: Tensor = fitted.sample(n, seed=seed)[site]
    if tuple(values.shape[1:]) == (2,):
        return scatter({site: values}, path)
    return image_grid(values, path, shape=image, columns=min(n, 16))


def draw_loss(history: History, path: Path) -> Path | None:
    """Draw the loss by step, and that on held-out rows; None where nothing was trained."""
    losses = {k: v for k, v in history.metrics.items() if k == "loss" or k.endswith(".loss")}
    if not any(math.isfinite(v) for series in losses.values() for v in series.tolist()):
        return None
    return loss_curve({k: v.tolist() for k, v in losses.items()}, path)


def draw_chains(drawn: Draws | None, path: Path) -> Path | None:
    """Draw the scalars whose chains agree least; None where there are no chains, or nothing moves."""
    scalars = 0 if drawn is None else sum(x[0].numel() for x in drawn.values())
    return traces(drawn, path) if drawn is not None and scalars else None


def square(fitted: Fitted) -> tuple[int, int] | None:
    """The height and width of a value if it has a square number of scalars, as small images do."""
    for site in map(fitted.structure.sites.__getitem__, fitted.structure.observed):
        side = math.isqrt(math.prod(site.event_shape))
        if len(site.event_shape) == 1 and side > 1 and side * side == site.event_shape[0]:
            return side, side
    return None


def _site(fitted: Fitted, image: tuple[int, int] | None) -> str | None:
    structure = fitted.structure
    for name in structure.observed:
        shape = tuple(structure.sites[name].event_shape)
        pictured = (
            len(shape) == 2 or shape == (2,) or (image is not None and math.prod(shape) == math.prod(image))
        )
        if structure.local(name) and pictured:
            return name
    return None
