"""What the tests of recording share: a function gives the same eager and recorded, in every respect that shows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.record import Recorded
from pgen.algorithms.record.tape import mapped


def leaves(tree: Any) -> list[Any]:
    """The leaves of a nested result, in order."""
    found: list[Any] = []
    mapped(tree, found.append)
    return found


def cloned(tree: Any) -> Any:
    """Arguments of which nothing is shared with others."""
    return mapped(tree, lambda x: x.detach().clone() if isinstance(x, Tensor) else x)


def same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Two nested results are equal to round-off, with their types, shapes and layout."""
    assert mapped(found, lambda _: None) == mapped(expected, lambda _: None)
    assert type(found) is type(expected)
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        assert one.stride() == other.stride() or one.numel() < 2, (one.stride(), other.stride())
        torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)


def check(fn: Any, *kinds: tuple[Any, ...], tolerance: float = 1e-6, **options: Any) -> Recorded:
    """The law: results, changes in place and random numbers are those of the function, in every call.

    Args:
        fn: a function.
        kinds: arguments of one call each; all are tried twice, so that each is also a replay.
        tolerance: of results.
        options: of `Recorded`.
    """
    twin = copy.deepcopy(fn)  # with tensors of its own
    fast = Recorded(fn, fallback=False, **options)
    for args in (*kinds, *kinds):
        mine, its = cloned(args), cloned(args)
        torch.manual_seed(7)
        expected = twin(*its)
        after = torch.get_rng_state()
        torch.manual_seed(7)
        found = fast(*mine)
        same(found, expected, tolerance)
        same(mine, its, tolerance)  # what was changed in place
        assert torch.equal(torch.get_rng_state(), after), "random numbers drawn"
        for leaf in leaves(found):
            assert not isinstance(leaf, Tensor) or not leaf.requires_grad
    for recording in fast.recordings.values():
        assert recording is not None
        assert recording.trouble is None, recording.trouble
    return fast
