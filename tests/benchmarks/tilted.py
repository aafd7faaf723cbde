"""Energies that tilt other laws, on digits: the prior of a variational autoencoder, and a flow.

    python -m tests.benchmarks.tilted [vae] [flow] [--seeds 3] [--steps 3000]

vae: binary 8 x 8 digits (scikit-learn). `z ~ N(0, I)` becomes `z ~ Energy(net, (k,), base=N(0, I))`, one line of the program;
everything is learned from scratch by `variational`. Printed are held-out nats, importance-weighted (200 particles), with log Z
annealed and its error told.

flow: digits with uniform noise, between -1 and 1. A spline flow is fitted; then `x ~ Energy(net, (64,), base=fitted.law("x"))`, one
line again, is learned by noise contrastive estimation, for which the flow is the noise. Held-out nats, log Z by annealing from
the flow, with stochastic bounds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.distributions import Energy
from pgen.nn import MLPEnergy
from pgen.zoo import VAE, SplineFlow
from pgen.zoo.datasets import digits, digits_binary

LATENTS = 8


class TiltedVAE(VAE):
    """The autoencoder, but for the line of its prior."""

    def __init__(self, latents: int) -> None:
        super().__init__(latents, levels=2)
        self.tilt = MLPEnergy(latents, (128, 128))

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            z = pyro.sample("z", Energy(self.tilt, (LATENTS,), base=dist.Normal(self.zero, 1.0).to_event(1)))
            return pyro.sample("x", self.head(self.decoder(z)).to_event(1))


class TiltedFlow(nn.Module):
    """A flow that is fitted already, tilted."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.tilt = (base,), MLPEnergy(64, (256, 256))

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", Energy(self.tilt, (64,), base=self.base[0]))


def vae(seed: int, steps: int) -> list[tuple[str, str, str, float]]:
    """Held-out nats of both priors."""
    data, found = digits_binary(), []
    run = pgen.Run(steps=steps, lr=1e-3, batch_size=128, progress=False, seed=seed)
    for name, make in (
        ("normal prior", lambda: VAE(LATENTS, levels=2)),
        ("energy prior", lambda: TiltedVAE(LATENTS)),
    ):
        torch.manual_seed(seed)
        start = time.perf_counter()
        backend = pgen.backend("variational", evaluate="importance", evaluation_particles=200)
        fitted = pgen.fit(make(), data.train, backend, run=run, seed=seed)
        seconds = time.perf_counter() - start
        estimate = fitted.log_prob(data.test, seed=0).mean()
        found.append((name, f"{float(estimate.value):.3f} +- {float(estimate.stderr):.3f}", "", seconds))
    return found


def flow(seed: int, steps: int) -> list[tuple[str, str, str, float]]:
    """Held-out nats of a flow, and of the flow tilted."""
    data = digits()
    torch.manual_seed(seed)

    def dequantised(x: Tensor) -> Tensor:
        return (x + torch.rand(x.shape)) * 2 / 17 - 1

    train, test = ({"x": dequantised(part["x"].float())} for part in (data.train, data.test))
    valid = {"x": dequantised(data.valid["x"].float())}
    run = pgen.Run(
        steps=steps, lr=1e-3, batch_size=128, validation=valid, patience=4, progress=False, seed=seed
    )
    start = time.perf_counter()
    plain = pgen.fit(SplineFlow(64), train, "exact", run=run, seed=seed)
    middle = time.perf_counter()
    backend = pgen.backend("exact", via={"x": "noise-contrastive"})
    again = pgen.Run(
        steps=1000, lr=3e-4, batch_size=128, weight_decay=1e-2, optimizer="adamw", progress=False, seed=seed
    )
    tilted = pgen.fit(TiltedFlow(plain.law("x")), train, backend, run=again, seed=seed)
    end = time.perf_counter()
    estimate = tilted.log_prob(test, seed=0)
    sides = f"{float(estimate.lower.mean()):.3f} to {float(estimate.upper.mean()):.3f}"
    mean = estimate.mean()
    return [
        ("flow", f"{float(plain.log_prob(test).mean().value):.3f}", "exact", middle - start),
        ("flow, tilted", f"{float(mean.value):.3f} +- {float(mean.stderr):.3f}", sides, end - middle),
    ]


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Energies that tilt other laws.")
    parser.add_argument("what", nargs="*", default=["vae", "flow"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "seed", "held-out nats", "between", "seconds to learn")
    for what in options.what:
        for seed in range(options.seeds):
            for name, nats, sides, seconds in {"vae": vae, "flow": flow}[what](seed, options.steps):
                table.add_row(name, str(seed), nats, sides, f"{seconds:.0f}")
                print(what, seed, name, nats, sides, f"{seconds:.0f} s", flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
