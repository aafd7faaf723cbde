r"""The reverse diffusion with steps chosen by their error, each row's own, on one Brownian path.

In y = x / sigma^2 and the clock theta = 1 / sigma^2, the signal-to-noise ratio, the reverse of x = x_0 + sigma eps is

    dy = D(x, sigma) dtheta + dB(theta)

with a Brownian motion B: noise that does not depend on the state, and a drift that is the denoiser itself. Euler's step is
then exact where D does not change. Two stages of Roessler's SRA1 use the mean of B over the step besides its end, which is
what D sees of the noise on the way, and have strong order 3/2; without it samples lose variance. The difference from
Euler's step is the error estimate, as in Jolicoeur-Martineau et al.'s solver, and the better of the two is kept.
A rejected step is tried again on the same path (a virtual Brownian tree): redrawing the noise of rejected steps would
prefer noise that makes errors small, and bias the samples.

References:
    Jolicoeur-Martineau, Li, Piche-Taillefer, Kachman & Mitliagkas, Gotta Go Fast When Generating Data with Score-Based
    Models, arXiv:2105.14080, 2021 (algorithm 1).
    Roessler, Runge-Kutta Methods for the Strong Approximation of Solutions of Stochastic Differential Equations, SIAM J.
    Numer. Anal. 48, 2010 (SRA1).
    El Alaoui & Montanari, An information-theoretic view of stochastic localization, IEEE Trans. Inf. Theory 68, 2022
    (the coordinates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pgen.algorithms.diffusion.adaptive_ode import (
    Solution,
    between,
    error_norm,
    require_levels,
    require_progress,
)
from pgen.algorithms.diffusion.brownian import BrownianTree
from pgen.algorithms.diffusion.field import Field, per_row

_SAFETY, _POWER, _LEAST, _MOST = 0.9, 0.6, 0.2, 5.0
_GRID = 4e-3  # ratio of neighbouring times of the Brownian tree, less 1


def adaptive_sde(
    x: Tensor,
    sigma_start: float,
    sigma_end: float,
    field: Field,
    rtol: float = 0.01,
    atol: float = 0.01,
    *,
    most: int = 10_000,
) -> Solution:
    r"""Follow the reverse diffusion from a noise level to a smaller one.

    A step is accepted where the root mean square of error / (atol + rtol |x|) over a row is at most 1. The error is that
    of a single path: samples' law converges sooner.

    Args:
        x: values `[B, *event]` at `sigma_start`.
        sigma_start: noise level to start from.
        sigma_end: noise level to end at, smaller and positive.
        field: the denoiser, with random numbers.
        rtol: tolerance relative to x.
        atol: absolute tolerance.
        most: evaluations of the denoiser for any row.

    Raises:
        ValueError: noise levels or tolerances that are not positive; a field without random numbers.
        RuntimeError: rows that need more evaluations, or whose values are not finite.

    Example:
        >>> from pgen.algorithms.diffusion.mixture import Mixture
        >>> from pgen.algorithms.diffusion.noise import Streams
        >>> field = Field(Mixture(torch.tensor([[-1.0], [1.0]]), scale=0.1), Streams(0, rows=4))
        >>> x = adaptive_sde(20 * field.noise(torch.empty(4, 1)), 20.0, 1e-3, field).x
        >>> bool(((x.abs() - 1).abs() < 0.5).all())
        True
    """
    require_levels(sigma_start, sigma_end, rtol, atol)
    if not sigma_end < sigma_start:
        raise ValueError(
            f"got noise levels from {sigma_start} to {sigma_end}; expected the reverse diffusion to go down"
        )
    if field.streams is None:
        raise ValueError(
            "the reverse diffusion draws noise, and the field has none; expected Field(denoiser, Streams(seed, rows=len(x)))"
        )
    batch = len(x)
    field.draws += 1
    tree = BrownianTree(field.streams, sigma_start**-2, sigma_end**-2, _GRID, x, key=field.draws)
    time = torch.full((batch,), tree.low, dtype=torch.float64)
    step = torch.full_like(time, 0.1)  # in log theta
    evaluations, rejected = torch.ones(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    motion, denoised = torch.zeros_like(x), field(x, sigma_start)
    while True:
        going = time < tree.high * (1 - 1e-9)
        if not going.any():
            return Solution(x, evaluations, rejected)
        require_progress(going & ((evaluations + 2 > most) | step.isnan()), time**-0.5, evaluations, step)
        goal = torch.where(going, (time * step.exp()).clamp(max=tree.high), time)
        end = tree.nearest(goal)
        end = torch.where(
            going & (end <= time * (1 + 1e-9)),
            tree.nearest((time * (1 + 1.5 * _GRID)).clamp(max=tree.high)),
            end,
        )
        end = torch.where(going, end, time)
        reached, middle = tree(end), time + 0.75 * (end - time)
        mean = (tree((time + end) / 2) - motion) / 2 + (reached - motion) / 4  # of the noise over the step
        stage = _stage(x, denoised, 1.5 * mean, time, middle)
        ahead = field(stage, middle**-0.5)
        first = _stage(x, denoised, reached - motion, time, end)
        change = _on((end - time) / end, x) * (ahead - denoised) * (2 / 3)
        new = first + change
        error = error_norm(change, x, new, end**-0.5, rtol, atol)
        # On the grid's least step there is nothing to take back: the path has no more detail.
        good = going & ((error <= 1) | (end <= time * (1 + 1.01 * _GRID)) & error.isfinite())
        evaluations += going.long()
        rejected += going & ~good
        factor = _SAFETY * error.nan_to_num(math.inf).clamp(min=1e-6) ** (-_POWER)
        taken = (end / time).log()
        # Much smaller after a rejection, or the grid might round the step to what it was.
        factor = torch.where(good, factor.clamp(_LEAST, _MOST), factor.clamp(_LEAST, 0.7))
        step = torch.where(going, torch.where(good, step, taken) * factor, step).clamp(max=1.0)
        step = torch.where(going & ~error.isfinite() & (taken <= 2 * _GRID), math.nan, step)
        on = per_row(good.to(x.device), x)
        x, motion, time = (
            torch.where(on, new, x),
            torch.where(on, reached, motion),
            torch.where(good, end, time),
        )
        if good.any():
            # Rows that were taken back keep what they know at their start.
            denoised = torch.where(on, field(x, time**-0.5), denoised)
            evaluations += good.long()


@dataclass(frozen=True)
class AdaptiveSDE:
    """The same as a solver: between two levels of a grid, as many steps as the tolerance takes.

    Attributes:
        rtol: tolerance relative to x.
        atol: absolute tolerance.
        sigma_min: a last level of 0 is reached by way of this one (or not at all, where the step starts below it), and
            taking the denoised value there.
        most: evaluations of the denoiser for any row and step.
    """

    rtol: float = 0.01
    atol: float = 0.01
    sigma_min: float = 0.002
    most: int = 10_000

    only_down: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_levels(self.sigma_min, self.sigma_min, self.rtol, self.atol)

    def step(self, x: Tensor, t: Tensor | float, t_next: Tensor | float, fn: Field) -> Tensor:
        """From noise level t to noise level t_next."""

        def follow(x: Tensor, start: float, end: float) -> Tensor:
            return adaptive_sde(x, start, end, fn, self.rtol, self.atol, most=self.most).x

        return between(x, float(t), float(t_next), fn, follow, self.sigma_min)


def _stage(x: Tensor, denoised: Tensor, noise: Tensor, time: Tensor, end: Tensor) -> Tensor:
    """x at another theta: y grows by D times the change of theta, and by noise."""
    return _on(time / end, x) * x + _on((end - time) / end, x) * denoised + noise / _on(end, x)


def _on(values: Tensor, like: Tensor) -> Tensor:
    """Numbers `[B]` of the CPU's float64, to be multiplied with rows."""
    return per_row(values.to(like.dtype).to(like.device), like)
