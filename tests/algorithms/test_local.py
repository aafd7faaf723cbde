"""Discrete moves by the terms of a density: exact matrices on tiny models, laws of many chains, specimens that must fail."""

import functools
import itertools
import math

import pytest
import torch

from pgen.algorithms.kernels import gibbs, local
from pgen.algorithms.kernels.gibbs import GibbsWithGradients
from pgen.algorithms.kernels.local import LocalGibbs
from pgen.algorithms.record import record
from pgen.testing.statistics import StatisticalFailure, assert_frequencies

CHAINS = 10_000


class Model:
    """Random tables, one for each scope, over a few variables: the log density is their sum."""

    def __init__(self, sizes, scopes, seed=0):
        source = torch.Generator().manual_seed(seed)
        self.sizes, self.scopes = sizes, scopes
        self.tables = [
            1.5 * torch.randn([sizes[i] for i in scope], dtype=torch.float64, generator=source)
            for scope in scopes
        ]
        self.states = torch.tensor(list(itertools.product(*map(range, sizes))))
        self.law = self(None, self.states.unsqueeze(1)).sum((1, 2)).softmax(0)

    def __call__(self, q, z):
        found = [t[tuple(z[..., i] for i in s)] for t, s in zip(self.tables, self.scopes, strict=True)]
        return torch.stack(found, -1)

    def code(self, z):
        return sum(c * math.prod(self.sizes[i + 1 :]) for i, c in enumerate(z.unbind(1)))

    def draw(self, n):
        return self.states[torch.multinomial(self.law, n, replacement=True)]

    def check(self, z, law=None):
        assert_frequencies(self.code(z), self.law if law is None else law)


SIZES, SCOPES = (2, 3, 2, 4, 3), ((0,), (0, 1), (1, 2), (2, 3), (3, 4), (4,))


@pytest.fixture
def chain():
    return Model(SIZES, SCOPES)


def run(kernel, z, target, sweeps, widths=None):
    state = kernel.init(z, target)
    for _ in range(sweeps):
        state, _ = kernel.sweep(state, widths, target)
    return state


# --- who is moved at once ---


@pytest.mark.parametrize(
    ("sizes", "scopes", "groups"),
    [
        ((2,) * 6, [(i, i + 1) for i in range(5)], 2),  # a chain
        ((2,) * 4, [(0, 1, 2, 3)], 4),  # all meet
        ((3,) * 5, [(i,) for i in range(5)], 1),  # none meet
        ((2, 3, 2, 3), [], 2),  # two kinds
        ((1, 2), [(0, 1)], 1),  # what has one value is not moved
    ],
)
def test_variables_of_one_group_share_no_term(sizes, scopes, groups):
    kernel = LocalGibbs(tuple(sizes), tuple(scopes))
    assert len(kernel.colours) == groups
    assert sorted(i for g in kernel.colours for i in g) == [i for i, k in enumerate(sizes) if k > 1]
    for group, scope in itertools.product(kernel.colours, scopes):
        assert len(set(group) & set(scope)) <= 1
        assert len({sizes[i] for i in group}) == 1


def test_a_chessboard_takes_two_colours():
    at = {(i, j): 20 * i + j for i in range(20) for j in range(20)}
    edges = [(at[i, j], at[i + a, j + b]) for i, j in at for a, b in ((0, 1), (1, 0)) if (i + a, j + b) in at]
    kernel = LocalGibbs((2,) * 400, tuple(edges))
    assert [len(g) for g in kernel.colours] == [200, 200]


# --- one tiny model, exactly ---


def matrices(model, scopes=SCOPES):
    """The transition matrix of each group's update, from its conditionals."""
    kernel, states = LocalGibbs(model.sizes, scopes), model.states
    conditionals = kernel.log_conditionals(kernel.init(states, model), model)
    found = []
    for group, log in zip(kernel.colours, conditionals, strict=True):
        others = [i for i in range(len(model.sizes)) if i not in group]
        alike = (states[:, None, others] == states[None, :, others]).all(-1)
        chances = [log[:, :, g].exp()[:, states[:, i]] for g, i in enumerate(group)]
        found.append(alike * torch.stack(chances).prod(0))
    return found


