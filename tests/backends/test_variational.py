"""The variational backend through the public API, on programs whose answers are known."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.backends.variational import OtherDataWarning, Variational
from pgen.capability import Exactness, Query
from pgen.errors import DataError, OptionError, ProgramError, Refused, Unanswerable


def run(steps, **options):
    return pgen.Run(steps=steps, progress=False, **options)


def fitted(program, data, steps=0, seed=0, lr=1e-2, batch_size=None, **options):
    return pgen.fit(
        program, data, Variational(**options), run=run(steps, lr=lr, batch_size=batch_size), seed=seed
    )


# --- a program with everything known: x = W z + noise -----------------------------------------------------

W = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]])
NOISE = 0.6
PRECISION = torch.eye(2) + W.T @ W / NOISE**2
COVARIANCE = torch.linalg.inv(PRECISION)


def linear(n):
    with pyro.plate("rows", n):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, NOISE).to_event(1))


def exact_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.MultivariateNormal(x @ W @ COVARIANCE / NOISE**2, COVARIANCE))


def wide_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.MultivariateNormal(x @ W @ COVARIANCE / NOISE**2, 2 * COVARIANCE))


def evidence(x):
    return dist.MultivariateNormal(torch.zeros(3), W @ W.T + NOISE**2 * torch.eye(3)).log_prob(x)


@pytest.fixture
def x():
    source = torch.Generator().manual_seed(1)
    return torch.randn(40, 2, generator=source) @ W.T + NOISE * torch.randn(40, 3, generator=source)


class TestLogProb:
    @pytest.mark.parametrize("evaluate", ["bound", "importance"])
    def test_the_exact_posterior_as_guide_gives_the_log_evidence_without_error(self, x, evaluate):
        estimate = fitted(linear, {"x": x}, guide=exact_guide, evaluate=evaluate).log_prob()
        torch.testing.assert_close(estimate.value, evidence(x), rtol=0, atol=2e-5)
        assert estimate.stderr.max() < 2e-5
        assert estimate.kind == ("lower bound" if evaluate == "bound" else "estimate")

    def test_any_other_guide_leaves_the_gap_that_its_divergence_is(self, x):
        estimate = fitted(linear, {"x": x}, guide=wide_guide, evaluation_particles=400).log_prob(seed=1)
        gap = 0.5 * (2 * 2 - 2 - 2 * math.log(2.0))  # KL(N(m, 2 C) || N(m, C)) in two dimensions
        assert ((evidence(x) - estimate.value - gap).abs() < 6 * estimate.stderr + 1e-5).all()
        assert estimate.value.mean() < evidence(x).mean() - 0.2

    def test_importance_weights_close_the_gap_and_say_how_sure_they_are(self, x):
        estimate = fitted(
            linear, {"x": x}, guide=wide_guide, evaluate="importance", evaluation_particles=400
        ).log_prob(seed=1)
        assert ((evidence(x) - estimate.value).abs() < 6 * estimate.stderr).all()
        assert estimate.khat.max() < 0.5  # weights of a guide that is too wide are bounded
        assert estimate.particles == 400

    def test_it_is_about_any_rows(self, x):
        fit = fitted(linear, {"x": x}, guide=exact_guide)
        torch.testing.assert_close(
            fit.log_prob({"x": x[:3] + 1}).value, evidence(x[:3] + 1), rtol=0, atol=2e-5
        )

    def test_it_knows_its_measure_and_size(self, x):
        estimate = fitted(linear, {"x": x}, guide=exact_guide).log_prob()
        assert (estimate.measure, estimate.dims) == ("density", 3)


class TestPosterior:
    def test_draws_and_marginals_are_the_guides(self, x):
        fit = fitted(linear, {"x": x}, guide=exact_guide)
        mean = x @ W @ COVARIANCE / NOISE**2
        torch.testing.assert_close(fit.marginals()["z"].mean, mean)
        draws = fit.posterior(n=4000, seed=2)["z"]
        assert draws.shape == (4000, 40, 2)
        error = COVARIANCE.diagonal().sqrt() / 4000**0.5
        assert ((draws.mean(0) - mean).abs() < 6 * error).all()

    def test_resampling_corrects_a_wrong_guide(self, x):
        plain = fitted(linear, {"x": x}, guide=wide_guide).posterior(n=4000, seed=3)["z"]
        corrected = fitted(linear, {"x": x}, guide=wide_guide, correction="importance").posterior(
            n=4000, seed=3
        )
        variance = COVARIANCE.diagonal()
        assert (plain.var(0).mean(0) / variance - 2.0).abs().max() < 0.1
        assert (corrected["z"].var(0).mean(0) / variance - 1.0).abs().max() < 0.1
        assert corrected.khat.shape == (40,)
        assert corrected.khat.max() < 0.7

    def test_a_guide_too_narrow_is_reported(self, x):
        def narrow(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.MultivariateNormal(x @ W @ COVARIANCE / NOISE**2, 0.1 * COVARIANCE))

        fit = fitted(linear, {"x": x}, guide=narrow, correction="importance")
        with pytest.warns(UserWarning, match="k-hat is above 0.7 for"):
            draws = fit.posterior(n=1000, seed=4)
        assert (draws.khat > 0.7).float().mean() > 0.5


# --- training ---------------------------------------------------------------------------------------------


class PPCA(nn.Module):
    def __init__(self, features=4, latents=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, latents, generator=torch.Generator().manual_seed(0)))
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.weight.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.mean, self.log_noise.exp()).to_event(1))


def ppca_data(n=400):
    source = torch.Generator().manual_seed(3)
    loading = torch.tensor([[1.5, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.5, 0.9]])
    return torch.randn(n, 2, generator=source) @ loading.T + 0.5 * torch.randn(n, 4, generator=source) + 2.0


def ppca_evidence(fit, x):
    t = fit.parameters
    covariance = t["weight"] @ t["weight"].T + (2 * t["log_noise"]).exp() * torch.eye(4)
    return dist.MultivariateNormal(t["mean"], covariance).log_prob(x)


@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg", "renyi", "wake-sleep"])
def test_every_objective_learns_ppca(objective):
    """The evidence comes within 0.05 nats of its maximum (closed form: Tipping & Bishop 1999)."""
    x = ppca_data()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = eigenvalues[2:].mean()
    best = -0.5 * (4 * math.log(2 * math.pi) + eigenvalues[:2].log().sum() + 2 * noise.log() + 4)
    fit = pgen.fit(
        PPCA(),
        {"x": x},
        Variational(objective=objective),
        run=run(400, lr=3e-2, schedule="cosine", batch_size=100),
        seed=0,
    )
    assert ppca_evidence(fit, x).mean() > best - 0.05
    assert ppca_evidence(fit, x).mean() <= best + 1e-4


def test_the_elbo_of_ppca_is_within_two_hundredths_of_a_nat():
    x = ppca_data()
    fit = pgen.fit(
        PPCA(),
        {"x": x},
        Variational(guide=FullRank()),
        run=run(600, lr=3e-2, schedule="cosine", batch_size=100),
        seed=0,
    )
    gap = ppca_evidence(fit, x).mean() - fit.log_prob(seed=0).mean().value
    assert -0.005 < gap < 0.02


class FullRank(nn.Module):
    """The family that holds the posterior of a linear Gaussian program."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x):
        tril = self.scale.tril(-1) + torch.diag_embed(self.scale.diagonal().exp())
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.slope(x), scale_tril=tril))


