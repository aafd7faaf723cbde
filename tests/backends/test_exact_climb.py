"""The exact backend by default: small problems end at their maximum, and a fit that does not says so."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.backends.exact.climb import Climb, differentiated
from pgen.run import Run

QUIET = Run(progress=False)


class Eye:
    """Notes what it is told; stops at the first step if so asked."""

    def __init__(self, seen, stop=False):
        self.seen, self.stop = seen, stop

    def start(self, run, total):
        self.seen.append(total)

    def step(self, index, metrics):
        if self.stop:
            raise KeyboardInterrupt
        self.seen.append(metrics["loss"])

    def finish(self, history):
        self.seen.append("finish")


def steps_of(program, data, **options):
    """How many steps a fit means to take, stopped at the first."""
    seen = []
    pgen.fit(program, data, "exact", run=Run(progress=False, observers=(Eye(seen, stop=True),), **options))
    return seen[0]


def normal(x):
    mu = pyro.param("mu", torch.tensor(0.0))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, sd), obs=x)


def mixture(x):
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    means = pyro.param("means", torch.tensor([-0.5, 0.5]))
    sds = pyro.param("sds", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[k], sds[k]), obs=x)


def chain(x):
    moves = pyro.param("moves", torch.tensor([[0.6, 0.4], [0.4, 0.6]]), constraint=constraints.simplex)
    means = pyro.param("means", torch.tensor([-0.5, 0.5]))
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Categorical(moves[z]))
        pyro.sample(f"x{t}", dist.Normal(means[z], 0.7), obs=x[t])


def test_a_normal_far_away_ends_at_its_maximum():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2 + 30
    fitted = pgen.fit(normal, {"x": x}, "exact", run=QUIET)
    assert fitted.parameters["mu"].item() == pytest.approx(x.mean().item(), abs=2e-3)
    best = dist.Normal(x.mean(), x.std(unbiased=False)).log_prob(x).sum()
    torch.testing.assert_close(fitted.log_prob().value.sum(), best, atol=1e-3, rtol=0)
    assert fitted.history.stopped == "finished"
    assert not fitted.history.warnings
    assert len(fitted.history["loss"]) == fitted.history.steps
    assert fitted.history["loss"][0] > fitted.history["loss"][-1]


def expectation_maximisation(x, steps=2000):
    weights, means, sds = torch.ones(2) / 2, torch.tensor([-0.5, 0.5]), torch.ones(2)
    for _ in range(steps):
        shares = (weights.log() + dist.Normal(means, sds).log_prob(x[:, None])).softmax(1)
        count = shares.sum(0)
        weights, means = count / count.sum(), (shares * x[:, None]).sum(0) / count
        sds = ((shares * (x[:, None] - means).square()).sum(0) / count).sqrt()
    return (weights.log() + dist.Normal(means, sds).log_prob(x[:, None])).logsumexp(1).sum()


def test_a_mixture_reaches_what_expectation_maximisation_does():
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1))
    x = torch.cat([noise[:80] - 4, noise[80:] * 1.5 + 4])
    fitted = pgen.fit(mixture, {"x": x}, "exact", run=QUIET)
    torch.testing.assert_close(
        fitted.log_prob().value.sum(), expectation_maximisation(x), atol=1e-2, rtol=1e-5
    )


def test_a_chain_with_learned_transitions_reaches_a_point_where_baum_welch_stays():
    """Each row of transitions is, at the maximum, the expected share of its moves: the fixed point of EM."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, generator=generator) * 0.7 + torch.tensor([-1.0] * 8 + [2.0] * 7 + [-1.0] * 5)
    fitted = pgen.fit(chain, args=(x,), backend="exact", run=QUIET)
    draws = fitted.posterior(n=20_000, seed=0)
    z = torch.stack([draws[f"z{t}"] for t in range(20)], 1)
    before, after = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1), z
    counts = torch.stack(
        [((before == i) & (after == j)).float().mean(0).sum() for i in (0, 1) for j in (0, 1)]
    )
    shares = counts.reshape(2, 2) / counts.reshape(2, 2).sum(1, keepdim=True)
    torch.testing.assert_close(fitted.parameters["moves"].softmax(-1), shares, atol=0.02, rtol=0)


def test_no_steps_learn_nothing_and_steps_are_taken_as_asked():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 3
    still = pgen.fit(normal, {"x": x}, "exact", run=Run(steps=0, progress=False))
    assert still.parameters["mu"].item() == 0
    assert still.history.steps == 0
    assert pgen.fit(normal, {"x": x}, "exact", run=Run(steps=7, progress=False)).history.steps == 7
    assert steps_of(normal, {"x": x}) == 500
    for options in ({"lr": 1e-2}, {"batch_size": 10}, {"validation": 0.2}, {"optimizer": "sgd"}):
        assert steps_of(normal, {"x": x}, **options) == 2000


def test_a_loss_that_still_falls_at_the_end_is_told():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 30
    slow = pgen.fit(normal, {"x": x}, "exact", run=Run(steps=500, schedule="constant", progress=False))
    assert any("still falling" in warning for warning in slow.history.warnings)
    done = pgen.fit(normal, {"x": x - 30}, "exact", run=Run(steps=1000, lr=1e-2, progress=False))
    assert not done.history.warnings


def test_a_likelihood_without_a_maximum_is_told_and_stays_finite():
    fitted = pgen.fit(normal, {"x": torch.full((5,), 2.0)}, "exact", run=QUIET)
    assert fitted.history.warnings
    assert all(value.isfinite().all() for value in fitted.parameters.values())


def test_noise_and_running_statistics_are_left_to_the_steps_of_a_run():
    class Noisy(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight = layer, nn.Parameter(torch.ones(3))

        def forward(self, x, y):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.layer(x) @ self.weight, 1.0), obs=y)

    data = {"x": torch.randn(20, 3), "y": torch.randn(20)}
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(3)):
        assert steps_of(Noisy(layer), data) == 2000


def test_it_is_the_same_every_time_and_observers_follow():
    seen = []
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 3
    runs = (QUIET, Run(progress=False, observers=(Eye(seen),)))
    one, two = (pgen.fit(normal, {"x": x}, "exact", run=run, seed=4) for run in runs)
    assert all(torch.equal(value, two.parameters[name]) for name, value in one.parameters.items())
    assert seen == [500, *two.history["loss"].tolist(), "finish"]


def test_beyond_what_is_finite_there_is_a_wall():
    """Minus the logarithm has no value left of zero, where the first long step would go."""
    x = torch.tensor([1e-3], requires_grad=True)

    def loss():
        if x.item() < 0:
            raise ValueError("no logarithm")
        return (x - x.log()).sum() + 1e4 * torch.relu(2 - x).sum()

    climb = Climb(differentiated(loss, [x]), [x])
    climb.go()
    assert x.item() >= 0
    assert climb.lowest <= 2 - torch.tensor(2.0).log().item() + 1e-2
