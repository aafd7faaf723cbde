"""What a saved folder holds, as bytes: tensors and JSON encoded, and decoded with every byte accounted for.

    tensors.safetensors   the tensors
    pgen.json             format, version, names of the tensors in order, and whatever JSON the caller gave
    manifest.json         size and SHA-256 of the other two (safetensors itself has no checksum)

Nothing in them is executed: no pickle, no import path. `pgen.store` puts them on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from pgen.errors import CheckpointError

VERSION = 1
TENSORS, METADATA, MANIFEST = "tensors.safetensors", "pgen.json", "manifest.json"
FILES = (TENSORS, METADATA, MANIFEST)
MAX_ENTRIES = 100_000
"""Tensors in one file: more is a header made to exhaust the reader."""
MAX_HEADER = 64 * 2**20
MAX_JSON = 64 * 2**20
MAX_MANIFEST = 64 * 2**10
MAX_DEPTH = 64

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_UNSIGNED = (torch.uint64, torch.uint32, torch.uint16, torch.uint8)
DTYPES = frozenset({torch.bool, *_FLOATS, *_SIGNED, *_UNSIGNED})

Reader = Callable[[str, int | None, int | None], bytes]
"""From the name of a file, the largest size allowed and the size expected, to its bytes."""


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of every file.

    Raises:
        CheckpointError: something that would not come back as it went in.
    """
    if len(tensors) > MAX_ENTRIES:
        raise CheckpointError(f"{TENSORS}: given {len(tensors)} tensors; expected at most {MAX_ENTRIES}")
    if not isinstance(metadata, Mapping):
        kind = type(metadata).__name__
        raise CheckpointError(f"{METADATA}: metadata is {kind}; expected a mapping with string keys")
    packed = safetensors.torch.save({name: _plain(name, tensor) for name, tensor in tensors.items()})
    given = _jsonable(metadata, "metadata")
    described = {"format": "pgen", "version": VERSION, "names": list(tensors), "metadata": given}
    contents = {TENSORS: packed, METADATA: _canonical(described)}
    if len(contents[METADATA]) > MAX_JSON:
        raise CheckpointError(f"{METADATA}: {len(contents[METADATA])} bytes; expected at most {MAX_JSON}")
    files = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in contents.items()}
    return {**contents, MANIFEST: _canonical({"files": files, "version": VERSION})}


def decode(folder: Path, read: Reader) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and metadata.

    Args:
        folder: named in errors.
        read: gives the bytes of a file; only names in `FILES` are asked for.

    Raises:
        CheckpointError: the bytes are not exactly those that `encode` made.
    """
    contents = {}
    for name, (size, digest) in _manifest(folder / MANIFEST, read(MANIFEST, MAX_MANIFEST, None)).items():
        data = read(name, MAX_JSON if name == METADATA else None, size)
        if _digest(data) != digest:
            raise CheckpointError(
                f"{folder / name}: altered: expected SHA-256 {_glimpse(digest)} (from {MANIFEST}), found "
                f"{_digest(data)}"
            )
        contents[name] = data
    names, metadata = _described(folder / METADATA, contents[METADATA])
    tensors = _tensors(folder / TENSORS, contents[TENSORS])
    if len(names) != len(tensors) or set(names) != set(tensors):
        found = _glimpse(list(tensors))
        raise CheckpointError(f"{folder / TENSORS}: expected the tensors {_glimpse(names)}; found {found}")
    return {name: tensors[name] for name in names}, metadata


# --- in -----------------------------------------------------------------------------------------------------


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The values alone: on the CPU, contiguous, in memory of their own."""
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(
            f"{TENSORS}: {name!r} cannot name a tensor; expected a string, not '__metadata__'"
        )
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise CheckpointError(f"{TENSORS}: {name!r} is {kind}; expected a tensor (numbers go into metadata)")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"{TENSORS}: {name!r} is not dense ({tensor.layout}, {tensor.device}); save its dense values"
        )
    if tensor.dtype not in DTYPES:
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in DTYPES))
        raise CheckpointError(f"{TENSORS}: {name!r} is {tensor.dtype}; expected one of {known}")
    return tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True).contiguous()


