"""Autoregressive laws: masses sum to one, draws follow them, and the order is kept."""

import itertools

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pgen import Run, fit
from pgen.capability import Capability, capabilities_of
from pgen.distributions import (
    Autoregressive,
    Bernoulli,
    Categorical,
    GaussianMixture,
    LogisticMixture,
    Ordinal,
)
from pgen.errors import DataError, OptionError, ProgramError
from pgen.nn import MADE, CausalConv

FALSE_ALARM = 1e-6


def stirred(network, scale=0.7):
    """The network with weights that matter everywhere, in evaluation mode."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return network.eval()


def every(levels, places):
    """All values: shape [levels ** places, places]."""
    return torch.tensor(list(itertools.product(range(levels), repeat=places)))


def chi_square_p(counts, masses):
    """Chance of counts so far from their expectation, cells of expectation below 5 taken together."""
    expected = masses.double() / masses.double().sum() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = torch.tensor(float(keep.sum()) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def law_of(name):
    """A law over few enough values to list them, its number of levels and of places."""
    order = torch.tensor([2, 0, 3, 1])
    if name == "categorical":
        return Autoregressive(stirred(MADE(4, 3, levels=3, hidden=(16, 16))), (4,), Categorical(3)), 3, 4
    if name == "categorical, other order":
        network = stirred(MADE(4, 3, levels=3, hidden=(16, 12), order=order))
        return Autoregressive(network, (4,), Categorical(3)), 3, 4
    if name == "ordinal":
        return Autoregressive(stirred(MADE(3, 6, levels=5, hidden=(16, 16))), (3,), Ordinal(5)), 5, 3
    if name == "logistic mixture":
        head = LogisticMixture(5, components=2)
        return Autoregressive(stirred(MADE(3, head.size, levels=5, hidden=(16, 16))), (3,), head), 5, 3
    if name == "bernoulli, an image":
        network = stirred(CausalConv((2, 3), 1, levels=2, channels=8, window=5))
        return Autoregressive(network, (2, 3), Bernoulli()), 2, 6
    network = stirred(MADE(4, 3, levels=3, hidden=(16, 16), context=2))
    return Autoregressive(network, (4,), Categorical(3), context=torch.randn(2)), 3, 4


LAWS = [
    "categorical",
    "categorical, other order",
    "ordinal",
    "logistic mixture",
    "bernoulli, an image",
    "categorical, with context",
]


@pytest.mark.parametrize("name", LAWS)
def test_masses_sum_to_one(name):
    law, levels, places = law_of(name)
    values = every(levels, places).view(-1, *law.event_shape)
    with torch.no_grad():
        assert float(law.log_prob(values).exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_log_prob(name):
    law, levels, places = law_of(name)
    values = every(levels, places)
    masses = law.log_prob(values.view(-1, *law.event_shape)).exp().detach()
    draws = law.sample((20_000,)).flatten(1).long()
    codes = draws @ levels ** torch.arange(places).flip(0)
    counts = torch.bincount(codes, minlength=len(values))
    assert chi_square_p(counts, masses) > FALSE_ALARM
    # The test can fail: the same counts are not those of neighbouring values.
    assert chi_square_p(counts, masses.roll(1)) < FALSE_ALARM


@pytest.mark.parametrize("name", LAWS)
def test_the_order_is_kept(name):
    law, levels, places = law_of(name)
    one, other = torch.zeros(law.event_shape), torch.full(law.event_shape, float(levels - 1))
    law.check_order(one, other)
    law.check_order(other, one)
    # By autograd, through the numbers: place i hears of place j only if j comes earlier.
    context = None if law.context is None else law.context[None]
    arguments = () if context is None else (context,)
    x = torch.rand(places, requires_grad=True)
    numbers = law.network(x.view(1, *law.event_shape), *arguments).view(places, -1).sum(-1)
    jacobian = torch.stack([torch.autograd.grad(n, x, retain_graph=True)[0] for n in numbers])
    order = torch.arange(places) if law.order is None else law.order
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(places))
    assert (jacobian[rank[None, :] >= rank[:, None]] == 0).all()
    assert (jacobian[rank[None, :] < rank[:, None]] != 0).any(), "nothing is heard at all"


class Peeking(nn.Module):
    """A network that hears of everything, itself included."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 12)

    def forward(self, value):
        return self.linear(value.float()).unflatten(-1, (4, 3))


def test_a_network_that_peeks_is_caught():
    law = Autoregressive(stirred(Peeking()), (4,), Categorical(3))
    with pytest.raises(ProgramError, match="breaks the order: the law at place 0 .*4 of 4 places"):
        law.check_order(torch.zeros(4), torch.full((4,), 2.0))
    masses = law.log_prob(every(3, 4)).exp().sum().detach()
    assert abs(float(masses) - 1) > 1e-3, "and its masses do not sum to one"


