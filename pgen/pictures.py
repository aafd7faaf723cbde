"""Pictures of draws and of training, as PNG files; matplotlib is optional and used without global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgen.advice import coordinate
from pgen.draws import Draws
from pgen.errors import DataError, PgenError
from pgen.metrics.chains import e_bfmi

if TYPE_CHECKING:
    from pgen.testing import Calibration

_CHAINS = 8  # chains drawn one by one; of more, so many, evenly over all
_PANELS = 12  # scalars in one picture, at most
_POINTS = 4000  # in one panel: more lie on top of each other
_STEPS = 1000  # of one chain in one panel: there are no more pixels


def image_grid(
    images: Tensor, path: str | Path, *, shape: tuple[int, int] | None = None, columns: int = 10
) -> Path:
    """Draw images side by side and write them to a PNG file.

    Args:
        images: shape `[n, H, W]`, or `[n, H * W]` with `shape`; black is the greatest value. In colours, from 0 to 1:
            `[n, 3, H, W]`.
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
    width = 0.5 * columns + 1.6
    figure = _empty_figure(width=width, height=0.55 * len(rows))
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, images in zip(panels, rows.values(), strict=True):
        _show(axes, _tiled(_as_images(images[:columns], shape), columns))
    figure.subplots_adjust(left=1.4 / width, right=0.99, top=0.98, bottom=0.02, hspace=0.12)
    for axes, title in zip(
        panels, rows, strict=True
    ):  # in the margin, which is 1.4 inches whatever the columns
        place = axes.get_position()
        figure.text(0.1 / width, (place.y0 + place.y1) / 2, title, va="center", fontsize=8)
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


