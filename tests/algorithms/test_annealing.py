"""Annealed importance sampling and tempered SMC against evidences in closed form.

The main target is a linear-Gaussian model with 20 latents: evidence, posterior and exact posterior draws are known.
Chains are independent, and so are islands; every comparison is with a standard error, at 1e-6 or less.
"""

import math

import pytest
import torch

from pgen.algorithms.annealing import (
    AnnealedImportance,
    TemperedSMC,
    cloud_scale,
    evidence_above,
    evidence_below,
    next_beta,
    systematic,
)
from pgen.algorithms.kernels.base import untuned
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import MALA, ULA
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.algorithms.path import Frames, Path, Walk, even_ladder, gaussian
from pgen.algorithms.record import record
from pgen.testing.statistics import (
    StatisticalFailure,
    assert_distribution,
    assert_estimate,
    assert_lower_bound,
    assert_mean,
)

double = {"dtype": torch.float64}


class Linear:
    """y = A q + noise, q ~ N(0, I), noise of standard deviation 1/2: everything in closed form."""

    noise = 0.5

    def __init__(self, size=20):
        source = torch.Generator().manual_seed(3)
        self.size = size
        self.matrix = torch.randn(size, size, generator=source, **double) / math.sqrt(size)
        self.matrix = self.matrix + torch.eye(size, **double)
        self.data = self.matrix @ torch.randn(size, generator=source, **double) + 0.3
        self.reference, self.sample = gaussian(torch.zeros(size, **double), torch.ones(size, **double))
        marginal = self.matrix @ self.matrix.T + self.noise**2 * torch.eye(size, **double)
        law = torch.distributions.MultivariateNormal(torch.zeros(size, **double), marginal)
        self.log_evidence = law.log_prob(self.data)
        precision = torch.eye(size, **double) + self.matrix.T @ self.matrix / self.noise**2
        self.root = torch.linalg.cholesky(precision.inverse())
        self.mean = precision.inverse() @ self.matrix.T @ self.data / self.noise**2

    def __call__(self, q):
        base, slope = self.reference(q)
        error = (self.data - q @ self.matrix.T) / self.noise
        constant = self.size * math.log(math.sqrt(2 * math.pi) * self.noise)
        return base - error.square().sum(1) / 2 - constant, slope + error @ self.matrix / self.noise

    @property
    def path(self):
        return Path(self, self.reference, self.sample)

    def draw(self, n):
        return self.mean + torch.randn(n, self.size, **double) @ self.root.T

    def whiten(self, q):
        return torch.linalg.solve_triangular(self.root, (q - self.mean).mT, upper=False).mT


@pytest.fixture(scope="module")
def model():
    return Linear()


@pytest.fixture(scope="module")
def arrived(model):
    """Many small islands: their spread, which is the error bar, is then well known itself."""
    torch.manual_seed(5)
    smc = TemperedSMC(MALA(), particles=128, islands=100, moves=4, keep=0.8)
    return smc.run(model.path, record=record)


# --- tempered SMC ---


def test_smc_finds_the_evidence(model, arrived):
    found = evidence_below(arrived.log_evidence)
    assert 0 < found.stderr < 0.15
    # adaptation couples the islands weakly: an allowance of a twentieth of a nat
    assert_estimate(found.estimate, model.log_evidence, found.stderr.square().add(0.05**2).sqrt())
    assert_lower_bound(found.bound, model.log_evidence, found.bound_stderr)


def test_smc_draws_the_posterior(model, arrived):
    """Islands are independent; an island's N draws are not."""
    z = model.whiten(arrived.position)
    assert_mean(
        z.mean(1), 0.0, alpha=1e-8, what="mean"
    )  # for normals; 1e-6 for Student's 99 degrees of freedom
    assert_mean(z.square().mean(1), 1.0, alpha=1e-8, slack=0.05, what="variance")
    cross = torch.einsum("gni,gnj->gij", z, z) / z.shape[1] - torch.eye(model.size)
    assert_mean(cross, 0.0, alpha=1e-8, slack=0.05, what="covariance")
    assert arrived.draws().shape == (12_800, 20)


