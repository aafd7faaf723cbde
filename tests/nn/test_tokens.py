"""Laws of the transformer over tokens: every place hears every other, rows do not mix, shapes are kept."""

import pytest
import torch

from pgen.errors import DataError, OptionError
from pgen.nn.tokens import TokenTransformer


def stirred(**options):
    """A small one whose last map is not zero."""
    net = TokenTransformer(6, 4, 16, 2, **options).double()
    torch.nn.init.normal_(net.last[1].weight)
    return net.eval()


def test_it_starts_knowing_nothing():
    assert (TokenTransformer(6, 4, 16)(torch.randint(5, (3, 6))) == 0).all()


def test_every_place_hears_every_other():
    net, x = stirred(), torch.randint(4, (1, 6))
    for place in range(6):
        other = x.clone()
        other[:, place] = 4
        assert ((net(other) - net(x)).abs().amax(-1) > 1e-6).all()


def test_places_are_told_apart():
    net, x = stirred(), torch.full((1, 6), 4)
    assert not torch.allclose(net(x)[:, 0], net(x)[:, 1])


def test_rows_do_not_mix():
    net, x = stirred(), torch.randint(5, (7, 6))
    torch.testing.assert_close(net(x)[3], net(x[3:4])[0])


def test_shapes_and_numbers():
    net = TokenTransformer((2, 3), 4, 16, outputs=7, context=3)
    x, c = torch.randint(5, (5, 2, 3)), torch.randn(5, 3)
    assert net(x, c).shape == (5, 2, 3, 7)
    assert net(x[:0], c[:0]).shape == (0, 2, 3, 7)


def test_the_context_is_heard():
    net = stirred(context=2)
    x = torch.randint(5, (1, 6)).expand(2, -1)
    y = net(x, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert not torch.allclose(y[0], y[1])


def test_wrong_inputs_are_named():
    with pytest.raises(OptionError, match="heads must divide"):
        TokenTransformer(8, 4, width=10, heads=4)
    with pytest.raises(DataError, match="expected 6 for each row"):
        TokenTransformer(6, 4, 16)(torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(DataError, match="got no context"):
        TokenTransformer(6, 4, 16, context=2)(torch.zeros(3, 6, dtype=torch.long))
