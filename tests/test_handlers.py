"""The handlers: batches stand for the whole without bias; values keep their roles."""

import itertools
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.handlers import Lent, Observe, ScaleRows, Substitute, without_missing
from pgen.inspection import inspect_problem
from pgen.problem import Problem

X = torch.tensor([0.5, -1.0, 2.0, 0.25])


def program(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def test_a_scaled_batch_stands_for_the_whole_without_bias():
    """The mean over all batches of a size is the log probability of the whole, to rounding."""
    structure, problem = inspect_problem(Problem.of(program, {"x": X}))
    z = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def joint(batch, rows):
        values = {"mu": torch.tensor(0.7), "z": z[rows]}
        with ScaleRows(structure.data_plates, batch.scale):
            return poutine.trace(Substitute(values)(batch)).get_trace().log_prob_sum()

    whole = joint(problem, torch.arange(4))
    for size in (1, 2, 3):
        batches = [torch.tensor(rows) for rows in itertools.combinations(range(4), size)]
        mean = torch.stack([joint(problem.take(rows), rows) for rows in batches]).mean()
        assert torch.allclose(mean, whole, atol=1e-5)


def test_a_plate_that_subsamples_scales_itself():
    def subsampling(data):
        with pyro.plate("data", len(data), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=data[index])

    with ScaleRows(("data",), 5.0):
        node = poutine.trace(subsampling).get_trace(X).nodes["x"]
    assert node["scale"] == 2.0


def test_substituted_values_stay_latent():
    trace = poutine.trace(
        Substitute({"z": torch.ones(4), "x": torch.zeros(4)})(Problem.of(program, {"x": X}))
    ).get_trace()
    assert torch.equal(trace.nodes["z"]["value"], torch.ones(4))
    assert not trace.nodes["z"]["is_observed"]
    assert torch.equal(trace.nodes["x"]["value"], X)  # what is observed is not substituted


def test_fallbacks_yield_to_the_programs_own_observations():
    def own(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x + 1)
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with Observe({}, fallback={"x": X, "y": X}):
        trace = poutine.trace(own).get_trace(X)
    assert torch.equal(trace.nodes["x"]["value"], X + 1)
    assert torch.equal(trace.nodes["y"]["value"], X)
    assert trace.nodes["y"]["is_observed"]


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(torch.zeros(3), 1.0),
        dist.Normal(torch.zeros(2, 3), 1.0).to_event(1),
        dist.Beta(torch.full((2, 3), 2.0), 3.0).to_event(2),
        dist.Poisson(torch.ones(3)),
        dist.Bernoulli(torch.full((3,), 0.25)),
        dist.Gamma(torch.ones(3), 1.0),
    ],
)
def test_missing_elements_integrate_to_one(law):
    value = law.sample()
    holed = value.clone()
    holed.reshape(-1)[1] = float("nan")
    masked, filled = without_missing("x", law, holed)
    base = law.base_dist if isinstance(law, torch.distributions.Independent) else law
    each = base.log_prob(value).clone()
    each.reshape(-1)[1] = 0.0
    assert torch.isfinite(filled).all()
    assert torch.allclose(masked.log_prob(filled).sum(), each.sum(), atol=1e-5)


def test_gradients_flow_past_missing_values():
    loc = torch.zeros(3, requires_grad=True)
    law, value = without_missing("x", dist.Normal(loc, 1.0), torch.tensor([1.0, float("nan"), -1.0]))
    law.log_prob(value).sum().backward()
    assert loc.grad.tolist() == [1.0, 0.0, -1.0]


def test_what_is_lent_twice_is_in_both_contexts_and_what_it_had_first_wins():
    held = {"a": "own", "b": "own"}

    @contextmanager
    def lending(**values):
        before = dict(held)
        held.update(values)
        yield
        held.update(before)

    once = Lent(lambda: dict(held), lambda: lending(a="first"))
    twice = Lent(once, lambda: lending(a="second", b="second"))
    assert twice() == {"a": "first", "b": "second"}
    with twice.context():  # as a law does whose networks run later
        assert held == {"a": "first", "b": "second"}
    assert held == {"a": "own", "b": "own"}
