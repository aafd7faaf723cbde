r"""Contrastive divergence: more density where the data are, less where chains of the model are.

    grad log p(x) = grad f(x) - E_model[grad f]

with the expectation over chains that began at the data (`ContrastiveDivergence`), that never stop (`PersistentContrastiveDivergence`)
or that began at noise (`ShortRun`), and moved by any kernel that leaves exp(f) invariant.

Chains that begin at the data show that the model is wrong only as far as they come in k steps. Small moves do not cross
between separate modes, and then nothing is learned of how much mass each of them has. So besides its steps every chain may
*leap*: it is offered `leaps` independent draws of the reference law, and takes one of them, or stays, with probabilities in
proportion to exp(f) / reference (iterated sampling importance resampling), which leaves exp(f) invariant as the steps
do. Leaps join modes in few dimensions, or for a good reference; in many they are never taken, and cost one evaluation each.

References:
    Hinton, Training products of experts by minimizing contrastive divergence, Neural Computation 14, 2002.
    Tieleman, Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008.
    Nijkamp, Hill, Zhu & Wu, Learning non-convergent non-persistent short-run MCMC, NeurIPS 2019.
    Du & Mordatch, Implicit generation and modeling with energy-based models, NeurIPS 2019: the buffer, its renewal, and
    small energies.
    Andrieu, Lee & Vihola, Uniform ergodicity of the iterated conditional SMC, Bernoulli 24, 2018: the leaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.learning import Frame, Learned, at_least, pull, roughened, watched
from pgen.algorithms.energy.reference import Law, Reference
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density, Moves, Sweeps, Usual, Walk
from pgen.algorithms.kernels.base import Kernel


@dataclass(frozen=True)
class Chained:
    """What contrastive objectives share: how their chains move, and what keeps them stable.

    Attributes:
        steps: of the kernel, at each call.
        leaps: draws of the reference law that are offered to each chain at each call; 0 for none.
        continuous: kernel for what is measured; MALA by default.
        discrete: kernel for what is counted; Gibbs with gradients for bits by default, else Gibbs.
        target_accept: what the step size is adapted to; None for a kernel that accepts everything (`ULA`), whose step size
            then stays at `step_size`.
        step_size: to begin with, in standard deviations of the data.
        regularisation: how much energies are pulled together.
        input_noise: on data and draws where their densities are compared, in standard deviations of the data.
    """

    steps: int = 10
    leaps: int = 8
    continuous: Kernel | None = None
    discrete: Any = None
    target_accept: float | None = 0.574
    step_size: float = 0.1
    regularisation: float = 1e-3
    input_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        at_least("steps", self.steps, 1)
        at_least("leaps", self.leaps, 0)
        at_least("regularisation", self.regularisation, 0)
        at_least("input_noise", self.input_noise, 0)
        if not self.step_size > 0:
            raise ValueError(f"step_size is positive, got {self.step_size}")

    def _walk(self, space: Space, sweep: Callable[[Tensor], Tensor] | None) -> Walk:
        if sweep is not None:
            return Sweeps(sweep, self.steps)
        usual = Usual(space)
        continuous, discrete = self.continuous or usual.continuous, self.discrete or usual.discrete
        return Moves(space, continuous, discrete, self.steps, self.target_accept)

    def _contrast(
        self, f: Density, x: Tensor, draws: Tensor, memory: Chains, told: dict[str, Tensor]
    ) -> Learned:
        f_data = f(roughened(x, memory.frame, self.input_noise))
        f_draws = f(roughened(draws, memory.frame, self.input_noise))
        mean = f_draws if memory.conditional else f_draws.mean()
        told = told | watched(memory.frame, f_data, f_draws, draws)
        return Learned(f_data - mean - pull(self.regularisation, f_data, f_draws), told)


class Chains(nn.Module):
    """How chains move, and those that stay.

    Attributes:
        log_step: logarithm of the step size, in standard deviations of the data, `[]`.
        position: chains that stay, `[m, *event]`.
        age: calls since each of them was renewed, `[m]`.
    """

    log_step: Tensor
    position: Tensor
    age: Tensor

    def __init__(
        self,
        data: Tensor,
        space: Space,
        walk: Walk,
        reference: Law | None,
        step_size: float,
        conditional: bool,
        kept: int,
    ) -> None:
        super().__init__()
        self.walk, self.conditional = walk, conditional
        self.frame = Frame(data, space)
        self.reference = Reference(data, space, widen=1.2) if reference is None else reference
        self.register_buffer("log_step", self.frame.centre.new_tensor(step_size).log())
        picked = torch.randint(len(data), (kept,), device=data.device)
        self.register_buffer("position", data.detach()[picked].clone())
        self.register_buffer("age", torch.zeros(kept, dtype=self.log_step.dtype, device=data.device))

    def move(self, x: Tensor, f: Density, leaps: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Chains `[C, *event]` a few steps on, and the step size nearer to what the acceptance asks for."""
        told = dict[str, Tensor]()
        with torch.no_grad():
            if leaps:
                x, told["leapt"] = leap(x, f, self.reference, leaps)
            step = self.log_step.exp()
            x, accept = self.walk(x, f, step * self.frame.scale)
            if self.walk.target_accept is not None and self.frame.space.dims:
                moved = self.log_step + 0.1 * (accept - self.walk.target_accept)
                # A flat density accepts everything; a step as wide as the data is as good as any longer one.
                self.log_step.copy_(moved.nan_to_num(nan=-1.0).clamp(-12.0, 0.0))
            told |= {"accept": accept, "step_size": step}
        return x.detach(), told


