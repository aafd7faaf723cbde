"""Discrete and mixed kernels against enumeration.

Chains are independent of each other, so their states after some steps are independent draws, and a chi-square test over
all states holds its stated rate (1e-6) however correlated successive states are. A chain that starts with an exact draw
must stay exact; one that starts elsewhere must get there.
"""

import itertools
import math

import pytest
import torch

from pgen.algorithms.kernels import gibbs, mixed
from pgen.algorithms.kernels.base import untuned
from pgen.algorithms.kernels.chees import ChEES
from pgen.algorithms.kernels.gibbs import Gibbs, GibbsWithGradients
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import MALA
from pgen.algorithms.kernels.mixed import Joint, Mixed
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.algorithms.record import record
from pgen.testing.statistics import (
    StatisticalFailure,
    assert_distribution,
    assert_frequencies,
    assert_moments,
)

CHAINS = 10_000  # notices an indicator off by a tenth of its standard deviation; see `draws_needed`
SIZES = (2, 3, 4)


class Table:
    """Any distribution over all combinations of a few variables."""

    def __init__(self, log_table):
        self.log_table, self.sizes = log_table, tuple(log_table.shape)
        self.law = log_table.flatten().softmax(0)

    def __call__(self, z):
        return self.log_table[tuple(z.unbind(1))]

    def relaxed(self, x):
        """The multilinear extension to one-hot codes, and its gradient."""
        x = x.detach().requires_grad_()
        value = self.log_table.expand(len(x), *self.sizes)
        for i, size in enumerate(self.sizes):
            value = (value * x[:, i, :size].reshape(len(x), size, *[1] * (value.dim() - 2))).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    def code(self, z):
        return sum(column * math.prod(self.sizes[i + 1 :]) for i, column in enumerate(z.unbind(1)))

    def draw(self, n):
        flat = torch.multinomial(self.law, n, replacement=True)
        return torch.stack(torch.unravel_index(flat, self.sizes), 1)

    def check(self, z, what="states"):
        assert_frequencies(self.code(z), self.law, what=what)


@pytest.fixture
def table():
    """One table for all seeds, so that what must fail fails for all of them."""
    source = torch.Generator().manual_seed(8)
    return Table(torch.randn(SIZES, dtype=torch.float64, generator=source))


def run(kernel, z, target, steps):
    state = kernel.init(z, target)
    for _ in range(steps):
        state, info = kernel.step(state, None, target)
    return state, info


