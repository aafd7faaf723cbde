r"""Linear observations with Gaussian noise, y = A x_0 + b + N(0, R), and the linear algebra of them.

What the algorithms ask for is (R + c A A')^-1 and its determinant, for another c in every row. With w = R^(-1/2),

    R + c A A' = w^-1 (I + c Q diag(lambda) Q') w^-1

where Q, lambda decompose w A A' w once: from the operator's singular values where it knows them and R is a multiple of
the identity, else from the matrix A A', made in full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import per_row
from pgen.algorithms.diffusion.operators.base import LinearOperator, Map
from pgen.algorithms.diffusion.posteriors.guide import over_event

LARGEST = 4096
"""Outputs for which A A' is made in full, at most."""


class Gram(NamedTuple):
    """Decomposition of w A A' w: eigenvalues, the projection on their vectors, and back."""

    values: Tensor
    project: Map
    expand: Map


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """y = A x_0 + offset + noise.

    Attributes:
        operator: A.
        y: what was seen, `[*out]`, or `[B, *out]` with an observation for each row.
        variance: of the noise, independent in every number: one for all, or `[*out]`.
        offset: b, `[*out]` or a number.

    Raises:
        ValueError: a variance is not positive.

    Example:
        >>> from pgen.algorithms.diffusion.operators import Mask
        >>> seen = LinearGaussian(Mask(torch.tensor([True, False])), torch.tensor([2.0]), 0.25)
        >>> seen.log_likelihood(torch.tensor([[2.0, 7.0], [3.0, 7.0]]))
        tensor([-0.2258, -2.2258])
    """

    operator: LinearOperator
    y: Tensor
    variance: Tensor | float
    offset: Tensor | float = 0.0
    _gram: list[Gram] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Check the variance."""
        if not bool((torch.as_tensor(self.variance) > 0).all()):
            raise ValueError(f"LinearGaussian(variance={self.variance}): expected positive numbers")

    def residual(self, x0: Tensor) -> Tensor:
        """y - A x_0 - b, `[B, *out]`."""
        return self.y.to(x0) - self.operator(x0) - self.offset

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0), `[B]`, in nats, normalised."""
        residual = self.residual(x0)
        spread = torch.as_tensor(self.variance).to(residual).expand(residual.shape)
        return -over_event(residual.square() / spread + spread.log() + math.log(2 * math.pi)) / 2

    def root(self, like: Tensor) -> Tensor:
        """R^(-1/2): a number, or `[*out]`."""
        return torch.as_tensor(self.variance).to(like).rsqrt()

    def solve(self, residual: Tensor, spread: Tensor) -> Tensor:
        """(R + spread A A')^-1 residual.

        Args:
            residual: `[B, *out]`.
            spread: variance of x_0 around its mean, `[B]`.
        """
        gram, root = self.gram(residual), self.root(residual)
        white = root * residual
        c = gram.project(white)
        shrink = 1 / (1 + per_row(spread.to(c), c) * gram.values.to(c)) - 1
        return root * (white + gram.expand(shrink * c))

    def log_density(self, residual: Tensor, spread: Tensor) -> Tensor:
        """log N(residual; 0, R + spread A A'), `[B]`, in nats."""
        gram, root = self.gram(residual), self.root(residual)
        white = root * residual
        c = gram.project(white)
        growth = (1 + per_row(spread.to(c), c) * gram.values.to(c)).expand(c.shape)
        square = over_event(white.square()) + over_event((1 / growth - 1) * c.square())
        constant = over_event((math.log(2 * math.pi) - 2 * root.log()).expand(white.shape))
        return -(square + over_event(growth.log()) + constant) / 2

    def gram(self, like: Tensor) -> Gram:
        """The decomposition of w A A' w, made once.

        Args:
            like: a residual, `[B, *out]`.

        Raises:
            ValueError: neither are the singular values of use nor is the matrix small enough.
        """
        if not self._gram:
            self._gram.append(self._decompose(like))
        return self._gram[0]

    def _decompose(self, like: Tensor) -> Gram:
        out, variance = like.shape[1:], torch.as_tensor(self.variance, dtype=torch.float64)
        if bool((variance == variance.reshape(-1)[0]).all()):
            spectrum = self.operator.svd()
            if spectrum is not None:
                values = spectrum.values.double() ** 2 / variance.reshape(-1)[0].to(spectrum.values.device)
                return Gram(values, spectrum.project_output, spectrum.expand_output)
        size = out.numel()
        if size > LARGEST:
            raise ValueError(
                f"an observation of {size} numbers whose operator has no known singular values (or with unequal "
                f"variances) needs the matrix A A' in full; expected at most {LARGEST} numbers, or an operator with "
                "`svd` and one variance"
            )
        root = self.root(torch.zeros((), dtype=torch.float64, device=like.device)).expand(out).reshape(-1)
        eye = torch.eye(size, dtype=torch.float64, device=like.device)
        with torch.no_grad():
            square = self.operator(self.operator.adjoint(eye.reshape(size, *out))).reshape(size, size)
        values, basis = torch.linalg.eigh(root[:, None] * (square + square.mT) / 2 * root)

        def project(v: Tensor) -> Tensor:
            return v.reshape(len(v), -1) @ basis.to(v)

        def expand(c: Tensor) -> Tensor:
            return (c @ basis.to(c).mT).reshape(len(c), *out)

        return Gram(values.clamp(min=0), project, expand)
