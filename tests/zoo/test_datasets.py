"""Data sets: sizes, splits and values; files that are missing or damaged are named."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pgen.errors import DataError
from pgen.zoo import datasets, plugin
from pgen.zoo.data import Data


def shared():
    """The folder with real data, where there is one."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("PGEN_SHARED_DATA", beside))


def test_digits_are_split_in_order():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    data = datasets.digits()
    x = torch.cat([s["x"] for s in (data.train, data.valid, data.test)])
    assert [len(s["x"]) for s in (data.train, data.valid, data.test)] == [1000, 350, 447]
    assert torch.equal(x, torch.from_numpy(sklearn.data).long())
    assert (data.kind, data.levels, data.event_shape, data.image) == ("mass", 17, (64,), (8, 8))
    assert (int(x.min()), int(x.max())) == (0, 16)


def test_digits_in_black_and_white_and_with_labels():
    pytest.importorskip("sklearn")
    plain, binary, labelled = datasets.digits(), datasets.digits_binary(), datasets.digits_labelled()
    assert torch.equal(binary.train["x"], (plain.train["x"] >= 8).float())
    assert binary.levels == 2
    assert set(labelled.train) == {"x", "y"}
    assert float(labelled.train["x"].max()) == 1.0
    assert torch.equal(labelled.train["y"].unique(), torch.arange(10))


def test_options_are_those_that_the_maker_takes():
    pytest.importorskip("sklearn")
    programs = plugin.pgen_programs()
    digits = datasets.digits()
    assert digits.options_for(programs["vae"]) == {"features": 64, "levels": 17}
    assert digits.options_for(programs["ppca"]) == {"features": 64}
    assert digits.options_for(programs["causal-image"]) == {"levels": 17, "image": (8, 8)}
    assert datasets.digits_labelled().options_for(programs["logistic-regression"]) == {
        "features": 64,
        "classes": 10,
    }
    assert repr(digits) == "Data(digits: 1000/350/447 rows of x [64], a mass)"


def write_idx(path, array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.parametrize("below", ["mnist", "."])
def test_mnist_is_read_from_a_folder(tmp_path, below):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 2, 3), dtype=np.uint8) for n in (50_002, 4))
    write_idx(tmp_path / below / "train-images-idx3-ubyte.gz", train)
    write_idx(tmp_path / below / "t10k-images-idx3-ubyte.gz", test)
    data = datasets.mnist(tmp_path)
    assert [len(s["x"]) for s in (data.train, data.valid, data.test)] == [50_000, 2, 4]
    assert torch.equal(data.valid["x"], torch.from_numpy(train[50_000:].reshape(2, 6)))
    assert (data.levels, data.image, data.features) == (256, (2, 3), 6)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="'mnist' is read from a folder.*--data-folder"):
        datasets.mnist()
    with pytest.raises(DataError, match=r"no file .*mnist/train-images-idx3-ubyte.gz"):
        datasets.mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, np.zeros((3, 2, 2), np.uint8))
    whole = path.read_bytes()
    for damaged in (
        whole[:-9],
        b"no gzip at all",
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\x00"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a whole idx file"):
            datasets.mnist(tmp_path)
    (tmp_path / "nltcs.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="not a whole npz file"):
        datasets.debd("nltcs")(tmp_path)
    np.savez(tmp_path / "nltcs.npz", train=np.zeros((2, 16), np.uint8))
    with pytest.raises(DataError, match="not a whole npz file with arrays train, valid, test"):
        datasets.debd("nltcs")(tmp_path)


def test_a_pickle_in_an_npz_is_not_opened(tmp_path):
    arrays = {s: np.array([{"a": 1}], dtype=object) for s in ("train", "valid", "test")}
    np.savez(tmp_path / "nltcs.npz", allow_pickle=True, **arrays)
    with pytest.raises(DataError, match="not a whole npz file"):
        datasets.debd("nltcs")(tmp_path)


def test_colour_photographs_are_read_from_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (20, 3))
    with pytest.raises(DataError, match="no file"):
        datasets.cifar10_subset(tmp_path)
    np.savez(tmp_path / "cifar10_jpeg_subset.npz", train_images=train, test_images=test)
    data = datasets.cifar10_subset(tmp_path)
    assert [len(s["x"]) for s in (data.train, data.valid, data.test)] == [18, 2, 3]
    assert torch.equal(data.test["x"].reshape(3, 3, 32, 32)[1, 2], torch.from_numpy(test[1, :, :, 2]).long())
    assert torch.equal(data.valid["x"][1], torch.from_numpy(train[10]).permute(2, 0, 1).flatten().long())
    assert (data.levels, data.features, data.image) == (256, 3072, (32, 32))


@pytest.mark.parametrize("name", ["debd-nltcs", "debd-dna", "mnist-binary", "fashion-mnist"])
def test_real_files(name):
    folder = shared()
    if not folder.is_dir():
        pytest.skip("no folder of real data: set PGEN_SHARED_DATA to one that holds debd/ and mnist/")
    data = plugin.pgen_datasets()[name](folder)
    assert isinstance(data, Data)
    assert data.train["x"].shape[1:] == data.event_shape
    assert int(data.train["x"].max()) == data.levels - 1
    assert len(data.test["x"]) > 1000
