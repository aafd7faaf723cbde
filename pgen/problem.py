"""A problem: a Pyro program with its arguments and its data bound, ready to run; how data meets the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pgen.calling import is_required, name_of, parameters_of
from pgen.errors import DataError, ProgramError
from pgen.handlers import Adapt, Observe, StandIn
from pgen.tensors import ONLY_OBSERVED, as_tensor, holed, is_numbers, not_finite, shared_rows

Data = Any  # a mapping, a tensor, a tuple of tensors, a torch Dataset or DataLoader of those, or None


@dataclass(frozen=True)
class Problem:
    """A Pyro program with arguments and data bound: calling it, without arguments, runs the program on the data.

    Make one with `Problem.of`. A key of the data that names an argument of the program is passed to it; a key that
    names a site is observed there. Tensors share their leading dimension, the rows; `take` holds some of them.

    Attributes:
        program: any Pyro callable.
        inputs: data passed to the program as arguments, by name. NaN in what the program observes untouched means missing.
        observations: data observed at sites, by site name. NaN means missing.
        args: positional arguments, never batched; but for device and precision passed unchanged.
        kwargs: keyword arguments, likewise.
        rows: the number of rows N, or None where no tensor has a leading dimension or the program cannot take fewer.
        size: what the program is told, if it asks for the number of examples.
        total: rows of the problem that these rows were taken from (equal to `rows` unless `take` was used).
        unobserved: run the program forward, drawing also the sites that it observes by `obs=`.
    """

    program: Callable[..., Any]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    observations: Mapping[str, Tensor] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    size: int | None = None
    total: int | None = None
    unobserved: bool = False
    positional: tuple[str, ...] = ()  # the inputs passed by position, in order
    missing: frozenset[str] = frozenset()  # the observations that hold NaN
    holed: frozenset[str] = frozenset()  # the inputs that do
    size_name: str | None = None  # the argument that takes the number of rows
    adapters: Mapping[str, Callable[[Any], Any]] = field(
        default_factory=dict
    )  # site -> how its law is converted
    undrawable: frozenset[str] = frozenset()  # latents without a way to draw them, given some value instead
    learners: Mapping[str, Any] = field(default_factory=dict)
    completing: Mapping[str, Tensor] | None = None  # what is missing in part is a site (see `Observe`)
    source: _Rows | None = None  # a map-style dataset whose rows are read by `take`
    suggested_batch: int | None = None

    @staticmethod
    def of(
        program: Callable[..., Any],
        data: Data = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Problem:
        """Bind data and arguments to a program.

        Raises:
            DataError: empty data, infinite values, leading dimensions that disagree, or a key that cannot be used.
            ProgramError: the program is nothing that can be called.
        """
        if not callable(program) or isinstance(program, type):
            found = f"the class {program.__name__}" if isinstance(program, type) else type(program).__name__
            raise ProgramError(
                f"program is {found}; expected a function with pyro.sample statements, or a module (an instance of its class)"
            )
        bare = Problem(program, args=tuple(args), kwargs=dict(kwargs or {}))
        return bare.with_data(data)

    def with_data(self, data: Data) -> Problem:
        """The same program and arguments on other data."""
        clean = Problem(
            self.program,
            args=self.args,
            kwargs=self.kwargs,
            adapters=self.adapters,
            undrawable=self.undrawable,
            learners=self.learners,
        )
        if isinstance(data, Problem):
            raise DataError(
                "data is a Problem already; pass its data: a mapping, a tensor, a tuple, a Dataset or a DataLoader"
            )
        if isinstance(data, (DataLoader, Dataset)):
            return clean._with_source(data)
        if hasattr(data, "columns") and hasattr(data, "to_numpy"):  # a data frame: its columns by name
            data = {str(name): data[name].to_numpy() for name in data.columns}
        return clean._with_tensors(data)

    def _with_source(self, data: DataLoader | Dataset) -> Problem:
        loader = data if isinstance(data, DataLoader) else None
        dataset: Any = data.dataset if isinstance(data, DataLoader) else data
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise DataError(
                f"data is {type(dataset).__name__}, which has no length; rows are drawn by index: give a map-style Dataset "
                "(with __len__ and __getitem__) or tensors"
            )
        if isinstance(dataset, TensorDataset):
            tensors = dataset.tensors
            found = self._with_tensors(tensors if len(tensors) != 1 else tensors[0])
        elif len(dataset) == 0:
            raise DataError(f"data is empty: {type(dataset).__name__} has 0 rows; give at least one")
        else:
            collate = (
                loader.collate_fn if loader is not None and loader.collate_fn is not None else default_collate
            )
            rows = _Rows(dataset, collate)
            first = self._with_tensors(rows.read(torch.tensor([0])), by_row=True)
            found = replace(first, source=rows, rows=len(dataset), size=len(dataset), total=len(dataset))
        return replace(found, suggested_batch=None if loader is None else loader.batch_size)

    def holding(self, observations: Mapping[str, Tensor]) -> Problem:
        """The same problem, holding these values with NaN too, by site; those that it observes already stay."""
        more = {k: v for k, v in observations.items() if k not in self.observations}
        return self._but(observations={**self.observations, **more}, missing=self.missing.union(more))

    def _with_tensors(self, data: Data, by_row: bool = False) -> Problem:
        names, takes_any = parameters_of(self.program)
        positional: tuple[str, ...] = ()
        if data is None:
            named: dict[str, Any] = {}
        elif isinstance(data, Mapping):
            named = {str(k): v for k, v in data.items()}
        else:
            values = tuple(data) if isinstance(data, (tuple, list)) and not is_numbers(data) else (data,)
            order = [n for n in names if n not in self.kwargs]
            if len(values) > len(order) and not takes_any:
                raise DataError(
                    f"got {len(values)} positional data tensors, but {name_of(self.program)} takes {len(order)} arguments "
                    f"({', '.join(order) or 'none'}); to observe a site, give a mapping: {{'site': tensor}}"
                )
            if order[:1] == ["n"]:
                as_tensor("data", values[0])
                raise DataError(
                    f"{name_of(self.program)}(n) takes the number of examples, and the data is a bare tensor; "
                    "say which site it is observed at: {'site': tensor}"
                )
            positional = tuple(order[i] if i < len(order) else f"argument {i}" for i in range(len(values)))
            named = dict(zip(positional, values, strict=True))
        tensors = {key: as_tensor(key, value) for key, value in named.items()}
        accepts = set(positional) | set(names)
        inputs = {k: v for k, v in tensors.items() if k in accepts}
        observations = {k: v for k, v in tensors.items() if k not in accepts}
        for key, value in inputs.items():
            if value.is_floating_point() and bool(value.isinf().any() | (by_row & value.isnan().any())):
                raise DataError(not_finite(key, value, "argument", ONLY_OBSERVED))
        for key, value in observations.items():
            if value.is_floating_point() and bool(value.isinf().any()):
                raise DataError(
                    not_finite(key, value, "site", "only NaN is allowed there, and means missing")
                )
        rows = shared_rows(tensors)
        free = [
            n for n in names[len(self.args) + len(positional) :] if n not in self.kwargs and n not in inputs
        ]
        required = [n for n in free if is_required(self.program, n)]
        if len(required) > 1:
            raise DataError(
                f"{name_of(self.program)} still needs {', '.join(map(repr, required))}; give them in the data (batched by rows), in args=(...) "
                "or kwargs={...} (passed unchanged); a single open argument is given the number of rows"
            )
        size = next((n for n in free if n in required or n == "n"), None)
        if rows is None and size is not None and size in required:
            rows = 1  # no data: one example, as long as nobody asks for more
        return replace(
            self,
            inputs=inputs,
            observations=observations,
            rows=rows,
            size=rows,
            total=rows,
            positional=positional,
            missing=holed(observations),
            holed=holed(inputs),
            size_name=size,
        )

    @property
    def learning(self) -> Problem:
        """The same problem, its sites as they are learned: what a loss is computed from."""
        return self._but(adapters={**self.adapters, **self.learners}) if self.learners else self

    def told(self) -> dict[str, Tensor]:
        """What its learners tell about the last step, by site and name."""
        return {
            f"{site}.{k}": v for site, learner in self.learners.items() for k, v in learner.told().items()
        }

    def take(self, index: Tensor) -> Problem:
        """The same program on some of the rows."""
        if self.source is not None:
            taken = self._with_tensors(self.source.read(index), by_row=True)
            return replace(taken, total=self.total, source=None, unobserved=self.unobserved)
        if self.rows is None:
            return self
        pick = {k: v[index.to(v.device)] if v.ndim else v for k, v in self.inputs.items()}
        seen = {k: v[index.to(v.device)] if v.ndim else v for k, v in self.observations.items()}
        rest = self.completing and {k: v[index.to(v.device)] for k, v in self.completing.items()}
        return self._but(
            inputs=pick, observations=seen, completing=rest, rows=index.numel(), size=index.numel()
        )

    def _but(self, **changes: Any) -> Problem:
        """`dataclasses.replace`, ten times as fast: it is called at every step of a run."""
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        twin.__dict__.update(changes)
        return twin

    def whole(self) -> Problem:
        """The same problem, all rows always together: for programs whose size is fixed."""
        full = self.take(torch.arange(self.rows or 0)) if self.source is not None else self
        return replace(full, rows=None, total=None)

    def forward(self, n: int | None = None) -> Problem:
        """The same program run forward, nothing observed; on `n` rows, if given, recycling those of its inputs in order."""
        some = self
        if n is not None:
            some = replace(
                self.take(torch.arange(n) % self.rows) if self.rows is not None else self,
                rows=n,
                size=n,
                total=n,
            )
        return replace(some, observations={}, missing=frozenset(), unobserved=True)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Problem:
        """The data, and tensors among the arguments, moved to a device; those of floating-point numbers cast to a dtype."""
        inputs = {k: _moved(v, device, dtype) for k, v in self.inputs.items()}
        seen = {k: _moved(v, device, dtype) for k, v in self.observations.items()}
        rest = self.completing and {k: _moved(v, device, dtype) for k, v in self.completing.items()}
        source = self.source
        if source is not None:
            source = replace(source, device=device or source.device, dtype=dtype or source.dtype)
        args, kwargs = tree_map(partial(_moved, device=device, dtype=dtype), (self.args, dict(self.kwargs)))
        return replace(
            self,
            inputs=inputs,
            observations=seen,
            completing=rest,
            args=args,
            kwargs=kwargs,
            source=source,
        )

    @property
    def device(self) -> torch.device:
        """Where the data lies (the CPU, if there is none)."""
        return next(
            (v.device for v in (*self.inputs.values(), *self.observations.values())), torch.device("cpu")
        )

    @property
    def scale(self) -> float:
        """Rows of the whole over rows at hand: what the log probability of a row counts for."""
        return 1.0 if not self.rows or not self.total else self.total / self.rows

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments that the program is called with."""
        named: dict[str, Any] = {k: v for k, v in self.inputs.items() if k not in self.positional}
        if self.size_name is not None and (
            self.size is not None or is_required(self.program, self.size_name)
        ):
            named[self.size_name] = self.size if self.size is not None else 1
        return (*(self.inputs[k] for k in self.positional), *self.args), {**self.kwargs, **named}

    def __call__(self) -> Any:
        """Run the program on its data: a Pyro program of no arguments."""
        if self.source is not None:
            return self.take(torch.arange(self.rows or 0))()
        args, kwargs = self.arguments()
        meet = (
            poutine.uncondition()
            if self.unobserved
            else Observe(self.observations, self.missing, fallback=self.inputs, completing=self.completing)
        )
        with StandIn(self.undrawable), Adapt(self.adapters), meet:
            return self.program(*args, **kwargs)


@dataclass(frozen=True)
class _Rows:
    """Rows of a map-style dataset, read by index."""

    dataset: Any
    collate: Callable[[list[Any]], Any]
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def read(self, index: Tensor) -> Any:
        rows = self.collate([self.dataset[i] for i in index.tolist()])
        if self.device is None and self.dtype is None:
            return rows
        return tree_map(partial(_moved, device=self.device, dtype=self.dtype), rows)


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
