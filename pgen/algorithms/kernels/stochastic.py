r"""Langevin and Hamiltonian dynamics on mini-batch gradients: no correction, so small or shrinking steps.

The target may return another estimate of the log density and its gradient at every call, such as N/n times that of
n data drawn out of N (plus the prior). Nothing is kept of an evaluation, and no proposal is refused; what is
sampled comes near the posterior as steps go to zero.

The step size h follows the convention of the other kernels: noise of size h, drift :math:`h^2 / 2`. The
:math:`\varepsilon_t` of Welling & Teh is :math:`h_t^2`, and so is the learning rate η of Chen, Fox & Guestrin. A
`Schedule` shrinks it as

.. math:: \varepsilon_t = h_t^2 = h^2\, (1 + t / b)^{-\gamma}

Draws with a shrinking step are to be weighted by :math:`\varepsilon_t` (Welling & Teh, equation 11);
`Schedule.learning_rate` gives it.

References:
    Bayesian learning via stochastic gradient Langevin dynamics (Welling & Teh, ICML 2011). Stochastic gradient
    Hamiltonian Monte Carlo (Chen, Fox & Guestrin, ICML 2014), arXiv:1402.4102. Preconditioned stochastic gradient
    Langevin dynamics for deep neural networks (Li, Chen, Carlson & Carin, AAAI 2016), arXiv:1512.07666.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Info, LogDensity, Tuning, pull, push
from pgen.algorithms.kernels.hmc import standard_normal


@dataclass(frozen=True)
class Schedule:
    """How the squared step shrinks: `(1 + t / offset) ** -decay` times what it was.

    Attributes:
        decay: the exponent γ. 0 keeps the step (and with it a bias). In (0.5, 1] steps add up to infinity while
            their squares do not, and the bias goes away.
        offset: iterations b until the decline sets in.

    Example:
        >>> Schedule(decay=1.0, offset=10.0).learning_rate(torch.tensor(2.0), torch.tensor(10))
        tensor(2.0000)
    """

    decay: float = 0.0
    offset: float = 1.0

    def __post_init__(self) -> None:
        """Refuse steps that grow, and schedules that start at no step."""
        if not (self.decay >= 0 and self.offset > 0):
            raise ValueError(
                f"Schedule(decay={self.decay}, offset={self.offset}): expected decay >= 0 (0 for a constant "
                "step; in (0.5, 1] for one that shrinks) and offset > 0"
            )

    def step_size(self, first: Tensor, iteration: Tensor) -> Tensor:
        """The step `h_t` of iteration t, from the first one."""
        if not self.decay:
            return first
        return first * (1 + iteration.to(first.dtype) / self.offset) ** (-self.decay / 2)

    def learning_rate(self, first: Tensor, iteration: Tensor) -> Tensor:
        """The squared step `h_t ** 2`: the weight of a draw."""
        return self.step_size(first, iteration).square()


CONSTANT = Schedule()


class Drifter(NamedTuple):
    """State of `SGLD`.

    Attributes:
        position: `[C, d]`.
        square: running mean of squared gradients in whitened coordinates, `[C, d]`; stays 0 without RMSprop.
        iteration: `[]`.
    """

    position: Tensor
    square: Tensor
    iteration: Tensor


@dataclass(frozen=True)
class SGLD:
    r"""Stochastic gradient Langevin dynamics, optionally with the RMSprop preconditioner.

    .. math:: x' = x + \tfrac{1}{2} h_t^2\, G\, g + h_t\, G^{1/2} \xi, \qquad
              G = \frac{1}{\lambda + \sqrt{v}}, \quad v \leftarrow \alpha v + (1 - \alpha)\, g^2

    in whitened coordinates, with :math:`G = 1` where `rmsprop` is 0. With it the step is in units of the gradient:
    directions with gradients of size s take steps of size about :math:`h / \sqrt s`. As in the paper's experiments
    the term :math:`\Gamma` for the change of G with position is left out; Li et al. bound the bias that leaves.

    Attributes:
        schedule: how steps shrink.
        rmsprop: the α of the running mean, such as 0.99; 0 for none.
        floor: the λ that keeps steps finite where gradients vanish.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> data = torch.ones(100)
        >>> def target(q):  # N(q, 1) data by mini-batches of 10, N(0, 1) prior
        ...     batch = data[torch.randint(100, (10,))]
        ...     gradient = -q + 10 * (batch - q).sum(-1, keepdim=True)
        ...     return -q.square().sum(-1) / 2, gradient
        >>> kernel = SGLD(Schedule(decay=0.6, offset=100.0))
        >>> state = kernel.init(torch.zeros(4, 1), target)
        >>> for _ in range(3):
        ...     state, info = kernel.step(state, untuned(state.position), target)
        >>> state.iteration
        tensor(3)
    """

    schedule: Schedule = CONSTANT
    rmsprop: float = 0.0
    floor: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse what makes no running mean."""
        if not (0 <= self.rmsprop < 1 and self.floor > 0):
            raise ValueError(
                f"SGLD(rmsprop={self.rmsprop}, floor={self.floor}): expected 0 <= rmsprop < 1 (0 for no "
                "preconditioner, 0.99 as in the paper) and floor > 0"
            )

    def init(self, position: Tensor, target: LogDensity) -> Drifter:
        """The state at positions `[C, d]`; evaluates the target only where it must know a gradient."""
        square = torch.zeros_like(position)
        if self.rmsprop:  # a mean that began at zero would take giant first steps
            square = target(position)[1].square()
        return Drifter(position, square, torch.zeros((), dtype=torch.int64, device=position.device))

    def step(self, state: Drifter, tuning: Tuning, target: LogDensity) -> tuple[Drifter, Info]:
        """One step of every chain."""
        log_density, gradient = target(state.position)
        step = self.schedule.step_size(tuning.step_size, state.iteration)
        gradient = pull(tuning.scale, gradient)
        noise = standard_normal(gradient)
        square = state.square
        if self.rmsprop:
            square = self.rmsprop * square + (1 - self.rmsprop) * gradient.square()
            metric = 1 / (self.floor + square.sqrt())
            move = step.square() / 2 * metric * gradient + step * metric.sqrt() * noise
        else:
            move = step.square() / 2 * gradient + step * noise
        position = state.position + push(tuning.scale, move)
        sound = position.isfinite().all(-1)
        position, square = _kept(sound, position, state.position), _kept(sound, square, state.square)
        return Drifter(position, square, state.iteration + 1), _info(log_density, sound)


