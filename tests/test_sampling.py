"""Draws from programs, many at once: of the right shape and law, vectorised or not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.inspection import inspect_problem
from pgen.problem import Problem
from pgen.sampling import draw, observed_scalars, particles, split, spread, vectorizes
from pgen.testing import statistics as stats


def bind(program, data=None, **options):
    structure, problem = inspect_problem(Problem.of(program, data, **options))
    return problem, structure


def local(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def shared(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(mu, 1.0))


def groups(n):
    with pyro.plate("groups", 4, dim=-1):
        mu = pyro.sample("mu", dist.Normal(torch.arange(4.0), 1.0))
        with pyro.plate("data", n, dim=-2):
            pyro.sample("x", dist.Normal(mu, 0.5))


def regression(covariates):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(covariates)):
        pyro.sample("y", dist.Normal((covariates * w).sum(-1), 0.1))


def regression_by_matrix(covariates):  # goes wrong side by side: `@` knows nothing of leading dimensions
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(covariates)):
        pyro.sample("y", dist.Normal(covariates @ w, 0.1))


def sums_everything(n):  # silently wrong side by side
    with pyro.plate("three", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(z.sum(), 1.0))


def branches(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(2.0 if mu.item() > 0 else -2.0, 0.1))


def fixed():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("five", 5):
        pyro.sample("x", dist.Normal(mu, 1.0))


def per_row(data):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    for i in range(len(data)):
        pyro.sample(f"x{i}", dist.Bernoulli(p), obs=data[i])


COVARIATES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])
CASES = {
    # program, data, shapes of a draw, does it run side by side
    "local": (local, {"x": torch.randn(4)}, {"z": (2,), "x": ()}, True),
    "shared": (shared, {"x": torch.randn(4)}, {"mu": (), "x": ()}, True),
    "groups": (groups, {"x": torch.randn(6, 4)}, {"mu": (4,), "x": (4,)}, True),
    "regression": (regression, {"covariates": COVARIATES, "y": torch.randn(4)}, {"w": (2,), "y": ()}, True),
    "regression by @": (
        regression_by_matrix,
        {"covariates": COVARIATES, "y": torch.randn(4)},
        {"w": (2,), "y": ()},
        False,
    ),
    "sums everything": (sums_everything, {"x": torch.randn(4)}, {"z": (3,), "x": ()}, False),
    "branches": (branches, {"x": torch.randn(4)}, {"mu": (), "x": ()}, False),
    "fixed": (fixed, {"x": torch.randn(5)}, {"mu": (), "x": (5,)}, True),
    "no data": (shared, None, {"mu": (), "x": ()}, True),
    "per row": (per_row, torch.ones(3), {"p": (), "x0": (), "x1": (), "x2": ()}, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 7])
def test_shapes(case, n):
    program, data, shapes, _ = CASES[case]
    drawn = draw(*bind(program, data), n)
    assert {site: tuple(v.shape) for site, v in drawn.items()} == {
        site: (n, *s) for site, s in shapes.items()
    }
    assert not any(v.requires_grad for v in drawn.values())


@pytest.mark.parametrize("case", CASES)
def test_programs_that_go_wrong_side_by_side_are_found(case):
    program, data, _, able = CASES[case]
    assert vectorizes(*bind(program, data)) is able


def test_every_draw_has_its_own_global_value():
    n = 20_000
    drawn = draw(*bind(shared, {"x": torch.randn(4)}), n)
    law = dist.Normal(0.0, 10.0**0.5)
    stats.assert_distribution(drawn["x"], law.cdf)
    stats.assert_mean(drawn["x"] * drawn["mu"], 9.0)
    assert len(drawn["mu"].unique()) > n // 2


@pytest.mark.parametrize("case", ["regression by @", "sums everything", "branches"])
def test_programs_that_are_run_one_by_one_have_the_right_law(case):
    program, data, _, _ = CASES[case]
    n = 1500
    drawn = draw(*bind(program, data), n)
    if case == "branches":
        assert bool(((drawn["x"] > 0) == (drawn["mu"] > 0)).all())
    elif case == "sums everything":
        stats.assert_distribution(drawn["x"] - drawn["z"].sum(-1), dist.Normal(0.0, 1.0).cdf)
    else:
        rows = COVARIATES[torch.arange(n) % 4]
        stats.assert_distribution(drawn["y"] - (rows * drawn["w"]).sum(-1), dist.Normal(0.0, 0.1).cdf)


def test_inputs_are_recycled_row_by_row():
    n = 203  # more than one chunk, and no multiple of the rows
    drawn = draw(*bind(regression, {"covariates": COVARIATES, "y": torch.randn(4)}), n)
    rows = COVARIATES[torch.arange(n) % 4]
    residual = drawn["y"] - (rows * drawn["w"]).sum(-1)
    stats.assert_distribution(residual, dist.Normal(0.0, 0.1).cdf)


def test_given_values_are_kept():
    problem, structure = bind(shared, {"x": torch.randn(4)})
    mu = torch.linspace(-50, 50, 300)
    drawn = draw(problem, structure, 300, given={"mu": mu})
    assert torch.equal(drawn["mu"], mu)
    stats.assert_distribution(drawn["x"] - mu, dist.Normal(0.0, 1.0).cdf)
    problem, structure = bind(branches, {"x": torch.randn(4)})
    drawn = draw(problem, structure, 10, given={"mu": torch.linspace(1, 2, 10)})
    assert bool((drawn["x"] > 0).all())


def test_observed_data_do_not_show_in_draws():
    drawn = draw(*bind(shared, {"x": torch.full((4,), 1e6)}), 1000)
    assert float(drawn["x"].abs().max()) < 100


# --- layouts ---


@pytest.mark.parametrize("case", ["local", "shared", "groups", "fixed"])
def test_split_and_spread_are_inverse(case):
    problem, structure = bind(*CASES[case][:2])
    trace = poutine.trace(particles(problem, structure, 6)).get_trace()
    for site in structure.sites:
        value = split(trace.nodes[site]["value"], structure, site)
        law = structure.sites[site]
        if not law.observed:
            assert value.shape[0] == 6
            assert len(value.shape) == 1 + len(law.batch_shape) + len(law.event_shape)
            again = split(spread(value, structure, site), structure, site)
            assert torch.equal(again, value)


def test_particles_are_independent():
    problem, structure = bind(shared, {"x": torch.randn(4)})
    mu = poutine.trace(particles(problem, structure, 5000)).get_trace().nodes["mu"]["value"]
    assert mu.shape == (5000, 1)
    stats.assert_distribution(mu, dist.Normal(0.0, 3.0).cdf)


def test_observed_scalars_per_row():
    assert observed_scalars(*bind(local, {"x": torch.randn(4)})) == 1
    assert observed_scalars(*bind(groups, {"x": torch.randn(6, 4)})) == 4
    assert observed_scalars(*bind(fixed, {"x": torch.randn(5)})) == 5
    assert observed_scalars(*bind(local, {"z": torch.randn(4, 2), "x": torch.randn(4)})) == 3


# --- vectors outside the plate of the rows ---


def vectors(covariates):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(covariates)):
        pyro.sample("y", dist.Normal(covariates * w, 0.01).to_event(1))


@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_vectors_meet_their_own_row(rows, n):
    """Pyro's parallel Predictive counts event dimensions as plates; as many draws as rows, or entries, would hide it."""
    x = torch.arange(3.0 * rows).reshape(rows, 3) + 1
    problem, structure = bind(vectors, {"covariates": x, "y": torch.zeros(rows, 3)})
    assert vectorizes(problem, structure)
    w = torch.tensor([1.0, -10.0, 100.0]) * (torch.arange(n) + 1.0)[:, None]
    drawn = draw(problem, structure, n, given={"w": w})
    assert torch.equal(drawn["w"], w)
    torch.testing.assert_close(drawn["y"], x[torch.arange(n) % rows] * w, atol=0.1, rtol=0.0)


def within(n):  # the rows are the last batch dimension, not the first
    with pyro.plate("data", n, dim=-1), pyro.plate("repeats", 3, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.01))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_values_of_rows_are_given_back_as_they_came(n):
    problem, structure = bind(within, {"x": torch.randn(3, 3)})
    z = torch.arange(3.0 * n).reshape(n, 3)
    drawn = draw(problem, structure, n, given={"z": z}) if structure.data_plates else {"z": z, "x": z}
    assert torch.equal(drawn["z"], z)
    torch.testing.assert_close(drawn["x"], z, atol=0.1, rtol=0.0)
