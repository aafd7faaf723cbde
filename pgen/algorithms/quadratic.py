r"""Gaussian marginals and posteriors from a log density alone: a Laplace approximation that proves itself.

Where the log joint density f is a quadratic function of the latents, and only there, the Laplace
approximation is the truth. With $\Lambda = -\nabla^2 f$ and mean $m = \Lambda^{-1} \nabla f(0)$,

\[ \log \int e^{f(z)} dz
   = f(0) + \tfrac12 \nabla f(0)^\top m + \tfrac{D}{2} \log 2\pi - \tfrac12 \log\det \Lambda. \]

So nothing has to be known about how the density was written: linear regression, factor analysis, trees,
Kalman chains and hierarchies of groups are all the same to it. Whether f is quadratic is settled by
comparing its value with the parabola and its gradient with the straight line that they would have to be, near
and far from where it was expanded.

Latents come in two kinds: **outer** ones `[G]`, and **inner** ones `[B, Q]`, whose B blocks meet each other
only through the outer ones. The precision is then an arrow, and its Cholesky factor costs $B (Q + G)^3$ at
most.

Source: Tierney and Kadane 1986 for the expansion; Curtis, Powell and Reid 1974, "On the estimation of
    sparse Jacobian matrices", for getting many columns of the Hessian out of one backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: From outer latents [G] and inner ones [B, Q] to the log density: terms [B] of the blocks, and the rest.
LogJoint = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


#: Posterior standard deviations from the mean at which a density is looked at, as far as a wide prior reaches.
_SPREADS = (0.3, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0, 100.0, 1000.0)


class NotQuadratic(ValueError):
    """The log density is no concave quadratic function of the latents, so no Gaussian is exact."""


@dataclass(frozen=True)
class Shape:
    """How many latents there are and which of them interact.

    Args:
        outer: number of outer latents, G.
        blocks: number of blocks of inner ones, B.
        inner: number in each block, Q.
        colours: for each latent (outer first, then those of one block) a colour. Two latents of one colour
            never interact with each other, nor with a common third. By default every latent has its own.
        pairs: rows (i, j) of latents that interact, both ways round, i = j included; needed with `colours`.
    """

    outer: int
    blocks: int
    inner: int
    colours: Sequence[int] | None = None
    pairs: Tensor | None = None


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian over outer and inner latents, and the log of its total mass.

    Attributes:
        blocks: the terms of log Z that belong to the blocks, `[B]`; without outer latents, the log mass of
            each.
        constant: the rest of log Z, a scalar.
        outer: posterior mean `[G]`.
        inner: posterior mean `[B, Q]`.
        schur: Cholesky factor of the precision of the outer latents with the inner ones integrated out,
            `[G, G]`.
        factors: Cholesky factors of the precision of each block, `[B, Q, Q]`.
        gains: derivative of each block's conditional mean in the outer latents, `[B, Q, G]`.
    """

    blocks: Tensor
    constant: Tensor
    outer: Tensor
    inner: Tensor
    schur: Tensor
    factors: Tensor
    gains: Tensor

    @property
    def log_normalizer(self) -> Tensor:
        """Log of the integral of the density, a scalar."""
        return self.constant + self.blocks.sum()

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Joint draws: outer latents `[n, G]` and inner ones `[n, B, Q]`."""
        options = {"dtype": self.inner.dtype, "device": self.inner.device}
        noise = torch.randn(n, *self.outer.shape, 1, **options)
        outer = torch.linalg.solve_triangular(self.schur.mT, noise, upper=True).squeeze(-1)
        noise = torch.randn(n, *self.inner.shape, 1, **options)
        inner = torch.linalg.solve_triangular(self.factors.mT, noise, upper=True).squeeze(-1)
        inner = inner + torch.einsum("bqg,ng->nbq", self.gains, outer)
        return self.outer + outer, self.inner + inner

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Marginal covariances of the outer latents `[G, G]` and of each block `[B, Q, Q]`."""
        outer = torch.cholesky_inverse(self.schur)
        return outer, torch.cholesky_inverse(self.factors) + self.gains @ outer @ self.gains.mT


