"""Laws of guidance: scale 1 changes nothing, an exact classifier gives the exact conditional denoiser."""

import pytest
import torch

from pgen.algorithms.diffusion import guidance
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.testing.statistics import assert_mean

F64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.0], [0.5, 2.0], [2.0, 0.0]], dtype=F64)


def whole():
    return Mixture(MEANS, scale=0.4)


def part(k):
    return Mixture(MEANS[k : k + 1], scale=0.4)


def conditional(x, sigma, context):
    """The denoiser of the component named by a one-hot context; of all of them, where it is NaN."""
    of_all = whole()(x, sigma)
    of_each = torch.stack([part(k)(x, sigma) for k in range(3)], 1)
    found = (context.nan_to_num().unsqueeze(-1) * of_each).sum(1)
    return torch.where(context.isnan().any(-1, keepdim=True), of_all, found)


def rows():
    return torch.randn(7, 2, dtype=F64), torch.linspace(0.1, 3.0, 7, dtype=F64), torch.eye(3, dtype=F64)[1]


def test_classifier_free_guidance_extrapolates_from_none_to_the_condition():
    x, sigma, context = rows()
    one, none = part(1)(x, sigma), whole()(x, sigma)
    for scale in (0.0, 1.0, 2.5):
        found = guidance.classifier_free(conditional, scale)(x, sigma, context)
        torch.testing.assert_close(found, none + scale * (one - none))


def test_it_evaluates_both_in_one_call():
    calls = []

    def counting(x, sigma, context):
        calls.append(len(x))
        return conditional(x, sigma, context)

    guidance.classifier_free(counting, 2.0)(*rows())
    assert calls == [14]


def test_guidance_can_be_kept_to_some_noise_levels():
    x, sigma, context = rows()
    found = guidance.classifier_free(conditional, guidance.within(1.0, 2.0, 3.0))(x, sigma, context)
    strong = guidance.classifier_free(conditional, 3.0)(x, sigma, context)
    inside = (sigma >= 1.0) & (sigma <= 2.0)
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(found[inside], strong[inside])
    torch.testing.assert_close(found[~inside], part(1)(x, sigma)[~inside])


def test_an_exact_classifier_gives_the_denoiser_of_the_class():
    x, sigma, _ = rows()

    def log_prob(x, sigma):
        return part(1).log_prob(x, sigma) - whole().log_prob(x, sigma)

    found = guidance.classifier(whole(), log_prob)(x, sigma)
    torch.testing.assert_close(found, part(1)(x, sigma))
    with torch.no_grad():  # where solvers are
        torch.testing.assert_close(guidance.classifier(whole(), log_prob)(x, sigma), found)
    twice = guidance.classifier(whole(), log_prob, 2.0)(x, sigma)
    torch.testing.assert_close(twice - found, found - whole()(x, sigma))


def test_autoguidance_goes_away_from_the_bad():
    x, sigma, context = rows()
    good, bad = part(1)(x, sigma), whole()(x, sigma)
    for scale in (1.0, 2.0):
        found = guidance.autoguidance(part(1), whole(), scale)(x, sigma)
        torch.testing.assert_close(found, bad + scale * (good - bad))
    conditioned = guidance.autoguidance(conditional, lambda x, s, c: whole()(x, s), 2.0)
    torch.testing.assert_close(conditioned(x, sigma, context.expand(7, 3)), bad + 2 * (good - bad))


def test_conditions_are_dropped_at_their_rate_and_whole():
    context = torch.randn(20_000, 3)
    dropped = guidance.drop_condition(context, torch.rand(20_000), 0.3)
    missing = dropped.isnan()
    assert torch.equal(missing.all(1), missing.any(1))
    assert_mean(missing[:, :1].double(), 0.3)
    assert torch.equal(dropped[~missing], context[~missing])


@pytest.mark.parametrize("shape", [(3,), (7, 3)])
def test_a_condition_is_bound_for_solvers(shape):
    x, sigma, context = rows()
    bound = guidance.given(conditional, context.expand(shape))
    torch.testing.assert_close(bound(x, sigma), part(1)(x, sigma))
    assert guidance.given(whole, None) is whole
