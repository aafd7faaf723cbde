"""Energies under every likelihood backend, against closed forms: learned, weighed, drawn, conditioned, refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.algorithms.energy.contrastive import PersistentContrastiveDivergence
from pgen.capability import Capability, Exactness, Query
from pgen.distributions import Energy
from pgen.distributions.energy_learning import learned_by
from pgen.fitting import Doubtful
from pgen.nn import RBM
from pgen.testing.statistics import StatisticalFailure, assert_estimate, assert_frequencies, assert_mean
from pgen.zoo import JointEnergy

torch.manual_seed(0)
DATA = {"x": 1.0 + 0.5 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(7))}
MEAN, SD = float(DATA["x"].mean()), float(DATA["x"].std(unbiased=False))
RUN = pgen.Run(steps=400, lr=0.02, batch_size=500, progress=False)
WAYS = (
    "persistent-contrastive-divergence",
    "contrastive-divergence",
    "short-run",
    "noise-contrastive",
    "conditional-noise-contrastive",
    "score-matching",
    "sliced-score-matching",
    "denoising-score-matching",
    "energy-discrepancy",
    "quadrature-likelihood",
)


class Parabola(nn.Module):
    """x ~ exp(-a (x - b)^2 / 2): a Gaussian, known only as an energy."""

    def __init__(self, a=1.0, b=0.0):
        super().__init__()
        self.log_a, self.b = nn.Parameter(torch.tensor(math.log(a))), nn.Parameter(torch.tensor(b))

    def energy(self, x):
        return self.log_a.exp() * (x[..., 0] - self.b).square() / 2

    def forward(self, n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(self.energy, (1,)))


def fixed(program):
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    return program


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_the_gaussian(way):
    run = pgen.Run(steps=60, lr=0.2, progress=False) if way == "quadrature-likelihood" else RUN
    fitted = pgen.fit(Parabola(), DATA, pgen.backend("exact", via={"x": way}), run=run)
    a, b = (float(fitted.parameters[name]) for name in ("log_a", "b"))
    assert abs(b - MEAN) < 0.06
    assert abs(math.exp(-a / 2) - SD) < (0.06 if way != "energy-discrepancy" else 0.12)
    estimate = fitted.log_prob()
    expected = dist.Normal(b, math.exp(-a / 2)).log_prob(DATA["x"][:, 0])
    torch.testing.assert_close(estimate.value, expected, rtol=1e-3, atol=1e-3)
    assert estimate.kind == "estimate"
    assert estimate.solver_error is not None


def test_draws_are_those_of_what_was_learned():
    fitted = pgen.fit(Parabola(), DATA, "exact", run=RUN)
    drawn = fitted.sample(2000, seed=1)["x"]
    a, b = (float(fitted.parameters[name]) for name in ("log_a", "b"))
    assert abs(float(drawn.mean()) - b) < 5 * math.exp(-a / 2) / math.sqrt(1000)
    assert abs(float(drawn.std()) - math.exp(-a / 2)) < 0.05
    assert {"x.accept", "x.energy_gap", "x.spread", "x.age", "x.escaped"} <= fitted.history.metrics.keys()
    assert 0.3 < float(fitted.history["x.accept"][-1]) < 0.97


def test_a_fit_is_repeated_by_its_seed_and_survives_a_file(tmp_path):
    one, two = (
        pgen.fit(Parabola(), DATA, "exact", run=pgen.Run(steps=30, progress=False), seed=3) for _ in range(2)
    )
    assert all(torch.equal(v, two.parameters[k]) for k, v in one.parameters.items())
    one.save(tmp_path / "fit")
    again = pgen.load(tmp_path / "fit", Parabola())
    torch.testing.assert_close(again.log_prob().value, one.log_prob().value)
    assert torch.equal(again.sample(10, seed=0)["x"], one.sample(10, seed=0)["x"])  # chains are saved too


def test_hyperparameters_are_those_of_an_object():
    way = learned_by(PersistentContrastiveDivergence(chains=64, steps=2))
    backend = pgen.backend("exact", via={"x": way})
    fitted = pgen.fit(Parabola(), DATA, backend, run=pgen.Run(steps=5, progress=False))
    chains = [v for k, v in fitted._answers.tensors().items() if k.endswith("position")]
    assert [len(v) for v in chains] == [64]


def test_annealing_states_an_error_that_rows_share():
    program = fixed(Parabola(4.0, 1.0))
    backend = pgen.backend("exact", via={"x": "annealed-importance"})
    found = pgen.fit(program, DATA, backend).log_prob(seed=0)
    expected = dist.Normal(1.0, 0.5).log_prob(DATA["x"][:, 0])
    assert_estimate(found.value[:1], expected[:1], found.stderr[:1])
    torch.testing.assert_close(found.mean().stderr, found.shared)  # which no number of rows averages out
    assert float(found.lower.mean()) < float(found.upper.mean())
    low, high = found.interval(0.999999)
    assert bool((low <= expected).all() and (expected <= high).all())


def test_a_fixed_energy_needs_no_data():
    drawn = pgen.fit(fixed(Parabola(4.0, 1.0)), None, "exact").sample(2000, seed=0)["x"]
    assert abs(float(drawn.mean()) - 1) < 0.1
    assert abs(float(drawn.std()) - 0.5) < 0.05


def test_an_unnormalised_answer_says_so():
    def program(n):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", Energy(lambda x, c: (x * c).square().sum(-1), (1,), context=scale.expand(n, 1)))

    with pytest.raises(pgen.errors.Refused, match="constant"):
        pgen.fit(program, {"x": torch.randn(5, 1)}, "mcmc")


# --- latent ---


class Tilted(nn.Module):
    """z ~ N(0, 1) tilted by exp(-(a - 1) z^2 / 2), so N(0, 1/a); x ~ N(z, 1)."""

    def __init__(self, a=1.0):
        super().__init__()
        self.log_a = nn.Parameter(torch.tensor(math.log(a)))

    def forward(self, n):
        with pyro.plate("data", n):
            base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
            z = pyro.sample(
                "z", Energy(lambda z: (self.log_a.exp() - 1) * z[..., 0].square() / 2, (1,), base=base)
            )
            pyro.sample("x", dist.Normal(z[..., 0], 1.0))


SEEN = {"x": math.sqrt(1 / 4 + 1) * torch.randn(1000, generator=torch.Generator().manual_seed(5))}


def test_a_latent_energy_is_learned_with_the_bound():
    run = pgen.Run(steps=1500, lr=0.02, batch_size=500, progress=False)
    fitted = pgen.fit(Tilted(), SEEN, pgen.backend("variational", family="full"), run=run)
    variance = math.exp(-float(fitted.parameters["log_a"]))
    best = float(SEEN["x"].var(unbiased=False)) - 1
    assert abs(variance - best) < 0.12
    found = fitted.log_prob(seed=0)
    exact = dist.Normal(0.0, math.sqrt(variance + 1)).log_prob(SEEN["x"])
    assert found.kind == "lower bound"  # an estimate of one, as its constant is estimated
    assert float((exact - found.value).mean()) > -4 * float(found.mean().stderr)
    assert float((exact - found.value).mean()) < 0.1


def test_mcmc_conditions_a_latent_energy():
    fitted = pgen.fit(fixed(Tilted(4.0)), {"x": torch.tensor([1.0])}, "mcmc", run=pgen.Run(progress=False))
    drawn = fitted.posterior(n=4000)["z"].reshape(-1)
    assert abs(float(drawn.mean()) - 0.2) < 0.05  # precision 4 + 1
    assert abs(float(drawn.std()) - math.sqrt(1 / 5)) < 0.03
    assert fitted.offer.answers[Query.LOG_PROB] is Exactness.ESTIMATE  # the constant is taken off
    assert fitted.log_prob().kind == "estimate"


def test_most_probable_values_of_a_latent_energy():
    program = fixed(Tilted(4.0))
    found = pgen.fit(program, {"x": torch.tensor([1.0, -2.0])}, pgen.backend("exact", estimate="map"))
    torch.testing.assert_close(found.parameters["z"][:, 0], torch.tensor([0.2, -0.4]), atol=1e-3, rtol=1e-3)


# --- discrete ---


class Machine(nn.Module):
    def __init__(self):
        super().__init__()
        self.rbm = RBM(6, 3, scale=0.5)

    def forward(self, n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(self.rbm, (6,), support=constraints.boolean))


def bits(n=2000):
    g = torch.Generator().manual_seed(2)
    first = torch.bernoulli(torch.full((n, 3), 0.5), generator=g)
    flip = torch.bernoulli(torch.full((n, 3), 0.1), generator=g)
    return {"x": torch.cat([first, (first - flip).abs()], 1)}


@pytest.mark.parametrize("way", ["persistent-contrastive-divergence", "pseudo-likelihood"])
def test_a_boltzmann_machine_learns_and_is_weighed_exactly(way):
    data = bits()
    run = pgen.Run(steps=1500, lr=0.02, batch_size=500, progress=False)
    fitted = pgen.fit(Machine(), data, pgen.backend("exact", via={"x": way}), run=run, seed=1)
    every = Energy(lambda x: x, (6,), support=constraints.boolean).space.every(torch.zeros(()))
    p = fitted.log_prob({"x": every})
    assert p.kind == "exact"
    assert abs(float(p.value.double().exp().sum()) - 1) < 1e-4
    entropy = 3 * math.log(2) - 3 * (0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert float(fitted.log_prob().value.mean()) > -entropy - 0.12
    codes = (fitted.sample(5000, seed=0)["x"] @ torch.tensor([32.0, 16, 8, 4, 2, 1])).long()
    assert_frequencies(codes, p.value.exp())


# --- two statements ---


class Joint(nn.Module):
    """A classifier with a density of what it classifies."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, n):
        with pyro.plate("data", n):
            base = dist.Normal(torch.zeros(1), 3.0).to_event(1)
            x = pyro.sample("x", Energy(lambda x: -self.net(x).logsumexp(-1), (1,), base=base))
            pyro.sample("y", dist.Categorical(logits=self.net(x)))


