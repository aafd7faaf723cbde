"""The exact answers of the reference problems are exact: against the programs themselves."""

import math

import pyro
import pytest
import torch
from pyro import poutine

from pgen.inspection import inspect_problem
from pgen.problem import Problem
from pgen.sampling import draw
from pgen.testing import problems, unsuitable
from pgen.testing import statistics as stats
from pgen.testing.checks_truth import assert_law, moments_of

KNOWN = {p.name: p for p in (*problems.SUITED, *problems.DENOISED, *problems.ENERGIES)}
EVERY = KNOWN | {p.name: p for p in (*problems.LEARNED, *problems.UNSUITABLE)}
SUITED = {p.name: p for p in problems.SUITED}


@pytest.mark.parametrize("name", EVERY)
def test_every_program_meets_its_data(name):
    reference = EVERY[name]
    structure, problem = inspect_problem(Problem.of(reference.program, reference.data))
    assert set(structure.observed) <= set(reference.data)
    if reference.posterior is not None:
        laws = reference.posterior(reference.data)
        assert set(laws) == set(structure.latents)
    if reference.log_prob is not None:
        tied = problem.rows is None or any(not structure.local(s) for s in structure.latents)
        assert reference.log_prob(reference.data).shape == (1 if tied else problem.rows,)


@pytest.mark.parametrize("name", SUITED)
def test_evidence_and_posterior_agree_with_weighted_draws_from_the_prior(name):
    """Self-normalised importance sampling by the program itself, against the closed forms."""
    reference, count = SUITED[name], 60_000
    structure, problem = inspect_problem(Problem.of(reference.program, reference.data))
    plate = pyro.plate("_draws", count, dim=-2)

    def many():
        with plate:
            problem()

    trace = poutine.trace(many).get_trace()
    trace.compute_log_prob(lambda site, node: node["is_observed"])
    logs = sum(trace.nodes[s]["log_prob"].expand(count, -1) for s in structure.observed).double()
    truth = reference.log_prob(reference.data)
    if truth.shape == (1,):
        logs = logs.sum(-1, keepdim=True)
    weights = (logs - truth).exp()  # mean 1 if the evidence is right
    stats.assert_mean(weights, 1.0, what=f"evidence of {name}")
    laws = reference.posterior(reference.data)
    values = {
        site: trace.nodes[site]["value"].double().reshape(count, *law.batch_shape)
        for site, law in laws.items()
    }
    expectations = {
        site: (lambda draws, site=site: draws[site], moments_of(law)[0]) for site, law in laws.items()
    }
    for what, (function, expected) in {**expectations, **reference.joint(reference.data)}.items():
        weighed = (function(values) - expected).reshape(count, -1) * weights
        stats.assert_mean(weighed, 0.0, what=f"posterior expectation of {what}")


def test_evidence_and_posterior_of_a_denoised_latent_agree_with_weighted_draws():
    """The same with exact draws of the prior: of the program's own, nothing but a denoiser is known."""
    reference = KNOWN["denoised-latent"]
    z = problems.denoised.exact().sample(60_000, generator=torch.Generator().manual_seed(0))
    seen = torch.distributions.Normal(z[:, :1] - 0.5 * z[:, 1:], 0.75)
    weights = (
        seen.log_prob(reference.data["y"].double()) - reference.log_prob(reference.data)
    ).exp()  # [draws, rows]
    stats.assert_mean(weights, 1.0, what="evidence")
    law = reference.posterior(reference.data)["z"]
    (function, product) = reference.joint(reference.data)["z[0] z[1]"]
    for found, expected in (
        (z, law.mean),
        (z.square(), law.variance + law.mean.square()),
        (function({"z": z})[:, None], product[:, None]),
    ):
        stats.assert_mean((found[:, None] - expected) * weights[..., None], 0.0, what="posterior expectation")


@pytest.mark.parametrize("name", [p.name for p in (*problems.SUITED, *problems.DENOISED)])
def test_predictive_laws_are_those_of_the_program(name):
    reference = KNOWN[name]
    structure, problem = inspect_problem(Problem.of(reference.program, reference.data))
    if problem.undrawable:  # by itself, a program draws a diffusion as it can
        nodes = poutine.trace(reference.program).get_trace(10_000).nodes
        drawn = {site: nodes[site]["value"] for site in structure.sites}
    else:
        drawn = draw(problem, structure, 10_000)
    for site, law in reference.predictive().items():
        assert drawn[site].shape == (10_000, *law.batch_shape)
        assert_law(drawn[site], law, alpha=1e-6, what=site)


