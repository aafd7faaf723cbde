"""Gradients of the variational objectives against enumeration of every outcome, weighed.

The backend's own terms, plates, baselines and scales are used; only the draws are given. So means are exact,
and no test here can fail by chance.
"""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pgen.algorithms import bounds
from pgen.backends.variational import objectives
from pgen.backends.variational.objectives import Baselines, Regularizer
from pgen.backends.variational.settle import couple, settle
from pgen.guides.proposal import users
from pgen.inspection import inspect_problem
from pgen.parameters import Parameters
from pgen.problem import Problem


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Program(nn.Module):
    """Per row: a, b given a, and observed x given b, y given a."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([-0.6, 0.8, -1.5, -1.0, 3.0]))

    def forward(self, n):
        t = self.theta
        with pyro.plate("rows", n):
            a = pyro.sample("a", dist.Bernoulli(logits=t[0]))
            b = pyro.sample("b", dist.Bernoulli(logits=t[1] + t[2] * a))
            pyro.sample("x", dist.Bernoulli(logits=t[3] + t[4] * b))
            pyro.sample("y", dist.Normal(a, 1.0))


class Guide(nn.Module):
    def __init__(self, draws=("a", "b")):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([0.5, -0.3, 0.7, 0.4]))
        self.draws = draws

    def forward(self, x, y):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=self.phi[0] + self.phi[3] * y))
            if "b" in self.draws:
                pyro.sample("b", dist.Bernoulli(logits=self.phi[1] + self.phi[2] * a - x))


DATA = {"x": torch.tensor([1.0, 0.0, 1.0]), "y": torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)}


class Bench:
    """A guide and a program coupled as the backend does it."""

    def __init__(self, guide, rows, analytic):
        data = {k: v[:rows].double() for k, v in DATA.items()}
        self.problem = Problem.of(Program(), data)
        structure, self.problem = inspect_problem(self.problem)
        proposal = users(guide, self.problem, structure)
        self.parameters = Parameters.of(self.problem, owners={"guide": guide})
        summed = tuple(s for s in structure.latents if s not in proposal.order)
        with self.parameters.installed():
            self.coupling = settle(
                couple(proposal, structure, summed), self.problem, analytic=analytic, particles=True
            )
        self.tensors = list(self.parameters.tensors.values())

    def gradient(self, loss):
        found = torch.autograd.grad(loss, self.tensors, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def lanes(self, problem, particles, outcome):
        rows = problem.rows
        values = outcome.reshape(particles, -1, rows)
        lanes = [dict(zip(self.coupling.order, v, strict=True)) for v in values]
        return self.coupling.follow(problem, self.coupling.redraw(problem, lanes, particles), particles)

    def outcomes(self, particles, rows):
        count = particles * len(self.coupling.order) * rows
        return torch.tensor(list(product((0.0, 1.0), repeat=count)))

    def chance(self, lanes):
        terms = self.coupling.guide_terms([lane.guide for lane in lanes])
        return sum(t.value.sum() for t in terms.values()).exp()

    def mean(self, loss_of, particles):
        """Exact mean gradient of an estimator, and the exact gradient of the mean of what it reports."""
        with self.parameters.installed():
            estimated, expected, value = 0.0, 0.0, 0.0
            for outcome in self.outcomes(particles, self.problem.rows):
                lanes = self.lanes(self.problem, particles, outcome)
                chance = self.chance(lanes)
                loss, _ = loss_of(lanes)
                estimated = estimated + chance.detach() * self.gradient(loss)
                lanes = self.lanes(self.problem, particles, outcome)
                expected = expected + self.chance(lanes) * self.exact(lanes, particles)
                value = value + chance.detach() * loss.detach()
        return estimated, self.gradient(expected), value, expected.detach()

    def exact(self, lanes, particles):
        """Minus the bound of this outcome from its log weights, differentiable: nothing clever."""
        program = sum(t.value for t in self.coupling.program_terms(lanes).values())
        guide = sum(t.value for t in self.coupling.guide_terms([lane.guide for lane in lanes]).values())
        log_w = (program - guide).reshape(particles, -1)
        return -bounds.log_mean_exp(log_w).mean() if self.particle_bound else -log_w.mean()

    particle_bound = False


def elbo_of(bench, **options):
    def loss_of(lanes):
        averages = {s: torch.tensor(0.4) for s in bench.coupling.scored}
        return objectives.elbo(
            bench.coupling, bench.problem, lanes, Regularizer(**options), Baselines(averages)
        )

    return loss_of


@pytest.mark.parametrize(
    ("particles", "rows", "analytic"),
    [(1, 1, False), (1, 2, True), (2, 1, False), (2, 1, True), (1, 3, False)],
)
def test_the_elbo_of_discrete_latents_is_unbiased(particles, rows, analytic):
    bench = Bench(Guide(), rows, analytic)
    assert bench.coupling.scored == ("a", "b")
    assert bench.coupling.analytic == (frozenset({"a", "b"}) if analytic else frozenset())
    estimated, exact, value, expected = bench.mean(elbo_of(bench), particles)
    torch.testing.assert_close(estimated, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_a_latent_that_is_left_to_the_program_is_summed_out():
    bench = Bench(Guide(draws=("a",)), 2, True)
    assert bench.coupling.summed == ("b",)
    estimated, exact, value, expected = bench.mean(elbo_of(bench), 2)
    torch.testing.assert_close(estimated, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    with bench.parameters.installed():  # and the sum is the sum
        (lane,) = bench.lanes(bench.problem, 1, torch.tensor([1.0, 0.0]))
        mine = bench.coupling.program_terms([lane])["summed out"].value
        full = Bench(Guide(), 2, False)
        both = [full.lanes(full.problem, 1, torch.tensor([1.0, 0.0, b, b])) for b in (0.0, 1.0)]
        terms = [full.coupling.program_terms(lanes) for lanes in both]
        torch.testing.assert_close(
            mine, torch.stack([t["b"].value + t["x"].value for t in terms]).logsumexp(0)
        )


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_bounds_of_several_particles_are_unbiased(alpha):
    bench = Bench(Guide(), 1, False)

    def exact(lanes, particles):
        program = sum(t.value for t in bench.coupling.program_terms(lanes).values())
        guide = sum(t.value for t in bench.coupling.guide_terms([lane.guide for lane in lanes]).values())
        return -bounds.power_mean((program - guide).reshape(particles, -1), 1 - alpha).mean()

    bench.exact = exact
    estimated, true, value, expected = bench.mean(
        lambda lanes: objectives.importance(bench.coupling, bench.problem, lanes, 2, alpha), 2
    )
    torch.testing.assert_close(estimated, true, rtol=0, atol=1e-12)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_the_cost_of_a_local_draw_is_that_of_its_own_row(monkeypatch):
    """With the plates forgotten the mean stays and the variance grows: why dimensions have names."""
    bench = Bench(Guide(), 2, False)

    def variance():
        with bench.parameters.installed():
            total, square = 0.0, 0.0
            for outcome in bench.outcomes(1, 2):
                lanes = bench.lanes(bench.problem, 1, outcome)
                chance = bench.chance(lanes).detach()
                gradient = bench.gradient(elbo_of(bench)(lanes)[0])
                total, square = total + chance * gradient, square + chance * gradient.square()
        return total, (square - total.square()).sum()

    mean, by_row = variance()
    local_cost = objectives.estimators.local_cost
    blurred = lambda terms, dims: local_cost(terms, ()).reshape([1] * len(dims))  # noqa: E731
    monkeypatch.setattr(objectives.estimators, "local_cost", blurred)
    same, whole = variance()
    torch.testing.assert_close(mean, same, rtol=0, atol=1e-12)
    assert by_row < 0.7 * whole


def test_terms_that_a_draw_cannot_influence_are_left_out():
    bench = Bench(Guide(), 1, False)
    depends = bench.coupling.depends()
    assert depends["p", "x"] == {"b"}
    assert depends["p", "y"] == {"a"}
    assert depends["q", "b"] == {"a", "b"}


def test_dropping_a_term_that_matters_is_found_out(monkeypatch):
    """The broken specimen: a cost without the likelihood of x."""
    bench = Bench(Guide(), 1, False)
    real = type(bench.coupling).depends
    broken = lambda self: {k: set() if k == ("p", "x") else v for k, v in real(self).items()}  # noqa: E731
    monkeypatch.setattr(type(bench.coupling), "depends", broken)
    estimated, exact, _, _ = bench.mean(elbo_of(bench), 1)
    assert (estimated - exact).abs().max() > 0.01


def test_beta_and_free_bits_reach_the_gradient_and_not_the_bound():
    bench = Bench(Guide(), 2, True)
    with bench.parameters.installed():
        lanes = bench.lanes(bench.problem, 1, torch.tensor([1.0, 0.0, 0.0, 1.0]))
        plain, metrics = objectives.elbo(bench.coupling, bench.problem, lanes, Regularizer())
        doubled, same = objectives.elbo(bench.coupling, bench.problem, lanes, Regularizer(beta=2.0))
        torch.testing.assert_close(doubled - plain, metrics["kl"])
        assert metrics == same
        free, _ = objectives.elbo(bench.coupling, bench.problem, lanes, Regularizer(floor=100.0))
        torch.testing.assert_close(free.detach(), plain.detach() - metrics["kl"] + 200.0)
        guide = dict(
            zip(
                bench.parameters.tensors,
                torch.autograd.grad(free, bench.tensors, allow_unused=True),
                strict=True,
            )
        )
        assert guide["guide.phi"] is None or not guide["guide.phi"].any()


class Smooth(nn.Module):
    """A shared weight, a latent vector per row, one observation."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, n):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.gain * z.sum(-1) + w, 0.5))


class SmoothGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.2))
        self.slope = nn.Parameter(torch.tensor([0.3, -0.1]))

    def forward(self, x):
        pyro.sample("w", dist.Normal(self.m, 0.4))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.unsqueeze(-1) * self.slope, 0.8).to_event(1))


def smooth(rows=6, analytic=True):
    guide = SmoothGuide()
    problem = Problem.of(Smooth(), {"x": torch.linspace(-1.0, 2.0, rows)})
    structure, problem = inspect_problem(problem)
    parameters = Parameters.of(problem, owners={"guide": guide})
    with parameters.installed():
        coupling = settle(
            couple(users(guide, problem, structure), structure, ()),
            problem,
            analytic=analytic,
            particles=True,
        )
    return problem, coupling, parameters


@pytest.mark.parametrize("objective", ["elbo", "elbo, sampled divergences", "iwae"])
def test_batches_are_right_in_the_mean(objective):
    """Over a partition into batches the mean loss and gradient is that of all rows, draws held the same."""
    problem, coupling, parameters = smooth(analytic="sampled" not in objective)
    tensors = list(parameters.tensors.values())
    torch.manual_seed(0)
    values = {"w": torch.randn(1, 1), "z": torch.randn(1, 6, 2)}

    def run(batch, index):
        lanes = [{"w": values["w"][0, 0], "z": values["z"][0, index]}]
        lanes = coupling.follow(batch, coupling.redraw(batch, lanes, 1), 1)
        if (
            objective == "iwae"
        ):  # with a latent that rows share, one particle is the ELBO, and linear in the batch
            loss, _ = objectives.importance(coupling, batch, lanes, 1, 0.0)
        else:
            loss, _ = objectives.elbo(coupling, batch, lanes, Regularizer())
        found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in found)])

    with parameters.installed():
        whole = run(problem, torch.arange(6))
        for parts in ([[0, 1], [2, 3], [4, 5]], [[5, 0, 2], [1, 3, 4]]):
            mean = torch.stack([run(problem.take(torch.tensor(p)), torch.tensor(p)) for p in parts]).mean(0)
            torch.testing.assert_close(mean, whole)


