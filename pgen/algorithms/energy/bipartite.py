r"""Units in two halves, each independent given the other: what can be computed of such a net.

.. math:: f(v) = b^\top v + \sum_j \log(1 + e^{c_j + W_j v}) \qquad \text{(bits v)}

          f(v) = m^\top v - \tfrac{1}{2} \lambda^\top v^2 + k + \sum_j \log(1 + e^{c_j + W_j v}) \qquad \text{(real v)}

Both are energies -f of v with the bits h summed out, and offer a block Gibbs sweep v -> h -> v, which is reversible; and where the
smaller half has at most `SMALL` units, the exact sum over all its states, and exact draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pgen.algorithms.energy.sums import log_sum

SMALL = 20
"""Units whose states are summed over."""

_CELLS = 2**22


def bits_of(code: Tensor, size: int, like: Tensor) -> Tensor:
    """The states `[R, size]` that have these numbers `[R]`.

    >>> bits_of(torch.arange(4), 2, torch.zeros(()))
    tensor([[0., 0.],
            [0., 1.],
            [1., 0.],
            [1., 1.]])
    """
    return (code.unsqueeze(1) >> torch.arange(size - 1, -1, -1, device=code.device) & 1).to(like.dtype)


def coins(logits: Tensor) -> Tensor:
    """Bits that are one with these log odds."""
    return (torch.rand_like(logits) < logits.sigmoid()).to(logits.dtype)


@dataclass(frozen=True)
class Bits:
    """Bits on both sides.

    Attributes:
        weight: `[hidden, visible]`.
        visible: biases `[visible]`.
        hidden: biases `[hidden]`.

    Example:
        >>> net = Bits(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2))
        >>> net.log_partition().exp()
        tensor(32.0000, dtype=torch.float64)
    """

    weight: Tensor
    visible: Tensor
    hidden: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, visible]`."""
        return -(v @ self.visible + F.softplus(F.linear(v, self.weight, self.hidden)).sum(-1))

    def raised(self, v: Tensor) -> Tensor:
        """Hidden units, drawn given visible ones."""
        return coins(F.linear(v, self.weight, self.hidden))

    def lowered(self, h: Tensor) -> Tensor:
        """Visible units, drawn given hidden ones."""
        return coins(F.linear(h, self.weight.T, self.visible))

    def sweep(self, v: Tensor) -> Tensor:
        """Up and down once."""
        return self.lowered(self.raised(v))

    def at(self, beta: Tensor | float, rates: Tensor) -> Bits:
        """The net on its way from independent bits with log odds `rates` `[visible]`."""
        return Bits(beta * self.weight, (1 - beta) * rates + beta * self.visible, beta * self.hidden)

    def turned(self) -> Bits:
        """The same net with its halves swapped."""
        return Bits(self.weight.T, self.hidden, self.visible)

    @property
    def knows_partition(self) -> bool:
        """Whether one of the halves is small."""
        return min(self.weight.shape) <= SMALL

    def log_partition(self) -> Tensor | None:
        """Log of the sum over all states, `[]`, in double precision; None where there are too many."""
        small = self if len(self.visible) <= len(self.hidden) else self.turned()
        size = len(small.visible)
        if size > SMALL:
            return self._unconnected()

        def terms(code: Tensor) -> Tensor:
            return -small(bits_of(code, size, small.visible))

        return log_sum(terms, 2**size, self.weight.device, max(1, _CELLS // len(small.hidden)))

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, visible]`.

        Raises:
            ValueError: both halves are too large to be summed over, and connected.
        """
        turn = len(self.hidden) < len(self.visible)
        small = self.turned() if turn else self
        size = len(small.visible)
        if size > SMALL:
            if self._unconnected() is None:
                raise ValueError(
                    f"exact draws sum over the smaller half, at most {SMALL} units; it has {size}: run block Gibbs sweeps"
                )
            return coins(self.visible.expand(n, -1))
        codes = torch.arange(2**size, device=self.weight.device)
        logits = torch.cat(
            [
                -small(bits_of(part, size, self.visible)).double()
                for part in codes.split(max(1, _CELLS // len(small.hidden)))
            ]
        )
        drawn = bits_of(torch.multinomial(logits.softmax(0), n, replacement=True), size, self.visible)
        return self.lowered(drawn) if turn else drawn

    def _unconnected(self) -> Tensor | None:
        if bool(self.weight.any()):
            return None
        return F.softplus(self.visible.double()).sum() + F.softplus(self.hidden.double()).sum()


@dataclass(frozen=True)
class Reals:
    """Real numbers below, bits above.

    Attributes:
        weight: `[hidden, visible]`.
        linear: m, `[visible]`.
        precision: lambda, `[visible]`, positive.
        constant: k, `[]`.
        hidden: biases `[hidden]`.
    """

    weight: Tensor
    linear: Tensor
    precision: Tensor
    constant: Tensor
    hidden: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Free energies `[R]` of rows `[R, visible]`."""
        quadratic = v @ self.linear - v.square() @ self.precision / 2
        return -(quadratic + self.constant + F.softplus(F.linear(v, self.weight, self.hidden)).sum(-1))

    def raised(self, v: Tensor) -> Tensor:
        """Hidden bits, drawn given visible numbers."""
        return coins(F.linear(v, self.weight, self.hidden))

    def lowered(self, h: Tensor) -> Tensor:
        """Visible numbers, drawn given hidden bits."""
        mean = F.linear(h, self.weight.T, self.linear) / self.precision
        return mean + torch.randn_like(mean) * self.precision.rsqrt()

    def sweep(self, v: Tensor) -> Tensor:
        """Up and down once."""
        return self.lowered(self.raised(v))

    def at(self, beta: Tensor | float, mean: Tensor, deviation: Tensor) -> Reals:
        """The net on its way from independent normal numbers."""
        precision = deviation.reciprocal().square()
        return Reals(
            beta * self.weight,
            (1 - beta) * mean * precision + beta * self.linear,
            (1 - beta) * precision + beta * self.precision,
            beta * self.constant,
            beta * self.hidden,
        )

    @property
    def knows_partition(self) -> bool:
        """Whether there are few hidden units."""
        return len(self.hidden) <= SMALL

    def log_partition(self) -> Tensor | None:
        """Log of the integral, `[]`, by a sum over the hidden states; None where there are too many."""
        size = len(self.hidden)
        if size > SMALL and bool(self.weight.any()):
            return None
        if size > SMALL:
            return self._integrals(self.linear.double()) + F.softplus(self.hidden.double()).sum()

        def terms(code: Tensor) -> Tensor:
            return self._of_hidden(bits_of(code, size, self.hidden))

        return log_sum(terms, 2**size, self.weight.device, max(1, _CELLS // len(self.linear)))

    def sample(self, n: int) -> Tensor:
        """Exact draws `[n, visible]`.

        Raises:
            ValueError: there are too many hidden states to sum over, and they matter.
        """
        size = len(self.hidden)
        if size <= SMALL:
            parts = torch.arange(2**size, device=self.weight.device).split(max(1, _CELLS // len(self.linear)))
            logits = torch.cat([self._of_hidden(bits_of(part, size, self.hidden)) for part in parts])
            code = torch.multinomial(logits.double().softmax(0), n, replacement=True)
            return self.lowered(bits_of(code, size, self.hidden))
        if bool(self.weight.any()):
            raise ValueError(
                f"exact draws sum over at most {SMALL} hidden units, got {size}: run block Gibbs sweeps"
            )
        return self.lowered(coins(self.hidden.expand(n, -1)))

    def _of_hidden(self, h: Tensor) -> Tensor:
        return h @ self.hidden + self._integrals(F.linear(h, self.weight.T, self.linear))

    def _integrals(self, linear: Tensor) -> Tensor:
        """Log integral of `exp(linear v - precision v^2 / 2 + constant)`."""
        each = linear.square() / self.precision + math.log(2 * math.pi) - self.precision.log()
        return each.sum(-1) / 2 + self.constant
