"""The backend mcmc: right answers by every kernel, on every kind of latent; options, refusals, fallbacks."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.algorithms.record import NotRecorded
from pgen.errors import OptionError, ProgramError, Refused
from pgen.inspection import inspect_problem
from pgen.isolation import isolated
from pgen.metrics.chains import diagnose
from pgen.problem import Problem

Y = torch.tensor([1.2, 0.4, 2.2, 1.7])


def conjugate():
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=Y)


MEAN = float(Y.sum() / (4 + 1 / 4))
SD = (4 + 1 / 4) ** -0.5


def scales():
    """A correlated pair of very different scales, and a positive latent."""
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1e4, 99.0], [99.0, 1.0]])))
    s = pyro.sample("s", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(x[1], 1.0), obs=torch.tensor(0.5))
    pyro.sample("c", dist.Poisson(s), obs=torch.tensor(4.0))


def frozen():
    k = pyro.sample("k", dist.Uniform(0.0, 10.0))
    u = pyro.sample("u", dist.Uniform(0.0, k))
    pyro.sample("y", dist.Normal(u, 1.0), obs=torch.tensor(8.0))


def frozen_by_quadrature():
    k = torch.linspace(0, 10, 2001, dtype=torch.float64)[1:, None]
    u = torch.linspace(0, 10, 2001, dtype=torch.float64)[None, 1:]
    weight = torch.where(u < k, torch.exp(-((8 - u) ** 2) / 2) / k, 0.0)
    weight = weight / weight.sum()
    return float((weight * u).sum()), float((weight * k).sum())


def near(draws, truth, *, name="", sds=5.0):
    """The mean of draws `[chains, n]` is the truth within so many Monte Carlo standard errors: 6e-7 for five."""
    found = diagnose(draws.double(), (0.5,))
    error = abs(float(found.mean) - truth)
    assert error < sds * float(found.mcse_mean), (name, float(found.mean), truth, float(found.mcse_mean))


KERNELS = {
    "nuts": {},
    "hmc": {},
    "chees": {},
    "meads": {"warmup": 400},
    "mala": {},
    "random-walk": {},
    "tempering": {"chains": 8},
    "smc": {},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_finds_a_conjugate_posterior(kernel):
    options = {"chains": 32, "warmup": 100, "draws": 200} | KERNELS[kernel]
    fitted = pgen.fit(conjugate, None, pgen.backend("mcmc", kernel=kernel, **options))
    draws = fitted.draws().by_chain()["mu"]
    near(draws, MEAN)
    near((draws - MEAN) ** 2, SD**2)


def test_the_check_of_kernels_can_fail():
    fitted = pgen.fit(conjugate, None, pgen.backend("mcmc", kernel="nuts", chains=32, warmup=100, draws=200))
    with pytest.raises(AssertionError):
        near(fitted.draws().by_chain()["mu"], MEAN + 0.1)


def test_rows_that_a_program_chooses_stand_for_all():
    y = torch.randn(100, generator=torch.Generator().manual_seed(0)) + 2
    index = torch.arange(0, 100, 5)

    def program(chosen):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 100, subsample=index if chosen else torch.randperm(100)[:20]) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    backend = pgen.backend("mcmc", kernel="nuts", chains=32, warmup=100, draws=200)
    fitted = pgen.fit(program, None, backend, args=(True,))
    draws = fitted.draws().by_chain()["mu"]
    near(draws, float(y[index].sum() * 5 / 100.01))
    near((draws - draws.mean()) ** 2, 1 / 100.01)
    assert fitted.log_prob().kind.value == "unnormalized"  # each row counts as five: the density of no law
    with pytest.raises(Refused, match="a random part of its rows"):
        pgen.fit(program, None, backend, args=(False,))


@pytest.mark.parametrize("kernel", ["sgld", "sghmc", "ula"])
def test_kernels_without_correction_come_near_with_small_steps(kernel):
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 1
    backend = pgen.backend("mcmc", kernel=kernel, chains=32, warmup=800, draws=300, step_size=0.02)
    run = pgen.Run() if kernel == "ula" else pgen.Run(batch_size=50)
    fitted = pgen.fit(program, y, backend, run=run)
    mean, sd = float(y.sum() / 200.25), 200.25**-0.5
    draws = fitted.posterior(n=4000)["mu"]
    assert abs(float(draws.mean()) - mean) < 0.5 * sd
    assert sd * 0.7 < float(draws.std()) < sd * 2


@pytest.mark.parametrize("kernel", ["nuts", "chees"])
def test_scales_correlations_and_constraints(kernel):
    fitted = pgen.fit(scales, None, pgen.backend("mcmc", kernel=kernel, chains=64, draws=200))
    draws = fitted.draws().by_chain()
    x = draws["x"].double()
    near(x[..., 1], 0.25, name="x1")
    near(x[..., 0], 99 / 2 * 0.5, name="x0")
    near((x[..., 0] - 24.75) ** 2, 1e4 - 99**2 / 2, name="variance of x0")
    near(draws["s"], 7 / 3, name="s")


@pytest.mark.parametrize("kernel", ["nuts", "chees"])
def test_a_support_that_depends_on_a_latent(kernel):
    fitted = pgen.fit(frozen, None, pgen.backend("mcmc", kernel=kernel, chains=64, draws=300))
    u, k = frozen_by_quadrature()
    draws = fitted.draws().by_chain()
    near(draws["u"], u, name="u")
    near(draws["k"], k, name="k")


def test_ten_thousand_chains():
    def banana():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x**2, 0.5))

    fitted = pgen.fit(banana, None, pgen.backend("mcmc", kernel="chees", chains=10_000, warmup=60, draws=10))
    draws = fitted.draws().by_chain()
    assert draws["y"].shape == (10_000, 10)
    last = draws["y"][:, -1].double()  # independent across chains
    assert abs(float(last.mean()) - 1) < 5 * math.sqrt((2 + 0.25) / 10_000)


def mixture(y):
    with pyro.plate("components", 2):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("y", dist.Normal(m[z], 1.0), obs=y)


def test_label_switching_is_seen_and_both_labels_are_visited():
    y = torch.tensor([-2.0, -1.7, -2.3, 2.1, 1.8, 2.2])
    fitted = pgen.fit(mixture, y, pgen.backend("mcmc", chains=64, draws=200))
    draws = fitted.draws()
    swapped = (draws["m"][:, 0] > draws["m"][:, 1]).double().reshape(64, -1).mean(1)
    assert 0.2 < float(swapped.mean()) < 0.8  # 64 chains, each in one of two modes: 1e-6 is at 0.2
    assert any("chains disagree. Labels are switched" in w for w in fitted.summary().warnings)
    z = draws["z"].double()
    assert (
        float((z[:, 0] - z[:, 3]).abs().mean()) > 0.9
    )  # the two groups are kept apart, whatever their labels


def pair():
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.2, 0.8])[(a == 1).long()]))
    mu = pyro.sample("mu", dist.Normal(a + 2 * b, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(2.0))


@pytest.mark.parametrize("way", ["auto", "none"])
def test_finite_latents_summed_out_or_drawn_in_turn(way):
    backend = pgen.backend("mcmc", enumerate=way, chains=64, warmup=120, draws=200)
    draws = pgen.fit(pair, None, backend).draws().by_chain()
    a, b = torch.meshgrid(torch.arange(3.0), torch.arange(2.0), indexing="ij")
    one = torch.where(a == 1, 0.8, 0.2)
    log = torch.tensor([0.2, 0.3, 0.5]).log()[:, None] + torch.where(b == 1, one, 1 - one).log()
    weight = (log - (2 - a - 2 * b) ** 2 / 4).flatten().softmax(0).reshape(3, 2).double()
    near((draws["a"] == 2), float(weight[2].sum()), name="a")
    near(draws["b"], float(weight[:, 1].sum()), name="b")
    near(draws["mu"], float((weight * (a + 2 * b + 2) / 2).sum()), name="mu")


def test_evidence_is_that_of_the_conjugate_model():
    fitted = pgen.fit(conjugate, None, pgen.backend("mcmc", kernel="chees", chains=32, draws=150))
    found = fitted.log_prob(seed=0)
    covariance = torch.eye(4, dtype=torch.float64) + 4
    law = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance)
    truth = float(law.log_prob(Y.double()))
    assert found.kind == "estimate"
    assert abs(float(found.value) - truth) < 5 * float(found.stderr) + 1e-3
    assert float(found.stderr) < 0.05


def test_the_posterior_of_other_data():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    backend = pgen.backend("mcmc", kernel="chees", chains=32, warmup=100, draws=150)
    fitted = pgen.fit(program, torch.zeros(4), backend)
    other = fitted.posterior(torch.full((9,), 3.0), n=4800)
    near(other.by_chain()["mu"], 27 / 9.25)


def test_many_data_sets_at_once():
    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    problem = Problem.of(program, {"y": torch.zeros(5)})
    structure, problem = inspect_problem(problem)
    data = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)) * 3
    backend = pgen.backend("mcmc", kernel="chees", warmup=100)
    with isolated(0):
        found = backend.posteriors(problem, structure, pgen.Run(), {"y": data}, 200)
    for y, draws in zip(data, found, strict=True):
        z = (draws["mu"].double() - float(y.sum()) / 5.25) * 5.25**0.5
        assert abs(float(z.mean())) < 5 * 2 / math.sqrt(200)
        assert 0.7 < float(z.std()) < 1.4


def test_a_program_that_reads_values_runs_as_it_is_written():
    def branches():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        scale = 1.0 if b.item() > 100 else 2.0
        pyro.sample("y", dist.Normal(b, scale), obs=torch.tensor(1.0))

    backend = pgen.backend("mcmc", kernel="nuts", warmup=60, draws=100)
    with pytest.warns(NotRecorded, match=r"branches runs as it is written.*item.*test_mcmc.py"):
        fitted = pgen.fit(branches, None, backend)
    near(fitted.draws().by_chain()["b"], 0.2)


def test_single_precision_matrices_of_the_user_are_lifted():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5])

    def regression():
        b = pyro.sample("b", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(x @ b, 0.5).to_event(1), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = pgen.fit(regression, None, pgen.backend("mcmc", kernel="chees", chains=32, draws=100))
    assert fitted.posterior(n=10)["b"].dtype == torch.float32
    precision = x.double().T @ x.double() * 4 + torch.eye(3) / 100
    truth = torch.linalg.solve(precision, x.double().T @ y.double() * 4)
    draws = fitted.draws().by_chain()["b"]
    for i in range(3):
        near(draws[..., i], float(truth[i]))


def test_draws_are_continued_and_spread_over_chains():
    fitted = pgen.fit(conjugate, None, pgen.backend("mcmc", kernel="chees", chains=8, warmup=50, draws=100))
    few = fitted.posterior(n=20, seed=0)
    assert few.chains == 8
    assert few["mu"].shape == (20,)
    many = fitted.posterior(n=2000)
    assert many.chains == 8
    assert len(set(many["mu"].tolist())) > 1500
    assert len(fitted.draws()["mu"]) == 800  # asking for more leaves what was fitted as it was


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match="expected one of 'auto', 'nuts'"):
        pgen.backend("mcmc", kernel="nut")
    with pytest.raises(OptionError, match="chains=0"):
        pgen.backend("mcmc", chains=0)
    with pytest.raises(OptionError, match="target_accept"):
        pgen.backend("mcmc", target_accept=1.0)
    with pytest.raises(OptionError, match="init gives no value of 'mu'"):
        pgen.fit(conjugate, None, pgen.backend("mcmc", init={"m": 0.0}))


def test_refusals_name_the_site():
    net = torch.nn.Linear(1, 1)

    def learned(x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x[:, None])[:, 0] + b, 1.0), obs=x)

    with pytest.raises(Refused, match="a prior for its learned tensors"):
        pgen.fit(learned, torch.zeros(3), "mcmc")


def test_a_program_without_a_possible_start_says_so():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(0.0, 1.0, validate_args=False), obs=torch.tensor(2.0))
        pyro.factor("never", x * 0 - math.inf)

    with pytest.raises(ProgramError, match="no starting point"):
        pgen.fit(impossible, None, pgen.backend("mcmc", chains=4))


def test_explain_says_what_is_done_to_each_latent():
    (row,) = [r for r in pgen.explain(mixture, torch.zeros(3)) if r.backend == "mcmc"]
    assert "m moved by chees" in row.answer.why
    assert "z summed out exactly" in row.answer.why


def test_a_module_with_sampled_weights_is_recorded_and_predicts_new_rows():
    class Regression(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = pyro.nn.PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("rows", len(x)):
                return pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    y = x.sum(1) + 0.3 * torch.randn(60, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotRecorded)
        backend = pgen.backend("mcmc", chains=32, draws=100)
        fitted = pgen.fit(Regression(), {"x": x, "y": y}, backend)
    inputs = torch.cat([x, torch.ones(60, 1)], 1).double()
    precision = inputs.T @ inputs / 0.09 + torch.eye(3)
    truth = torch.linalg.solve(precision, inputs.T @ y.double() / 0.09)
    weights = fitted.draws().by_chain()["linear.weight"][..., 0, :]
    for i in range(2):
        near(weights[..., i], float(truth[i]))
    new = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    drawn = fitted.predictive({"x": new}, n=3200, seed=0)["obs"].double()
    assert drawn.shape == (3200, 3)
    means = torch.cat([new, torch.ones(3, 1)], 1).double() @ truth
    assert float((drawn.mean(0) - means).abs().max()) < 6 * 0.35 / 3200**0.5 + 0.02


def test_observed_in_part_by_a_mask():
    def program(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)

    seen = torch.tensor([True, False, True, True])
    fitted = pgen.fit(program, {"y": Y, "seen": seen}, pgen.backend("mcmc", chains=32, draws=150))
    draws = fitted.draws().by_chain()
    near(draws["mu"], float(Y[seen].sum() / 3.25))
    near(draws["y"][..., 1], float(Y[seen].sum() / 3.25), name="the element that was not seen")