def test_more_particles_give_a_tighter_bound_up_to_the_evidence():
    x = ppca_data(200)
    guide = FullRank()
    fit = fitted(PPCA(), {"x": x}, guide=guide)
    values = [fit.log_prob(seed=0).value.mean()]
    for k in (2, 8, 32):
        bound = fitted(PPCA(), {"x": x}, guide=guide, evaluate="importance", evaluation_particles=k)
        values.append(torch.stack([bound.log_prob(seed=s).value.mean() for s in range(20)]).mean())
    assert values == sorted(values)
    assert values[0] < values[1] - 0.5
    assert values[-1] <= ppca_evidence(fit, x).mean() + 0.05


def test_history_is_minus_the_bound_per_row():
    x = ppca_data()
    for objective in ("elbo", "iwae", "dreg", "renyi"):
        fit = fitted(PPCA(), {"x": x}, steps=3, objective=objective, batch_size=100)
        metric = "elbo" if objective == "elbo" else "bound"
        torch.testing.assert_close(fit.history["loss"], -fit.history[metric], rtol=1e-5, atol=1e-4)


# --- latents that rows share ------------------------------------------------------------------------------


def gaussian_mean(n):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", n):
        pyro.sample("y", dist.Normal(mean, 1.0))


@pytest.mark.parametrize("guide", ["auto", "mean-field", "full-rank", "low-rank"])
def test_a_shared_latent_has_its_conjugate_posterior(guide):
    y = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 1.5
    precision = 1 / 4 + 50
    fit = pgen.fit(
        gaussian_mean,
        {"y": y},
        Variational(guide=guide, particles=8),
        run=run(400, lr=5e-2, schedule="cosine", batch_size=25),
        seed=0,
    )
    draws = fit.posterior(n=20_000, seed=1)["mean"]
    assert abs(draws.mean() - y.sum() / precision) < 0.03
    assert abs(draws.std() / precision**-0.5 - 1) < 0.15
    exact = dist.MultivariateNormal(torch.zeros(50), torch.eye(50) + 4.0).log_prob(y)
    torch.testing.assert_close(-fit.history["loss"][-100:].mean() * 50, exact.double(), rtol=0, atol=1.0)


