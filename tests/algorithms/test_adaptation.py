"""What a kernel learns about its target: exact where it can be, close where it is estimated."""

import functools
import math

import pytest
import torch

from pgen.algorithms.adaptation import warmup
from pgen.algorithms.adaptation.metric import (
    Spread,
    covariance,
    curvature,
    gathered,
    lost,
    nothing,
    scale_of,
)
from pgen.algorithms.adaptation.step_size import DualAveraging, crossing
from pgen.algorithms.adaptation.warmup import Warmup
from pgen.algorithms.kernels.hmc import HMC, initial
from pgen.algorithms.kernels.iterate import iterate
from pgen.algorithms.kernels.nuts import NUTS

DOUBLE = torch.float64


def normal_with(covariance):
    precision = torch.linalg.inv(covariance)

    def target(q):
        gradient = -q @ precision
        return 0.5 * (q * gradient).sum(-1), gradient

    return target


def normal(q):
    return -0.5 * q.square().sum(-1), -q


def autoregressive(d, rho):
    i = torch.arange(d, dtype=DOUBLE)
    return rho ** (i[:, None] - i).abs()


def condition(scale, exact):
    """How far from a sphere the target is once whitened: 1 is perfect."""
    root = torch.diag(scale) if scale.dim() == 1 else scale
    values = torch.linalg.svdvals(
        torch.linalg.solve_triangular(root, torch.linalg.cholesky(exact), upper=False)
    )
    return (values[0] / values[-1]).item()


def warmed(kernel, target, position, seed=0, **options):
    torch.manual_seed(seed)
    driver = Warmup(kernel, **options)
    return driver.advance(driver.init(position, target), target, len(driver.plan))


# ---- step size


@pytest.mark.parametrize("accept", [0.574, 0.651, 0.8])
def test_dual_averaging_finds_the_step_size(accept):
    """Under noise, from far off; the acceptance probability of a step ε is exp(-ε²)."""
    torch.manual_seed(0)
    rule = DualAveraging(accept)
    at = rule.init(torch.tensor(100.0, dtype=DOUBLE))
    for _ in range(500):
        at = rule.update(at, torch.exp(-(at.step_size**2)) + 0.1 * torch.randn((), dtype=DOUBLE))
    assert abs(at.averaged - math.sqrt(-math.log(accept))) < 0.03


def test_dual_averaging_takes_no_number_for_no_acceptance():
    rule = DualAveraging()
    at = rule.init(torch.tensor(1.0))
    assert (
        rule.update(at, torch.tensor(math.nan)).step_size == rule.update(at, torch.tensor(0.0)).step_size < 1
    )


@pytest.mark.parametrize("accept", [0.0, 1.0, 1.5])
def test_an_impossible_acceptance_is_refused(accept):
    with pytest.raises(ValueError, match=f"got {accept}"):
        DualAveraging(accept)
    with pytest.raises(ValueError, match=f"got {accept}"):
        Warmup(NUTS(), accept=accept)


@pytest.mark.parametrize("guess", [1e-6, 1.0, 1e6])
def test_the_first_step_size_does_not_depend_on_the_guess(guess):
    torch.manual_seed(0)
    state = initial(
        1e-3 * torch.randn(200, 10, dtype=DOUBLE), normal_with(1e-6 * torch.eye(10, dtype=DOUBLE))
    )
    step_size = crossing(
        state,
        torch.ones(10, dtype=DOUBLE),
        normal_with(1e-6 * torch.eye(10, dtype=DOUBLE)),
        torch.tensor(guess, dtype=DOUBLE),
    )
    assert 3e-4 < step_size < 5e-3  # the scale is 1e-3; a factor of two either way of where 0.8 are accepted


def test_chains_that_cannot_move_have_no_say():
    position = torch.randn(20, 2, dtype=DOUBLE)
    position[:15] = math.nan
    step_size = crossing(
        initial(position, normal), torch.ones(2, dtype=DOUBLE), normal, torch.tensor(1e-3, dtype=DOUBLE)
    )
    assert 0.3 < step_size < 4


# ---- metric


@pytest.mark.parametrize("dense", [True, False])
def test_moments_in_portions_are_those_of_all(dense):
    torch.manual_seed(0)
    draws = torch.randn(30, 7, 3, dtype=DOUBLE) * torch.tensor([1.0, 10.0, 1e-3], dtype=DOUBLE) + 1e4
    moments = nothing(draws[0], dense)
    for portion in draws.split([1, 4, 20, 5]):
        moments = gathered(moments, portion)
    expected = torch.cov(draws.reshape(-1, 3).mT)
    torch.testing.assert_close(
        covariance(moments).covariance, expected if dense else expected.diagonal(), rtol=1e-6, atol=0
    )


