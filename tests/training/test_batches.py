"""Batches are pure functions of seed and step, and visit every row once per epoch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from pgen.problem import Problem
from pgen.training.batches import Batches, derive, forked, split


def _problem(rows):
    return Problem.of(lambda x: x, {"x": torch.arange(rows)})


def _rows(batch):
    return batch.inputs["x"].tolist()


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 60), size=st.integers(1, 70), seed=st.integers(0, 2**62))
def test_every_row_once_per_epoch_and_no_short_batch(rows, size, seed):
    batches = Batches(_problem(rows), size, seed)
    stream = [row for step in range(3 * rows // min(size, rows) + 1) for row in _rows(batches(step))]
    assert {len(_rows(batches(step))) for step in range(9)} == {min(size, rows)}
    for epoch in range(2):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_a_batch_depends_on_seed_and_step_alone():
    forwards, backwards = Batches(_problem(50), 8, 3), Batches(_problem(50), 8, 3)
    ahead = [_rows(forwards(step)) for step in range(40)]
    back = [_rows(backwards(step)) for step in reversed(range(40))]
    assert ahead == back[::-1]
    assert ahead != [_rows(Batches(_problem(50), 8, 4)(step)) for step in range(40)]
    aligned = Batches(_problem(48), 8, 3)
    assert [_rows(aligned(step)) for step in range(6)] != [_rows(aligned(step)) for step in range(6, 12)]
    assert _rows(Batches(_problem(50), 8, 3)(10**9)) is not None  # far steps cost nothing


def test_orders_of_past_epochs_are_forgotten():
    batches = Batches(_problem(50), 8, 3)
    for step in range(300):
        batches(step)
    assert len(batches._orders) <= 3


def test_some_rows_only():
    train, held = split(10, 0.3, seed=5)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(10))
    assert len(held) == 3
    assert [len(part) for part in split(2, 0.01, 0)] == [len(part) for part in split(2, 0.99, 0)] == [1, 1]
    batches = Batches(_problem(10), 3, 0, rows=train, total=7)
    assert {row for step in range(20) for row in _rows(batches(step))} == set(train.tolist())
    assert batches(0).total == 7
    part = replace(batches, rows=held)
    assert [row for batch in part.slices() for row in _rows(batch)] == held.tolist()
    assert Batches(_problem(10), 3, 0)(0).total == 10


def test_slices_cover_everything_in_order():
    assert [_rows(batch) for batch in Batches(_problem(5), 2, 0).slices()] == [[0, 1], [2, 3], [4]]
    assert [_rows(batch) for batch in Batches(_problem(5), 9, 0).slices()] == [[0, 1, 2, 3, 4]]


def test_a_data_set_read_by_index():
    class Squares(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return torch.tensor(i * i)

    squares = Batches(Problem.of(lambda x: x, Squares()), 4, 0)
    assert set(_rows(squares(0))) <= {i * i for i in range(10)}
    assert squares(0).rows == 4
    whole = Batches(Problem.of(lambda x: x, Squares()), 10, 0, dtype=torch.float64)
    assert _rows(whole(3)) == [i * i for i in range(10)]


def test_casting_leaves_integers_alone():
    problem = Problem.of(lambda x, y: x, {"x": torch.ones(4), "y": torch.arange(4)})
    for size in (2, 4):
        batch = Batches(problem, size, 0, dtype=torch.float64)(0)
        assert (batch.inputs["x"].dtype, batch.inputs["y"].dtype) == (torch.float64, torch.int64)


def test_seeds_of_different_purposes_differ():
    seeds = {
        derive(seed, *path)
        for seed in range(50)
        for path in [("step", 0), ("step", 1), ("order", 0), (0,), ("0",)]
    }
    assert len(seeds) == 250
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_come_back_as_they_were_even_from_an_error():
    before = torch.random.get_rng_state()

    def draw():
        with forked([torch.device("cpu")]) as generators:
            assert generators == [torch.default_generator]
            generators[0].manual_seed(1)
            raise RuntimeError(torch.randn(3))

    with pytest.raises(RuntimeError):
        draw()
    assert torch.equal(before, torch.random.get_rng_state())
