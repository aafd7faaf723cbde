"""Posteriors under diffusion priors, as programs state them, against exact ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.backends.score import Score
from pgen.distributions import VE, VP, Diffusion, MixtureDenoiser
from pgen.errors import DataError, Refused

MIXTURE = MixtureDenoiser(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), scale=0.5)
NORMAL = MixtureDenoiser(torch.tensor([[1.0, -1.0]]), scale=1.0)
SCHEDULE = VE(0.01, 80.0)
ONES = torch.ones(1, 2)


def measured(mixture=MIXTURE):
    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(mixture, SCHEDULE, (2,)))
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5))

    return program


def near(draws, exact, *, within):
    """Mean and covariance of draws, in units of exact ones' standard deviations."""
    scale = exact.std(0)
    mean = (draws.mean(0) - exact.mean(0)) / scale
    covariance = (draws.T.cov() - exact.T.cov()) / scale[:, None] / scale
    assert float(mean.abs().max()) < within, mean
    assert float(covariance.abs().max()) < 2 * within, covariance


def test_each_row_has_the_posterior_of_its_own_observation():
    y = torch.tensor([0.0, 2.0, -1.0])
    fitted = pgen.fit(measured(), None, Score(posterior="tds", particles=2000))
    drawn = fitted.posterior({"y": y}, n=2000, seed=0)["x"]
    assert drawn.shape == (2000, 3, 2)
    for row in range(3):
        exact = MIXTURE.posterior(ONES, y[row : row + 1], torch.tensor([[0.25]])).sample(20_000)
        near(drawn[:, row], exact, within=0.15)
    wrong = MIXTURE.posterior(ONES, y[1:2], torch.tensor([[0.25]])).sample(20_000)
    with pytest.raises(AssertionError):
        near(drawn[:, 0], wrong, within=0.15)


def test_the_evidence_is_known_with_its_error():
    y = torch.tensor([0.0, 2.0, -1.0])
    found = pgen.fit(measured(), None, Score(posterior="tds", levels=200)).log_prob({"y": y}, seed=0)
    means = MIXTURE.means.sum(-1)
    exact = torch.logsumexp(
        MIXTURE.log_weights + dist.Normal(means, math.sqrt(0.75)).log_prob(y[:, None]), -1
    )
    assert found.kind == "estimate"
    assert bool(((found.value - exact).abs() < 6 * found.stderr + 0.05).all())


@pytest.mark.parametrize("kind", ["tds", "mmps", "pigdm", "ddrm", "split-gibbs"])
def test_of_a_normal_prior_every_algorithm_for_linear_observations_is_exact(kind):
    normal = MixtureDenoiser(torch.zeros(1, 2), scale=1.0)
    y = torch.tensor([1.5])
    backend = Score(posterior=kind, particles=2000, levels=200)
    drawn = pgen.fit(measured(normal), None, backend).posterior({"y": y}, n=2000, seed=0)["x"][:, 0]
    exact = normal.posterior(ONES, y, torch.tensor([[0.25]])).sample(20_000)
    near(drawn, exact, within=0.2)


def test_any_likelihood_will_do():
    """Counts: the posterior by quadrature."""
    prior = MixtureDenoiser(torch.tensor([-1.0, 1.5]), scale=0.5)

    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(prior, SCHEDULE, ()))
            pyro.sample("y", dist.Poisson(x.exp()))

    y = torch.tensor([1.0, 6.0])
    drawn = pgen.fit(program, None, Score(posterior="tds", particles=2000)).posterior(
        {"y": y}, n=2000, seed=0
    )["x"]
    grid = torch.linspace(-4, 5, 4001)
    log = prior.log_prob(grid) + dist.Poisson(grid.exp()).log_prob(y[:, None])
    weight = log.softmax(-1)
    mean = (weight * grid).sum(-1)
    std = ((weight * grid**2).sum(-1) - mean**2).sqrt()
    assert bool(((drawn.mean(0) - mean).abs() < 0.15 * std).all())
    assert bool(((drawn.std(0) / std - 1).abs() < 0.15).all())


