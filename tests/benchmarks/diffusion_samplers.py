"""Samplers of diffusion models side by side: error against evaluations of an exact denoiser, and what a step costs.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.diffusion_samplers [error] [overhead]
        [--dims 2 80] [--nfe 5 10 20 50] [--seeds 4] [--only NAME ...] [--no-peers]

(about ten minutes; with `--dims 2 80 800 --nfe 5 10 20 50 100 1000` an hour). The peers are diffusers and k-diffusion:
run this by an interpreter that has them; what is not there is named, and left out.

error: a Gaussian mixture, ten components N(m_k, 0.25^2 I), m_k ~ N(0, I), uneven weights. 2,048 draws of each
sampler against as many exact ones: sliced Wasserstein distance (256 directions) and MMD^2 (Gaussian kernel, median
distance, unbiased), means over seeds and their standard errors. `exact` is a second exact sample: the floor. Below it is
luck, and from 20 evaluations on much of the order is. Budgets are in evaluations of the denoiser; a dash where a sampler
has no sensible run. All start from the same noise, at their own first levels, so that those that draw none have one
limit. Rows with "moments" also know mean and variance of the data; those with "adapted" had a trial run on 128 rows,
whose evaluations are printed.

overhead: milliseconds per evaluation where the denoiser returns a ready tensor, values [256, 3, 32, 32].
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.grids import adapted, default, karras, uniform_time
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.schedules import VP
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialAdamsBashforth,
    Heun,
    PredictorCorrector,
    SDEDPMSolverPP,
    UniPC,
)

ROWS, COMPONENTS, WIDTH = 2048, 10, 0.25
LONG = 1000
"""Budget at which only a few run."""

Denoise = Callable[[Tensor, float], Tensor]
Sampler = Callable[[Denoise, int, int, int], Tensor | None]
"""From a denoiser, a dimension, a budget and a seed to draws; None: nothing sensible to do with that budget."""


class Problem:
    """The mixture in some dimension, with a count of its denoiser's evaluations."""

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(COMPONENTS, dim, generator=generator)
        weights = (torch.randn(COMPONENTS, generator=generator) / 2).softmax(0)
        self.dim, self.law, self.evaluations = dim, Mixture(means, WIDTH, weights=weights), 0
        self.mean = weights @ means
        self.variance = float((weights @ (means - self.mean).square()).mean()) + WIDTH**2

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        self.evaluations += 1
        return self.law(x, sigma)

    def draws(self, seed: int) -> Tensor:
        return self.law.sample(ROWS, generator=torch.Generator().manual_seed(seed))


def streams_of(seed: int) -> Streams:
    return Streams(1000 + seed, ROWS)


def unit(seed: int, dim: int) -> Tensor:
    """What everybody starts from, times the first noise level."""
    return streams_of(seed).normal(0, (dim,), torch.empty(0))


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    directions = torch.randn(a.shape[1], 256, generator=torch.Generator().manual_seed(2))
    directions /= directions.norm(dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt())


def mmd(a: Tensor, b: Tensor) -> float:
    a, b = a[:1024], b[:1024]
    width = torch.cdist(b, b).square().median()
    aa, bb, ab = ((-torch.cdist(u, v).square() / width).exp() for u, v in ((a, a), (b, b), (a, b)))
    n = len(a)
    return float(((aa.sum() - n) + (bb.sum() - n)) / (n * (n - 1)) - 2 * ab.mean())


# pgen


