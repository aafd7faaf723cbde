"""The score backend: what it learns, draws and weighs, against laws for which all is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.backends.score import Score
from pgen.backends.score.options import TIMES, WEIGHTINGS
from pgen.backends.score.training import Objective
from pgen.capability import Exactness, Query
from pgen.distributions import EDM, VE, VP, Diffusion, MixtureDenoiser, Quantized, RectifiedFlow
from pgen.errors import OptionError, Refused, Unanswerable
from pgen.testing.statistics import StatisticalFailure, assert_mean, assert_moments

MIXTURE = MixtureDenoiser(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), scale=0.5)


class Gaussian(nn.Module):
    """The denoiser of N(mean, exp(log_scale)^2), to be learned."""

    def __init__(self, size=2):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(size))
        self.log_scale = nn.Parameter(torch.zeros(size))

    def forward(self, x, sigma, context=None):
        v, s2 = (2 * self.log_scale).exp(), sigma[:, None] ** 2
        mean = self.mean if context is None else self.mean + torch.nan_to_num(context)
        return (v * x + s2 * mean) / (v + s2)


def observed(denoiser, schedule):
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Diffusion(denoiser, schedule, (2,)))

    return program


def measured(n):
    """A mixture, seen through a sum with noise."""
    with pyro.plate("data", n):
        x = pyro.sample("x", Diffusion(MIXTURE, VE(0.01, 80.0), (2,)))
        pyro.sample("y", dist.Normal(x[..., 0] + x[..., 1], 0.5))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([1.0, -0.5]) + torch.tensor([0.5, 2.0]) * torch.randn(2000, 2, generator=generator)


# --- learning ---

WAYS = (
    [{"weighting": w} for w in ("auto", "learned", *WEIGHTINGS)]
    + [{"times": t} for t in TIMES if t != "low-discrepancy"]
    + [{"loss": "sliced", "weighting": "edm"}]
)


@pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(o.values()))
def test_every_loss_has_its_minimum_at_the_moments_of_the_data(data, options):
    """The best denoiser of the form of a Gaussian's is that of the Gaussian with the data's mean and variance."""
    denoiser = Gaussian()
    run = pgen.Run(steps=400, batch_size=500, lr=3e-2)
    fitted = pgen.fit(
        observed(denoiser, EDM()), {"x": data}, pgen.backend("score", **options), run=run, seed=1
    )
    mean, scale = fitted.parameters["denoiser.mean"], fitted.parameters["denoiser.log_scale"].exp()
    torch.testing.assert_close(mean, data.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(scale, data.std(0), atol=0, rtol=0.1)
    assert torch.equal(denoiser.mean, torch.zeros(2)), "the user's module is left alone"


@pytest.mark.parametrize("schedule", [VE(0.01, 50.0), VP(), VP("cosine"), RectifiedFlow()], ids=str)
def test_every_schedule_learns_the_density(data, schedule):
    run = pgen.Run(steps=300, batch_size=500, lr=3e-2)
    fitted = pgen.fit(observed(Gaussian(), schedule), {"x": data}, "score", run=run, seed=1)
    best = dist.Normal(data.mean(0), data.std(0)).log_prob(data[:50]).sum(-1)
    found = fitted.log_prob({"x": data[:50]})
    assert found.kind == "estimate"
    assert found.evaluations
    assert float((found.value - best).abs().mean()) < 0.1
    assert float(found.solver_error.max()) < 0.05


def test_pairing_noise_with_data_learns_a_flow_and_offers_no_density(data):
    run = pgen.Run(steps=30, batch_size=64, lr=3e-2)
    fitted = pgen.fit(
        observed(Gaussian(), RectifiedFlow()),
        {"x": data},
        pgen.backend("score", coupling="optimal-transport"),
        run=run,
        seed=1,
    )
    assert set(fitted.offer.answers) == {Query.SAMPLE}
    with pytest.raises(Unanswerable):
        fitted.log_prob()
    assert fitted.sample(5)["x"].shape == (5, 2)


def test_conditions_are_left_out_as_often_as_asked():
    """Of 4,000 rows a share of 0.25, six standard errors being 0.041; of none, none."""
    seen = []

    def denoiser(x, sigma, context):
        seen.append(context.isnan().any(-1))
        return x

    law = Diffusion(denoiser, EDM(), (2,), context=torch.zeros(4000, 1))
    torch.manual_seed(0)
    for dropout in (0.25, 0.0):
        objective = Objective(lambda schedule: torch.ones_like, TIMES["uniform"], dropout=dropout)
        objective("x", law, torch.zeros(4000, 2))
    assert abs(float(seen[0].float().mean()) - 0.25) < 0.041
    assert not seen[1].any()


def test_a_grid_of_ones_own_begins_where_it_says():
    def short(n, low, high):
        return torch.cat([torch.linspace(5.0, 0.05, n).double(), torch.zeros(1).double()])

    normal = MixtureDenoiser(torch.zeros(1, 2), scale=1.0)
    drawn = pgen.fit(observed(normal, VE(0.01, 80.0)), None, Score(grid=short, steps=200, solver="euler"))
    assert_moments(drawn.sample(4000, seed=0)["x"], 0.0, 1.0, alpha=1e-6)


def test_a_condition_is_learned(data):
    """Rows of class c have mean (1, -0.5) + 3 c."""
    shift = 3.0 * (torch.arange(2000) % 2)[:, None].float()
    denoiser = Gaussian()

    def program(c, n=None):
        with pyro.plate("data", len(c)):
            pyro.sample("x", Diffusion(denoiser, EDM(), (2,), context=c))

    run = pgen.Run(steps=400, batch_size=500, lr=3e-2)
    fitted = pgen.fit(program, {"c": shift, "x": data + shift}, "score", run=run, seed=1)
    torch.testing.assert_close(fitted.parameters["denoiser.mean"], data.mean(0), atol=0.1, rtol=0)
    some = {"c": shift[:4], "x": (data + shift)[:4]}
    exact = dist.Normal(data.mean(0) + shift[:4], data.std(0)).log_prob(some["x"]).sum(-1)
    torch.testing.assert_close(fitted.log_prob(some).value, exact, atol=0.3, rtol=0)
    with pytest.raises(OptionError, match=r"Score\(condition_dropout=2\): expected a number from 0 to 1"):
        Score(condition_dropout=2)


def test_other_sites_are_trained_by_their_log_probabilities(data):
    def program(n):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(MIXTURE, VP(), (2,)))
            pyro.sample("y", dist.Normal(x.sum(-1) + loc, 1.0))

    y = data.sum(-1) + 2.0
    run = pgen.Run(steps=200, lr=5e-2)
    fitted = pgen.fit(program, {"x": data, "y": y}, "score", run=run, seed=1)
    torch.testing.assert_close(fitted.parameters["loc"], torch.tensor(2.0), atol=0.1, rtol=0)


# --- queries ---


@pytest.fixture(scope="module")
def fixed():
    return pgen.fit(measured, None, "score")


def test_nothing_to_learn_is_fitted_at_once_and_says_how_exact_it_is(fixed):
    assert fixed.offer.answers == dict.fromkeys(
        (Query.SAMPLE, Query.LOG_PROB, Query.POSTERIOR), Exactness.ESTIMATE
    )
    row = pgen.explain(measured, {"y": torch.zeros(3)})["score"]
    assert row.offered
    assert row.answer.paths == {"x": ("reverse-diffusion",)}


def test_log_prob_is_that_of_all_sites_row_by_row(fixed):
    seen = fixed.sample(30, seed=0)
    found = fixed.log_prob(seen)
    exact = MIXTURE.log_prob(seen["x"], 0.01) + dist.Normal(seen["x"].sum(-1), 0.5).log_prob(seen["y"])
    torch.testing.assert_close(found.value, exact, atol=5e-3, rtol=0)
    assert found.stderr is None


def test_draws_have_the_joint_law(fixed):
    drawn = fixed.sample(20_000, seed=1)
    mean = MIXTURE.means.mean(0)
    var = MIXTURE.means.var(0, unbiased=False) + 0.25
    assert_moments(drawn["x"], mean, var.sqrt())
    assert_mean(drawn["y"], float(mean.sum()))
    with pytest.raises(StatisticalFailure):
        assert_mean(drawn["y"], float(mean.sum()) + 0.1)


def test_laws_wrapped_by_pyro_are_served_like_bare_ones():
    """Three at once, one of them masked: two count, each as by itself."""
    keep = torch.tensor([True, False, True])

    def program(n):
        with pyro.plate("data", n):
            law = Diffusion(MIXTURE, VE(0.01, 80.0), (2,)).expand((3,))
            pyro.sample("x", law.mask(keep).to_event(1))

    fitted = pgen.fit(program, None, "score")
    drawn = fitted.sample(6, seed=0)["x"]
    assert drawn.shape == (6, 3, 2)
    exact = (MIXTURE.log_prob(drawn, 0.01) * keep).sum(-1)
    torch.testing.assert_close(fitted.log_prob({"x": drawn}).value, exact, atol=5e-3, rtol=0)


def test_a_draw_is_the_same_at_any_number(fixed):
    assert torch.equal(fixed.sample(3, seed=2)["x"], fixed.sample(100, seed=2)["x"][:3])


@pytest.mark.parametrize("solver", ["heun", "ancestral", "dpm++", "ddim"])
def test_any_solver_draws(solver):
    backend = pgen.backend("score", solver=solver, steps=60)
    drawn = pgen.fit(measured, None, backend).sample(4000, seed=3)["x"]
    assert_mean(drawn, MIXTURE.means.mean(0), slack=0.1)


def test_a_strangers_solver_needs_one_method():
    class Straight:
        def step(self, x, t, t_next, fn):
            return x + (t_next - t) * (x - fn(x, t)) / t

    drawn = pgen.fit(measured, None, Score(solver=Straight(), steps=100)).sample(4000, seed=3)["x"]
    assert_mean(drawn, MIXTURE.means.mean(0), slack=0.1)


def test_a_bound_says_that_it_is_one(data):
    fitted = pgen.fit(measured, None, pgen.backend("score", evaluate="bound"))
    seen = fitted.sample(20, seed=0)
    found = fitted.log_prob(seen)
    exact = MIXTURE.log_prob(seen["x"], 0.01) + dist.Normal(seen["x"].sum(-1), 0.5).log_prob(seen["y"])
    assert found.kind == "lower bound"
    gap = (exact - found.value).mean()
    error = found.stderr.square().sum().sqrt() / 20
    assert -6 * float(error) < float(gap) < 0.1 + 6 * float(error)


def test_whole_numbers_are_a_mass(data):
    normal = MixtureDenoiser(torch.zeros(1, 2), scale=1.0)

    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Quantized(Diffusion(normal, VE(0.01, 50.0), (2,)), levels=7, low=-3.5))

    cells = torch.tensor([[3, 3], [2, 5]])
    fitted = pgen.fit(program, {"x": cells}, pgen.backend("score", weighting="learned"))
    assert fitted.history.steps == 0, "nothing is to be learned"
    drawn = pgen.fit(fitted.program, None, "score").sample(20, seed=0)["x"]
    assert drawn.dtype == torch.long
    assert 0 <= int(drawn.min()) <= int(drawn.max()) <= 6
    found = fitted.log_prob()
    ends = torch.distributions.Normal(0.0, 1.0).cdf(torch.arange(8.0) - 3.5)
    exact = ends.diff().log()[cells].sum(-1)
    assert found.measure == "mass"
    assert found.dims == 2
    # The log density somewhere in the cells, whose volume is 1: between its extremes there.
    assert -2.1 < float(found.value[0]) < -1.8
    assert -6.1 < float(found.value[1]) < -3.0
    assert -6.1 < float(exact[1]) < -3.0
    assert math.isfinite(found.bits_per_dim())


def test_a_fit_is_saved_and_loaded(data, tmp_path):
    program = observed(Gaussian(), EDM())
    fitted = pgen.fit(program, {"x": data}, "score", run=pgen.Run(steps=20), seed=1)
    fitted.save(tmp_path / "fit")
    loaded = pgen.load(tmp_path / "fit", program)
    assert torch.equal(loaded.sample(5, seed=1)["x"], fitted.sample(5, seed=1)["x"])
    assert torch.equal(loaded.log_prob().value, fitted.log_prob().value)


def test_what_was_learned_is_a_prior_of_the_next_program(data):
    """Laws that run a network when asked keep the tensors that were lent to it when they were made."""
    denoiser = Gaussian()
    learned = pgen.fit(
        observed(denoiser, EDM()),
        {"x": data},
        "score",
        run=pgen.Run(steps=300, batch_size=500, lr=3e-2),
        seed=1,
    )
    some = {"x": data[:20]}
    again = pgen.fit(learned.program, some, "score").log_prob()
    assert torch.equal(again.value, learned.log_prob(some).value)

    def outer(n):
        x = learned.program(n)["x"]
        with pyro.plate("rows", n):
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5))

    def prior(n):
        with pyro.plate("data", n):
            return {"x": pyro.sample("x", Diffusion(denoiser, EDM(), (2,)))}

    learned = pgen.fit(prior, {"x": data}, "score", run=pgen.Run(steps=300, batch_size=500, lr=3e-2), seed=1)
    assert not pgen.structure_of(outer, {"y": torch.zeros(2)}).params, "what was learned is fixed"
    y = torch.tensor([1.5])
    drawn = pgen.fit(outer, None, Score(particles=2000)).posterior({"y": y}, n=2000, seed=0)["x"][:, 0]
    mean, std = learned.parameters["denoiser.mean"], learned.parameters["denoiser.log_scale"].exp()
    law = MixtureDenoiser(mean[None], covariance=std.square().diag())
    exact = law.posterior(torch.ones(1, 2), y, torch.tensor([[0.25]]))
    spread = exact.covariance()[0].diagonal().sqrt()
    assert bool(((drawn.mean(0) - exact.means[0]).abs() < 0.2 * spread).all())


def test_rows_that_are_missing_count_for_nothing(data):
    held = torch.cat([data + 2.0, torch.full((2000, 2), math.nan)])
    run = pgen.Run(steps=700, batch_size=500, lr=3e-2)
    backend = Score(weighting="edm")
    fitted = pgen.fit(observed(Gaussian(), EDM()), {"x": held}, backend, run=run, seed=1)
    torch.testing.assert_close(fitted.parameters["denoiser.mean"], data.mean(0) + 2.0, atol=0.15, rtol=0)
    assert torch.equal(fitted.log_prob({"x": held[1999:2001]}).value == 0, torch.tensor([False, True]))


def test_whole_numbers_under_a_condition_are_guided_too():
    """The condition counted twice moves a normal law of unit variance twice as far."""
    context = torch.tensor([[1.0, -2.0]]).expand(500, 2)

    def program(n=None):
        with pyro.plate("data", len(context)):
            law = Diffusion(Gaussian(), VE(0.01, 80.0), (2,), context=context)
            pyro.sample("x", Quantized(law, levels=40, low=-20.0))

    drawn = pgen.fit(program, None, Score(guidance=2.0)).sample(4000, seed=0)["x"].reshape(-1, 2)
    for i in range(2):
        assert_mean(drawn[:, i] - 19.5, 2.0 * float(context[0, i]), slack=0.05)


def test_the_evidence_comes_from_particles_whatever_draws():
    y = torch.tensor([1.0])
    found = [pgen.fit(measured, None, Score(posterior=k)).log_prob({"y": y}, seed=0) for k in ("dps", "tds")]
    assert torch.equal(found[0].value, found[1].value)


# --- refusals ---


def test_what_it_cannot_serve_it_refuses_by_name():
    def flat(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def hidden(n):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(MIXTURE, VP(), (2,)))
            pyro.sample("y", dist.Normal(x.sum(-1), scale))

    def counted(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Quantized(Diffusion(MIXTURE, VP(), (2,)), levels=7, low=-3.5))
            pyro.sample("y", dist.Normal(x.sum(-1).float(), 1.0))

    y = torch.zeros(5)
    for program, seen, site, missing in (
        (counted, "y", "x", "real values"),
        (flat, "x", "x", "denoiser"),
        (hidden, "y", "scale", "denoiser"),
    ):
        with pytest.raises(Refused) as caught:
            pgen.fit(program, {seen: y}, "score")
        assert (caught.value.refusal.site, caught.value.refusal.missing) == (site, missing)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "eular"}, "expected one of 'euler'"),
        ({"weighting": "even"}, "or a callable of noise levels"),
        ({"steps": 0}, "a whole number of at least 1"),
        ({"divergence": "approximate"}, "expected one of 'auto', 'exact'"),
        ({"posterior": "guess"}, "expected one of 'auto', 'exact', 'tds'"),
        ({"coupling": "optimal-transport", "loss": "sliced"}, "leaves no score"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Score(**options)