def test_rows_may_be_seen_through_operators_of_their_own_and_in_part():
    def program(mask, n=None):
        with pyro.plate("data", len(mask)):
            x = pyro.sample("x", Diffusion(NORMAL, SCHEDULE, (2,)))
            pyro.sample("y", dist.Normal(mask * x, 0.5).to_event(1))
            pyro.sample("z", dist.Normal(x[..., 0], 0.5))

    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    y = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    z = torch.tensor([math.nan, 0.0, math.nan])
    fitted = pgen.fit(program, {"mask": mask}, Score(posterior="tds", particles=1000))
    drawn = fitted.posterior({"mask": mask, "y": y, "z": z}, n=1000, seed=0)["x"]
    for row in range(3):
        seen = [mask[row].diag()]
        values = [y[row]]
        if not z[row].isnan():
            seen.append(torch.tensor([[1.0, 0.0]]))
            values.append(z[row : row + 1])
        matrix, value = torch.cat(seen), torch.cat(values)
        exact = NORMAL.posterior(matrix, value, 0.25 * torch.eye(len(value))).sample(20_000)
        near(drawn[:, row], exact, within=0.2)


def test_what_depends_on_the_latent_and_is_not_seen_follows():
    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(NORMAL, SCHEDULE, (2,)))
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5))
            pyro.sample("z", dist.Normal(x[..., 0], 0.1))

    drawn = pgen.fit(program, None, Score(posterior="tds", particles=500)).posterior(
        {"y": torch.tensor([1.0, 3.0])}, n=500, seed=0
    )
    assert set(drawn) == {"x", "z"}
    gap = drawn["z"] - drawn["x"][..., 0]
    assert float(gap.mean().abs()) < 0.03
    assert abs(float(gap.std()) - 0.1) < 0.02


def test_two_sources_are_told_apart():
    """One number seen, the sum of two: each with a prior of its own."""
    low, high = (MixtureDenoiser(torch.tensor([m]), scale=s) for m, s in ((-1.0, 0.5), (2.0, 1.0)))

    def program(n):
        with pyro.plate("data", n):
            a = pyro.sample("a", Diffusion(low, SCHEDULE, ()))
            b = pyro.sample("b", Diffusion(high, VP(), ()))
            pyro.sample("y", dist.Normal(a + b, 0.1))

    drawn = pgen.fit(program, None, Score(posterior="tds", particles=2000)).posterior(
        {"y": torch.tensor([2.0])}, n=2000, seed=0
    )
    gain = torch.tensor([0.25, 1.0]) / 1.26
    mean = torch.tensor([-1.0, 2.0]) + gain * 1.0
    both = torch.stack([drawn["a"], drawn["b"]], -1)[:, 0]
    std = (torch.tensor([0.25, 1.0]) * (1 - gain)).sqrt()
    assert bool(((both.mean(0) - mean).abs() < 0.15 * std).all())
    assert bool(((both.std(0) / std - 1).abs() < 0.15).all())


def test_rows_that_share_a_latent_speak_of_it_together():
    def program(n):
        x = pyro.sample("x", Diffusion(NORMAL, SCHEDULE, (2,)))
        with pyro.plate("data", n):
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0))

    y = torch.tensor([1.0, 2.0, 3.0, 2.0])
    fitted = pgen.fit(program, None, Score(posterior="tds", particles=2000, levels=200))
    drawn = fitted.posterior({"y": y}, n=2000, seed=0)["x"]
    assert drawn.shape == (2000, 2)
    exact = NORMAL.posterior(torch.ones(4, 2), y, torch.eye(4)).sample(20_000)
    near(drawn, exact, within=0.15)
    evidence = fitted.log_prob({"y": y}, seed=0)
    truth = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 2.0).log_prob(y)
    assert abs(float(evidence.value[0] - truth)) < 6 * float(evidence.stderr[0]) + 0.05


def test_particles_that_were_nearly_all_lost_are_spoken_of():
    """Seven standard deviations from the data, in the tail of one of two modes."""
    prior = MixtureDenoiser(torch.tensor([-1.0, 1.5]), scale=0.5)

    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(prior, SCHEDULE, ()))
            pyro.sample("y", dist.Normal(x, 0.2))

    few = Score(posterior="tds", particles=512, levels=100)
    fitted = pgen.fit(program, None, few)
    with pytest.warns(UserWarning, match="may be wrong; use more levels or particles"):
        fitted.posterior({"y": torch.tensor([-5.0])}, n=100, seed=0)
    fitted.posterior({"y": torch.tensor([-1.2])}, n=100, seed=0)  # and not without cause
    more = pgen.fit(program, None, Score(posterior="tds", particles=2000))  # levels as they are needed
    drawn = more.posterior({"y": torch.tensor([-5.0])}, n=2000, seed=0)["x"]
    exact = prior.linear_posterior(torch.tensor([[5.0]]), torch.tensor([[-25.0]]), 20_000)[0][0]
    assert abs(float(drawn.mean() - exact.mean())) < 0.15 * float(exact.std())
    assert abs(float(drawn.std() / exact.std()) - 1) < 0.15
    far = fitted.log_prob({"y": torch.tensor([-2.5])}, seed=0)
    exact = prior.log_prob(torch.tensor([-2.5]), math.hypot(0.0, 0.2))
    assert float((far.value - exact).abs()) < 6 * float(far.stderr) + 3 * float(far.solver_error) + 0.02


