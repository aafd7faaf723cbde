"""The peer of `tests.benchmarks.vae_step`, run by an interpreter that has it: the step of a VAE in NumPyro.

    PYTHON vae_step_numpyro.py BATCH BLOCK

For every number read from standard input it takes so many blocks of steps, and prints the seconds per step of each.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceMeanField_ELBO

PIXELS, HIDDEN, LATENT, RATE = 784, 400, 20, 1e-4


def main() -> None:
    """Take steps as told."""
    rows, block = int(sys.argv[1]), int(sys.argv[2])
    keys = jax.random.split(jax.random.PRNGKey(0), 7)
    x = (jax.random.uniform(keys[6], (rows, PIXELS)) < 0.3).astype(jnp.float32)

    def linear(key, inputs, outputs):
        weights = jax.random.uniform(key, (inputs, outputs), minval=-1, maxval=1) / inputs**0.5
        return {"weight": weights, "bias": jnp.zeros(outputs)}

    def apply(layer, value):
        return value @ layer["weight"] + layer["bias"]

    def program(x):
        layers = numpyro.param(
            "decoder", {"hidden": linear(keys[0], LATENT, HIDDEN), "out": linear(keys[1], HIDDEN, PIXELS)}
        )
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), LATENT)), 1.0).to_event(1))
            logits = apply(layers["out"], jax.nn.softplus(apply(layers["hidden"], z)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        layers = numpyro.param(
            "encoder",
            {
                "hidden": linear(keys[2], PIXELS, HIDDEN),
                "loc": linear(keys[3], HIDDEN, LATENT),
                "scale": linear(keys[4], HIDDEN, LATENT),
            },
        )
        h = jax.nn.softplus(apply(layers["hidden"], x))
        with numpyro.plate("rows", len(x)):
            law = dist.Normal(apply(layers["loc"], h), jnp.exp(apply(layers["scale"], h)))
            numpyro.sample("z", law.to_event(1))

    svi = SVI(program, guide, numpyro.optim.Adam(RATE), TraceMeanField_ELBO())
    state = svi.init(keys[5], x)
    update = jax.jit(svi.update, donate_argnums=0)
    for line in sys.stdin:
        found = []
        for _ in range(int(line)):
            start = time.perf_counter()
            for _ in range(block):
                state, loss = update(state, x)
                loss.block_until_ready()
            found.append((time.perf_counter() - start) / block)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
