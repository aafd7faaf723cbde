"""Which sites a tensor was computed from, element by element, read off the stream of torch operations.

Pyro's provenance tensors lose track at in-place writes, `out=` and `vmap`. Here every storage carries marks, and a
dispatch mode, which sees each operation after autograd, functionalisation and vmap have done their part, moves the
marks along. Marks are kept per element where operations only move data or work element by element, per tensor elsewhere.
Where a value leaves torch (`.item()`, a branch, `.numpy()`), nobody can follow: that is recorded as a `Leak`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgen.propagation import Marks, argument, is_pointwise, passed_on, pointwise, put, union


@dataclass(frozen=True)
class Leak:
    """A value that left torch: what it was computed from, and the line of the program where it happened."""

    labels: frozenset[str]
    operation: str
    where: str


_BLOCK, _FEW = 16, 64  # elements in a block, and blocks that a label may be listed in


@dataclass
class _Storage:
    owner: Tensor  # keeps the memory alive, so that its address stays its own
    width: int  # bytes of an element, as masks count them
    marks: Marks = field(default_factory=dict)  # masks here are flat, one entry per element of the storage
    wide: set[str] = field(default_factory=set)  # labels that may hold anywhere
    blocks: dict[int, set[str]] = field(
        default_factory=dict
    )  # labels that may hold in a few blocks of elements

    def near(self, start: int, stop: int) -> Iterable[str]:
        """Labels that may hold between two elements.

        A series that is seen step by step has as many labels as steps, and a view of one step meets few of them.
        """
        first, last = start // _BLOCK, stop // _BLOCK
        if last - first > _FEW:
            return tuple(self.marks)
        return self.wide.union(*(self.blocks.get(b, ()) for b in range(first, last + 1)))

    def place(self, label: str, start: int, stop: int) -> None:
        """Say that a label may hold between two elements."""
        first, last = start // _BLOCK, stop // _BLOCK
        if last - first > _FEW:
            self.wide.add(label)
        elif label not in self.wide:
            for b in range(first, last + 1):
                self.blocks.setdefault(b, set()).add(label)


class Provenance:
    """Follow labels through torch operations: `with provenance: ...`, then `mark`, `labels` and `leaks`.

    >>> a, out, p = torch.ones(2), torch.zeros(2), Provenance()
    >>> p.mark(a, "a")
    >>> with p:
    ...     out[0] = a[1]
    ...     twice = out * 2
    >>> sorted(p.labels(out)), sorted(p.labels(out[1])), sorted(p.labels(twice))
    (['a'], [], ['a'])
    """

    def __init__(self) -> None:
        """Start with nothing marked."""
        self.leaks: list[Leak] = []
        self._storages: dict[int, _Storage] = {}
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self) -> Provenance:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc)

    def mark(self, tensor: Tensor, *labels: str) -> None:
        """Say that every element of the tensor comes from these labels, and from nothing else."""
        self.write(tensor, dict.fromkeys(labels, True))

    def labels(self, *tensors: Any) -> frozenset[str]:
        """All labels that any element of the tensors was computed from."""
        return frozenset(
            label for t in tree_leaves(tensors) if isinstance(t, Tensor) for label in self.read(t)
        )

    def read(self, tensor: Tensor) -> Marks:
        """The marks of a tensor's elements."""
        stored = self._storages.get(_address(tensor))
        if stored is None or not stored.marks:
            return {}
        found: Marks = {}
        if stored.width != tensor.element_size():  # a complex tensor seen as real, say: all or nothing
            return dict.fromkeys(stored.marks, True)
        for label in stored.near(*_span(tensor)):
            mask = stored.marks.get(label, False)
            if isinstance(mask, Tensor):
                view = mask.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
                if bool(view.any()):
                    found[label] = True if bool(view.all()) else view
            elif mask:
                found[label] = True
        return found

    def write(self, tensor: Tensor, marks: Marks, keep: bool = False) -> None:
        """Set the marks of a tensor's elements; `keep` adds to what is there."""
        address = _address(tensor)
        if not address or tensor.numel() == 0:
            return
        stored = self._storages.get(address)
        if stored is None:
            if not marks:
                return
            stored = self._storages[address] = _Storage(tensor, tensor.element_size())
        size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        whole = tensor.numel() == size and tensor.is_contiguous()
        if whole and not keep:
            stored.marks = {
                k: True if m is True else torch.as_tensor(m).expand(tensor.shape).reshape(-1).clone()
                for k, m in marks.items()
            }
            stored.wide, stored.width = set(marks), tensor.element_size()
            stored.blocks.clear()
            return
        if stored.width != tensor.element_size():
            stored.marks |= dict.fromkeys(marks, True)
            stored.wide |= set(marks)
            return
        for label in marks if keep else [*stored.marks, *marks]:
            old = stored.marks.get(label, False)
            new = marks.get(label, False)
            if old is True and (keep or new is True):
                continue
            if whole and new is True:
                stored.marks[label] = True
                stored.wide.add(label)
                continue
            if new is not False:
                stored.place(label, *_span(tensor))
            flat = old if isinstance(old, Tensor) else torch.full((size,), bool(old), device=tensor.device)
            view = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            if keep:
                view |= new
            else:
                view.copy_(torch.as_tensor(new, device=tensor.device))
            if bool(flat.any()):
                stored.marks[label] = flat
            else:
                stored.marks.pop(label, None)

    def leak(self, labels: frozenset[str], operation: str) -> None:
        """Record that a value computed from these labels left torch, unless a library did it to check its arguments."""
        where = _line_of_program()
        if labels and where is not None:
            self.leaks.append(Leak(labels, operation, where))


