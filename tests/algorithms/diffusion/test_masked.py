"""Masked diffusion: the bound, the law that is drawn from, and what a wrong weight would do."""

import math
from itertools import pairwise, permutations

import pytest
import torch

from pgen.algorithms.diffusion import masked, masked_exact, masked_sample
from pgen.algorithms.diffusion.masked_views import (
    Cosine,
    Counts,
    EveryView,
    LogLinear,
    Orders,
    Times,
    along,
    every_set,
    spread,
)
from pgen.algorithms.diffusion.noise import Streams
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_mean, draws_needed
from tests.algorithms.diffusion.masked_laws import Chain

CHAIN = Chain.random(levels=3, places=5, seed=0)
X = CHAIN.every()
VIEWS = {
    "counts": Counts(2),
    "counts, each once": Counts(5),
    "orders": Orders(2),
    "times": Times(3),
    "times, cosine": Times(2, Cosine()),
}


class Stubborn:
    """Conditionals that contradict one another: no law has them all."""

    def __init__(self, levels, places, seed=1):
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        self.table = torch.randn(places, levels + 1, places, levels, **options)

    def __call__(self, tokens, rows):
        places = torch.arange(tokens.shape[1])
        return 0.7 * self.table[places, tokens].sum(1)


STUBBORN = Stubborn(3, 4)


def mean_over_orders(predict, tokens, levels, reduce):
    """By listing all orders."""
    found = []
    for order in permutations(range(tokens.shape[1])):
        rank = torch.empty(tokens.shape[1], dtype=torch.long)
        rank[list(order)] = torch.arange(tokens.shape[1])
        views = along(rank.expand_as(tokens), tokens.shape[1])
        found.append(masked.bound(predict, tokens, views, levels))
    return reduce(torch.stack(found))


# --- the bound ---


def test_with_the_true_conditionals_the_bound_is_the_log_probability():
    exact = CHAIN.log_prob(X)
    found = masked.bound(CHAIN.predict, X, EveryView()(X), 3)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    for _ in range(3):  # and so is every order, not only their mean
        order = masked.bound(CHAIN.predict, X, Orders(1)(X), 3)
        torch.testing.assert_close(order, exact, rtol=0, atol=1e-10)
    assert float(-(exact.exp() * found).sum()) == pytest.approx(CHAIN.entropy, abs=1e-9)


def test_listing_sets_is_listing_orders():
    x = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    bound = masked.bound(STUBBORN, x, EveryView()(x), 3)
    torch.testing.assert_close(bound, mean_over_orders(STUBBORN, x, 3, lambda f: f.mean(0)))
    law = masked_exact.log_law(STUBBORN, x, 3)
    torch.testing.assert_close(law, mean_over_orders(STUBBORN, x, 3, lambda f: f.logsumexp(0) - math.log(24)))
    assert (law > bound + 1e-3).all(), "a mean of logs is below the log of the mean"


