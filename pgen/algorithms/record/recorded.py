"""`record`: a function that remembers what it did, one tape for every kind of argument that it meets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from pgen.algorithms.record.replay import Replay, replay_of
from pgen.algorithms.record.simplify import lifted, simplified
from pgen.algorithms.record.tape import Tape, Unrecordable, tape_of, tensors_in

P = ParamSpec("P")
R = TypeVar("R")

class NotRecorded(UserWarning):
    """A function runs as it is written, more slowly: its operations depend on values."""


@dataclass(frozen=True)
class Recording:
    """One tape ready to run.

    Attributes:
        tape: the operations, simplified.
        recorded: how many there were before.
        rebuild: from the outputs to the shape of the result.
        replay: the function.
    """

    tape: Tape
    recorded: int
    rebuild: Callable[[Sequence[Tensor]], Any]
    replay: Replay


class Recorded(Generic[P, R]):
    """A function of tensors that is run once for each kind of arguments, and replayed from then on.

    The kind is the nesting of the arguments, shapes, strides, types and devices of their tensors, the values of all
    else, and torch's default type. Tensors that the function brings along, such as weights in a closure, are read as
    they were at recording; pass what changes as an argument.

    Gradients do not flow through a replay: take them inside, by `torch.autograd.grad`. Random numbers are drawn anew at
    every call, as the function would draw them.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        simplify: bool = True,
        lift: bool = False,
        fallback: bool = True,
        compiler: Callable[[Tape, Sequence[Tensor]], Replay] | None = None,
    ) -> None:
        self.fn = fn
        self.simplify, self.lift, self.fallback, self.compiler = simplify, lift, fallback, compiler
        self.recordings: dict[Any, Recording | None] = {}
        self.obstacle: Unrecordable | None = None
        self.__doc__ = fn.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, by a replay where there is one."""
        if kwargs:
            raise TypeError(f"a recorded function takes its arguments by position; got {sorted(kwargs)} by name")
        tensors: list[Tensor] = []
        key = (_kind(args, tensors), torch.get_default_dtype())
        found = self.recordings.get(key, _NONE)
        if found is _NONE:
            return self._first(key, args, tensors)
        if found is None:
            return self.fn(*args)
        with torch.no_grad():
            return cast("R", found.rebuild(found.replay(*tensors)))

    def _first(self, key: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> R:
        try:
            recording, result = self._record(args, tensors)
        except Unrecordable as error:
            if not self.fallback:
                raise
            self.obstacle = error
            self.recordings[key] = None
            warnings.warn(f"not recorded, so slower: {error}", NotRecorded, stacklevel=3)
            return self.fn(*args)
        self.recordings[key] = recording
        return result

    def _record(self, args: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Recording, R]:
        def flat(*leaves: Tensor) -> Any:
            with torch.enable_grad():
                return self.fn(*_filled(args, iter(leaves)))

        inputs = [t.detach() for t in tensors]
        state = _random_states(inputs)
        tape, result = self._lifted(flat, inputs) if self.lift else tape_of(flat, inputs)
        after = _random_states(inputs)
        _restore(state)
        # In-place operations on inputs (running statistics) have been done once; here they work on copies.
        values = tape.run([t.clone() for t in inputs])
        _restore(after)
        short = simplified(tape, values) if self.simplify else tape
        sizes = {i: v.nbytes for i, v in values.items()}
        replay = replay_of(short, sizes) if self.compiler is None else self.compiler(short, inputs)
        return Recording(short, len(tape.ops), _rebuilder(result), replay), _detached(result)

    def _lifted(self, flat: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tape, Any]:
        """The tape of the function in its own precision, carried over to that of the inputs."""
        low, high = torch.get_default_dtype(), torch.float64
        if low == high or all(t.dtype != high for t in inputs):
            return tape_of(flat, inputs)
        down = [t.to(low) if t.dtype == high else t for t in inputs]
        state = _random_states(inputs)
        tape, result = tape_of(flat, down)
        rough = list(tensors_in(result))
        try:
            lifted_tape = lifted(tape, low, high)
            _restore(state)
            values = lifted_tape.run([t.clone() for t in inputs])
            fine = [values[i] for i in lifted_tape.outputs]
            alike = all(torch.allclose(f.to(r.dtype), r, 1e-2, 1e-2, equal_nan=True) for f, r in zip(fine, rough))
        except (RuntimeError, TypeError):
            alike = False
        if alike:
            return lifted_tape, _filled(_detached(result), iter(fine))

        def cast(*leaves: Tensor) -> Any:
            found = flat(*(t.to(low) if t.dtype == high else t for t in leaves))
            return _filled(found, iter([t.to(high) if t.dtype == low else t for t in tensors_in(found)]))

        _restore(state)
        return tape_of(cast, inputs)


def record(fn: Callable[P, R], *, fallback: bool = True) -> Recorded[P, R]:
    """Run a function once for every kind of arguments, then replay the operations that it performed.

    Args:
        fn: takes nested tuples, lists and dicts of tensors, and plain values; gives such nested tensors. What it does
            may depend on plain values and shapes, not on the values of tensors.
        fallback: run the function itself where it cannot be recorded, with a warning that names the line; else raise.

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
    return Recorded(fn, fallback=fallback)


_NONE: Any = object()


def _kind(tree: Any, tensors: list[Tensor]) -> Any:
    """What a recording depends on, collecting the tensors on the way."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return (tree.shape, tree.stride(), tree.dtype, tree.device)
    if isinstance(tree, (tuple, list)):
        return (type(tree), *[_kind(item, tensors) for item in tree])
    if isinstance(tree, dict):
        return (dict, *[(key, _kind(item, tensors)) for key, item in tree.items()])
    return (type(tree), tree)


def _filled(tree: Any, leaves: Any) -> Any:
    """The arguments with other tensors in the same places."""
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, (tuple, list)):
        items = [_filled(item, leaves) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _filled(item, leaves) for key, item in tree.items()}
    return tree


def _rebuilder(result: Any) -> Callable[[Sequence[Tensor]], Any]:
    if isinstance(result, tuple) and not hasattr(result, "_fields") and all(isinstance(r, Tensor) for r in result):
        return lambda outputs: outputs
    if isinstance(result, Tensor):
        return lambda outputs: outputs[0]
    return lambda outputs: _filled(result, iter(outputs))


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, (tuple, list)):
        items = [_detached(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _detached(item) for key, item in tree.items()}
    return tree


def _random_states(tensors: Sequence[Tensor]) -> list[tuple[torch.device, Tensor]]:
    found = [(torch.device("cpu"), torch.get_rng_state())]
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        found.append((device, torch.cuda.get_rng_state(device)))
    return found


def _restore(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