def test_moments_leave_out_what_they_are_told_to():
    torch.manual_seed(0)
    draws = torch.randn(20, 6, 2, dtype=DOUBLE)
    kept = torch.tensor([True, True, False, True, True, True])
    draws[:10, 2] = math.nan
    moments = gathered(gathered(nothing(draws[0], dense=True), draws[:10], kept), draws[10:])
    counted = torch.cat([draws[:10, kept].reshape(-1, 2), draws[10:].reshape(-1, 2)])
    torch.testing.assert_close(covariance(moments).covariance, torch.cov(counted.mT))


@pytest.mark.parametrize("correlated", [0.0, 0.95])
def test_the_worth_of_draws_is_how_many_are_independent(correlated):
    """First-order autoregressive chains: n draws are worth n (1 - ρ) / (1 + ρ)."""
    torch.manual_seed(0)
    n, chains = 400, 64
    draws = [torch.randn(chains, 5, dtype=DOUBLE)]
    for _ in range(n - 1):
        draws.append(
            correlated * draws[-1] + math.sqrt(1 - correlated**2) * torch.randn(chains, 5, dtype=DOUBLE)
        )
    worth = covariance(gathered(nothing(draws[0], dense=True), torch.stack(draws))).effective
    expected = n * chains * (1 - correlated) / (1 + correlated)
    assert 0.6 * expected < worth <= n * chains


@pytest.mark.parametrize("dense", [True, False])
def test_gradients_tell_the_scale_of_a_normal_from_any_points(dense):
    """Points from a cube, which know nothing of the target."""
    torch.manual_seed(0)
    d = 6
    deviation = torch.logspace(-1, 1, d, dtype=DOUBLE)
    correlation = torch.full((d, d), 0.9 if dense else 0.0, dtype=DOUBLE).fill_diagonal_(1.0)
    exact = correlation * deviation * deviation[:, None]
    points = torch.rand(40, d, dtype=DOUBLE) * 4 - 2
    _, gradient = normal_with(exact)(points)
    found = scale_of(curvature(points, gradient, dense), dense)
    assert condition(found, exact) < 1.001  # a ridge of 1e-4 beside eigenvalues of 0.1
    draws_alone = scale_of(covariance(gathered(nothing(points, dense), points[None])), dense)
    assert condition(draws_alone, exact) > 30


def test_correlations_are_kept_where_there_are_some():
    torch.manual_seed(0)
    d, n = 20, 4_000

    def auto(exact, n):
        draws = torch.randn(1, n, d, dtype=DOUBLE) @ torch.linalg.cholesky(exact).mT
        return scale_of(covariance(gathered(nothing(draws[0], dense=True), draws)))

    strong, none = autoregressive(d, 0.9), torch.eye(d, dtype=DOUBLE)
    assert auto(strong, n).dim() == 2
    assert condition(auto(strong, n), strong) < 1.5
    assert auto(none, n).dim() == 1  # noise is not taken for correlation
    assert auto(strong, 30).dim() == 1  # too few to tell


def test_scales_are_sound_whatever_the_draws():
    for found in (torch.zeros(3), torch.full((3,), math.nan), torch.full((3,), math.inf)):
        assert torch.equal(scale_of(Spread(found, torch.tensor(10.0))), torch.ones(3))
    flat = torch.ones(3, 3)  # of rank one
    scale = scale_of(Spread(flat, torch.tensor(1e6)), dense=True)
    assert scale.isfinite().all()
    assert (scale.diagonal() > 0 if scale.dim() == 2 else scale > 0).all()


def test_chains_far_below_the_others_are_lost():
    torch.manual_seed(0)
    usual = -torch.distributions.Gamma(50.0, 1.0).sample((60,))
    assert not lost(usual).any()
    found = lost(torch.cat([usual, torch.tensor([-1e4, -math.inf, math.nan])]))
    assert found.tolist() == [False] * 60 + [True] * 3


def test_a_mode_of_lower_density_is_not_abandoned():
    """A wide mode, 40 nats below a narrow one, in 20 dimensions: it may hold all the mass. One 1e5 below does not."""
    torch.manual_seed(0)
    position = torch.randn(64, 20, dtype=DOUBLE)
    log_density = -torch.randn(64, dtype=DOUBLE).abs()
    log_density[:10] -= 40.0
    log_density[10] = -1e5
    moved = (warmup._restarted(position, log_density) != position).any(-1)
    assert moved.nonzero().squeeze(-1).tolist() == [10]


# ---- warm-up

