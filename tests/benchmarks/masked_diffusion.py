"""Masked diffusion on laws that are known, and on digits: python -m tests.benchmarks.masked_diffusion (minutes).

Four tables: strings of eight tokens from Markov chains, learned through the exact backend, their bound beside
the entropy and their conditionals beside the true ones; the variance of ways to look at a value, at equal
numbers of network passes; what drawing in few steps costs; nats per image of handwritten digits.
"""

from __future__ import annotations

import time
from functools import cache

import pyro
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.algorithms.diffusion.masked_views import Cosine, Counts, LogLinear, Orders, Times
from pgen.distributions import ordinal_logits
from pgen.distributions.masked_diffusion import MaskedDiffusion
from pgen.isolation import isolated
from pgen.nn.tokens import TokenTransformer
from pgen.zoo.datasets import digits
from tests.algorithms.diffusion.masked_laws import Chain

LEVELS, PLACES = 5, 8


class Masked(nn.Module):
    """A program of one site: a masked diffusion."""

    def __init__(self, network: nn.Module, levels: int, places: int) -> None:
        super().__init__()
        self.network, self.levels, self.places = network, levels, places

    def law(self) -> MaskedDiffusion:
        """The law at the site."""
        return MaskedDiffusion(self.network, self.levels, (self.places,))

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            return pyro.sample("x", self.law())


def learned(program: Masked, data: Tensor, run: pgen.Run, seed: int) -> tuple[MaskedDiffusion, float]:
    """The fitted law, and the seconds it took."""
    began = time.perf_counter()
    fitted = pgen.fit(program, {"x": data}, "exact", run=run, seed=seed)
    program.load_state_dict(dict(fitted.parameters), strict=False)
    program.eval()
    return program.law(), time.perf_counter() - began


# --- strings of a known law --------------------------------------------------------------------------------


