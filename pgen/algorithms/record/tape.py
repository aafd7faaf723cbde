"""The tape: a list of tensor operations, in which tensors are numbers.

Numbers name the inputs, the constants that a function brought along, and what each operation gave. A tape is a plain
value: passes over it (see `simplify.py`) take one and give another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """The number of a tensor on the tape."""

    index: int


@dataclass(frozen=True)
class Op:
    """One operation: its arguments, with `Ref` in place of tensors, and the numbers of what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any  # a Ref, or a tuple or list of Refs and None

    @property
    def name(self) -> str:
        """As torch prints it: `aten.add.Tensor`."""
        return str(self.func)

    @cached_property
    def random(self) -> bool:
        """Whether it draws from the random generator."""
        return is_random(self.func)

    @cached_property
    def movable(self) -> bool:
        """Whether it does nothing but give its results, so that it can be left out, merged or computed in advance.

        Of operations that torch did not define that is not known.
        """
        return is_pure(self.func)

    def reads(self) -> tuple[int, ...]:
        """Numbers of the tensors that it reads."""
        return self._numbers[0]

    def gives(self) -> tuple[int, ...]:
        """Numbers of the tensors that it gives."""
        return self._numbers[1]

    def writes(self) -> tuple[int, ...]:
        """Numbers of the tensors that it changes in place."""
        return self._numbers[2]

    @cached_property
    def _numbers(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        changed = () if self.movable else written(self.func, self.args, self.kwargs)
        read = refs_in(self.args)
        if self.kwargs:
            read += refs_in(self.kwargs)
        return tuple(read), tuple(refs_in(self.out)), tuple(refs_in(changed))

    def renamed(self, names: Mapping[int, int]) -> Op:
        """The same operation on tensors with other numbers; what it gives keeps its own."""
        if names.keys().isdisjoint(self.reads()):
            return self
        kwargs = renamed(self.kwargs, names) if self.kwargs else self.kwargs
        return Op(self.func, renamed(self.args, names), kwargs, self.out)


@dataclass(frozen=True)
class Tape:
    """Operations in order.

    Attributes:
        inputs: numbers of the inputs.
        constants: tensors that the function brought along or that no input changes, by number.
        ops: the operations.
        outputs: numbers of the results.
        live: numbers of those constants that change between runs: read anew in each.
    """

    inputs: list[int]
    constants: dict[int, Tensor]
    ops: list[Op]
    outputs: list[int]
    live: frozenset[int] = field(default_factory=frozenset)

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Perform the operations one by one; gives every tensor by its number."""
        values = self.start(inputs)
        for op in self.ops:
            perform(op, values)
        return values

    def results(self, *inputs: Tensor) -> list[Tensor]:
        """The same, of which it gives the outputs."""
        values = self.run(inputs)
        return [values[i] for i in self.outputs]

    def start(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """The tensors that are there before the first operation."""
        return {**self.constants, **dict(zip(self.inputs, inputs, strict=True))}

    def fresh(self) -> int:
        """A number that is not in use, and neither are those above it."""
        numbers = [*self.inputs, *self.constants, *self.outputs]
        numbers.extend(i for op in self.ops for i in op.gives())
        return max(numbers, default=-1) + 1


def perform(op: Op, values: dict[int, Tensor]) -> None:
    """Do one operation on the tensors at hand, and put its results under their numbers."""
    args = [values[a.index] if type(a) is Ref else with_values(a, values) for a in op.args]
    found = op.func(*args, **with_values(op.kwargs, values)) if op.kwargs else op.func(*args)
    bind(op.out, found, values)


class WithGrad:
    """An operation that keeps what its backward pass needs only while gradients are on."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.namespace, self.tags = func.namespace, func.tags
        self._schema, self._overloadname = func._schema, func._overloadname

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Its results, with all that a backward pass reads."""
        args, kwargs = mapped((args, kwargs), lambda a: a.detach() if isinstance(a, Tensor) else a)
        with torch.enable_grad():
            return self.func(*args, **kwargs)

    def __str__(self) -> str:
        return str(self.func)


@lru_cache(maxsize=4096)
def is_random(func: Any) -> bool:
    """Whether an operation draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


@lru_cache(maxsize=4096)
def is_pure(func: Any) -> bool:
    """Whether an operation of torch's has no effect but its results."""
    return (
        func.namespace in ("aten", "prims")
        and bool(func._schema.returns)
        and not is_random(func)
        and not _written_arguments(func)
    )


#: Operations that change running statistics although their schema does not say so.
_SILENT = {
    "aten::native_batch_norm": (3, 4), "aten::cudnn_batch_norm": (3, 4), "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_gather_stats": (3, 4), "aten::batch_norm_gather_stats_with_counts": (3, 4),
    "aten::batch_norm_update_stats": (1, 2),
}  # fmt: skip


@lru_cache(maxsize=4096)
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    silent = _SILENT.get(func._schema.name, ())
    if not func._schema.is_mutable and not silent:
        return ()
    return tuple(
        (i, a.name)
        for i, a in enumerate(func._schema.arguments)
        if i in silent or (a.alias_info is not None and a.alias_info.is_write)
    )


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation changes in place."""
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    return [value for value in found if value is not None]


def memory(value: Tensor) -> int:
    """A name for the memory of a tensor: the same for views of one another, while they live."""
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and the like have none
        return id(value)


def refs_in(tree: Any) -> list[int]:
    """The numbers in nested arguments, in order."""
    if type(tree) is Ref:
        return [tree.index]
    found: list[int] = []
    if isinstance(tree, (tuple, list, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            kind = type(item)
            if kind is Ref:
                found.append(item.index)
            elif kind not in _LEAVES:
                found += refs_in(item)
    return found


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with every leaf changed."""
    if isinstance(tree, (tuple, list)):
        items = [mapped(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: mapped(item, change) for key, item in tree.items()}
    return change(tree)


def renamed(tree: Any, names: Mapping[int, int]) -> Any:
    """Nested arguments with other numbers."""
    kind = type(tree)
    if kind is Ref:
        return Ref(names[tree.index]) if tree.index in names else tree
    if kind is tuple or kind is list:
        return kind([item if type(item) in _LEAVES else renamed(item, names) for item in tree])
    return mapped(tree, lambda leaf: renamed(leaf, names)) if kind is dict else tree


def with_values(tree: Any, values: Mapping[int, Tensor]) -> Any:
    """Nested arguments with tensors in place of their numbers."""
    kind = type(tree)
    if kind is Ref:
        return values[tree.index]
    if kind is tuple or kind is list:
        return kind([item if type(item) in _LEAVES else with_values(item, values) for item in tree])
    return mapped(tree, lambda leaf: with_values(leaf, values)) if kind is dict else tree


_LEAVES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout})


def bind(names: Any, found: Any, values: dict[int, Tensor]) -> None:
    """Put results under their numbers."""
    if isinstance(names, Ref):
        values[names.index] = found
    elif isinstance(names, (tuple, list)):
        for name, item in zip(names, found, strict=True):
            bind(name, item, values)
