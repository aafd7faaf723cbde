"""Fits by Markov chains from the command line: the posterior is said and drawn, and a run that was killed goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pgen.cli import main
from pgen.commands.rundir import RunDirectory

COIN = """
import pyro, pyro.distributions as dist
def coin(n):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", n):
        return pyro.sample("x", dist.Bernoulli(p))
"""
FIT = (
    "fit",
    "coin.py:coin",
    "--data",
    "coin.csv",
    "--backend",
    "mcmc",
    "--set",
    "chains=64",
    "--set",
    "draws=200",
    "--out",
    "run",
)


def pgen(*words, code=0):
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coin.py").write_text(COIN)
    (tmp_path / "coin.csv").write_text("x\n1.\n1.\n0.\n1.\n")
    return tmp_path


def test_a_fit_says_its_posterior(here):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    told = pgen(*FIT)
    assert "64 chains of 200 draws" in told
    assert "R-hat" in told
    assert "traces.png" in told
    assert (here / "run" / "traces.png").stat().st_size > 1000
    found = json.loads(pgen(*FIT, "--force", "--json"))
    row = found["posterior"]["p"]
    # Beta(5, 3): mean 5/8, sd 0.161; six of its own errors are passed by chance with probability 2e-9.
    assert abs(row["mean"] - 0.625) < 6 * row["mcse_mean"]
    assert row["ess_bulk"] > 400
    assert (found["chains"], found["draws"], found["warnings"]) == (64, 200, [])


def test_a_fit_without_chains_says_none(here):
    found = json.loads(pgen(*FIT[:4], "--backend", "exact", "--out", "run", "--json"))
    assert "posterior" not in found
    assert not (here / "run" / "traces.png").exists()


def test_a_run_that_was_killed_goes_on(here):
    pgen(*FIT)
    whole = load_file(here / "run" / "fit" / "tensors.safetensors")
    shards = sorted((here / "run" / "chains").glob("draws-*"))
    assert len(shards) == 2
    # As if the process had been killed in the second block, before there was a fit.
    for path in (here / "run" / "fit", shards[1], here / "run" / "traces.png"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = shards[0].stat().st_mtime_ns
    pgen(*FIT)
    assert shards[0].stat().st_mtime_ns == before
    again = load_file(here / "run" / "fit" / "tensors.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole if name != "history")
    assert RunDirectory(here / "run").config().backend == "mcmc"
