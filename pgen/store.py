"""Tensors and JSON in a folder that is either whole or refused.

`save` writes a new folder beside the old one, makes it durable, and swaps the two by renaming, so that a
crash at any moment leaves one that loads: the previous or the new. `load` checks every byte, and reads no
other file than the three of `pgen.archive`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pgen.archive import FILES, MANIFEST, decode, encode
from pgen.errors import CheckpointError


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON to the folder `path`, replacing what an earlier `save` left there.

    Args:
        path: the folder. Its parent is made if need be. An existing folder is replaced only if it is empty or
            holds nothing but the files of an earlier `save`.
        tensors: dense tensors of any device, layout and shape, by name; shared memory is written once per
            name.
        metadata: None, bool, int, finite float, str, and lists and string-keyed mappings of those.

    Raises:
        CheckpointError: something would not come back as it went in, the folder holds other files, or the
            system refused; what was there before is still there and still loads.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp() + "/fit"
        >>> save(folder, {"loc": torch.arange(3.0)}, {"program": "coin"})
        >>> tensors, metadata = load(folder)
        >>> tensors["loc"], metadata
        (tensor([0., 1., 2.]), {'program': 'coin'})
    """
    path = Path(os.path.abspath(path))
    contents = encode(tensors, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(path)
        _replace(path, contents)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written: {_reason(error)}; expected a folder that can be made "
            "and renamed beside the previous one. Nothing is half written: what was saved before still loads"
        ) from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors on the CPU, in the order they were given, and the metadata.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or not what it claims to be. The message names
            the file, what was expected there and what was found.
    """
    path = Path(os.path.abspath(path))
    while True:
        folder = _current(path)
        before = _identity(folder)
        try:
            _require_folder(folder)
            return decode(folder, partial(_read, folder))
        except CheckpointError:
            if _identity(_current(path)) == before:
                raise
        # Another process swapped in a newer checkpoint while this one was being read: read that one.


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything at `path` that `load` would try to read."""
    return os.path.lexists(_current(Path(os.path.abspath(path))))


# --- writing ------------------------------------------------------------------------------------------------


def _replace(path: Path, contents: Mapping[str, bytes]) -> None:
    aside = _aside(path)
    if os.path.lexists(path):
        _discard(aside)  # left by a crash after the second rename; after the first, it is the one that counts
    fresh = _own(path.with_name(f".{path.name}.new"))
    moved = False
    try:
        fresh.mkdir()
        for name, data in contents.items():
            _write(fresh / name, data)
        _sync(fresh)
        if os.path.lexists(path):
            os.rename(path, aside)
            moved = True
        os.rename(fresh, path)
        _sync(path.parent)
    except BaseException:
        if moved:
            _undo(path, aside, fresh)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _discard(aside)
    _sweep(path)


def _undo(path: Path, aside: Path, fresh: Path) -> None:
    """Put the previous folder back, as far as the system allows; else `load` finds it aside."""
    try:
        if os.path.lexists(path):
            os.rename(path, fresh)
        os.rename(aside, path)
    except OSError:
        pass


def _discard(folder: Path) -> None:
    """Delete a folder, if it is there, under a name of its own: no later one of this name is touched."""
    trash = _own(folder)
    try:
        os.rename(folder, trash)
    except OSError:
        return  # it is not there, or stays for the next save to try
    shutil.rmtree(trash, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Delete what killed writers left behind."""
    for left in path.parent.glob(f".{path.name}.*-*-*"):
        writer = left.name.split("-")[-2]
        if writer.isdigit() and not _is_alive(int(writer)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere, asking is a way of killing
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _refuse_strangers(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        target = os.path.realpath(path)
        raise CheckpointError(f"{path}: is a symbolic link; expected a folder: save to {target} itself")
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is a file; expected the name of a folder, new or left by an earlier save"
        )
    others = sorted(set(os.listdir(path)) - set(FILES))
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise CheckpointError(
            f"{path}: holds other files ({shown}), which saving would delete; expected a new folder, for "
            f"example {path / 'fit'}"
        )


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows does not open folders
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading ------------------------------------------------------------------------------------------------


def _own(folder: Path) -> Path:
    """A name that no other writer uses, and that tells whose it is."""
    return folder.with_name(f"{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _current(path: Path) -> Path:
    """The folder to read: `path`, or the previous one if a crash came between the two renames."""
    return path if os.path.lexists(path) or not os.path.lexists(_aside(path)) else _aside(path)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    try:
        found = os.lstat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _require_folder(folder: Path) -> None:
    try:
        mode = os.lstat(folder).st_mode
    except OSError as error:
        raise CheckpointError(
            f"{folder}: expected a folder with {', '.join(FILES)}; found {_reason(error)}"
        ) from error
    if stat.S_ISLNK(mode):
        target = os.path.realpath(folder)
        raise CheckpointError(f"{folder}: is a symbolic link, which is not followed; pass {target} itself")
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{folder}: expected a folder with {', '.join(FILES)}; found a file")


def _read(folder: Path, name: str, limit: int | None, size: int | None) -> bytes:
    """The bytes of a regular file; links, pipes and devices are refused before they are opened."""
    file = folder / name
    try:
        mode = os.lstat(file).st_mode
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "a folder or device"
            raise CheckpointError(f"{file}: expected a regular file; found {kind}, which is not read")
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as stream:
            found = os.fstat(handle).st_size
            if size is not None and found != size:
                change = "truncated" if found < size else "longer than it was"
                raise CheckpointError(
                    f"{file}: {change}: expected {size} bytes (from {MANIFEST}), found {found}"
                )
            if limit is not None and found > limit:
                raise CheckpointError(f"{file}: too large: expected at most {limit} bytes, found {found}")
            data = stream.read(found + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; expected {', '.join(FILES)} in {file.parent}") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {_reason(error)}") from error
    if len(data) != found:
        raise CheckpointError(f"{file}: changed while it was read: expected {found} bytes, found {len(data)}")
    return data


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return f"{error.strerror or error} ({name})"