def test_smc_climbs_evenly(arrived):
    beta = arrived.ladder.beta
    assert beta[0] == 0
    assert beta[-1] == 1
    assert (beta[1:] > beta[:-1]).all()
    assert 5 < len(beta) < 60
    assert len(arrived.ladder.tuning.step_size) == len(beta) - 1
    # the step size follows the acceptance wherever it has had time to
    assert (arrived.accept[3:] - 0.574).abs().max() < 0.2


@pytest.mark.parametrize("kernel", [RandomWalk(), HMC(steps=5)])
def test_smc_with_other_kernels(kernel):
    model = Linear(3)
    accept = 0.3 if isinstance(kernel, RandomWalk) else 0.8
    smc = TemperedSMC(kernel, particles=100, islands=100, accept=accept, threshold=1.0)
    arrived = smc.run(model.path)
    found = evidence_below(arrived.log_evidence)
    assert_estimate(found.estimate, model.log_evidence, found.stderr.square().add(0.02**2).sqrt())
    assert_mean(model.whiten(arrived.position).mean(1), 0.0, alpha=1e-8, slack=0.02)


def test_smc_weighs_far_modes():
    """Two modes at -6 and 6, one three times as narrow and as heavy: no kernel crosses, weights must do it."""

    def target(q):
        q = q.detach().requires_grad_()
        left = math.log(0.25) - (q + 6).square().sum(1) / 2 - math.log(2 * math.pi)
        right = math.log(0.75 * 9) - 9 * (q - 6).square().sum(1) / 2 - math.log(2 * math.pi)
        value = torch.logaddexp(left, right)
        return value.detach(), torch.autograd.grad(value.sum(), q)[0]

    reference, sample = gaussian(torch.zeros(2, **double), torch.full((2,), 8.0, **double))
    arrived = TemperedSMC(MALA(), particles=200, islands=100).run(Path(target, reference, sample))
    weight = arrived.log_evidence.exp()
    share = (arrived.position[..., 0] > 0).double().mean(1)
    assert_mean(weight * (share - 0.75), 0.0, alpha=1e-8, slack=0.01)  # the ratio of unbiased estimates
    assert_estimate(*_pooled(arrived.log_evidence, 0.0))


def test_a_target_with_holes():
    """Half of the reference is impossible: Z = 1/2, densities are -inf and gradients NaN there."""
    reference, sample = gaussian(torch.zeros(1, **double), torch.ones(1, **double))

    def target(q):
        value, gradient = reference(q)
        dead = q[:, 0] < 0
        return value.masked_fill(dead, -math.inf), gradient.masked_fill(dead.unsqueeze(1), math.nan)

    path = Path(target, reference, sample)
    arrived = TemperedSMC(MALA(), particles=200, islands=100).run(path)
    assert_estimate(*_pooled(arrived.log_evidence, -math.log(2)))
    assert (arrived.position > 0).all()
    ladder = even_ladder(2, untuned(arrived.position[0], 0.5))
    weights = AnnealedImportance(MALA()).ascend(path, ladder, 4000).log_weight
    assert_mean(weights.exp(), 0.5)


def test_an_island_may_be_lost():
    """Ten particles, and one in twenty hits the target: most islands miss it altogether, none spoils the others."""
    reference, sample = gaussian(torch.zeros(1, **double), torch.ones(1, **double))

    def target(q):
        value, gradient = reference(q)
        return value.masked_fill(q[:, 0] < 1.645, -math.inf), gradient

    arrived = TemperedSMC(MALA(), particles=10, islands=1000).run(Path(target, reference, sample))
    assert_mean(arrived.log_evidence.exp(), 0.05, slack=1e-4)
    assert (arrived.draws() > 1.6).all()


