"""Estimators for discrete draws against enumeration of every outcome of every particle, weighed.

So means *and variances* of the estimators are exact, and no test here can fail by chance.
"""

from itertools import product

import networkx as nx
import pytest
import torch

from pgen.algorithms import bounds, estimators
from pgen.algorithms.estimators import Term

# p: a, b(a), x(b), y(a).   q: a, b(a).   Each of a, b, x, y is 0 or 1.
OBSERVED = {"x": torch.tensor(1.0), "y": torch.tensor(0.0)}
PARENTS = {"a": (), "b": ("a",), "x": ("b",), "y": ("a",)}
GUIDE = nx.DiGraph([("a", "b")])
DEPENDS = {("p", n): (n, *parents) for n, parents in PARENTS.items()} | {
    ("q", "a"): ("a",),
    ("q", "b"): ("b", "a"),
}


def bernoulli(logit, value):
    return -torch.nn.functional.binary_cross_entropy_with_logits(
        logit.expand_as(value), value, reduction="none"
    )


def program_terms(a, b):
    one = torch.ones_like(a)
    return {
        "a": bernoulli(-0.6 * one, a),
        "b": bernoulli(0.8 - 1.5 * a, b),
        "x": bernoulli(-1.0 + 3.0 * b, OBSERVED["x"] * one),
        "y": bernoulli(0.4 + 2.0 * a, OBSERVED["y"] * one),
    }


def guide_terms(phi, a, b):
    return {"a": bernoulli(phi[0], a), "b": bernoulli(phi[1] + phi[2] * a, b)}


def phi_leaf():
    return torch.tensor([0.5, -0.3, 0.7], dtype=torch.float64, requires_grad=True)


def outcomes(particles):
    """Every joint outcome of a and b over the particles, `[outcomes, particles]` each."""
    table = torch.tensor(list(product((0.0, 1.0), repeat=2 * particles)), dtype=torch.float64)
    return table[:, :particles], table[:, particles:]


def moments(estimator, particles):
    """Exact mean and total variance of an estimator's gradient."""
    phi, gradients, chances = phi_leaf(), [], []
    for a, b in zip(*outcomes(particles), strict=True):
        chances.append(sum(guide_terms(phi, a, b).values()).sum().exp().detach())
        gradients.append(torch.autograd.grad(estimator(phi, a, b), phi)[0])
    gradient, chance = torch.stack(gradients), torch.stack(chances).unsqueeze(1)
    mean = (chance * gradient).sum(0)
    return mean, float((chance * (gradient - mean) ** 2).sum())


def exact_gradient(particles=1):
    """Of minus the expected bound over that many particles (1: the ELBO), by enumeration."""
    phi, total = phi_leaf(), 0.0
    for a, b in zip(*outcomes(particles), strict=True):
        q = sum(guide_terms(phi, a, b).values())
        total = total - q.sum().exp() * bounds.iwae(sum(program_terms(a, b).values()) - q).value_with_gradient
    return torch.autograd.grad(total, phi)[0]


@pytest.fixture(autouse=True)
def _differentiable_values(monkeypatch):
    """Enumeration differentiates the bound itself, which `Bound.value` is detached from."""
    monkeypatch.setattr(bounds.Bound, "value_with_gradient", property(lambda self: -self.loss), raising=False)


def plain(baseline=None, prune=False):
    """The score-function estimator of the ELBO, site by site, mean over particles."""

    def loss(phi, a, b):
        p, q = program_terms(a, b), guide_terms(phi, a, b)
        total = 0.0
        for site in q:
            terms = {("p", n): Term(-v, ("particles",)) for n, v in p.items()}
            terms |= {("q", n): Term(v, ("particles",)) for n, v in q.items()}
            keep = estimators.downstream(site, GUIDE, DEPENDS) if prune else set(terms)
            cost = estimators.local_cost([terms[n] for n in keep], ("particles",))
            total = total + estimators.score_function(
                q[site], cost, 0.0 if baseline is None else baseline(cost)
            ) / len(a)
        return total

    return loss


def vimco(phi, a, b):
    q = sum(guide_terms(phi, a, b).values())
    return estimators.vimco(sum(program_terms(a, b).values()) - q, q).loss


ELBO_ESTIMATORS = {
    "plain, 1 particle": (plain(), 1),
    "constant baseline, 1 particle": (plain(lambda cost: torch.tensor(1.8)), 1),
    "by structure, 1 particle": (plain(prune=True), 1),
    "plain, 2 particles": (plain(), 2),
    "leave-one-out, 2 particles": (plain(estimators.leave_one_out), 2),
    "leave-one-out and structure, 2 particles": (plain(estimators.leave_one_out, prune=True), 2),
}


@pytest.mark.parametrize("name", ELBO_ESTIMATORS)
def test_unbiased(name):
    mean, _ = moments(*ELBO_ESTIMATORS[name])
    torch.testing.assert_close(mean, exact_gradient(), rtol=0, atol=1e-12)


