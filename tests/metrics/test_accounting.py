"""Likelihood accounting."""

import math

import pytest
import torch

from pgen.errors import OptionError
from pgen.metrics import bits_per_dim, cell_log_mass, mean_and_error, perplexity


def test_a_uniform_byte_costs_eight_bits():
    assert float(bits_per_dim(torch.tensor(-12 * math.log(256)), 12)) == pytest.approx(8.0)
    assert float(perplexity(torch.tensor(-12 * math.log(256)), 12)) == pytest.approx(256.0, rel=1e-5)


def test_a_uniform_density_over_the_range_stands_for_the_mass_of_a_level():
    """Density 1 / (L w) for each scalar, in cells of width w: mass 1 / L, whatever the width."""
    for width in (1.0, 1 / 256, 3.0):
        density = torch.tensor(-5 * math.log(17 * width))
        assert float(cell_log_mass(density, 5, width)) == pytest.approx(-5 * math.log(17))


def test_mean_and_error():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert mean_and_error(x) == (3.0, pytest.approx(float(x.std()) / 2))
    assert math.isnan(mean_and_error(x[:1])[1])


def test_bad_input_is_named():
    with pytest.raises(OptionError, match="at least one scalar"):
        bits_per_dim(torch.zeros(1), 0)
    with pytest.raises(OptionError, match="positive width"):
        cell_log_mass(torch.zeros(1), 2, 0.0)
