"""How many chains there are by default, that long programs are recorded once, and sampled right however long."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.backends.mcmc import sizes
from pgen.evaluation import Functions
from pgen.metrics.chains import diagnose


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
    assert sizes.tried(structure) == {3: 256, 20: 256, 300: 32}[length]


def test_a_long_program_keeps_the_chains_that_it_was_recorded_for():
    brief, loop = pgen.structure_of(hidden(3)), pgen.structure_of(hidden(20))
    for ratio, of_brief, of_loop in [(60, 32, 32), (70, 64, 64), (130, 128, 256), (300, 256, 256)]:
        costs = functions(1000, 3 * 1000 * 1.5 * 1000 / 0.7 / ratio)
        assert sizes.chains_for(costs, "auto", brief) == of_brief
        assert sizes.chains_for(costs, "auto", loop) == of_loop


def test_a_long_program_is_recorded_once():
    run = pgen.Run(progress=False, compile="auto")
    fitted = pgen.fit(hidden(30), None, pgen.backend("mcmc", warmup=10, draws=2), run=run)
    sampled = fitted._answers.fitted
    assert sampled.chains.count == 256
    assert len(sampled.functions.target.recordings) == 1


def truth(ys, grid):
    """Mean and standard deviation of `gap` in `shifted`, by the forward algorithm on a grid."""
    rows = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log()
    levels = torch.stack([torch.zeros_like(grid), grid], -1)
    heights = dist.Normal(levels, 1.0).log_prob(ys[:, None, None])
    forward = rows[0] + heights[0]
    for height in heights[1:]:
        forward = (forward.unsqueeze(-1) + rows).logsumexp(-2) + height
    weights = (forward.logsumexp(-1) + dist.Normal(0.0, 3.0).log_prob(grid)).softmax(0)
    mean = (weights * grid).sum()
    return mean, (weights * (grid - mean) ** 2).sum().sqrt()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("length", [200, 2000])
def test_a_hidden_chain_of_thousands_of_steps(length):
    torch.manual_seed(length)
    rows, states = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), [0]
    for _ in range(length):
        states.append(int(torch.multinomial(rows[states[-1]], 1)))
    ys = torch.randn(length, dtype=torch.float64) + 1.5 * torch.tensor(states[1:])

    def shifted():
        gap = pyro.sample("gap", dist.Normal(0.0, 3.0))
        state = torch.tensor(0)
        for t in range(length):
            state = pyro.sample(f"s{t}", dist.Categorical(rows[state]))
            pyro.sample(f"y{t}", dist.Normal(gap * state, 1.0), obs=ys[t])

    backend = pgen.backend("mcmc", chains=32, warmup=100, draws=50)
    fitted = pgen.fit(shifted, None, backend, run=pgen.Run(progress=False, precision="float64"))
    draws = fitted.draws().by_chain()["gap"].double()
    found = diagnose(draws, (0.5,))
    grid = torch.linspace(0.5, 2.5, 2001, dtype=torch.float64)
    mean, sd = truth(ys, grid)
    half, _ = truth(ys[: length // 2], grid)
    assert float(found.r_hat) < 1.05
    assert abs(float(found.mean - mean)) < 5 * float(found.mcse_mean)  # fails a right sampler once in 10^6
    assert abs(float(found.mean - half)) > 5 * float(found.mcse_mean)  # of half of the data it would be wrong
    assert abs(float(found.sd / sd) - 1) < 5 / (2 * float(found.ess_bulk)) ** 0.5
    assert abs(float(found.mean - 1.5)) < 6 * float(sd)
