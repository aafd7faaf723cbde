"""`pgen fit`: a program, data and a backend in; a run directory out."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pgen.choice import choose
from pgen.commands.drawing import draw_chains, draw_loss, draw_samples
from pgen.commands.inputs import Program, Source, data_of, program_of
from pgen.commands.options import typed
from pgen.commands.output import emit, say, show
from pgen.commands.rundir import Config, RunDirectory, unused
from pgen.draws import Draws
from pgen.errors import OptionError
from pgen.fitted import Fitted
from pgen.fitting import explain, make_backend
from pgen.fitting import fit as fit_program
from pgen.history import History
from pgen.observers import JsonLines
from pgen.protocols import Backend
from pgen.registry import Registry
from pgen.run import Run

RUN_FLAGS = ("steps", "batch_size", "lr", "patience", "device")
"""Fields of `Run` that have a flag of their own."""


def fit(
    program: str,
    arguments: Iterable[str],
    data: str | None,
    data_folder: Path | None,
    split: str | None,
    backend: str | None,
    options: Iterable[str],
    run_words: Iterable[str],
    seed: int,
    out: Path | None,
    force: bool,
    as_json: bool,
    validation: str | None,
    **flags: Any,
) -> None:
    """Fit, save, draw, and say what came of it."""
    source = None if data is None else data_of(data, data_folder)
    wanted = program_of(program, arguments, data=source, seed=seed)
    part, rows = (None, None) if source is None else source.part(split, "train")
    chosen = backend_of(backend, options) or _best(wanted, rows)
    named = f"{wanted.name}-{chosen.name}"
    folder = unused(Path("runs"), named) if out is None else out
    run = run_of(run_words, flags, source, validation, directory=folder, seed=seed)
    config = Config(
        program=program,
        arguments={k: to_json(v) for k, v in wanted.arguments.items()},
        data=data,
        split=part,
        backend=chosen.name,
        options=described_options(chosen),
        run={**run.described(), "validation": validation, "directory": None, "observers": []},
        seed=seed,
    )
    directory = RunDirectory.create(folder, config, force=force)
    run = run_of(
        run_words,
        flags,
        source,
        validation,
        directory=folder,
        seed=seed,
        observers=(JsonLines(directory.metrics),),
    )
    with directory.unless_failed():
        fitted = fit_program(wanted.call, rows, chosen, kwargs=wanted.kwargs, run=run, seed=seed)
        fitted.save(directory.fit)
    # Chains note how often they accepted; no other fit does.
    drawn = fitted.draws() if "acceptance_rate" in fitted.history else None
    image = getattr(getattr(source, "whole", None), "image", None)
    pictures = _pictures(fitted, directory, image, seed, drawn)
    if as_json:
        emit({"run": str(folder), **_summary(fitted), **({} if drawn is None else _posterior(drawn))})
        return
    written = [
        "config.json",
        *(["metrics.jsonl"] if directory.metrics.exists() else []),
        "fit/",
        *pictures,
    ]
    if drawn is not None:
        show(drawn.summary())
    say(f"{wanted.name} by {chosen.name}: {_training(fitted.history)}")
    say(f"answers {', '.join(f'{q.value}: {e.value}' for q, e in fitted.offer.answers.items())}")
    say(f"wrote {folder}: {', '.join(written)}")


def backend_of(name: str | None, words: Iterable[str]) -> Backend | None:
    """The backend of that name with options `key=value`; None where no name is given.

    Raises:
        OptionError: options without a backend, an unknown option, or a value that it does not take.
    """
    words = list(words)
    if name is None:
        if words:
            raise OptionError(
                f"--set {words[0]}: whose option? Name the backend too: --backend NAME --set {words[0]}"
            )
        return None
    kind = Registry.installed().backend(name)
    return make_backend(name, **typed(kind, words, flag="--set", owner=f"backend {name!r}"))


def backend_from(spec: str) -> Backend:
    """A backend from one word with options: `"variational objective=iwae particles=8"`."""
    try:
        name, *words = shlex.split(spec)
    except ValueError as error:
        raise OptionError(
            f"--backend {spec!r}: expected a name and options, for example 'variational objective=iwae' "
            f"({error})"
        ) from error
    found = backend_of(name, words)
    if found is None:
        raise OptionError(f"--backend {spec!r}: expected a name")
    return found


def run_of(
    words: Iterable[str],
    flags: Mapping[str, Any],
    source: Source | None,
    validation: str | None,
    **fixed: Any,
) -> Run:
    """The run that the flags of a command describe.

    Raises:
        OptionError: an unknown field, a value that it does not take, or one that is given twice.
    """
    fields = typed(Run, words, flag="--run", owner="a run")
    given = {k: flags[k] for k in RUN_FLAGS if flags.get(k) is not None}
    for key in fields.keys() & (given.keys() | fixed.keys() | ({"validation"} if validation else set())):
        flag = "--out" if key in ("directory", "observers") else f"--{key.replace('_', '-')}"
        raise OptionError(f"--run {key}=...: say it by {flag}")
    if validation is not None:
        given["validation"] = _held_out(validation, source)
    return Run(**fields, **given, **fixed)


def described_options(backend: Backend) -> dict[str, Any]:
    """The options of a backend as JSON values; what JSON cannot hold is named."""
    return {name: to_json(value) for name, value in vars(backend).items()}


def to_json(value: Any) -> Any:
    """A value as JSON holds it, or what it is called."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _held_out(text: str, source: Source | None) -> Any:
    try:
        return float(text)
    except ValueError:
        if source is None:
            raise OptionError(f"--validation {text}: a part of which data set? Give --data too") from None
        return source.part(text)[1]


def _pictures(
    fitted: Fitted,
    directory: RunDirectory,
    image: tuple[int, int] | None,
    seed: int,
    drawn: Draws | None,
) -> list[str]:
    """Names of the pictures that were drawn; none, with a warning, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        warnings.warn(
            "no pictures without matplotlib: pip install 'pgen-ppl[plots]'", UserWarning, stacklevel=2
        )
        return []
    written = [
        draw_samples(fitted, directory.samples, seed=seed, image=image),
        draw_loss(fitted.history, directory.loss),
        draw_chains(drawn, directory.traces),
    ]
    return [path.name for path in written if path is not None]


def _best(program: Program, data: Any) -> Backend:
    structure = explain(program.call, data, kwargs=program.kwargs).structure
    return choose(structure, [make_backend(name) for name in Registry.installed().backends])


def _summary(fitted: Fitted) -> dict[str, Any]:
    history = fitted.history
    return {
        "backend": fitted.backend.name,
        "answers": {q.value: e.value for q, e in fitted.offer.answers.items()},
        "stopped": history.stopped,
        "steps": history.steps,
        "seconds": history.seconds,
        "loss": float(history["loss"][-1]) if "loss" in history and history.steps else None,
        "validation": history.validation[-1][1] if history.validation else None,
        "seed": fitted.seed,
    }


def _posterior(drawn: Draws) -> dict[str, Any]:
    summary = drawn.summary()
    keys = ("mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "r_hat")
    return {
        "posterior": {row.name: {key: getattr(row, key) for key in keys} for row in summary},
        "chains": summary.chains,
        "draws": summary.draws,
        "warnings": list(summary.warnings),
    }


def _training(history: History) -> str:
    text = repr(history).removeprefix("History(").removesuffix(")")
    return f"{text} (what was learned so far is kept)" if history.stopped == "interrupted" else text