def test_rows_that_a_latent_ties_have_one_log_probability():
    y = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 1.5
    precision = 1 / 4 + 50

    def posterior():
        pyro.sample("mean", dist.Normal(y.sum() / precision, precision**-0.5))

    fit = fitted(gaussian_mean, {"y": y}, guide=posterior)
    estimate = fit.log_prob(seed=0)
    exact = dist.MultivariateNormal(torch.zeros(50), torch.eye(50) + 4.0).log_prob(y)
    torch.testing.assert_close(estimate.value, exact.reshape(1), rtol=0, atol=1e-3)
    assert estimate.stderr < 1e-4
    assert estimate.dims == 50


def test_samples_are_those_of_the_program():
    y = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 1.5
    drawn = fitted(gaussian_mean, {"y": y}).sample(20_000, seed=0)
    assert drawn["y"].shape == drawn["mean"].shape == (20_000,)
    assert abs(drawn["mean"].std() / 2 - 1) < 5.5 / 40_000**0.5
    assert abs(drawn["y"].std() / 5**0.5 - 1) < 5.5 / 40_000**0.5


def test_marginals_over_other_supports_know_their_moments():
    def coin(n):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Bernoulli(p))

    fit = fitted(coin, {"x": torch.tensor([1.0, 1.0, 0.0, 1.0])}, steps=300, lr=2e-2, particles=8)
    exact = dist.Beta(5.0, 3.0)
    marginal = fit.marginals()["p"]
    assert abs(marginal.mean - exact.mean) < 0.05
    assert abs(marginal.variance.sqrt() - exact.stddev) < 0.04


# --- latents that are summed out --------------------------------------------------------------------------


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, n):
        with pyro.plate("rows", n):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(self.loc[k], 1.0))


def test_what_can_be_summed_out_needs_no_guide_and_is_exact():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    fit = fitted(Mixture(), {"x": x})
    joint = torch.tensor([0.3, 0.7]).log() + dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(x[:, None])
    estimate = fit.log_prob()
    assert estimate.kind == "exact" == fit.offer.answers[Query.LOG_PROB]
    torch.testing.assert_close(estimate.value, joint.logsumexp(1))
    torch.testing.assert_close(fit.marginals()["k"].probs, joint.softmax(1))
    share = (fit.posterior(n=20_000, seed=0)["k"] == 1).float().mean(0)
    expected = joint.softmax(1)[:, 1]
    assert ((share - expected).abs() < 5.5 * (expected * (1 - expected) / 20_000).sqrt()).all()


class Switching(nn.Module):
    """A continuous and a finite latent per row, the one's law given the other."""

    def forward(self, n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(logits=2 * z))
            pyro.sample("x", dist.Normal(z + 2 * k, 0.5))


