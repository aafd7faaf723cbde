r"""Traces of Jacobians: exactly, or estimated with a variance.

The velocity of the probability-flow equation in log noise level is x - D(x, sigma); its divergence is d - tr J, with J
the Jacobian of the denoiser. J is never formed: it is known by what it does to directions, a few at a time.

- `Exact`: all d unit vectors.
- `Hutchinson`: the mean of v' J v over random signs v. Its variance for symmetric J is twice the sum of the squares off
  the diagonal, over the number of probes.
- `HutchPP`: the trace over a subspace where J is large, exactly, and an estimate of the rest. A denoiser's Jacobian is
  close to a multiple of the identity and few directions more, and such a trace is found exactly: the multiple is removed
  before the subspace is looked for, and the remaining probes are orthonormal, so that they see no difference in a
  multiple of the identity. As they are drawn without replacement, so to speak, from a frame of the rest, a sample variance
  with the correction for finite populations is unbiased for theirs.

How to write one: a frozen object with `products(d)`, how many directions it takes, and `trace(product, noise, like)`.

References:
    Hutchinson, A stochastic estimator of the trace of the influence matrix, Comm. Stat. Simul. Comput. 18, 1989.
    Meyer, Musco, Musco & Woodruff, Hutch++: Optimal Stochastic Trace Estimation, SOSA 2021.
    Epperly, Tropp & Webber, XTrace: Making the most of every sample in stochastic trace estimation, SIMAX 45, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""From directions `[P, B, *event]` to J times each of them, the same shape."""
Noise = Callable[[int], Tensor]
"""From a number P to fresh standard normal numbers `[P, B, *event]`."""


class Trace(NamedTuple):
    """Traces of rows.

    Attributes:
        value: `[B]`.
        variance: of the estimate, itself an unbiased estimate, `[B]`; None where the value is exact.
        freedom: degrees of freedom of that variance; fewer than probes less 1, as quadratic forms have heavy tails.
    """

    value: Tensor
    variance: Tensor | None = None
    freedom: float | None = None


class Divergence(Protocol):
    """A way to a trace."""

    def products(self, d: int) -> int:
        """How many directions are multiplied by J, for events of d scalars."""
        ...

    def trace(self, product: Product, noise: Noise, like: Tensor) -> Trace:
        """The trace for every row of `like`, `[B, *event]`."""
        ...


@dataclass(frozen=True)
class Exact:
    """One product for every scalar of an event.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> Exact().trace(lambda v: v @ matrix.mT, lambda n: torch.empty(0), torch.zeros(1, 2)).value
        tensor([5.])
    """

    def products(self, d: int) -> int:
        """All d."""
        return d

    def trace(self, product: Product, noise: Noise, like: Tensor) -> Trace:
        """The trace, exactly."""
        event = like.shape[1:]
        d = math.prod(event)
        eye = torch.eye(d, dtype=like.dtype, device=like.device).reshape(d, 1, *event).expand(d, *like.shape)
        return Trace(product(eye).reshape(d, len(like), d).diagonal(dim1=0, dim2=2).sum(1))


@dataclass(frozen=True)
class Hutchinson:
    r"""The mean of v' J v over random probes.

    Attributes:
        probes: how many, at least 2, so that there is a variance.
        orthogonal: probes of one row are orthogonal to each other and uniformly distributed, not signs: better where J
            is close to a multiple of the identity in no particular basis, worse where its diagonal varies much.
    """

    probes: int = 8
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise ValueError(
                f"Hutchinson(probes={self.probes}): expected at least 2; of one probe there is no standard error"
            )

    def products(self, d: int) -> int:
        """One for each probe; never more than d where they are orthogonal."""
        return min(self.probes, d) if self.orthogonal else self.probes

    def trace(self, product: Product, noise: Noise, like: Tensor) -> Trace:
        """The estimate and its variance."""
        if self.orthogonal:
            return _frame(product, noise(self.products(like[0].numel())), like, None)
        signs = torch.where(noise(self.probes) < 0, -1.0, 1.0).to(like)
        values = (signs * product(signs)).reshape(*signs.shape[:2], -1).sum(2)  # [P, B]
        return Trace(values.mean(0), values.var(0) / self.probes, _freedom(self.probes))


@dataclass(frozen=True)
class HutchPP:
    r"""The trace over a subspace, exactly, and an estimate of the rest: Hutch++.

    A third of the products looks for the subspace, a third takes the trace over it, a third probes the rest.

    Attributes:
        probes: products in all, at least 6. With as many as an event has scalars, the trace is exact.
    """

    probes: int = 30

    def __post_init__(self) -> None:
        if self.probes < 6:
            raise ValueError(
                f"HutchPP(probes={self.probes}): expected at least 6, two for each of its three parts"
            )

    def products(self, d: int) -> int:
        """As many as `probes`, or d where d is no more."""
        return min(self.probes, d)

    def trace(self, product: Product, noise: Noise, like: Tensor) -> Trace:
        """The estimate and its variance."""
        d = like[0].numel()
        if d <= self.probes:
            exact = Exact().trace(product, noise, like)
            return Trace(exact.value, torch.zeros_like(exact.value), math.inf)
        k = self.probes // 3
        sketch = noise(k)
        start = torch.linalg.qr(_columns(sketch)).Q  # [B, D, k]
        moved = _columns(product(_directions(start, like)))
        # The least Ritz value, where J is c I and fewer than k directions more, is c: J - c I then has those alone.
        ritz = start.mT @ moved
        least = torch.linalg.eigvalsh((ritz + ritz.mT) / 2)[:, :1].unsqueeze(-1)
        basis = torch.linalg.qr(moved - least * start).Q
        inside = (basis * _columns(product(_directions(basis, like)))).sum((1, 2))
        rest = _frame(product, noise(self.probes - 2 * k), like, basis)
        return rest._replace(value=inside + rest.value)


