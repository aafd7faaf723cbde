"""Laws of the set encoder: no order, any size, batches apart."""

import pytest
import torch

from pgen.errors import DataError, OptionError
from pgen.nn import DeepSet


def test_the_order_of_elements_does_not_matter():
    net, x = DeepSet(3, learned=5), torch.randn(4, 9, 3)
    torch.testing.assert_close(net(x), net(x[:, torch.randperm(9)]))


def test_batches_do_not_mix():
    net, x = DeepSet(3, learned=5), torch.randn(4, 9, 3)
    torch.testing.assert_close(net(x)[2], net(x[2:3])[0])


def test_any_dimension_in_front_of_the_features_can_be_the_set():
    net, x = DeepSet(2), torch.randn(4, 6, 5, 2)
    torch.testing.assert_close(net(x, dim=-3), net(x.movedim(1, 2)))


def test_the_mean_and_the_size_are_among_the_statistics():
    net, x = DeepSet(2, learned=3, size=4), torch.randn(7, 2)
    out = net(x)
    assert out.shape == (net.outputs,)
    torch.testing.assert_close(out[3:5], x.mean(0))
    torch.testing.assert_close(out[5], torch.tensor(7 / 4).log())


def test_copies_of_a_set_change_only_its_size():
    net, x = DeepSet(2, learned=3), torch.randn(5, 2)
    once, twice = net(x), net(torch.cat([x, x]))
    torch.testing.assert_close(once[:-1], twice[:-1])
    assert twice[-1] > once[-1]


def test_wrong_inputs_are_named():
    with pytest.raises(DataError, match="counted from the right"):
        DeepSet(2)(torch.zeros(3, 2), dim=0)
    with pytest.raises(DataError, match="n >= 1 elements"):
        DeepSet(2)(torch.zeros(0, 2))
    with pytest.raises(OptionError, match="size=0"):
        DeepSet(2, size=0)