def test_smc_gives_up_with_advice(model):
    with pytest.raises(RuntimeError, match="reference is too far"):
        TemperedSMC(MALA(), particles=64, islands=1, longest=2).run(model.path)


# --- annealed importance sampling ---


@pytest.fixture(scope="module")
def both_ways(model, arrived):
    torch.manual_seed(6)
    ais, ladder = AnnealedImportance(MALA(), moves=2), arrived.ladder.finer(12)
    up = ais.ascend(model.path, ladder, 1600, record=record)
    down = ais.descend(model.path, ladder, model.draw(1600), record=record)
    return up, down


def test_bounds_enclose_the_evidence(model, both_ways):
    up, down = both_ways
    below, above = evidence_below(up.log_weight), evidence_above(down.log_weight)
    assert_lower_bound(below.bound, model.log_evidence, below.bound_stderr)
    assert_lower_bound(-above.bound, -model.log_evidence, above.bound_stderr)
    assert below.bound + 5 * below.bound_stderr < model.log_evidence  # strictly: the check below can fail
    assert above.bound - 5 * above.bound_stderr > model.log_evidence
    assert above.bound - below.bound < 2
    with pytest.raises(StatisticalFailure):  # the bounds exchanged
        assert_lower_bound(above.bound, model.log_evidence, above.bound_stderr)


def test_weights_are_unbiased_both_ways(model, both_ways):
    """Weights spread over a nat: their mean is normal enough in groups; 80 groups of 20."""
    for sign, run in zip((1, -1), both_ways, strict=True):
        weight = (sign * (run.log_weight - model.log_evidence)).exp().reshape(80, -1).mean(1)
        assert_mean(weight, 1.0, alpha=1e-8)
        found = evidence_below(run.log_weight) if sign == 1 else evidence_above(run.log_weight)
        assert_estimate(found.estimate, model.log_evidence, found.stderr)


def test_short_ladders_loosen_bounds_only():
    model = Linear(3)
    tuning, ais, gaps = untuned(model.draw(1), 0.3), AnnealedImportance(MALA()), []
    for ladder in (even_ladder(4, tuning), even_ladder(4, tuning).finer(10)):
        up = evidence_below(ais.ascend(model.path, ladder, 1000).log_weight)
        down = evidence_above(ais.descend(model.path, ladder, model.draw(1000)).log_weight)
        assert up.bound < model.log_evidence < down.bound
        gaps.append(down.bound - up.bound)
    assert gaps[1] < gaps[0] / 2


def test_one_rung_is_importance_sampling(model):
    ladder = even_ladder(1, untuned(model.draw(1)))
    torch.manual_seed(0)
    found = AnnealedImportance(MALA()).ascend(model.path, ladder, 50).log_weight
    torch.manual_seed(0)
    q = model.sample(50)
    torch.testing.assert_close(found, model(q)[0] - model.reference(q)[0])


def test_finer_ladders_pass_through_the_same_temperatures():
    coarse = even_ladder(3, untuned(torch.zeros(1, 2), 0.3))
    coarse = coarse._replace(tuning=coarse.tuning._replace(step_size=torch.tensor([0.1, 0.2, 0.3])))
    fine = coarse.finer(4)
    torch.testing.assert_close(fine.beta[::4], coarse.beta)
    assert (fine.beta[1:] > fine.beta[:-1]).all()
    assert fine.tuned(5).step_size == coarse.tuned(2).step_size


# --- specimens that must fail ---


def test_the_check_fails_a_kernel_without_correction():
    """Of ULA with whitened steps of 1 the posterior is a third too wide."""
    model, settings = Linear(3), {"particles": 100, "islands": 100, "accept": 0.999, "step_size": 1.0}
    biased = TemperedSMC(ULA(), **settings).run(model.path)
    with pytest.raises(StatisticalFailure):
        assert_mean(model.whiten(biased.position).square().mean(1), 1.0, alpha=1e-8, slack=0.05)