def test_each_device_lowers_the_variance():
    variance = {name: moments(*case)[1] for name, case in ELBO_ESTIMATORS.items()}
    assert variance["constant baseline, 1 particle"] < variance["plain, 1 particle"]
    assert variance["by structure, 1 particle"] < variance["plain, 1 particle"]
    assert (
        variance["leave-one-out, 2 particles"]
        < variance["plain, 2 particles"]
        < variance["plain, 1 particle"]
    )
    assert variance["leave-one-out and structure, 2 particles"] < variance["leave-one-out, 2 particles"]


def test_vimco_is_unbiased_and_steadier_than_the_plain_signal():
    def naive(phi, a, b):
        q = sum(guide_terms(phi, a, b).values())
        bound = bounds.iwae(sum(program_terms(a, b).values()) - q)
        return bound.loss + estimators.score_function(q, -bound.value)

    mean, variance = moments(vimco, 2)
    torch.testing.assert_close(mean, exact_gradient(2), rtol=0, atol=1e-12)
    plain_mean, plain_variance = moments(naive, 2)
    torch.testing.assert_close(plain_mean, mean)
    assert variance < 0.5 * plain_variance


def test_a_baseline_that_sees_the_draw_or_a_term_too_few_is_found_out():
    """Broken specimens: a baseline that includes the draw's own cost, and a term dropped that matters."""

    def own_cost(phi, a, b):
        return plain(lambda cost: cost.mean(0))(phi, a, b)

    def too_few(phi, a, b):
        p, q = program_terms(a, b), guide_terms(phi, a, b)
        return estimators.score_function(q["a"], q["a"] - p["a"] - p["y"]) + estimators.score_function(
            q["b"], q["b"] - p["x"]
        )

    for broken, particles in ((own_cost, 2), (too_few, 1)):
        assert (moments(broken, particles)[0] - exact_gradient()).abs().max() > 0.01


def test_what_a_draw_can_influence():
    assert estimators.downstream("a", GUIDE, DEPENDS) == set(DEPENDS)
    assert estimators.downstream("b", GUIDE, DEPENDS) == {("p", "b"), ("p", "x"), ("q", "b")}
    # drawn in the other order in the guide: a follows b, so b's draw reaches the terms of a as well
    assert estimators.downstream("b", nx.DiGraph([("b", "a")]), DEPENDS) == set(DEPENDS)


def test_a_local_draw_meets_the_cost_of_its_own_row_only():
    rows = Term(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), ("particles", "rows"))
    words = Term(torch.arange(24.0).reshape(4, 2, 3), ("words", "particles", "rows"))
    everywhere = Term(torch.tensor([10.0, 20.0]), ("particles",))
    cost = estimators.local_cost([rows, words, everywhere], ("particles", "rows"))
    torch.testing.assert_close(cost, rows.value + words.value.sum(0) + everywhere.value[:, None])
    torch.testing.assert_close(
        estimators.local_cost([rows, everywhere], ("particles",)), rows.value.sum(1) + everywhere.value
    )


def test_plates_lower_the_variance_by_the_number_of_rows_and_keep_the_mean():
    """Rows with one Bernoulli each, one shared logit: the whole cost is far noisier than that by row."""
    rows, logit = 4, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gain = torch.linspace(1, 2, rows, dtype=torch.float64)

    def exact():
        return torch.autograd.grad((logit.sigmoid() * gain).sum(), logit)[0]

    def gradients(by_row):
        for z in product((0.0, 1.0), repeat=rows):
            z = torch.tensor(z, dtype=torch.float64)
            log_q = bernoulli(logit, z)
            cost = Term(gain * z, ("rows",))
            cost = estimators.local_cost([cost], ("rows",) if by_row else ())
            yield (
                log_q.sum().exp().detach(),
                torch.autograd.grad(estimators.score_function(log_q, cost), logit)[0],
            )

    variance = {}
    for by_row in (True, False):
        chance, gradient = (torch.stack(v) for v in zip(*gradients(by_row), strict=True))
        torch.testing.assert_close((chance * gradient).sum(), exact())
        variance[by_row] = float((chance * (gradient - exact()) ** 2).sum())
    assert variance[True] < variance[False] / 4


def test_terms_align_by_name_and_refuse_to_lose_a_dimension():
    term = Term(torch.arange(6.0).reshape(2, 3), ("rows", "particles"))
    assert term.align(("particles", "words", "rows")).shape == (3, 1, 2)
    torch.testing.assert_close(term.align(("particles", "rows")), term.value.T)
    assert term.sum_to(("rows",)).dims == ("rows",)
    torch.testing.assert_close(term.sum_to(()).value, term.value.sum())
    with pytest.raises(ValueError, match="sum_to"):
        term.align(("rows",))


def test_the_moving_average_lags_one_step():
    average = torch.zeros(())
    for _ in range(200):
        average = estimators.moving_average(average, torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(average, torch.tensor(4.0))


def test_without_each_replaces_one_weight_by_the_geometric_mean_of_the_others():
    w = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(4):
        others = torch.cat([w[:k], w[k + 1 :]])
        expected = bounds.log_mean_exp(torch.cat([others, others.mean(0, keepdim=True)]))
        torch.testing.assert_close(estimators.without_each(w)[k], expected)
