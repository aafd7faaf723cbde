"""Encoding, decoding and editing by a diffusion, against Gaussians, whose paths are known."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.solvers import Ancestral
from pgen.distributions import EDM, VE, VP, Diffusion, MixtureDenoiser, RectifiedFlow
from pgen.errors import DataError, OptionError
from pgen.testing.statistics import StatisticalFailure, assert_mean

F64 = torch.float64


def gaussian(mean, scale, schedule=None, dtype=F64):
    """N(mean, scale^2) at the least noise level but for that level itself, as a diffusion."""
    mixture = MixtureDenoiser(torch.as_tensor(mean, dtype=dtype)[None], scale=scale)
    return Diffusion(mixture, VE(0.01, 80.0) if schedule is None else schedule, mixture.means.shape[1:])


def encoded(x, mean, scale, schedule):
    """Along the flow (x - mean) / sqrt(scale^2 + sigma^2) stays; the start is scaled as that of draws is."""
    low, high = schedule.sigma_min, schedule.sigma_max
    mean = torch.as_tensor(mean, dtype=x.dtype)
    there = mean + (x - mean) * math.sqrt((scale**2 + high**2) / (scale**2 + low**2))
    return there / math.sqrt(high**2 + 1)


@pytest.mark.parametrize("schedule", [VE(0.01, 80.0), VP(), EDM(), RectifiedFlow()], ids=str)
def test_the_noise_of_a_gaussian_value_is_known_and_leads_back(schedule):
    law = gaussian([1.0, -2.0], 0.5, schedule)
    x = torch.randn(3, 4, 2, dtype=F64) * 0.5 + torch.tensor([1.0, -2.0], dtype=F64)
    noise = law.encode(x)
    torch.testing.assert_close(noise, encoded(x, [1.0, -2.0], 0.5, schedule), atol=1e-4, rtol=0)
    assert not torch.allclose(noise, encoded(x, [1.0, -2.0], 0.6, schedule), atol=1e-2)
    torch.testing.assert_close(law.decode(noise), x, atol=5e-4, rtol=0)


def test_a_value_of_a_mixture_comes_back_in_single_precision():
    generator = torch.Generator().manual_seed(0)
    mixture = MixtureDenoiser(torch.randn(5, 1, 4, 4, generator=generator) * 2, scale=0.3)
    law = Diffusion(mixture, EDM(), (1, 4, 4))
    x = mixture.sample(50, generator=generator).float()
    back = law.decode(law.encode(x))
    assert back.dtype == torch.float32
    assert float((back - x).abs().max()) < 1e-3 * float(x.std())


def test_a_row_is_encoded_by_itself():
    law = gaussian([0.0, 0.0], 1.0)
    x = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(law.encode(x)[3], law.encode(x[3]), rtol=1e-12, atol=0)
    assert law.encode(x[:0]).shape == law.decode(x[:0]).shape == law.edited(x[:0], 1.0).shape == (0, 2)


def test_one_model_decodes_what_another_encoded():
    source, target = gaussian([1.0, 0.0], 0.5), gaussian([-2.0, 3.0], 2.0, VE(0.01, 200.0))
    x = torch.randn(6, 2, dtype=F64) * 0.5 + source.denoiser.means
    there = target.decode(source.encode(x))
    expected = target.denoiser.means + (x - source.denoiser.means) * 4
    # The flows end where noise hides the mean all but a share of mean / sigma, in which the two differ.
    torch.testing.assert_close(there, expected, atol=0.08, rtol=0)
    torch.testing.assert_close(source.decode(target.encode(there)), x, atol=1e-3, rtol=0)


def test_a_context_goes_with_its_rows():
    def shifted(x, sigma, context):
        s2 = sigma[:, None] ** 2
        return (x + s2 * context) / (1 + s2)

    context = torch.tensor([[-3.0], [0.0], [3.0]], dtype=F64)
    law = Diffusion(shifted, VE(0.01, 200.0), (2,), context=context)
    x = context + torch.randn(4, 3, 2, dtype=F64)
    noise = law.encode(x)
    assert noise.shape == (4, 3, 2)
    torch.testing.assert_close(noise, x - context, atol=0.06, rtol=0)
    torch.testing.assert_close(law.decode(noise), x, atol=1e-3, rtol=0)
    assert law.encode(torch.zeros(2, dtype=F64)).shape == (3, 2)
    near = law.edited(x, 0.05, seed=0)
    assert near.shape == x.shape
    assert float((near - x).abs().max()) < 0.5


# --- SDEdit ---

N = 20_000


def assert_gaussian(x, mean, std):
    """Mean and variance, but for what solvers err by; false alarms at 1e-6 each, at N draws it sees 0.04 deviations."""
    assert_mean(x, mean, slack=0.01)
    assert_mean((x - mean).square() / std**2, 1.0, slack=0.03)


@pytest.mark.parametrize("solver", [None, Ancestral()], ids=["flow", "stochastic"])
def test_much_noise_gives_the_prior_and_little_stays_near(solver):
    law = gaussian([1.0], 0.5, VE(0.01, 200.0))
    value = torch.full((N, 1), 4.0, dtype=F64)
    steps = 32 if solver is None else 200
    far = law.edited(value, 200.0, steps=steps, solver=solver, seed=0)[:, 0]
    assert_gaussian(far, 1.0, 0.5)
    with pytest.raises(StatisticalFailure):
        assert_gaussian(law.edited(value, 1.0, steps=steps, solver=solver, seed=0)[:, 0], 1.0, 0.5)
    near = law.edited(value, 0.02, solver=solver, seed=0)
    assert float((near - value).abs().mean()) < 0.05


def test_in_between_the_law_is_known():
    """Value v, noise to level s, the flow down: m + (v + s e - m) scale / sqrt(scale^2 + s^2), at noise level 0."""
    law = gaussian([1.0], 0.5)
    drawn = law.edited(torch.full((N, 1), 4.0, dtype=F64), 1.0, seed=1)[:, 0]
    shrink = 0.5 / math.sqrt(0.25 + 1)
    assert_gaussian(drawn, 1 + 3 * shrink, shrink)
    with pytest.raises(StatisticalFailure):
        assert_gaussian(drawn, 1.0, 0.5)


def test_seeds():
    law = gaussian([0.0, 0.0], 1.0)
    x = torch.zeros(70, 2, dtype=F64)
    one = law.edited(x, 1.0, seed=3)
    assert torch.equal(one, law.edited(x, 1.0, seed=3))
    torch.testing.assert_close(one[:5], law.edited(x[:5], 1.0, seed=3))
    assert not torch.equal(one, law.edited(x, 1.0, seed=4))
    torch.manual_seed(0)
    first = law.edited(x, 1.0)
    assert not torch.equal(first, law.edited(x, 1.0))


def test_what_cannot_be_is_said():
    law = gaussian([0.0, 0.0], 1.0)
    for ask in (law.encode, law.decode, lambda x: law.edited(x, 1.0)):
        with pytest.raises(DataError, match=r"has shape \(3,\); expected \[..., 2\]"):
            ask(torch.zeros(3))
        with pytest.raises(DataError, match=r"has shape \(\)"):
            ask(torch.zeros(()))
    with pytest.raises(DataError, match=r"expected \[..., 4, 2\]"):
        law.expand((4,)).encode(torch.zeros(3, 2))
    for sigma in (0.001, 0.01, 81.0, True, float("nan")):
        with pytest.raises(OptionError, match=r"above 0.01 and at most 80"):
            law.edited(torch.zeros(2), sigma)
    with pytest.raises(OptionError, match="whole number"):
        law.edited(torch.zeros(2), 1.0, steps=0)
    with pytest.raises(OptionError, match="between 0 and 1"):
        law.encode(torch.zeros(2), tolerance=0)
