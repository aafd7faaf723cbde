"""Pictures of draws and of training, as PNG files; matplotlib is optional and used without global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgen.errors import DataError, PgenError


def image_grid(
    images: Tensor, path: str | Path, *, shape: tuple[int, int] | None = None, columns: int = 10
) -> Path:
    """Draw images side by side and write them to a PNG file.

    Args:
        images: shape `[n, H, W]`, or `[n, H * W]` with `shape`; black is the greatest value.
        path: where to write.
        shape: height and width; None for square ones, or for images that have a shape.
        columns: images in a row of the grid.

    Returns:
        The path.

    Raises:
        DataError: rows are not images.
        PgenError: matplotlib is not installed.
    """
    pixels = _as_images(images, shape)
    figure, axes = _figure(width=0.6 * columns, height=0.6 * math.ceil(len(pixels) / columns))
    _show(axes, _tiled(pixels, columns))
    return _write(figure, path)


def compare_images(
    rows: Mapping[str, Tensor], path: str | Path, *, shape: tuple[int, int] | None = None, columns: int = 16
) -> Path:
    """Draw one titled row of images for each entry, such as the data and the draws of several fits.

    Args:
        rows: images by title, each as for `image_grid`; the first `columns` of them are shown.
        path: where to write.
        shape: height and width; None for square ones, or for images that have a shape.
        columns: images in a row.

    Returns:
        The path.

    Raises:
        DataError: there is nothing to draw, or rows are not images.
        PgenError: matplotlib is not installed.
    """
    if not rows:
        raise DataError(
            "compare_images: nothing to draw; give images by title, e.g. {'data': x, 'vae': draws}"
        )
    figure = _empty_figure(width=0.5 * columns + 1.6, height=0.55 * len(rows))
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (title, images) in zip(panels, rows.items(), strict=True):
        _show(axes, _tiled(_as_images(images[:columns], shape), columns))
        axes.set_title(title, loc="left", x=-0.18, y=0.3, fontsize=8)
    figure.subplots_adjust(left=0.16, right=0.99, top=0.98, bottom=0.02, hspace=0.12)
    return _write(figure, path)


def loss_curve(history: Mapping[str, Sequence[float]], path: str | Path, *, title: str = "") -> Path:
    """Draw metrics over steps, one line each.

    Args:
        history: numbers by name; where there is a name `step`, it is the horizontal axis.
        path: where to write.
        title: of the picture.

    Returns:
        The path.

    Raises:
        DataError: no metric has a number that is finite.
        PgenError: matplotlib is not installed.
    """
    lines = {name: [float(v) for v in values] for name, values in history.items() if name != "step"}
    if not any(math.isfinite(v) for values in lines.values() for v in values):
        raise DataError(f"loss_curve: no finite number in {list(history) or 'an empty history'}")
    figure, axes = _figure(width=6.4, height=4.0)
    for name, values in lines.items():
        steps = list(history.get("step", range(1, len(values) + 1)))
        axes.plot(steps[: len(values)], values, label=name, linewidth=1.0)
    axes.set_xlabel("step")
    axes.set_ylabel("nats" if list(lines) == ["loss"] else "")
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.tight_layout()
    return _write(figure, path)


def scatter(samples: Mapping[str, Tensor], path: str | Path, *, reach: float | None = None) -> Path:
    """Draw points on the plane, one panel for each entry, all on one scale.

    Args:
        samples: points by title, shape `[n, 2]` each.
        path: where to write.
        reach: show `[-reach, reach]^2`; None for what the first sample takes.

    Returns:
        The path.

    Raises:
        DataError: there is nothing to draw, or points are not on the plane.
        PgenError: matplotlib is not installed.
    """
    points = {title: torch.as_tensor(x).detach().cpu() for title, x in samples.items()}
    wrong = next(
        (f"{t!r} of shape {tuple(x.shape)}" for t, x in points.items() if x.ndim != 2 or x.shape[1] != 2),
        None,
    )
    if wrong or not points:
        raise DataError(f"scatter: expected points of shape [n, 2] by title; got {wrong or 'nothing'}")
    edge = reach if reach is not None else 1.1 * float(next(iter(points.values())).abs().max())
    figure = _empty_figure(width=3.0 * len(points), height=3.2)
    for axes, (title, x) in zip(
        figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True
    ):
        axes.scatter(x[:, 0], x[:, 1], s=2.0, linewidths=0, alpha=0.5)
        axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", title=title)
    figure.tight_layout()
    return _write(figure, path)


def _empty_figure(width: float, height: float) -> Any:
    """A figure of its own, drawn by Agg: neither pyplot nor a display is touched."""
    try:
        figure = import_module("matplotlib.figure").Figure(figsize=(width, height), dpi=120)
        import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    except ImportError as error:
        raise PgenError(
            "pictures need matplotlib, which is not installed: pip install 'pgen-ppl[plots]'"
        ) from error
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure = _empty_figure(width, height)
    return figure, figure.subplots()


def _show(axes: Any, picture: Tensor) -> None:
    axes.imshow(picture.numpy(), cmap="gray_r", interpolation="nearest", aspect="equal")
    axes.set_axis_off()


def _write(figure: Any, path: str | Path) -> Path:
    figure.savefig(path, format="png")
    return Path(path)


def _as_images(images: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """Images `[n, H, W]` of floating-point numbers."""
    pixels = torch.as_tensor(images).detach().cpu().float()
    if pixels.ndim == 2:
        side = math.isqrt(pixels.shape[1])
        height, width = shape or (side, side)
        if height * width == pixels.shape[1]:
            return pixels.reshape(-1, height, width)
    if pixels.ndim != 3 or not len(pixels):
        raise DataError(
            f"expected images [n, H, W], or [n, H * W] with shape=(H, W); got {tuple(images.shape)} and "
            f"{shape}"
        )
    return pixels


def _tiled(images: Tensor, columns: int) -> Tensor:
    """One picture of images in rows, a light line between them."""
    count, height, width = images.shape
    lines = math.ceil(count / columns)
    low, high = float(images.min()), float(images.max())
    board = torch.full((lines * columns, height + 1, width + 1), low + 0.15 * (high - low))
    board[count:] = low
    board[:count, :height, :width] = images
    return (
        board.view(lines, columns, height + 1, width + 1)
        .permute(0, 2, 1, 3)
        .reshape(lines * (height + 1), -1)
    )
