"""The No-U-Turn Sampler: leaf by leaf the tree of a plain implementation, and draws of the right law.

The plain implementation keeps all points of a trajectory in a list and looks at all its parts. It is given the same
random numbers. False-alarm rates are 1e-6; chains begin with exact draws, so that they are independent draws at the end.
"""

import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pgen.algorithms.kernels import nuts, tree
from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.hmc import standard_normal
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.record import record
from tests.algorithms.kernel_laws import kolmogorov, log_gamma, log_half_cauchy

DOUBLE = torch.float64
Z = 4.9
KOLMOGOROV = 2.7


def tuned(step_size, scale):
    return Tuning(torch.tensor(step_size, dtype=DOUBLE), scale, torch.tensor(1.0, dtype=DOUBLE))


def ones(d):
    return torch.ones(d, dtype=DOUBLE)


def normal(q):
    return -0.5 * q.square().sum(-1), -q


def banana(q):
    """q₀ ~ N(0, 1), q₁ | q₀ ~ N(q₀², 1/4)."""
    off = (q[:, 1] - q[:, 0] ** 2) * 4
    gradient = torch.stack([-q[:, 0] + 2 * off * q[:, 0], -off], 1)
    return -0.5 * q[:, 0] ** 2 - off**2 / 8, gradient


def exact_banana(n):
    x, y = torch.randn(2, n, dtype=DOUBLE)
    return torch.stack([x, x**2 + y / 2], 1)


def banana_cdf(q):
    """Of q₁, by quadrature over q₀."""
    x = torch.linspace(-9, 9, 4001, dtype=DOUBLE)
    weight = torch.exp(-0.5 * x**2) * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    grid = torch.linspace(-4, 40, 2000, dtype=DOUBLE)
    values = (torch.special.ndtr((grid[:, None] - x**2) * 2) * weight).sum(-1)
    at = torch.searchsorted(grid, q).clamp(1, len(grid) - 1)
    share = (q - grid[at - 1]) / (grid[at] - grid[at - 1])
    return torch.lerp(values[at - 1], values[at], share)


# ---- the plain implementation


def plain(q, target, step_size, trajectories, max_depth=10):
    """One chain `[d]`: a list of points, looked through; draws `[trajectories, d]` and leaves of each."""
    draws, leaves = [], []
    p = standard_normal(q[None])[0]
    for _ in range(trajectories):
        q, count, p = plain_trajectory(q, p, target, step_size, max_depth)
        draws.append(q)
        leaves.append(count)
    return torch.stack(draws), leaves


def plain_trajectory(q, p, target, step_size, max_depth):
    def joint(q, p):
        return float(target(q[None])[0] - 0.5 * p @ p)

    def turns(part):
        (q0, p0), (q1, p1) = part[0], part[-1]
        return (q1 - q0) @ p0 <= 0 or (q1 - q0) @ p1 <= 0

    def any_part_turns(part):
        if len(part) == 1:
            return False
        half = len(part) // 2
        return turns(part) or any_part_turns(part[:half]) or any_part_turns(part[half:])

    points, begin = [(q, p)], joint(q, p)
    forward, weight, draw, count = True, 0.0, q, 0
    for depth in range(max_depth):
        branch, branch_weight, chosen, failed = [], -math.inf, None, False
        at = points[-1] if forward else points[0]
        for _ in range(2**depth):
            at = plain_leapfrog(at, target, step_size if forward else -step_size)
            count += 1
            gain = joint(*at) - begin
            gain = gain if math.isfinite(gain) else -math.inf
            log_u, log_v, log_coin = torch.rand(3, 1, dtype=DOUBLE).log().unbind()
            branch_weight = float(torch.logaddexp(torch.tensor(branch_weight), torch.tensor(gain)))
            if gain > branch_weight + log_u:
                chosen = at[0]
            branch = [*branch, at] if forward else [at, *branch]
            momentum = standard_normal(q[None])[0]
            # Aligned parts that end with this leaf: those of 2, 4, 8, ... leaves.
            size = 2
            while len(branch) % size == 0:
                failed = failed or any_part_turns(branch[-size:] if forward else branch[:size])
                size *= 2
            if failed or gain < -1000:
                return draw, count, momentum
        if branch_weight > weight + log_v:
            draw = chosen
        weight = float(torch.logaddexp(torch.tensor(weight), torch.tensor(branch_weight)))
        points = points + branch if forward else branch + points
        if turns(points):
            return draw, count, momentum
        if log_coin < math.log(0.5):
            forward = not forward
    return draw, count, momentum


