"""Pyro programs of ten more posteriors, as `tests.stand_ins`.

References are in `tests/benchmarks/further_references.py`. What is here is what went wrong elsewhere, or could: predictors as they
come, centred hierarchies, correlation matrices, labels, a change point, ordered supports.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.stand_ins import normal, runge_kutta


def years(year, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * year, sigma), obs=y)


def collinear(x, y):
    a, b = pyro.sample("a", dist.Normal(0.0, 50.0)), normal("b", 8, 0.0, 10.0)
    sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + x @ b, sigma), obs=y)


def zero_inflated(x, y):
    a, b = normal("a", 2, 0.0, 2.0), normal("b", 2, 0.0, 2.0)
    with pyro.plate("rows", len(y)):
        law = dist.ZeroInflatedPoisson(torch.exp(a[0] + a[1] * x), gate_logits=b[0] + b[1] * x)
        pyro.sample("y", law, obs=y)


def roaches(site, x, y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.HalfCauchy(1.0))
    beta, phi = pyro.sample("beta", dist.Normal(0.0, 1.0)), pyro.sample("phi", dist.HalfCauchy(5.0))
    with pyro.plate("sites", 15):
        effect = pyro.sample("e", dist.Normal(mu, tau))
    with pyro.plate("visits", len(y)):
        log_mean = effect[site] + beta * x
        pyro.sample("y", dist.NegativeBinomial(phi, logits=log_mean - phi.log()), obs=y)


def slopes(group, x, y):
    mu = normal("mu", 2, 0.0, 5.0)
    tau = pyro.sample("tau", dist.HalfNormal(2.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", 25):
        b = pyro.sample("b", dist.MultivariateNormal(mu, scale_tril=tau[..., None] * factor))
    pyro.deterministic("rho", factor[..., 1, 0])
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[..., group, 0] + b[..., group, 1] * x, sigma), obs=y)


def mixture3(y):
    weights = pyro.sample("w", dist.Dirichlet(torch.full((3,), 2.0)))
    ordered = [dist.transforms.OrderedTransform()]
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    mu = pyro.sample("mu", dist.TransformedDistribution(base, ordered))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[k], sigma[k]), obs=y)


def disasters(y):
    early, late = pyro.sample("early", dist.Exponential(1.0)), pyro.sample("late", dist.Exponential(1.0))
    n = len(y)
    change = pyro.sample("change", dist.Categorical(logits=torch.zeros(n)), infer={"enumerate": "parallel"})
    rate = torch.where(torch.arange(n) < change[..., None], early, late)
    pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def hmm_covariates(x, y):
    a, b = normal("a", 2, 1.0), normal("b", 2)
    mu, gap = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("gap", dist.LogNormal(0.5, 0.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    means = torch.stack([mu, mu + gap])
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        stay = torch.sigmoid(a + b * x[t])
        rows = torch.stack([stay[0], 1 - stay[0], 1 - stay[1], stay[1]]).reshape(2, 2)
        z = pyro.sample(f"z{t}", dist.Categorical(rows[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(means[z], sigma), obs=y[t])


def gp_ard(x, y):
    length = pyro.sample("length", dist.InverseGamma(3.0, 3.0).expand([3]).to_event(1))
    alpha, sigma = pyro.sample("alpha", dist.HalfNormal(2.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    lag = (x[:, None] - x[None]) / length
    smooth = alpha**2 * torch.exp(-0.5 * (lag**2).sum(-1))
    covariance = smooth + (sigma**2 + 1e-6) * torch.eye(len(y), dtype=y.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y), dtype=y.dtype), covariance), obs=y)


def sir(y):
    beta, gamma = (
        pyro.sample("beta", dist.LogNormal(-0.5, 0.5)),
        pyro.sample("gamma", dist.LogNormal(-1.0, 0.5)),
    )
    start, phi = pyro.sample("i0", dist.LogNormal(1.5, 1.0)), pyro.sample("phi", dist.Exponential(0.1))

    def rate(z: Tensor, t: float) -> Tensor:
        new = beta * z[0] * z[1] / 1000
        return torch.stack([-new, new - gamma * z[1]])

    z = runge_kutta(rate, torch.stack([1000 - start, start]), len(y), 2, 0.5)
    pyro.deterministic("r0", beta / gamma)
    with pyro.plate("days", len(y)):
        pyro.sample("y", dist.GammaPoisson(phi, phi / z[:, 1].clamp(min=1e-6)), obs=y)


def program(name: str) -> Callable[..., None]:
    """The program of that name."""
    return globals()[name]
