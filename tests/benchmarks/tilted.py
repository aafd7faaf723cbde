"""Energies that tilt other laws, on digits: the prior of a variational autoencoder, and a flow.

    python -m tests.benchmarks.tilted [vae] [flow] [--seeds 3] [--steps 1500]

vae: binary 8 x 8 digits (scikit-learn). `z ~ N(0, I)` becomes `z ~ Energy(net, (k,), base=N(0, I))`. Everything is learned at
once by `variational`, from scratch, or from where the fitted autoencoder is (and then the autoencoder goes on as long, too).
Held-out nats are importance-weighted (200 particles), with log Z annealed and its error told.

flow: digits with uniform noise, between -1 and 1. A spline flow is fitted and stopped early; then
`x ~ Energy(net, (64,), base=fitted.law("x"))` is learned by noise contrastive estimation, for which the flow is the noise, and
by persistent chains. Held-out nats, log Z by annealing from the flow, between stochastic bounds.

The change of each program is printed, as `diff` sees it. `told apart` is the accuracy of a classifier between draws and held-out
rows: 0.5 is best.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import time
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.contrastive import PersistentContrastiveDivergence
from pgen.algorithms.energy.draws import LongRun
from pgen.distributions import Energy
from pgen.distributions.energy_conversions import drawn_by
from pgen.distributions.energy_learning import learned_by
from pgen.distributions.energy_partition import annealed_by
from pgen.metrics import c2st
from pgen.nn import MLPEnergy
from pgen.zoo import VAE, SplineFlow
from pgen.zoo.datasets import digits, digits_binary

LATENTS = 8
# Chains through a flow of 64 numbers are slow: leaps from the flow carry them, and few steps are taken between.
SHORT = LongRun(warmup=40, chains=200, steps=1, thin=5)
FLOW_ANSWERS = (annealed_by(Annealing(chains=200, most=200), SHORT), drawn_by(SHORT))


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


class LearnedFlow(nn.Module):
    """A flow that is fitted already, as a program."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = (base,)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", self.base[0])


