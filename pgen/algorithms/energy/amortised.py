r"""A sampler that learns beside the energy, in the place of chains.

    max over f   min over q     E_data[f(x)] - ( E_q[f(y)] + H[q] )

The bracket is at most log Z, and is log Z where q is exp(f) / Z. The generator climbs it by the force that acts on its draws,
the slope of f less the score of q, which is the gradient of E_q[f] + H[q] for draws that are moved.

The energy follows the gradient of the likelihood as far as the generator keeps up: at the paper's plain mean over draws, which
goes wrong where it cannot. A network of normal latents cannot come to separate modes without draws between them; there f falls
and falls, and its slope runs away. (A penalty on slopes at the data stops that, and makes the density smooth.) So here draws
*weigh* exp(f) / q, truncated, as the density of q is estimated with its score anyway: then it is enough that q covers exp(f).
And some of the draws are of the reference law, so that none of its places is left unseen. Both die out in many dimensions,
where weights say nothing; there, `greatest=None` and a penalty are the paper's way.

References:
    Grathwohl, Kelly, Hashemi, Norouzi, Swersky & Duvenaud, No MCMC for me: amortized sampling for fast and stable training of
    energy-based models, ICLR 2021.
    Bengio & Senecal, Adaptive importance sampling to accelerate training of a neural probabilistic language model, IEEE
    Transactions on Neural Networks 19, 2008: draws of a law that learns, with weights.
    Ionides, Truncated importance sampling, Journal of Computational and Graphical Statistics 17, 2008.
    Hesterberg, Weighted average importance sampling and defensive mixture distributions, Technometrics 37, 1995.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.generator import Drawn, Generator, one_law, truncated
from pgen.algorithms.energy.learning import Learned, at_least, pull, watched
from pgen.algorithms.energy.matching import score
from pgen.algorithms.energy.reference import Law, Reference
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


class Amortiser(Generator):
    """A generator, and a law that covers what it does not."""

    def __init__(
        self,
        data: Tensor,
        space: Space,
        network: nn.Module | None,
        latents: int | None,
        hidden: tuple[int, ...],
        reference: Law | None,
    ) -> None:
        super().__init__(data, space, network, latents, hidden)
        self.reference = Reference(data, space, widen=1.2) if reference is None else reference


@dataclass(frozen=True)
class Amortised:
    """Density is taken from where a generator draws, which learns to draw from the density.

    Attributes:
        generator: a module, latents `[n, k]` to standardised unconstrained coordinates `[n, d]`; None for one that is made.
        latents: k; None for d.
        hidden: layers of a generator that is made.
        ratio: draws of the generator for each row of data.
        around: candidates around the latent of a draw, for the entropy's gradient.
        anywhere: candidates among all latents, the same for all draws.
        entropy: weight of the entropy. 1 is the likelihood; a smaller one makes draws seek modes, and the density is then learned
            as its power.
        greatest: weight of a draw, over the mean one; None for no weights.
        defence: share of draws that are of the reference law, if they are weighed.
        penalty: on the mean square of slopes of f at the data, in standardised coordinates; it takes .1 or so where draws are
            not weighed.
        regularisation: how much energies are pulled together.

    Example:
        >>> from torch.distributions import constraints
        >>> x, space = torch.randn(100, 2), Space.of(constraints.real, (2,))
        >>> width = torch.nn.Parameter(torch.tensor(0.5))
        >>> way = Amortised(hidden=(16,))
        >>> memory = way.memory(x, space)
        >>> learned = way(lambda x: -(x / width).square().sum(-1) / 2, x, memory)
        >>> learned.surrogate.sum().backward()
        >>> bool(width.grad > 0), memory.sample(3).shape
        (True, torch.Size([3, 2]))
    """

    generator: nn.Module | None = None
    latents: int | None = None
    hidden: tuple[int, ...] = (128, 128)
    ratio: int = 1
    around: int = 10
    anywhere: int = 250
    entropy: float = 1.0
    greatest: float | None = 20.0
    defence: float = 0.2
    penalty: float = 0.0
    regularisation: float = 1e-3

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        for name, least in (
            ("ratio", 1),
            ("around", 1),
            ("anywhere", 0),
            ("entropy", 0),
            ("penalty", 0),
            ("regularisation", 0),
        ):
            at_least(name, getattr(self, name), least)
        if self.latents is not None:
            at_least("latents", self.latents, 1)
        if self.greatest is not None:
            at_least("greatest", self.greatest, 1)
            at_least("anywhere", self.anywhere, 1)
        if not 0 <= self.defence < 1:
            raise ValueError(f"defence is a share below 1, got {self.defence}")

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Amortiser:
        """The generator, which has `sample(n)`.

        Raises:
            ValueError: the density is conditional, or some numbers are counted.
        """
        one_law(conditional)
        return Amortiser(data, space, self.generator, self.latents, self.hidden, reference)

    def __call__(self, f: Density, x: Tensor, memory: Amortiser) -> Learned:
        """f(x) less the mean of f over draws; and the work of the force that moves these."""
        drawn = memory.draw(self.ratio * len(x))
        found = memory.origins(drawn, self.around, self.anywhere)
        with torch.enable_grad():
            u = drawn.u.detach().requires_grad_()
            y, volume = memory.values(u), memory.volume(u)
            f_draws = f(y)
            slope = torch.autograd.grad((f_draws + volume).sum(), u, retain_graph=True)[0]
        y, log_q = y.detach(), found.log_prob - volume.detach()
        work = ((slope - self.entropy * found.score).detach() * drawn.u).sum(1).mean()
        f_data, entropy = f(x), -log_q.mean()
        told = watched(memory.frame, f_data, f_draws, y) | {
            "entropy": entropy,
            "sigma": memory.sigma.detach(),
            "candidates": found.used,
        }
        mean, more = self._mean(f, f_draws, y, log_q, memory)
        told |= more
        surrogate = f_data - mean + (work - work.detach()) - pull(self.regularisation, f_data, f_draws)
        if self.penalty:
            steep = score(lambda x: f(x), memory.standardised(x.detach()), memory.frame)
            surrogate = surrogate - self.penalty * steep.square().sum(1)
        return Learned(surrogate, told)

    def _mean(
        self, f: Density, f_draws: Tensor, y: Tensor, log_q: Tensor, memory: Amortiser
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of f under exp(f), whose gradient is that of log Z, and an estimate of log Z."""
        if self.greatest is None:
            return f_draws.mean(), {"log_partition": f_draws.detach().mean() - log_q.mean()}
        n = len(y)
        others = round(n * self.defence / (1 - self.defence))
        if others:
            with torch.no_grad():
                far = memory.reference.sample(others)
                u = memory.standardised(far)
                log_far = memory.log_prob(
                    Drawn(u.new_zeros(others, memory.latents), u), 0, self.anywhere
                ) - memory.volume(u)
                log_q = torch.cat([log_q, log_far]) + math.log(n / (n + others))
                log_reference = memory.reference.log_prob(torch.cat([y, far]))
                log_q = torch.logaddexp(log_q, log_reference + math.log(others / (n + others)))
            f_draws = torch.cat([f_draws, f(far)])
        log_weight = f_draws.detach() - log_q
        weight = truncated(log_weight, self.greatest)
        return (weight * f_draws).sum(), {
            "log_partition": log_weight.logsumexp(0) - math.log(len(log_weight)),
            "effective": 1 / weight.square().sum() / len(weight),
        }