def test_every_group_is_in_detailed_balance(chain):
    for matrix in matrices(chain):
        flow = chain.law[:, None] * matrix
        torch.testing.assert_close(matrix.sum(1), torch.ones_like(chain.law))
        torch.testing.assert_close(flow, flow.T)


def test_a_scope_left_out_breaks_the_balance(chain):
    flows = [chain.law[:, None] * matrix for matrix in matrices(chain, tuple((s[0],) for s in SCOPES))]
    assert any((flow - flow.T).abs().max() > 1e-3 for flow in flows)


@pytest.mark.parametrize("start", [0, 7, 100])
def test_a_sweep_draws_from_the_product_of_the_matrices(chain, start):
    whole = functools.reduce(torch.matmul, matrices(chain))
    state = run(LocalGibbs(SIZES, SCOPES), chain.states[start].expand(CHAINS, -1), chain, 1)
    chain.check(state.position, whole[start] / whole[start].sum())
    torch.testing.assert_close(state.terms, chain(None, state.position.unsqueeze(1)).squeeze(1))


# --- many chains ---


@pytest.mark.parametrize("start", ["exact", "corner"])
@pytest.mark.parametrize("scopes", ["own", "all"])
def test_every_state_is_visited_as_often_as_it_should_be(chain, start, scopes):
    """To say that a term depends on more than it does costs time, and changes nothing."""
    named = SCOPES if scopes == "own" else ((0, 1, 2, 3, 4),) * len(SCOPES)
    z = chain.draw(CHAINS) if start == "exact" else torch.zeros(CHAINS, 5, dtype=torch.long)
    chain.check(run(LocalGibbs(SIZES, named), z, chain, 2 if start == "exact" else 15).position)


def test_impossible_values_are_left_and_never_entered():
    model = Model((3, 3), ((0, 1),))
    model.tables[0][0, 0], model.tables[0][2, 2] = -math.inf, math.nan
    law = model.tables[0].flatten().nan_to_num(nan=-math.inf).softmax(0)
    kernel = LocalGibbs((3, 3), ((0, 1),))
    start = torch.zeros(CHAINS, 2, dtype=torch.long)
    assert kernel.impossible(start, model(None, start.unsqueeze(1)).squeeze(1)).all()
    model.check(run(kernel, start, model, 15).position, law)


class Counts:
    """Two Poisson counts whose sum is favoured to be even; beyond 40 there is hardly anything."""

    rates = torch.tensor([0.8, 6.0], dtype=torch.float64)
    most = 40

    def __init__(self):
        n = torch.arange(self.most + 1)
        self.states = torch.cartesian_prod(n, n)
        self.law = self(None, self.states.unsqueeze(1)).sum((1, 2)).softmax(0)

    def __call__(self, q, z):
        own = z * self.rates.log() - torch.lgamma(z + 1.0)
        own = torch.where(z >= 0, own, -math.inf)
        return torch.cat([own, torch.where(z.sum(-1, keepdim=True) % 2 == 0, 1.0, 0.0)], -1)

    def draw(self, n):
        return self.states[torch.multinomial(self.law, n, replacement=True)]

    def check(self, z):
        assert_frequencies(z[:, 0] * (self.most + 1) + z[:, 1], self.law)


COUNTS = LocalGibbs((0, 0), ((0,), (1,), (0, 1)))


@pytest.mark.parametrize("widths", [(1.0, 1.0), (2.0, 7.5)])
@pytest.mark.parametrize("start", ["exact", "zero"])
def test_counts_without_an_end(widths, start):
    model = Counts()
    z = model.draw(CHAINS) if start == "exact" else torch.zeros(CHAINS, 2, dtype=torch.long)
    state = run(COUNTS, z, model, 4 if start == "exact" else 100, torch.tensor(widths))
    model.check(state.position)
    torch.testing.assert_close(state.terms, model(None, state.position.unsqueeze(1)).squeeze(1))


def test_acceptance_is_told_apart_for_each_count():
    model = Counts()
    state = COUNTS.init(model.draw(CHAINS), model)
    _, accept = COUNTS.sweep(state, torch.tensor([30.0, 1.0]), model)
    assert accept[0] < 0.2 < accept[1] < 0.95


