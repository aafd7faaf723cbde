"""Orders of convergence: of paths on a mixture, of means and variances on a Gaussian, all against the theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.grids import karras, log_snr
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import (
    DDIM,
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
    UniPC,
)
from pgen.algorithms.diffusion.solvers.state import history
from pgen.algorithms.diffusion.solvers.weights import adams, combined

HIGH, LOW = 40.0, 0.05
EAB = ExponentialAdamsBashforth

torch.manual_seed(0)
MIXTURE = Mixture(torch.randn(10, 2, dtype=torch.float64), 0.25)


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor]:
    """Values at the first level, and what the equation makes of them."""
    x = start(Streams(0, 32), (2,), HIGH, MIXTURE.means)
    return x, solve(x, log_snr(1500, LOW, HIGH, zero=False), Field(MIXTURE), UniPC(4, "log"))


def order(solver, n: int, reference, grid) -> float:
    x, exact = reference
    errors = [
        (solve(x, grid(steps), Field(MIXTURE), solver) - exact).square().mean().sqrt() for steps in (n, 2 * n)
    ]
    return math.log2(errors[0] / errors[1])


def even(n: int) -> Tensor:
    return log_snr(n, LOW, HIGH, zero=False)


def uneven(n: int) -> Tensor:
    """Steps in log sigma that are alternately long and half as long: equal steps may not be assumed."""
    steps = torch.tensor([1.0, 0.5], dtype=torch.float64).repeat(n // 2)
    u = torch.cat([steps.new_zeros(1), steps.cumsum(0)]) / steps.sum()
    return (math.log(HIGH) + u * math.log(LOW / HIGH)).exp()


PATHS = [
    (Euler(), 1, 100),
    (DDIM(0.0), 1, 100),
    (EulerMaruyama(eta=0.0), 1, 400),
    (Heun(), 2, 100),
    (DPMSolverPP(2), 2, 100),
    (DPMSolverPP(3), 3, 200),
    (SDEDPMSolverPP(2, eta=0.0), 2, 100),
    (SDEDPMSolverPP(3, eta=0.0), 3, 200),
    *((UniPC(p, v), p + 1, n) for v in ("log", "sigma", "angle") for p, n in ((1, 200), (2, 100), (3, 60))),
    *((EAB(p, v), p, n) for v in ("log", "sigma", "angle") for p, n in ((1, 100), (2, 100), (3, 100))),
    (EAB(4, "sigma"), 4, 60),
    (EAB(4, "angle"), 4, 60),
]


@pytest.mark.parametrize("grid", [even, uneven])
@pytest.mark.parametrize(("solver", "theory", "n"), PATHS, ids=lambda v: str(v))
def test_paths(solver, theory: int, n: int, grid, reference) -> None:
    # A method of one order less or more is off by 1; fourth order is met where starting values still count.
    assert abs(order(solver, n, reference, grid) - theory) < (0.3 if theory < 4 else 0.65)


class Halved:
    """DPM-Solver++(3M) as its authors' code has it: half of the second difference."""

    def step(self, state, t, t_next, fn):
        s, t = float(t), float(t_next)
        state = history(state)
        state = state.seen(s, fn(state.x, s), 3)
        whole = adams(state.levels, s, t)
        if len(whole) == 3:  # the parabola's second difference: what it adds to the straight line
            h, k = math.log(s / t), [math.log(level / s) for level in state.levels[1:]]
            phi = 2 * ((1 - math.exp(-h)) / h**2 - 1 / h + 0.5) * h**2
            second = [1 / (k[0] * k[1]), -1 / (k[0] * (k[1] - k[0])), 1 / (k[1] * (k[1] - k[0]))]
            whole = [w - phi / 2 * d for w, d in zip(whole, second, strict=True)]
        return state._replace(x=combined(state.x, t / s, state.denoised, whole))


class Even:
    """The two-step method for equal steps, whatever they are."""

    def step(self, state, t, t_next, fn):
        s, t = float(t), float(t_next)
        state = history(state)
        state = state.seen(s, fn(state.x, s), 2)
        guess = torch.lerp(state.denoised[0], state.denoised[-1], -0.5)
        return state._replace(x=torch.lerp(guess, state.x, t / s))


class Backwards:
    """A step of Euler's with the sign of the score wrong."""

    def step(self, x, t, t_next, fn):
        return x + (x - fn(x, t)) * (1 - float(t_next) / float(t))


def test_broken_ones_are_told(reference) -> None:
    assert abs(order(Halved(), 200, reference, even) - 2) < 0.3  # not 3
    assert abs(order(Even(), 200, reference, uneven) - 1) < 0.3  # not 2
    assert order(Backwards(), 100, reference, even) < 0.5 or math.isnan(
        order(Backwards(), 100, reference, even)
    )


# Means and variances. On a Gaussian the denoiser is affine, and so is every solver: what it makes of the first value and
# of the noise is a vector of coefficients, found by running it on the unit vectors. No random number is drawn.

MEAN, SCALE = 0.7, 0.5


class Coefficients(Field):
    """Values are rows [of the constant 1, of the first value, of each noise]."""

    def __init__(self, size: int, mean: float = MEAN, scale: float = SCALE) -> None:
        super().__init__(self.answer)
        self.unit = torch.eye(size, dtype=torch.float64)
        self.mean, self.scale = mean, scale

    def answer(self, x: Tensor, sigma: Tensor) -> Tensor:
        keep = (self.scale**2 / (self.scale**2 + sigma**2)).unsqueeze(-1)
        return keep * x + (1 - keep) * self.mean * self.unit[:1]

    def noise(self, like: Tensor) -> Tensor:
        self.draws += 1
        return self.unit[1 + self.draws : 2 + self.draws]


