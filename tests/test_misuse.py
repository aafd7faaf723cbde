"""What a new user does wrong with real data, and what is said of it; and what looks wrong and works."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.errors import DataError, ProgramError, Refused
from pgen.fitting import UnusedOption
from pgen.inspection import structure_of
from pgen.problem import Problem


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def many(x, y=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def coin(n):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", n):
        pyro.sample("x", dist.Bernoulli(p))


def mixture(n):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", n):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(loc[z], 1.0))


def gaussian(n):
    scale = pyro.sample("scale", dist.Normal(-5.0, 0.1))
    with pyro.plate("rows", n):
        pyro.sample("x", dist.Normal(0.0, scale))


WIDE = np.arange(60.0).reshape(20, 3)

MISUSES = {
    "a column beside a vector": (
        regression,
        {"x": torch.ones(20, 1), "y": torch.ones(20)},
        DataError,
        r"batch shape \(20, 20\), and the observed value \(20,\) would count 20 times.*x\[:, 0\]",
    ),
    "whole numbers times weights": (
        many,
        {"x": WIDE.astype(int), "y": torch.ones(20)},
        ProgramError,
        r"'x' is int64: give x\.float\(\)",
    ),
    "double times weights": (
        many,
        {"x": WIDE, "y": torch.ones(20)},
        ProgramError,
        r"'x' is float64: give x\.float\(\), or fit in double with Run\(precision='float64'\)",
    ),
    "words": (
        coin,
        {"x": np.array(["yes", "no"])},
        DataError,
        r"holds text, not numbers: 'yes' at index \(0,\)",
    ),
    "a word among numbers": (
        coin,
        {"x": np.array([1.0, "?"], dtype=object)},
        DataError,
        r"'\?' at index \(1,\).*leave this column out",
    ),
    "dates": (coin, {"x": np.array(["2020-01-01"], dtype="datetime64[D]")}, DataError, "holds .*date"),
    "a sparse tensor": (
        coin,
        {"x": torch.eye(3).to_sparse()},
        DataError,
        r"dense tensor: data\.to_dense\(\)",
    ),
    "the name of a file": (coin, "flips.csv", DataError, r"is str 'flips\.csv'"),
    "a set": (coin, {1.0, 0.0}, DataError, "is set; expected a tensor"),
    "an index that is no integer": (mixture, {"x": torch.ones(4)}, ProgramError, r"index by z\.long\(\)"),
    "a scale below zero": (gaussian, {"x": torch.ones(4)}, ProgramError, r"invalid values:\s-[0-9.]+$"),
    "a program that was called": (None, None, ProgramError, "program is NoneType; expected a function"),
    "a class": (nn.Linear, None, ProgramError, "the class Linear; expected .*an instance"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_told_with_what_to_do(name):
    program, data, kind, match = MISUSES[name]
    with pytest.raises(kind, match=match):
        structure_of(program, data)


@pytest.mark.parametrize("way", ["args", "kwargs", "captured"])
def test_double_numbers_that_are_no_data_are_told_what_to_do(way):
    x, y = torch.from_numpy(WIDE), torch.zeros(20, dtype=torch.float64)
    program = (lambda: many(x, y)) if way == "captured" else many
    given = {"args": {"args": (x, y)}, "kwargs": {"kwargs": {"x": x, "y": y}}, "captured": {}}[way]
    with pytest.raises(ProgramError, match=r"float64.*Run\(precision='float64'\)"):
        structure_of(program, None, **given)
    backend = pgen.backend("mcmc", chains=2, warmup=2, draws=2, kernel="hmc")
    fitted = pgen.fit(program, None, backend, run=pgen.Run(precision="float64"), seed=0, **given)
    assert fitted.posterior(n=2)["weights"].dtype is torch.float64


def test_precision_reaches_the_arguments():
    problem = Problem.of(many, None, (torch.ones(2, 3),), {"y": [torch.ones(2), 3, "word", torch.arange(2)]})
    moved = problem.to(dtype=torch.float64)
    assert moved.args[0].dtype is moved.kwargs["y"][0].dtype is torch.float64
    assert moved.kwargs["y"][1:3] == [3, "word"]
    assert moved.kwargs["y"][3].dtype is torch.int64


def test_data_in_a_plate_may_be_shared_along_another_plate():
    def program(y):
        with pyro.plate("copies", 3, dim=-2), pyro.plate("rows", len(y), dim=-1):
            pyro.sample("y", dist.Normal(torch.zeros(3, 1), 1.0), obs=y)

    assert structure_of(program, torch.zeros(5)).observed == ("y",)


def test_none_and_series_are_data():
    problem = Problem.of(coin, {"x": np.array([1, None, True], dtype=object)})
    assert problem.missing == {"x"}
    assert problem.observations["x"][[0, 2]].tolist() == [1.0, 1.0]

    class Series:
        def to_numpy(self):
            return np.array([0.0, 1.0])

    assert Problem.of(coin, {"x": Series()}).observations["x"].tolist() == [0.0, 1.0]


# --- options of a run that are set in vain ---

CHAINS = {"chains": 2, "warmup": 2, "draws": 2}


def fit_by_chains(run, **options):
    return pgen.fit(
        coin, {"x": torch.ones(4)}, pgen.backend("mcmc", **{**CHAINS, **options}), run=run, seed=0
    )


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"steps": 500}, "warmup= and draws="),
        ({"lr": 0.01}, "step_size="),
        ({"batch_size": 2}, "kernel='sgld'"),
        ({"optimizer": "sgd"}, "nothing is learned"),
    ],
)
def test_options_that_chains_have_no_use_for_are_named(given, instead):
    ((option, _),) = given.items()
    with pytest.warns(UnusedOption, match=rf"'mcmc' makes no use of Run\({option}=.*{instead}"):
        fit_by_chains(pgen.Run(**given, progress=False))


def test_options_that_chains_use_are_not_named():
    backend = pgen.backend("mcmc")
    used = pgen.Run(
        progress=False, precision="float64", compile=False, directory="a", checkpoint_every=1, seed=3
    )
    assert backend.unused(used) == backend.unused(pgen.Run(steps=0)) == {}
    assert pgen.backend("mcmc", kernel="sgld").unused(pgen.Run(batch_size=2)) == {}
    assert backend.unused(pgen.Run(steps=1, patience=2, validation=0.1)).keys() == {
        "steps",
        "patience",
        "validation",
    }


@dataclass(frozen=True)
class Stepless:
    """Has no use for steps, and no answers either."""

    name: ClassVar[str] = "stepless"

    def unused(self, run):
        return {"steps": "there are none"} if "steps" in run.given else {}

    def examine(self, structure):
        return pgen.Refusal(None, "a reason", "there is none")

    def fit(self, problem, structure, run):
        raise NotImplementedError


def test_a_comparison_has_one_run_for_all_and_names_none():
    run, data = pgen.Run(steps=9), {"x": torch.ones(4)}
    with (
        pytest.warns(UnusedOption, match="'stepless' makes no use of Run\\(steps=9\\): there are none"),
        pytest.raises(Refused),
    ):
        pgen.fit(coin, data, Stepless(), run=run)
    (row,) = pgen.compare(coin, data, {"a": Stepless()}, run=run).rows
    assert row.fitted is None


def test_options_that_are_given_are_known():
    assert pgen.Run().given == ()
    assert pgen.Run(steps=3, clip_norm=None, directory="a").given == ("steps", "clip_norm", "directory")
