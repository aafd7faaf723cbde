"""The classifier two-sample test: guessing where there is nothing to see, sure where there is."""

import math

import pytest
import torch

from pgen.errors import OptionError
from pgen.metrics import c2st

OPTIONS = {"hidden": 16, "steps": 40, "folds": 2}


def test_p_values_keep_their_size_under_one_law():
    """Of 20 comparisons under one law, 10 or more with p <= 0.05 happen once in 1e7."""
    p = [c2st(torch.randn(60, 2), torch.randn(60, 2), seed=s, **OPTIONS).p_value for s in range(20)]
    assert sum(v <= 0.05 for v in p) < 10
    far = [c2st(torch.randn(60, 2), torch.randn(60, 2) + 1.5, seed=s, **OPTIONS).p_value for s in range(3)]
    assert all(v <= 0.05 for v in far), "the check can fail"


def test_accuracy_reaches_the_best_that_there_is():
    """Means d apart: the best accuracy is Phi(d / 2); 600 rows, five standard errors are 0.1."""
    x, y = torch.randn(300, 2), torch.randn(300, 2) + torch.tensor([1.5, 0.0])
    best = 0.5 * (1 + math.erf(0.75 / math.sqrt(2)))
    found = c2st(x, y, hidden=0)
    assert found.accuracy == pytest.approx(best, abs=0.1)
    assert found.stderr == pytest.approx(math.sqrt(best * (1 - best) / 600), rel=0.2)


def test_a_hidden_layer_sees_what_a_line_does_not():
    angle = torch.rand(150) * 2 * math.pi
    circle = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    centre = 0.3 * torch.randn(150, 2)
    assert c2st(circle, centre).accuracy > 0.95
    assert c2st(circle, centre, hidden=0).accuracy < 0.8


def test_the_same_seed_gives_the_same_answer_and_gradients_may_be_off():
    x, y = torch.randn(20, 2), torch.randn(25, 2)
    state = torch.get_rng_state()
    with torch.no_grad():
        one = c2st(x, y, seed=7, **OPTIONS)
    assert one == c2st(x, y, seed=7, **OPTIONS)
    assert torch.equal(state, torch.get_rng_state())


def test_constant_features_are_harmless():
    x = torch.zeros(20, 3)
    assert c2st(x, x, **OPTIONS).accuracy == pytest.approx(0.5)


def test_bad_options_are_named():
    with pytest.raises(OptionError, match="expected 2 to 5 folds"):
        c2st(torch.zeros(5, 1), torch.zeros(6, 1), folds=6)
