r"""Chains that begin where a generator draws, and teach it where they came.

    y ~ q    ->    y' a few steps of chains of exp(f) on        energy: more density at data, less at y'
                                                                generator: log q(y') is to grow

The generator makes long chains of short ones: what they achieve at one call they need not at the next. And it is a sampler of
the energy in the end, by maximum likelihood: unlike one that climbs the energy (`Amortised`), it comes to every mode that its
chains are in.

In the paper the latent is kept as it was drawn, and teaching is regression: g(e) moves to y'. That is right for chains that
come nearly nowhere. Of those that forget where they began, regression leaves the mean, and the generator shrinks to it. So the
latents of y' are inferred anew, from candidates around the one that was drawn and anywhere (`Generator.log_prob`).

Draws that no step frees, as between separate modes, would make both partners go wrong: the energy falls there without end, and
the generator learns that they are good. So draws have the weights exp(f) / q, truncated, of where their chains began; they stay
right when steps that leave exp(f) invariant move them, as in sequential Monte Carlo.

References:
    Xie, Lu, Gao, Zhu & Wu, Cooperative training of descriptor and generator networks, IEEE TPAMI 42, 2020: the scheme.
    Bornschein & Bengio, Reweighted wake-sleep, ICLR 2015: a likelihood that is climbed by inferred latents.
    Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 68, 2006: weights of draws that are then moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.contrastive import Chained, Chains
from pgen.algorithms.energy.generator import Drawn, Generator, one_law, truncated
from pgen.algorithms.energy.learning import Learned, at_least, pull, roughened, watched
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


class Taught(Chains):
    """How chains move, and the generator that they teach."""

    generator: Generator

    def sample(self, n: int) -> Tensor:
        """Draws of the generator, `[n, *event]`."""
        return self.generator.sample(n)


@dataclass(frozen=True)
class Cooperative(Chained):
    """Contrastive divergence from draws of a generator that learns from the chains (MCMC teaching).

    Attributes:
        leaps: none, unless told otherwise, as the generator brings chains to all modes.
        generator: a module, latents `[n, k]` to standardised unconstrained coordinates `[n, d]`; None for one that is made.
        latents: k; None for d.
        hidden: widths of the layers of a generator that is made.
        around: candidates around the latent of a draw, by which the generator's density is estimated.
        anywhere: candidates among all latents, the same for all draws.
        greatest: weight of a draw, over the mean one.

    Example:
        >>> from torch.distributions import constraints
        >>> x, space = torch.randn(100, 2), Space.of(constraints.real, (2,))
        >>> way = Cooperative(steps=5, hidden=(16,))
        >>> memory = way.memory(x, space)
        >>> learned = way(lambda x: -x.square().sum(-1) / 2, x, memory)
        >>> learned.surrogate.sum().backward()
        >>> memory.generator.free_sigma.grad is not None, memory.sample(3).shape
        (True, torch.Size([3, 2]))
    """

    leaps: int = 0
    generator: nn.Module | None = None
    latents: int | None = None
    hidden: tuple[int, ...] = (128, 128)
    around: int = 10
    anywhere: int = 250
    greatest: float = 20.0

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        super().__post_init__()
        for name in ("around", "anywhere", "greatest"):
            at_least(name, getattr(self, name), 1)
        if self.latents is not None:
            at_least("latents", self.latents, 1)

    def memory(
        self,
        data: Tensor,
        space: Space,
        *,
        reference: Law | None = None,
        conditional: bool = False,
        sweep: Callable[[Tensor], Tensor] | None = None,
    ) -> Taught:
        """The generator, and the step size; `sweep` replaces the kernels by the energy's own.

        Raises:
            ValueError: the density is conditional, or some numbers are counted.
        """
        one_law(conditional)
        generator = Generator(data, space, self.generator, self.latents, self.hidden)
        memory = Taught(
            data, space, self._walk(space, sweep), reference, self.step_size, conditional=False, kept=0
        )
        memory.generator = generator
        return memory

    def __call__(self, f: Density, x: Tensor, memory: Taught) -> Learned:
        """f(x) less the mean of f where chains from the generator came, and the generator's log density there."""
        generator = memory.generator
        drawn = generator.draw(len(x))
        start = drawn.u.detach()
        y = generator.values(start)
        with torch.no_grad():
            found = generator.origins(drawn, self.around, self.anywhere)
            log_weight = f(y) + generator.volume(start) - found.log_prob
            weight = truncated(log_weight, self.greatest)
        draws, told = memory.move(y, f, self.leaps)
        moved = generator.standardised(draws)
        begun = generator.inferred(Drawn(drawn.latent, moved))
        learned_q = generator.log_prob(begun, self.around, self.anywhere)
        taught = (weight * learned_q).sum()
        f_data = f(roughened(x, memory.frame, self.input_noise))
        f_draws = f(roughened(draws, memory.frame, self.input_noise))
        surrogate = f_data - (weight * f_draws).sum() + (taught - taught.detach())
        told = (
            told
            | watched(memory.frame, f_data, f_draws, draws)
            | {
                "moved": (moved - start).square().mean().sqrt(),
                "effective": 1 / weight.square().sum() / len(weight),
                "sigma": generator.sigma.detach(),
                "entropy": (generator.volume(start) - found.log_prob).mean(),
            }
        )
        return Learned(surrogate - pull(self.regularisation, f_data, f_draws), told)