def gaussian(log_joint: LogJoint, shape: Shape, like: Tensor) -> Gaussian:
    """The Gaussian that a quadratic log density is, differentiable in whatever `log_joint` depends on.

    Args:
        log_joint: the log density; blocks must not interact except through the outer latents.
        shape: sizes, and which latents interact.
        like: a tensor whose dtype and device the latents take.

    Raises:
        NotQuadratic: the Hessian is not negative definite. That the density is quadratic is *not* checked
            here, but by `prove`, since it needs to be checked once and not at every training step.

    >>> def log_joint(outer, inner):  # z ~ N(0, 1), x = 2 ~ N(z, 1): p(x) = N(2; 0, 2)
    ...     z = inner[:, 0]
    ...     return -(z**2 + (2 - z) ** 2) / 2 - math.log(2 * math.pi), torch.zeros(())
    >>> with torch.no_grad():
    ...     found = gaussian(log_joint, Shape(0, 1, 1), torch.zeros((), dtype=torch.float64))
    >>> round(float(found.inner), 6), round(float(found.log_normalizer + math.log(4 * math.pi) / 2), 6)
    (1.0, -1.0)
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        outer = like.new_zeros(shape.outer).requires_grad_()
        inner = like.new_zeros(shape.blocks, shape.inner).requires_grad_()
        blocks, rest = log_joint(outer, inner)
        slope_outer, slope_inner = _gradient(blocks.sum() + rest, outer, inner)
        hessian = _hessian(slope_outer, slope_inner, outer, inner, shape, differentiable)
    if not differentiable:
        blocks, rest, slope_outer, slope_inner = (
            t.detach() for t in (blocks, rest, slope_outer, slope_inner)
        )
    return _complete(blocks, rest, slope_outer, slope_inner, *(-block for block in hessian))


def prove(log_joint: LogJoint, found: Gaussian, *, tolerance: float | None = None, points: int = 2) -> None:
    r"""Settle whether a log density is the Gaussian that its expansion says.

    At random points z and their mirror images, from a third of a posterior standard deviation to a thousand
    out, the gradient must be $-\Lambda (z - m)$, relative to its largest element, and the value must have
    fallen by $\tfrac12 (z - m)^\top \Lambda (z - m)$, to `tolerance` (by default 1e-6 in double precision,
    2e-3 in single). Points are drawn with torch's generator.

    Raises:
        NotQuadratic: it is not.
    """
    if tolerance is None:
        tolerance = 1e-6 if found.inner.dtype == torch.float64 else 2e-3
    outer_precision, coupling, inner_precision = _precision(found)
    with torch.no_grad():
        blocks, rest = log_joint(found.outer.detach(), found.inner.detach())
        top, height = blocks.sum() + rest, blocks.abs().sum() + rest.abs()
    for spread in _SPREADS:
        draws_outer, draws_inner = found.sample(points)
        for k, sign in itertools.product(range(points), (spread, -spread)):
            outer = (found.outer + sign * (draws_outer[k] - found.outer)).detach().requires_grad_()
            inner = (found.inner + sign * (draws_inner[k] - found.inner)).detach().requires_grad_()
            with torch.enable_grad():
                blocks, rest = log_joint(outer, inner)
                gradients = _gradient(blocks.sum() + rest, outer, inner)
            out, inn = (outer - found.outer).detach(), (inner - found.inner).detach()
            expected = (
                -(outer_precision @ out) - torch.einsum("bqg,bq->g", coupling, inn),
                -(inner_precision @ inn.unsqueeze(-1)).squeeze(-1) - coupling @ out,
            )
            for actual, straight in zip(gradients, expected, strict=True):
                if straight.numel() == 0:
                    continue
                gap = (actual.detach() - straight).abs().max()
                scale = straight.abs().max().clamp_min(torch.finfo(straight.dtype).tiny)
                if not gap <= tolerance * scale:
                    raise NotQuadratic(
                        f"{spread:g} standard deviations from its mean, the gradient of the log density "
                        f"differs from a straight line by {float(gap / scale):.1e} of its size"
                    )
            fall = 0.5 * ((out * expected[0]).sum() + (inn * expected[1]).sum())
            gap, scale = (blocks.sum() + rest - top - fall).detach().abs(), fall.abs() + height
            if not gap <= tolerance * scale:
                raise NotQuadratic(
                    f"{spread:g} standard deviations from its mean, the log density differs from a parabola "
                    f"by {float(gap / scale):.1e} of its size"
                )


def _gradient(total: Tensor, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.autograd.grad(
        total, (outer, inner), create_graph=True, materialize_grads=True, allow_unused=True
    )
    return found[0], found[1]


def _hessian(
    slope_outer: Tensor, slope_inner: Tensor, outer: Tensor, inner: Tensor, shape: Shape, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [G, G], [B, Q, G] and [B, Q, Q] of the Hessian, one backward pass per colour of columns."""
    g, every = shape.outer, torch.arange(shape.outer + shape.inner)
    colours = every if shape.colours is None else torch.as_tensor(shape.colours)
    pairs = torch.cartesian_prod(every, every) if shape.pairs is None else shape.pairs
    outer_block = _Entries(outer.new_zeros(g, g))
    coupling = _Entries(inner.new_zeros(shape.blocks, shape.inner, g))
    inner_block = _Entries(inner.new_zeros(shape.blocks, shape.inner, shape.inner))
    # Columns of outer and of inner latents take passes of their own: in outer rows, the blocks would add up.
    for columns, slope in ((every[:g], slope_outer), (every[g:], slope_inner)):
        for colour in colours[columns].unique().tolist():
            here = columns[colours[columns] == colour]
            weight = slope[..., here.to(slope.device) - columns[0]].sum()
            if not weight.requires_grad:
                continue
            along_outer, along_inner = torch.autograd.grad(
                weight,
                (outer, inner),
                retain_graph=True,
                create_graph=differentiable,
                materialize_grads=True,
                allow_unused=True,
            )
            # Of the columns of one colour, a row meets at most one: its sum over them is that one's entry.
            row, column = pairs[torch.isin(pairs[:, 1], here)].unbind(1)
            inside = row >= g
            if columns[0] >= g:
                inner_block.add(row[inside] - g, column[inside] - g, along_inner)
            else:
                outer_block.add(row[~inside], column[~inside], along_outer)
                coupling.add(row[inside] - g, column[inside], along_inner)
    return outer_block.matrix(), coupling.matrix(), inner_block.matrix()


