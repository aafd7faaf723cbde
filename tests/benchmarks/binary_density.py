"""Exact nats on seven binary densities: python -m tests.benchmarks.binary_density --data FOLDER [--sets nltcs dna ...].

The folder holds one `.npz` for each set, with the arrays `train`, `valid` and `test`. For every set, in nats per row:

- a Chow-Liu tree, in closed form; its smoothing is chosen on the validation rows;
- a mixture of products of Bernoullis: its latent is summed out;
- a mixture of trees: one Chow-Liu tree for every component of that mixture, rows weighted by what they owe to it, and
  then a fit of all of them together;
- masked autoencoders of several settings; for the best of them, four orders whose probabilities are averaged.

All are Pyro programs, fitted by `pgen.fit(..., "exact")` until the validation rows get no likelier. The model of a set is the
candidate of greatest validation likelihood: the test rows choose nothing. On `nltcs` the probabilities of all 2^16 values are
added up.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pgen
from pgen.fitted import Fitted
from pgen.isolation import isolated
from pgen.zoo import Data, MaskedAutoencoder, Tree, TreeMixture, chow_liu
from pgen.zoo.datasets import DEBD, debd

PUBLIC = {"nltcs": -6.759, "plants": -16.524, "jester": -58.227, "accidents": -33.188}
SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
ORDERS = 4


@dataclass(frozen=True)
class Masked:
    """A masked autoencoder and how it is trained."""

    hidden: int
    dropout: float
    decay: float
    steps: int
    lr: float = 3e-3

    def __str__(self) -> str:
        return f"masked, hidden {self.hidden}, dropout {self.dropout:g}, decay {self.decay:g}"


@dataclass(frozen=True)
class Settings:
    """What is tried on one set: components of mixtures, their steps, and masked autoencoders."""

    components: int
    steps: int
    masked: tuple[Masked, ...]


SETTINGS = {
    "nltcs": Settings(16, 1000, (Masked(64, 0.0, 0.1, 2000), Masked(256, 0.0, 0.1, 3000))),
    "plants": Settings(32, 1000, (Masked(256, 0.2, 0.1, 4000), Masked(512, 0.3, 0.1, 5000))),
    "mushrooms": Settings(32, 1500, (Masked(256, 0.3, 0.3, 3000), Masked(256, 0.5, 0.1, 3000))),
    "dna": Settings(6, 300, (Masked(16, 0.3, 0.1, 800), Masked(16, 0.2, 0.03, 800))),
    "nips": Settings(8, 300, (Masked(100, 0.5, 10.0, 300), Masked(256, 0.7, 5.0, 300))),
    "jester": Settings(24, 600, (Masked(128, 0.3, 1.0, 1500), Masked(256, 0.5, 0.3, 2500))),
    "accidents": Settings(32, 1500, (Masked(256, 0.2, 0.1, 4000), Masked(512, 0.3, 0.1, 5000))),
}


@dataclass(frozen=True)
class Candidate:
    """Laws whose probabilities are averaged (mostly one), and the processor's seconds to find them."""

    name: str
    laws: tuple[Fitted | Tree, ...]
    seconds: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log probabilities of rows, in nats."""
        scores = [
            law.log_prob(x) if isinstance(law, Tree) else law.log_prob({"x": x}).value for law in self.laws
        ]
        return torch.logsumexp(torch.stack(scores).double(), 0) - math.log(len(scores))

    def nats(self, x: Tensor) -> float:
        """Their mean."""
        return float(self.log_prob(x).mean())


def timed(name: str, find: Callable[[], Fitted | Tree]) -> Candidate:
    """One law and the seconds that it took."""
    start = time.process_time()
    law = find()
    return Candidate(name, (law,), time.process_time() - start)


def chow_liu_tree(data: Data) -> Candidate:
    """The tree whose smoothing suits the validation rows."""
    valid = data.valid["x"]
    return timed(
        "Chow-Liu tree",
        lambda: max(
            (chow_liu(data.train["x"], a) for a in SMOOTHING), key=lambda t: float(t.log_prob(valid).mean())
        ),
    )


def products(x: Tensor, components: int, generator: torch.Generator, spread: float = 0.5) -> list[Tree]:
    """Products of Bernoullis near the shares of ones in the data."""
    logits = ((x.sum(0) + 0.5) / (len(x) + 1)).logit()
    lone = torch.full(logits.shape, -1)
    noise = spread * torch.randn(components, len(logits), generator=generator)
    return [Tree((logits + each)[:, None].expand(-1, 2), lone) for each in noise]


def mixture(name: str, data: Data, trees: list[Tree], steps: int, lr: float) -> Candidate:
    """A mixture that starts from these."""
    run = pgen.Run(steps=steps, batch_size=128, lr=lr, validation=data.valid, patience=4, progress=False)
    program = TreeMixture(data.features, len(trees), trees)
    return timed(name, lambda: pgen.fit(program, data.train, "exact", run=run, seed=0))


def mixtures(data: Data, settings: Settings) -> list[Candidate]:
    """Of products, then of trees that share out the rows as those do."""
    x, count = data.train["x"], settings.components
    start = products(x, count, torch.Generator().manual_seed(0))
    plain = mixture(f"mixture of {count} products", data, start, settings.steps, 0.03)
    (fitted,) = plain.laws
    shares = fitted.marginals(data.train)["component"].probs.detach()  # [rows, components]
    trees = [chow_liu(x, smoothing=1.0, weights=share) for share in shares.unbind(-1)]
    grown = mixture(f"mixture of {count} trees", data, trees, settings.steps, 0.02)
    return [plain, replace(grown, seconds=grown.seconds + plain.seconds)]


def masked(data: Data, setting: Masked, seed: int) -> Candidate:
    """A masked autoencoder; seed 0 takes the variables in their own order, others in one of their own."""
    run = pgen.Run(
        steps=setting.steps,
        batch_size=128,
        lr=setting.lr,
        optimizer="adamw",
        weight_decay=setting.decay,
        ema=0.99,
        validation=data.valid,
        patience=5,
        progress=False,
    )
    with isolated(seed):
        order = torch.randperm(data.features) if seed else None
        program = MaskedAutoencoder(data.features, 2, setting.hidden, setting.dropout, order=order)
    return timed(str(setting), lambda: pgen.fit(program, data.train, "exact", run=run, seed=seed))


def averaged(data: Data, setting: Masked, first: Candidate) -> Candidate:
    """The same in other orders too."""
    every = [first, *(masked(data, setting, seed) for seed in range(1, ORDERS))]
    laws = tuple(law for each in every for law in each.laws)
    return Candidate(f"{ORDERS} orders of the best of these", laws, sum(each.seconds for each in every))


def total_probability(law: Candidate, features: int) -> float:
    """The probabilities of all values, added up."""
    every = torch.arange(2**features)[:, None] >> torch.arange(features) & 1
    return float(law.log_prob(every.float()).exp().sum())


def judge(console: Console, name: str, data: Data) -> tuple[float, float]:
    """Print all candidates of a set; test nats of the tree and of the candidate that the validation rows prefer."""
    settings, valid = SETTINGS[name], data.valid["x"]
    tree = chow_liu_tree(data)
    found = mixtures(data, settings)
    singles = {setting: masked(data, setting, 0) for setting in settings.masked}
    favourite = max(singles, key=lambda setting: singles[setting].nats(valid))
    found += [*singles.values(), averaged(data, favourite, singles[favourite])]
    best = max(found, key=lambda each: each.nats(valid))
    rows = " / ".join(str(len(split["x"])) for split in (data.train, data.valid, data.test))
    table = Table(
        "model", "train", "valid", "test", "seconds", title=f"{name}: {data.features} variables, {rows} rows"
    )
    for each in (tree, *found):
        nats = [f"{each.nats(split['x']):.3f}" for split in (data.train, data.valid, data.test)]
        table.add_row(f"{each.name} *" if each is best else each.name, *nats, f"{each.seconds:.1f}")
    console.print(table)
    if name == "nltcs":
        console.print(f"the probabilities of all 2^16 values add up to {total_probability(best, 16):.8f}\n")
    return tree.nats(data.test["x"]), best.nats(data.test["x"])


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Exact nats on binary densities.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the .npz files")
    parser.add_argument("--sets", nargs="+", default=list(DEBD), choices=list(DEBD))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    table = Table(
        "set",
        "Chow-Liu",
        "public figure",
        "model",
        "gain",
        title="test nats per row; * chosen on validation rows",
    )
    start = time.perf_counter()
    for name in options.sets:
        tree, best = judge(console, name, debd(name)(options.data))
        table.add_row(name, f"{tree:.3f}", str(PUBLIC.get(name, "")), f"{best:.3f}", f"{best - tree:+.3f}")
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
