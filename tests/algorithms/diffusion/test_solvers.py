"""Fixed-step solvers: what the papers say of a step, and laws that hold for every solver."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pgen.algorithms.diffusion.adaptive_ode import AdaptiveODE
from pgen.algorithms.diffusion.adaptive_sde import AdaptiveSDE
from pgen.algorithms.diffusion.field import Field, per_row
from pgen.algorithms.diffusion.grids import default, karras, log_snr, uniform_time
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.schedules import VP
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import (
    DDIM,
    SOLVERS,
    Ancestral,
    AnnealedLangevin,
    Consistency,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    ExponentialAdamsBashforth,
    Heun,
    PredictorCorrector,
    SDEDPMSolverPP,
    Solver,
    UniPC,
    moved,
    only_down,
    value,
)
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_moments

EAB = ExponentialAdamsBashforth
EVERY = [
    *(solver() for solver in SOLVERS.values()),
    DDIM(0.5),
    EulerMaruyama(0.5),
    PredictorCorrector(DPMSolverPP(3), steps=2),
    PredictorCorrector(rule="norm"),
    Heun(churn=0.2, s_noise=1.01),
    DPMSolverPP(3),
    SDEDPMSolverPP(3, eta=0.3),
    UniPC(2, "log"),
    UniPC(4, "angle"),
    EAB(2, "log"),
    EAB(4),
    EAB(4, "angle"),
]
every = pytest.mark.parametrize("solver", EVERY, ids=str)
shapes = pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of independent numbers N(0.7, 0.5^2): elementwise, any shape."""
    keep = per_row(0.25 / (0.25 + sigma**2), x)
    return torch.lerp(torch.full_like(x, 0.7), x, keep)


def sample(
    solver, shape, rows: int, grid: Tensor, *, seed=3, dtype=torch.float32, denoiser=gaussian
) -> Tensor:
    streams = Streams(seed, rows)
    x = start(streams, shape, grid[0], torch.empty(0, dtype=dtype))
    return solve(x, grid, Field(denoiser, streams), solver)


# Laws of every solver.


@every
@shapes
def test_sample_of_a_seed_is_the_same_at_any_batch_size(solver, shape) -> None:
    grid = karras(6, 0.05, 20.0)
    many = sample(solver, shape, 150, grid)
    assert many.shape == (150, *shape)
    assert many.isfinite().all()
    for rows in (1, 70):
        assert torch.equal(sample(solver, shape, rows, grid), many[:rows])
    seeds = [11, 5, 8]
    own = sample(solver, shape, 3, grid, seed=seeds)
    assert torch.equal(sample(solver, shape, 1, grid, seed=seeds[1:2]), own[1:2])