def plain_leapfrog(at, target, step_size):
    q, p = at
    p = p + step_size / 2 * target(q[None])[1][0]
    q = q + step_size * p
    return q, p + step_size / 2 * target(q[None])[1][0]


@pytest.mark.parametrize(
    ("target", "d", "step_size", "max_depth"),
    [(normal, 1, 0.4, 10), (normal, 4, 0.05, 10), (normal, 2, 0.3, 2), (normal, 2, 0.3, 1), (banana, 2, 0.25, 10), (log_gamma, 3, 1.5, 10)],
)  # fmt: skip
def test_every_tree_is_that_of_the_plain_implementation(target, d, step_size, max_depth):
    """Same draws and numbers of leaves in 60 trajectories: every turn of every part was seen, and no other."""
    begin, n = 0.3 * ones(d), 60
    torch.manual_seed(0)
    draws, leaves = plain(begin, target, step_size, n, max_depth)
    torch.manual_seed(0)
    kernel = NUTS(max_depth=max_depth)
    _, found, trees = kernel.run(kernel.init(begin[None], target), tuned(step_size, ones(d)), target, n)
    assert trees.evaluations[:, 0].tolist() == leaves
    torch.testing.assert_close(found[:, 0], draws, rtol=1e-8, atol=1e-8)
    if max_depth == 10:
        assert len(set(leaves)) > 1  # trees of many shapes were seen


# ---- laws

CASES = {
    "normal": (normal, lambda n: torch.randn(n, 1, dtype=DOUBLE), torch.special.ndtr, 1.3),
    "gamma": (log_gamma, lambda n: torch.distributions.Gamma(2.0, torch.ones(n, 1, dtype=DOUBLE)).sample().log(),
              lambda q: torch.special.gammainc(torch.tensor(2.0, dtype=DOUBLE), q.exp()), 0.9),
    "half-Cauchy": (log_half_cauchy, lambda n: torch.randn(2, n, 1, dtype=DOUBLE).abs().log().diff(dim=0)[0],
                    lambda q: 2 / math.pi * torch.atan(q.exp()), 1.4),
    "banana": (banana, exact_banana, banana_cdf, 0.35),
}  # fmt: skip


def distance(case, iterations=3, chains=20_000, seed=1):
    target, exact, cdf, step_size = CASES[case]
    torch.manual_seed(seed)
    q = exact(chains)
    kernel = NUTS()
    _, draws, trees = kernel.run(
        kernel.init(q, target), tuned(step_size, ones(q.shape[1])), target, iterations
    )
    return kolmogorov(draws[-1][:, -1], cdf), trees.accept.mean()


@pytest.mark.parametrize("case", CASES)
def test_exact_draws_stay_exact(case):
    found, accept = distance(case)
    assert found < KOLMOGOROV
    assert 0.3 < accept < 0.97  # there was something to put right


@pytest.mark.parametrize("case", ["normal", "gamma", "half-Cauchy"])
def test_without_weights_they_do_not(case, monkeypatch):
    monkeypatch.setattr(tree, "gained", lambda new, old: torch.zeros_like(new))
    assert distance(case)[0] > KOLMOGOROV


def test_growing_on_one_side_alone_is_wrong(monkeypatch):
    monkeypatch.setattr(tree, "_LOG_HALF", -math.inf)
    assert distance("gamma", iterations=10)[0] > KOLMOGOROV


