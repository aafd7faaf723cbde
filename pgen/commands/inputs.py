"""What PROGRAM and DATA on a command line mean: names of the registry, a file of code, a file of numbers."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pgen.commands.options import near, pairs, plain
from pgen.errors import DataError, OptionError, PgenError, ProgramError, UnknownName
from pgen.registry import Registry

_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)")


@dataclass(frozen=True)
class Program:
    """A program, with what is passed to it beside data.

    Attributes:
        text: what the user wrote.
        call: the Pyro program.
        kwargs: arguments passed to it unchanged.
        arguments: what `--arg` said, as plain values.
    """

    text: str
    call: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A short name, for folders."""
        found = _FILE.fullmatch(self.text)
        return found["name"] if found else self.text.rpartition(":")[2]


def is_file(text: str) -> bool:
    """Whether a program is named by a file of code."""
    return _FILE.fullmatch(text) is not None


def program_of(
    text: str,
    words: Iterable[str] = (),
    *,
    arguments: Mapping[str, Any] | None = None,
    data: Source | None = None,
    seed: int = 0,
) -> Program:
    """The program that a word on the command line means.

    Args:
        text: a name in the registry, whose maker is called; or `file.py:name`, a program in a file, which is
            executed. A class in a file is instantiated.
        words: arguments `key=value` of the maker or class, or of the program where a file holds a function.
        arguments: the same, as values.
        data: what the program will be fitted to; it settles arguments of a maker, such as `features`.
        seed: of the initial weights.

    Raises:
        UnknownName: no such name, file, or name in the file.
        ProgramError: executing the file raised, or what it holds is no program.
        OptionError: an argument that the maker does not take.
    """
    values = {**{k: plain(v) for k, v in pairs(words, "--arg").items()}, **(arguments or {})}
    if text.endswith(".py"):
        raise UnknownName(
            f"{text}: which program of the file? Expected file.py:name, for example {text}:model"
        )
    found = _FILE.fullmatch(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if found is None:
            maker = Registry.installed().program(text)
            values = {**(data.settles(maker) if data else {}), **values}
            return Program(text, _made(text, maker, values), arguments=values)
        value = _in_file(Path(found["path"]), found["name"])
        if isinstance(value, type):
            return Program(text, _made(text, value, values), arguments=values)
        return Program(text, value, kwargs=values, arguments=values)


def _in_file(path: Path, name: str) -> Callable[..., Any]:
    module = _executed(path)
    if name not in module:
        defined = [n for n, v in module.items() if getattr(v, "__module__", None) == module["__name__"]]
        own = [n for n in defined if callable(module[n]) and not n.startswith("_")]
        told = ", ".join(own) or "no function or class"
        raise UnknownName(f"{path} has no {name!r}{near(name, own)} It defines {told}")
    if not callable(module[name]):
        kind = type(module[name]).__name__
        raise ProgramError(
            f"{path}:{name} is {kind}, which cannot be called; a program is a function or a module"
        )
    return module[name]


def _made(text: str, maker: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    parameters = _parameters(maker)
    for key in values:
        if parameters and key not in parameters:
            raise OptionError(
                f"--arg {key}: program {text!r} takes no {key!r}{near(key, parameters)} It takes "
                f"{', '.join(parameters) or 'nothing'}"
            )
    lacking = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and n not in values
    ]
    if lacking:
        raise OptionError(
            f"program {text!r} needs {', '.join(map(repr, lacking))}; give it: --arg {lacking[0]}=..."
        )
    try:
        return maker(**values)
    except TypeError as error:
        raise OptionError(
            f"program {text!r} cannot be made with "
            f"{', '.join(f'{k}={v!r}' for k, v in values.items()) or 'its defaults'}: {error}"
        ) from error


def _parameters(maker: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(maker).parameters
    except (TypeError, ValueError):
        return {}


def _executed(path: Path) -> dict[str, Any]:
    """The names that a file defines; its folder is importable, as under `python file.py`."""
    if not path.is_file():
        raise UnknownName(
            f"no file {path} is there; expected file.py:name, a program in a file, or a name of `pgen list "
            "programs`"
        )
    name = f"_pgen_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnknownName(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except PgenError:
        raise
    except Exception as error:
        raise ProgramError(f"{path} raised {type(error).__name__} while it was executed: {error}") from error
    return vars(module)


# --- data -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A data set, with the parts that it is divided into.

    Attributes:
        text: what the user wrote.
        parts: data by name of the part; one part called "all" where it is not divided.
        whole: what the reader gave.
    """

    text: str
    parts: Mapping[str, Any]
    whole: Any = None

    def settles(self, maker: Callable[..., Any]) -> dict[str, Any]:
        """The arguments of a program's maker that this data decides."""
        decide = getattr(self.whole, "options_for", None)
        return dict(decide(maker)) if callable(decide) else {}

    def part(self, name: str | None, *otherwise: str) -> tuple[str, Any]:
        """A part by name; where none is given, the first of `otherwise` that there is, else all there is.

        Raises:
            OptionError: there is no part of that name.
        """
        if name is None:
            name = next((o for o in (*otherwise, "all") if o in self.parts), next(iter(self.parts)))
        if name not in self.parts:
            raise OptionError(
                f"data {self.text!r} has no part {name!r}{near(name, self.parts)} It has "
                f"{', '.join(self.parts)}"
            )
        return name, self.parts[name]


def data_of(text: str, folder: Path | None = None) -> Source:
    """The data that a word on the command line means: a data set of the registry, or a file.

    Raises:
        UnknownName: no such data set or file.
        DataError: the file does not hold what it should.
    """
    reader = _READERS.get(Path(text).suffix.lower())
    if reader is None:
        if Path(text).is_file():
            raise DataError(f"{text}: expected a file that ends in {', '.join(_READERS)}")
        whole = Registry.installed().dataset(text)(folder)
        return Source(text, _parts(whole), whole)
    if not Path(text).is_file():
        raise UnknownName(
            f"no file {text} is there; expected a .npz, .csv or .safetensors file, or a name of `pgen list "
            "datasets`"
        )
    try:
        found = reader(Path(text))
    except PgenError:
        raise
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{text} cannot be read as {Path(text).suffix}: {error}") from error
    if not found:
        raise DataError(f"{text} holds no data")
    return Source(text, {"all": found})


def _parts(data: Any) -> dict[str, Any]:
    names = ("train", "valid", "test")
    if isinstance(data, Mapping):
        divided = [n for n in names if isinstance(data.get(n), Mapping)]
        return {n: data[n] for n in divided} if divided else {"all": data}
    divided = [n for n in names if getattr(data, n, None) is not None]
    return {n: getattr(data, n) for n in divided} if divided else {"all": data}


def _npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: _tensor(path, name, archive[name]) for name in archive.files}


def _csv(path: Path) -> dict[str, Tensor]:
    """Columns by name; `x[0]`, `x[1]`, ... make one vector per row. An empty field is missing (NaN)."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise DataError(
            f"{path}: expected a line of column names and a line of numbers for each row, and found "
            f"{len(rows)} lines"
        )
    head, body = [name.strip() for name in rows[0]], rows[1:]
    for i, row in enumerate(body, start=2):
        if len(row) != len(head):
            raise DataError(
                f"{path}, line {i}: {len(row)} fields, and {len(head)} columns are named ({', '.join(head)})"
            )
    columns = {name: _column(path, name, [row[i] for row in body]) for i, name in enumerate(head)}
    if len(columns) != len(head):
        raise DataError(f"{path}: two columns have the same name ({', '.join(head)})")
    found: dict[str, Tensor] = {}
    vectors: dict[str, list[Tensor]] = {}
    for name, column in columns.items():
        if (place := re.fullmatch(r"(.+)\[(\d+)\]", name)) is None:
            found[name] = column
        elif int(place[2]) != len(vectors.setdefault(place[1], [])):
            raise DataError(f"{path}: expected column {place[1]}[{len(vectors[place[1]])}] where {name} is")
        else:
            vectors[place[1]].append(column)
    return found | {name: torch.stack(parts, -1) for name, parts in vectors.items()}


def _column(path: Path, name: str, fields: list[str]) -> Tensor:
    try:
        values = [float(f) if f.strip() else float("nan") for f in fields]
    except ValueError as error:
        raise DataError(f"{path}: column {name!r} holds something else than numbers: {error}") from error
    whole = all(re.fullmatch(r"\s*[+-]?\d+\s*", f) for f in fields)
    return torch.tensor([int(v) for v in values] if whole else values)


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{path}: {name!r} holds {array.dtype}; expected numbers")
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float64)).to(torch.get_default_dtype())
    return torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else np.int64))


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npz": _npz,
    ".csv": _csv,
    ".safetensors": load_file,
}
