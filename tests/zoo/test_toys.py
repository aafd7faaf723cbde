"""Toys: their densities integrate to one, and draws and entropies are those of the densities."""

import math

import pytest
import torch

from pgen.zoo import HMM, toys

ALL = [toys.ring(), toys.grid(), toys.moons(), toys.gaussians(), toys.checkerboard()]
STEP = {"ring": 0.005, "grid": 0.025, "moons": 0.025, "gaussians": 0.05, "checkerboard": 0.02}


def quadrature(toy):
    """Points of a fine grid over the toy's square, their log densities, and the area of a cell.

    For Gaussians the midpoint rule with steps of half a standard deviation is exact to 1e-30; for squares
    that
    the grid does not cut, exactly exact.
    """
    edge = STEP[toy.name] * math.ceil(toy.reach / STEP[toy.name])
    line = torch.arange(-edge, edge - 1e-9, STEP[toy.name], dtype=torch.float64) + STEP[toy.name] / 2
    density = []
    for rows in line.split(64):
        points = torch.cartesian_prod(rows, line)
        density.append(toy.log_prob(points))
    return torch.cat(density), STEP[toy.name] ** 2


@pytest.mark.parametrize("toy", ALL, ids=lambda toy: toy.name)
def test_densities_integrate_to_one_and_entropies_are_right(toy):
    log_density, area = quadrature(toy)
    assert float(log_density.exp().sum()) * area == pytest.approx(1.0, abs=1e-6)
    inside = log_density[log_density > -math.inf]
    entropy = -float((inside.exp() * inside).sum()) * area
    if toy.entropy is not None:
        assert toy.entropy == pytest.approx(entropy, abs=1e-5)
    # Draws cost, on average, the entropy: within 5 standard errors.
    scores = toy.log_prob(toy.sample(20_000, seed=0))
    assert scores.isfinite().all()
    assert -float(scores.mean()) == pytest.approx(
        entropy, abs=5 * float(scores.std()) / math.sqrt(20_000) + 1e-6
    )


def test_entropies_of_the_published_toys():
    assert toys.ring().entropy == pytest.approx(-4.293, abs=1e-3)
    assert toys.grid().entropy == pytest.approx(0.065, abs=1e-3)
    assert toys.checkerboard().entropy == pytest.approx(math.log(32))


def test_overlapping_gaussians_claim_no_closed_form():
    assert toys.ring(scale=0.1).entropy is None


def test_every_mode_gets_its_share():
    x = toys.ring().sample(8000, seed=1)
    sector = (torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi / 8)).round().long() % 8
    share = torch.bincount(sector, minlength=8) / 8000
    assert ((share - 1 / 8).abs() < 5.4 * math.sqrt(1 / 8 * 7 / 8 / 8000)).all()  # 8 modes at 1e-6 in all
    assert ((x.norm(dim=-1) - 1).abs() < 0.07).all()


def test_the_same_seed_gives_the_same_draws_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    toy = toys.checkerboard()
    assert torch.equal(toy.sample(10, seed=3), toy.sample(10, seed=3))
    assert not torch.equal(toy.sample(10, seed=3), toy.sample(10, seed=4))
    assert torch.equal(state, torch.get_rng_state())


def test_a_board_is_dark_where_it_says():
    board = toys.checkerboard().law
    light, dark = torch.tensor([-3.0, -1.0]), torch.tensor([-3.0, -3.0])
    assert float(board.log_prob(light)) == -math.inf
    assert float(board.log_prob(dark)) == pytest.approx(-math.log(32))
    assert float(board.log_prob(torch.tensor([5.0, 5.0]))) == -math.inf
    assert board.expand((3,)).sample((2,)).shape == (2, 3, 2)


def test_a_toy_is_a_data_set():
    data = toys.readers()["moons"](None)
    assert [len(s["x"]) for s in (data.train, data.valid, data.test)] == [10_000, 2_000, 5_000]
    assert (data.kind, data.features, data.event_shape) == ("density", 2, (2,))
    assert float(data.truth.log_prob(data.test["x"]).mean()) < 0
    assert not torch.equal(data.train["x"][:10], data.valid["x"][:10])


def test_sequences_are_those_of_a_hidden_markov_model_that_rarely_moves():
    data = toys.sequences()
    x = data.train["x"]
    assert x.shape == (1000, 12)
    assert torch.equal(x, toys.sequences().train["x"])
    assert data.options_for(HMM) == {"states": 3, "symbols": 5}
    # No state shows both 0 and 4, so one follows the other only after a move.
    after = x[:, 1:][x[:, :-1] == 0]
    assert float((after == 4).float().mean()) < 0.1 < float((after == 0).float().mean())
