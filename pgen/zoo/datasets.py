"""Real data sets: the digits of scikit-learn, and MNIST and its like from a folder of the user's."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgen.errors import DataError
from pgen.zoo.data import Data

DEBD = {"nltcs": 16, "plants": 69, "jester": 100, "accidents": 111, "mushrooms": 112, "dna": 180, "nips": 500}
"""Binary density-estimation benchmarks, and how many variables each has."""


def digits(folder: Path | None = None) -> Data:
    """Handwritten digits, 8x8 pixels of 17 grey levels 0..16, from scikit-learn: 1000/350/447 in order.

    Raises:
        DataError: scikit-learn is not installed.
    """
    pixels, _ = _digits()
    return _image_data(
        "digits", [{"x": p} for p in _in_order(pixels)], 17, (8, 8), "1,797 digits of 8x8 pixels"
    )


def digits_binary(folder: Path | None = None) -> Data:
    """The digits in black and white: 1 where the level is 8 or more."""
    pixels, _ = _digits()
    splits = [{"x": p} for p in _in_order((pixels >= 8).float())]
    return _image_data("digits-binary", splits, 2, (8, 8), "the digits in black and white")


def digits_labelled(folder: Path | None = None) -> Data:
    """The digits as an argument `x` in [0, 1] and their labels `y`, 0..9, to classify."""
    pixels, labels = _digits()
    parts = zip(_in_order(pixels / 16.0), _in_order(labels), strict=True)
    train, valid, test = ({"x": x, "y": y} for x, y in parts)
    text = "the digits and which digit each is"
    return Data(
        "digits-labelled",
        train,
        valid,
        test,
        "mass",
        (64,),
        image=(8, 8),
        description=text,
        licence=_SKLEARN,
        more={"classes": 10},
    )


def mnist(folder: Path | None = None) -> Data:
    """MNIST, 28x28 pixels of 256 levels, from the four idx files in `folder`: 50000/10000/10000.

    Raises:
        DataError: no folder was given, or a file is missing or damaged.
    """
    return _idx_images(
        "mnist", folder, "mnist", "70,000 handwritten digits", "CC BY-SA 3.0 (LeCun, Cortes, Burges)"
    )


def fashion_mnist(folder: Path | None = None) -> Data:
    """Fashion-MNIST, 28x28 pixels of 256 levels, from the four idx files in `folder`: 50000/10000/10000.

    Raises:
        DataError: no folder was given, or a file is missing or damaged.
    """
    return _idx_images(
        "fashion-mnist", folder, "fashion_mnist", "70,000 pictures of clothes", "MIT (Zalando)"
    )


def mnist_binary(folder: Path | None = None) -> Data:
    """MNIST, once binarised at random (Larochelle and Murray 2011), from `binarized_mnist.npz` in `folder`.

    Raises:
        DataError: no folder was given, or a file is missing or damaged.
    """
    arrays = _npz("mnist-binary", folder, "binarized_mnist/binarized_mnist.npz")
    splits = [{"x": torch.from_numpy(np.unpackbits(arrays[s], axis=1)).float()} for s in _SPLITS]
    text = "MNIST, binarised once at random"
    return _image_data("mnist-binary", splits, 2, (28, 28), text, "CC BY-SA 3.0 (LeCun, Cortes, Burges)")


def cifar10_subset(folder: Path | None = None) -> Data:
    """Colour photographs of ten kinds, 32x32 pixels of three channels, from `cifar10_jpeg_subset.npz`: 1800/200/500.

    `x` holds the channels one after the other, 3 x 32 x 32 levels. They were decoded from JPEG: likelihoods are not those
    of CIFAR-10.

    Raises:
        DataError: no folder was given, or the file is missing or damaged.
    """
    name, keys = "cifar10_subset/cifar10_jpeg_subset.npz", ("train_images", "test_images")
    arrays = _npz("cifar10-subset", folder, name, keys)
    train, test = (torch.from_numpy(arrays[k]).permute(0, 3, 1, 2).flatten(1).long() for k in keys)
    held = torch.arange(len(train)) % 10 == 0  # images are in the order of their kinds
    first, valid, last = ({"x": part} for part in (train[~held], train[held], test))
    text, size = "2,500 colour photographs of ten kinds, decoded from JPEG", (3 * 32 * 32,)
    return Data(
        "cifar10-subset",
        first,
        valid,
        last,
        "mass",
        size,
        256,
        (32, 32),
        description=text,
        licence="none stated",
    )


def debd(name: str) -> Callable[[Path | None], Data]:
    """The reader of one of the binary density-estimation benchmarks (`DEBD` lists them)."""

    def read(folder: Path | None = None) -> Data:
        arrays = _npz(f"debd-{name}", folder, f"debd/{name}.npz")
        train, valid, test = ({"x": torch.from_numpy(arrays[s]).float()} for s in _SPLITS)
        text = f"{DEBD[name]} binary variables (Lowd and Davis 2010, Van Haaren and Davis 2012)"
        size = (DEBD[name],)
        return Data(
            f"debd-{name}", train, valid, test, "mass", size, 2, description=text, licence="none stated"
        )

    read.__doc__ = f"Density-estimation benchmark {name!r}: {DEBD[name]} binary variables, from a folder."
    return read


_SPLITS = ("train", "valid", "test")
_SKLEARN = "BSD-3-Clause (scikit-learn), data CC BY 4.0 (Alpaydin and Kaynak, UCI)"


def _digits() -> tuple[Tensor, Tensor]:
    try:
        bunch = import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'pgen-ppl[data]'"
        ) from error
    return torch.from_numpy(bunch.data).long(), torch.from_numpy(bunch.target).long()


def _in_order(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The split of Tomczak (2022), without shuffling, so that figures can be compared."""
    train, valid, test = values.split([1000, 350, 447])
    return train, valid, test


