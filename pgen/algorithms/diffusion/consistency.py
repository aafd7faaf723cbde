r"""Consistency models: from any noisy value to the end of its path, in one evaluation.

A consistency function f(x, sigma) is constant along the probability-flow ODE and the identity at sigma_min. It is learned
from pairs of neighbouring noise levels a < b of a grid that gets finer as training goes on,

    distillation    distance(f(x_b, b), sg f(x_a, a)),   x_a one step of the ODE from x_b, by a teacher's denoiser
    training        the same with x_a = x_0 + a eps and x_b = x_0 + b eps: no teacher

where sg stops gradients. Samples are f(sigma_max eps, sigma_max); or, better, that again with noise, for a few levels.
Networks must be the identity at sigma_min by construction: `end_of_path` makes one out of any network, and
`pgen.nn.Preconditioned(network, sigma_data, sigma_min=...)` is one.

References:
    Song, Dhariwal, Chen & Sutskever, Consistency Models, ICML 2023.
    Song & Dhariwal, Improved Techniques for Training Consistency Models, ICLR 2024 (the defaults here: pseudo-Huber
    distance, the network as its own target, log-normal levels, doubling grids).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, per_row
from pgen.algorithms.diffusion.guidance import given


@dataclass(frozen=True)
class Curriculum:
    r"""Which pairs of noise levels to train on: Karras' grid, doubled again and again during training.

    The grid has `first` levels at the beginning, and twice as many after each of equally long parts of the run, up to
    `last`. Pairs are drawn from it with the probabilities that a log-normal law gives to the intervals.

    Attributes:
        steps: of the whole run.
        first: number of intervals at the beginning.
        last: at the end.
        sigma_min: least level.
        sigma_max: largest.
        rho: curvature of the grid.
        log_mean: of the log-normal law.
        log_std: of the log-normal law.

    Example:
        >>> [Curriculum(1000, first=10, last=80).intervals(step) for step in (0, 250, 500, 999)]
        [10, 20, 40, 80]
    """

    steps: int
    first: int = 10
    last: int = 1280
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log_mean: float = -1.1
    log_std: float = 2.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.first <= self.last:
            raise ValueError(
                f"Curriculum(steps={self.steps}, first={self.first}, last={self.last}): expected 1 <= first <= last "
                "and 1 step or more"
            )
        if not 0 < self.sigma_min < self.sigma_max < math.inf or self.rho <= 0 or self.log_std <= 0:
            raise ValueError(
                f"Curriculum(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, rho={self.rho}, "
                f"log_std={self.log_std}): expected 0 < sigma_min < sigma_max < inf, rho > 0 and log_std > 0"
            )

    def intervals(self, step: int) -> int:
        """How many intervals the grid has at a step, counted from 0."""
        return int(self._intervals(torch.tensor(float(step), dtype=torch.float64)))

    def grid(self, step: int) -> Tensor:
        """Noise levels, increasing, `[intervals + 1]`, float64."""
        count = self.intervals(step)
        return self._level(torch.arange(count + 1, dtype=torch.float64) / count)

    def levels(self, step: int | Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbouring levels (lower, upper), `[B]` each, from uniform numbers `[B]`.

        A level of the log-normal law within the range, and the interval it falls into: no grid is made, and nothing turns
        on the step, which may be a tensor of no dimensions.
        """
        number = step.double() if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float64)
        count = self._intervals(number.to(u.device))
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64, device=u.device)
        below, above = torch.special.ndtr((ends.log() - self.log_mean) / self.log_std)
        quantile = torch.special.ndtri(below + u.double() * (above - below))
        level = (self.log_mean + self.log_std * quantile).exp().clamp(self.sigma_min, self.sigma_max)
        low, high = self._roots
        place = (count * (level ** (1 / self.rho) - low) / (high - low)).floor().clamp(min=0)
        place = torch.minimum(place, count - 1)
        return self._level(place / count).to(u), self._level((place + 1) / count).to(u)

    def _intervals(self, step: Tensor) -> Tensor:
        stages = math.floor(math.log2(self.last / self.first)) + 1
        stage = (step * stages / self.steps).floor().clamp(max=stages)
        return (self.first * 2**stage).clamp(max=self.last)

    def _level(self, part: Tensor) -> Tensor:
        """Noise levels at parts of the grid, from 0 (least) to 1."""
        low, high = self._roots
        return ((low + part * (high - low)) ** self.rho).clamp(self.sigma_min, self.sigma_max)

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)