def rank_ecdf(calibration: Calibration, path: str | Path, *, quantities: Sequence[str] | None = None) -> Path:
    """Draw, for each quantity, the ECDF of its ranks minus that of uniform ones, and the band that it should stay in.

    A posterior that is too narrow gives a curve that goes up and then down, one that is too wide the reverse; one that
    is too low lies below zero throughout, one that is too high above.

    Args:
        calibration: what `pgen.testing.sbc` gave.
        path: where to write.
        quantities: names of those to draw; None for all, the worst first where there are more than 24.

    Returns:
        The path.

    Raises:
        DataError: a name is not one of its quantities.
        PgenError: matplotlib is not installed.

    References:
        Säilynoja, Bürkner & Vehtari (2022), Statistics and Computing 32(2).
    """
    rows = sorted(calibration.rows, key=lambda row: row.p) if len(calibration) > 24 else list(calibration)
    known = [row.quantity for row in rows]
    unknown = [name for name in quantities or () if name not in known]
    if unknown:
        raise DataError(f"rank_ecdf: no quantity {unknown[0]!r}; there are {', '.join(known)}")
    shown = [row for row in rows if quantities is None or row.quantity in quantities][:24]
    at, low, high = calibration.band()
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    figure = _empty_figure(width=2.6 * columns, height=2.1 * lines + 0.3)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, row in zip(panels, shown, strict=False):
        axes.fill_between(at, low - at, high - at, color="0.88", linewidth=0)
        axes.axhline(0.0, color="0.6", linewidth=0.6)
        color = "tab:blue" if row.passed else "tab:red"
        axes.plot(at, calibration.ecdf(row.quantity) - at, color=color, linewidth=1.0, drawstyle="steps-post")
        axes.set_title(row.quantity if row.passed else f"{row.quantity}\n{row.verdict}", fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("rank of the truth / number of draws", fontsize=7)
    figure.supylabel("ECDF minus uniform", fontsize=7)
    figure.tight_layout()
    return _write(figure, path)


def traces(draws: Draws, path: str | Path, names: Sequence[str] | None = None) -> Path:
    """Draw each scalar's chains over their draws, and beside it how the ranks of every chain are distributed.

    Chains that agree have ranks that are uniform up to chance (Vehtari et al. 2021); the grey band holds each bar
    with probability 99 %, if draws were independent. Of long chains every so many-th draw is shown, 1,000 to 2,000
    of each of at most 8 chains; ranks are those of all draws.

    Args:
        draws: from Markov chains.
        path: where to write.
        names: scalars (`"theta[3]"`) or sites (`"theta"`); None for the six scalars with the worst R-hat.

    Returns:
        The path.

    Raises:
        DataError: there is no scalar or site of that name, or there are more than 12 scalars.
        PgenError: matplotlib is not installed.
    """
    scalars = _scalars(draws, names, most=6)
    figure = _empty_figure(width=8.0, height=1.6 * len(scalars))
    panels = figure.subplots(len(scalars), 2, squeeze=False, width_ratios=(2, 1))
    for (left, right), (name, x) in zip(panels, scalars.items(), strict=True):
        chains, count = x.shape
        bins, every = max(2, min(20, count // 10)), max(1, count // _STEPS)
        ranks = x.flatten().argsort().argsort().reshape(x.shape) * bins // x.numel()
        expected = count / bins
        reach = 2.58 * math.sqrt(expected * (1 - 1 / bins))
        right.axhspan(expected - reach, expected + reach, color="0.9", linewidth=0)
        for c in range(0, chains, math.ceil(chains / _CHAINS)):
            left.plot(range(0, count, every), x[c, ::every], linewidth=0.5, alpha=0.8)
            right.stairs(torch.bincount(ranks[c], minlength=bins), linewidth=1.0)
        left.set_ylabel(name, fontsize=8)
        right.set(yticks=[], ylim=(0, None))
        for axes in (left, right):
            axes.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("draw", fontsize=8)
    panels[-1, 1].set_xlabel("rank", fontsize=8)
    figure.tight_layout()
    return _write(figure, path)


def pairs(draws: Draws, path: str | Path, names: Sequence[str] | None = None) -> Path:
    """Draw scalars against each other, divergent draws in red on top: where those gather, the chains do not go.

    Of many draws every so many-th is shown, 4,000 to 8,000 in all, and every divergent one; histograms are of all.

    Args:
        draws: from any posterior; `stats["diverging"]` marks the divergent ones, if there is such.
        path: where to write.
        names: scalars (`"theta[3]"`) or sites (`"theta"`); None for the four scalars with the worst R-hat.

    Returns:
        The path.

    Raises:
        DataError: there is no scalar or site of that name, or there are more than 12 scalars.
        PgenError: matplotlib is not installed.
    """
    scalars = {name: x.flatten() for name, x in _scalars(draws, names, most=4).items()}
    flags = draws.by_chain(draws.stats).get("diverging")
    bad = torch.zeros(next(iter(scalars.values())).shape, dtype=torch.bool)
    bad = bad if flags is None else flags.flatten().bool().cpu()
    shown = ~bad
    shown &= torch.arange(len(bad)) % max(1, len(bad) // _POINTS) == 0
    figure = _empty_figure(width=1.8 * len(scalars) + 0.6, height=1.8 * len(scalars) + 0.4)
    panels = figure.subplots(len(scalars), len(scalars), squeeze=False, sharex="col")
    for i, (below, y) in enumerate(scalars.items()):
        for j, (beside, x) in enumerate(scalars.items()):
            axes = panels[i, j]
            axes.tick_params(labelsize=6)
            if j > i:
                axes.set_axis_off()
            elif j == i:
                axes.hist(x.numpy(), bins=40, histtype="step", linewidth=1.0)
                axes.set_yticks([])
            else:
                axes.scatter(x[shown], y[shown], s=2.0, linewidths=0, alpha=0.3)
                axes.scatter(x[bad], y[bad], s=6.0, linewidths=0, color="red")
            if i == len(scalars) - 1:
                axes.set_xlabel(beside, fontsize=8)
        panels[i, 0].set_ylabel(below, fontsize=8)
    figure.tight_layout()
    return _write(figure, path)


def energies(draws: Draws, path: str | Path) -> Path:
    """Draw how energies are distributed, and how they change from draw to draw: the second as wide as the first is well.

    Args:
        draws: with `stats["energy"]`.
        path: where to write.

    Returns:
        The path.

    Raises:
        DataError: the draws carry no energies.
        PgenError: matplotlib is not installed.
    """
    if "energy" not in draws.stats:
        raise DataError(
            f"energies: the draws carry {', '.join(draws.stats) or 'no statistics'}, no energy; only Hamiltonian kernels "
            "leave one"
        )
    energy = draws.by_chain({"energy": draws.stats["energy"]})["energy"].double().cpu()
    figure, axes = _figure(width=5.0, height=3.0)
    for x, label in ((energy - energy.mean(), "energy"), (energy.diff(dim=-1), "change")):
        axes.hist(x.flatten().numpy(), bins=60, density=True, alpha=0.5, label=label)
    axes.set(xlabel="nats", yticks=[], title=f"least E-BFMI {float(e_bfmi(energy).min()):.2f}")
    axes.legend(frameon=False)
    figure.tight_layout()
    return _write(figure, path)


def _scalars(draws: Draws, names: Sequence[str] | None, most: int) -> dict[str, Tensor]:
    """Chains of scalars by name, `[chains, draws]` each."""
    if names is None:
        rows = sorted(draws.summary(()).rows, key=lambda r: -r.r_hat if math.isfinite(r.r_hat) else 0.0)
        names = [r.name for r in rows[:most]]
    found: dict[str, Tensor] = {}
    for site, x in draws.by_chain().items():
        shape, flat = x.shape[2:], x.reshape(*x.shape[:2], math.prod(x.shape[2:])).cpu()
        places = {coordinate(site, i, shape): i for i in range(flat.shape[-1])}
        chosen = [c for c in places if site in names or c in names]
        found |= {c: flat[..., places[c]] for c in chosen}
    strange = [n for n in names if n not in found and not (n in draws and draws[n][0].numel())]
    if strange or not 0 < len(found) <= _PANELS:
        shapes = ", ".join(f"{s} {list(v.shape[1:])}" for s, v in draws.items())
        problem = f"no {strange[0]!r}" if strange else f"{len(found)} scalars"
        raise DataError(
            f"{problem}; name 1 to {_PANELS} of the scalars, such as 'theta[3]', of the sites: {shapes}"
        )
    return found


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
    """Images `[n, H, W]` of floating-point numbers, or `[n, H, W, 3]` of colours."""
    pixels = torch.as_tensor(images).detach().cpu().float()
    if pixels.ndim == 2:
        side = math.isqrt(pixels.shape[1])
        height, width = shape or (side, side)
        if height * width == pixels.shape[1]:
            return pixels.reshape(-1, height, width)
    if pixels.ndim == 4 and pixels.shape[1] == 3 and len(pixels):
        return pixels.movedim(1, -1).clamp(0.0, 1.0)
    if pixels.ndim != 3 or not len(pixels):
        raise DataError(
            f"expected images [n, H, W], in colours [n, 3, H, W], or [n, H * W] with shape=(H, W); got {tuple(images.shape)} "
            f"and {shape}"
        )
    return pixels


def _tiled(images: Tensor, columns: int) -> Tensor:
    """One picture of images in rows, a light line between them."""
    count, height, width, *colours = images.shape
    lines = math.ceil(count / columns)
    low, high = (1.0, 0.0) if colours else (float(images.min()), float(images.max()))  # white, black
    board = torch.full((lines * columns, height + 1, width + 1, *colours), low + 0.15 * (high - low))
    board[count:] = low
    board[:count, :height, :width] = images
    laid = board.view(lines, columns, height + 1, width + 1, *colours).transpose(1, 2)
    return laid.reshape(lines * (height + 1), columns * (width + 1), *colours)
