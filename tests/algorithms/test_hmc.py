"""Hamiltonian dynamics, and the Monte Carlo of it: what must be conserved is conserved.

Chains that begin with exact draws must end with exact draws, however many steps they make. Ten thousands of
independent chains show it without autocorrelation to account for. Every such test has a false-alarm rate of 1e-6.
"""

import math

import pytest
import torch

from pgen.algorithms.kernels import hmc
from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.hmc import HMC, Phase, leapfrog, trajectory
from tests.algorithms.kernel_laws import kolmogorov, log_gamma, log_half_cauchy

DOUBLE = torch.float64
Z = 4.9  # 1e-6 both ways
KOLMOGOROV = 2.7  # 2 exp(-2 x²) = 1e-6


def tuned(step_size, scale):
    return Tuning(torch.tensor(step_size, dtype=DOUBLE), scale, torch.tensor(1.0, dtype=DOUBLE))


def anharmonic(q):
    """log density -Σ q⁴/4 - (q₀ q₁)²/2."""
    cross = q[:, :1] * q[:, 1:]
    gradient = -(q**3) - torch.cat([q[:, :1] * q[:, 1:] ** 2, q[:, :1] ** 2 * q[:, 1:]], 1)
    return -(q**4).sum(-1) / 4 - cross[:, 0] ** 2 / 2, gradient


def normal(q):
    return -0.5 * q.square().sum(-1), -q


def start(chains=64, seed=0):
    torch.manual_seed(seed)
    q, p = torch.randn(2, chains, 2, dtype=DOUBLE)
    log_density, gradient = anharmonic(q)
    return Phase(q, p, gradient, log_density)


def euler(begin, step_size, scale, target, steps):
    """Not symplectic, not reversible."""
    q, p, gradient, _ = begin
    for _ in range(steps):
        q, p = q + step_size * p, p + step_size * gradient
        log_density, gradient = target(q)
    return Phase(q, p, gradient, log_density)


def energy_error(integrate, steps):
    begin = start()
    end = integrate(
        begin, torch.tensor(1.0 / steps, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE), anharmonic, steps
    )
    return (hmc.log_joint(end[3], end[1]) - hmc.log_joint(begin[3], begin[1])).abs().mean()


@pytest.mark.parametrize(("integrate", "order"), [(trajectory, 2), (euler, 1)])
def test_the_energy_error_falls_with_the_square_of_the_step(integrate, order):
    found = torch.log2(energy_error(integrate, 200) / energy_error(integrate, 400))
    assert abs(found - order) < 0.1


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.5, 2.0], dtype=DOUBLE), torch.tensor([[0.5, 0.0], [0.7, 2.0]], dtype=DOUBLE)]
)
def test_the_way_back_leads_back(scale):
    begin, step = start(), torch.tensor(0.05, dtype=DOUBLE)
    there = trajectory(begin, step, scale, anharmonic, 30)
    back = trajectory(there._replace(momentum=-there.momentum), step, scale, anharmonic, 30)
    torch.testing.assert_close(back.position, begin.position, rtol=0, atol=1e-10)
    torch.testing.assert_close(-back.momentum, begin.momentum, rtol=0, atol=1e-10)


def test_euler_does_not_come_back():
    begin, step = start(), torch.tensor(0.05, dtype=DOUBLE)
    there = euler(begin, step, None, anharmonic, 30)
    back = euler(there._replace(momentum=-there.momentum), step, None, anharmonic, 30)
    assert (back.position - begin.position).abs().max() > 0.01


@pytest.mark.parametrize(("integrate", "volume"), [(trajectory, True), (euler, False)])
def test_volume_is_preserved(integrate, volume):
    def flow(z):
        q, p = z[None, :2], z[None, 2:]
        log_density, gradient = anharmonic(q)
        step, scale = torch.tensor(0.1, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
        end = integrate(Phase(q, p, gradient, log_density), step, scale, anharmonic, 5)
        return torch.cat([end.position[0], end.momentum[0]])

    determinant = torch.autograd.functional.jacobian(
        flow, torch.tensor([0.3, -1.0, 0.8, 0.5], dtype=DOUBLE)
    ).det()
    assert (abs(determinant - 1) < 1e-12) == volume


@pytest.mark.parametrize("shape", [(), (64,), (64, 1)])
def test_a_leapfrog_is_a_trajectory_of_one_step_and_takes_a_step_size_per_chain(shape):
    begin = start()
    step = torch.full(shape, 0.1, dtype=DOUBLE)
    scale = torch.ones(2, dtype=DOUBLE)
    one = leapfrog(begin.position, begin.momentum, begin.gradient, step, scale, anharmonic)
    for _ in range(4):
        one = leapfrog(one.position, one.momentum, one.gradient, step, scale, anharmonic)
    many = trajectory(begin, step, scale, anharmonic, 5)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b)


