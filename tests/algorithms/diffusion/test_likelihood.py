"""Log densities against exact ones: errors within what is reported, intervals that cover, gradients that are scores."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.adaptive_ode import adaptive_ode
from pgen.algorithms.diffusion.divergence import Exact, Hutchinson, HutchPP, Jacobian, Trace
from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.likelihood import log_prob
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.quadrature import GAUSS, KRONROD, NODES, Values, integrate, student_quantile
from pgen.algorithms.diffusion.terminal import Terminal, matched, standard

FLOAT = {"dtype": torch.float64}
Z = 4.9  # of a normal: a false alarm of 1e-6
LOW, HIGH = 0.05, 80.0


def mixture(*event, components=10, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(components, *event, generator=generator, **FLOAT) + offset
    return Mixture(means, scale=0.25, weights=torch.linspace(1, 2, components, **FLOAT))


def points(law, rows=16, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = law.sample(rows, generator=generator)
    return x + LOW * torch.randn(x.shape, generator=generator, **FLOAT)


def field_of(law, rows=16, seed=1):
    return Field(law, Streams(seed, rows=rows))


# --- against exact densities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(), (2,), (2, 4), (80,)])
def test_log_density_is_exact_to_a_hundredth_of_a_nat(event):
    law = mixture(*event)
    x = points(law)
    found = log_prob(x, Field(law), LOW, HIGH)
    miss = (found.value - law.log_prob(x, LOW)).abs()
    assert miss.mean() < 0.002
    assert found.solver_error.max() < 0.01
    assert found.stderr is None
    given = log_prob(
        x, Field(law), LOW, HIGH, lambda z: law.log_prob(z, HIGH)
    )  # the prior's own error is left out
    assert ((given.value - law.log_prob(x, LOW)).abs() <= given.solver_error + 1e-6).all()


@pytest.mark.parametrize("fault", ["shift", "sign", "factor"])
def test_a_missing_factor_is_seen(fault, monkeypatch):
    law = mixture(2)
    x = points(law)
    whole = Exact.trace

    def wrong(self, product, noise, like):
        value = whole(self, product, noise, like).value
        return Trace({"shift": value - 0.05, "sign": -value, "factor": 0.97 * value}[fault])

    monkeypatch.setattr(Exact, "trace", wrong)
    found = log_prob(x, Field(law), LOW, HIGH)
    assert (found.value - law.log_prob(x, LOW)).abs().mean() > 0.01


def test_a_prior_that_forgets_the_mean_is_seen():
    law = mixture(2, offset=20.0)
    x = points(law)
    exact = law.log_prob(x, LOW)
    zero = log_prob(x, Field(law), LOW, HIGH, standard(HIGH, x[0]).log_prob)
    assert (zero.value - exact).abs().mean() > 0.05
    own = log_prob(x, Field(law), LOW, HIGH)
    assert (own.value - exact).abs().mean() < 0.002


def test_flat_calls_are_the_same_numbers():
    law = mixture(3)
    x = points(law)
    for divergence in ("exact", Hutchinson(4), HutchPP(6)):
        one = log_prob(x, field_of(law), LOW, HIGH, divergence=divergence)
        two = log_prob(x, field_of(law), LOW, HIGH, divergence=divergence, flat=True)
        torch.testing.assert_close(one.value, two.value, rtol=1e-8, atol=1e-8)
        assert torch.equal(one.products, two.products)


def test_a_row_does_not_depend_on_what_is_beside_it():
    law = mixture(3)
    x = points(law)
    for flat in (False, True):
        every = log_prob(x, field_of(law), LOW, HIGH, divergence=Hutchinson(3), flat=flat)
        part = Field(law, Streams(1, rows=16).part(4, 2))
        few = log_prob(x[4:6], part, LOW, HIGH, divergence=Hutchinson(3), flat=flat)
        torch.testing.assert_close(few.value, every.value[4:6], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(few.stderr, every.stderr[4:6], rtol=1e-6, atol=1e-9)


def test_rows_with_a_context_of_their_own():
    means = torch.tensor([[-30.0, 1.0], [0.0, 0.0], [4.0, 2.0]], **FLOAT)

    def denoiser(x, sigma):
        keep = 0.25 / (0.25 + sigma.unsqueeze(-1) ** 2)
        return means + keep * (x - means)

    x = means + 0.3
    found = log_prob(x, Field(denoiser), LOW, HIGH)
    variance = 0.25 + LOW**2
    exact = -(0.3**2) / variance - math.log(2 * math.pi * variance)
    torch.testing.assert_close(found.value, torch.full((3,), exact, **FLOAT), rtol=1e-4, atol=1e-4)


def test_a_rough_path_is_corrected_to_first_order():
    law = mixture(8)
    x = points(law)
    exact, prior = law.log_prob(x, LOW), lambda z: law.log_prob(z, HIGH)
    rough = log_prob(x, Field(law), LOW, HIGH, prior, tolerance=2e-3, error=1e-5)
    fine = log_prob(x, Field(law), LOW, HIGH, prior, tolerance=1e-6, error=1e-5)
    assert (fine.value - exact).abs().max() < 1e-5
    assert ((rough.value - exact).abs() <= rough.solver_error).all()
    # What a solver that carries the trace along would have at that tolerance, without the correction, is far more.
    path = adaptive_ode(x, LOW, HIGH, Field(law), 0.0, 2e-3, noise_units=True, dense=True)
    plain = path_integral(path, law, x) + prior(path.x)
    assert (rough.value - exact).abs().mean() < 0.1 * (plain - exact).abs().mean()


def path_integral(solved, law, x):
    def traces(levels, needed):
        return Values(
            torch.stack(
                [
                    Exact().trace(Jacobian(law).at(solved.path.at(level)[0], level.exp()), None, x).value
                    for level in levels
                ]
            )
        )

    low, high = math.log(LOW), math.log(HIGH)
    return x[0].numel() * (high - low) - integrate(traces, low, high, len(x), error=1e-5, panels=3).value


def test_single_precision():
    law = mixture(20)
    x = points(law)
    found = log_prob(x.float(), Field(law.to(torch.float32)), LOW, HIGH)
    assert found.value.dtype == torch.float32
    assert (found.value - law.log_prob(x, LOW)).abs().mean() < 0.01


def test_evaluations_and_products_are_counted():
    law = mixture(3)
    x = points(law)
    field = Field(law)
    found = log_prob(x, field, LOW, HIGH, standard(HIGH, x[0]).log_prob)
    assert found.evaluations.max() <= field.evaluations  # rows wait for each other
    assert (found.products % 3 == 0).all()


# --- estimated traces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [Hutchinson(4), HutchPP(9)], ids=str)
def test_intervals_cover(way):
    # 400 intervals of 95 %: covering as rarely as 89.6 % of them has a chance below 1e-6 if the true rate is 95 %, and
    # standard errors that are a third too small would cover 81 %.
    law = mixture(20)
    rows = 400
    x = points(law, rows)
    exact = law.log_prob(x, LOW)
    found = log_prob(x, field_of(law, rows), LOW, HIGH, divergence=way, flat=True, error=0.05)
    low, high = found.interval(0.95)
    assert ((low <= exact) & (exact <= high)).double().mean() > 0.896
    assert (found.freedom > 0).all()
    score = (found.value - exact) / found.stderr
    assert abs(score.mean()) < 0.35  # no bias beside the standard error
    if isinstance(way, Hutchinson):
        assert (score.abs() > 1.96 * 2 / 3).double().mean() > 0.104  # and not too wide either


def test_probes_are_fresh_at_every_node():
    # One probe for the whole path, as is customary, has errors that add up instead of averaging out.
    law = mixture(20)
    x = points(law, 100)
    exact = law.log_prob(x, LOW)
    fresh = log_prob(x, field_of(law, 100), LOW, HIGH, divergence=Hutchinson(2), flat=True)

    class Frozen(Streams):
        def normal(self, draw, shape, like):
            return super().normal(0, shape, like)

    same = log_prob(x, Field(law, Frozen(1, rows=100)), LOW, HIGH, divergence=Hutchinson(2), flat=True)
    miss = [(found.value - exact).square().mean().sqrt() for found in (fresh, same)]
    assert miss[0] < 0.6 * miss[1]
    assert same.stderr.mean() < 0.6 * miss[1]  # and their standard error would be a lie


def test_other_seeds_are_other_probes():
    law = mixture(20)
    x = points(law)
    one, same, other = (
        log_prob(x, field_of(law, seed=s), LOW, HIGH, divergence="hutchinson").value for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_in_values_are_scores_and_in_parameters_are_right():
    shift = torch.zeros((), requires_grad=True, **FLOAT)
    law = mixture(2)
    x = points(law, 4).requires_grad_()

    def denoiser(x, sigma):  # of a law moved by `shift`
        return law(x - shift, sigma) + shift

    found = log_prob(x, Field(denoiser), LOW, HIGH, differentiable=True)
    in_x, in_shift = torch.autograd.grad(found.value.sum(), (x, shift), allow_unused=False)
    score = law.score(x.detach(), LOW)
    torch.testing.assert_close(in_x, score, rtol=0.01, atol=0.02)
    assert abs(in_shift + score.sum()) < 0.05 * score.abs().sum()


def test_gradients_are_not_left_out_in_silence():
    law = mixture(2)
    x = points(law, 4)
    with pytest.raises(ValueError, match="differentiable=True"):
        log_prob(x.requires_grad_(), Field(law), LOW, HIGH)
    assert not log_prob(x.detach(), Field(law), LOW, HIGH).value.requires_grad


# --- faults ------------------------------------------------------------------------------------------------------


def test_faults_are_named():
    law = mixture(2)
    x = points(law)
    with pytest.raises(ValueError, match="divergence='hutch'.*'hutch\\+\\+'"):
        log_prob(x, Field(law), LOW, HIGH, divergence="hutch")
    with pytest.raises(ValueError, match="draw random directions"):
        log_prob(x, Field(law), LOW, HIGH, divergence="hutchinson")
    with pytest.raises(ValueError, match="sigma_min=80"):
        log_prob(x, Field(law), 80.0, 0.05)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        log_prob(x, Field(lambda x, sigma: law(x.detach(), sigma)), LOW, HIGH, standard(HIGH, x[0]).log_prob)
    with pytest.raises(ValueError, match="expected 'auto'"):
        matched(Field(law), HIGH, x, "whole")


# --- the prior -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(), (6,), (2, 3)])
def test_matched_prior_is_that_of_a_normal(event):
    d = math.prod(event)
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(0), **FLOAT)
    law = Mixture(torch.full((1, *event), 3.0, **FLOAT), covariance=root @ root.mT)
    x = 40 * torch.randn(7, *event, generator=torch.Generator().manual_seed(1), **FLOAT)
    exact = law.log_prob(x, 40.0)
    full = matched(Field(law), 40.0, x[:1], repeats=4)
    torch.testing.assert_close(full.log_prob(x), exact, rtol=1e-6, atol=1e-6)
    miss = [
        (way.log_prob(x) - exact).abs().max()
        for way in (matched(Field(law), 40.0, x[:1], "scalar"), standard(40.0, x[0]))
    ]
    assert miss[0] < miss[1]
    apart = Mixture(torch.full((1, *event), 3.0, **FLOAT), scale=1.5)
    diagonal = matched(Field(apart), 40.0, x[:1], "diagonal", repeats=4)
    torch.testing.assert_close(diagonal.log_prob(x), apart.log_prob(x, 40.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_prior_samples_have_its_law(full):
    # A standard deviation that is off by 5 % is 4.9 + 4.9 standard errors with (9.8 / 0.05)^2 / 2, about 20,000, draws.
    spread = torch.diag(torch.tensor([1.0, 4.0], **FLOAT)) if full else torch.tensor([1.0, 4.0], **FLOAT)
    law = Terminal(2.0, torch.tensor([3.0, -1.0], **FLOAT), spread, full)
    x = law.sample(Streams(0, rows=20_000).normal(0, (2,), torch.empty(0, **FLOAT)))
    deviation = torch.tensor([5.0, 8.0], **FLOAT).sqrt()
    assert ((x.mean(0) - law.mean).abs() < Z * deviation / math.sqrt(len(x))).all()
    assert ((x.std(0) / deviation - 1).abs() < Z / math.sqrt(2 * len(x))).all()
    exact = torch.distributions.Normal(law.mean, deviation).log_prob(x[:5]).sum(1)
    torch.testing.assert_close(law.log_prob(x[:5]), exact)


# --- quadrature ------------------------------------------------------------------------------------------------------


def test_rules_are_exact_on_polynomials():
    for power in range(17):
        exact = 2 / (power + 1) if power % 2 == 0 else 0.0
        assert abs(float(KRONROD @ NODES**power) - exact) < 1e-13
        assert power > 9 or abs(float(GAUSS @ NODES**power) - exact) < 1e-13


def test_each_row_is_integrated_to_its_error():
    sharp = torch.tensor([1.0, 30.0, 1000.0], **FLOAT)
    seen = []

    def bump(t, needed):
        seen.append(int(needed.sum()))
        return Values(sharp / (1 + (sharp * (t - 0.3)) ** 2))

    exact = torch.atan(sharp * 0.7) + torch.atan(sharp * 0.3)
    found = integrate(bump, 0.0, 1.0, 3, error=1e-6, most=40)
    assert ((found.value - exact).abs() <= found.disagreement + 1e-12).all()
    assert (found.disagreement < 1e-6).all()
    assert seen[0] == 3
    assert seen[-1] == 1  # the sharp one was at it alone
    left = integrate(bump, 0.0, 1.0, 3, error=1e-6, most=2)
    assert left.disagreement[2] > 1e-6  # and what is left is said


def test_noise_is_not_taken_for_roughness():
    generator = torch.Generator().manual_seed(0)
    rows, deviation = 2000, 0.1

    def noisy(t, needed):
        noise = deviation * torch.randn(t.shape, generator=generator, **FLOAT)
        spread = (
            torch.randn(5, *t.shape, generator=generator, **FLOAT).square().mean(0)
        )  # of 5 degrees of freedom
        return Values(t.exp() + noise, deviation**2 * spread, 5.0)

    found = integrate(noisy, 0.0, 1.0, rows, error=1e-3)
    miss = found.value - (math.e - 1)
    assert abs(miss.mean()) < Z * miss.std() / math.sqrt(rows)
    assert abs(miss.var() / found.variance.mean() - 1) < Z * math.sqrt(2 / rows)
    assert (found.disagreement > 0).double().mean() < 0.05
    weights = (KRONROD / 2) ** 2
    # Variances that are estimates scatter; taken for true ones, they would halve the degrees of freedom.
    freedom = 5 * weights.sum() ** 2 / weights.square().sum()
    torch.testing.assert_close(found.freedom.median(), freedom, rtol=0.1, atol=0)


def test_student_quantiles():
    freedom = torch.tensor([2.0, 4.0, 10.0, 100.0, 1e9], **FLOAT)
    known = torch.tensor([4.3027, 2.7764, 2.2281, 1.9840, 1.9600], **FLOAT)
    torch.testing.assert_close(student_quantile(0.975, freedom), known, rtol=0.01, atol=0)
