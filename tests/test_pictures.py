"""Pictures: files of the right size with the right pixels, and no global state."""

import matplotlib as mpl
import pytest
import torch

from pgen import pictures
from pgen.draws import Draws
from pgen.errors import DataError, PgenError

PNG = b"\x89PNG\r\n\x1a\n"


def test_image_grid(tmp_path):
    path = pictures.image_grid(torch.rand(23, 64), tmp_path / "a.png")
    assert path.read_bytes().startswith(PNG)
    pictures.image_grid(torch.rand(3, 4, 6), tmp_path / "b.png", columns=3)
    pictures.image_grid(torch.randint(0, 17, (3, 24)), tmp_path / "c.png", shape=(4, 6))


def test_tiles_keep_their_pixels():
    images = torch.arange(3 * 4, dtype=torch.float).view(3, 2, 2)
    board = pictures._tiled(images, columns=2)
    assert board.shape == (6, 6)
    assert torch.equal(board[:2, :2], images[0])
    assert torch.equal(board[:2, 3:5], images[1])
    assert torch.equal(board[3:5, :2], images[2])


def test_colours_are_kept_and_what_is_empty_is_white(tmp_path):
    images = torch.rand(3, 3, 4, 5)
    board = pictures._tiled(pictures._as_images(images, None), columns=2)
    assert board.shape == (10, 12, 3)
    assert torch.equal(board[:4, 6:11], images[1].movedim(0, -1))
    assert float(board[5:, 6:].min()) == 1.0
    assert pictures.image_grid(images * 3 - 1, tmp_path / "a.png").read_bytes().startswith(PNG)


def test_compare_images_loss_curve_and_scatter(tmp_path):
    rows = {"data": torch.rand(16, 64), "a fit": torch.rand(4, 64)}
    assert pictures.compare_images(rows, tmp_path / "a.png").read_bytes().startswith(PNG)
    history = {"step": [10, 20, 30], "loss": [3.0, 2.0, 1.0], "valid": [3.0, 2.5]}
    assert pictures.loss_curve(history, tmp_path / "b.png").read_bytes().startswith(PNG)
    points = {"data": torch.randn(50, 2), "draws": torch.randn(50, 2)}
    assert pictures.scatter(points, tmp_path / "c.png").read_bytes().startswith(PNG)


def test_no_backend_is_chosen_for_the_user(tmp_path):
    before = dict(mpl.rcParams)
    pictures.image_grid(torch.rand(3, 64), tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match=r"expected images \[n, H, W\].*got \(3, 63\)"):
        pictures.image_grid(torch.rand(3, 63), tmp_path / "a.png")
    with pytest.raises(DataError, match="nothing to draw"):
        pictures.compare_images({}, tmp_path / "a.png")
    with pytest.raises(DataError, match="no finite number"):
        pictures.loss_curve({"loss": [float("nan")]}, tmp_path / "a.png")
    with pytest.raises(DataError, match=r"'x' of shape \(3, 4\)"):
        pictures.scatter({"x": torch.rand(3, 4)}, tmp_path / "a.png")


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(pictures, "import_module", missing)
    with pytest.raises(PgenError, match=r"pip install 'pgen-ppl\[plots\]'"):
        pictures.image_grid(torch.rand(3, 64), tmp_path / "a.png")


def markov(n=400, **stats):
    flags = torch.rand(n) < 0.1
    return Draws(
        {"mu": torch.randn(n), "theta": torch.randn(n, 14)}, chains=4, stats={"diverging": flags, **stats}
    )


def test_pictures_of_chains(tmp_path):
    draws = markov(energy=torch.randn(400))
    assert pictures.traces(draws, tmp_path / "a.png").read_bytes().startswith(PNG)
    assert pictures.traces(draws, tmp_path / "b.png", ["mu", "theta[13]"]).read_bytes().startswith(PNG)
    assert pictures.pairs(draws, tmp_path / "c.png").read_bytes().startswith(PNG)
    assert pictures.pairs(Draws({"z": torch.randn(30, 2)}), tmp_path / "d.png", ["z"]).exists()
    assert pictures.energies(draws, tmp_path / "e.png").read_bytes().startswith(PNG)
    many = Draws({"mu": torch.randn(20 * 60)}, chains=60)
    assert pictures.traces(many, tmp_path / "f.png").exists()


def test_scalars_are_found_by_name():
    draws = markov()
    found = pictures._scalars(draws, ["theta[3]", "mu"], most=6)
    assert torch.equal(found["theta[3]"].flatten(), draws["theta"][:, 3])
    assert list(pictures._scalars(draws, None, most=6)) != []
    with pytest.raises(DataError, match=r"no 'tau'; name 1 to 12 of the scalars.*theta \[14\]"):
        pictures._scalars(draws, ["tau"], most=6)
    with pytest.raises(DataError, match="14 scalars; name 1 to 12"):
        pictures._scalars(draws, ["theta"], most=6)


def test_energies_need_energies(tmp_path):
    with pytest.raises(DataError, match="the draws carry diverging, no energy"):
        pictures.energies(markov(), tmp_path / "a.png")


def test_pictures_of_many_draws_are_thin_and_keep_what_diverges(tmp_path, monkeypatch):
    drawn = []
    figure_of = pictures._empty_figure

    def watched(**size):
        figure = figure_of(**size)
        drawn.append(figure)
        return figure

    monkeypatch.setattr(pictures, "_empty_figure", watched)
    diverging = torch.zeros(51_200, dtype=torch.bool)
    diverging[[1, 777, 51_199]] = True
    draws = Draws({"a": torch.randn(51_200, 2)}, chains=4, stats={"diverging": diverging})
    pictures.pairs(draws, tmp_path / "p.png", ["a"])
    shown, bad = drawn[0].axes[2].collections
    assert 4000 <= len(shown.get_offsets()) <= 8000
    assert len(bad.get_offsets()) == 3
    pictures.traces(draws, tmp_path / "t.png", ["a"])
    for line in drawn[1].axes[0].lines:
        assert 1000 <= len(line.get_xdata()) <= 2000
        assert line.get_xdata()[-1] > 12_700  # of 12,800
