"""The peers of `tests.benchmarks.mcmc`, run by an interpreter that has them: NumPyro, BlackJAX, nutpie.

    PYTHON mcmc_peers.py ROW MODEL SEED DRAWS.npz

prints one line of JSON with seconds and gradients and writes the draws, `[chains, draws, ...]` per site, so
that one estimator judges everybody. The data of the models are here too, in numpy alone: pgen reads them.

`cold_s`: the program stated, compiled, warmed up and drawn from. `compiled_s`: a second run, warm-up and draws,
with what the first compiled. `draw_s`: the draws alone. Imports count in none of them.

Peers get the faster of two ways where there are two: mixtures and the hidden Markov model come with their
discrete latents summed out by hand, and NumPyro's kernel runs a second time under one jit of our own, because
its `MCMC.run` compiles anew at every call. NumPyro and BlackJAX compute in float32, nutpie in float64.
"""

from __future__ import annotations

import functools
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

# The interpreter that reads the data has none of the peers, so each runner imports its own.

_R = np.random.default_rng(0)
X, _BETA = _R.normal(size=(1000, 25)), _R.normal(size=25) * 0.5
Y = (_R.random(1000) < 1 / (1 + np.exp(-X @ _BETA))) * 1.0
Y8, S8 = np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
YH = _R.normal(size=48) * 1.2 + 0.3 + _R.normal(size=48)
_LAG = np.abs(np.arange(100)[:, None] - np.arange(100)[None, :])
TRIL = np.linalg.cholesky(0.9**_LAG)

_K = _R.random(300) < 0.4
YM = np.where(_K, -1.5, 1.5) + np.where(_K, 0.7, 0.9) * _R.normal(size=300)
STICKY = np.ones((2, 2)) + 3 * np.eye(2)
"""Concentrations of the transitions of the hidden Markov model."""


def _chain(length: int) -> np.ndarray:
    rows, state, out = np.array([[0.85, 0.15], [0.1, 0.9]]), 0, []
    for _ in range(length):
        state = _R.choice(2, p=rows[state])
        out.append([-1.5, 1.5][state] + 0.8 * _R.normal())
    return np.array(out)


YS = _chain(100)

MODELS = ("schools", "logistic", "hier50", "corr100", "mixture", "hmm")
ROWS = (
    "numpyro4",
    "numpyro4-parallel",
    "blackjax4",
    "blackjax-chees128",
    "blackjax-meads128",
    "nutpie4",
    "nutpie4-jax",
)
WARMUP, DRAWS = 500, 1000
MANY = 200
"""Draws of each chain where there are 128 of them."""

Outcome = tuple[dict[str, np.ndarray], dict[str, Any]]


