"""References of the posteriors in `tests.further_stand_ins`, as `reference_posteriors.py`, which it uses.

    PYTHON tests/benchmarks/further_references.py [NAME ...]

Where a program is hard to sample as it is written (predictors that are correlated, centred hierarchies), it is stated in other
coordinates here, and the values that it is compared in are deterministic.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as d
from jax.scipy.special import logsumexp
from numpyro import deterministic, factor, sample

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from reference_posteriors import flat, normal, runge_kutta, write

from tests.further_data import NAMES, data


def years(year, y):
    level, beta = flat("_level", 1)[0], sample("beta", d.Normal(0, 10))
    alpha = deterministic("alpha", level - 1982.5 * beta)
    factor("prior", d.Normal(0, 100).log_prob(alpha))
    sample("y", d.Normal(alpha + beta * year, sample("sigma", d.HalfNormal(5))), obs=y)


def collinear(x, y):
    design = jnp.concatenate([jnp.ones((200, 1)), x], 1)
    both = jax.scipy.linalg.solve_triangular(jnp.linalg.qr(design)[1], flat("_rotated", 9))
    a, b = deterministic("a", both[0]), deterministic("b", both[1:])
    factor("prior", d.Normal(0, 50).log_prob(a) + d.Normal(0, 10).log_prob(b).sum())
    sample("y", d.Normal(a + x @ b, sample("sigma", d.HalfCauchy(5))), obs=y)


def zero_inflated(x, y):
    a, b = normal("a", 2, 0.0, 2.0), normal("b", 2, 0.0, 2.0)
    gate, count = jax.nn.sigmoid(b[0] + b[1] * x), d.Poisson(jnp.exp(a[0] + a[1] * x)).log_prob(y)
    some = jnp.log1p(-gate) + count
    factor("y", jnp.where(y == 0, jnp.logaddexp(jnp.log(gate), some), some).sum())


def roaches(site, x, y):
    mu, tau = sample("mu", d.Normal(0, 3)), sample("tau", d.HalfCauchy(1))
    beta, phi = sample("beta", d.Normal(0, 1)), sample("phi", d.HalfCauchy(5))
    effect = deterministic("e", mu + tau * normal("_z", 15))
    sample("y", d.NegativeBinomial2(jnp.exp(effect[site] + beta * x), phi), obs=y)


def slopes(group, x, y):
    mu, tau = normal("mu", 2, 0.0, 5.0), sample("tau", d.HalfNormal(2).expand([2]))
    root = sample("_factor", d.LKJCholesky(2, 2.0))
    sigma, z = sample("sigma", d.HalfNormal(2)), sample("_z", d.Normal(0, 1).expand([25, 2]))
    b = deterministic("b", mu + z @ (tau[:, None] * root).T)
    deterministic("rho", root[1, 0])
    sample("y", d.Normal(b[group, 0] + b[group, 1] * x, sigma), obs=y)


def mixture3(y):
    weights = sample("w", d.Dirichlet(jnp.full(3, 2.0)))
    base = d.Normal(jnp.zeros(3), 2).to_event(1)
    mu = sample("mu", d.TransformedDistribution(base, d.transforms.OrderedTransform()))
    sigma = sample("sigma", d.LogNormal(0, 0.5).expand([3]))
    factor("y", logsumexp(jnp.log(weights) + d.Normal(mu, sigma).log_prob(y[:, None]), 1).sum())


def disasters(y):
    early, late = sample("early", d.Exponential(1)), sample("late", d.Exponential(1))
    before = jnp.arange(100) < jnp.arange(100)[:, None]
    each = jnp.where(before, d.Poisson(early).log_prob(y), d.Poisson(late).log_prob(y))
    factor("y", logsumexp(each.sum(1)))


def hmm_covariates(x, y):
    a, b = normal("a", 2, 1.0), normal("b", 2)
    mu, gap = sample("mu", d.Normal(0, 2)), sample("gap", d.LogNormal(0.5, 0.5))
    sigma = sample("sigma", d.HalfNormal(2))
    stay = jax.nn.sigmoid(a + b * x[:, None])
    rows = jnp.stack([stay[:, 0], 1 - stay[:, 0], 1 - stay[:, 1], stay[:, 1]], 1).reshape(-1, 2, 2)
    emitted = d.Normal(jnp.stack([mu, mu + gap]), sigma).log_prob(y[:, None])

    def step(state, given):
        move, seen = given
        return logsumexp(state[:, None] + jnp.log(move), 0) + seen, None

    first = jnp.log(rows[0, 0]) + emitted[0]
    factor("y", logsumexp(jax.lax.scan(step, first, (rows[1:], emitted[1:]))[0]))


def gp_ard(x, y):
    length = sample("length", d.InverseGamma(3, 3).expand([3]))
    alpha, sigma = sample("alpha", d.HalfNormal(2)), sample("sigma", d.HalfNormal(1))
    lag = (x[:, None] - x) / length
    covariance = alpha**2 * jnp.exp(-0.5 * (lag**2).sum(-1)) + (sigma**2 + 1e-6) * jnp.eye(60)
    sample("y", d.MultivariateNormal(jnp.zeros(60), covariance), obs=y)


def sir(y):
    beta, gamma = sample("beta", d.LogNormal(-0.5, 0.5)), sample("gamma", d.LogNormal(-1, 0.5))
    start, phi = sample("i0", d.LogNormal(1.5, 1)), sample("phi", d.Exponential(0.1))

    def rate(z, t):
        new = beta * z[0] * z[1] / 1000
        return jnp.stack([-new, new - gamma * z[1]])

    z = runge_kutta(rate, jnp.stack([1000 - start, start]), 20, 2, 0.5)
    deterministic("r0", beta / gamma)
    sample("y", d.NegativeBinomial2(jnp.maximum(z[:, 1], 1e-6), phi), obs=y)


if __name__ == "__main__":
    numpyro.enable_x64()
    for chosen in sys.argv[1:] or NAMES:
        write(chosen, data(chosen), globals()[chosen])