def test_two_statements_share_an_energy():
    g = torch.Generator().manual_seed(3)
    y = torch.randint(2, (2000,), generator=g)
    x = torch.randn(2000, 1, generator=g) + 3.0 * y[:, None] - 1.5
    fitted = pgen.fit(Joint(), {"x": x, "y": y}, "exact", run=pgen.Run(steps=600, lr=5e-3, progress=False))
    at = torch.tensor([[-2.0], [0.0], [2.0]])
    probs = fitted.marginals({"x": at})["y"].probs[:, 1]
    torch.testing.assert_close(probs, torch.sigmoid(3 * at[:, 0]), atol=0.1, rtol=0.0)
    both = (fitted.log_prob({"x": at, "y": torch.full((3,), k)}).value for k in (0, 1))
    torch.testing.assert_close(torch.stack(list(both)).logsumexp(0), fitted.log_prob({"x": at}).value)
    given = pgen.fit(fitted.program, {"y": torch.tensor([1])}, "mcmc", run=pgen.Run(progress=False))
    assert abs(float(given.posterior(n=2000)["x"].mean()) - 1.5) < 0.25


# --- refusals and doubts ---


def test_an_energy_that_has_no_integral_is_named_and_nothing_is_lost():
    class Never(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.5))

        def forward(self, n):
            with pyro.plate("data", n):
                pyro.sample("x", Energy(lambda x: -nn.functional.softplus(self.a) * x.square().sum(-1), (1,)))

    program = Never()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(pgen.errors.Diverged, match="energy at site 'x'.*no finite integral"):
            pgen.fit(program, DATA, "exact", run=RUN)
    assert program.a.item() == 0.5
    backend = pgen.backend("exact", via={"x": "noise-contrastive"})
    with pytest.warns(Doubtful, match="site 'x': far from the data"):
        fitted = pgen.fit(program, DATA, backend, run=pgen.Run(steps=20, progress=False))
    with pytest.raises(pgen.errors.Unanswerable, match="does not fall off"):
        fitted.log_prob()


