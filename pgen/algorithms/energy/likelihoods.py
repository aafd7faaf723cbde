r"""Likelihoods of one number given all others, for what is counted: the partition function cancels in each of them.

    pseudo-likelihood   sum_i log p(z_i | all others)
    ratio matching      - sum_i s(f(x with bit i flipped) - f(x))^2

Both are greatest at the law of the data. Each index takes as many evaluations as it has values (a bit, one more), so a random
few of the indices may stand for all.

References:
    Besag, Statistical analysis of non-lattice data, The Statistician 24, 1975.
    Hyvarinen, Some extensions of score matching, CSDA 51, 2007: ratio matching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pgen.algorithms.energy.learning import Frame, Learned, at_least
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density


@dataclass(frozen=True)
class _Neighbours:
    """What both share: which indices, and the densities of all values of each.

    Attributes:
        indices: drawn for each row and call to stand for all; None for all of them.
    """

    scores: ClassVar[bool] = True
    indices: int | None = None

    def __post_init__(self) -> None:
        """Check hyperparameters."""
        if self.indices is not None:
            at_least("indices", self.indices, 1)

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Frame:
        """Nothing but the space.

        Raises:
            ValueError: a number that is measured.
        """
        if space.dims or not space.cardinalities:
            raise ValueError(
                "these compare the values of numbers that are counted; use score matching for the others"
            )
        return Frame(data, space)

    def _values(self, f: Density, x: Tensor, space: Space) -> tuple[Tensor, Tensor, float]:
        """What is known of s indices of each row.

        Returns:
            Densities `[K, s, n]` of all their values (minus infinity where there is none), the values that they have,
            `[s, n]`, and how many indices each of the s stands for.
        """
        z = space.apart(x.detach())[1]
        n, m = z.shape
        sizes = torch.tensor(space.cardinalities, device=z.device)
        some = m if self.indices is None else min(self.indices, m)
        which = (
            torch.rand(n, m, device=z.device).argsort(1)[:, :some]
            if some < m
            else torch.arange(m, device=z.device).expand(n, m)
        )
        most = max(space.cardinalities)
        value = torch.arange(most, device=z.device).reshape(most, 1, 1)
        known = value < sizes[which].mT  # [K, s, n]
        chosen = value.expand(most, some, n).minimum(sizes[which].mT - 1)
        every = z.expand(most, some, n, m).scatter(
            3, which.mT.expand(most, some, n).unsqueeze(3), chosen.unsqueeze(3)
        )
        empty = x.new_zeros(most * some * n, 0)
        found = f(space.together(empty, every.reshape(-1, m))).reshape(most, some, n)
        return torch.where(known, found, -math.inf), z.gather(1, which).mT, m / some


@dataclass(frozen=True)
class PseudoLikelihood(_Neighbours):
    """The sum of log conditionals.

    Example:
        Independent bits: then it is the likelihood.

        >>> from torch.distributions import constraints
        >>> x, method = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), PseudoLikelihood()
        >>> logits = torch.tensor([0.0, 2.0])
        >>> method(lambda x: x @ logits, x, method.memory(x, Space.of(constraints.boolean, (2,)))).surrogate
        tensor([-2.8201, -0.8201])
    """

    def __call__(self, f: Density, x: Tensor, memory: Frame) -> Learned:
        """Log conditionals of each row, summed."""
        found, value, weight = self._values(f, x, memory.space)
        log_p = found.log_softmax(0).gather(0, value.unsqueeze(0))[0]
        right = (found.detach().argmax(0) == value).to(log_p.dtype).mean()
        return Learned(weight * log_p.sum(0), {"guessed": right})


@dataclass(frozen=True)
class RatioMatching(_Neighbours):
    """Bits: the square of one less each conditional. Less is made of bits that are predicted badly."""

    def memory(
        self, data: Tensor, space: Space, *, reference: Law | None = None, conditional: bool = False
    ) -> Frame:
        """Nothing but the space.

        Raises:
            ValueError: numbers that are not bits.
        """
        found = super().memory(data, space)
        if not space.binary:
            raise ValueError("ratio matching is for bits; use PseudoLikelihood")
        return found

    def __call__(self, f: Density, x: Tensor, memory: Frame) -> Learned:
        """Minus the sum of squares of each row."""
        found, value, weight = self._values(f, x, memory.space)
        p = found.softmax(0).gather(0, value.unsqueeze(0))[0]
        return Learned(-weight * (1 - p).square().sum(0), {"guessed": (p.detach() > 0.5).to(p.dtype).mean()})
