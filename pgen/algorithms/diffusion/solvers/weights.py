r"""Weights of exponential Adams methods: a polynomial through denoised values, integrated exactly.

With h = log(s / t) and time tau from 0 at noise level s to h at t, diffusion's equations are linear but for the denoiser:

    x_t = (t / s) exp(-eta h) x_s + r int_0^h exp(-r (h - tau)) D(tau) dtau (+ noise),    r = 1 + eta

eta is 0 for the ordinary and 1 for the reverse-time stochastic differential equation. D is replaced by the polynomial
through its values at some noise levels, in some variable of the noise level: then the integral is a sum over these
values with weights that depend on noise levels alone.

References:
    Hochbruck & Ostermann, Exponential integrators, Acta Numerica 2010, section 2.5.
    Zhang & Chen, Fast Sampling of Diffusion Models with Exponential Integrator, ICLR 2023.
    Gonzalez et al., SEEDS: Exponential SDE Solvers, NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

POINTS = 24
"""Of the Gauss-Legendre rule: exact to rounding wherever a step is less than a factor of e^20."""

VARIABLES: dict[str, Callable[[float], float]] = {
    "log": math.log,
    "sigma": float,
    "angle": math.atan,
}
"""Variables in which denoised values are taken for a polynomial: log sigma, sigma, arctan(sigma)."""


def _legendre(points: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on [0, 1], by Golub & Welsch's eigenvalues."""
    k = torch.arange(1, points, dtype=torch.float64, device="cpu")
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return ((nodes + 1) / 2).tolist(), vectors[0].square().tolist()


_NODES, _WEIGHTS = _legendre(POINTS)


def adams(
    levels: Sequence[float], s: float, t: float, *, variable: str = "log", rate: float = 1.0
) -> list[float]:
    """Weights of denoised values at some noise levels, for a step from s to t.

    Args:
        levels: noise levels of the values, all different.
        s: noise level where the step begins.
        t: where it ends; 0 too, where the variable reaches it.
        variable: of the polynomial, a key of `VARIABLES`.
        rate: r = 1 + eta.

    Returns:
        One weight for each level; their sum is 1 - (t / s)^r.
    """
    if len(levels) == 1:
        return [1.0 - (t / s) ** rate]
    phi = VARIABLES[variable]
    z = [phi(level) for level in levels]
    if t == 0.0:  # the integral is all at its end
        return _lagrange(z, phi(t))
    h = math.log(s / t)
    total = [0.0] * len(z)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        mass = weight * rate * h * math.exp(-rate * h * (1 - node))
        for j, basis in enumerate(_lagrange(z, phi(s * math.exp(-h * node)))):
            total[j] += mass * basis
    return total


def _lagrange(z: list[float], at: float) -> list[float]:
    """The polynomials that are 1 at one node and 0 at the others, at a point."""
    out = []
    for j, own in enumerate(z):
        product = 1.0
        for k, other in enumerate(z):
            if k != j:
                product *= (at - other) / (own - other)
        out.append(product)
    return out


def combined(x: Tensor, keep: float, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """keep x + sum of weights times values, in about as many passes over memory as there are values.

    Args:
        x: values `[B, *event]`.
        keep: their factor.
        values: denoised values `[B, *event]`.
        weights: their factors, whose sum is 1 - keep.
    """
    out = torch.lerp(values[0], x, keep)
    if len(values) > 1:
        out = out.add_(values[0], alpha=weights[0] - (1.0 - keep))
    for one, weight in zip(values[1:], weights[1:], strict=True):
        out = out.add_(one, alpha=weight)
    return out
