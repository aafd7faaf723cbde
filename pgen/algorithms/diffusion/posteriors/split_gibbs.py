r"""Split Gibbs sampling: the likelihood and the diffusion prior take turns, tied by a spring of shrinking length.

    pi(x, z) ~ p(x) p(y | z) exp(-|x - z|^2 / (2 rho^2))

    z | x, y:   exact for linear-Gaussian observations; Metropolis-adjusted Langevin moves for any other likelihood
    x | z:      the prior's law of x_0 given x_0 + rho eps = z: the reverse diffusion, begun at noise level rho from z

As rho -> 0, x is a draw of the posterior. Large rho first lets modes be reached; the last value is the bias.

References:
    Vono, Dobigeon & Chainais, Split-and-Augmented Gibbs Sampler, IEEE TSP 2019. Xu & Chi, Provably Robust Score-Based
    Diffusion Posterior Sampling for Plug-and-Play Image Reconstruction, NeurIPS 2024. Wu, Sun, Chen, Zhang, Yue &
    Bouman, Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors, NeurIPS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field, per_row
from pgen.algorithms.diffusion.posteriors.guide import (
    LogLikelihood,
    log_likelihood_and_gradient,
    over_event,
)
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian
from pgen.algorithms.diffusion.posteriors.resampling import uniform_rows
from pgen.algorithms.diffusion.solve import solve
from pgen.algorithms.diffusion.solvers.ancestral import Ancestral
from pgen.algorithms.diffusion.solvers.state import Solver


@dataclass(frozen=True, eq=False)
class SplitGibbs:
    """Split Gibbs sampling; see the module.

    Attributes:
        likelihood: a `LinearGaussian`, or log p(y | x_0) `[B]` of any kind, differentiable.
        levels: rho of each sweep, decreasing at first, then as many sweeps at the last as are wanted.
        steps: of the solver in a sweep, at most.
        floor: noise level where a sweep's diffusion ends (then a last step to 0).
        moves: Langevin moves for a likelihood of any kind.
        solver: a stochastic one: x | z is a law, not a value.

    Raises:
        ValueError: a setting is out of its range.
    """

    likelihood: LinearGaussian | LogLikelihood
    levels: tuple[float, ...]
    steps: int = 20
    floor: float = 0.01
    moves: int = 20
    solver: Solver = field(default_factory=Ancestral)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.levels or min(self.levels) <= 0 or self.steps < 1 or self.moves < 1 or self.floor <= 0:
            raise ValueError(
                f"SplitGibbs(levels={self.levels}, steps={self.steps}, floor={self.floor}, moves={self.moves}): expected "
                "positive numbers"
            )

    def sample(self, x: Tensor, prior: Field) -> Tensor:
        """x_0 after all sweeps, `[B, *event]`.

        Args:
            x: where to begin, `[B, *event]`: for example zeros, or draws of the prior.
            prior: the denoiser and the random numbers.
        """
        with torch.no_grad():
            size = x.new_full((len(x),), 0.5)
            for rho in self.levels:
                if isinstance(self.likelihood, LinearGaussian):
                    z = gaussian_step(self.likelihood, x, rho, prior)
                else:
                    z, size = langevin_step(self.likelihood, x, rho, prior, self.moves, size)
                x = solve(z, self._grid(rho), prior, self.solver)
        return x

    def _grid(self, rho: float) -> Tensor:
        if rho <= self.floor:
            return torch.tensor([rho, 0.0], dtype=torch.float64)
        start, end = torch.tensor([rho, self.floor], dtype=torch.float64).log().tolist()
        inner = torch.linspace(start, end, self.steps, dtype=torch.float64).exp()
        return torch.cat([inner, inner.new_zeros(1)])


def gaussian_step(observation: LinearGaussian, x: Tensor, rho: float, noise: Field) -> Tensor:
    """An exact draw of z ~ p(y | z) N(z; x, rho^2 I), by Matheron's rule: draw z and y without data, then correct z."""
    z = x + rho * noise.noise(x)
    seen = observation.residual(z)
    missed = seen - noise.noise(seen) / observation.root(seen)
    spread = x.new_full((len(x),), rho**2)
    return z + rho**2 * observation.operator.adjoint(observation.solve(missed, spread))


def langevin_step(
    log_likelihood: LogLikelihood, x: Tensor, rho: float, noise: Field, moves: int, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Metropolis-adjusted Langevin moves for z ~ p(y | z) N(z; x, rho^2 I), from x.

    Args:
        log_likelihood: log p(y | z), `[B]`.
        x: the spring's other end, `[B, *event]`.
        rho: its length.
        noise: whose random numbers are taken.
        moves: how many.
        size: step sizes in units of rho^2, `[B]`; they follow the acceptance and come back.
    """

    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = log_likelihood_and_gradient(log_likelihood, z)
        return value - over_event((z - x).square()) / (2 * rho**2), gradient - (z - x) / rho**2

    z = x + 0.0
    value, gradient = target(z)
    for n in range(moves):
        step = per_row(size * rho**2, x)
        drift = z + step / 2 * gradient
        proposed = drift + step.sqrt() * noise.noise(x)
        there, slope = target(proposed)
        forth, back = (proposed - drift).square(), (z - proposed - step / 2 * slope).square()
        log = there - value + over_event((forth - back) / (2 * step))
        accept = torch.nan_to_num(log, nan=-torch.inf).clamp(max=0).exp()
        taken = uniform_rows(noise, x).to(accept) < accept
        row = per_row(taken, x)
        z, gradient = torch.where(row, proposed, z), torch.where(row, slope, gradient)
        value = torch.where(taken, there, value)
        size = size * ((accept - 0.574) / (n + 1) ** 0.6).exp()
    return z, size
