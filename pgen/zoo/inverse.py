"""Inverse problems: a value that nobody saw, an operator, and what was seen of it; operators for images, by name.

One learned law is the prior of every question. Operators are those of `algorithms.diffusion.operators`, for images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pgen.algorithms.diffusion.operators import (
    Blur,
    Downsample,
    FourierUndersample,
    Greyscale,
    Mask,
    Radon,
)
from pgen.errors import OptionError

Shape = Sequence[int]
Side = Literal["lower", "upper", "left", "right", "centre", "edge"]

_FLOOR = 1e-4
"""Rates of counts are at least this: below, no photon would ever say so."""

_LAWS: Mapping[str, Callable[[Tensor, float], Any]] = {
    "normal": dist.Normal,
    "laplace": lambda seen, noise: dist.Laplace(seen, noise / math.sqrt(2)),
    "poisson": lambda seen, noise: dist.Poisson(seen.clamp(min=_FLOOR) / noise**2),
}


class Measured(nn.Module):
    r"""A value with a known law, seen through an operator and with noise.

    .. math:: x \sim p, \qquad y \sim q(\,\cdot \mid A x)

    Sites: `x`, and `y`, which is observed: `pgen.fit(Measured(law, A), None, "score").posterior({"y": y})` draws `x`
    given `y`. The law may be a learned one, `fitted.law("x")`, which stays as it is.

    Args:
        prior: the law of one `x`, of empty batch shape; or an object that has one, such as `DenoisingDiffusion`:
            `prior.law()`, whose tensors are then learned where `x` is observed.
        operator: A, from `[..., *image]` to `[..., *out]`; an operator of this module, or any differentiable function.
        noise: standard deviation of `y`; of counts, of `y` in units of A x where A x = 1.
        likelihood: q: `"normal"`, `"laplace"`, `"poisson"` (counts of mean :math:`A x / \text{noise}^2`, where A x is
            positive); or a callable from A x, `[..., *out]`, to a distribution over values of that shape.
        image: the shape in which the operator takes `x`; None: as `x` is.

    Raises:
        OptionError: the prior is no law of one value, the image is not of its size, or the likelihood is unknown.

    Example:
        >>> law = dist.Normal(torch.zeros(16), 1.0).to_event(1)
        >>> program = Measured(law, downsample((4, 4), 2), noise=0.1, image=(4, 4))
        >>> from pyro import poutine
        >>> {k: tuple(v["value"].shape) for k, v in poutine.trace(program).get_trace(3).nodes.items() if k in "xy"}
        {'x': (3, 16), 'y': (3, 2, 2)}
    """

    def __init__(
        self,
        prior: Any,
        operator: Callable[[Tensor], Tensor],
        noise: float = 0.1,
        likelihood: str | Callable[[Tensor], Any] = "normal",
        image: Shape | None = None,
    ) -> None:
        super().__init__()
        law = _law_of(prior)
        if not isinstance(law, torch.distributions.Distribution) or law.batch_shape:
            given = (
                f"of batch shape {tuple(law.batch_shape)}"
                if hasattr(law, "batch_shape")
                else type(law).__name__
            )
            raise OptionError(
                f"Measured: the prior is {given}; expected the law of one value, such as fitted.law('x')"
            )
        if image is not None and math.prod(image) != law.event_shape.numel():
            raise OptionError(
                f"Measured(image={tuple(image)}): the prior is over {tuple(law.event_shape)}; expected a shape of "
                f"{law.event_shape.numel()} numbers"
            )
        if not callable(operator):
            raise OptionError(
                f"Measured: the operator is {type(operator).__name__}; expected a function of x, such as blur((8, 8))"
            )
        if not callable(likelihood) and likelihood not in _LAWS:
            raise OptionError(
                f"Measured(likelihood={likelihood!r}): expected {', '.join(map(repr, _LAWS))}, or a callable from A x to a distribution"
            )
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 < noise < math.inf:
            raise OptionError(f"Measured(noise={noise!r}): expected a positive number")
        self.prior, self.operator, self.noise, self.likelihood = prior, operator, float(noise), likelihood
        self.image = tuple(law.event_shape if image is None else image)

    def law(self) -> Any:
        """The law of `x`."""
        return _law_of(self.prior)

    def seen(self, x: Tensor) -> Tensor:
        """A x, `[..., *out]`, of values `[..., *event_shape]`."""
        lead = x.shape[: x.dim() - len(self.law().event_shape)]
        return self.operator(x.reshape(lead + self.image))

    def forward(self, n: int) -> Tensor:
        """The program: `n` values, and what is seen of each."""
        law = self.law()
        with pyro.plate("data", n):
            x = pyro.sample("x", law)
            seen = self.seen(x)
            likelihood = self.likelihood
            noisy: Any = likelihood(seen) if callable(likelihood) else _LAWS[likelihood](seen, self.noise)
            inner = len(noisy.batch_shape) - (x.dim() - len(law.event_shape))
            return pyro.sample("y", noisy.to_event(inner))


def _law_of(prior: Any) -> Any:
    """The law itself, or what an object with a method `law` says it is."""
    law = getattr(prior, "law", None) if isinstance(prior, nn.Module) else None
    return law() if callable(law) else prior


def mask(image: Shape, hidden: Side | float = "lower", *, share: float = 0.5, seed: int = 0) -> Mask:
    """What is left of images where a part of them is hidden: `[..., *image]` to `[..., n]`, a pixel's channels together.

    Args:
        image: `(H, W)`, or with channels, `(C, H, W)`.
        hidden: `"lower"`, `"upper"`, `"left"`, `"right"` part; `"centre"`: a box in the middle, `"edge"`: all around one;
            or a number: the share of the pixels that are hidden, drawn at random.
        share: of the height, or of the width, that is hidden; of both sides, of a box.
        seed: of random pixels.

    Example:
        >>> mask((4, 4), "upper")(torch.arange(16.0).reshape(4, 4))
        tensor([ 8.,  9., 10., 11., 12., 13., 14., 15.])
    """
    height, width = _sides("mask", image)
    if isinstance(hidden, str):
        _share("mask", "share", share)
        row, column = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
        box = ((row - height / 2).abs() < share * height / 2) & (
            (column - width / 2).abs() < share * width / 2
        )
        every = torch.ones(height, width, dtype=torch.bool)
        places = {
            "lower": (row > height * (1 - share)) & every,
            "upper": (row < height * share) & every,
            "left": (column < width * share) & every,
            "right": (column > width * (1 - share)) & every,
            "centre": box,
            "edge": ~box,
        }
        if hidden not in places:
            raise OptionError(
                f"mask(hidden={hidden!r}): expected {', '.join(map(repr, places))}, or a share of the pixels"
            )
        shown = ~places[hidden]
    else:
        _share("mask", "hidden", hidden)
        count = max(1, round((1 - hidden) * height * width))
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
        shown = torch.zeros(height * width, dtype=torch.bool)
        shown[order[:count]] = True
        shown = shown.reshape(height, width)
    return Mask(shown if len(image) == 2 else shown.expand(*image[:-2], height, width))


def blur(image: Shape, width: float = 1.0, *, padding: str = "circular") -> Blur:
    """Gaussian blur: `[..., *image]` to the same shape, channel by channel.

    Args:
        image: `(H, W)`, or with channels.
        width: standard deviation of the kernel, in pixels.
        padding: `"circular"`, with known singular values, or `"zeros"`.

    Example:
        >>> float(blur((5, 5), 0.5)(torch.ones(5, 5)).mean().round(decimals=4))
        1.0
    """
    sides = _sides("blur", image)
    if not 0 < width < math.inf:
        raise OptionError(f"blur(width={width!r}): expected a positive number of pixels")
    lines = []
    for side in sides:
        reach = min(math.ceil(4 * width), (side - 1) // 2)
        line = torch.exp(-((torch.arange(-reach, reach + 1, dtype=torch.float64) / width) ** 2) / 2)
        lines.append(line / line.sum())
    if padding not in ("circular", "zeros"):
        raise OptionError(f"blur(padding={padding!r}): expected 'circular' or 'zeros'")
    return Blur(lines[0][:, None] * lines[1], sides, padding)


def downsample(image: Shape, factor: int = 2) -> Downsample:
    """Means of blocks of pixels: `[..., H, W]` to `[..., H / factor, W / factor]`, channel by channel.

    Example:
        >>> downsample((3, 8, 8), 4)(torch.ones(3, 8, 8)).shape
        torch.Size([3, 2, 2])
    """
    sides = _sides("downsample", image)
    if (
        isinstance(factor, bool)
        or not isinstance(factor, int)
        or factor < 1
        or any(s % factor for s in sides)
    ):
        raise OptionError(
            f"downsample({tuple(image)}, {factor!r}): expected a whole number that divides both sides of the image"
        )
    return Downsample(factor)


def greyscale(image: Shape, weights: Sequence[float] | None = None) -> Greyscale:
    """Grey from colours: `[..., C, H, W]` to `[..., 1, H, W]`.

    Args:
        image: `(C, H, W)`.
        weights: of the channels; None: of red, green and blue as the eye weighs them, or even ones where C is not 3.

    Example:
        >>> greyscale((3, 2, 2))(torch.ones(5, 3, 2, 2)).shape
        torch.Size([5, 1, 2, 2])
    """
    _sides("greyscale", image)
    if len(image) != 3 or (weights is not None and len(weights) != image[0]):
        raise OptionError(
            f"greyscale({tuple(image)}, weights={weights}): expected an image (C, H, W), and a weight for each channel"
        )
    if weights is None and image[0] == 3:
        return Greyscale()
    even = [1 / image[0]] * image[0]
    return Greyscale(torch.tensor(even if weights is None else list(weights), dtype=torch.float64))


def radon(image: Shape, angles: int | Tensor = 16, *, detectors: int | None = None) -> Radon:
    """Sums along parallel rays, as in tomography: `[..., H, W]` to `[..., angles, detectors]`.

    Args:
        image: `(H, W)`, or with channels.
        angles: how many, evenly over half a turn; or a tensor of them, in radians.
        detectors: rays for each angle, a pixel apart; None: as many as the longer side.

    Example:
        >>> radon((4, 4), 2)(torch.ones(4, 4))[0]
        tensor([4., 4., 4., 4.])
    """
    sides = _sides("radon", image)
    if isinstance(angles, bool) or (isinstance(angles, int) and angles < 1):
        raise OptionError(f"radon(angles={angles!r}): expected one angle or more, or a tensor of them")
    return Radon(angles, sides, detectors)


def fourier(image: Shape, share: float = 0.3, *, centre: float = 0.1, seed: int = 0) -> FourierUndersample:
    """Some rows of the Fourier transform, as magnetic resonance measures them: `[..., H, W]` to `[..., n, 2]`.

    Args:
        image: `(H, W)`, or with channels.
        share: of the rows that are measured: those of the lowest frequencies, and others at random.
        centre: share of the rows that are of the lowest frequencies.
        seed: of the random rows.

    Example:
        >>> fourier((8, 8), 0.5)(torch.ones(8, 8)).shape
        torch.Size([32, 2])
    """
    height, width = _sides("fourier", image)
    for name, value in (("share", share), ("centre", centre)):
        if not 0 < value <= 1:
            raise OptionError(
                f"fourier({name}={value!r}): expected a share of the rows, above 0 and at most 1"
            )
    count = max(1, round(share * height))
    low = min(count, max(1, round(centre * height)))
    frequency = torch.fft.fftfreq(height).abs()
    chance = torch.rand(height, generator=torch.Generator().manual_seed(seed))
    order = torch.where(frequency.argsort(stable=True).argsort() < low, -1.0, chance).argsort()
    rows = torch.zeros(height, dtype=torch.bool)
    rows[order[:count]] = True
    return FourierUndersample(rows[:, None].expand(height, width).contiguous())


def _sides(maker: str, image: Shape) -> tuple[int, int]:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in image)
    if len(image) not in (2, 3) or not whole:
        raise OptionError(f"{maker}({tuple(image)}): expected the shape of an image, (H, W) or (C, H, W)")
    return image[-2], image[-1]


def _share(maker: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise OptionError(f"{maker}({name}={value!r}): expected a share between 0 and 1")