def test_a_surrogate_is_no_weight_for_discrete_draws():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, n):
            with pyro.plate("data", n):
                k = pyro.sample("k", dist.Bernoulli(0.5))
                c = self.w[k.long()][..., None]
                pyro.sample("x", Energy(lambda x, c: (x * c).square().sum(-1), (1,), context=c))

    for backend in ("exact", "variational"):
        with pytest.raises(pgen.errors.Refused, match="'x'"):
            pgen.fit(Mixed(), DATA, backend)


def test_explain_tells_how_an_energy_is_learned_and_answered():
    offer = pgen.explain(Parabola(), DATA)["exact"].answer
    assert offer.learning == {"x": ("persistent-contrastive-divergence",)}
    assert offer.paths == {"x": ("quadrature", "chains")}
    assert offer.answers[Query.LOG_PROB] is Exactness.ESTIMATE
    assert Capability.LOG_DENSITY in pgen.structure_of(Parabola(), DATA).sites["x"].capabilities


def test_chains_that_stay_belong_to_no_row():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0))

        def forward(self, c):
            with pyro.plate("data", len(c)):
                pyro.sample("x", Energy(lambda x, c: (self.a * x - c).square().sum(-1), (1,), context=c))

    g = torch.Generator().manual_seed(4)
    c = torch.randn(1000, 1, generator=g)
    data = {"c": c, "x": c / 2 + 0.5 / math.sqrt(2) * torch.randn(1000, 1, generator=g)}  # a = 2
    with pytest.raises(pgen.errors.Refused, match="another law for every c"):
        pgen.fit(Given(), data, pgen.backend("exact", via={"x": "persistent-contrastive-divergence"}))
    fitted = pgen.fit(Given(), data, "exact", run=RUN)  # by chains that begin at each row
    assert abs(float(fitted.parameters["a"]) - 2) < 0.15
    truth = dist.Normal(c[:, 0] / 2, 8**-0.5).log_prob(data["x"][:, 0])
    a = float(fitted.parameters["a"])
    near = dist.Normal(c[:, 0] / a, 1 / (a * 2**0.5)).log_prob(data["x"][:, 0])
    torch.testing.assert_close(
        fitted.log_prob().value, near, atol=1e-3, rtol=0.0
    )  # each row with its own constant
    assert float((near - truth).mean().abs()) < 0.02