def test_finite_latents_are_drawn_given_the_guides():
    x = torch.tensor([-1.0, 0.5, 2.5])
    grid = torch.linspace(-6, 6, 4001)
    prior = dist.Normal(0.0, 1.0).log_prob(grid)[:, None]
    ones = (
        prior
        + torch.nn.functional.logsigmoid(2 * grid)[:, None]
        + dist.Normal(grid[:, None] + 2, 0.5).log_prob(x)
    )
    zeros = (
        prior
        + torch.nn.functional.logsigmoid(-2 * grid)[:, None]
        + dist.Normal(grid[:, None], 0.5).log_prob(x)
    )
    step = math.log(grid[1] - grid[0])
    log_ones, log_all = ones.logsumexp(0) + step, torch.logaddexp(ones, zeros).logsumexp(0) + step

    def wide(x):  # draws z alone: k is summed out
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 1.5))

    options = {"correction": "importance", "evaluate": "importance", "evaluation_particles": 4000}
    fit = fitted(Switching(), {"x": x}, guide=wide, **options)
    estimate = fit.log_prob(seed=1)
    assert ((estimate.value - log_all).abs() < 6 * estimate.stderr + 1e-4).all()
    draws = fit.posterior(n=4000, seed=2)
    assert draws["k"].shape == (4000, 3)
    assert (draws["k"].mean(0) - (log_ones - log_all).exp()).abs().max() < 0.06
    weights = torch.logaddexp(ones, zeros).softmax(0)
    assert (draws["z"].mean(0) - (weights * grid[:, None]).sum(0)).abs().max() < 0.1


def test_without_enumeration_the_guide_draws_them():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    fit = pgen.fit(
        Mixture(), {"x": x}, Variational(enumerate="none", particles=4), run=run(400, lr=3e-2), seed=0
    )
    joint = torch.tensor([0.3, 0.7]).log() + dist.Normal(fit.parameters["loc"], 1.0).log_prob(x[:, None])
    probs = fit.marginals()["k"].probs
    assert (probs - joint.softmax(1)).abs().max() < 0.15
    assert "score function" in fit.offer.why or "trained by" in fit.offer.why


# --- simulations ------------------------------------------------------------------------------------------


def test_forward_kl_learns_the_posterior_from_simulations_of_rows(x):
    fit = pgen.fit(
        linear,
        {"x": x},
        Variational(objective="forward-kl", simulations=4000),
        run=run(400, lr=1e-2, schedule="cosine"),
        seed=0,
    )
    marginal = fit.marginals()["z"]
    assert (marginal.mean - x @ W @ COVARIANCE / NOISE**2).abs().max() < 0.3
    assert (marginal.variance.mean(0) / COVARIANCE.diagonal() - 1).abs().max() < 0.15


def test_forward_kl_learns_from_whole_data_sets_and_without_any():
    def program():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("draws", 5):
            pyro.sample("y", dist.Normal(mean, 1.0))

    options = {"objective": "forward-kl", "simulations": 4000}
    fit = pgen.fit(program, None, Variational(**options), run=run(300, lr=1e-2, schedule="cosine"), seed=0)
    y = torch.tensor([0.5, 1.0, 1.5, 0.0, 2.0])
    draws = fit.posterior({"y": y}, n=5000, seed=1)["mean"]
    assert abs(draws.mean() - y.sum() / 6) < 0.1
    assert abs(draws.std() - 6**-0.5) < 0.06


# --- users' guides ----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """As Pyro's examples are: program and guide are methods of one module, called alike."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Linear(3, 4)
        self.temperature = nn.Parameter(torch.zeros(()))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(self.decoder(z), self.temperature.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, scale.exp() * self.temperature.exp()).to_event(1))


def test_methods_of_one_module_share_their_tensors(x):
    pair = Pair()
    before = {k: v.clone() for k, v in pair.state_dict().items()}
    fit = fitted(pair.model, x, steps=100, guide=pair.guide)
    assert set(fit.parameters) == set(before)
    assert all((fit.parameters[k] != before[k]).any() for k in before)
    assert all(
        torch.equal(v, before[k]) for k, v in pair.state_dict().items()
    )  # the user's own are left alone
    assert fit.history["loss"][-10:].mean() < fit.history["loss"][:10].mean()


@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg", "renyi", "wake-sleep"])
def test_every_objective_takes_a_users_guide(x, objective):
    pair = Pair()
    fit = fitted(pair.model, x, steps=150, guide=pair.guide, objective=objective, particles=3)
    assert torch.isfinite(fit.log_prob(seed=0).value).all()
    assert fit.sample(7)["obs"].shape == (7, 3)


def test_wake_sleep_has_two_players_unless_tensors_are_shared(x):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 4)

        def forward(self, x):
            loc, scale = self.net(x).chunk(2, -1)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, n):
            with pyro.plate("rows", n):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1))

    fit = fitted(Decoder(), {"x": x}, steps=5, guide=Encoder(), objective="wake-sleep", sleep=0.3)
    assert {"program.loss", "guide.loss"} <= set(fit.history.metrics)
    pair = Pair()
    fit = fitted(pair.model, x, steps=5, guide=pair.guide, objective="wake-sleep")
    assert "loss" in fit.history.metrics


