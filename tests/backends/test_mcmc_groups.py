"""Chains in groups, one to a device: what each draws is its own affair, and all go on after a stop to the bit."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.algorithms.adaptation import step_size
from pgen.backends.mcmc import groups
from pgen.backends.mcmc.groups import in_turn, on, same_device, seed_of
from pgen.errors import CheckpointError, OptionError
from pgen.problem import Problem

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, 10.0), obs=y)


def fit(draws=100, chains=8, devices=("cpu", "cpu"), folder=None, seed=0, kernel="mala"):
    backend = pgen.backend("mcmc", kernel=kernel, chains=chains, warmup=40, draws=draws)
    run = pgen.Run(devices=devices, directory=folder, checkpoint_every=None if folder is None else 100)
    return pgen.fit(schools, Y, backend, run=run, seed=seed)


def same(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[site], other[site]) for site in one)


@pytest.mark.parametrize("kernel", ["nuts", "mala"])
def test_a_group_draws_what_it_would_draw_alone(kernel):
    both = fit(kernel=kernel).draws()
    assert both.chains == 8
    assert both["mu"].shape == (800,)
    for g in range(2):
        alone = fit(chains=4, devices=1, seed=seed_of(0, g), kernel=kernel).draws()
        same({k: v[400 * g : 400 * (g + 1)] for k, v in both.items()}, alone)
        assert torch.equal(both.stats["lp"][400 * g : 400 * (g + 1)], alone.stats["lp"])
    assert not torch.equal(both["mu"][:400], both["mu"][400:])


def test_the_summary_is_over_the_chains_of_all_groups():
    fitted = fit()
    summary = fitted.summary()
    assert fitted.draws().chains == 8
    assert "mu" in str(summary)
    assert fitted.history.steps == 100
    assert len(fitted.posterior(n=30)["mu"]) == 30


@pytest.mark.parametrize("kernel", ["nuts", "chees", "sgld"])
def test_saved_groups_go_on_as_if_they_had_never_stopped(kernel, tmp_path):
    fit(100, kernel=kernel).save(tmp_path / "saved")
    loaded = pgen.load(tmp_path / "saved", schools)
    same(loaded.draws(), fit(100, kernel=kernel).draws())
    same(loaded.resume(100).draws(), fit(200, kernel=kernel).draws())


def test_shards_of_groups_hold_the_same_draws_as_memory(tmp_path):
    same(fit(200, folder=tmp_path).draws(), fit(200).draws())
    for g in range(2):
        assert (tmp_path / "chains" / f"group-{g}" / "draws-00000200").is_dir()
    same(fit(300, folder=tmp_path).draws(), fit(300).draws())


def test_shards_that_were_divided_in_another_way_are_refused(tmp_path):
    fit(folder=tmp_path / "two")
    with pytest.raises(CheckpointError, match="in several groups, and here there is one"):
        fit(folder=tmp_path / "two", devices=1)
    with pytest.raises(CheckpointError, match="1 of 2"):
        fit(folder=tmp_path / "two", devices=("cpu",) * 4)
    fit(folder=tmp_path / "one", devices=1)
    with pytest.raises(CheckpointError, match="in one group, and here there are 2"):
        fit(folder=tmp_path / "one")


def test_killed_in_the_middle_groups_go_on_with_the_same_draws(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_mcmc_groups as t; t.fit(2000, folder={str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "chains" / "group-0"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 100
    while not (folder.is_dir() and any(folder.glob("draws-*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(folder.glob("draws-*"))
    assert not (folder / "draws-00002000").exists()
    same(fit(2000, folder=tmp_path).draws(), fit(2000).draws())


# --- taking turns, and running side by side -----------------------------------------------------------------


def test_when_one_group_fails_the_others_put_away_what_they_have():
    closed = []

    def steps(name, fails):
        try:
            for _ in range(3):
                yield
            if fails:
                raise RuntimeError(name)
            yield
        finally:
            closed.append(name)

    with pytest.raises(RuntimeError, match="a"):
        in_turn([steps("a", True), steps("b", False)])
    assert closed == ["a", "b"]


@pytest.fixture
def threads(monkeypatch):
    """A thread for each of the names `cpu:0`, `cpu:1`, ...: all mean the CPU, whose generator nobody may draw from then."""
    monkeypatch.setattr(groups.Groups, "_lane", lambda self, group: group.device)
    monkeypatch.setattr(groups, "seeder", lambda device: lambda seed: None)


FOUR = tuple(f"cpu:{g}" for g in range(4))


class Creep:
    """A kernel without randomness: every chain climbs a little."""

    def init(self, position, target):
        return (position,)

    def step(self, state, tuning, target):
        from pgen.algorithms.kernels.base import Info

        value, gradient = target(state[0])
        one = torch.ones_like(value)
        return (state[0] + 0.01 * gradient,), Info(one, -value, one > 1, one)


def creeping():
    backend = pgen.backend("mcmc", kernel=Creep(), chains=8, warmup=20, draws=300)
    return pgen.fit(schools, Y, backend, run=pgen.Run(devices=FOUR)).draws()


@pytest.fixture
def crept(monkeypatch):
    """What they draw in turn. Momenta that the first step size is tried with are none, so that nothing is random."""
    monkeypatch.setattr(step_size, "standard_normal", torch.zeros_like)
    return creeping()


@pytest.mark.parametrize("again", range(2))
def test_threads_give_what_turns_give(crept, threads, again):
    """Recording, running and keeping draws in four threads at once."""
    assert not torch.equal(crept["mu"][:300], crept["mu"][600:900])
    before = threading.active_count()
    same(creeping(), crept)
    assert threading.active_count() == before


def test_a_failure_in_a_thread_is_raised_and_stops_the_others(threads):
    class Fails(Creep):
        def step(self, state, tuning, target):
            raise RuntimeError("broken kernel")

    backend = pgen.backend("mcmc", kernel=Fails(), chains=4, warmup=20, draws=300)
    with pytest.raises(RuntimeError, match="broken kernel"):
        pgen.fit(schools, Y, backend, run=pgen.Run(devices=FOUR, compile=False))


# --- options ------------------------------------------------------------------------------------------------


def test_devices_of_a_run():
    assert pgen.Run().places == pgen.Run(devices=("cpu",)).places == ()
    assert pgen.Run(devices=["cpu"]).device == "cpu"
    run = pgen.Run(devices=["cpu", torch.device("cpu")])
    assert run.places == (torch.device("cpu"), torch.device("cpu"))
    assert run.device == "cpu"
    assert run.described()["devices"] == ["cpu", "cpu"]
    assert repr(run) == "Run(device='cpu', devices=('cpu', 'cpu'))"
    if not torch.cuda.is_available():
        assert pgen.Run(devices="auto") == pgen.Run()


def test_chains_are_divided_equally():
    with pytest.raises(OptionError, match=r"chains=9.*multiple of 2"):
        fit(chains=9)


@pytest.mark.parametrize("backend", ["exact", "variational"])
def test_other_backends_say_that_they_use_one(backend):
    with pytest.raises(OptionError, match=rf"'{backend}' computes on one device.*device='cpu'"):
        pgen.fit(schools, Y, backend, run=pgen.Run(devices=("cpu", "cpu")))


def test_a_problem_is_put_on_a_device_with_all_that_it_holds():
    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, y, offset):
            mu = pyro.sample("mu", dist.Normal(torch.zeros_like(self.scale), self.scale))
            pyro.sample("y", dist.Normal(mu + offset, 1.0).expand(y.shape).to_event(1), obs=y)

    meta, program = torch.device("meta"), Program()
    moved = on(Problem.of(program, Y, kwargs={"offset": torch.ones(())}), meta)
    assert moved.inputs["y"].device == moved.kwargs["offset"].device == moved.program.scale.device == meta
    assert program.scale.device.type == "cpu"  # the user's own stays where it is
    there = Problem.of(program, Y, kwargs={"offset": torch.ones(())})
    assert on(there, torch.device("cpu")).program is program
    with pytest.raises(OptionError, match="given no data"):
        on(Problem.of(lambda: None), meta)


def test_devices_are_told_apart():
    assert same_device(torch.device("cpu"), torch.device("cpu", 0))
    assert not same_device(torch.device("cuda", 0), torch.device("cuda", 1))
    assert not same_device(torch.device("cpu"), torch.device("meta"))
