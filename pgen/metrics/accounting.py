"""Likelihood accounting: nats, bits per dimension, perplexity; and how a density becomes a mass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgen.errors import OptionError


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over rows and its standard error: how far another sample of rows would put it.

    Args:
        values: one number for each row, shape `[n]`.

    >>> mean_and_error(torch.tensor([1.0, 3.0]))
    (2.0, 1.0)
    """
    rows = values.numel()
    error = float(values.std() / math.sqrt(rows)) if rows > 1 else math.nan
    return float(values.mean()), error


def bits_per_dim(log_mass: Tensor, dims: int) -> Tensor:
    r"""Code length in bits for each scalar, $-\log P / (D \ln 2)$.

    Args:
        log_mass: log probability *mass*, in nats. A density has no code length: see `cell_log_mass`.
        dims: scalars D of one row.

    >>> bits_per_dim(torch.tensor(-64 * math.log(2.0)), 64)
    tensor(1.)
    """
    _check_dims(dims)
    return -log_mass / (dims * math.log(2.0))


def perplexity(log_mass: Tensor, tokens: int) -> Tensor:
    r"""Number of equally likely choices that would be as hard to guess, $\exp(-\log P / T)$.

    Args:
        log_mass: log probability mass of all tokens together, in nats.
        tokens: how many there are.

    >>> perplexity(torch.tensor(3 * math.log(1 / 7)), 3)
    tensor(7.0000)
    """
    _check_dims(tokens)
    return torch.exp(-log_mass / tokens)


def cell_log_mass(log_density: Tensor, dims: int, width: float) -> Tensor:
    r"""The log mass that a log density stands for in cells of a width, $\log p + D \log w$.

    Over draws uniform in the cell this is, on average, no more than the log mass of the cell (Theis et al.
    2016).

    Args:
        log_density: at a point of the cell, in nats.
        dims: scalars D of one row.
        width: of a cell, along every coordinate.
    """
    _check_dims(dims)
    if width <= 0:
        raise OptionError(f"cell_log_mass: width={width}; a cell has a positive width, e.g. 1 / 256")
    return log_density + dims * math.log(width)


def _check_dims(dims: int) -> None:
    if dims < 1:
        raise OptionError(f"a row has at least one scalar; got {dims}")
