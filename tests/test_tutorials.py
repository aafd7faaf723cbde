"""The tutorials run as written, in a process of their own, and end in a claim about a number."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_as_written(path, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before  # it leaves no files


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_is_short_and_begins_with_mathematics(path):
    text = path.read_text(encoding="utf-8")
    cells = text.split("# %%")[1:]
    assert len(text.splitlines()) < 150
    assert cells[0].startswith(" [markdown]\n# # ")
    assert "$$" in cells[0]
    assert isinstance(ast.parse(text).body[-1], ast.Assert)


def test_there_are_tutorials():
    assert [p.stem for p in TUTORIALS][:3] == ["01_one_program", "02_vae", "03_your_own_backend"]
