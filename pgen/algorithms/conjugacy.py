r"""Conjugate posteriors from a log likelihood alone: conjugacy that proves itself.

A prior of an exponential family, $p(z) = h(z) \exp(\eta^\top T(z) - A(\eta))$, is conjugate to a
likelihood if, and only if, the log likelihood is linear in the sufficient statistics:
$\log p(x \mid z) = a + b^\top T(z)$. Then

\[ p(z \mid x) = h(z) \exp((\eta + b)^\top T(z) - A(\eta + b)), \qquad
   \log p(x) = a + A(\eta + b) - A(\eta). \]

Nothing has to be known about how the likelihood was written: b is read off its gradient at a few points,
and that the likelihood is linear in T is settled at many more, from one tail of prior and posterior to the other:
a likelihood with a kink or a step is linear in T on either side of it, and only points on both tell. So Bernoulli, binomial, geometric and
negative binomial likelihoods under a beta prior need no table, nor do exposures that some network computes.

Source: Diaconis and Ylvisaker 1979, "Conjugate priors for exponential families".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributions
from torch.distributions import Distribution

#: Probabilities whose quantiles, under prior and posterior, the likelihood is looked at: the tails first.
_LEVELS = (0.999, 0.001, 0.997, 0.003, 0.99, 0.01, *(k / 20 for k in range(1, 20)))
#: The same for vectors, each of whose components is taken from tail to tail, as long as the runs last.
_VECTOR_LEVELS = (0.999, 0.001, 0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01)
_VECTOR_RUNS = 48
#: Draws that quantiles are read off, and numbers that they may amount to.
_DRAWS, _MAX_NUMBERS = 4096, 2**22
#: Round-off that an update's parameters may carry, in units of the last place.
_ROUND_OFF = 1e4

#: From a value of the latent, `[*batch, *event]`, to terms of any shape that add up to the log likelihood.
LogLikelihood = Callable[[Tensor], Tensor]


class NotConjugate(ValueError):
    """The log likelihood is not linear in the prior's sufficient statistics, or the posterior is improper."""


@dataclass(frozen=True)
class Family:
    """An exponential family of one number or, for `vector`, of one probability vector per batch element.

    To add one: the statistics T, the natural parameters of a distribution, A, and the way back to
    parameters.

    Attributes:
        statistics: T(z), with a new last dimension (`vector`: the last dimension itself).
        natural: natural parameters of a distribution of the family, likewise.
        log_normalizer: A of natural parameters.
        parameters: constructor arguments of the family's posterior class from natural parameters.
        posterior: that class.
        points: values of the latent at which the likelihood is looked at, given the prior; as many as
            statistics.
        vector: whether the latent is a probability vector.
    """

    statistics: Callable[[Tensor], Tensor]
    natural: Callable[[Any], Tensor]
    log_normalizer: Callable[[Tensor], Tensor]
    parameters: Callable[[Tensor], Mapping[str, Tensor]]
    posterior: Any  # a class of distributions
    points: Callable[[Any], list[Tensor]]
    vector: bool = False


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*tensors), -1)


# Each family in natural form. Normal: T = (z, z^2). Beta: (log z, log(1 - z)). Gamma: (log z, z).
# Inverse gamma: (log z, 1 / z). Log-normal: (log z, log^2 z). Dirichlet: log z.


def _normal_a(eta: Tensor) -> Tensor:
    first, second = eta.unbind(-1)
    return -(first**2) / (4 * second) - 0.5 * torch.log(-2 * second)


def _normal_parameters(eta: Tensor) -> Mapping[str, Tensor]:
    first, second = eta.unbind(-1)
    return {"loc": -first / (2 * second), "scale": (-2 * second).rsqrt()}


def _normal_eta(loc: Tensor, scale: Tensor) -> Tensor:
    return _stack(loc / scale**2, -0.5 / scale**2)


def _gamma_a(eta: Tensor) -> Tensor:
    shape, rate = eta[..., 0] + 1, -eta[..., 1]
    return torch.lgamma(shape) - shape * rate.log()


def _inverse_gamma_a(eta: Tensor) -> Tensor:
    shape, rate = -eta[..., 0] - 1, -eta[..., 1]
    return torch.lgamma(shape) - shape * rate.log()


def _beta_a(eta: Tensor) -> Tensor:
    return torch.lgamma(eta + 1).sum(-1) - torch.lgamma((eta + 1).sum(-1))