def _jsonable(value: Any, where: str, depth: int = 0) -> Any:
    """The value as JSON gives it back, or an error: JSON changes keys and NaN in silence."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{METADATA}: {_glimpse(where)} is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(
                f"{METADATA}: {where} is {value}, which JSON cannot hold; use None, or a tensor"
            )
        return value
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise CheckpointError(f"{METADATA}: {where} has the key {wrong[0]!r}; expected strings")
        return {key: _jsonable(v, f"{where}[{key!r}]", depth + 1) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    raise CheckpointError(
        f"{METADATA}: {where} is {type(value).__name__}; expected None, bool, int, float, str, list or "
        "mapping (tensors go among the tensors)"
    )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- out ----------------------------------------------------------------------------------------------------


def _json(file: Path, raw: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected JSON; found {len(raw)} bytes that are not ({error})"
        ) from error


def _manifest(file: Path, raw: bytes) -> dict[str, tuple[int, str]]:
    """Size and digest of every other file."""
    manifest = _json(file, raw)
    if not isinstance(manifest, dict) or set(manifest) != {"files", "version"}:
        raise CheckpointError(f"{file}: expected the keys files and version; found {_glimpse(manifest)}")
    _require_version(file, manifest["version"])
    files = manifest["files"]
    if not isinstance(files, dict) or set(files) != {TENSORS, METADATA}:
        found = _glimpse(files)
        raise CheckpointError(f"{file}: expected entries for {TENSORS} and {METADATA} alone; found {found}")
    expected = {}
    for name, entry in files.items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise CheckpointError(f"{file}: expected bytes and sha256 of {name}; found {_glimpse(entry)}")
        expected[name] = (size, digest)
    if _canonical(manifest) != raw:
        raise CheckpointError(f"{file}: altered: expected the spelling that pgen writes, found another")
    return expected


def _described(file: Path, raw: bytes) -> tuple[list[str], dict[str, Any]]:
    """The names of the tensors, in the order they were given, and the metadata."""
    described = _json(file, raw)
    if not isinstance(described, dict) or set(described) != {"format", "version", "names", "metadata"}:
        found = _glimpse(described)
        raise CheckpointError(f"{file}: expected the keys format, version, names and metadata; found {found}")
    _require_version(file, described["version"])
    names, metadata = described["names"], described["metadata"]
    if described["format"] != "pgen" or not isinstance(metadata, dict):
        raise CheckpointError(f'{file}: expected format "pgen" and a mapping; found {_glimpse(described)}')
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: expected a list of names of tensors; found {_glimpse(names)}")
    return names, metadata


def _require_version(file: Path, version: Any) -> None:
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{file}: expected format version {VERSION}, found {version}: upgrade pgen to read it"
        )
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"{file}: expected format version {VERSION}, found {_glimpse(version)}")


def _tensors(file: Path, data: bytes) -> dict[str, Tensor]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise CheckpointError(
            f"{file}: expected a safetensors header within the file and of at most {MAX_HEADER} bytes; "
            f"found a length of {length} in a file of {len(data)}"
        )
    header = _json(file, data[8 : 8 + length])
    if not isinstance(header, dict) or len(header) > MAX_ENTRIES:
        raise CheckpointError(
            f"{file}: expected a header of at most {MAX_ENTRIES} tensors; found {_glimpse(header)}"
        )
    try:
        return safetensors.torch.load(data)
    except (
        Exception
    ) as error:  # SafetensorError, KeyError for an unknown dtype, ValueError, RuntimeError, ...
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: expected tensors in the safetensors format; {found}") from error


def _glimpse(value: Any) -> str:
    many = isinstance(value, (dict, list)) and len(value) > 10
    shown = f"{type(value).__name__} of {len(value)}" if many else repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."