@every
def test_dtypes(solver) -> None:
    grid = karras(8, 0.05, 20.0)
    single, double = (sample(solver, (5,), 40, grid, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    if not _draws(solver):
        x = start(Streams(3, 40), (5,), 20.0, torch.empty(0, dtype=torch.float64))
        near = [solve(x.to(dtype), grid, Field(gaussian), solver) for dtype in (torch.float32, torch.float64)]
        assert torch.allclose(near[0].double(), near[1], atol=1e-4)


@every
def test_step_to_zero_is_the_denoised_value(solver) -> None:
    if isinstance(solver, Heun):
        solver = Heun()  # churn is noise in this step too
    field, x = Field(gaussian, Streams(0, 4)), torch.randn(4, 3)
    assert torch.equal(value(solver.step(x, 0.3, 0.0, field)), gaussian(x, torch.full((4,), 0.3)))
    assert field.evaluations == 1
    assert field.draws == 0


@every
def test_thousand_steps(solver) -> None:
    """No NaN, on levels as near to each other as a thousand are; and samples of the data's law."""
    grid = uniform_time(1000, VP())
    if isinstance(solver, AnnealedLangevin):
        solver = AnnealedLangevin(0.2, steps=1)
    out = sample(solver, (20,), 100, grid)
    assert out.isfinite().all()
    if not isinstance(solver, (Consistency, AnnealedLangevin)):  # no map of its own; too few steps
        assert abs(float(out.mean()) - 0.7) < 0.06
        assert abs(float(out.std()) - 0.5) < 0.045


@every
def test_gradients_flow_and_inputs_stay(solver) -> None:
    torch.manual_seed(1)
    means, grid = torch.randn(3, 2, dtype=torch.float64), karras(4, 0.1, 5.0)
    x = 5 * torch.randn(2, 2, dtype=torch.float64)

    def run(x: Tensor, means: Tensor) -> Tensor:
        return solve(x, grid, Field(Mixture(means, 0.3), Streams(0, 2)), solver)

    before = x.clone()
    first = run(x, means)
    assert torch.equal(x, before)
    assert torch.equal(run(x, means), first)
    x.requires_grad_(), means.requires_grad_()
    assert torch.autograd.gradcheck(run, (x, means), fast_mode=True)


@every
def test_answers_of_the_denoiser_stay(solver) -> None:
    """They may be its own memory, or the values it was given."""
    ready = torch.randn(4, 3)
    kept = ready.clone()
    grid = karras(5, 0.05, 20.0)
    solve(torch.randn(4, 3), grid, Field(lambda x, sigma: ready, Streams(0, 4)), solver)
    assert torch.equal(ready, kept)
    x = torch.randn(4, 3)
    seen: list[tuple[Tensor, Tensor]] = []

    def same(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, x.clone()))
        return x

    solve(x, grid, Field(same, Streams(0, 4)), solver)
    assert all(torch.equal(a, b) for a, b in seen)


@every
def test_evaluations(solver) -> None:
    """One a step, to 0 too, but where two or more are the method."""
    n, field = 6, Field(gaussian, Streams(0, 4))
    solve(torch.randn(4, 3), karras(n, 0.05, 20.0), field, solver)
    more = {
        Heun: 1,
        PredictorCorrector: getattr(solver, "steps", 0),
        AnnealedLangevin: getattr(solver, "steps", 0) - 1,
    }
    assert field.evaluations == n + (n - 1) * more.get(type(solver), 0)


@every
def test_it_is_a_solver(solver) -> None:
    assert isinstance(solver, Solver)
    if _draws(solver):
        with pytest.raises(ValueError, match="draws noise"):
            solve(torch.randn(4, 3), karras(5, 0.05, 20.0), Field(gaussian), solver)
    else:
        solve(torch.randn(4, 3), karras(5, 0.05, 20.0), Field(gaussian), solver)


def _draws(solver) -> bool:
    field = Field(gaussian, Streams(0, 2))
    solve(torch.randn(2, 3), karras(3, 0.1, 5.0), field, solver)
    return field.draws > 0


# Steps as their papers state them.


def test_ddim_and_ddpm_at_the_scale_of_vp() -> None:
    """In the variables of Ho et al. and Song et al., where data shrink: the same numbers after scaling."""
    s, t = 2.0, 1.2
    before, after = 1 / (1 + s**2), 1 / (1 + t**2)  # alpha-bar
    x = s * torch.randn(6, 3, dtype=torch.float64)
    clean = gaussian(x, torch.full((6,), s, dtype=torch.float64))
    z = Streams(0, 6).normal(1, (3,), x)
    scaled = x * math.sqrt(before)
    noise = (scaled - math.sqrt(before) * clean) / math.sqrt(1 - before)
    for eta in (0.0, 0.4, 1.0):
        spread = eta * math.sqrt((1 - after) / (1 - before) * (1 - before / after))
        paper = math.sqrt(after) * clean + math.sqrt(1 - after - spread**2) * noise + spread * z
        ours = DDIM(eta).step(x, s, t, Field(gaussian, Streams(0, 6)))
        assert torch.allclose(ours * math.sqrt(after), paper)
    beta = 1 - before / after
    mean = (
        math.sqrt(after) * beta / (1 - before) * clean
        + math.sqrt(1 - beta) * (1 - after) / (1 - before) * scaled
    )
    paper = mean + math.sqrt((1 - after) / (1 - before) * beta) * z
    ours = Ancestral().step(x, s, t, Field(gaussian, Streams(0, 6)))
    assert torch.allclose(ours * math.sqrt(after), paper)


def test_edm_algorithm_2() -> None:
    s, t, churn = 2.0, 1.2, 0.3
    x = s * torch.randn(6, 3, dtype=torch.float64)
    full = lambda v: torch.full((6,), v, dtype=torch.float64)  # noqa: E731
    u = s * (1 + churn)
    hat = x + math.sqrt(u**2 - s**2) * 1.003 * Streams(0, 6).normal(1, (3,), x)
    d = (hat - gaussian(hat, full(u))) / u
    guess = hat + (t - u) * d
    d2 = (guess - gaussian(guess, full(t))) / t
    paper = hat + (t - u) * (d + d2) / 2
    solver = Heun(churn, s_min=1.0, s_max=3.0, s_noise=1.003)
    assert torch.allclose(solver.step(x, s, t, Field(gaussian, Streams(0, 6))), paper)
    assert torch.equal(solver.step(x, 4.0, t, Field(gaussian)), Heun().step(x, 4.0, t, Field(gaussian)))


def test_corrector_of_song_et_al() -> None:
    """Rule "norm": e = 2 (snr |z| / |g|)^2 for each row, |z| by its expectation."""
    s, t, snr = 2.0, 1.2, 0.2
    x = s * torch.randn(6, 30, dtype=torch.float64)
    found = PredictorCorrector(Euler(), snr, rule="norm").step(x, s, t, Field(gaussian, Streams(0, 6)))
    x = Euler().step(x, s, t, Field(gaussian))
    score = (gaussian(x, torch.full((6,), t, dtype=torch.float64)) - x) / t**2
    e = 2 * (snr * math.sqrt(30) / score.norm(dim=1, keepdim=True)) ** 2
    assert bool((e < t**2).all())
    paper = x + e * score + (2 * e).sqrt() * Streams(0, 6).normal(1, (30,), x)
    assert torch.allclose(found, paper)


def test_unipc_as_its_authors_state_it() -> None:
    """The linear system of their section 3, with B(h) = e^h - 1, on uneven levels: the same second step."""
    levels, x0 = [8.0, 5.0, 2.0], 8 * torch.randn(6, 3, dtype=torch.float64)
    lam = [-math.log(v) for v in levels]
    d0 = gaussian(x0, torch.full((6,), levels[0], dtype=torch.float64))
    x1 = torch.lerp(d0, x0, levels[1] / levels[0])
    d1 = gaussian(x1, torch.full((6,), levels[1], dtype=torch.float64))
    phi = lambda h: (-math.expm1(-h), (h + math.expm1(-h)) / h)  # noqa: E731  weights of D, h D'
    h = lam[1] - lam[0]
    x1 = levels[1] / levels[0] * x0 + phi(h)[0] * d0 + phi(h)[1] * (d1 - d0)  # UniC-1
    h, r = lam[2] - lam[1], (lam[0] - lam[1]) / (lam[2] - lam[1])
    paper = levels[2] / levels[1] * x1 + phi(h)[0] * d1 + phi(h)[1] * (d0 - d1) / r  # UniP-2
    found = solve(x0, torch.tensor(levels, dtype=torch.float64), Field(gaussian), UniPC(2, "log"))
    assert torch.allclose(found, paper)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DDIM(0.0), Euler()),
        (DDIM(1.0), Ancestral()),
        (SDEDPMSolverPP(1), Ancestral()),
        (SDEDPMSolverPP(1, eta=0.0), Euler()),
        (SDEDPMSolverPP(2, eta=0.0), EAB(2, "log")),
        (SDEDPMSolverPP(3, eta=0.0), EAB(3, "log")),
        (EAB(1), Euler()),
        (PredictorCorrector(UniPC(3), steps=0), UniPC(3)),
    ],
    ids=str,
)
def test_one_is_the_other(one, other) -> None:
    grid = karras(9, 0.05, 20.0)
    first, second = (sample(solver, (4,), 20, grid, dtype=torch.float64) for solver in (one, other))
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-10)


