"""Energies as programs: of vectors, of bits, and of an image together with its label."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pgen.distributions.energy import Energy
from pgen.nn.boltzmann import RBM
from pgen.nn.energies import MLPEnergy
from pgen.nn.mlp import MLP


class EnergyModel(nn.Module):
    r"""Vectors whose log density is a network, but for a constant.

    .. math:: p(x) \propto N(x; 0, w^2 I)\, e^{-E(x)}

    Sites: `x`, the data, real and of a scale of about one.

    Args:
        features: numbers of one row.
        hidden: widths of the layers.
        width: w, the standard deviation of the base.

    Example:
        >>> EnergyModel(features=3).energy(torch.zeros(2, 3)).shape
        torch.Size([2])
    """

    def __init__(self, features: int = 2, hidden: Sequence[int] = (128, 128), width: float = 2.0) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.energy = MLPEnergy(features, hidden)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        base = dist.Normal(torch.zeros(self.features), self.width).to_event(1)
        with pyro.plate("data", n):
            return pyro.sample("x", Energy(self.energy, (self.features,), base=base))


class BoltzmannMachine(nn.Module):
    """Bits under a restricted Boltzmann machine (see `pgen.nn.RBM`).

    Sites: `x`, the data, zeros and ones.

    Args:
        features: bits of one row.
        hidden: hidden units; up to twenty, its log probabilities are exact.
        rows: data `[n, features]` whose means it begins with; None: all one half.

    Example:
        >>> machine = BoltzmannMachine(features=4, hidden=2)
        >>> machine.rbm.log_partition().shape
        torch.Size([])
    """

    def __init__(self, features: int = 64, hidden: int = 12, rows: Tensor | None = None) -> None:
        super().__init__()
        self.features = features
        self.rbm = RBM(features, hidden)
        if rows is not None:
            self.rbm.like(rows)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", Energy(self.rbm, (self.features,), support=constraints.boolean))


class JointEnergy(nn.Module):
    r"""A classifier that is a density of what it classifies, too.

    .. math:: p(x) \propto N(x; 0, w^2 I) \sum_y e^{f_y(x)}, \qquad p(y \mid x) = \frac{e^{f_y(x)}}{\sum_k e^{f_k(x)}}

    Sites: `x`, real vectors; `y`, their labels. Two statements: `fitted.marginals({"x": x})["y"]` classifies,
    `fitted.log_prob({"x": x})` says what does not belong, and given labels `mcmc` draws what has them, from where the chains of
    learning are: `pgen.fit(fitted.program, {"y": labels}, pgen.backend("mcmc", init=fitted))`.

    Args:
        features: numbers of one row.
        classes: labels, 0 to classes - 1.
        hidden: widths of the layers.
        width: w, the standard deviation of the base.

    Example:
        >>> JointEnergy(features=3, classes=2).energy(torch.zeros(5, 3)).shape
        torch.Size([5])

    References:
        Grathwohl et al., Your classifier is secretly an energy based model and you should treat it like one
        (ICLR 2020), arXiv:1912.03263.
    """

    def __init__(
        self, features: int = 64, classes: int = 10, hidden: Sequence[int] = (256, 256), width: float = 1.0
    ) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.logits = MLP(features, classes, hidden, nn.SiLU)

    def energy(self, x: Tensor) -> Tensor:
        """Energies `[rows]` of values `[rows, features]`, whatever their labels."""
        return -self.logits(x).logsumexp(-1)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        base = dist.Normal(torch.zeros(self.features), self.width).to_event(1)
        with pyro.plate("data", n):
            x = pyro.sample("x", Energy(self.energy, (self.features,), base=base))
            return pyro.sample("y", dist.Categorical(logits=self.logits(x)))
