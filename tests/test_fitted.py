"""The four queries: seeds, shapes, evidence of every form, honesty, and the fitted program as a program."""

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pgen
from pgen.capability import Estimate, Exactness, Offer, Query, Rank
from pgen.draws import Draws
from pgen.errors import DataError, Dishonest, OptionError, Unanswerable
from pgen.run import Run
from pgen.testing.problems import LEARNED, SUITED
from tests.testing.zoo_of_bad_backends import Oracle, OracleAnswers, answering, offering, promising

REFERENCES = {p.name: p for p in (*SUITED, *LEARNED)}


def fit(name="linear-gaussian", backend=None):
    reference = REFERENCES[name]
    return pgen.fit(reference.program, reference.data, backend or Oracle(), run=Run(steps=1))


# --- seeds and shapes ---


def test_a_seed_repeats_and_none_does_not():
    fitted = fit()
    for ask in (lambda s: fitted.sample(5, seed=s)["z"], lambda s: fitted.posterior(n=5, seed=s)["z"]):
        assert torch.equal(ask(1), ask(1))
        assert not torch.equal(ask(1), ask(2))
        assert not torch.equal(ask(None), ask(None))


def test_asking_leaves_the_generators_alone():
    fitted = fit()
    before = torch.get_rng_state()
    fitted.sample(3)
    fitted.posterior(n=3)
    fitted.log_prob()
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes():
    fitted = fit()
    assert {k: tuple(v.shape) for k, v in fitted.sample(3).items()} == {"z": (3,), "x": (3,)}
    assert fitted.posterior(n=3)["z"].shape == (3, 5)
    assert fitted.posterior({"x": torch.zeros(2)}, 3)["z"].shape == (3, 2)
    assert fitted.log_prob().value.shape == (5,)
    assert fit("gaussian-mean").log_prob().value.shape == (1,)
    assert not fitted.posterior(n=3)["z"].requires_grad


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_the_number_of_draws_is_checked(n):
    fitted = fit()
    for ask in (fitted.sample, lambda n: fitted.posterior(n=n)):
        with pytest.raises(OptionError, match="expected a whole number of draws, at least 1"):
            ask(n)


def test_any_whole_number_will_do():
    assert fit().sample(np.int64(3))["z"].shape == (3,)


# --- evidence ---


def test_evidence_of_every_form_gives_the_same():
    fitted = fit()
    value = torch.tensor([1.0, -2.0])
    expected = REFERENCES["linear-gaussian"].log_prob({"x": value}).float()
    for evidence in ({"x": value}, {"x": value.tolist()}, {"x": value.numpy()}):
        assert torch.allclose(fitted.log_prob(evidence).value, expected)


def test_evidence_may_leave_sites_out():
    fitted = fit("gaussian-mean")
    _, structure = fitted._asked({"mu": torch.tensor(1.0)})
    assert structure.latents == ("x",)
    assert structure.observed == ("mu",)


def test_inputs_stay_where_new_ones_are_not_given():
    fitted = fit("regression")
    reference = REFERENCES["regression"]
    y = torch.arange(5.0)
    expected = reference.log_prob({**reference.data, "y": y}).float()
    assert torch.allclose(fitted.log_prob({"y": y}).value, expected)
    fewer = {"covariates": reference.data["covariates"][:2], "y": y[:2]}
    assert torch.allclose(fitted.log_prob(fewer).value, reference.log_prob(fewer).float())


def test_bad_evidence_is_told_like_bad_data():
    fitted = fit()
    with pytest.raises(DataError, match="data key 'y' names neither an argument nor a site"):
        fitted.log_prob({"y": torch.zeros(2)})
    with pytest.raises(DataError, match="is empty"):
        fitted.posterior({"x": torch.zeros(0)})


# --- honesty ---


def test_what_was_not_offered_is_not_answered():
    fitted = fit("pushforward")
    for ask, query in ((fitted.posterior, "posterior"), (fitted.marginals, "marginals")):
        with pytest.raises(Unanswerable) as caught:
            ask()
        text = str(caught.value)
        assert f"backend 'oracle' does not answer {query} for pushforward" in text
        assert "it offered sample (exact), log_prob (exact)" in text
        assert "pgen.explain" in text


def spoil(**methods):
    """A backend whose answers have other methods."""
    return dataclass(frozen=True)(type("Spoilt", (Oracle,), {"answers": answering(**methods)}))()


def more_exact_than_offered():
    kind = type("Spoilt", (Oracle,), {"examine": offering(answers=promising(log_prob="lower bound"))})
    return dataclass(frozen=True)(kind)()