class Roller(NamedTuple):
    """State of `SGHMC`: positions and momenta (in whitened coordinates), `[C, d]` each, and the iteration, `[]`."""

    position: Tensor
    momentum: Tensor
    iteration: Tensor


@dataclass(frozen=True)
class SGHMC:
    r"""Stochastic gradient Hamiltonian Monte Carlo: momentum with friction, and noise to balance it.

    .. math:: p' = (1 - \alpha_t)\, p + h_t\, g + \sqrt{2 \alpha_t - h_t^2 V}\; \xi, \qquad x' = x + h_t\, p',
              \qquad \alpha_t = h_t / \ell

    in whitened coordinates: equation 15 of the paper, whose v is h p and whose η is h². The friction 1/ℓ is set by
    `Tuning.length`, the time in which a momentum is forgotten. V is the variance of the gradient's noise, which does
    part of the friction's balancing by itself.

    Attributes:
        schedule: how steps shrink.
        gradient_variance: V, in whitened coordinates; 0 if not known. Where it exceeds what friction balances, no
            noise is added.

    Example:
        >>> from pgen.algorithms.kernels.base import untuned
        >>> target = lambda q: (-q.square().sum(-1) / 2, -q + torch.randn_like(q))
        >>> kernel = SGHMC(gradient_variance=1.0)
        >>> state = kernel.init(torch.zeros(4, 2), target)
        >>> state, info = kernel.step(state, untuned(state.position), target)
        >>> state.momentum.shape
        torch.Size([4, 2])
    """

    schedule: Schedule = CONSTANT
    gradient_variance: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a variance below zero."""
        if not self.gradient_variance >= 0:
            raise ValueError(
                f"SGHMC(gradient_variance={self.gradient_variance}): expected a variance, at least 0 (0 where it is "
                "not known)"
            )

    def init(self, position: Tensor, target: LogDensity) -> Roller:
        """The state at positions `[C, d]`, with fresh momenta; does not evaluate the target."""
        start = torch.zeros((), dtype=torch.int64, device=position.device)
        return Roller(position, standard_normal(position), start)

    def step(self, state: Roller, tuning: Tuning, target: LogDensity) -> tuple[Roller, Info]:
        """One step of every chain."""
        log_density, gradient = target(state.position)
        step = self.schedule.step_size(tuning.step_size, state.iteration)
        decay = (step / tuning.length).clamp(max=1.0)
        noise = (2 * decay - step.square() * self.gradient_variance).clamp(min=0.0).sqrt()
        momentum = (1 - decay) * state.momentum + step * pull(tuning.scale, gradient)
        momentum = momentum + noise * standard_normal(momentum)
        position = state.position + step * push(tuning.scale, momentum)
        sound = position.isfinite().all(-1)
        position, momentum = _kept(sound, position, state.position), _kept(sound, momentum, state.momentum)
        return Roller(position, momentum, state.iteration + 1), _info(log_density, sound)


def _kept(sound: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """A chain whose step is not a number stays where it was."""
    return torch.where(sound.unsqueeze(-1), new, old)


def _info(log_density: Tensor, sound: Tensor) -> Info:
    ones = torch.ones_like(log_density)
    return Info(sound.to(ones.dtype), -log_density, ~sound, ones)
