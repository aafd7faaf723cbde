"""Log densities by the probability-flow equation: python -m tests.benchmarks.diffusion_likelihood [exact] [trained].

exact (a minute):

A Gaussian mixture whose denoiser and densities are exact, noise level 0.05 to 80, 64 points. Error in nats, seconds of one
core, work for each point. Beside pgen's ways those of an equation solver that carries the trace along, with torchdiffeq
where it is installed: the exact trace at every stage, and one random direction for the whole path.

trained (a minute on one core for every fit; [--points 100000] [--schedules VE VP EDM RectifiedFlow] [--laws five moons]):
what a plain `pgen.fit` of a `DenoiserMLP` to draws of a mixture in the plane knows of its law at the least noise level,
in which the noise left there is counted, at 1,000 new points; the score's error is sqrt(E|s - s*|^2 / E|s*|^2). As a floor,
the error of the mixture itself, of the right number of components, fitted to the same points from the truth on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import TypeVar

import pyro
import torch
from pyro import poutine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.algorithms.diffusion.divergence import Hutchinson, HutchPP
from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.likelihood import log_prob
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.schedules import EDM, VE, VP, RectifiedFlow, Schedule
from pgen.distributions import Diffusion
from pgen.nn import DenoiserMLP, Preconditioned
from pgen.zoo import toys

try:
    from torchdiffeq import odeint
except ImportError:
    odeint = None

Found = TypeVar("Found")
LOW, HIGH, POINTS = 0.05, 80.0, 64


def mixture(d: int) -> Mixture:
    """Ten components around the origin."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, d, generator=generator)
    weights = torch.softmax(0.5 * torch.randn(10, generator=generator), 0)
    return Mixture(means.double(), scale=0.25, weights=weights.double())


def points(law: Mixture, count: int) -> Tensor:
    """Draws with noise."""
    generator = torch.Generator().manual_seed(5)
    x = law.sample(count, generator=generator)
    return x + LOW * torch.randn(x.shape, dtype=x.dtype, generator=generator)


