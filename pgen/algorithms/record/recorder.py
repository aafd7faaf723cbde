"""Writing the tape: what a function did to its tensors, operation by operation, below autograd and vmap.

A dispatch mode sees every tensor operation as it reaches the kernels: batched by `vmap`, with the backward pass that
`autograd.grad` ran spelled out. Unlike `make_fx`, whose first use imports the compiler (1.2 s), this needs nothing but
torch.

What a tape cannot hold is a decision: a number read off a tensor (`.item()`, `if x > 0`, `.numpy()`) decides what is
done next, and the tape would repeat that decision for ever. Such functions are refused, with the line that did it.
Numbers may be read off tensors that depend neither on the inputs nor on chance.
"""

from __future__ import annotations

import linecache
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pgen.algorithms.record.tape import Op, Ref, Tape, WithGrad, is_random, mapped, memory, refs_in, written
from pgen.algorithms.record.verify import World, copied, dice, whole

_HERE = str(Path(__file__).parents[2])
_LIBRARIES = (str(Path(torch.__file__).parent), _HERE, "<frozen", "<string>", "<recorded>")
_PACKAGES = ("-packages/pyro/", "-packages/zuko/")


class Unrecordable(RuntimeError):
    """A function whose operations depend on the values of its tensors.

    Attributes:
        operation: what read a value, such as `.item()`.
        where: the user's line, `file:line: text`, where it is known.
    """

    def __init__(self, operation: str, where: str | None, why: str | None = None) -> None:
        self.operation, self.where = operation, where
        place = f" at {where}" if where else ""
        super().__init__(f"{operation}{place}: {why or _DECIDES}")


_DECIDES = (
    "what is computed next may depend on the value of a tensor, so the operations cannot be recorded; choose by "
    "torch.where, index by tensors, and keep numbers as tensors"
)


