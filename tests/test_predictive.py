"""New data and pointwise log likelihoods for posterior draws: vectorised in three ways, all equal to one run at a time."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen import predictive as module
from pgen.errors import DataError
from pgen.handlers import Substitute
from pgen.inspection import inspect_problem
from pgen.predictive import log_likelihood, predictive
from pgen.problem import Problem
from pgen.sampling import vectorizes
from pgen.testing import statistics as stats

ROWS = 5
X = torch.linspace(-1.0, 1.0, 2 * ROWS, dtype=torch.float64).reshape(ROWS, 2)


def bind(program, data):
    structure, problem = inspect_problem(Problem.of(program, data))
    return problem, structure


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def by_plates(x, y=None):  # takes leading dimensions
    w = pyro.sample("w", dist.Normal(zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), s), obs=y)


def by_matrix(x, y=None):  # does not, and torch.vmap does
    w = pyro.sample("w", dist.Normal(zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


def by_branch(x, y=None):  # one at a time
    w = pyro.sample("w", dist.Normal(zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(zeros(()), 1.0))
    mean = (x * w).sum(-1) if s.item() > 0 else zeros(len(x))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, s), obs=y)


def vectors(x, y=None):  # an observed vector for each row, and a latent one
    w = pyro.sample("w", dist.Normal(zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x * w + z, s[..., None]).to_event(1), obs=y)


def grouped(y=None):  # a plate left of the one of the data, and no rows to take apart
    with pyro.plate("groups", 3, dim=-1):
        w = pyro.sample("w", dist.Normal(zeros(2), 1.0).to_event(1))
        with pyro.plate("within", ROWS, dim=-2):
            pyro.sample("y", dist.Normal(w.sum(-1), 0.5), obs=y)


def data_of(program):
    shape = {"vectors": (ROWS, 2), "grouped": (ROWS, 3)}.get(program.__name__, (ROWS,))
    y = torch.linspace(-2.0, 2.0, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return {"y": y} if program is grouped else {"x": X, "y": y}


def draws_of(program, n):
    torch.manual_seed(n)
    w = {"w": torch.randn(n, 3, 2, dtype=torch.float64)} if program is grouped else {}
    if program is grouped:
        return w
    out = {"w": torch.randn(n, 2, dtype=torch.float64), "s": torch.rand(n, dtype=torch.float64) + 0.5}
    return out | ({"z": torch.randn(n, ROWS, 2, dtype=torch.float64)} if program is vectors else {})


def one_by_one(problem, structure, draws):
    """Log likelihoods by separate runs: the meaning of the vectorised ones."""
    out = []
    for i in range(len(next(iter(draws.values())))):
        with Substitute({s: v[i] for s, v in draws.items()}):
            node = poutine.trace(problem).get_trace().nodes["y"]
        out.append(node["fn"].log_prob(node["value"]))
    return torch.stack(out)


PROGRAMS = [by_plates, by_matrix, by_branch, vectors, grouped]


def test_the_three_ways_are_all_taken():
    able = [vectorizes(*bind(p, data_of(p))) for p in PROGRAMS]
    assert able == [True, False, False, True, True]


# As many draws as rows, or as coefficients, is where an alignment by chance would pass.
@pytest.mark.parametrize("n", [1, 2, 3, ROWS, 7])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_log_likelihood_is_that_of_separate_runs(program, n):
    problem, structure = bind(program, data_of(program))
    draws = draws_of(program, n)
    found = log_likelihood(problem, structure, draws)["y"]
    assert found.shape == (n, *((ROWS, 3) if program is grouped else (ROWS,)))
    torch.testing.assert_close(found, one_by_one(problem, structure, draws), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, ROWS, 4000])
@pytest.mark.parametrize("program", [by_plates, by_matrix, vectors, grouped], ids=lambda p: p.__name__)
def test_new_data_have_the_law_that_each_draw_gives(program, n):
    problem, structure = bind(program, data_of(program))
    draws = draws_of(program, n)
    found = predictive(problem, structure, draws)["y"]
    assert found.shape == (n, *data_of(program)["y"].shape)
    if program is grouped:
        mean, sd = draws["w"].sum(-1)[:, None], torch.tensor(0.5, dtype=torch.float64)
    elif program is vectors:
        mean, sd = X * draws["w"][:, None] + draws["z"], draws["s"][:, None, None]
    else:
        mean, sd = draws["w"] @ X.T, draws["s"][:, None]
    noise = (found - mean) / sd
    stats.assert_distribution(noise.flatten(), dist.Normal(0.0, 1.0).cdf)
    if n > 100:  # no noise is shared, neither among draws nor among rows
        flat = noise.flatten(1)
        stats.assert_mean(flat[:, :-1] * flat[:, 1:], 0.0, std=1.0)
        stats.assert_mean(flat[:-1:2] * flat[1::2], 0.0, std=1.0)


def test_a_program_run_one_by_one_has_the_right_law():
    problem, structure = bind(by_branch, data_of(by_branch))
    draws = draws_of(by_branch, 300)
    noise = (predictive(problem, structure, draws)["y"] - draws["w"] @ X.T) / draws["s"][:, None]
    stats.assert_distribution(noise.flatten(), dist.Normal(0.0, 1.0).cdf)


def test_laws_that_vmap_cannot_sample_are_run_one_by_one():
    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Beta((x @ w).exp(), 2.0), obs=y)

    problem, structure = bind(program, {"x": X, "y": torch.full((ROWS,), 0.5, dtype=torch.float64)})
    draws = {"w": torch.randn(400, 2, dtype=torch.float64)}
    a = (draws["w"] @ X.T).exp()
    found = predictive(problem, structure, draws)["y"]
    stats.assert_mean((found - a / (a + 2)).flatten()[:, None], 0.0)


def test_latents_without_draws_are_drawn_from_the_program():
    problem, structure = bind(vectors, data_of(vectors))
    n = 4000
    draws = {"w": torch.zeros(n, 2, dtype=torch.float64), "s": torch.ones(n, dtype=torch.float64)}
    found = predictive(problem, structure, draws)["y"]
    stats.assert_moments(found.flatten(1), 0.0, 2.0**0.5)


def test_discrete_latents_that_were_summed_out_mix_anew():
    def mixture(n):
        mu = pyro.sample("mu", dist.Normal(zeros(2), 5.0).to_event(1))
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)))
            pyro.sample("x", dist.Normal(mu[k], 0.01))

    problem, structure = bind(mixture, {"x": torch.randn(6, dtype=torch.float64)})
    mu = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(2000, 2).contiguous()
    found = predictive(problem, structure, {"mu": mu})["x"]
    assert found.shape == (2000, 6)
    stats.assert_mean((found > 0).double(), 0.75)


def test_missing_observations_count_for_nothing():
    data = data_of(by_plates)
    y = data["y"].clone()
    y[1] = torch.nan

    def program(x):
        by_plates(x)

    problem, structure = bind(program, {"x": X, "y": y})
    draws = draws_of(by_plates, 4)
    found = log_likelihood(problem, structure, draws)["y"]
    whole = log_likelihood(*bind(program, data), draws)["y"]
    assert bool((found[:, 1] == 0).all())
    torch.testing.assert_close(found[:, 2:], whole[:, 2:])


def test_scales_and_masks():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(zeros(()), 1.0))
        with pyro.plate("data", len(y)), poutine.scale(scale=7.0), poutine.mask(mask=y > 0):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    found = log_likelihood(*bind(program, (y,)), {"mu": torch.zeros(3, dtype=torch.float64)})["y"]
    expected = torch.tensor([0.0, dist.Normal(0.0, 1.0).log_prob(y[1])], dtype=torch.float64)
    torch.testing.assert_close(found, expected.expand(3, 2), check_dtype=False)


def test_many_draws_are_run_some_at_a_time(monkeypatch):
    problem, structure = bind(by_matrix, data_of(by_matrix))
    draws = draws_of(by_matrix, 11)
    whole = log_likelihood(problem, structure, draws)["y"]
    monkeypatch.setattr(module, "_AT_ONCE", 80)
    torch.testing.assert_close(log_likelihood(problem, structure, draws)["y"], whole)
    assert predictive(problem, structure, draws)["y"].shape == (11, ROWS)


def test_wrong_draws_are_named():
    problem, structure = bind(vectors, data_of(vectors))
    draws = draws_of(vectors, 3)
    with pytest.raises(DataError, match=r"none of z"):
        log_likelihood(problem, structure, {k: v for k, v in draws.items() if k != "z"})
    with pytest.raises(DataError, match=r"draws of 'z' have shape \(3, 4, 2\); expected \(3, 5, 2\)"):
        predictive(problem, structure, draws | {"z": draws["z"][:, :4]})
    with pytest.raises(DataError, match="expected draws of latent sites"):
        predictive(problem, structure, {})