def _around(prior: Distribution) -> list[Tensor]:
    return [prior.mean - prior.stddev, prior.mean + prior.stddev]


def _simplex_points(prior: Distribution) -> list[Tensor]:
    mean = prior.mean
    tilt = torch.linspace(0.5, 1.5, mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return [mean, mean * tilt / (mean * tilt).sum(-1, keepdim=True)]


_GAMMA = Family(
    statistics=lambda z: _stack(z.log(), z),
    natural=lambda d: _stack(d.concentration - 1, -d.rate),
    log_normalizer=_gamma_a,
    parameters=lambda eta: {"concentration": eta[..., 0] + 1, "rate": -eta[..., 1]},
    posterior=distributions.Gamma,
    points=lambda d: [0.5 * d.mean, 2.0 * d.mean],
)
_BETA = Family(
    statistics=lambda z: _stack(z.log(), torch.log1p(-z)),
    natural=lambda d: _stack(d.concentration1 - 1, d.concentration0 - 1),
    log_normalizer=_beta_a,
    parameters=lambda eta: {"concentration1": eta[..., 0] + 1, "concentration0": eta[..., 1] + 1},
    posterior=distributions.Beta,
    points=lambda d: [0.6 * d.mean, 0.4 + 0.6 * d.mean],
)
#: By the name of the prior's class; a prior may be a member of a larger family, as an exponential is a gamma.
FAMILIES: Mapping[str, Family] = {
    "Normal": Family(
        statistics=lambda z: _stack(z, z**2),
        natural=lambda d: _normal_eta(d.loc, d.scale),
        log_normalizer=_normal_a,
        parameters=_normal_parameters,
        posterior=distributions.Normal,
        points=_around,
    ),
    "LogNormal": Family(
        statistics=lambda z: _stack(z.log(), z.log() ** 2),
        natural=lambda d: _normal_eta(d.loc, d.scale),
        log_normalizer=_normal_a,
        parameters=_normal_parameters,
        posterior=distributions.LogNormal,
        points=lambda d: [(d.loc - d.scale).exp(), (d.loc + d.scale).exp()],
    ),
    "Gamma": _GAMMA,
    "Chi2": _GAMMA,
    "Exponential": Family(
        statistics=_GAMMA.statistics,
        natural=lambda d: _stack(torch.zeros_like(d.rate), -d.rate),
        log_normalizer=_gamma_a,
        parameters=_GAMMA.parameters,
        posterior=distributions.Gamma,
        points=_GAMMA.points,
    ),
    "InverseGamma": Family(
        statistics=lambda z: _stack(z.log(), 1 / z),
        natural=lambda d: _stack(-d.concentration - 1, -d.rate),
        log_normalizer=_inverse_gamma_a,
        parameters=lambda eta: {"concentration": -eta[..., 0] - 1, "rate": -eta[..., 1]},
        posterior=distributions.InverseGamma,
        points=lambda d: [0.5 * d.rate / d.concentration, 2.0 * d.rate / d.concentration],
    ),
    "Beta": _BETA,
    "Dirichlet": Family(
        statistics=torch.log,
        natural=lambda d: d.concentration - 1,
        log_normalizer=_beta_a,
        parameters=lambda eta: {"concentration": eta + 1},
        posterior=distributions.Dirichlet,
        points=_simplex_points,
        vector=True,
    ),
}


@dataclass(frozen=True)
class Conjugate:
    """A conjugate update; its log evidence is `likelihood.sum() + correction.sum()`.

    Attributes:
        family: of prior and posterior.
        natural: natural parameters of the posterior, `[*batch, S]`.
        change: what the likelihood added to those of the prior, `[*batch, S]`.
        point: a value of the latent, `[*batch, *event]`.
        likelihood: terms of the log likelihood there, as they were returned.
        correction: what turns it into the evidence, by element of the latent, `[*batch]`.
    """

    family: Family
    natural: Tensor
    change: Tensor
    point: Tensor
    likelihood: Tensor
    correction: Tensor

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Constructor arguments of the posterior, of class `family.posterior`."""
        return self.family.parameters(self.natural)

    @property
    def posterior(self) -> Distribution:
        """The posterior."""
        return self.family.posterior(**self.parameters, validate_args=False)


def update(log_likelihood: LogLikelihood, family: Family, prior: Distribution) -> Conjugate:
    """The conjugate posterior, differentiable in whatever prior and likelihood depend on.

    The elements of the latent must enter the likelihood separately, each linear in its statistics; whether
    they do is settled by `prove`, not here, since that needs to be done once and not at every training
    step.

    Raises:
        NotConjugate: the posterior would be improper.

    >>> flips, one = torch.tensor([1.0, 1.0, 0.0]).double(), torch.ones(()).double()
    >>> with torch.no_grad():
    ...     prior = distributions.Beta(one, one)
    ...     found = update(lambda z: distributions.Bernoulli(z).log_prob(flips), FAMILIES["Beta"], prior)
    >>> {name: round(float(value), 6) for name, value in found.parameters.items()}
    {'concentration1': 3.0, 'concentration0': 2.0}
    >>> round(float((found.likelihood.sum() + found.correction).exp()), 6)  # 2! 1! / 4!
    0.083333
    """
    eta = family.natural(prior)
    points = [point.detach() for point in family.points(prior)]
    slopes = [_look(log_likelihood, point)[1] for point in points]
    change = (_simplex_change if family.vector else _scalar_change)(family, points, slopes)
    posterior = eta + change
    gain = family.log_normalizer(posterior) - family.log_normalizer(eta)
    if not bool(torch.isfinite(gain).all()):
        raise NotConjugate("the posterior would be improper: its parameters lie outside their range")
    correction = gain - (change * family.statistics(points[0])).sum(-1)
    return Conjugate(family, posterior, change, points[0], log_likelihood(points[0]), correction)


def prove(
    log_likelihood: LogLikelihood, found: Conjugate, prior: Distribution, tolerance: float | None = None
) -> None:
    """Settle whether a log likelihood is linear in the statistics, at points all over prior and posterior.

    There, its value and its gradient must be what the update says, to `tolerance` relative to the terms
    that they are sums of (by default 1e-6 in double precision, 2e-3 in single). The points are quantiles
    from tail to tail, which are the same every time, and a few drawn with torch's generator.

    Raises:
        NotConjugate: it is not.
    """
    family, change = found.family, found.change.detach()
    if tolerance is None:
        tolerance = 1e-6 if change.dtype == torch.float64 else 2e-3
    doubt = _doubt(found, prior)
    with torch.no_grad():
        before, origin = found.likelihood.detach(), family.statistics(found.point)
    for point in _probes(found, prior):
        after, slope = (t.detach() for t in _look(log_likelihood, point))
        if family.vector:
            weighted = point * slope
            # Along the simplex only: the component normal to it is not the likelihood's to choose.
            lift = (change - weighted).sum(-1, keepdim=True)
            gap, size = (weighted + lift * point - change).abs(), weighted.abs() + change.abs()
            slack = doubt
        else:
            derivative = _derivative(family, point)
            terms = change * derivative
            gap, size = (slope - terms.sum(-1)).abs(), terms.abs().sum(-1)
            slack = (doubt * derivative.abs()).sum(-1)
        _require(gap, size + slack / tolerance, tolerance, "gradient")
        step = family.statistics(point) - origin
        gap = (after.sum() - before.sum() - (change * step).sum()).abs()
        size = (change * step).abs().sum() + before.abs().sum()
        _require(gap, size + (doubt * step.abs()).sum() / tolerance, tolerance, "value")


def _doubt(found: Conjugate, prior: Distribution) -> Tensor:
    """How far round-off may have moved each change, `[*batch, S]`: far out, little becomes much."""
    family, change = found.family, found.change.detach()
    unit = _ROUND_OFF * torch.finfo(change.dtype).eps
    if family.vector:
        return unit * change.abs().amax(-1, keepdim=True)
    derivatives = torch.stack([_derivative(family, point.detach()) for point in family.points(prior)])
    slope = (change * derivatives).abs().sum(-1, keepdim=True).amax(0)
    return unit * slope / derivatives.abs().amax(0)


@torch.no_grad()
def _probes(found: Conjugate, prior: Distribution) -> Iterator[Tensor]:
    """Values of the latent all over the mass of prior and posterior."""
    for source in (prior, found.posterior, found.posterior):
        # Half way to the first point, draws keep away from the edges of the support, where round-off rules.
        yield 0.5 * (source.sample().detach() + found.point)
    for source in (prior, found.posterior):
        count = max(64, min(_DRAWS, _MAX_NUMBERS // max(1, found.point.numel())))
        device = found.point.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            draws = source.sample(torch.Size([count])).detach()
        draws = _inside(found.family, draws)
        yield from _vector_quantiles(draws) if found.family.vector else _quantiles(found.family, draws)


def _inside(family: Family, value: Tensor) -> Tensor:
    """Values kept from the edges of the support, as far as round-off rules there."""
    info = torch.finfo(value.dtype)
    edge, support = info.eps**0.4, family.posterior.support
    if family.vector:
        value = value.clamp_min(edge)
        return value / value.sum(-1, keepdim=True)
    if support is distributions.constraints.unit_interval:
        return value.clamp(edge, 1 - edge)
    return (
        value if support is distributions.constraints.real else value.clamp(info.tiny**0.5, info.tiny**-0.5)
    )


def _quantiles(family: Family, draws: Tensor) -> Iterator[Tensor]:
    """Quantiles of every element, and values beyond; all elements at one level at a time, then at several."""
    table = draws.sort(0).values
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    points = table[(levels * (len(draws) - 1)).round().long().to(draws.device)]
    # As far again from the median as the outermost quantiles: little mass, unless the likelihood adds to it.
    free = distributions.biject_to(family.posterior.support)
    beyond = free(2 * free.inv(points[:2]) - free.inv(table[len(table) // 2]))
    points = _inside(family, torch.cat([beyond, points]))
    yield from points
    elements = draws[0].numel()
    if elements > 1:
        flat, column = points.reshape(len(points), elements), torch.arange(elements, device=draws.device)
        for k in range(len(points)):
            yield flat[(k + 7 * column) % len(points), column].reshape(draws.shape[1:])


def _vector_quantiles(draws: Tensor) -> Iterator[Tensor]:
    """Draws in which one component after the other is at one of its quantiles."""
    pairs = [(level, component) for level in _VECTOR_LEVELS for component in range(draws.shape[-1])]
    for level, component in pairs[:_VECTOR_RUNS]:
        rank = draws[..., component].argsort(0)[round(level * (len(draws) - 1))]
        yield draws.gather(0, rank[None, ..., None].expand(1, *draws.shape[1:]))[0]
    yield from draws[:8]


def _require(gap: Tensor, size: Tensor, tolerance: float, what: str) -> None:
    floor = size.max() * torch.finfo(size.dtype).eps + torch.finfo(size.dtype).tiny
    worst = float((gap / (size + floor)).max())
    if not worst <= tolerance:
        raise NotConjugate(
            f"the {what} of the log likelihood is off by {worst:.1e} of its size from what a function linear "
            "in the sufficient statistics of the prior would have"
        )


def _look(log_likelihood: LogLikelihood, point: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of the log likelihood and its gradient, with a graph of its own where gradients are wanted."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        at = point.detach().requires_grad_()
        terms = log_likelihood(at)
        if not terms.requires_grad:
            return terms, torch.zeros_like(point)
        slope = torch.autograd.grad(
            terms.sum(), at, create_graph=wanted, materialize_grads=True, allow_unused=True
        )
        return terms, slope[0]


def _derivative(family: Family, point: Tensor) -> Tensor:
    """Derivative of each statistic of a scalar latent, `[*batch, S]`."""
    with torch.enable_grad():
        at = point.detach().requires_grad_()
        columns = family.statistics(at).reshape(-1, 2).sum(0)
        return torch.stack([torch.autograd.grad(c, at, retain_graph=True)[0] for c in columns], -1).detach()


def _scalar_change(family: Family, points: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """Solve b^T T'(z) = slope at as many points as there are statistics."""
    derivatives = torch.stack([_derivative(family, point) for point in points], -2)
    return torch.linalg.solve(derivatives, torch.stack(slopes, -1))


def _simplex_change(family: Family, points: list[Tensor], slopes: list[Tensor]) -> Tensor:
    r"""Solve $b = z \circ (g + \lambda)$ for b and a normal component $\lambda$ at each of two points."""
    (z, w), (g, h) = points, slopes
    basis = torch.stack([z, -w], -1)
    normal = torch.linalg.solve(basis.mT @ basis, basis.mT @ (w * h - z * g).unsqueeze(-1))
    return z * (g + normal[..., 0, :])
