r"""Langevin steps for discrete variables: all of them are proposed at once, each by its own gradient.

With x the one-hot code, g the gradient of the log density by it and α the step size, the Langevin proposal
N(x'; x + α g / 2, α), restricted to codes, comes apart into the variables:

.. math:: q(x' \mid x) = \prod_i q_i(z'_i \mid x), \qquad
          q_i(k \mid x) \propto \exp\Big(\tfrac{1}{2} (g_{ik} - g_{i z_i}) - \tfrac{1}{\alpha} [k \ne z_i]\Big)

since two codes of a variable are at a squared distance of 2, or 0. (Of bits that are coded by one number the distance is 1:
α here is twice the α there.) The sum over variables is what `GibbsWithGradients` spends on a single change; here a step
costs the same one gradient and changes many variables, as many as the step size allows: it is best adapted so that about
0.57 of the proposals are accepted. A proposal of everything is only as good as the linear model of the density is over its
whole length, so strongly coupled variables ask for small steps.

References:
    A Langevin-like Sampler for Discrete Distributions (Zhang, Liu & Liu, ICML 2022), arXiv:2206.09914. Optimal Scaling
    for Locally Balanced Proposals in Discrete Spaces (Sun, Dai & Schuurmans, NeurIPS 2022), arXiv:2209.08183: accept
    0.574 of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, Tuning, where
from pgen.algorithms.kernels.gibbs import (
    RelaxedDensity,
    RelaxedState,
    check_cardinalities,
    one_hot,
    outside,
    pick_of,
    report,
)
from pgen.algorithms.kernels.hmc import gained


@dataclass(frozen=True)
class DiscreteLangevin:
    """Propose a value for every variable at once, by a first-order model of the density; Metropolis-corrected.

    It is used as `GibbsWithGradients` is: positions are indices `[C, m]`, the density takes one-hot codes `[C, m, K]`
    and gives values `[C]` and gradients `[C, m, K]`.

    Args:
        cardinalities: number of values of each of the m variables.
        step_size: α, where no tuning is given. With a flat density and m variables of two values, `m / (1 + e^(1/α))`
            of them are changed.
        dtype: of the one-hot code that the density is given; torch's default if None.

    Raises:
        ValueError: a cardinality is below 1, or the step size is not positive.

    Example:
        >>> field = torch.tensor([[0.0, 1.0], [0.0, -1.0]])  # log odds of two bits
        >>> target = lambda x: ((x * field).sum((1, 2)), field.expand_as(x))
        >>> _ = torch.manual_seed(0)
        >>> kernel = DiscreteLangevin((2, 2), step_size=2.0)
        >>> state = kernel.init(torch.zeros(5000, 2, dtype=torch.long), target)
        >>> for _ in range(20):
        ...     state, info = kernel.step(state, None, target)
        >>> bool((state.position.float().mean(0) - torch.tensor([0.731, 0.269])).abs().max() < 0.05)
        True
    """

    cardinalities: tuple[int, ...]
    step_size: float = 0.5
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_cardinalities(self.cardinalities)
        if not self.step_size > 0:
            raise ValueError(f"DiscreteLangevin(step_size=...) is positive, got {self.step_size}")

    def init(self, position: Tensor, target: RelaxedDensity) -> RelaxedState:
        """The state at `position` `[C, m]`."""
        return RelaxedState(position, *target(one_hot(position, self.cardinalities, self.dtype)))

    def step(
        self, state: RelaxedState, tuning: Tuning | None, target: RelaxedDensity
    ) -> tuple[RelaxedState, Info]:
        """One proposal to every chain; with a tuning, of its step size."""
        z, log_density, gradient = state
        step_size = self.step_size if tuning is None else tuning.step_size
        logits = self._logits(z, gradient, step_size)
        new = pick_of(logits.exp()).squeeze(2)
        found = RelaxedState(new, *target(one_hot(new, self.cardinalities, self.dtype)))
        back = self._logits(new, found.gradient, step_size)
        gain = gained(found.log_density + _of(back, z), log_density + _of(logits, new))
        taken = torch.rand_like(gain).log() < gain
        kept = where(taken, found, state)
        return kept, report(gain.clamp(max=0.0).exp(), kept.log_density, 1)

    def _logits(self, z: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """Log probabilities of the values of each variable, `[C, m, K]`."""
        present = z.unsqueeze(2)
        logits = (gradient - gradient.gather(2, present)) / 2 - 1 / step_size
        logits = logits.scatter(2, present, 0.0)
        if len(set(self.cardinalities)) > 1:
            logits = logits.masked_fill(outside(self.cardinalities, z.device), -math.inf)
        return logits.log_softmax(2)


def _of(logits: Tensor, z: Tensor) -> Tensor:
    """The log probability of values that are drawn one by one, `[C]`."""
    return logits.gather(2, z.unsqueeze(2)).sum((1, 2))