# Samples.


MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [2.0, -2.0]])
WEIGHTS = torch.tensor([0.2, 0.5, 0.3])


@pytest.mark.parametrize(
    ("solver", "grid"),
    [
        (UniPC(3), default(20)),
        (DPMSolverPP(3), karras(40, 0.01, 40.0)),
        (Heun(), karras(40, 0.01, 40.0)),
        (Ancestral(), karras(300, 0.01, 40.0)),
        (SDEDPMSolverPP(2), karras(100, 0.01, 40.0)),
        (Heun(churn=0.1), karras(100, 0.01, 40.0)),
        (PredictorCorrector(Ancestral()), karras(150, 0.01, 40.0)),
    ],
    ids=lambda v: f"{len(v)} levels" if isinstance(v, Tensor) else str(v),
)
def test_shares_of_components(solver, grid) -> None:
    """4,000 draws: a share off by 0.05 is found 999,999 times in a million, at as rare a false alarm."""
    mixture = Mixture(MEANS, 0.25, weights=WEIGHTS)
    out = sample(solver, (2,), 4000, grid, denoiser=mixture)
    nearest = torch.cdist(out, MEANS).argmin(1)
    assert_frequencies(nearest, WEIGHTS)
    assert_moments((out - MEANS[nearest])[:1500] / 0.25, torch.zeros(2), torch.ones(2))