def test_lists_and_counts_of_different_sizes_together():
    """A count whose rate a label chooses: the label is then a mixture's."""
    rates = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)

    def target(q, z):
        label, count = z[..., 0], z[..., 1]
        log = count * rates.log()[label] - rates[label] - torch.lgamma(count + 1.0)
        return torch.where(count >= 0, log, -math.inf).unsqueeze(-1)

    kernel = LocalGibbs((3, 0), ((0, 1),))
    label = torch.randint(3, (CHAINS,))
    start = torch.stack([label, torch.poisson(rates[label]).long()], 1)
    z = run(kernel, start, target, 5, torch.tensor([1.0, 3.0])).position
    assert_frequencies(z[:, 0], torch.ones(3) / 3, what="labels")
    n = torch.arange(40)
    law = (n * rates.log()[:, None] - rates[:, None] - torch.lgamma(n + 1.0)).exp().mean(0)
    assert_frequencies(z[:, 1], law / law.sum(), what="counts")


# --- specimens that must fail ---


def test_the_check_fails_where_a_scope_was_left_out(chain):
    blind = LocalGibbs(SIZES, tuple((s[0],) for s in SCOPES))
    with pytest.raises(StatisticalFailure):
        chain.check(run(blind, chain.draw(CHAINS), chain, 2).position)


def test_the_check_fails_stale_terms(chain):
    kernel = LocalGibbs(SIZES, SCOPES)
    state = kernel.init(chain.draw(CHAINS), chain)
    state = state._replace(terms=state.terms.flip(0))
    with pytest.raises(StatisticalFailure):
        chain.check(kernel.sweep(state, None, chain)[0].position)


def test_the_check_fails_steps_that_are_longer_upwards(monkeypatch):
    model, fair = Counts(), torch.sign
    monkeypatch.setattr(local.torch, "sign", lambda x: fair(x + 0.2))
    with pytest.raises(StatisticalFailure):
        model.check(run(COUNTS, model.draw(CHAINS), model, 4).position)


class Forgetful(GibbsWithGradients):
    """Leaves the probability of the way back out of its acceptance."""

    def step(self, state, tuning, target):
        values = max(self.cardinalities)
        logits = self._logits(state.position, state.gradient)
        pick = gibbs.pick_of(logits.exp())
        new = state.position.scatter(1, pick // values, pick % values)
        proposed = self.init(new, target)
        taken = torch.rand_like(state.log_density).log() < proposed.log_density - state.log_density
        return gibbs.where(taken, proposed, state), None


@pytest.mark.parametrize("kernel", [GibbsWithGradients, Forgetful])
def test_gradients_without_the_way_back_are_noticed(kernel):
    model = Model((3, 4), ((0, 1),), seed=3)

    def relaxed(x):
        x = x.detach().requires_grad_()
        value = torch.einsum("ci,cj,ij->c", x[:, 0, :3], x[:, 1], model.tables[0])
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    kernel = kernel((3, 4), dtype=torch.float64)
    state = kernel.init(model.draw(CHAINS), relaxed)
    for _ in range(5):
        state, _ = kernel.step(state, None, relaxed)
    if isinstance(kernel, Forgetful):
        with pytest.raises(StatisticalFailure):
            model.check(state.position)
    else:
        model.check(state.position)


# --- as programs ---


def test_recorded_sweeps_are_the_sweeps(chain):
    kernel, wrap = LocalGibbs(SIZES, SCOPES), functools.cache(record)
    state = kernel.init(torch.zeros(7, 5, dtype=torch.long), chain)
    for seed in range(3):
        torch.manual_seed(seed)
        expected, _ = kernel.sweep(state, None, chain, torch.zeros(7, 0))
        torch.manual_seed(seed)
        found, _ = kernel.sweep(state, None, chain, torch.zeros(7, 0), wrap)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)
        state = found


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LocalGibbs((), ()), "numbers of values"),
        (lambda: LocalGibbs((2, -1), ()), "at least 1"),
        (lambda: LocalGibbs((2, 2), ((0, 2),)), r"0\.\.1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