class Recorder(TorchDispatchMode):
    """Writes the tape while it is active.

    Attributes:
        inputs, constants, ops: those of the tape.
        originals: the tensors that constants stand for, as the function has them.
        captured: numbers of the constants that belong to someone else.
        saved: captured tensors that the function changed, each with a copy of its memory before.
        generators: random generators that operations were given, each with its state before.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping this mode for its compiler, the import of which takes a second."""
        return False

    def __init__(self, inputs: Sequence[Tensor], live: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.held: list[Tensor] = []  # all met so far, so that none takes another's place in memory
        self.numbers: dict[int, int] = {}
        self.constants: dict[int, Tensor] = {}
        self.originals: dict[int, Tensor] = {}
        self.captured: set[int] = set()
        self.ops: list[Op] = []
        self.inputs = [self._add(tensor) for tensor in inputs]
        self.own = {memory(tensor) for tensor in inputs}  # memory that belongs to this run
        self.varying = self.own | {memory(tensor) for tensor in live}  # that depends on inputs or on chance
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        self.left: dict[int, Tensor] = {}  # states of generators, as the latest operation left them
        self.second = False  # in a second run, no generator is met for the first time

    def tape(self, outputs: Iterable[Tensor]) -> Tape:
        """What was recorded, with these results."""
        numbers = [self.number(tensor) for tensor in outputs]
        live = frozenset(i for i in self.captured if self.varies(self.originals[i]))
        return Tape(self.inputs, self.constants, self.ops, numbers, live)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was never met is a constant."""
        found = self.numbers.get(id(tensor))
        if found is None:
            found = self._add(tensor)
            self.constants[found] = tensor.detach() if tensor.requires_grad else tensor
            self.originals[found] = tensor
            self.captured.add(found)
            if tensor.is_inference():  # torch does not count changes of these
                self.varying.add(memory(tensor))
        return found

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the inputs or on chance."""
        return memory(tensor) in self.varying

    def _add(self, tensor: Tensor) -> int:
        number = len(self.held)
        self.held.append(tensor)
        self.numbers[id(tensor)] = number
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        writes = list(tensors_in(written(func, args, kwargs)))
        self._save(writes)
        for generator in _generators_in(args, kwargs):
            self._follow(generator)
        named = self._named((args, kwargs))
        varies = is_random(func) or any(self.varies(t) for t in tensors_in((args, kwargs)))
        found = func(*args, **kwargs)
        for generator in _generators_in(args, kwargs):
            self.left[id(generator)] = generator.get_state()
        given = list(tensors_in(found))
        if not given and found is not None and not isinstance(found, (tuple, list)):
            if varies and str(func) not in _OF_SHAPES:
                raise Unrecordable(_READS.get(str(func), str(func)), where_now())
            return found
        if varies and torch.Tag.dynamic_output_shape in func.tags and not self._fixed_shape(func, args):
            raise Unrecordable(f"{func} (its result has as many elements as the values say)", where_now())
        done = WithGrad(func) if torch.is_grad_enabled() and str(func) in _GRAD_AWARE else func
        self.ops.append(Op(done, named[0], named[1], mapped(found, self._given)))
        if (
            func is torch.ops.aten.lift_fresh.default
        ):  # a tensor made of numbers on the spot: nobody else has it
            self.captured.difference_update(refs_in(named))
        for tensor in (*given, *writes):
            self.own.add(memory(tensor))
            if varies:
                self.varying.add(memory(tensor))
        return found

    def _save(self, writes: Sequence[Tensor]) -> None:
        """Keep what this run changes and others will see."""
        for tensor in writes:
            if memory(tensor) not in self.own:
                place = whole(tensor)
                self.saved.append((place, place.clone()))
                self.own.add(memory(tensor))

    def _follow(self, generator: torch.Generator) -> None:
        """Check that nothing but recorded operations moves a generator."""
        state, left = generator.get_state(), self.left.get(id(generator))
        if (left is None and self.second) or (left is not None and not torch.equal(state, left)):
            raise Unrecordable(
                "a random generator that is made, or seeded, in every run",
                where_now(),
                "a recording would go on with it where it was left; make it and seed it once, outside",
            )
        self.generators.setdefault(id(generator), (generator, state))

    def _fixed_shape(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an indexing gives a shape that no value decides: by integers, or by masks that never change."""
        if func is not torch.ops.aten.index.Tensor:
            return False
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return not any(self.varies(mask) for mask in masks)

    def _named(self, tree: Any) -> Any:
        return mapped(tree, lambda leaf: Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf)

    def _given(self, leaf: Any) -> Ref | None:
        if not isinstance(leaf, Tensor):
            return None
        found = self.numbers.get(id(leaf))
        return Ref(self._add(leaf) if found is None else found)


_READS = {"aten._local_scalar_dense.default": ".item()", "aten.equal.default": "torch.equal"}
_GRAD_AWARE = {"aten.mkldnn_rnn_layer.default"}
#: They tell about shapes and types.
_OF_SHAPES = {
    "aten.is_same_size.default",
    "aten.dense_dim.default",
    "aten.sparse_dim.default",
    "prim.device.default",
}


class _Exits(TorchFunctionMode):
    """Sees values leave torch, or come in, by ways that no tensor operation shows."""

    _OUT = frozenset(
        {
            Tensor.numpy,
            Tensor.tolist,
            Tensor.__array__,
            Tensor.__dlpack__,
            Tensor.__deepcopy__,
            Tensor.__reduce_ex__,
        }
    )
    _DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._OUT and self.recorder.varies(args[0]):
            raise Unrecordable(f".{func.__name__}()", where_now())
        if func == self._DATA:
            raise Unrecordable(
                "assigning .data",
                where_now(),
                "it changes a tensor behind torch's back; use .copy_() in its place",
            )
        return func(*args, **(kwargs or {}))


def recorded_run(fn: Callable[..., Any], recorder: Recorder) -> tuple[Tape, Any]:
    """Run a function of tensors once.

    Args:
        fn: takes the inputs one by one; gives nested tuples, lists and dicts of tensors.
        recorder: made for these inputs; what the function does to them in place is done.

    Returns:
        The tape, whose outputs are the tensors of the result in order; and the result itself.

    Raises:
        Unrecordable: the function read a value off a tensor that depends on its inputs or on chance, or does what a
            tape cannot hold.
    """
    dice = _other_dice()
    inputs = recorder.held[: len(recorder.inputs)]
    try:
        with recorder, _Exits(recorder):
            result = fn(*inputs)
    except Unrecordable:
        raise
    except RuntimeError as error:
        if "data-dependent" in str(error) or ".item()" in str(error):
            raise Unrecordable(_said(error), where_raised(error.__traceback__)) from error
        raise
    if _other_dice() != dice:
        raise Unrecordable(
            "random numbers of Python's or NumPy's", None, "a recording would repeat them; draw them by torch"
        )
    if recorder.generators:
        _run_again(fn, recorder)
    for tensor in recorder.originals.values():
        grad = tensor.grad if tensor.requires_grad and tensor.is_leaf else None
        if (
            grad is not None
            and recorder.numbers.get(id(grad)) not in recorder.captured
            and recorder.varies(grad)
        ):
            raise Unrecordable(
                ".backward()",
                None,
                "it leaves gradients in tensors outside; return those of torch.autograd.grad",
            )
    return recorder.tape(tensors_in(result)), result


def _run_again(fn: Callable[..., Any], recorder: Recorder) -> None:
    """Raise unless a second run takes its generators from where they happen to be; all is put back as it was.

    A generator that is seeded before its first use looks, in one run, like any other.
    """
    generators = [generator for generator, _ in recorder.generators.values()]
    world = World(
        dice(), [(g, g.get_state()) for g in generators], [(t, t.clone()) for t, _ in recorder.saved]
    )
    again = Recorder([copied(t) for t in recorder.held[: len(recorder.inputs)]])
    again.second = True
    try:
        for generator in generators:
            generator.manual_seed(generator.initial_seed() ^ 1)
            again.left[id(generator)] = generator.get_state()
        with again, _Exits(again):
            fn(*again.held)
    finally:
        world.restore()


def tape_of(fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tape, Any]:
    """The tape of one run of a function, and its result; see `recorded_run`."""
    return recorded_run(fn, Recorder(inputs))


def _generators_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Generator]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]


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


def _other_dice() -> Any:
    """The state of random generators that are not torch's."""
    numpy = sys.modules.get("numpy")
    legacy = numpy.random.get_state() if numpy is not None else None
    return random.getstate(), None if legacy is None else (legacy[1].tobytes(), *legacy[2:])


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
    return not path.startswith(_LIBRARIES) and not any(part in path for part in _PACKAGES)


def _line(path: str, number: int) -> str:
    text = linecache.getline(path, number).strip()
    return f"{path}:{number}" + (f": {text}" if text else "")


def _said(error: BaseException) -> str:
    text = str(error)
    return ".item() or a branch" if ".item()" in text or "control flow" in text else text.splitlines()[0]