def leap(x: Tensor, f: Density, reference: Law, offers: int) -> tuple[Tensor, Tensor]:
    """Every chain `[C, *event]` stays or goes to one of `offers` draws; also, how many went (a fraction, `[]`)."""
    draws = reference.sample(offers * len(x))
    every = torch.cat([x, draws])
    weight = (f(every) - reference.log_prob(every)).nan_to_num(nan=-torch.inf).reshape(offers + 1, len(x))
    gumbel = -(-torch.rand_like(weight).log()).log()
    chosen = (weight + gumbel).argmax(0)
    index = chosen * len(x) + torch.arange(len(x), device=x.device)
    return every.index_select(0, index), (chosen > 0).to(weight.dtype).mean()


@dataclass(frozen=True)
class ContrastiveDivergence(Chained):
    """CD-k: chains begin at the data, at every call anew.

    Biased: what is learned is a density at which k steps from the data change nothing on average. That is the true one
    where the model holds it. Without leaps it is blind to the weights of modes that k steps do not join, and to modes
    without data (where chains never come, density may grow unseen).

    Example:
        >>> from torch.distributions import constraints
        >>> x, space = torch.randn(100, 2), Space.of(constraints.real, (2,))
        >>> width = torch.nn.Parameter(torch.tensor(0.5))
        >>> cd = ContrastiveDivergence(steps=5)
        >>> learned = cd(lambda x: -(x / width).square().sum(-1) / 2, x, cd.memory(x, space))
        >>> learned.surrogate.sum().backward()
        >>> bool(width.grad > 0), sorted(learned.told)
        (True, ['accept', 'energy_gap', 'escaped', 'leapt', 'spread', 'step_size'])
    """

    def memory(
        self,
        data: Tensor,
        space: Space,
        *,
        reference: Law | None = None,
        conditional: bool = False,
        sweep: Callable[[Tensor], Tensor] | None = None,
    ) -> Chains:
        """The step size; `sweep` replaces the kernels by the energy's own."""
        return Chains(data, space, self._walk(space, sweep), reference, self.step_size, conditional, 0)

    def __call__(self, f: Density, x: Tensor, memory: Chains) -> Learned:
        """f(x) less f where the chain that began at x came."""
        draws, told = memory.move(x.detach(), f, self.leaps)
        return self._contrast(f, x, draws, memory, told)


