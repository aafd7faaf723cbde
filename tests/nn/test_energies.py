"""Networks that are energies: bounded slopes, growth far away, contexts, shapes, and what they refuse."""

import pytest
import torch
from torch import nn

from pgen.errors import DataError, OptionError
from pgen.nn import ConvEnergy, MLPEnergy
from pgen.nn.energies import lipschitz


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def steepest(energy, pairs):
    """The greatest slope between pairs of values `[2, n, ...]`."""
    with torch.no_grad():
        rise = (energy(pairs[0]) - energy(pairs[1])).abs()
    return float((rise / (pairs[0] - pairs[1]).flatten(1).norm(dim=1)).max())


def widened(network, factor=20.0):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    return network


def test_spectral_layers_bound_the_slope_whatever_is_learned():
    """SiLU has slopes of at most 1.1, in two layers, and weights of a norm of at most 1."""
    pairs = torch.randn(2, 500, 3)
    held = MLPEnergy(3, (32, 32), spectral=True)
    for parameter in held.network.parameters():
        with torch.no_grad():
            parameter.mul_(20.0)
    with torch.no_grad():
        for _ in range(
            200
        ):  # estimates of singular values follow by one step of the power method at every call in training
            held(pairs[0])
    assert steepest(held, pairs) <= 1.1**2 * 1.01
    assert steepest(widened(MLPEnergy(3, (32, 32))), pairs) > 10


def test_singular_values_are_those_of_a_decomposition():
    layer = lipschitz(nn.Linear(5, 4))
    for _ in range(200):
        layer(torch.zeros(1, 5))
    with torch.no_grad():
        assert float(torch.linalg.matrix_norm(layer.weight, 2)) <= 1 + 1e-4


def test_confinement_makes_energies_grow_as_a_square():
    loose, held = MLPEnergy(2, (16,)), MLPEnergy(2, (16,), confinement=2.0)
    held.network.load_state_dict(loose.network.state_dict())
    x = 100 * torch.randn(50, 2)
    torch.testing.assert_close(held(x) - loose(x), x.square().sum(1) / 8, rtol=1e-4, atol=1e-2)
    assert bool((held(1e4 * x) > held(x)).all())


def test_a_context_changes_an_energy_and_waves_add_detail():
    energy = MLPEnergy(2, (16,), context=3)
    x = torch.randn(4, 2)
    assert not torch.allclose(energy(x, torch.zeros(4, 3)), energy(x, torch.ones(4, 3)))
    fine = MLPEnergy(2, (16,), frequencies=8, detail=0.5)
    assert fine.waves.shape == (8, 2)
    assert not any(name == "waves" for name, _ in fine.named_parameters())  # drawn once, not learned
    assert fine(x).shape == (4,)


@pytest.mark.parametrize("network", [MLPEnergy(2), ConvEnergy((8, 8))], ids=["mlp", "conv"])
def test_a_single_energy_has_no_constant(network):
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    assert last.bias is None


def test_logits_keep_their_constants():
    network = ConvEnergy((8, 8), outputs=3)
    assert [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].bias is not None
    assert network(torch.randn(5, 8, 8)).shape == (5, 3)


def test_images_may_be_flat_or_have_colours():
    grey = ConvEnergy((8, 8))
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(grey(x), grey(x.flatten(1)))
    assert ConvEnergy((9, 6), colours=3)(torch.randn(2, 3, 9, 6)).shape == (2,)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: MLPEnergy(2, frequencies=-1), OptionError, "frequencies=-1"),
        (lambda: MLPEnergy(2, confinement=0.0), OptionError, "confinement=0.0"),
        (lambda: MLPEnergy(2)(torch.zeros(4, 3)), DataError, r"\[rows, 2\]"),
        (lambda: ConvEnergy((0, 8)), OptionError, r"\(0, 8\)"),
        (lambda: ConvEnergy((8, 8))(torch.zeros(4, 63)), DataError, r"\(8, 8\)"),
    ],
)
def test_what_is_wrong_is_named(call, error, told):
    with pytest.raises(error, match=told):
        call()
