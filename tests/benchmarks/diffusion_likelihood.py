"""Log densities by the probability-flow equation: python -m tests.benchmarks.diffusion_likelihood (a minute).

A Gaussian mixture whose denoiser and densities are exact, noise level 0.05 to 80, 64 points. Error in nats, seconds of one
core, work for each point. Beside pgen's ways those of an equation solver that carries the trace along, with torchdiffeq
where it is installed: the exact trace at every stage, and one random direction for the whole path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pgen.algorithms.diffusion.divergence import Hutchinson, HutchPP
from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.likelihood import log_prob
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for d in (2, 80):
        accuracy(Console(width=130), d)
    coverage(Console(width=130))
