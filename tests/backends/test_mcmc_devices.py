"""Everything is computed where the data are, seen without a second device.

While data lie on the CPU, torch's default device is "meta", on which tensors have no values: whatever is made without
a word on where lands there, and fails as soon as it meets what has values. What passes here makes no tensor on the wrong
device when the data are on an accelerator.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.backends.mcmc.answers import Posterior
from pgen.backends.mcmc.method import MCMC

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def aside(method):
    @functools.wraps(method)
    def inner(*args, **kwargs):
        with torch.device("meta"):
            return method(*args, **kwargs)

    return inner


@pytest.fixture
def elsewhere(monkeypatch):
    """That default, in all that the backend does."""
    for kind, names in (
        (MCMC, ("fit",)),
        (Posterior, ("posterior", "log_prob", "resume", "tensors", "load")),
    ):
        for name in names:
            monkeypatch.setattr(kind, name, aside(getattr(kind, name)))


def schools(y):
    zero = torch.zeros_like(y[0])
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 5.0))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu + tau * z, 10.0).to_event(1), obs=y)


def mixture(y):
    half = torch.full_like(y[:1], 0.5).expand(2)
    m = pyro.sample("m", dist.Normal(5 * torch.ones_like(half), 5.0).to_event(1))
    k = pyro.sample("k", dist.Categorical(half))
    pyro.sample(
        "y", dist.Normal(m[..., 0] * k + m[..., 1] * (1 - k), 10.0).expand(y.shape).to_event(1), obs=y
    )


def local(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
        pyro.sample("y", dist.Normal(z, 10.0), obs=y)


KERNELS = ["nuts", "hmc", "chees", "meads", "mala", "random-walk", "ula", "sgld", "sghmc", "tempering", "smc"]


def fit(program, kernel="chees", **options):
    options = {"chains": 8, "warmup": 30, "draws": 20} | options
    return pgen.fit(program, Y, pgen.backend("mcmc", kernel=kernel, **options))


def lies_on_the_cpu(draws):
    assert all(v.device.type == "cpu" for v in (*draws.values(), *draws.stats.values()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel, elsewhere):
    lies_on_the_cpu(fit(schools, kernel).draws())


@pytest.mark.parametrize("init", ["uniform", "prior", "pathfinder"])
def test_starts(init, elsewhere):
    lies_on_the_cpu(fit(schools, init=init).draws())


def test_finite_latents_that_are_summed_out(elsewhere):
    lies_on_the_cpu(fit(mixture, "auto").draws())


def test_summary_and_evidence(elsewhere):
    fitted = fit(schools, islands=4)
    assert "tau" in str(aside(fitted.draws().summary)())
    assert fitted.log_prob(seed=0).value.device.type == "cpu"


def test_evidence_by_row(elsewhere):
    assert fit(local, islands=4).log_prob(seed=0).value.device.type == "cpu"


def test_saved_loaded_and_resumed(tmp_path, elsewhere):
    fitted = fit(schools)
    fitted.save(tmp_path / "saved")
    lies_on_the_cpu(pgen.load(tmp_path / "saved", schools).resume(20).draws())


def test_groups(tmp_path, elsewhere):
    run = pgen.Run(devices=("cpu", "cpu"), directory=tmp_path, checkpoint_every=100)
    backend = pgen.backend("mcmc", chains=8, warmup=30, draws=20)
    lies_on_the_cpu(pgen.fit(schools, Y, backend, run=run).draws())


def test_the_check_can_fail(elsewhere):
    """A kernel that makes its noise without a word on where."""
    from pgen.algorithms.kernels.base import Info

    class Stray:
        def init(self, position, target):
            return (position,)

        def step(self, state, tuning, target):
            one = target(state[0])[0] * 0 + 1
            return (state[0] + torch.randn(state[0].shape, dtype=state[0].dtype),), Info(
                one, one, one > 1, one
            )

    with pytest.raises(Exception, match="meta"):
        fit(schools, Stray()).draws()
