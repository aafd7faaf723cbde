"""References of the posteriors in `tests.stand_ins`, by a route that shares nothing with pgen but the data.

    PYTHON tests/benchmarks/reference_posteriors.py [NAME ...]

writes `tests/data/posteriors/NAME.json`. Linear regressions are drawn from exactly: the scale by its
marginal on a grid, the coefficients from the normal given it. The mixture whose labels switch is integrated on a
grid. Everything else is stated a second time in NumPyro (an interpreter that has it is needed), finite
latents summed out by hand: four chains of 10,000 draws or more in float64, R-hat below 1.005 or the script fails.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as d
from jax.scipy.special import logsumexp
from numpyro import deterministic, factor, sample
from numpyro.infer import MCMC, NUTS, init_to_median

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.posterior_data import NAMES, data

FOLDER = Path(__file__).parents[1] / "data" / "posteriors"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CHAINS, WARMUP, DRAWS = 4, 3000, 10_000
SLOW = {"horseshoe": 20_000, "volatility": 20_000}
"""Draws of those that mix slowly."""
Table = dict[str, dict[str, float]]


# --- exact -------------------------------------------------------------------------------------------------


def regression(
    x: np.ndarray, y: np.ndarray, log_prior: Callable[[np.ndarray], np.ndarray], scale: float = math.inf
) -> dict[str, np.ndarray]:
    """Independent draws of `beta` and `sigma`; the coefficients have a flat or a normal prior."""
    r, n = np.random.default_rng(0), 100_000
    gram, moment = x.T @ x, x.T @ y
    residual = y - x @ np.linalg.solve(gram, moment)
    guess = math.sqrt(residual @ residual / len(y))
    sigmas = guess * np.exp(np.linspace(-1.5, 1.5, 6001))
    eigenvalues, vectors = np.linalg.eigh(gram)
    projected = vectors.T @ moment
    # p(y | sigma), the coefficients integrated out in the eigenbasis of the Gram matrix
    precision = eigenvalues[:, None] / sigmas**2 + (0.0 if math.isinf(scale) else scale**-2)
    quadratic = y @ y / sigmas**2 - ((projected[:, None] / sigmas**2) ** 2 / precision).sum(0)
    log_p = -len(y) * np.log(sigmas) - 0.5 * np.log(precision).sum(0) - 0.5 * quadratic
    log_p += log_prior(sigmas) + np.log(sigmas)  # the grid is even in log sigma
    cdf = np.cumsum(np.exp(log_p - log_p.max()))
    sigma = np.exp(np.interp(r.random(n), cdf / cdf[-1], np.log(sigmas)))
    precision = eigenvalues / sigma[:, None] ** 2 + (0.0 if math.isinf(scale) else scale**-2)
    rotated = projected / sigma[:, None] ** 2 / precision + r.normal(size=(n, x.shape[1])) / np.sqrt(
        precision
    )
    return {"beta": (rotated @ vectors.T)[None], "sigma": sigma[None]}


def half_cauchy(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """Log density, up to a constant."""
    return lambda s: -np.log1p((s / scale) ** 2)


def grid(y: np.ndarray) -> dict[str, np.ndarray]:
    """Draws of the mixture whose labels switch, from its density on a grid of three axes, jittered."""
    mu, theta = np.linspace(-9, 9, 301), (np.arange(100) + 0.5) / 100
    p = np.exp(-0.5 * (y[:, None] - mu) ** 2)
    log_p = -0.5 * (mu[:, None, None] / 3) ** 2 - 0.5 * (mu[None, :, None] / 3) ** 2
    log_p = np.broadcast_to(log_p, (301, 301, 100)).copy()
    for row in p:
        log_p += np.log(theta * row[:, None, None] + (1 - theta) * row[None, :, None])
    r, n = np.random.default_rng(0), 100_000
    mass = np.exp(log_p - log_p.max()).ravel()
    i, j, k = np.unravel_index(r.choice(mass.size, n, p=mass / mass.sum()), log_p.shape)
    jitter = r.uniform(-0.5, 0.5, (3, n))
    means = np.stack([mu[i], mu[j]], 1) + (mu[1] - mu[0]) * jitter[:2].T
    return {"theta": (theta[k] + 0.01 * jitter[2])[None], "mu": means[None]}


EXACT = {
    "earnings": lambda x, y: regression(x, y, half_cauchy(2.5)),
    "kidscore": lambda x, y: regression(x, y, half_cauchy(2.5)),
    "mesquite": lambda x, y: regression(x, y, np.zeros_like),
    "blr": lambda x, y: regression(x, y, lambda s: -0.5 * (s / 10) ** 2, 10.0),
    "switching": grid,
}


# --- NumPyro -----------------------------------------------------------------------------------------------


def normal(name, size, loc=0.0, scale=1.0):
    return sample(name, d.Normal(loc, scale).expand([size]).to_event(1))


def flat(name, size):
    return sample(name, d.ImproperUniform(d.constraints.real, (), (size,)))


def diamonds(x, y):
    b, intercept = normal("b", 24), sample("intercept", d.StudentT(3, 8, 10))
    sample("y", d.Normal(intercept + x @ b, sample("sigma", d.HalfCauchy(10))), obs=y)


def nes(income, vote):
    beta = flat("beta", 2)
    sample("vote", d.Bernoulli(logits=beta[0] + beta[1] * income), obs=vote)


def wells(x, y):
    sample("y", d.Bernoulli(logits=x @ flat("beta", 4)), obs=y)


def poisson(year, count):
    alpha, b = sample("alpha", d.Uniform(-20, 20)), sample("beta", d.Uniform(-10, 10).expand([3]).to_event(1))
    sample("count", d.Poisson(jnp.exp(alpha + jnp.stack([year, year**2, year**3], 1) @ b)), obs=count)


def dogs(avoided, shocks, y):
    beta = normal("beta", 3, 0.0, 100.0)
    sample("y", d.Bernoulli(logits=beta[0] + beta[1] * avoided + beta[2] * shocks), obs=y)


def radon(county, floor, y):
    mu, tau = sample("mu", d.Normal(0, 10)), sample("tau", d.HalfNormal(1))
    beta, sigma = sample("beta", d.Normal(0, 10)), sample("sigma", d.HalfNormal(1))
    alpha = deterministic("alpha", mu + tau * sample("_raw", d.Normal(0, 1).expand([40])))
    sample("y", d.Normal(alpha[county] + beta * floor, sigma), obs=y)


def rats(age, y):
    mu_alpha, mu_beta = (sample(f"mu_{k}", d.Normal(0, 1000)) for k in ("alpha", "beta"))
    sigma_y, sigma_alpha = (sample(f"sigma_{k}", d.HalfCauchy(25)) for k in ("y", "alpha"))
    sigma_beta = sample("sigma_beta", d.HalfCauchy(5))
    alpha = sample("alpha", d.Normal(mu_alpha, sigma_alpha).expand([30, 1]))
    beta = sample("beta", d.Normal(mu_beta, sigma_beta).expand([30, 1]))
    sample("y", d.Normal(alpha + beta * (age - 22), sigma_y), obs=y)


def surgical(operations, deaths):
    mu, sigma = sample("mu", d.Normal(0, 10)), sample("sigma", d.HalfNormal(1))
    b = sample("b", d.Normal(mu, sigma).expand([12]))
    sample("deaths", d.BinomialLogits(b, operations), obs=deaths)
    deterministic("rate", jax.nn.sigmoid(b))


def survival(x, time, died):
    alpha, beta = sample("alpha", d.Normal(0, 5)), normal("beta", 2, 0.0, 2.0)
    shape = sample("shape", d.Gamma(1, 0.5))
    weibull = d.Weibull(jnp.exp(alpha + x @ beta), shape)
    tail = -((time / weibull.scale) ** shape)
    factor("times", jnp.where(died == 1, weibull.log_prob(time), tail))


def horseshoe(x, y):
    tau, scale = sample("tau", d.HalfNormal(0.2)), sample("lambda", d.HalfCauchy(1).expand([20]))
    width = 2 / jnp.sqrt(4 + (tau * scale) ** 2)
    beta = deterministic("beta", normal("z", 20) * scale * tau * width)
    sample("y", d.Normal(x @ beta, sample("sigma", d.HalfNormal(2))), obs=y)


def gauss_mix(y):
    theta, sigma = sample("theta", d.Beta(5, 5)), sample("sigma", d.HalfNormal(2).expand([2]))
    mu = sample("mu", d.ImproperUniform(d.constraints.ordered_vector, (), (2,)))
    factor("prior", d.Normal(0, 2).log_prob(mu).sum())
    each = d.Normal(mu, sigma).log_prob(y[:, None]) + jnp.log(jnp.stack([theta, 1 - theta]))
    factor("y", logsumexp(each, 1))


def forward(start, rows, emitted):
    """Log probability of a sequence, its hidden states summed out."""
    step = lambda a, e: (logsumexp(a[:, None] + jnp.log(rows), 0) + e, None)  # noqa: E731
    return logsumexp(jax.lax.scan(step, jnp.log(start) + emitted[0], emitted[1:])[0])


def hmm(y):
    theta = sample("theta", d.Dirichlet(jnp.ones((2, 2))))
    mu, sigma = sample("mu", d.Normal(jnp.array([3.0, 7.0]), 1)), sample("sigma", d.LogNormal(0, 0.5))
    factor("y", forward(theta[0], theta, d.Normal(mu, sigma).log_prob(y[:, None])))


def basketball(u, v):
    theta = sample("theta", d.Dirichlet(jnp.full((2, 2), 2.0)))
    low, gap = sample("low", d.LogNormal(-0.5, 0.5)), sample("gap", d.LogNormal(0.5, 0.5))
    phi = deterministic("phi", jnp.stack([low, low + gap]))
    lam = sample("lam", d.Normal(jnp.array([0.0, 2.0]), 1))
    emitted = d.Exponential(1 / phi).log_prob(u[:, None]) + d.Normal(lam, 0.8).log_prob(v[:, None])
    factor("uv", forward(jnp.full(2, 0.5), theta, emitted))


def kernel(x, alpha, rho, jitter):
    return alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2) + jitter * jnp.eye(len(x))


def gp(x, y):
    rho, alpha = sample("rho", d.Gamma(25, 4)), sample("alpha", d.HalfNormal(2))
    sigma = sample("sigma", d.HalfNormal(1))
    sample("y", d.MultivariateNormal(jnp.zeros(11), kernel(x, alpha, rho, sigma**2)), obs=y)


def gp_poisson(x, k):
    rho, alpha = sample("rho", d.Gamma(25, 4)), sample("alpha", d.HalfNormal(2))
    f = deterministic("f", jnp.linalg.cholesky(kernel(x, alpha, rho, 1e-10)) @ normal("f_tilde", 11))
    sample("k", d.Poisson(jnp.exp(f)), obs=k)


def accel(root, basis, y):
    def smooth(name):
        size, length = sample(f"size_{name}", d.HalfNormal(2)), sample(f"length_{name}", d.InverseGamma(3, 1))
        spectrum = size**2 * math.sqrt(2 * math.pi) * length * jnp.exp(-0.5 * (length * root) ** 2)
        return basis @ (jnp.sqrt(spectrum) * normal(f"z_{name}", 12))

    level = sample("level", d.Normal(-1, 1))
    sample("y", d.Normal(smooth("mean"), jnp.exp(level + smooth("scale"))), obs=y)


def arma(y):
    mu, phi, theta = (
        sample("mu", d.Normal(0, 10)),
        sample("phi", d.Normal(0, 2)),
        sample("theta", d.Normal(0, 2)),
    )
    first = y[0] - (mu + phi * mu)

    def step(e, pair):
        e = pair[1] - (mu + phi * pair[0] + theta * e)
        return e, e

    _, errors = jax.lax.scan(step, first, jnp.stack([y[:-1], y[1:]], 1))
    errors = jnp.concatenate([first[None], errors])
    sample("errors", d.Normal(0, sample("sigma", d.HalfCauchy(2.5))), obs=errors)


def volatility(y):
    mu, phi = sample("mu", d.Cauchy(0, 10)), sample("phi", d.Uniform(-1, 1))
    sigma, z = sample("sigma", d.HalfCauchy(5)), normal("z", 60)
    first = z[0] / jnp.sqrt(1 - phi**2)

    def step(h, z):
        return phi * h + z, phi * h + z

    h = jnp.concatenate([first[None], jax.lax.scan(step, first, z[1:])[1]])
    sample("y", d.Normal(0, jnp.exp(deterministic("h", mu + sigma * h) / 2)), obs=y)


def runge_kutta(rate, z, times, per, h):
    def step(z, t):
        k1 = rate(z, t)
        k2 = rate(z + h / 2 * k1, t + h / 2)
        k3 = rate(z + h / 2 * k2, t + h / 2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(z + h * k3, t + h))
        return z, z

    return jax.lax.scan(step, z, h * jnp.arange(times * per))[1][per - 1 :: per]


def lotka_volterra(y):
    theta = sample("theta", d.LogNormal(jnp.log(jnp.array([0.55, 0.028, 0.8, 0.024])), 0.5))
    z0 = sample("z0", d.LogNormal(math.log(10), 1).expand([2]))
    sigma = sample("sigma", d.LogNormal(-1, 1).expand([2]))

    def rate(z, t):
        return jnp.stack([(theta[0] - theta[1] * z[1]) * z[0], (theta[3] * z[0] - theta[2]) * z[1]])

    z = jnp.concatenate([z0[None], runge_kutta(rate, z0, 19, 4, 0.25)])
    sample("y", d.LogNormal(jnp.log(z), sigma), obs=y)


def one_compartment(y):
    k_a, k_m, v_m = (sample(k, d.LogNormal(0, 1)) for k in ("k_a", "K_m", "V_m"))
    sigma = sample("sigma", d.LogNormal(-1, 1))

    def rate(c, t):
        return 15 * k_a * jnp.exp(-k_a * t) - v_m / 2 * c / (k_m + c)

    sample("y", d.LogNormal(jnp.log(runge_kutta(rate, 0.0, 20, 4, 0.125)), sigma), obs=y)


def sampled(name: str, given: dict[str, np.ndarray], model: Callable[..., None]) -> dict[str, np.ndarray]:
    """Draws `[chains, draws, ...]` of every site and deterministic value, but for names that begin with `_`."""
    arrays = {k: jnp.asarray(v) for k, v in given.items()}
    nuts = NUTS(model, target_accept_prob=0.98, dense_mass=True, init_strategy=init_to_median)
    draws = SLOW.get(name, DRAWS)
    counts = {"num_warmup": WARMUP, "num_samples": draws, "num_chains": CHAINS}
    mcmc = MCMC(nuts, chain_method="vectorized", progress_bar=False, **counts)
    mcmc.run(jax.random.PRNGKey(1), **arrays, extra_fields=("diverging",))
    print(name, "divergences:", int(mcmc.get_extra_fields()["diverging"].sum()), flush=True)
    return {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items() if k[0] != "_"}


# --- summaries ---------------------------------------------------------------------------------------------


def summary(draws: np.ndarray, exact: bool) -> dict[str, float]:
    """Moments and quantiles of one coordinate, `[chains, draws]`."""
    mean, sd = float(draws.mean()), float(draws.std(ddof=1))
    size = draws.size if exact else float(az.ess(draws, method="mean"))
    kurtosis = float(((draws - mean) ** 4).mean() / sd**4)
    out = {"mean": mean, "sd": sd, "mcse_mean": sd / math.sqrt(min(size, draws.size)), "kurtosis": kurtosis}
    return out | {
        f"q{round(100 * q):02d}": float(v) for q, v in zip(QUANTILES, np.quantile(draws, QUANTILES))
    }


def write(name: str, given: dict[str, np.ndarray], model: Callable[..., None] | None) -> None:
    """Compute one reference and write it; the model is None where there is an exact way."""
    began = time.perf_counter()
    exact = model is None
    found = EXACT[name](**given) if model is None else sampled(name, given, model)
    table: Table = {}
    rhat = 1.0
    for site, draws in found.items():
        for i in np.ndindex(draws.shape[2:]):
            label = f"[{','.join(str(k + 1) for k in i)}]" if i else ""
            one = draws[(slice(None), slice(None), *i)]
            table[site + label] = summary(one, exact)
            rhat = rhat if exact else max(rhat, float(az.rhat(one)))
    assert rhat < 1.005, f"{name}: R-hat {rhat}"
    size = min((t["sd"] / t["mcse_mean"]) ** 2 for t in table.values())
    method = "exact draws" if exact else f"NumPyro {numpyro.__version__} NUTS, float64"
    chains, count = found[next(iter(found))].shape[:2]
    rows = {k: {a: float(f"{b:.7g}") for a, b in v.items()} for k, v in table.items()}
    described = {"posterior": name, "method": method, "chains": chains, "draws_per_chain": count}
    described |= {"max_rhat": round(rhat, 5), "min_ess": round(size), "parameters": rows}
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
    head = json.dumps({k: v for k, v in described.items() if k != "parameters"})[:-1]
    (FOLDER / f"{name}.json").write_text(f'{head}, "parameters": {{\n{lines}\n}}}}\n')
    print(f"{name}: R-hat {rhat:.4f}, ESS {size:.0f}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    numpyro.enable_x64()
    for chosen in sys.argv[1:] or NAMES:
        write(chosen, data(chosen), None if chosen in EXACT else globals()[chosen])
