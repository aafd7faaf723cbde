"""Where problem, structure, backend and run meet: `fit`, `explain`, `load`."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from pgen.capability import Offer
from pgen.choice import Explanation, choose, conversions_of, examine, refusal_text
from pgen.conversion import Adapter, Conversions
from pgen.errors import OptionError, Refused
from pgen.fitted import Fitted
from pgen.inspection import inspect_problem
from pgen.isolation import isolated, whole_seed
from pgen.learning import incomparable, learners_of
from pgen.problem import Data, Problem
from pgen.protocols import Backend
from pgen.registry import Registry
from pgen.run import Run
from pgen.saving import restored
from pgen.structure import Structure
from pgen.training.options import shown


class UnusedOption(UserWarning):
    """An option of a run is set, and the backend has no use for it."""


def fit(
    program: Callable[..., Any],
    data: Data = None,
    backend: str | Backend | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    run: Run | None = None,
    seed: int | None = None,
) -> Fitted:
    """Fit a program to data by a backend.

    Args:
        program: any Pyro program.
        data: a mapping (keys name arguments or sites), a tensor or tuple (positional arguments), a torch Dataset or
            DataLoader of those, or None. Tensors share their leading dimension, the rows.
        backend: a registered name, a backend with options (`pgen.backend(name, ...)`), or None to choose.
        args: positional arguments passed to the program unchanged, never batched.
        kwargs: keyword arguments passed to the program unchanged, never batched.
        run: steps, batches, device, optimiser; defaults suit small problems.
        seed: makes everything repeatable; None takes that of the run. Recorded in `fitted.seed`.

    Raises:
        DataError: the data does not meet the program.
        ProgramError: the program raises.
        Refused: the backend cannot serve the program (its `refusal` names site and missing property).
        UnknownName: no such backend.
    """
    run = Run() if run is None else run
    if not isinstance(run, Run):
        raise OptionError(f"run is {type(run).__name__}; expected a pgen.Run, as in run=pgen.Run(steps=500)")
    seed = whole_seed(run.seed if seed is None else seed)
    with isolated(seed, run.precision):
        problem = Problem.of(program, data, args, kwargs)
        structure, problem = _inspected(
            problem.to(run.device, torch.float64 if run.precision == "float64" else None)
        )
        chosen = _chosen(backend, structure)
        if run.places and not getattr(chosen, "several_devices", False):
            raise OptionError(
                f"backend {chosen.name!r} computes on one device, and Run(devices=...) names {len(run.places)}; expected "
                f"Run(device={run.device!r}), or a backend that divides its work, such as 'mcmc'"
            )
        _warn_of_unused(chosen, run)
        offer = chosen.examine(structure)
        if not isinstance(offer, Offer):
            raise Refused(
                f"backend {chosen.name!r} cannot fit {structure.name}: {refusal_text(offer)}", offer
            )
        problem = _adapted(problem, structure, chosen, offer)
        _require_comparable(problem, run)
        torch.manual_seed(seed)
        answers = chosen.fit(problem, structure, replace(run, seed=seed))
    fitted = Fitted(problem, structure, chosen, offer, answers, seed, run.precision, run.progress)
    _warn_of_doubts(fitted, answers)
    return fitted


def _require_comparable(problem: Problem, run: Run) -> None:
    """Nothing is chosen by held-out losses that mean nothing."""
    told = None if run.validation is None else incomparable(problem.learners)
    if told is None:
        return
    if run.patience is not None:
        raise OptionError(f"Run(patience={run.patience}) cannot stop by a held-out loss here: {told}")
    warnings.warn(f"Run(validation=...) has little to say here: {told}", UnusedOption, stacklevel=3)


class Doubtful(UserWarning):
    """What was learned at a site looks wrong: its history says how."""


def _warn_of_doubts(fitted: Fitted, answers: Any) -> None:
    """Let the conversions that sites were learned by look at what came of it."""
    history = fitted.history
    for site, learner in fitted.problem.learners.items():
        if (
            fitted.structure.sites[site].parents or fitted.structure.sites[site].inputs
        ):  # a law for every value of these
            continue
        found = {k.partition(".")[2]: v for k, v in history.metrics.items() if k.startswith(f"{site}.")}
        for conversion in learner.path if history.steps else ():
            told = conversion.doubt(fitted.law(site), found) if conversion.doubt is not None else None
            if told is not None:
                history = replace(history, warnings=(*history.warnings, f"site {site!r}: {told}"))
                warnings.warn(history.warnings[-1], Doubtful, stacklevel=3)
    if history is not fitted.history:
        answers.history = history


def _adapted(problem: Problem, structure: Structure, backend: Backend, offer: Offer) -> Problem:
    """The problem, its sites converted as the offer says: in one way to be learned, in another to be asked about."""
    torch.manual_seed(0)
    learned = {site: conversions_of(structure, backend, site, path) for site, path in offer.learning.items()}
    learners = learners_of(problem, structure, learned)
    adapters = {}
    for site, path in offer.paths.items():
        kept = learners[site].memories if site in learners else {}
        adapters[site] = Adapter(conversions_of(structure, backend, site, path), kept)
    return replace(problem, adapters=adapters, learners=learners)


def _chosen(backend: str | Backend | None, structure: Structure) -> Backend:
    if isinstance(backend, str):
        return make_backend(backend)
    return choose(structure, _installed()) if backend is None else backend


def _warn_of_unused(backend: Backend, run: Run) -> None:
    unused: Callable[[Run], Mapping[str, str]] | None = getattr(backend, "unused", None)
    for name, instead in (unused(run) if unused is not None else {}).items():
        warnings.warn(
            f"backend {backend.name!r} makes no use of Run({name}={shown(getattr(run, name))}): {instead}",
            UnusedOption,
            stacklevel=3,
        )


def explain(
    program: Callable[..., Any],
    data: Data = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """What every installed backend would answer about a program, or which site lacks what: prints as a table."""
    structure, _ = _inspected(Problem.of(program, data, args, kwargs))
    return examine(structure, _installed())


def make_backend(name: str, **options: Any) -> Backend:
    """A backend by its registered name, with options: `pgen.backend("variational", particles=8)`.

    Raises:
        UnknownName: no backend of that name is installed.
        OptionError: it has no such option.
    """
    kind = Registry.installed().backend(name)
    known = [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise OptionError(
                f"backend {name!r} has no option {option!r}; {hint}Its options: {', '.join(known) or 'none'}"
            )
    return kind(**options)


def load(
    path: str | os.PathLike[str],
    program: Callable[..., Any],
    *,
    backend: Backend | None = None,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Fitted:
    """Load what `fitted.save(path)` wrote; names in the file resolve only among installed backends.

    Args:
        path: the folder.
        program: the program that was fitted.
        backend: the backend, where one of its options (such as a guide) could not be saved.
        args: positional arguments of the program, where they could not be saved.
        kwargs: keyword arguments, likewise.

    Raises:
        CheckpointError: missing, truncated or altered files, or another program.
    """
    return restored(
        path, program, lambda name, options: make_backend(name, **options), _unlearned, backend, args, kwargs
    )


def _unlearned(
    program: Callable[..., Any], data: Data, backend: Backend, *, precision: Any, **options: Any
) -> Fitted:
    return fit(program, data, backend, run=Run(steps=0, progress=False, precision=precision), **options)


def _installed() -> list[Backend]:
    return [kind() for kind in Registry.installed().backends.values()]


def _inspected(problem: Problem) -> tuple[Structure, Problem]:
    structure, problem = inspect_problem(problem)
    return replace(structure, conversions=Conversions(Registry.installed().conversions)), problem