@pytest.mark.parametrize(
    "name", ["gaussian-mean", "linear-gaussian", "mixture", "hmm", "pushforward", "regression"]
)
def test_answers_are_functions_of_any_data(name):
    reference = SUITED[name]
    some = reference.some(2)
    whole, part = reference.log_prob(reference.data), reference.log_prob(some)
    if whole.shape != (1,):
        assert torch.equal(part, whole[:2])
    else:
        assert not torch.equal(part, whole)


def test_the_hidden_markov_chain_by_the_forward_recursion():
    reference = SUITED["hmm"]
    start, move, emit = (
        torch.tensor(v, dtype=torch.float64) for v in (problems._START, problems._MOVE, problems._EMIT)
    )
    alpha = start.log()
    for t in range(3):
        likelihood = -0.5 * (reference.data[f"x{t}"][:, None].double() - emit) ** 2 - 0.5 * math.log(
            2 * math.pi
        )
        alpha = (alpha if t == 0 else (alpha[:, :, None] + move.log()).logsumexp(1)) + likelihood
    assert torch.allclose(alpha.logsumexp(-1), reference.log_prob(reference.data))


def test_the_optimum_of_what_is_learned():
    (reference,) = problems.LEARNED
    x = reference.data["x"].double()
    law = torch.distributions.Normal(x.mean(), x.std(correction=0))
    assert float(law.log_prob(x).mean()) == pytest.approx(reference.best, abs=1e-9)
    start = torch.distributions.Normal(0.0, 1.0).log_prob(x).mean()
    assert reference.best - float(start) > 0.1  # something is to be learned


def test_programs_follow_double_precision():
    for reference in problems.SUITED:
        data = {k: v.double() for k, v in reference.data.items()}
        structure, problem = inspect_problem(Problem.of(reference.program, data))
        trace = poutine.trace(problem).get_trace()
        trace.compute_log_prob()
        for site in structure.observed:
            if not structure.sites[site].discrete:
                assert trace.nodes[site]["log_prob"].dtype == torch.float64


def test_the_unsuitable_ones_are():
    assert {p.name for p in problems.UNSUITABLE if p.must_refuse} == {"learned-energy"}
    structure, _ = inspect_problem(Problem.of(unsuitable.implicit, EVERY["implicit"].data))
    assert not any(c.value in ("log_prob", "log_density") for c in structure.sites["x"].capabilities)
    structure, _ = inspect_problem(Problem.of(EVERY["learned-energy"].program, EVERY["learned-energy"].data))
    assert structure.sites["energy"].params == ("slope",)
    structure, _ = inspect_problem(Problem.of(unsuitable.branching, EVERY["branching"].data))
    assert structure.leaks


@pytest.mark.parametrize("name", [p.name for p in problems.ENERGIES])
def test_energies_are_the_laws_that_are_said_of_them_up_to_a_constant(name):
    reference = KNOWN[name]
    _, problem = inspect_problem(Problem.of(reference.program, reference.data))
    site = "z" if name == "energy-latent" else "x"
    law = poutine.trace(problem).get_trace().nodes[site]["fn"]
    values = torch.linspace(-3.0, 3.0, 61)[:, None, None]  # for one of the rows
    found = law.single.log_density(values)[:, 0].double()
    error = found - reference.predictive()[site].log_prob(values.double())[:, 0, 0]
    assert float((error - error[0]).abs().max()) < 1e-5
    assert float(error[0].abs()) > 0.5  # the constant is not theirs


def test_evidence_and_posterior_of_a_latent_energy_by_quadrature():
    reference = KNOWN["energy-latent"]
    z = torch.linspace(-8.0, 8.0, 8001, dtype=torch.float64)
    x = reference.data["x"].double()[:, None]
    joint = reference.predictive()["z"].log_prob(z[:, None])[:, 0] + torch.distributions.Normal(
        z, 0.75
    ).log_prob(x)
    evidence = torch.trapezoid(joint.exp(), z).log()
    torch.testing.assert_close(evidence, reference.log_prob(reference.data))
    law = reference.posterior(reference.data)["z"]
    torch.testing.assert_close(torch.trapezoid((joint - evidence[:, None]).exp() * z, z), law.mean[:, 0])
    second = torch.trapezoid((joint - evidence[:, None]).exp() * z.square(), z)
    torch.testing.assert_close(second, (law.variance + law.mean.square())[:, 0])