class Map(Coefficients):
    """The consistency function in the denoiser's place."""

    def answer(self, x: Tensor, sigma: Tensor) -> Tensor:
        keep = self.scale / (self.scale**2 + sigma**2).sqrt().unsqueeze(-1)
        return keep * x + (1 - keep) * self.mean * self.unit[:1]


def moments(solver, grid: Tensor, kind=Coefficients, per: int = 1, extra: float = 0.0) -> tuple[float, float]:
    """Mean and variance at the end of a grid, the first value having those of its level."""
    field = kind(2 + per * len(grid))
    out = solve(field.unit[1:2], grid, field, solver)[0]
    first = SCALE**2 + float(grid[0]) ** 2
    mean = float(out[0] + out[1] * MEAN)
    return mean, float(out[1].square() * first + out[2:].square().sum()) + extra


def weak_order(solver, n: int = 200, per: int = 1) -> float:
    errors = []
    for steps in (n, 2 * n):
        mean, variance = moments(solver, log_snr(steps, 0.1, 10.0, zero=False), per=per)
        assert math.isclose(mean, MEAN, abs_tol=1e-10)  # on its own path from the first step on
        errors.append(abs(variance - SCALE**2 - 0.01))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("solver", "theory"),
    [
        (Ancestral(), 1),
        (DDIM(0.5), 1),
        (DDIM(1.0), 1),
        (EulerMaruyama(), 1),
        (EulerMaruyama(eta=0.5), 1),
        (SDEDPMSolverPP(1), 1),
        (SDEDPMSolverPP(2), 2),
        (SDEDPMSolverPP(2, eta=0.5), 2),
        (SDEDPMSolverPP(3), 2),
        (Euler(), 1),
        (Heun(), 2),
        (UniPC(3), 4),
    ],
    ids=lambda v: str(v),
)
def test_moments(solver, theory: int) -> None:
    assert abs(weak_order(solver) - theory) < (0.1 if theory < 4 else 0.4)


def test_churn() -> None:
    """Shared out over more steps, it leaves the law what it is; each step's noise is repaired to second order."""
    errors = []
    for n in (100, 200):
        grid = log_snr(n, 0.1, 10.0, zero=False)
        _, variance = moments(Heun.churned(20.0, n), grid)
        errors.append(abs(variance - SCALE**2 - 0.01))
    assert errors[1] < 1e-3
    assert math.log2(errors[0] / errors[1]) > 1.7


def test_without_half_of_the_noise_no_order_is_left() -> None:
    class Quiet(Coefficients):
        def noise(self, like: Tensor) -> Tensor:
            return super().noise(like) / 2

    grids = [log_snr(n, 0.1, 10.0, zero=False) for n in (100, 200)]
    gaps = [abs(moments(Ancestral(), grid, Quiet)[1] - SCALE**2 - 0.01) for grid in grids]
    assert math.log2(gaps[0] / gaps[1]) < 0.2
    assert gaps[1] > 0.02


def test_langevin_steps_have_their_own_stationary_law() -> None:
    """x - a / 2V (x - m) + sqrt(a) z settles at a variance of V / (1 - a / 4V), for data and noise of variance V."""
    level, step = 1.0, 0.4
    total = SCALE**2 + level**2
    grid = torch.tensor([3.0, level], dtype=torch.float64)
    mean, variance = moments(AnnealedLangevin(step, steps=150), grid, per=150)
    assert math.isclose(variance, total / (1 - step / (4 * total)), rel_tol=1e-9)
    assert math.isclose(mean, MEAN, abs_tol=1e-9)
    push = 2 * 0.3**2  # the corrector's e; its steps are a = 2 e
    mean, variance = moments(PredictorCorrector(Euler(), snr=0.3, steps=150), grid, per=150)
    assert math.isclose(variance, total / (1 - push / (2 * total)), rel_tol=1e-9)
    assert math.isclose(mean, MEAN, abs_tol=1e-9)


def test_corrector_repairs_its_predictor() -> None:
    grid = log_snr(30, 0.05, 10.0, zero=False)
    true = SCALE**2 + 0.05**2
    alone, repaired = (
        abs(moments(solver, grid, per=9)[1] - true)
        for solver in (Euler(), PredictorCorrector(Euler(), steps=8))
    )
    assert repaired < alone / 2


@pytest.mark.parametrize("levels", [[80.0, 0.0], [80.0, 3.0, 0.0], [80.0, 2.0, 0.5, 0.0], [80.0, 1.0, 0.2]])
def test_consistency_map_is_exact_in_any_number_of_steps(levels: list[float]) -> None:
    mean, variance = moments(Consistency(), torch.tensor(levels, dtype=torch.float64), Map)
    assert math.isclose(mean, MEAN, rel_tol=1e-9)
    assert math.isclose(variance, SCALE**2 + levels[-1] ** 2, rel_tol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [
        Euler(),
        Ancestral(),
        Heun(),
        DPMSolverPP(2),
        DPMSolverPP(3),
        SDEDPMSolverPP(),
        UniPC(3),
        EulerMaruyama(),
    ],
    ids=lambda v: str(v),
)
def test_the_law_in_the_limit(solver) -> None:
    """To data themselves, along Karras's levels: the last step loses what noise sigma_min had, and no more."""
    mean, variance = moments(solver, karras(600, 0.005, 40.0))
    assert math.isclose(mean, MEAN, rel_tol=1e-3)
    assert math.isclose(variance, SCALE**2, rel_tol=0.06 if isinstance(solver, EulerMaruyama) else 0.02)
