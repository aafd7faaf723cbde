"""Boltzmann machines on binarised digits: is log Z what enumeration says, and does its interval hold it?

    python -m tests.benchmarks.boltzmann learn [--seeds 12] [--steps 10000] [--lr 0.01] [--ways CD-1 ...]
    python -m tests.benchmarks.boltzmann partition [--runs 100]

scikit-learn's digits, 8 x 8 pixels above 7 of 16; 1,400 rows to learn from, 397 held out. `learn` compares ways by exact held-out
nats (twelve hidden units are summed over): their mean over seeds and its standard error. With twelve hidden units CD-1 is wrong
by a tenth of a nat, and so is PCD where its chains do not keep up with the weights: it takes twenty sweeps at each step for PCD
to come as near as the likelihood itself does. `partition` estimates log Z by annealed importance sampling, up from base rates and
down from draws of block Gibbs chains, of machines that are untrained, lightly and strongly trained, and with weights tripled:
the worst error, the mean standard error, and how often the 95 % interval holds the exact value.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

import pgen
from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.contrastive import ContrastiveDivergence, PersistentContrastiveDivergence
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.route import Own
from pgen.algorithms.energy.space import Space
from pgen.distributions.energy_learning import learned_by
from pgen.nn import RBM
from pgen.zoo import BoltzmannMachine

HIDDEN = 12


def _persistent(sweeps: int) -> Any:
    how = PersistentContrastiveDivergence(
        steps=sweeps, leaps=0, chains=200, moved=200, renew=0.01, regularisation=0.0
    )
    return learned_by(how)


WAYS: dict[str, Any] = {
    "CD-1": learned_by(ContrastiveDivergence(steps=1, leaps=0, regularisation=0.0)),
    "PCD-5": _persistent(5),
    "PCD-20": _persistent(20),
    "default": "persistent-contrastive-divergence",
    "pseudo-likelihood": "pseudo-likelihood",
    "likelihood": None,
}


def bits() -> tuple[Tensor, Tensor]:
    """Rows to learn from, and held out."""
    pixels = (torch.tensor(load_digits().data) > 7).float()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1400]], pixels[order[1400:]]


def fitted(way: Any, seed: int, steps: int, lr: float = 3e-3, ema: float = 0.99) -> Any:
    """A machine learned in one way; None: by its own likelihood."""
    train, _ = bits()
    torch.manual_seed(seed)
    backend = pgen.backend("exact", via={} if way is None else {"x": way})
    run = pgen.Run(steps=steps, lr=lr, batch_size=128, ema=ema, progress=False, seed=seed)
    return pgen.fit(BoltzmannMachine(64, HIDDEN, train), {"x": train}, backend, run=run)


def learn(ways: list[str], seeds: int, steps: int, lr: float) -> None:
    """Held-out nats by way."""
    train, held = bits()
    table = Table("way", "held-out nats (exact)", "worst", "best", "on its own rows", "seconds")
    for name in ways:
        start = time.perf_counter()
        fits = [fitted(WAYS[name], seed, steps, lr, ema=0.999) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / seeds
        apart, own = (
            torch.stack([fit.log_prob({"x": x}).mean().value for fit in fits]) for x in (held, train)
        )
        table.add_row(
            name,
            f"{float(apart.mean()):.3f} +- {float(apart.var(correction=min(1, seeds - 1)) ** 0.5 / seeds**0.5):.3f}",
            f"{float(apart.min()):.3f}",
            f"{float(apart.max()):.3f}",
            f"{float(own.mean()):.3f}",
            f"{seconds:.0f}",
        )
        print(name, [round(float(v), 3) for v in apart], flush=True)
    Console(width=110).print(table)


def machines() -> dict[str, RBM]:
    """From easy to hard."""
    train, _ = bits()
    found = {}
    for name, steps, factor in (
        ("untrained", 0, 1.0),
        ("lightly", 300, 1.0),
        ("strongly", 8000, 1.0),
        ("tripled", 8000, 3.0),
    ):
        torch.manual_seed(0)
        machine = RBM(64, HIDDEN).like(train)
        fit = fitted(None, 0, steps)
        with torch.no_grad():
            for key, parameter in machine.named_parameters():
                parameter.copy_(fit.parameters[f"rbm.{key}"])
            machine.weight.mul_(factor)
        found[name] = machine.requires_grad_(False)
    return found


def partition(runs: int) -> None:
    """Errors and coverage by machine."""
    space = Space.of(torch.distributions.constraints.boolean, (64,))
    table = Table(
        "machine",
        "exact log Z",
        "worst error",
        "mean stderr",
        "held in 95 %",
        "apart, median",
        "seconds each",
    )
    for name, machine in machines().items():
        exact = float(machine.log_partition())
        how, long = Annealing(chains=1000, most=1000), LongRun(chains=500)
        errors, stderrs, held, apart = [], [], 0, []
        start = time.perf_counter()
        for seed in range(runs):
            torch.manual_seed(seed)
            begin = torch.bernoulli(machine.rates.sigmoid().expand(500, -1))
            drawn = long(lambda x, machine=machine: -machine(x), begin, space, 500, sweep=machine.sweep)
            found = how.run(Own(machine.tempered), drawn)
            errors.append(abs(float(found.log_z) - exact))
            stderrs.append(float(found.stderr))
            held += errors[-1] <= 1.96 * stderrs[-1]
            apart.append(float(found.apart))
        table.add_row(
            name,
            f"{exact:.3f}",
            f"{max(errors):.3f}",
            f"{sum(stderrs) / runs:.4f}",
            f"{held} of {runs}",
            f"{float(torch.tensor(apart).median()):.1f}",
            f"{(time.perf_counter() - start) / runs:.1f}",
        )
        print(name, "done", flush=True)
    Console(width=110).print(table)


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Boltzmann machines on binarised digits.")
    parser.add_argument("what", choices=["learn", "partition"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "learn":
        learn(options.ways, options.seeds, options.steps, options.lr)
    else:
        partition(options.runs)


if __name__ == "__main__":
    main()
