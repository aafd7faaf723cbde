"""The learned tensors of a program: found, cloned, and lent to the user's modules for the length of one call.

Weights of `nn.Module`s are found on the program itself, its bound object, closure, globals, arguments and through
`pyro.module`; `pyro.param` values in the store. A fit trains clones, so two fits of one program never share weights,
the user's modules keep theirs, and Pyro's process-wide store stays as it was.
"""

from __future__ import annotations

import functools
import gc
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pgen.calling import held_by, is_handler
from pgen.errors import CheckpointError
from pgen.handlers import StandIn
from pgen.problem import Problem

_Slot = tuple[
    MutableMapping[str, Any], str, str
]  # a module's dict of tensors, the key in it, the name of our tensor


class Parameters:
    """The learned tensors of one fit of a program.

    Attributes:
        tensors: name -> leaf tensor, trained in place (unconstrained for `pyro.param` with a constraint).
        buffers: name -> tensor that the program updates or keeps fixed (running means, frozen weights).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Empty; `Parameters.of` finds those of a program."""
        self._device = device
        self.tensors: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._slots: list[_Slot] = []
        self._modules: list[nn.Module] = []
        self._constraints: dict[str, Any] = {}
        self._known: dict[int, str] = {}

    @staticmethod
    def of(
        problem: Problem, owners: Mapping[str, object] | None = None, run: Callable[[], object] | None = None
    ) -> Parameters:
        """Find and clone the learned tensors of a problem's program, and of further owners such as a guide.

        Args:
            problem: the program with some data; it is run once, so that `pyro.param` and `pyro.module` are met.
            owners: further objects to search, by the prefix of their names: `{"guide": guide}`.
            run: what to run instead of the problem alone, e.g. guide and program in turn.
        """
        found = Parameters(problem.device)
        for name, value in _roots(problem):
            found._search(name, value)
        for name, value in (owners or {}).items():
            found._search(name, value)
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            pyro.get_param_store().scope() as store,
            found._lent(training=False),
            StandIn(),
        ):
            (run or problem)()
        found._adopt(store)
        return found

    @contextmanager
    def installed(self, training: bool = False) -> Iterator[Parameters]:
        """Lend the tensors to the user's modules and to Pyro's store, and put everything back at the end."""
        params = {name: self.tensors[name] for name in self._constraints}
        scope = {"params": params, "constraints": dict(self._constraints)}
        with self._lent(training), pyro.get_param_store().scope(scope):  # type: ignore[arg-type]
            yield self

    def state(self) -> dict[str, Tensor]:
        """All tensors and buffers, detached, by name."""
        return {k: v.detach().clone() for k, v in {**self.tensors, **self.buffers}.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved values.

        Raises:
            CheckpointError: a name is missing, unknown, or of another shape.
        """
        own = {**self.tensors, **self.buffers}
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise CheckpointError(
                f"the saved tensors are not those of this program: it lacks {missing or 'none'}, and the file has {unknown or 'none'} "
                "more; load with the program that was fitted"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != state[name].shape:
                    raise CheckpointError(
                        f"saved tensor {name!r} has shape {tuple(state[name].shape)}, the program's has {tuple(tensor.shape)}; "
                        "load with the program that was fitted"
                    )
                tensor.copy_(state[name])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Parameters:
        """Move the tensors, in place, to a device or floating-point dtype."""
        for group in (self.tensors, self.buffers):
            for name, tensor in group.items():
                moved = tensor.detach().to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                if moved is not tensor.detach() and (
                    moved.device != tensor.device or moved.dtype != tensor.dtype
                ):
                    group[name] = moved.requires_grad_(tensor.requires_grad)
        return self

    def frozen(self) -> Parameters:
        """The same tensors detached: nothing that runs the program learns through them."""
        twin = Parameters()
        twin.__dict__.update(vars(self))
        twin.tensors = {k: v.detach() for k, v in self.tensors.items()}
        return twin

    def constraint(self, name: str) -> Any:
        """The constraint of a `pyro.param`, or None for a module's weight, which is free."""
        return self._constraints.get(name)

    def _search(self, name: str, value: object) -> None:
        for path, module in _modules_in(name, value, set()):
            for inner, part in module.named_modules(prefix=path):
                if any(part is m for m in self._modules):
                    continue
                self._modules.append(part)
                for kind in ("_parameters", "_buffers"):
                    slots = getattr(part, kind)
                    for key, tensor in slots.items():
                        if tensor is not None:
                            self._claim(slots, key, f"{inner}.{key}".lstrip("."), tensor)

    def _claim(self, slots: MutableMapping[str, Any], key: str, name: str, tensor: Tensor) -> None:
        known = self._known.get(id(tensor))
        if known is None:
            trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            clone = self._copy(tensor)
            clone = (
                nn.Parameter(clone)
                if trained
                else (nn.Parameter(clone, False) if isinstance(tensor, nn.Parameter) else clone)
            )
            (self.tensors if trained else self.buffers)[name] = clone
            self._known[id(tensor)] = self._known[id(clone)] = known = name
        self._slots.append((slots, key, known))

    def _copy(self, tensor: Tensor) -> Tensor:
        double = tensor.is_floating_point() and torch.get_default_dtype() is torch.float64
        return tensor.detach().to(self._device, torch.float64 if double else None, copy=True)

    def _adopt(self, store: Mapping[str, Any]) -> None:
        """Take over what the program put into Pyro's store: values of `pyro.param`, weights of unseen modules."""
        for name, tensor in store["params"].items():
            if id(tensor) in self._known:
                continue
            if (
                "$$$" in name
                and (slots := _owner_of(tensor, name.rpartition(".")[2].rpartition("$$$")[2])) is not None
            ):
                self._claim(
                    slots, name.rpartition(".")[2].rpartition("$$$")[2], name.replace("$$$", "."), tensor
                )
                continue
            self.tensors[name] = self._copy(tensor).requires_grad_()
            self._constraints[name] = store["constraints"][name]

    @contextmanager
    def _lent(self, training: bool) -> Iterator[None]:
        before = [slots[key] for slots, key, _ in self._slots]
        modes = [m.training for m in self._modules]
        try:
            for slots, key, name in self._slots:
                slots[key] = self.tensors[name] if name in self.tensors else self.buffers[name]
            for module in self._modules:
                if (
                    module.training != training
                ):  # setting an attribute of a module costs more than all else here
                    module.training = training
            yield
        finally:
            for (slots, key, name), value in zip(self._slots, before, strict=True):
                if name in self.buffers and slots.get(key) is not None:
                    self.buffers[name] = slots[
                        key
                    ]  # some modules replace a buffer instead of writing into it
                slots[key] = value
            for module, mode in zip(self._modules, modes, strict=True):
                if module.training != mode:
                    module.training = mode


def _roots(problem: Problem) -> list[tuple[str, object]]:
    named = [(f"args.{i}", a) for i, a in enumerate(problem.args)]
    kept = [(f"learning.{site}", learner.modules()) for site, learner in problem.learners.items()]
    return [("", problem.program), *named, *((k, v) for k, v in problem.kwargs.items()), *kept]


def _modules_in(name: str, value: object, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a value holds, with the path at which each was found, in a fixed order."""
    if id(value) in seen or getattr(type(value), "pgen_fixed", False):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield name, value
        children: Sequence[tuple[str, object]] = []
    elif isinstance(value, types.MethodType):
        children = [("", value.__self__), ("", value.__func__)]
    elif isinstance(value, functools.partial) or is_handler(value):
        held, args, kwargs = held_by(value)
        children = [("", held), *((str(i), a) for i, a in enumerate(args)), *kwargs.items()]
    elif isinstance(value, types.FunctionType):
        if not _is_users(value.__module__):
            return
        children = [*_captured(value), *((f"default.{i}", d) for i, d in enumerate(value.__defaults__ or ()))]
    elif isinstance(value, Mapping):
        children = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(i), v) for i, v in enumerate(value)]
    elif (
        _is_users(type(value).__module__)
        and hasattr(value, "__dict__")
        and not isinstance(value, (type, types.ModuleType, Tensor))
    ):
        children = [*vars(value).items(), ("", getattr(type(value), "__call__", None))]  # noqa: B004 - not to know, to search
    else:
        return
    for key, child in children:
        yield from _modules_in(f"{name}.{key}".strip("."), child, seen)


def _captured(function: types.FunctionType) -> list[tuple[str, object]]:
    wrapped = inspect.unwrap(function)
    found: list[tuple[str, object]] = [] if wrapped is function else [("", wrapped)]
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((key, cell.cell_contents))
        except ValueError:  # a cell that is still empty
            continue
    names = {n for code in _codes(function.__code__) for n in code.co_names}
    return found + [(n, function.__globals__[n]) for n in sorted(names) if n in function.__globals__]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_users(module: str | None) -> bool:
    """Whether code of this module may hold a user's networks (libraries are not searched)."""
    root = (module or "").partition(".")[0]
    return root not in {
        "torch",
        "pyro",
        "numpy",
        "builtins",
        "networkx",
        "zuko",
        "functools",
        "typing",
        "collections",
    }


def _owner_of(tensor: Tensor, key: str) -> MutableMapping[str, Any] | None:
    """The dict of a module that was met only through `pyro.module`: the one that holds this very tensor."""
    for holder in gc.get_referrers(tensor):
        if (
            isinstance(holder, dict)
            and holder.get(key) is tensor
            and any(isinstance(o, dict) and o.get("_parameters") is holder for o in gc.get_referrers(holder))
        ):
            return holder
    return None
