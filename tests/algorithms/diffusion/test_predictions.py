"""Laws of conversions between what networks predict: exact inverses, and the same denoiser from all of them."""

import itertools

import pytest
import torch

from pgen.algorithms.diffusion import predictions, weightings
from pgen.algorithms.diffusion.field import score_of
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.predictions import DATA, NOISE, SCORE, VELOCITY, V, convert, denoiser_from
from pgen.algorithms.diffusion.schedules import EDM, VE, VP, RectifiedFlow, SubVP

KINDS = [DATA, NOISE, SCORE, V, VELOCITY, predictions.preconditioned(0.7)]
SCHEDULES = [VE(), VP(), VP("cosine"), SubVP(), EDM(), RectifiedFlow()]
LEVELS = torch.tensor([0.01, 0.3, 1.0, 4.0, 30.0], dtype=torch.float64)


def named(values):
    return [getattr(v, "name", None) or f"{type(v).__name__}{getattr(v, 'kind', '')}" for v in values]


def noisy(event=(3,)):
    x0, noise = (torch.randn(len(LEVELS), *event, dtype=torch.float64) for _ in range(2))
    level = LEVELS.reshape(-1, *[1] * len(event))
    return x0, noise, x0 + level * noise, level


@pytest.mark.parametrize("kind", KINDS, ids=named(KINDS))
@pytest.mark.parametrize("event", [(), (3,), (2, 1, 4)])
def test_data_come_back_from_the_target(kind, event):
    x0, noise, x, level = noisy(event)
    p, q = kind.coefficients(level)
    torch.testing.assert_close(kind.data(p * x0 + q * noise, x, LEVELS), x0, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(kind.of(x0, x, LEVELS), p * x0 + q * noise, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(KINDS, 2)))
def test_any_prediction_becomes_any_other(source, target):
    x0, noise, x, level = noisy()
    (p, q), (r, s) = source.coefficients(level), target.coefficients(level)
    found = convert(p * x0 + q * noise, x, LEVELS, source, target)
    torch.testing.assert_close(found, r * x0 + s * noise, atol=1e-9, rtol=1e-9)


def test_each_is_what_its_name_says():
    x0, noise, x, level = noisy()
    scale = VP().scale(VP().time(level))
    torch.testing.assert_close(V.of(x0, x, LEVELS), scale * noise - scale * level * x0)
    torch.testing.assert_close(NOISE.of(x0, x, LEVELS), noise)
    torch.testing.assert_close(SCORE.of(x0, x, LEVELS), score_of(x0, x, LEVELS))
    torch.testing.assert_close(VELOCITY.of(x0, x, LEVELS), noise - x0)


def test_targets_of_v_and_of_the_preconditioned_network_have_unit_variance():
    for kind, spread in ((V, 1.0), (predictions.preconditioned(0.3), 0.3)):
        p, q = kind.coefficients(LEVELS)
        torch.testing.assert_close(spread**2 * p**2 + q**2, torch.ones_like(p))


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [
        (NOISE, weightings.Uniform()),
        (V, weightings.V()),
        (VELOCITY, weightings.FlowMatching()),
        (predictions.preconditioned(0.7), weightings.EDM(0.7)),
    ],
)
def test_a_square_loss_of_a_prediction_is_its_weighting(kind, weighting):
    x0, _, x, _ = noisy()
    guess = torch.randn_like(x0)
    error = (kind.of(guess, x, LEVELS) - kind.of(x0, x, LEVELS)).square().sum(-1)
    torch.testing.assert_close(error, weighting(LEVELS) * (guess - x0).square().sum(-1))
    torch.testing.assert_close(kind.weight(LEVELS), weighting(LEVELS))


def mixture():
    means = torch.tensor([[-1.0, 0.5], [1.0, 2.0]], dtype=torch.float64)
    return Mixture(means, scale=torch.tensor([0.3, 0.6], dtype=torch.float64))


def truth(schedule, prediction):
    """An exact network in a schedule's coordinates, from its density there and autograd alone."""
    law = mixture()

    def density(x, t):
        scale = schedule.scale(t)
        return (law.log_prob(x / scale.unsqueeze(-1), schedule.sigma(t)) - 2 * scale.log()).sum()

    def network(x, t):
        score = torch.func.grad(density)(x, t)
        scale, deviation = schedule.scale(t)[:, None], (schedule.scale(t) * schedule.sigma(t))[:, None]
        noise = -deviation * score
        data = (x - deviation * noise) / scale
        h = 1e-6
        rates = [
            ((f(t + h) - f(t - h)) / (2 * h))[:, None]
            for f in (schedule.scale, lambda t: schedule.scale(t) * schedule.sigma(t))
        ]
        turned = (scale * noise - deviation * data) / torch.sqrt(scale**2 + deviation**2)
        velocity = rates[0] * data + rates[1] * noise
        return {"data": data, "noise": noise, "score": score, "v": turned, "velocity": velocity}[prediction]

    return network


@pytest.mark.parametrize("prediction", ["data", "noise", "score", "v", "velocity"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named(SCHEDULES))
def test_a_denoiser_from_anything_is_the_denoiser(schedule, prediction):
    law, level = mixture(), torch.tensor([0.05, 0.4, 1.0, 5.0], dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64) * (1 + level[:, None])
    found = denoiser_from(truth(schedule, prediction), prediction, schedule)(x, level)
    torch.testing.assert_close(found, law(x, level), atol=1e-6, rtol=1e-6)


def test_a_score_taken_for_that_of_scale_free_values_is_noticed():
    level = torch.tensor([1.0, 5.0], dtype=torch.float64)
    x = torch.randn(2, 2, dtype=torch.float64)
    wrong = denoiser_from(truth(VP(), "score"), SCORE, VP())(x, level)
    assert (wrong - mixture()(x, level)).abs().max() > 0.01


def test_the_flow_velocity_is_noise_minus_data():
    p, q = predictions.velocity_along(RectifiedFlow()).coefficients(LEVELS)
    torch.testing.assert_close(p, -torch.ones_like(p))
    torch.testing.assert_close(q, torch.ones_like(q))


def test_the_network_is_given_the_context():
    seen = denoiser_from(lambda x, t, c: x * 0 + c, "data", VP())
    context = torch.tensor([[3.0]])
    torch.testing.assert_close(seen(torch.zeros(1, 2), torch.ones(1), context), torch.full((1, 2), 3.0))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'epsilon': expected 'data', 'noise'"):
        denoiser_from(lambda x, t: x, "epsilon", VP())
