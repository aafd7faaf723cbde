"""Sums over finite latents against brute force: every joint value tried by running the program on it."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pgen.backends.exact import Exact
from pgen.backends.exact.laws import Finite
from pgen.backends.variational import Variational
from pgen.capability import Exactness, Offer, Query, Refusal
from pgen.errors import Refused
from pgen.fitting import fit
from pgen.handlers import Substitute
from pgen.inspection import inspect_problem
from pgen.problem import Problem
from pgen.run import Run

QUIET = Run(progress=False)
WEIGHTS = torch.tensor([0.2, 0.3, 0.5])
MOVE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
MEANS = torch.tensor([-1.0, 0.5, 2.0])


def mixture(n):
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[k], 1.0))


def shared_scale(n):
    """A latent outside the plate ties the rows together."""
    s = pyro.sample("s", dist.Bernoulli(0.3))
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[k], 0.5 + s))


def nested():
    top = pyro.sample("top", dist.Categorical(WEIGHTS))
    with pyro.plate("schools", 2, dim=-1):
        kind = pyro.sample("kind", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.8])[top]))
        with pyro.plate("pupils", 3, dim=-2):
            able = pyro.sample("able", dist.Bernoulli(0.2 + 0.5 * kind))
            pyro.sample("score", dist.Normal(able - kind, 1.0), obs=torch.arange(6.0).reshape(3, 2) / 3)


def sequences(x, mask=None):
    """Pyro's own way of writing a hidden Markov model over a plate of sequences, with tones inside."""
    steps = x.shape[1]
    with pyro.plate("sequences", x.shape[0], dim=-2):
        state = 0
        for t in pyro.markov(range(steps)):
            with poutine.mask(mask=True if mask is None else mask[:, t, None]):
                state = pyro.sample(f"z_{t}", dist.Categorical(MOVE[state]), infer={"enumerate": "parallel"})
                with pyro.plate(f"tones_{t}", 2, dim=-1):
                    tones = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.8, 0.6]])[state.squeeze(-1)]
                    pyro.sample(f"x_{t}", dist.Bernoulli(tones), obs=x[:, t])


def topics():
    """A small topic model with its continuous weights fixed: words in documents, topics summed out."""
    table = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]])
    with pyro.plate("documents", 2, dim=-1):
        style = pyro.sample("style", dist.Categorical(torch.tensor([0.6, 0.4])))
        with pyro.plate("words", 3, dim=-2):
            topic = pyro.sample("topic", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[style]))
            words = torch.tensor([[0, 2], [1, 3], [0, 2]])
            pyro.sample("word", dist.Categorical(table[topic]), obs=words)


def evidence_by_factor():
    a = pyro.sample("a", dist.Categorical(WEIGHTS))
    b = pyro.sample("b", dist.Bernoulli(0.4))
    pyro.factor("agree", torch.where(a == b.long(), 1.5, -0.5))
    with pyro.plate("three", 3):
        pyro.factor("each", -0.3 * a * torch.arange(3.0))


def mixed_codings():
    one_hot = pyro.sample("one_hot", dist.OneHotCategorical(WEIGHTS))
    count = pyro.sample("count", dist.Binomial(3, 0.3 + 0.2 * one_hot[..., 1]))
    sign = pyro.sample("sign", dist.Bernoulli(0.5))
    pyro.sample(
        "y", dist.Normal((one_hot * MEANS).sum(-1) + count * (2 * sign - 1), 1.0), obs=torch.tensor(0.7)
    )


def combines_what_never_meets():
    """Values that no site depends on together are added up on the side."""
    total = 0.0
    for i in range(4):
        z = pyro.sample(f"z_{i}", dist.Categorical(WEIGHTS[: 2 + i % 2] / WEIGHTS[: 2 + i % 2].sum()))
        total = total + z
        pyro.sample(f"x_{i}", dist.Normal(MEANS[z], 1.0), obs=torch.tensor(0.3 * i))
    pyro.deterministic("total", total)
    return total


def sequential_plate():
    s = pyro.sample("s", dist.Categorical(WEIGHTS))
    for i in pyro.plate("i", 3):
        k = pyro.sample(f"k_{i}", dist.Bernoulli(0.2 + 0.2 * s))
        pyro.sample(f"x_{i}", dist.Normal(k, 1.0), obs=torch.tensor(float(i)))


