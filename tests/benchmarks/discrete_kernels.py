"""How fast kernels of many bits mix: Gibbs, Gibbs with gradients and discrete Langevin on an Ising model.

    python -m tests.benchmarks.discrete_kernels [--side 10] [--couplings 0.1 0.25 0.4] [--draws 1600]

A torus of spins without a field; 64 chains that begin at random, a quarter of the time for warm-up. Steps of discrete
Langevin are adapted to accept 0.574. Effective draws (bulk, all chains) of the energy and of the size of the mean spin; the
fewer of the two per 1,000 evaluations of a chain and per second. An evaluation is the density of a row for Gibbs, the density
with its gradient for the others. Every kernel is recorded, on one core. The last column is the mean energy of a spin: the
three should agree.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pgen.algorithms.adaptation.step_size import DualAveraging
from pgen.algorithms.kernels.base import Tuning, untuned
from pgen.algorithms.kernels.discrete_langevin import DiscreteLangevin
from pgen.algorithms.kernels.gibbs import Gibbs, GibbsWithGradients
from pgen.algorithms.record import record
from pgen.metrics.chains import ess_bulk

CHAINS = 64


@dataclass(frozen=True)
class Ising:
    """Spins of a square that is joined to itself at the edges."""

    side: int
    coupling: float

    def of_spins(self, spin: Tensor) -> tuple[Tensor, Tensor]:
        """Log density `[R]` and its slope `[R, m]`, of spins `[R, m]`."""
        square = spin.unflatten(1, (self.side, self.side))
        near = torch.stack([square.roll(shift, dim) for dim in (1, 2) for shift in (1, -1)]).sum(0)
        slope = self.coupling * near.flatten(1)
        return (slope * spin).sum(1) / 2, slope

    def __call__(self, z: Tensor) -> Tensor:
        """For `Gibbs`."""
        return self.of_spins(2.0 * z - 1)[0]

    def relaxed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For kernels with gradients."""
        value, slope = self.of_spins(x[..., 1] - x[..., 0])
        return value, torch.stack([-slope, slope], 2)


def measured(kernel: Any, model: Ising, draws: int) -> dict[str, float]:
    """Draws, after a quarter as many that are left out."""
    torch.manual_seed(0)
    m = model.side**2
    target: Any = model if isinstance(kernel, Gibbs) else model.relaxed
    state = kernel.init(torch.randint(2, (CHAINS, m)), target)
    tuning, rule = untuned(torch.zeros(1, m)), DualAveraging(accept=0.574)
    at = rule.init(torch.tensor(0.3))

    def one(state: Any, tuning: Tuning) -> Any:
        return kernel.step(state, tuning, target)

    step = record(one)
    for _ in range(draws // 4):
        state, info = step(state, tuning._replace(step_size=at.step_size))
        at = rule.update(at, info.accept.mean())
    tuning = tuning._replace(step_size=at.averaged)
    accept, evaluations, flips = 0.0, 0.0, 0.0
    energy, size = [], []
    start = time.perf_counter()
    for _ in range(draws):
        before = state.position
        state, info = step(state, tuning)
        energy.append(-state.log_density)
        size.append((2.0 * state.position - 1).mean(1).abs())
        flips += float((state.position != before).sum(1).float().mean()) / draws
        accept += float(info.accept.mean()) / draws
        evaluations += float(info.evaluations.mean())
    seconds = time.perf_counter() - start
    ess = {name: float(ess_bulk(torch.stack(v, 1))) for name, v in (("energy", energy), ("size", size))}
    fewer = min(ess.values())
    return {
        "accept": accept,
        "flips": flips,
        **ess,
        "per evaluation": fewer / CHAINS / evaluations * 1000,
        "per second": fewer / seconds,
        "mean": float(torch.stack(energy).mean()) / m / model.coupling,
    }


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Mixing of kernels of many bits.")
    parser.add_argument("--side", type=int, default=10)
    parser.add_argument("--couplings", nargs="+", type=float, default=[0.1, 0.25, 0.4])
    parser.add_argument("--draws", type=int, default=1600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (2,) * options.side**2
    headings = (
        "coupling", "kernel", "accepted", "flips a draw", "ESS energy", "ESS size", "per 1,000 evaluations", "per second",
        "energy / J",
    )  # fmt: skip
    table = Table(*headings, title=f"Ising, {options.side} x {options.side}, {CHAINS} chains")
    for coupling in options.couplings:
        model = Ising(options.side, coupling)
        for name, kernel, draws in (
            ("Gibbs, a sweep", Gibbs(sizes), options.draws // 8),
            ("with gradients, 10 moves", GibbsWithGradients(sizes, moves=10), options.draws),
            ("discrete Langevin", DiscreteLangevin(sizes), options.draws),
        ):
            found = measured(kernel, model, draws)
            table.add_row(
                str(coupling), name, f"{found['accept']:.2f}", f"{found['flips']:.1f}", f"{found['energy']:.0f}",
                f"{found['size']:.0f}", f"{found['per evaluation']:.3g}", f"{found['per second']:.3g}", f"{found['mean']:.3f}",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