def test_wrong_weights_are_told() -> None:
    mixture = Mixture(MEANS, 0.25, weights=torch.tensor([0.25, 0.45, 0.3]))
    out = sample(UniPC(3), (2,), 4000, default(20), denoiser=mixture)
    with pytest.raises(StatisticalFailure):
        assert_frequencies(torch.cdist(out, MEANS).argmin(1), WEIGHTS)


def test_encoded_and_decoded() -> None:
    mixture = Mixture(MEANS.double(), 0.25, weights=WEIGHTS.double())
    x = mixture.sample(50, generator=torch.Generator().manual_seed(0))
    up = log_snr(150, 0.02, 20.0, zero=False).flip(0)
    for solver in (Heun(), DPMSolverPP(3), UniPC(3), EAB(4)):
        far = solve(x, up, Field(mixture), solver)
        assert float(far.std()) > 10
        assert torch.allclose(solve(far, up.flip(0), Field(mixture), solver), x, atol=1e-2)


@pytest.mark.parametrize("solver", [*EVERY, AdaptiveODE(), AdaptiveSDE()], ids=str)
def test_upwards_there_is_a_law_or_a_reason(solver) -> None:
    """Either the values of data get the law of the larger noise level, or the solver and the grid are named."""
    grid = log_snr(40, 0.05, 5.0, zero=False).flip(0)
    streams = Streams(0, 2000)
    x = 0.7 + (0.25 + 0.05**2) ** 0.5 * streams.normal(0, (3,), torch.empty(0))
    if only_down(solver):
        with pytest.raises(ValueError, match=r"goes up, from noise level 0.05 to 5; expected") as raised:
            solve(x, grid, Field(gaussian, streams), solver)
        assert str(solver) in str(raised.value)
        return
    if isinstance(solver, AnnealedLangevin):
        solver = AnnealedLangevin(0.4, steps=30)
    out = solve(x, grid, Field(gaussian, streams), solver)
    if not isinstance(solver, Consistency):  # the denoiser is none of its maps
        # 6,000 numbers: 5 standard errors of the spread are 5 %; correctors and steps of first order have a bias.
        assert abs(float(out.std()) / (25.25**0.5) - 1) < 0.12
        assert abs(float(out.mean()) - 0.7) < 5 * 5.1 / 6000**0.5


# Others' solvers, others' wishes.


class Midpoint:
    """Written by somebody who has read one sentence."""

    def step(self, x, t, t_next, fn):
        if t_next == 0:
            return fn(x, t)
        middle = (t * t_next).sqrt()
        half = x + (middle - t) * (x - fn(x, t)) / t
        return x + (t_next - t) * (half - fn(half, middle)) / middle


class Momentum(NamedTuple):
    x: Tensor
    last: Tensor


