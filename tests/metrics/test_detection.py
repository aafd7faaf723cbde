"""Areas under curves and calibration, against scikit-learn, closed forms and draws that are calibrated by construction."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from pgen.errors import OptionError
from pgen.metrics import auroc, calibration_error


@pytest.mark.parametrize("rounded", [False, True])
def test_the_area_is_that_of_another_library_ties_included(rounded):
    g = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(300, generator=g) + 0.7, torch.randn(200, generator=g)
    if rounded:
        inside, outside = inside.round(), outside.round()
    labels = torch.cat([torch.ones(300), torch.zeros(200)])
    expected = roc_auc_score(labels.numpy(), torch.cat([inside, outside]).numpy())
    assert float(auroc(inside, outside)) == pytest.approx(expected, abs=1e-12)
    assert float(auroc(outside, inside)) == pytest.approx(1 - expected, abs=1e-12)
    assert float(auroc(7 * inside - 3, 7 * outside - 3)) == pytest.approx(expected, abs=1e-12)


def test_normal_scores_have_the_area_of_the_closed_form():
    """Phi(d / sqrt 2), to six standard errors of at most 1 / sqrt(12 n)."""
    g = torch.Generator().manual_seed(1)
    found = auroc(torch.randn(20_000, generator=g) + 1, torch.randn(20_000, generator=g))
    expected = 0.5 * (1 + math.erf(0.5))
    assert abs(float(found) - expected) < 6 * math.sqrt(2 / 12 / 20_000)


def test_labels_drawn_by_the_probabilities_are_calibrated_and_others_are_not():
    g = torch.Generator().manual_seed(2)
    probs = (2 * torch.randn(20_000, 5, generator=g)).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=g)[:, 0]
    noise = math.sqrt(15 / 20_000)  # bins whose gaps are but noise, of variance at most p (1 - p) / n_b each
    assert float(calibration_error(probs, labels)) < noise
    sharper = probs.square() / probs.square().sum(-1, keepdim=True)
    assert float(calibration_error(sharper, labels)) > 3 * noise


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: auroc(torch.zeros(0), torch.zeros(3)), "inside"),
        (lambda: auroc(torch.zeros(3), torch.tensor([math.nan])), "outside"),
        (lambda: calibration_error(torch.zeros(3, 2), torch.zeros(4)), r"\[n, classes\]"),
        (lambda: calibration_error(torch.zeros(3, 2), torch.zeros(3)), "softmax"),
        (lambda: calibration_error(torch.full((3, 2), 0.5), torch.zeros(3), bins=0), "bins"),
    ],
)
def test_what_is_wrong_is_named(call, told):
    with pytest.raises(OptionError, match=told):
        call()