def peer(law: Mixture, x: Tensor, tolerance: float, exact: bool) -> tuple[Tensor, int, int]:
    """Log densities by torchdiffeq's dopri5, evaluations and products."""
    d, calls = x.shape[1], 0
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1

    def slope(level: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            f = y - law(y, level.exp().expand(len(y)))
            if exact:
                columns = [
                    torch.autograd.grad(f[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(d)
                ]
                trace = torch.stack(columns).sum(0)
            else:
                trace = (torch.autograd.grad((f * signs).sum(), y)[0] * signs).sum(-1)
        return f.detach(), trace.detach()

    ends = torch.tensor([LOW, HIGH], dtype=x.dtype).log()
    state = (x, torch.zeros(len(x), dtype=x.dtype))
    end, total = odeint(slope, state, ends, rtol=tolerance, atol=tolerance, method="dopri5")
    return law.log_prob(end[-1], HIGH) + total[-1], calls, calls * (d if exact else 1)


def timed(run: Callable[[], Found]) -> tuple[float, Found]:
    """The less of two times, in seconds of the processor, after a run to warm up."""
    best = math.inf
    found = run()
    for _ in range(2):
        start = time.process_time()
        found = run()
        best = min(best, time.process_time() - start)
    return best, found


def accuracy(console: Console, d: int) -> None:
    """Error and cost of every way."""
    law = mixture(d)
    x = points(law, POINTS)
    exact = law.log_prob(x, LOW)
    table = Table(
        "way", "mean error", "largest", "reported: solver", "stderr", "seconds", "evaluations", "products",
        title=f"D = {d}, {POINTS} points, nats",
    )  # fmt: skip

    def ours(name: str, x: Tensor, law: Mixture, **options: object) -> None:
        seconds, found = timed(lambda: log_prob(x, Field(law, Streams(0, rows=len(x))), LOW, HIGH, **options))
        miss = (found.value - exact).abs()
        table.add_row(
            name,
            f"{miss.mean():.1e}",
            f"{miss.max():.1e}",
            f"{found.solver_error.mean():.1e}",
            "-" if found.stderr is None else f"{found.stderr.mean():.1e}",
            f"{seconds:.3f}",
            f"{found.evaluations.double().mean():.0f}",
            f"{found.products.double().mean():.0f}",
        )

    given = {"prior": lambda z: law.log_prob(z, HIGH)}
    ours("pgen exact", x, law, divergence="exact")
    ours("pgen exact, flat", x, law, divergence="exact", flat=True)
    ours("pgen exact, flat, exact end", x, law, divergence="exact", flat=True, **given)
    ours("pgen exact, flat, float32", x.float(), law.to(torch.float32), divergence="exact", flat=True)
    ours("pgen hutch++, flat", x, law, divergence=HutchPP(24), flat=True)
    ours("pgen hutchinson(8), flat", x, law, divergence=Hutchinson(8), flat=True)
    ours("pgen hutchinson(32), flat", x, law, divergence=Hutchinson(32), flat=True)
    if odeint is not None:
        for trace in (True, False):
            seconds, (value, calls, products) = timed(lambda trace=trace: peer(law, x, 1e-5, trace))
            miss = (value - exact).abs()
            name = "torchdiffeq exact, exact end" if trace else "torchdiffeq one probe, exact end"
            table.add_row(
                name, f"{miss.mean():.1e}", f"{miss.max():.1e}", "-", "-", f"{seconds:.3f}", str(calls), str(products)
            )  # fmt: skip
    console.print(table)


def coverage(console: Console) -> None:
    """How often intervals of 95 % hold the exact log density."""
    law, count = mixture(80), 1000
    x = points(law, count)
    exact = law.log_prob(x, LOW)
    table = Table(
        "way",
        "covered",
        "root mean square error",
        "mean stderr",
        title="D = 80, 1000 points, intervals of 95 %",
    )
    for name, way in (
        ("hutchinson(2)", Hutchinson(2)),
        ("hutchinson(8)", Hutchinson(8)),
        ("hutchinson(8, orthogonal)", Hutchinson(8, orthogonal=True)),
        ("hutch++(12)", HutchPP(12)),
        ("hutch++(24)", HutchPP(24)),
    ):
        found = log_prob(x, Field(law, Streams(0, rows=count)), LOW, HIGH, divergence=way, flat=True)
        low, high = found.interval(0.95)
        covered = ((low <= exact) & (exact <= high)).double().mean()
        miss = (found.value - exact).square().mean().sqrt()
        table.add_row(name, f"{covered:.3f}", f"{miss:.3f}", f"{found.stderr.mean():.3f}")
    console.print(table)


LEVELS = (0.05, 0.1, 0.3, 1.0, 3.0)
SCHEDULES: dict[str, Schedule] = {
    "VE": VE(0.01, 20.0),
    "VP": VP(),
    "EDM": EDM(),
    "RectifiedFlow": RectifiedFlow(),
}


def five() -> Mixture:
    """Five components of other widths and weights, which overlap."""
    means = torch.tensor([[-1.5, -1.0], [0.0, 1.5], [1.5, 0.0], [-0.5, -0.2], [1.0, -1.6]])
    scales = torch.tensor([0.3, 0.25, 0.2, 0.4, 0.3])
    return Mixture(means, scales, weights=torch.tensor([0.25, 0.25, 0.15, 0.2, 0.15]))


def moons() -> Mixture:
    """The zoo's, a mixture of 128."""
    law = toys.moons().law
    return Mixture(law.component_distribution.mean, 0.1, weights=law.mixture_distribution.probs)


LAWS = {"five": five, "moons": moons}


class Program(nn.Module):
    """A diffusion of points in the plane."""

    def __init__(self, data: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser = Preconditioned(DenoiserMLP(2), float(data.std()), mean=data.mean(0))
        self.schedule = schedule

    def forward(self, n: int) -> None:
        """n points."""
        with pyro.plate("data", n):
            pyro.sample("x", Diffusion(self.denoiser, self.schedule, (2,)))


def refitted(law: Mixture, data: Tensor, rounds: int = 30) -> Mixture:
    """The round Gaussians of greatest likelihood near the law: expectation-maximisation that begins with the truth."""
    x = data.double()
    for _ in range(rounds):
        share = law._terms(x, torch.zeros(1, dtype=x.dtype))[0].softmax(-1)  # [points, K]
        mass = share.sum(0)
        means = share.mT @ x / mass[:, None]
        spread = (share * (x[:, None] - means).square().mean(-1)).sum(0) / mass
        law = Mixture(means, spread.sqrt(), weights=mass / mass.sum())
    return law


def trained(console: Console, names: list[str], schedules: list[str], count: int) -> None:
    """Fits by the defaults, against the exact law."""
    table = Table(
        "law", "schedule", "seconds", "mean abs. error", "bias", "largest", "floor", *(f"score, {s:g}" for s in LEVELS),
        title=f"{count} points to learn from, 1000 to judge by, nats",
    )  # fmt: skip
    for name in names:
        law = LAWS[name]()
        data = law.sample(count, generator=torch.Generator().manual_seed(100))
        best = refitted(law, data)
        for kind in schedules:
            schedule, generator = SCHEDULES[kind], torch.Generator().manual_seed(77)
            clean = law.sample(1000, generator=generator)
            x = clean + schedule.sigma_min * torch.randn(clean.shape, generator=generator)
            exact = law.to(torch.float64).log_prob(x.double(), schedule.sigma_min)
            floor = (best.log_prob(x.double(), schedule.sigma_min) - exact).abs().mean()
            torch.manual_seed(0)
            begin = time.process_time()
            fitted = pgen.fit(Program(data, schedule), {"x": data}, "score", run=pgen.Run(progress=False))
            seconds = time.process_time() - begin
            miss = fitted.log_prob({"x": x}).value.double() - exact
            node = poutine.trace(fitted.program).get_trace(1).nodes["x"]["fn"]
            scores = []
            for level in LEVELS:
                y = clean + level * torch.randn(clean.shape, generator=generator)
                truth, guess = law(y, level), getattr(node, "base_dist", node).denoise(y, level).detach()
                scores.append(float(((guess - truth).square().sum() / (truth - y).square().sum()).sqrt()))
            table.add_row(
                name, kind, f"{seconds:.0f}", f"{miss.abs().mean():.3f}", f"{miss.mean():+.4f}", f"{miss.abs().max():.2f}",
                f"{floor:.3f}", *(f"{100 * s:.1f} %" for s in scores),
            )  # fmt: skip
    console.print(table)


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="Log densities of diffusions.")
    parser.add_argument("parts", nargs="*", help="exact, trained; exact where none is named")
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--laws", nargs="+", default=["five"], choices=list(LAWS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    parts = options.parts or ["exact"]
    if "exact" in parts:
        for d in (2, 80):
            accuracy(console, d)
        coverage(console)
    if "trained" in parts:
        trained(console, options.laws, options.schedules, options.points)


if __name__ == "__main__":
    main()
