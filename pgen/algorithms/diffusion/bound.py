r"""A lower bound on log p(x) out of a denoiser: what a diffusion at a latent site gives in place of a log density.

A diffusion is a hierarchical model whose latents are its noisy values: x at sigma_max from a Gaussian, then one small
denoising step after another, and x itself, at last, from N(x_sigma_min, sigma_min^2). With the path x + sigma eps as its
guide, the evidence bound is, in the limit of infinitely many steps,

    log p(x) >= - KL(N(x, sigma_max^2) || N(m, v + sigma_max^2))
                - E int |x - D(x + sigma eps, sigma)|^2 / sigma^3 dsigma            from sigma_min to sigma_max
                - d/2 (1 + log(2 pi sigma_min^2))

The integral is estimated, unbiasedly, and only where it is not known. For data from N(m, v), the denoiser, its error and
the integral have closed forms; so the integral is that one plus the mean of

    (|x - D(x_sigma, sigma)|^2 - |x - D_Gauss(x_sigma, sigma)|^2) / sigma^3

at noise levels uniform in their logarithm. At high noise the two errors cancel, as everything looks Gaussian there, and at
low noise they do as well, both being sigma eps; with a Gaussian for D, nothing is left. In between, `Bound.fitted` finds by
regression what can be foreseen of the difference, from the noise level, |eps|^2 and |x - m|^2, and that is split off as
well. Noise levels are one shifted grid over all rows and particles, so each particle of a row has its own part of the range.

References:
    Kingma, Salimans, Poole & Ho, Variational Diffusion Models, NeurIPS 2021.
    Song, Durkan, Murray & Ermon, Maximum Likelihood Training of Score-Based Diffusion Models, NeurIPS 2021.
    Vahdat, Kreis & Kautz, Score-based Generative Modeling in Latent Space, NeurIPS 2021 (as a prior, its denoiser and the
    latents trained together; there, too, the Gaussian part is split off).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import per_row
from pgen.algorithms.diffusion.guidance import given


@dataclass(frozen=True, eq=False)
class Bound:
    r"""The variational lower bound on the log density of a diffusion.

    The density is that of the law that the denoiser generates, with noise of standard deviation sigma_min on top of what
    is left at that level: sqrt(2) sigma_min in all where the denoiser is exact.

    Attributes:
        sigma_min: least noise level.
        sigma_max: largest; what is left of the data there is taken for Gaussian.
        mean: m of that Gaussian, the data's mean: a number or `[*event]`. At sigma_max it counts for the bound; in what
            is split off, for its variance only.
        variance: v, the data's variance per scalar.
        antithetic: use every noise with both signs, at twice the evaluations.
        profile: what is foreseen of the difference of the errors: at levels evenly spaced in their logarithm, its mean
            and its slopes in |eps|^2 and |x - m|^2, `[3, levels]`; None for nothing. See `fitted`.

    Example:
        >>> x, noise = torch.zeros(3, 2), torch.randn(4, 3, 2)
        >>> exact = lambda x, sigma: x / (1 + sigma[:, None] ** 2)  # of N(0, 1)
        >>> Bound()(x, exact, torch.tensor(0.5), noise)  # log N(0 | 0, 1) in two dimensions: -1.8379
        tensor([-1.8379, -1.8379, -1.8379])
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    mean: Tensor | float = 0.0
    variance: float = 1.0
    antithetic: bool = False
    profile: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not 0 < self.variance < math.inf:
            raise ValueError(
                f"Bound(sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, variance={self.variance}): expected "
                "0 < sigma_min < sigma_max < inf and a positive variance"
            )

    def __call__(
        self,
        x: Tensor,
        denoiser: Callable[..., Tensor],
        u: Tensor,
        noise: Tensor,
        *,
        context: Tensor | None = None,
    ) -> Tensor:
        """An unbiased estimate of the bound, in nats.

        Args:
            x: values, `[B, *event]`; the result is differentiable in them and in the denoiser's parameters.
            denoiser: `denoiser(x, sigma)`, or with a context as third argument; called once, with all particles.
            u: a number uniform on [0, 1), 0-dimensional.
            noise: standard normal, `[particles, B, *event]`.
            context: conditions, `[B, c]`.

        Returns:
            `[B]`.

        Raises:
            ValueError: noise of another shape than values.
        """
        return self._estimates(x, denoiser, u.reshape(1), noise.unsqueeze(0), context)[0]

    @torch.no_grad()
    def fitted(
        self,
        x: Tensor,
        denoiser: Callable[..., Tensor],
        noise: Tensor,
        *,
        context: Tensor | None = None,
        levels: int = 17,
    ) -> Bound:
        """The same bound, to be estimated with less variance: by what a regression foresees of this denoiser's errors.

        What is left in many dimensions is mostly odd in the noise: with `antithetic`, standard deviations fall to a third
        there; in the plane, by a tenth or a half.
        Values and noise from anywhere leave the estimates unbiased (as long as those have noise of their own); the nearer
        to what will be asked for, the better. Takes `levels * particles` evaluations.

        Args:
            x: values like those that will be asked for, `[B, *event]`.
            denoiser: the one that will be.
            noise: standard normal, `[particles, B, *event]`; particles times B at least 10, better 200.
            context: conditions, `[B, c]`.
            levels: noise levels, 2 or more.

        Raises:
            ValueError: fewer than two levels, or noise of another shape than values.
        """
        self._check(x, noise.unsqueeze(0), 1)
        if levels < 2:
            raise ValueError(f"Bound.fitted(levels={levels}): expected 2 or more")
        plain = replace(self, profile=None)
        span = torch.linspace(0, 1, levels, dtype=x.dtype, device=x.device)
        eps = noise.flatten(0, 1)
        features = self._features(x.repeat(len(noise), *[1] * (x.dim() - 1)), eps)  # [P B, 3]
        gains = [plain._gain(x, denoiser, self._sigma(part).expand(len(eps)), eps, context) for part in span]
        design, outcomes = features.cpu().double(), torch.stack(gains, 1).cpu().double()
        moments = design.mT @ design
        ridge = torch.diag(
            1e-6 * moments.diagonal() + 1e-12
        )  # where values do not differ, two features are one
        return replace(self, profile=torch.linalg.solve(moments + ridge, design.mT @ outcomes).to(x))

    def with_error(
        self,
        x: Tensor,
        denoiser: Callable[..., Tensor],
        u: Tensor,
        noise: Tensor,
        *,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The bound, and the standard error of its estimate, from independent repetitions.

        Args:
            x: values, `[B, *event]`.
            denoiser: `denoiser(x, sigma)`, or with a context as third argument.
            u: independent uniform numbers, `[R]` with R >= 2.
            noise: standard normal, `[R, particles, B, *event]`.
            context: conditions, `[B, c]`.

        Returns:
            Value and standard error, `[B]` each; in units of the latter, the error has about Student's law with R - 1
            degrees of freedom.

        Raises:
            ValueError: fewer than two repetitions, or noise of another shape than values.
        """
        if len(u) < 2:
            raise ValueError(
                f"Bound.with_error: got {len(u)} shifts; expected 2 or more, one for each repetition"
            )
        values = self._estimates(x, denoiser, u, noise, context)
        return values.mean(0), values.std(0) / math.sqrt(len(values))

    def _estimates(
        self, x: Tensor, denoiser: Callable[..., Tensor], u: Tensor, noise: Tensor, context: Tensor | None
    ) -> Tensor:
        """Estimates `[R, B]` from shifts `[R]` and noise `[R, particles, B, *event]`."""
        self._check(x, noise, len(u))
        part = self._parts(u.to(x), noise.shape[1], len(x))
        if self.antithetic:
            part, noise = torch.cat([part, part], 1), torch.cat([noise, -noise], 1)
        gain = self._gain(x, denoiser, self._sigma(part).flatten(), noise.flatten(0, 2), context)
        mean = gain.reshape(part.shape).mean(1)
        if self.profile is not None:
            mean = mean - self._foreseen(x, part, noise)
        return self._gaussian(x) + math.log(self.sigma_max / self.sigma_min) * mean

    def _check(self, x: Tensor, noise: Tensor, repetitions: int) -> None:
        if noise.shape[2:] != x.shape or noise.shape[0] != repetitions or not noise.shape[1]:
            raise ValueError(
                f"Bound: got values {tuple(x.shape)}, {repetitions} shift(s) and noise {tuple(noise.shape)}; expected "
                f"noise {(repetitions, 'particles', *x.shape)} (without the first, where there is one shift)"
            )

    def _parts(self, u: Tensor, particles: int, rows: int) -> Tensor:
        """Where in the range, `[R, particles, B]`: a grid over all rows and particles, a coarser one over each row."""
        row = torch.arange(rows, device=u.device, dtype=u.dtype) / max(rows, 1)
        particle = torch.arange(particles, device=u.device, dtype=u.dtype)
        return (u[:, None, None] + (particle[:, None] + row) / particles) % 1

    def _sigma(self, part: Tensor) -> Tensor:
        """Noise levels, uniform in the logarithm."""
        return self.sigma_min * torch.exp(part * math.log(self.sigma_max / self.sigma_min))

    def _features(self, x: Tensor, noise: Tensor) -> Tensor:
        """What the errors depend on: 1, |eps|^2 - d, |x - m|^2 - d v, `[..., B, 3]` for noise `[..., B, *event]`."""
        d = math.prod(x.shape[1:])
        heat = noise.reshape(*noise.shape[: noise.dim() - x.dim() + 1], d).square().sum(-1) - d
        away = (x - self.mean).reshape(len(x), d).square().sum(-1) - d * self.variance
        return torch.stack([torch.ones_like(heat), heat, away.expand(heat.shape)], -1)

    def _foreseen(self, x: Tensor, part: Tensor, noise: Tensor) -> Tensor:
        """Profile minus its exact mean over levels and noise, averaged over particles: `[R, B]`, of mean 0."""
        assert self.profile is not None
        profile = self.profile.to(x)
        place = part * (profile.shape[1] - 1)
        left = place.long().clamp(max=profile.shape[1] - 2)
        at_levels = torch.lerp(profile[:, left], profile[:, left + 1], place - left)  # [3, R, particles, B]
        features = self._features(x, noise)
        seen = (at_levels.movedim(0, -1) * features).sum(-1).mean(1)
        over_levels = torch.trapezoid(profile, dx=1 / (profile.shape[1] - 1))
        return seen - over_levels[0] - over_levels[2] * features[0, 0, :, 2]

    def _gaussian(self, x: Tensor) -> Tensor:
        """The bound of a diffusion whose denoiser is that of N(m, v), in closed form, `[B]`."""
        d, v = math.prod(x.shape[1:]), self.variance
        square = (x - self.mean).reshape(len(x), d).square().sum(-1)
        low, high = self.sigma_min**2, self.sigma_max**2
        below, above = low / (v + low), high / (v + high)
        # its errors are (1 - k) (x - m) - k sigma eps with k = v / (v + sigma^2)
        of_data = square * (1 / (v + low) - 1 / (v + high)) / 2
        of_noise = d * (math.log(above / below) - (above - below)) / 2
        divergence = (square - d * v) / (v + high) / 2 - d * math.log(above) / 2
        reconstruction = d * (1 + math.log(2 * math.pi * low)) / 2
        return -(divergence + of_data + of_noise + reconstruction)

    def _gain(
        self,
        x: Tensor,
        denoiser: Callable[..., Tensor],
        sigma: Tensor,
        noise: Tensor,
        context: Tensor | None,
    ) -> Tensor:
        """How much less the denoiser errs than the Gaussian's, over sigma^2: for copies of all rows, one after another."""
        copies = len(noise) // max(len(x), 1)
        data = x.repeat(copies, *[1] * (x.dim() - 1))
        repeated = None if context is None else context.expand(len(x), -1).repeat(copies, 1)
        noisy = data + per_row(sigma, data) * noise
        found = given(denoiser, repeated)(noisy, sigma)
        gaussian = self.mean + per_row(self.variance / (self.variance + sigma**2), data) * (noisy - self.mean)
        # |x - G|^2 - |x - D|^2 as a product: no difference of large numbers where the two are near
        gain = (found - gaussian) * (2 * data - gaussian - found)
        return gain.reshape(len(gain), -1).sum(-1) / sigma**2