def test_autoguides_of_pyro_work_as_they_are():
    y = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 1.5

    def program(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = pyro.infer.autoguide.AutoNormal(program)
    fit = fitted(program, y, steps=300, lr=3e-2, guide=guide, particles=4)
    assert abs(fit.posterior(n=5000, seed=0)["mean"].mean() - y.sum() / 50.25) < 0.1


def guide_without_z(x):
    pass


def guide_with_more(x):
    exact_guide(x)
    pyro.sample("extra", dist.Normal(0.0, 1.0))


def guide_that_observes(x):
    exact_guide(x)
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def guide_without_plate(x):
    pyro.sample("z", dist.MultivariateNormal(x @ W @ COVARIANCE / NOISE**2, COVARIANCE))


def guide_of_strangers(image, label):
    pass


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (guide_without_z, ["guide_without_z", "'z'", "pyro.sample"]),
        (guide_with_more, ["guide_with_more", "'extra'", "is_auxiliary"]),
        (guide_that_observes, ["'x'", "obs="]),
        (guide_without_plate, ["'z'", "plate", "'rows'"]),
        (guide_of_strangers, ["image, label", "x", "n"]),
    ],
)
def test_a_guide_that_does_not_fit_is_told_what_and_how(x, guide, words):
    with pytest.raises(ProgramError) as error:
        fitted(linear, {"x": x}, guide=guide)
    for word in words:
        assert word in str(error.value)


# --- options, offers, refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "elbow"}, "'elbo', 'iwae'"),
        ({"guide": "magic"}, "or a callable"),
        ({"particles": 0}, "at least 1"),
        ({"particles": 2.0}, "whole number"),
        ({"beta": -1.0}, "from 0"),
        ({"warmup": 2}, "from 0 to 1"),
        ({"objective": "iwae", "beta": 2.0}, "only objective='elbo'"),
        ({"objective": "iwae", "free_bits": 0.5}, "only objective='elbo'"),
        ({"sleep": 0.5}, "only objective='wake-sleep'"),
        ({"family": "cauchy"}, "'normal', 'low-rank'"),
        ({"family": "full", "guide": "mean-field"}, "only guide='amortized'"),
        ({"evaluation_particles": 1}, "at least 2"),
        ({"alpha": math.nan}, "number"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        Variational(**options)


def test_objectives_that_need_a_path_or_several_particles_say_so():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    with pytest.raises(OptionError, match="drawn without one"):
        fitted(Mixture(), {"x": x}, enumerate="none", objective="dreg")
    with pytest.raises(OptionError, match="particles >= 2"):
        fitted(Mixture(), {"x": x}, enumerate="none", objective="iwae", particles=1)


def test_free_bits_per_dimension_need_independent_dimensions(x):
    with pytest.raises(OptionError, match="free_bits_per='site'"):
        fitted(
            linear, {"x": x}, steps=2, guide=wide_guide_learned(), free_bits=0.1, free_bits_per="dimension"
        )
    fit = fitted(
        PPCA(),
        {"x": ppca_data()},
        steps=200,
        lr=3e-2,
        batch_size=100,
        free_bits=0.5,
        free_bits_per="dimension",
    )
    kl = torch.distributions.kl_divergence(fit.marginals()["z"].base_dist, dist.Normal(0.0, 1.0)).mean(0)
    assert (kl > 0.4).all()


def wide_guide_learned():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.MultivariateNormal(self.shift.expand(len(x), 2), COVARIANCE))

    return Guide()


def test_free_bits_keep_a_latent_from_collapsing():
    """With pure noise as data the ELBO empties the latent; free bits leave about what they grant."""
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    kls = {}
    for floor in (0.0, 1.0):
        fit = fitted(PPCA(), {"x": x}, steps=250, lr=3e-2, batch_size=100, free_bits=floor)
        kls[floor] = float(fit.history["kl"][-50:].mean())
    assert kls[1.0] > kls[0.0] + 0.3


def test_the_offer_says_what_is_answered_and_how(x):
    structure = pgen.structure_of(linear, {"x": x})
    offer = Variational().examine(structure)
    assert offer.answers[Query.LOG_PROB] is Exactness.LOWER_BOUND
    assert Variational(evaluate="importance").examine(structure).answers[Query.LOG_PROB] is Exactness.ESTIMATE
    assert offer.answers[Query.SAMPLE] is Exactness.EXACT
    assert "z read off each row" in offer.why


