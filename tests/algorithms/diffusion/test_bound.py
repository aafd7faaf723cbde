"""Laws of the variational bound: exact for Gaussians, below the density otherwise, with honest errors."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.bound import Bound
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.testing.statistics import (
    StatisticalFailure,
    assert_estimate,
    assert_lower_bound,
    assert_mean,
    assert_standard_normal,
)

F64 = torch.float64


def gaussian(v):
    return lambda x, sigma: x * (v / (v + sigma**2)).reshape(-1, *[1] * (x.dim() - 1))


def by_quadrature(x, v, prior, low, high):
    """The bound of the denoiser of N(0, v) with prior variance `prior`, term by term, `[B]`."""
    d, square = x.shape[1], x.square().sum(1)
    sigma = torch.logspace(math.log10(low), math.log10(high), 100_001, dtype=F64)
    keep = v / (v + sigma**2)
    error = (1 - keep) ** 2 * square[:, None] + keep**2 * sigma**2 * d
    diffusion = torch.trapezoid(error / sigma**2, sigma.log(), dim=1)
    noisy = torch.distributions.Normal(x, x.new_tensor(high))
    end = torch.distributions.Normal(x.new_tensor(0.0), math.sqrt(prior + high**2))
    divergence = torch.distributions.kl_divergence(noisy, end).sum(1)
    return -divergence - diffusion - d / 2 * (1 + math.log(2 * math.pi * low**2))


@pytest.mark.parametrize("v", [0.1, 1.0, 9.0])
def test_of_a_gaussian_the_bound_is_known_without_error(v):
    x = 2 * torch.randn(6, 3, dtype=F64)
    found = Bound(0.01, 50.0, variance=v)(x, gaussian(v), torch.rand(()), torch.randn(1, 6, 3, dtype=F64))
    torch.testing.assert_close(found, by_quadrature(x, v, v, 0.01, 50.0), atol=1e-5, rtol=0)


def test_of_a_gaussian_the_gap_is_tiny():
    x = torch.randn(50, 3, dtype=F64)
    low = 0.002
    found = Bound(low)(x, gaussian(1.0), torch.rand(()), torch.randn(1, 50, 3, dtype=F64))
    law = torch.distributions.Normal(x.new_tensor(0.0), math.sqrt(1 + 2 * low**2))
    gap = law.log_prob(x).sum(1) - found
    torch.testing.assert_close(gap, low**2 * x.square().sum(1) / 2, atol=1e-9, rtol=0.02)


@pytest.mark.parametrize("antithetic", [False, True])
def test_what_is_split_off_does_not_matter(antithetic):
    """Another Gaussian splits off another part; the expectation stays, and its errors are what they are said to be."""
    x, reps = 2 * torch.randn(40, 2, dtype=F64), 600  # so many that standard errors are known to 3 %
    noise = torch.randn(reps, 2, 40, 2, dtype=F64)
    split = Bound(0.01, 50.0, variance=1.0, antithetic=antithetic)
    value, error = split.with_error(x, gaussian(4.0), torch.rand(reps, dtype=F64), noise)
    assert_estimate(value, by_quadrature(x, 4.0, 1.0, 0.01, 50.0), 1.1 * error)
    with pytest.raises(StatisticalFailure):
        assert_estimate(value, by_quadrature(x, 1.0, 1.0, 0.01, 50.0), 1.1 * error)


def law():
    return Mixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=F64), scale=0.5)


def settings(x, **options):
    return Bound(0.005, 80.0, mean=x.mean(0), variance=float(x.var(0).mean()), **options)


def estimates(x, denoiser, repetitions=400, particles=2, **options):
    noise = torch.randn(repetitions, particles, *x.shape, dtype=x.dtype)
    return settings(x, **options).with_error(x, denoiser, torch.rand(repetitions, dtype=F64), noise)


def test_with_the_exact_denoiser_the_bound_is_the_log_density():
    x = law().sample(60)
    value, error = estimates(x, law())
    truth = law().log_prob(x, 0.005 * math.sqrt(2))
    assert_lower_bound(value, truth, 1.1 * error)
    assert float((truth - value).mean()) < 0.02 + 5 * float(error.square().sum().sqrt()) / len(x)


def test_a_worse_denoiser_has_a_lower_bound():
    x = law().sample(400)
    truth = law().log_prob(x).mean()
    worse = [lambda x, s: law()(x, 1.5 * s), lambda x, s: 0.9 * law()(x, s), gaussian(4.0)]
    for denoiser in worse:
        value, _ = estimates(x, denoiser, 20, 4)
        assert value.mean() < truth - 0.05


def test_standard_errors_are_calibrated():
    """Scores over many independent estimates of one number: of standard deviation one, about."""
    x, n = law().sample(1).expand(2000, 2), 2000
    noise = torch.randn(12, 4, n, 2, dtype=F64)
    value, error = Bound(0.05, 20.0, variance=4.0).with_error(x, law(), torch.rand(12, dtype=F64), noise)
    score = (value - value.mean()) / error
    # rows share their shifts, so this is no test at 1e-6; Student's law with 11 degrees has deviation 1.106
    assert 0.85 < float(score.std()) < 1.4
    assert_mean((score.abs() < 2.201).double(), 0.95, slack=0.04)


def test_splitting_off_a_gaussian_and_antithetic_noise_make_it_vary_less():
    x = law().sample(500)

    def deviation(found):
        return float(found[1].mean())

    naive = []
    for _ in range(40):
        sigma = 0.005 * torch.exp(torch.rand(500, dtype=F64) * math.log(80 / 0.005))
        noise = torch.randn(500, 2, dtype=F64)
        error = (law()(x + sigma[:, None] * noise, sigma) - x).square().sum(1) / sigma**2
        naive.append(error * math.log(80 / 0.005))
    plain = float(torch.stack(naive).std(0).mean()) / math.sqrt(40)
    one = deviation(estimates(x, law(), 40, 1))
    assert one < 0.75 * plain
    assert deviation(estimates(x, law(), 40, 1, antithetic=True)) < one
    assert deviation(estimates(x, law(), 40, 8)) < one / 2


def test_what_is_foreseen_of_the_errors_is_split_off_without_bias():
    x, reps = law().sample(50), 600
    plain = settings(x, antithetic=True)
    fitted = plain.fitted(law().sample(100), law(), torch.randn(2, 100, 2, dtype=F64), levels=9)
    shifts, noise = torch.rand(reps, dtype=F64), torch.randn(reps, 2, 50, 2, dtype=F64)
    value, error = fitted.with_error(x, law(), shifts, noise)
    before, spread = plain.with_error(x, law(), shifts, noise)
    assert error.mean() < 0.8 * spread.mean()
    assert_estimate(value, before, 1.1 * (error**2 + spread**2).sqrt())
    anything = Bound(0.005, 80.0, profile=torch.randn(3, 5, dtype=F64))  # unbiased, however bad it is
    value, error = anything.with_error(x, law(), shifts, noise)
    assert_estimate(value, before, 1.1 * (error**2 + spread**2).sqrt())


def test_of_a_gaussian_nothing_is_left_to_be_foreseen():
    x = torch.randn(30, 3, dtype=F64)
    fitted = Bound(0.01, 50.0).fitted(x, gaussian(1.0), torch.randn(2, 30, 3, dtype=F64))
    assert fitted.profile.abs().max() < 1e-10
    equal = Bound(0.01, 50.0).fitted(x[:1].expand(30, 3), law_of_three, torch.randn(2, 30, 3, dtype=F64))
    assert equal.profile.isfinite().all()


def law_of_three(x, sigma):
    return torch.tanh(x) / (1 + sigma[:, None])


def test_noise_levels_are_one_grid_over_rows_and_particles():
    seen = []

    def watching(x, sigma):
        seen.append(sigma)
        return x

    Bound(0.1, 10.0)(torch.zeros(10, 1), watching, torch.tensor(0.37), torch.randn(4, 10, 1))
    part = (seen[0].log() - math.log(0.1)) / math.log(100.0)
    gaps = part.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 40), atol=1e-4, rtol=0)
    quarters = (part.reshape(4, 10) * 4).long().sort(0).values
    assert (quarters == torch.arange(4)[:, None]).all()  # each row has a level in each quarter


def test_the_gradient_in_the_value_is_the_score():
    """A latent's encoder is trained through it."""
    x = law().sample(30).requires_grad_()
    u, noise = torch.rand(()), torch.randn(4000, 30, 2, dtype=F64)
    (found,) = torch.autograd.grad(settings(x.detach())(x, law(), u, noise).sum(), x)
    torch.testing.assert_close(found, law().score(x, 0.005).detach(), atol=0.8, rtol=0.15)