class Jacobian:
    """Products of a denoiser's Jacobian, or its transpose, with directions: reverse mode over many at once, or what else works.

    Which of them a denoiser allows is found out once, against a finite difference: a denoiser that is computed under
    `torch.no_grad`, or detaches its input, would otherwise have a Jacobian that is wrong and a density that looks right.

    Args:
        denoiser: from values `[B, *event]` and noise levels `[B]`.
        chunk: scalars of all directions in one call.
        differentiable: products can be differentiated further.

    Attributes:
        mode: `"reverse"` (one evaluation for all directions), `"forward"` or `"loop"` (reverse mode, a direction at a time);
            None before the first product.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        *,
        chunk: int = 2**18,
        differentiable: bool = False,
    ) -> None:
        self.denoiser, self.chunk, self.differentiable = denoiser, chunk, differentiable
        self.mode: str | None = None

    def at(self, x: Tensor, sigma: Tensor) -> Product:
        """Products at values `[B, *event]` and noise levels `[B]`."""

        def product(directions: Tensor) -> Tensor:
            if self.mode is None:
                self.mode = self._allowed(x, sigma)
            return self._product(self.mode, x, sigma, directions)

        return product

    def _product(self, mode: str, x: Tensor, sigma: Tensor, directions: Tensor) -> Tensor:
        size = max(1, self.chunk // max(x.numel(), 1))
        if mode == "forward":
            with torch.set_grad_enabled(self.differentiable):
                along = torch.func.vmap(
                    lambda v: torch.func.jvp(lambda y: self.denoiser(y, sigma), (x,), (v,))[1]
                )
                parts = [along(part) for part in directions.split(size)]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        with torch.enable_grad():
            y = x if self.differentiable and x.requires_grad else x.detach().requires_grad_()
            out = self.denoiser(y, sigma)

            def back(v: Tensor, batched: bool) -> Tensor:
                found = torch.autograd.grad(
                    out, y, v, retain_graph=True, create_graph=self.differentiable, is_grads_batched=batched
                )
                return found[0]

            if mode == "reverse":
                return torch.cat([back(part, True) for part in directions.split(size)])
            return torch.stack([back(v, False) for v in directions])

    def _allowed(self, x: Tensor, sigma: Tensor) -> str:
        """The first mode that works and agrees with a finite difference in a random direction."""
        numbers = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        v = numbers.to(x)
        h = 0.01 * sigma.reshape(-1, *(1,) * (x.dim() - 1)).to(x)
        with torch.no_grad():
            high, low = self.denoiser(x + h * v, sigma), self.denoiser(x - h * v, sigma)
            seen = (high - low) / (2 * h)
            rounding = torch.finfo(x.dtype).eps * (high.abs() + x.abs()) / h
        causes = []
        for mode in ("reverse", "forward", "loop"):
            try:
                found = self._product(mode, x, sigma, v.unsqueeze(0))[0].detach()
            except (RuntimeError, NotImplementedError, ValueError) as error:
                causes.append(f"{mode} mode: {str(error).strip().splitlines()[0]}")
                continue
            # Reverse mode has the transpose: what the two share is the quadratic form, all that a trace needs.
            miss = ((found - seen) * v).sum().abs()
            scale = torch.maximum((seen * v).abs().sum(), (found * v).abs().sum())
            if miss <= 0.05 * scale + 10 * (rounding * v.abs()).sum():
                return mode
            causes.append(f"{mode} mode: the derivative differs from a finite difference")
        raise ValueError(
            "the denoiser cannot be differentiated in its values: "
            + "; ".join(causes)
            + ". Expected a function of torch's operations; is it computed under torch.no_grad, or its input detached?"
        )


def _frame(product: Product, noise: Tensor, like: Tensor, basis: Tensor | None) -> Trace:
    """The trace over what is orthogonal to `basis`, by an orthonormal frame of it or a part of one."""
    probes = _columns(noise)
    d, q = probes.shape[1:]
    taken = 0 if basis is None else basis.shape[2]
    q = min(q, d - taken)
    probes = probes[:, :, :q]
    for _ in range(
        2 if basis is not None else 1
    ):  # twice is enough (Kahan): the first leaves rounding errors
        if basis is not None:
            probes = probes - basis @ (basis.mT @ probes)
        probes = torch.linalg.qr(probes).Q
    values = (probes * _columns(product(_directions(probes, like)))).sum(1)  # [B, q]
    left = d - taken
    if q == left:  # the whole of it: nothing is estimated
        return Trace(values.sum(1), torch.zeros_like(values[:, 0]), math.inf)
    return Trace(left * values.mean(1), left**2 * values.var(1) / q * (1 - q / left), _freedom(q))


def _freedom(count: int) -> float:
    """Degrees of freedom of a sample variance of quadratic forms.

    Of normal numbers there are count - 1. A quadratic form of normal numbers has an excess kurtosis of up to 12, which it
    has where one direction outweighs all others; sample variances vary the more for it.
    """
    return (count - 1) / (1 + 6 * (count - 1) / count)


def _columns(directions: Tensor) -> Tensor:
    """Directions `[P, B, *event]` as matrices `[B, D, P]`."""
    return directions.reshape(*directions.shape[:2], -1).permute(1, 2, 0)


def _directions(columns: Tensor, like: Tensor) -> Tensor:
    """Matrices `[B, D, P]` as directions `[P, B, *event]`."""
    return columns.permute(2, 0, 1).reshape(-1, *like.shape)
