"""Laws of training times: uniform each, even together; drawn by importance without bias."""

import pytest
import torch

from pgen.algorithms.diffusion import times
from pgen.algorithms.diffusion.times import Importance
from pgen.testing.statistics import StatisticalFailure, assert_distribution, assert_frequencies

ROWS = 8
BATCHES = 12_000  # for each row a distribution function off by 0.05 is noticed at 1e-6 both ways


def spread(name, batches):
    """Times of many batches, `[batches, rows]`."""
    if name == "antithetic":
        return torch.stack([times.antithetic(u) for u in torch.rand(batches, ROWS // 2)])
    if name == "stratified":
        return torch.stack([times.stratified(u) for u in torch.rand(batches, ROWS)])
    return torch.stack([times.lattice(u, ROWS) for u in torch.rand(batches)])


@pytest.mark.parametrize("name", ["antithetic", "lattice"])
def test_every_time_is_uniform_by_itself(name):
    assert_distribution(spread(name, BATCHES), lambda u: u)


def test_stratified_times_are_uniform_together():
    drawn = spread("stratified", BATCHES)
    pick = drawn.gather(1, torch.randint(ROWS, (BATCHES, 1)))
    assert_distribution(pick, lambda u: u)
    with pytest.raises(StatisticalFailure):  # a row has its own cell: rows must come in random order
        assert_distribution(drawn[:, :1], lambda u: u)


@pytest.mark.parametrize("name", ["stratified", "lattice"])
def test_every_cell_has_one_time(name):
    cells = (spread(name, 200) * ROWS).long().clamp(max=ROWS - 1)
    counts = torch.zeros(200, ROWS).scatter_add(1, cells, torch.ones(200, ROWS))
    assert ((counts - 1).abs().sum(1) <= 2).all()  # rounding may put a time on the other side of an edge
    assert (counts == 1).all(1).float().mean() > 0.95


@pytest.mark.parametrize(("name", "gain"), [("antithetic", 5.0), ("stratified", 30.0), ("lattice", 5.0)])
def test_means_over_a_batch_vary_less(name, gain):
    loss = lambda u: torch.exp(-2 * u)  # noqa: E731
    plain = loss(torch.rand(4000, ROWS)).mean(1).var()
    assert float(loss(spread(name, 4000)).mean(1).var()) < float(plain) / gain


def loss_of(u):
    return 0.1 + torch.exp(-0.5 * ((u - 0.2) / 0.05) ** 2)


def learned(rounds=60, cells=32):
    state = Importance.start(cells)
    for shift in torch.rand(rounds):
        u, _ = state.draw(times.lattice(shift, 512))
        state = state.update(u, loss_of(u))
    return state


def test_importance_begins_uniform():
    u = torch.rand(100)
    drawn, ratio = Importance.start().draw(u)
    torch.testing.assert_close(drawn, u, atol=1e-5, rtol=0)
    torch.testing.assert_close(ratio, torch.ones(100))


def test_importance_follows_the_root_mean_square_of_the_loss():
    state = learned()
    inner = (torch.arange(32 * 50).double() + 0.5) / (32 * 50)
    rms = loss_of(inner).square().reshape(32, 50).mean(1).sqrt()
    expected = 0.9 * rms / rms.mean() + 0.1
    assert (state.density().double() / expected - 1).abs().max() < 0.05


def test_importance_draws_from_its_density():
    state, n = learned(), 40_000
    drawn, ratio = state.draw(torch.rand(n))
    cells = (drawn * 32).long().clamp(max=31)
    assert_frequencies(cells, state.density() / 32)
    torch.testing.assert_close(ratio, 1 / state.density()[cells], rtol=1e-3, atol=0)


def test_importance_leaves_means_as_they_are_and_makes_them_vary_less():
    state = learned()
    even = (torch.arange(100_000) + 0.5) / 100_000
    u, ratio = state.draw(even)
    mean = loss_of(even.double()).mean()
    torch.testing.assert_close((ratio * loss_of(u)).double().mean(), mean, rtol=1e-3, atol=0)
    assert abs(float(loss_of(u).mean()) - float(mean)) > 0.05  # without the ratio it is not
    assert float((ratio * loss_of(u)).var()) < float(loss_of(even).var()) / 10


def test_cells_that_were_not_seen_are_believed_to_be_as_the_others():
    state = Importance.start(4).update(torch.tensor([0.1, 0.9]), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(state.density(), 0.9 * torch.tensor([0.5, 1.0, 1.0, 1.5]) + 0.1)


def test_importance_survives_losses_of_zero_and_keeps_its_state_to_itself():
    before = Importance.start(4)
    after = before.update(torch.rand(10), torch.zeros(10))
    assert torch.isfinite(after.density()).all()
    assert float(before.mass.sum()) == 0


def test_impossible_histograms_are_refused():
    with pytest.raises(ValueError, match="expected 1 or more cells"):
        Importance.start(0)
    with pytest.raises(ValueError, match="0 < share"):
        Importance.start(4, share=0.0)