def test_a_scale_is_a_change_of_coordinates():
    """HMC on N(0, SSᵀ) with scale S is S times HMC on N(0, I)."""
    torch.manual_seed(3)
    scale = torch.randn(3, 3, dtype=DOUBLE).tril() + 3 * torch.eye(3, dtype=DOUBLE)
    precision = torch.linalg.inv(scale @ scale.mT)
    x = torch.randn(50, 3, dtype=DOUBLE)

    def correlated(q):
        gradient = -q @ precision
        return 0.5 * (q * gradient).sum(-1), gradient

    kernel, found = HMC(steps=4), []
    for target, q, s in ((normal, x, torch.ones(3, dtype=DOUBLE)), (correlated, x @ scale.mT, scale)):
        torch.manual_seed(0)
        state = kernel.init(q, target)
        for _ in range(5):
            state, _ = kernel.step(state, tuned(0.7, s), target)
        found.append(state.position)
    torch.testing.assert_close(found[0] @ scale.mT, found[1])


CASES = {
    "gamma": (log_gamma, lambda n: torch.distributions.Gamma(2.0, torch.ones(n, 1, dtype=DOUBLE)).sample().log(),
              lambda q: torch.special.gammainc(torch.tensor(2.0, dtype=DOUBLE), q.exp()), 0.8),
    "half-Cauchy": (log_half_cauchy, lambda n: torch.randn(2, n, 1, dtype=DOUBLE).abs().log().diff(dim=0)[0],
                    lambda q: 2 / math.pi * torch.atan(q.exp()), 1.3),
    "normal": (normal, lambda n: torch.randn(n, 1, dtype=DOUBLE), torch.special.ndtr, 1.2),
}  # fmt: skip


def steps_from(kernel, case, iterations=5, chains=20_000, seed=1):
    target, exact, cdf, step_size = CASES[case]
    torch.manual_seed(seed)
    state = kernel.init(exact(chains), target)
    for _ in range(iterations):
        state, info = kernel.step(state, tuned(step_size, torch.ones(1, dtype=DOUBLE)), target)
    return state, info, kolmogorov(state.position[:, 0], cdf)


@pytest.mark.parametrize("case", CASES)
def test_exact_draws_stay_exact(case):
    state, info, distance = steps_from(HMC(steps=3), case)
    assert distance < KOLMOGOROV
    assert 0.3 < info.accept.mean() < 0.97  # the rule of acceptance is put to work
    torch.testing.assert_close(state.log_density, CASES[case][0](state.position)[0])


@pytest.mark.parametrize("case", CASES)
def test_without_metropolis_they_do_not(case, monkeypatch):
    monkeypatch.setattr(hmc, "gained", lambda new, old: torch.zeros_like(new))
    assert steps_from(HMC(steps=3), case)[2] > KOLMOGOROV


def test_moments_of_an_ill_conditioned_normal():
    """Standard deviations 1 and 1,000, correlation 0.9, wrong scale; mean and covariance of 20,000 chains."""
    deviation = torch.tensor([1.0, 1000.0], dtype=DOUBLE)
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=DOUBLE) * deviation * deviation[:, None]
    precision = torch.linalg.inv(covariance)

    def target(q):
        gradient = -q @ precision
        return 0.5 * (q * gradient).sum(-1), gradient

    torch.manual_seed(0)
    n = 20_000
    x = torch.randn(n, 2, dtype=DOUBLE) @ torch.linalg.cholesky(covariance).mT
    kernel = HMC(steps=5)
    state = kernel.init(x, target)
    for _ in range(4):
        state, info = kernel.step(state, tuned(0.5, 0.7 * deviation), target)
    assert info.accept.mean() < 0.95
    z = (state.position / deviation).mT
    assert (z.mean(1) * math.sqrt(n)).abs().max() < Z
    assert ((z.square().mean(1) - 1) * math.sqrt(n / 2)).abs().max() < Z
    assert ((z[0] * z[1]).mean() - 0.9).abs() * math.sqrt(n / (1 + 0.9**2)) < Z


@pytest.mark.parametrize("outside", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("gradient_outside", [math.nan, 1.0])
def test_what_is_not_finite_is_never_taken(outside, gradient_outside):
    """The half-normal: beyond the wall density and gradient are no numbers."""

    def target(q):
        inside = q > 0
        log_density = torch.where(inside, -0.5 * q.square(), outside).sum(-1)
        return log_density, torch.where(inside, -q, gradient_outside)

    torch.manual_seed(0)
    kernel = HMC(steps=3)
    state = kernel.init(torch.randn(20_000, 1, dtype=DOUBLE).abs(), target)
    for _ in range(5):
        state, info = kernel.step(state, tuned(0.4, torch.ones(1, dtype=DOUBLE)), target)
        assert all(t.isfinite().all() for t in (*state, info.accept, info.energy))
    assert kolmogorov(state.position[:, 0], lambda q: torch.erf(q / math.sqrt(2))) < KOLMOGOROV
    assert info.diverging.any()


@pytest.mark.parametrize("options", [{"steps": 0}, {"jitter": 1.0}, {"jitter": -0.1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        HMC(**options)