_OVERWRITES = {
    "copy_",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "geometric_",
    "cauchy_",
    "log_normal_",
}


class _Operations(TorchDispatchMode):
    """Moves marks along with every aten operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping this mode for its compiler, the import of which takes a second."""
        return False

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        p = self.provenance
        name = func.overloadpacket.__name__
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return func(*args, **kwargs)  # a view: marks belong to the storage, which it shares
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("_local_scalar_dense", "is_nonzero"):
            p.leak(p.labels(*inputs), "item")
            return func(*args, **kwargs)
        before = {id(t): p.read(t) for t in inputs}
        marked = any(before.values())
        written = [
            a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        targets = [
            t for n in written for t in tree_leaves(argument(func, args, kwargs, n)) if isinstance(t, Tensor)
        ]
        out = func(*args, **kwargs)
        if targets:
            sources = [t for t in inputs if all(t is not w for w in targets)]
            inplace = name.endswith("_") and not any(a.is_out for a in func._schema.arguments)
            for target in targets:
                if inplace and name == "index_put_":
                    p.write(target, put(args, before))
                    indices = [i for i in args[1] if isinstance(i, Tensor)]
                    p.write(target, union(indices, before), keep=True)
                elif inplace and name not in _OVERWRITES:
                    pointed = pointwise(sources, before, target) if is_pointwise(func) else None
                    p.write(target, union(sources, before) if pointed is None else pointed, keep=True)
                elif is_pointwise(func) or name == "copy_":
                    p.write(target, pointwise(sources, before, target))
                else:
                    p.write(target, union(sources, before))
            return out
        if not marked:
            return out
        addresses = {_address(t) for t in inputs}
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and _address(result) not in addresses:
                p.write(result, passed_on(func, args, kwargs, before, result))
        return out


class _Functions(TorchFunctionMode):
    """Catches what never reaches the dispatcher as tensors: indexing by a number, and exits to numpy and Python."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self.provenance = provenance

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _EXITS:
            self.provenance.leak(self.provenance.labels(args), _EXITS[func])
        elif func is Tensor.__getitem__ and (index := _scalar_indices(args[1])):
            labels = self.provenance.labels(index)
            if labels:
                # Indexing by a 0-d integer tensor goes through .item(): keep the dependence ourselves.
                quiet = self.provenance.leaks
                self.provenance.leaks = []
                out = func(*args, **kwargs).clone()
                self.provenance.leaks = quiet
                self.provenance.write(out, dict.fromkeys(labels, True), keep=True)
                return out
        elif func is Tensor.__setitem__ and (index := _scalar_indices(args[1])):
            labels = self.provenance.labels(index)
            if labels:
                quiet = self.provenance.leaks
                self.provenance.leaks = []
                out = func(*args, **kwargs)
                self.provenance.leaks = quiet
                self.provenance.write(args[0], dict.fromkeys(labels, True), keep=True)
                return out
        return func(*args, **kwargs)


_EXITS: dict[Any, str] = {Tensor.numpy: "numpy", Tensor.tolist: "tolist", Tensor.__array__: "numpy"}


def _scalar_indices(index: Any) -> list[Tensor]:
    parts = index if isinstance(index, tuple) else (index,)
    return [i for i in parts if isinstance(i, Tensor) and i.ndim == 0 and not i.is_floating_point()]


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last element of the storage that a tensor may touch."""
    start = int(tensor.storage_offset())
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return start, start + sum((int(n) - 1) * int(step) for n, step in steps if n > 1)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


_LIBRARIES = ("torch", "pyro", "pgen", "zuko", "contextlib", "functools", "importlib")


def _line_of_program() -> str | None:
    """The line of the user's program that is running; None where a library looks at a value to check its arguments."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        root = module.partition(".")[0]
        if root in ("pyro", "zuko") or module.startswith(("torch.distributions", "torch.nn")):
            return None
        if root not in _LIBRARIES or module.startswith(("pgen.zoo", "pgen.nn", "pgen.distributions")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