class TiltedFlow(LearnedFlow):
    """The same, tilted."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.tilt = MLPEnergy(64, (256, 256))

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", Energy(self.tilt, (64,), base=self.base[0]))


class Row(NamedTuple):
    """What is found of one model."""

    model: str
    nats: Tensor
    stderr: Tensor
    between: str
    apart: float
    seconds: float


def change(before: type, after: type) -> str:
    """The lines by which the programs of two classes differ."""
    pair = [inspect.getsource(cls.forward).splitlines() for cls in (before, after)]
    lines = list(difflib.unified_diff(*pair, lineterm="", n=0))[3:]
    return "\n".join(line for line in lines if not line.startswith("@@"))


def looked_at(name: str, fitted: Any, test: dict[str, Tensor], seconds: float) -> Row:
    """Held-out nats and draws of a fit."""
    estimate = fitted.log_prob(test, seed=0)
    mean = estimate.mean()
    sides = (
        ""
        if estimate.lower is None or estimate.upper is None
        else f"{float(estimate.lower.mean()):.3f} to {float(estimate.upper.mean()):.3f}"
    )
    drawn = fitted.sample(len(test["x"]), seed=0)["x"].float()
    told = c2st(drawn, test["x"].float()).accuracy
    stderr = torch.zeros(()) if mean.stderr is None else mean.stderr
    return Row(name, mean.value, stderr, sides, float(told), seconds)


def timed(*args: Any, **kwargs: Any) -> tuple[Any, float]:
    """A fit, and the seconds that it took."""
    start = time.perf_counter()
    fitted = pgen.fit(*args, **kwargs)
    return fitted, time.perf_counter() - start


def continued(program: nn.Module, fitted: Any) -> nn.Module:
    """A program whose tensors are those of a fit, where it has them."""
    program.load_state_dict(dict(fitted.parameters), strict=False)
    return program


def vae(seed: int, steps: int) -> list[Row]:
    """Held-out nats of both priors."""
    data = digits_binary()
    data_train, data_test = ({"x": part["x"].float()} for part in (data.train, data.test))
    backend = pgen.backend(
        "variational",
        evaluate="importance",
        evaluation_particles=200,
        via={"z": learned_by(PersistentContrastiveDivergence(steps=5))},
    )
    plain = pgen.backend("variational", evaluate="importance", evaluation_particles=200)
    run = pgen.Run(steps=steps, lr=1e-3, batch_size=128, progress=False, seed=seed)
    torch.manual_seed(seed)
    normal, taken = timed(VAE(LATENTS, levels=2), data_train, plain, run=run, seed=seed)
    found = [looked_at("vae: normal prior", normal, data_test, taken)]
    torch.manual_seed(seed)
    tilted, taken = timed(TiltedVAE(LATENTS), data_train, backend, run=run, seed=seed)
    found.append(looked_at("vae: energy prior", tilted, data_test, taken))
    torch.manual_seed(seed)
    more, taken = timed(
        continued(VAE(LATENTS, levels=2), normal), data_train, plain, run=run, seed=seed + 1000
    )
    found.append(looked_at("vae: normal prior, twice as long", more, data_test, taken))
    torch.manual_seed(seed)
    begun = continued(TiltedVAE(LATENTS), normal)
    after, taken = timed(begun, data_train, backend, run=run, seed=seed + 1000)
    found.append(looked_at("vae: energy prior, from the fitted one", after, data_test, taken))
    return found


def flow(seed: int, steps: int) -> list[Row]:
    """Held-out nats of a flow, and of the flow tilted."""
    data = digits()
    torch.manual_seed(seed)
    train, valid, test = (
        {"x": (part["x"].float() + torch.rand(part["x"].shape)) * 2 / 17 - 1}
        for part in (data.train, data.valid, data.test)
    )
    stop = pgen.Run(
        steps=steps, lr=1e-3, batch_size=128, validation=valid, patience=4, progress=False, seed=seed
    )
    plain, taken = timed(SplineFlow(64), train, "exact", run=stop, seed=seed)
    found = [looked_at("flow", plain, test, taken)]
    base = plain.law("x")
    run = {"lr": 3e-4, "batch_size": 128, "optimizer": "adamw", "weight_decay": 1e-2, "progress": False}
    nce = pgen.Run(steps=600, validation=valid, patience=4, seed=seed, **run)
    backend = pgen.backend("exact", via={"x": ("noise-contrastive", *FLOW_ANSWERS)})
    tilted, taken = timed(TiltedFlow(base), train, backend, run=nce, seed=seed)
    found.append(looked_at("flow, tilted: noise-contrastive", tilted, test, taken))
    chains = learned_by(PersistentContrastiveDivergence(steps=1, leaps=4, chains=512))
    backend = pgen.backend("exact", via={"x": (chains, *FLOW_ANSWERS)})
    tilted, taken = timed(
        TiltedFlow(base), train, backend, run=pgen.Run(steps=300, seed=seed, **run), seed=seed
    )
    found.append(looked_at("flow, tilted: persistent chains", tilted, test, taken))
    return found


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Energies that tilt other laws.")
    parser.add_argument("what", nargs="*", default=["vae", "flow"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = {"vae": (VAE, TiltedVAE), "flow": (LearnedFlow, TiltedFlow)}
    rows: dict[str, list[Row]] = {}
    for what in options.what:
        print(what, change(*pairs[what]), sep="\n", flush=True)
        for seed in range(options.seeds):
            for row in {"vae": vae, "flow": flow}[what](seed, options.steps):
                rows.setdefault(row.model, []).append(row)
                print(
                    f"{row.model}, seed {seed}: {float(row.nats):.3f} +- {float(row.stderr):.3f} {row.between} "
                    f"told apart {row.apart:.3f} {row.seconds:.0f} s",
                    flush=True,
                )
    table = Table("model", "held-out nats, by seed", "mean", "error of log Z", "told apart", "seconds")
    for model, found in rows.items():
        nats = torch.stack([row.nats for row in found])
        table.add_row(
            model,
            " ".join(f"{float(x):.2f}" for x in nats),
            f"{float(nats.mean()):.2f}"
            + (f" +- {float(nats.std() / len(nats) ** 0.5):.2f}" if len(nats) > 1 else ""),
            f"{max(float(row.stderr) for row in found):.3f}",
            f"{sum(row.apart for row in found) / len(found):.3f}",
            f"{sum(row.seconds for row in found) / len(found):.0f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
