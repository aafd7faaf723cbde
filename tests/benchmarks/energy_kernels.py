"""Chain-steps per second of Langevin, MALA and HMC on energies: pgen beside bare loops of torch, torchebm, JAX and BlackJAX.

    python -m tests.benchmarks.energy_kernels [--dims 2 128] [--chains 1000 10000] [--energies gauss mlp] [--compile]

A chain-step is one transition of one chain; HMC's has five leapfrogs. Energies: `gauss`, |x|^2 / 2v with v from 0.5 to 2, and
`mlp`, d-128-128-1 with SiLU plus |x|^2 / 2. Single precision, one core; all ways take turns, the median of several rounds is
printed. pgen's kernels end with log density and gradient at the last position; so do the bare loops of MALA and HMC. `--compile`
adds recordings compiled by inductor. ULA looks whether its numbers are finite after every 24 moves, or 6 of many
chains. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pgen.algorithms.energy.walks import with_gradient
from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.iterate import moved
from pgen.algorithms.kernels.langevin import MALA, ULA
from pgen.algorithms.record import record

EPS, LEAPS, STEP = 1e-2, 5, 0.1
Way = Callable[[], Any]


class Mlp(nn.Module):
    """A small network in a bowl."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Energies `[C]`."""
        return self.net(x).squeeze(-1) + 0.5 * (x * x).sum(-1)


class Gauss(nn.Module):
    """Independent normal numbers."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("precision", 1 / torch.linspace(0.5, 2, d))

    def forward(self, x: Tensor) -> Tensor:
        """Energies `[C]`."""
        return 0.5 * (x * x * self.precision).sum(-1)


def ours(energy: nn.Module, x: Tensor, steps: int, compiled: bool) -> dict[str, Way]:
    """pgen's kernels, recorded."""
    by_autograd = with_gradient(lambda q: -energy(q))
    targets: dict[str, Any] = {"": by_autograd}
    if isinstance(energy, Gauss):

        def by_hand(q: Tensor) -> tuple[Tensor, Tensor]:
            slope = -q * energy.precision
            return 0.5 * (q * slope).sum(-1), slope

        targets[", hand gradient"] = by_hand
    found: dict[str, Way] = {}
    small = x.numel() <= 128_000 and (isinstance(energy, Gauss) or len(x) <= 1000)
    scale, moves = torch.ones(()), 24 if small else 6
    for name, kernel, step in (
        ("ULA", ULA(moves), (2 * EPS) ** 0.5),
        ("MALA", MALA(), (2 * EPS) ** 0.5),
        ("HMC", HMC(LEAPS, jitter=0.0), STEP),
    ):
        tuning = Tuning(torch.tensor(step), scale, scale)
        for label, target in targets.items():
            state = kernel.init(x, target)
            for how in ("", ", compiled") if compiled else ("",):
                wrap = functools.cache(functools.partial(record, compile="inductor" if how else "products"))
                draws = steps // getattr(kernel, "moves", 1)
                found[f"{name} pgen{label}{how}"] = functools.partial(
                    moved, kernel, state, tuning, target, draws, wrap, 1 if draws < steps else None
                )
    return found


