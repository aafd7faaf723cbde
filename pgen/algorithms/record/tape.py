"""The tape: what a function did to its tensors, operation by operation, below autograd and vmap.

A dispatch mode sees every tensor operation as it reaches the kernels: batched by `vmap`, with the backward pass that
`autograd.grad` ran spelled out. The tape keeps them in order, names each tensor by a number, and notes which numbers
are inputs, which are constants that the function brought along, and which came out. Unlike `make_fx`, whose first use
imports the compiler (1.2 s), this needs nothing but torch.

What a tape cannot hold is a decision: a number read off a tensor (`.item()`, `if x > 0`, `.numpy()`) decides what is
done next, and the tape would repeat that decision for ever. Such functions are refused, with the line that did it.
"""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARIES = ("/torch/", "/pyro/", "/pgen/", "/zuko/", "<frozen", "<string>")


class Unrecordable(RuntimeError):
    """A function whose operations depend on the values of its tensors.

    Attributes:
        operation: what read a value, such as `.item()`.
        where: the user's line, `file:line: text`, where it is known.
    """

    def __init__(self, operation: str, where: str | None) -> None:
        self.operation, self.where = operation, where
        place = f" at {where}" if where else ""
        super().__init__(
            f"{operation}{place}: what is computed next may depend on the value of a tensor, so the operations cannot be "
            "recorded; choose by torch.where, index by tensors, and keep numbers as tensors"
        )


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

    def reads(self) -> list[int]:
        """Numbers of the tensors that it reads."""
        return list(refs_in((self.args, self.kwargs)))

    def gives(self) -> list[int]:
        """Numbers of the tensors that it gives."""
        return list(refs_in(self.out))

    @property
    def random(self) -> bool:
        """Whether it draws from the random generator."""
        return torch.Tag.nondeterministic_seeded in self.func.tags

    def writes(self) -> list[int]:
        """Numbers of the tensors that it changes in place."""
        if not self.func._schema.is_mutable:
            return []
        found = []
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                found.extend(refs_in(value))
        return found


