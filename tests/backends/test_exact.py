"""The exact backend against brute force: every joint value of the latents tried by running the program."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from pgen.backends.exact import Exact
from pgen.backends.exact.mode import At
from pgen.capability import Offer, Query
from pgen.errors import DataError, OptionError, Refused
from pgen.fitting import fit
from pgen.handlers import Substitute
from pgen.problem import Problem
from pgen.run import Run
from pgen.structure import structure_of

QUIET = Run(progress=False)
torch.manual_seed(0)
WEIGHTS = torch.tensor([0.2, 0.3, 0.5])
MOVE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
MEANS = torch.tensor([-1.0, 0.5, 2.0])


# --- programs with finite latents ------------------------------------------------------------------------


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


# --- learning --------------------------------------------------------------------------------------------


def test_fully_observed_programs_reach_their_maximum_likelihood():
    data = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def coin(n):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", n):
            pyro.sample("x", dist.Bernoulli(p))

    fitted = fit(coin, {"x": data}, Exact(), run=Run(steps=400, lr=0.05, progress=False))
    best = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert float(fitted.log_prob().value.mean()) == pytest.approx(best, abs=1e-4)
    assert Query.POSTERIOR not in fitted.offer.answers


def test_the_gradient_is_that_of_the_evidence():
    """One step of plain gradient descent on a mixture moves by the gradient of its closed form."""
    start = torch.tensor([0.0, 0.5, 1.0])

    def program(n):
        means = pyro.param("means", start.clone())
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(means[k], 1.0))

    run = Run(steps=1, optimizer="sgd", lr=1.0, clip_norm=None, progress=False)
    fitted = fit(program, {"x": X}, Exact(), run=run)
    means = start.clone().requires_grad_()
    (WEIGHTS.log() + dist.Normal(means, 1.0).log_prob(X[:, None])).logsumexp(-1).mean().backward()
    torch.testing.assert_close(fitted.parameters["means"], start + means.grad)


def test_the_most_probable_values_are_the_mode():
    def program(n):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mu + k, rate.rsqrt()))

    fitted = fit(program, {"x": X}, Exact(estimate="map"), run=QUIET)
    assert set(fitted.offer.answers) == {Query.SAMPLE}
    assert fitted.sample(4)["x"].shape == (4,)

    def density(mu: Tensor, rate: Tensor) -> Tensor:
        each = torch.stack([dist.Normal(mu + k, rate.rsqrt()).log_prob(X) for k in (0.0, 1.0)])
        prior = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Gamma(3.0, 2.0).log_prob(rate)
        return prior + (each.logsumexp(0) - math.log(2)).sum()

    mu, rate = (fitted.parameters[name].clone().requires_grad_() for name in ("mu", "rate"))
    slopes = torch.autograd.grad(density(mu, rate), (mu, rate))
    assert all(abs(float(slope)) < 2e-3 for slope in slopes)


# --- Gaussian and conjugate groups -----------------------------------------------------------------------


def tree(n):
    with pyro.plate("data", n):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 0.7))
        c = pyro.sample("c", dist.Normal(0.5 * a - 1.0, 0.6))
        pyro.sample("x", dist.Normal(b, 0.3))
        pyro.sample("y", dist.Normal(2 * c, 0.3))


def test_a_linear_gaussian_tree_equals_its_joint_gaussian():
    data = {"x": torch.randn(20), "y": torch.randn(20)}
    fitted = fit(tree, data, Exact(), run=QUIET)
    # a, b, c, x, y as a linear map of independent noise.
    noise = torch.diag(torch.tensor([1.0, 0.7, 0.6, 0.3, 0.3]).double())
    rows = {"a": noise[0], "b": noise[0] + noise[1], "c": 0.5 * noise[0] + noise[2]}
    rows |= {"x": rows["b"] + noise[3], "y": 2 * rows["c"] + noise[4]}
    mean = torch.tensor([0.0, 0.0, -1.0, 0.0, -2.0]).double()
    joint = torch.stack(list(rows.values())) @ torch.stack(list(rows.values())).T
    observed = torch.stack([data["x"], data["y"]], -1).double()
    law = dist.MultivariateNormal(mean[3:], joint[3:, 3:])
    torch.testing.assert_close(fitted.log_prob().value.double(), law.log_prob(observed), rtol=1e-5, atol=1e-5)
    gain = joint[:3, 3:] @ joint[3:, 3:].inverse()
    posterior = joint[:3, :3] - gain @ joint[3:, :3]
    centre = mean[:3] + (observed - mean[3:]) @ gain.T
    laws = fitted.marginals()
    for i, name in enumerate("abc"):
        torch.testing.assert_close(laws[name].loc.double(), centre[:, i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            laws[name].scale.double(), posterior[i, i].sqrt().expand(20), rtol=1e-4, atol=1e-5
        )
    # Only y observed: x is predicted, jointly with the rest.
    laws = fitted.marginals({"y": data["y"]})
    gain = joint[:4, 4:] / joint[4, 4]
    torch.testing.assert_close(
        laws["x"].loc.double(), mean[3] + (observed[:, 1] + 2) * gain[3, 0], rtol=1e-4, atol=1e-4
    )


def groups(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", n):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0).expand([n]))
        pyro.sample("x", dist.Normal(theta[..., None] * torch.ones(4), 0.5).to_event(1))


def test_a_thousand_groups_are_integrated_by_blocks():
    x = torch.randn(1000, 4)
    fitted = fit(groups, {"x": x}, Exact(), run=QUIET)
    # The mean of a group is sufficient: it is N(mu, 1 + 0.25 / 4).
    v, m = 1.0625, x.double().mean(-1)
    precision = 1 / 9 + 1000 / v
    assert float(fitted.marginals()["mu"].loc) == pytest.approx(float(m.sum() / v / precision), abs=1e-5)
    assert float(fitted.marginals()["mu"].scale) == pytest.approx(precision**-0.5, rel=1e-5)
    assert fitted.posterior(n=10)["theta"].shape == (10, 1000)


def kalman(x):
    z = torch.zeros(2)
    turn = torch.tensor([[0.9, 0.2], [-0.2, 0.9]])
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.MultivariateNormal(z @ turn.T, 0.1 * torch.eye(2)))
        pyro.sample(f"x_{t}", dist.Normal(z[..., 0], 0.5), obs=x[t])


def test_a_kalman_chain_equals_pyros_own():
    x = torch.randn(40)
    fitted = fit(kalman, None, Exact(), args=(x,), run=QUIET)
    # GaussianHMM moves once before it shows anything, so it starts where one move leads to the first state.
    turn = torch.tensor([[0.9, -0.2], [0.2, 0.9]])
    tiny = dist.MultivariateNormal(torch.zeros(2), 1e-8 * torch.eye(2))
    move = dist.MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
    seen = dist.MultivariateNormal(torch.zeros(1), 0.25 * torch.eye(1))
    hmm = dist.GaussianHMM(tiny, turn, move, torch.tensor([[1.0], [0.0]]), seen, duration=40)
    assert float(fitted.log_prob().value) == pytest.approx(float(hmm.log_prob(x[:, None])), abs=2e-3)


def test_conjugate_latents_are_integrated_each_on_its_own():
    def program(n):
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        with pyro.plate("kinds", 3, dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", n, dim=-1):
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("count", dist.Poisson(rate[kind]))

    kind, count = torch.tensor([0, 1, 2, 2, 1, 2]), torch.tensor([3.0, 0.0, 5.0, 2.0, 1.0, 4.0])
    fitted = fit(program, {"kind": kind, "count": count}, Exact(), run=QUIET)
    laws = fitted.marginals()
    torch.testing.assert_close(laws["weights"].concentration, torch.tensor([2.0, 4.0, 6.0]))
    torch.testing.assert_close(laws["rate"].concentration, torch.tensor([5.0, 3.0, 13.0]))
    torch.testing.assert_close(laws["rate"].rate, torch.tensor([2.0, 3.0, 4.0]))
    assert fitted.posterior(n=5)["rate"].shape == (5, 3)
    by_hand = torch.lgamma(torch.tensor([2.0, 4.0, 6.0])).sum() - torch.lgamma(torch.tensor(12.0))
    by_hand += torch.lgamma(torch.tensor(6.0)) - torch.lgamma(torch.tensor([1.0, 2.0, 3.0])).sum()
    for k, (a, b) in enumerate(((5.0, 2.0), (3.0, 3.0), (13.0, 4.0))):
        by_hand += math.lgamma(a) - a * math.log(b) - math.lgamma(2.0)
        by_hand -= torch.lgamma(count[kind == k] + 1).sum()
    assert float(fitted.log_prob().value) == pytest.approx(float(by_hand), abs=1e-4)


def test_local_conjugate_latents_answer_row_by_row():
    def program(n):
        with pyro.plate("data", n):
            p = pyro.sample("p", dist.Beta(torch.tensor([2.0, 1.0]), 3.0).to_event(1))
            pyro.sample("k", dist.Binomial(torch.tensor([5.0, 4.0]), p).to_event(1))

    k = torch.tensor([[1.0, 4.0], [5.0, 0.0], [2.0, 2.0]])
    fitted = fit(program, {"k": k}, Exact(), run=QUIET)
    a, total = torch.tensor([2.0, 1.0]), torch.tensor([5.0, 4.0])
    torch.testing.assert_close(
        fitted.log_prob().value, dist.BetaBinomial(a, torch.tensor([3.0, 3.0]), total).log_prob(k).sum(-1)
    )
    law = fitted.marginals()["p"]
    torch.testing.assert_close(law.base_dist.concentration1, a + k)
    assert law.event_shape == (2,)


# --- any evidence ----------------------------------------------------------------------------------------


def test_sites_that_no_evidence_bears_upon_are_predicted():
    fitted = fit(mixture, None, Exact(), run=QUIET)
    torch.testing.assert_close(fitted.marginals()["k"].probs.flatten(), WEIGHTS)
    draws = fitted.posterior({"k": torch.tensor([0, 2])}, n=10_000, seed=3)["x"]
    error = 5.5 / math.sqrt(10_000)  # of a mean with unit standard deviation: two-sided 4e-8 each
    assert (draws.mean(0) - MEANS[[0, 2]]).abs().max() < error
    assert float(fitted.log_prob({"k": torch.tensor([0, 2])}).value.sum()) == pytest.approx(
        math.log(0.1), abs=1e-5
    )


def test_what_is_impossible_has_no_posterior():
    def program():
        a = pyro.sample("a", dist.Categorical(logits=torch.tensor([0.0, 0.0])))
        table = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
        pyro.sample("b", dist.Categorical(logits=table[a]))

    fitted = fit(program, None, Exact(), run=QUIET)
    evidence = {"b": torch.tensor(2)}
    assert fitted.log_prob(evidence).value == -math.inf
    with pytest.raises(DataError, match="have probability zero"):
        fitted.marginals(evidence)


# --- refusals --------------------------------------------------------------------------------------------


def neural(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.tanh(z), 0.1))


def not_conjugate(n):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Bernoulli(p**2))


def logistic(n):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Bernoulli(logits=w))


def both(n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(mu * k, 1.0))


def heavy(n):
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(0.0, s))


def branching(n):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    loc = 1.0 if k > 0 else -1.0
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(loc, 1.0))


def coupled(n):
    with pyro.plate("rows", 12, dim=-1):
        a = pyro.sample("a", dist.Bernoulli(0.5))
    with pyro.plate("columns", 9, dim=-2):
        b = pyro.sample("b", dist.Bernoulli(0.5))
    with pyro.plate("rows", 12, dim=-1), pyro.plate("columns", 9, dim=-2):
        pyro.sample("x", dist.Normal(a * b, 1.0), obs=torch.zeros(9, 12))


def undeclared(n):
    k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(3)))
    pyro.sample("x", dist.Normal(k.sum(), 1.0))


REFUSED = {
    "logistic": (logistic, "x", "a Gaussian law"),
    "mixed": (both, "mu", "a finite support"),
    "heavy": (heavy, "s", "a law that can be integrated"),
    "branching": (branching, "k", "uses that stay in torch"),
    "coupled": (coupled, "a", "a sum of bearable size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_site_and_what_it_lacks(case):
    program, site, missing = REFUSED[case]
    data = None if program is coupled else {"x": X.round().clamp(0, 1)}
    kwargs = {"n": 3} if program is coupled else None
    answer = Exact().examine(structure_of(program, data, kwargs=kwargs))
    assert not isinstance(answer, Offer)
    assert (answer.site, answer.missing) == (site, missing)


@pytest.mark.parametrize(
    ("program", "site", "missing"),
    [
        (neural, "z", "a Gaussian posterior"),
        (not_conjugate, "p", "a conjugate likelihood"),
        (undeclared, "k", "a plate around its batch dimensions"),
    ],
)
def test_what_only_looks_exact_is_refused_by_the_numbers(program, site, missing):
    data = {"x": torch.tensor(1.0) if program is undeclared else X.round().clamp(0, 1)}
    with pytest.raises(Refused) as caught:
        fit(program, data, Exact(), run=QUIET, kwargs={"n": 3} if program is undeclared else None)
    assert (caught.value.refusal.site, caught.value.refusal.missing) == (site, missing)


def test_a_program_that_indexes_lists_is_refused_with_its_line():
    def program():
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal([0.0, 1.0, 2.0][z], 1.0), obs=torch.tensor(1.0))

    answer = Exact().examine(structure_of(program))
    assert answer.site == "z"
    assert "test_exact.py:" in answer.why


@pytest.mark.parametrize("options", [{"estimate": "mean"}, {"max_table": 0}])
def test_options_are_checked(options):
    with pytest.raises(OptionError, match=f"Exact\\({next(iter(options))}="):
        Exact(**options)


def test_hints_for_pyros_own_enumeration_change_nothing():
    plain = fit(mixture, {"x": X}, Exact(), run=QUIET).log_prob().value
    hinted = fit(config_enumerate(mixture), {"x": X}, Exact(), run=QUIET).log_prob().value
    torch.testing.assert_close(plain, hinted)


def test_points_are_set_in_free_coordinates():
    with At({"rate": torch.tensor(0.0)}):
        assert pyro.sample("rate", dist.Gamma(1.0, 1.0)) == 1.0
