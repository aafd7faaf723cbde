"""Chains that stop and go on: saved and loaded, streamed to disk, killed; the draws are the same to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.errors import CheckpointError, Unanswerable


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(pyro.deterministic("theta", mu + tau * z), 10.0), obs=y)


Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


def fit(draws, kernel="chees", folder=None, y=Y, seed=0):
    backend = pgen.backend("mcmc", kernel=kernel, chains=16, warmup=60, draws=draws)
    run = pgen.Run() if folder is None else pgen.Run(directory=folder, checkpoint_every=100)
    return pgen.fit(schools, y, backend, run=run, seed=seed)


def same(one, other):
    one, other = one.draws(), other.draws()
    assert list(one) == list(other) == ["mu", "tau", "z", "theta"]
    assert all(torch.equal(one[site], other[site]) for site in one)


@pytest.mark.parametrize("kernel", ["chees", "nuts", "meads", "mala", "tempering", "sgld"])
def test_a_saved_fit_goes_on_as_if_it_had_never_stopped(kernel, tmp_path):
    fit(100, kernel).save(tmp_path / "saved")
    same(pgen.load(tmp_path / "saved", schools).resume(100), fit(200, kernel))


def test_loading_gives_what_was_saved_and_leaves_the_random_state_alone(tmp_path):
    fitted = fit(100)
    fitted.save(tmp_path / "saved")
    before = torch.get_rng_state()
    loaded = pgen.load(tmp_path / "saved", schools)
    assert torch.equal(before, torch.get_rng_state())
    same(loaded, fitted)
    assert str(loaded.summary()) == str(fitted.summary())


def test_shards_on_disk_hold_the_same_draws_as_memory(tmp_path):
    same(fit(300, folder=tmp_path), fit(300))
    names = sorted(p.name for p in (tmp_path / "chains").iterdir())
    assert names[:3] == ["draws-00000100", "draws-00000200", "draws-00000300"]
    same(fit(400, folder=tmp_path), fit(400))  # goes on where the folder ends


def test_shards_of_other_data_or_another_seed_are_refused(tmp_path):
    fit(100, folder=tmp_path)
    with pytest.raises(CheckpointError, match="another program, data, backend or seed"):
        fit(100, folder=tmp_path, y=Y + 1)
    with pytest.raises(CheckpointError, match="another program, data, backend or seed"):
        fit(100, folder=tmp_path, seed=1)


def test_a_missing_or_damaged_shard_is_told(tmp_path):
    fit(300, folder=tmp_path)
    middle = tmp_path / "chains" / "draws-00000200"
    tensors = middle / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError):
        fit(300, folder=tmp_path).draws()
    tensors.write_bytes(whole)
    middle.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a shard before it is missing"):
        fit(300, folder=tmp_path).draws()


def test_what_keeps_no_chains_cannot_resume():
    def conjugate():
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(Unanswerable, match="keeps no chains"):
        pgen.fit(conjugate, None, "exact").resume(10)


def test_killed_in_the_middle_it_goes_on_with_the_same_draws(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_mcmc_resume as t; t.fit(2000, folder={str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "chains"
    for kill_at in ("warmup-*", "draws-*"):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        deadline = time.monotonic() + 100
        while not (folder.is_dir() and any(folder.glob(kill_at))) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert any(folder.glob(kill_at))
    assert not (folder / "draws-00002000").exists()  # it was killed before the end
    same(fit(2000, folder=tmp_path), fit(2000))