def test_overlooking_turns_of_parts_is_noticed(monkeypatch):
    """The plain implementation then grows other trees."""

    def careless(origin, levels, max_depth):
        plan = tree.planned(origin, levels, max_depth)
        plan.parts.fill_(-math.inf)
        return plan

    monkeypatch.setattr(nuts, "planned", careless)
    with pytest.raises(AssertionError):
        test_every_tree_is_that_of_the_plain_implementation(normal, 1, 0.4, 10)


@pytest.mark.parametrize("d", [2, 20])
def test_moments_of_correlated_normals_from_a_bad_start(d):
    """All chains begin at one point, far out; variances 1 to 1e4, correlations near 0.9; 4,000 chains after 60 draws.

    By then the slowest direction has forgotten its beginning; the chains are independent, so the z-scores are exact.
    """
    torch.manual_seed(0)
    n = 4_000 if d == 2 else 1_000
    deviation = torch.logspace(0, 2, d, dtype=DOUBLE)
    correlation = torch.full((d, d), 0.9, dtype=DOUBLE).fill_diagonal_(1.0)
    covariance = correlation * deviation * deviation[:, None]
    precision, root = torch.linalg.inv(covariance), torch.linalg.cholesky(covariance)

    def target(q):
        gradient = -q @ precision
        return 0.5 * (q * gradient).sum(-1), gradient

    kernel = NUTS()
    state = kernel.init((3 * deviation).expand(n, d).contiguous(), target)
    scale = root + 0.1 * torch.diag(deviation)  # dense, and not quite right
    state, _, trees = kernel.run(state, tuned(0.8, scale), target, 20)
    z = torch.linalg.solve_triangular(root, state.position.mT, upper=False)
    assert (z.mean(1) * math.sqrt(n)).abs().max() < Z
    assert ((z @ z.mT / n - torch.eye(d, dtype=DOUBLE)) * math.sqrt(n / 2)).abs().max() < Z * math.sqrt(2)
    assert not trees.diverging.any()


def test_a_scale_is_a_change_of_coordinates():
    torch.manual_seed(3)
    scale = torch.randn(3, 3, dtype=DOUBLE).tril() + 3 * torch.eye(3, dtype=DOUBLE)
    precision = torch.linalg.inv(scale @ scale.mT)
    x = torch.randn(50, 3, dtype=DOUBLE)

    def correlated(q):
        gradient = -q @ precision
        return 0.5 * (q * gradient).sum(-1), gradient

    found = []
    for target, q, s in ((normal, x, ones(3)), (correlated, x @ scale.mT, scale)):
        torch.manual_seed(0)
        found.append(NUTS().run(NUTS().init(q, target), tuned(0.4, s), target, 8)[1])
    torch.testing.assert_close(found[0] @ scale.mT, found[1])


def test_every_chain_gives_all_its_draws_however_long_its_trees():
    """Chains at the centre of a wide and of a narrow normal: trees differ, counts do not, laws neither."""
    width = torch.cat([ones(500), 30 * ones(500)])[:, None]

    def target(q):
        return -0.5 * (q / width).square().sum(-1), -q / width**2

    torch.manual_seed(0)
    kernel = NUTS()
    _, draws, trees = kernel.run(
        kernel.init(width * torch.randn(1000, 1, dtype=DOUBLE), target), tuned(0.9, ones(1)), target, 10
    )
    assert draws.shape == (10, 1000, 1)
    assert trees.evaluations[:, 500:].mean() > 5 * trees.evaluations[:, :500].mean()
    assert kolmogorov((draws[-1] / width)[:, 0], torch.special.ndtr) < KOLMOGOROV
    assert (trees.evaluations >= 2 ** (trees.depth - 1)).all()
    assert (trees.evaluations < 2**trees.depth).all()


