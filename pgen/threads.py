"""How many threads to compute with: one, unless some operation is large enough to share.

torch hands parts of an operation to all threads from 32,768 elements on, which gains microseconds on an idle machine
and loses milliseconds on a busy one, where threads wait for each other at the end of every operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHARED = 2**24
"""Multiply-adds in one operation, about half a millisecond of one core, from which on it is shared."""

_ELEMENT = 16  # multiply-adds that an element costs where an operation reads it once
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "mv": 0, "addmv": 1, "dot": 0}


class Work(TorchDispatchMode):
    """Looks at operations on the CPU while it is active.

    Attributes:
        largest: multiply-adds of the largest one.

    Example:
        >>> with Work() as work:
        ...     product = torch.ones(100, 200) @ torch.ones(200, 300)
        >>> work.largest == 100 * 200 * 300
        True
        >>> work.threads(8)
        1
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping this mode for its compiler, the import of which takes a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = found if isinstance(found, (tuple, list)) else [found]
        tensors = [t for t in (*args, *given) if isinstance(t, Tensor) and t.device.type == "cpu"]
        if tensors:
            self.largest = max(self.largest, _cost(func._schema.name.partition("::")[2], args, tensors))
        return found

    def threads(self, available: int) -> int:
        """As many as there are, or one."""
        return available if self.largest >= SHARED else 1


def _cost(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> int:
    sizes = [t.numel() for t in tensors]
    if name in _PRODUCTS:
        return tensors[-1].numel() * args[_PRODUCTS[name]].shape[-1]
    if name.startswith(("convolution", "mkldnn_convolution", "_convolution")):
        backward = "backward" in name
        weight = args[2] if backward else args[1]
        return (args[0] if backward else tensors[-1]).numel() * (weight.numel() // weight.shape[0])
    if name.startswith(("linalg_", "_linalg_", "cholesky", "triangular_solve", "_scaled_dot_product")):
        return max(t.numel() * max(t.shape[-2:], default=1) for t in tensors)
    return _ELEMENT * max(sizes)


@contextmanager
def threads_restored() -> Iterator[int]:
    """Whatever number of threads is set inside, the present one holds again afterwards. Gives it."""
    before = torch.get_num_threads()
    try:
        yield before
    finally:
        use_threads(before)


def use_threads(number: int) -> None:
    """Compute with so many threads; costs nothing where that is so already."""
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