X = torch.tensor([0.3, -1.2, 2.0])
TONES = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
PROGRAMS = {
    "mixture": (mixture, {"x": X}),
    "shared scale": (shared_scale, {"x": X}),
    "nested plates": (nested, None),
    "sequences": (sequences, {"x": TONES}),
    "topics": (topics, None),
    "factors": (evidence_by_factor, None),
    "codings": (mixed_codings, None),
    "combined on the side": (combines_what_never_meets, None),
    "sequential plate": (sequential_plate, None),
}


def brute_force(program, data):
    """All joint values of the latents, element by element, with their log joint densities."""
    problem = Problem.of(program, data)
    trace = poutine.trace(problem).get_trace()
    latents = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and type(site["fn"]).__name__ != "_Subsample"
    ]
    cells = []
    for name in latents:
        site = trace.nodes[name]
        values = site["fn"].enumerate_support(expand=False).reshape(-1, *site["fn"].event_shape)
        cells += [(name, i, values) for i in range(site["fn"].batch_shape.numel())]
    states, logs = [], []
    for choice in itertools.product(*(range(len(values)) for _, _, values in cells)):
        flat = {name: [] for name in latents}
        for (name, _, values), index in zip(cells, choice):
            flat[name].append(values[index])
        state = {n: torch.stack(v).reshape(trace.nodes[n]["value"].shape) for n, v in flat.items()}
        states.append(state)
        logs.append(poutine.trace(Substitute(state)(problem)).get_trace().log_prob_sum().double())
    return {n: torch.stack([s[n] for s in states]) for n in latents}, torch.stack(logs)


@pytest.mark.parametrize("case", PROGRAMS)
def test_evidence_marginals_and_draws_equal_brute_force(case):
    program, data = PROGRAMS[case]
    states, logs = brute_force(program, data)
    fitted = fit(program, data, Exact(), run=QUIET)
    torch.testing.assert_close(
        fitted.log_prob().value.sum().double(), logs.logsumexp(0), rtol=1e-6, atol=1e-5
    )
    weights = logs.softmax(0)
    laws, n = fitted.marginals(), 20_000
    draws = fitted.posterior(n=n, seed=1)
    for name, values in states.items():
        law = laws[name]
        assert law.batch_shape + law.event_shape == values.shape[1:]
        # Means of squares and of values themselves tell the marginals of all codings apart.
        for power in (1, 2):
            numbers = values.double() ** power
            exact = (weights.reshape(-1, *(1,) * (values.dim() - 1)) * numbers).sum(0)
            support = law.enumerate_support(expand=True)
            probs = law.log_prob(support).exp().double()
            probs = probs.reshape(probs.shape + (1,) * len(law.event_shape))
            torch.testing.assert_close(
                (probs * support.double() ** power).sum(0), exact, rtol=1e-5, atol=1e-5
            )
            # Values lie in [0, 3], their squares in [0, 9]: Hoeffding at 1e-8 per element.
            bound = 9 * math.sqrt(math.log(2e8) / (2 * n))
            assert draws[name].shape == (n, *values.shape[1:])
            assert ((draws[name].double() ** power).mean(0) - exact).abs().max() < bound


def test_draws_are_joint():
    states, logs = brute_force(shared_scale, {"x": X})
    weights = logs.softmax(0)
    draws, n = fit(shared_scale, {"x": X}, Exact(), run=QUIET).posterior(n=20_000, seed=2), 20_000
    same = (states["k"] == 2).all(-1) & (states["s"] == 1)
    found = ((draws["k"] == 2).all(-1) & (draws["s"] == 1)).double().mean()
    p = weights[same].sum()
    assert abs(found - p) < 5.5 * math.sqrt(p * (1 - p) / n)  # two-sided 4e-8
    # Independent draws of the marginals would not pass.
    independent = (draws["k"][torch.randperm(n)] == 2).all(-1) & (draws["s"] == 1)
    assert abs(independent.double().mean() - p) > 5.5 * math.sqrt(p * (1 - p) / n)


def test_rows_answer_for_themselves_unless_a_latent_ties_them():
    apart = fit(mixture, {"x": X}, Exact(), run=QUIET).log_prob()
    exact = (WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(X[:, None])).logsumexp(-1)
    torch.testing.assert_close(apart.value, exact)
    assert apart.kind == "exact"
    assert apart.measure == "density"
    assert fit(shared_scale, {"x": X}, Exact(), run=QUIET).log_prob().value.shape == (1,)