def bare(energy: nn.Module, x: Tensor, steps: int) -> dict[str, Way]:
    """Loops that one would write by hand."""
    both = with_gradient(energy)
    noise = (2 * EPS) ** 0.5

    def by_autograd(y: Tensor) -> Tensor:
        return both(y)[1]

    def by_hand(y: Tensor) -> tuple[Tensor, Tensor]:
        slope = y * energy.precision
        return 0.5 * (y * slope).sum(-1), slope

    def langevin(slope: Callable[[Tensor], Tensor]) -> Tensor:
        y = x
        for _ in range(steps):
            y = y - EPS * slope(y) + noise * torch.randn_like(y)
        return y

    def mala(both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        y, (v, g) = x, both(x)
        for _ in range(steps):
            z = torch.randn_like(y)
            p = y - EPS * g + noise * z
            vp, gp = both(p)
            back = (y - p + EPS * gp).square().sum(-1) / (4 * EPS)
            ok = torch.rand_like(v).log() < v - vp - back + 0.5 * z.square().sum(-1)
            y, v, g = torch.where(ok[:, None], p, y), torch.where(ok, vp, v), torch.where(ok[:, None], gp, g)
        return y

    def hmc(both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        y, (v, g) = x, both(x)
        for _ in range(steps):
            p = torch.randn_like(y)
            before = v + 0.5 * p.square().sum(-1)
            q, vq, gq = y, v, g
            for _ in range(LEAPS):
                p = p - 0.5 * STEP * gq
                q = q + STEP * p
                vq, gq = both(q)
                p = p - 0.5 * STEP * gq
            ok = torch.rand_like(v).log() < before - vq - 0.5 * p.square().sum(-1)
            y, v, g = torch.where(ok[:, None], q, y), torch.where(ok, vq, v), torch.where(ok[:, None], gq, g)
        return y

    found: dict[str, Way] = {
        "ULA bare torch": lambda: langevin(by_autograd),
        "MALA bare torch": lambda: mala(both),
        "HMC bare torch": lambda: hmc(both),
    }
    if isinstance(energy, Gauss):
        found["ULA bare torch, hand gradient"] = lambda: langevin(lambda y: y * energy.precision)
        found["MALA bare torch, hand gradient"] = lambda: mala(by_hand)
        found["HMC bare torch, hand gradient"] = lambda: hmc(by_hand)
    return {name: torch.no_grad()(way) for name, way in found.items()}


def torchebm(energy: nn.Module, x: Tensor, steps: int) -> dict[str, Way]:
    """torchebm's samplers, where it is installed."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics
    except ImportError:
        return {}

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return self.energy(x)

    langevin = LangevinDynamics(Model(), step_size=EPS)
    hmc = HamiltonianMonteCarlo(Model(), step_size=STEP, n_leapfrog_steps=LEAPS)
    return {
        "ULA torchebm": lambda: langevin.sample(x=x, n_steps=steps),
        "HMC torchebm": lambda: hmc.sample(x=x, n_steps=steps),
    }


def jaxes(energy: nn.Module, x: Tensor, steps: int) -> dict[str, Way]:
    """JAX's scan and BlackJAX's kernels under vmap, where they are installed."""
    try:
        import blackjax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}
    if isinstance(energy, Gauss):
        precision = jnp.asarray(energy.precision.numpy())

        def one(y: Any) -> Any:
            return 0.5 * (y * y * precision).sum()

    else:
        layers = [
            (jnp.asarray(m.weight.detach().numpy()).T, jnp.asarray(m.bias.detach().numpy()))
            for m in energy.net
            if isinstance(m, nn.Linear)
        ]

        def one(y: Any) -> Any:
            h = y
            for i, (weight, bias) in enumerate(layers):
                h = h @ weight + bias
                h = jax.nn.silu(h) if i < 2 else h
            return h[0] + 0.5 * (y * y).sum()

    start, key, chains = jnp.asarray(x.numpy()), jax.random.PRNGKey(0), len(x)
    slope = jax.vmap(jax.grad(one))

    @jax.jit
    def scanned(key: Any, x: Any) -> Any:
        def step(y: Any, k: Any) -> Any:
            return y - EPS * slope(y) + (2 * EPS) ** 0.5 * jax.random.normal(k, y.shape), None

        return jax.lax.scan(step, x, jax.random.split(key, steps))[0]

    def kernel(algorithm: Any) -> Way:
        @jax.jit
        def run(key: Any, x: Any) -> Any:
            def step(state: Any, k: Any) -> Any:
                return jax.vmap(algorithm.step)(jax.random.split(k, chains), state)[0], None

            return jax.lax.scan(step, jax.vmap(algorithm.init)(x), jax.random.split(key, steps))[0].position

        return lambda: run(key, start).block_until_ready()

    def density(y: Any) -> Any:
        return -one(y)

    hmc = blackjax.hmc(
        density, step_size=STEP, inverse_mass_matrix=jnp.ones(x.shape[1]), num_integration_steps=LEAPS
    )
    return {
        "ULA JAX scan": lambda: scanned(key, start).block_until_ready(),
        "MALA BlackJAX": kernel(blackjax.mala(density, EPS)),
        "HMC BlackJAX": kernel(hmc),
    }


def race(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Chain-steps per second.")
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 128])
    parser.add_argument("--chains", nargs="+", type=int, default=[1000, 10000])
    parser.add_argument("--energies", nargs="+", default=["gauss", "mlp"], choices=["gauss", "mlp"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "energy",
        "D",
        "chains",
        "kernel",
        "pgen",
        "best torch",
        "ratio",
        "JAX",
        "ratio",
        title="chain-steps per second",
    )
    for kind in options.energies:
        for d in options.dims:
            for chains in options.chains:
                torch.manual_seed(0)
                energy = (Gauss if kind == "gauss" else Mlp)(d).requires_grad_(False)
                x = torch.randn(chains, d)
                steps = 96 if chains * d <= 128_000 and (kind == "gauss" or chains == 1000) else 24
                ways = {
                    **ours(energy, x, steps, options.compile),
                    **bare(energy, x, steps),
                    **torchebm(energy, x, steps),
                    **jaxes(energy, x, steps),
                }
                rate = {name: chains * steps / s for name, s in race(ways, options.rounds).items()}
                for name, value in rate.items():
                    print(f"{kind} D={d} {chains} chains  {name:38}{value:12.4g}", flush=True)
                for kernel in ("ULA", "MALA", "HMC"):
                    mine = max(v for k, v in rate.items() if k.startswith(f"{kernel} pgen"))
                    torches = [
                        v for k, v in rate.items() if k.startswith(kernel) and ("bare" in k or "ebm" in k)
                    ]
                    jax = [v for k, v in rate.items() if k.startswith(kernel) and "JAX" in k]
                    best = max(torches)
                    table.add_row(
                        kind, str(d), str(chains), kernel, f"{mine:.3g}", f"{best:.3g}", f"{mine / best:.2f}",
                        *((f"{jax[0]:.3g}", f"{mine / jax[0]:.2f}") if jax else ("-", "-")),
                    )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