def test_a_latent_without_a_finite_list_needs_a_users_guide():
    def counts(n):
        with pyro.plate("rows", n):
            k = pyro.sample("k", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(k, 1.0))

    data = {"x": torch.tensor([1.0, 4.0])}
    with pytest.raises(Refused) as error:
        fitted(counts, data)
    assert error.value.refusal.site == "k"

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Poisson(x.clamp(min=0.5)))

    assert torch.isfinite(fitted(counts, data, guide=guide).log_prob(seed=0).value).all()


def test_a_learned_energy_under_factor_is_refused_with_the_fix():
    energy = nn.Linear(1, 1)

    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("energy", energy(z.unsqueeze(-1)).squeeze(-1))
            pyro.sample("x", dist.Normal(z, 1.0))

    with pytest.raises(Refused) as error:
        fitted(program, {"x": torch.zeros(3)})
    assert error.value.refusal.site == "energy"
    assert "log Z" in error.value.refusal.why


# --- queries on other evidence ----------------------------------------------------------------------------


def two_views(n):
    with pyro.plate("rows", n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))
        pyro.sample("y", dist.Normal(2 * z, 0.5))


def view_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))  # the posterior given x alone


def test_sites_that_are_left_out_and_bear_on_nothing_are_integrated_out():
    x = torch.tensor([0.5, -1.0])
    fit = fitted(two_views, {"x": x, "y": 2 * x}, guide=view_guide)
    estimate = fit.log_prob({"x": x})
    torch.testing.assert_close(estimate.value, dist.Normal(0.0, 1.25**0.5).log_prob(x), rtol=0, atol=1e-5)
    draws = fit.posterior({"x": x}, n=4000, seed=0)
    assert draws["y"].shape == (4000, 2)
    assert (draws["y"].mean(0) - 1.6 * x).abs().max() < 6 * (4 * 0.2 + 0.25) ** 0.5 / 4000**0.5
    assert set(fit.marginals({"x": x})) == {"z", "y"}


def test_a_latent_of_the_guide_may_be_observed():
    x = torch.tensor([0.5, -1.0])
    z = torch.tensor([0.1, 0.2])
    fit = fitted(two_views, {"x": x, "y": 2 * x}, guide=view_guide)
    estimate = fit.log_prob({"x": x, "z": z})
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x)
    torch.testing.assert_close(estimate.value, expected, rtol=0, atol=1e-5)


def test_a_latent_that_nobody_draws_is_named():
    def three(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(u, 0.5))

    x = torch.tensor([0.5, -1.0])

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    fit = fitted(three, {"x": x, "u": x}, guide=guide)
    with pytest.raises(Unanswerable, match="'u' is not observed"):
        fit.log_prob({"x": x})


def test_a_guide_of_fixed_size_serves_its_own_rows_only(x):
    fit = fitted(linear, {"x": x}, steps=50, guide="mean-field")
    assert fit.log_prob().value.shape == (40,)
    with pytest.raises(DataError, match="40 rows"):
        fit.log_prob({"x": x[:5]})
    with pytest.raises(OptionError, match="always go together"):
        fitted(linear, {"x": x}, steps=1, batch_size=10, guide="mean-field")


def test_a_program_without_data_is_queried_by_its_prior():
    fit = fitted(two_views, None, evaluation_particles=500, evaluate="importance", correction="importance")
    x = torch.tensor([0.5, -1.0])
    estimate = fit.log_prob({"x": x}, seed=0)
    assert ((estimate.value - dist.Normal(0.0, 1.25**0.5).log_prob(x)).abs() < 6 * estimate.stderr).all()
    draws = fit.posterior({"x": x}, n=2000, seed=0)["z"]
    assert (draws.mean(0) - 0.8 * x).abs().max() < 0.1


# --- state ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_fit(x):
    first, second = (fitted(PPCA(), {"x": ppca_data()}, steps=20, seed=5) for _ in range(2))
    assert torch.equal(first.history["loss"], second.history["loss"])
    assert torch.equal(first.posterior(n=3, seed=1)["z"], second.posterior(n=3, seed=1)["z"])