def test_masks_and_markov_mean_what_they_mean_in_pyro():
    mask = torch.tensor([[True, True], [True, False]])
    ours = fit(sequences, {"x": TONES, "mask": mask}, Exact(), run=QUIET).log_prob().value
    theirs = -TraceEnum_ELBO(max_plate_nesting=2).loss(sequences, lambda *a, **k: None, TONES, mask)
    assert ours.shape == (2,)
    assert float(ours.sum()) == pytest.approx(theirs, abs=1e-5)


def test_slices_of_rows_make_one_answer():
    data = {"x": torch.randn(50)}
    whole, sliced = (fit(mixture, data, Exact(max_table=m), run=QUIET) for m in (10**6, 20))
    torch.testing.assert_close(whole.log_prob().value, sliced.log_prob().value)
    torch.testing.assert_close(whole.marginals()["k"].probs, sliced.marginals()["k"].probs)
    assert sliced.posterior(n=3)["k"].shape == (3, 50)


def test_hints_for_pyros_own_enumeration_change_nothing():
    plain = fit(mixture, {"x": X}, Exact(), run=QUIET).log_prob().value
    hinted = fit(config_enumerate(mixture), {"x": X}, Exact(), run=QUIET).log_prob().value
    torch.testing.assert_close(plain, hinted)


def test_the_law_of_a_plain_list_of_values():
    support = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    law = Finite(support, torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]))
    assert (law.batch_shape, law.event_shape) == ((2,), (2,))
    torch.testing.assert_close(law.mean, torch.tensor([[0.8, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(law.log_prob(support[2]).exp(), torch.tensor([0.5, 0.0]))
    assert law.log_prob(torch.tensor([5.0, 5.0])).tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(law.log_prob(law.enumerate_support()).exp().sum(0), torch.ones(2))
    assert law.sample((4,)).shape == (4, 2, 2)
    assert law.expand((3, 2)).enumerate_support(expand=False).shape == (3, 1, 1, 2)


def test_programs_that_take_one_value_at_a_time_learn_as_well():
    def program():
        level = pyro.param("level", torch.tensor(0.5))
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        mean = torch.zeros(3)
        mean[z] = 1.0
        pyro.sample("x", dist.Normal(level * mean, 1.0).to_event(1), obs=torch.tensor([2.0, 0.1, 0.4]))

    run = Run(steps=1, optimizer="sgd", lr=1.0, clip_norm=None, progress=False)
    fitted = fit(program, None, Exact(), run=run)
    level = torch.tensor(0.5, requires_grad=True)
    seen = dist.Normal(level * torch.eye(3), 1.0).log_prob(torch.tensor([2.0, 0.1, 0.4])).sum(-1)
    (WEIGHTS.log() + seen).logsumexp(0).backward()
    torch.testing.assert_close(fitted.parameters["level"], 0.5 + level.grad)


# --- what leaves its plate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [torch.sum, lambda z: z[..., 0], lambda z: z @ torch.tensor([1.0, 2.0, 3.0])])
def test_a_finite_latent_used_outside_its_plate_is_refused_and_not_offered(use):
    def program(n):
        with pyro.plate("k", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("d", n):
            pyro.sample("x", dist.Normal(use(z), 1.0))

    data = {"x": torch.tensor([0.3, -1.2, 2.0])}
    with pytest.raises(Refused, match="site 'z' lacks uses inside its plates: 'x' depends on 'z'"):
        fit(program, data, Exact(), run=QUIET)
    structure, _ = inspect_problem(Problem.of(program, data))
    offer = Variational().examine(structure)
    assert isinstance(offer, Offer)
    assert "summed out" not in offer.why
    assert offer.answers[Query.LOG_PROB] is Exactness.LOWER_BOUND
    assert isinstance(Variational(guide="mean-field").examine(structure), Refusal)


def test_what_is_only_predicted_may_look_across_a_plate():
    def program():
        with pyro.plate("k", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(3.0))
        pyro.sample("any", dist.Bernoulli(z.mean()))

    fitted = fit(program, None, Exact(), run=QUIET)
    y = torch.arange(3.0)
    terms = torch.stack([dist.Normal(k, 1.0).log_prob(y) for k in (0.0, 1.0)])
    exact = (torch.tensor([0.7, 0.3]).log()[:, None] + terms).logsumexp(0).sum()
    torch.testing.assert_close(fitted.log_prob().value.sum(), exact)
    assert fitted.posterior(n=4)["any"].shape == (4,)
