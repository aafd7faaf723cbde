"""Missing values in arguments, and in events: the same posterior as without them, or an error that says what to do."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import Dataset

import pgen
from pgen.errors import DataError
from pgen.handlers import without_missing
from pgen.inspection import inspect_problem, structure_of
from pgen.problem import Problem

NAN = math.nan
X = torch.randn(30, generator=torch.Generator().manual_seed(0))
Y = 2 * X + 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(1))
HOLED = Y.clone()
HOLED[[3, 7, 29]] = NAN
KEPT = ~HOLED.isnan()


def line(x):
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    return a + b * x


def regression(x, y=None):
    mean = line(x)
    with pyro.plate("rows", len(x)):
        pyro.sample("seen", dist.Normal(mean, 0.3), obs=y)


def table(t):
    mean = line(t[:, 0])
    with pyro.plate("rows", len(t)):
        pyro.sample("seen", dist.Normal(mean, 0.3), obs=t[:, 1])


def test_what_the_program_observes_as_it_is_may_be_missing():
    complete = pgen.fit(regression, {"x": X[KEPT], "y": Y[KEPT]}, "exact")
    cases = [
        (regression, {"x": X, "y": HOLED}),
        (regression, (X, HOLED)),
        (table, torch.stack([X, HOLED], 1)),
        (regression, {"x": X, "seen": HOLED}),
    ]
    for program, data in cases:
        structure, problem = inspect_problem(Problem.of(program, data))
        assert structure.missing == {"seen"}
        assert structure.data_plates == ("rows",)
        assert problem.observations["seen"].isnan().sum() == 3
        fitted = pgen.fit(program, data, "exact")
        assert torch.allclose(fitted.log_prob().value, complete.log_prob().value, atol=1e-4)
        assert torch.allclose(fitted.marginals()["b"].mean, complete.marginals()["b"].mean, atol=1e-5)
    assert torch.allclose(complete.log_prob({"x": X, "y": HOLED}).value, complete.log_prob().value, atol=1e-4)


def test_chains_and_guides_take_them_too():
    exact = pgen.fit(regression, {"x": X[KEPT], "y": Y[KEPT]}, "exact").marginals()["b"]
    data = {"x": X, "y": HOLED}
    chains = pgen.fit(regression, data, pgen.backend("mcmc", chains=16, warmup=100, draws=300), seed=0)
    assert abs(chains.posterior(n=4800)["b"].mean() - exact.mean) < 0.15 * exact.stddev
    assert chains.predictive(n=3)["seen"].shape == (3, 30)
    run = pgen.Run(steps=20, progress=False, validation=data, validate_every=10)
    guide = pgen.fit(regression, data, "variational", run=run, seed=0)
    assert guide.history.validation
    assert all(math.isfinite(loss) for _, loss in guide.history.validation)


def test_a_problem_without_rows_takes_them_by_its_arguments():
    wanted = pgen.fit(regression, None, "exact", kwargs={"x": X[KEPT], "y": Y[KEPT]}).log_prob()
    found = pgen.fit(regression, None, "exact", kwargs={"x": X, "y": HOLED}).log_prob()
    assert torch.allclose(found.value, wanted.value, atol=1e-4)


def test_missing_values_far_beyond_the_rows_that_are_looked_at_first():
    x = torch.zeros(5000)
    y = torch.zeros(5000)
    y[4711] = NAN
    assert structure_of(regression, {"x": x, "y": y}).missing == {"seen"}
    with pytest.raises(DataError, match=r"data 'x'.*first at index \(4711,\)"):
        structure_of(regression, {"x": y, "y": x})


def standardised(x, y):
    mean = line(x)
    with pyro.plate("rows", len(x)):
        pyro.sample("seen", dist.Normal(mean, 0.3), obs=(y - y.mean()) / y.std())


def compared(x, y):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("seen", dist.Bernoulli(p), obs=(y > 0).float())


def weighed(x, y):
    pyro.factor("seen", -(line(x) - y).square().sum())


def lagged(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("steps", len(y) - 1):
        pyro.sample("seen", dist.Normal(b * y[:-1], 1.0), obs=y[1:])


def filled(x, y):
    mean = line(x)
    with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=~y.isnan()):
        pyro.sample("seen", dist.Normal(mean, 0.3), obs=y.nan_to_num())


@pytest.mark.parametrize("program", [standardised, compared, weighed, lagged, filled])
def test_what_is_computed_from_missing_values_is_refused(program):
    with pytest.raises(
        DataError, match=r"data 'y' .* has 3 of 30 .*issing values are allowed only.*kwargs=\{"
    ):
        structure_of(program, {"x": X, "y": HOLED})


def test_a_program_that_knows_what_to_do_is_given_them_unchanged():
    found = pgen.fit(filled, None, "exact", kwargs={"x": X, "y": HOLED}).log_prob()
    wanted = pgen.fit(regression, {"x": X, "y": HOLED}, "exact").log_prob()
    assert torch.allclose(found.value, wanted.value, atol=1e-4)


def test_rows_of_a_dataset_that_is_read_row_by_row_are_complete():
    class Rows(Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, i):
            return {"x": X[i], "y": HOLED[i]}

    with pytest.raises(DataError, match=r"data 'y' \(passed as argument\).*missing values are allowed only"):
        structure_of(regression, Rows())


# --- events ---

COVARIANCE = torch.tensor([[1.0, 0.5, 0.2], [0.5, 2.0, 0.3], [0.2, 0.3, 1.5]])


@pytest.mark.parametrize(
    "law",
    [
        dist.MultivariateNormal(torch.tensor([1.0, -1.0, 0.5]), COVARIANCE),
        dist.LowRankMultivariateNormal(torch.ones(3), torch.tensor([[1.0], [0.5], [0.2]]), torch.ones(3)),
    ],
)
def test_a_gaussian_event_may_be_missing_in_part(law):
    value = torch.tensor([[0.3, 0.1, -0.7], [NAN, 0.4, 1.0], [NAN, NAN, NAN], [0.2, NAN, NAN]])
    part, inside = without_missing("x", law, value)
    wanted = []
    for row in value:
        here = (~row.isnan()).nonzero()[:, 0]
        marginal = (law.mean[here], law.covariance_matrix[here][:, here])
        wanted.append(
            dist.MultivariateNormal(*marginal).log_prob(row[here]) if len(here) else torch.tensor(0.0)
        )
    assert torch.allclose(part.log_prob(inside), torch.stack(wanted), atol=1e-5)


@pytest.mark.parametrize(
    "law",
    [
        dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
        dist.Multinomial(5, torch.tensor([0.2, 0.3, 0.5])),
        dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])),
        dist.MultivariateStudentT(torch.tensor(5.0), torch.zeros(3), torch.eye(3)),
    ],
)
def test_an_event_of_any_law_may_be_missing_as_a_whole(law):
    value = law.sample(torch.Size([4]))
    holed = value.clone()
    holed[1] = NAN
    part, inside = without_missing("x", law, holed)
    assert law.support.check(inside).all()
    each = law.log_prob(value)
    assert torch.allclose(part.log_prob(inside), torch.where(torch.arange(4) == 1, 0.0, each))


def test_evidence_of_gaussian_rows_that_are_missing_in_part():
    def program(n):
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.MultivariateNormal(m, COVARIANCE))

    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    x[2], x[4, 1], x[5, 0] = NAN, NAN, NAN
    # All numbers of all rows are jointly normal: rows share m.
    joint = torch.block_diag(*[COVARIANCE] * 6) + 9.0 * torch.eye(3).repeat(6, 6)
    here = (~x.flatten().isnan()).nonzero()[:, 0]
    wanted = dist.MultivariateNormal(torch.zeros(len(here)), joint[here][:, here]).log_prob(x.flatten()[here])
    assert torch.allclose(pgen.fit(program, {"x": x}, "exact").log_prob().value, wanted, atol=1e-4)


def test_other_events_that_are_missing_in_part_are_named():
    def program(n):
        c = pyro.sample("c", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Dirichlet(c * torch.ones(3)))

    x = torch.full((3000, 3), 1 / 3)
    x[1500] = NAN
    assert structure_of(program, {"x": x}).missing == {"x"}
    x[2500, 1] = NAN
    with pytest.raises(DataError, match=r"site 'x': 1 of its observed events.*first at index \(2500,\)"):
        structure_of(program, {"x": x})