@pytest.mark.parametrize(
    ("backend", "ask", "match"),
    [
        (
            more_exact_than_offered(),
            lambda f: f.log_prob(),
            "offered log_prob as 'lower bound' and answered it as 'exact'",
        ),
        (
            spoil(log_prob=lambda self, p, s: torch.zeros(5)),
            lambda f: f.log_prob(),
            "answered log_prob with Tensor; expected pgen.Estimate",
        ),
        (
            spoil(log_prob_of=lambda self, p: torch.zeros(3)),
            lambda f: f.log_prob(),
            r"answered log_prob with shape \(3,\); expected \(5,\)",
        ),
        (
            spoil(sample=lambda self, n: {"z": torch.zeros(n)}),
            lambda f: f.sample(2),
            "answered sample without site 'x'",
        ),
        (
            spoil(sample=lambda self, n: {"z": torch.zeros(n), "x": torch.zeros(1)}),
            lambda f: f.sample(2),
            r"answered sample at 'x' with shape \(1,\); expected \(2, ...\)",
        ),
        (
            spoil(posterior=lambda self, p, s, n: {}),
            lambda f: f.posterior(n=2),
            "answered posterior without site 'z'",
        ),
    ],
)
def test_a_backend_that_breaks_its_word_is_named(backend, ask, match):
    fitted = fit(backend=backend)
    with pytest.raises(Dishonest, match=f"backend 'oracle' .*{match}"):
        ask(fitted)


def test_draws_are_a_mapping_that_keeps_what_diagnostics_need():
    draws = Draws({"z": torch.zeros(6, 2)}, chains=2, khat=torch.tensor([0.3, 0.8]))
    assert draws["z"].shape == (6, 2)
    assert list(draws) == ["z"]
    assert len(draws) == 1
    assert repr(draws) == "Draws(z [6, 2]; k-hat up to 0.80)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arviz, about its own future
        tree = draws.to_arviz()
    assert dict(tree["posterior"].sizes)["chain"] == 2
    assert dict(tree["posterior"].sizes)["draw"] == 3
    plain = fit(backend=spoil(posterior=lambda self, p, s, n: {"z": torch.zeros(n, 5)})).posterior(n=2)
    assert isinstance(plain, Draws)


# --- the program ---


def test_the_fitted_program_is_a_program_with_what_was_learned():
    fitted = fit("learned-gaussian")
    program = fitted.program
    trace = poutine.trace(program).get_trace(3)
    law = trace.nodes["x"]["fn"]
    law = law.base_dist if hasattr(law, "base_dist") else law
    assert torch.allclose(law.loc, torch.tensor(0.375), atol=1e-4)
    assert not law.loc.requires_grad
    assert not any(p.requires_grad for p in trace.param_nodes)
    assert [p.detach().item() for p in REFERENCES["learned-gaussian"].program.parameters()] == [0.0, 0.0]


def test_a_fitted_program_has_nothing_left_to_learn():
    structure = pgen.structure_of(fit("learned-gaussian").program, REFERENCES["learned-gaussian"].data)
    assert structure.params == ()
    assert list(structure.sites) == ["x"]


def test_a_fit_is_a_part_of_the_next_program():
    prior = fit("learned-gaussian").program

    def inverse_problem(n):
        prior(n)
        with pyro.plate("rows", n):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    structure = pgen.structure_of(inverse_problem, {"y": torch.zeros(4)})
    assert structure.latents == ("x",)
    assert structure.observed == ("y",)


def test_a_program_with_nothing_learned_is_itself():
    @dataclass(frozen=True)
    class NoParameters(Oracle):
        name: ClassVar[str] = "no-parameters"

        def answers(self, problem, structure, run):
            answers = OracleAnswers(self, problem, structure, run)
            del answers.parameters
            return answers

    fitted = fit(backend=NoParameters())
    assert fitted.program is REFERENCES["linear-gaussian"].program
    assert fitted.parameters == {}


def test_later_fits_do_not_change_an_earlier_one():
    network = nn.Linear(1, 1)

    def program(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(network(x)[:, 0], 1.0))

    data = {"x": torch.ones(3, 1), "y": torch.zeros(3)}

    @dataclass(frozen=True)
    class Sets(Oracle):
        value: float = 0.0

        def examine(self, structure):
            return Offer({Query.LOG_PROB: Exactness.EXACT}, Rank.SUITED, "why")

        def answers(self, problem, structure, run):
            return SetsAnswers(self.value, problem)

    class SetsAnswers:
        def __init__(self, value, problem):
            self.parameters = pgen.parameters.Parameters.of(problem)
            with torch.no_grad():
                for t in self.parameters.tensors.values():
                    t.fill_(value)

        def log_prob(self, problem, structure):
            with self.parameters.installed():
                trace = poutine.trace(problem).get_trace()
            trace.compute_log_prob()
            return Estimate(trace.nodes["y"]["log_prob"], "exact")

    first = pgen.fit(program, data, Sets(value=1.0))
    before = first.log_prob().value
    second = pgen.fit(program, data, Sets(value=3.0))
    assert torch.equal(first.log_prob().value, before)
    assert not torch.equal(second.log_prob().value, before)
    with torch.no_grad():
        network.weight.fill_(100.0)
    assert torch.equal(first.log_prob().value, before)
    assert poutine.trace(first.program).get_trace(torch.ones(1, 1)).nodes["y"][
        "fn"
    ].loc.item() == pytest.approx(2.0)


def test_it_prints_what_it_answers():
    text = repr(fit())
    for part in ("linear_gaussian", "Oracle", "sample: exact", "log_prob: exact", "posterior: exact"):
        assert part in text
    assert replace(fit().offer, why="x").why == "x"
