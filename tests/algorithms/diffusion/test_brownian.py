"""Virtual Brownian trees: the law of Brownian motion, one path whoever asks, rows with paths of their own."""

import math
from itertools import pairwise

import pytest
import torch

from pgen.algorithms.diffusion.brownian import BrownianTree, counted_normal
from pgen.algorithms.diffusion.noise import Streams

FLOAT = {"dtype": torch.float64}
Z = 4.9  # of a normal: a false alarm of 1e-6


def tree_of(rows=1000, event=(4,), low=0.01, high=100.0, tolerance=1e-2, seed=0, **options):
    like = torch.zeros(rows, *event, **FLOAT)
    return BrownianTree(Streams(seed, rows=rows), low, high, tolerance, like, **options)


def covariances(tree, times):
    """Of increments between neighbouring times, in units of their standard deviations: `[T - 1, T - 1]`."""
    times = [tree.nearest(t)[0] for t in times]
    steps = torch.stack([tree.increment(a, b).flatten() / (b - a).sqrt() for a, b in pairwise(times)])
    return steps @ steps.mT / steps.shape[1]


def is_brownian(tree, times):
    """Variances 1 and covariances 0 within what 4,000 numbers allow."""
    found, count = covariances(tree, times), tree._like.numel()
    off = (found - torch.eye(len(found), **FLOAT)).abs()
    return bool(
        (off.diagonal() < Z * math.sqrt(2 / count)).all() and (off.triu(1) < Z / math.sqrt(count)).all()
    )


TIMES = (0.01, 0.011, 0.05, 0.9, 1.0, 40.0, 100.0)


def test_increments_are_independent_with_the_variance_of_their_time():
    assert is_brownian(tree_of(), TIMES)


@pytest.mark.parametrize("fault", ["calm", "repeated"])
def test_the_check_sees_a_tree_that_is_wrong(fault, monkeypatch):
    normal = BrownianTree._normal

    def wrong(self, node, rows=None):
        if fault == "calm":  # bridges are straight lines
            return normal(self, node, rows) * (node == 0).unsqueeze(-1)
        return normal(self, torch.zeros_like(node), rows)  # every node draws the same

    monkeypatch.setattr(BrownianTree, "_normal", wrong)
    assert not is_brownian(tree_of(), TIMES)


def test_increments_add_up():
    tree = tree_of(rows=5)
    torch.testing.assert_close(
        tree.increment(0.02, 7.0), tree.increment(0.02, 0.3) + tree.increment(0.3, 7.0)
    )
    torch.testing.assert_close(tree.increment(7.0, 0.02), -tree.increment(0.02, 7.0))
    assert (tree(0.01) == 0).all()


def test_one_path_whoever_asks_in_whatever_order():
    times = [0.01, 0.02, 3.0, 0.5, 99.0, 100.0, 0.011]
    one, other = tree_of(rows=3), tree_of(rows=3)
    forth = [one(t) for t in times]
    back = [other(t) for t in reversed(times)][::-1]
    for a, b in zip(forth, back):
        assert torch.equal(a, b)


def test_rows_ask_at_times_of_their_own():
    tree, times = tree_of(rows=4), torch.tensor([0.01, 0.7, 8.0, 100.0], **FLOAT)
    every = tree(times)
    for i, t in enumerate(times):
        assert torch.equal(every[i], tree_of(rows=4)(float(t))[i])


def test_a_row_does_not_depend_on_how_many_there_are():
    many, few = tree_of(rows=200), tree_of(rows=3)
    assert torch.equal(many(0.37)[:3], few(0.37))
    like = torch.zeros(2, 4, **FLOAT)
    part = BrownianTree(Streams(0, rows=200).part(7, 2), 0.01, 100.0, 1e-2, like)
    assert torch.equal(many(0.37)[7:9], part(0.37))
    own = BrownianTree(Streams([5, 9], rows=2), 0.01, 100.0, 1e-2, like)
    swapped = BrownianTree(Streams([9, 5], rows=2), 0.01, 100.0, 1e-2, like)
    assert torch.equal(own(0.37), swapped(0.37).flip(0))


def test_other_seeds_rows_and_keys_are_other_motions():
    bound = Z / math.sqrt(4000)
    first = tree_of()(3.0).flatten() / math.sqrt(3)
    for other in (tree_of(seed=1), tree_of(key=1)):
        assert abs((first * other(3.0).flatten()).mean() / math.sqrt(3)) < bound
    rows = first.reshape(2, -1)
    assert abs((rows[0] * rows[1]).mean()) < Z / math.sqrt(2000)


@pytest.mark.parametrize("event", [(), (1,), (2, 3)])
def test_any_event_shape_and_dtype(event):
    like = torch.zeros(6, *event)
    value = BrownianTree(Streams(0, rows=6), 0.1, 1.0, 1e-2, like)(0.5)
    assert value.shape == like.shape
    assert value.dtype == like.dtype


def test_grid_is_as_fine_as_asked_for():
    tree = tree_of(tolerance=1e-3)
    for t in (0.0123, 1.7, 55.5):
        assert abs(float(tree.nearest(t)[0]) / t - 1) < 5.1e-4


def test_normal_numbers_from_a_counter_are_normal():
    drawn = counted_normal(torch.arange(1000), 201, torch.float64)
    assert drawn.shape == (1000, 201)
    sample = drawn.flatten().sort().values
    n = len(sample)
    below = torch.special.ndtr(sample)
    place = torch.arange(n, **FLOAT) / n
    distance = torch.maximum((below - place).abs(), (below - place - 1 / n).abs()).max()
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))  # Dvoretzky, Kiefer, Wolfowitz and Massart
    for a, b in (
        (drawn[:, 0], drawn[:, 1]),
        (drawn[:-1, 0], drawn[1:, 0]),
        (drawn[:, 2] ** 2 - 1, drawn[:, 3] ** 2 - 1),
    ):
        assert abs((a * b).mean()) < Z * (a * b).std() / math.sqrt(len(a))


def test_faults_are_named():
    like = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="0 < low"):
        BrownianTree(Streams(0, rows=2), 0.0, 1.0, 1e-2, like)
    with pytest.raises(ValueError, match="tolerance=2"):
        BrownianTree(Streams(0, rows=2), 0.1, 1.0, 2.0, like)
    with pytest.raises(ValueError, match="3 rows for 2"):
        BrownianTree(Streams(0, rows=3), 0.1, 1.0, 1e-2, like)
    with pytest.raises(ValueError, match=r"expected them from 0\.1 to 1"):
        BrownianTree(Streams(0, rows=2), 0.1, 1.0, 1e-2, like)(1.1)