def once(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and value of one call."""
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


def numpyro_model(name: str) -> Callable[[], None]:
    """The model, in NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as d
    from jax.scipy.special import logsumexp

    sample = numpyro.sample

    def schools() -> None:
        mu, tau = sample("mu", d.Normal(0, 5)), sample("tau", d.HalfCauchy(5))
        z = sample("z", d.Normal(0, 1).expand([8]).to_event(1))
        sample("y", d.Normal(mu + tau * z, S8).to_event(1), obs=Y8)

    def logistic() -> None:
        b = sample("b", d.Normal(0, 1).expand([25]).to_event(1))
        sample("y", d.Bernoulli(logits=jnp.asarray(X, jnp.float32) @ b).to_event(1), obs=Y)

    def hier50() -> None:
        mu, lt = sample("mu", d.Normal(0, 1)), sample("lt", d.Normal(0, 1))
        th = sample("th", d.Normal(mu, jnp.exp(lt)).expand([48]).to_event(1))
        sample("y", d.Normal(th, 1).to_event(1), obs=YH)

    def corr100() -> None:
        sample("x", d.MultivariateNormal(jnp.zeros(100), scale_tril=jnp.asarray(TRIL, jnp.float32)))

    def levels() -> Any:  # in order, or labels switch and no chain of anybody's converges
        low, gap = sample("low", d.Normal(-1, 2)), sample("gap", d.LogNormal(1, 0.5))
        return jnp.stack([low, low + gap])

    def mixture() -> None:
        w, loc = sample("w", d.Dirichlet(jnp.ones(2))), levels()
        scale = sample("scale", d.LogNormal(0, 0.5).expand([2]).to_event(1))
        sample("y", d.MixtureSameFamily(d.Categorical(w), d.Normal(loc, scale)).expand([300]), obs=YM)

    def hmm() -> None:
        rows, level = sample("rows", d.Dirichlet(jnp.asarray(STICKY, jnp.float32)).to_event(1)), levels()
        scale = sample("scale", d.LogNormal(0, 0.5))
        emitted = d.Normal(level, scale).log_prob(jnp.asarray(YS, jnp.float32)[:, None])
        log_rows = jnp.log(rows)

        def forward(a: Any, e: Any) -> Any:
            return logsumexp(a[:, None] + log_rows, 0) + e, None

        # the state before the first is the first, as in the Pyro program
        last, _ = jax.lax.scan(forward, log_rows[0] + emitted[0], emitted[1:])
        numpyro.factor("y", logsumexp(last))

    return locals()[name]


def numpyro_run(model: str, seed: int, parallel: bool) -> Outcome:
    """NUTS, four chains: vectorised (and once more under one jit), or one device per chain."""
    import numpyro

    if parallel:
        numpyro.set_host_device_count(4)
    import jax
    from numpyro.infer import MCMC, NUTS

    program = numpyro_model(model)
    method = "parallel" if parallel else "vectorized"
    counts = {"num_warmup": WARMUP, "num_samples": DRAWS, "num_chains": 4}
    mcmc = MCMC(NUTS(program), chain_method=method, progress_bar=False, **counts)

    def go(key):
        return (mcmc.run(jax.random.PRNGKey(key)), jax.block_until_ready(mcmc.get_samples()))

    cold, _ = once(lambda: go(seed))
    draws = mcmc.get_samples(group_by_chain=True)
    if parallel:
        again, _ = once(lambda: go(seed + 1))
        return draws, {"cold_s": cold, "compiled_s": again}
    kernel = NUTS(program)
    start = kernel.init(jax.random.split(jax.random.PRNGKey(seed), 4), WARMUP, None, (), {})
    back = jax.vmap(jax.vmap(kernel.postprocess_fn((), {})))

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state = kernel.sample(state, (), {})
        return state, (state.z, state.num_steps)

    def jit(count):
        return jax.jit(lambda state: jax.lax.scan(step, state, None, length=count))

    warm, draw = jit(WARMUP), jit(DRAWS)

    def full():
        return jax.block_until_ready(draw(warm(start)[0]))

    full()
    compiled, _ = once(full)
    state = jax.block_until_ready(warm(start)[0])
    seconds, (_, (z, steps)) = once(lambda: jax.block_until_ready(draw(state)))
    draws = {k: np.swapaxes(np.asarray(v), 0, 1) for k, v in back(z).items() if k in draws}
    figures = {"cold_s": cold, "compiled_s": compiled, "draw_s": seconds, "gradients": int(steps.sum())}
    return draws, figures


def blackjax_run(model: str, seed: int, kind: str) -> Outcome:
    """NUTS, ChEES-HMC or MEADS over NumPyro's potential, adaptation and draws under two jits.

    Positions are vectors: ChEES's adaptation (1.7.1) fails where a leaf of a tree is a matrix for each chain.
    """
    import blackjax
    import jax
    import optax
    from jax.flatten_util import ravel_pytree
    from numpyro.infer.util import initialize_model

    chains, count = (4, DRAWS) if kind == "nuts" else (128, MANY)
    began = time.perf_counter()
    info = initialize_model(jax.random.PRNGKey(9), numpyro_model(model))
    first, tree_of = ravel_pytree(info.param_info.z)

    def logp(z):
        return -info.potential_fn(tree_of(z))

    key, split = jax.random.PRNGKey, jax.random.split
    functions: dict[str, Any] = {}

    def starts(k: Any) -> Any:
        return jax.random.uniform(k, (chains, *first.shape), minval=-2.0, maxval=2.0)

    def tune(k: Any) -> Any:
        if kind == "nuts":

            def one(k, z):
                return blackjax.window_adaptation(blackjax.nuts, logp).run(k, z, WARMUP)[0]

            return jax.vmap(one)(split(k, chains), starts(k))
        if kind == "chees":
            adapt = blackjax.chees_adaptation(logp, chains)
            (state, found), _ = adapt.run(k, starts(k), 0.1, optax.adam(0.025), WARMUP)
        else:
            (state, found), _ = blackjax.meads_adaptation(logp, chains).run(k, starts(k), WARMUP)
        functions.update({a: b for a, b in found.items() if callable(b)})  # a jit returns arrays only
        return state, {a: b for a, b in found.items() if not callable(b)}

    def chain(k: Any, state: Any, found: dict[str, Any]) -> Any:
        kernel = {"nuts": blackjax.nuts, "chees": blackjax.dynamic_hmc, "meads": blackjax.ghmc}[kind]
        kernel = kernel(logp, **found, **functions)

        def step(state: Any, k: Any) -> Any:
            state, info = kernel.step(k, state)
            return state, (state.position, getattr(info, "num_integration_steps", 1))

        return jax.lax.scan(step, state, split(k, count))[1]

    per_chain = (0, 0, 0) if kind == "nuts" else (0, 0, None)
    warm = jax.jit(tune)
    draw = jax.jit(lambda k, state, found: jax.vmap(chain, per_chain)(split(k, chains), state, found))

    def full(s):
        return jax.block_until_ready(draw(key(s + 50), *warm(key(s))))

    full(seed)
    cold = time.perf_counter() - began
    compiled, (z, _) = once(lambda: full(seed + 1))
    tuned = jax.block_until_ready(warm(key(seed + 1)))
    seconds, (_, steps) = once(lambda: jax.block_until_ready(draw(key(3), *tuned)))
    z = jax.vmap(jax.vmap(lambda z: info.postprocess_fn(tree_of(z))))(z)
    gradients = int(np.sum(np.asarray(steps) * np.ones((chains, count))))
    draws = {k: np.asarray(v) for k, v in z.items()}
    return draws, {"cold_s": cold, "compiled_s": compiled, "draw_s": seconds, "gradients": gradients}


def pymc_model(name: str) -> Any:
    """The model, in PyMC, for nutpie."""
    import pymc as pm
    import pytensor
    import pytensor.tensor as pt

    with pm.Model() as model:
        if name == "schools":
            mu, tau, z = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5), pm.Normal("z", 0, 1, shape=8)
            pm.Normal("y", mu + tau * z, S8, observed=Y8)
        elif name == "logistic":
            pm.Bernoulli("y", logit_p=X @ pm.Normal("b", 0, 1, shape=25), observed=Y)
        elif name == "hier50":
            mu, lt = pm.Normal("mu", 0, 1), pm.Normal("lt", 0, 1)
            pm.Normal("y", pm.Normal("th", mu, pm.math.exp(lt), shape=48), 1, observed=YH)
        elif name == "corr100":
            pm.MvNormal("x", np.zeros(100), chol=TRIL, shape=100)
        else:
            low, gap = pm.Normal("low", -1, 2), pm.LogNormal("gap", 1, 0.5)
            level = pt.stack([low, low + gap])
        if name == "mixture":
            w, scale = pm.Dirichlet("w", np.ones(2)), pm.LogNormal("scale", 0, 0.5, shape=2)
            pm.NormalMixture("y", w=w, mu=level, sigma=scale, observed=YM)
        elif name == "hmm":
            rows, scale = pm.Dirichlet("rows", STICKY, shape=(2, 2)), pm.LogNormal("scale", 0, 0.5)
            log_rows = pt.log(rows)
            emitted = pm.logp(pm.Normal.dist(level, scale), YS[:, None])

            def forward(e, a, r):
                return pt.logsumexp(a[:, None] + r, axis=0) + e

            out = pytensor.scan(
                forward, emitted[1:], log_rows[0] + emitted[0], log_rows, return_updates=False
            )
            pm.Potential("y", pt.logsumexp(out[-1]))
    return model


