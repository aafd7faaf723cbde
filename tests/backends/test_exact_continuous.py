"""Gaussian and conjugate latents integrated exactly, against joint Gaussians and textbook updates."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.backends.exact import Exact
from pgen.fitting import fit
from pgen.handlers import Substitute
from pgen.problem import Problem
from pgen.run import Run

QUIET = Run(progress=False)


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


def test_missing_values_are_integrated_out():
    loadings = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, 0.7], [0.0, 1.0]])

    def factors(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.T, 0.5).to_event(1))

    x = torch.randn(4, 4)
    x[0, 1], x[1], x[2, :3] = math.nan, math.nan, math.nan
    values = fit(factors, {"x": x}, Exact(), run=QUIET).log_prob().value
    covariance = loadings @ loadings.T + 0.25 * torch.eye(4)
    for row, value in zip(x, values):
        seen = ~row.isnan()
        law = (
            dist.MultivariateNormal(torch.zeros(int(seen.sum())), covariance[seen][:, seen])
            if seen.any()
            else None
        )
        assert float(value) == pytest.approx(0.0 if law is None else float(law.log_prob(row[seen])), abs=1e-4)


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


# --- every arrangement of plates, against one dense Hessian -------------------------------------------------


DOUBLE = torch.float64
SCORES = torch.randn(4, 3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def normal(loc, scale: float):
    return dist.Normal(torch.as_tensor(loc, dtype=DOUBLE), torch.tensor(scale, dtype=DOUBLE))


def nested():
    mu = pyro.sample("mu", normal(0.0, 2.0))
    with pyro.plate("schools", 5, dim=-1):
        school = pyro.sample("school", normal(mu, 1.0))
        with pyro.plate("classes", 3, dim=-2):
            group = pyro.sample("group", normal(school, 0.5))
            with pyro.plate("pupils", 4, dim=-3):
                pyro.sample("score", normal(group + 0.1 * mu, 0.7), obs=SCORES)


def crossed():
    with pyro.plate("left", 5, dim=-1):
        u = pyro.sample("u", normal(0.0, 1.0))
    with pyro.plate("right", 3, dim=-2):
        v = pyro.sample("v", normal(0.3, 1.5))
        with pyro.plate("left again", 5, dim=-1):
            pyro.sample("y", normal(u - 2 * v, 1.0), obs=SCORES[0])


def hub():
    m = pyro.sample("m", normal(0.0, 1.0))
    for i in range(40):
        z = pyro.sample(f"z_{i}", normal(m * (0.1 * i), 1.0))
        pyro.sample(f"y_{i}", normal(z, 0.5), obs=SCORES.flatten()[i])


def events():
    w = pyro.sample(
        "w", dist.MultivariateNormal(torch.zeros(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE) + 0.5)
    )
    with pyro.plate("columns", 5, dim=-1):
        z = pyro.sample("z", normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("rows", 3, dim=-2):
            e = pyro.sample("e", normal(z.sum((-1, -2)), 0.3))
            pyro.sample("x", normal(z[..., 0, :].sum(-1) + w[..., 1, None, None] + e, 0.5), obs=SCORES[0])


def dense(program):
    """Evidence, and means and variances of all latents, from one Hessian over all of them."""
    problem = Problem.of(program)
    nodes = poutine.trace(problem).get_trace().nodes
    plain = [n for n, s in nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"]
    names = [n for n in plain if not nodes[n]["is_observed"]]
    shapes = [nodes[n]["value"].shape for n in names]
    sizes = [shape.numel() for shape in shapes]

    def density(flat):
        values = {n: v.reshape(shape) for n, v, shape in zip(names, flat.split(sizes), shapes)}
        return poutine.trace(Substitute(values)(problem)).get_trace().log_prob_sum()

    zero = torch.zeros(sum(sizes), dtype=DOUBLE, requires_grad=True)
    precision = -torch.autograd.functional.hessian(density, zero.detach())
    height = density(zero)
    slope = torch.autograd.grad(height, zero)[0]
    covariance = precision.inverse()
    mean = covariance @ slope
    volume = len(zero) * math.log(2 * math.pi) - torch.logdet(precision)
    evidence = height.detach() + 0.5 * (slope @ mean + volume)
    pairs = zip(names, mean.split(sizes), covariance.diagonal().split(sizes), shapes)
    return evidence, {n: (m.reshape(shape), v.reshape(shape)) for n, m, v, shape in pairs}


@pytest.mark.parametrize("program", [nested, crossed, hub, events])
def test_any_arrangement_of_plates_equals_the_dense_answer(program):
    evidence, moments = dense(program)
    fitted = fit(program, None, Exact(), run=QUIET)
    assert float(fitted.log_prob().value) == pytest.approx(float(evidence), abs=1e-9)
    laws, draws = fitted.marginals(), fitted.posterior(n=3)
    for name, (mean, variance) in moments.items():
        law = laws[name]
        assert law.batch_shape + law.event_shape == mean.shape
        assert draws[name].shape == (3, *mean.shape)
        law = law.base_dist if isinstance(law, dist.TransformedDistribution) else law
        torch.testing.assert_close(law.mean.reshape(mean.shape), mean)
        torch.testing.assert_close(law.variance.reshape(mean.shape), variance)