def test_saved_and_loaded(tmp_path):
    x = ppca_data()
    fit = fitted(PPCA(), {"x": x}, steps=20)
    fit.save(tmp_path / "fit")
    again = pgen.load(tmp_path / "fit", PPCA())
    torch.testing.assert_close(fit.log_prob(seed=1).value, again.log_prob(seed=1).value)
    torch.testing.assert_close(fit.posterior(n=5, seed=1)["z"], again.posterior(n=5, seed=1)["z"])


def test_a_program_that_does_not_broadcast_is_run_particle_by_particle(x):
    def stubborn(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.mm(z, W.T)  # takes matrices only
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(1))

    fit = fitted(stubborn, {"x": x}, guide=exact_guide, evaluation_particles=4)
    torch.testing.assert_close(fit.log_prob().value, evidence(x), rtol=0, atol=2e-5)
    assert fit.posterior(n=3)["z"].shape == (3, 40, 2)
    for objective in ("elbo", "iwae", "dreg", "wake-sleep"):
        trained = fitted(stubborn, {"x": x}, steps=3, objective=objective, particles=2)
        assert torch.isfinite(trained.history.metrics[next(iter(trained.history.metrics))]).all()


def test_a_program_that_sums_over_particles_is_not_fooled():
    """The broken specimen: it runs under a plate of particles, silently wrong, and so is run one by one."""

    def leaky(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            centred = z - z.mean() + z.detach().mean() * 0  # the mean over all dimensions
            pyro.sample("x", dist.Normal(centred, 1.0))

    from pgen.backends.variational.joint import agrees
    from pgen.backends.variational.settle import couple
    from pgen.guides.proposal import prior
    from pgen.inspection import inspect_problem
    from pgen.problem import Problem

    for program, right in ((leaky, False), (two_views, True)):
        structure, problem = inspect_problem(Problem.of(program, {"x": torch.randn(4)}))
        assert agrees(couple(prior(structure), structure, ()), problem) is right


def test_marginals_of_a_chain_are_mixtures_with_a_density():
    def chain(n):
        with pyro.plate("rows", n):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0))

    def guide(x):
        with pyro.plate("rows", len(x)):
            b = pyro.sample("b", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

    x = torch.tensor([1.5, -3.0])
    fit = fitted(chain, {"x": x}, guide=guide)
    marginal = fit.marginals(seed=0)["a"]
    assert marginal.batch_shape == (2,)
    assert (marginal.mean - x / 3).abs().max() < 0.25
    exact = dist.Normal(x / 3, (2 / 3) ** 0.5)
    value = torch.tensor([0.3, -1.0])
    assert (marginal.log_prob(value) - exact.log_prob(value)).abs().max() < 0.25
    assert marginal.sample((5,)).shape == (5, 2)
    torch.testing.assert_close(fit.log_prob().value, dist.Normal(0.0, 3**0.5).log_prob(x), rtol=0, atol=1e-5)


def test_no_warnings_by_the_way(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(linear, {"x": x}, steps=3)


# --- data other than those fitted ------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["auto", "full-rank"])
def test_a_guide_that_reads_no_data_says_so_about_other_data(guide):
    data = {"y": torch.randn(20)}
    fit = fitted(gaussian_mean, data, guide=guide)
    for same in (None, {"y": data["y"].clone()}):
        assert fit.posterior(same, n=4, seed=0)["mean"].shape == (4,)
    with pytest.warns(OtherDataWarning, match="'mean' reads no data.*fit again"):
        fit.posterior({"y": torch.randn(20) + 5}, n=4)
    with pytest.warns(OtherDataWarning, match="marginals"):
        fit.marginals({"y": torch.randn(20) + 5})
    assert fit.log_prob({"y": torch.randn(20)}).kind is Exactness.LOWER_BOUND
    assert "that of the fitted data" in fit.offer.why


def test_guides_that_read_the_data_answer_about_any_without_a_word(x):
    fitted(linear, {"x": x}).posterior({"x": x + 1}, n=2)
    data = {"y": torch.randn(6)}
    fit = fitted(gaussian_mean, data, objective="forward-kl", simulations=8)
    fit.posterior({"y": data["y"] + 1}, n=2)


@pytest.mark.parametrize("guide", ["mean-field", "full-rank", "low-rank", "flow"])
def test_a_guide_that_reads_no_data_cannot_learn_from_simulations(guide):
    with pytest.raises(Refused, match="guide='amortized'"):
        fitted(gaussian_mean, {"y": torch.randn(5)}, objective="forward-kl", guide=guide)
