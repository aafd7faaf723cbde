"""How many chains there are by default, and that programs which take long to record are recorded once."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.backends.mcmc import sizes
from pgen.evaluation import Functions


def hidden(length):
    """Two states that take turns, one site a step."""
    ys = torch.arange(length).remainder(2) * 2.0

    def program():
        stay = pyro.sample("stay", dist.Beta(5.0, 2.0))
        rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
        level = pyro.sample("level", dist.Normal(torch.tensor([0.0, 2.0]), 1.0).to_event(1))
        state = torch.tensor(0)
        for t in pyro.markov(range(length)):
            state = pyro.sample(f"s{t}", dist.Categorical(rows[state]))
            pyro.sample(f"y{t}", dist.Normal(level[state], 1.0), obs=ys[t])

    return program


def functions(operations, numbers):
    """Of a recorded density that costs so much."""
    return Functions(None, None, "recorded", cost=(operations, numbers))


@pytest.mark.parametrize("length", [3, 20, 300])
def test_the_chains_that_are_tried_follow_the_numbers_of_the_program(length):
    structure = pgen.structure_of(hidden(length))
    assert sizes.tried(structure) == {3: 256, 20: 128, 300: 32}[length]


def test_a_long_program_keeps_the_chains_that_it_was_recorded_for():
    brief, loop = pgen.structure_of(hidden(3)), pgen.structure_of(hidden(20))
    for ratio, of_brief, of_loop in [(60, 32, 32), (70, 64, 128), (130, 128, 128), (300, 256, 128)]:
        costs = functions(1000, 3 * 1000 * 1.5 * 1000 / 0.7 / ratio)
        assert sizes.chains_for(costs, "auto", brief) == of_brief
        assert sizes.chains_for(costs, "auto", loop) == of_loop


def test_a_long_program_is_recorded_once():
    run = pgen.Run(progress=False, compile="auto")
    fitted = pgen.fit(hidden(30), None, pgen.backend("mcmc", warmup=10, draws=2), run=run)
    sampled = fitted._answers.fitted
    assert sampled.chains.count == 128
    assert len(sampled.functions.target.recordings) == 1
