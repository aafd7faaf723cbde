"""`pgen explain`, `compare`, `sample`, `evaluate`: asking a program, or the fit in a run directory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from pgen.capability import Offer
from pgen.commands.drawing import draw_samples, square
from pgen.commands.fit import backend_from, run_of
from pgen.commands.inputs import data_of, is_file, program_of
from pgen.commands.output import emit, row_numbers, say, show, table
from pgen.commands.rundir import Config, RunDirectory
from pgen.comparison import Comparison
from pgen.comparison import compare as compare_fits
from pgen.comparison import evaluate as evaluate_fit
from pgen.errors import CheckpointError, OptionError
from pgen.fitted import Fitted
from pgen.fitting import explain as explain_program
from pgen.structure import Structure


def explain(
    program: str,
    arguments: Iterable[str],
    data: str | None,
    data_folder: Path | None,
    split: str | None,
    as_json: bool,
) -> None:
    """What every backend says about a program."""
    source = None if data is None else data_of(data, data_folder)
    wanted = program_of(program, arguments, data=source)
    rows = None if source is None else source.part(split, "train")[1]
    explanation = explain_program(wanted.call, rows, kwargs=wanted.kwargs)
    if as_json:
        emit(
            {
                "program": program,
                "sites": _sites(explanation.structure),
                "backends": [_answer(row) for row in explanation],
            }
        )
    else:
        show(explanation)


def compare(
    program: str,
    arguments: Iterable[str],
    data: str | None,
    data_folder: Path | None,
    split: str | None,
    backends: Iterable[str],
    test: str | None,
    run_words: Iterable[str],
    seed: int,
    as_json: bool,
    validation: str | None,
    **flags: Any,
) -> None:
    """Fit by several backends, and evaluate each on the same data."""
    source = None if data is None else data_of(data, data_folder)
    wanted = program_of(program, arguments, data=source, seed=seed)
    rows, held_out = None, None
    if source is not None:
        rows = source.part(split, "train")[1]
        held_out = source.part(test)[1] if test is not None else source.parts.get("test")
    elif test is not None:
        raise OptionError(f"--test {test}: a part of which data set? Give --data too")
    run = run_of(run_words, flags, source, validation, seed=seed)
    named = {spec: backend_from(spec) for spec in backends}
    compared = compare_fits(wanted.call, rows, named, test=held_out, kwargs=wanted.kwargs, run=run, seed=seed)
    if as_json:
        emit({"program": program, "on": compared.on, "rows": [row_numbers(row) for row in compared]})
    else:
        show(compared)


def sample(run: Path, count: int, out: Path | None, program: str | None, seed: int, as_json: bool) -> None:
    """Draw from a fit; to a file, or summed up."""
    if out is not None and out.suffix not in (".npz", ".safetensors", ".png"):
        raise OptionError(f"--out {out}: expected a file that ends in .npz, .safetensors or .png")
    fitted, _ = _opened(run, program)
    if out is not None and out.suffix == ".png":
        if draw_samples(fitted, out, n=count, seed=seed, image=square(fitted)) is None:
            raise OptionError(
                f"--out {out}: nothing that {run} draws can be shown as a picture; write numbers: --out "
                "draws.npz"
            )
        say(f"wrote {out}")
        return
    draws = fitted.sample(count, seed=seed)
    if out is not None:
        _write(out, draws)
    if as_json:
        emit(
            {
                "n": count,
                "out": None if out is None else str(out),
                "sites": {k: _moments(v) for k, v in draws.items()},
            }
        )
        return
    rows = [
        [
            k,
            list(v.shape),
            str(v.dtype).removeprefix("torch."),
            *(f"{m:.4g}" for m in _moments(v).values() if isinstance(m, float)),
        ]
        for k, v in draws.items()
    ]
    table(["site", "shape", "dtype", "mean", "sd", "min", "max"], rows)
    if out is not None:
        say(f"wrote {out}")


def evaluate(
    run: Path,
    data: str | None,
    data_folder: Path | None,
    split: str | None,
    program: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Evaluate a fit on held-out data."""
    fitted, config = _opened(run, program)
    name = config.data if data is None else data
    if name is None:
        part, rows = None, None
    elif data is None and Path(name).suffix:
        raise OptionError(
            f"{run} was fitted to the file {name}; name the file to evaluate on: pgen evaluate {run} --data "
            "FILE"
        )
    else:
        part, rows = data_of(name, data_folder).part(split, "test")
    row = evaluate_fit(f"{config.program} by {config.backend}", fitted, rows, seed=seed)
    on = "the training data" if rows is None else f"{name}, {part}"
    if as_json:
        emit({"run": str(run), "data": name, "split": part, **row_numbers(row)})
    else:
        show(Comparison((row,), on))


def _opened(run: Path, program: str | None) -> tuple[Fitted, Config]:
    """The fit in a run directory. Code is executed only where the user names it."""
    directory = RunDirectory(run)
    config = directory.config()
    if program is None and is_file(config.program):
        raise CheckpointError(
            f"{run} was made from {config.program!r}, a file of code, and a run directory does not decide "
            "what is executed; "
            f"name it yourself: --program {config.program}"
        )
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.arguments.items()}
    wanted = program_of(program or config.program, arguments=arguments)
    return directory.load(wanted.call, wanted.kwargs), config


def _sites(structure: Structure) -> list[dict[str, Any]]:
    return [
        {
            "name": s.name,
            "distribution": s.distribution,
            "observed": s.observed,
            "capabilities": sorted(c.value for c in s.capabilities),
            "event_shape": list(s.event_shape),
            "batch_shape": list(s.batch_shape),
            "plates": list(s.plates),
            "parents": list(s.parents),
            "params": list(s.params),
            "certain": s.certain,
        }
        for s in structure
    ]


def _answer(row: Any) -> dict[str, Any]:
    answer = row.answer
    if isinstance(answer, Offer):
        return {
            "backend": row.backend,
            "offered": True,
            "rank": answer.rank.name.lower(),
            "answers": {q.value: e.value for q, e in answer.answers.items()},
            "why": answer.why,
            "paths": {site: list(path) for site, path in answer.paths.items()},
        }
    return {
        "backend": row.backend,
        "offered": False,
        "site": answer.site,
        "missing": answer.missing,
        "why": answer.why,
    }


def _moments(value: Tensor) -> dict[str, Any]:
    number = value.detach().double()
    spread = float(number.std()) if number.numel() > 1 else 0.0
    return {
        "shape": list(value.shape),
        "mean": float(number.mean()),
        "sd": spread,
        "min": float(number.min()),
        "max": float(number.max()),
    }


def _write(out: Path, draws: Mapping[str, Tensor]) -> None:
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in draws.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npz":
            with zipfile.ZipFile(
                out, "w"
            ) as archive:  # np.savez has arguments that a site may be called like
                for name, tensor in tensors.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, tensor.numpy(), allow_pickle=False)
        else:
            save_file(tensors, out)
    except OSError as error:
        raise OptionError(f"--out {out}: it cannot be written: {error.strerror or error}") from error
