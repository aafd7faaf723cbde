"""Denoising diffusion restoration models: coordinates of the operator's singular vectors, each with its own noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.operators.base import Spectrum
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian


@dataclass(frozen=True, eq=False)
class DDRM:
    r"""A solver with a linear-Gaussian observation inside: the field it is given is the prior's.

    In coordinates of V, an observed one is seen as y_i = (U'y)_i / s_i with standard deviation n_i = sd / s_i. From noise
    level s to t, with d = V' D(x_s, s):

        n_i > t:     d_i + sqrt(1 - eta^2) t (y_i - d_i) / n_i + eta t z_i
        n_i <= t:    (1 - eta_b) d_i + eta_b y_i + sqrt(t^2 - eta_b^2 n_i^2) z_i
        not seen:    d_i + sqrt(1 - eta^2) t (x_s - d)_i / s + eta t z_i

    Start from `init`.

    Attributes:
        observation: with an operator that knows its singular values, and one variance.
        eta: noise of unobserved coordinates, in [0, 1].
        eta_b: weight of the observation, in [0, 1].

    Raises:
        ValueError: the observation is none of these.

    References:
        Kawar, Elad, Ermon & Song, Denoising Diffusion Restoration Models, NeurIPS 2022, equations 7 and 8.
    """

    observation: LinearGaussian
    eta: float = 0.85
    eta_b: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges and observation."""
        if not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise ValueError(f"DDRM(eta={self.eta}, eta_b={self.eta_b}): expected numbers in [0, 1]")
        self._spectrum()

    def init(self, sigma: float | Tensor, like: Tensor, field: Field) -> Tensor:
        """Values at the first noise level: noise, around what was seen.

        Args:
            sigma: the first noise level.
            like: of the shape of what is wanted, `[B, *event]`.
            field: whose random numbers are taken.
        """
        z, top = field.noise(like), float(sigma)
        spectrum, seen, noise = self._seen(like)
        c = spectrum.project(z)
        start = seen + (top**2 - noise**2).clamp(min=0).sqrt() * c
        return top * z + spectrum.expand(torch.where(noise <= top, start, top * c) - top * c)

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, fn: Field) -> Tensor:
        """From noise level t down to t_next."""
        high, low = float(t), float(t_next)
        denoised, z = fn(x, t), fn.noise(x)
        kept = math.sqrt(1 - self.eta**2)
        free = denoised + kept * low / high * (x - denoised) + self.eta * low * z
        spectrum, seen, noise = self._seen(x)
        d, c = spectrum.project(denoised), spectrum.project(z)
        vague = d + kept * low * (seen - d) / noise + self.eta * low * c
        clear = torch.lerp(d, seen, self.eta_b)
        clear = clear + (low**2 - self.eta_b**2 * noise**2).clamp(min=0).sqrt() * c
        return free + spectrum.expand(torch.where(noise > low, vague, clear) - spectrum.project(free))

    def _seen(self, like: Tensor) -> tuple[Spectrum, Tensor, Tensor]:
        """The decomposition, what is seen in its coordinates, and the standard deviations there."""
        spectrum = self._spectrum()
        y = self.observation.y.to(like) - self.observation.offset
        values = spectrum.values.to(like)
        seen = spectrum.project_output(y) / values
        return spectrum, seen, torch.as_tensor(self.observation.variance).to(like).max().sqrt() / values

    def _spectrum(self) -> Spectrum:
        spectrum = self.observation.operator.svd()
        variance = torch.as_tensor(self.observation.variance)
        if spectrum is None or not bool((variance == variance.reshape(-1)[0]).all()):
            raise ValueError(
                f"DDRM: got {type(self.observation.operator).__name__} and variance {self.observation.variance}; "
                "expected an operator whose `svd` is known (Dense(as_matrix(operator, shape)) is one) and one variance"
            )
        return spectrum
