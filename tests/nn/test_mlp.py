"""Laws of the perceptron: batches, context, skip, sizes."""

import pytest
import torch
from torch import nn

from pgen.errors import DataError, OptionError
from pgen.nn import MLP


@pytest.mark.parametrize("batch", [(), (5,), (4, 1, 3)])
@pytest.mark.parametrize("hidden", [(), (7,), (8, 6)])
def test_it_acts_on_the_last_dimension_only(batch, hidden):
    net = MLP(3, 2, hidden)
    x = torch.randn(*batch, 3)
    rows = torch.stack([net(row) for row in x.reshape(-1, 3)])
    torch.testing.assert_close(net(x), rows.reshape(*batch, 2))


def test_context_broadcasts_against_the_input():
    net = MLP(3, 2, (8,), context=4)
    x, c = torch.randn(5, 1, 3), torch.randn(6, 4)
    out = net(x, c)
    assert out.shape == (5, 6, 2)
    torch.testing.assert_close(out[2, 3], net(x[2, 0], c[3]))


def test_with_skip_every_affine_map_is_reached_exactly():
    net = MLP(3, 2, (1,), skip=True)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    with torch.no_grad():
        net.skip.weight.copy_(weight)
        net.last.weight.zero_()
        net.last.bias.copy_(bias)
    x = torch.randn(10, 3)
    torch.testing.assert_close(net(x), x @ weight.T + bias)


def test_the_activation_is_the_one_asked_for():
    layers = MLP(1, 1, (2, 2), nn.Tanh).layers
    assert [type(m) for m in layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("sizes", [(0, 1, (2,)), (1, 0, (2,)), (1, 1, (0,)), (-1, 1, ())])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(OptionError, match="positive whole numbers"):
        MLP(*sizes)


def test_wrong_inputs_are_named():
    with pytest.raises(DataError, match=r"shape \(2, 4\); expected \[\.\.\., 3\]"):
        MLP(3, 1)(torch.zeros(2, 4))
    with pytest.raises(DataError, match="got none as context"):
        MLP(3, 1, context=2)(torch.zeros(2, 3))
    with pytest.raises(DataError, match="expected none"):
        MLP(3, 1)(torch.zeros(2, 3), torch.zeros(2, 1))