def test_the_law_sums_to_one_however_the_conditionals_contradict_each_other():
    x = Chain(CHAIN.move, 4).every()
    assert float(masked_exact.log_law(STUBBORN, x, 3).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(masked.bound(STUBBORN, x, EveryView()(x), 3).exp().sum()) < 0.99


def drawn_bounds(views, x, repeats, predict=STUBBORN):
    """Independent draws of the bound of one value."""
    many = x.expand(repeats, -1)
    if isinstance(
        views, Counts | Times
    ):  # rows share a shift: one call for each is independent of the others
        return torch.stack([masked.bound(predict, x[None], views(x[None]), 3)[0] for _ in range(repeats)])
    return masked.bound(predict, many, views(many), 3)


@pytest.mark.parametrize("name", [n for n in VIEWS if "times" not in n])
def test_every_way_to_look_has_the_same_mean(name):
    torch.manual_seed(2)
    x = torch.tensor([0, 1, 2, 0])
    exact = masked.bound(STUBBORN, x[None], EveryView()(x[None]), 3)
    assert_mean(drawn_bounds(VIEWS[name], x, draws_needed(0.2)), exact[0], what=name)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_the_schedule_does_not_matter(schedule):
    """Times have no finite variance; so hold the mean weight of each set against its value instead."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    m, rate = schedule.masked(t), schedule.rate(t)
    for k in range(1, 6):
        mean = (rate * m**k * (1 - m) ** (5 - k)).mean()
        assert float(mean) == pytest.approx(1 / (k * math.comb(5, k)), rel=1e-4)


def test_times_are_like_the_formula():
    torch.manual_seed(3)
    x = torch.zeros(20_000, 6, dtype=torch.long)
    for schedule in (LogLinear(), Cosine()):
        views = Times(1, schedule)(x)
        count = views.hidden.sum(-1)
        assert (views.weight > 0).sum() == count.sum()
        assert views.weight.isfinite().all()
        # A place counts 1 / t where hidden, which happens with chance t; truncated so that a variance exists.
        share = torch.where(count >= 2, views.weight.amax(-1) * count, 0.0)[0]
        assert_mean(share, 5.0, what="sum over k = 2..6 of k times 1 / k")


def test_a_wrong_weight_is_seen():
    """1 / k in place of L / k: the mean is off by far more than chance."""
    torch.manual_seed(4)
    x = torch.tensor([0, 1, 2, 0])
    exact = masked.bound(STUBBORN, x[None], EveryView()(x[None]), 3)[0]

    def broken(views):
        return lambda tokens: masked.Views(views(tokens).hidden, views(tokens).weight / 4)

    draws = torch.stack(
        [masked.bound(STUBBORN, x[None], broken(Counts(4))(x[None]), 3)[0] for _ in range(400)]
    )
    with pytest.raises(StatisticalFailure):
        assert_mean(draws, exact)


def test_integrating_out_the_time_lowers_the_variance():
    torch.manual_seed(5)
    x = CHAIN.sample(400, torch.Generator().manual_seed(0))
    spreads = {}
    for name, views in (("times", Times(5)), ("counts", Counts(5)), ("orders", Orders(1))):
        draws = torch.stack([masked.bound(CHAIN.predict, x, views(x), 3) for _ in range(40)])
        spreads[name] = float(draws.var(0).mean())
    assert spreads["counts"] < spreads["times"] / 2
    assert spreads["orders"] < 1e-20


def test_the_gradient_of_the_mean_is_the_mean_of_the_gradients():
    torch.manual_seed(6)
    table = STUBBORN.table.clone().requires_grad_()
    x = torch.tensor([[0, 1, 2, 0]])

    def predict(tokens, rows):
        return 0.7 * table[torch.arange(4), tokens].sum(1)

    def gradient(views):
        return torch.autograd.grad(masked.bound(predict, x, views(x), 3).sum(), table)[0]

    exact = gradient(EveryView())
    moves = exact.abs() > 1e-12
    repeats = draws_needed(0.25, components=int(moves.sum()))
    draws = torch.stack([gradient(Counts(2))[moves] for _ in range(repeats)])
    assert_mean(draws, exact[moves], what="gradient")
    with pytest.raises(StatisticalFailure):
        assert_mean(draws, 0.5 * exact[moves])


# --- views ---


@pytest.mark.parametrize("views", [1, 3, 6, 7])
@pytest.mark.parametrize("rows", [1, 4])
def test_counts_are_spread_evenly(views, rows):
    hidden, weight = Counts(views)(torch.zeros(rows, 6, dtype=torch.long))
    assert hidden.shape == weight.shape == (views, rows, 6)
    count = hidden.sum(-1)
    assert ((count >= 1) & (count <= 6)).all()
    if views == 6:
        assert (count.sort(0).values == torch.arange(1, 7)[:, None]).all(), "each count once, in every row"
    points = spread(views, rows).flatten().sort().values
    torch.testing.assert_close(points.diff(), torch.full_like(points[1:], 1 / (views * rows)))


def test_each_row_alone_sees_all_times_equally_often():
    """The shift goes round: a row's first number is uniform, not always the same part of the interval."""
    torch.manual_seed(7)
    points = torch.stack([spread(1, 4)[0] for _ in range(4000)])
    assert_frequencies((points * 8).long(), torch.full((8,), 1 / 8))


def test_every_set_is_listed_once():
    sets = every_set(4, 4)
    assert len(set(map(tuple, sets.tolist()))) == 16
    with pytest.raises(ValueError, match="expected at most 12 places"):
        EveryView()(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("maker", [Counts, Times, Orders])
def test_no_views_are_an_error(maker):
    with pytest.raises(ValueError, match="expected 1 or more"):
        maker(0)


def test_impossible_levels_are_no_nan():
    """A network that rules a level out: minus infinity where it is scored, and no NaN anywhere else."""
    sure = torch.tensor([[0.0, -math.inf, 0.0]], dtype=torch.float64)

    def predict(tokens, rows):
        return sure.expand(*tokens.shape, 3)

    x = torch.tensor([[0, 2, 2, 0], [0, 1, 2, 0]])
    found = masked.bound(predict, x, EveryView()(x), 3)
    assert float(found[0]) == pytest.approx(-4 * math.log(2))
    assert float(found[1]) == -math.inf
    assert masked_exact.log_law(predict, x, 3).tolist() == pytest.approx([-4 * math.log(2), -math.inf])
    rank = torch.arange(4).expand(1000, -1)
    draws = masked_sample.reveal(
        predict, torch.zeros(1000, 4, dtype=torch.long), rank, torch.rand(1000, 4), 3
    )
    assert not (draws == 1).any()


# --- draws ---


def sample(predict, rows, places, levels, steps=None, schedule=None, known=None, tokens=None, seed=0):
    known = torch.zeros(rows, places, dtype=torch.bool) if known is None else known
    tokens = torch.zeros(rows, places, dtype=torch.long) if tokens is None else tokens
    return masked_sample.infilled(
        predict, tokens, known, Streams(seed, rows), levels, steps=steps, schedule=schedule or LogLinear()
    )


def test_draws_follow_the_law():
    strings = Chain(CHAIN.move, 4).every()
    law = masked_exact.log_law(STUBBORN, strings, 3).exp()
    index = sample(STUBBORN, 40_000, 4, 3) @ torch.tensor([27, 9, 3, 1])
    assert_frequencies(index, law)
    in_one_step = sample(STUBBORN, 40_000, 4, 3, steps=1) @ torch.tensor([27, 9, 3, 1])
    with pytest.raises(StatisticalFailure):
        assert_frequencies(in_one_step, law)


def ancestral_law(predict, levels, places, grid):
    """Exact, by a step of the reverse process at a time over all partly masked strings; m falls along the grid."""
    states = torch.cartesian_prod(*[torch.arange(levels + 1)] * places)
    numbers = (levels + 1) ** torch.arange(places - 1, -1, -1)
    mass = torch.zeros(len(states), dtype=torch.float64)
    mass[-1] = 1.0
    laws = predict(states, None).softmax(-1)
    for high, low in pairwise(grid):
        leave = (high - low) / high
        after = torch.zeros_like(mass)
        hidden = states == levels
        # [states, places, levels + 1]: what each place turns into
        stay = torch.nn.functional.one_hot(states, levels + 1).double()
        turn = torch.cat([leave * laws, torch.full((*states.shape, 1), 1 - leave).to(laws)], -1)
        each = torch.where(hidden[..., None], turn, stay)
        for number, target in enumerate(states):
            into = each[:, torch.arange(places), target].prod(-1)
            after[number] = (mass * into).sum()
        mass = after
    full = (states < levels).all(-1)
    return states[full] @ numbers, mass[full]


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()])
def test_steps_are_those_of_the_ancestral_sampler(schedule):
    predict = Stubborn(2, 3, seed=3)
    grid = schedule.masked(torch.tensor([1.0, 2 / 3, 1 / 3, 0.0], dtype=torch.float64))
    numbers, law = ancestral_law(predict, 2, 3, grid.tolist())
    assert float(law.sum()) == pytest.approx(1)
    found = sample(predict, 40_000, 3, 2, steps=3, schedule=schedule) @ torch.tensor([9, 3, 1])
    index = torch.searchsorted(numbers, found)
    assert torch.equal(numbers[index], found)
    assert_frequencies(index, law)