def test_chains_of_any_dimension_agree_with_moments():
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(lambda x: 2 * x.square().sum(-1), (5,)))

    drawn = pgen.fit(program, None, "exact").sample(1000, seed=0)["x"]
    assert_mean(drawn[:, 0].square(), 0.25, alpha=1e-5)


# --- values missing in part ---

PRECISION = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 1.5]])


def correlated(n):
    with pyro.plate("data", n):
        pyro.sample("x", Energy(lambda x: ((x @ PRECISION) * x).sum(-1) / 2, (3,)))


def conditional_of(i, value):
    """Mean and standard deviation of the two other numbers."""
    rest = [j for j in range(3) if j != i]
    inner = PRECISION[rest][:, rest]
    mean = -torch.linalg.solve(inner, PRECISION[rest, i] * value)
    return mean, torch.linalg.inv(inner).diagonal().sqrt()


def test_what_is_missing_in_part_is_drawn_given_the_rest():
    nan = math.nan
    x = torch.tensor([[1.0, nan, nan], [nan, 2.0, nan], [-0.5, nan, nan], [1.0, 2.0, 3.0]])
    fitted = pgen.fit(correlated, None, "exact")
    drawn = fitted.posterior({"x": x}, 1000, seed=0)["x"]
    assert drawn.shape == (1000, 4, 3)
    there = ~x.isnan()
    torch.testing.assert_close(
        drawn[:, there], x[there].expand(1000, -1)
    )  # in all of their rows, and the last is whole
    for row, known in ((0, 0), (1, 1), (2, 0)):
        mean, sd = conditional_of(known, float(x[row, known]))
        rest = drawn[:, row][:, [j for j in range(3) if j != known]]
        assert_mean(rest, mean, std=sd, alpha=1e-5)
        with pytest.raises(StatisticalFailure):
            assert_mean(rest, torch.zeros(2), std=sd, alpha=1e-5)