KERNELS = {
    "systematic": Gibbs(SIZES),
    "random": Gibbs(SIZES, scan="random"),
    "blocks": Gibbs(SIZES, blocks=((0, 2), (1,))),
    "random overlapping blocks": Gibbs(SIZES, blocks=((2,), (1, 0), (0, 2)), scan="random"),
    "gradients": GibbsWithGradients(SIZES, moves=3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("start", ["exact", "corner"])
def test_every_state_is_visited_as_often_as_it_should_be(name, start, table):
    kernel = KERNELS[name]
    target = table.relaxed if name == "gradients" else table
    z = table.draw(CHAINS) if start == "exact" else torch.zeros(CHAINS, 3, dtype=torch.long)
    state, info = run(kernel, z, target, 3 if start == "exact" else 25)
    table.check(state.position)
    torch.testing.assert_close(state.log_density, table(state.position))
    torch.testing.assert_close(info.energy, -state.log_density)


def test_one_block_of_everything_draws_independently(table):
    kernel = Gibbs(SIZES, blocks=((0, 1, 2),))
    state, info = run(kernel, torch.zeros(CHAINS, 3, dtype=torch.long), table, 1)
    table.check(state.position)
    assert (info.evaluations == 23).all()


def test_a_sweep_is_the_product_of_conditionals():
    """From (0, 0): z0 by p(z0 | z1 = 0), then z1 by p(z1 | z0)."""
    log_table = 2 * torch.randn(3, 4, dtype=torch.float64)
    law = log_table[:, :1].softmax(0) * log_table.softmax(1)
    state, _ = run(Gibbs((3, 4)), torch.zeros(CHAINS, 2, dtype=torch.long), Table(log_table), 1)
    assert_frequencies(4 * state.position[:, 0] + state.position[:, 1], law.flatten())


def test_a_single_chain_fills_short_blocks_with_nothing():
    """Independent variables: a sweep is an independent draw, so one chain gives a sample."""
    table = Table(torch.randn(2, 1, dtype=torch.float64) + torch.randn(5, dtype=torch.float64))
    state = Gibbs((2, 5)).init(torch.zeros(1, 2, dtype=torch.long), table)
    kernel, seen = Gibbs((2, 5), scan="random"), []
    for _ in range(1500):
        state, _ = kernel.step(state, None, table)
        seen.append(state.position)
    table.check(torch.cat(seen))


def test_impossible_states_are_left_and_never_entered():
    log_table = torch.zeros(3, 3, dtype=torch.float64)
    log_table[0, 0], log_table[2, 2] = -math.inf, math.nan
    state, _ = run(Gibbs((3, 3)), torch.zeros(2000, 2, dtype=torch.long), Table(log_table), 5)
    law = torch.ones(3, 3, dtype=torch.float64)
    law[0, 0] = law[2, 2] = 0
    assert_frequencies(3 * state.position[:, 0] + state.position[:, 1], law.flatten() / 7)


def test_gradients_do_not_alternate_where_everything_is_accepted():
    """Without a proposal to stay, a fair coin would show heads at every even step."""
    table = Table(torch.zeros(2))
    state, _ = run(GibbsWithGradients((2,)), torch.zeros(CHAINS, 1, dtype=torch.long), table.relaxed, 3)
    table.check(state.position)


def test_any_proposal_is_right_whose_way_back_is_counted(table, monkeypatch):
    """Logits that have nothing to do with the target, and depend on where they start."""
    informed = GibbsWithGradients._logits

    def uneven(kernel, z, gradient):
        half = informed(kernel, z, gradient)
        return torch.where(half.isinf(), half, half.sin() * (1 + z.sum(1, keepdim=True)) / 2).log_softmax(1)

    monkeypatch.setattr(GibbsWithGradients, "_logits", uneven)
    state, _ = run(KERNELS["gradients"], table.draw(CHAINS), table.relaxed, 3)
    table.check(state.position)


# --- specimens that must fail ---


def test_the_check_fails_a_stale_density(table):
    state = Gibbs(SIZES).init(table.draw(CHAINS), table)
    state = state._replace(log_density=state.log_density.flip(0))
    state, _ = Gibbs(SIZES).step(state, None, table)
    with pytest.raises(StatisticalFailure):
        table.check(state.position)


def test_the_check_fails_an_uncorrected_proposal(table, monkeypatch):
    monkeypatch.setattr(gibbs, "gained", lambda new, old: torch.zeros_like(new))
    state, _ = run(KERNELS["gradients"], table.draw(CHAINS), table.relaxed, 3)
    with pytest.raises(StatisticalFailure):
        table.check(state.position)


def test_the_check_fails_a_corrected_proposal_that_accepts_too_much(table, monkeypatch):
    monkeypatch.setattr(gibbs, "gained", lambda new, old: new - old + 0.5)
    state, _ = run(KERNELS["gradients"], table.draw(CHAINS), table.relaxed, 3)
    with pytest.raises(StatisticalFailure):
        table.check(state.position)


# --- Ising ---


class Ising:
    """Spins on a 3 x 3 torus-free lattice, coupled, in a field: 512 states."""

    def __init__(self, coupling=0.4):
        places = list(itertools.product(range(3), range(3)))
        self.coupling = torch.zeros(9, 9, dtype=torch.float64)
        for i, j in itertools.combinations(range(9), 2):
            if abs(places[i][0] - places[j][0]) + abs(places[i][1] - places[j][1]) == 1:
                self.coupling[i, j] = self.coupling[j, i] = coupling
        self.field = torch.linspace(-0.3, 0.3, 9, dtype=torch.float64)
        self.states = torch.cartesian_prod(*[torch.arange(2)] * 9)
        self.law = self(self.states).softmax(0)

    def __call__(self, z):
        spin = 2.0 * z.double() - 1
        return ((spin @ self.coupling / 2 + self.field) * spin).sum(1)

    def relaxed(self, x):
        spin = x[:, :, 1] - x[:, :, 0]
        slope = spin @ self.coupling + self.field
        return ((slope + self.field) * spin).sum(1) / 2, torch.stack([-slope, slope], 2)


@pytest.mark.parametrize("gradients", [False, True])
def test_ising_states_and_marginals(gradients):
    model = Ising()
    start = torch.zeros(CHAINS, 9, dtype=torch.long)  # all down
    if gradients:
        state, info = run(GibbsWithGradients((2,) * 9, 5, torch.float64), start, model.relaxed, 30)
        assert info.accept.mean() > 0.6
    else:
        state, _ = run(Gibbs((2,) * 9), start, model, 25)
    code = (state.position * 2 ** torch.arange(8, -1, -1)).sum(1)
    assert_frequencies(code, model.law, what="all 512 states")
    up = (model.law.unsqueeze(1) * model.states).sum(0)
    assert_frequencies(state.position, torch.stack([1 - up, up], 1), what="marginals")


# --- mixed ---


class Mixture:
    """Five data, two components with unknown means and a normal prior: the posterior is a sum over 32 assignments."""

    weights = torch.tensor([0.35, 0.65], dtype=torch.float64)
    data = torch.tensor([-1.2, -0.4, 0.3, 1.1, 2.0], dtype=torch.float64)
    prior = 2.0

    def __init__(self):
        self.assignments = torch.cartesian_prod(*[torch.arange(2)] * 5)
        mean, variance = self.conditional(self.assignments)
        # p(z, y): complete the square in each mean
        self.law = (
            self.weights[self.assignments].log().sum(1)
            + (variance.log() + mean.square() / variance).sum(1) / 2
        ).softmax(0)

    def conditional(self, z):
        member = torch.nn.functional.one_hot(z, 2).double()
        variance = 1 / (member.sum(1) + self.prior**-2)
        return variance * (member * self.data[:, None]).sum(1), variance

    def __call__(self, q, z):
        distance = self.data - q.gather(1, z)
        density = self.weights[z].log().sum(1) - distance.square().sum(1) / 2
        density = density - (q / self.prior).square().sum(1) / 2
        gradient = torch.zeros_like(q).scatter_add(1, z, distance) - q / self.prior**2
        return density, gradient

    def relaxed(self, q, x):
        """Linear in the one-hot code, so the gradient is the contribution of each choice."""
        each = self.weights.log() - (self.data[:, None] - q[:, None]).square() / 2
        return (x * each).sum((1, 2)) - (q / self.prior).square().sum(1) / 2, each

    def draw(self, n):
        z = self.assignments[torch.multinomial(self.law, n, replacement=True)]
        mean, variance = self.conditional(z)
        return mean + variance.sqrt() * torch.randn(n, 2, dtype=torch.float64), z

    def check(self, q, z):
        """The law of z, and that of q given z, which together are the joint."""
        assert_frequencies((z * 2 ** torch.arange(4, -1, -1)).sum(1), self.law, what="assignments")
        mean, variance = self.conditional(z)
        score = (q - mean) / variance.sqrt()
        assert_distribution(score, torch.special.ndtr, what="means given assignments")
        assert_moments(score, 0.0, 1.0, what="means given assignments")


def run_mixed(kernel, start, target, steps, step_size=0.6):
    state = kernel.init(start, target)
    tuning = untuned(state.position, step_size)
    for _ in range(steps):
        state, info = kernel.step(state, tuning, target)
    return state, info


MIXED = {
    "mala, gibbs": Mixed(MALA(), Gibbs((2,) * 5)),
    "walk, gibbs by blocks": Mixed(RandomWalk(), Gibbs((2,) * 5, blocks=((0, 1), (2, 3, 4)))),
    "hmc, gibbs": Mixed(HMC(steps=4), Gibbs((2,) * 5, scan="random")),
    "nuts, gibbs": Mixed(NUTS(max_depth=3), Gibbs((2,) * 5)),
    "mala, gradients": Mixed(MALA(), GibbsWithGradients((2,) * 5, moves=3, dtype=torch.float64), sweeps=2),
}


@pytest.mark.parametrize("name", MIXED)
def test_exact_draws_of_the_mixture_stay_exact(name):
    model = Mixture()
    target = Joint(model, model.relaxed) if "gradients" in name else model
    state, info = run_mixed(MIXED[name], model.draw(CHAINS), target, 4)
    model.check(state.position, state.choices)
    assert (info.evaluations > 5).all()


def test_what_is_no_matter_of_the_density_is_kept():
    """ChEES counts its iterations, to jitter its trajectories."""
    model, kernel = Mixture(), Mixed(ChEES(), Gibbs((2,) * 5))
    state, _ = run_mixed(kernel, model.draw(10), model, 3)
    assert state.continuous.iteration == 3
    torch.testing.assert_close(state.continuous.log_density, model(state.position, state.choices)[0])


def test_the_mixture_is_found_from_afar():
    model = Mixture()
    q, z = torch.full((CHAINS, 2), 3.0, dtype=torch.float64), torch.zeros(CHAINS, 5, dtype=torch.long)
    state, _ = run_mixed(MIXED["mala, gibbs"], (q, z), model, 80, step_size=1.0)
    model.check(state.position, state.choices)


def test_the_check_fails_a_density_that_was_not_refreshed(monkeypatch):
    model = Mixture()
    monkeypatch.setattr(mixed, "refresh", lambda kernel, state, target: state)
    state, _ = run_mixed(MIXED["mala, gibbs"], model.draw(CHAINS), model, 5)
    with pytest.raises(StatisticalFailure):
        model.check(state.position, state.choices)


# --- as programs ---


@pytest.mark.parametrize("name", ["systematic", "random overlapping blocks", "gradients"])
def test_a_recorded_sweep_is_the_sweep(name, table):
    kernel, target = KERNELS[name], table
    if name == "gradients":  # plain operations
        field = torch.randn(3, 4, dtype=torch.float64)
        target = lambda x: ((x * field).sum((1, 2)), field.expand_as(x))  # noqa: E731
    state = kernel.init(torch.zeros(7, 3, dtype=torch.long), target)
    step = record(lambda state: kernel.step(state, None, target))
    for seed in range(4):
        torch.manual_seed(seed)
        expected = kernel.step(state, None, target)
        torch.manual_seed(seed)
        found = step(state)
        for a, b in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
            torch.testing.assert_close(a, b)
        state = found[0]
    assert step.obstacle is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gibbs(()), "cardinalities"),
        (lambda: Gibbs((2, 0)), "at least 1"),
        (lambda: Gibbs((2, 2), blocks=((0,),)), "block"),
        (lambda: Gibbs((2, 2), scan="snake"), "snake"),
        (lambda: GibbsWithGradients((2,), moves=0), "moves"),
        (lambda: Mixed(MALA(), Gibbs((2,)), sweeps=0), "sweeps"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()
