"""How marks pass through an operation of torch: which elements of its result come from which of its arguments.

Operations that only move data move masks the same way; pointwise ones join them; sums and products of matrices spread
them along the dimensions that they mix. For everything else each element comes from all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Marks = dict[str, "bool | Tensor"]  # label -> True (every element) or a mask shaped like the tensor
Before = Mapping[int, Marks]  # of the arguments, by id

_MOVES: dict[
    str, tuple[int, ...]
] = {  # operations that only move data, and the positions of the arguments that they move
    **dict.fromkeys(
        (
            "cat",
            "stack",
            "clone",
            "index",
            "index_select",
            "gather",
            "repeat",
            "flip",
            "roll",
            "masked_select",
        ),
        (0,),
    ),
    **dict.fromkeys(("constant_pad_nd", "_unsafe_view", "_reshape_copy", "take", "tril", "triu"), (0,)),
    **dict.fromkeys(("select_scatter", "slice_scatter"), (0, 1)),
    "index_put": (0, 2),
}
_REDUCES = {"sum", "mean", "prod", "logsumexp", "amax", "amin", "any", "all", "var", "std"}
_ALIKE = {  # pointwise, though not tagged so
    "_to_copy",
    "clone",
    "floor_divide",
    "log_sigmoid_forward",
    "binary_cross_entropy_with_logits",
}
_MIXES = {"_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort"}  # along one dimension


def passed_on(func: Any, args: Any, kwargs: Any, before: Before, result: Tensor) -> Marks:
    """The marks of a result."""
    name = func.overloadpacket.__name__
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if name in _MOVES:
        return _moved(func, args, kwargs, before, name, result)
    if is_pointwise(func) or (name in _ALIKE and result.shape == inputs[0].shape):
        return pointwise(inputs, before, result)
    spread = _spread(func, args, kwargs, name, result)
    if spread is None:
        return union(inputs, before)
    found: Marks = {}
    for t in inputs:
        for label, mask in before.get(id(t), {}).items():
            new = spread(t, mask) if isinstance(mask, Tensor) else True
            _join(found, label, new)
    return found


def argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """An argument of an operation by its name; what it is by default, where it was left out."""
    if name in kwargs:
        return kwargs[name]
    for i, a in enumerate(func._schema.arguments):
        if a.name == name:
            return args[i] if i < len(args) else a.default_value
    return None


def is_pointwise(func: Any) -> bool:
    """Whether each element of a result comes from those at the same place, as broadcast."""
    return torch.Tag.pointwise in func.tags


def union(tensors: Iterable[Tensor], before: Before) -> Marks:
    """Every element has all labels."""
    return {label: True for t in tensors for label in before.get(id(t), {})}


def pointwise(tensors: Iterable[Tensor], before: Before, like: Tensor) -> Marks:
    """Element by element: an element of the result has the labels of the elements it was made from."""
    found: Marks = {}
    for t in tensors:
        for label, mask in before.get(id(t), {}).items():
            _join(found, label, mask)
    return {k: m if m is True else torch.as_tensor(m).expand(like.shape) for k, m in found.items()}


def put(args: Any, before: Before) -> Marks:
    """`target[indices] = values`: only the elements that are written to change their marks."""
    target, indices, values = args[:3]
    old, new = before[id(target)], before[id(values)]
    marks: Marks = {}
    for label in {*old, *new}:
        mask = _mask(old.get(label, False), target)
        was = mask.clone()
        mask.index_put_(tuple(indices), _mask(new.get(label, False), values))
        marks[label] = mask | was if len(args) > 3 and args[3] else mask
    return marks


def _join(found: Marks, label: str, mask: bool | Tensor) -> None:
    old = found.get(label, False)
    if mask is True or old is True:
        found[label] = True
    elif old is False:
        found[label] = mask
    else:
        found[label] = torch.as_tensor(old) | torch.as_tensor(mask)


def _mask(mark: bool | Tensor, like: Tensor) -> Tensor:
    """A mark as a mask of its own."""
    return mark.clone() if isinstance(mark, Tensor) else torch.full(like.shape, mark, device=like.device)


# --- data that is moved ---


def _moved(func: Any, args: Any, kwargs: Any, before: Before, name: str, result: Tensor) -> Marks:
    """The operation only moves data: do the same to the masks. Indices add their labels where they were looked up."""
    data = [t for i in _MOVES[name] for t in tree_leaves(args[i]) if isinstance(t, Tensor)]
    rest = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and all(t is not d for d in data)]
    found: Marks = {}
    for t in rest:
        for label, mask in before.get(id(t), {}).items():
            _join(found, label, _looked_up(args, name, result, mask) if isinstance(mask, Tensor) else True)
    whole = {label for label, mask in found.items() if mask is True}
    for label in {k for t in data for k in before[id(t)]} - whole:

        def mask_of(leaf: Any, label: str = label) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return _mask(before[id(leaf)].get(label, False), leaf)

        masks = [tree_map(mask_of, a) if i in _MOVES[name] else a for i, a in enumerate(args)]
        try:
            _join(found, label, func(*masks, **kwargs))
        except (RuntimeError, TypeError):
            found[label] = True
    return found


def _looked_up(args: Any, name: str, result: Tensor, mask: Tensor) -> bool | Tensor:
    """A mask of an index, as a mask of what was looked up by it."""
    if name == "gather":
        return mask
    if name == "index_select":
        return mask.reshape([-1 if d == args[1] % result.dim() else 1 for d in range(result.dim())]).expand(
            result.shape
        )
    if name != "index":
        return True
    at = [d for d, index in enumerate(args[1]) if index is not None]
    indices = [args[1][d] for d in at]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return True
    shape = np.broadcast_shapes(*(index.shape for index in indices))
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0  # else what is looked up comes first
    after = result.dim() - first - len(shape)
    return mask.expand(shape).reshape((1,) * first + shape + (1,) * after).expand(result.shape)


# --- data that is mixed ---


def _spread(
    func: Any, args: Any, kwargs: Any, name: str, result: Tensor
) -> Callable[[Tensor, Tensor], bool | Tensor] | None:
    """How a mask of an argument becomes one of the result; None where all is mixed."""
    if name in _REDUCES and isinstance(args[0], Tensor):
        dims = argument(func, args, kwargs, "dim")
        keep = bool(argument(func, args, kwargs, "keepdim"))
        return lambda t, mask: _any(mask, dims, keep)
    if name in _MIXES:
        dim = argument(func, args, kwargs, "dim")
        return lambda t, mask: _any(mask, dim, True).expand(result.shape)
    if name in ("mm", "bmm", "mv", "addmm", "baddbmm"):
        first, second = args[-2:]

        def spread(t: Tensor, mask: Tensor) -> bool | Tensor:
            if first is second:
                return True
            if t is first:
                return mask.any(-1, keepdim=name != "mv").expand(result.shape)
            if t is second:
                return mask.any(-2, keepdim=True).expand(result.shape) if name != "mv" else True
            return mask.expand(result.shape)

        return spread
    return None


def _any(mask: Tensor, dims: int | Sequence[int] | None, keep: bool) -> Tensor:
    where = range(mask.dim()) if dims is None or dims == [] or dims == () else dims
    return mask.any(tuple(where) if not isinstance(where, int) else where, keepdim=keep)