def test_a_fine_grid_costs_no_more_than_one_call_for_each_place():
    shown = []

    def counted(tokens, rows):
        shown.append(len(rows))
        return CHAIN.network(tokens)

    sample(counted, 50, 5, 3, steps=10_000)
    assert len(shown) <= 5
    shown.clear()
    sample(counted, 50, 5, 3, steps=2)
    assert len(shown) == 2
    assert sum(shown) <= 100


def test_infinitely_many_steps_are_one_place_at_a_time():
    known = torch.zeros(64, 5, dtype=torch.bool)
    known[:, 1] = True
    when = masked_sample.uniforms(Streams(0, 64), 0, 5)
    rank = masked_sample.ranks(when, known, None, LogLinear())
    assert torch.equal(rank.sort(-1).values, torch.arange(-1, 4).expand(64, -1))
    assert torch.equal(masked_sample.ranks(when, known, 2**20, Cosine()), rank)
    assert (masked_sample.ranks(when, known | True, 3, LogLinear()) == -1).all()


def test_what_is_known_stays_and_the_rest_follows_it():
    """Draws of the ends given the middle of a chain: its exact conditional law."""
    x = torch.tensor([0, 2, 1, 2, 0])
    known = torch.tensor([False, False, True, True, False])
    draws = sample(CHAIN.predict, 20_000, 5, 3, known=known.expand(20_000, -1), tokens=x.expand(20_000, -1))
    assert (draws[:, known] == x[known]).all()
    agree = (X[:, known] == x[known]).all(-1)
    joint = CHAIN.log_prob(X[agree]).softmax(0)
    assert_frequencies(draws[:, ~known] @ torch.tensor([9, 3, 1]), joint)


