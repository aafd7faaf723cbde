"""Boltzmann machines against enumeration of all their states."""

import pytest
import torch

from pgen.algorithms.energy.space import Space
from pgen.errors import DataError, OptionError
from pgen.nn import RBM
from pgen.nn.boltzmann import GaussianRBM
from pgen.nn.deep_boltzmann import DeepBoltzmann
from pgen.testing.statistics import StatisticalFailure, assert_frequencies

VISIBLE, HIDDEN = 6, 4
CODES = torch.tensor([2.0**i for i in range(VISIBLE)])


def every(n=VISIBLE):
    return Space.of(torch.distributions.constraints.boolean, (n,)).every(torch.zeros(()))


def machine(kind="rbm"):
    torch.manual_seed(0)
    made = RBM(VISIBLE, HIDDEN, scale=0.7) if kind == "rbm" else DeepBoltzmann((VISIBLE, 3, 2), scale=0.9)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def test_free_energies_are_sums_over_hidden_units():
    rbm, x, h = machine(), every(), every(HIDDEN)
    joint = x @ rbm.visible_bias + (h @ rbm.hidden_bias)[:, None] + h @ rbm.weight @ x.T  # [16, 64]
    torch.testing.assert_close(rbm(x), -joint.logsumexp(0))


def test_free_energies_of_a_deep_machine_are_sums_over_all_hidden_units():
    deep, x = machine("deep"), every()
    w1, w2 = deep.weights
    b0, b1, b2 = deep.biases
    one, two = every(3), every(2)
    joint = (
        (x @ b0)[:, None, None]
        + (one @ b1)[:, None]
        + (two @ b2)
        + (x @ w1.T @ one.T)[:, :, None]
        + one @ w2.T @ two.T
    )
    torch.testing.assert_close(deep(x), -joint.flatten(1).logsumexp(1))
    torch.testing.assert_close(deep.log_partition().float(), joint.flatten().logsumexp(0))


@pytest.mark.parametrize("kind", ["rbm", "deep"])
def test_sweeps_and_draws_have_the_law_of_the_energy(kind):
    made, x = machine(kind), every()
    p = (-made(x)).softmax(0).detach()
    torch.testing.assert_close((-made(x)).logsumexp(0).double(), made.log_partition())
    torch.manual_seed(1)
    index = {int(code): i for i, code in enumerate(x @ CODES)}

    def places(rows):
        return torch.tensor([index[int(code)] for code in rows @ CODES])

    drawn = made.sample(20_000)
    assert_frequencies(places(drawn), p)
    swept = made.sweep(made.sweep(drawn))
    assert_frequencies(places(swept.detach()), p)
    other = (-1.3 * made(x)).softmax(0).detach()
    with pytest.raises(StatisticalFailure):
        assert_frequencies(places(swept.detach()), other)


@pytest.mark.parametrize("kind", ["rbm", "deep"])
def test_the_way_from_independent_bits_begins_and_ends_right(kind):
    made = machine(kind).like(torch.bernoulli(torch.full((100, VISIBLE), 0.3)))
    x = every()
    torch.testing.assert_close(made.tempered(1.0)(x), made(x))
    cold = -made.tempered(0.0)(x)
    bits = torch.distributions.Bernoulli(logits=made.rates).log_prob(x).sum(1)
    torch.testing.assert_close(cold.log_softmax(0), bits)


def test_gaussian_units_have_the_density_of_their_energy():
    torch.manual_seed(2)
    made = GaussianRBM(2, 3, scale=0.5)
    t = torch.linspace(-9, 9, 601, dtype=torch.float32)
    x = torch.cartesian_prod(t, t)
    log_z = (-made(x)).double().logsumexp(0) + 2 * torch.log(torch.tensor(18 / 600.0))
    assert abs(float((log_z - made.log_partition()).detach())) < 1e-3


def test_wrong_sizes_are_named():
    with pytest.raises(OptionError, match="RBM"):
        RBM(0, 3)
    with pytest.raises(DataError, match="places|shape"):
        RBM(4, 2)(torch.zeros(1, 5))
    with pytest.raises(OptionError, match="one hidden layer"):
        DeepBoltzmann((4, 2))
    assert RBM(40, 30).log_partition() is None