class Remembering:
    """With a state of its own."""

    def step(self, state, t, t_next, fn):
        x, last = (state, None) if isinstance(state, Tensor) else state
        now = fn(x, t)
        guess = now if last is None else now + 0.1 * (now - last)
        return Momentum(guess + t_next / t * (x - guess), now)


@shapes
@pytest.mark.parametrize(
    "solver", [Midpoint(), Remembering(), PredictorCorrector(Remembering())], ids=lambda v: type(v).__name__
)
def test_strangers(solver, shape) -> None:
    assert isinstance(solver, Solver)
    out = sample(solver, shape, 600, karras(40, 0.01, 40.0))
    assert out.shape == (600, *shape)
    assert out.dtype == torch.float32
    # Standard error of the mean is 0.02 and of the standard deviation 0.014, or less: five of them, and the solver's own.
    assert abs(float(out.mean()) - 0.7) < 0.13
    assert abs(float(out.std()) - 0.5) < 0.11
    assert torch.equal(sample(solver, shape, 6, karras(40, 0.01, 40.0)), out[:6])


@pytest.mark.parametrize(
    "solver", [Euler(), UniPC(3), EAB(3), SDEDPMSolverPP(2), Remembering()], ids=lambda v: type(v).__name__
)
def test_on_step_sees_and_moves(solver) -> None:
    grid = karras(6, 0.05, 20.0)
    seen: list[float] = []

    def held(x: Tensor, level: float) -> Tensor:
        seen.append(level)
        known = torch.full_like(x[:, :1], 9.0)
        return torch.cat([known, x[:, 1:]], 1)

    streams = Streams(0, 5)
    x = start(streams, (3,), 20.0, torch.empty(0))
    out = solve(x, grid, Field(gaussian, streams), solver, on_step=held)
    assert seen == grid[1:].tolist()
    assert torch.equal(out[:, 0], torch.full((5,), 9.0))
    other = solve(x, grid, Field(gaussian, Streams(0, 5)), solver, on_step=lambda x, level: None)
    assert torch.allclose(out[:, 1:], other[:, 1:], atol=1e-6)  # and the memory was kept


def test_states() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert moved(x, y) is y
    assert moved(Momentum(x, x), y) == Momentum(y, x)


def test_start() -> None:
    streams, like = Streams(4, 3000), torch.empty(0, dtype=torch.float64)
    mean, variance = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.tensor([4.0, 0.0], dtype=torch.float64),
    )
    x = start(streams, (2,), 1.5, like, mean=mean, variance=variance)
    assert_moments(x, mean, (variance + 1.5**2).sqrt())
    assert torch.equal(start(streams, (2,), 1.5, like), 1.5 * streams.normal(0, (2,), like))
    assert torch.allclose(
        start(streams, (2,), 1.5, like, mean=1.0, variance=4.0), 1 + 2.5 * streams.normal(0, (2,), like)
    )


@pytest.mark.parametrize(
    "levels",
    [
        [1.0],
        [[2.0, 1.0]],
        [2.0, 2.0, 1.0],
        [1.0, 2.0, 1.0],
        [0.0, 1.0],
        [1.0, 0.0, 0.0],
        [1.0, -1.0],
        [2.0, math.nan],
    ],
    ids=str,
)
def test_grids_that_are_none(levels) -> None:
    with pytest.raises(ValueError, match="expected"):
        solve(torch.zeros(2, 1), torch.tensor(levels), Field(gaussian), Euler())


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(1.5),
        lambda: EulerMaruyama(-1.0),
        lambda: PredictorCorrector(snr=0.0),
        lambda: PredictorCorrector(rule="other"),
        lambda: AnnealedLangevin(step_size=2.0),
        lambda: AnnealedLangevin(steps=0),
        lambda: Heun(churn=-0.1),
        lambda: Heun(s_min=2.0, s_max=1.0),
        lambda: DPMSolverPP(4),
        lambda: SDEDPMSolverPP(0),
        lambda: SDEDPMSolverPP(eta=-1.0),
        lambda: UniPC(5),
        lambda: UniPC(variable="time"),
        lambda: EAB(0),
        lambda: EAB(variable="time"),
        lambda: Consistency(-1.0),
    ],
)
def test_hyperparameters_are_checked(make) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()
