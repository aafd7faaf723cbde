"""Diffusions at latent sites, learned together with the rest of the program, where the evidence is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.backends.score import Score
from pgen.capability import Query
from pgen.distributions import EDM, VE, Diffusion, MixtureDenoiser
from pgen.errors import OptionError, ProgramError, Refused, Unanswerable

NOISE = 0.5
TRUTH = dist.Normal(torch.tensor([1.0, -0.5]), torch.tensor([0.6, 1.5]))


class Gaussian(nn.Module):
    """The denoiser of N(mean, exp(log_scale)^2), to be learned."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self, x, sigma):
        v, s2 = (2 * self.log_scale).exp(), sigma[:, None] ** 2
        return (v * x + s2 * self.mean) / (v + s2)


class Noisy(nn.Module):
    """Latent plane, seen with noise: y ~ N(mean, scale^2 + noise^2), its posterior normal, of independent elements."""

    def __init__(self, schedule=None):
        super().__init__()
        self.denoiser = Gaussian()
        self.schedule = schedule or VE(0.01, 50.0)

    def forward(self, n):
        with pyro.plate("data", n):
            z = pyro.sample("z", Diffusion(self.denoiser, self.schedule, (2,)))
            pyro.sample("y", dist.Normal(z, NOISE).to_event(1))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    z = TRUTH.loc + TRUTH.scale * torch.randn(1500, 2, generator=generator)
    return {"y": z + NOISE * torch.randn(1500, 2, generator=generator)}


def fit(data, steps=700, program=None, **options):
    run = pgen.Run(steps=steps, batch_size=256, lr=2e-2)
    return pgen.fit(program or Noisy(), data, Score(**options), run=run, seed=0)


@pytest.mark.parametrize(
    ("weighting", "schedule"), [("auto", VE(0.01, 50.0)), ("uniform", VE(0.01, 50.0)), ("edm", EDM())]
)
def test_denoiser_and_guide_find_the_maximum_of_the_evidence(data, weighting, schedule):
    """Whatever the weights, the optimum is that of maximum likelihood, and the bound is tight there."""
    fitted = fit(data, program=Noisy(schedule), weighting=weighting)
    learned = fitted.parameters
    mean, variance = data["y"].mean(0), data["y"].var(0) - NOISE**2
    assert float((learned["denoiser.mean"] - mean).abs().max()) < 0.06
    assert float((2 * learned["denoiser.log_scale"] - variance.log()).abs().max()) < 0.15
    exact = dist.Normal(mean, (variance + NOISE**2).sqrt()).log_prob(data["y"]).sum(-1)
    found = fitted.log_prob(seed=0)
    assert found.kind == "lower bound"
    gap = float((exact - found.value).mean())
    error = 6 * float(found.stderr.square().sum().sqrt()) / len(exact)
    assert -error < gap < 0.05 + error


def test_the_guide_draws_posteriors_and_noise_levels_do_so_too(data):
    fitted = fit(data)
    asked = {"y": torch.tensor([[2.0, 0.0], [0.0, -2.0]])}
    mean, variance = data["y"].mean(0), data["y"].var(0) - NOISE**2
    gain = variance / (variance + NOISE**2)
    exact = dist.Normal(mean + gain * (asked["y"] - mean), (gain * NOISE**2).sqrt())
    along = pgen.fit(fitted.program, None, Score(posterior="mmps"))
    for way in (fitted, along):
        drawn = way.posterior(asked, n=2000, seed=0)["z"]
        assert drawn.shape == (2000, 2, 2)
        assert float(((drawn.mean(0) - exact.mean) / exact.stddev).abs().max()) < 0.25
        assert float((drawn.std(0) / exact.stddev).log().abs().max()) < 0.2
    swapped = (drawn.mean(0).flip(0) - exact.mean) / exact.stddev  # of the other row
    assert float(swapped.abs().max()) > 0.25


def test_weights_other_than_the_bounds_reach_the_denoiser_only(data):
    """Guide and likelihood follow the bound whatever the weights are: doubled, they double the denoiser's gradient only."""
    found = {}
    for factor in (1.0, 2.0):
        score = Score(weighting=lambda sigma, factor=factor: factor / sigma**2)
        kept = []
        run = pgen.Run(steps=1, batch_size=64, compile=False, clip_norm=None, optimizer=keeper(kept))
        fitted = pgen.fit(Noisy(), data, score, run=run, seed=0)
        names = list(fitted._answers.parameters.tensors)
        gradients = dict(zip(names, kept[0], strict=True))
        found[factor] = gradients
    for name, once in found[1.0].items():
        expected = 2.0 if name.startswith("denoiser.") else 1.0
        assert torch.allclose(found[2.0][name], expected * once, rtol=1e-4, atol=1e-6), name
    assert any(name.startswith("guide") for name in found[1.0])


