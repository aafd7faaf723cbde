"""What must hold of every kernel that leaves a target alone: chains that begin in it stay in it.

Chains begin at exact, independent draws. Each chain's averages over its iterations are then unbiased, and independent of
those of others: a z-test over chains needs no autocorrelation, and at 1e-6 fails by chance once in a million.
"""

import torch

from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.iterate import iterate
from pgen.testing.statistics import assert_mean

FLOAT = {"dtype": torch.float64}


class Normal:
    """A normal target with correlation, and its draws."""

    def __init__(self, dimensions=3, correlation=0.8):
        index = torch.arange(dimensions, **FLOAT)
        self.mean = index - 1
        deviation = 0.5 + index
        self.covariance = correlation ** (index[:, None] - index).abs() * torch.outer(deviation, deviation)
        self.root = torch.linalg.cholesky(self.covariance)
        self.precision = torch.linalg.inv(self.covariance)

    def __call__(self, q):
        gradient = (self.mean - q) @ self.precision
        return ((q - self.mean) * gradient).sum(-1) / 2, gradient

    def draw(self, chains):
        return self.mean + torch.randn(chains, len(self.mean), **FLOAT) @ self.root.T

    def functions(self, q):
        """The mean and all second moments, less what they should be."""
        x = q - self.mean
        products = x.unsqueeze(-1) * x.unsqueeze(-2) - self.covariance
        return torch.cat([x, products.flatten(-2)], -1)


class LogGamma:
    """The logarithm of a Gamma(2) variable: skewed, with one light and one heavy tail. Moments by quadrature."""

    def __init__(self, dimensions=2):
        self.dimensions = dimensions
        grid = torch.linspace(-30, 6, 400_001, **FLOAT)
        weight = (2 * grid - grid.exp()).exp()
        self.moments = [float((weight * f(grid)).sum() / weight.sum()) for f in self.each]

    each = (lambda x: x, torch.square, torch.exp, lambda x: (x < 0).to(x.dtype))

    def __call__(self, q):
        return (2 * q - q.exp()).sum(-1), 2 - q.exp()

    def draw(self, chains):
        return (-torch.rand(2, chains, self.dimensions, **FLOAT).log()).sum(0).log()

    def functions(self, q):
        return torch.cat([f(q) - m for f, m in zip(self.each, self.moments, strict=True)], -1)


class Half:
    """A standard normal in one dimension of which only q < 1 is left: not a number beyond."""

    def __call__(self, q):
        inside = q < 1
        return torch.where(inside, -q.square() / 2, torch.nan).squeeze(-1), torch.where(inside, -q, torch.nan)

    def draw(self, chains):
        uniform = torch.rand(chains, 1, **FLOAT) * torch.special.ndtr(torch.ones((), **FLOAT))
        return torch.special.ndtri(uniform)

    def functions(self, q):
        edge = torch.ones((), **FLOAT)
        mean = -torch.exp(-edge / 2) / (2 * torch.pi) ** 0.5 / torch.special.ndtr(edge)
        return torch.cat([q - mean, q.square() - 1 - mean], -1)


def log_gamma(q):
    """The logarithm of a Gamma(2, 1) variable, in every dimension."""
    return (2 * q - q.exp()).sum(-1), 2 - q.exp()


def log_half_cauchy(q):
    """The logarithm of the size of a Cauchy variable, in every dimension."""
    return (q - torch.log1p((2 * q).exp())).sum(-1), -torch.tanh(q)


def kolmogorov(draws, cdf):
    """√n times the largest distance between the empirical and the exact distribution function."""
    n = len(draws)
    expected = cdf(draws.sort().values)
    steps = torch.arange(n + 1, dtype=expected.dtype) / n
    return n**0.5 * max((steps[1:] - expected).max(), (expected - steps[:-1]).max()).item()


def tuned(step_size, scale, length=1.0):
    return Tuning(torch.tensor(step_size, **FLOAT), scale, torch.tensor(length, **FLOAT))


def assert_invariant(kernel, target, tuning, *, chains=4000, iterations=20, state=None):
    """Chains that begin in the target are in it at the end, and in the mean on the way."""
    state = kernel.init(target.draw(chains), target) if state is None else state
    _, draws, info = iterate(kernel, state, tuning, target, iterations)
    assert draws.isfinite().all()
    assert ((info.accept >= 0) & (info.accept <= 1)).all()
    assert_mean(target.functions(draws).mean(0), 0.0, what=f"{type(kernel).__name__}: functions of the draws")
    return draws, info