def test_an_algorithm_for_linear_observations_refuses_others_by_site():
    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(NORMAL, SCHEDULE, (2,)))
            pyro.sample("y", dist.Poisson(x.sum(-1).exp()))

    fitted = pgen.fit(program, None, Score(posterior="pigdm"))
    with pytest.raises(Refused) as caught:
        fitted.posterior({"y": torch.tensor([1.0])})
    assert caught.value.refusal.site == "y"
    assert "linear" in caught.value.refusal.missing


def test_a_mixture_is_conditioned_exactly_and_weighed_so():
    """Rows with matrices of their own, through one denoiser that is asked for nothing but its posterior."""

    def program(turn, n=None):
        with pyro.plate("data", len(turn)):
            x = pyro.sample("x", Diffusion(MIXTURE, SCHEDULE, (2,)))
            pyro.sample("y", dist.Normal((turn * x).sum(-1), 0.5))

    turn = torch.tensor([[1.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    y = torch.tensor([0.0, 2.0, -1.0])
    fitted = pgen.fit(program, {"turn": turn}, "score")
    drawn = fitted.posterior({"turn": turn, "y": y}, n=9000, seed=0)["x"]
    found = fitted.log_prob({"turn": turn, "y": y})
    assert bool((found.stderr == 0).all())
    for row in range(3):
        seen = (turn[row : row + 1], y[row : row + 1], torch.tensor([[0.25]]))
        # 9,000 and 20,000 draws: a mean off by 0.1 sd is seen, one in a million is off by 0.065 by chance.
        near(drawn[:, row], MIXTURE.posterior(*seen).sample(20_000), within=0.1)
        means = MIXTURE.means @ turn[row]
        spread = (0.25 * turn[row].square().sum() + 0.25).sqrt()
        exact = torch.logsumexp(MIXTURE.log_weights + dist.Normal(means, spread).log_prob(y[row]), 0)
        assert abs(float(found.value[row] - exact)) < 1e-3  # the law has the least noise level, 0.01, on it


class Asked:
    """A denoiser of one's own that knows its posterior, and says when it is asked."""

    def __init__(self):
        self.times = 0

    def __call__(self, x, sigma):
        return NORMAL(x, sigma)

    def linear_posterior(self, operator, y, n, *, sigma):
        self.times += 1
        return NORMAL.linear_posterior(operator, y, n, sigma=sigma)


def test_a_denoiser_of_ones_own_may_offer_its_posterior():
    own = Asked()
    y = {"y": torch.tensor([0.5])}
    pgen.fit(measured(own), None, Score(posterior="tds", particles=500, levels=40)).posterior(y, n=10, seed=0)
    assert own.times == 0
    drawn = pgen.fit(measured(own), None, "score").posterior(y, n=4000, seed=0)["x"][:, 0]
    assert own.times == 1
    near(drawn, NORMAL.posterior(ONES, y["y"], torch.tensor([[0.25]])).sample(20_000), within=0.15)
    plain = pgen.fit(measured(lambda x, sigma: NORMAL(x, sigma)), None, Score(posterior="exact"))
    with pytest.raises(Refused, match="linear_posterior") as caught:
        plain.posterior(y)
    assert caught.value.refusal.site == "x"


@pytest.mark.parametrize("kind", ["replacement", "repaint"])
def test_single_elements_that_were_seen_are_put_in(kind):
    """Two independent elements: one is put in, the other's law is not changed."""

    def program(scale, n=None):
        with pyro.plate("data", len(scale)):
            x = pyro.sample("x", Diffusion(NORMAL, SCHEDULE, (2,)))
            pyro.sample("y", dist.Normal(scale * x[..., 0], 0.1))

    scale, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    fitted = pgen.fit(program, {"scale": scale}, Score(posterior=kind, levels=50))
    drawn = fitted.posterior({"scale": scale, "y": y}, n=2000, seed=0)["x"]
    assert float((drawn[..., 0] - y / scale).abs().max()) < 0.01 * 6
    assert float((drawn[..., 1].mean(0) + 1).abs().max()) < 0.15
    assert float((drawn[..., 1].std(0) - 1).abs().max()) < 0.15


def test_what_mixes_elements_cannot_be_put_in():
    fitted = pgen.fit(measured(), None, Score(posterior="repaint"))
    with pytest.raises(Refused, match="single elements") as caught:
        fitted.posterior({"y": torch.tensor([1.0])})
    assert caught.value.refusal.site == "y"


def test_a_condition_counts_in_posteriors_as_it_does_in_draws():
    """Of normal laws around a condition, or around 0 without one, guidance by 2 makes one around twice the condition."""

    def denoiser(x, sigma, context):
        square = sigma.unsqueeze(-1) ** 2
        return (x + square * context.nan_to_num(0.0)) / (1 + square)

    def program(c, n=None):
        with pyro.plate("data", len(c)):
            x = pyro.sample("x", Diffusion(denoiser, SCHEDULE, (1,), context=c))
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1))

    c, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [0.0]])
    for scale in (1.0, 2.0):
        fitted = pgen.fit(program, {"c": c}, Score(guidance=scale, particles=2000))
        drawn = fitted.posterior({"c": c, "y": y}, n=2000, seed=0)["x"]
        mean = (drawn.mean(0) - scale * c / 2).abs().max()
        assert float(mean) < 0.15 * math.sqrt(0.5), mean