def test_a_batch_without_its_scale_is_not():
    """The broken specimen: a batch that takes itself for the whole counts the shared latent too often."""
    problem, coupling, parameters = smooth()
    with parameters.installed(), torch.no_grad():
        batch = problem.take(torch.tensor([0, 1]))
        (lane,) = coupling.weigh(batch, 1)
        right, _ = objectives.elbo(coupling, batch, [lane], Regularizer())
        alone = type(batch)(**{**vars(batch), "total": 2})
        wrong, _ = objectives.elbo(coupling, alone, [lane], Regularizer())
    assert (right - wrong).abs() > 0.01


def test_known_divergences_have_the_mean_of_sampled_ones():
    """And no variance: checked by Gauss-Hermite quadrature over the one-dimensional latent."""
    problem, coupling, parameters = smooth(rows=1)
    assert coupling.analytic == {"w", "z"}
    nodes = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    sampled = smooth(rows=1, analytic=False)[1]
    with parameters.installed(), torch.no_grad():

        def kl(c, w):
            lanes = c.follow(problem, c.redraw(problem, [{"w": w, "z": torch.zeros(1, 2)}], 1), 1)
            return objectives.elbo(c, problem, lanes, Regularizer())[1]["kl"]

        exact = kl(coupling, torch.tensor(0.0))
        z = torch.distributions.Normal(0.3 * 0 + torch.tensor([[-0.3, 0.1]]), 0.8)
        prior = torch.distributions.Normal(0.0, 1.0)
        expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.2, 0.4), prior)
        expected = expected + torch.distributions.kl_divergence(z, prior).sum()
        torch.testing.assert_close(exact, expected)
        drawn = torch.stack([kl(sampled, 0.2 + 0.4 * e) for e in nodes[:50]])
        assert drawn.std() > 0.1  # what the closed form spares


