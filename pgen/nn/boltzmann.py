r"""Boltzmann machines: energies of units in two halves, each of which is drawn at once given the other.

.. math:: E(v, h) = -b^\top v - c^\top h - h^\top W v, \qquad
          F(v) = -\log \sum_h e^{-E(v, h)} = -b^\top v - \sum_j \log(1 + e^{c_j + W_j v})

As an energy of `pgen.distributions.Energy`, a machine gives F of rows of visible units; its block Gibbs sweep, its route of
annealing and, with up to twenty units on the smaller side, its exact partition function and exact draws come along. Gradients
are those of F by autograd.

    RBM            bits below, bits above
    GaussianRBM    real numbers below, bits above
    DeepBoltzmann  bits in any number of layers, in `deep_boltzmann.py`

References:
    Training products of experts by minimizing contrastive divergence (Hinton, Neural Computation 14, 2002). On the
    quantitative analysis of deep belief networks (Salakhutdinov & Murray, ICML 2008): base rates. Exponential family
    harmoniums with an application to information retrieval (Welling, Rosen-Zvi & Hinton, NIPS 2004): real units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.bipartite import Bits, Reals
from pgen.errors import DataError, OptionError


class RBM(nn.Module):
    """A restricted Boltzmann machine on bits.

    Args:
        visible: number of visible units V.
        hidden: number of hidden units H.
        scale: standard deviation of the weights to begin with.

    Raises:
        OptionError: a size is not positive.
        DataError: (when called) rows do not have V places.

    Example:
        >>> machine = RBM(4, 2, scale=0.0)
        >>> machine(torch.zeros(1, 4)).exp(), machine.log_partition().exp()  # 1 / 4 and 2^6
        (tensor([0.2500], grad_fn=<ExpBackward0>), tensor(64.0000, dtype=torch.float64, grad_fn=<ExpBackward0>))
    """

    rates: Tensor

    def __init__(self, visible: int, hidden: int, *, scale: float = 0.01) -> None:
        super().__init__()
        check_sizes("RBM", (visible, hidden))
        self.weight = nn.Parameter(scale * torch.randn(hidden, visible))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("rates", torch.zeros(visible))

    def like(self, data: Tensor) -> Self:
        """Begin as independent bits with the means of data `[N, V]`, from which annealing then starts too."""
        with torch.no_grad():
            self.rates.copy_(log_odds(rows_of("RBM", data, len(self.rates))))
            self.visible_bias.copy_(self.rates)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, V]`."""
        return self.net(rows_of("RBM", x, len(self.visible_bias)))

    @property
    def net(self) -> Bits:
        """What it computes with."""
        return Bits(self.weight, self.visible_bias, self.hidden_bias)

    def sweep(self, x: Tensor) -> Tensor:
        """A block Gibbs sweep: hidden units given rows `[R, V]`, then visible units given those."""
        return self.net.sweep(x)

    def tempered(self, beta: Tensor | float) -> Bits:
        """The machine on its way from independent bits (0) to itself (1)."""
        return self.net.at(beta, self.rates)

    @property
    def knows_partition(self) -> bool:
        """Whether `log_partition` answers."""
        return self.net.knows_partition

    def log_partition(self) -> Tensor | None:
        """log Z, exactly, or None where both halves have more than twenty units."""
        return self.net.log_partition()

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, V]`.

        Raises:
            ValueError: both halves are too large to be summed over.
        """
        with torch.no_grad():
            return self.net.sample(n)


class GaussianRBM(nn.Module):
    r"""A restricted Boltzmann machine of real numbers: a mixture of 2^H normal distributions of one shape.

    .. math:: F(v) = \sum_i \frac{(v_i - b_i)^2}{2 \sigma_i^2} - \sum_j \log(1 + e^{c_j + W_j (v / \sigma)})

    Args:
        visible: number of visible numbers V.
        hidden: number of hidden units H.
        scale: standard deviation of the weights to begin with.

    Raises:
        OptionError: a size is not positive.
        DataError: (when called) rows do not have V places.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, visible: int, hidden: int, *, scale: float = 0.01) -> None:
        super().__init__()
        check_sizes("GaussianRBM", (visible, hidden))
        self.weight = nn.Parameter(scale * torch.randn(hidden, visible))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.log_sigma = nn.Parameter(torch.zeros(visible))
        self.register_buffer("mean", torch.zeros(visible))
        self.register_buffer("deviation", torch.ones(visible))

    def like(self, data: Tensor) -> Self:
        """Begin as independent normal numbers with the moments of data `[N, V]`; annealing then starts there too."""
        data = rows_of("GaussianRBM", data, len(self.mean))
        with torch.no_grad():
            self.mean.copy_(data.mean(0))
            self.deviation.copy_(data.std(0).clamp_min(1e-3))
            self.visible_bias.copy_(self.mean)
            self.log_sigma.copy_(self.deviation.log())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, V]`."""
        return self.net(rows_of("GaussianRBM", x, len(self.visible_bias)))

    @property
    def net(self) -> Reals:
        """What it computes with."""
        inverse = (-self.log_sigma).exp()
        precision = inverse.square()
        constant = -(self.visible_bias.square() * precision).sum() / 2
        return Reals(
            self.weight * inverse, self.visible_bias * precision, precision, constant, self.hidden_bias
        )

    def sweep(self, x: Tensor) -> Tensor:
        """A block Gibbs sweep: hidden units given rows `[R, V]`, then visible numbers given those."""
        return self.net.sweep(x)

    def tempered(self, beta: Tensor | float) -> Reals:
        """The machine on its way from independent normal numbers (0) to itself (1)."""
        return self.net.at(beta, self.mean, self.deviation)

    @property
    def knows_partition(self) -> bool:
        """Whether `log_partition` answers."""
        return self.net.knows_partition

    def log_partition(self) -> Tensor | None:
        """log Z, exactly, or None where there are more than twenty hidden units."""
        return self.net.log_partition()

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, V]`.

        Raises:
            ValueError: there are too many hidden units to sum over.
        """
        with torch.no_grad():
            return self.net.sample(n)


# --- small parts ---


def log_odds(data: Tensor) -> Tensor:
    """Log odds `[V]` of the means of bits `[N, V]`, with half a count of each kind added.

    >>> log_odds(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([1.6094, 0.0000])
    """
    ones = data.sum(0)
    return ((ones + 0.5) / (len(data) - ones + 0.5)).log()


def rows_of(name: str, x: Tensor, size: int) -> Tensor:
    """Rows `[R, size]`, or an error that names who got others."""
    if x.dim() != 2 or x.shape[1] != size:
        raise DataError(
            f"{name} got values of shape {tuple(x.shape)}; expected rows [R, {size}]: x.flatten(1)"
        )
    return x


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Whether all are positive."""
    if not sizes or min(sizes) < 1:
        raise OptionError(f"{name}: every layer has one unit or more, got sizes {tuple(sizes)}")
