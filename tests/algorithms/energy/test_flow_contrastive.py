"""Flow-contrastive estimation: at the truth nothing moves, the flow plays against the energy, and log Z is found."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pgen.algorithms.energy.flow_contrastive import FlowContrastive
from pgen.algorithms.energy.space import Space
from pgen.testing.statistics import StatisticalFailure, assert_mean

SPACE = Space.of(constraints.real, (1,))
ROWS = 400
LOG_Z = 0.5 * math.log(2 * math.pi)  # of exp(-x^2 / 2)


class Line(nn.Module):
    """A flow of one affine map: N(loc, scale^2)."""

    def __init__(self, loc=0.0, scale=1.0):
        super().__init__()
        self.loc, self.log_scale = (
            nn.Parameter(torch.tensor([loc])),
            nn.Parameter(torch.tensor([scale]).log()),
        )

    def forward(self):
        return torch.distributions.Independent(torch.distributions.Normal(self.loc, self.log_scale.exp()), 1)


def gradients(flow, width=1.0, constant=LOG_Z, likelihood=0.0, draws=300):
    """Of the energy's width, of log Z and of the flow, at data of N(0, 1): one row for each of many batches."""
    torch.manual_seed(0)
    width = nn.Parameter(torch.tensor(width))
    way = FlowContrastive(flow, likelihood=likelihood, ratio=2)
    found = []
    for _ in range(draws):
        x = torch.randn(ROWS, 1)
        memory = way.memory(x, SPACE)
        with torch.no_grad():
            memory.log_partition.fill_(constant)
        surrogate = way(lambda x: -(x[:, 0] / width).square() / 2, x, memory).surrogate.mean()
        found.append(torch.stack(torch.autograd.grad(surrogate, [width, memory.log_partition])))
    return torch.stack(found)


def test_nothing_moves_at_the_truth_and_something_does_beside_it():
    assert_mean(gradients(Line(0.5, 1.5)), 0.0)
    for wrong in ({"width": 1.2}, {"constant": 1.2}):
        with pytest.raises(StatisticalFailure):
            assert_mean(gradients(Line(0.5, 1.5), **wrong), 0.0)


def test_the_flow_is_drawn_to_the_energy():
    """The game alone, without a likelihood: a flow to the right of an energy that is true goes left."""
    torch.manual_seed(0)
    flow = Line(0.7, 1.0)
    way = FlowContrastive(flow, likelihood=0.0)
    x = torch.randn(20_000, 1)
    memory = way.memory(x, SPACE)
    with torch.no_grad():
        memory.log_partition.fill_(LOG_Z)
    learned = way(lambda x: -x[:, 0].square() / 2, x, memory)
    (slope,) = torch.autograd.grad(learned.surrogate.mean(), flow.loc)
    assert float(slope) < -0.01  # ascent
    assert learned.told["told_apart"] > 0.55


def test_an_energy_its_constant_and_the_flow_are_found():
    """Data of N(1, 0.5^2): -(x - m)^2 / 2 v^2 has log Z = log(v sqrt(2 pi))."""
    torch.manual_seed(0)
    data = 1 + 0.5 * torch.randn(4000, 1)
    mean, log_v = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
    way = FlowContrastive(Line())
    memory = way.memory(data, SPACE)
    tuned = [mean, log_v, *memory.parameters()]
    optimizer = torch.optim.Adam(tuned, lr=0.02, maximize=True)
    for _ in range(600):
        x = data[torch.randint(len(data), (250,))]
        optimizer.zero_grad()
        way(lambda x: -((x[:, 0] - mean) / log_v.exp()).square() / 2, x, memory).surrogate.mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert abs(float(mean) - 1) < 0.08
        assert abs(float(log_v.exp()) - 0.5) < 0.05
        assert abs(float(memory.log_partition) - LOG_Z - math.log(0.5)) < 0.1
        assert abs(float(memory.flow.loc) - 1) < 0.08


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: FlowContrastive(lambda: None), TypeError, "module"),
        (lambda: FlowContrastive(Line(), ratio=0), ValueError, "ratio"),
        (lambda: FlowContrastive(Line(), likelihood=-1.0), ValueError, "likelihood"),
        (
            lambda: FlowContrastive(Line()).memory(torch.zeros(3, 1), SPACE, conditional=True),
            ValueError,
            "another partition function",
        ),
        (
            lambda: FlowContrastive(Line()).memory(torch.zeros(3, 1), Space.of(constraints.boolean, (1,))),
            ValueError,
            "counted",
        ),
    ],
)
def test_what_is_wrong_is_named(call, error, told):
    with pytest.raises(error, match=told):
        call()