def marginals_of(x):
    """Log densities of what is there, by row."""
    covariance, found = torch.linalg.inv(PRECISION), []
    for row in x:
        there = (~row.isnan()).nonzero()[:, 0]
        law = dist.MultivariateNormal(torch.zeros(len(there)), covariance[there][:, there])
        found.append(law.log_prob(row[there]))
    return torch.stack(found)


def test_the_log_probability_of_what_is_known_integrates_the_rest():
    nan = math.nan
    x = torch.tensor([[1.0, nan, nan], [nan, 2.0, nan], [1.0, 2.0, 3.0], [-0.5, nan, nan], [nan, 0.3, -1.0]])
    found = pgen.fit(correlated, None, "exact").log_prob({"x": x}, seed=0)
    assert (found.kind, found.measure, found.dims) == ("estimate", "density", None)
    assert_estimate(found.value, marginals_of(x), found.stderr, rounding=1e-3)
    filled = torch.where(x.isnan(), x.nanmedian(0).values, x)
    with pytest.raises(StatisticalFailure):  # the rest at its medians, not integrated
        assert_estimate(found.value, marginals_of(filled), found.stderr, rounding=1e-3)
    torch.testing.assert_close(found.stderr, found.shared.expand(5))  # the rest is integrated, not estimated


def beside(n):
    k = pyro.sample("k", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", Energy(lambda x: ((x @ PRECISION) * x).sum(-1) / 2, (3,)))
        pyro.sample("y", dist.Normal(k, 1.0))


def test_what_is_known_counts_beside_what_rows_share():
    """Two rows: one log Z for each of them, and so twice its error; what is seen at other sites counts once."""
    x = torch.tensor([[1.0, math.nan, math.nan], [0.5, math.nan, math.nan]])
    y = torch.tensor([0.3, 0.7])
    truth = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(y)
    fitted = pgen.fit(beside, {"x": torch.zeros(2, 3), "y": y}, "exact")
    found = fitted.log_prob({"x": x, "y": y}, seed=0)
    assert found.dims == 4
    assert_estimate(found.value, (truth + marginals_of(x).sum())[None], found.stderr, rounding=1e-3)
    with pytest.raises(StatisticalFailure):
        assert_estimate(found.value, marginals_of(x).sum()[None], found.stderr, rounding=1e-3)
    single = pgen.fit(correlated, None, "exact").log_prob({"x": torch.zeros(1, 3)}, seed=0).stderr
    many = fitted.log_prob({"x": torch.zeros(40, 3), "y": torch.zeros(40)}, seed=0)
    assert float(many.stderr / single) == pytest.approx(40, rel=0.5)
    assert many.dims == 160
    with pytest.raises(pgen.errors.DataError, match="not independent"):
        fitted.log_prob({"x": x.roll(1, 1).where(torch.eye(2, 3).bool(), x), "y": y})


def test_what_is_known_is_not_weighed_by_bounds_or_beside_what_a_program_observes():
    def observing(n, y):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(lambda x: ((x @ PRECISION) * x).sum(-1) / 2, (3,)))
            pyro.sample("z", dist.Normal(0.0, 1.0), obs=y)

    x, y = torch.tensor([[1.0, math.nan, math.nan]] * 2), torch.tensor([0.3, 0.7])
    with pytest.raises(pgen.errors.DataError, match="observes 'z' by itself"):
        pgen.fit(observing, {"x": torch.zeros(2, 3), "y": y}, "exact").log_prob({"x": x, "y": y})
    run = pgen.Run(steps=5, progress=False)
    bounded = pgen.fit(beside, {"x": torch.zeros(2, 3), "y": y}, "variational", run=run)
    assert bounded.log_prob().kind == "lower bound"
    with pytest.raises(pgen.errors.Unanswerable, match="one bound less another is none"):
        bounded.log_prob({"x": x, "y": y})