@dataclass
class Tape:
    """Operations in order.

    Attributes:
        inputs: numbers of the inputs.
        constants: tensors that the function brought along, by number.
        ops: the operations.
        outputs: numbers of the results.
    """

    inputs: list[int]
    constants: dict[int, Tensor]
    ops: list[Op]
    outputs: list[int]

    def run(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Perform the operations one by one; gives every tensor by its number."""
        values: dict[int, Tensor] = dict(self.constants)
        values.update(zip(self.inputs, inputs, strict=True))
        for op in self.ops:
            found = op.func(*with_values(op.args, values), **with_values(op.kwargs, values))
            bind(op.out, found, values)
        return values


def refs_in(tree: Any) -> Iterable[int]:
    """The numbers in nested arguments, in order."""
    if isinstance(tree, Ref):
        yield tree.index
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from refs_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from refs_in(item)


def renamed(tree: Any, names: dict[int, int]) -> Any:
    """Nested arguments with other numbers."""
    if isinstance(tree, Ref):
        return Ref(names.get(tree.index, tree.index))
    if isinstance(tree, (tuple, list)):
        return type(tree)(renamed(item, names) for item in tree)
    if isinstance(tree, dict):
        return {key: renamed(item, names) for key, item in tree.items()}
    return tree


def with_values(tree: Any, values: dict[int, Tensor]) -> Any:
    """Nested arguments with tensors in place of their numbers."""
    if isinstance(tree, Ref):
        return values[tree.index]
    if isinstance(tree, (tuple, list)):
        return type(tree)(with_values(item, values) for item in tree)
    if isinstance(tree, dict):
        return {key: with_values(item, values) for key, item in tree.items()}
    return tree


def bind(names: Any, found: Any, values: dict[int, Tensor]) -> None:
    """Put results under their numbers."""
    if isinstance(names, Ref):
        values[names.index] = found
    elif isinstance(names, (tuple, list)):
        for name, item in zip(names, found, strict=True):
            bind(name, item, values)


def tape_of(fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tape, Any]:
    """Run a function of tensors once, and give the tape of what it did, and its result.

    Args:
        fn: takes the inputs one by one; gives nested tuples, lists and dicts of tensors.
        inputs: tensors.

    Returns:
        The tape, whose outputs are the tensors of the result in order; and the result itself.

    Raises:
        Unrecordable: the function read a value off a tensor that depends on its inputs or on chance.
    """
    recorder = _Recorder(inputs)
    try:
        with recorder, _Exits(recorder):
            result = fn(*inputs)
    except Unrecordable:
        raise
    except RuntimeError as error:
        if "data-dependent" in str(error) or ".item()" in str(error):
            raise Unrecordable(_said(error), where_raised(error.__traceback__)) from error
        raise
    leaves = list(tensors_in(result))
    outputs = [recorder.number(leaf) for leaf in leaves]
    return Tape(recorder.inputs, recorder.constants, recorder.ops, outputs), result


def tensors_in(tree: Any) -> Iterable[Tensor]:
    """The tensors in a nested result, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


@dataclass
class _Known:
    """Tensors met so far, held so that none is mistaken for another that took its place in memory."""

    tensors: list[Tensor] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> int:
        number = len(self.tensors)
        self.tensors.append(tensor)
        self.numbers[id(tensor)] = number
        return number


class _Recorder(TorchDispatchMode):
    """Writes the tape."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping this mode for its compiler, the import of which takes a second."""
        return False

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = _Known()
        self.inputs = [self.known.add(tensor) for tensor in inputs]
        self.constants: dict[int, Tensor] = {}
        self.ops: list[Op] = []
        self.varies = set(self.inputs)  # tensors that depend on the inputs or on chance

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was never met is a constant."""
        found = self.known.numbers.get(id(tensor))
        if found is None:
            found = self.known.add(tensor)
            self.constants[found] = tensor.detach() if tensor.requires_grad else tensor
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        names = self._numbered((args, kwargs))
        op = Op(func, names[0], names[1], None)
        varies = op.random or any(i in self.varies for i in op.reads())
        if not _is_all_tensors(found):
            if varies:
                operation = ".item()" if "_local_scalar_dense" in str(func) else str(func)
                raise Unrecordable(operation, where_now())
            return found
        if varies and torch.Tag.dynamic_output_shape in func.tags and not self._fixed_shape(func, args):
            raise Unrecordable(f"{func} (its result has as many elements as the values say)", where_now())
        out = self._given(found)
        op = Op(func, names[0], names[1], out)
        self.ops.append(op)
        if varies:
            self.varies.update(refs_in(out))
            self.varies.update(op.writes())
        return found

    def _fixed_shape(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an indexing gives a shape that no value decides: by integers, or by masks that never change."""
        if func is not torch.ops.aten.index.Tensor:
            return False
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return all(self.number(mask) not in self.varies for mask in masks)

    def _numbered(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return Ref(self.number(tree))
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._numbered(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._numbered(item) for key, item in tree.items()}
        return tree

    def _given(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            found = self.known.numbers.get(id(tree))
            return Ref(self.known.add(tree) if found is None else found)
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._given(item) for item in tree)
        return None


class _Exits(TorchFunctionMode):
    """Sees values leave torch by ways that no tensor operation shows."""

    _WAYS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._WAYS:
            number = self.recorder.known.numbers.get(id(args[0]))
            if number is None or number in self.recorder.varies:
                raise Unrecordable(f".{func.__name__}()", where_now())
        return func(*args, **(kwargs or {}))


def _is_all_tensors(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return all(_is_all_tensors(item) for item in tree)
    return tree is None or isinstance(tree, Tensor)


def where_now() -> str | None:
    """The innermost line of the user's code that is running, as `file:line: text`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


def where_raised(trace: TracebackType | None) -> str | None:
    """The innermost line of the user's code in a traceback."""
    lines = [f for f in traceback.extract_tb(trace) if _is_users(f.filename)]
    return _line(lines[-1].filename, lines[-1].lineno or 0) if lines else None


def _is_users(path: str) -> bool:
    return not any(part in path for part in _LIBRARIES)


def _line(path: str, number: int) -> str:
    text = linecache.getline(path, number).strip()
    return f"{path}:{number}" + (f": {text}" if text else "")


def _said(error: BaseException) -> str:
    text = str(error)
    return ".item() or a branch" if ".item()" in text or "control flow" in text else text.splitlines()[0]
