r"""Noise-contrastive estimation: a density learned by telling data from draws of a law that is known.

    sum_x log s(f(x) - c - log q(x) - log nu) + sum_y log s(-(f(y) - c - log q(y) - log nu)),    y ~ q, nu for every x

with s the logistic function is greatest at f - c = log p, so that c is the logarithm of the partition function, learned with
the rest. No chains; consistent for any q that is positive where p is; the closer q is to p, the less data it takes, and where
the two hardly overlap it learns nothing in any feasible time.

References:
    Gutmann & Hyvarinen, Noise-contrastive estimation of unnormalized statistical models, JMLR 13, 2012.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pgen.algorithms.energy.learning import Learned, at_least, pull, rows
from pgen.algorithms.energy.reference import Law, Reference
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


class Noise(nn.Module):
    """A law of noise, and the logarithm of the partition function.

    Attributes:
        law: normalised.
        log_partition: learned, `[]`.
    """

    def __init__(self, data: Tensor, law: Law) -> None:
        super().__init__()
        self.law = law
        self.log_partition = nn.Parameter(torch.zeros((), dtype=data.dtype, device=data.device))


def _told(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How often the two are told apart: 1/2 is chance, 1 is noise too far from the data to learn from."""
    return {
        "told_apart": ((real > 0).to(real.dtype).mean() + (fake < 0).to(real.dtype).mean()) / 2,
        "energy_gap": (fake.mean() - real.mean()).detach(),
    }


def unconditional(conditional: bool) -> None:
    """Raise if a density is conditional: its log Z is no single number."""
    if conditional:
        raise ValueError(
            "a conditional density has another partition function at every row, and this objective learns one number; use "
            "ConditionalNoiseContrastive or ContrastiveDivergence"
        )


@dataclass(frozen=True)
class NoiseContrastive:
    """NCE with noise from a law fitted to the data, or a given one.

    Attributes:
        ratio: draws of noise for each row of data, nu.
        widen: factor on the standard deviations of the fitted law; heavier than the data is safer than lighter.
        regularisation: how much energies are pulled together.

    Example:
        >>> from torch.distributions import constraints
        >>> x, space = torch.randn(100, 2), Space.of(constraints.real, (2,))
        >>> nce = NoiseContrastive()
        >>> memory = nce.memory(x, space)
        >>> nce(lambda x: -x.square().sum(-1) / 2, x, memory).surrogate.sum().backward()
        >>> bool(memory.log_partition.grad > 0)  # log 2 pi is above 0
        True
    """

    scores: ClassVar[bool] = True
    ratio: int = 4
    widen: float = 1.2
    regularisation: float = 0.0

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        at_least("ratio", self.ratio, 1)
        at_least("regularisation", self.regularisation, 0)

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Noise:
        """The law of noise, and log Z.

        Raises:
            ValueError: the density is conditional.
        """
        unconditional(conditional)
        return Noise(data, Reference(data, space, self.widen) if reference is None else reference)

    def __call__(self, f: Density, x: Tensor, memory: Noise) -> Learned:
        """Log odds of data, and of noise that is drawn anew."""
        with torch.no_grad():
            noise = memory.law.sample(self.ratio * len(x))
            log_q, log_q_noise = memory.law.log_prob(x), memory.law.log_prob(noise)
        f_data, f_noise = f(x), f(noise)
        surrogate, told = compared(f_data, f_noise, log_q, log_q_noise, memory.log_partition)
        return Learned(surrogate - pull(self.regularisation, f_data, f_noise), told)


def compared(
    f_data: Tensor, f_noise: Tensor, log_q: Tensor, log_q_noise: Tensor, log_partition: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective for each row `[n]`, from densities of data `[n]` and of noise `[nu n]`."""
    n = len(f_data)
    ratio = len(f_noise) // n
    offset = log_partition + torch.tensor(float(ratio), dtype=f_data.dtype).log().to(f_data.device)
    real, fake = f_data - log_q - offset, f_noise - log_q_noise - offset
    told = _told(real, fake) | {"log_partition": log_partition.detach().clone()}
    return logsigmoid(real) + ratio * rows(logsigmoid(-fake), n), told