class OwnScale(TemperedSMC):
    """Each island moves by the scale of the whole cloud, its own particles among it."""

    def _scales(self, position, log_weight):
        pooled, frames = super()._scales(position, log_weight)
        return pooled, frames._replace(scale=pooled.expand_as(frames.scale))


@pytest.mark.parametrize("kind", [TemperedSMC, OwnScale])
def test_the_check_fails_a_scale_that_knows_its_particles(kind):
    """Thirty dimensions, and 64 draws to each: enough for a covariance, but using it twice costs more than a nat."""
    model = Linear(30)
    arrived = kind(HMC(steps=5), particles=64, islands=30, moves=2, accept=0.8).run(model.path)
    found = evidence_below(arrived.log_evidence)
    # the allowance is for what is left through third parties, and for Student's 29 degrees of freedom
    error = found.stderr.square().add(0.15**2).sqrt()
    if kind is TemperedSMC:
        assert_estimate(found.estimate, model.log_evidence, error)
    else:
        with pytest.raises(StatisticalFailure):
            assert_estimate(found.estimate, model.log_evidence, error)


def test_the_check_fails_a_missing_factor():
    """The reference is not normalised, by a factor of 1.2, as if a Jacobian had been forgotten."""
    model = Linear(2)

    def shifted(q):
        value, gradient = model.reference(q)
        return value + math.log(1.2), gradient

    arrived = TemperedSMC(MALA(), particles=200, islands=100).run(Path(model, shifted, model.sample))
    with pytest.raises(StatisticalFailure):
        assert_estimate(*_pooled(arrived.log_evidence, model.log_evidence))


def test_the_check_fails_weights_taken_after_the_move(model):
    """The ratio at q_{t+1} in place of q_t: too high, by the heat that the moves let out."""

    class Late(AnnealedImportance):
        def ascend(self, path, ladder, chains):
            cloud, walk = path.evaluate(path.sample(chains)), Walk(self.kernel, path, self.moves)
            log_weight = torch.zeros(chains, **double)
            for t in range(1, len(ladder.beta)):
                cloud, _, _ = walk(cloud, ladder.beta[t], ladder.tuned(t))
                log_weight = log_weight + (ladder.beta[t] - ladder.beta[t - 1]) * cloud.ratio
            return log_weight

    small = Linear(2)
    ladder = even_ladder(20, untuned(small.draw(1), 0.4))
    right = AnnealedImportance(MALA(), 3).ascend(small.path, ladder, 4000).log_weight
    assert_mean((right - small.log_evidence).exp(), 1.0)
    late = Late(MALA(), 3).ascend(small.path, ladder, 4000)
    with pytest.raises(StatisticalFailure):
        assert_mean((late - small.log_evidence).exp(), 1.0)


# --- parts ---


def test_systematic_resampling_draws_floor_or_ceiling():
    log_weight = torch.randn(50, 40, **double).mul(2).log_softmax(1)
    log_weight[:, -1] = -math.inf
    log_weight = log_weight.log_softmax(1)
    index = systematic(log_weight)
    counts = torch.zeros(50, 40, **double).scatter_add_(1, index, torch.ones(50, 40, **double))
    expected = 40 * log_weight.exp()
    assert ((counts >= expected.floor() - 1e-9) & (counts <= expected.ceil() + 1e-9)).all()
    assert (counts[:, -1] == 0).all()


def test_systematic_resampling_is_unbiased():
    weight = torch.tensor([0.05, 0.15, 0.33, 0.47], **double)
    index = systematic(weight.log().expand(20_000, 4))
    counts = (index.unsqueeze(2) == torch.arange(4)).double().sum(1)
    assert_mean(counts, 4 * weight)