@pytest.mark.parametrize("vectorized", [True, False])
def test_dreg_gives_the_program_its_usual_gradient_and_the_guide_a_quieter_one(vectorized):
    """Against iwae at the same draws: equal for the program; for the guide, in the mean."""
    from dataclasses import replace

    problem, coupling, parameters = smooth(rows=3)
    coupling = replace(coupling, vectorized=vectorized, analytic=frozenset())
    tensors = parameters.tensors

    def gradients(loss):
        return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))

    with parameters.installed():
        torch.manual_seed(3)
        plain = gradients(objectives.importance(coupling, problem, coupling.weigh(problem, 4), 4, 0.0)[0])
        torch.manual_seed(3)
        loss, metrics = objectives.doubly(coupling, problem, 4, parameters.frozen().installed)
        doubly = gradients(loss)
        torch.testing.assert_close(loss.detach(), -metrics["bound"])
    torch.testing.assert_close(plain["gain"], doubly["gain"])
    assert (plain["guide.slope"] - doubly["guide.slope"]).abs().max() > 1e-3


def test_dreg_of_the_backend_is_dreg_of_the_algorithm():
    """Same draws, same log weights written out by hand."""
    from dataclasses import replace

    problem, coupling, parameters = smooth(rows=3)
    coupling = replace(coupling, analytic=frozenset())
    t = parameters.tensors
    with parameters.installed():
        torch.manual_seed(5)
        loss, _ = objectives.doubly(coupling, problem, 4, parameters.frozen().installed)
        mine = torch.autograd.grad(loss, [t["guide.m"], t["guide.slope"]])
    torch.manual_seed(5)
    x = problem.observations["x"]
    w_eps = torch.randn(4, 1)
    z_eps = torch.randn(4, 3, 2)
    m, slope = t["guide.m"], t["guide.slope"]
    w, z = m + 0.4 * w_eps, x[:, None] * slope + 0.8 * z_eps

    def log_weights(draws):
        w, z = draws
        normal = torch.distributions.Normal
        p = normal(0.0, 1.0).log_prob(w)[:, 0] + normal(0.0, 1.0).log_prob(z).sum((-1, -2))
        p = p + normal(t["gain"] * z.sum(-1) + w, 0.5).log_prob(x).sum(-1)
        q = normal(m.detach(), 0.4).log_prob(w)[:, 0]
        return p - q - normal(x[:, None] * slope.detach(), 0.8).log_prob(z).sum((-1, -2))

    theirs = torch.autograd.grad(bounds.dreg(log_weights, [w, z]).loss / 3, [m, slope])
    torch.testing.assert_close(mine, theirs)