def test_noise_at_the_largest_level_is_not_all_there_is():
    """A prior as wide as the noise: without its moments at the largest level, means would be off by a fifth."""
    wide = MixtureDenoiser(torch.tensor([[30.0, 30.0]]), scale=40.0)

    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(lambda x, sigma: wide(x, sigma), VE(0.1, 80.0), (2,)))
            pyro.sample("y", dist.Normal(x.sum(-1), 0.5))

    drawn = pgen.fit(program, None, Score(particles=2000)).posterior(
        {"y": torch.tensor([0.0])}, n=2000, seed=0
    )["x"][:, 0]
    exact = wide.posterior(ONES, torch.zeros(1), torch.tensor([[0.25]])).sample(20_000)
    gap = torch.tensor([1.0, -1.0]) / math.sqrt(2)
    assert abs(float((drawn @ gap).mean() - (exact @ gap).mean())) < 0.15 * 40
    assert abs(float((drawn @ gap).std() / (exact @ gap).std()) - 1) < 0.1


def test_a_latent_diffusion_is_a_prior_for_the_other_backends_too():
    """Its bound stands in for its density: the evidence bound is below the evidence, and near it."""
    y = torch.tensor([0.5, 2.0, -1.0])
    backend = pgen.backend("variational", family="full", evaluation_particles=4000)
    fitted = pgen.fit(measured(NORMAL), {"y": y}, backend, run=pgen.Run(steps=800, lr=1e-2), seed=0)
    exact = dist.Normal(0.0, 1.5).log_prob(y)
    found = fitted.log_prob(seed=0)
    assert found.kind == "lower bound"
    gap = exact - found.value
    assert bool((gap > -6 * found.stderr - 0.01).all())
    assert bool((gap < 0.1 + 6 * found.stderr).all())
    drawn = fitted.posterior(n=4000, seed=0)["x"]
    for row in range(3):
        law = NORMAL.posterior(ONES, y[row : row + 1], torch.tensor([[0.25]]))
        assert float((drawn[:, row].mean(0) - law.means[0]).abs().max()) < 0.2


def test_a_value_seen_in_part_is_a_statement_of_its_own():
    """A value with NaN in it is refused, and what the error says to write instead fills it in, exactly here."""

    def alone(n):
        with pyro.plate("data", n):
            pyro.sample("x", Diffusion(MIXTURE, SCHEDULE, (2,)))

    with pytest.raises(DataError, match=r"the elements of Diffusion depend.*pyro.sample\('seen'"):
        pgen.fit(alone, None, "score").log_prob({"x": torch.tensor([[0.5, math.nan]])})

    def program(n):
        with pyro.plate("data", n):
            x = pyro.sample("x", Diffusion(MIXTURE, SCHEDULE, (2,)))
            pyro.sample("seen", dist.Normal(x[..., :1], 0.05).to_event(1))

    drawn = pgen.fit(program, None, "score").posterior({"seen": torch.tensor([[0.5]])}, n=4000, seed=0)["x"]
    way, spread = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0025]])
    near(drawn[:, 0], MIXTURE.posterior(way, torch.tensor([0.5]), spread).sample(20_000), within=0.15)