def test_a_value_without_rows_can_be_missing_in_part():
    def program():
        pyro.sample("x", Energy(lambda x: ((x @ PRECISION) * x).sum(-1) / 2, (3,)))

    x = torch.tensor([math.nan, 0.7, math.nan])
    fitted = pgen.fit(program, None, "exact")
    found = fitted.log_prob({"x": x}, seed=0)
    assert found.dims == 1
    assert_estimate(found.value, marginals_of(x[None]), found.stderr, rounding=1e-3)
    drawn = fitted.posterior({"x": x}, 1000, seed=0)["x"]
    mean, sd = conditional_of(1, 0.7)
    assert_mean(drawn[:, ::2], mean, std=sd, alpha=1e-5)


def test_what_is_known_of_bits_has_a_probability():
    """A machine of five bits above two: sums over all values of what is missing."""
    machine = RBM(5, 2)
    with torch.no_grad():
        machine.weight.normal_(generator=torch.Generator().manual_seed(0))

    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(machine.requires_grad_(False), (5,), support=constraints.boolean))

    fitted = pgen.fit(program, None, "exact")
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    p = fitted.log_prob({"x": every}).value.exp()
    nan = math.nan
    x = torch.tensor([[1.0, nan, 0.0, nan, 1.0], [nan, nan, nan, 1.0, nan], [0.0, 0.0, nan, 1.0, 1.0]])
    found = fitted.log_prob({"x": x})
    truth = torch.stack([p[((every == row) | row.isnan()).all(1)].sum() for row in x])
    assert (found.kind, found.measure, found.stderr) == ("exact", "mass", None)
    torch.testing.assert_close(found.value.exp(), truth, rtol=1e-4, atol=1e-6)
    alike = fitted.log_prob({"x": torch.tensor([[nan, 1.0, 1.0, 1.0, 1.0], [nan, 0.0, 0.0, 0.0, 0.0]])})
    assert alike.dims == 4


def test_what_depends_on_a_value_that_is_missing_in_part_is_left_out():
    fitted = pgen.fit(
        JointEnergy(2, 2, (8,)),
        {"x": torch.randn(50, 2), "y": torch.arange(50) % 2},
        "exact",
        run=pgen.Run(steps=0),
    )
    lacking = torch.tensor([[1.0, math.nan]])
    with pytest.raises(pgen.errors.DataError, match="y depends on it.*leave y out"):
        fitted.log_prob({"x": lacking, "y": torch.tensor([1])})
    assert bool(fitted.log_prob({"x": lacking}).value.isfinite().all())


def test_what_is_missing_in_part_is_moved_by_mcmc_beside_latents():
    def program(n):
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", Energy(lambda x: ((x @ PRECISION) * x).sum(-1) / 2, (3,)))
            pyro.sample("y", dist.Normal(k, 1.0))

    x = torch.tensor([[1.0, math.nan, math.nan], [0.5, math.nan, math.nan]])
    data = {"x": x, "y": torch.tensor([0.3, 0.7])}
    fitted = pgen.fit(program, {"x": torch.zeros(2, 3), "y": data["y"]}, "mcmc", run=pgen.Run(progress=False))
    found = fitted.posterior(data, 2000, seed=0)
    assert found["x"].shape == (2000, 2, 3)
    assert abs(float(found["k"].mean()) - 1 / 3) < 0.15
    for row in (0, 1):
        mean, sd = conditional_of(0, float(x[row, 0]))
        assert bool(((found["x"][:, row, 1:].mean(0) - mean).abs() < 0.2 * sd).all())
        assert bool((found["x"][:, row, 1:].std(0) / sd - 1).abs().max() < 0.15)