def end_of_path(network: Denoiser, sigma_min: float) -> Denoiser:
    r"""A function that is the identity at sigma_min, out of any network that has the form of a denoiser.

    .. math:: f(x, \sigma) = x + (1 - \sigma_{min} / \sigma)\,(D(x, \sigma) - x)

    This is one step of Euler's method along the probability flow, from sigma to sigma_min: where D is the denoiser, f is a
    first guess of the path's end; a network that is trained through f learns the D with which one step is right. (With the
    scales of `pgen.nn.Preconditioned` for D, f has those of Song et al. 2023, but for terms of sigma_min / sigma.)

    Args:
        network: from values `[B, *event]` and noise levels `[B]` to values.
        sigma_min: least level.
    """

    def end(x: Tensor, sigma: Tensor) -> Tensor:
        return x + per_row((1 - sigma_min / sigma).clamp(min=0), x) * (network(x, sigma) - x)

    return end


def pseudo_huber(error: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|error|^2 + c^2) - c of each row `[B, *event]`: square where small, linear where large; `[B]`.

    Args:
        error: differences.
        c: where one becomes the other; None: 0.00054 sqrt(d), the authors' choice.
    """
    flat = error.reshape(len(error), -1)
    width = 0.00054 * math.sqrt(flat.shape[1]) if c is None else c
    square = flat.square().sum(-1)
    return square / (torch.sqrt(square + width**2) + width)  # the difference, without its cancellation


def consistency_training(
    model: Callable[..., Tensor],
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    noise: Tensor,
    *,
    target: Callable[..., Tensor] | None = None,
    context: Tensor | None = None,
    c: float | None = None,
) -> Tensor:
    """Loss of a consistency model on data alone, weighted by 1 / (upper - lower).

    Args:
        model: `model(x, sigma)`, or with a context as third argument; the identity at sigma_min.
        x: data, `[B, *event]`.
        lower: noise levels, `[B]`.
        upper: the next larger ones, `[B]`.
        noise: standard normal, shape of x.
        target: what gives the value at the lower level, for example a moving average of the model; None: the model.
        context: conditions, `[B, c]`.
        c: of the pseudo-Huber distance.

    Returns:
        One loss for each row, `[B]`.
    """
    start = x + per_row(lower, x) * noise
    return _loss(model, target, x + per_row(upper, x) * noise, start, lower, upper, context, c)


def consistency_distillation(
    model: Callable[..., Tensor],
    teacher: Callable[..., Tensor],
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    noise: Tensor,
    *,
    target: Callable[..., Tensor] | None = None,
    context: Tensor | None = None,
    c: float | None = None,
) -> Tensor:
    """Loss of a consistency model that follows a teacher's probability-flow ODE, weighted by 1 / (upper - lower).

    Args:
        model: as for `consistency_training`.
        teacher: a denoiser, for example a guided one: its guidance is then distilled as well.
        x: data, `[B, *event]`.
        lower: noise levels, `[B]`.
        upper: the next larger ones, `[B]`.
        noise: standard normal, shape of x.
        target: as for `consistency_training`.
        context: conditions, `[B, c]`; the teacher is given them too.
        c: of the pseudo-Huber distance.

    Returns:
        One loss for each row, `[B]`.
    """
    noisy = x + per_row(upper, x) * noise
    with torch.no_grad():
        start = heun(given(teacher, context), noisy, upper, lower)
    return _loss(model, target, noisy, start, lower, upper, context, c)


def heun(denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step of Heun's method along dx / dsigma = (x - D) / sigma, each row between levels `[B]` of its own."""
    step = per_row(sigma_next - sigma, x)
    slope = (x - denoiser(x, sigma)) / per_row(sigma, x)
    there = x + step * slope
    slope_there = (there - denoiser(there, sigma_next)) / per_row(sigma_next, x)
    return x + step * (slope + slope_there) / 2


def _loss(
    model: Callable[..., Tensor],
    target: Callable[..., Tensor] | None,
    noisy: Tensor,
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    context: Tensor | None,
    c: float | None,
) -> Tensor:
    with torch.no_grad():
        goal = given(model if target is None else target, context)(start, lower)
    return pseudo_huber(given(model, context)(noisy, upper) - goal, c) / (upper - lower)
