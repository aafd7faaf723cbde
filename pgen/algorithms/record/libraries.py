"""Compiled libraries on disk, where nobody else can put any.

To load a library is to run it. So the folder and every file in it have to belong to the user, and to be closed to the
writing of others; and a file's name ends in the checksum of its contents, so that one that was cut off, or changed, is
not loaded but made again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Libraries:
    """A folder of libraries.

    Attributes:
        folder: is made where it is not there, for this user alone.
    """

    folder: Path

    @staticmethod
    def at(folder: Path | None) -> Libraries:
        """In a folder; by default `pgen/compiled` in the user's cache directory.

        Raises:
            RuntimeError: others could put libraries there.
        """
        if folder is None:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(home) / "pgen" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(folder.stat()):
            raise RuntimeError(
                f"{folder} belongs to another user, or others may write to it, who could put code there that this user "
                f"would run; expected a folder of this user's alone, for example after: chmod go-w {folder}"
            )
        return Libraries(folder)

    def find(self, name: str) -> Path | None:
        """The library of a name, if it is there and whole; what is not whole is removed."""
        for path in sorted(self.folder.glob(f"{name}-*.so")):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and _is_own(status) and path.name == _named(name, path):
                return path
            path.unlink(missing_ok=True)
        return None

    def keep(self, name: str, made: Path) -> Path:
        """Take in a library, which lies on the same disk, in one step: nobody ever sees half of it."""
        path = self.folder / _named(name, made)
        made.chmod(0o600)
        os.replace(made, path)
        return path


def _named(name: str, path: Path) -> str:
    return f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()}.so"


def _is_own(status: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and only this user can change it."""
    if not hasattr(os, "geteuid"):  # users are told apart in other ways
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS
