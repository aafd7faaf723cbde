"""Diffusions as distributions: a denoiser, and what follows from it, against mixtures for which all is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.capability import Capability, Exactness, capabilities_of
from pgen.conversion import CORE, Conversions, exactness_of
from pgen.distributions import EDM, VE, VP, Diffusion, MixtureDenoiser, Quantized, RectifiedFlow, SubVP
from pgen.distributions.denoiser_conversions import CONVERSIONS
from pgen.errors import OptionError, PgenError, ProgramError
from pgen.testing.statistics import StatisticalFailure, assert_estimate, assert_lower_bound, assert_moments

F64 = torch.float64
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=F64)
MIXTURE = MixtureDenoiser(MEANS, scale=0.5, weights=torch.tensor([0.5, 0.3, 0.2]))
SCHEDULES = {
    "VE": VE(0.01, 80.0),
    "VP": VP(),
    "cosine": VP("cosine"),
    "sub-VP": SubVP(),
    "EDM": EDM(),
    "flow": RectifiedFlow(),
}
C = Capability


def shifted(rows, sigma, context):
    """The denoiser of N(context, 1) in every element; of N(0, 1) where there is no condition."""
    mean = torch.nan_to_num(context).sum(-1).reshape(-1, *[1] * (rows.dim() - 1))
    s2 = sigma.reshape(-1, *[1] * (rows.dim() - 1)) ** 2
    return (rows + s2 * mean) / (1 + s2)


# --- as a distribution ---


@pytest.mark.parametrize("event", [(), (3,), (2, 3), (1, 4, 2)])
def test_any_event_shape_any_lead_and_any_noise_levels(event):
    mixture = MixtureDenoiser(torch.randn(4, *event, dtype=F64), scale=0.7)
    law = Diffusion(mixture, VE(0.01, 80.0), event)
    x = torch.randn(5, 2, *event, dtype=F64)
    levels = torch.rand(5, 1, dtype=F64) + 0.1
    found = law.denoise(x, levels)
    assert found.shape == x.shape
    for i in range(5):
        torch.testing.assert_close(found[i], mixture(x[i], levels[i].expand(2)))
    assert law.sample((0,)).shape == (0, *event)
    assert law.log_prob(x[:0]).shape == law.bound(x[:0]).shape == (0, 2)
    assert law.sample((7, 2)).shape == (7, 2, *event)
    assert law.log_prob(x).shape == law.bound(x).shape == (5, 2)


def test_a_context_for_each_row_and_a_plate():
    context = torch.randn(4, 2, dtype=F64)
    law = Diffusion(shifted, VP(), (3,), context=context)
    assert (law.batch_shape, law.event_shape) == ((4,), (3,))
    x = torch.randn(6, 4, 3, dtype=F64)
    rows = Diffusion(shifted, VP(), (3,), context=context[2])
    torch.testing.assert_close(law.denoise(x, 0.5)[:, 2], rows.denoise(x[:, 2], 0.5))
    assert law.expand((6, 4)).sample().shape == (6, 4, 3)

    def program():
        with pyro.plate("outer", 6, dim=-2), pyro.plate("data", 4, dim=-1):
            return pyro.sample("x", law)

    assert poutine.trace(program).get_trace().nodes["x"]["fn"].batch_shape == (6, 4)
    exact = dist.Normal(context.sum(-1, keepdim=True), 1.0).expand((4, 3)).to_event(1)
    torch.testing.assert_close(law.log_prob(x), exact.log_prob(x), atol=2e-3, rtol=0)


def test_by_itself_it_can_denoise_and_the_rest_is_by_conversion():
    law = Diffusion(MIXTURE, VP(), (2,))
    assert capabilities_of(law) == {C.DENOISER}
    conversions = Conversions((*CORE, *CONVERSIONS))

    def path(wanted, **options):
        found = conversions.path(capabilities_of(law), wanted, **options)
        return [c.name for c in found], exactness_of(found)

    assert path(C.SCORE) == (["tweedie"], Exactness.EXACT)
    assert path(C.SAMPLE) == (["reverse-diffusion"], Exactness.ESTIMATE)
    assert path(C.RSAMPLE) == (["reverse-path"], Exactness.ESTIMATE)
    assert path(C.BOUND) == (["denoising-bound"], Exactness.LOWER_BOUND)
    assert path(C.LOG_PROB) == (["denoising-bound", "bound-for-log-prob"], Exactness.LOWER_BOUND)
    assert path(C.LOG_PROB, random=False) == (["probability-flow"], Exactness.ESTIMATE)
    x = torch.randn(5, 2, dtype=F64)
    for name, given in (("tweedie", "score"), ("probability-flow", "log_prob")):
        converted = conversions.named(name).convert(law)
        torch.testing.assert_close(getattr(converted, given)(x), getattr(law, given)(x))
    moved = conversions.named("reverse-path").convert(law).rsample((3,))
    assert moved.shape == (3, 2)


def test_draws_are_differentiable_in_what_the_denoiser_holds():
    mean = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)

    def denoiser(x, sigma):
        return (x + sigma[:, None] ** 2 * mean) / (1 + sigma[:, None] ** 2)

    path = next(c for c in CONVERSIONS if c.name == "reverse-path")
    x = path.convert(Diffusion(denoiser, VP(), (2,))).rsample((50,))
    (slope,) = torch.autograd.grad(x.mean(0).sum(), mean)
    torch.testing.assert_close(slope, torch.ones(2, dtype=F64), atol=0.02, rtol=0)


def test_what_cannot_be_is_said():
    with pytest.raises(OptionError, match="schedule is VP itself; expected a schedule"):
        Diffusion(MIXTURE, VP, (2,))
    with pytest.raises(OptionError, match=r"event_shape is '2'; expected the shape of one value"):
        Diffusion(MIXTURE, VP(), "2")
    with pytest.raises(OptionError, match="denoiser is int"):
        Diffusion(3, VP(), (2,))
    wrong = Diffusion(lambda x, sigma: x[:, :1], VP(), (2,))
    with pytest.raises(ProgramError, match=r"gave \(4, 1\) for values \(4, 2\)"):
        wrong.denoise(torch.zeros(4, 2), 1.0)
    assert issubclass(ProgramError, PgenError)


# --- what follows from the denoiser ---


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_density_is_that_of_the_data(name):
    schedule = SCHEDULES[name]
    law = Diffusion(MIXTURE, schedule, (2,))
    x = MIXTURE.sample(40, generator=torch.Generator().manual_seed(1))
    exact = MIXTURE.log_prob(x, schedule.sigma_min)
    torch.testing.assert_close(law.log_prob(x), exact, atol=5e-3, rtol=0)
    torch.testing.assert_close(
        law.score(x), MIXTURE.score(x, torch.full((40,), schedule.sigma_min, dtype=F64)), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_draws_have_the_law_of_the_data(name):
    law = Diffusion(MIXTURE, SCHEDULES[name], (2,))
    mean = MIXTURE.log_weights.exp() @ MIXTURE.means
    away = MIXTURE.means - mean
    covariance = away.mT @ (MIXTURE.log_weights.exp()[:, None] * away) + 0.25 * torch.eye(2, dtype=F64)
    torch.manual_seed(2)
    x = law.sample((20_000,))
    for k in range(2):
        assert_moments(x[:, k], mean[k], covariance[k, k].sqrt())
    torch.manual_seed(2)
    broken = Diffusion(lambda x, s: 0.98 * MIXTURE(x, s), SCHEDULES[name], (2,)).sample((20_000,))
    with pytest.raises(StatisticalFailure):
        assert_moments(broken[:, 0], mean[0], covariance[0, 0].sqrt())


def test_the_bound_is_below_the_density_and_close():
    law = Diffusion(MIXTURE, VE(0.01, 80.0), (2,))
    x = MIXTURE.sample(20, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    values = torch.stack([law.bound(x) for _ in range(400)])
    mean, stderr = values.mean(0), values.std(0) / 20
    exact = MIXTURE.log_prob(x, 0.01)
    assert_lower_bound(mean.mean()[None], exact.mean()[None], (stderr.square().sum().sqrt() / 20)[None])
    assert float((exact - mean).mean()) < 0.1


def test_a_draw_depends_on_its_seed_and_its_number_alone():
    def elementwise(x, sigma):
        return torch.tanh(x / (1 + sigma[:, None] ** 2))

    law = Diffusion(elementwise, EDM(), (3,))
    torch.manual_seed(5)
    few = law.sample((4,))
    torch.manual_seed(5)
    assert torch.equal(few, law.sample((300,))[:4])


def test_guidance_counts_the_condition_several_times():
    context = torch.tensor([[1.5]], dtype=F64)
    law = Diffusion(shifted, VP(), (2,), context=context)
    x = torch.randn(1, 2, dtype=F64)
    torch.testing.assert_close(law.guided(1.0).denoise(x, 1.0), law.denoise(x, 1.0))
    twice = law.guided(2.0).denoise(x, 1.0)
    torch.testing.assert_close(twice, Diffusion(shifted, VP(), (2,), context=2 * context).denoise(x, 1.0))


# --- whole numbers ---


def test_whole_numbers_have_a_mass_bounded_from_below():
    normal = MixtureDenoiser(torch.zeros(1, 1, dtype=F64), scale=1.0)
    law = Quantized(Diffusion(normal, VE(0.005, 50.0), (1,)), levels=7, low=-3.5, width=1.0)
    assert capabilities_of(law) == {C.BOUND, C.DENOISER}
    cells = torch.arange(7)[:, None]
    ends = torch.distributions.Normal(0.0, 1.0).cdf(torch.arange(8, dtype=F64) - 3.5)
    mass = ends.diff()
    torch.manual_seed(6)
    values = torch.stack([law.bound(cells) for _ in range(2000)])
    mean, stderr = values.mean(0), values.std(0) / math.sqrt(2000)
    assert_lower_bound(mean, mass.log(), stderr)
    assert float((mass.log() - mean)[1:6].max()) < 0.2
    # Uniform dequantisation of a normal: E log p(x + u) in closed form.
    around = torch.arange(7, dtype=F64) - 3.0
    exact = -(around**2 + 1 / 12) / 2 - math.log(2 * math.pi) / 2
    assert_estimate(mean, exact, stderr, rounding=0.01)
    x = next(c for c in CONVERSIONS if c.name == "reverse-diffusion").convert(law).sample((50,))
    assert x.dtype == torch.long
    assert 0 <= int(x.min()) <= int(x.max()) <= 6


def test_a_law_without_density_or_bound_cannot_be_quantized():
    class Nothing(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        capabilities = frozenset({C.SAMPLE})

    with pytest.raises(OptionError, match="neither a log_prob nor a bound"):
        Quantized(Nothing((), (2,), validate_args=False), levels=3)
