"""What one training step costs beside the arithmetic: a variational auto-encoder 784-400-20 on binary rows.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m tests.benchmarks.vae_step [--peers PYTHON] [BATCH ...]

(some minutes; `taskset -c 1` in front steadies it). Milliseconds per step, and multiples of PyTorch written by hand and
run eagerly, for

    floor             the matrix products of a step, and nothing else
    PyTorch           by hand: the divergence in closed form; then with fused Adam; then compiled
    Pyro              SVI with `Trace_ELBO`; and its best: mean field, without validation, with fused Adam
    pgen              the same Pyro program and guide: as written (`Run(compile=False)`), replayed (the default), and
                      compiled (`Run(compile="inductor")`)
    NumPyro           mean field, jitted, donated; by an interpreter that has it (`--peers`)

All see the same batch at every step, except "pgen, drawing batches", which takes other rows each time. pgen's figures
are those of a run as it is: norms of gradients, clipping, metrics, comparisons of replays with the program. Turns go
round, so that a noisy spell of the machine hits all; a figure is the median over blocks of steps. `first`: seconds of
the first turn (ten steps, for pgen a fit of 140), compilation included; torch keeps compiled code on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import infer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.backends.variational import Variational
from pgen.run import Run

PIXELS, HIDDEN, LATENT, RATE = 784, 400, 20, 1e-4
BLOCK = 10  # steps that are timed together: as many as lie between two looks of a run at its metrics

Timed = Callable[[int], list[float]]
"""Takes so many blocks of steps; gives the seconds per step of each."""


class Encoder(nn.Module):
    """Means and scales of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.loc, self.scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.softplus(self.hidden(x))
        return self.loc(h), self.scale(h).exp()


def networks() -> tuple[Encoder, nn.Sequential]:
    """The same weights every time."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, PIXELS))
    return Encoder(), decoder


def blocks(step: Callable[[], object]) -> Timed:
    """Time a step that is called from here."""

    def timed(count: int) -> list[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            for _ in range(BLOCK):
                step()
            found.append((time.perf_counter() - start) / BLOCK)
        return found

    return timed


# --- by hand ------------------------------------------------------------------------------------------------


def products(x: Tensor) -> Timed:
    """The matrix products: forward, and two for each on the way back (the first layer needs one)."""
    rows = len(x)
    sizes = [(PIXELS, HIDDEN), (HIDDEN, LATENT), (HIDDEN, LATENT), (LATENT, HIDDEN), (HIDDEN, PIXELS)]
    shapes = (
        [(rows, i, o) for i, o in sizes]
        + [(i, rows, o) for i, o in sizes]
        + [(rows, o, i) for i, o in sizes[1:]]
    )
    pairs = [(torch.randn(a, b), torch.randn(b, c)) for a, b, c in shapes]
    return blocks(lambda: [a @ b for a, b in pairs])


def by_hand(x: Tensor, *, compiled: bool = False, fused: bool = False) -> Timed:
    """PyTorch, as one would write it."""
    encoder, decoder = networks()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE, fused=fused)

    def loss(x: Tensor) -> Tensor:
        loc, scale = encoder(x)
        z = loc + scale * torch.randn_like(loc)
        kl = 0.5 * (loc * loc + scale * scale - 1 - 2 * scale.log()).sum()
        return nn.functional.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + kl

    chosen = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad()
        chosen(x).backward()
        optimizer.step()

    return blocks(step)


# --- Pyro ---------------------------------------------------------------------------------------------------


def program_and_guide(
    tag: str = "",
) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None], list[Tensor]]:
    """The Pyro program and its guide, and their weights; the store is global, so names can be told apart."""
    encoder, decoder = networks()

    def program(x: Tensor) -> None:
        pyro.module(f"decoder{tag}", decoder)
        with pyro.plate("rows", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), LATENT), x.new_ones(len(x), LATENT))
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"encoder{tag}", encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return program, guide, [*encoder.parameters(), *decoder.parameters()]


def pyro_svi(x: Tensor, *, best: bool) -> Timed:
    """Pyro's own training loop, or the fastest that can be made of its parts."""
    program, guide, weights = program_and_guide(f"{len(x)}{best}")
    if not best:
        svi = infer.SVI(program, guide, pyro.optim.Adam({"lr": RATE}), infer.Trace_ELBO())
        return blocks(lambda: svi.step(x))
    elbo, optimizer = infer.TraceMeanField_ELBO(), torch.optim.Adam(weights, lr=RATE, fused=True)

    def step() -> None:
        with pyro.validation_enabled(False):
            optimizer.zero_grad()
            elbo.differentiable_loss(program, guide, x).backward()
            optimizer.step()

    return blocks(step)