def test_an_order_that_is_not_the_networks_is_caught():
    network = stirred(MADE(4, 3, levels=3, hidden=(16,)))
    law = Autoregressive(network, (4,), Categorical(3), order=torch.tensor([3, 2, 1, 0]))
    with pytest.raises(ProgramError, match="breaks the order"):
        law.check_order(torch.zeros(4), torch.full((4,), 2.0))


def test_a_gaussian_mixture_integrates_to_one():
    head = GaussianMixture(3)
    network = stirred(MADE(2, head.size, hidden=(16,))).double()
    # Numbers in [-1, 1]: scales from 0.37 to 2.7 and means within 3, so this grid is fine and wide enough.
    law = Autoregressive(lambda x: network(x).tanh(), (2,), head)
    line = torch.linspace(-22, 22, 441, dtype=torch.float64)
    with torch.no_grad():
        total = law.log_prob(torch.cartesian_prod(line, line)).exp().sum() * 0.1**2
    assert float(total) == pytest.approx(1.0, abs=1e-6)
    assert Autoregressive(network, (2,), head).sample((5,)).dtype == torch.float64


def test_context_of_each_row_is_its_own():
    network = stirred(MADE(4, 3, levels=3, hidden=(16, 16), context=2))
    contexts = torch.randn(5, 2)
    law = Autoregressive(network, (4,), Categorical(3), context=contexts)
    values = every(3, 4)[:7]
    together = law.log_prob(values[:, None])
    apart = [Autoregressive(network, (4,), Categorical(3), context=c).log_prob(values) for c in contexts]
    torch.testing.assert_close(together, torch.stack(apart, -1))
    assert law.sample((3,)).shape == (3, 5, 4)
    assert float((together[:, 0] - together[:, 1]).detach().abs().max()) > 0.01, "the context is not heard"


@pytest.mark.parametrize("name", ["categorical", "bernoulli, an image", "categorical, with context"])
def test_shapes_are_those_of_a_pyro_distribution(name):
    law, _, _ = law_of(name)
    wide = law.expand((6, 5))
    assert wide.batch_shape == (6, 5)
    assert wide.event_shape == law.event_shape
    draws = wide.sample((2,))
    assert draws.shape == (2, 6, 5, *law.event_shape)
    assert wide.log_prob(draws).shape == (2, 6, 5)
    assert wide.log_prob(draws[0, 0, 0]).shape == (6, 5)
    torch.testing.assert_close(wide.log_prob(draws), law.log_prob(draws))
    assert not draws.requires_grad


def test_at_a_sample_site_in_a_plate():
    law, _, _ = law_of("categorical")

    def model(n):
        with pyro.plate("data", n):
            return pyro.sample("x", law)

    trace = poutine.trace(model).get_trace(5)
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (5, 4)
    assert trace.nodes["x"]["log_prob"].shape == (5,)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], law.log_prob(trace.nodes["x"]["value"]))


def test_what_it_declares():
    law, _, _ = law_of("ordinal")
    assert capabilities_of(law) == {Capability.SAMPLE, Capability.LOG_PROB}
    assert law.support.event_dim == 1
    assert law.support.is_discrete
    with pytest.raises(ValueError, match="support"):
        Autoregressive(law.network, (3,), law.head, validate_args=True).log_prob(torch.tensor([0, 5, 0]))


def test_gradients_reach_the_network():
    law, _, _ = law_of("ordinal")
    law.log_prob(torch.zeros(3, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in law.network.parameters())


def test_errors_say_what_to_do():
    network = MADE(4, 3, levels=3, hidden=(8,))
    with pytest.raises(OptionError, match=r"not a permutation of the 4 places.*torch.randperm\(4\)"):
        Autoregressive(network, (4,), Categorical(3), order=torch.tensor([0, 0, 1, 2]))
    with pytest.raises(ProgramError, match=r"numbers of shape \(1, 4, 3\).*takes 5"):
        Autoregressive(network, (4,), Categorical(5)).log_prob(torch.zeros(1, 4))
    with pytest.raises(DataError, match="context"):
        Autoregressive(network, (4,), Categorical(3), context=torch.zeros(2)).log_prob(torch.zeros(4))
    with pytest.raises(DataError, match="expected 4 places"):
        network(torch.zeros(2, 5))
    with pytest.raises(OptionError, match="at least 2 levels"):
        Categorical(1)
    with pytest.raises(OptionError, match="at least 3 numbers"):
        Ordinal(17, rank=2)
    with pytest.raises(OptionError, match="at least 1 component"):
        GaussianMixture(0)


def test_a_network_with_an_order_is_trained_by_replays():
    """The order is read where values are checked, at the first step, and not in what is recorded."""

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MADE(4, 1, levels=2, hidden=(8,), order=torch.tensor([2, 0, 3, 1]))

        def forward(self, n):
            with pyro.plate("data", n):
                pyro.sample("x", Autoregressive(self.network, (4,), Bernoulli()))

    x = torch.randint(0, 2, (50, 4)).float()
    fitted = fit(Program(), {"x": x}, "exact", run=Run(steps=100, batch_size=16, progress=False))
    assert not [said for said in fitted.history.warnings if "replays" in said]