@cache
def string_law(seed: int) -> tuple[Chain, MaskedDiffusion, Tensor, float]:
    """A chain, what was learned from 20,000 of its strings, others of its strings, and seconds."""
    chain = Chain.random(LEVELS, PLACES, seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = chain.sample(20_000, generator), chain.sample(500, generator)
    with isolated(seed):
        program = Masked(TokenTransformer(PLACES, LEVELS, width=64, depth=2), LEVELS, PLACES)
    run = pgen.Run(steps=1500, batch_size=128, lr=3e-3, progress=False)
    law, seconds = learned(program, train, run, seed)
    return chain, law, test, seconds


@torch.no_grad()
def strings(seeds: int = 3) -> Table:
    """Bounds and conditionals; all but the strings themselves is exact, by listing the 256 sets of places."""
    table = Table(
        *(
            "seed",
            "seconds",
            "entropy",
            "bound - entropy",
            "law - entropy",
            "left to right",
            "TV of conditionals",
        ),
        title="8 tokens of 5 kinds: nats per token, on 500 strings that were not seen",
    )
    for seed in range(seeds):
        chain, law, test, seconds = string_law(seed)
        true = chain.log_prob(test)
        found = (
            law.exact_bound(test),
            law.exact_log_prob(test),
            law.log_prob_in_order(test, torch.arange(PLACES)),
        )
        gaps = [float((true - one).mean()) / PLACES for one in found]
        known = torch.rand(test.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        exact = chain.network(test.masked_fill(~known, LEVELS)).softmax(-1)
        off = (law.conditional(test, known).probs - exact).abs().sum(-1)[~known] / 2
        table.add_row(
            str(seed),
            f"{seconds:.0f}",
            f"{chain.entropy / PLACES:.4f}",
            *(f"{gap:.4f}" for gap in gaps),
            f"{float(off.mean()):.4f}",
        )
    return table


@torch.no_grad()
def variances() -> Table:
    """Of the bound of one string, at as many passes through the network as it has places."""
    _, law, test, _ = string_law(0)
    test = test[:200]
    exact = law.exact_bound(test)
    table = Table(
        "views", "variance", "of the mean over rows", "mean - exact", title="eight passes for each string"
    )
    for views in (Times(8), Times(8, Cosine()), Counts(8), Orders(1)):
        draws = torch.stack([law.bound(test, views=views) for _ in range(50)])
        off = float((draws.mean(0) - exact).mean())
        table.add_row(
            str(views),
            f"{float(draws.var(0).mean()):.4f}",
            f"{float(draws.mean(1).var()):.2e}",
            f"{off:+.4f}",
        )
    return table


@torch.no_grad()
def draws(n: int = 10_000) -> Table:
    """How likely draws are under the true law, which is minus the entropy where they follow it."""
    chain, law, _, _ = string_law(0)
    table = Table("schedule", "steps", "log p of draws + entropy, nats", "milliseconds", title=f"{n} draws")
    for schedule in (LogLinear(), Cosine()):
        for steps in (1, 2, 4, 8, 100, None):
            drawer = MaskedDiffusion(law.network, LEVELS, (PLACES,), schedule=schedule, steps=steps)
            began = time.perf_counter()
            x = drawer.sample((n,), seed=0)
            seconds = time.perf_counter() - began
            off = float(chain.log_prob(x).mean()) + chain.entropy
            table.add_row(type(schedule).__name__, str(steps), f"{off:+.4f}", f"{1000 * seconds:.0f}")
    return table


# --- digits ------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Logits of every pixel of an 8x8 image from those shown: any network over tokens will do, this convolves."""

    def __init__(self, levels: int = 17, width: int = 48, depth: int = 3, dropout: float = 0.25) -> None:
        super().__init__()
        self.levels = levels
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(width, 8, 8))
        wide = [nn.Conv2d(width, width, 5, padding=2) for _ in range(depth)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GELU(), conv, nn.GELU(), nn.Conv2d(width, width, 1), nn.Dropout(dropout))
            for conv in wide
        )
        self.last = nn.Sequential(nn.GELU(), nn.Conv2d(width, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [rows, 64] to logits [rows, 64, levels]."""
        image = x.reshape(-1, 8, 8)
        hidden = image == self.levels
        grey = torch.where(hidden, 0.0, 2 * image / (self.levels - 1) - 1)
        y = self.first(torch.stack([grey, hidden.to(grey)], 1)) + self.place
        for block in self.blocks:
            y = y + block(y)
        return ordinal_logits(self.last(y).flatten(2).mT, self.levels)


@torch.no_grad()
def images() -> Table:
    """The bound beside figures of laws of one order, which are exact."""
    data = digits()
    with isolated(0):
        program = Masked(Pixels(), 17, 64)
    run = pgen.Run(
        steps=700,
        batch_size=128,
        lr=3e-3,
        optimizer="adamw",
        weight_decay=0.05,
        warmup_steps=70,
        ema=0.99,
        progress=False,
    )
    law, seconds = learned(program, data.train["x"], run, 0)
    x = data.valid["x"]
    bound = law.bound_with_error(x, 4).mean()
    raster = torch.arange(64)
    upper = raster < 32
    one_order = law.log_prob_in_order(x, raster)
    lower_half = law.log_prob_in_order(x, raster[32:], upper)
    table = Table("digits, 350 validation images", "nats per image", "", title=f"trained in {seconds:.0f} s")
    table.add_row(
        "masked diffusion", f"{-float(bound.value):.2f} ± {float(bound.stderr):.2f}", "bound, all orders"
    )
    table.add_row("the same, in raster order", f"{-float(one_order.mean()):.2f}", "exact")
    table.add_row("the same, lower half given the upper", f"{-float(lower_half.mean()):.2f}", "exact")
    table.add_row("autoregressive (Tomczak, 2022)", "88.7", "exact, as published")
    table.add_row("pgen.zoo.CausalImage", "at most 87.5", "exact, as tests/zoo/test_digits.py asserts")
    return table


def main() -> None:
    """Print all tables."""
    console = Console(width=120)
    for table in (strings, variances, draws, images):
        console.print(table())


if __name__ == "__main__":
    main()