def test_a_row_is_the_same_beside_any_others():
    few, many = sample(CHAIN.predict, 3, 5, 3), sample(CHAIN.predict, 200, 5, 3)
    assert torch.equal(few, many[:3])
    assert not torch.equal(few, sample(CHAIN.predict, 3, 5, 3, seed=1))


def test_nothing_to_draw():
    assert sample(CHAIN.predict, 0, 5, 3).shape == (0, 5)


def test_draws_from_the_ends_of_the_distribution_function():
    law = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64).log().expand(3, -1)
    assert masked_sample.drawn(law, torch.tensor([0.0, 0.75, 1.0]))[:2].tolist() == [1, 2]
    tiny = torch.tensor([[0.0, -1e4]])
    assert masked_sample.drawn(tiny, torch.tensor([1 - 1e-12], dtype=torch.float64)).item() == 0


# --- conditionals, and work in parts ---


def test_conditionals_are_certain_where_known():
    known = torch.tensor([True, False, True, False, False]).expand_as(X)
    found = masked.conditional_logits(CHAIN.predict, X, known, 3).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    shown = torch.nn.functional.one_hot(X, 3).double()
    assert torch.equal(found[known], shown[known])
    # by listing: the law of a place among strings that agree at the known ones
    row = X[100]
    agree = (X[:, known[0]] == row[known[0]]).all(-1)
    weight = CHAIN.log_prob(X).softmax(0) * agree
    exact = (weight[:, None, None] * shown).sum(0) / weight.sum()
    torch.testing.assert_close(found[100], exact)


def test_work_in_parts_is_the_same_work(monkeypatch):
    views = EveryView()(X)
    whole = masked.bound(CHAIN.predict, X, views, 3)
    monkeypatch.setattr(masked, "AT_ONCE", 1000)
    with torch.no_grad():
        torch.testing.assert_close(masked.bound(CHAIN.predict, X, views, 3), whole)
        torch.testing.assert_close(
            masked.predicted(CHAIN.predict, X, X[:, 0]), CHAIN.network(X).log_softmax(-1)
        )
