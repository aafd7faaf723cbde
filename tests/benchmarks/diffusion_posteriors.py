r"""Posteriors of a Gaussian-mixture prior under random linear observations, against exact draws.

The setting of MCG-Diff (Cardoso, Janati, Le Corff & Moulines, 2023, section 4): 25 components of unit covariance at
(-8i, -8j) repeated over the dimensions, i and j in -2..2, random weights; y = A x_0 + N(0, sd^2) with A = U S V',
singular values uniform in [0, 1], sd uniform in [0, max s]. The prior is given by its denoiser alone; the posterior is a
mixture, exactly.

Printed: for every dimension, number of observations and method the median over seeds of the max-sliced 2-Wasserstein
distance (1,000 random directions, 1,000 draws) to exact draws, divided by that of exact draws to exact draws; that
floor itself (means over pairs of six exact samples); the coverage of 90 % intervals; seconds. With `--likelihood poisson`
or `laplace`, the same for these, beside long chains: what is seen is A x_0 alone, of few dimensions, whose law under the
prior is a mixture again; ten thousand Markov chains there, begun at resampled draws of the prior, and x_0 given A x_0,
exactly.

Methods named `api` are `fitted.posterior` with its default options.

python tests/benchmarks/diffusion_posteriors.py --seeds 5 --dims 8,80
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

import pgen
from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.operators import Dense
from pgen.algorithms.diffusion.posteriors import (
    DDRM,
    DPS,
    LGD,
    MMPS,
    DPSStep,
    Guide,
    LinearGaussian,
    LineMALA,
    PiGDM,
    SplitGibbs,
    Twisted,
    refine,
    width_of,
)
from pgen.algorithms.diffusion.posteriors.metropolis import Conditioned, Euclidean, Metric
from pgen.algorithms.diffusion.solve import solve
from pgen.algorithms.diffusion.solvers import Ancestral
from pgen.distributions import VE, Diffusion

DRAWS, DIRECTIONS, LEAST, PARTICLES, STEPS = 1000, 1000, 0.02, 4096, 100
MANY, CHAINS, MOVES = 4_000_000, 10_000, 1000


class Case(NamedTuple):
    """A prior, what is seen of it, and the truth.

    Attributes:
        prior: of x_0.
        seen: a linear-Gaussian observation, whose operator is what others see by, too.
        log_likelihood: of x_0, Gaussian or not.
        like: all draws' shape, `[DRAWS, D]`.
        law: of y given x_0, number by number, in the dtype of x_0.
        exact: so many exact draws of the posterior.
    """

    prior: Mixture
    seen: LinearGaussian
    log_likelihood: Callable[[Tensor], Tensor]
    like: Tensor
    law: Callable[[Tensor], Any]
    exact: Callable[[int, torch.Generator], Tensor]


def case(dim: int, seen: int, seed: int, likelihood: str) -> Case:
    """A random one."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    grid = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)).double()
    weights = torch.randn(25, **kind).square()
    prior = Mixture(-8 * grid.repeat(1, dim // 2), scale=1.0, weights=weights)
    right = torch.linalg.qr(torch.randn(dim, seen, **kind))[0].mT
    left = torch.linalg.qr(torch.randn(seen, seen, **kind))[0]
    values = torch.rand(seen, **kind)
    matrix = left * values @ right
    spread = float(torch.rand((), **kind) * values.max())
    truth = prior.sample(1, generator=generator)
    like = truth.expand(DRAWS, -1)
    if likelihood == "gaussian":
        law = lambda x: pyro.distributions.Normal(x @ matrix.to(x).mT, spread)  # noqa: E731
        y = truth @ matrix.mT + spread * torch.randn(1, seen, **kind)
        observation = LinearGaussian(Dense(matrix), y[0], spread**2)
        return Case(
            prior, observation, observation.log_likelihood, like, law, exact_draws(prior, observation)
        )
    unit = (prior.sample(100_000, generator=generator) @ matrix.mT).std(0)
    if likelihood == "laplace":
        law = lambda x: pyro.distributions.Laplace(x @ matrix.to(x).mT, spread)  # noqa: E731
    else:
        law = lambda x: pyro.distributions.Poisson((1 + x @ matrix.to(x).mT / unit.to(x)).exp())  # noqa: E731
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        y = law(truth).sample()[0]

    def log_likelihood(x: Tensor) -> Tensor:
        return law(x).log_prob(y).sum(-1)

    draw = chained_draws(prior, matrix, log_likelihood, generator)
    return Case(prior, LinearGaussian(Dense(matrix), y, spread**2), log_likelihood, like, law, draw)


def chained_draws(
    prior: Mixture,
    matrix: Tensor,
    log_likelihood: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Callable[[int, torch.Generator], Tensor]:
    """Draws of the posterior for components of unit covariance, by Markov chains of u = A x_0.

    Proposals have the covariance A A' of a component times one of four scales; a chain begins at a draw of the prior,
    resampled by its likelihood, so that modes have their weights from the start.
    """
    kind = {"dtype": torch.float64, "generator": generator}
    lift = torch.linalg.pinv(matrix)  # x_0 with A x_0 = u, for the likelihood, which reads nothing else of it
    root = torch.linalg.cholesky(matrix @ matrix.mT)
    centres = prior.means @ matrix.mT

    def shares(u: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(root, (u.unsqueeze(1) - centres).mT, upper=False)
        return prior.log_weights - white.square().sum(1) / 2  # [chains, K]

    def log_density(u: Tensor) -> Tensor:
        return shares(u).logsumexp(-1) + log_likelihood(u @ lift.mT)

    index = prior.log_weights.exp().multinomial(MANY, True, generator=generator)
    u = centres[index] + torch.randn(MANY, len(matrix), **kind) @ root.mT
    weight = log_likelihood(u @ lift.mT).softmax(0)
    size = float(1 / weight.square().sum())
    if size < DRAWS:
        print(f"(chains begin at what is worth {size:.0f} draws: weights of modes are no better than that)")
    # torch.multinomial takes 2^24 categories at most, and evenly spread points choose with less noise
    places = (torch.arange(CHAINS, dtype=torch.float64) + torch.rand((), **kind)) / CHAINS
    u = u[torch.searchsorted(weight.cumsum(0), places).clamp(max=MANY - 1)]
    log = log_density(u)
    for step in range(MOVES):
        to = u + (1.0, 0.3, 0.1, 0.03)[step % 4] * torch.randn(u.shape, **kind) @ root.mT
        there = log_density(to)
        taken = torch.rand(len(u), **kind).log() < there - log
        u, log = torch.where(taken.unsqueeze(1), to, u), torch.where(taken, there, log)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        some = u[torch.randint(len(u), (n,), generator=generator)]
        index = shares(some).softmax(-1).multinomial(1, generator=generator)[:, 0]
        x = prior.means[index] + torch.randn(n, matrix.shape[1], dtype=u.dtype, generator=generator)
        return x + (some - x @ matrix.mT) @ lift.mT  # given u, x_0 is normal around the component's mean

    return draw


def exact_draws(prior: Mixture, observation: LinearGaussian) -> Callable[[int, torch.Generator], Tensor]:
    """Exact draws of the posterior for components of unit covariance: never a [D, D] matrix."""
    centred = prior.means.new_ones(len(prior.means))
    weights = prior.log_weights + observation.log_density(observation.residual(prior.means), centred)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        kind = {"dtype": torch.float64, "generator": generator}
        index = torch.multinomial(weights.softmax(0), n, True, generator=generator)
        x = prior.means[index] + torch.randn(n, prior.means.shape[1], **kind)
        residual = observation.residual(x)
        missed = residual - torch.randn(residual.shape, **kind) / observation.root(residual)
        return x + observation.operator.adjoint(observation.solve(missed, x.new_ones(n)))

    return draw


def seen_from(x: Tensor, directions: Tensor) -> Tensor:
    """Projections of draws, sorted in each direction."""
    return (x @ directions).sort(0).values


def distance(a: Tensor, b: Tensor) -> float:
    """The largest 2-Wasserstein distance of projections, from `seen_from`."""
    return float((a - b).square().mean(0).sqrt().max())


def noise_levels(prior: Mixture, steps: int) -> Tensor:
    """From above the prior's spread to almost none, evenly in the logarithm."""
    top = 4 * float(prior.means.norm(dim=1).max())
    ends = torch.tensor([top, LEAST], dtype=torch.float64).log()
    return torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64).exp()


# --- methods: from a case and a seed to draws [DRAWS, D] ---


def guided(c: Case, seed: int, make: Callable[[Field], Guide], steps: int = STEPS) -> Tensor:
    """Ancestral sampling with a conditional denoiser."""
    field = Field(make(Field(c.prior)), Streams(seed, DRAWS))
    grid = noise_levels(c.prior, steps)
    with torch.no_grad():
        return solve(grid[0] * field.noise(c.like), grid, field, Ancestral())


def stepped(c: Case, seed: int, solver: DPSStep | DDRM, steps: int) -> Tensor:
    """A solver that knows what was seen."""
    field, grid = Field(c.prior, Streams(seed, DRAWS)), noise_levels(c.prior, steps)
    x = solver.init(grid[0], c.like, field) if isinstance(solver, DDRM) else grid[0] * field.noise(c.like)
    return solve(x, grid, field, solver)


def split_gibbs(c: Case, seed: int, likelihood: object) -> Tensor:
    """40 sweeps from far to near, the last ones at 0.2."""
    levels = tuple(noise_levels(c.prior, 50)[10:].clamp(min=0.2).tolist())
    field = Field(c.prior, Streams(seed, DRAWS))
    return SplitGibbs(likelihood, levels).sample(torch.zeros_like(c.like), field)


def twisted(c: Case, seed: int, make: Callable[[Field], Guide]) -> Tensor:
    """Draws from many particles."""
    field = Field(c.prior, Streams(seed, PARTICLES))
    like = c.like[:1].expand(PARTICLES, -1)
    found = Twisted(PARTICLES).sample(make(field), field, noise_levels(c.prior, STEPS), like)
    return found.draws(DRAWS, torch.full((1,), 0.5))[0]


def moved(c: Case, seed: int, make: Callable[[Field], Guide], metric: Metric, moves: int) -> Tensor:
    """The same, and then Metropolis moves."""
    x = twisted(c, seed, make)
    kernel = LineMALA(c.log_likelihood, LEAST, metric=metric)
    return refine(kernel, x, Field(c.prior, Streams(seed + 1, DRAWS)), moves, step_size=0.5).x


SPREAD = 129.0
"""Variance of a number under the prior with equal weights."""

LINEAR: dict[str, Callable[[Case, int], Tensor]] = {
    "exact": lambda c, seed: c.exact(DRAWS, torch.Generator().manual_seed(seed)),
    "DPS, as published": lambda c, seed: stepped(c, seed, DPSStep(c.seen), 3 * STEPS),
    "DPS, bounded": lambda c, seed: guided(c, seed, lambda f: DPS(f, c.log_likelihood, limit=1.0), 3 * STEPS),
    "DDRM": lambda c, seed: stepped(c, seed, DDRM(c.seen), STEPS),
    "PiGDM": lambda c, seed: guided(c, seed, lambda f: PiGDM(f, c.seen, SPREAD)),
    "MMPS": lambda c, seed: guided(c, seed, lambda f: MMPS(f, c.seen)),
    "split Gibbs": lambda c, seed: split_gibbs(c, seed, c.seen),
    "TDS, DPS": lambda c, seed: twisted(c, seed, lambda f: DPS(f, c.log_likelihood, limit=1.0)),
    "TDS, PiGDM": lambda c, seed: twisted(c, seed, lambda f: PiGDM(f, c.seen, SPREAD)),
    "TDS, MMPS": lambda c, seed: twisted(c, seed, lambda f: MMPS(f, c.seen)),
    "TDS, MMPS + moves": lambda c, seed: moved(
        c, seed, lambda f: MMPS(f, c.seen), Conditioned(c.seen, 1.0), 20
    ),
}


def tempered(f: Field, c: Case) -> DPS:
    """DPS with a width read off the prior's draws."""
    x = c.prior.sample(500, generator=torch.Generator().manual_seed(0))
    return DPS(f, c.log_likelihood, width_of(c.log_likelihood, x), SPREAD)


ANY: dict[str, Callable[[Case, int], Tensor]] = {
    "exact": LINEAR["exact"],
    "DPS, bounded": LINEAR["DPS, bounded"],
    "LGD, bounded": lambda c, seed: guided(
        c, seed, lambda f: LGD(f, c.log_likelihood, SPREAD, limit=1.0), 3 * STEPS
    ),
    "split Gibbs": lambda c, seed: split_gibbs(c, seed, c.log_likelihood),
    "TDS, DPS": LINEAR["TDS, DPS"],
    "TDS, LGD": lambda c, seed: twisted(c, seed, lambda f: LGD(f, c.log_likelihood, SPREAD, limit=1.0)),
    "DPS, tempered": lambda c, seed: guided(c, seed, lambda f: tempered(f, c)),
    "TDS, tempered DPS": lambda c, seed: twisted(c, seed, lambda f: tempered(f, c)),
    "TDS, t. DPS + moves": lambda c, seed: moved(c, seed, lambda f: tempered(f, c), Euclidean(), 40),
}


def by_default(c: Case, seed: int, *, exact: bool) -> Tensor:
    """By `fitted.posterior`, with the options as they are: the denoiser a plain function, or the mixture itself."""
    mixture = c.prior.to(torch.float32)
    denoiser = mixture if exact else lambda x, sigma: mixture(x, sigma)
    schedule = VE(LEAST, 4 * float(c.prior.means.norm(dim=1).max()))

    def program(n: int) -> None:
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(denoiser, schedule, tuple(c.like.shape[1:])))
            pyro.sample("y", c.law(x).to_event(1))

    asked = {"y": c.seen.y.float().reshape(1, -1)}
    return pgen.fit(program, None, "score").posterior(asked, n=DRAWS, seed=seed)["x"][:, 0].double()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--dims", default="8,80", help="even numbers, separated by commas")
    parser.add_argument("--seen", default="1,2,4", help="how many numbers are observed")
    parser.add_argument("--likelihood", default="gaussian", choices=["gaussian", "poisson", "laplace"])
    parser.add_argument("--methods", default="", help="names that contain any of these, separated by commas")
    options = parser.parse_args()
    methods = dict(LINEAR if options.likelihood == "gaussian" else ANY)
    methods["api, function"] = lambda c, seed: by_default(c, seed, exact=False)
    if options.likelihood == "gaussian":
        methods["api, mixture"] = lambda c, seed: by_default(c, seed, exact=True)
    chosen = [name for name in methods if any(part in name for part in options.methods.split(","))]
    print(f"{'D':>4} {'d_y':>3} {'method':<18}  ratio  quarters  worst distance   floor  cover seconds")
    for dim in map(int, options.dims.split(",")):
        for seen in map(int, options.seen.split(",")):
            found = [
                measured(case(dim, seen, seed, options.likelihood), seed, methods, chosen)
                for seed in range(options.first, options.first + options.seeds)
            ]
            table = torch.tensor(found, dtype=torch.float64)  # [seeds, methods, 5]
            middle, mean, worst = table.quantile(0.5, 0), table.mean(0), table.amax(0)
            low, high = (table.quantile(q, 0) for q in (0.25, 0.75))
            for i, name in enumerate(chosen):
                ratio, far, floor = middle[i, :3].tolist()
                print(
                    f"{dim:>4} {seen:>3} {name:<18} {ratio:6.2f} {float(low[i, 0]):4.2f}-{float(high[i, 0]):4.2f}"
                    f" {float(worst[i, 0]):6.2f} {far:8.3f} {floor:7.3f}"
                    f" {float(mean[i, 3]):6.3f} {float(mean[i, 4]):7.1f}",
                    flush=True,
                )


def measured(
    c: Case, seed: int, methods: dict[str, Callable[[Case, int], Tensor]], chosen: list[str]
) -> list[tuple[float, ...]]:
    """For each method: ratio to the floor, distance, floor, coverage, seconds."""
    generator = torch.Generator().manual_seed(1000 + seed)
    directions = torch.randn(c.like.shape[1], DIRECTIONS, dtype=torch.float64, generator=generator)
    directions = directions / directions.norm(dim=0)
    reference = [seen_from(c.exact(DRAWS, generator), directions) for _ in range(6)]
    pairs = [distance(reference[i], reference[j]) for i in range(6) for j in range(i)]
    floor = float(torch.tensor(pairs).mean())
    rows = []
    for name in chosen:
        begin = time.perf_counter()
        x = methods[name](c, 2 * seed + 10_000)
        seconds = time.perf_counter() - begin
        there = seen_from(x, directions)
        far = float(torch.tensor([distance(there, r) for r in reference]).mean())
        low, high = x.quantile(torch.tensor([0.05, 0.95], dtype=x.dtype), 0)
        truth = c.exact(2000, generator)
        cover = float(((truth >= low) & (truth <= high)).double().mean())
        rows.append((far / floor, far, floor, cover, seconds))
    return rows


if __name__ == "__main__":
    main()