class _Entries:
    """Entries of a (batch of) matrix, collected and written at once."""

    def __init__(self, zeros: Tensor) -> None:
        self.zeros = zeros
        self.rows: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        rows = rows.to(values.device)
        self.rows.append(rows)
        self.columns.append(columns.to(values.device))
        self.values.append(values[..., rows])

    def matrix(self) -> Tensor:
        if not self.rows:
            return self.zeros
        batch = [torch.arange(n, device=self.zeros.device).unsqueeze(-1) for n in self.zeros.shape[:-2]]
        return self.zeros.index_put(
            (*batch, torch.cat(self.rows), torch.cat(self.columns)), torch.cat(self.values, -1)
        )


def _complete(
    blocks: Tensor,
    rest: Tensor,
    slope_outer: Tensor,
    slope_inner: Tensor,
    outer_precision: Tensor,
    coupling: Tensor,
    inner_precision: Tensor,
) -> Gaussian:
    """Complete the square: first every block, then the outer latents."""
    factors = _cholesky(inner_precision, "an inner latent")
    solved = torch.cholesky_solve(torch.cat([coupling, slope_inner.unsqueeze(-1)], -1), factors)
    gains, shift = -solved[..., :-1], solved[..., -1]
    schur = _cholesky(outer_precision + (coupling.mT @ gains).sum(0), "an outer latent")
    slope = slope_outer + torch.einsum("bqg,bq->g", gains, slope_inner)
    outer = torch.cholesky_solve(slope.unsqueeze(-1), schur).squeeze(-1)
    masses = blocks + 0.5 * (slope_inner * shift).sum(-1) + _log_volume(factors)
    constant = rest + 0.5 * (slope * outer).sum() + _log_volume(schur)
    inner = shift + gains @ outer
    return Gaussian(masses, constant, outer, inner, schur, factors, gains)


def _log_volume(factor: Tensor) -> Tensor:
    """Half the log of (2 pi)^D over the determinant, from a Cholesky factor of the precision."""
    return 0.5 * factor.shape[-1] * math.log(2 * math.pi) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _cholesky(precision: Tensor, what: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(0.5 * (precision + precision.mT))
    if bool((info != 0).any()) or not bool(torch.isfinite(factor).all()):
        raise NotQuadratic(
            f"the log density does not fall off along {what}: its Hessian is not negative definite, so it is "
            "no Gaussian"
        )
    return factor


def _precision(found: Gaussian) -> tuple[Tensor, Tensor, Tensor]:
    inner = found.factors @ found.factors.mT
    coupling = -(inner @ found.gains)
    outer = found.schur @ found.schur.mT - (coupling.mT @ found.gains).sum(0)
    return outer.detach(), coupling.detach(), inner.detach()