def test_evidence_by_chains_takes_the_constants_off():
    """z_j has precision 3 around 1/2, written without its constant; x_ij ~ N(z_j, 1)."""

    def program(n):
        z = pyro.sample("z", Energy(lambda z: 3 * (z - 0.5).square().sum(-1) / 2, (2,)))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    backend = pgen.backend("mcmc", chains=16, warmup=100, draws=100)
    found = pgen.fit(program, {"x": x}, backend, run=pgen.Run(progress=False)).log_prob(seed=0)
    law = dist.MultivariateNormal(torch.full((5,), 0.5), torch.eye(5) + torch.ones(5, 5) / 3)
    truth = law.log_prob(x.mT).sum()[None]
    assert found.kind == "estimate"
    assert_estimate(found.value, truth, found.stderr, rounding=1e-3)
    with pytest.raises(StatisticalFailure):
        assert_estimate(found.value + math.log(2 * math.pi / 3), truth, found.stderr, rounding=1e-3)


def test_what_is_missing_begins_where_learning_left_chains_and_labels_follow_it():
    """Two clusters at -4 and 4, in both numbers; the label says which. The rest of a value is in the same cluster, where chance is 1/2."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (600,), generator=g)
    x = (8.0 * y[:, None] - 4) / 4 + 0.25 * torch.randn(600, 2, generator=g)
    run = pgen.Run(steps=300, lr=3e-3, batch_size=200, progress=False)
    fitted = pgen.fit(JointEnergy(2, 2, (32,)), {"x": x, "y": y}, "exact", run=run)
    lacking = torch.tensor([[1.0, math.nan], [-1.0, math.nan]])
    drawn = fitted.posterior({"x": lacking}, 200, seed=0)
    assert float((drawn["x"][:, 0, 1] > 0).double().mean()) > 0.85
    assert float((drawn["x"][:, 1, 1] < 0).double().mean()) > 0.85
    assert float((drawn["y"] == torch.tensor([1, 0])).double().mean()) > 0.85
    known = pgen.fit(fitted.program, {"y": torch.tensor([1, 0])}, "mcmc", run=pgen.Run(progress=False))
    other = torch.tensor([[math.nan, 1.0], [math.nan, -1.0]])
    drawn = known.posterior({"x": other, "y": torch.tensor([1, 0])}, 200, seed=0)["x"]
    assert float((drawn[:, 0, 0] > 0).double().mean()) > 0.85
    assert float((drawn[:, 1, 0] < 0).double().mean()) > 0.85


def test_what_a_machine_of_bits_lacks_is_summed_over():
    machine = RBM(6, 3)
    with torch.no_grad():
        machine.weight.copy_(torch.randn(machine.weight.shape, generator=torch.Generator().manual_seed(0)))

    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(machine.requires_grad_(False), (6,), support=constraints.boolean))

    x = torch.tensor([[1.0, 0.0, 1.0, 1.0, math.nan, math.nan]])
    drawn = pgen.fit(program, None, "exact").posterior({"x": x}, 4000, seed=0)["x"][:, 0]
    ends = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    with torch.no_grad():
        expected = (-machine(torch.cat([x[:, :4].expand(4, 4), ends], 1))).softmax(0)
    assert_frequencies((2 * drawn[:, 4] + drawn[:, 5]).long(), expected)
    with pytest.raises(StatisticalFailure):
        assert_frequencies((2 * drawn[:, 5] + drawn[:, 4]).long(), expected)