def ours(
    solver: Any, grid: Callable[[int], Tensor | None], *, moments: bool = False, trial: bool = False
) -> Sampler:
    """A solver on a grid that depends on the budget."""

    def run(problem: Any, dim: int, budget: int, seed: int) -> Tensor | None:
        levels = grid(budget)
        if levels is None or (trial and budget > 20):
            return None
        like = torch.empty(0)
        known: dict[str, Any] = {"mean": problem.mean, "variance": problem.variance} if moments else {}
        if trial:
            field = Field(problem.law)
            rows = start(Streams(12345, 128), (dim,), levels[0], like, **known)
            found = adapted(levels, field, rows, solver)
            levels = found.grid
            if seed == 0:
                text = " ".join(f"{level:.3g}" for level in levels.tolist())
                print(f"    adapted to D = {dim}: {text} ({found.evaluations} evaluations of 128 rows)")
        streams = streams_of(seed)
        return solve(
            start(streams, (dim,), levels[0], like, **known), levels, Field(problem, streams), solver
        )

    return run


def half(grid: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """For two evaluations a step, one in the last."""
    return lambda budget: grid((budget + 1) // 2)


def early(grid: Callable[[int], Tensor]) -> Callable[[int], Tensor | None]:
    """For budgets below the largest."""
    return lambda budget: grid(budget) if budget < LONG else None


def langevin(budget: int) -> Tensor | None:
    """Five Langevin steps at each level but the first."""
    return karras(1 + (budget - 1) // 5, 0.01, 20.0, math.inf) if budget > 20 else None


def rough(budget: int) -> Tensor:
    """For solvers with noise, which do better with a longer last step."""
    return karras(budget, max(1 / budget, 0.01), 20.0)


def vp(budget: int) -> Tensor:
    return uniform_time(budget, VP())


PGEN: dict[str, Sampler] = {
    "UniPC-3": ours(UniPC(3), default),
    "UniPC-3, moments": ours(UniPC(3), default, moments=True),
    "UniPC-3, adapted": ours(UniPC(3), default, trial=True),
    "UniPC-2": ours(UniPC(2), early(default)),
    "UniPC-3 (log), Karras": ours(UniPC(3, "log"), early(lambda n: karras(n, 0.01, 80.0))),
    "exponential AB-3": ours(ExponentialAdamsBashforth(3), early(default)),
    "DPM++ 2M": ours(DPMSolverPP(2), default),
    "DPM++ 3M": ours(DPMSolverPP(3), early(default)),
    "SDE-DPM++ 2M": ours(SDEDPMSolverPP(2), rough),
    "SDE-DPM++ 2M, eta 0.3": ours(SDEDPMSolverPP(2, 0.3), early(rough)),
    "SDE-DPM++ 3M": ours(SDEDPMSolverPP(3), early(rough)),
    "Heun": ours(Heun(), half(default)),
    "Heun, churn": ours(Heun(churn=0.1), early(half(default))),
    "DDIM": ours(DDIM(), default),
    "ancestral": ours(Ancestral(), rough),
    "Euler-Maruyama": ours(EulerMaruyama(), vp),
    "predictor-corrector": ours(PredictorCorrector(), half(rough)),
    "annealed Langevin": ours(AnnealedLangevin(0.2, 5), langevin),
}


# diffusers


def diffusers_samplers() -> dict[str, Sampler]:
    """diffusers' schedulers at their defaults, but for the spacing that ends in data."""
    import diffusers as d

    long = {"DDPM", "DDIM", "DPM++ 2M", "SDE-DPM++ 2M", "Heun"}
    trailing = {"timestep_spacing": "trailing"}
    multistep = d.DPMSolverMultistepScheduler
    made: dict[str, Callable[[], Any]] = {
        "DDPM": lambda: d.DDPMScheduler(clip_sample=False, **trailing),
        "DDIM": lambda: d.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **trailing),
        "DPM++ 2M": lambda: multistep(solver_order=2),
        "DPM++ 2M, Karras": lambda: multistep(solver_order=2, use_karras_sigmas=True),
        "DPM++ 3M": lambda: multistep(solver_order=3),
        "SDE-DPM++ 2M": lambda: multistep(algorithm_type="sde-dpmsolver++"),
        "UniPC-3": lambda: d.UniPCMultistepScheduler(solver_order=3),
        "UniPC-3, Karras": lambda: d.UniPCMultistepScheduler(solver_order=3, use_karras_sigmas=True),
        "DEIS-3": lambda: d.DEISMultistepScheduler(solver_order=3),
        "PNDM": lambda: d.PNDMScheduler(skip_prk_steps=True),
        "Euler": lambda: d.EulerDiscreteScheduler(**trailing),
        "Euler ancestral": lambda: d.EulerAncestralDiscreteScheduler(**trailing),
        "Heun": lambda: d.HeunDiscreteScheduler(**trailing),
        "Heun, Karras": lambda: d.HeunDiscreteScheduler(use_karras_sigmas=True),
        "EDM Euler": lambda: d.EDMEulerScheduler(sigma_data=1.0),
        "EDM DPM++ 2M": lambda: d.EDMDPMSolverMultistepScheduler(sigma_data=1.0),
        "EDM DPM++ 3M": lambda: d.EDMDPMSolverMultistepScheduler(sigma_data=1.0, solver_order=3),
    }
    return {f"diffusers {name}": scheduled(name, make, name in long) for name, make in made.items()}


def scheduled(name: str, make: Callable[[], Any], long: bool) -> Sampler:
    """A scheduler's loop. It hands out scaled values and times, and wants what its own kind of network would answer."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    log_levels = torch.expm1(-torch.log1p(-beta).cumsum(0)).log() / 2  # log sigma of its thousand steps
    per = 2 if name.startswith("Heun") else 1

    def run(denoise: Denoise, dim: int, budget: int, seed: int) -> Tensor | None:
        if budget == LONG and not long:
            return None
        scheduler, generator = make(), torch.Generator().manual_seed(1000 + seed)
        scheduler.set_timesteps(budget - 1 if name == "PNDM" else (budget + per - 1) // per)
        x = unit(seed, dim) * float(scheduler.init_noise_sigma)
        more = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            if name.startswith("EDM"):
                level = float(scheduler.sigmas[scheduler.step_index])
                through = 1 / (1 + level**2)  # its skip connection; the rest is scaled by level sqrt(through)
                answer = (denoise(x, level) - through * x) / (level * math.sqrt(through))
            elif hasattr(scheduler, "sigmas") and scheduler.init_noise_sigma != 1.0:
                level = float(scheduler.sigmas[scheduler.step_index])
                answer = (x - denoise(x, level)) / level
            else:
                below = min(int(t), 998)
                part = float(t) - below
                level = float((log_levels[below] * (1 - part) + log_levels[below + 1] * part).exp())
                noisy = given * math.sqrt(1 + level**2)
                answer = (noisy - denoise(noisy, level)) / level
            x = scheduler.step(answer, t, x, **more).prev_sample
        return x

    return run


# k-diffusion


def k_module() -> Any:
    """k-diffusion's samplers without the rest of its package, which wants networks and image libraries."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or found.origin is None:
        raise ImportError("no module named k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(found.origin).parent)]
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x.reshape(x.shape + (1,) * (n - x.dim()))  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules.update({"k_diffusion": package, "k_diffusion.utils": utils})
    return importlib.import_module("k_diffusion.sampling")


def k_samplers() -> dict[str, Sampler]:
    k = k_module()

    def sampler(function: Callable[..., Tensor], per: int) -> Sampler:
        def run(denoise: Denoise, dim: int, budget: int, seed: int) -> Tensor | None:
            if budget == LONG:
                return None
            levels = k.get_sigmas_karras((budget + per - 1) // per, 0.01, 80.0)
            torch.manual_seed(1000 + seed)
            x = unit(seed, dim) * 80.0
            return function(lambda x, sigma, **_: denoise(x, float(sigma[0])), x, levels, disable=True)

        return run

    names = {"euler": 1, "heun": 2, "dpm_2": 2, "lms": 1, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 1}
    return {f"k-diffusion {name}": sampler(getattr(k, f"sample_{name}"), per) for name, per in names.items()}


def peers() -> dict[str, Sampler]:
    """Those that are there."""
    out: dict[str, Sampler] = {}
    for name, make in (("diffusers", diffusers_samplers), ("k-diffusion", k_samplers)):
        try:
            out.update(make())
        except ImportError as error:
            print(f"without {name}: {error}")
    return out


# What is measured.


def error(dims: list[int], budgets: list[int], seeds: int, samplers: dict[str, Sampler]) -> None:
    for dim in dims:
        problem = Problem(dim)
        truth = [problem.draws(100 + seed) for seed in range(seeds)]
        again = [problem.draws(200 + seed) for seed in range(seeds)]
        print(f"\nD = {dim}, {seeds} seeds")
        table = {
            name: [measured(problem, sampler, budget, truth) for budget in budgets]
            for name, sampler in samplers.items()
        }
        for which, distance in enumerate((sliced_wasserstein, mmd)):
            floor = [distance(a, b) for a, b in zip(again, truth, strict=True)]
            print(
                f"\nD = {dim}: {('sliced Wasserstein', 'MMD^2 x 1000')[which]}, exact: {shown(floor, which)}"
            )
            print(f"{'':32s}" + "".join(f"{budget:>16d}" for budget in budgets))
            for name, cells in table.items():
                print(
                    f"{name:32s}"
                    + "".join(f"{shown(cell[which], which) if cell else '-':>16s}" for cell in cells)
                )
            for side in ("pgen", "diffusers", "k-diffusion"):
                best = [
                    min(
                        (
                            (statistics.mean(cells[i][which]), name)
                            for name, cells in table.items()
                            if name.startswith(side) and cells[i] and not math.isnan(cells[i][which][0])
                        ),
                        default=None,
                    )
                    for i in range(len(budgets))
                ]
                if any(best):
                    print(
                        f"best of {side:24s}"
                        + "".join(f"{shown([b[0]], which) if b else '-':>16s}" for b in best)
                    )


def measured(
    problem: Problem, sampler: Sampler, budget: int, truth: list[Tensor]
) -> tuple[list[float], list[float]] | None:
    """Both distances for every seed."""
    out: tuple[list[float], list[float]] = ([], [])
    for seed, exact in enumerate(truth):
        problem.evaluations = 0
        with torch.no_grad():
            x = sampler(problem, problem.dim, budget, seed)
        if x is None:
            return None
        if problem.evaluations > budget:
            raise RuntimeError(f"{problem.evaluations} evaluations for a budget of {budget}")
        out[0].append(sliced_wasserstein(x, exact))
        out[1].append(mmd(x, exact))
    return out


def shown(values: list[float], which: int) -> str:
    """A mean with its standard error."""
    factor, digits = (1.0, 4) if which == 0 else (1000.0, 2)
    mean = statistics.mean(values) * factor
    if math.isnan(mean):
        return "nan      "
    if len(values) == 1:
        return f"{mean:.{digits}f}      "
    return f"{mean:.{digits}f} {statistics.stdev(values) * factor / math.sqrt(len(values)):.{digits - 1}f}"


@torch.no_grad()
def overhead(with_peers: bool, shape: tuple[int, ...] = (256, 3, 32, 32), steps: int = 20) -> None:
    """Milliseconds per evaluation, everything but the denoiser."""
    x, ready = torch.randn(shape), torch.randn(shape)
    runs: dict[str, tuple[Callable[[], object], int]] = {}

    def in_place(noise: bool) -> Callable[[], None]:
        y, z = x.clone(), torch.empty_like(x)

        def run() -> None:
            for _ in range(steps):
                y.mul_(0.99).add_(ready, alpha=0.01)
                if noise:
                    y.add_(z.normal_(), alpha=0.1)

        return run

    runs["in place: a x + b D"] = in_place(False), steps
    runs["in place, and noise"] = in_place(True), steps
    streams = Streams(0, shape[0])
    runs["pgen's noise alone"] = lambda: [streams.normal(i, shape[1:], x) for i in range(steps)], steps

    def pgen_run(solver: Any) -> tuple[Callable[[], object], int]:
        grid = karras(steps, 0.01, 80.0)
        field = Field(lambda x, sigma: ready, streams)
        solve(x, grid, field, solver)
        return lambda: solve(x, grid, Field(lambda x, sigma: ready, streams), solver), field.evaluations

    for solver in (
        DDIM(),
        DPMSolverPP(2),
        DPMSolverPP(3),
        UniPC(2),
        UniPC(3),
        ExponentialAdamsBashforth(3),
        Heun(),
        Ancestral(),
        EulerMaruyama(),
        SDEDPMSolverPP(2),
        PredictorCorrector(),
        AnnealedLangevin(steps=2),
    ):
        runs[f"pgen {solver}"] = pgen_run(solver)
    if with_peers:
        runs.update(peers_runs(x, ready, steps))
    ballast = torch.empty(
        8_000_000
    )  # freed: a network's memory would have taught the allocator to keep blocks this large
    del ballast
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):  # turns go round, so that a noisy spell hits all
        for name, (run, count) in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) / count)
    print(f"\nmilliseconds per evaluation, values {list(shape)}, {torch.get_num_threads()} thread(s)")
    for name, values in times.items():
        print(f"{name[:90]:92s}{1e3 * statistics.median(values):8.2f}")


def peers_runs(x: Tensor, ready: Tensor, steps: int) -> dict[str, tuple[Callable[[], object], int]]:
    """The same of the peers."""
    out: dict[str, tuple[Callable[[], object], int]] = {}
    try:
        import diffusers as d

        multistep = d.DPMSolverMultistepScheduler
        made: dict[str, Callable[[], Any]] = {
            "DDPM": d.DDPMScheduler,
            "DDIM": d.DDIMScheduler,
            "DPM++ 2M": lambda: multistep(solver_order=2),
            "DPM++ 3M": lambda: multistep(solver_order=3),
            "SDE-DPM++ 2M": lambda: multistep(algorithm_type="sde-dpmsolver++"),
            "UniPC-3": lambda: d.UniPCMultistepScheduler(solver_order=3),
            "Euler": d.EulerDiscreteScheduler,
            "Heun": d.HeunDiscreteScheduler,
            "EDM DPM++ 2M": d.EDMDPMSolverMultistepScheduler,
        }

        def loop(make: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                scheduler, y = make(), x
                scheduler.set_timesteps(steps)
                for t in scheduler.timesteps:
                    scheduler.scale_model_input(y, t)
                    y = scheduler.step(ready, t, y).prev_sample

            return run

        for name, make in made.items():
            out[f"diffusers {name}"] = loop(make), 2 * steps - 1 if name == "Heun" else steps
    except ImportError as error:
        print(f"without diffusers: {error}")
    try:
        k = k_module()
        levels = k.get_sigmas_karras(steps, 0.01, 80.0)
        for name, count in (
            ("euler", steps),
            ("heun", 2 * steps - 1),
            ("dpmpp_2m", steps),
            ("dpmpp_2m_sde", steps),
        ):
            function = getattr(k, f"sample_{name}")
            out[f"k-diffusion {name}"] = (
                (lambda function=function: function(lambda x, sigma, **_: ready, x, levels, disable=True)),
                count,
            )
    except ImportError as error:
        print(f"without k-diffusion: {error}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="error, overhead; both where none is named")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 80])
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the samplers wanted")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    parts = options.parts or ["overhead", "error"]
    if "overhead" in parts:
        overhead(options.peers)
    if "error" in parts:
        samplers = {f"pgen {name}": sampler for name, sampler in PGEN.items()} | (
            peers() if options.peers else {}
        )
        wanted = {n: s for n, s in samplers.items() if any(part in n for part in options.only)}
        error(options.dims, options.nfe, options.seeds, wanted)


if __name__ == "__main__":
    main()
