"""Energies of the plane: how near each way of learning comes to a density that is known, and how fast.

    python -m tests.benchmarks.energy_planes [--targets ring grid ...] [--ways pcd cd ...] [--seeds 10] [--steps N]

The model is one network (`MLPEnergy`, two hidden layers of 128 units beside 64 random waves) on a wide Gaussian base, the
same for all targets and all ways; so are the runs, but that score matching takes twice as many steps. There are 100,000 rows to
learn from: of 10,000, score matching with narrow noise learns the very rows. log Z is integrated on a grid (`via="quadrature"`),
so that

    KL(data || model) = E_data[log p_data(x) - log p_model(x)]

over 20,000 fresh points is exact but for their sampling error (about .005-.01). Targets: a ring of eight and a grid of 25
Gaussians (standard deviation .2), two moons (noise .1) and a checkerboard, which is uniform on eight squares and so has edges
that no smooth energy follows. Printed are the KL at the end, how often runs were rolled back, their seconds, and with `--time`
the seconds of the shortest run (of an eighth, a quarter, half of the steps, each with a schedule of its own) that is at most 0.1
nats away.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.algorithms.energy.matching import DenoisingScoreMatching, SlicedScoreMatching
from pgen.distributions import Energy
from pgen.distributions.energy_learning import learned_by
from pgen.nn.energies import MLPEnergy
from pgen.zoo import toys

TARGETS = {
    "ring": lambda: toys.ring(8, 2.0, 0.2),
    "grid": lambda: toys.grid(5, 2.0, 0.2),
    "moons": lambda: toys.moons(64, 0.1),
    "checkerboard": toys.checkerboard,
}
WAYS: dict[str, Any] = {
    "cd": "contrastive-divergence",
    "pcd": "persistent-contrastive-divergence",
    "nce": "noise-contrastive",
    "dsm": lambda steps: learned_by(DenoisingScoreMatching(noise=0.01, anneal=4 * steps // 5)),
    "ssm": lambda steps: learned_by(SlicedScoreMatching(noise=0.01, anneal=4 * steps // 5)),
    "ed": "energy-discrepancy",
    "cnce": "conditional-noise-contrastive",
    "amortised": "amortised",
    "cooperative": "cooperative",
}
FIVE = ("cd", "pcd", "nce", "dsm", "ssm")
LONGER = {"dsm": 2, "ssm": 2}  # times as many steps, over most of which their noise becomes narrower
ENOUGH = 0.1


class Plane(nn.Module):
    """One energy on a base 1.5 times as wide as the data."""

    def __init__(self, width: float, hidden: int = 128, waves: int = 64, detail: float = 1.0) -> None:
        super().__init__()
        self.energy = MLPEnergy(2, (hidden, hidden), frequencies=waves, detail=detail)
        self.width = width

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        base = dist.Normal(torch.zeros(2), self.width).to_event(1)
        with pyro.plate("data", n):
            return pyro.sample("x", Energy(self.energy, (2,), base=base))


def divergence(fitted: pgen.fitted.Fitted, toy: toys.Toy) -> float:
    """KL(data || model), in nats."""
    x = toy.sample(20_000, seed=99)
    return float((toy.log_prob(x) - fitted.log_prob({"x": x}).value).double().mean())


def learn(name: str, way: str, seed: int, run: pgen.Run, rows: int = 100_000) -> tuple[float, float, int]:
    """KL at the end, seconds of training, and roll-backs."""
    toy = TARGETS[name]()
    data = toy.sample(rows, seed=seed)
    torch.manual_seed(seed)
    program = Plane(1.5 * float(data.std()))
    steps = (run.steps or 2000) * LONGER.get(way, 1)
    how = WAYS[way](steps) if callable(WAYS[way]) else WAYS[way]
    backend = pgen.backend("exact", via={"x": how})
    fitted = pgen.fit(program, {"x": data}, backend, run=replace(run, seed=seed, steps=steps))
    back = sum("went back" in told for told in fitted.history.warnings)
    return divergence(fitted, toy), fitted.history.seconds, back


def until_enough(name: str, way: str, seed: int, run: pgen.Run, rows: int) -> float | None:
    """Seconds of training of the shortest of several runs, each with its own schedule, that is near enough."""
    steps = run.steps or 2000
    for part in (8, 4, 2, 1):
        kl, seconds, _ = learn(name, way, seed, replace(run, steps=steps // part), rows)
        if kl <= ENOUGH:
            return seconds
    return None


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Energies of the plane.")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--ways", nargs="+", default=list(FIVE), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rows", type=int, default=100_000, help="to learn from")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--time", action="store_true", help="also how long the shortest run takes that is near enough"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = pgen.Run(steps=options.steps, batch_size=options.batch, lr=options.lr, ema=0.995, progress=False)
    table = Table(
        "target", "way", "KL, median", "worst", "runs at most .1", "rolled back", "seconds", "until .1"
    )
    for name in options.targets:
        for way in options.ways:
            found = [
                learn(name, way, s, run, options.rows)
                for s in range(options.first, options.first + options.seeds)
            ]
            kls = torch.tensor([kl for kl, _, _ in found])
            quick = until_enough(name, way, options.first, run, options.rows) if options.time else None
            table.add_row(
                name,
                way,
                f"{float(kls.median()):.3f}",
                f"{float(kls.max()):.3f}",
                f"{int((kls <= ENOUGH).sum())} of {len(kls)}",
                str(sum(back for _, _, back in found)),
                f"{sum(s for _, s, _ in found) / len(found):.1f}",
                "" if quick is None else f"{quick:.1f}",
            )
            print(name, way, [round(float(kl), 3) for kl in kls], flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
