"""Walks leave densities invariant on every kind of space; a step size alone does not."""

import math

import pytest
import torch
from torch.distributions import constraints

from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Moves, Sweeps, Usual, with_gradient
from pgen.algorithms.kernels.gibbs import Gibbs
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import MALA, ULA
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_mean

CHAINS = 20_000
COUPLING = torch.tensor([[0.0, 0.8, -0.5], [0.8, 0.0, 0.3], [-0.5, 0.3, 0.0]])


def ising(x):
    return (x @ COUPLING * x).sum(-1) + x[:, 0]


def bits(n):
    torch.manual_seed(1)
    space = Space.of(constraints.boolean, (3,))
    every = space.every(torch.zeros(()))
    p = ising(every).softmax(0)
    return space, every, p, every[torch.multinomial(p, n, replacement=True)]


@pytest.mark.parametrize("kind", ["gradients", "gibbs"])
def test_bits_stay_as_they_are(kind):
    space, _, p, x = bits(CHAINS)
    walk = Usual(space).walk(3) if kind == "gradients" else Moves(space, discrete=Gibbs((2, 2, 2)), steps=3)
    moved = walk(x, ising, torch.tensor(1.0)).position
    assert bool((moved != x).any())
    assert_frequencies((moved @ torch.tensor([4.0, 2.0, 1.0])).long(), p)


def test_a_walk_for_another_density_is_noticed():
    space, _, p, x = bits(CHAINS)
    moved = Usual(space).walk(10)(x, lambda x: 0.8 * ising(x), torch.tensor(1.0)).position
    with pytest.raises(StatisticalFailure):
        assert_frequencies((moved @ torch.tensor([4.0, 2.0, 1.0])).long(), p)


@pytest.mark.parametrize("kernel", [MALA(), HMC(steps=3)])
def test_positive_numbers_keep_their_law(kernel):
    torch.manual_seed(2)
    law = torch.distributions.Gamma(3.0, 2.0)
    space = Space.of(constraints.positive, (1,))
    x = law.sample((CHAINS, 1))
    walk = Moves(space, kernel, steps=5)
    moved, accept = walk(x, lambda x: law.log_prob(x).squeeze(-1), torch.tensor(0.8))
    assert 0.3 < float(accept) < 1
    assert_mean(moved, 1.5, std=math.sqrt(3) / 2)
    assert_mean(moved.square(), 3.0)
    biased, _ = Moves(space, ULA(), steps=5)(x, lambda x: law.log_prob(x).squeeze(-1), torch.tensor(1.4))
    with pytest.raises(StatisticalFailure):
        assert_mean(biased.square(), 3.0)


def test_mixed_spaces_keep_their_law():
    torch.manual_seed(3)
    space = Space.of(
        constraints.cat([constraints.real, constraints.integer_interval(0, 2)], dim=-1, lengths=[1, 1]), (2,)
    )
    weights, means = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.0, 2.0])

    def f(x):
        k = x[:, 1].long()
        return weights.log()[k] - (x[:, 0] - means[k]).square() / 2

    k = torch.multinomial(weights, CHAINS, replacement=True)
    x = torch.stack([means[k] + torch.randn(CHAINS), k.float()], 1)
    for walk in (Usual(space).walk(4), Usual(space).walk(4).backwards()):
        moved = walk(x, f, torch.tensor(1.0)).position
        assert_frequencies(moved[:, 1].long(), weights)
        assert_mean(moved[:, 0], float(weights @ means))


def test_sweeps_are_the_energys_own():
    walked = Sweeps(lambda x: x + 1, steps=3)(torch.zeros(2, 1), lambda x: x.sum(-1), torch.tensor(1.0))
    assert walked.position.tolist() == [[3.0], [3.0]]


def test_gradients_do_not_follow_what_is_learned():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    value, slope = with_gradient(lambda x: -scale * x.square().sum(-1))(torch.ones(1, 2))
    assert not value.requires_grad
    assert not slope.requires_grad
    assert slope.tolist() == [[-4.0, -4.0]]


def test_a_kernel_that_is_missing_is_named():
    with pytest.raises(ValueError, match="3 discrete numbers"):
        Moves(Space.of(constraints.boolean, (3,)), MALA())
    with pytest.raises(ValueError, match="steps"):
        Usual(Space.of(constraints.real, (1,))).walk(0)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.tensor([0.3, -0.2])[x.long()].sum(-1),  # looked up
        lambda x: (x * torch.nn.Parameter(torch.ones(1))).sum(-1).detach(),
    ],
)
def test_an_energy_without_a_gradient_is_told_what_to_be(f):
    space = Space.of(constraints.boolean, (3,))
    with pytest.raises(ValueError, match="no gradient in the values"):
        Usual(space).walk()(torch.zeros(4, 3), f, torch.tensor(1.0))
    moved = Moves(space, discrete=Gibbs((2, 2, 2)))(torch.zeros(4, 3), f, torch.tensor(1.0)).position
    assert moved.shape == (4, 3)