# --- pgen ---------------------------------------------------------------------------------------------------


class Clock:
    """An observer that notes the time of every block of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, run: Any, total: int) -> None:
        """Nothing yet."""

    def step(self, index: int, metrics: Any) -> None:
        """Blocks of metrics come when they are complete."""
        if index % BLOCK == 0:
            self.times.append(time.perf_counter())

    def finish(self, history: Any) -> None:
        """Nothing more."""


def fitted(x: Tensor, rows: int, compiled: Any) -> Timed:
    """A fit of its own every time, of which the first steps do not count."""
    warm = 12

    def timed(count: int) -> list[float]:
        (program, guide, _), clock = program_and_guide(), Clock()
        run = Run(
            steps=BLOCK * max(count + warm + 1, 10), batch_size=rows, lr=RATE, progress=False, compile=compiled,
            observers=(clock,),
        )  # fmt: skip
        history = pgen.fit(program, x, Variational(guide=guide, particles=1), run=run).history
        if history.warnings:
            raise RuntimeError(history.warnings)
        late = clock.times[warm:]
        return [(b - a) / BLOCK for a, b in pairwise(late)][:count]

    return timed


# --- NumPyro, elsewhere -------------------------------------------------------------------------------------


@contextmanager
def numpyro_svi(python: str, rows: int) -> Iterator[Timed]:
    """A process that takes steps when it is told to."""
    script = Path(__file__).with_name("vae_step_numpyro.py")
    with subprocess.Popen(
        [python, str(script), str(rows), str(BLOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def timed(count: int) -> list[float]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield timed
        process.stdin.close()  # type: ignore[union-attr]


# --- the race -----------------------------------------------------------------------------------------------


def race(
    candidates: dict[str, Timed], rounds: int, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per step, and seconds until the first block was done, turn by turn."""
    first, counts, found = {}, {}, {name: list[float]() for name in candidates}
    for name, timed in candidates.items():
        start = time.perf_counter()
        timed(1)
        first[name] = time.perf_counter() - start
        one = min(timed(2))
        counts[name] = max(2, int(seconds / (one * BLOCK)))
    for _ in range(rounds):
        for name, timed in candidates.items():
            found[name].extend(timed(counts[name]))
    return {name: statistics.median(times) for name, times in found.items()}, first


def main() -> None:
    """Race all candidates at every batch size, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("batches", nargs="*", type=int, default=[16, 128, 1024])
    parser.add_argument("--peers", help="an interpreter with numpyro")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="of every turn")
    parser.add_argument(
        "--without", default="", help="candidates to leave out, by parts of their names, with commas"
    )
    options = parser.parse_args()
    table = Table(
        "", *(f"batch {rows}" for rows in options.batches), title="ms per step (multiple of eager PyTorch)"
    )
    lines: dict[str, list[str]] = {}
    for rows in options.batches:
        torch.manual_seed(1)
        x = (torch.rand(rows, PIXELS) < 0.3).float()
        many = (torch.rand(8 * rows, PIXELS) < 0.3).float()
        candidates = {
            "matrix products alone": products(x),
            "PyTorch": by_hand(x),
            "PyTorch, fused Adam": by_hand(x, fused=True),
            "PyTorch, compiled, fused Adam": by_hand(x, compiled=True, fused=True),
            "Pyro, Trace_ELBO": pyro_svi(x, best=False),
            "Pyro, at its best": pyro_svi(x, best=True),
            "pgen, as written": fitted(x, rows, False),
            "pgen, replayed": fitted(x, rows, "auto"),
            "pgen, replayed, drawing batches": fitted(many, rows, "auto"),
            "pgen, compiled": fitted(x, rows, "inductor"),
        }
        left_out = [part for part in options.without.split(",") if part]
        candidates = {name: c for name, c in candidates.items() if not any(part in name for part in left_out)}
        if options.peers:
            with numpyro_svi(options.peers, rows) as timed:
                medians, first = race(
                    {**candidates, "NumPyro, jitted": timed}, options.rounds, options.seconds
                )
        else:
            medians, first = race(candidates, options.rounds, options.seconds)
        for name, median in medians.items():
            cell = f"{1e3 * median:.2f} ({median / medians['PyTorch']:.2f}), first {first[name]:.1f} s"
            lines.setdefault(name, []).append(cell)
    for name, cells in lines.items():
        table.add_row(name, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
