"""Enumeration: one run of a program gives the right factors, in few dimensions, scaled and masked."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.ops.indexing import Vindex
from pyro.optim import SGD

from pgen.algorithms.sum_product import log_partition, marginals, sample
from pgen.enumeration import enumerate_sites
from pgen.errors import Refused
from pgen.handlers import ScaleRows, Substitute
from pgen.inspection import inspect_problem
from pgen.problem import Problem

WEIGHTS = torch.tensor([0.2, 0.3, 0.5])
MEANS = torch.tensor([-1.0, 0.5, 2.0])
X = torch.tensor([0.3, -1.2, 2.0, 0.1])


def enumerated(program, data=None, sites=None, **options):
    structure, problem = inspect_problem(Problem.of(program, data))
    chosen = structure.latents if sites is None else sites
    return enumerate_sites(problem, structure, chosen, **options), structure


def mixture(n):
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[k], 1.0))


def rows_of_mixture(x):
    return (WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None])).logsumexp(-1)


def test_factors_are_named_by_plates_and_latents():
    found, _ = enumerated(mixture, {"x": X})
    assert {name: set(factor.names) for name, factor in found.factors.items()} == {
        "k": {"data", "k"},
        "x": {"data", "k"},
    }
    assert found.variables == {"k": ("data",)}
    assert found.supports["k"].tolist() == [0, 1, 2]
    torch.testing.assert_close(log_partition(found.graph(keep=["data"])), rows_of_mixture(X))
    torch.testing.assert_close(log_partition(found.graph()), rows_of_mixture(X).sum())


def test_a_chain_needs_two_dimensions_however_long():
    deepest = 0

    def chain():
        nonlocal deepest
        z = 0
        for t in range(100):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(3)[z] * 0.7 + 0.1))
            deepest = max(deepest, z.dim())
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=torch.tensor(0.1 * t))

    found, _ = enumerated(chain)
    assert deepest == 2
    assert len(found.graph().factors) == 200
    assert math.isfinite(float(log_partition(found.graph())))


def test_what_a_program_does_after_its_last_site_does_not_matter():
    def chain():
        z, states = 0, []
        for t in range(5):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(3)[z] * 0.7 + 0.1))
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 1.0), obs=torch.tensor(0.1 * t))
            states.append(z)
        return torch.stack(states)

    found, _ = enumerated(chain)
    assert len(found.factors) == 10


def test_values_come_back_in_the_shape_of_the_site():
    def program():
        with pyro.plate("a", 2, dim=-1), pyro.plate("b", 3, dim=-2):
            pyro.sample("one_hot", dist.OneHotCategorical(WEIGHTS))
        with pyro.plate("c", 4, dim=-3):
            pyro.sample("flag", dist.Bernoulli(0.5))

    found, structure = enumerated(program)
    draws = sample(found.graph(), 6)
    values = {name: found.values(name, index) for name, index in draws.items()}
    assert values["one_hot"].shape == (6, 3, 2, 3)
    assert values["flag"].shape == (6, *structure.sites["flag"].batch_shape)
    assert set(values["flag"].flatten().tolist()) <= {0.0, 1.0}


def test_a_particle_plate_stays_apart():
    def program(n):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[k] + m, 1.0))

    structure, problem = inspect_problem(Problem.of(program, {"x": X}))
    m = torch.tensor([-1.0, 0.0, 2.0])

    def run():
        with pyro.plate("particles", 3, dim=-2), Substitute({"m": m[:, None]}):
            problem()

    found = enumerate_sites(run, structure, ["k"], nesting=structure.nesting + 1)
    totals = log_partition(found.graph(["k", "x"], keep=["particles", "data"]))
    torch.testing.assert_close(totals, torch.stack([rows_of_mixture(X - value) for value in m]))
    assert found.factors["m"].names == ("particles",)
    assert marginals(found.graph(["k", "x"], keep=["particles"]))["k"].shape == (3, 4, 3)


def test_a_batch_of_rows_counts_for_all_after_the_sum_not_before():
    structure, problem = inspect_problem(Problem.of(mixture, {"x": X}))
    run = ScaleRows(["data"], 2.5)(problem)
    found = enumerate_sites(run, structure, ["k"], powers={"data": 2.5})
    torch.testing.assert_close(log_partition(found.graph()), 2.5 * rows_of_mixture(X).sum())


def test_a_subsampled_plate_counts_for_all_of_it_after_the_sum():
    def outside(x):
        """Pyro refuses this one: its enumeration knows a single scale."""
        s = pyro.sample("s", dist.Bernoulli(0.3))
        with pyro.plate("rows", 8, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    def inside(x):
        with pyro.plate("rows", 8, subsample=torch.arange(4)):
            s = pyro.sample("s", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    prior = torch.tensor([0.7, 0.3]).log()
    likelihood = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(X[:, None])
    found, _ = enumerated(outside, {"x": X})
    torch.testing.assert_close(log_partition(found.graph()), (prior + 2 * likelihood.sum(0)).logsumexp(0))
    found, _ = enumerated(inside, {"x": X})
    theirs = -TraceEnum_ELBO(max_plate_nesting=1).loss(inside, lambda x: None, X)
    assert float(log_partition(found.graph())) == pytest.approx(theirs, rel=1e-5)


def test_a_scale_tempers_a_likelihood_and_is_refused_around_a_latent():
    def tempered():
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=torch.tensor(0.3))

    found, _ = enumerated(tempered)
    exact = (WEIGHTS.log() + 0.5 * dist.Normal(MEANS, 1.0).log_prob(torch.tensor(0.3))).logsumexp(0)
    torch.testing.assert_close(log_partition(found.graph()), exact)

    def ambiguous():
        with poutine.scale(scale=0.5):
            tempered()

    with pytest.raises(Refused, match="site 'k' lacks a log probability that is not scaled"):
        enumerated(ambiguous)


def test_what_is_masked_out_counts_for_nothing():
    mask = torch.tensor([True, False, True, False])

    def masked(n):
        with poutine.mask(mask=mask[:n]):
            mixture(n)

    structure, problem = inspect_problem(Problem.of(mixture, {"x": X}))
    whole = poutine.mask(problem, mask=mask)
    found = enumerate_sites(whole, structure, ["k"])
    kept = torch.where(mask, rows_of_mixture(X), torch.zeros(()))
    torch.testing.assert_close(log_partition(found.graph(keep=["data"])), kept)


def test_several_plates_over_the_rows_have_one_name():
    def program(x):
        with pyro.plate("causes", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
        with pyro.plate("effects", len(x)):
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    found, structure = enumerated(program, {"x": X})
    assert structure.data_plates == ("causes", "effects")
    torch.testing.assert_close(log_partition(found.graph(keep=["causes"])), rows_of_mixture(X))


def test_vectorised_indexing_works_as_in_pyro():
    table = torch.tensor([[[0.1, 0.9], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]])

    def program():
        a = pyro.sample("a", dist.Categorical(WEIGHTS))
        b = pyro.sample("b", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("c", dist.Categorical(Vindex(table)[a, b]), obs=torch.tensor(1))

    found, _ = enumerated(program)
    exact = (WEIGHTS[:, None] * torch.tensor([0.4, 0.6]) * table[..., 1]).sum().log()
    torch.testing.assert_close(log_partition(found.graph()), exact)


def test_gradients_reach_the_parameters():
    means = MEANS.clone().requires_grad_()

    def program(n):
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(means[k], 1.0))

    found, _ = enumerated(program, {"x": X})
    ours = torch.autograd.grad(log_partition(found.graph()), means)[0]
    exact = (WEIGHTS.log() + dist.Normal(means, 1.0).log_prob(X[:, None])).logsumexp(-1).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(exact, means)[0])


def in_place():
    """Not written for batches: with all values at once, every state would be marked."""
    z = 0
    for t in range(4):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(3)[z] * 0.7 + 0.1))
        mean = torch.zeros(3)
        mean[z] = 1.0
        pyro.sample(f"x_{t}", dist.Normal(mean, 1.0).to_event(1), obs=torch.tensor([0.3 * t, 0.0, 1.0]))


def test_programs_that_take_one_value_at_a_time_are_run_so():
    runs = 0

    def counted():
        nonlocal runs
        runs += 1
        in_place()

    structure, problem = inspect_problem(Problem.of(counted))
    runs = 0
    found = enumerate_sites(problem, structure, structure.latents, check=True)
    assert found.apart
    assert runs <= 2 * (1 + 2 + 1) + 9  # two attempts, tried twice, one repeated; every pair of neighbours
    message = torch.zeros(3)
    for t in range(4):
        move = (torch.eye(3) * 0.7 + 0.1).log()
        seen = dist.Normal(torch.eye(3), 1.0).log_prob(torch.tensor([0.3 * t, 0.0, 1.0])).sum(-1)
        message = (move[0] if t == 0 else (message[:, None] + move).logsumexp(0)) + seen
    torch.testing.assert_close(log_partition(found.graph()), message.logsumexp(0))
    # Without the check, the wrong answer would have passed.
    unchecked = enumerate_sites(problem, structure, structure.latents)
    assert abs(float(log_partition(unchecked.graph()) - message.logsumexp(0))) > 0.1
    # What is known to be needed is not tried again.
    assert enumerate_sites(problem, structure, structure.latents, apart=True).apart


def test_a_program_that_mixes_the_elements_of_a_plate_is_refused():
    """Neither all values at once nor one by one are its law, since elements differ in neither."""

    def running():
        with pyro.plate("k", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z.cumsum(-1), 1.0), obs=torch.arange(3.0))

    def centred(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z - z.mean(), 1.0))

    def neighbours():
        with pyro.plate("k", 4):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            pyro.sample("y", dist.Normal(MEANS[z.roll(1, -1)], 1.0), obs=torch.arange(4.0))

    for seed in range(5):
        for program, data in ((running, None), (centred, {"y": torch.arange(2.0)}), (neighbours, None)):
            torch.manual_seed(seed)
            with pytest.raises(Refused, match="site 'y' lacks .*its plate's elements are mixed"):
                enumerated(program, data, check=True)


def test_one_by_one_in_a_plate_is_compared_and_kept():
    """Not written for batches either, but its elements are apart."""

    def marked():
        with pyro.plate("k", 3):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            mean = torch.zeros(3, 3)
            mean[torch.arange(3), z] = 1.0
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.eye(3))

    found, _ = enumerated(marked, check=True)
    assert found.apart
    seen = dist.Normal(torch.eye(3)[:, None], 1.0).log_prob(torch.eye(3)).sum(-1)  # [state, element]
    exact = (WEIGHTS.log()[:, None] + seen).logsumexp(0).sum()
    torch.testing.assert_close(log_partition(found.graph()), exact)


def test_one_by_one_gives_the_factors_of_all_at_once():
    structure, problem = inspect_problem(Problem.of(mixture, {"x": X}))
    together = enumerate_sites(problem, structure, ["k"], check=True)
    apart = enumerate_sites(problem, structure, ["k"], apart=True)
    assert not together.apart
    assert apart.apart
    for keep in ([], ["data"]):
        torch.testing.assert_close(
            log_partition(together.graph(keep=keep)), log_partition(apart.graph(keep=keep))
        )
    torch.testing.assert_close(marginals(together.graph())["k"], marginals(apart.graph())["k"])


def test_nothing_is_left_behind_when_a_program_fails():
    def many():
        z = 0
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(20, 20)[z]))
            pyro.sample(f"x_{t}", dist.Normal(z.float().reshape(()), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(
        Refused, match="work on all values of the finite latents at once: many raised"
    ) as caught:
        enumerated(many)
    assert caught.value.refusal.site is not None
    assert len(pyro.poutine.runtime._PYRO_STACK) == 0


def test_a_site_that_is_met_for_some_values_only_is_refused():
    def sometimes():
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        if k.numel() == 1 and bool(MEANS[k.detach().clone().reshape(())] > 1.0):
            pyro.sample("extra", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(Refused, match="site 'k' lacks uses that stay in torch"):
        enumerated(sometimes)


def test_a_latent_without_a_finite_support_is_refused():
    def program():
        pyro.sample("count", dist.Poisson(3.0))

    with pytest.raises(Refused, match="site 'count' lacks Capability.ENUMERATE: Poisson"):
        enumerated(program)


def test_pyro_itself_gives_the_same_gradient_step():
    """An independent implementation of the whole: a step of SVI with Pyro's enumeration."""
    start = torch.tensor([0.0, 0.5, 1.0])

    def model(x):
        means = pyro.param("means", start.clone())
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)

    with pyro.get_param_store().scope():
        svi = SVI(model, lambda x: None, SGD({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
        svi.step(X)
        theirs = pyro.param("means").detach().clone()
    with pyro.get_param_store().scope():
        structure, problem = inspect_problem(Problem.of(model, {"x": X}))
        total = log_partition(enumerate_sites(problem, structure, ["k"]).graph())
        means = pyro.param("means")
        ours = start + 0.1 * torch.autograd.grad(total, means)[0]
    torch.testing.assert_close(ours, theirs)
