r"""Learning from data beside themselves with noise: no chains, no scores, no law of noise, no partition function.

`EnergyDiscrepancy` asks that data lose energy against what a symmetric change there and back makes of them,

    - log( w / M + 1/M sum_j exp(f(x_j) - f(x)) ),    x_j = x + noise + noise_j,

which is the likelihood of f for wide noise and score matching for narrow noise. `ConditionalNoiseContrastive` asks which of a
pair, x and x + noise, is the data: log s(f(x) - f(y)). Both have their maximum at the law of the data for noise of any width,
and both take widths log-uniform between two numbers of standard deviations of the data, one for every row: narrow noise is
blind to the weights of separate modes, wide noise to fine detail.

What is measured gets normal noise in unconstrained coordinates; what is counted is drawn anew, evenly, with a probability.

References:
    Schroeder, Ou, Lim, Li, Vollmer & Duncan, Energy discrepancies: a score-independent loss for energy-based models,
    NeurIPS 2023. Schroeder, Ou, Li & Duncan, Energy-based modelling for discrete and mixed data via heat equations on
    structured spaces, NeurIPS 2024.
    Ceylan & Gutmann, Conditional noise-contrastive estimation of unnormalised models, ICML 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pgen.algorithms.energy.learning import Frame, Learned, at_least, changed, log_uniform, pull, rows, widths
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


@dataclass(frozen=True)
class EnergyDiscrepancy:
    """ED: data against what two changes make of them.

    Attributes:
        narrow: least width of the noise.
        wide: greatest.
        flip: probability that an index is drawn anew, in each of the two changes.
        draws: contrasting values for each row, M.
        floor: w: bounds what a single contrasting value can do.
        regularisation: how much energies are pulled together.

    Example:
        >>> from torch.distributions import constraints
        >>> x, space = torch.randn(100, 2), Space.of(constraints.real, (2,))
        >>> ed = EnergyDiscrepancy()
        >>> ed(lambda x: -x.square().sum(-1) / 2, x, ed.memory(x, space)).surrogate.shape
        torch.Size([100])
    """

    scores: ClassVar[bool] = True
    narrow: float = 0.1
    wide: float = 2.0
    flip: float = 0.2
    draws: int = 16
    floor: float = 1.0
    regularisation: float = 1e-3

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        widths(self.narrow, self.wide, self.flip)
        at_least("draws", self.draws, 1)
        at_least("floor", self.floor, 0)
        at_least("regularisation", self.regularisation, 0)

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Frame:
        """Where the data lie."""
        return Frame(data, space)

    def __call__(self, f: Density, x: Tensor, memory: Frame) -> Learned:
        """Minus the discrepancy of each row."""
        n, m, space = len(x), self.draws, memory.space
        q, z = space.apart(x.detach())
        width = log_uniform(self.narrow, self.wide, n, q)
        there = changed(q, z, memory, width, self.flip)
        back = changed(there[0].repeat(m, 1), there[1].repeat(m, 1), memory, width.repeat(m, 1), self.flip)
        f_data, f_noise = f(x), f(space.together(*back))
        gain = (f_noise + space.volume(back[0])).reshape(m, n) - f_data - space.volume(q)
        floor = torch.full_like(f_data, self.floor).log().unsqueeze(0)
        loss = torch.cat([floor, gain]).logsumexp(0) - math.log(m)
        told = {"energy_gap": gain.detach().mean()}
        return Learned(-loss - pull(self.regularisation, f_data, f_noise), told)


@dataclass(frozen=True)
class ConditionalNoiseContrastive:
    """CNCE: data or changed data, which is which.

    Attributes:
        narrow: least width of the noise.
        wide: greatest.
        flip: probability that an index is drawn anew.
        ratio: pairs for each row.
    """

    scores: ClassVar[bool] = True
    narrow: float = 0.1
    wide: float = 2.0
    flip: float = 0.2
    ratio: int = 8

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        widths(self.narrow, self.wide, self.flip)
        at_least("ratio", self.ratio, 1)

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Frame:
        """Where the data lie."""
        return Frame(data, space)

    def __call__(self, f: Density, x: Tensor, memory: Frame) -> Learned:
        """Twice the log probability of the right order, as in the paper."""
        n, space = len(x), memory.space
        q, z = space.apart(x.detach())
        q, z = q.repeat(self.ratio, 1), z.repeat(self.ratio, 1)
        moved, other = changed(q, z, memory, log_uniform(self.narrow, self.wide, len(q), q), self.flip)
        # Symmetric in coordinates, where densities carry the volume of the change of variables.
        gain = (
            f(x).repeat(self.ratio) + space.volume(q) - f(space.together(moved, other)) - space.volume(moved)
        )
        told = {"ordered": (gain.detach() > 0).to(q.dtype).mean(), "energy_gap": -gain.detach().mean()}
        return Learned(2 * rows(logsigmoid(gain), n), told)
