"""MEADS: generalised Hamiltonian Monte Carlo leaves targets alone; its warm-up reads eigenvalues right."""

import functools
from dataclasses import dataclass

import pytest
import torch

from pgen.algorithms.adaptation.chees import whitened
from pgen.algorithms.adaptation.meads import MEADSWarmup, largest_eigenvalue
from pgen.algorithms.kernels.hmc import trajectory
from pgen.algorithms.kernels.iterate import iterate
from pgen.algorithms.kernels.meads import MEADS, Persistent
from pgen.algorithms.record import record
from pgen.testing.statistics import StatisticalFailure, assert_distribution, assert_mean, assert_moments
from tests.algorithms.kernel_laws import FLOAT, Half, LogGamma, Normal, assert_invariant, tuned


@pytest.mark.parametrize("scale", ["diagonal", "dense"])
def test_a_normal_target_is_left_invariant(scale):
    target = Normal()
    step = {"diagonal": 0.6, "dense": 1.2}[scale]
    scale = {"diagonal": target.covariance.diagonal().sqrt(), "dense": target.root}[scale]
    assert_invariant(MEADS(), target, tuned(step, scale, 2.0))


@pytest.mark.parametrize("length", [0.3, 2.0, 20.0])
def test_a_skewed_target_is_left_invariant(length):
    _, info = assert_invariant(MEADS(), LogGamma(), tuned(1.0, torch.ones(2, **FLOAT), length), iterations=30)
    assert 0.3 < info.accept.mean() < 0.95  # so that the decision matters


def test_a_proposal_that_is_not_a_number_is_refused():
    draws, info = assert_invariant(MEADS(), Half(), tuned(0.8, torch.ones(1, **FLOAT), 2.0))
    assert draws.max() < 1
    assert info.diverging.any()


def test_momenta_stay_normal_and_thresholds_uniform():
    target, tuning = LogGamma(), tuned(1.0, torch.ones(2, **FLOAT), 2.0)
    state, _, _ = iterate(MEADS(), MEADS().init(target.draw(20_000), target), tuning, target, 12)
    assert_moments(state.momentum, 0.0, 1.0)
    assert_distribution(state.threshold, lambda u: ((u + 1) / 2).clamp(0, 1))


def test_rejections_come_in_clusters():
    """With a threshold drawn anew they would be as likely after a rejection as after an acceptance."""
    target, tuning = LogGamma(), tuned(1.0, torch.ones(2, **FLOAT), 20.0)
    _, draws, _ = iterate(MEADS(), MEADS().init(target.draw(2000), target), tuning, target, 60)
    stayed = (draws[1:] == draws[:-1]).all(-1).double()
    after = (stayed[1:] * stayed[:-1]).mean() / stayed.mean()
    assert after > 1.4 * stayed.mean()


def test_thinning_drops_draws_and_changes_nothing_else():
    target, tuning = LogGamma(), tuned(0.5, torch.ones(2, **FLOAT), 2.0)
    start = target.draw(5)
    torch.manual_seed(0)
    _, whole, every = MEADS().run(MEADS().init(start, target), tuning, target, 12)
    torch.manual_seed(0)
    _, thinned, info = MEADS(thin=4).run(MEADS().init(start, target), tuning, target, 3)
    assert torch.equal(thinned, whole[3::4])
    assert torch.equal(info.evaluations, torch.full((3, 5), 4.0, **FLOAT))
    torch.testing.assert_close(info.accept, every.accept.reshape(3, 4, 5).mean(1))
    assert torch.equal(info.energy, every.energy[3::4])


def test_all_there_is_is_in_the_state():
    target, tuning = LogGamma(), tuned(0.5, torch.ones(2, **FLOAT), 2.0)
    start = target.draw(5)
    torch.manual_seed(0)
    _, whole, _ = MEADS().run(MEADS().init(start, target), tuning, target, 7)
    torch.manual_seed(0)
    half, first, _ = MEADS().run(MEADS().init(start, target), tuning, target, 3)
    _, second, _ = MEADS().run(Persistent(*(t.clone() for t in half)), tuning, target, 4)
    assert torch.equal(whole, torch.cat([first, second]))


def test_recorded_steps_draw_the_same():
    target, warmup = LogGamma(), MEADSWarmup(iterations=16)
    drawn = []
    for wrap in (lambda fn: fn, functools.cache(record)):
        torch.manual_seed(0)
        tuned = warmup.begin(torch.randn(16, 2, **FLOAT), target)
        state, tuning = warmup.finish(warmup.advance(tuned, target, 16, wrap))
        drawn.append(MEADS().run(state, tuning, target, 5, wrap)[1])
    torch.testing.assert_close(*drawn)


# --- warm-up ---


def test_the_eigenvalue_estimate_lies_between_the_mean_and_the_largest():
    spread = torch.tensor([10.0, 1, 1, 1, 1, 1], **FLOAT)
    rows = torch.randn(4000, 6, **FLOAT) * spread
    found, values = largest_eigenvalue(rows), spread.square()
    assert values.mean() < found <= values.max()
    assert found == pytest.approx(float(values.square().sum() / values.sum()), rel=0.1)
    torch.testing.assert_close(
        largest_eigenvalue(rows[:5]), largest_eigenvalue(torch.stack([rows[:5]] * 2))[1]
    )
    whole = rows[:5] @ rows[:5].T  # pair by pair, by the definition
    pairs = (whole.square().sum() - whole.diagonal().square().sum()) / 20
    torch.testing.assert_close(
        largest_eigenvalue(rows[:5]), torch.maximum(pairs, whole.trace() ** 2 / 150) * 5 / whole.trace()
    )


