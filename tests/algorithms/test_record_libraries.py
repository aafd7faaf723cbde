"""Libraries on disk: nobody else's, nothing that was cut off or changed, and nothing half-written is ever loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pgen.algorithms.record.libraries import Libraries

unix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner and mode here")


def kept(folder: Path, contents: bytes = b"code") -> Path:
    made = folder / "made"
    made.write_bytes(contents)
    return Libraries(folder).keep("name", made)


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    libraries = Libraries.at(tmp_path)
    assert libraries.find("name") is None
    path = kept(tmp_path)
    assert libraries.find("name") == path
    assert libraries.find("nam") is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_name_is_found_though_it_was_made_twice(tmp_path: Path) -> None:
    paths = {kept(tmp_path, b"one"), kept(tmp_path, b"other")}
    assert Libraries(tmp_path).find("name") in paths


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"Code"),
        lambda path: path.rename(path.with_name(f"name-{0:064x}.so")),
    ],
    ids=["cut off", "empty", "changed", "of another name"],
)
def test_what_is_not_whole_is_removed(spoil, tmp_path: Path) -> None:
    spoil(kept(tmp_path))
    assert Libraries(tmp_path).find("name") is None
    assert not list(tmp_path.iterdir())


@unix
def test_a_file_that_others_can_change_is_removed(tmp_path: Path) -> None:
    path = kept(tmp_path)
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o620)
    assert Libraries(tmp_path).find("name") is None
    assert not path.exists()


@unix
def test_a_link_to_elsewhere_is_removed(tmp_path: Path) -> None:
    path = kept(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert Libraries(tmp_path).find("name") is None
    assert elsewhere.exists()


@unix
def test_what_another_user_put_there_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, me = kept(tmp_path), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert Libraries(tmp_path).find("name") is None
    assert not path.exists()
    with pytest.raises(RuntimeError, match="another user"):
        Libraries.at(tmp_path)


@unix
def test_a_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    libraries = Libraries.at(tmp_path / "some" / "where")
    assert libraries.folder.stat().st_mode & 0o777 == 0o700
    libraries.folder.chmod(0o755)
    assert Libraries.at(libraries.folder) == libraries  # reading does no harm
    libraries.folder.chmod(0o770)
    with pytest.raises(RuntimeError, match="chmod go-w"):
        Libraries.at(libraries.folder)


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Libraries.at(None).folder == tmp_path / "cache" / "pgen" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert Libraries.at(None).folder == tmp_path / ".cache" / "pgen" / "compiled"