def test_the_next_temperature_keeps_what_was_asked():
    ratio, level = 3 * torch.randn(1, 500, **double), torch.full((1, 500), -math.log(500), **double)
    beta = next_beta(ratio, level, torch.tensor(0.25, **double), 0.7)
    weight = ((beta - 0.25) * ratio).exp()
    torch.testing.assert_close(weight.sum() ** 2 / weight.square().sum() / 500, torch.tensor(0.7, **double))
    assert next_beta(ratio * 1e-3, level, torch.tensor(0.25, **double), 0.7) == 1
    high = next_beta(ratio * 1e9, level, torch.tensor(0.25, **double), 0.7)
    assert high > 0.25  # it always moves


@pytest.mark.parametrize("points", [4, 5000])
def test_the_scale_of_a_cloud(points):
    root = torch.tensor([[2.0, 0.0], [1.0, 0.5]], **double)
    cloud = torch.randn(points, 2, **double) @ root.T
    weight = torch.full((points,), 1 / points, **double)
    scale = cloud_scale(cloud, weight, dense=True)
    assert (scale.diagonal() > 0).all()
    torch.testing.assert_close(scale.square().sum(1).sqrt(), cloud_scale(cloud, weight, dense=False))
    if points > 4:
        torch.testing.assert_close(scale, root, rtol=0.1, atol=0.1)
    assert cloud_scale(cloud[:1].expand(3, 2), weight[:1].expand(3) / 3 * points, True).isfinite().all()


def test_frames_are_coordinates():
    scale = torch.randn(3, 2, 2, **double).tril() + 2 * torch.eye(2, **double)
    for frames in (Frames(scale, True), Frames(scale.diagonal(dim1=1, dim2=2).unsqueeze(1), False)):
        q = torch.randn(6, 2, **double)
        u = frames.solve(q).requires_grad_()
        torch.testing.assert_close(frames.push(u), q)
        smooth = frames.push(u).sin().sum()  # the chain rule is `pull`
        torch.testing.assert_close(torch.autograd.grad(smooth, u)[0], frames.pull(q.cos()))
        model = Linear(2)
        value, gradient = frames.path(model.path).target(u.detach())
        torch.testing.assert_close(value, model(q)[0])
        torch.testing.assert_close(gradient, frames.pull(model(q)[1]))


@pytest.mark.parametrize("dense", [False, True])
def test_a_gaussian_reference(dense):
    mean, root = torch.tensor([1.0, -2.0], **double), torch.tensor([[2.0, 0.0], [1.0, 0.5]], **double)
    scale = root if dense else root.diagonal()
    density, sample = gaussian(mean, scale)
    law = torch.distributions.MultivariateNormal(mean, scale_tril=root if dense else scale.diag())
    q = sample(20_000).requires_grad_()
    value, gradient = density(q)
    torch.testing.assert_close(value, law.log_prob(q))
    torch.testing.assert_close(gradient, torch.autograd.grad(law.log_prob(q).sum(), q)[0])
    z = torch.linalg.solve_triangular(law.scale_tril, (q.detach() - mean).mT, upper=False).mT
    assert_distribution(z, torch.special.ndtr)


def test_float32(model):
    small = Linear(2)
    reference, sample = gaussian(torch.zeros(2), torch.ones(2))

    def target(q):
        value, gradient = small(q.double())
        return value.float(), gradient.float()

    arrived = TemperedSMC(MALA(), particles=64, islands=20).run(Path(target, reference, sample))
    assert arrived.position.dtype == torch.float32
    assert abs(evidence_below(arrived.log_evidence).estimate - small.log_evidence) < 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TemperedSMC(MALA(), particles=1), "particles"),
        (lambda: TemperedSMC(MALA(), keep=1.0), "keep"),
        (lambda: AnnealedImportance(MALA(), moves=0), "moves"),
        (lambda: even_ladder(0, untuned(torch.zeros(1, 1))), "rung"),
        (lambda: TemperedSMC(MALA()).run(Path(lambda q: (q.sum(1), q))), "reference"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def _pooled(log_evidence, truth):
    found = evidence_below(log_evidence)
    return found.estimate, torch.as_tensor(truth, **double), found.stderr.square().add(0.01**2).sqrt()