HARD = {
    "correlated": (autoregressive(50, 0.99), 64, 100),
    "badly scaled": (torch.full((6, 6), 0.999, dtype=DOUBLE).fill_diagonal_(1.0)
                     * torch.logspace(-2, 2, 6, dtype=DOUBLE) * torch.logspace(-2, 2, 6, dtype=DOUBLE)[:, None], 64, 100),
}  # fmt: skip


@pytest.mark.parametrize("case", HARD)
def test_warm_up_makes_hard_normals_easy(case):
    exact, chains, iterations = HARD[case]
    torch.manual_seed(0)
    target, kernel = normal_with(exact), NUTS()
    begin = torch.rand(chains, len(exact), dtype=DOUBLE) * 4 - 2
    at = warmed(kernel, target, begin, iterations=iterations)
    assert condition(at.tuning.scale, exact) < 2.5
    _, draws, trees = kernel.run(at.state, at.tuning, target, 20)
    assert abs(trees.accept.mean() - 0.8) < 0.07
    assert trees.depth.max() <= 5
    # The last draws of 64 independent chains: each variance within 5 standard errors of the exact one.
    z = draws[-1] / exact.diagonal().sqrt()
    assert (z.square().mean(0) - 1).abs().max() < 5.5 * math.sqrt(2 / chains)


def test_without_learning_the_scale_it_stays_hard():
    exact, chains, _ = HARD["correlated"]
    at = warmed(
        NUTS(max_depth=5),
        normal_with(exact),
        torch.rand(chains, 50, dtype=DOUBLE) * 4 - 2,
        iterations=30,
        metric="unit",
    )
    assert condition(at.tuning.scale, exact) > 50


@pytest.mark.parametrize("accept", [0.651, 0.9])
def test_any_kernel_is_warmed_up_to_its_own_acceptance(accept):
    exact = (
        autoregressive(5, 0.9)
        * torch.logspace(-2, 2, 5, dtype=DOUBLE)
        * torch.logspace(-2, 2, 5, dtype=DOUBLE)[:, None]
    )
    torch.manual_seed(0)
    target, kernel = normal_with(exact), HMC(steps=5)
    at = warmed(kernel, target, torch.randn(64, 5, dtype=DOUBLE), iterations=200, accept=accept)
    assert condition(at.tuning.scale, exact) < 2
    _, _, info = iterate(kernel, at.state, at.tuning, target, 50)
    assert abs(info.accept.mean() - accept) < 0.07


def test_chains_that_begin_nowhere_do_not_ruin_the_scale():
    torch.manual_seed(0)
    begin = torch.randn(64, 3, dtype=DOUBLE)
    begin[:3] = 1e7
    begin[3] = math.nan
    at = warmed(NUTS(), normal, begin, iterations=60)
    assert condition(at.tuning.scale, torch.eye(3, dtype=DOUBLE)) < 1.3
    assert (at.tuning.scale - 1).abs().max() < 0.2
    assert at.state.position.abs().max() < 10


def test_what_is_stopped_goes_on_bit_for_bit():
    driver, seeds = Warmup(NUTS(), iterations=40), torch.arange(100)

    def go_on(at, blocks):
        for _ in range(blocks):
            torch.manual_seed(int(seeds[at.block]))
            at = driver.advance(at, normal)
        return at

    torch.manual_seed(0)
    at = go_on(driver.init(torch.randn(16, 3, dtype=DOUBLE), normal), 6)
    tensors = functools.partial(
        torch.utils._pytree.tree_map, lambda t: t.clone() if isinstance(t, torch.Tensor) else t
    )
    saved = tensors(at)
    left = len(driver.plan) - 6
    once, again = go_on(at, left), go_on(saved, left)
    assert driver.finished(once)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (once, again)), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_the_plan_adds_up_and_is_reported_block_by_block():
    for iterations in (20, 57, 150, 1000):
        plan = Warmup(NUTS(), iterations=iterations).plan
        assert sum(block.length for block in plan) == iterations
        assert [block.ends for block in plan].count("all") == 1
        assert plan[-1].ends == "all"
    driver, seen = Warmup(HMC(steps=2), iterations=20), []
    torch.manual_seed(0)
    at = driver.advance(
        driver.init(torch.randn(8, 2), normal), normal, 10_000, progress=lambda at: seen.append(at.block)
    )
    assert seen == list(range(1, len(driver.plan) + 1))
    assert driver.advance(at, normal) is at


@pytest.mark.parametrize(
    ("options", "said"), [({"iterations": 5}, "at least 20, got 5"), ({"metric": "full"}, "auto.*got 'full'")]
)
def test_impossible_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Warmup(NUTS(), **options)
