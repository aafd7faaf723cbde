"""Laws of self-conditioning: a function of its inputs, the plain network where guesses weigh nothing, no gradient in guesses."""

import pyro
import pytest
import torch
from torch import nn

import pgen
from pgen.distributions import EDM, Diffusion
from pgen.errors import DataError
from pgen.nn import DenoiserMLP, Preconditioned, SelfConditioned, UNet
from pgen.testing.statistics import StatisticalFailure, assert_frequencies


def networks():
    """Wrapped networks with their event shapes, and plain ones of the same weights but for those of the guess."""
    torch.manual_seed(0)
    wide, plain = DenoiserMLP(6, hidden=(16, 16), outputs=3), DenoiserMLP(3, hidden=(16, 16))
    both, alone = UNet(2, width=8, outputs=1), UNet(1, width=8)
    return [(wide, plain, (3,), "first.weight"), (both, alone, (1, 8, 8), "first.weight")]


def randomized(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["perceptron", "unet"])
def test_guesses_of_no_weight_leave_the_plain_network(which, training):
    wide, plain, shape, first = networks()[which]
    randomized(wide)
    weights = wide.state_dict()
    weights[first][:, len(weights[first][0]) // 2 :] = 0.0  # those of the guess
    plain.load_state_dict({**weights, first: weights[first][:, : len(weights[first][0]) // 2]})
    x, noise = torch.randn(4, *shape), torch.randn(4)
    found = SelfConditioned(wide).train(training)(x, noise)
    torch.testing.assert_close(found, plain(x, noise))


def test_in_evaluation_it_is_a_function_that_uses_the_guess():
    network = SelfConditioned(randomized(DenoiserMLP(4, hidden=(16,), outputs=2))).eval()
    x, noise = torch.randn(6, 2), torch.randn(6)
    assert torch.equal(network(x, noise), network(x, noise))
    rows = torch.cat([network(x[i : i + 1], noise[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(network(x, noise), rows)
    first = network.network(torch.cat([x, 0 * x], 1), noise)
    torch.testing.assert_close(network(x, noise), network.network(torch.cat([x, first], 1), noise))
    assert (network(x, noise) - first).abs().max() > 1e-3


def test_gradients_go_through_guesses_in_evaluation_alone():
    network = SelfConditioned(randomized(DenoiserMLP(4, hidden=(16,), outputs=2)), share=1.0)
    x, noise = torch.randn(3, 2), torch.rand(3)

    def slope(guessed):
        y = x.clone().requires_grad_()
        return torch.autograd.grad(guessed(y).sum(), y)[0]

    guess = network.network(torch.cat([x, 0 * x], 1), noise).detach()
    held = slope(lambda y: network.network(torch.cat([y, guess], 1), noise))
    torch.testing.assert_close(slope(lambda y: network(y, noise)), held)
    network.eval()
    h = 1e-3 * torch.eye(2)[0]
    with torch.no_grad():
        change = (network(x + h, noise) - network(x - h, noise)).sum(1) / 2e-3
    torch.testing.assert_close(slope(lambda y: network(y, noise))[:, 0], change, atol=1e-3, rtol=1e-3)
    assert (slope(lambda y: network(y, noise)) - held).abs().max() > 1e-3


def test_half_of_the_rows_are_given_a_guess_while_training():
    class Told(nn.Module):
        """Says whether a guess is there; its first guess is 1."""

        def forward(self, both, noise):
            return both[:, :1].clone().fill_(1.0) + both[:, 1:]

    torch.manual_seed(0)
    given = (SelfConditioned(Told()).train()(torch.zeros(4000, 1), torch.zeros(4000)) - 1).squeeze(1)
    assert_frequencies(given.long(), torch.tensor([0.5, 0.5]))
    with pytest.raises(StatisticalFailure):
        assert_frequencies(given.long(), torch.tensor([0.6, 0.4]))


def test_conditions_reach_the_network():
    network = randomized(DenoiserMLP(4, hidden=(8,), context=3, outputs=2))
    found = SelfConditioned(network).eval()
    x, noise, context = torch.randn(2, 2), torch.zeros(2), torch.randn(2, 3)
    assert (found(x, noise, context) - found(x, noise, -context)).abs().max() > 1e-3


def test_what_does_not_fit_is_said():
    with pytest.raises(DataError, match=r"the network gave \(5, 4\)"):
        SelfConditioned(DenoiserMLP(4))(torch.zeros(5, 2), torch.zeros(5))
    with pytest.raises(DataError, match="event shape"):
        SelfConditioned(DenoiserMLP(()))(torch.zeros(5), torch.zeros(5))


def test_the_backend_trains_it_in_one_mode_and_asks_it_in_the_other():
    denoiser = Preconditioned(SelfConditioned(DenoiserMLP(4, hidden=(16, 16), outputs=2)), 1.0)
    modes = []
    denoiser.network.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Diffusion(denoiser, EDM(), (2,)))

    torch.manual_seed(0)
    data = torch.tensor([1.0, -1.0]) + 0.5 * torch.randn(500, 2)
    run = pgen.Run(steps=60, lr=1e-2, progress=False, compile=False)
    fitted = pgen.fit(program, {"x": data}, "score", run=run)
    assert modes.count(True) == 60
    modes.clear()
    a, b = (fitted.sample(5, seed=0)["x"] for _ in range(2))
    assert torch.equal(a, b)
    assert modes
    assert not any(modes)
