"""`record`: a function that remembers what it did, one tape for every kind of argument that it meets."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _device

from pgen.algorithms.record.inductor import Inductor
from pgen.algorithms.record.products import by_onednn, pays
from pgen.algorithms.record.recorder import Unrecordable
from pgen.algorithms.record.recording import Compiler, Recording, recording_of
from pgen.algorithms.record.replay import flattener_of
from pgen.algorithms.record.tape import mapped
from pgen.algorithms.record.verify import uncast

P = ParamSpec("P")
R = TypeVar("R")

_IN_TURN = (
    threading.RLock()
)  # functions call what belongs to the process, such as Pyro's handlers; replays do not
_MANY = 32  # kinds of arguments after which something is wrong


class NotRecorded(UserWarning):
    """A function runs as it is written, more slowly: its operations depend on values."""


class ManyRecordings(UserWarning):
    """A function is recorded again and again: what changes from call to call is not passed as a tensor."""


class Recorded(Generic[P, R]):
    """A function of tensors that is run once for each kind of arguments, and replayed from then on.

    The kind is the nesting of the arguments, shapes, strides, types and devices of their tensors, the values of all
    else, torch's default type and device, and automatic casts.

    - Inputs, and captured tensors such as the buffers of a module, are changed in place as the function changes them.
    - Captured tensors that others change between calls, as an optimiser does, are noticed and read anew. Changes that
      torch does not count (through NumPy) are not; pass such tensors as arguments.
    - Random numbers are drawn anew at every call, in the order in which the function draws them.
    - Gradients do not flow through a replay: take them inside, by `torch.autograd.grad`.
    - A call inside of another recording becomes part of it.

    Attributes:
        recordings: by kind; None where the function has to be run as it is written.
        obstacle: why, where that is so.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        simplify: bool = True,
        lift: bool = False,
        fallback: bool = True,
        compiler: Compiler | None = None,
    ) -> None:
        """Begin without a recording.

        Args:
            fn: see `record`.
            simplify: shorten the tape.
            lift: compute in double precision for inputs in that, though the function makes its constants in single.
            fallback: run the function itself where it cannot be recorded, with a warning; else raise.
            compiler: makes a replay of a tape and example inputs.
        """
        self.fn = fn
        self.simplify, self.lift, self.fallback, self.compiler = simplify, lift, fallback, compiler
        self.recordings: dict[Any, Recording | None] = {}
        self.obstacle: Unrecordable | None = None
        self.live: list[Tensor] = []  # captured tensors that were seen to change
        self.__doc__ = fn.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, by a replay where there is one."""
        tensors: list[Tensor] = []
        try:
            kind = (kind_of(args, tensors), kind_of(kwargs, tensors) if kwargs else None, _surroundings())
        except RuntimeError:  # sparse tensors and the like have no strides
            return self._as_written(args, kwargs)
        found = self.recordings.get(kind, _NONE)
        if found is None or _transforms() is not None:
            return self._as_written(args, kwargs)
        if found is _NONE or (found.watched and self._stale(found)):
            with _IN_TURN:
                found = self._record(kind, args, kwargs, tensors)
            if found is None:
                return self._as_written(args, kwargs)
        if found.written and found.entangled(tensors):
            return self._as_written(args, kwargs)
        return _replayed(found, tensors)

    def bound(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function for arguments of this kind only, which it does not look at: for loops that change no shapes.

        Saves half a microsecond a tensor. Arguments of another kind give nonsense, or errors.
        """
        self(*args, **kwargs)
        kind = (kind_of(args, []), kind_of(kwargs, []) if kwargs else None, _surroundings())
        found = self.recordings.get(kind)
        if found is None or found.written or torch._C._is_any_autocast_enabled():
            return self
        flat = flattener_of(args, kwargs)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if found.watched and found.stale():
                return self(*args, **kwargs)
            return _replayed(found, flat(args, kwargs))

        return run

    def _as_written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        """The function itself, on tensors cut off from any graph as those of a replay are."""
        args, kwargs = mapped((args, kwargs), _detached)
        with _IN_TURN, torch.enable_grad():
            return mapped(self.fn(*args, **kwargs), _detached)

    def _stale(self, found: Recording) -> bool:
        changed = found.stale()
        known = {id(t) for t in self.live}
        self.live.extend(t for t in changed if id(t) not in known)
        return bool(changed)

    def _record(
        self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Recording | None:
        if len(self.recordings) == _MANY and kind not in self.recordings:
            warnings.warn(
                f"{_name(self.fn)} was recorded for {_MANY} kinds of arguments; pass numbers that change from call to "
                "call as tensors, and keep shapes the same",
                ManyRecordings,
                stacklevel=3,
            )

        def flat(*leaves: Tensor) -> Any:
            items = iter(leaves)
            some, named = mapped(
                (args, kwargs), lambda leaf: next(items) if isinstance(leaf, Tensor) else leaf
            )
            with torch.enable_grad():
                return self.fn(*some, **named)

        try:
            self.recordings[kind] = recording_of(
                flat, tensors, live=self.live, simplify=self.simplify, lift=self.lift, compiler=self.compiler
            )
        except Unrecordable as error:
            if not self.fallback:
                raise
            if self.obstacle is None:
                warnings.warn(
                    f"{_name(self.fn)} is not recorded, so slower: {error}", NotRecorded, stacklevel=3
                )
            self.obstacle = error
            self.recordings[kind] = None
        return self.recordings[kind]


def record(fn: Callable[P, R], *, fallback: bool = True, compile: str | None = None) -> Recorded[P, R]:
    """Run a function once for every kind of arguments, then replay the operations that it performed.

    Args:
        fn: takes nested tuples, lists and dicts of tensors, and plain values; gives such nested tensors. What it does
            may depend on plain values and shapes, not on the values of tensors.
        fallback: run the function itself where it cannot be recorded, with a warning that names the line; else raise.
        compile: "products" for large products of matrices by the library that suits the processor, at no cost (see
            `products.py`); "inductor" to have torch's compiler make one native function of the operations, which takes some
            twenty seconds where it was not done before (see `Inductor`); "background" to replay them until that is
            done: then results change by round-off at a call that depends on the clock, so that no two runs are the
            same to the last bit.

    Raises:
        Unrecordable: the function reads a value off a tensor, and `fallback` is off.

    Example:
        >>> def energy(x, power):
        ...     x = x.detach().requires_grad_()
        ...     e = (x ** power).sum(-1)
        ...     return e.detach(), torch.autograd.grad(e.sum(), x)[0]
        >>> fast = record(energy)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> fast(x, 2)
        (tensor([5.]), tensor([[2., 4.]]))
        >>> fast(x + 1, 2)  # replayed
        (tensor([13.]), tensor([[4., 6.]]))
    """
    compilers: dict[str | None, Compiler | None] = {
        None: None, "products": by_onednn if pays() else None, "inductor": Inductor(), "background": Inductor(wait=False),
    }  # fmt: skip
    if compile not in compilers:
        raise ValueError(f"compile takes 'products', 'inductor', 'background' or None, got {compile!r}")
    return Recorded(fn, fallback=fallback, compiler=compilers[compile])


_NONE: Any = object()
_transforms = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_casts = torch._C._is_any_autocast_enabled
_with_grad, _set_grad = torch.is_grad_enabled, torch._C._set_grad_enabled


def _replayed(found: Recording, tensors: Sequence[Tensor]) -> Any:
    if _modes() or _casts():
        with uncast(), torch.no_grad():
            # Another recording wants the operations themselves, not buffers.
            return found.rebuild(found.tape.results(*tensors) if _modes() else found.replay(*tensors))
    if not _with_grad():
        return found.rebuild(found.replay(*tensors))
    _set_grad(False)
    try:
        return found.rebuild(found.replay(*tensors))
    finally:
        _set_grad(True)


def kind_of(tree: Any, tensors: list[Tensor]) -> Any:
    """What a recording depends on, collecting the tensors on the way.

    Raises:
        TypeError: a value that cannot be compared.
    """
    items = tree.values() if isinstance(tree, dict) else tree
    kind: list[Any] = [type(tree), *tree] if isinstance(tree, dict) else [type(tree)]
    for item in items:
        known = type(item)
        if known is Tensor or isinstance(item, Tensor):
            tensors.append(item)
            kind += item.shape, item.stride(), item.dtype, item.device
            if known is not Tensor:
                kind.append(known)
        elif isinstance(item, (tuple, list, dict)):
            kind.append(kind_of(item, tensors))
        elif known is float:
            kind.append(repr(item))  # tells zeros apart, and knows a NaN again
        else:
            kind += known, item
    return tuple(kind)


def _surroundings() -> Any:
    """What else decides which operations are done."""
    if _casts():
        casts = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
        return torch.get_default_dtype(), _device.CURRENT_DEVICE, *casts
    return torch.get_default_dtype(), _device.CURRENT_DEVICE


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__