def nutpie_run(model: str, seed: int, cores: int, backend: str) -> Outcome:
    """Four chains of NUTS, over the cores there are; compiled by numba (its default) or by JAX."""
    import nutpie

    options = {"backend": backend, "gradient_backend": "pytensor" if backend == "numba" else "jax"}
    counts = {"draws": DRAWS, "tune": WARMUP, "chains": 4, "cores": cores, "progress_bar": False}
    compile_s, compiled = once(lambda: nutpie.compile_pymc_model(pymc_model(model), **options))
    first, _ = once(lambda: nutpie.sample(compiled, seed=seed, **counts))
    second, found = once(lambda: nutpie.sample(compiled, seed=seed + 1, **counts))
    draws = {k: v.values for k, v in found.posterior.data_vars.items()}
    steps, before = (int(g["n_steps"].values.sum()) for g in (found.sample_stats, found.warmup_sample_stats))
    figures = {"cold_s": compile_s + first, "compiled_s": second, "gradients": steps}
    # nutpie does not say how long its warm-up took: its share of the gradients tells
    return draws, {**figures, "draw_s": second * steps / (steps + before)}


def main() -> None:
    """One cell: run, write the draws, print the figures."""
    import os

    row, model, seed, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    warnings.filterwarnings("ignore")
    cores = len(os.sched_getaffinity(0))
    runners = {
        "numpyro4": functools.partial(numpyro_run, parallel=False),
        "numpyro4-parallel": functools.partial(numpyro_run, parallel=True),
        "blackjax4": functools.partial(blackjax_run, kind="nuts"),
        "blackjax-chees128": functools.partial(blackjax_run, kind="chees"),
        "blackjax-meads128": functools.partial(blackjax_run, kind="meads"),
        "nutpie4": functools.partial(nutpie_run, cores=cores, backend="numba"),
        "nutpie4-jax": functools.partial(nutpie_run, cores=cores, backend="jax"),
    }
    draws, figures = runners[row](model, seed)
    np.savez(path, **{k: np.asarray(v) for k, v in draws.items()})
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