def _image_data(
    name: str,
    splits: list[dict[str, Tensor]],
    levels: int,
    image: tuple[int, int],
    description: str,
    licence: str = _SKLEARN,
) -> Data:
    train, valid, test = splits
    pixels = (image[0] * image[1],)
    return Data(
        name, train, valid, test, "mass", pixels, levels, image, description=description, licence=licence
    )


def _idx_images(name: str, folder: Path | None, below: str, description: str, licence: str) -> Data:
    train = _idx(_find(name, folder, below, "train-images-idx3-ubyte.gz"))
    test = _idx(_find(name, folder, below, "t10k-images-idx3-ubyte.gz"))
    parts = (train[:50000], train[50000:], test)  # the last 10,000 of the training images are for validation
    splits = [{"x": torch.from_numpy(p.reshape(len(p), -1).copy())} for p in parts]
    return _image_data(name, splits, 256, (train.shape[1], train.shape[2]), description, licence)


def _find(name: str, folder: Path | None, below: str, file: str) -> Path:
    if folder is None:
        raise DataError(
            f"data set {name!r} is read from a folder of yours that holds {below}/{file}: --data-folder PATH"
        )
    places = [Path(folder) / below / file, Path(folder) / file]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise DataError(
            f"data set {name!r}: no file {places[0]} (nor {places[1]}); --data-folder names the folder it is "
            "in"
        )
    return found


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's idx format: two zeros, the type, the rank, the sizes, the values."""
    try:
        raw = gzip.decompress(path.read_bytes())
        rank = raw[3]
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        if raw[:3] != b"\x00\x00\x08" or len(raw) != 4 + 4 * rank + int(np.prod(shape)):
            raise ValueError(f"it says that it holds {shape} bytes and has {len(raw) - 4 - 4 * rank}")
    except (OSError, EOFError, zlib.error, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{path} is not a whole idx file of bytes: {error}") from error
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _npz(
    name: str, folder: Path | None, file: str, keys: tuple[str, ...] = _SPLITS
) -> Mapping[str, np.ndarray]:
    below, _, name_of_file = file.rpartition("/")
    path = _find(name, folder, below, name_of_file)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a whole npz file with arrays {', '.join(keys)}: {error}") from error