@dataclass(frozen=True)
class ShortRun(Chained):
    """Chains begin at the reference law, at every call anew.

    What is learned is a density whose *short runs from noise* look like the data: a sampler that needs exactly so many
    steps. The density itself is biased as far as they have not converged.
    """

    steps: int = 50

    def memory(
        self,
        data: Tensor,
        space: Space,
        *,
        reference: Law | None = None,
        conditional: bool = False,
        sweep: Callable[[Tensor], Tensor] | None = None,
    ) -> Chains:
        """The step size; `sweep` replaces the kernels by the energy's own."""
        return Chains(data, space, self._walk(space, sweep), reference, self.step_size, conditional, 0)

    def __call__(self, f: Density, x: Tensor, memory: Chains) -> Learned:
        """f(x) less f where chains from noise came."""
        draws, told = memory.move(memory.reference.sample(len(x)), f, self.leaps)
        return self._contrast(f, x, draws, memory, told)


@dataclass(frozen=True)
class PersistentContrastiveDivergence(Chained):
    """PCD: chains go on from call to call while the density changes slowly under them.

    At each call some of them, as many as there are rows of data by default, are drawn from the buffer, moved and put back.
    Their mean is the noisier half of the gradient: where a move is cheap, moving more of them than rows pays.
    Before they move, each is renewed with probability `renew`: a remedy for chains that are stuck. Renewed at the data the
    method stays consistent, since chains at the data are chains of the right model; renewed at noise it has the bias of
    short runs in that fraction, and finds modes that the data lack.

    Attributes:
        chains: in the buffer.
        moved: how many of them at each call; None: as many as there are rows, and all at most.
        renew: probability for each chain and call.
        renew_from: `"data"` or `"noise"` (the reference law).
    """

    chains: int = 1000
    moved: int | None = None
    renew: float = 0.05
    renew_from: Literal["data", "noise"] = "data"

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        super().__post_init__()
        at_least("chains", self.chains, 1)
        if self.moved is not None and not 1 <= self.moved <= self.chains:
            raise ValueError(f"moved is 1 to chains={self.chains}, or None; got {self.moved}")
        if not 0 <= self.renew <= 1:
            raise ValueError(f"renew is a probability, got {self.renew}")
        if self.renew_from not in ("data", "noise"):
            raise ValueError(f'renew_from is "data" or "noise", got {self.renew_from!r}')

    def memory(
        self,
        data: Tensor,
        space: Space,
        *,
        reference: Law | None = None,
        conditional: bool = False,
        sweep: Callable[[Tensor], Tensor] | None = None,
    ) -> Chains:
        """The step size and the chains, at rows of the data.

        Raises:
            ValueError: the density is conditional.
        """
        if conditional:
            raise ValueError(
                "persistent chains belong to no row of the data, and a conditional density is another one at every row; "
                "use ContrastiveDivergence, ShortRun or ConditionalNoiseContrastive"
            )
        return Chains(data, space, self._walk(space, sweep), reference, self.step_size, False, self.chains)

    def __call__(self, f: Density, x: Tensor, memory: Chains) -> Learned:
        """f(x) less the mean of f over chains that were moved."""
        with torch.no_grad():
            moved = min(len(x), self.chains) if self.moved is None else self.moved
            which = torch.randperm(self.chains, device=x.device)[:moved]
            position, age = memory.position.index_select(0, which), memory.age.index_select(0, which)
            if self.renew_from == "data":
                fresh = x.detach()[torch.randint(len(x), (moved,), device=x.device)]
            else:
                fresh = memory.reference.sample(moved)
            renewed = torch.rand(moved, device=x.device) < self.renew
            position = torch.where(renewed.reshape(-1, *(1,) * (x.dim() - 1)), fresh.to(position), position)
            age = torch.where(renewed, 0.0, age) + 1
        draws, told = memory.move(position, f, self.leaps)
        memory.position.index_copy_(0, which, draws)
        memory.age.index_copy_(0, which, age)
        return self._contrast(f, x, draws, memory, told | {"age": memory.age.mean()})
