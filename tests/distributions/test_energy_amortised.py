"""Energies that are learned by a sampler beside them, in fits: a known Gaussian, a support that ends, draws of the sampler."""

import math

import pyro
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.algorithms.energy.amortised import Amortised
from pgen.algorithms.energy.cooperative import Cooperative
from pgen.distributions import Energy
from pgen.distributions.energy_learning import learned_by
from pgen.errors import OptionError
from tests.benchmarks.energy_planes import learn

X = 1.0 + 0.5 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(7))
RUN = pgen.Run(steps=300, lr=0.02, batch_size=250, progress=False)
WAYS = {
    "amortised": Amortised(hidden=(16,), around=5, anywhere=50),
    "cooperative": Cooperative(steps=3, hidden=(16,), around=5),
}


class Parabola(nn.Module):
    """exp(-a (t - b)^2 / 2) of t = x, or of t = log x with the density of a log-normal law."""

    def __init__(self, positive=False):
        super().__init__()
        self.positive = positive
        self.log_a, self.b = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def energy(self, x):
        t = x[..., 0].log() if self.positive else x[..., 0]
        return self.log_a.exp() * (t - self.b).square() / 2 + (t if self.positive else 0.0)

    def forward(self, n):
        support = constraints.positive if self.positive else constraints.real
        with pyro.plate("data", n):
            pyro.sample("x", Energy(self.energy, (1,), support=support))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_the_gaussian_is_found_and_so_is_its_sampler(name, positive):
    x = X.exp() if positive else X
    fitted = pgen.fit(
        Parabola(positive), {"x": x}, pgen.backend("exact", via={"x": learned_by(WAYS[name])}), run=RUN
    )
    sd = math.exp(-float(fitted.parameters["log_a"]) / 2)
    assert abs(float(fitted.parameters["b"]) - float(X.mean())) < 0.06
    assert abs(sd - float(X.std())) < 0.06
    last = {key: float(value[-50:].mean()) for key, value in fitted.history.metrics.items()}
    entropy = (
        0.5 * math.log(2 * math.pi * math.e) + float(X.std().log()) + (float(X.mean()) if positive else 0.0)
    )
    assert abs(last["x.entropy"] - entropy) < 0.15
    assert abs(last["x.spread"] - 1) < 0.15


@pytest.mark.parametrize("name", WAYS)
def test_ways_are_asked_for_by_name_and_refuse_what_is_counted(name):
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self, n):
            with pyro.plate("data", n):
                pyro.sample("x", Energy(lambda x: -(x @ self.logits), (2,), support=constraints.boolean))

    with pytest.raises(OptionError, match=f"'x' cannot be learned by {name}.*counted"):
        pgen.fit(Bits(), {"x": torch.ones(5, 2)}, pgen.backend("exact", via={"x": name}), run=RUN)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ring", "moons"])
@pytest.mark.parametrize("name", WAYS)
def test_densities_on_the_plane_are_learned(name, target):
    """KL(data || model) by a log Z on a grid; .02 to .05 is usual, plus a sampling error of .01."""
    run = pgen.Run(steps=800, batch_size=512, lr=3e-3, ema=0.995, progress=False)
    kl, _, back = learn(target, name, 0, run)
    assert -0.05 < kl < 0.1
    assert back == 0


def test_the_sampler_that_was_learned_beside_an_energy_draws_for_it():
    """x ~ N(3, 0.5^2): the generator's draws have that mean and spread, to what 400 steps learn of it."""
    data = {"x": 3 + 0.5 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))}

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_a, self.b = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(2.5))

        def forward(self, n):
            with pyro.plate("data", n):
                pyro.sample("x", Energy(lambda x: self.log_a.exp() * (x[..., 0] - self.b).square() / 2, (1,)))

    run = pgen.Run(steps=400, lr=0.02, batch_size=250, progress=False)
    way = learned_by(Amortised(hidden=(16,)))
    fitted = pgen.fit(Bowl(), data, pgen.backend("exact", via={"x": (way, "generator")}), run=run)
    assert fitted.offer.paths["x"][-1] == "generator"
    drawn = fitted.sample(4000, seed=0)["x"]
    assert abs(float(drawn.mean()) - 3) < 0.1
    assert 0.4 < float(drawn.std()) < 0.6
    with pytest.raises(pgen.errors.PgenError, match="no sampler"):
        pgen.fit(Bowl(), None, pgen.backend("exact", via={"x": "generator"})).sample(3)
