"""Pyro programs of 25 posteriors on generated data, each written as a Pyro user would write it.

The arguments come from `tests.posterior_data`, the references from
`tests/benchmarks/reference_posteriors.py`, which states every model a second time, in NumPyro, with finite
latents summed out by hand, or integrates it exactly. Flat priors are proper ones under `.mask(False)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor


def normal(name: str, size: int, loc: float = 0.0, scale: float = 1.0) -> Tensor:
    """A vector of independent normals."""
    return pyro.sample(name, dist.Normal(loc, scale).expand([size]).to_event(1))


def flat(name: str, size: int) -> Tensor:
    """A vector that nothing is known of."""
    return pyro.sample(name, dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(False))


# --- linear regressions ------------------------------------------------------------------------------------


def earnings(x, y):
    beta = flat("beta", 4)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("people", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


kidscore = earnings


def mesquite(x, y):
    beta = flat("beta", 7)
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0).mask(False))
    pyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)


def blr(x, y):
    beta = normal("beta", 5, 0.0, 10.0)
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    pyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)


def diamonds(x, y):
    b = normal("b", 24)
    intercept = pyro.sample("intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(10.0))
    with pyro.plate("stones", len(y)):
        pyro.sample("y", dist.Normal(intercept + (x * b).sum(-1), sigma), obs=y)


# --- generalised linear and hierarchical models ------------------------------------------------------------


def nes(income, vote):
    beta = flat("beta", 2)
    with pyro.plate("voters", len(vote)):
        pyro.sample("vote", dist.Bernoulli(logits=beta[0] + beta[1] * income), obs=vote)


def wells(x, y):
    beta = flat("beta", 4)
    pyro.sample("y", dist.Bernoulli(logits=torch.mv(x, beta)).to_event(1), obs=y)


def poisson(year, count):
    alpha = pyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    beta = pyro.sample("beta", dist.Uniform(-10.0, 10.0).expand([3]).to_event(1))
    rate = torch.exp(alpha + beta[0] * year + beta[1] * year**2 + beta[2] * year**3)
    with pyro.plate("years", len(year)):
        pyro.sample("count", dist.Poisson(rate), obs=count)


def dogs(avoided, shocks, y):
    beta = normal("beta", 3, 0.0, 100.0)
    with pyro.plate("dogs", 30, dim=-2), pyro.plate("trials", 25, dim=-1):
        logits = beta[0] + beta[1] * avoided + beta[2] * shocks
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def radon(county, floor, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("counties", 40):
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(alpha[county] + beta * floor, sigma), obs=y)


def rats(age, y):
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 1000.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 1000.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfCauchy(25.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfCauchy(25.0))
    sigma_beta = pyro.sample("sigma_beta", dist.HalfCauchy(5.0))
    rat = pyro.plate("rats", 30, dim=-2)
    with rat:
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    with rat, pyro.plate("weeks", 5, dim=-1):
        pyro.sample("y", dist.Normal(alpha + beta * (age - 22), sigma_y), obs=y)


def surgical(operations, deaths):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("hospitals", 12):
        b = pyro.sample("b", dist.Normal(mu, sigma))
        pyro.sample("deaths", dist.Binomial(operations, logits=b), obs=deaths)
    pyro.deterministic("rate", torch.sigmoid(b))


def survival(x, time, died):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 5.0))
    beta = normal("beta", 2, 0.0, 2.0)
    shape = pyro.sample("shape", dist.Gamma(1.0, 0.5))
    scaled = torch.log(time) - alpha - x @ beta
    hazard = torch.log(shape) - torch.log(time) + shape * scaled
    pyro.factor("times", (died * hazard - torch.exp(shape * scaled)).sum())


def horseshoe(x, y):
    tau = pyro.sample("tau", dist.HalfNormal(0.2))
    scale = pyro.sample("lambda", dist.HalfCauchy(torch.ones(20)).to_event(1))
    z = normal("z", 20)
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    slab = 2.0 / torch.sqrt(4.0 + (tau * scale) ** 2)
    beta = pyro.deterministic("beta", z * scale * tau * slab)
    pyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)


# --- mixtures and hidden Markov models ---------------------------------------------------------------------


def gauss_mix(y):
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def switching(y):
    theta = pyro.sample("theta", dist.Uniform(0.0, 1.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(1 - theta), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(torch.where(k == 1, mu[1], mu[0]), 1.0), obs=y)


def hmm(y):
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([3.0, 7.0]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z{t}", dist.Categorical(theta[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(mu[z], sigma), obs=y[t])


def basketball(u, v):
    with pyro.plate("states", 2):
        theta = pyro.sample("theta", dist.Dirichlet(torch.tensor([2.0, 2.0])))
    low, gap = pyro.sample("low", dist.LogNormal(-0.5, 0.5)), pyro.sample("gap", dist.LogNormal(0.5, 0.5))
    phi = pyro.deterministic("phi", torch.stack([low, low + gap]))
    lam = pyro.sample("lam", dist.Normal(torch.tensor([0.0, 2.0]), 1.0).to_event(1))
    z = None
    for t in pyro.markov(range(len(u))):
        move = torch.full((2,), 0.5) if z is None else Vindex(theta)[z]
        z = pyro.sample(f"z{t}", dist.Categorical(move))
        pyro.sample(f"u{t}", dist.Exponential(1 / Vindex(phi)[z]), obs=u[t])
        pyro.sample(f"v{t}", dist.Normal(Vindex(lam)[z], 0.8), obs=v[t])


# --- Gaussian processes and series -------------------------------------------------------------------------


def kernel(x, alpha, rho, jitter):
    lag = x[:, None] - x[None, :]
    return alpha**2 * torch.exp(-0.5 * (lag / rho) ** 2) + jitter * torch.eye(len(x), dtype=x.dtype)


def gp(x, y):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    covariance = kernel(x, alpha, rho, sigma**2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x), dtype=x.dtype), covariance), obs=y)


def gp_poisson(x, k):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = normal("f_tilde", len(x))
    f = pyro.deterministic("f", torch.linalg.cholesky(kernel(x, alpha, rho, 1e-10)) @ f_tilde)
    with pyro.plate("points", len(x)):
        pyro.sample("k", dist.Poisson(f.exp()), obs=k)


def accel(root, basis, y):
    def smooth(name):
        size = pyro.sample(f"size_{name}", dist.HalfNormal(2.0))
        length = pyro.sample(f"length_{name}", dist.InverseGamma(3.0, 1.0))
        z = normal(f"z_{name}", 12)
        density = size * torch.sqrt(math.sqrt(2 * math.pi) * length) * torch.exp(-0.25 * (length * root) ** 2)
        return basis @ (density * z)

    level = pyro.sample("level", dist.Normal(-1.0, 1.0))
    mean, log_scale = smooth("mean"), level + smooth("scale")
    pyro.sample("y", dist.Normal(mean, log_scale.exp()).to_event(1), obs=y)


def arma(y):
    mu, phi = pyro.sample("mu", dist.Normal(0.0, 10.0)), pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    errors = [y[0] - (mu + phi * mu)]
    for t in range(1, len(y)):
        errors.append(y[t] - (mu + phi * y[t - 1] + theta * errors[-1]))
    errors = torch.stack(errors)
    pyro.sample("errors", dist.Normal(torch.zeros_like(errors), sigma).to_event(1), obs=errors)


def volatility(y):
    mu = pyro.sample("mu", dist.Cauchy(0.0, 10.0))
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
    z = normal("z", len(y))
    h = [z[0] / torch.sqrt(1 - phi**2)]
    for t in range(1, len(y)):
        h.append(phi * h[-1] + z[t])
    h = pyro.deterministic("h", mu + sigma * torch.stack(h))
    pyro.sample("y", dist.Normal(0.0, torch.exp(h / 2)).to_event(1), obs=y)


# --- differential equations --------------------------------------------------------------------------------


def runge_kutta(rate: Callable[[Tensor, float], Tensor], z: Tensor, times: int, per: int, h: float) -> Tensor:
    """The solution `[times, ...]` at every `per` steps of length `h`, after them."""
    t, seen = 0.0, []
    for _ in range(times):
        for _ in range(per):
            k1 = rate(z, t)
            k2 = rate(z + h / 2 * k1, t + h / 2)
            k3 = rate(z + h / 2 * k2, t + h / 2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(z + h * k3, t + h))
            t += h
        seen.append(z)
    return torch.stack(seen)


def lotka_volterra(y):
    theta = pyro.sample(
        "theta", dist.LogNormal(torch.tensor([0.55, 0.028, 0.8, 0.024]).log(), 0.5).to_event(1)
    )
    z0 = pyro.sample("z0", dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))

    def rate(z, t):
        prey, hunter = z[..., 0], z[..., 1]
        grow = (theta[0] - theta[1] * hunter) * prey
        return torch.stack([grow, (theta[3] * prey - theta[2]) * hunter], -1)

    z = torch.cat([z0[None], runge_kutta(rate, z0, len(y) - 1, 4, 0.25)])
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.LogNormal(z.log(), sigma).to_event(1), obs=y)


def one_compartment(y):
    k_a = pyro.sample("k_a", dist.LogNormal(0.0, 1.0))
    k_m = pyro.sample("K_m", dist.LogNormal(0.0, 1.0))
    v_m = pyro.sample("V_m", dist.LogNormal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))

    def rate(c, t):
        return 15 * k_a * torch.exp(-k_a * t) - v_m / 2 * c / (k_m + c)

    c = runge_kutta(rate, torch.zeros((), dtype=y.dtype), len(y), 4, 0.125)
    pyro.sample("y", dist.LogNormal(c.log(), sigma).to_event(1), obs=y)


def program(name: str) -> Callable[..., None]:
    """The program of that name."""
    return globals()[name]
