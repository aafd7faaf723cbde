"""A run directory: what `pgen fit` leaves behind, and what `pgen sample` and `pgen evaluate` read again.

    config.json     program, data, backend with options, run, seed, versions: what was asked for
    metrics.jsonl   one line of metrics per step
    fit/            what was learned: safetensors, JSON and checksums (`Fitted.save`)
    samples.png     draws, where there is something to draw
    loss.png        the loss by step, where there was one
    traces.png      the chains that agree least, where there are chains
    chains/         their draws so far, from which a run that was killed goes on
    checkpoints/    only where checkpoints were asked for

Nothing in it is executed. A program of the registry is found by its name; one that came from a file is only
named, as text, and must be given again by who reads the directory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pgen.errors import CheckpointError, OptionError
from pgen.fitted import Fitted
from pgen.fitting import load
from pgen.plugins.loader import scan

CONFIG, METRICS, FIT, SAMPLES, LOSS, TRACES, CHAINS, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "fit",
    "samples.png",
    "loss.png",
    "traces.png",
    "chains",
    "checkpoints",
)
FORMAT = 1
_LIMIT = 2**20  # bytes of a configuration; anything longer was not written here
_OWN = frozenset({CONFIG, METRICS, FIT, SAMPLES, LOSS, TRACES, CHAINS, CHECKPOINTS})


@dataclass(frozen=True)
class Config:
    """What was asked for.

    Attributes:
        program: a name in the registry, or `file.py:name`.
        arguments: arguments of the program, as plain values.
        data: a name in the registry, a path, or None.
        split: the part of the data set that was learned from.
        backend: its registered name.
        options: its options; what JSON cannot hold is named, not stored.
        run: the fields of `pgen.Run`, likewise.
        seed: of everything.
        versions: of what numbers depend on.
    """

    program: str
    arguments: Mapping[str, Any]
    data: str | None
    split: str | None
    backend: str
    options: Mapping[str, Any]
    run: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str] = field(default_factory=lambda: versions())


@dataclass(frozen=True)
class RunDirectory:
    """A folder with the files named above."""

    path: Path

    @staticmethod
    def create(path: Path, config: Config, *, force: bool = False) -> RunDirectory:
        """Make the folder and write the configuration.

        A folder that holds an unfinished run of the same configuration is gone on with.

        Raises:
            CheckpointError: it holds a finished run, another run, or other files, and is left as it is.
        """
        made = RunDirectory(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            strange = (
                sorted(f.name for f in path.iterdir() if f.name not in _OWN) if path.is_dir() else ["a file"]
            )
            if strange:
                raise CheckpointError(
                    f"{path} holds {strange[0]!r}, which is no part of a run; give another folder: --out "
                    "FOLDER"
                )
            if force:
                shutil.rmtree(path)
            elif (path / FIT).exists():
                raise CheckpointError(
                    f"{path} holds a finished run; give another folder (--out FOLDER), or replace it "
                    "(--force)"
                )
            elif made.config() != config:
                raise CheckpointError(
                    f"{path} holds an unfinished run of another configuration; give another folder (--out "
                    "FOLDER), or replace it (--force)"
                )
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"format": FORMAT, **asdict(config)}, indent=2, allow_nan=False)
            (path / CONFIG).write_text(text + "\n", encoding="utf-8")
            (path / METRICS).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path}: the run directory cannot be written: {error.strerror or error}"
            ) from error
        return made

    @contextmanager
    def unless_failed(self) -> Iterator[None]:
        """Take the folder away again if a run fails before there is anything in it to keep."""
        try:
            yield
        except BaseException:
            if {f.name for f in self.path.iterdir()} <= {CONFIG}:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    @property
    def fit(self) -> Path:
        """The folder with what was learned."""
        return self.path / FIT

    @property
    def metrics(self) -> Path:
        """The file with metrics by step."""
        return self.path / METRICS

    @property
    def samples(self) -> Path:
        """The picture of draws."""
        return self.path / SAMPLES

    @property
    def loss(self) -> Path:
        """The picture of the loss."""
        return self.path / LOSS

    @property
    def traces(self) -> Path:
        """The picture of chains."""
        return self.path / TRACES

    @property
    def checkpoints(self) -> Path:
        """The folder with checkpoints."""
        return self.path / CHECKPOINTS

    def config(self) -> Config:
        """What was asked for.

        Raises:
            CheckpointError: the folder or the file is missing, truncated, or not what it claims to be.
        """
        return _config(self.path / CONFIG, _read(self.path))

    def load(self, program: Callable[..., Any], kwargs: Mapping[str, Any] | None = None) -> Fitted:
        """The fit, with the program that was fitted.

        Raises:
            CheckpointError: the run did not finish, or its files are truncated, altered or another program's.
        """
        if not self.fit.exists():
            raise CheckpointError(
                f"{self.path} holds no finished fit ({FIT}/ is missing): the run was ended before it could "
                "be saved; fit again"
            )
        return load(self.fit, program, kwargs=kwargs)


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("pgen-ppl", "torch", "pyro-ppl", "numpy", "zuko"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pgen itself, run from a source tree
            found[name] = next((p.version for p in scan() if p.distribution == name), "unknown")
    return found


def _read(folder: Path) -> bytes:
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is {'no folder' if folder.exists() else 'not there'}; expected a run directory, as "
            "`pgen fit` writes it"
        )
    try:
        with open(path, "rb") as file:
            text = file.read(_LIMIT + 1)
    except OSError as error:
        held = ", ".join(sorted(os.listdir(folder))[:5]) or "nothing"
        raise CheckpointError(
            f"{folder} is no run directory: {CONFIG} cannot be read ({error.strerror}); it holds {held}"
        ) from error
    if len(text) > _LIMIT:
        raise CheckpointError(f"{path} is longer than {_LIMIT} bytes; `pgen fit` writes no such file")
    return text


def _config(path: Path, text: bytes) -> Config:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not text.strip() else f"is truncated or altered: {error}"
        raise CheckpointError(f"{path} {what}; expected the JSON that `pgen fit` wrote") from error
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{path} has another format than {FORMAT}; it was written by another version of pgen, or altered"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "program": (str,), "arguments": (dict,), "data": (str, type(None)), "split": (str, type(None)),
        "backend": (str,), "options": (dict,), "run": (dict,), "seed": (int,), "versions": (dict,),
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(found.get(key, ...), kind):
            got = "nothing" if key not in found else type(found[key]).__name__
            raise CheckpointError(
                f"{path}: {key!r} must be {' or '.join(k.__name__ for k in kind)}, and is {got}; the file "
                "was altered"
            )
    if strange := sorted(found.keys() - kinds.keys()):
        raise CheckpointError(f"{path}: {strange[0]!r} is no part of a configuration; the file was altered")
    return Config(**found)


def unused(parent: Path, name: str) -> Path:
    """A folder of that name that is not there yet: `name`, `name-2`, `name-3`, ...

    Raises:
        OptionError: the name has a character that a folder's must not have.
    """
    if os.sep in name or name in ("", ".", ".."):
        raise OptionError(f"{name!r} cannot name a folder; say where to write: --out FOLDER")
    taken = 2
    path = parent / name
    while path.exists():
        path, taken = parent / f"{name}-{taken}", taken + 1
    return path
