"""Data as tensors: what is taken for one, and what is said of what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgen.errors import DataError

ONLY_OBSERVED = (
    "missing values are allowed only where they are observed as they are: obs=argument, or {'site': tensor}; a program "
    "that knows what to do about NaN is given it by kwargs={...}"
)


def as_tensor(key: str, value: Any) -> Tensor:
    """A tensor of real or whole numbers, one at least, from a tensor, an array, a series of a data frame, or numbers.

    Lists of Python's numbers take the default dtype, arrays keep theirs. None among numbers is NaN.

    Raises:
        DataError: it is none; the message says what it is and where.
    """
    if hasattr(value, "to_numpy"):  # a series of a data frame
        value = value.to_numpy()
    if isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, (np.ndarray, np.generic, int, float, bool, list, tuple)):
        value = _numbers(key, value) if isinstance(value, np.ndarray) else value
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"data {key!r}: {type(value).__name__} does not make a tensor ({error}); give numbers of one shape"
            ) from error
        if tensor.dtype is torch.float64 and not isinstance(value, (np.ndarray, np.generic)):
            tensor = tensor.to(torch.get_default_dtype())
    else:
        shown = f" {value!r}" if isinstance(value, str) else ""
        raise DataError(
            f"data {key!r} is {type(value).__name__}{shown}; expected a tensor, an array or numbers. What is not batched by rows "
            "goes into args=(...) or kwargs={...}"
        )
    if tensor.is_complex():
        raise DataError(
            f"data {key!r} is complex; expected real or whole numbers: give its parts, as torch.view_as_real does"
        )
    if tensor.layout is not torch.strided:
        raise DataError(f"data {key!r} is {tensor.layout}; expected a dense tensor: data.to_dense()")
    if tensor.numel() == 0:
        raise DataError(f"data {key!r} is empty (shape {tuple(tensor.shape)}); give at least one row")
    return tensor


def _numbers(key: str, array: np.ndarray) -> np.ndarray:
    """An array of numbers, from one of Python's objects too; what is missing there is NaN."""
    if array.dtype.kind in "biufc":
        return array
    if array.dtype.kind == "O":
        found = np.empty(array.shape)
        for at, each in np.ndenumerate(array):
            # pandas has a missing value of its own, which is equal to nothing, not even to be compared
            missing = each is None or type(each).__name__ == "NAType"
            if not missing and not isinstance(each, (int, float, np.number, np.bool_)):
                raise _no_number(key, at, each)
            found[at] = np.nan if missing else each
        return found
    raise (
        _no_number(key, (0,) * array.ndim, array.flat[0])
        if array.size
        else DataError(f"data {key!r} is empty")
    )


def _no_number(key: str, at: tuple[int, ...], value: Any) -> DataError:
    kind = "text" if isinstance(value, str) else type(value).__name__
    return DataError(
        f"data {key!r} holds {kind}, not numbers: {str(value)!r} at index {at}; number its values from 0 (pandas.factorize "
        "does), or leave this column out"
    )


def is_numbers(data: Any) -> bool:
    """Whether this is a list of numbers, which is one tensor, and not a list of tensors."""
    return isinstance(data, list) and all(isinstance(v, (int, float, bool)) for v in data)


def holed(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of those that hold NaN."""
    return frozenset(k for k, v in tensors.items() if v.is_floating_point() and bool(v.isnan().any()))


def not_finite(key: str, value: Tensor, role: str, hint: str) -> str:
    """What is wrong with a tensor of the data that holds numbers that are none, and where."""
    bad = (~torch.isfinite(value)).nonzero()
    return (
        f"data {key!r} (passed as {role}) has {len(bad)} of {value.numel()} values that are not finite, "
        f"the first at index {tuple(bad[0].tolist())}; {hint}"
    )


def shared_rows(tensors: Mapping[str, Tensor]) -> int | None:
    """The leading dimension that all tensors share; None where none has one.

    Raises:
        DataError: they disagree.
    """
    sizes = {k: v.shape[0] for k, v in tensors.items() if v.ndim}
    if len(set(sizes.values())) > 1:
        shapes = ", ".join(f"{k!r} {tuple(tensors[k].shape)}" for k in sizes)
        raise DataError(
            f"data tensors disagree on the number of rows: {shapes}; they must share the leading dimension. What is not "
            "batched by rows goes into args=(...) or kwargs={...}"
        )
    return next(iter(sizes.values()), None)