def test_training_by_the_bound_finds_the_denoiser():
    """The one free number of a Gaussian's denoiser; a bound with another power of sigma would find another."""
    x = 2 * torch.randn(4000, 1, dtype=F64)
    log_v = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([log_v], 0.1)
    for _ in range(80):
        loss = -Bound(0.01, 50.0, variance=4.0)(
            x,
            lambda x, s: gaussian(log_v.exp())(x, s),
            torch.rand(()),
            torch.randn(1, 4000, 1, dtype=F64),
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(float(log_v.detach().exp()) / float(x.square().mean()) - 1) < 0.15


@pytest.mark.parametrize("event", [(), (3,), (2, 2, 1)])
def test_events_have_any_shape_and_rows_keep_their_context(event):
    x, context = torch.randn(5, *event), torch.randn(5, 2)

    def denoiser(v, sigma, c):
        level, shift = (t.reshape(-1, *[1] * len(event)) for t in (sigma, c[:, 0]))
        return shift + (v - shift) / (1 + level**2)  # of N(c, 1)

    noise = torch.randn(2, 3, *x.shape)
    value, _ = Bound(0.01, 500.0).with_error(x, denoiser, torch.rand(2), noise, context=context)
    assert value.shape == (5,)
    alone = Bound(0.01, 500.0).with_error(
        x[2:3],
        lambda v, s: denoiser(v, s, context[2:3].expand(len(v), 2)),
        torch.tensor([0.1, 0.7]),
        torch.randn(2, 500, *x[2:3].shape),
    )
    exact = Bound(0.01, 500.0, mean=0.0)
    many, error = exact.with_error(x, denoiser, torch.rand(8), torch.randn(8, 300, *x.shape), context=context)
    target = [torch.distributions.Normal(c, 1.0).log_prob(v).sum() for v, c in zip(x, context[:, 0])]
    assert_standard_normal((many - torch.stack(target)) / (3 * error + 0.02))
    assert abs(float(alone[0] - target[2])) < 6 * float(alone[1]) * 5 + 0.1


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        Bound(1.0, 0.5)
    with pytest.raises(ValueError, match="positive variance"):
        Bound(variance=0.0)
    with pytest.raises(ValueError, match="expected noise"):
        Bound()(torch.zeros(3, 2), gaussian(1.0), torch.rand(()), torch.randn(1, 3, 1))
    with pytest.raises(ValueError, match="2 or more"):
        Bound().with_error(torch.zeros(3, 2), gaussian(1.0), torch.rand(1), torch.randn(1, 1, 3, 2))
    with pytest.raises(ValueError, match="levels=1"):
        Bound().fitted(torch.zeros(3, 2), gaussian(1.0), torch.randn(1, 3, 2), levels=1)