@pytest.mark.parametrize("rows", [8, 32, 200])
def test_few_rows_do_not_make_eigenvalues_large(rows):
    """All are 1; the moments of the rows themselves would say `1 + 60 / rows`."""
    found = largest_eigenvalue(torch.randn(20_000 // rows, rows, 60, **FLOAT))
    assert float(found.mean()) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("chains", [32, 128])
def test_few_chains_find_the_step_of_many(chains):
    target = Normal(dimensions=60, correlation=0.0)
    warmup = MEADSWarmup(iterations=100)
    tuned_ = warmup.begin(target.draw(chains), target, scale=target.root)
    _, tuning = warmup.finish(warmup.advance(tuned_, target, 100))
    assert 0.42 < float(tuning.step_size) <= 0.5
    assert 0.7 < float(tuning.length) < 1.4


def test_the_step_is_half_the_reciprocal_root_of_the_eigenvalue():
    """Whitened exactly, in few dimensions with many chains, all eigenvalues are 1: ε = 1/2, and 1/γ = 1."""
    target = Normal(2)
    warmup = MEADSWarmup(iterations=60)
    tuned_ = warmup.begin(target.draw(4000), target, scale=target.root)
    _, tuning = warmup.finish(warmup.advance(tuned_, target, 60))
    assert tuning.step_size == pytest.approx(0.5, rel=0.05)
    assert tuning.length == pytest.approx(1.0, rel=0.05)


def test_warm_up_finds_the_scale_and_the_target():
    target = Normal(dimensions=10, correlation=0.9)
    warmup = MEADSWarmup(iterations=200)
    tuned_ = warmup.begin(torch.rand(64, 10, **FLOAT) * 4 - 2, target)
    state, tuning = warmup.finish(warmup.advance(tuned_, target, 200))
    values = torch.linalg.eigvalsh(whitened(tuning.scale, whitened(tuning.scale, target.covariance).T))
    assert values.min() > 0.6
    assert values.max() < 1.6
    _, draws, _ = MEADS(thin=20).run(state, tuning, target, 30)
    assert_moments(draws[3:].flatten(0, 1), target.mean, target.covariance.diagonal().sqrt())


def test_warm_up_in_blocks_is_the_same_warm_up():
    target, warmup = LogGamma(), MEADSWarmup(iterations=50)
    start = target.draw(32)
    found = []
    for blocks in ([50], [7, 20, 23]):
        torch.manual_seed(5)
        tuned_ = warmup.begin(start, target)
        for block in blocks:
            tuned_ = warmup.advance(tuned_, target, block)
        found.append(warmup.finish(tuned_))
    (one, tuning), (other, same) = found
    torch.testing.assert_close(one.position, other.position)  # sums in another order: equal to rounding
    torch.testing.assert_close(tuning.scale, same.scale)


def test_chains_that_make_no_folds_are_refused():
    target = Normal()
    with pytest.raises(ValueError, match="such as 8"):
        MEADSWarmup().begin(target.draw(6), target)
    with pytest.raises(ValueError, match="such as 12"):
        MEADSWarmup().begin(target.draw(13), target)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MEADS(thin=0), "at least 1 iteration"),
        (lambda: MEADSWarmup(folds=1), "2 folds"),
        (lambda: MEADSWarmup(iterations=0), "at least 1"),
        (lambda: MEADSWarmup(cautious=0.0), "positive"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# --- broken specimens ---


@dataclass(frozen=True)
class KeepsItsMomentum(MEADS):
    """Goes on in the same direction after a rejection."""

    def step(self, state, tuning, target):
        new, info = MEADS.step(self, state, tuning, target)
        stayed = (new.position == state.position).all(-1, keepdim=True)
        return new._replace(momentum=torch.where(stayed, -new.momentum, new.momentum)), info

    run = None


@dataclass(frozen=True)
class KeepsItsThreshold(MEADS):
    """Does not divide u by the ratio of densities."""

    def step(self, state, tuning, target):
        new, info = MEADS.step(self, state, tuning, target)
        renewed = -torch.expm1(-2 * tuning.step_size / tuning.length)
        return new._replace(threshold=torch.remainder(state.threshold + 1 + renewed / 2, 2) - 1), info

    run = None


@dataclass(frozen=True)
class AlwaysAccepts(MEADS):
    def step(self, state, tuning, target):
        end = trajectory(
            (state.position, torch.randn_like(state.momentum), state.gradient, state.log_density),
            tuning.step_size,
            tuning.scale,
            target,
            1,
        )
        return Persistent(*end, state.threshold), MEADS.step(self, state, tuning, target)[1]

    run = None


@pytest.mark.parametrize("kernel", [KeepsItsMomentum(), KeepsItsThreshold(), AlwaysAccepts()])
def test_a_kernel_that_does_not_leave_the_target_invariant_is_noticed(kernel):
    with pytest.raises(StatisticalFailure):
        assert_invariant(
            kernel, LogGamma(), tuned(1.2, torch.ones(2, **FLOAT), 2.0), iterations=40, chains=10_000
        )


def test_the_mean_of_many_short_chains_is_right():
    target = LogGamma()
    start = MEADS().init(target.draw(8000), target)
    _, draws, _ = MEADS(thin=2).run(start, tuned(0.7, torch.ones(2, **FLOAT), 1.0), target, 10)
    assert_mean(target.functions(draws).mean(0), 0.0)
