"""Deep Boltzmann machines: several layers of bits, of which the even ones are one half, the odd ones the other.

Given the even layers, all odd ones are independent bits, and the reverse. So a deep machine is a restricted one whose weights
have blocks of zeros, and all that `boltzmann` says of its free energy, sweeps, annealing and exact sums holds of the even layers.

References:
    Deep Boltzmann machines (Salakhutdinov & Hinton, AISTATS 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgen.algorithms.energy.bipartite import SMALL, Bits, bits_of
from pgen.errors import OptionError
from pgen.nn.boltzmann import check_sizes, log_odds, rows_of

_SUMMED = 14
"""Hidden units whose states are summed over for every row."""


@dataclass(frozen=True)
class Layers:
    """A deep machine at some temperature, as the energy of its visible units.

    Attributes:
        halves: its even layers (visible ones first) under its odd layers.
        visible: number of visible units V.
    """

    halves: Bits
    visible: int

    def __call__(self, x: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, V]`: sums over all states of the smaller half of what is hidden."""
        return -(x @ self.halves.visible[: self.visible] + self._table(x).logsumexp(1))

    def sweep(self, x: Tensor) -> Tensor:
        """The summed units given rows, exactly, then the other hidden ones, then the visible ones."""
        size = len(self.halves.hidden) if self._odd else self._rest
        code = torch.multinomial(self._table(x).softmax(1), 1).squeeze(1)
        drawn = bits_of(code, size, x)
        odd = drawn if self._odd else self.halves.raised(torch.cat([x, drawn], 1))
        return self.halves.lowered(odd)[:, : self.visible]

    @property
    def knows_partition(self) -> bool:
        """Whether `log_partition` answers."""
        return self.halves.knows_partition

    def log_partition(self) -> Tensor | None:
        """log Z of the visible units, which is that of all."""
        return self.halves.log_partition()

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, V]`."""
        return self.halves.sample(n)[:, : self.visible]

    @property
    def _rest(self) -> int:
        return len(self.halves.visible) - self.visible

    @property
    def _odd(self) -> bool:
        return len(self.halves.hidden) <= self._rest

    def _table(self, x: Tensor) -> Tensor:
        """Log weights `[R, states]` of the states of the smaller hidden half, given rows."""
        weight, bias, hidden = self.halves.weight, self.halves.visible, self.halves.hidden
        below, above = weight.split([self.visible, self._rest], 1)
        rest = bias[self.visible :]
        size = len(hidden) if self._odd else self._rest
        if size > _SUMMED:
            raise OptionError(
                f"DeepBoltzmann: its energy of the visible units alone sums over the smaller half of the hidden ones, at most "
                f"{_SUMMED} units, here {size}; take the energy of all even layers, machine.even, and observe the first "
                f"{self.visible} of its units"
            )
        states = bits_of(torch.arange(2**size, device=x.device), size, x)
        if self._odd:
            own = states @ hidden + F.softplus(F.linear(states, above.T, rest)).sum(1)
            return own + x @ (states @ below).T
        field = F.linear(x, below, hidden).unsqueeze(1) + F.linear(states, above)
        return states @ rest + F.softplus(field).sum(2)


class DeepBoltzmann(nn.Module):
    r"""A deep Boltzmann machine: layers of bits, each connected to its neighbours.

    .. math:: E(h_0, \dots, h_L) = -\sum_l b_l^\top h_l - \sum_l h_{l+1}^\top W_l h_l

    The odd layers are independent given the even ones, and summed out by formula. What is left is an energy of the even layers:

    - `machine.even`, an energy of rows `[R, E]` of all even layers, visible units first, of any size: block Gibbs over odd and even
      layers, and annealing. A program has one site of E bits, of which the first V are observed and the others missing.
    - `machine`, the energy of rows `[R, V]` of the visible units alone. It sums over all states of the odd layers or of the
      other even ones, whichever are fewer: at most 14 units.

    Both have the partition function of the machine, exact where the odd or the even layers have at most twenty units.

    Args:
        sizes: of the layers, visible one first; three or more.
        scale: standard deviation of the weights to begin with.

    Raises:
        OptionError: fewer than three layers, or an empty one; (when called) too many hidden units to sum over.
        DataError: (when called) rows do not have V places.

    Example:
        >>> machine = DeepBoltzmann((6, 3, 2), scale=0.0)
        >>> machine(torch.zeros(2, 6)).shape, machine.even(torch.zeros(2, 8)).shape
        (torch.Size([2]), torch.Size([2]))
        >>> machine.log_partition().exp().round()
        tensor(2048., dtype=torch.float64, grad_fn=<RoundBackward0>)
    """

    rates: Tensor

    def __init__(self, sizes: Sequence[int], *, scale: float = 0.01) -> None:
        super().__init__()
        check_sizes("DeepBoltzmann", sizes)
        if len(sizes) < 3:
            raise OptionError(
                f"DeepBoltzmann({tuple(sizes)}) has one hidden layer; that is RBM({', '.join(map(str, sizes))})"
            )
        self.weights = nn.ParameterList(scale * torch.randn(high, low) for low, high in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes)
        self.register_buffer("rates", torch.zeros(sizes[0]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the layers."""
        return tuple(len(bias) for bias in self.biases)

    @property
    def even(self) -> EvenLayers:
        """The energy of all even layers."""
        return EvenLayers(self)

    def like(self, data: Tensor) -> Self:
        """Begin with visible units that have the means of data `[N, V]`, from which annealing then starts too."""
        with torch.no_grad():
            self.rates.copy_(log_odds(rows_of("DeepBoltzmann", data, len(self.rates))))
            self.biases[0].copy_(self.rates)
        return self

    def halves(self, beta: Tensor | float = 1.0) -> Bits:
        """Even layers under odd layers."""
        rows = list[Tensor]()
        for odd in range(1, len(self.biases), 2):
            blocks = list[Tensor]()
            for even in range(0, len(self.biases), 2):
                if even == odd - 1:
                    blocks.append(self.weights[even])
                elif even == odd + 1:
                    blocks.append(self.weights[odd].T)
                else:
                    blocks.append(self.rates.new_zeros(len(self.biases[odd]), len(self.biases[even])))
            rows.append(torch.cat(blocks, 1))
        visible = torch.cat(list(self.biases)[::2])
        whole = Bits(torch.cat(rows), visible, torch.cat(list(self.biases)[1::2]))
        return whole.at(beta, F.pad(self.rates, (0, len(visible) - len(self.rates))))

    def forward(self, x: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, V]`."""
        return self.tempered(1.0)(rows_of("DeepBoltzmann", x, len(self.rates)))

    def tempered(self, beta: Tensor | float) -> Layers:
        """The machine on its way from independent bits (0) to itself (1)."""
        return Layers(self.halves(beta), len(self.rates))

    def sweep(self, x: Tensor) -> Tensor:
        """Hidden units given rows `[R, V]`, exactly, then visible units given those."""
        return self.tempered(1.0).sweep(x)

    @property
    def knows_partition(self) -> bool:
        """Whether `log_partition` answers."""
        return min(sum(self.sizes[::2]), sum(self.sizes[1::2])) <= SMALL

    def log_partition(self) -> Tensor | None:
        """log Z, exactly, or None where both odd and even layers have more than twenty units."""
        return self.halves().log_partition()

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, V]`.

        Raises:
            ValueError: there are too many units to sum over.
        """
        with torch.no_grad():
            return self.tempered(1.0).sample(n)


class EvenLayers(nn.Module):
    """A deep Boltzmann machine as the energy of its even layers, `[R, E]`, visible units first.

    Args:
        machine: whose parameters it shares.
    """

    def __init__(self, machine: DeepBoltzmann) -> None:
        super().__init__()
        self.machine = machine

    @property
    def size(self) -> int:
        """E."""
        return sum(self.machine.sizes[::2])

    def forward(self, x: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, E]`."""
        return self.machine.halves()(rows_of("DeepBoltzmann.even", x, self.size))

    def sweep(self, x: Tensor) -> Tensor:
        """Odd layers given rows `[R, E]`, then even layers given those."""
        return self.machine.halves().sweep(x)

    def tempered(self, beta: Tensor | float) -> Bits:
        """On its way from independent bits (0) to itself (1)."""
        return self.machine.halves(beta)

    @property
    def knows_partition(self) -> bool:
        """Whether `log_partition` answers."""
        return self.machine.knows_partition

    def log_partition(self) -> Tensor | None:
        """log Z, exactly, or None where both odd and even layers have more than twenty units."""
        return self.machine.log_partition()

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, E]`."""
        with torch.no_grad():
            return self.machine.halves().sample(n)
