"""Fits by replays are fits as written, to round-off: every objective, guide and estimator, and what is summed out."""

import os
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.backends.exact import Exact
from pgen.backends.variational import Variational
from pgen.run import Run


def vae(*layers, latent=2):
    """Rows with latents of their own, decoded by a network with these layers in its midst."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(latent, 8), *layers, nn.Tanh(), nn.Linear(8, 3))

    def program(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1), obs=x)

    return program, torch.randn(40, 3)


def regression(missing=False):
    torch.manual_seed(2)
    features, weights = torch.randn(40, 3), torch.tensor([1.0, -1.0, 0.5])
    y = features @ weights + 0.1 * torch.randn(40)
    if missing:
        y[::5] = torch.nan

    def program(features):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(features)):
            pyro.sample("y", dist.Normal(features @ b, s))

    return program, {"features": features, "y": y}


def mixture():
    torch.manual_seed(3)

    def program(x):
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=dist.constraints.simplex)
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    return program, 3 * torch.randn(40)


def counts():
    """Latents drawn without a path."""
    torch.manual_seed(4)

    def program(x):
        rate = pyro.param("rate", torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Poisson(rate.exp()))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    return program, torch.randn(30) + 3


def counts_guide():
    torch.manual_seed(4)
    net = nn.Linear(1, 1)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Poisson(net(x[:, None]).squeeze(-1).exp().clamp(max=50)))

    return guide


def subsample():
    torch.manual_seed(5)
    y = torch.randn(200) + 2

    def program():
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 200, subsample_size=20) as chosen:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[chosen])

    return program, None


def chain():
    """A hidden Markov chain, summed out."""
    torch.manual_seed(6)

    def program(x):
        moves = pyro.param("moves", torch.eye(3) * 0.8 + 0.1, constraint=dist.constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 0.0, 1.0]))
        state = 0
        for t in pyro.markov(range(6)):
            state = pyro.sample(f"state{t}", dist.Categorical(moves[state]))
            pyro.sample(f"x{t}", dist.Normal(loc[state], 0.5), obs=x[..., t])

    return program, torch.randn(6)


def process():
    """A Gaussian process: factors of matrices."""
    inputs = torch.linspace(0, 1, 12)

    def program():
        width = pyro.param("width", torch.tensor(0.3), constraint=dist.constraints.positive)
        covariance = torch.exp(-0.5 * ((inputs[:, None] - inputs) / width) ** 2) + 0.01 * torch.eye(12)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(12), covariance), obs=torch.sin(6 * inputs))

    return program, None


BATCH = {"batch_size": 16}
CASES = {
    "elbo": (vae, Variational, {}, BATCH),
    "annealed": (regression, Variational, {"guide": "mean-field", "warmup": 0.5, "beta": 2.0}, {}),
    "free bits": (vae, Variational, {"free_bits": 0.1, "free_bits_per": "dimension"}, BATCH),
    "iwae": (vae, Variational, {"objective": "iwae"}, BATCH),
    "dreg": (vae, Variational, {"objective": "dreg"}, BATCH),
    "renyi": (vae, Variational, {"objective": "renyi"}, BATCH),
    "wake-sleep": (vae, Variational, {"objective": "wake-sleep", "sleep": 0.3}, BATCH),
    "forward-kl": (vae, Variational, {"objective": "forward-kl", "simulations": 100}, BATCH),
    "dropout": (lambda: vae(nn.Dropout(0.3)), Variational, {}, BATCH),
    "batch norm": (lambda: vae(nn.BatchNorm1d(8)), Variational, {"particles": 1}, BATCH),
    "bfloat16": (vae, Variational, {}, {**BATCH, "precision": "bfloat16"}),
    "float64": (vae, Variational, {}, {**BATCH, "precision": "float64"}),
    "validated": (vae, Variational, {}, {**BATCH, "validation": 0.2, "validate_every": 9, "ema": 0.9}),
    "full rank": (regression, Variational, {"guide": "full-rank"}, {}),
    "low rank": (regression, Variational, {"guide": "low-rank"}, {}),
    "missing": (lambda: regression(missing=True), Variational, {}, BATCH),
    "mixture": (mixture, Variational, {}, {}),
    "score function": (counts, lambda: Variational(guide=counts_guide(), particles=1), {}, {}),
    "vimco": (counts, lambda: Variational(guide=counts_guide(), objective="iwae"), {}, {}),
    "subsample": (subsample, Variational, {"guide": "mean-field"}, {}),
    "chain": (chain, Exact, {}, {}),
    "process": (process, Exact, {}, {}),
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("pgen.training.replays.FEWEST_STEPS", 0)
    monkeypatch.setattr("pgen.backends.exact.climb._UNRECORDED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fitted(case, compiled, steps=14):
    make, backend, options, run = CASES[case]
    program, data = make()
    lr = None if steps is None else 1e-2  # where the run says nothing, small problems are climbed
    run = Run(steps=steps, lr=lr, progress=False, compile=compiled, **run)
    if case == "chain":  # one sequence, whole
        return pgen.fit(program, None, backend(**options), args=(data,), run=run, seed=0)
    return pgen.fit(program, data, backend(**options), run=run, seed=0)


def assert_close(one, other, name, case):
    """To what the round-off of one step grows to in a few: other noise, or another rule, is off by percents."""
    slack = {"float64": 1e-9, "bfloat16": 1e-2}.get(case, 1e-4)
    assert torch.allclose(one, other, rtol=slack, atol=slack), name


@pytest.mark.parametrize("case", CASES)
def test_replays_change_no_number(case):
    written, replayed = (fitted(case, compiled) for compiled in (False, "auto"))
    assert replayed.history.warnings == written.history.warnings
    assert written.history.metrics.keys() == replayed.history.metrics.keys()
    for name in written.history.metrics:
        assert_close(written.history[name], replayed.history[name], name, case)
    for (step, one), (again, other) in zip(
        written.history.validation, replayed.history.validation, strict=True
    ):
        assert step == again
        assert abs(one - other) < 1e-4 * (1 + abs(one))
    for name, value in written.parameters.items():
        assert_close(value, replayed.parameters[name], name, case)


@pytest.mark.parametrize("case", ["chain", "process"])
def test_climbing_by_replays_comes_to_the_same_point(case):
    written, replayed = (fitted(case, compiled, steps=None) for compiled in (False, "auto"))
    assert_close(written.history["loss"][-1], replayed.history["loss"][-1], "loss", case)
    assert replayed.history.warnings == written.history.warnings


def test_a_branch_on_a_latent_is_named_and_run_as_written():
    def program(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        scale = 1.0 if mean > 0 else 2.0
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    data, found = torch.randn(20), []
    for compiled in (False, None):
        run = Run(steps=14, progress=False, compile=compiled)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(pgen.fit(program, data, Variational(guide="mean-field"), run=run, seed=0).history)
    written, replayed = found
    assert torch.equal(written["loss"], replayed["loss"])
    (told,) = replayed.warnings
    assert "test_replayed_fits.py" in told
    assert "scale = 1.0 if mean > 0 else 2.0" in told


def test_a_fit_imports_no_compiler():
    """Which takes over a second, several times the fit."""
    code = """
import sys, torch, pyro, pyro.distributions as dist, pgen
from pgen.backends.variational import Variational
from pgen.backends.exact import Exact
def program(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x)
run = pgen.Run(steps=120, progress=False)
history = pgen.fit(program, torch.randn(20), Variational(), run=run).history
assert not history.warnings, history.warnings
pgen.fit(program, torch.randn(20), Exact(), run=pgen.Run(progress=False))
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