def test_a_step_is_a_run_of_one_draw():
    kernel, q = NUTS(), torch.zeros(5, 2, dtype=DOUBLE)
    torch.manual_seed(0)
    state, trees = kernel.step(kernel.init(q, normal), tuned(0.5, ones(2)), normal)
    torch.manual_seed(0)
    _, draws, _ = kernel.run(kernel.init(q, normal), tuned(0.5, ones(2)), normal, 1)
    assert torch.equal(state.position, draws[0])
    assert all(t.shape == (5,) for t in trees)


def test_recorded_leaves_give_the_same_draws_and_are_recorded_once():
    made = []

    def wrap(leaf):
        made.append(leaf)
        return record(leaf)

    wrap = functools.cache(wrap)
    q = torch.ones(20, 2, dtype=DOUBLE)
    kernel, found = NUTS(), []
    for options in ((), (wrap,), (wrap,)):
        torch.manual_seed(0)
        state = kernel.init(q, banana)
        for _ in range(2):
            state, draws, _ = kernel.run(state, tuned(0.1, ones(2)), banana, 15, *options)
        found.append(draws)
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert len(made) == 1


def test_a_leaf_is_few_operations():
    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            return func(*args, **(kwargs or {}))

    q = torch.zeros(8, 3, dtype=DOUBLE)
    log_density, gradient = normal(q)
    leaf = tree.Leaf(lambda q: (log_density, gradient))
    trees, plan = tree.planted(q, log_density, gradient, ones(3), 4), tree.planned(q, 4, 10)
    tuning = tuned(0.5, ones(3))
    with Counting() as count:
        leaf(trees, plan, tuning)
    assert count.operations < 90


@pytest.mark.parametrize("outside", [-math.inf, math.nan])
def test_what_is_not_finite_is_never_taken(outside):
    def target(q):
        inside = q > 0
        return torch.where(inside, -0.5 * q.square(), outside).sum(-1), torch.where(inside, -q, math.nan)

    torch.manual_seed(0)
    kernel = NUTS()
    state = kernel.init(torch.randn(20_000, 1, dtype=DOUBLE).abs(), target)
    state, draws, trees = kernel.run(state, tuned(0.3, ones(1)), target, 4)
    assert all(t.isfinite().all() for t in (draws, *state, *trees))
    assert kolmogorov(draws[-1][:, 0], lambda q: torch.erf(q / math.sqrt(2))) < KOLMOGOROV
    assert trees.diverging.any()


def test_a_chain_that_cannot_move_harms_no_other():
    q = torch.zeros(10, 2, dtype=DOUBLE)
    q[3] = math.nan
    torch.manual_seed(0)
    _, draws, trees = NUTS().run(NUTS().init(q, normal), tuned(0.5, ones(2)), normal, 5)
    others = torch.arange(10) != 3
    assert draws[:, others].isfinite().all()
    assert draws[:, 3].isnan().all()
    assert trees.diverging[:, 3].all()
    assert not trees.diverging[:, others].any()


def test_ten_thousand_chains():
    torch.manual_seed(0)
    kernel = NUTS()
    state = kernel.init(exact_banana(10_000), banana)
    state, draws, _ = kernel.run(state, tuned(0.3, ones(2)), banana, 3)
    assert draws.shape == (3, 10_000, 2)
    assert kolmogorov(state.position[:, 0], torch.special.ndtr) < KOLMOGOROV
    assert kolmogorov(state.position[:, 1], banana_cdf) < KOLMOGOROV


def test_single_precision_stays_single():
    kernel, q = NUTS(), torch.zeros(50, 2)
    tuning = Tuning(torch.tensor(0.5), torch.ones(2), torch.tensor(1.0))
    _, draws, trees = kernel.run(kernel.init(q, normal), tuning, normal, 5)
    assert draws.dtype == trees.energy.dtype == torch.float32


@pytest.mark.parametrize("options", [{"max_depth": 0}, {"max_depth": 21}, {"look": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options.values()))}"):
        NUTS(**options)
