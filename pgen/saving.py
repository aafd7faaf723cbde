"""A fit as a folder: its tensors, and what else a file can hold of it; and a fit again from these.

What JSON cannot hold, such as a function among the options, is named, and has to be given again. Options that only
training asks for, which backends mark with `field(metadata={"saved": False})`, are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgen import store
from pgen.errors import CheckpointError
from pgen.history import History
from pgen.protocols import Backend
from pgen.structure import Structure

if TYPE_CHECKING:
    from pgen.fitted import Fitted

_HELD = "tensor"  # marks the place of a tensor among options
_KEEP_BYTES = 16 * 2**20  # of training data, up to which it is saved too: queries without data go on working


def save(fitted: Fitted, path: str | os.PathLike[str]) -> None:
    """Write a fit to a folder.

    Raises:
        CheckpointError: an option or argument has no place in such a file; the message says which.
    """
    problem = fitted.problem
    kept = (
        fitted._complete
        and sum(v.nbytes for v in (*problem.inputs.values(), *problem.observations.values())) <= _KEEP_BYTES
    )
    if problem.source is not None:
        kept, problem = False, problem.take(torch.arange(min(3, problem.rows or 0)))
    elif not kept and problem.rows is not None:
        problem = problem.take(torch.arange(min(3, problem.rows)))
    tensors = {f"answers.{k}": v for k, v in fitted._answers.tensors().items()}
    tensors |= {f"input.{k}": v for k, v in problem.inputs.items()}
    tensors |= {f"observation.{k}": v for k, v in problem.observations.items()}
    held: dict[str, Tensor] = {}
    kept_options = [f.name for f in fields(fitted.backend) if f.metadata.get("saved", True)]  # type: ignore[arg-type]
    options = {name: _plain(getattr(fitted.backend, name), held) for name in kept_options}
    tensors |= held
    metadata = {
        "backend": fitted.backend.name,
        "options": options,
        "program": fitted.structure.name,
        "sites": _signature(fitted.structure),
        "seed": fitted.seed,
        "precision": fitted._precision,
        "complete": bool(kept),
        "positional": list(problem.positional),
        "arguments": {
            "args": [_plain(a) for a in problem.args],
            "kwargs": {k: _plain(v) for k, v in problem.kwargs.items()},
        },
        "history": fitted.history.to_json(),
    }
    store.save(path, tensors, metadata)


def restored(
    path: str | os.PathLike[str],
    program: Callable[..., Any],
    find: Callable[[str, Mapping[str, Any]], Backend],
    fit: Callable[..., Fitted],
    backend: Backend | None,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
) -> Fitted:
    """A saved fit, put together again: the same backend on the same structure, then the learned tensors."""
    tensors, metadata = store.load(path)
    where = os.fspath(path)
    try:
        inputs = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("input.")}
        observed = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("observation.")}
        learned = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("answers.")}
        positional = metadata["positional"]
        data = tuple(inputs[k] for k in positional) if positional else ({**inputs, **observed} or None)
        options, name = _filled(metadata["options"], tensors), metadata["backend"]
        saved_args, saved_kwargs = metadata["arguments"]["args"], metadata["arguments"]["kwargs"]
        signature, seed = metadata["sites"], int(metadata["seed"])
        history, complete = History.from_json(metadata["history"]), bool(metadata["complete"])
        precision = metadata["precision"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is no saved fit: {type(error).__name__} {error} in its metadata; expected what fitted.save wrote"
        ) from error
    for what, given, saved in (("args", args, saved_args), ("kwargs", kwargs, saved_kwargs)):
        lost = [v for v in (saved.values() if isinstance(saved, dict) else saved) if _lost(v)]
        if lost and given is None:
            raise CheckpointError(
                f"{where}: the fit was given {lost[0]['object']} in {what}, which a file cannot hold; give it again: pgen.load(path, program, {what}=...)"
            )
    if backend is None:
        lost_options = [k for k, v in options.items() if _lost(v)]
        if lost_options:
            raise CheckpointError(
                f"{where}: option {lost_options[0]!r} of backend {name!r} was {options[lost_options[0]]['object']}, which a file cannot hold; "
                f"give the backend again: pgen.load(path, program, backend=pgen.backend({name!r}, {lost_options[0]}=...))"
            )
        backend = find(name, {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    elif backend.name != name:
        raise CheckpointError(f"{where} was fitted by backend {name!r}, not {backend.name!r}")
    fitted = fit(
        program,
        data,
        backend,
        args=tuple(saved_args) if args is None else args,
        kwargs=saved_kwargs if kwargs is None else kwargs,
        seed=seed,
        precision=precision,
    )
    if _signature(fitted.structure) != signature:
        raise CheckpointError(
            f"{where} holds a fit of the sites {signature}, but this program has {_signature(fitted.structure)}; load with the program that was fitted"
        )
    fitted._answers.load(learned)
    fitted._answers.history = history
    fitted._complete, fitted._progress = complete, None
    return fitted


def _signature(structure: Structure) -> dict[str, list[Any]]:
    return {s.name: [s.distribution, list(s.event_shape), s.observed] for s in structure}


def _plain(value: Any, held: dict[str, Tensor] | None = None) -> Any:
    """A value as JSON holds it; what JSON cannot hold is named, to be given again at loading.

    Where `held` is given, tensors are put there, and objects that say themselves as plain values and tensors (`plain()`)
    are kept as that.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if held is not None and isinstance(value, Tensor):
        name = f"option.{len(held)}"
        held[name] = value
        return {_HELD: name}
    if held is not None and callable(getattr(value, "plain", None)):
        value = value.plain()
    if isinstance(value, (list, tuple)):
        items = [_plain(v, held) for v in value]
        if not any(_lost(v) for v in items):
            return items
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        named = {k: _plain(v, held) for k, v in value.items()}
        if not any(_lost(v) for v in named.values()):
            return named
    return {"object": f"{type(value).__module__}.{type(value).__qualname__}", "lost": True}


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_plain` made, with the tensors that it held."""
    if isinstance(value, list):
        return [_filled(v, tensors) for v in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {_HELD}:
        return tensors[value[_HELD]]
    return {k: _filled(v, tensors) for k, v in value.items()}


def _lost(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("lost") is True
