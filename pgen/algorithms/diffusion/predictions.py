r"""What networks predict, and a denoiser made of any of it.

With x = x_0 + sigma eps, everything that networks are trained to predict is, at a given noise level, one linear map of
data and noise,

    y = p(sigma) x_0 + q(sigma) eps

    data                x_0                     p = 1,              q = 0
    noise               eps                     p = 0,              q = 1
    score               -eps / sigma            p = 0,              q = -1 / sigma
    v                   a eps - a sigma x_0     p = -a sigma,       q = a,      a = 1 / sqrt(1 + sigma^2)
    velocity            eps - x_0               p = -1,             q = 1
    preconditioned      (x_0 - c_skip x) / c_out (Karras et al.)

and x and y together give x_0 = (q x - sigma y) / (q - p sigma): one formula converts any of them into any other, and an
error in y is one in x_0 times p - q / sigma, so that a uniformly weighted loss in y is a denoising loss with weight
(p - q / sigma)^2.

References:
    Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, NeurIPS 2020 (noise).
    Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022 (v).
    Karras, Aittala, Aila & Laine, Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS 2022.
    Liu, Gong & Liu, Flow Straight and Fast, ICLR 2023 (velocity).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import per_row
from pgen.algorithms.diffusion.schedules import Schedule

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From noise levels to (p, q), both of their shape."""


@dataclass(frozen=True)
class Prediction:
    r"""One way to say what the data are: y = p(sigma) x_0 + q(sigma) eps.

    Another is made by giving its coefficients: `Prediction("sum", lambda s: (s.new_ones(s.shape), s.new_ones(s.shape)))`.

    Attributes:
        name: what it is called.
        coefficients: p and q at noise levels; p sigma and q must differ.

    Example:
        >>> x, level = torch.tensor([[2.0]]), torch.tensor([0.5])
        >>> NOISE.data(torch.tensor([[1.0]]), x, level)  # x - sigma eps
        tensor([[1.5000]])
        >>> VELOCITY.of(torch.tensor([[1.5]]), x, level)  # eps - x_0
        tensor([[-0.5000]])
    """

    name: str
    coefficients: Coefficients

    def data(self, predicted: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] from what was predicted of x = x0 + sigma eps.

        Args:
            predicted: y, `[B, *event]`.
            x: `[B, *event]`.
            sigma: positive noise levels, `[B]`.
        """
        p, q = self.coefficients(sigma)
        whole = q - p * sigma
        return per_row(q / whole, x) * x - per_row(sigma / whole, x) * predicted

    def of(self, data: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """What is to be predicted of x = x0 + sigma eps, where x0, or its mean given x, is `data`."""
        p, q = self.coefficients(sigma)
        return per_row(p - q / sigma, x) * data + per_row(q / sigma, x) * x

    def weight(self, sigma: Tensor) -> Tensor:
        """Squared error of the prediction over squared error of the denoised value, (p - q / sigma)^2."""
        p, q = self.coefficients(sigma)
        return (p - q / sigma) ** 2


def _v(sigma: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(1 + sigma**2)
    return -scale * sigma, scale


DATA = Prediction("data", lambda s: (torch.ones_like(s), torch.zeros_like(s)))
NOISE = Prediction("noise", lambda s: (torch.zeros_like(s), torch.ones_like(s)))
SCORE = Prediction("score", lambda s: (torch.zeros_like(s), -1 / s))
V = Prediction("v", _v)
VELOCITY = Prediction("velocity", lambda s: (-torch.ones_like(s), torch.ones_like(s)))


def preconditioned(sigma_data: float = 0.5) -> Prediction:
    r"""What the network within EDM's preconditioning predicts: of unit variance at every noise level.

    (x_0 - c_skip x) / c_out with c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2).

    Args:
        sigma_data: s, the standard deviation of the data.
    """

    def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.sqrt(sigma**2 + sigma_data**2)
        return sigma / (sigma_data * root), -sigma_data / root

    return Prediction("preconditioned", coefficients)


def convert(y: Tensor, x: Tensor, sigma: Tensor, source: Prediction, target: Prediction) -> Tensor:
    """What `target` says where `source` says y, of x = x0 + sigma eps `[B, *event]` at levels `[B]`."""
    return target.of(source.data(y, x, sigma), x, sigma)


def velocity_along(schedule: Schedule) -> Prediction:
    r"""The velocity d x_t / dt = scale' x_0 + (scale sigma)' eps of a schedule's own path, x_t = scale (x_0 + sigma eps).

    For `RectifiedFlow` that is eps - x_0. For VP it is the velocity in its time; `V` is the velocity along the circle
    (scale, scale sigma), at unit speed.
    """

    def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor]:
        t = schedule.time(sigma)

        def path(t: Tensor) -> tuple[Tensor, Tensor]:
            scale = schedule.scale(t)
            return scale, scale * schedule.sigma(t)

        return torch.func.jvp(path, (t,), (torch.ones_like(t),))[1]

    return Prediction("velocity", coefficients)


def _by_name(name: str, schedule: Schedule) -> Prediction:
    """What these words mean for a network that lives on the path of a schedule."""
    if name == "score":  # with respect to x_t: the score in x, over the scale
        return Prediction(
            "score", lambda s: (torch.zeros_like(s), -1 / (s * schedule.scale(schedule.time(s))))
        )
    if name == "velocity":
        return velocity_along(schedule)
    known = {each.name: each for each in (DATA, NOISE, V)}
    if name not in known:
        raise ValueError(
            f"prediction {name!r}: expected 'data', 'noise', 'score', 'v', 'velocity' or a Prediction"
        )
    return known[name]


def denoiser_from(
    network: Callable[..., Tensor], prediction: str | Prediction, schedule: Schedule
) -> Callable[..., Tensor]:
    r"""A denoiser out of a network that predicts something else, in a schedule's own coordinates.

    The network is called as `network(x_t, t)` with x_t = scale(t) (x_0 + sigma(t) eps) and times t `[B]` in [0, 1] (and
    with a condition, where the denoiser is given one). One that counts steps is adapted by a function, for example
    `lambda x, t: unet(x, (t * 1000 - 1).round())`.

    Args:
        network: what predicts.
        prediction: what it predicts: `"data"`, `"noise"`, `"score"` (the gradient of log p_t at x_t), `"v"`
            (Salimans & Ho), `"velocity"` (d x_t / dt of the schedule), or a `Prediction`.
        schedule: whose coordinates.

    Returns:
        `denoiser(x, sigma)` or `denoiser(x, sigma, context)`: E[x0 | x0 + sigma eps = x], x `[B, *event]`, sigma `[B]`.

    Raises:
        ValueError: no such prediction.

    Example:
        >>> from pgen.algorithms.diffusion.schedules import RectifiedFlow
        >>> denoiser = denoiser_from(lambda x, t: torch.zeros_like(x), "velocity", RectifiedFlow())
        >>> denoiser(torch.tensor([[3.0]]), torch.tensor([2.0]))  # not moving: x_0 = x_t = x / (1 + sigma)
        tensor([[1.]])
    """
    kind = prediction if isinstance(prediction, Prediction) else _by_name(prediction, schedule)

    def denoise(x: Tensor, sigma: Tensor, *context: Tensor) -> Tensor:
        t = schedule.time(sigma)
        return kind.data(network(per_row(schedule.scale(t), x) * x, t, *context), x, sigma)

    return denoise
