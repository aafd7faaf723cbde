"""Moment-matching posterior sampling: x_0 given x_sigma taken for a Gaussian with its true mean and covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Denoiser, per_row
from pgen.algorithms.diffusion.posteriors.guide import Look, over_event, watched
from pgen.algorithms.diffusion.posteriors.observation import LinearGaussian


@dataclass(frozen=True, eq=False)
class MMPS:
    r"""A conditional denoiser from Tweedie's covariance, Cov[x_0 | x_sigma] = sigma^2 J, J = dD/dx.

        g(x, sigma) = N(y; A D, R + sigma^2 A J A'),    D_y = D + sigma^2 J' A' (R + sigma^2 A J A')^-1 (y - A D)

    (J is symmetric for a true denoiser; its symmetric part is taken, negative eigenvalues of A J A' as zero.) Exact where
    the prior is Gaussian. With m numbers observed the matrix is made by m vector-Jacobian products, all at once;
    or the equation is solved by some conjugate gradients, at one product each.

    Attributes:
        prior: the denoiser D.
        observation: what was seen.
        iterations: of conjugate gradients; None: the matrix in full (few numbers observed). With conjugate gradients the
            determinant is left out of g, which is then a twist, not an evidence.

    References:
        Rozet, Andry, Lanusse & Louppe, Learning Diffusion Priors from Observations by Expectation Maximization,
        NeurIPS 2024. Boys et al., Tweedie Moment Projected Diffusions for Inverse Problems, TMLR 2024.
    """

    prior: Denoiser
    observation: LinearGaussian
    iterations: int | None = None

    def __post_init__(self) -> None:
        """Check the iterations."""
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"MMPS(iterations={self.iterations}): expected None or a positive integer")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """About E[x_0 | x_sigma = x, y]."""
        return self.look(x, sigma).posterior

    def look(self, x: Tensor, sigma: Tensor) -> Look:
        """See `Guide`."""
        with torch.enable_grad():
            leaf, denoised = watched(self.prior, x, sigma)
        value = denoised.detach()
        residual = self.observation.residual(value)
        root = self.observation.root(residual)
        level = per_row(sigma, x) ** 2
        solve = self._in_full if self.iterations is None else self._iterated
        shift, log_twist = solve(leaf, denoised, root * residual, level)
        constant = over_event((math.log(2 * math.pi) - 2 * root.log()).expand(residual.shape)) / 2
        return Look(value, value + shift, log_twist - constant)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x_0), `[B]`."""
        return self.observation.log_likelihood(x0)

    def _in_full(self, leaf: Tensor, denoised: Tensor, white: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """With w A sigma^2 J A' w as a matrix in every row."""
        rows, out = len(white), white.shape[1:]
        size = out.numel()
        root, operator = self.observation.root(white), self.observation.operator
        eye = torch.eye(size, dtype=white.dtype, device=white.device).reshape(size, *out)
        asked = operator.adjoint(root * eye)  # A' w e_j, [m, *event]
        asked = asked.unsqueeze(1).expand(size, *denoised.shape)
        (found,) = torch.autograd.grad(denoised, leaf, asked, is_grads_batched=True)
        found = found * level  # sigma^2 J' A' w e_j, [m, B, *event]
        square = (root * operator(found)).reshape(size, rows, size).movedim(0, 1)
        values, basis = torch.linalg.eigh((square + square.mT) / 2)
        growth = 1 + values.clamp(min=0)  # [B, m]
        along = (white.reshape(rows, 1, size) @ basis).squeeze(1)
        solution = (basis @ (along / growth).unsqueeze(-1)).squeeze(-1)  # [B, m]
        shift = (found * solution.mT.reshape(size, rows, *[1] * (leaf.dim() - 1))).sum(0)
        return shift, -(along.square() / growth + growth.log()).sum(-1) / 2

    def _iterated(
        self, leaf: Tensor, denoised: Tensor, white: Tensor, level: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With products by w A sigma^2 J A' w only."""
        root, operator = self.observation.root(white), self.observation.operator

        def pulled(v: Tensor) -> Tensor:
            asked = operator.adjoint(root * v)
            return level * torch.autograd.grad(denoised, leaf, asked, retain_graph=True)[0]

        solution = conjugate_gradient(lambda v: v + root * operator(pulled(v)), white, self.iterations or 1)
        return pulled(solution), -over_event(white * solution) / 2


def conjugate_gradient(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """Some steps towards K x = right from zero, K symmetric positive, row by row.

    Args:
        apply: K, on `[B, ...]`.
        right: `[B, ...]`.
        iterations: how many.
    """
    tiny = torch.finfo(right.dtype).tiny
    x, residual, direction = torch.zeros_like(right), right, right
    power = over_event(residual.square())
    for _ in range(iterations):
        image = apply(direction)
        rate = per_row(power / over_event(direction * image).clamp(min=tiny), right)
        x, residual = x + rate * direction, residual - rate * image
        power, before = over_event(residual.square()), power
        direction = residual + per_row(power / before.clamp(min=tiny), right) * direction
    return x