@pytest.mark.parametrize("option", [{"condition_dropout": 0.5}, {"times": "importance"}, {"loss": "sliced"}])
def test_what_the_bound_cannot_follow_is_a_loss_of_the_denoisers_own(data, option):
    fitted = fit(data, steps=3, **option)
    assert "z.denoising" in fitted.history.metrics
    assert "z.denoising" not in fit(data, steps=3).history.metrics


def keeper(kept):
    """An optimiser that moves nothing and keeps the gradients."""

    class Keeper(torch.optim.SGD):
        def step(self, closure=None):
            kept.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    return lambda tensors: Keeper(tensors, lr=0.0)


def test_a_fit_is_saved_replayed_and_asked_about_other_rows(data, tmp_path):
    steps = {"steps": 130, "batch_size": 128, "lr": 1e-2}
    replayed = pgen.fit(Noisy(), data, "score", run=pgen.Run(**steps), seed=0)
    written = pgen.fit(Noisy(), data, "score", run=pgen.Run(**steps, compile=False), seed=0)
    for name, tensor in written.parameters.items():
        assert torch.allclose(tensor, replayed.parameters[name], atol=1e-5), name
    replayed.save(tmp_path / "fit")
    loaded = pgen.load(tmp_path / "fit", Noisy())
    few = {"y": data["y"][:7]}
    assert torch.equal(loaded.log_prob(few, seed=0).value, replayed.log_prob(few, seed=0).value)
    assert set(loaded.sample(3, seed=0)) == {"z", "y"}


def test_other_latents_are_drawn_beside_and_a_known_prior_waits_for_its_likelihood():
    """The noise of a measurement is learned where the prior is known, and a shared latent has a posterior too."""
    prior = MixtureDenoiser(torch.tensor([[-2.0], [2.0]]), scale=0.5)

    class Measured(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_noise = nn.Parameter(torch.tensor(-0.5))

        def forward(self, n):
            shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
            with pyro.plate("data", n):
                x = pyro.sample("x", Diffusion(prior, VE(0.02, 50.0), (1,)))
                pyro.sample("y", dist.Normal(x[..., 0] + shift, self.log_noise.exp()))

    torch.manual_seed(0)
    y = prior.sample(400)[:, 0] + 1.0 + 0.3 * torch.randn(400)
    program = Measured()
    offer = next(row.answer for row in pgen.explain(program, {"y": y}) if row.backend == "score")
    assert offer.answers[Query.LOG_PROB] == "lower bound"
    fitted = fit({"y": y}, steps=800, program=program, family="full")
    assert abs(float(fitted.parameters["log_noise"].exp()) - 0.3) < 0.15
    drawn = fitted.posterior(n=50, seed=0)
    assert drawn["shift"].shape == (50,)
    assert drawn["x"].shape == (50, 400, 1)
    assert abs(float(drawn["shift"].mean()) - 1.0) < 0.2
    noise = math.exp(float(fitted.parameters["log_noise"]))
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)),
        dist.Normal(torch.tensor([-1.0, 3.0]), math.hypot(noise, 0.5)),
    )
    found = fitted.log_prob(seed=0)
    assert found.value.shape == (1,)
    assert float(found.value) < float(law.log_prob(y).sum()) + 6 * float(found.stderr)


def test_a_guide_of_ones_own(data):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
            self.log_scale = nn.Parameter(torch.zeros(2))

        def forward(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("z", dist.Normal(self.gain * y + self.shift, self.log_scale.exp()).to_event(1))

    fitted = fit(data, guide=Guide())
    variance = data["y"].var(0) - NOISE**2
    gain = variance / (variance + NOISE**2)
    assert float((fitted.parameters["guide.gain"] - gain).abs().max()) < 0.08

    def wrong(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0).to_event(1))
            pyro.sample("u", dist.Normal(y, 1.0).to_event(1), infer={"is_auxiliary": True})

    with pytest.raises(ProgramError, match="expected the latents that data bear upon: z"):
        fit(data, steps=1, guide=wrong)


def test_what_cannot_be_learned_so_is_refused(data):
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = Gaussian()

        def forward(self, n):
            with pyro.plate("data", n):
                k = pyro.sample("k", dist.Bernoulli(0.5))
                z = pyro.sample("z", Diffusion(self.denoiser, VE(), (2,)))
                pyro.sample("y", dist.Normal(z + k[..., None], NOISE).to_event(1))

    with pytest.raises(Refused, match="'k'.*no path"):
        fit(data, steps=1, program=Switched())
    with pytest.raises(Refused, match="leaves no score"):
        fit(data, steps=1, coupling="optimal-transport")
    with pytest.raises(OptionError, match="guide=3"):
        Score(guide=3)
    known = pgen.fit(Noisy(), None, Score(posterior="guide"))
    with pytest.raises(Unanswerable, match="none was learned"):
        known.posterior({"y": torch.zeros(1, 2)}, n=2)
